"""What renders chat templates, as a process of its own. They are code by strangers: one that does
not end, or grows without end, is ended with the process, whatever code in C it is in."""

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime

from jinja2 import Template, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scripts.files import Refusal, cause

MEMORY = 1 << 30  # bytes
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of the same, the first counts


class Generation(Extension):
    """{% generation %} marks an answer for training. Here it does nothing."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=1)
def compiled(template: str) -> Template:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return sandbox.from_string(template)


def render(template: str, messages: list[dict], variables: dict) -> str:
    """The text of a conversation, with all that transformers gives to a template."""
    given = {"tools": None, "documents": None, "add_generation_prompt": True} | variables
    given["messages"] = [whole_message(m) for m in messages]
    return compiled(template).render(given)


def whole_message(message: dict) -> dict:
    """Without what is null, and with the thoughts by the names that templates know."""
    found = {name: value for name, value in message.items() if value is not None}
    for name in THOUGHTS:
        if name in found:
            return {"thinking": found[name]} | found | {THOUGHTS[0]: found[name]}
    return found


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would escape what HTML does, and sort the keys."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def raise_exception(message: str):
    """What templates call to refuse a conversation."""
    raise Refusal(message)


def answer(line: bytes) -> str:
    """The text for a line of JSON with the arguments of `render`, or the error that there was; as a
    line of JSON."""
    try:
        return json.dumps({"text": render(**json.loads(line))})
    except MemoryError:
        return json.dumps({"error": f"it takes more than {MEMORY >> 20} MB"})
    except Exception as error:
        return json.dumps({"error": cause(error)})


def limit_memory() -> None:
    """For the rest of this process, where the system can do that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        is_lower = 0 <= hard < MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (hard if is_lower else MEMORY, hard))


def serve(seconds: int) -> None:
    """Answer each line of standard input by one, until there are no more. The system itself ends
    the process where an answer takes too long: Python would not in the midst of code in C."""
    limit_memory()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for line in sys.stdin.buffer:
        signal.alarm(seconds)
        reply = answer(line)
        signal.alarm(0)
        print(reply, flush=True)
