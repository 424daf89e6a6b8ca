"""The sampling that a checkpoint asks for: of a chat only, as transformers' generate() would take
it, beneath flags and lines of a file."""

import json
import math
import shutil
import warnings

import pytest
from helpers import write_checkpoint, write_json
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import generate
from scripts import cli, defaults
from scripts.checkpoint import Refusal
from scripts.requests import Request

NAMES = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
ENDS = {"bos_token_id": 0, "eos_token_id": [4, 5]}
OWN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02}
OWN["repetition_penalty"] = 1.3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def stating(tiny, tmp_path):
    """A function that makes a checkpoint whose generation_config.json states more."""

    def make(stated):
        folder = shutil.copytree(tiny, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        write_json(folder / "generation_config.json", ENDS | stated)
        return folder

    return make


# ---- what the file means


@pytest.fixture(scope="module")
def theirs():
    """The sampling that generate() of transformers chooses by a file: None where it is greedy."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape))

    def choose(folder):
        model.generation_config = GenerationConfig.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, _ = model._prepare_generation_config(None)
        found = {name: getattr(config, name) for name in NAMES}
        return found | {"temperature": found["temperature"] if config.do_sample else 0.0}

    return choose


STATED = {
    "all": OWN,
    "do_sample alone": {"do_sample": True},
    "greedy": {"do_sample": False},
    "greedy with a penalty": {"do_sample": False, "repetition_penalty": 1.1},
    "no do_sample": {"temperature": 0.6, "top_p": 0.9},
    "a penalty alone": {"repetition_penalty": 1.05},
    "nulls": {"do_sample": True, "temperature": None, "top_k": None, "top_p": 0.8, "min_p": None},
    "whole numbers": {"do_sample": True, "temperature": 1, "top_p": 1, "repetition_penalty": 2},
    "no top-k": {"do_sample": True, "top_k": 0, "temperature": 0.7},
}


@pytest.mark.parametrize("stated", STATED.values(), ids=STATED)
def test_as_transformers_takes_it(theirs, stating, stated):
    folder = stating(stated)
    want = theirs(folder)
    want["min_p"] = want["min_p"] or 0.0
    want["top_k"] = want["top_k"] or defaults.INFINITY
    found = defaults.of_checkpoint(folder)
    assert found == want
    assert [type(found[name]) for name in NAMES] == [float, int, float, float, float]


def test_a_file_that_says_nothing_of_sampling(tiny, stating, tmp_path):
    assert defaults.of_checkpoint(tmp_path) == {}, "no file"
    assert defaults.of_checkpoint(tiny) == {}
    assert defaults.of_checkpoint(stating({"max_length": 20, "temperature": None})) == {}


BROKEN = {
    "temperature below 0": ({"temperature": -1}, "temperature -1"),
    "temperature nan": ({"temperature": math.nan}, "temperature nan"),
    "temperature infinite": ({"temperature": math.inf}, "temperature inf"),
    "temperature a text": ({"temperature": "0.6"}, "temperature is '0.6'"),
    "temperature a list": ({"temperature": [0.6]}, "temperature is [0.6]"),
    "temperature a boolean": ({"temperature": True}, "temperature is True"),
    "top_k below 0": ({"top_k": -1}, "top_k -1"),
    "top_k no integer": ({"top_k": 20.0}, "top_k is 20.0"),
    "top_k false": ({"top_k": False}, "top_k is False"),
    "top_k endless": ({"top_k": 10**4000}, "top_k 1000"),
    "top_p 0": ({"top_p": 0}, "top_p 0"),
    "top_p above 1": ({"top_p": 1.2}, "top_p 1.2"),
    "min_p above 1": ({"min_p": 2}, "min_p 2"),
    "penalty 0": ({"repetition_penalty": 0}, "repetition_penalty 0"),
    "penalty an object": ({"repetition_penalty": {"a": 1}}, "repetition_penalty is {'a': 1}"),
    "do_sample a number": ({"do_sample": 1}, "do_sample is 1"),
    "do_sample a text": ({"do_sample": "true"}, "do_sample is 'true'"),
}


@pytest.mark.parametrize("stated, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(stating, stated, words):
    """It names the file and the setting. Where nobody chats, nobody minds."""
    folder = stating({"do_sample": True} | stated)
    argv = ["--checkpoint_path", str(folder), "--prompt", "fox", "--max_new_tokens", "1"]
    for flag in ("--chat", "--interactive"):
        own = argv[:2] if flag == "--interactive" else argv
        with pytest.raises(Refusal) as error:
            generate.main([*own, flag])
        line = str(error.value)
        assert "\n" not in line and "generation_config.json" in line and words in line
        assert "expected" in line
    generate.main(argv)


def test_a_list_is_one_line(tiny, tmp_path):
    write_json(tmp_path / "generation_config.json", [OWN])
    with pytest.raises(Refusal, match="generation_config.json: expected a JSON object"):
        defaults.of_checkpoint(tmp_path)


# ---- what is asked for


def asked(monkeypatch, capsys, folder, *argv):
    """The requests of a run, and what it says on standard error."""
    seen = []
    plain = generate.Engine.generate

    def spy(engine, requests):
        seen.extend(requests)
        return plain(engine, requests)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Engine, "generate", spy)
        generate.main(["--checkpoint_path", str(folder), "--max_new_tokens", "2", *map(str, argv)])
    return seen, capsys.readouterr()


def sampling(request):
    return {name: getattr(request, name) for name in NAMES}


WITHOUT = sampling(Request(0, "", []))
WANTED = {name: OWN[name] for name in NAMES}
WORDS = "sampling by generation_config.json: "


def test_in_a_chat(stating, monkeypatch, capsys):
    folder = stating(OWN)
    (request,), said = asked(monkeypatch, capsys, folder, "--chat", "--prompt", "fox")
    assert sampling(request) == WANTED
    words = "temperature 0.6, top_k 20, top_p 0.95, min_p 0.02, repetition_penalty 1.3"
    assert said.err.splitlines()[-1] == WORDS + words


def test_in_a_conversation(stating, monkeypatch, capsys):
    """Which has no stats: it is told first, to who watches."""
    lines = iter(["fox", "/exit"])
    told = []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(cli, "progress", lambda *words, **options: told.append(words))
    (request,), _ = asked(monkeypatch, capsys, stating(OWN), "--interactive")
    assert sampling(request) == WANTED
    assert any(WORDS in words[0] for words in told)


def test_the_words_leave_json_alone(stating, monkeypatch, capsys):
    folder = stating(OWN)
    _, said = asked(monkeypatch, capsys, folder, "--chat", "--prompt", "fox", "--json")
    completion, stats = map(json.loads, said.out.splitlines())
    assert "sampling" not in str(completion.keys()) + str(stats["stats"].keys())
    assert WORDS in said.err


def test_elsewhere_nothing_changes(tiny, stating, monkeypatch, capsys):
    (request,), said = asked(monkeypatch, capsys, stating(OWN), "--prompt", "fox")
    assert sampling(request) == WITHOUT and WORDS not in said.err
    (request,), said = asked(monkeypatch, capsys, tiny, "--chat", "--prompt", "fox")
    assert sampling(request) == WITHOUT and WORDS not in said.err


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_wins(stating, monkeypatch, capsys, name):
    """Also where its value is the flag's default, in either way to write it."""
    folder = stating(OWN)
    for flag in ([f"--{name}", WITHOUT[name]], [f"--{name}={WITHOUT[name]}"]):
        argv = ["--chat", "--prompt", "fox", *flag]
        (request,), said = asked(monkeypatch, capsys, folder, *argv)
        assert sampling(request) == WANTED | {name: WITHOUT[name]}
        assert WORDS in said.err and f"{name} " not in said.err.split(WORDS)[1]


def test_flags_that_leave_nothing(stating, monkeypatch, capsys):
    flags = [word for name in NAMES for word in (f"--{name}", WITHOUT[name])]
    argv = ["--chat", "--prompt", "fox", *flags]
    (request,), said = asked(monkeypatch, capsys, stating(OWN), *argv)
    assert sampling(request) == WITHOUT and WORDS not in said.err


def test_a_line_wins_over_both(stating, monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "fox"}, {"prompt": "fox", "temperature": 0.1, "top_k": 3, "min_p": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--chat", "--prompts_file", path, "--temperature", 0.9]
    found, _ = asked(monkeypatch, capsys, stating(OWN), *argv)
    assert sampling(found[0]) == WANTED | {"temperature": 0.9}
    assert sampling(found[1]) == WANTED | {"temperature": 0.1, "top_k": 3, "min_p": 0.5}


def test_greedy_by_the_file(stating, monkeypatch, capsys):
    """Samples are alike, until a flag says otherwise."""
    folder = stating({"do_sample": False})
    argv = ["--chat", "--prompt", "the dog", "--num_samples", 3, "--max_new_tokens", 12, "--json"]

    def texts(*more):
        _, said = asked(monkeypatch, capsys, folder, *argv, *more)
        return {str(json.loads(line)["tokens"]) for line in said.out.splitlines()[:-1]}

    assert len(texts()) == 1
    assert len(texts("--temperature", 1)) == 3


def test_a_draft_has_no_say(stating, monkeypatch, capsys):
    """Its file is not even looked at."""
    draft = stating({"do_sample": True, "temperature": -1})
    argv = ["--chat", "--prompt", "fox", "--draft_checkpoint_path", draft]
    (request,), _ = asked(monkeypatch, capsys, stating(OWN), *argv)
    assert sampling(request) == WANTED


def test_what_is_given():
    args = cli.parse_args(["--temperature=0.8", "--top_k", "200", "--seed", "1"])
    assert args.given == ["temperature", "top_k"]
    assert (args.temperature, args.top_k, args.top_p) == (0.8, 200, 1.0)
    assert cli.parse_args([]).given == []
