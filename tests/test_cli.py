"""The command line of generate.py: bad input, the JSON lines, --output that survives a kill, prompts, conversations."""

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
from safetensors.torch import load_file, save_file
from test_generate import CONTEXT, SPECIAL, load, train_bpe, write_checkpoint, write_json

import generate

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "generate.py")
KEYS = ["id", "sample", "prompt", "prompt_ids", "text", "tokens", "logprobs", "finish_reason", "prompt_tokens", "seed"]
STATS = ["decode_tokens_per_sec", "prefill_tokens_per_sec", "time_to_first_token_s", "load_s", "compile_s"]
STATS += ["new_tokens", "model_bytes", "bandwidth_gb_s", "accept_counts", "peak_memory_gb", "deterministic"]
QUICK = ["--max_new_tokens", "4", "--precision", "fp32"]


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
    *completions, stats = map(json.loads, out.split("\n")[:-1])  # splitlines knows more line ends than JSON does
    return completions, stats["stats"], err


def texts(capsys, *argv):
    """{(id, sample): tokens} of a run."""
    return {(c["id"], c["sample"]): c["tokens"] for c in run_json(capsys, *argv)[0]}


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def command(*argv, **options):
    """generate.py as a process of its own."""
    argv = [sys.executable, SCRIPT, *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=300, **options)


# ---- bad input


def refused(monkeypatch, capsys, *argv):
    """Run generate.py as a script, but in this process; it must end with status 2 and one line, returned."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(SCRIPT, run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1 and len(err) > 20, err
    return err


@pytest.fixture
def refuse(monkeypatch, capsys):
    return lambda *argv: refused(monkeypatch, capsys, *argv)


def test_bad_input_as_a_process(tiny, tmp_path):
    """Status 2, one line on standard error, nothing on standard output, no traceback."""
    output = tmp_path / "out.jsonl"
    for argv in (["--checkpoint_path", tmp_path / "nowhere"], ["--checkpoint_path", tiny, "--top_p", "1.5"]):
        done = command(*argv, "--json", "--output", output)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        assert not output.exists(), "nothing is written"


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
    monkeypatch.chdir(tmp_path)
    error = refuse("--checkpoint_path", tiny, *flags)
    assert not list(tmp_path.iterdir()), "nothing is written"
    value = flags[-1] if len(flags[-1]) < 20 and flags[0] in ("--temperature", "--top_p", "--top_k") else ""
    assert value in error and (flags[0].lstrip("-") in error or not value), "it names the flag and the value"


@pytest.mark.parametrize(
    "flags,choices",
    [
        (["--precision", "fp8"], ["bf16", "fp16", "fp32"]),
        (["--top_p", "2"], ["1"]),
        (["--device", "cuda:99"], ["cpu"]),
        (["--prompt", str(CONTEXT + 1)], [str(CONTEXT)]),
    ],
    ids=lambda x: " ".join(x),
)
def test_error_names_what_is_valid(refuse, tiny, flags, choices):
    error = refuse("--checkpoint_path", tiny, *flags)
    assert all(choice in error.replace(flags[-1], "") for choice in choices), error


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in config.items() if value is not None})


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def replace_by_file(directory):
    shutil.rmtree(directory)
    directory.write_text("")


def index_to_nothing(directory):
    write_json(directory / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "gone.safetensors"}})


NORM = "model.layers.1.input_layernorm.weight"
SPOILED = {
    "no directory": (shutil.rmtree, "copy"),
    "a file": (replace_by_file, "copy"),
    "empty directory": (empty, "config.json"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json"),
    "config binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "unknown architecture": (lambda d: edit_config(d, architectures=["Gpt9ForCausalLM"]), "Gpt9ForCausalLM"),
    "no architecture": (lambda d: edit_config(d, architectures=None), "architecture"),
    "unknown activation": (lambda d: edit_config(d, hidden_act="gelu"), "gelu"),
    "no hidden_size": (lambda d: edit_config(d, hidden_size=None), "hidden_size"),
    "hidden_size a text": (lambda d: edit_config(d, hidden_size="64"), "64"),
    "0 heads": (lambda d: edit_config(d, num_attention_heads=0, head_dim=16), "copy"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
    "missing tensor": (lambda d: edit_weights(d, lambda t: t.pop(NORM)), NORM),
    "extra tensor": (lambda d: edit_weights(d, lambda t: t.update(extra=torch.ones(2))), "extra"),
    "misshapen tensor": (lambda d: edit_weights(d, lambda t: t.update({NORM: torch.ones(65)})), NORM),
    "transposed tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
        "lm_head.weight",
    ),
    "integer tensor": (lambda d: edit_weights(d, lambda t: t.update({NORM: torch.ones(64).long()})), NORM),
    "truncated weights": (lambda d: truncate(d / "model.safetensors", -1000), "safetensors"),
    "weights cut in the header": (lambda d: truncate(d / "model.safetensors", 100), "safetensors"),
    "weights of 0 bytes": (lambda d: truncate(d / "model.safetensors", 0), "safetensors"),
    "weights no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"junk" * 99), "safetensors"),
    "index names a missing file": (index_to_nothing, "gone.safetensors"),
    "settings nested too deep": (lambda d: (d / "config.json").write_text("[" * 200_000), "recursion"),
    "template of no kind": (lambda d: write_json(d / "tokenizer_config.json", {"chat_template": [1]}), "tokenizer"),
    "end ids of no kind": (lambda d: write_json(d / "generation_config.json", {"eos_token_id": [[1]]}), "tokenizer"),
    "index no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("x"), "index.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer no JSON": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
    "tokenizer of 0 bytes": (lambda d: truncate(d / "tokenizer.json", 0), "tokenizer"),
    "tokenizer settings no JSON": (lambda d: (d / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
    "generation settings no JSON": (lambda d: (d / "generation_config.json").write_text("x"), "generation_config"),
}


@pytest.mark.parametrize("spoil,named", SPOILED.values(), ids=SPOILED)
def test_spoiled_checkpoint(refuse, copy, spoil, named):
    """Each is refused in a line that names the culprit."""
    spoil(copy)
    assert named in refuse("--checkpoint_path", copy)


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
    edit_weights(copy, lambda tensors: tensors[NORM].fill_(float("nan")))
    assert "--precision" in refuse("--checkpoint_path", copy, *QUICK, "--json")


def test_tokenizer_of_another_model(refuse, copy):
    """A prompt with ids past the embedding: an error here, not an index out of bounds later."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
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
    assert "template" in error and ("refusing" not in error or "roles must alternate" in error)


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


