"""A table that is measured row by row: lines of JSON while it is, the rows to read, and where it is
and the time left."""

import contextlib
import json
import sys
import time

from scripts.checkpoint import is_first_rank, progress
from scripts.files import refusing
from scripts.jobs import clock, columns
from scripts.outputs import Output


class Table:
    """Rows of so many names, each of which takes some `turns` to measure, of so many in all. A row
    goes to `output` at once, as JSON with `about` in it. It is printed at once as well, or in the
    end where standard error is a terminal, which shows the progress until then: whatever ends it,
    no row is lost. `heading` are lines that come first."""

    def __init__(self, names: list[str], turns: int, output: Output, about: dict, heading: str):
        self.names = names
        self.turns = turns
        self.done = 0
        self.output = output
        self.about = about
        head = "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"
        self.waiting = [heading, head]
        self.shows_progress = sys.stderr.isatty() and is_first_rank()
        self.began = time.monotonic()

    def __enter__(self) -> "Table":
        if not self.shows_progress:
            self.print()
        return self

    def __exit__(self, *error) -> None:
        self.show("")
        if self.waiting[2:] or not any(error):
            self.print()

    def print(self) -> None:
        for line in self.waiting:
            print(line, flush=True)
        self.waiting = []

    def add(self, values: list) -> None:
        """A row: a word and numbers."""
        word, *numbers = values
        self.waiting.append(f"| {word} | " + " | ".join(f"{x:.4g}" for x in numbers) + " |")
        self.output.write(json.dumps(dict(zip(self.names, values, strict=True)) | self.about))
        if not self.shows_progress:
            self.print()

    def turn(self, what: str) -> None:
        """One more turn is done, of that row."""
        self.done += 1
        seconds = (time.monotonic() - self.began) / self.done * (self.turns - self.done)
        self.show(f"{what}: turn {self.done}/{self.turns}, about {clock(seconds)} left")

    def show(self, line: str) -> None:
        """Write over what the terminal shows, and no further than it is wide."""
        width = columns() - 1
        with contextlib.suppress(OSError):  # the terminal is gone, and the measuring goes on
            progress(f"{line:<{width}.{width}}", end="\r")


def check_rows(output: Output) -> None:
    """Raise Refusal where lines are to be added to what are no rows."""
    for number, line in enumerate(output.read().splitlines(), start=1):
        what = f"{output.name} holds more than rows, line {number}"
        with refusing(what, ValueError, KeyError, TypeError):
            json.loads(line)["tokens/s"]
