"""Files that are written, and the processes of torchrun: nothing of others is written over, nothing
is lost, nothing waits without end."""

import concurrent.futures
import contextlib
import gzip
import json
import math
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import (  # noqa: F401
    FP32,
    QUICK,
    ROOT,
    command,
    copy,
    environment,
    exit_status,
    is_one_line,
    refuse,
    run_json,
    tiny,
)

import generate
from scripts import contract, interrupts, outputs, ranks
from scripts import eval as evaluation
from scripts.checkpoint import Refusal, is_first_rank
from scripts.outputs import Output

# ---- one file, two flags; files of others


def foreign_files(folder):
    """By name, what is there and is no trace."""
    text = folder / "notes.txt"
    text.write_text("mine")
    empty = folder / "empty.json"
    empty.write_text("")
    link = folder / "link.json"
    link.symlink_to(text)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    socket.socket(socket.AF_UNIX).bind(str(folder / "socket"))
    names = ["notes.txt", "empty.json", "link.json", "folder", "pipe", "socket"]
    return {name: folder / name for name in names} | {"null": Path("/dev/null")}


def look(path):
    """What would show that somebody has touched it."""
    state = os.lstat(path)
    content = path.read_bytes() if path.is_file() else None
    return state.st_mode, state.st_ino, state.st_mtime_ns, content


@pytest.mark.parametrize(
    "name", ["notes.txt", "empty.json", "link.json", "folder", "pipe", "socket", "null"]
)
def test_profile_writes_over_nothing(refuse, tiny, tmp_path, name):  # noqa: F811
    path = foreign_files(tmp_path)[name]
    before = look(path)
    error = refuse("--checkpoint_path", tiny, "--profile", path, *QUICK)
    assert str(path) in error and "no trace" in error
    assert look(path) == before


def test_profile_replaces_a_trace(tiny, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "trace.json"
    argv = ["--checkpoint_path", tiny, "--profile", path, *QUICK]
    run_json(capsys, *argv)
    first = path.stat().st_ino
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    run_json(capsys, *argv)
    assert path.stat().st_ino != first and json.loads(path.read_text())["traceEvents"]
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_what_a_killed_trace_has_left(tmp_path):
    """The next one removes it."""
    path = tmp_path / "trace.json"
    left, lock = outputs.new_folder(path)
    (left / path.name).write_text("half")
    with outputs.new_trace(path) as work:  # the owner of the other one still lives
        Path(work).write_text("whole")
    assert left.exists() and path.read_text() == "whole"
    path.unlink()
    os.close(lock)
    with outputs.new_trace(path) as work:
        Path(work).write_text("whole")
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_traces(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"schemaVersion": 1}'))
    assert outputs.is_trace(path)
    path.write_bytes(gzip.compress(b'{"mine": 1}'))
    assert not outputs.is_trace(path)
    path.write_bytes(b"no gzip")
    assert not outputs.is_trace(path)


@pytest.mark.parametrize("one", ["score", "prompts_file", "profile"])
@pytest.mark.parametrize("how", ["the same", "another spelling", "a link", "a hard link"])
def test_one_file_for_two_flags(refuse, tiny, tmp_path, one, how):  # noqa: F811
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "prompt_ids": [1], "tokens": [2], "logprobs": [0]}\n')
    before = look(path)
    other = path
    if how == "another spelling":
        other = tmp_path / "." / ".." / tmp_path.name / "a.jsonl"
    if how == "a link":
        other = tmp_path / "b.jsonl"
        other.symlink_to(path)
    if how == "a hard link":
        other = tmp_path / "b.jsonl"
        os.link(path, other)
    error = refuse("--checkpoint_path", tiny, f"--{one}", path, "--output", other, *QUICK)
    assert f"--{one}" in error and "--output" in error and "same file" in error
    assert look(path)[2:] == before[2:]


def test_one_new_file_for_two_flags(refuse, tiny, tmp_path):  # noqa: F811
    path = tmp_path / "new"
    refuse("--checkpoint_path", tiny, "--profile", path, "--output", path, *QUICK)
    assert not path.exists()


@pytest.mark.parametrize("flag", ["--output", "--profile"])
@pytest.mark.parametrize("place", ["nowhere", "nowhere/deeper", "a file"])
def test_no_place_for_a_file(refuse, tmp_path, flag, place):  # noqa: F811
    """It is refused before anything is loaded."""
    (tmp_path / "a file").write_text("mine")
    path = tmp_path / place / "new"
    error = refuse("--checkpoint_path", tmp_path / "no checkpoint", flag, path, *QUICK)
    assert f"{flag} {path}" in error and "expected a directory" in error
    assert [file.name for file in tmp_path.iterdir()] == ["a file"]