@pytest.mark.parametrize("content", [b"", b"\n \n", b"fox\n\xff\xfe\n"], ids=["empty", "blank", "not UTF-8"])
def test_bad_prompts_file(refuse, tiny, tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert "prompts.txt" in refuse("--checkpoint_path", tiny, "--prompts_file", tmp_path / "prompts.txt")


def test_closed_standard_input(tiny):
    done = command("--checkpoint_path", tiny, "--prompts_file", "-", preexec_fn=lambda: os.close(0))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_no_unicode_typed(tiny):
    """Bytes that are no text do not end a conversation."""
    argv = [sys.executable, SCRIPT, "--checkpoint_path", tiny, "--interactive", *QUICK]
    done = subprocess.run(argv, capture_output=True, env=environment(), timeout=300, input=b"the \xff dog\nfox\n")
    assert (done.returncode, done.stderr, len(done.stdout.split(b"\n"))) == (0, b"", 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_printed(tiny):
    """One line and status 2, at an end that flushes what is buffered too."""
    settings = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    argv = [sys.executable, SCRIPT, "--checkpoint_path", tiny, "--prompt", "dog", *QUICK]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, env=settings, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_temperature_of_almost_nothing(tiny, capsys):
    """A number that fp32 takes for 0 means what 0 means."""
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK, "--temperature"]
    assert texts(capsys, *argv, "1e-46") == texts(capsys, *argv, "1e-31") == texts(capsys, *argv, "0")


def test_long_prompt_among_others(refuse, tiny, tmp_path):
    """All prompts are checked before the first is run; the error says which one it is."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "fox"}\n' + json.dumps({"prompt": "fox " * CONTEXT, "id": "long"}))
    assert "long" in refuse("--checkpoint_path", tiny, "--prompts_file", tmp_path / "p.jsonl", "--json")


def test_empty_prompt_with_bos(tmp_path, capsys):
    """A tokenizer with BOS makes one token of nothing, and that is a prompt."""
    directory = write_checkpoint(tmp_path, bos=True)
    completions, _, _ = run_json(capsys, "--checkpoint_path", directory, "--prompt", "", *QUICK)
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
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--prompt", "fox", "--num_samples", 2, "--batch_size", 3]
    completions, stats, err = run_json(capsys, *argv, "--max_new_tokens", 6, "--ignore_eos")
    assert sorted((c["id"], c["sample"]) for c in completions) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    encode = train_bpe().encode
    for c in completions:
        assert list(c) == KEYS
        assert c["prompt"] == ("the dog", "fox")[c["id"]] and c["prompt_ids"] == encode(c["prompt"]).ids
        assert c["prompt_tokens"] == len(c["prompt_ids"]) and c["seed"] == 1234
        assert len(c["tokens"]) == len(c["logprobs"]) == 6 and c["finish_reason"] == "length"
        assert all(type(i) is int for i in c["tokens"]) and all(type(x) is float and x <= 0 for x in c["logprobs"])
        assert c["text"] == train_bpe().decode(c["tokens"])
    assert list(stats) == STATS
    assert stats["new_tokens"] == 24 and stats["accept_counts"] == [] and stats["deterministic"] is False
    measured = ["decode_tokens_per_sec", "prefill_tokens_per_sec", "time_to_first_token_s", "load_s", "model_bytes"]
    assert all(stats[name] > 0 for name in [*measured, "bandwidth_gb_s", "peak_memory_gb"])
    assert stats["compile_s"] < 1 and math.isfinite(sum(stats[name] for name in measured))
    assert "tokens/s" in err, "words for people go to standard error"


def test_stats_of_one_token(tiny, capsys):
    """Nothing was decoded: the speed is 0, not an error and not infinite, which is no JSON."""
    for argv in (["--max_new_tokens", 1], ["--prompt", CONTEXT]):
        _, stats, _ = run_json(capsys, "--checkpoint_path", tiny, *argv)
        assert stats["decode_tokens_per_sec"] == 0 and stats["bandwidth_gb_s"] == 0


def test_logprobs_are_exact(tiny, capsys):
    """Printed so that they parse back to the very float32 that was computed."""
    completions, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompt", "dog", "--max_new_tokens", 40)
    logprobs = completions[0]["logprobs"]
    assert all(struct.unpack("f", struct.pack("f", x))[0] == x for x in logprobs)
    model, tokenizer = load(Path(tiny), torch.bfloat16)
    engine = generate.Engine(model, tokenizer, 1, 64)
    ids = completions[0]["prompt_ids"]
    *_, (completion, _) = engine.generate([generate.Request(0, "dog", ids, max_new_tokens=40)])
    assert completion.logprobs == logprobs and completion.tokens == completions[0]["tokens"]


def test_same_text_every_way(tiny, tmp_path, capsys):
    """One slot or many, whole or in chunks, on the screen or in a file: the same completions."""
    argv = ["--checkpoint_path", tiny, "--num_samples", 3, "--max_new_tokens", 12, "--precision", "fp32"]
    for prompt in ("the dog", "a fox jumps over", "Nothing", "40"):
        argv += ["--prompt", prompt]
    want = texts(capsys, *argv)
    assert len(want) == 12 and len(set(map(tuple, want.values()))) == 12
    assert texts(capsys, *argv, "--batch_size", 5, "--prefill_chunk", 3, "--output", tmp_path / "o.jsonl") == want
    lines = list(map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines()))
    assert {(c["id"], c["sample"]): c["tokens"] for c in lines} == want and [list(c) for c in lines] == [KEYS] * 12


@pytest.mark.parametrize("precision", generate.PRECISIONS)
def test_precision(tiny, capsys, precision):
    """All three run, and the logprobs of a prompt's first token are about the same."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 3, "--temperature", 0]
    (want,), stats, _ = run_json(capsys, *argv, "--precision", "fp32")
    (got,), half, _ = run_json(capsys, *argv, "--precision", precision)
    assert abs(got["logprobs"][0] - want["logprobs"][0]) < 0.1
    assert precision == "fp32" or half["model_bytes"] < 0.6 * stats["model_bytes"]


def test_seed_matters(tiny, capsys):
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 12]
    one, two = (texts(capsys, *argv, "--seed", seed) for seed in (1, 2))
    assert one != two and texts(capsys, *argv, "--seed", 1) == one
    assert texts(capsys, *argv, "--seed", -1) and texts(capsys, *argv, "--seed", 2**70)


