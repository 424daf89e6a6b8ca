"""scripts/bench.py on a tiny random model: what it measures and prints, the bandwidth that it sees,
two checkouts in turns, the picture of its lines, bad input."""

import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import types
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from test_scripts import CONFIG, status_of

import generate
from scripts import bench, hardware, machine, picture, plot, tables, turns
from scripts.files import Refusal
from scripts.outputs import Output

ROOT = Path(generate.__file__).parent
COMPILE = torch.compile


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


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
    cells = [("prefill", "1", "30"), *(("decode", b, n) for b in ("1", "2") for n in ("16", "200"))]
    assert [tuple(row[:3]) for row in table] == cells
    assert all(len(row) == columns for row in table)
    assert all(float(x) > 0 for row in table for x in row[3:])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rounded = [[f"{x:.4g}" for x in list(line.values())[1:columns]] for line in lines]
    assert rounded == [row[1:] for row in table]
    if flags:
        for line in lines:
            assert line["cost"] * line["deterministic"] == pytest.approx(line["tokens/s"])
    for line in lines:
        assert line["model"] == "config, random weights" and line["limit_GB/s"] == 12
        assert line["torch"] == torch.__version__ and line["hardware"].endswith(", 1 thread")
        assert (line["precision"], line["quantize"], line["compile"]) == ("bf16", None, False)
        assert "--contexts 16,200" in line["command"] and "--output" not in line["command"]


@pytest.mark.slow
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

    def watched_load(*args):
        models = load_models(*args)
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


@pytest.mark.parametrize(
    "last, word",
    [
        ("decode\n", "`decode 30`"),
        ("decode 0\n", "decode 0"),
        ("prefill 1 501\n", "1 to 500"),
        ("prefill 1 2 3\n", "prefill 1 2 3"),
    ],
)
def test_bench_serves(config, monkeypatch, capsys, last, word):
    """`ready`, then a number for each line, until one that is no order."""
    orders = "decode 3\nprefill 1\ndecode 1 40\nprefill 1 30\n" + last
    monkeypatch.setattr(sys, "stdin", io.StringIO(orders))
    cells = []

    def watched(model, cell, length, chunk):
        cells.append((*cell, length))
        return work(model, cell, length, chunk)

    work = bench.work
    monkeypatch.setattr(bench, "work", watched)
    flags = ["--random_weights", config, "--batch_size", "2", "--contexts", "40", "--serve"]
    assert status_of(bench.main, monkeypatch, "bench.py", *flags) == 2
    out, err = capsys.readouterr()
    ready, *rates = out.split()
    assert ready == "ready" and len(rates) == 4 and all(float(rate) > 0 for rate in rates)
    assert err.count("\n") == 1 and word in err
    usual = [("decode", 2, 16, 501), ("prefill", 1, 500, 501)]
    assert cells == [*usual, ("decode", 2, 40, 501), ("prefill", 1, 30, 501)]


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
    """A card reads 4 GB, or half of what is free, and is timed by events; a CPU reads four times
    what its caches hold, or half of what is free, and 256 MB at least."""
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
    some, most = 32 << 20, 1152 << 20
    expected = [(some, 1 << 40, 256 << 20), (most, 1 << 40, 4 * most), (most, 1 << 30, 1 << 29)]
    expected += [(most, 0, 256 << 20), (most, math.inf, 4 * most)]
    for caches, memory, size in expected:
        monkeypatch.setattr(hardware, "caches", lambda caches=caches: caches)
        monkeypatch.setattr(hardware, "free_memory", lambda memory=memory: memory)
        machine.read_bandwidth(torch.device("cpu"))
        assert sizes[-1] == size


