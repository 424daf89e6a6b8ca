"""What strangers may give: templates that do not end, what is no file where one is expected, and
texts of any length. Each ends soon, in one line."""

import contextlib
import json
import os
import runpy
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import CONTEXT, CORPUS, train_bpe, write_checkpoint, write_json

from scripts import chat, checkpoint, files, machine, templates
from scripts.files import Refusal
from scripts.loading import read_shape
from scripts.requests import message
from scripts.templates import Renderer
from scripts.tokenizer import Tokenizer

SCRIPT = str(Path(__file__).resolve().parent.parent / "generate.py")
FOX = [message("user", "fox")]
QUICK = ["--max_new_tokens", "2", "--precision", "fp32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def generate(monkeypatch, capsys):
    """Run generate.py as a script, but in this process: its status, its lines on standard output
    and on standard error."""

    def read_bandwidth(device):
        return 12e9

    monkeypatch.setattr(machine, "read_bandwidth", read_bandwidth)

    def run(*argv):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [SCRIPT, *map(str, argv), *QUICK])
            patch.setattr(sys, "stdout", sys.stdout)  # to be put back
            runpy.run_path(SCRIPT, run_name="__main__")
        out, err = capsys.readouterr()
        return end.value.code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def refuse(generate):
    """Run it, which must end soon with status 2 and one line, returned."""

    def run(*argv):
        began = time.monotonic()
        status, out, err = generate(*argv)
        assert (status, out, len(err)) == (2, [], 1), err
        assert err[0].startswith("error: ") and time.monotonic() - began < 10
        return err[0]

    return run


# ---- templates


@pytest.fixture
def one_second(monkeypatch):
    """As much time as a template has."""
    Renderer.stop()
    monkeypatch.setattr(templates, "SECONDS", 1)
    yield
    Renderer.stop()


def again(change, start="'a'"):
    """A template that changes n.x again and again."""
    loop = f"{{% for i in range(99) %}}{{% set n.x = {change} %}}{{% endfor %}}"
    return f"{{% set n = namespace(x={start}) %}}{loop}{{{{ n.x | string | length }}}}"


LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
ENDLESS = {
    "loops": 3 * LOOP + 3 * END,
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a block within itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "it includes itself": "{% include 'chat_template.jinja' %}",
    "text that doubles by ~": again("n.x ~ n.x"),
    "text that doubles by *": again("n.x * 2"),
    "text that doubles by replace": again("n.x | replace('a', 'aaaa')"),
    "a number of all digits": "{{ 7 ** (10 ** 10) }}",
    "a number that is squared": again("n.x * n.x", start="7"),
    "lists within lists that are compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in "
    "range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "lists within lists that are written": again("[n.x, n.x]"),
    "center": "{{ 'a' | center(10 ** 11) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "indent": "{{ 'a' | indent(10 ** 11, first=true) }}",
    "batch": "{{ [1] | batch(10 ** 11, 1) | list | length }}",
    "slice": "{{ [1] | slice(10 ** 11) | list | length }}",
    "lipsum": "{{ lipsum(10 ** 9) }}",
    "tojson": "{{ {'a': 1} | tojson(indent=10 ** 11) }}",
    "what it prints": f"{LOOP}{{{{ 'a' * 99999 }}}}{END}",
    "brackets": f"{{{{ {50_000 * '('}1{50_000 * ')'} }}}}",
    "signs": f"{{{{ {50_000 * '-'}1 }}}}",
    "conditions": 20_000 * "{% if 1 %}",
    "a template of any length": 10_000_000 * "a",
}


# A second each, of ways to grow of which others are tried.
GROWING = ("text that doubles by *", "text that doubles by replace", "a number that is squared")
GROWING += ("lists within lists that are written", "slice", "lipsum")
ENDLESS_CASES = [
    pytest.param(template, id=name, marks=[pytest.mark.slow] * (name in GROWING))
    for name, template in ENDLESS.items()
]


@pytest.mark.parametrize("template", ENDLESS_CASES)
def test_a_template_that_does_not_end(tiny, one_second, template):
    tokenizer = Tokenizer(tiny)
    tokenizer.template = template
    began = time.monotonic()
    with pytest.raises(Refusal, match="the chat template failed: ."):
        tokenizer.encode_chat(FOX)
    assert time.monotonic() - began < 5
    tokenizer.template = "{{ messages[0].content }}"
    assert tokenizer.encode_chat(FOX) == train_bpe().encode("fox").ids, "others go on"