def test_text_for_people(tiny, capsys):
    """Without --json: the prompt and its text on standard output, figures on standard error."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 12, "--precision", "fp32"]
    completions, _, _ = run_json(capsys, *argv)
    for more in ([], ["--batch_size", "2"]):
        generate.main([*map(str, argv), *more])
        out, err = capsys.readouterr()
        assert out.strip("\n") == ("the dog" + completions[0]["text"]).strip("\n")
        assert "tokens/s" in err and "error" not in err


def test_text_of_several(tiny, capsys):
    """Every completion is on standard output, whole, whichever slot it came from."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--prompt", "fox", "--max_new_tokens", 12]
    argv = [*map(str, argv), "--precision", "fp32", "--num_samples", "2"]
    completions, _, _ = run_json(capsys, *argv)
    for batch_size in ("1", "3"):
        generate.main([*argv, "--batch_size", batch_size])
        out = capsys.readouterr().out
        assert all(c["prompt"] + c["text"] in out for c in completions)


def test_stop_and_special_tokens(tiny, capsys):
    """--stop is repeatable and cut from the text; ignore_eos goes on past end tokens, which never show."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 60, "--precision", "fp32"]
    (whole,), _, _ = run_json(capsys, *argv, "--ignore_eos")
    start = next(i for i in range(4, 50) if "\ufffd" not in whole["text"][i : i + 3])
    stop = whole["text"][start : start + 3]
    (cut,), _, _ = run_json(capsys, *argv, "--ignore_eos", "--stop", "never there", "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].find(stop)] and cut["finish_reason"] == "stop"
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])]


# ---- prompts


def test_prompts_jsonl(tiny, tmp_path, capsys):
    """id, seed and max_new_tokens of a line go before the flags; what merely looks like a line end is text."""
    lines = [
        {"prompt": "the dog", "id": "a", "seed": 7, "max_new_tokens": 3},
        {"prompt": "fox\u2028and\u0085dog \u4f60\u597d", "seed": 8},
        {"prompt": "12", "note": "a number is text here"},
        {"prompt": "the dog", "id": 77},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", newline="")
    argv = ["--checkpoint_path", tiny, "--prompts_file", path, "--max_new_tokens", 5, "--ignore_eos"]
    completions, _, _ = run_json(capsys, *argv)
    assert [c["id"] for c in completions] == ["a", 1, 2, 77]
    assert [c["seed"] for c in completions] == [7, 8, 1234, 1234]
    assert [len(c["tokens"]) for c in completions] == [3, 5, 5, 5]
    assert [c["prompt"] for c in completions] == [line["prompt"] for line in lines]
    assert completions[2]["prompt_ids"] == train_bpe().encode("12").ids
    alone = texts(capsys, "--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 3, "--seed", 7)
    assert alone[0, 0] == completions[0]["tokens"]


def test_prompts_text(tiny, tmp_path, capsys, monkeypatch):
    """One prompt a line, of a file and of standard input; blank lines are none, and braces and numbers are text."""
    path, prompts = tmp_path / "prompts.txt", ["the dog", "  fox 你好", "12", "[x] {y}"]
    path.write_bytes("\r\n".join([*prompts[:2], "", *prompts[2:]]).encode("utf-8-sig"))  # some editors begin so
    completions, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompts_file", path, *QUICK)
    assert [c["prompt"] for c in completions] == prompts and [c["id"] for c in completions] == [0, 1, 2, 3]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
    again, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompts_file", "-", *QUICK)
    assert again == completions


def test_prompts_jsonl_stdin(tiny, capsys, monkeypatch):
    data = b'{ "prompt": "fox", "id": "x"}\n{"prompt": "dog", "seed": 5}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    completions, _, _ = run_json(capsys, "--checkpoint_path", tiny, "--prompts_file", "-", *QUICK)
    assert [(c["id"], c["prompt"], c["seed"]) for c in completions] == [("x", "fox", 1234), (1, "dog", 5)]


def test_num_samples(tiny, capsys):
    """Different texts, the first of them the one that is made without the flag; at temperature 0 one text."""
    argv = ["--checkpoint_path", tiny, "--prompt", "the dog", "--max_new_tokens", 16, "--precision", "fp32"]
    four = texts(capsys, *argv, "--num_samples", 4, "--batch_size", 2)
    assert sorted(four) == [(0, 0), (0, 1), (0, 2), (0, 3)] and len(set(map(tuple, four.values()))) == 4
    assert texts(capsys, *argv)[0, 0] == four[0, 0]
    greedy = texts(capsys, *argv, "--num_samples", 3, "--temperature", 0)
    assert len(greedy) == 3 and len(set(map(tuple, greedy.values()))) == 1


def test_synthetic_prompts(tiny, capsys):
    """An integer is that many random tokens, the same ones every time, all of the vocabulary."""
    argv = ["--checkpoint_path", tiny, "--prompt", 200, "--prompt", "7", "--max_new_tokens", 2, "--ignore_eos"]
    completions, _, _ = run_json(capsys, *argv)
    ids = completions[0]["prompt_ids"]
    assert [c["prompt_tokens"] for c in completions] == [200, 7] and len(set(ids)) > 80
    assert 0 <= min(ids) and max(ids) < train_bpe().get_vocab_size()
    assert run_json(capsys, *argv)[0] == completions


def test_context_warning(tiny, capsys):
    """Prompt plus --max_new_tokens past the context: a warning, and generation up to the context."""
    argv = ["--checkpoint_path", tiny, "--prompt", CONTEXT - 8, "--ignore_eos"]
    for asked, got in ((8, 8), (9, 8), (10**12, 8)):
        completions, _, err = run_json(capsys, *argv, "--max_new_tokens", asked)
        assert ("warning" in err) == (asked > 8) and len(completions[0]["tokens"]) == got
        assert completions[0]["finish_reason"] == "length"


def test_chat(tiny, capsys):
    """--chat feeds the rendered template; --system goes first. The text alone is printed."""
    encode, user = train_bpe().encode, "<|user|>the dog<|end|><|assistant|>"
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
    argv = ["--checkpoint_path", tiny, "--chat", "--quantize", mode, "--deterministic", "--max_new_tokens", 12]
    argv += [word for text in ("the dog the dog", "fox", "quick brown") for word in ("--prompt", text)]
    bits = lambda *flags: [(c["tokens"], c["logprobs"]) for c in run_json(capsys, *argv, *flags)[0]]
    want = bits()
    assert sorted(bits("--batch_size", 3, "--prompt_lookup")) == sorted(bits("--batch_size", 2)) == sorted(want)
    assert sorted(bits("--seed", 5)) != sorted(want)


def test_random_weights(tiny, capsys, refuse):
    """A shape is enough for synthetic prompts, and for nothing else."""
    config = Path(tiny) / "config.json"
    completions, stats, _ = run_json(capsys, "--random_weights", config, "--prompt", 9, "--max_new_tokens", 5)
    assert len(completions[0]["tokens"]) == 5 and completions[0]["text"] == "" and stats["model_bytes"] > 0
    assert len(run_json(capsys, "--random_weights", config, "--max_new_tokens", 2)[0]) == 1
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


JOB = ["--num_samples", "2", "--max_new_tokens", "24", "--precision", "fp32", "--ignore_eos"]


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
    """A prompts file of 60 lines, the flags that run it, and the text of an undisturbed run."""
    directory = tmp_path_factory.mktemp("job")
    (directory / "p.jsonl").write_text("".join(f'{{"prompt": "dog {i}", "id": "p{i}"}}\n' for i in range(60)))
    argv = ["--checkpoint_path", tiny, "--prompts_file", str(directory / "p.jsonl"), *JOB]
    generate.main([*argv, "--batch_size", "8", "--json", "--output", str(directory / "whole.jsonl")])
    return argv, by_key(directory / "whole.jsonl")


def by_key(path):
    """Completions of a file by (id, sample); nothing may stand there twice."""
    lines = list(map(json.loads, path.read_text().split("\n")[:-1]))
    found = {(line["id"], line["sample"]): line["tokens"] for line in lines}
    assert len(found) == len(lines), "a completion stands there twice"
    assert path.read_bytes().endswith(b"\n")
    return found


def disturbed(argv, path, sign):
    """Start the job, send a signal after its fifth line; what it left, its status and its standard error."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *argv, "--output", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        end = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.monotonic() < end, "it ended or hung before the signal"
            time.sleep(0.005)
        process.send_signal(sign)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return path.read_bytes(), process.returncode, err


