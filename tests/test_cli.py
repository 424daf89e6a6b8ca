"""The command line of generate.py: bad input, the JSON lines, --output that survives a kill,
prompts, conversations. Most tests run it in this process, which is quicker."""

import io
import json
import math
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    CONTEXT,
    SPECIAL,
    heed_interrupts,
    load,
    train_bpe,
    write_checkpoint,
    write_json,
)
from safetensors.torch import load_file, save_file

import generate
from scripts import chat, cli, requests
from scripts.requests import Completion, Request

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "generate.py")
COMPLETION_KEYS = """id sample prompt prompt_ids text tokens logprobs finish_reason prompt_tokens
seed""".split()
STATS_KEYS = """decode_tokens_per_sec prefill_tokens_per_sec time_to_first_token_s load_s compile_s
new_tokens model_bytes bandwidth_gb_s accept_counts peak_memory_gb deterministic""".split()
FP32 = ["--precision", "fp32"]
QUICK = ["--max_new_tokens", "4", *FP32]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a tiny checkpoint, as text."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(tiny, tmp_path / "copy")


def run_json(capsys, *argv):
    """Run in this process with --json; completions, stats, and what stood on standard error."""
    generate.main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    lines = out.split("\n")[:-1]  # splitlines knows more line ends than JSON does
    *completions, stats = map(json.loads, lines)
    return completions, stats["stats"], err


def texts(capsys, *argv):
    """{(id, sample): tokens} of a run."""
    completions, _, _ = run_json(capsys, *argv)
    return {(c["id"], c["sample"]): c["tokens"] for c in completions}


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def command(*argv, **options):
    """generate.py as a process of its own."""
    options = {"env": environment(), "stdout": subprocess.PIPE} | options
    argv = [sys.executable, SCRIPT, *map(str, argv)]
    return subprocess.run(argv, stderr=subprocess.PIPE, text=True, timeout=300, **options)


# ---- bad input


def is_one_line(err):
    return err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1


