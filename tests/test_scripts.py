"""scripts/bench.py and scripts/verify.py on a tiny random model: what they print, what they find,
bad input."""

import fcntl
import io
import json
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import generate
from kernels import BATCH_INVARIANT, FAST
from scripts import bench, cli, contract, machine, verify

ROOT = Path(generate.__file__).parent
COMPILE = torch.compile
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 3000,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def status_of(main, monkeypatch, *argv):
    """With which status a command ends, in this process."""
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be put back
    with pytest.raises(SystemExit) as end:
        generate.command(main)
    return end.value.code


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch, request):
    """Reading more than the caches of this machine hold takes seconds."""
    if "bandwidth" not in request.node.name:
        monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e10)


# ---- scripts/bench.py


def bench_here(monkeypatch, config, *flags):
    """Run bench.py in this process, which can look into it, with code that is traced and not
    compiled; returns how many graphs that makes."""

    def traced(function, options, **more):
        return COMPILE(function, backend="eager", **more)

    argv = ["--random_weights", config, "--runs", "1", "--prompts", "30", *flags]
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, argv)])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bench.main()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def table_rows(text):
    """The cells of a table, without the rows of its head."""
    lines = [line for line in text.splitlines() if re.match(r"\| (pre|de)", line)]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize("flags, columns", [([], 6), (["--deterministic"], 8)], ids=str)
def test_bench(config, monkeypatch, capsys, flags, columns):
    """A table of both kinds, without the flag and, if it is given, with it; the same as lines of
    JSON."""
    path = config.parent / "lines.jsonl"
    asked = ("--batches", "1,2", "--contexts", "16,200", "--output", path)
    bench_here(monkeypatch, config, *asked, *flags)
    table = table_rows(capsys.readouterr().out)
    cells = [("prefill", "1", "30"), *(("decode", b, n) for n in ("16", "200") for b in ("1", "2"))]
    assert [tuple(row[:3]) for row in table] == cells
    assert all(len(row) == columns for row in table)
    assert all(float(x) > 0 for row in table for x in row[3:])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rounded = [[f"{x:.4g}" for x in list(line.values())[1:]] for line in lines]
    assert rounded == [row[1:] for row in table]
    if flags:
        for line in lines:
            assert line["cost"] * line["deterministic"] == pytest.approx(line["tokens/s"])


def test_bench_compiles_once_a_mode(config, monkeypatch):
    """The layers and the head, each once."""
    contexts = "--compile", "--batches", "1", "--contexts", "16,200,700,40"
    assert bench_here(monkeypatch, config, *contexts) == 2
    assert bench_here(monkeypatch, config, *contexts, "--deterministic") == 4
    # The negative control: caches as long as the text of each cell.
    work, lengths = bench.work, iter(range(800, 2000, 100))

    def of_another_length(model, cell, length, chunk):
        return work(model, cell, next(lengths), chunk)

    monkeypatch.setattr(bench, "work", of_another_length)
    assert bench_here(monkeypatch, config, *contexts) > 2


def test_bench_feeds_random_ids(config, monkeypatch):
    fed = []
    step, prefill = generate.Engine.step, generate.Engine.prefill

    def watched_step(engine, tokens, *others):
        fed.append(sum(tokens, []))
        return step(engine, tokens, *others)

    def watched_prefill(engine, ids, *others):
        fed.append(ids)
        return prefill(engine, ids, *others)

    monkeypatch.setattr(generate.Engine, "step", watched_step)
    monkeypatch.setattr(generate.Engine, "prefill", watched_prefill)
    bench_here(monkeypatch, config, "--batches", "5")
    assert {len(ids) for ids in fed} == {5, 30}
    assert all(len(set(ids)) > len(ids) / 2 for ids in fed)


