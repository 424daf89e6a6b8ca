"""Tokenizers from all the files that say something of them, beside transformers."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CORPUS, SPECIAL, train_bpe, write_checkpoint, write_json
from test_text import converted_sentencepiece
from tokenizers import AddedToken, pre_tokenizers, processors

from scripts.checkpoint import Refusal
from scripts.requests import message
from scripts.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
BITS = [
    "a",
    " ",
    "  ",
    "\n",
    "\t",
    "the dog",
    " fox",
    "hi",
    "12",
    "é",
    "e\u0301",
    "你好",
    "🙂",
    "I'll",
]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def texts(*tokens, count=30):
    """Texts in which spaces, words and tokens stand side by side."""
    rng = random.Random(0)
    bits = [*BITS, *tokens, *tokens]
    mixed = ["".join(rng.choices(bits, k=rng.randint(1, 9))) for _ in range(count)]
    return ["", " ", "hi", " hi", *mixed]


def token(content, special=True, **flags):
    return {"content": content, **FLAGS, "special": special, **flags}


def check_equal(directory, *tokens):
    """The ids of texts, plain or of a template, and the text of ids are those of transformers."""
    from transformers import AutoTokenizer

    ours, reference = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts(*tokens):
        for bos in (False, True):
            wanted = reference(text, add_special_tokens=bos).input_ids
            assert ours.encode(text, bos) == wanted, (text, bos)
    assert ours.vocab() == reference.get_vocab()
    assert ours.kind.named == reference.special_tokens_map
    rng = random.Random(0)
    for _ in range(10):
        ids = ours.lead + rng.choices(range(len(reference)), k=12)
        assert ours.kind.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    return ours


def write_tokenizer(directory, content, settings, model_type="llama", **files):
    """`content` is that of tokenizer.json, `files` are others by the first part of their names."""
    files |= {"tokenizer": content, "tokenizer_config": settings}
    files["config"] = {"model_type": model_type}
    for name, given in files.items():
        write_json(directory / f"{name}.json", given)


def byte_level():
    return json.loads(train_bpe().to_str())


# ---- added tokens

SIZE = train_bpe().get_vocab_size()
ADDED = {
    "decoder": {"added_tokens_decoder": {SIZE: token("<x>"), SIZE + 1: token("<y>", False)}},
    "decoder, as ids are given out": {
        "added_tokens_decoder": {SIZE + 7: token("<y>"), SIZE + 3: token("<x>")}
    },
    "decoder, blanks": {
        "added_tokens_decoder": {
            SIZE: token("<x>", lstrip=True),
            SIZE + 1: token("<y>", False, rstrip=True),
            SIZE + 2: token("fo", False, single_word=True, normalized=True),
        }
    },
    "decoder changes flags": {"added_tokens_decoder": {4: token("<|end|>", rstrip=True)}},
    "older list": {"additional_special_tokens": ["<x>", "<y>"]},
    "newer list": {"extra_special_tokens": ["<y>", "<x>"], "additional_special_tokens": ["<z>"]},
    "newer names": {"extra_special_tokens": {"image_token": "<x>", "boi": "<y>"}},
    "names": {"bos_token": "<x>", "eos_token": "<y>", "pad_token": "<x>", "unk_token": None},
    "names as dicts": {"eos_token": {"__type": "AddedToken", **token("<y>", False, lstrip=True)}},
    "a name of its own": {"audio_token": "<x>", "add_bos_token": True},
    "special tokens are text": {"split_special_tokens": True, "eos_token": "<y>"},
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_of_the_settings(tmp_path, name):
    write_tokenizer(tmp_path, byte_level(), ADDED[name])
    check_equal(tmp_path, "<x>", "<y>", "<z>", "fo", "<|end|>")


OLDER_FILES = [
    ({"added_tokens": {"<x>": SIZE, "<y>": SIZE + 1}}, {}),
    ({"added_tokens": {"<x>": SIZE}}, {"eos_token": "<x>"}),
    ({"special_tokens_map": {"eos_token": "<x>", "additional_special_tokens": ["<y>"]}}, {}),
    ({"special_tokens_map": {"pad_token": token("<y>", lstrip=True)}}, {"pad_token": "<x>"}),
    ({"special_tokens_map": {"additional_special_tokens": ["<x>"]}}, {"extra_special_tokens": []}),
    ({"special_tokens_map": {"pad_token": "<x>"}}, {"added_tokens_decoder": {SIZE: token("<y>")}}),
    ({"added_tokens": {"<x>": SIZE}}, {"added_tokens_decoder": {SIZE: token("<y>")}}),
]


@pytest.mark.parametrize("files, settings", OLDER_FILES)
def test_added_tokens_of_older_files(tmp_path, files, settings):
    """Where the settings list all added tokens, the older files count no more."""
    write_tokenizer(tmp_path, byte_level(), settings, **files)
    check_equal(tmp_path, "<x>", "<y>")


@pytest.mark.parametrize("name", ["bos_token", "additional_special_tokens", "added_tokens_decoder"])
def test_no_token_is_refused(tmp_path, name):
    given = {"bos_token": 5, "additional_special_tokens": [5], "added_tokens_decoder": {"9": "x"}}
    if name == "added_tokens_decoder":
        given[name] = {"9": 5}
    write_tokenizer(tmp_path, byte_level(), {name: given[name]})
    with pytest.raises(Refusal, match="expected a token"):
        Tokenizer(tmp_path)


# ---- classes that build a tokenizer anew


def yi():
    """Added tokens that are no special ones, in a tokenizer of spaces and words."""
    content = converted_sentencepiece()
    size = len(content["model"]["vocab"])
    for i, text in enumerate(["\n", "<y>", "12"]):
        content["added_tokens"].append({"id": size + i, **token(text, special=False)})
    first = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return content | {"post_processor": json.loads(first.__getstate__())}


BUILT = [
    ("LlamaTokenizer", {}),
    ("LlamaTokenizer", {"legacy": True}),
    ("LlamaTokenizer", {"legacy": False, "add_bos_token": False}),
    ("LlamaTokenizerFast", {"legacy": True, "add_prefix_space": False}),
    ("LlamaTokenizerFast", {"add_prefix_space": None, "add_eos_token": True, "bos_token": "<y>"}),
    ("CodeLlamaTokenizerFast", {"legacy": True}),
    ("GemmaTokenizer", {}),
    ("PreTrainedTokenizerFast", {"legacy": False}),
    (None, {"bos_token": "<s>"}),
    ("SomebodysTokenizer", {}),
]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("name, settings", BUILT)
def test_classes_of_pieces(tmp_path, name, settings, model_type):
    """Whether a space goes before a text between added tokens depends on the class, the model and
    the settings."""
    settings = settings | ({"tokenizer_class": name} if name else {})
    write_tokenizer(tmp_path, yi(), settings, model_type)
    check_equal(tmp_path, "\n", "<y>", "12", "<s>", "</s>")


BYTE_LEVEL = ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast"]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("name", [*BYTE_LEVEL, None])
def test_classes_of_bytes(tmp_path, name, model_type):
    """The file splits digits and adds a space, which some classes do not take from it."""
    content = byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    both = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    content["pre_tokenizer"] = json.loads(both.__getstate__())
    settings = {"tokenizer_class": name} if name else {}
    write_tokenizer(tmp_path, content, settings, model_type)
    check_equal(tmp_path, "<|end|>", "<|endoftext|>")


MENDED = [
    ("mistral", "4.57.1", True),
    (None, None, True),
    ("mistral", "5.0.0", False),
    ("llama", "4.57.1", False),
]


@pytest.mark.parametrize("model_type, version, is_mended", MENDED)
def test_words_of_mistral(tmp_path, model_type, version, is_mended):
    """Large vocabularies were published with a wrong rule, which a setting mends."""
    content = byte_level()
    vocab = content["model"]["vocab"]
    for i in range(len(vocab), 100_001):
        vocab[f"unused{i}"] = i
    words = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    bytes_of_words = content["pre_tokenizer"] | {"use_regex": False}
    parts = [words, bytes_of_words]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    write_tokenizer(tmp_path, content, {"fix_mistral_regex": True}, model_type)
    config = {"model_type": model_type, "transformers_version": version}
    known = {name: value for name, value in config.items() if value}
    write_json(tmp_path / "config.json", known)
    ours = check_equal(tmp_path)
    found = ours.kind.tokenizer.pre_tokenizer.pre_tokenize_str("12")
    assert len(found) == (2 if is_mended else 1)


# ---- vocab.json and merges.txt


def write_vocab(directory, settings, model_type="llama", **files):
    model = byte_level()["model"]
    write_tokenizer(directory, {}, settings, model_type, vocab=model["vocab"], **files)
    (directory / "tokenizer.json").unlink()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


END = {"added_tokens_decoder": {4: token("<|end|>"), SIZE: token("<|endoftext|>")}}
VOCABS = [
    ("qwen2", {"tokenizer_class": "Qwen2Tokenizer"} | END, {}),
    ("qwen3", {}, {}),
    ("qwen2", {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|end|>"}, {}),
    ("qwen3", {"additional_special_tokens": ["<x>"]}, {"added_tokens": {"<x>": SIZE}}),
    ("llama", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    ("llama", {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True}, {}),
    ("llama", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True} | END, {}),
    ("llama", {"tokenizer_class": "GPTNeoXTokenizerFast"}, {}),
]


@pytest.mark.parametrize("model_type, settings, files", VOCABS)
def test_vocab_and_merges(tmp_path, model_type, settings, files):
    write_vocab(tmp_path, settings, model_type, **files)
    check_equal(tmp_path, "<|end|>", "<|endoftext|>", "<x>")


def test_vocab_that_nobody_reads(tmp_path):
    write_vocab(tmp_path, {"tokenizer_class": "BertTokenizer"})
    with pytest.raises(Refusal, match="tokenizer_class is BertTokenizer.*Qwen2Tokenizer, GPT2"):
        Tokenizer(tmp_path)
    write_vocab(tmp_path, {})
    with pytest.raises(Refusal, match="tokenizer_class is None"):
        Tokenizer(tmp_path)
    write_vocab(tmp_path, {"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "merges.txt").write_text("a b c")
    with pytest.raises(Refusal, match="merges.txt: expected two pieces"):
        Tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(Refusal, match="expected merges.txt"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(Refusal, match="expected tokenizer.json, tokenizer.model, or vocab.json"):
        Tokenizer(tmp_path)


# ---- sentencepiece alone


def train_pieces(directory, kind="bpe", **options):
    """A model of sentencepiece, and the plain processor of it."""
    import sentencepiece

    data = io.BytesIO()
    options = {"vocab_size": 320, "byte_fallback": True, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS[:2]),
        model_writer=data,
        model_type=kind,
        minloglevel=3,
        num_threads=1,
        **options,
    )
    (directory / "tokenizer.model").write_bytes(data.getvalue())
    write_json(directory / "config.json", {"model_type": "llama"})
    return sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())


def as_transformers(directory, pieces, settings, texts_of_tokens):
    """What transformers makes of class LlamaTokenizer of such a model of byte pairs: a merge of
    every two pieces that are one, in the order of their ids."""
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((i, len(left), len(right), left, right))
    pairs = [list(merge[-2:]) for merge in sorted(merges)]
    from transformers import LlamaTokenizer

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    reference = LlamaTokenizer(vocab=vocab, merges=list(map(tuple, pairs)), **names, **settings)
    reference.add_tokens([AddedToken(text, normalized=False) for text in texts_of_tokens])
    return reference


SETTINGS = [
    {"legacy": False},
    {"legacy": True},
    {"legacy": True, "add_bos_token": False, "add_eos_token": True},
    {"legacy": False, "add_prefix_space": False},
    {"legacy": None},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pieces_of_class_llama(tmp_path, settings):
    """The space before a text: always, or the first alone."""
    pieces = train_pieces(tmp_path, user_defined_symbols=["<u>"])
    settings = {"add_bos_token": True} | settings
    size = len(pieces)
    listed = {"added_tokens_decoder": {size: token("<x>"), size + 1: token("[INST]", False)}}
    given = settings | listed | {"tokenizer_class": "LlamaTokenizer"}
    write_json(tmp_path / "tokenizer_config.json", given)
    reference = as_transformers(tmp_path, pieces, settings, ["<u>", "<x>", "[INST]"])
    ours = Tokenizer(tmp_path)
    for text in texts("<s>", "</s>", "<x>", "[INST]", "<u>", "  a", count=200):
        for bos in (False, True):
            wanted = reference(text, add_special_tokens=bos).input_ids
            assert ours.encode(text, bos) == wanted, (text, bos)
    assert ours.hidden[size] == "<x>" and size + 1 not in ours.hidden
    ids = ours.encode("the <x>dog[INST] fox", bos=False)
    assert ours.decode(ids).split() == ["the", "dog[INST]", "fox"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_of_no_class(tmp_path, kind):
    """What is special is a single id in a plain prompt too. The model says what else becomes of a
    text; with `legacy` a space goes before each part of it, as it does where nothing is said."""
    pieces = train_pieces(tmp_path, kind)
    end, fox, the = (pieces.encode(word) for word in ("the dog", "fox", "the"))
    x = len(pieces)
    prompt = "the  dog</s>fox<x>the"
    listed = {"additional_special_tokens": ["<x>"]}
    write_json(tmp_path / "tokenizer_config.json", listed)
    assert Tokenizer(tmp_path).encode(prompt) == [1, *end, 2, *fox, x, *the]
    write_json(tmp_path / "tokenizer_config.json", listed | {"legacy": True})
    assert Tokenizer(tmp_path).encode(prompt) == [1, *end, 2, *fox, x, *the]
    write_json(tmp_path / "tokenizer_config.json", listed | {"legacy": False})
    ids = Tokenizer(tmp_path).encode(prompt)
    assert ids[: len(end) + 2] == [1, *end, 2] and ids != [1, *end, 2, *fox, x, *the]
    words = "".join(pieces.id_to_piece(i) for i in ids if i < x)
    assert words == "<s>▁the▁dog</s>foxthe"


@pytest.mark.parametrize("bos", ["", None, "<s>", {"content": "<s>"}])
def test_pieces_begin_with_bos(tmp_path, bos):
    """Some early files leave its text out: the model knows it."""
    train_pieces(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": bos, "added_tokens_decoder": None})
    assert Tokenizer(tmp_path).encode("the")[0] == 1


def test_pieces_without_bytes(tmp_path):
    """Class LlamaTokenizer leaves out what is no piece; else it is <unk>."""
    pieces = train_pieces(tmp_path, byte_fallback=False, vocab_size=80)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert Tokenizer(tmp_path).encode("the 你好") == pieces.encode("the 你好")
    settings = {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}
    write_json(tmp_path / "tokenizer_config.json", settings)
    reference = as_transformers(tmp_path, pieces, {}, [])
    for text in ["the 你好", "\t\tthe\ndog", "a\n a", "\nthe"]:
        assert Tokenizer(tmp_path).encode(text) == reference(text).input_ids


# ---- end tokens


@pytest.mark.parametrize("eos", ["<|user|>", {"content": "<|user|>"}])
def test_end_tokens_of_all_files(tmp_path, eos):
    write_tokenizer(tmp_path, byte_level(), {"eos_token": eos})
    user = SPECIAL.index("<|user|>")
    assert Tokenizer(tmp_path).eos_ids == {user}
    write_json(tmp_path / "config.json", {"eos_token_id": 7})
    assert Tokenizer(tmp_path).eos_ids == {7, user}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [8, 9]})
    assert Tokenizer(tmp_path).eos_ids == {7, 8, 9, user}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": None})
    assert Tokenizer(tmp_path).eos_ids == {7, user}


@pytest.mark.parametrize("given", ["2", True, -1, [1, "2"], [[2]], 2.5])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_no_end_tokens(tmp_path, file, given):
    write_tokenizer(tmp_path, byte_level(), {})
    write_json(tmp_path / file, {"eos_token_id": given})
    with pytest.raises(Refusal, match=f"{file}: eos_token_id is"):
        Tokenizer(tmp_path)


# ---- what a template sees

TALK = [
    message("system", "<b> & 'é' \"你好\""),
    message("user", [{"type": "text", "text": "fox"}, {"type": "image", "z": 1, "a": None}]),
    {"role": "assistant", "content": None, "tool_calls": [{"b": 1, "a": [1.5, True]}]},
    {"role": "assistant", "content": "dog", "reasoning": "because"},
]
TEMPLATES = [
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{% for name in names %}{% endfor %}{% if bos_token is defined %}bos{{ bos_token }}{% endif %}"
    "{% if pad_token is defined %}pad{% endif %}{% if unk_token is defined %}unk{% endif %}"
    "{% if image_token is defined %}{{ image_token }}{% endif %}",
    "{{ eos_token }}{{ tools is defined }}{{ tools }}{{ documents }}{{ add_generation_prompt }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if m.content is not defined %}{% break %}{% endif %}{% endfor %}",
    "{%- for m in messages -%}\n  {%- generation -%}\n {{ m.role }}{{ loop.index }}\n"
    "{%- endgeneration -%}\n  {% endfor %}",
    "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ strftime_now('%%f') }}{{ dict(a=1) }}",
    "{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ messages[1].content[0].text }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_see_what_they_do_in_transformers(tmp_path, template):
    from transformers import AutoTokenizer

    settings = {"bos_token": "<|bos|>", "eos_token": {"__type": "AddedToken", **token("<|end|>")}}
    settings |= {"image_token": "<x>", "pad_token": None, "chat_template": template}
    write_tokenizer(tmp_path, byte_level(), settings)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    wanted = reference.apply_chat_template(
        TALK, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert Tokenizer(tmp_path).encode_chat(TALK) == wanted


def test_places_of_templates(tmp_path):
    """A folder of templates goes before a file, and that before the settings."""
    from transformers import AutoTokenizer

    def check(*words):
        reference = AutoTokenizer.from_pretrained(tmp_path)
        wanted = reference.apply_chat_template(TALK, tokenize=False)
        assert wanted in words
        assert Tokenizer(tmp_path).encode_chat(TALK) == train_bpe().encode(wanted).ids

    settings = {"chat_template": [{"name": "default", "template": "fox"}]}
    settings["chat_template"].append({"name": "tool_use", "template": "over"})
    write_tokenizer(tmp_path, byte_level(), settings)
    check("fox")
    (tmp_path / "chat_template.jinja").write_text("höll dog", encoding="utf-8")
    check("höll dog")
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("over")
    check("höll dog")
    (folder / "default.jinja").write_text("lazy")
    check("lazy")


def test_templates_of_other_names(tmp_path):
    given = [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]
    write_tokenizer(tmp_path, byte_level(), {"chat_template": given})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a")  # without a chat, there is no need of one
    with pytest.raises(Refusal, match="tool_use, rag, expected one called default"):
        tokenizer.encode_chat([message("user", "a")])


# ---- a locale that knows no letters

ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run_in_ascii(*argv, **options):
    """Python in a locale of ASCII, which is told what bytes to take as text."""
    environment = os.environ | ASCII
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, **options
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


ECHO = """
import json, sys
from pathlib import Path
from scripts import chat, cli
from scripts.tokenizer import Tokenizer