def exit_status(monkeypatch, *argv):
    """Run generate.py as a script, but in this process."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [SCRIPT, *map(str, argv)])
        patch.setattr(sys, "stdout", sys.stdout)  # to be put back
        runpy.run_path(SCRIPT, run_name="__main__")
    return end.value.code


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Run generate.py, which must end with status 2 and one line, returned."""

    def run(*argv):
        assert exit_status(monkeypatch, *argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert is_one_line(err) and len(err) > 20, err
        return err

    return run


def close_standard_input():
    os.close(0)


def test_bad_input_as_a_process(tiny, tmp_path):
    """Here, nothing to read: status 2, one line on standard error, nothing on standard output,
    nothing written. With GPT_EXACT_DEBUG=1 it is a traceback."""
    output = tmp_path / "out.jsonl"
    argv = ["--checkpoint_path", tiny, "--prompts_file", "-", "--json", "--output", output]
    done = command(*argv, preexec_fn=close_standard_input)
    assert (done.returncode, done.stdout) == (2, "")
    assert is_one_line(done.stderr) and "Traceback" not in done.stderr
    assert not output.exists(), "nothing is written"

    env = environment() | {"GPT_EXACT_DEBUG": "1"}
    debugged = command(*argv, preexec_fn=close_standard_input, env=env)
    assert (debugged.returncode, debugged.stdout) == (1, "")
    assert debugged.stderr.startswith("Traceback") and 'generate.py", line' in debugged.stderr
    message = done.stderr.removeprefix("error: ")
    assert debugged.stderr.endswith(f"scripts.files.Refusal: {message}")


def test_a_bug_is_a_traceback_and_a_line(tiny, monkeypatch, capsys):
    """And status 1; with GPT_EXACT_DEBUG=1 it is raised, and so is what a user does."""

    def write(*_):
        raise LookupError("lost\nand not found")

    monkeypatch.setattr(requests, "write", write)
    argv = ["--checkpoint_path", tiny, *QUICK]
    assert exit_status(monkeypatch, *argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Traceback") and "LookupError: lost" in err
    assert err.endswith("\nerror: this is a bug in the code, not in what you gave\n")
    monkeypatch.setenv("GPT_EXACT_DEBUG", "0")
    assert exit_status(monkeypatch, *argv) == 1
    monkeypatch.setenv("GPT_EXACT_DEBUG", "1")
    with pytest.raises(LookupError):
        exit_status(monkeypatch, *argv)
    with pytest.raises(ValueError, match="top_k 0"):
        exit_status(monkeypatch, *argv, "--top_k", 0)


BAD_FLAGS = {
    "temperature below 0": ["--temperature", "-0.1"],
    "temperature nan": ["--temperature", "nan"],
    "temperature infinite": ["--temperature", "inf"],
    "temperature no number": ["--temperature", "warm"],
    "top_p 0": ["--top_p", "0"],
    "top_p below 0": ["--top_p", "-0.5"],
    "top_p above 1": ["--top_p", "1.0001"],
    "top_p nan": ["--top_p", "nan"],
    "top_k 0": ["--top_k", "0"],
    "top_k no integer": ["--top_k", "2.5"],
    "top_k too large for a tensor": ["--top_k", "1" + 30 * "0"],
    "min_p below 0": ["--min_p", "-0.1"],
    "min_p above 1": ["--min_p", "1.5"],
    "min_p nan": ["--min_p", "nan"],
    "repetition_penalty 0": ["--repetition_penalty", "0"],
    "repetition_penalty below 0": ["--repetition_penalty", "-1.2"],
    "repetition_penalty nan": ["--repetition_penalty", "nan"],
    "repetition_penalty infinite": ["--repetition_penalty", "inf"],
    "logit_bias no JSON": ["--logit_bias", "5: -100"],
    "logit_bias of a Python": ["--logit_bias", "{5: -100}"],
    "logit_bias a list": ["--logit_bias", "[5, 6]"],
    "logit_bias nothing": ["--logit_bias", "null"],
    "logit_bias of a word": ["--logit_bias", '{"the": 1}'],
    "logit_bias of an id below 0": ["--logit_bias", '{"-1": 1}'],
    "logit_bias of an id twice": ["--logit_bias", '{"05": 1}'],
    "logit_bias of an id past the vocabulary": ["--logit_bias", '{"380": 1}'],
    "logit_bias of an endless id": ["--logit_bias", '{"%s": 1}' % (5000 * "9")],
    "logit_bias no number": ["--logit_bias", '{"5": "1"}'],
    "logit_bias a boolean": ["--logit_bias", '{"5": true}'],
    "logit_bias nan": ["--logit_bias", '{"5": NaN}'],
    "logit_bias infinite": ["--logit_bias", '{"5": -Infinity}'],
    "logit_bias past fp32": ["--logit_bias", '{"5": 1e39}'],
    "logit_bias too deep": ["--logit_bias", 100_000 * "["],
    "batch_size 0": ["--batch_size", "0"],
    "batch_size below 0": ["--batch_size", "-3"],
    "max_new_tokens 0": ["--max_new_tokens", "0"],
    "prefill_chunk below 0": ["--prefill_chunk", "-1"],
    "num_samples 0": ["--num_samples", "0"],
    "seed no integer": ["--seed", "x"],
    "precision unknown": ["--precision", "fp8"],
    "stop empty": ["--stop", ""],
    "flag unknown": ["--no_such_flag"],
    "positional": ["Hello"],
    "value missing": ["--prompt"],
    "system without chat": ["--system", "Be brief."],
    "prompt and file": ["--prompt", "a", "--prompts_file", "b.txt"],
    "interactive and prompt": ["--interactive", "--prompt", "a"],
    "interactive and file": ["--interactive", "--prompts_file", "b.txt"],
    "interactive and json": ["--interactive", "--json"],
    "interactive and output": ["--interactive", "--output", "never.jsonl"],
    "random weights and checkpoint": ["--random_weights", "config.json"],
    "no such device": ["--device", "cuda:99"],
    "unknown device": ["--device", "abacus"],
    "device without data": ["--device", "meta"],
    "prompt of 0 tokens": ["--prompt", "0"],
    "prompt past the context": ["--prompt", str(CONTEXT + 1)],
    "prompt past all memory": ["--prompt", "1" + 15 * "0"],
    "batch past all memory": ["--batch_size", "1" + 12 * "0"],
    "prompt of 5000 digits": ["--prompt", 5000 * "9"],
    "text past the context": ["--prompt", "fox " * CONTEXT],
    "empty prompt without BOS": ["--prompt", ""],
    "prompt that is no Unicode": ["--prompt", "fox\udcff"],
    "file missing": ["--prompts_file", "no/such/file.jsonl"],
    "file a directory": ["--prompts_file", "/"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(refuse, tiny, tmp_path, monkeypatch, flags):
    """Nothing is written, and where a number is wrong, the line names the flag and the value."""
    monkeypatch.chdir(tmp_path)
    error = refuse("--checkpoint_path", tiny, *flags)
    assert not list(tmp_path.iterdir())
    if flags[0] == "--logit_bias":
        assert "logit_bias" in error and "expected" in error
    numbers = ("--temperature", "--top_p", "--top_k", "--min_p", "--repetition_penalty")
    if flags[0] in numbers and len(flags[1]) < 20:
        assert flags[0].lstrip("-") in error and flags[1] in error


VALID = {
    "precision": (["--precision", "fp8"], ["bf16", "fp16", "fp32"]),
    "top_p": (["--top_p", "2"], ["1"]),
    "device": (["--device", "cuda:99"], ["cpu"]),
    "prompt": (["--prompt", str(CONTEXT + 1)], [str(CONTEXT)]),
}


@pytest.mark.parametrize("flags, choices", VALID.values(), ids=VALID)
def test_error_names_what_is_valid(refuse, tiny, flags, choices):
    error = refuse("--checkpoint_path", tiny, *flags).replace(flags[-1], "")
    assert all(choice in error for choice in choices), error


BAD_FILES = {  # its name, its content (None: no file; a number: so many bytes of it), what is named
    "no config": ("config.json", None, "config.json"),
    "config no JSON": ("config.json", b"{", "config.json"),
    "config a list": ("config.json", b"[1]", "config.json"),
    "config binary": ("config.json", b"\xff\xfe\x00", "config.json"),
    "config nested too deep": ("config.json", b"[" * 200_000, "recursion"),
    "no weights": ("model.safetensors", None, "safetensors"),
    "truncated weights": ("model.safetensors", -1000, "safetensors"),
    "weights cut in the header": ("model.safetensors", 100, "safetensors"),
    "weights of 0 bytes": ("model.safetensors", 0, "safetensors"),
    "weights no safetensors": ("model.safetensors", b"junk" * 99, "safetensors"),
    "index no JSON": ("model.safetensors.index.json", b"x", "index.json"),
    "index names a missing file": (
        "model.safetensors.index.json",
        b'{"weight_map": {"lm_head.weight": "gone.safetensors"}}',
        "gone.safetensors",
    ),
    "no tokenizer": ("tokenizer.json", None, "tokenizer"),
    "tokenizer no JSON": ("tokenizer.json", b"{}", "tokenizer"),
    "tokenizer of 0 bytes": ("tokenizer.json", 0, "tokenizer"),
    "tokenizer settings no JSON": ("tokenizer_config.json", b"{", "tokenizer_config.json"),
    "template of no kind": ("tokenizer_config.json", b'{"chat_template": [1]}', "tokenizer"),
    "generation settings no JSON": ("generation_config.json", b"x", "generation_config"),
    "end ids of no kind": ("generation_config.json", b'{"eos_token_id": [[1]]}', "tokenizer"),
}


@pytest.mark.parametrize("name, content, named", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_of_a_checkpoint(refuse, copy, name, content, named):
    """Each is refused in a line that names the culprit."""
    path = copy / name
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        path.write_bytes(path.read_bytes()[:content])
    else:
        path.write_bytes(content)
    assert named in refuse("--checkpoint_path", copy)


BAD_CONFIGS = {  # what it says (None: nothing), what is named
    "unknown architecture": ({"architectures": ["Gpt9ForCausalLM"]}, "Gpt9ForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture"),
    "unknown activation": ({"hidden_act": "gelu"}, "gelu"),
    "no hidden_size": ({"hidden_size": None}, "hidden_size"),
    "hidden_size a text": ({"hidden_size": "64"}, "64"),
    "0 heads": ({"num_attention_heads": 0, "head_dim": 16}, "copy"),
}


@pytest.mark.parametrize("changes, named", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config(refuse, copy, changes, named):
    path = copy / "config.json"
    config = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in config.items() if value is not None})
    assert named in refuse("--checkpoint_path", copy)


NORM = "model.layers.1.input_layernorm.weight"
HEAD = "lm_head.weight"
BAD_TENSORS = {  # its name, and what it is (None: nothing)
    "missing": (NORM, None),
    "extra": ("extra", torch.ones(2)),
    "misshapen": (NORM, torch.ones(65)),
    "transposed": (HEAD, torch.ones(64, len(train_bpe().get_vocab()))),
    "of integers": (NORM, torch.ones(64, dtype=torch.int64)),
}


def edit_weights(directory, name, tensor):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name, tensor", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensor(refuse, copy, name, tensor):
    edit_weights(copy, name, tensor)
    assert name in refuse("--checkpoint_path", copy)


@pytest.mark.parametrize("named", ["no directory", "a file", "an empty directory"])
def test_no_checkpoint(refuse, tmp_path, named):
    path = tmp_path / named
    if named == "a file":
        path.write_text("")
    if named == "an empty directory":
        path.mkdir()
    assert named in refuse("--checkpoint_path", path)


def test_spoiled_sentencepiece(refuse, copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"junk" * 50)
    assert "tokenizer" in refuse("--checkpoint_path", copy)


def test_tokenizer_settings_for_training(copy, capsys):
    """A tokenizer that was saved with a length to cut and to fill texts to does neither here."""
    argv = ["--checkpoint_path", copy, "--prompt", "the quick fox", *QUICK]
    want = run_json(capsys, *argv)[0][0]["prompt_ids"]
    tokenizer = train_bpe()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(copy / "tokenizer.json"))
    assert run_json(capsys, *argv)[0][0]["prompt_ids"] == want and len(want) > 2
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=len(want) + 3)
    tokenizer.save(str(copy / "tokenizer.json"))
    assert run_json(capsys, *argv)[0][0]["prompt_ids"] == want


def test_logits_that_are_no_numbers(refuse, copy):
    """As where half precision overflows."""
    edit_weights(copy, NORM, torch.full((64,), float("nan")))
    argv = ["--checkpoint_path", copy, *QUICK, "--json"]
    assert "--precision" in refuse(*argv)
    assert "--precision" in refuse(*argv, "--top_p", 0.9, "--num_samples", 3, "--batch_size", 2)


def test_tokenizer_of_another_model(refuse, copy):
    """A prompt with ids past the embedding: an error here, not an index out of bounds later."""
    tokenizer = train_bpe()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(copy / "tokenizer.json"))
    refuse("--checkpoint_path", copy, "--prompt", "a zebra")


TEMPLATES = {
    "none": None,
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "refusing, in two lines": "{{ raise_exception('roles\nmust alternate') }}",
    "broken": "{% if %}",
}


@pytest.mark.parametrize("flag", ["--chat", "--interactive"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_bad_chat_template(refuse, copy, monkeypatch, template, flag):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    write_json(copy / "tokenizer_config.json", {"chat_template": template})
    error = refuse("--checkpoint_path", copy, flag)
    assert "template" in error
    if template and "raise" in template:
        assert "roles must alternate" in error


def test_chat_template_file_no_text(refuse, copy):
    (copy / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    refuse("--checkpoint_path", copy, "--chat", "--prompt", "Hello")


BAD_LINES = {
    "no JSON": "fox",
    "cut JSON": '{"prompt": "a", ',
    "a list": '["prompt"]',
    "a number": "7",
    "no prompt": '{"id": 5}',
    "prompt no text": '{"prompt": 5}',
    "prompt null": '{"prompt": null}',
    "seed no integer": '{"prompt": "a", "seed": 1.5}',
    "seed a text": '{"prompt": "a", "seed": "1"}',
    "max_new_tokens 0": '{"prompt": "a", "max_new_tokens": 0}',
    "max_new_tokens true": '{"prompt": "a", "max_new_tokens": true}',
    "id a list": '{"prompt": "a", "id": [1]}',
    "id null": '{"prompt": "a", "id": null}',
    "id again": '{"prompt": "a", "id": "one"}',
    "prompt of half a character": '{"prompt": "fox \\ud800"}',
    "id of half a character": '{"prompt": "a", "id": "\\ud800"}',
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(refuse, tiny, tmp_path, line):
    """The error names file and line; blank lines count."""
    path = tmp_path / "prompts.jsonl"
    text = f'{{"prompt": "fox", "id": "one"}}\n\n{line}\n{{"prompt": "dog"}}\n'
    path.write_text(text, errors="surrogateescape")
    error = refuse("--checkpoint_path", tiny, "--prompts_file", path)
    assert "prompts.jsonl" in error and "line 3" in error


BAD_CONTENTS = {"empty": b"", "blank": b"\n \n", "not UTF-8": b"fox\n\xff\xfe\n"}


@pytest.mark.parametrize("content", BAD_CONTENTS.values(), ids=BAD_CONTENTS)
def test_bad_prompts_file(refuse, tiny, tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert "prompts.txt" in refuse("--checkpoint_path", tiny, "--prompts_file", path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_printed(tiny):
    """One line and status 2, at an end that flushes what is buffered too."""
    settings = environment()
    settings.pop("PYTHONUNBUFFERED", None)
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK]
    with open("/dev/full", "w") as full:
        done = command(*argv, stdout=full, env=settings)
    assert done.returncode == 2 and is_one_line(done.stderr)


def test_temperature_of_almost_nothing(tiny, capsys):
    """A number that fp32 takes for 0 means what 0 means."""
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK, "--temperature"]
    greedy = texts(capsys, *argv, "0")
    assert texts(capsys, *argv, "1e-46") == texts(capsys, *argv, "1e-31") == greedy


def test_long_prompt_among_others(refuse, tiny, tmp_path):
    """All prompts are checked before the first is run; the error says which one it is."""
    path = tmp_path / "p.jsonl"
    long = json.dumps({"prompt": "fox " * CONTEXT, "id": "long"})
    path.write_text('{"prompt": "fox"}\n' + long)
    assert "long" in refuse("--checkpoint_path", tiny, "--prompts_file", path, "--json")


def test_empty_prompt_with_bos(copy, capsys):
    """A tokenizer with BOS makes one token of nothing, and that is a prompt."""
    train_bpe(bos=True).save(str(copy / "tokenizer.json"))
    completions, _, _ = run_json(capsys, "--checkpoint_path", copy, "--prompt", "", *QUICK)
    assert completions[0]["prompt_ids"] == [0]


def test_output_a_directory(refuse, tiny, tmp_path):
    refuse("--checkpoint_path", tiny, "--output", tmp_path)
    refuse("--checkpoint_path", tiny, "--output", tmp_path / "no" / "such" / "place.jsonl")


FOREIGN = {
    "text": b"Dear diary,\nnothing of note.\n",
    "a line without end": b"Dear diary",
    "JSON of another kind": b'{"name": "x", "version": 1}\n',
    "JSON without end of line": b'{"name": "x", "version": 1}',
    "JSON over lines": b'{\n  "name": "x"\n}\n',
    "a list": b"[1, 2]\n",
    "completions, then text": b'{"id": 0, "sample": 0}\nDear diary',
    "bytes": b"\x00\xff\xfe{}\n",
    "a torn line within": b'{"id": 0, "sample": 0}\n{"id": 1, "sam\n{"id": 2, "sample": 0}\n',
    "a bracket": b"{ is a brace",
    "a prompt without end of line": b'{"id": 1, "prompt": "fox"}',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_output_foreign(refuse, tiny, tmp_path, content):
    """A file that is not ours is refused, and stays as it was."""
    path = tmp_path / "precious"
    path.write_bytes(content)
    assert "precious" in refuse("--checkpoint_path", tiny, "--output", path, *QUICK)
    assert path.read_bytes() == content


def test_bad_input_leaves_output(refuse, tiny, tmp_path):
    """An error after --output was looked at leaves that file as it was, a torn line too."""
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": 0, "sample": 0}\n{"id": 1, "sam')
    before = path.read_bytes()
    refuse("--checkpoint_path", tiny, "--output", path, "--prompt", str(CONTEXT + 1))
    assert path.read_bytes() == before


# ---- JSON lines


def test_json_fields(tiny, capsys):
    """Exactly the fields and types that are promised, the stats last."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--prompt", "fox"]
    argv += ["--num_samples", 2, "--batch_size", 3, "--max_new_tokens", 6, "--ignore_eos"]
    completions, stats, err = run_json(capsys, *argv)
    found = sorted((c["id"], c["sample"]) for c in completions)
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]
    tokenizer = train_bpe()
    for c in completions:
        assert list(c) == COMPLETION_KEYS
        assert c["prompt"] == ("the dog", "fox")[c["id"]]
        assert c["prompt_ids"] == tokenizer.encode(c["prompt"]).ids
        assert c["prompt_tokens"] == len(c["prompt_ids"])
        assert c["seed"] == 1234
        assert c["finish_reason"] == "length"
        assert len(c["tokens"]) == len(c["logprobs"]) == 6
        assert all(type(token) is int for token in c["tokens"])
        assert all(type(logprob) is float and logprob <= 0 for logprob in c["logprobs"])
        assert c["text"] == tokenizer.decode(c["tokens"])
    assert list(stats) == STATS_KEYS
    assert stats["new_tokens"] == 24
    assert stats["accept_counts"] == [] and stats["deterministic"] is False
    assert stats["compile_s"] < 1
    for name in STATS_KEYS:
        if name.endswith(("_per_sec", "_token_s", "load_s", "_bytes", "gb_s", "_gb")):
            assert 0 < stats[name] < math.inf, name
    assert "tokens/s" in err, "words for people go to standard error"


def test_stats_of_one_token(tiny, capsys):
    """Nothing was decoded: the speed is 0, not an error and not infinite, which is no JSON."""
    for argv in (["--max_new_tokens", 1], ["--prompt", CONTEXT]):
        _, stats, _ = run_json(capsys, "--checkpoint_path", tiny, *argv)
        assert stats["decode_tokens_per_sec"] == 0 and stats["bandwidth_gb_s"] == 0


def test_logprobs_are_exact(tiny, capsys):
    """Printed so that they parse back to the very float32 that was computed."""
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", "--max_new_tokens", 40]
    (printed,), _, _ = run_json(capsys, *argv)
    for logprob in printed["logprobs"]:
        assert struct.unpack("f", struct.pack("f", logprob)) == (logprob,)
    model, tokenizer = load(Path(tiny), torch.bfloat16)
    engine = generate.Engine(model, tokenizer, 1, 64)
    request = Request(0, "dog", printed["prompt_ids"], max_new_tokens=40)
    *_, (completion, _) = engine.generate([request])
    assert completion.logprobs == printed["logprobs"] and completion.tokens == printed["tokens"]


def test_same_text_every_way(tiny, tmp_path, capsys):
    """One slot or many, whole or in chunks, on the screen or in a file: the same completions."""
    argv = ["--checkpoint_path", tiny, "--num_samples", 3, "--max_new_tokens", 12, *FP32]
    for prompt in ("the dog", "a fox jumps over", "Nothing", "40"):
        argv += ["--prompt", prompt]
    want = texts(capsys, *argv)
    assert len(want) == 12 and len(set(map(tuple, want.values()))) == 12
    path = tmp_path / "o.jsonl"
    assert texts(capsys, *argv, "--batch_size", 5, "--prefill_chunk", 3, "--output", path) == want
    lines = list(map(json.loads, path.read_text().splitlines()))
    assert {(line["id"], line["sample"]): line["tokens"] for line in lines} == want
    assert [list(line) for line in lines] == [COMPLETION_KEYS] * 12


def test_precision(tiny, capsys):
    """All three run, and the logprobs of a prompt's first token are about the same."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 3]
    runs = {}
    for precision in cli.PRECISIONS:
        (completion,), stats, _ = run_json(
            capsys, *argv, "--temperature", 0, "--precision", precision
        )
        runs[precision] = completion["logprobs"][0], stats["model_bytes"]
    assert set(runs) == {"bf16", "fp16", "fp32"}
    logprob, size = runs["fp32"]
    for name in ("bf16", "fp16"):
        assert abs(runs[name][0] - logprob) < 0.1
        assert runs[name][1] < 0.6 * size


def test_seed_matters(tiny, capsys):
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 12, "--seed"]
    one = texts(capsys, *argv, 1)
    assert texts(capsys, *argv, 2) != one
    assert texts(capsys, *argv, 1) == one
    assert texts(capsys, *argv, -1) and texts(capsys, *argv, 2**70)


def test_text_for_people(tiny, capsys):
    """Without --json: the prompt and its text on standard output, figures on standard error."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", "12", *FP32]
    completions, _, _ = run_json(capsys, *argv)
    for more in ([], ["--batch_size", "2"]):
        generate.main([*argv, *more])
        out, err = capsys.readouterr()
        assert out.strip("\n") == ("the dog" + completions[0]["text"]).strip("\n")
        assert "tokens/s" in err and "error" not in err
        assert "% of the 12 GB/s that this machine reads" in err


def test_text_of_several(tiny, capsys):
    """Every completion is on standard output, whole, whichever slot it came from."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--prompt", "fox"]
    argv += ["--max_new_tokens", "12", "--num_samples", "2", *FP32]
    completions, _, _ = run_json(capsys, *argv)
    for batch_size in ("1", "3"):
        generate.main([*argv, "--batch_size", batch_size])
        out = capsys.readouterr().out
        assert all(c["prompt"] + c["text"] in out for c in completions)


def test_stop(tiny, capsys):
    """--stop is repeatable and cut from the text; --ignore_eos goes on past end tokens."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 60, *FP32]
    argv.append("--ignore_eos")
    (whole,), _, _ = run_json(capsys, *argv)
    text = whole["text"]
    start = next(i for i in range(4, 50) if "\ufffd" not in text[i : i + 3])
    stop = text[start : start + 3]
    (cut,), _, _ = run_json(capsys, *argv, "--stop", "never there", "--stop", stop)
    assert cut["text"] == text[: text.find(stop)] and cut["finish_reason"] == "stop"
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])]


# ---- prompts


def test_prompts_jsonl(tiny, tmp_path, capsys):
    """id, seed and max_new_tokens of a line go before the flags; what merely looks like a line end
    is text."""
    lines = [
        {"prompt": "the dog", "id": "a", "seed": 7, "max_new_tokens": 3},
        {"prompt": "fox\u2028and\u0085dog \u4f60\u597d", "seed": 8},
        {"prompt": "12"},  # a number is text here
        {"prompt": "the dog", "id": 77},
    ]
    path = tmp_path / "prompts.jsonl"
    content = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(content + "\n\n", newline="")
    argv = ["--checkpoint_path", tiny, "--max_new_tokens", 5, "--ignore_eos"]
    completions, _, _ = run_json(capsys, *argv, "--prompts_file", path)
    assert [c["id"] for c in completions] == ["a", 1, 2, 77]
    assert [c["seed"] for c in completions] == [7, 8, 1234, 1234]
    assert [len(c["tokens"]) for c in completions] == [3, 5, 5, 5]
    assert [c["prompt"] for c in completions] == [line["prompt"] for line in lines]
    assert completions[2]["prompt_ids"] == train_bpe().encode("12").ids
    alone = texts(capsys, *argv, "--prompt", "the dog", "--max_new_tokens", 3, "--seed", 7)
    assert alone[0, 0] == completions[0]["tokens"]


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "setting, value",
    [
        ("temperature", 0),
        ("temperature", 3.5),
        ("top_k", 1),
        ("top_p", 0.01),
        ("min_p", 0.9),
        ("repetition_penalty", 0.1),
        ("logit_bias", {"40": 1e30}),
        ("seed", 9),
        ("max_new_tokens", 2),
    ],
)
def test_setting_of_a_line(tiny, tmp_path, capsys, setting, value):
    """It is the line's alone, and does what the flag does."""
    lines = [{"prompt": "the dog"}, {"prompt": "the dog", setting: value}]
    path = write_lines(tmp_path / "prompts.jsonl", *lines)
    argv = ["--checkpoint_path", tiny, "--max_new_tokens", 8, "--ignore_eos", *FP32]
    found = texts(capsys, *argv, "--prompts_file", path)
    plain = texts(capsys, *argv, "--prompt", "the dog")[0, 0]
    flag = [f"--{setting}", json.dumps(value)]
    flagged = texts(capsys, *argv, "--prompt", "the dog", *flag)[0, 0]
    assert found[0, 0] == plain
    assert found[1, 0] == flagged != plain


def test_stop_of_a_line(tiny, tmp_path, capsys):
    """One text or a list, instead of that of the flags."""
    argv = ["--checkpoint_path", tiny, "--max_new_tokens", 40, "--ignore_eos", *FP32]
    (whole,), _, _ = run_json(capsys, *argv, "--prompt", "the dog")
    text = whole["text"]
    one, other = text[5], text[9]
    settings = [one, [one], [other, "never there"], [], None]
    lines = [{"prompt": "the dog", "stop": stop} for stop in settings[:-1]]
    path = write_lines(tmp_path / "prompts.jsonl", *lines, {"prompt": "the dog"})
    completions, _, _ = run_json(capsys, *argv, "--prompts_file", path, "--stop", text[3])
    want = [text.partition(stop)[0] for stop in (one, one, other)] + [text]
    assert [c["text"] for c in completions] == [*want, text.partition(text[3])[0]]


@pytest.mark.parametrize(
    "line, word",
    [
        ({"max_tokens": 3}, "max_tokens"),
        ({"Temperature": 0}, "Temperature"),
        ({"n": 2}, "there is no n"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": -0.5}, "-0.5"),
        ({"temperature": math.nan}, "nan"),
        ({"temperature": math.inf}, "inf"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"min_p": True}, "min_p"),
        ({"min_p": math.nan}, "nan"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"repetition_penalty": False}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "nan"),
        ({"repetition_penalty": math.inf}, "inf"),
        ({"logit_bias": [[5, 1]]}, "logit_bias"),
        ({"logit_bias": '{"5": 1}'}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias of 5"),
        ({"logit_bias": {"5": None}}, "logit_bias of 5"),
        ({"logit_bias": {"5": math.nan}}, "nan"),
        ({"logit_bias": {"380": 1}}, "380"),
        ({"logit_bias": {"-1": 1}}, "-1"),
        ({"logit_bias": {"": 1}}, "''"),
        ({"logit_bias": {"five": 1}}, "five"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [7]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"id": 0}, "earlier line has the id 0"),
        ({"system": "Be brief."}, "--chat"),
        ({"messages": [{"role": "user", "content": "a"}]}, "--chat"),
    ],
)
def test_refused_setting_of_a_line(refuse, tiny, tmp_path, line, word):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "fox"}, {"prompt": "dog"} | line)
    error = refuse("--checkpoint_path", tiny, "--prompts_file", path)
    assert "line 2" in error and word in error


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"content": "hello"}]},
        {"messages": [{"role": "system", "content": "a"}], "system": "b"},
    ],
)
def test_refused_conversation_of_a_line(refuse, tiny, tmp_path, line):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "fox"}, line)
    assert "line 2" in refuse("--checkpoint_path", tiny, "--chat", "--prompts_file", path)