def test_processes_that_share_a_lock_measure_one_at_a_time(config, monkeypatch, tmp_path):
    """While another one measures or compiles, it loads and waits; while it measures, no other
    does."""
    path = tmp_path / "lock"
    loaded = threading.Event()
    load_models, timed = bench.load_models, bench.timeit.timeit
    alone = []

    def watched_load(args):
        models = load_models(args)
        loaded.set()
        return models

    def watched_time(*args, **options):
        with open(path, "w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        alone.append(True)
        return timed(*args, **options)

    monkeypatch.setattr(bench, "load_models", watched_load)
    monkeypatch.setattr(bench.timeit, "timeit", watched_time)
    flags = (monkeypatch, config, "--batches", "1", "--lock", path)
    thread = threading.Thread(target=bench_here, args=flags)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        thread.start()
        assert loaded.wait(60)
        thread.join(1)
        assert thread.is_alive() and alone == []
    thread.join(60)
    assert alone == [True, True]  # a prefill and a decode


def test_bench_serves(config, monkeypatch, capsys):
    """`ready`, then a number for each line, until one that is no order."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("decode 3\nprefill 1\ndecode\n"))
    flags = ["--random_weights", config, "--batch_size", "2", "--serve"]
    assert status_of(bench.main, monkeypatch, "bench.py", *flags) == 2
    out, err = capsys.readouterr()
    ready, decode, prefill = out.split()
    assert ready == "ready" and float(decode) > 0 and float(prefill) > 0
    assert err.count("\n") == 1 and "`decode 30`" in err


# ---- the bandwidth


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, end):
        return 2.0  # milliseconds


def test_bandwidth_is_read_from_more_than_caches_hold(monkeypatch):
    """A card reads 4 GB, or half of what is free, and is timed by events; a CPU reads 256 MB, or
    four times its cache."""
    sizes = []

    def ones(size, device):
        sizes.append(size * 4)
        on_gpu = device.type == "cuda"
        return types.SimpleNamespace(nbytes=size * 4, is_cuda=on_gpu, sum=lambda: None)

    free = [1 << 40]
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    assert machine.read_bandwidth(torch.device("cuda")) == (4 << 30) / 0.002
    free[0] = 3 << 30
    assert machine.read_bandwidth(torch.device("cuda")) == (3 << 29) / 0.002
    for cache, size in ((32 << 20, 256 << 20), (256 << 20, 1 << 30)):
        monkeypatch.setattr(machine, "last_cache", lambda cache=cache: cache)
        machine.read_bandwidth(torch.device("cpu"))
        assert sizes[-1] == size


def test_the_bandwidth_of_this_machine():
    assert 1e8 < machine.read_bandwidth(torch.device("cpu")) < 1e13


# ---- bad input

BAD_INPUT = [
    (["bench.py", "--bogus"], "--bogus"),
    (["bench.py", "--batches", "x"], "x"),
    (["bench.py", "--batches", "0"], "--batches from 1"),
    (["bench.py", "--contexts", "3000"], "1 to 2999"),
    (["bench.py", "--checkpoint_path", "/nowhere"], "config.json"),
    (["verify.py", "--bogus"], "--bogus"),
    (["verify.py", "--size", "x"], "--size"),
    (["verify.py", "--checkpoint_path", "/nowhere"], "config.json"),
]


@pytest.mark.parametrize("argv, word", BAD_INPUT, ids=str)
def test_bad_input(config, monkeypatch, capsys, argv, word):
    model = [] if "--checkpoint_path" in argv else ["--random_weights", config]
    command = verify.main if argv[0] == "verify.py" else bench.main
    assert status_of(command, monkeypatch, *argv, *model) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_verify_is_a_command():
    argv = [sys.executable, "scripts/verify.py", "--bogus"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "--bogus" in done.stderr


# ---- scripts/verify.py


def test_tally():
    alone = {0: ([5, 6], [-1.0, -2.0]), 1: ([7], [-3.0])}
    last = (1, ([7], [-3.0]))
    assert contract.tally(alone, list(alone.items())) == ("0 of 2", False)
    assert contract.tally(alone, [(0, ([5, 6], [-1.0, -2.0000001])), last]) == ("1 of 2, 1", True)
    assert contract.tally(alone, [(0, ([5], [-1.0])), (1, ([8], [-3.0]))]) == ("1 of 2, 0", True)


class SameProcess:
    """In place of a pool of processes."""

    def Pool(self, count):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def apply(self, function, args):
        return function(*args)


def differ(found):
    """Whether it says so: "0 of 7", "3 of 7, 0", or a number of unique completions."""
    count = int(found.split()[0])
    return count > (0 if " of " in found else 1)


def test_verify(config, monkeypatch, capsys):
    """With the flag nothing differs. Each broken rule is seen among the controls, and by the
    comparisons that it concerns: here, one is broken in place of the flag being off. Texts are
    short; nothing is compiled and there is one thread, as otherwise it takes minutes."""
    prepare = contract.prepare

    def prepare_or_break(args, deterministic):
        args, model, requests = prepare(args, True)
        if not deterministic:
            contract.follow(model, contract.CausalFlag())
        return args, model, requests

    monkeypatch.setattr(contract, "prepare", prepare_or_break)
    monkeypatch.setattr(contract, "LENGTHS", (1, 9, 10, 64, 65, 30, 100))
    monkeypatch.setattr(contract, "NEW", 5)
    monkeypatch.setattr(contract.multiprocessing, "get_context", lambda kind: SameProcess())
    monkeypatch.setattr(machine, "set_up", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    flags = ["--random_weights", config, "--precision", "fp32"]
    status = status_of(verify.main, monkeypatch, "verify.py", *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    (_, *promised), controls = rows[:10], dict(rows[11:])
    off = {name: found for name, found, _ in promised}
    assert status == 0
    assert not any(differ(on) for _, _, on in promised), promised
    assert controls.keys() == contract.CONTROLS.keys()
    assert all(map(differ, controls.values())), controls
    assert differ(off["C2 prefill in chunks"]) and differ(off["C2 rescored by prefill"])
    assert not differ(off["C6 cache length"])  # which that rule has nothing to do with


@pytest.mark.parametrize("promise, control", [(True, True), (False, False)])
def test_verify_fails(config, monkeypatch, capsys, promise, control):
    """Where a comparison differs with the flag, or where a control does not."""

    def promises(args, model, requests):
        yield "C1", "1 of 1, 0", promise and args.deterministic

    def controls(args, model, requests):
        yield "rule", "0 of 1", control

    monkeypatch.setattr(contract, "promises", promises)
    monkeypatch.setattr(contract, "controls", controls)
    assert status_of(verify.main, monkeypatch, "verify.py", "--random_weights", config) == 1
    assert "does not hold" in capsys.readouterr().out


@pytest.mark.parametrize("flag, ops", [(False, FAST), (True, BATCH_INVARIANT)], ids=["off", "on"])
def test_verify_compares_both_tables(config, flag, ops):
    args = cli.parse_args(["--random_weights", str(config)], size=2)
    args, model, requests = contract.prepare(args, flag)
    assert model.ops is ops and args.deterministic == flag
    lengths = [len(request.prompt_ids) for request in requests]
    assert lengths == [*contract.LENGTHS, *contract.LENGTHS]


@pytest.mark.parametrize("name", list(contract.CONTROLS)[:2])
def test_controls_are_other_products(name):
    """The same sums of 384 products, in another order."""
    ops, _ = contract.CONTROLS[name]
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 384, generator=generator) for n in (64, 40))
    packed = BATCH_INVARIANT.pack(weight, None, 3, False)
    want = BATCH_INVARIANT.linear(x, packed)
    torch.testing.assert_close(ops.linear(x, packed), want, rtol=0, atol=1e-4)
    assert not torch.equal(ops.linear(x[:1], packed), want[:1])
