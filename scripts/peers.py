"""Work that waits for somebody at the other end of a network: in a process of its own, which is
watched."""

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scripts.checkpoint import Refusal

PATIENCE = 180  # seconds in which at least so many bytes must come:
LEAST = 1 << 18
MEMORY = 4 << 30  # bytes that such a process may take
TICK = 0.2  # seconds between two looks at what has come


def watched(work: Callable, *args, folder: Path, most=math.inf, longest=math.inf):
    """What work(*args) returns, in a process that ends with this one. Raises Refusal where that
    raises something; where less than LEAST bytes come into a folder in PATIENCE seconds; or if all
    is more than `most` bytes, or takes longer than `longest` seconds."""
    answer, pipe = multiprocessing.Pipe(duplex=False)
    # A copy of this process has the work, whatever it is, and what that needs.
    copy = multiprocessing.get_context("fork")
    child = copy.Process(target=alone, args=(pipe, os.getpid(), work, args))
    child.start()
    pipe.close()
    try:
        watch(answer, folder, most, longest)
        found, message = answer.recv()
    except EOFError:
        raise Refusal("the process that downloads was killed") from None
    finally:
        child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        child.join()
    if message is not None:
        raise Refusal(message)
    return found


def watch(answer, folder: Path, most: float, longest: float) -> None:
    """Wait for an answer as long as something comes."""
    began = last = time.monotonic()
    size = size_of(folder)
    while not answer.poll(TICK):
        now, found = time.monotonic(), size_of(folder)
        if found < size or found >= size + LEAST:
            size, last = found, now
        if found > most:
            raise Refusal(f"{found} bytes have come, expected at most {most}")
        if now - last > PATIENCE:
            raise Refusal(f"less than {LEAST} bytes have come in {PATIENCE} seconds")
        if now - began > longest:
            raise Refusal(f"it was not done in {longest} seconds")


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder, which come and go."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def alone(pipe, parent: int, work: Callable, args: tuple) -> None:
    """Send what work(*args) returns, and None; or None, and what is wrong."""
    os.setsid()  # Ctrl-C is for the parent; and what is started here can be killed at once
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    if not sys.stderr.isatty():  # nobody watches how it goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        answer = (work(*args), None)
    except Exception as error:  # packages raise many
        answer = (None, str(error)[:1000] or type(error).__name__)
    pipe.send(answer)


def end_with(parent: int) -> None:
    """Kill this process and all that it has started as soon as its parent is dead."""
    while os.getppid() == parent:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)