def test_conversations_in_a_file(tiny, tmp_path, capsys):
    """Messages are the whole conversation; a system message of a line goes before the flag's."""
    talk = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    talk.append({"role": "user", "content": "lazy"})
    own = [{"role": "system", "content": "Be slow."}, *talk]
    lines = [{"prompt": "12"}, {"prompt": "fox", "system": "Be quick."}]
    lines += [{"messages": talk}, {"messages": talk, "system": ""}, {"messages": own, "seed": 3}]
    path = write_lines(tmp_path / "p.jsonl", *lines)
    argv = ["--checkpoint_path", tiny, "--chat", "--system", "Be brief.", *QUICK]
    completions, _, _ = run_json(capsys, *argv, "--prompts_file", path)
    decode = train_bpe().decode
    spoken = "<|user|>fox<|end|><|assistant|>dog<|end|><|user|>lazy<|end|><|assistant|>"
    assert [decode(c["prompt_ids"], skip_special_tokens=False) for c in completions] == [
        "<|system|>Be brief.<|end|><|user|>12<|end|><|assistant|>",
        "<|system|>Be quick.<|end|><|user|>fox<|end|><|assistant|>",
        "<|system|>Be brief.<|end|>" + spoken,
        "<|system|><|end|>" + spoken,
        "<|system|>Be slow.<|end|>" + spoken,
    ]
    assert [c["prompt"] for c in completions] == ["12", "fox", "lazy", "lazy", "lazy"]
    assert [c["seed"] for c in completions] == [1234] * 4 + [3]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a.NdJson"])
