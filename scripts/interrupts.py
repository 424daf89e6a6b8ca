"""What asks a process to end; and Ctrl-C while a command imports what it needs, which takes
seconds: it ends without a word."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

ENDS = (signal.SIGTERM, signal.SIGHUP)  # by which a job is stopped, or loses its terminal


def end_quietly() -> None:
    """From here on Ctrl-C ends the process at once, unless it is ignored, as in a job of the
    background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """From here on it is a KeyboardInterrupt, as Python has it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, they wait: Python may lose an exception that comes while it imports a module."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *ENDS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Within, ENDS raise SystemExit, so that what is to be cleaned up is; those that are ignored
    stay so."""
    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    taken = [end for end in ENDS if is_main and signal.getsignal(end) is signal.SIG_DFL]
    for end in taken:
        signal.signal(end, leave)
    try:
        yield
    finally:
        for end in taken:
            signal.signal(end, signal.SIG_DFL)


def leave(number: int, frame) -> None:
    """With the status that a shell gives to a process that a signal has ended."""
    sys.exit(128 + number)
