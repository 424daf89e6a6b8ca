"""Chat templates: where a checkpoint directory has one, and the text of a conversation by it, which
a process of its own renders."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from scripts.files import Refusal, is_there, text_in

SECONDS = 10  # which a conversation may take
LARGEST = 10**6  # characters, twenty times those of the largest that was ever published


def find_template(directory: Path, settings: dict) -> str | dict | None:
    """A file of its own goes before the settings, which may have several by name: of these the
    default, or all where there is none."""
    for file in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        if is_there(directory / file):
            return text_in(directory / file)
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {named["name"]: named["template"] for named in given}
    if isinstance(given, dict):
        return given.get("default", given)
    return given


def render(template: str | dict | None, messages: list[dict], tokens: dict[str, str]) -> str:
    """The text of a conversation, ready for the next answer; `tokens` are those that the template
    may call by name. Raises Refusal for whatever it can do wrong."""
    if not template:
        raise Refusal("there is none")
    if isinstance(template, dict):
        raise Refusal(f"there are {', '.join(template)}, expected one called default")
    if not isinstance(template, str):
        raise Refusal(f"it is {template!r:.40}, expected a text")
    if len(template) > LARGEST:
        raise Refusal(f"it has {len(template)} characters, expected {LARGEST} at most")
    reply = Renderer.ask({"template": template, "messages": messages, "tokens": tokens})
    if "error" in reply:
        raise Refusal(reply["error"])
    return reply["text"]


class Renderer:
    """The process that runs scripts/sandbox.py. It ends with this one, which closes what it reads,
    and where it ends before, there is a new one."""

    current = None

    def __init__(self):
        code = f"import sys; sys.path = {sys.path}; from scripts import sandbox"
        code += f"; sandbox.serve({SECONDS})"
        self.owner = os.getpid()  # a process that is forked has a renderer of its own
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not meant for it
        )

    @classmethod
    def ask(cls, request: dict) -> dict[str, str]:
        """What sandbox.answer says. Raises Refusal where the process does not survive that."""
        if cls.current is None or cls.current.owner != os.getpid():
            cls.current = cls()
        process = cls.current.process
        is_answered = False
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline() or "null")
            is_answered = reply is not None
        finally:
            if not is_answered:  # by Ctrl-C, too, after which an old answer would be taken for new
                cls.stop()
        if is_answered:
            return reply
        if process.returncode == -signal.SIGALRM:
            raise Refusal(f"it did not end in {SECONDS} seconds")
        raise Refusal("it ended the process that renders it")

    @classmethod
    def stop(cls) -> None:
        """End the process, if this one has any."""
        renderer, cls.current = cls.current, None
        if renderer and renderer.owner == os.getpid():
            renderer.process.kill()
            renderer.process.wait()
            renderer.process.stdout.close()
            with contextlib.suppress(OSError):  # of what it has not read
                renderer.process.stdin.close()