def test_output_survives_a_kill(job, tmp_path, capsys):
    """Killed in the middle, the last line torn: a rerun loses nothing, does nothing twice, and keeps what was there."""
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
    assert len(completions) == len(want) - (lines - 1), "only what was missing is made, and only that is printed"
    assert stats["new_tokens"] == sum(len(c["tokens"]) for c in completions)


def test_output_complete(job, tmp_path, capsys):
    """Another rerun has nothing to do: the file stays as it is, the stats are there, and a stats line is no trouble."""
    argv, want = job
    path = tmp_path / "out.jsonl"
    run_json(capsys, *argv, "--batch_size", 8, "--output", path)
    with path.open("a") as file:
        file.write('{"stats": {"new_tokens": 1}}\n')
    before = path.read_bytes()
    completions, stats, _ = run_json(capsys, *argv, "--output", path)
    assert (completions, stats["new_tokens"], path.read_bytes()) == ([], 0, before)
    more = run_json(capsys, *argv, "--output", path, "--num_samples", 3, "--batch_size", 8)[0]
    assert sorted(c["sample"] for c in more) == [2] * 60


def test_output_no_file(tiny):
    """Where there is nothing to read, nothing is waited for."""
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK, "--output", "/dev/stdout"]
    done = command(*argv)
    assert done.returncode == 0 and done.stdout.count('{"id": 0') == 1


