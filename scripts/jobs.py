"""Where a long job is: how many completions are made, how fast, and the time left, in a line of the
terminal that is written over."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

from scripts.checkpoint import is_first_rank

PERIOD = 0.2  # seconds from one state of the line to the next
COLUMNS = 80  # of a terminal that does not say
ECHO = len("^C")  # what a terminal may add to the line


class Job:
    """The making of completions, several of them, of which an earlier run has made `before`. It is
    shown on standard error where that is a terminal, by the first rank, unless text that is
    `streamed` goes to a terminal as well. What else is printed there must go through `print`."""

    def __init__(self, requests: Sequence, before: int, streamed: bool):
        self.before = before
        self.total = before + len(requests)
        self.most = sum(request.max_new_tokens for request in requests)
        self.done = 0
        self.tokens = 0  # that are new, or scored
        self.tokens_done = 0  # those of completions that are done
        self.length = 0  # of what stands in the line
        self.began = self.shown = time.monotonic()
        self.shared = sys.stdout.isatty()  # the terminal, as far as one knows
        is_seen = sys.stderr.isatty() and not (streamed and self.shared)
        self.is_shown = is_first_rank() and is_seen and bool(requests) and self.total > 1

    def __enter__(self) -> "Job":
        self.write(self.state())
        return self

    def __exit__(self, *error) -> None:
        """Leave the totals, and the cursor below them, whatever has happened."""
        self.length += ECHO
        self.write(self.totals(), end="\n")

    def watch(self, steps: Iterator[tuple]) -> Iterator[tuple]:
        """Pass on what Engine.generate yields, and count what the caller is done with."""
        if not self.is_shown:
            yield from steps
            return
        for completion, piece in steps:
            yield completion, piece
            self.count(completion)
            now = time.monotonic()
            if now - self.shown >= PERIOD:
                self.shown = now
                self.write(self.state())

    def count(self, completion) -> None:
        """One more token of a completion, or of --score all tokens of a line."""
        scored = completion.request.line
        tokens = scored["tokens"] if scored else completion.tokens
        if scored:
            self.tokens += len(tokens)
        elif tokens:  # there is room for one
            self.tokens += 1
        if completion.finish_reason:
            self.done += 1
            self.tokens_done += len(tokens)

    def print(self, text: str, end: str = "\n") -> None:
        """Print to standard output. On a terminal that has the line, too, it goes out of the
        way."""
        if self.shared and self.length:
            self.write("", end="\r")
        print(text, end=end, flush=True)

    def write(self, line: str, end: str = "") -> None:
        """Write over the line, no further than the terminal is wide: there it would be broken, and
        nobody can write over what has become two."""
        if not self.is_shown:
            return
        width = columns() - 1
        line = line[: max(width, 0)]
        blanks = " " * (min(self.length, width) - len(line))
        try:
            print(f"\r{line}{blanks}", end=end, file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone, and the job goes on
            self.is_shown = False
        self.length = len(line)

    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def state(self) -> str:
        parts = [f"{self.before + self.done}/{self.total} completions"]
        if self.tokens:
            parts.append(f"{self.speed():.1f} tokens/s")
        if self.tokens and self.tokens_left() > 0:
            word = "" if self.done else "at most "
            parts.append(f"{word}{clock(self.tokens_left() / self.speed())} left")
        return ", ".join(parts)

    def tokens_left(self) -> float:
        """As many for each completion as those have that are done, or as many as there may be."""
        left = self.total - self.before - self.done
        expected = left * self.tokens_done / self.done if self.done else self.most
        return expected - (self.tokens - self.tokens_done)

    def totals(self) -> str:
        done = f"{self.before + self.done}/{self.total} completions"
        taken = clock(time.monotonic() - self.began)
        return f"{done}, {self.tokens} tokens in {taken}, {self.speed():.1f} tokens/s"


def columns() -> int:
    """Those of the terminal, which may change."""
    found = 0
    with contextlib.suppress(OSError, ValueError):  # it is none, or has no number
        found = os.get_terminal_size(sys.stderr.fileno()).columns
    return found or COLUMNS


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
