"""Two checkouts in turns, which is how speed is compared on a machine that others use as well: each
is a process that waits for its turn, turns are short and go round, and a change of the machine's
speed meets both. For bench.py --against, whose --serve is what measures."""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.files import Refusal, read_file, refusing
from scripts.tables import Table

HERE = Path(__file__).resolve().parent.parent
COLUMNS = "what batch tokens tokens/s against ratio from to".split()
RUNS = 9  # turns, where --runs does not say
TURN = 0.5  # seconds
LONGEST = 1000  # calls in a turn
PATIENCE = 10  # seconds until a process has ended that is about to
ASKED_OTHERWISE = ["against", "output", "batches", "batch_size", "runs"]
# What --serve measures without a number: all that it could at first.
USUAL_TOKENS = {"decode": 16, "prefill": 500}


def without(flags: list[str], names: list[str]) -> list[str]:
    """Flags as they were typed, but for those that have one of the names and a value."""
    kept, skips = [], False
    for flag in flags:
        name, has_value, _ = flag.removeprefix("--").partition("=")
        is_dropped = flag.startswith("--") and name in names
        if not (is_dropped or skips):
            kept.append(flag)
        skips = is_dropped and not has_value
    return kept


def find_script(checkout: Path) -> Path:
    """The bench.py of a checkout. Raises Refusal where there is none, or one without --serve."""
    script = checkout / "scripts" / "bench.py"
    if b"--serve" not in read_file(script):
        raise Refusal(f"--against {checkout}: its scripts/bench.py has no --serve")
    return script


class Server:
    """A bench.py --serve, in a process of its own that ends with this."""

    def __init__(self, script: Path, flags: list[str]):
        self.name = str(script.parent.parent)
        self.errors = tempfile.TemporaryFile()
        argv = [sys.executable, str(script), "--serve", *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        # In a group of its own, with the compilers that it starts. A Ctrl-C does not meet it there,
        # and where this process is killed, it reads the end of its orders.
        text = {"encoding": "utf-8", "errors": "replace"}
        self.process = subprocess.Popen(argv, process_group=0, **pipes, **text)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError):  # an order that it did not read
            self.process.stdin.close()
        if any(error):
            self.signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def signal(self, number: int) -> None:
        """Send it to the group, if that is still there."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def read(self) -> str:
        """A line of its output. Raises Refusal where it has ended."""
        if line := self.process.stdout.readline():
            return line.strip()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()] or ["without a word"]
        last = said[-1].removeprefix("error: ")
        raise Refusal(f"{self.name} ended, status {self.process.poll()}: {last}")

    def wait(self) -> None:
        """Until it is ready."""
        while self.read() != "ready":
            pass

    def ask(self, order: str) -> float:
        """Tokens per second."""
        with contextlib.suppress(BrokenPipeError):  # read() knows why
            self.process.stdin.write(f"{order}\n")
            self.process.stdin.flush()
        answer = self.read()
        with refusing(f"{self.name} answers {answer!r:.40} to {order!r}", ValueError):
            rate = float(answer)
            if not 0 < rate < float("inf"):
                raise ValueError("expected tokens per second")
        return rate


def compare(scripts: list[Path], cells: list, flags: list[str], table: Table) -> None:
    """Measure the cells by both scripts, and put them into a table; those of the same number of
    slots in one pair of processes."""
    runs = table.turns // len(cells)
    for batch in dict.fromkeys(cell.batch for cell in cells):
        with contextlib.ExitStack() as stack:
            given = [*flags, "--batch_size", str(batch)]
            servers = [stack.enter_context(Server(script, given)) for script in scripts]
            for server in reversed(servers):  # the other one may not know the flags
                server.wait()
            for cell in cells:
                if cell.batch == batch:
                    measure(servers, cell, runs, table)


def measure(servers: list[Server], cell, runs: int, table: Table) -> None:
    size = "" if cell.tokens == USUAL_TOKENS[cell.kind] else f" {cell.tokens}"
    slowest = min(server.ask(f"{cell.kind} 1{size}") for server in servers)
    calls = round(TURN * slowest / cell.new_tokens())
    order = f"{cell.kind} {min(max(calls, 1), LONGEST)}{size}"
    rates = []
    for _ in range(runs):
        rates.append([server.ask(order) for server in servers])
        table.turn(f"{cell.kind}, batch {cell.batch}, {cell.tokens} tokens")
    table.add([*cell, *summary(rates)])


def summary(rates: list[list[float]]) -> list[float]:
    """Of the rates of both, turn by turn: their medians, the median of their ratio, and from where
    to where the middle half of the ratios lies."""
    ratios = sorted(ours / other for ours, other in rates)
    quarter = len(ratios) // 4
    medians = [statistics.median(each) for each in zip(*rates, strict=True)]
    return [*medians, statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]]
