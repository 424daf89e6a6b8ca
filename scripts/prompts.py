"""What is asked for: prompts of the flags of generate.py and of files, and completions to score."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from scripts import requests, templates
from scripts.checkpoint import is_first_rank
from scripts.defaults import RANGES, check_bias, check_range, read_bias
from scripts.files import Refusal, read_stream, refusing
from scripts.outputs import Output
from scripts.requests import Request, RequestMaker, message

JSON_LINES = (".jsonl", ".ndjson", ".json")
JSON_BEGINS = re.compile(rb'\s*{\s*"')
# What a line of JSON may say of its request, and the type of that. A bool is no int here.
LINE_TYPES = {
    "prompt": [str],
    "messages": [list],
    "system": [str],
    "template_args": [dict],
    "id": [str, int],
    "seed": [int],
    "max_new_tokens": [int],
    "temperature": [int, float],
    "top_k": [int],
    "top_p": [int, float],
    "min_p": [int, float],
    "repetition_penalty": [int, float],
    "logit_bias": [dict],
    "stop": [str, list],
}


def wanted(args, maker: RequestMaker) -> tuple[list[Request], Output]:
    """What is still to be done, and where it is written: at the first rank, since others read and
    write nothing, and not in a conversation. Raises Refusal."""
    if args.interactive or not is_first_rank():
        return [], Output(None)
    asked = read_requests(args, maker)
    output = Output(args.output)
    return requests.resume(output, asked), output


def read_requests(args, maker: RequestMaker) -> list[Request]:
    """Of the flag that says what is asked for: --score, --prompts_file or --prompt. Raises Refusal,
    for a file with the number of the line."""
    if args.score:
        return read_score_file(args.score, maker)
    if args.prompts_file:
        return read_prompts_file(args.prompts_file, maker)
    default = "128" if args.random_weights else "Hello, my name is"
    return read_prompts(args.prompt or [default], maker)


def read_prompts(texts: Iterable[str], maker: RequestMaker) -> list[Request]:
    found = []
    for i, text in enumerate(texts):
        with refusing("--prompt", ValueError):
            typed = os.fsencode(text)  # which may be no text
            entry = {"id": i, "prompt": plain_text(typed)}
            check_length(entry["prompt"], maker)
            found += maker.make(entry)
    return found


def read_prompts_file(path: Path, maker: RequestMaker) -> list[Request]:
    """A prompt a line, as plain text or, in a .jsonl file, as JSON with settings of its own. Of
    standard input, the first line shows which."""
    where = f"--prompts_file {path}"
    lines = read_lines(where, path)
    is_json = path.suffix.lower() in JSON_LINES
    if str(path) == "-":
        is_json = JSON_BEGINS.match(b"".join(line for _, line in lines[:2])) is not None
    ids = set()
    found = []
    for number, line in lines:
        with refusing_line(where, number):
            given = read_object(line) if is_json else {"prompt": plain_text(line)}
            entry = {"id": len(ids)} | read_entry(given, maker)
            if entry["id"] in ids:
                raise Refusal(f"an earlier line has the id {entry['id']}")
            ids.add(entry["id"])
            check_length(entry["prompt"], maker)
            found += maker.make(entry)
    return found


def check_length(text: str, maker: RequestMaker) -> None:
    """Raise Refusal for what need not be read to its end. A number of tokens is no text, and of a
    chat the template says what the text is."""
    if not (maker.chat or text.isdigit()):
        maker.tokenizer.check_length(text, maker.context)


def read_entry(given: dict, maker: RequestMaker) -> dict:
    """What a line of JSON says of its request."""
    for name, value in given.items():
        if name not in LINE_TYPES:
            raise Refusal(f"there is no {name}, expected {', '.join(LINE_TYPES)}")
        if type(value) not in LINE_TYPES[name]:
            types = " or ".join(kind.__name__ for kind in LINE_TYPES[name])
            raise Refusal(f"{name} is {value!r:.40}, expected {types}")
        if name in RANGES:
            check_range(name, value, RANGES[name])
    entry = dict(given)
    if "stop" in given:
        entry["stop"] = read_stop(given["stop"])
    if "logit_bias" in given:
        entry["logit_bias"] = read_bias(given["logit_bias"])
        check_bias(entry["logit_bias"], maker.vocab_size)
    with refusing("template_args", Refusal):
        templates.check_arguments(given.get("template_args", {}))
    if not maker.chat and given.keys() & {"messages", "system", "template_args"}:
        raise Refusal("messages, system and template_args need --chat")
    if ("prompt" in given) == ("messages" in given):
        raise Refusal("expected a prompt or, with --chat, messages")
    if maker.chat:
        entry |= read_conversation(given, maker)
        entry.pop("system", None)
    return entry


def read_stop(given: str | list) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not all(isinstance(text, str) and text for text in texts):
        raise Refusal("expected some text as stop, or a list of texts")
    return texts


def read_conversation(given: dict, maker: RequestMaker) -> dict:
    """The messages of a line, and as its prompt the text of the last. A system message is theirs,
    else that of the line or of the flags."""
    messages = given.get("messages", [message("user", given.get("prompt"))])
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
    if not roles or None in roles:
        raise Refusal("expected messages that have a role")
    has_system = roles[0] == "system"
    if has_system and "system" in given:
        raise Refusal("expected one system message, there are two")
    system = [message("system", given["system"])] if "system" in given else maker.system
    if not has_system:
        messages = [*system, *messages]
    text = messages[-1].get("content")
    return {"messages": messages, "prompt": text if isinstance(text, str) else ""}


def read_score_file(path: Path, maker: RequestMaker) -> list[Request]:
    """Of each line with prompt_ids and tokens a request that has them all as its prompt, and room
    for none. Lines of stats are passed over."""
    where = f"--score {path}"
    found = []
    for number, line in read_lines(where, path):
        with refusing_line(where, number):
            given = read_object(line)
            if "stats" not in given:
                found += maker.make(score_entry(given))[:1]
    if not found:
        raise Refusal(f"{where} has no completion")
    return found


def score_entry(given: dict) -> dict:
    if not given["prompt_ids"]:
        raise Refusal("expected prompt_ids")
    names = {"id": given.get("id"), "sample": given.get("sample")}
    if any(isinstance(name, (list, dict)) for name in names.values()):
        raise Refusal("expected a text or a number as id and sample")
    ids = given["prompt_ids"] + given["tokens"]
    return names | {"prompt": "", "prompt_ids": ids, "max_new_tokens": 0, "line": given}


def read_lines(where: str, path: Path) -> list[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers; - is standard input. Line feeds
    alone end them: splitlines() knows characters that are part of a text."""
    content = read_stream(where, path)
    lines = enumerate(content.split(b"\n"), start=1)
    found = [(number, line.removesuffix(b"\r")) for number, line in lines if line.strip()]
    if not found:
        raise Refusal(f"{where} is empty")
    return found


def refusing_line(where: str, number: int):
    errors = (ValueError, TypeError, KeyError, RecursionError)
    return refusing(f"{where}, line {number} is refused", *errors)


def plain_text(line: bytes) -> str:
    """Some editors begin a file with a mark of its encoding. Raises UnicodeError."""
    return line.decode("utf-8-sig")


def read_object(line: bytes) -> dict:
    """A line of JSON. Raises ValueError for one that is no object, or that has half a character."""
    given = json.loads(line)
    if not isinstance(given, dict):
        raise Refusal("expected a JSON object")
    json.dumps(given, ensure_ascii=False).encode()  # raises UnicodeError for half a character
    return given
