"""The line that shows where a long job is, on pseudo-terminals: what stands on such a screen, and
that nothing else is changed by it."""

import contextlib
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import heed_interrupts
from test_cli import (  # noqa: F401
    FP32,
    SCRIPT,
    environment,
    exit_status,
    tiny,
    write_lines,
)

import generate
from scripts import jobs
from scripts.checkpoint import Refusal
from scripts.jobs import Job
from scripts.requests import Completion

STATE = re.compile(r"(\d+)/(\d+) completions(, [\d.]+ tokens/s)?(, (at most )?[\d:]+ left)?")
TOTALS = re.compile(r"(\d+)/(\d+) completions, (\d+) tokens in [\d:]+, [\d.]+ tokens/s")
PROMPTS = 7


class Terminal:
    """A pseudo-terminal of some width, where 0 is unknown; all that is written to it is read."""

    def __init__(self, width=80):
        self.width = width
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.data = b""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        with contextlib.suppress(OSError):  # where nobody writes any more
            while part := os.read(self.master, 1 << 16):
                self.data += part

    def open(self):
        return open(os.dup(self.slave), "w", encoding="utf-8", errors="backslashreplace")

    def close(self):
        """All that was written."""
        os.close(self.slave)
        self.reader.join(timeout=30)
        os.close(self.master)
        return self.data.decode()


def screen(written, width):
    """The lines that stand on a terminal in the end; one that was too long has become several."""
    lines, row, column = [[]], 0, 0
    for letter in written:
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
        else:
            if width and column == width:
                row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = letter
            column += 1
    lines += [[] for _ in range(row + 1 - len(lines))]
    return ["".join(line).rstrip() for line in lines]


def test_what_stands_on_a_screen():
    assert screen("ab\rc\r\n123456\r\nx", 4) == ["cb", "1234", "56", "x"]
    assert screen("abc\r   \rd\r\n", 80) == ["d", ""]


def states(written):
    """All that the line was, one after the other."""
    parts = [part.rstrip() for part in re.split("[\r\n]+", written)]
    return [part for part in parts if "/" in part and "completions" in part]


@pytest.fixture
def on_terminal(tiny, monkeypatch, capsys):  # noqa: F811
    """Run generate.py with standard error, and if so wanted standard output, on a terminal; what
    was written there between loading and the stats, and to standard output where that is none."""

    def run(*argv, width=80, both=False, main=generate.main):
        terminal = Terminal(width)
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            for name in ["stderr", "stdout"][: 1 + both]:
                patch.setattr(sys, name, stack.enter_context(terminal.open()))
            try:
                main(["--checkpoint_path", tiny, *FP32, *map(str, argv)])
            finally:
                run.written = terminal  # closed below, when nobody writes there any more
        run.written = terminal.close()
        after = re.split(r"loading (\d+)/\1\r\n", run.written)[-1]
        return re.split(r"\d+ tokens: decode", after)[0], capsys.readouterr().out

    return run


@pytest.fixture
def asked(tmp_path):
    """Flags: several prompts, three at once, whose completions are of several lengths."""
    lines = [{"prompt": f"dog {i}", "max_new_tokens": 3 + i} for i in range(PROMPTS)]
    path = write_lines(tmp_path / "p.jsonl", *lines)
    return ["--prompts_file", path, "--batch_size", 3, "--ignore_eos"]


@pytest.fixture
def every_state(monkeypatch):
    monkeypatch.setattr(jobs, "PERIOD", 0)


TOKENS = sum(3 + i for i in range(PROMPTS))


def test_a_job(on_terminal, asked, every_state, tiny, capsys):  # noqa: F811
    """The line goes from none to all; what is printed is the same as without it."""
    written, out = on_terminal(*asked, "--json")
    found = states(written)
    assert all(STATE.fullmatch(state) for state in found[:-1])
    done = [int(state.partition("/")[0]) for state in found]
    assert done == sorted(done) and set(done) == set(range(PROMPTS + 1))
    assert found[0] == f"0/{PROMPTS} completions" and "at most" in found[2]
    assert re.search(r"3/7 completions, [\d.]+ tokens/s, [\d:]+ left", "\n".join(found))
    assert len(found) > TOKENS
    match = TOTALS.fullmatch(found[-1])
    assert match and match.groups() == (str(PROMPTS), str(PROMPTS), str(TOKENS))
    assert screen(written, 80) == [found[-1], ""]

    generate.main(["--checkpoint_path", tiny, *FP32, *map(str, asked), "--json"])
    plain_out, err = capsys.readouterr()
    assert out.splitlines()[:-1] == plain_out.splitlines()[:-1]  # but for the stats
    assert len(out.splitlines()) == PROMPTS + 1
    assert "completions" not in err and "\r" not in err


