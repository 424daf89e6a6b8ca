"""Chat templates: where a checkpoint directory has one, and the text of a conversation by it, with
all that transformers gives to a template."""

import json
from datetime import datetime
from pathlib import Path

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scripts.checkpoint import Refusal

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of the same, the first counts


class Generation(Extension):
    """{% generation %} marks an answer for training. Here it does nothing."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def find_template(directory: Path, settings: dict) -> str | dict | None:
    """A file of its own goes before the settings, which may have several by name: of these the
    default, or all where there is none."""
    for file in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        if (directory / file).exists():
            return (directory / file).read_text(encoding="utf-8")
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {named["name"]: named["template"] for named in given}
    if isinstance(given, dict):
        return given.get("default", given)
    return given


def render(template: str | dict | None, messages: list[dict], tokens: dict[str, str]) -> str:
    """The text of a conversation, ready for the next answer. A template is code by strangers, so it
    runs in a sandbox; `tokens` are those that it may call by name."""
    if not template:
        raise Refusal("there is none")
    if isinstance(template, dict):
        raise Refusal(f"there are {', '.join(template)}, expected one called default")
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return sandbox.from_string(template).render(
        messages=[whole_message(m) for m in messages],
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **tokens,
    )


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