def test_names_of_json_lines(tiny, tmp_path, capsys, name):
    path = write_lines(tmp_path / name, {"prompt": "fox"})
    completions, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompts_file", path, *QUICK)
    assert completions[0]["prompt"] == "fox"


def test_other_names_are_text(tiny, tmp_path, capsys):
    path = write_lines(tmp_path / "jsonl.txt", {"prompt": "fox"})
    completions, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompts_file", path, *QUICK)
    assert completions[0]["prompt"] == '{"prompt": "fox"}'


@pytest.mark.parametrize("number", ["42", "007"])
def test_chat_about_a_number(tiny, capsys, number):
    argv = ["--checkpoint_path", tiny, "--chat", "--prompt", number, *QUICK]
    completions, _, _ = run_json(capsys, *argv)
    want = train_bpe().encode(f"<|user|>{number}<|end|><|assistant|>").ids
    assert completions[0]["prompt_ids"] == want


def test_max_seq_length(tiny, capsys, refuse):
    """It limits a prompt and its completion, as a smaller context would, and the cache."""
    argv = ["--checkpoint_path", tiny, "--prompt", 12, "--ignore_eos", *FP32]
    argv += ["--max_new_tokens", 8]
    whole, _, err = run_json(capsys, *argv, "--max_seq_length", 20)
    assert "warning" not in err
    cut, _, err = run_json(capsys, *argv, "--max_seq_length", 16)
    assert "warning" in err and "16" in err
    assert cut[0]["tokens"] == whole[0]["tokens"][:4] and len(cut[0]["tokens"]) == 4
    assert run_json(capsys, *argv, "--max_seq_length", 10**9)[0] == whole
    assert "12 tokens" in refuse(*argv, "--max_seq_length", 11)
    for wrong in (0, -1, 2**63):
        assert "max_seq_length" in refuse(*argv, "--max_seq_length", wrong)
    refuse(*argv, "--max_seq_length", "many")