def main():
    args = cli.parse_args(sys.argv[2:])
    ids = Tokenizer(Path(sys.argv[1])).encode_chat(args.system)
    found = [args.stop, args.system, ids, chat.read_line(), chat.read_line()]
    print(json.dumps(found, ensure_ascii=False))

cli.run([main])
"""


def test_the_locale_does_not_matter(tmp_path):
    """What is typed, files, and what is printed are UTF-8."""
    template = "hé🙂{{ messages[0].content }}"
    write_tokenizer(tmp_path, byte_level(), {})
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    argv = ["-c", ECHO, str(tmp_path), "--chat", "--stop", "é", "--system", "你好"]
    typed = "naïve\n".encode() + b"\xff!\n"
    status, out, error = run_in_ascii(*argv, input=typed)
    assert status == 0, error
    stop, system, ids, first, second = json.loads(out)
    assert (stop, system) == (["é"], [message("system", "你好")])
    assert ids == train_bpe().encode("hé🙂你好").ids
    assert (first, second) == ("naïve", "?!") and "naïve" in out


@pytest.mark.parametrize("flag", ["--stop", "--system"])
def test_bytes_that_are_no_text_are_refused(tmp_path, flag):
    status, _, error = run_in_ascii("-c", ECHO, str(tmp_path), "--chat", flag, b"caf\xe9")
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert f"argument {flag}" in error and "expected UTF-8" in error


def test_generate_in_ascii(tmp_path):
    write_checkpoint(tmp_path)
    argv = ["generate.py", "--checkpoint_path", str(tmp_path), "--json", "--max_new_tokens", "9"]
    file = tmp_path / "prompts.txt"
    file.write_text("né 你好\n", encoding="utf-8")
    status, out, error = run_in_ascii(*argv, "--prompts_file", str(file), "--ignore_eos")
    assert status == 0, error
    completion = json.loads(out.splitlines()[0])
    assert completion["prompt"] == "né 你好"
    assert completion["text"] == train_bpe().decode(completion["tokens"])
    status, out, _ = run_in_ascii(*argv, "--prompt", "né 你好")
    assert status == 0 and json.loads(out.splitlines()[0])["prompt"] == "né 你好"


def test_every_file_says_its_encoding():
    """What Python opens as text without one depends on the locale."""
    calls = ("read_text(", "write_text(", "open(")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            line = line.replace("os.open(", "")  # which opens no text
            opens = any(f" {call}" in line or f".{call}" in line for call in calls)
            is_text = opens and "safe_open" not in line and 'b"' not in line
            assert not is_text or "encoding=" in line, (path, line)
