"""Files that are read, how something is refused, and what is refused as a file: what one could wait
for without end."""

import contextlib
import io
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LARGEST = 1 << 30  # bytes of a file that is read as a whole
PART = 1 << 20  # of what is read at once
PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # that somebody else has opened
KINDS = {  # of what a path may name
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
PATIENCE = 5  # seconds until somebody writes to a pipe
TERMINALS = ("/dev/tty", "/dev/pts/", "/dev/console")
READABLE = ("a file", "a pipe", "a terminal")


class Refusal(ValueError):
    """The user gave something that cannot work; the message is the one line that they read."""


@contextlib.contextmanager
def refusing(message: str, *errors: type[Exception]) -> Iterator[None]:
    """Within, such errors come from what the user gave: each becomes a Refusal of the message and
    the cause."""
    try:
        yield
    except errors as error:
        raise Refusal(f"{message}: {cause(error)}") from error


def cause(error: Exception) -> str:
    """What an error says of itself, in words that one can read after a colon."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(getattr(error, "strerror", None) or error)


def is_there(path: Path) -> bool:
    """Whether something has that name, if only a link to nothing, which is as good as no file but
    hardly what is meant."""
    return os.path.lexists(path)


def kind_of(path: Path, name: str) -> str:
    """What a path names. Raises Refusal where that is nothing; `name` is what it is called then."""
    with refusing(f"{name:.300} cannot be read", OSError, ValueError):
        return KINDS.get(stat.S_IFMT(path.stat().st_mode), "no file")


def check_file(path: Path) -> None:
    """Raise Refusal for what is no file: to read it may mean to wait for ever. What a shell's
    <(command) stands for is read like a file."""
    kind = kind_of(path, str(path))
    is_of_a_shell = kind == "a pipe" and str(path).startswith(PIPES)
    if kind != "a file" and not is_of_a_shell:
        raise Refusal(f"{path} is {kind}, expected a file")


def read_all(name: str | Path, file: BinaryIO) -> bytes:
    """What comes until the end. Raises Refusal where there seems to be none."""
    content = part = bytearray(file.read(PART))
    while len(part) == PART and len(content) <= LARGEST:  # a terminal ends more than once
        part = file.read(PART)
        content += part
    if len(content) > LARGEST:
        raise Refusal(f"{name} has more than {LARGEST} bytes")
    return bytes(content)


def read_file(path: Path) -> bytes:
    """All that a file holds. Raises Refusal."""
    check_file(path)
    with refusing(f"{path} cannot be read", OSError):
        with io.BufferedReader(io.FileIO(path)) as file:
            return read_all(path, file)


def text_of(name: str | Path, content: bytes) -> str:
    """With any line ends as line feeds. Raises Refusal for what is no UTF-8."""
    with refusing(f"{name} is no text", UnicodeError):
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()


def text_in(path: Path) -> str:
    """The text of a file. Raises Refusal."""
    return text_of(path, read_file(path))


def read_stream(name: str, path: Path) -> bytes:
    """All that a file or a stream holds; - is standard input. `name` is what an error calls it.
    Raises Refusal for what cannot be read, or is not there in time, or does not end."""
    if str(path) == "-" and sys.stdin is None:
        raise Refusal(f"{name}: standard input is closed")
    with refusing(f"{name} cannot be read", OSError, AttributeError):
        if str(path) == "-":
            return read_all(name, sys.stdin.buffer)
        kind = kind_of(path, name)
        if kind == "a device" and os.path.realpath(path).startswith(TERMINALS):
            kind = "a terminal"
        if kind not in READABLE:
            raise Refusal(f"{name} is {kind}, expected a file or a pipe")
        # This waits for nobody at the other end.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(number, "rb") as file:
            first = first_byte(name, number) if is_named_pipe(kind, path) else b""
            os.set_blocking(number, True)
            return first + read_all(name, file)


def is_named_pipe(kind: str, path: Path) -> bool:
    return kind == "a pipe" and not str(path).startswith(PIPES)


def first_byte(name: str, file: int) -> bytes:
    """What comes first through a pipe; nothing, if somebody has it open who has not written yet.
    Raises Refusal where nobody has."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if byte := os.read(file, 1):
                return byte
        except BlockingIOError:
            return b""
        time.sleep(0.05)
    raise Refusal(f"{name} is a pipe that nobody writes to")