def type_in(monkeypatch, content):
    """What standard input gives from now on."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_prompts_text(tiny, tmp_path, capsys, monkeypatch):
    """One prompt a line, of a file and of standard input; blank lines are none, and braces and
    numbers are text."""
    path = tmp_path / "prompts.txt"
    prompts = ["the dog", "  fox 你好", "12", "[x] {y}"]
    content = "\r\n".join([*prompts[:2], "", *prompts[2:]])
    path.write_bytes(content.encode("utf-8-sig"))  # some editors begin so
    argv = ["--checkpoint_path", tiny, *QUICK, "--prompts_file"]
    completions, _, _ = run_json(capsys, *argv, path)
    assert [c["prompt"] for c in completions] == prompts
    assert [c["id"] for c in completions] == [0, 1, 2, 3]
    type_in(monkeypatch, "\n".join(prompts).encode())
    again, _, _ = run_json(capsys, *argv, "-")
    assert again == completions


def test_prompts_jsonl_stdin(tiny, capsys, monkeypatch):
    type_in(monkeypatch, b'{ "prompt": "fox", "id": "x"}\n{"prompt": "dog", "seed": 5}\n')
    completions, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompts_file", "-", *QUICK)
    found = [(c["id"], c["prompt"], c["seed"]) for c in completions]
    assert found == [("x", "fox", 1234), (1, "dog", 5)]


def test_num_samples(tiny, capsys):
    """Different texts, the first of them the one that is made without the flag; at temperature 0
    one text."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 16, *FP32]
    four = texts(capsys, *argv, "--num_samples", 4, "--batch_size", 2)
    assert sorted(four) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert len(set(map(tuple, four.values()))) == 4
    assert texts(capsys, *argv)[0, 0] == four[0, 0]
    greedy = texts(capsys, *argv, "--num_samples", 3, "--temperature", 0)
    assert len(greedy) == 3 and len(set(map(tuple, greedy.values()))) == 1