@pytest.mark.parametrize("keep", [1, 2, 9, -1], ids=["brace", "quote", "key", "line end alone"])
def test_output_torn_anywhere(tiny, tmp_path, capsys, keep):
    """However short the torn line is, it is dropped and made again."""
    path, argv = tmp_path / "out.jsonl", ["--checkpoint_path", tiny, "--prompt", "dog", "--prompt", "fox", *QUICK]
    run_json(capsys, *argv, "--output", path)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:keep])
    completions, _, _ = run_json(capsys, *argv, "--output", path)
    assert [c["id"] for c in completions] == [1] and path.read_bytes() == first + second
    assert f"2 of 2 completions are in {path}" in run_json(capsys, *argv, "--output", path)[2]


def test_interrupt(job, tmp_path):
    """Ctrl-C: what was finished is on disk, and no traceback."""
    argv, want = job
    left, status, err = disturbed(argv, tmp_path / "out.jsonl", signal.SIGINT)
    found = by_key(tmp_path / "out.jsonl")
    assert 5 <= len(found) < len(want) and left.count(b"\n") == len(found)
    assert all(want[key] == tokens for key, tokens in found.items())
    assert status != 0 and "Traceback" not in err


# ---- conversations


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """Types lines into --interactive; returns what each turn fed to the model, as text, and what was printed."""

    def run(lines, *flags):
        fed, plain = [], generate.Engine.generate

        def spy(engine, requests):
            requests = list(requests)
            fed.extend(train_bpe().decode(r.prompt_ids, skip_special_tokens=False) for r in requests)
            return plain(engine, requests)

        monkeypatch.setattr(generate.Engine, "generate", spy)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        argv = ["--checkpoint_path", tiny, "--interactive", "--max_new_tokens", "12", "--precision", "fp32"]
        generate.main([*argv, *flags])
        return fed, capsys.readouterr()

    return run