FOREIGN = {
    "text": "mine\n",
    "an object": '{"mine": 1}\n',
    "a list": "[1]\n",
    "rows": '{"id": 0, "sample": 0, "tokens": [1]}\n',
    "no line end": "mine",
    "an object without a line end": '{"id": 0}',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_output_leaves_other_files(refuse, tiny, tmp_path, content):  # noqa: F811
    path = tmp_path / "out"
    path.write_text(content)
    assert "more than completions" in refuse("--checkpoint_path", tiny, "--output", path, *QUICK)
    assert path.read_text() == content


@pytest.mark.parametrize("name", ["folder", "pipe", "socket"])
def test_output_waits_for_nobody(refuse, tiny, tmp_path, name):  # noqa: F811
    path = foreign_files(tmp_path)[name]
    before = look(path)
    assert str(path) in refuse("--checkpoint_path", tiny, "--output", path, *QUICK)
    assert look(path) == before


# ---- two runs, full disks, and --score


def test_two_runs_on_one_output(refuse, tiny, tmp_path, capsys):  # noqa: F811
    """The second is refused, also by another name, until the first one ends."""
    path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK, "--output"]
    with Output(path) as first:
        for name in (path, link):
            assert "another run" in refuse(*argv, name)
        first.write("")
    path.write_text("")
    assert len(run_json(capsys, *argv, path)[0]) == 1
    assert path.read_text().count("\n") == 1
    with Output(path), Output(tmp_path / "other"):
        pass