def test_synthetic_prompts(tiny, capsys):
    """An integer is that many random tokens, the same ones every time, all of the vocabulary."""
    argv = ["--checkpoint_path", tiny, "--prompt", 200, "--prompt", "7"]
    argv += ["--max_new_tokens", 2, "--ignore_eos"]
    completions, _, _ = run_json(capsys, *argv)
    ids = completions[0]["prompt_ids"]
    assert [c["prompt_tokens"] for c in completions] == [200, 7]
    assert len(set(ids)) > 80
    assert 0 <= min(ids) and max(ids) < train_bpe().get_vocab_size()
    assert run_json(capsys, *argv)[0] == completions


def test_context_warning(tiny, capsys):
    """Prompt plus --max_new_tokens past the context: a warning, and generation up to it."""
    argv = ["--checkpoint_path", tiny, "--prompt", CONTEXT - 8, "--ignore_eos"]
    for asked in (8, 9, 10**12):
        completions, _, err = run_json(capsys, *argv, "--max_new_tokens", asked)
        assert ("warning" in err) == (asked > 8)
        assert len(completions[0]["tokens"]) == 8
        assert completions[0]["finish_reason"] == "length"


def test_chat(tiny, capsys):
    """--chat feeds the rendered template; --system goes first. The text alone is printed."""
    encode = train_bpe().encode
    user = "<|user|>the dog<|end|><|assistant|>"
    argv = ["--checkpoint_path", tiny, "--chat", "--prompt", "the dog", *QUICK]
    (plain,), _, _ = run_json(capsys, *argv)
    (brief,), _, _ = run_json(capsys, *argv, "--system", "Be brief.")
    assert plain["prompt_ids"] == encode(user).ids and plain["prompt"] == "the dog"
    assert brief["prompt_ids"] == encode("<|system|>Be brief.<|end|>" + user).ids
    generate.main(argv)
    assert capsys.readouterr().out.strip("\n") == plain["text"].strip("\n")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_chat_quantized_in_a_batch_with_drafts(tiny, capsys, mode):
    """The bits of one prompt at a time; another seed has others."""
    argv = ["--checkpoint_path", tiny, "--chat", "--quantize", mode, "--deterministic"]
    argv += ["--max_new_tokens", 12]
    for prompt in ("the dog the dog", "fox", "quick brown"):
        argv += ["--prompt", prompt]

    def bits(*flags):
        completions, _, _ = run_json(capsys, *argv, *flags)
        return sorted((c["tokens"], c["logprobs"]) for c in completions)

    want = bits()
    assert bits("--batch_size", 3, "--prompt_lookup") == bits("--batch_size", 2) == want
    assert bits("--seed", 5) != want