def test_a_template_that_does_not_end_as_a_command(refuse, copy, one_second):
    (copy / "chat_template.jinja").write_text(ENDLESS["loops"])
    error = refuse("--checkpoint_path", copy, "--chat", "--prompt", "fox")
    assert "the chat template failed: it did not end in 1 second" in error


def test_the_process_of_templates_is_kept():
    """It is started once, and again where somebody has ended it; a process that is forked starts
    one of its own."""
    assert templates.render("{{ 1 }}", [], {}) == "1"
    process = Renderer.current.process
    assert templates.render("{{ 2 }}", [], {}) == "2"
    assert Renderer.current.process is process
    child = os.fork()
    if child == 0:
        is_right = templates.render("{{ 3 }}", [], {}) == "3"
        Renderer.stop()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert templates.render("{{ 4 }}", [], {}) == "4" and process.poll() is None
    process.kill()
    with contextlib.suppress(Refusal, OSError):
        templates.render("{{ 5 }}", [], {})
    assert templates.render("{{ 6 }}", [], {}) == "6"
    Renderer.stop()
    assert process.poll() is not None


def test_an_answer_that_nobody_has_read_is_not_taken_for_another(monkeypatch):
    def interrupt(line):
        raise KeyboardInterrupt

    assert templates.render("{{ 1 }}", [], {}) == "1"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(templates.json, "loads", interrupt)
        templates.render("{{ 2 }}", [], {})
    assert templates.render("{{ 3 }}", [], {}) == "3"


# ---- expressions of a tokenizer

EXPRESSIONS = ["(a+)+b", "(a|aa)+$x", "(a|a)+b"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_that_takes_too_long(copy, capfd, expression):
    """The package that meets it says so in pages, of which nothing is left."""
    content = json.loads((copy / "tokenizer.json").read_text())
    words = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    content["pre_tokenizer"] = words | {"invert": False}
    write_json(copy / "tokenizer.json", content)
    with pytest.raises(Refusal, match="the package tokenizers cannot do that"):
        Tokenizer(copy).encode(60 * "a")
    assert capfd.readouterr().err == ""


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
WIDENING = {"type": "Replace", "pattern": {"Regex": "."}, "content": 5000 * "a"}
GROWING = {
    "a normalizer": {"normalizer": {"type": "Sequence", "normalizers": 60 * [DOUBLING]}},
    "a decoder": {"decoder": {"type": "Sequence", "decoders": 60 * [DOUBLING]}},
    "one alone": {"normalizer": WIDENING},
}


@pytest.mark.parametrize("parts", GROWING.values(), ids=GROWING)
def test_a_tokenizer_that_makes_texts_long(refuse, copy, parts):
    content = json.loads((copy / "tokenizer.json").read_text()) | parts
    write_json(copy / "tokenizer.json", content)
    assert "tokenizer.json: what replaces text" in refuse("--checkpoint_path", copy)


# ---- texts of any length

LONG = {
    "words": "fox jumps over ",
    "letters": "a",
    "blanks": " ",
    "other letters": "你好",
    "one special token after the other": "<|end|>",
}


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("part", LONG.values(), ids=LONG)
def test_a_prompt_of_any_length(refuse, tiny, tmp_path, part, chat):
    """It is refused without being encoded as a whole."""
    text = (10_000_000 // len(part)) * part
    flags = ["--chat"] if chat else []
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "fox"}) + "\n" + json.dumps({"prompt": text}))
    for prompts in (["--prompt", text], ["--prompts_file", path]):
        error = refuse("--checkpoint_path", tiny, *flags, *prompts)
        assert f"is too long, expected 1 to {CONTEXT} tokens" in error
        assert len(error) < 150 + len(str(path))


def test_a_system_prompt_of_any_length(refuse, tiny):
    text = 1_000_000 * "fox jumps "
    error = refuse("--checkpoint_path", tiny, "--chat", "--system", text, "--prompt", "fox")
    assert f"is too long, expected 1 to {CONTEXT} tokens" in error and len(error) < 200


