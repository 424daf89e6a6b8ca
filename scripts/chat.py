"""A conversation in the terminal."""

import contextlib
import sys
from collections.abc import Callable, Sequence

from scripts.checkpoint import Refusal, is_first_rank, say
from scripts.requests import RequestMaker, message
from scripts.tokenizer import TooLong

LENGTH = 1024  # tokens that a conversation has room for until it needs more


def read_line() -> str:
    """What the user types, without the blanks around it; /exit at the end of input."""
    if sys.stdin is None:
        raise Refusal("standard input is closed, expected one who speaks")
    with contextlib.suppress(EOFError):
        line = input("> " if sys.stdin.isatty() else "")
        return line.encode(errors="replace").decode().strip()  # bytes that are no text become ?
    return "/exit"


def converse(
    engine,
    system: Sequence[dict],
    maker: RequestMaker,
    from_first: Callable,
    read: Callable[[], str] = read_line,
) -> None:
    """Talk until /exit; /clear forgets all but `system`, the messages that it begins with. The
    first rank alone reads, and `from_first(value)` gives its value to all ranks."""
    history = list(system)
    while True:
        line = from_first(read() if is_first_rank() else None)
        if line == "/exit":
            return
        if line == "/clear":
            history = list(system)
        elif line:
            history = answer(engine, history, line, maker)


def answer(engine, history: list[dict], line: str, maker: RequestMaker) -> list[dict]:
    """Print the answer to a line; returns the history with both. Ctrl-C ends the answer, and what
    there is of it stays."""
    turns = [*history, message("user", line)]
    text = ""
    with contextlib.suppress(KeyboardInterrupt):
        try:
            ids = maker.tokenizer.encode_chat(turns, maker.template_args)
            if len(ids) > maker.context:
                raise TooLong(f"{len(ids)} tokens do not fit the context of {maker.context}")
        except TooLong as error:  # no reason to lose the conversation
            say(f"{error}: /clear starts over")
            return history
        entry = {"id": "conversation", "prompt": line, "prompt_ids": ids}
        request = maker.make(entry)[0]
        length = len(ids) + request.max_new_tokens
        if length > engine.length:  # twice as much each time, as a compiler notices
            engine.reserve(min(max(length, 2 * engine.length), maker.context))
        for _, piece in engine.generate([request]):
            text += piece
            print(piece, end="", flush=True)
    print(flush=True)
    return [*turns, message("assistant", text)]