def write_files(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_all_caches_count_each_once(tmp_path, monkeypatch):
    """A server whose cores share an L3 by eights; of those that this process may use."""
    for cpu in range(32):
        first = cpu // 8 * 8
        caches = {
            "index0": (1, "Data", "32K", cpu),
            "index1": (1, "Instruction", "32K", cpu),
            "index2": (2, "Unified", "1024K", cpu),
            "index3": (3, "Unified", "96M", f"{first}-{first + 7}"),
        }
        for name, (level, kind, size, shared) in caches.items():
            files = {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}
            write_files(tmp_path / f"cpu{cpu}" / "cache" / name, files)
    monkeypatch.setattr(hardware, "CPUS", tmp_path)
    for usable in (32, 9):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=usable: set(range(n)))
        per_core, shared = (1024 + 32) << 10, 96 << 20
        assert hardware.caches() == usable * per_core + -(-usable // 8) * shared
    for cpu in range(9):
        write_files(tmp_path / f"cpu{cpu}" / "cache", {"index2/size": "?", "index3/size": ""})
    assert hardware.caches() == 9 * (32 << 10)
    shutil.rmtree(tmp_path)
    assert hardware.caches() == hardware.UNKNOWN_CACHES


@pytest.mark.parametrize(
    "line, limit, used",
    [
        ("0::/job/step", "memory.max", "memory.current"),
        ("4:cpu,memory:/job/step", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_free_memory_is_what_a_container_leaves(tmp_path, monkeypatch, line, limit, used):
    top = tmp_path / "groups" / ("memory" if "cpu" in line else "")
    monkeypatch.setattr(hardware, "PROC", tmp_path)
    monkeypatch.setattr(hardware, "GROUPS", tmp_path / "groups")
    assert hardware.free_memory() == math.inf and hardware.cpu_name()
    write_files(tmp_path, {"meminfo": "MemFree: 1 kB\nMemAvailable: 4096 kB"})
    write_files(tmp_path, {"cpuinfo": "processor : 0\nmodel name\t:  AMD  EPYC: 9"})
    assert hardware.free_memory() == 4 << 20 and hardware.cpu_name() == "AMD EPYC: 9"
    write_files(tmp_path, {"self/cgroup": f"7:devices:/\n{line}"})
    write_files(top, {f"job/step/{limit}": "max", f"job/{limit}": 3 << 20, f"job/{used}": 1 << 20})
    assert hardware.free_memory() == 2 << 20
    write_files(top, {f"job/{used}": 5 << 20})
    assert hardware.free_memory() == 0


def test_the_bandwidth_of_this_machine():
    assert 1e8 < machine.read_bandwidth(torch.device("cpu")) < 1e13


# ---- where it is


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal of 50 columns; a function that returns what it shows."""
    outer, inner = os.openpty()
    with os.fdopen(inner, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(tables, "columns", lambda: 50)

        def shown():
            print(end="<all>", file=file, flush=True)  # it arrives a little later
            found = ""
            while not found.endswith("<all>"):
                found += os.read(outer, 1 << 16).decode()
            return found.removesuffix("<all>")

        yield shown
    os.close(outer)


def test_a_terminal_shows_the_progress(config, monkeypatch, capsys, request):
    """Which turn of how many and the time left, over and over in one line; the table when it is
    done, and nothing else on standard output."""
    terminal = request.getfixturevalue("terminal")  # before a test, pytest takes it back
    bench_here(monkeypatch, config, "--batches", "1,2", "--runs", "2")
    shown = terminal().split("\r")
    assert all(len(line) == 49 for line in shown[:-1]) and shown[-1] == ""
    *turns_shown, blank, _ = shown
    assert [line.split("turn ")[1].split()[0] for line in turns_shown] == [
        f"{turn}/6," for turn in range(1, 7)
    ]
    assert re.fullmatch(r"decode, batch 2, 16 tokens: turn 6/6, about 0.*", turns_shown[-1])
    assert blank.strip() == ""
    out = capsys.readouterr().out
    assert "turn" not in out and "\r" not in out and len(table_rows(out)) == 3


def test_nothing_is_shown_where_nobody_watches(config, monkeypatch, capsys):
    bench_here(monkeypatch, config, "--batches", "1")
    out, err = capsys.readouterr()
    assert err == "" and len(table_rows(out)) == 2


@pytest.mark.parametrize("seen", [True, False])
def test_rows_are_printed_at_once_or_in_the_end(request, tmp_path, capsys, seen):
    """In the end where a terminal shows the progress, even if that is an error; to --output always
    at once."""
    if seen:
        request.getfixturevalue("terminal")
    path = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt):
        with tables.Table(["what", "tokens/s"], 4, Output(path), {"a": 1}, "heading") as table:
            table.turn("one")
            table.add(["decode", 2.5])
            assert json.loads(path.read_text()) == {"what": "decode", "tokens/s": 2.5, "a": 1}
            at_once = capsys.readouterr().out
            raise KeyboardInterrupt
    later = capsys.readouterr().out
    assert (at_once == "") == seen and (later == "") != seen
    assert at_once + later == "heading\n| what | tokens/s |\n|---|---|\n| decode | 2.5 |\n"


# ---- --against

FAKE = """# as bench.py --serve is driven
import os, signal, sys, time
log = open(LOG, "a", buffering=1)
print("start", NAME, *sys.argv[1:], file=log)
print("noise\\nready", flush=True)
for line in iter(sys.stdin.readline, ""):
    print("order", NAME, os.getpid(), line.strip(), file=log)
    ANSWER
print("end", NAME, file=log)
"""


@pytest.fixture
def fakes(config, tmp_path, monkeypatch):
    """Runs bench.py --against with processes that answer without a model, this checkout 30 and the
    other what is given: a line of Python. Returns the status, and what both were told."""

    def checkout(name, answer):
        script = tmp_path / name / "scripts" / "bench.py"
        script.parent.mkdir(parents=True)
        names = {"NAME": repr(name), "LOG": repr(str(tmp_path / "log")), "ANSWER": answer}
        text = FAKE
        for word, value in names.items():
            text = text.replace(word, value)
        script.write_text(text)
        return script.parent.parent

    def run(answer, *flags):
        monkeypatch.setattr(turns, "HERE", checkout("ours", "print(30, flush=True)"))
        other = checkout("other", answer)
        argv = ["bench.py", "--random_weights", config, "--against", other, *flags]
        status = status_of(bench.main, monkeypatch, *argv)
        log = tmp_path / "log"
        return status, [line.split() for line in log.read_text().splitlines()]

    return run


def test_checkouts_take_turns(fakes, tmp_path, capsys):
    """One order after the other, nine times in turns; a pair of processes for each batch, one pair
    at a time; the same flags for both."""
    lines = tmp_path / "lines.jsonl"
    flags = ("--batches", "1,4", "--quantize", "int8", "--output", lines, "--contexts=16,40")
    status, log = fakes("print(20, flush=True)", *flags)
    starts = [line for line in log if line[0] == "start"]
    pairs = [sorted(starts[:2], reverse=True), sorted(starts[2:], reverse=True)]
    assert status == 0 and [[line[1] for line in pair] for pair in pairs] == [["ours", "other"]] * 2
    for batch, (ours, other) in zip(["1", "4"], pairs, strict=True):
        given = ["--serve", "--quantize", "int8", "--contexts=16,40", "--batch_size", batch]
        assert ours[2:] == other[2:] == ["--serve", "--random_weights", *ours[4:]]
        assert [flag for flag in ours[2:] if flag in given] == given
    orders = [line for line in log if line[0] == "order"]
    assert [line[1] for line in orders] == ["ours", "other"] * 5 * 10
    prefill, *decodes = [orders[i * 20 + 2][3:] for i in range(5)]
    assert prefill == ["prefill", "1"] and decodes[0] == ["decode", "10"]  # half a second at 20
    assert decodes[1] == ["decode", "10", "40"] and decodes[2] == ["decode", "2"]
    ends = [i for i, line in enumerate(log) if line[0] == "end"]
    assert len(ends) == 4 and max(ends[:2]) < log.index(starts[2])

    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(row["what"], row["batch"], row["tokens"]) for row in rows] == [
        ("prefill", 1, 500), ("decode", 1, 16), ("decode", 1, 40), ("decode", 4, 16),
        ("decode", 4, 40),
    ]  # fmt: skip
    for row in rows:
        assert [row[name] for name in turns.COLUMNS[3:]] == [30, 20, 1.5, 1.5, 1.5]
        assert row["quantize"] == "int8" and row["deterministic"] is False
    assert len(table_rows(capsys.readouterr().out)) == 5


def test_the_ratio_is_that_of_each_turn():
    """It goes with a machine that slows down; of nine, the third and the seventh bound half."""
    rates = [[speed * (10 - speed), speed] for speed in range(1, 10)]
    ours, other, ratio, low, high = turns.summary(rates)
    assert (ours, other) == (21, 5) and (ratio, low, high) == (5, 3, 7)
    assert turns.summary([[3.0, 2.0]]) == [3, 2, 1.5, 1.5, 1.5]


DEATHS = [
    ("print('a', file=sys.stderr); sys.exit('error: no room')", "other ended, status 1: no room"),
    ("os.kill(os.getpid(), 9)", "other ended, status -9: without a word"),
    ("print('fast', flush=True)", "'fast' to 'prefill 1': could not"),
    ("print('nan', flush=True)", "'nan' to 'prefill 1': expected tokens"),
]


@pytest.mark.parametrize("answer, words", DEATHS, ids=str)
def test_one_that_dies_is_reported(fakes, capsys, answer, words):
    """In one line, and the other one is ended."""
    status, log = fakes(answer)
    out, err = capsys.readouterr()
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert table_rows(out) == []
    check_ended(log)


def check_ended(log):
    pids = {int(line[2]) for line in log if line[0] == "order"}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ctrl_c_ends_both(fakes, capsys):
    """One of them works on and on."""
    answer = "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, log = fakes(answer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130 and time.monotonic() - began < 30
    assert capsys.readouterr().err == ""
    check_ended(log)


def test_a_checkout_that_does_not_serve_is_refused(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "bench.py").write_text("print(5)")
    argv = ["bench.py", "--random_weights", config, "--against", tmp_path]
    assert status_of(bench.main, monkeypatch, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no --serve" in err and str(tmp_path) in err


SLOW = """
import time
quick_work = work

def work(*args):
    run = quick_work(*args)
    def slow_run():
        time.sleep(0.3)
        run()
    return slow_run
"""


@pytest.mark.slow
def test_a_slower_checkout_is_seen(config, tmp_path, monkeypatch, capsys):
    """A copy of the tree, whose steps all wait."""
    other = tmp_path / "other"
    for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.*")):
        copy = other / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    with open(other / "scripts" / "cells.py", "a") as file:
        file.write(SLOW)
    monkeypatch.setattr(turns, "TURN", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["bench.py", "--random_weights", config, "--against", other, "--batches", "1"]
    flags = ["--runs", "3", "--prompts", "30", "--deterministic", "--precision", "fp32"]
    assert status_of(bench.main, monkeypatch, *argv, *flags) == 0
    rows = table_rows(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [["prefill", "1", "30"], ["decode", "1", "16"]]
    for row in rows:
        ours, theirs, ratio, low, high = map(float, row[3:])
        assert ours > 2 * theirs and 2 < low <= ratio <= high


@pytest.mark.parametrize(
    "flags, kept",
    [
        (["--a", "--runs", "5", "--b"], ["--a", "--b"]),
        (["--runs=5", "--a=--runs", "--runs", "-5"], ["--a=--runs"]),
        (["--runs_more", "5", "runs"], ["--runs_more", "5", "runs"]),
    ],
    ids=str,
)
def test_flags_without_some(flags, kept):
    assert turns.without(flags, ["runs"]) == kept


# ---- the picture


def line_of(batch, rate, cost=None, **more):
    """As --output has it; weights of 0.27 GB, memory of 18.2 GB/s."""
    gb_s = 0.27 * rate / batch
    line = {"what": "decode", "batch": batch, "tokens": 16, "tokens/s": rate, "GB/s": gb_s}
    line["of_the_limit"] = gb_s / 18.2
    if cost:
        line |= {"deterministic": rate / cost, "cost": cost}
    about = {
        "model": "Tiny-135M",
        "hardware": "AMD EPYC, 2 threads",
        "date": "2026-11-29",
        "torch": "2.13.0+cpu",
        "precision": "bf16",
        "quantize": None,
        "compile": True,
        "command": "python scripts/bench.py --compile <&> $x$",
        "limit_GB/s": 18.2,
    }
    return line | about | more


def write_lines(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def plot_here(monkeypatch, *argv):
    return status_of(plot.main, monkeypatch, "plot.py", *argv)


def texts_of(path):
    root = xml.etree.ElementTree.parse(path).getroot()
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_plot(tmp_path, monkeypatch):
    """Text is text, and tells all numbers and what was measured; of two runs of the same it has the
    median; the same lines make the same file."""
    pytest.importorskip("matplotlib")
    first = [line_of(1, 51.2, 1.02), line_of(2, 93.1, 1.05), line_of(16, 346, 1.08)]
    second = [line_of(16, 354, 1.10), line_of(1, 9999, what="prefill")]
    files = [write_lines(tmp_path / "a", *first), write_lines(tmp_path / "b", *second)]
    target = tmp_path / "speed.svg"
    assert plot_here(monkeypatch, target, *files) == 0
    texts = texts_of(target)
    assert {"51.2", "93.1", "350", "50.2", "88.7", "321", "1.02", "1.05", "1.09"} <= {*texts}
    assert {"1", "2", "16", "64", "1024", "without --deterministic"} <= {*texts}
    for words in ("Tiny-135M", "AMD EPYC, 2 threads", "2026-11-29", "2.13.0+cpu", "bf16",
                  "compiled", "after 16 tokens", "18.2 GB/s", "--compile <&> $x$"):  # fmt: skip
        assert any(words in text for text in texts), words
    assert not any("9999" in text for text in texts)
    once = target.read_bytes()
    assert plot_here(monkeypatch, target, *files) == 0
    assert target.read_bytes() == once and sorted(tmp_path.iterdir()) == [*files, target]


def test_plot_of_several_ways_to_run(tmp_path, monkeypatch):
    """Each has its lines, named by what differs; the flag's only where it was measured."""
    pytest.importorskip("matplotlib")
    lines = [line_of(1, 50.0, command="one"), line_of(1, 90.0, 1.5, quantize="int8", command="two")]
    target = tmp_path / "speed.svg"
    assert plot_here(monkeypatch, target, write_lines(tmp_path / "a", *lines)) == 0
    texts = texts_of(target)
    assert {"without --deterministic, bf16", "without --deterministic, int8"} <= {*texts}
    assert "with --deterministic, int8" in texts and "with --deterministic, bf16" not in texts
    assert {"one", "two", "1.5"} <= {*texts}
    assert plot_here(monkeypatch, target, write_lines(tmp_path / "b", lines[0])) == 0
    assert not any("with --det" in text or "cost" in text for text in texts_of(target))


def luminance(colour):
    """That of WCAG 2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(x * y for x, y in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted(luminance(colour) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [dict.__getitem__, lambda dark, colour: colour])
def test_colours_can_be_read(scheme):
    """4.5 is what WCAG asks for text; the grid is to be no more than seen."""
    paper, grid = (scheme(picture.DARK, colour) for colour in (picture.PAPER, picture.GRID))
    for colour in picture.DARK.keys() - {picture.PAPER, picture.GRID}:
        assert contrast(scheme(picture.DARK, colour), paper) > 4.5
    assert 1.2 < contrast(grid, paper) < 3


def test_all_colours_have_another_in_dark_schemes(tmp_path, monkeypatch):
    """What is drawn names no other, and nothing leaves it to be black."""
    pytest.importorskip("matplotlib")
    target = tmp_path / "speed.svg"
    lines = write_lines(tmp_path / "a", line_of(1, 50.0, 1.5), line_of(4, 90.0, 1.5))
    assert plot_here(monkeypatch, target, lines) == 0
    text = target.read_text()
    rules = dict(re.findall(r'\[style\*="fill: (#\w+)"\] { fill: (#\w+) !important }', text))
    assert rules == picture.DARK and "(prefers-color-scheme: dark)" in text
    drawn = text[text.index("<metadata>") :]
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawn)) == {*picture.DARK}
    assert all("fill: #" in each for each in re.findall(r"<text [^>]*>", drawn))


BAD_LINES = [
    ([{}], "batch is missing"),
    ([5], "expected a JSON object"),
    ([line_of(1, 5.0) | {"tokens/s": float("nan")}], "tokens/s is nan"),
    ([line_of(1, 5.0), line_of(1, 5.0) | {"batch": True}], "line 2"),
    ([line_of(1, 5.0) | {"GB/s": 1e300}], "GB/s is 1e+300"),
    ([line_of(1, 5.0) | {"batch": -1}], "batch is -1"),
    ([line_of(1, 5.0) | {"deterministic": 3.0}], "cost is missing"),
    ([line_of(1, 5.0, hardware="a\x00b")], "hardware is 'a\\x00b'"),
    ([line_of(1, 5.0, model=7)], "model is 7"),
    ([line_of(1, 5.0, what="train")], "prefill or decode"),
    ([line_of(1, 5.0, quantize="int3")], "a mode or null"),
    ([line_of(1, 5.0, compile=1)], "true or false"),
    ([dict(zip(turns.COLUMNS, ["decode", 1, 16, 3.0, 2.0, 1.5, 1.4, 1.6], strict=True))], "GB/s"),
    ([], "found none"),
    ([line_of(1, 5.0, what="prefill")], "found none"),
    ([line_of(1, 5.0), line_of(1, 5.0, model="B")], "Tiny-135M; B"),
    ([line_of(1, 5.0), line_of(1, 5.0, hardware="B")], "kinds of hardware"),
]


@pytest.mark.parametrize("lines, words", BAD_LINES, ids=[words for _, words in BAD_LINES])
def test_plot_refuses_other_lines(tmp_path, monkeypatch, capsys, lines, words):
    pytest.importorskip("matplotlib")
    path = write_lines(tmp_path / "a.jsonl", *lines)
    assert plot_here(monkeypatch, tmp_path / "speed.svg", path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("content", [b"[" * 10**5, b"{", b"\xff\n", b'{"a": 1}{'])
def test_plot_refuses_what_is_no_json(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(Refusal):
        plot.read_rows(tmp_path / "a")


def test_plot_refuses_places(config, tmp_path, monkeypatch, capsys):
    """No directory, a directory, another name, a file that is something else; a target that could
    not be made is refused before anything is measured."""
    pytest.importorskip("matplotlib")
    lines = write_lines(tmp_path / "a.jsonl", line_of(1, 5.0))
    other = tmp_path / "other.svg"
    other.write_text("of somebody")
    (tmp_path / "folder.svg").mkdir()
    there = sorted(tmp_path.iterdir())
    for name in ("no/a.svg", "folder.svg", "speed.png", "other.svg"):
        assert plot_here(monkeypatch, tmp_path / name, lines) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and name in err
        with pytest.raises(Refusal, match=name):
            bench_here(monkeypatch, config, "--output", lines, "--plot", tmp_path / name)
    for argv in ([], ["a.svg"], ["--bogus", "a.svg", lines]):
        assert plot_here(monkeypatch, *argv) == 2
    assert sorted(tmp_path.iterdir()) == there and other.read_text() == "of somebody"


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    """Whatever fails while it is drawn: the one before remains."""
    pytest.importorskip("matplotlib")
    lines = write_lines(tmp_path / "a.jsonl", line_of(1, 5.0))
    target = tmp_path / "speed.svg"
    target.write_text("<svg>before</svg>")

    def full(svg):
        raise OSError("no space left")

    monkeypatch.setattr(plot, "add_dark", full)
    assert plot_here(monkeypatch, target, lines) == 2
    assert target.read_text() == "<svg>before</svg>"
    assert sorted(tmp_path.iterdir()) == [lines, target]


def test_plot_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = write_lines(tmp_path / "a.jsonl", line_of(1, 5.0))
    assert plot_here(monkeypatch, tmp_path / "speed.svg", lines) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_bench_plots_what_it_measures(config, monkeypatch, tmp_path):
    """Beside the lines of an earlier run, which must be of the same model: that is refused before
    anything is measured."""
    pytest.importorskip("matplotlib")
    lines, target = tmp_path / "lines.jsonl", tmp_path / "speed.svg"
    flags = ("--output", lines, "--plot", target)
    bench_here(monkeypatch, config, *flags, "--batches", "1,2", "--deterministic")
    bench_here(monkeypatch, config, *flags, "--batches", "4")
    texts = texts_of(target)
    assert {"1", "2", "4", "config, random weights: speed of decoding"} <= {*texts}
    assert "--batches 1,2 --deterministic" in " ".join(" ".join(texts).split())
    count = len(lines.read_text().splitlines())
    write_lines(tmp_path / "other.jsonl", line_of(1, 5.0))
    monkeypatch.setattr(bench, "load_models", None)
    with pytest.raises(Refusal, match="kinds of model"):
        bench_here(monkeypatch, config, "--output", tmp_path / "other.jsonl", "--plot", target)
    assert count == 5


# ---- bad input

BAD_INPUT = [
    (["bench.py", "--bogus"], "--bogus"),
    (["bench.py", "--batches", "x"], "x"),
    (["bench.py", "--batches", "0"], "--batches from 1"),
    (["bench.py", "--contexts", "3000"], "1 to 2999"),
    (["bench.py", "--checkpoint_path", "/nowhere"], "config.json"),
    (["bench.py", "--plot", "a.svg"], "--output"),
    (["bench.py", "--serve", "--plot", "a.svg"], "--serve excludes"),
    (["bench.py", "--against", "/nowhere"], "/nowhere"),
    (["bench.py", "--against", ROOT, "--contexts", "3000"], "1 to 2999"),
    (["bench.py", "--against", ROOT, "--runs", "0"], "--runs"),
    (["bench.py", "--against", ROOT, "--lock", "a"], "--against excludes"),
]


@pytest.mark.parametrize("argv, word", BAD_INPUT, ids=str)
def test_bad_input(config, monkeypatch, capsys, argv, word):
    model = [] if "--checkpoint_path" in argv else ["--random_weights", config]
    assert status_of(bench.main, monkeypatch, *argv, *model) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err
