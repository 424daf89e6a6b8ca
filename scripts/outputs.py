"""Files that are written. What somebody else wrote is never written over, and nobody finds half of
anything."""

import contextlib
import fcntl
import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts import interrupts
from scripts.files import Refusal, cause, refusing

WRITTEN = ("output", "profile")  # flags that name a file which is written
READ = ("prompts_file", "score", "random_weights")


def check_paths(args) -> None:
    """Raise Refusal where two flags name the same file, of which one is to be written, or where
    there is no place for one."""
    paths = {flag: getattr(args, flag) for flag in WRITTEN + READ if getattr(args, flag)}
    for written in WRITTEN:
        if written in paths and not paths[written].parent.is_dir():
            raise Refusal(f"--{written} {paths[written]}: expected a directory that is there")
        for flag, path in paths.items():
            if flag != written and written in paths and is_same(path, paths[written]):
                raise Refusal(f"--{written} and --{flag} are the same file, {path}")


def is_same(a: Path, b: Path) -> bool:
    """Whether both are one file, which may have several names, or would be one."""
    with contextlib.suppress(OSError):  # one of them is not there yet
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def open_at_once(path: str, flags: int) -> int:
    """Of a pipe that nobody reads it is an error, instead of a wait for somebody."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


class Output:
    """Lines of JSON that are added to a file, which is locked as long as this lives, or that go
    into a pipe; a `path` of None stands for none. Raises Refusal or OSError."""

    def __init__(self, path: Path | None, name: str = "--output"):
        self.path = path
        self.name = f"{name} {path}"
        self.file = None
        self.done = 0  # of what is asked for, what it had at first
        self.is_pipe = False
        if path is None:
            return
        with refusing(f"{self.name} cannot be written", OSError):
            self.file = open(path, "a", encoding="utf-8", opener=open_at_once)
        os.set_blocking(self.file.fileno(), True)
        self.is_pipe = not path.is_file()
        if not self.is_pipe:
            self.lock()

    def lock(self) -> None:
        """Until the file is closed, or this process dies. Some file systems know no locks."""
        taken = refusing(f"{self.name} is being written by another run", BlockingIOError)
        with contextlib.suppress(OSError), taken:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error) -> None:
        if self.file:
            self.file.close()

    def read(self) -> bytes:
        """All that is there, for one to see whether it may be added to."""
        return b"" if self.file is None or self.is_pipe else self.path.read_bytes()

    def cut(self, length: int) -> None:
        """Leave so many bytes."""
        self.file.truncate(length)

    def write(self, line: str) -> None:
        """Add a line, all at once."""
        if self.file:
            self.file.write(f"{line}\n")
            self.file.flush()


@contextlib.contextmanager
def new_trace(path: Path) -> Iterator[str]:
    """The name of a file to write, which then becomes `path`. Raises Refusal where that is there
    and is no trace."""
    if path.exists() and not is_trace(path):
        raise Refusal(f"--profile {path} is there and is no trace, expected a new name")
    with folder_beside(path) as folder:
        work = folder / path.name
        yield str(work)
        work.replace(path)


def is_trace(path: Path) -> bool:
    """Whether a file is one of PyTorch's profiler."""
    if not path.is_file():
        return False
    read = gzip.open if path.suffix == ".gz" else open
    with contextlib.suppress(OSError, EOFError), read(path, "rb") as file:
        return b'"schemaVersion"' in file.read(100)
    return False


class Taken(Refusal):
    """While a directory was made, somebody else has made one of that name."""


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` where no error is raised: whole or not at all.
    Beside it, in its parent, is room for temporary files. Raises Taken, or OSError."""
    with folder_beside(target) as folder:
        work = folder / target.name  # `folder` itself is closed to other users
        work.mkdir()
        yield work
        try:
            work.rename(target)
        except OSError as error:
            raise Taken(f"{target} cannot be made: {cause(error)}") from error


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A folder in which to make a target, that is removed in the end. What killed runs have left of
    the same target is removed before. Raises OSError."""
    remove_leftovers(target)
    with interrupts.orderly():
        folder, lock = new_folder(target)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def new_folder(target: Path) -> tuple[Path, int]:
    """A folder beside a target, and its descriptor, which is locked until it is closed or this
    process dies."""
    while True:
        folder = tempfile.mkdtemp(".unfinished", start_of_folders(target), target.parent)
        # Before it is locked, another run may take it for a leftover.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some file systems know no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(folder):
                return Path(folder), lock
            os.close(lock)


def start_of_folders(target: Path) -> str:
    """That of the names of the folders in which a target is made, which may be shorter than its
    own: a file system has a limit."""
    return f".{target.name[:40]}."


def remove_leftovers(target: Path) -> None:
    """Remove the folders in which a target was made by processes that are dead: the lock of one
    dies with its owner."""
    pattern = re.compile(re.escape(start_of_folders(target)) + r"[a-z0-9_]{8}\.unfinished")
    left = []
    with contextlib.suppress(OSError):  # not all that can be written can be read
        left = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    for path in left:
        with contextlib.suppress(OSError):  # locked, or another user's, or gone
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
