"""What --template_args and lines of a prompts file give to a chat template, beside transformers:
its variables, tools and documents, and which of several templates it is."""

import json
import shutil

import pytest
from helpers import SPECIAL, train_bpe, write_json
from test_cli import (  # noqa: F401
    QUICK,
    copy,
    exit_status,
    refuse,
    run_json,
    talk,
    tiny,
    write_lines,
)

from scripts import templates
from scripts.checkpoint import Refusal
from scripts.requests import message
from scripts.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is <there> & 'now', in °C",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["place"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {}}}
PAGES = [{"title": "Foxes", "text": "They jump."}, {"title": "Dogs", "text": "They are lazy."}]
TALK = [message("system", "Be brief."), message("user", "How is it in Zürich?")]
CALL = {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}
LONG_TALK = [
    *TALK,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "weather", "content": '{"celsius": 21.5}'},
    {"role": "assistant", "content": "<think>\n21.5?\n</think>\n\nWarm."},
    message("user", "And tomorrow?"),
]

# In the style of Qwen3: thoughts that are left out of old answers, or not to be had at all.
THINKING = """
{%- if tools %}
    {{- '<|system|>' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|end|>" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|system|>' + messages[0].content + '<|end|>' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, seeking=true) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.seeking and m.role == 'user' and m.content is string %}
        {%- set ns.seeking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|' + m.role + '|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|assistant|>' + content }}
        {%- for call in m.tool_calls or [] %}
            {%- if call.function %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '\\n<call>{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson if call.arguments is not string else call.arguments }}
            {{- '}</call>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|user|><response>' + m.content + '</response><|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# In the style of Llama 3.1: several variables with defaults, one of them the date of today.
TOOLS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|end|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("no first message to put tools in") }}
    {%- endif %}
    {{- '<|user|>' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
    {{- first + "<|end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one call at once") }}
        {%- endif %}
        {{- '<|assistant|>' + (message.tool_calls[0].function | tojson(sort_keys=true)) }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- '<|user|>' + (message.content | tojson(ensure_ascii=true)) }}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""

# In the style of Command R: pages to answer from.
PAGED = """{{ bos_token }}{% for d in documents or [] %}
Document: {{ loop.index0 }}
{% for key, value in d.items() %}
{{ key }}: {{ value }}
{% endfor %}
{% endfor %}
{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}
{{ citation_mode | default('accurate') }}{{ numbers }}{{ 'x' if flag else 'y' }}
{{ nested.a[1].b if nested is defined }}"""

CASES = {
    "thinking, nothing given": (THINKING, {}),
    "thinking, off": (THINKING, {"enable_thinking": False}),
    "thinking, on": (THINKING, {"enable_thinking": True}),
    "thinking, tools": (THINKING, {"tools": [WEATHER, TIME], "enable_thinking": False}),
    "thinking, no tools": (THINKING, {"tools": []}),
    "thinking, no prompt": (THINKING, {"add_generation_prompt": False}),
    "tools, a date": (TOOLS, {"date_string": "26 Jul 2024"}),
    "tools, today": (TOOLS, {}),
    "tools, two": (TOOLS, {"tools": [WEATHER, TIME], "date_string": "x"}),
    "tools, in the system": (TOOLS, {"tools": [TIME], "tools_in_user_message": False}),
    "tools, custom": (TOOLS, {"custom_tools": [WEATHER], "date_string": ""}),
    "tools, built in": (TOOLS, {"builtin_tools": ["brave_search", "code_interpreter"]}),
    "documents": (PAGED, {"documents": PAGES, "citation_mode": "fast", "flag": True}),
    "no documents": (PAGED, {"documents": None}),
    "values": (PAGED, {"numbers": [1, -2.5, 1e300, None], "nested": {"a": [0, {"b": "é🙂"}]}}),
    "odd names": (PAGED, {"": 1, "a b": 2, "loop": 3, "caller": 4, "flag": [0]}),
}


def write_tokenizer(directory, template):
    """The files that a tokenizer with a chat template, or a list of them, needs."""
    train_bpe().save(str(directory / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4], "image_token": "<x>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(directory / "tokenizer_config.json", settings | {"chat_template": template})


def texts(directory, talk, given):  # noqa: F811
    """Of a conversation with those arguments, ours and that of transformers."""
    from transformers import AutoTokenizer

    ours = Tokenizer(directory)
    reference = AutoTokenizer.from_pretrained(directory)
    options = {"add_generation_prompt": True} | given
    wanted = reference.apply_chat_template(talk, tokenize=False, **options)
    ids = reference.apply_chat_template(talk, tokenize=True, return_dict=False, **options)
    assert ours.encode_chat(talk, given) == ids
    return templates.render(ours.template, talk, ours.kind.named, given), wanted


@pytest.mark.parametrize("template, given", CASES.values(), ids=CASES)
def test_text_is_that_of_transformers(tmp_path, template, given):
    write_tokenizer(tmp_path, template)
    for conversation in (TALK, TALK[1:], LONG_TALK):
        found, wanted = texts(tmp_path, conversation, given)
        assert found == wanted


def test_arguments_change_the_text(tmp_path):
    """What would not be seen above if both were deaf."""
    found = {}
    for name, (template, given) in CASES.items():
        write_tokenizer(tmp_path, template)
        found[name] = Tokenizer(tmp_path).encode_chat(TALK, given)
    assert found["thinking, nothing given"] == found["thinking, on"] == found["thinking, no tools"]
    same = 2  # as those are
    assert len(set(map(tuple, found.values()))) == len(CASES) - same


def test_default_model(default_checkpoint):
    given = {"add_generation_prompt": False, "tools": [TIME], "enable_thinking": False}
    for some in ({}, given):
        found, wanted = texts(default_checkpoint, TALK, some)
        assert found == wanted and found.endswith("assistant\n") == (not some)


# ---- one of several

NAMED = {"default": "fox {{ x }}", "tool_use": "jumps {{ tools | length }}", "rag": "over {{ x }}"}
LISTED = [{"name": name, "template": text} for name, text in NAMED.items()]
CHOICES = [
    ({}, "fox "),
    ({"x": 1}, "fox 1"),
    ({"tools": [TIME]}, "jumps 1"),
    ({"tools": []}, "jumps 0"),
    ({"tools": None, "x": 1}, "fox 1"),
    ({"chat_template": "rag", "x": 1}, "over 1"),
    ({"chat_template": "rag", "tools": [TIME], "x": 1}, "over 1"),
    ({"chat_template": "default", "tools": [TIME], "x": 1}, "fox 1"),
    ({"chat_template": None, "tools": [TIME]}, "jumps 1"),
]


@pytest.mark.parametrize("place", ["settings", "folder"])
@pytest.mark.parametrize("given, wanted", CHOICES)
def test_a_template_is_chosen(tmp_path, place, given, wanted):
    """By its name, or because there are tools, from the settings or from files."""
    write_tokenizer(tmp_path, LISTED)
    if place == "folder":
        write_tokenizer(tmp_path, [{"name": "default", "template": "not this one"}])
        folder = tmp_path / "additional_chat_templates"
        folder.mkdir()
        for name, text in NAMED.items():
            (folder / f"{name}.jinja").write_text(text)
        (folder / "default.jinja").rename(tmp_path / "chat_template.jinja")
    assert texts(tmp_path, TALK, given) == (wanted, wanted)


def test_files_beside_settings(tmp_path):
    """Where no file is the default, the settings have it; where one is, nothing else of theirs
    counts."""
    write_tokenizer(tmp_path, LISTED)
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("lazy")
    assert Tokenizer(tmp_path).template == NAMED | {"rag": "lazy"}
    (tmp_path / "chat_template.jinja").write_text("dog")
    assert Tokenizer(tmp_path).template == {"default": "dog", "rag": "lazy"}
    assert texts(tmp_path, TALK, {"tools": [TIME]}) == ("dog", "dog")
    (folder / "._rag.jinja").write_bytes(b"\xff")  # which some systems leave beside files
    assert Tokenizer(tmp_path).template == {"default": "dog", "rag": "lazy"}


@pytest.mark.parametrize("template", [LISTED, "fox"], ids=["several", "one"])
def test_no_template_of_that_name(tmp_path, template):
    write_tokenizer(tmp_path, template)
    with pytest.raises(Refusal, match="its names are default.* expected one called other"):
        Tokenizer(tmp_path).encode_chat(TALK, {"chat_template": "other"})


@pytest.mark.parametrize("template", [None, "", [], {}])
def test_no_template_at_all(tmp_path, template):
    write_tokenizer(tmp_path, template)
    with pytest.raises(Refusal, match="there is none"):
        Tokenizer(tmp_path).encode_chat(TALK, {"chat_template": "rag"})


def test_tokens_of_the_checkpoint_cannot_be_set(tmp_path):
    write_tokenizer(tmp_path, "{{ image_token }}{{ other }}")
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(Refusal, match="image_token cannot be set"):
        tokenizer.encode_chat(TALK, {"image_token": "y"})
    assert templates.render(tokenizer.template, TALK, tokenizer.kind.named) == "<x>"


# ---- the flag, and lines of a file

WRONG = {
    '{"a": 1': "expected a JSON object: Expecting",
    "": "expected a JSON object",
    "[]": "it is [], expected a JSON object",
    "null": "it is None, expected a JSON object",
    '{"a": NaN}': "finite numbers",
    '{"a": [-Infinity]}': "finite numbers",
    '{"a": 1e999}': "finite numbers",
    '{"a": "\\ud800"}': "surrogates",
    '{"\\udfff": 1}': "surrogates",
    '{"a": "\udcff"}': "expected a JSON object: 'utf-8'",
    '{"a": ' + 9999 * "[": "recursion",
    '{"tools": ' + 300 * "[" + 300 * "]" + "}": "tools is [[",
    '{"a": ' + 5000 * "7" + "}": "expected a JSON object: Exceeds the limit",
    '{"messages": []}': "messages cannot be set",
    '{"bos_token": "x", "pad_token": "y"}': "bos_token cannot be set",
    '{"raise_exception": 0}': "raise_exception cannot be set",
    '{"continue_final_message": true}': "continue_final_message cannot be set",
    '{"tools": {"name": "f"}}': "tools is {'name': 'f'}, expected a list of objects",
    '{"tools": ["f"]}': "tools is ['f'], expected a list of objects",
    '{"documents": "text"}': "documents is 'text', expected a list of objects",
    '{"chat_template": ["rag"]}': "chat_template is ['rag'], expected the name",
    '{"add_generation_prompt": 0}': "add_generation_prompt is 0, expected true or false",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30])
def test_wrong_arguments(refuse, tiny, tmp_path, text):  # noqa: F811
    """Of the flag, and, where a line can have them, of a file, which is named with the line."""
    flags = ["--checkpoint_path", tiny, "--chat"]
    error = refuse(*flags, "--template_args", text)
    assert error.startswith("error: argument --template_args: ") and WRONG[text] in error
    path = tmp_path / "p.jsonl"
    line = f'{{"prompt": "a"}}\n{{"prompt": "b", "template_args": {text}}}\n'
    path.write_bytes(line.encode(errors="surrogateescape"))
    error = refuse(*flags, "--prompts_file", path)
    assert "line 2" in error
    assert WRONG[text].rpartition(": ")[2][:40] in error or not text.startswith("{")


@pytest.mark.parametrize("given", ["{}", '{"a": 1}'])
def test_arguments_need_a_chat(refuse, tiny, tmp_path, given):  # noqa: F811
    flags = ["--checkpoint_path", tiny, "--prompt", "fox"]
    assert "--template_args needs --chat or" in refuse(*flags, "--template_args", given)
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "template_args": json.loads(given)})
    assert "template_args need --chat" in refuse(*flags[:2], "--prompts_file", path)


def test_arguments_of_any_length(refuse, copy, tmp_path):  # noqa: F811
    """Far too many are refused before anybody renders them, long ones as any long text is."""
    (copy / "chat_template.jinja").write_text("{{ x }}")
    for length, word in ((10**6, "too long"), (2 * 10**7, "expected 10000000 at most")):
        line = {"prompt": "a", "template_args": {"x": length * "a"}}
        path = write_lines(tmp_path / "p.jsonl", line)
        error = refuse("--checkpoint_path", copy, "--chat", "--prompts_file", path)
        assert word in error and "line 1" in error


@pytest.fixture
def show(copy, capsys):  # noqa: F811
    """Run it with a template that prints its arguments; returns the prompts as the model has
    them."""
    text = "{{ a }} {{ b }} {{ tools | length if tools else tools }} {{ messages[-1].content }}"
    (copy / "chat_template.jinja").write_text(text)
    decode = train_bpe().decode

    def run(*flags):
        argv = ["--checkpoint_path", copy, "--chat", *QUICK, *flags]
        return [decode(c["prompt_ids"]) for c in run_json(capsys, *argv)[0]]

    return run


def test_a_line_goes_before_the_flag(show, tmp_path):
    """Name by name; no line knows of another."""
    lines = [
        {"prompt": "fox"},
        {"prompt": "dog", "template_args": {"a": 7}},
        {"messages": TALK[1:], "template_args": {"b": None, "tools": [WEATHER, TIME]}},
        {"prompt": "12", "template_args": {}},
    ]
    path = write_lines(tmp_path / "p.jsonl", *lines)
    flag = ["--template_args", json.dumps({"a": 1, "b": "hé", "tools": [TIME]})]
    question = TALK[-1]["content"]
    wanted = ["1 hé 1 fox", "7 hé 1 dog", f"1 None 2 {question}", "1 hé 1 12"]
    assert show("--prompts_file", path, *flag) == wanted
    wanted = ["  None fox", "7  None dog", f" None 2 {question}", "  None 12"]
    assert show("--prompts_file", path) == wanted
    assert show("--prompt", "fox", *flag) == ["1 hé 1 fox"]


def test_in_a_conversation(talk, tiny, tmp_path):  # noqa: F811
    """Each turn has them."""
    directory = shutil.copytree(tiny, tmp_path / "talking")
    write_tokenizer(directory, THINKING)
    lines = ["the dog", "fox"]
    flags = ["--checkpoint_path", str(directory), "--template_args"]
    fed, _ = talk(lines, *flags, '{"enable_thinking": false}')
    assert len(fed) == 2
    assert all(text.endswith("<|assistant|><think>\n\n</think>\n\n") for text in fed)
    fed, _ = talk(lines, *flags, "{}")
    assert all(text.endswith("<|assistant|>") for text in fed)