def test_interactive_history(talk):
    """The second turn is fed the first one and its answer; both answers are printed."""
    fed, (out, _) = talk(["the dog", "fox", "/exit", "never"], "--stop", "zzz")
    assert len(fed) == 2 and fed[0] == "<|user|>the dog<|end|><|assistant|>"
    assert fed[1].startswith(fed[0]) and fed[1].endswith("<|end|><|user|>fox<|end|><|assistant|>")
    answer = fed[1].removeprefix(fed[0]).removesuffix("<|end|><|user|>fox<|end|><|assistant|>")
    assert len(answer) > 3 and answer in out


def test_interactive_clear(talk):
    """/clear forgets all but the system prompt; blank lines and the end of input are no turns."""
    system = "<|system|>Be brief.<|end|>"
    fed, _ = talk(["the dog", "", "/clear", "fox", "   "], "--system", "Be brief.", "--chat")
    assert fed == [f"{system}<|user|>{word}<|end|><|assistant|>" for word in ("the dog", "fox")]


def test_interactive_interrupted(talk, monkeypatch):
    """Ctrl-C stops an answer; what there was of it stays in the history, and the conversation goes on."""
    push, seen = generate.Completion.push, []

    def interrupt(completion, token, logprob):
        seen.append(token)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return push(completion, token, logprob)

    monkeypatch.setattr(generate.Completion, "push", interrupt)
    fed, _ = talk(["the dog", "fox", "/exit"])
    assert len(fed) == 2 and fed[1].startswith(fed[0]) and fed[1].endswith("<|user|>fox<|end|><|assistant|>")
    assert len(seen) > 7