def test_random_weights(tiny, capsys, refuse):
    """A shape is enough for synthetic prompts, and for nothing else."""
    config = Path(tiny) / "config.json"
    argv = ["--random_weights", config, "--max_new_tokens", 5]
    completions, stats, _ = run_json(capsys, *argv, "--prompt", 9)
    assert len(completions[0]["tokens"]) == 5 and completions[0]["text"] == ""
    assert stats["model_bytes"] > 0
    assert len(run_json(capsys, *argv)[0]) == 1
    refuse("--random_weights", config, "--prompt", "the dog")
    refuse("--random_weights", config, "--chat")
    refuse("--random_weights", config, "--interactive")
    refuse("--random_weights", config.with_name("nothing.json"))


def test_bad_profile(refuse, tiny, tmp_path):
    for place in (tmp_path, tmp_path / "no" / "trace.json"):
        refuse("--checkpoint_path", tiny, "--profile", place, *QUICK)


@pytest.mark.parametrize("flag", ["--compile", "--compile_prefill"])
def test_no_compiler(refuse, tiny, monkeypatch, flag):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++" in refuse("--checkpoint_path", tiny, flag, "--device", "cpu", *QUICK)


def test_profile(tiny, tmp_path, capsys):
    run_json(capsys, "--checkpoint_path", tiny, "--profile", tmp_path / "trace.json", *QUICK)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


# ---- --output


PROMPTS = 30


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
    """The flags of a run of so many prompts, two samples each, and its tokens, undisturbed."""
    directory = tmp_path_factory.mktemp("job")
    lines = [f'{{"prompt": "dog {i}", "id": "p{i}"}}\n' for i in range(PROMPTS)]
    (directory / "p.jsonl").write_text("".join(lines))
    argv = ["--checkpoint_path", tiny, "--prompts_file", str(directory / "p.jsonl")]
    argv += ["--num_samples", "2", "--max_new_tokens", "24", "--ignore_eos", *FP32]
    whole = directory / "whole.jsonl"
    generate.main([*argv, "--batch_size", "8", "--json", "--output", str(whole)])
    return argv, by_key(whole)


def by_key(path):
    """Completions of a file by (id, sample); nothing may stand there twice."""
    lines = list(map(json.loads, path.read_text().split("\n")[:-1]))
    found = {(line["id"], line["sample"]): line["tokens"] for line in lines}
    assert len(found) == len(lines), "a completion stands there twice"
    assert path.read_bytes().endswith(b"\n")
    return found


