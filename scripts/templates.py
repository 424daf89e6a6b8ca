"""Chat templates: where a checkpoint directory has them, what a user may give them, and the text of
a conversation by one, which a process of its own renders."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from scripts.files import Refusal, is_there, refusing, text_in
from scripts.special_tokens import NAMES

SECONDS = 10  # which a conversation may take
LARGEST = 10**6  # characters, twenty times those of the largest that was ever published
LARGEST_ARGUMENTS = 10**7  # characters of them as JSON
# Names that are no variables of a template: what it gets elsewhere, what it calls, and an argument
# of apply_chat_template that means other text here than there.
NO_VARIABLES = {"messages", "raise_exception", "strftime_now", "continue_final_message", *NAMES}


def find_template(directory: Path, settings: dict) -> str | dict | None:
    """One, or several by name. Files go before the settings, which count as long as no file is the
    default."""
    files = sorted(directory.glob("additional_chat_templates/[!.]*.jinja"))
    named = {path.stem: text_in(path) for path in files}
    file = directory / "chat_template.jinja"
    if "default" not in named and is_there(file):
        named["default"] = text_in(file)
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    if named and ("default" in named or not given):
        return named
    if not named:
        return given
    return (given if isinstance(given, dict) else {"default": given}) | named


def typed_arguments(text: str) -> dict:
    """What --template_args gives to a template. Raises what argparse makes its own error of."""
    try:
        with refusing("expected a JSON object", ValueError, RecursionError):
            given = json.loads(os.fsencode(text).decode())
        return check_arguments(given)
    except (Refusal, RecursionError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_arguments(given: dict) -> dict:
    """What is given to a template, by name. Raises Refusal for what is no JSON, or has a name or a
    type that it cannot have."""
    if not isinstance(given, dict):
        raise Refusal(f"it is {given!r:.40}, expected a JSON object")
    with refusing("expected text and finite numbers", ValueError, RecursionError):
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        text.encode()  # not so of half a character
    if len(text) > LARGEST_ARGUMENTS:
        raise Refusal(f"it has {len(text)} characters, expected {LARGEST_ARGUMENTS} at most")
    for name in sorted(NO_VARIABLES & given.keys()):
        raise Refusal(f"{name} cannot be set, expected a variable of the template")
    for name in ("tools", "documents"):
        listed = given.get(name)
        is_list = isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)
        if listed is not None and not is_list:
            raise Refusal(f"{name} is {listed!r:.40}, expected a list of objects")
    name = given.get("chat_template")
    if name is not None and not isinstance(name, str):
        raise Refusal(f"chat_template is {name!r:.40}, expected the name of one")
    is_last = given.get("add_generation_prompt", True)
    if not isinstance(is_last, bool):
        raise Refusal(f"add_generation_prompt is {is_last!r:.40}, expected true or false")
    return given


def choose(templates: dict[str, str], arguments: dict) -> str:
    """As transformers does: the one that is named, or where there are tools the one for them, else
    the default. Raises Refusal where it is missing."""
    name = arguments.get("chat_template")
    if name is None:
        is_for_tools = arguments.get("tools") is not None and "tool_use" in templates
        name = "tool_use" if is_for_tools else "default"
    if name not in templates:
        raise Refusal(f"its names are {', '.join(templates)}, expected one called {name}")
    return templates[name]


def render(
    template: str | dict | None,
    messages: list[dict],
    tokens: dict[str, str],
    arguments: dict | None = None,
) -> str:
    """The text of a conversation, ready for the next answer; `tokens` are those that the template
    may call by name, `arguments` what a user gives it. Raises Refusal for whatever it can do
    wrong."""
    given = dict(arguments or {})
    if template:
        template = choose(template if isinstance(template, dict) else {"default": template}, given)
    if not template:
        raise Refusal("there is none")
    if not isinstance(template, str):
        raise Refusal(f"it is {template!r:.40}, expected a text")
    if len(template) > LARGEST:
        raise Refusal(f"it has {len(template)} characters, expected {LARGEST} at most")
    for name in sorted(tokens.keys() & given.keys()):
        raise Refusal(f"{name} cannot be set, it is a token of the checkpoint")
    given.pop("chat_template", None)
    request = {"template": template, "messages": messages, "variables": given | tokens}
    reply = Renderer.ask(request)
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