def test_a_lock_dies_with_its_owner(tmp_path):
    path = tmp_path / "out.jsonl"
    code = "import sys\nfrom pathlib import Path\nfrom scripts.outputs import Output\n"
    code += "output = Output(Path(sys.argv[1]))\nprint('locked', flush=True)\ninput()"
    argv = [sys.executable, "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=ROOT, **pipes) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(Refusal, match="another run"):
            Output(path)
        owner.kill()
        owner.wait()
        with Output(path):
            pass


def with_full_disk():
    """No file may grow beyond so many bytes: what comes of a write is what a full disk says."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))


def test_a_full_disk(tiny, tmp_path):  # noqa: F811
    """One line; the next run makes whole what is torn."""
    path = tmp_path / "out.jsonl"
    argv = ["--checkpoint_path", tiny, "--num_samples", 12, "--max_new_tokens", 8, "--prompt"]
    argv += ["dog", "--ignore_eos", *FP32, "--output", path]
    done = command(*argv, preexec_fn=with_full_disk)
    assert done.returncode == 2 and is_one_line(done.stderr)
    assert path.stat().st_size == 2500 and not path.read_text().endswith("\n")
    assert command(*argv).returncode == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == list(range(12))


@pytest.mark.parametrize("names", [True, False], ids=["ids", "no ids"])
@pytest.mark.parametrize("keep", [0, 1.4, 2])
def test_score_resumes(tiny, tmp_path, capsys, names, keep):  # noqa: F811
    """What is there is not scored again, in lines without ids and samples too."""
    file, whole, part = (tmp_path / name for name in ("a.jsonl", "whole.jsonl", "part.jsonl"))
    lines = []
    for i in range(3):
        name = {"id": i, "sample": 0} if names else {}
        lines.append(name | {"prompt_ids": [5, 6 + i], "tokens": [7, 8], "mine": i})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--checkpoint_path", tiny, "--score", file, *FP32, "--output"]
    run_json(capsys, *argv, whole)
    content = whole.read_text()
    assert len(content.splitlines()) == 3
    made = content.splitlines(keepends=True)
    torn = made[int(keep)][: 40 if keep % 1 else 0]
    part.write_text("".join(made[: int(keep)]) + torn)
    completions, _, err = run_json(capsys, *argv, part)
    assert part.read_text() == content
    assert len(completions) == 3 - int(keep)
    assert (f"{int(keep)} of 3 completions" in err) == (keep > 0)


# ---- logits that are no numbers


@pytest.fixture
def poisoned(copy):  # noqa: F811
    """A checkpoint of which one weight is no number."""
    path = copy / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(weights, path)
    return copy


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "dog"],
        ["--prompt", "dog dog dog dog", "--prompt_lookup"],
        ["--prompt", "dog", "--draft_quantize", "int8"],
        ["--prompt", "dog", "--num_samples", "3", "--batch_size", "2", "--deterministic"],
    ],
    ids=str,
)
def test_no_numbers(refuse, poisoned, tmp_path, flags):  # noqa: F811
    path = tmp_path / "out.jsonl"
    error = refuse("--checkpoint_path", poisoned, *flags, *QUICK, "--output", path)
    assert "no numbers" in error
    assert path.read_text() == ""


def test_no_numbers_in_score(refuse, poisoned, tmp_path):  # noqa: F811
    file, path = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt_ids": [5], "tokens": [7, 8]}\n')
    argv = ["--checkpoint_path", poisoned, "--score", file, "--output", path, "--json"]
    assert "no numbers" in refuse(*argv, *FP32)
    assert path.read_text() == ""


def test_no_numbers_in_eval(poisoned):
    model, tokenizer = generate.load(
        generate.cli.parse_args(["--checkpoint_path", str(poisoned), *FP32])
    )
    engine = generate.Engine(model, tokenizer, 1, 64)
    with pytest.raises(Refusal, match="no numbers"):
        evaluation.log_likelihood(engine, [1, 2, 3, 4], 64, 32)
    with pytest.raises(Refusal, match="no numbers"):
        evaluation.score(engine, [1, 2, 3, 4], 2)


# ---- what is left of torchrun in the environment

ALONE = [{"RANK": "1"}, {"LOCAL_RANK": "3"}, {"WORLD_SIZE": "1", "RANK": "7"}, {"WORLD_SIZE": "x"}]
HERE = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
BROKEN = [
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "0"},
    HERE | {"RANK": "2"},
    HERE | {"RANK": "-1"},
    HERE | {"RANK": "²"},
    HERE | {"RANK": "0", "MASTER_PORT": "http"},
    HERE | {"RANK": "0", "MASTER_PORT": "99999"},
    HERE | {"RANK": "1", "MASTER_ADDR": "no.such.host.anywhere"},
]


def as_rank(monkeypatch, variables):
    """As if a process had begun with these."""
    for name in ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = max(ranks.tp.variable("WORLD_SIZE"), 1)
    monkeypatch.setattr(ranks.tp, "world", world)
    monkeypatch.setattr(ranks.tp, "rank", ranks.tp.variable("RANK") if world > 1 else 0)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be put back


@pytest.mark.parametrize("variables", ALONE, ids=str)
def test_one_process(monkeypatch, variables):
    as_rank(monkeypatch, variables)
    ranks.join()
    assert not torch.distributed.is_initialized() and is_first_rank()


@pytest.mark.parametrize("variables", BROKEN, ids=str)
def test_variables_that_make_no_sense(monkeypatch, variables):
    as_rank(monkeypatch, variables)
    with pytest.raises(Refusal) as error:
        ranks.join()
    assert variables.get("MASTER_PORT", "WORLD_SIZE=2") in str(error.value)


def test_nobody_is_there(monkeypatch):
    """Neither for the first process nor for the second."""
    monkeypatch.setattr(ranks, "PATIENCE", ranks.datetime.timedelta(seconds=2))
    for rank in "01":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        as_rank(monkeypatch, HERE | {"RANK": rank, "MASTER_PORT": port})
        start = time.monotonic()
        with pytest.raises(Refusal, match=port):
            ranks.join()
        assert time.monotonic() - start < 30


def test_a_lonely_rank_speaks(tiny):  # noqa: F811
    """Though of several ranks only the first does."""
    variables = environment() | HERE | {"RANK": "1", "MASTER_ADDR": "no.such.host.anywhere"}
    done = command("--checkpoint_path", tiny, *QUICK, env=variables)
    assert done.returncode == 2 and is_one_line(done.stderr) and done.stdout == ""


# ---- what is too large


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_samples", 10**12],
        ["--num_samples", 2**70],
        ["--batch_size", 2**40],
        ["--batch_size", 2**16, "--max_new_tokens", 200, "--random_weights"],
        ["--max_new_tokens", 2**63],
        ["--top_k", "1" + "0" * 5000],
        ["--prefill_chunk", -(2**63)],
    ],
    ids=lambda flags: flags[0],
)
def test_too_large(refuse, tiny, tmp_path, flags):  # noqa: F811
    start = time.monotonic()
    if flags[-1] == "--random_weights":
        shape = json.loads((Path(tiny) / "config.json").read_text())
        shape |= {"max_position_embeddings": 10**6, "num_hidden_layers": 40}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(shape))
        error = refuse(*flags, path, "--prompt", 10**5)
        assert "cache of 65536 x" in error and "GB" in error
    else:
        refuse("--checkpoint_path", tiny, *flags)
    assert time.monotonic() - start < 20


def test_memory_that_is_short(refuse, tiny, monkeypatch):  # noqa: F811
    """What PyTorch says of it is one line, whoever asked for it."""

    def too_much(*_):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(generate.Transformer, "stack", too_much)
    assert "memory" in refuse("--checkpoint_path", tiny, *QUICK)


class PanicException(BaseException):
    """Named like that of packages in Rust."""


def test_a_panic_is_one_line(refuse, tiny, monkeypatch):  # noqa: F811
    def panic(*_):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(generate.requests, "write", panic)
    assert "unwrap" in refuse("--checkpoint_path", tiny, *QUICK)


# ---- devices, compilers and streams that are not there


@pytest.mark.parametrize(
    "name", ["hpu", "meta", "privateuseone", "cuda:x", "cpu:x", "mps", "nonsense"]
)
def test_no_such_device(refuse, tiny, name):  # noqa: F811
    error = refuse("--checkpoint_path", tiny, "--device", name, *QUICK)
    assert f"--device {name} is not available, choose from cpu" in error


@pytest.mark.parametrize("compiler", ["false", "true", "cat", "/", "no-such-program", "g++ -O2"])
def test_no_compiler(refuse, tiny, monkeypatch, compiler):  # noqa: F811
    """What does not make an object of a line of C++ is none, whatever its name and status."""
    monkeypatch.setenv("CXX", compiler)
    argv = ["--checkpoint_path", tiny, "--device", "cpu", *QUICK]
    assert f"{compiler} is none" in refuse(*argv, "--compile")


def without(*numbers):
    """A function that closes these streams."""

    def close():
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize(
    "closed, flags, word",
    [
        ([1], ["--prompt", "a"], "standard output is closed"),
        ([0, 1], ["--prompt", "a", "--json"], "standard output is closed"),
        ([0], ["--prompts_file", "-"], "standard input is closed"),
        ([0], ["--interactive"], "standard input is closed"),
    ],
    ids=str,
)
def test_closed_streams(tiny, closed, flags, word):  # noqa: F811
    argv = ["--checkpoint_path", tiny, *flags, *QUICK]
    done = command(*argv, stdin=subprocess.DEVNULL, preexec_fn=without(*closed))
    assert done.returncode == 2 and is_one_line(done.stderr) and word in done.stderr


def test_streams_that_nobody_needs(tiny):  # noqa: F811
    argv = ["--checkpoint_path", tiny, "--prompt", "dog", *QUICK]
    want = command(*argv).stdout
    done = command(*argv, stdin=subprocess.DEVNULL, preexec_fn=without(0, 2))
    assert done.returncode == 0 and done.stdout == want


def test_the_contract_needs_some_context(tiny):  # noqa: F811
    args = generate.cli.parse_args(["--checkpoint_path", tiny], size=1)
    with pytest.raises(Refusal, match="context of 256 tokens is too short"):
        contract.prepare(args, deterministic=True)


@pytest.mark.parametrize("flag", ["prompt", "stop", "seed", "device", "output", "system", "score"])
def test_a_flag_without_a_value(refuse, flag):  # noqa: F811
    assert f"--{flag}: expected something else" in refuse(f"--{flag}=--")


@pytest.mark.parametrize("flag", ["--temperature", "--device", "--checkpoint_path", "--seed"])
def test_errors_are_not_endless(refuse, flag):  # noqa: F811
    assert len(refuse(flag, "a" * 50000)) < 1200


def test_what_asks_to_end_waits_for_imports():
    """It is not lost, and comes after them; without the wait, the control, it comes at once."""
    for hold, seen in ((interrupts.held, ["imported"]), (contextlib.nullcontext, [])):
        found = []
        with pytest.raises(KeyboardInterrupt), hold():
            signal.raise_signal(signal.SIGINT)
            found.append("imported")
        assert found == seen
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("number", interrupts.ENDS)
def test_a_folder_is_removed_when_a_job_is_stopped(tmp_path, number):
    """As a shell has it, the status says by which signal; one that is ignored does nothing, and all
    are handled as before in the end, or in another thread."""
    with pytest.raises(SystemExit) as stop, outputs.new_directory(tmp_path / "out"):
        assert len(os.listdir(tmp_path)) == 1
        signal.raise_signal(number)
    assert stop.value.code == 128 + number and os.listdir(tmp_path) == []
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)
    try:
        with outputs.new_directory(tmp_path / "out"):
            signal.raise_signal(number)
    finally:
        signal.signal(number, signal.SIG_DFL)
    assert os.listdir(tmp_path) == ["out"]

    def other():
        with outputs.new_directory(tmp_path / "other"):
            assert signal.getsignal(number) is signal.SIG_DFL

    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(other).result()