def test_a_text_that_fits_is_not_refused(tiny):
    """However many characters it has."""
    tokenizer = Tokenizer(tiny)
    tokenizer.check_length(CORPUS[0], 20)
    tokenizer.kind = SimpleNamespace(encode=lambda text, bos: [1] * (len(text) // 1000))
    tokenizer.check_length(100_000 * "a", 100)
    with pytest.raises(Refusal, match="100000 characters"):
        tokenizer.check_length(100_000 * "a", 10)


def test_a_conversation_goes_on_after_a_long_line(tiny, capsys):
    engine = SimpleNamespace(length=CONTEXT)
    maker = SimpleNamespace(tokenizer=Tokenizer(tiny), context=CONTEXT, template_args={})
    assert chat.answer(engine, FOX, 1_000_000 * "fox ", maker) == FOX
    assert "is too long" in (error := capsys.readouterr().err) and "/clear starts over" in error
    assert chat.answer(engine, FOX, 300 * "fox ", maker) == FOX
    assert "do not fit the context of 256: /clear starts over" in capsys.readouterr().err


# ---- what is no file


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(os.path.relpath(path))


def link_to(target):
    return lambda path: path.symlink_to(target)


KINDS = {
    "a pipe": (make_pipe, "is a pipe"),
    "a socket": (make_socket, "is a socket"),
    "a directory": (Path.mkdir, "is a directory"),
    "a device": (link_to("/dev/zero"), "is a device"),
    "a link to a device that says nothing": (link_to("/dev/ptmx"), "is a device"),
    "a link to nothing": (link_to("nothing"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
}
WRONG = {
    "tokenizer.json": '{"model": 5}',
    "tokenizer_config.json": '{"bos_token": 5}',
    "special_tokens_map.json": '{"eos_token": {"content": 5}}',
    "generation_config.json": '{"eos_token_id": "x"}',
    "chat_template.jinja": b"\xff",
}


@pytest.mark.parametrize("file, content", WRONG.items())
def test_a_wrong_file_is_named(copy, file, content):
    path = copy / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refusal, match=file):
        Tokenizer(copy)


@pytest.mark.parametrize("name", ["architectures", "layer_types"])
@pytest.mark.parametrize("value", [5, True, {"a": 1}, [[1]], [{}]])
def test_a_wrong_list_is_named(copy, name, value):
    config = json.loads((copy / "config.json").read_text()) | {name: value}
    write_json(copy / "config.json", config)
    with pytest.raises(Refusal, match=f"{name} (is|has) "):
        read_shape(copy / "config.json")


FILES = """config.json generation_config.json tokenizer.json tokenizer_config.json
special_tokens_map.json added_tokens.json chat_template.jinja model.safetensors
model.safetensors.index.json""".split()


@pytest.mark.parametrize("make, words", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("file", FILES)
def test_no_file_in_a_checkpoint(copy, monkeypatch, file, make, words):
    monkeypatch.chdir(copy.parent)
    path = copy / file
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(Refusal) as error:
        load_all(copy)
    if not (path.is_symlink() and file == "model.safetensors"):  # which may be any model*
        assert file in str(error.value) and words in str(error.value)


def load_all(directory):
    """All files that there may be."""
    checkpoint.read_json(directory / "config.json")
    Tokenizer(directory)
    assert checkpoint.open_tensors(directory)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.model"])
def test_no_file_of_older_tokenizers(copy, monkeypatch, file):
    monkeypatch.chdir(copy.parent)
    (copy / "tokenizer.json").unlink()
    write_json(copy / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    if file != "tokenizer.model":
        write_json(copy / "vocab.json", {"a": 0})
        (copy / "merges.txt").write_text("")
    (copy / file).unlink(missing_ok=True)
    make_pipe(copy / file)
    with pytest.raises(Refusal, match=f"{file} is a pipe, expected a file"):
        Tokenizer(copy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_as_a_command(refuse, copy, file):
    (copy / file).unlink()
    make_pipe(copy / file)
    assert f"{copy / file} is a pipe, expected a file" in refuse("--checkpoint_path", copy)


@pytest.mark.parametrize("flag", ["--prompts_file", "--score", "--random_weights"])
@pytest.mark.parametrize("make, words", KINDS.values(), ids=KINDS)
def test_no_file_for_a_flag(refuse, tiny, tmp_path, monkeypatch, flag, make, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    make(tmp_path / "given")
    where = ["--checkpoint_path", tiny] if flag != "--random_weights" else ["--prompt", "5"]
    error = refuse(*where, flag, "given")
    assert "given" in error and words in error


@pytest.mark.parametrize("name", ["a\nb", os.fsdecode(b"\xff"), 300 * "a", "a\0b", ""])
def test_odd_names(refuse, tiny, name):
    for flag in ("--prompts_file", "--score", "--checkpoint_path"):
        where = ["--checkpoint_path", tiny] if flag != "--checkpoint_path" else []
        if name or not where:
            assert len(refuse(*where, flag, f"/nowhere/{name}")) < 600


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
@pytest.mark.parametrize("file", FILES[:3])
def test_a_file_that_nobody_may_read(copy, file):
    (copy / file).chmod(0)
    with pytest.raises(Refusal, match=f"{file} cannot be read: Permission denied"):
        load_all(copy)


# ---- what is read as a stream


def slowly(path, texts):
    with open(path, "wb", buffering=0) as file:
        for text in texts:
            time.sleep(0.1)
            file.write(text)


def test_prompts_through_a_pipe(generate, tiny, tmp_path):
    """Of one with a name, of one without, and where it comes slowly, or nothing comes at first."""
    path = tmp_path / "pipe"
    make_pipe(path)
    writer = threading.Thread(target=slowly, args=(path, [b"fo", b"x\nd", b"og"]))
    writer.start()
    argv = ["--checkpoint_path", tiny, "--json", "--prompts_file"]
    status, out, _ = generate(*argv, path)
    writer.join()
    assert status == 0 and [json.loads(line)["prompt"] for line in out[:-1]] == ["fox", "dog"]
    reading, writing = os.pipe()
    writer = threading.Thread(target=slowly, args=(writing, [b"fox\n", b"dog"]))
    writer.start()
    status, out, _ = generate(*argv, f"/dev/fd/{reading}")
    writer.join()
    os.close(reading)
    assert status == 0 and [json.loads(line)["prompt"] for line in out[:-1]] == ["fox", "dog"]


def test_a_shape_through_a_pipe(generate, tiny):
    reading, writing = os.pipe()
    os.write(writing, (tiny / "config.json").read_bytes())
    os.close(writing)
    status, out, _ = generate("--random_weights", f"/dev/fd/{reading}", "--prompt", "5", "--json")
    os.close(reading)
    assert status == 0 and len(out) == 2


def test_prompts_from_a_terminal(generate, tiny):
    """What is typed, until somebody says that it ends."""
    master, terminal = os.openpty()
    os.write(master, b"fox\ndog\n\x04")
    status, out, _ = generate(
        "--checkpoint_path", tiny, "--json", "--prompts_file", os.ttyname(terminal)
    )
    assert status == 0 and [json.loads(line)["prompt"] for line in out[:-1]] == ["fox", "dog"]
    os.close(master)
    os.close(terminal)


def test_a_stream_without_end(refuse, tiny, monkeypatch):
    """It is read up to a limit."""
    monkeypatch.setattr(files, "LARGEST", 3 << 20)
    reading, writing = os.pipe()

    def write():
        with contextlib.suppress(OSError), open(writing, "wb", buffering=0) as file:
            while True:
                file.write(1000 * b"fox\n")

    writer = threading.Thread(target=write)
    writer.start()
    error = refuse("--checkpoint_path", tiny, "--prompts_file", f"/dev/fd/{reading}")
    os.close(reading)
    writer.join()
    assert "has more than 3145728 bytes" in error


def test_a_file_without_end(copy, monkeypatch):
    """One that takes no room on disk."""
    monkeypatch.setattr(files, "LARGEST", 64 << 20)
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        path = copy / file
        before = path.read_bytes() if path.exists() else None
        with open(path, "wb") as sparse:
            sparse.truncate(1 << 40)
        with pytest.raises(Refusal, match=f"{file} has more than"):
            Tokenizer(copy)
        path.unlink()
        if before:
            path.write_bytes(before)
