"""Ctrl-C while a command imports what it needs, which takes seconds: it ends without a word."""

import signal


def end_quietly() -> None:
    """From here on Ctrl-C ends the process at once, unless it is ignored, as in a job of the
    background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """From here on it is a KeyboardInterrupt, as Python has it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