def test_interactive_long(tiny):
    """A conversation that outgrows the context says so and waits for /clear, after which it answers again."""
    lines = "the quick brown fox jumps over the lazy dog again and again\n" * 40
    done = command(
        "--checkpoint_path", tiny, "--interactive", "--max_new_tokens", 20, input=lines + "/clear\nthe dog\n"
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "context" in done.stderr and "/clear starts over" in done.stderr
    assert len(done.stdout.rstrip("\n").split("\n")) == 41 - done.stderr.count("/clear starts over")


# ---- the front door


def test_import_changes_no_setting():
    """Importing generate.py leaves the process as it was: threads, precision, compiler."""
    code = """
import random, torch, torch._dynamo.config as dynamo, torch._inductor.config as inductor
def settings():
    return [torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
            dynamo.get_config_copy(), inductor.get_config_copy(), random.getstate()]
before = settings()
import generate
assert settings() == before
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_help(capsys):
    """Every flag is there, with its default."""
    with pytest.raises(SystemExit) as end:
        generate.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for flag in (
        "checkpoint_path",
        "device",
        "precision",
        "random_weights",
        "prompt",
        "prompts_file",
        "chat",
        "system",
    ):
        assert f"--{flag} " in out
    for flag in ("interactive", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "num_samples", "stop"):
        assert f"--{flag} " in out
    for flag in (
        "ignore_eos",
        "batch_size",
        "prefill_chunk",
        "compile",
        "compile_prefill",
        "profile",
        "json",
        "output",
    ):
        assert f"--{flag} " in out
    assert all(default in out for default in ("200", "0.8", "1.0", "1234", "bf16"))


def test_default_model(default_checkpoint):
    """The command of the README, as a person types it, from another directory."""
    argv = ["--chat", "--prompt", "What is the capital of France?", "--temperature", "0", "--max_new_tokens", "12"]
    done = command(*argv, cwd=default_checkpoint)
    assert done.returncode == 0 and "Paris" in done.stdout and "Traceback" not in done.stderr
    assert not any(special in done.stdout for special in ("<|im_end|>", *SPECIAL))