def disturbed(argv, path, sign):
    """Start the job, send a signal after its fifth line; what it left, its status and its standard
    error."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *argv, "--output", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=heed_interrupts,
    )
    try:
        end = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, "it ended before the signal"
            assert time.monotonic() < end, "it hung before the signal"
            time.sleep(0.005)
        process.send_signal(sign)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return path.read_bytes(), process.returncode, err


def test_output_survives_a_kill(job, tmp_path, capsys):
    """Killed in the middle, the last line torn: a rerun loses nothing, does nothing twice, and
    keeps what was there."""
    argv, want = job
    path = tmp_path / "out.jsonl"
    left, status, _ = disturbed(argv, path, signal.SIGKILL)
    assert status == -signal.SIGKILL
    whole = left[: left.rfind(b"\n") + 1]
    lines = whole.count(b"\n")
    assert 5 <= lines < len(want), "the kill came in the middle"
    path.write_bytes(whole[:-7])  # the last line loses its end
    kept = whole[: whole[:-1].rfind(b"\n") + 1]
    completions, stats, _ = run_json(capsys, *argv, "--batch_size", 8, "--output", path)
    assert by_key(path) == want
    assert path.read_bytes().startswith(kept)
    assert len(completions) == len(want) - (lines - 1), "only what was missing is made and printed"
    assert stats["new_tokens"] == sum(len(c["tokens"]) for c in completions)
    check_nothing_is_left_to_do(argv, path, capsys)


def check_nothing_is_left_to_do(argv, path, capsys):
    """Another rerun leaves the file as it is, and prints stats, a line of which in the file is no
    trouble. One that asks for more makes what is new."""
    with path.open("a") as file:
        file.write('{"stats": {"new_tokens": 1}}\n')
    before = path.read_bytes()
    completions, stats, _ = run_json(capsys, *argv, "--output", path)
    assert (completions, stats["new_tokens"], path.read_bytes()) == ([], 0, before)
    argv = [*argv, "--num_samples", 3, "--batch_size", 8]
    more, _, _ = run_json(capsys, *argv, "--output", path)
    assert sorted(c["sample"] for c in more) == [2] * PROMPTS


def test_output_no_file(tiny, capsys):
    """Where there is nothing to read, nothing is waited for."""
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK]
    reader, writer = os.pipe()
    run_json(capsys, *argv, "--output", f"/dev/fd/{writer}")
    os.close(writer)
    with open(reader) as file:
        (line,) = file.readlines()
    assert line.startswith('{"id": 0')


TORN = {"brace": 1, "quote": 2, "key": 9, "line end alone": -1}


@pytest.mark.parametrize("keep", TORN.values(), ids=TORN)
def test_output_torn_anywhere(tiny, tmp_path, capsys, keep):
    """However short the torn line is, it is dropped and made again."""
    path = tmp_path / "out.jsonl"
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", "--prompt", "fox", *QUICK]
    argv += ["--output", path]
    run_json(capsys, *argv)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:keep])
    completions, _, _ = run_json(capsys, *argv)
    assert [c["id"] for c in completions] == [1]
    assert path.read_bytes() == first + second
    _, _, err = run_json(capsys, *argv)
    assert f"2 of 2 completions are in {path}" in err


def test_interrupt(job, tmp_path):
    """Ctrl-C: what was finished is on disk, and no traceback."""
    argv, want = job
    left, status, err = disturbed(argv, tmp_path / "out.jsonl", signal.SIGINT)
    found = by_key(tmp_path / "out.jsonl")
    assert 5 <= len(found) < len(want) and left.count(b"\n") == len(found)
    assert all(want[key] == tokens for key, tokens in found.items())
    assert status != 0 and "Traceback" not in err


@pytest.mark.parametrize("name", ["generate", "quantize", "scripts/bench", "scripts/verify"])
def test_interrupt_of_imports(name):
    """Ctrl-C before the first line of main(): no word, and what a shell calls status 130."""
    argv = [sys.executable, f"{ROOT}/{name}.py", "--help"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    mapped = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in mapped.read_text():  # it takes seconds from here on
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


# ---- conversations


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """Types lines into --interactive; returns what each turn fed to the model, as text, and what
    was printed."""
    decode = train_bpe().decode
    plain = generate.Engine.generate

    def run(lines, *flags):
        fed = []

        def spy(engine, requests):
            requests = list(requests)
            fed.extend(decode(r.prompt_ids, skip_special_tokens=False) for r in requests)
            return plain(engine, requests)

        monkeypatch.setattr(generate.Engine, "generate", spy)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        argv = ["--checkpoint_path", tiny, "--interactive", "--max_new_tokens", "12", *FP32]
        generate.main([*argv, *flags])
        return fed, capsys.readouterr()

    return run


def test_interactive_history(talk):
    """The second turn is fed the first one and its answer; both answers are printed."""
    fed, (out, _) = talk(["the dog", "fox", "/exit", "never"], "--stop", "zzz")
    assert len(fed) == 2
    assert fed[0] == "<|user|>the dog<|end|><|assistant|>"
    end = "<|end|><|user|>fox<|end|><|assistant|>"
    assert fed[1].startswith(fed[0]) and fed[1].endswith(end)
    answer = fed[1].removeprefix(fed[0]).removesuffix(end)
    assert len(answer) > 3 and answer in out


def test_interactive_clear(talk):
    """/clear forgets all but the system prompt; blank lines and the end of input are no turns."""
    lines = ["the dog", "", "/clear", "fox", "   "]
    fed, _ = talk(lines, "--system", "Be brief.", "--chat")
    system = "<|system|>Be brief.<|end|>"
    assert fed == [f"{system}<|user|>{word}<|end|><|assistant|>" for word in ("the dog", "fox")]


def test_interactive_interrupted(talk, monkeypatch):
    """Ctrl-C stops an answer; what there was of it stays in the history, and the conversation goes
    on."""
    push = Completion.push
    seen = []

    def interrupt(completion, token, logprob):
        seen.append(token)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return push(completion, token, logprob)

    monkeypatch.setattr(Completion, "push", interrupt)
    fed, _ = talk(["the dog", "fox", "/exit"])
    assert len(fed) == 2 and fed[1].startswith(fed[0])
    assert fed[1].endswith("<|user|>fox<|end|><|assistant|>")
    assert len(seen) > 7


@pytest.mark.parametrize("limit, want", [(None, [40, 80, 160, 256]), (100, [40, 80, 100])])
def test_interactive_memory(talk, monkeypatch, limit, want):
    """The cache grows with the conversation, up to the context or --max_seq_length."""
    lengths = []
    new_cache = generate.Transformer.new_cache

    def spy(model, batch_size, length):
        lengths.append(length)
        return new_cache(model, batch_size, length)

    monkeypatch.setattr(generate.Transformer, "new_cache", spy)
    monkeypatch.setattr(chat, "LENGTH", 40)
    lines = ["the quick brown fox jumps over the dog"] * 12
    flags = ["--max_seq_length", str(limit)] if limit else []
    fed, (out, err) = talk(lines, *flags)
    assert lengths == want
    assert "/clear starts over" in err  # at the end it is full
    roomy, (all_out, _) = talk(lines[: len(fed)], *flags)
    assert fed == roomy and out.startswith(all_out.rstrip("\n"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt_lookup", "--deterministic"],
        ["--draft_checkpoint_path", "--speculate_k", "3"],
        ["--quantize", "int8", "--draft_quantize", "int4", "--deterministic"],
    ],
    ids=lambda flags: flags[0],
)
def test_interactive_memory_beside_drafts(talk, tiny, monkeypatch, flags):
    """A cache that grows, of a smaller model too, changes nothing of what is said."""
    flags = [word for flag in flags for word in (flag, tiny)[: 1 + flag.endswith("path")]]
    lines = ["the quick brown fox jumps over the dog"] * 4
    want, (said, _) = talk(lines, *flags)
    monkeypatch.setattr(chat, "LENGTH", 30)
    found, (out, _) = talk(lines, *flags)
    assert (found, out) == (want, said) and len(found) == 4


def test_interactive_as_a_process(tiny):
    """Bytes that are no text do not end a conversation. One that outgrows the context says so and
    waits for /clear, after which it answers again."""
    lines = ["the \udcff dog", *["the quick brown fox jumps over the dog again"] * 30]
    lines += ["/clear", "the dog"]
    typed = "\n".join(lines) + "\n"
    argv = ["--checkpoint_path", tiny, "--interactive", *QUICK]
    done = command(*argv, input=typed, encoding="utf-8", errors="surrogateescape")
    assert done.returncode == 0
    refused = done.stderr.splitlines()
    assert all("context" in line and "/clear starts over" in line for line in refused)
    assert 0 < len(refused) < 30
    assert len(done.stdout.rstrip("\n").split("\n")) == 32 - len(refused)


# ---- the front door


def fresh_process(code, *argv):
    argv = [sys.executable, "-c", code, *argv]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


IMPORT = """
import random, torch, torch._dynamo.config as dynamo, torch._inductor.config as inductor

def settings():
    return [
        torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), random.getstate(),
        dynamo.get_config_copy(), inductor.get_config_copy(),
    ]

before = settings()
import generate
assert settings() == before
"""
RUN = """
import sys, generate
generate.main(sys.argv[1:])
assert "torch._dynamo" not in sys.modules
"""


def test_import_changes_no_setting():
    """Importing generate.py leaves the process as it was: threads, precision, compiler."""
    fresh_process(IMPORT)


def test_a_run_imports_no_compiler(tiny):
    """It takes a second or two, for which the first token would wait."""
    fresh_process(RUN, "--checkpoint_path", tiny, *QUICK)


FLAGS = """checkpoint_path device precision quantize group_size random_weights prompt prompts_file
chat system template_args interactive score max_new_tokens temperature top_k top_p min_p
repetition_penalty logit_bias seed num_samples stop ignore_eos batch_size prefill_chunk speculate_k
draft_checkpoint_path draft_quantize prompt_lookup compile compile_prefill profile deterministic
json output""".split()


def test_help(capsys):
    """Every flag is there, with its default."""
    with pytest.raises(SystemExit) as end:
        generate.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for flag in FLAGS:
        assert f"--{flag} " in out, flag
    for default in ("200", "0.8", "1.0", "1234", "bf16"):
        assert default in out


def test_default_model(default_checkpoint):
    """The command of the README, as a person types it, from another directory."""
    argv = ["--chat", "--prompt", "What is the capital of Japan?", "--temperature", "0"]
    done = command(*argv, "--max_new_tokens", "12", cwd=default_checkpoint)
    assert done.returncode == 0 and "Tokyo" in done.stdout
    assert "Traceback" not in done.stderr
    assert "GB/s that this machine reads" in done.stderr
    assert not any(special in done.stdout for special in ("<|im_end|>", *SPECIAL))