@pytest.mark.parametrize("width", [80, 1])
def test_not_often(on_terminal, asked, width):
    """Five times a second at most, and once at the beginning and the end."""
    began = time.monotonic()
    written, _ = on_terminal(*asked, "--num_samples", 5, "--json", width=width)
    seconds = time.monotonic() - began
    assert 2 <= written.count("\r") - written.count("\n") <= 2 + 5 * seconds


def test_one_completion_is_no_job(on_terminal, every_state):
    written, out = on_terminal("--prompt", "fox", "--max_new_tokens", 4, "--json")
    assert states(written) == [] and len(out.splitlines()) == 2
    written, _ = on_terminal("--prompt", "fox", "--num_samples", 2, "--max_new_tokens", 4, "--json")
    assert len(states(written)) > 2


def test_a_job_that_is_resumed(on_terminal, asked, every_state, tmp_path):
    """What was there counts as done, and not for the speed."""
    path = tmp_path / "out.jsonl"
    _, out = on_terminal(*asked, "--json", "--output", path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    left = sum(len(json.loads(line)["tokens"]) for line in lines[4:])
    written, _ = on_terminal(*asked, "--json", "--output", path)
    found = states(written)
    assert (
        found[0].startswith(f"4 of {PROMPTS} completions are in") and found[1] == "4/7 completions"
    )
    assert TOTALS.fullmatch(found[-1]).groups() == ("7", "7", str(left))
    assert sorted(path.read_text().splitlines()) == sorted(out.splitlines()[:-1])
    written, _ = on_terminal(*asked, "--json", "--output", path)
    assert states(written) == [f"7 of 7 completions are in {path}"]


def fail_after(monkeypatch, tokens, error):
    """All is well for so many tokens."""
    push = Completion.push
    seen = []

    def failing(completion, token, logprob):
        seen.append(token)
        if len(seen) > tokens:
            raise error
        return push(completion, token, logprob)

    monkeypatch.setattr(Completion, "push", failing)


def test_a_job_that_is_interrupted(on_terminal, asked, monkeypatch):
    fail_after(monkeypatch, 20, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        on_terminal(*asked, "--json")
    written = on_terminal.written.close()
    totals, after = screen(written, 80)[-2:]
    assert after == "" and TOTALS.fullmatch(totals).groups() == ("3", "7", "20")


def test_a_job_that_fails(on_terminal, asked, tiny, monkeypatch):  # noqa: F811
    """The error stands below, in a line of its own."""
    fail_after(monkeypatch, 20, Refusal("something is wrong"))

    def main(argv):
        assert exit_status(monkeypatch, *argv) == 2

    written, out = on_terminal(*asked, main=main)
    totals, error, after = screen(written, 80)[-3:]
    assert (error, after) == ("error: something is wrong", "")
    assert TOTALS.fullmatch(totals).groups() == ("3", "7", "20")
    assert len(out.strip().split("\n\n")) == 3


def test_both_on_one_terminal(on_terminal, asked, every_state, monkeypatch):
    """The line goes out of the way of texts, which are all there; without that they are not."""
    _, text = on_terminal(*asked)
    written, _ = on_terminal(*asked, both=True)
    assert len(states(written)) > TOKENS
    *found, totals, after = screen(written, 80)
    assert found == screen(text.replace("\n", "\r\n"), 80)[:-1] and after == ""
    assert TOTALS.fullmatch(totals)

    def plainly(job, text, end="\n"):
        print(text, end=end, flush=True)

    monkeypatch.setattr(Job, "print", plainly)
    written, _ = on_terminal(*asked, both=True)
    assert screen(written, 80)[: len(found)] != found


def test_json_on_the_same_terminal(on_terminal, asked, every_state):
    _, out = on_terminal(*asked, "--json")
    written, _ = on_terminal(*asked, "--json", both=True, width=0)
    *lines, totals, stats, after = screen(written, 0)
    assert lines == out.splitlines()[:-1] and after == ""
    assert TOTALS.fullmatch(totals) and stats.startswith('{"stats"')


def test_text_that_is_streamed(on_terminal, asked, every_state):
    """Beside it there is no line; where it goes elsewhere there is."""
    asked = [1 if flag == 3 else flag for flag in asked]  # one at a time
    written, out = on_terminal(*asked)
    assert len(states(written)) > TOKENS and "dog 6" in out
    written, _ = on_terminal(*asked, both=True)
    assert states(written) == [] and written == out.replace("\n", "\r\n")


@pytest.mark.parametrize("width", [0, 1, 2, 20, 35, 200])
def test_a_narrow_terminal(on_terminal, asked, every_state, width):
    """A line that is too long is cut; of unknown width, 80 columns."""
    written, _ = on_terminal(*asked, "--json", width=width)
    longest = max(len(part) for part in re.split("[\r\n]+", written))
    assert longest <= (width or 80) - 1
    assert len(screen(written, width)) == 2, "one, and that below"
    assert written.count("\r") > TOKENS


def test_a_line_that_is_not_cut_breaks(on_terminal, asked, every_state, monkeypatch):
    """What would be seen above otherwise."""
    monkeypatch.setattr(jobs, "columns", lambda: 1000)
    written, _ = on_terminal(*asked, "--json", width=35)
    assert len(screen(written, 35)) > TOKENS // 2


def test_a_terminal_that_is_gone(monkeypatch, capsys):
    """The job goes on."""
    master, slave = os.openpty()
    file = open(slave, "w", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        with Job([SimpleNamespace(max_new_tokens=3)] * 2, 0, False) as job:
            assert job.is_shown
            os.close(master)
            job.write("more")
            assert not job.is_shown
            job.print("text")
    assert capsys.readouterr().out == "text\n"
    with pytest.raises(OSError):
        file.close()  # of what it could not write


def test_scores(on_terminal, asked, every_state, tmp_path):
    """All tokens of a line at once."""
    _, out = on_terminal(*asked, "--json")
    path = tmp_path / "done.jsonl"
    path.write_text(out)
    written, scored = on_terminal("--score", path)
    found = states(written)
    assert [int(state.partition("/")[0]) for state in found] == [*range(PROMPTS + 1), PROMPTS]
    assert TOTALS.fullmatch(found[-1])[3] == str(TOKENS)
    assert len(scored.splitlines()) == PROMPTS


def test_the_first_rank_alone(monkeypatch):
    terminal = Terminal()
    with terminal.open() as file:
        monkeypatch.setattr(sys, "stderr", file)
        requests = [SimpleNamespace(max_new_tokens=3)] * 2
        shown = {}
        for rank in ("0", "1"):
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", rank)
            with Job(requests, 0, False) as job:
                shown[rank] = job.is_shown
    assert shown == {"0": True, "1": False}
    assert terminal.close().count("0/2") == 2


def test_time_that_is_left(monkeypatch):
    """By the completions that are done, and what is begun counts; before there are any, by what
    was asked for."""
    now = [100.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    job = Job([SimpleNamespace(max_new_tokens=50)] * 4, 6, False)
    assert job.state() == "6/10 completions"
    now[0] += 10
    job.tokens = 20
    assert job.state() == "6/10 completions, 2.0 tokens/s, at most 1:30 left"
    job.done, job.tokens_done = 1, 15
    assert job.state() == "7/10 completions, 2.0 tokens/s, 0:20 left"
    job.tokens = 15 + 60
    assert job.state() == "7/10 completions, 7.5 tokens/s", "longer than expected: nobody knows"
    job.done = 4
    assert job.totals() == "10/10 completions, 75 tokens in 0:10, 7.5 tokens/s"
    assert [jobs.clock(x) for x in (0.4, 59.6, 3599.4, 3600, 360_000)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "100:00:00",
    ]


def take_terminal():
    """Of a process that is about to start: its standard error is the terminal that Ctrl-C comes
    from."""
    heed_interrupts()
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)


def test_ctrl_c_at_a_terminal(tiny, tmp_path):  # noqa: F811
    """Typed while the job runs: the totals, in a line of which nothing is left of ^C, and the next
    line for the shell."""
    terminal = Terminal()
    output = tmp_path / "out.jsonl"
    argv = [sys.executable, SCRIPT, "--checkpoint_path", tiny, "--prompt", "dog", *FP32]
    argv += ["--num_samples", "2000", "--batch_size", "3", "--output", output, "--json"]
    process = subprocess.Popen(
        argv,
        stdout=subprocess.DEVNULL,
        stderr=terminal.slave,
        env=environment(),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    try:
        end = time.monotonic() + 100
        while b"left" not in terminal.data:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.write(terminal.master, b"\x03")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    written = terminal.close()
    assert "^C" in written
    totals, after = screen(written, 80)[-2:]
    assert after == ""
    done, total, _ = TOTALS.fullmatch(totals).groups()
    lines = output.read_bytes().count(b"\n")  # of which one may not have been counted yet
    assert total == "2000" and int(done) <= lines <= int(done) + 1 < 2000
