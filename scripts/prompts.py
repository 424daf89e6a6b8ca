"""What is asked for and what comes of it: the tokenizer, requests from the flags of generate.py and from files, their
completions, a conversation."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

import tp
from model import ModelConfig, read_json, refuse, refusing

LINE = "id sample prompt prompt_ids text tokens logprobs finish_reason prompt_tokens seed".split()  # of --json
message = lambda role, text: {"role": role, "content": text}


@dataclass(frozen=True)
class Request:
    """One completion to make."""

    id: int | str
    prompt: str
    prompt_ids: list[int]
    sample: int = 0
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    seed: int = 1234
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    line: dict | None = None  # of --score, to be printed again


class Tokenizer:
    """Text to ids and back, end ids and chat template of a checkpoint directory; of None (random weights), no text."""

    def __init__(self, directory: Path | None):
        if directory is None:
            self.eos_ids, self.decode, self.vocab = set(), lambda ids: "", dict
            self.encode = lambda text: refuse("random weights have no tokenizer: give --prompt a number of tokens")
            return
        self.settings = read_json(directory / "tokenizer_config.json", {})
        config = read_json(directory / "config.json", {}) | read_json(directory / "generation_config.json", {})
        jinja, given = directory / "chat_template.jinja", self.settings.get("chat_template")
        with refusing(f"{directory}: expected readable files of a tokenizer", Exception):
            eos = config.get("eos_token_id")
            self.eos_ids = set(eos if isinstance(eos, list) else [eos]) - {None}
            given = {t["name"]: t["template"] for t in given}.get("default") if isinstance(given, list) else given
            self.template = jinja.read_text() if jinja.exists() else given
            if (directory / "tokenizer.json").exists():
                import tokenizers

                hf = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
                self.encode, decode = lambda text, bos=True: hf.encode(text, add_special_tokens=bos).ids, hf.decode
                hf.no_truncation(), hf.no_padding()  # which are for training
                self.vocab = hf.get_vocab
            else:
                from sentencepiece import SentencePieceProcessor

                sp = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
                special = {t["content"]: int(i) for i, t in self.settings.get("added_tokens_decoder", {}).items()}
                special |= {sp.id_to_piece(i): i for i in range(len(sp)) if sp.is_control(i)}
                marks = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
                self.vocab = lambda: {sp.id_to_piece(i): i for i in range(len(sp))} | special
                add_bos = self.settings.get("add_bos_token", True) and sp.bos_id() >= 0
                ids_of = lambda part: [special[part]] if part in special else sp.encode(part)
                chat = lambda text: sum(map(ids_of, marks.split(text)), [])
                # In a plain prompt, what looks like a special token is text.
                self.encode = lambda text, bos=True: sp.encode(text, add_bos=add_bos) if bos else chat(text)
                decode = lambda ids: sp.decode([i for i in ids if i < len(sp)])
            lead = self.encode("a", bos=False)  # decoders may drop the space before the first word: another goes first
            known = len(decode(lead))
        self.decode = lambda ids: decode(lead + ids)[known:]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, ready for the next answer, by the checkpoint's template: untrusted code, sandboxed."""
        env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        env.globals |= {"raise_exception": refuse, "strftime_now": time.strftime, "tools": None, "documents": None}
        with refusing("the chat template failed", Exception):  # whatever a template can do wrong
            tokens = {n: self.settings.get(n) or "" for n in ("bos_token", "eos_token", "unk_token", "pad_token")}
            env.globals |= {n: token["content"] if isinstance(token, dict) else token for n, token in tokens.items()}
            # What marks an answer for training marks nothing here.
            text = re.sub(r"({%-?\s*(end)?)generation\b", r"\1with", self.template or refuse("there is none"))
            return self.encode(env.from_string(text).render(messages=messages, add_generation_prompt=True), bos=False)


class Completion:
    """A request and what came of it so far; `finish_reason` is None while it runs."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request, self.tokenizer, self.eos_ids = request, tokenizer, () if request.ignore_eos else tokenizer.eos_ids
        self.ids, self.tokens, self.logprobs = list(request.prompt_ids), [], []
        self.finish_reason = None if request.max_new_tokens else "length"  # the prompt fills the context
        # `shown` characters of the text have been returned, and it ends with the text of tokens[base:read].
        self.text, self.shown, self.base, self.read = "", 0, 0, 0

    def push(self, token: int, logprob: float) -> str:
        """Add a drawn token; returns the text that became certain: no half characters, nothing of a stop string."""
        self.ids.append(token)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        logprob == logprob or refuse("logits that are no numbers: choose another --precision")
        stop, full = self.request.stop, len(self.tokens) >= self.request.max_new_tokens
        self.finish_reason = "stop" if token in self.eos_ids else "length" if full else None
        # A short window is enough: what a token adds depends on its neighbours only.
        before, now = (self.tokenizer.decode(self.tokens[self.base : end]) for end in (self.read, None))
        if self.finish_reason or not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self.base, self.read = self.read, len(self.tokens)
        ends = [i for text in stop if (i := self.text.find(text, self.shown)) >= 0]
        if ends:
            self.text, self.finish_reason = self.text[: min(ends)], "stop"
        elif not self.finish_reason:  # what may become a stop string is held back
            ends = [i for i in range(self.shown, len(self.text)) if any(x.startswith(self.text[i:]) for x in stop)]
        start, self.shown = self.shown, min(ends, default=len(self.text))
        return self.text[start : self.shown]

    def json(self) -> str:
        known = vars(self.request) | vars(self) | {"prompt_tokens": len(self.request.prompt_ids)}
        line = self.request.line or {name: known[name] for name in LINE}
        return json.dumps(line | {"logprobs": self.logprobs}, ensure_ascii=False)


def make_requests(args, config: ModelConfig, tokenizer, entry: dict) -> list[Request]:
    """The samples of a prompt: its ids are given, random or its text's. Raises InputError."""
    text, ids = entry["prompt"], entry.get("prompt_ids")
    if ids is None and text.isascii() and text.isdigit() and not args.prompts_file:
        generator, size = torch.Generator().manual_seed(args.seed & 0xFFFFFFFF), min(int(text[:18]), config.context + 1)
        ids = torch.randint(config.vocab_size, (size,), generator=generator).tolist()
    elif ids is None:
        ids = tokenizer.encode_chat(args.system + [message("user", text)]) if args.chat else tokenizer.encode(text)
    room, name = config.context - len(ids), f"prompt {entry['id']}"
    if not ids or room < 0 or any(type(x) is not int or not 0 <= x < config.vocab_size for x in ids):
        refuse(f"{name}: {len(ids)} tokens, expected 1 to {config.context} (context), ids below {config.vocab_size}")
    settings = {f.name: getattr(args, f.name) for f in fields(Request) if hasattr(args, f.name)} | entry
    if settings["max_new_tokens"] > room:
        tp.say(f"warning: {name} meets the context of {config.context} after {room} new tokens")
    settings |= {"prompt_ids": ids, "max_new_tokens": min(settings["max_new_tokens"], room)}
    return [Request(**{"sample": i} | settings) for i in range(args.num_samples)]


def read_requests(args, config: ModelConfig, tokenizer) -> list[Request]:
    """For each --prompt, or line of --prompts_file or --score that is no blank nor stats. Raises InputError."""
    flag, path, is_json = ("--score", args.score, 1) if args.score else ("--prompts_file", args.prompts_file, 0)
    lines = enumerate(map(os.fsencode, args.prompt or ["128" if args.random_weights else "Hello, my name is"]))
    if path:
        with refusing(f"{flag} {path} cannot be read", OSError, AttributeError):  # stdin may be closed
            text = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = [(i, line.removesuffix(b"\r")) for i, line in enumerate(text.split(b"\n"), start=1) if line.strip()]
        is_json = is_json or path.suffix == ".jsonl" or (str(path) == "-" and re.match(rb'\s*{\s*"', text))
    kinds, made = {"prompt": [str], "id": [str, int], "seed": [int], "max_new_tokens": [int]}, {}
    for i, line in lines or refuse(f"{flag} {path} is empty"):
        with refusing(f"{flag} {path}, line {i} is refused" if path else "--prompt", ValueError, TypeError, KeyError):
            given = json.loads(line) if is_json else {"prompt": line.decode("utf-8-sig")}
            json.dumps(given, ensure_ascii=False).encode()  # raises UnicodeError for half a character
            if not args.score:
                entry = {"id": len(made)} | {key: given[key] for key in kinds if key in given or key == "prompt"}
                kind_is_wrong = any(type(value) not in kinds[name] for name, value in entry.items())
                if kind_is_wrong or entry.get("max_new_tokens", 1) < 1 or entry["id"] in made:
                    refuse("expected a text as prompt, an id of its own, integers as seed and max_new_tokens")
                made[entry["id"]] = make_requests(args, config, tokenizer, entry)
            elif "stats" not in given:
                ids = (given["prompt_ids"] or refuse("expected prompt_ids")) + given["tokens"]
                entry = {name: given.get(name) for name in ("id", "sample")} | {"prompt": "", "prompt_ids": ids}
                entry |= {"max_new_tokens": 0, "line": given}  # nothing is left to draw
                made[i, given.get("id"), given.get("sample")] = make_requests(args, config, tokenizer, entry)[:1]
    return [request for samples in made.values() for request in samples] or refuse(f"{flag} {path} has no completion")


def resume(path: Path | None, requests: list[Request]) -> list[Request]:
    """Those of which an --output file has no completion; a torn last line of the file is cut off."""
    *lines, torn = (path.read_bytes() if path and path.is_file() else b"").split(b"\n")
    with refusing(f"--output {path} holds more than completions, which would be lost", ValueError, KeyError, TypeError):
        done = {(entry["id"], entry["sample"]) for entry in map(json.loads, lines) if "stats" not in entry}
        b'{"id": '.startswith(torn[:7]) or refuse("its last line")
        with contextlib.suppress(ValueError):
            json.loads(torn)["tokens"]
    torn and os.truncate(path, path.stat().st_size - len(torn))
    left = [r for r in requests if (r.id, r.sample) not in done]
    len(left) < len(requests) and tp.say(f"{len(requests) - len(left)} of {len(requests)} completions are in {path}")
    return left


def read_line():
    with contextlib.suppress(EOFError):
        return input("> " if sys.stdin.isatty() else "").encode(errors="replace").decode().strip()
    return "/exit"


def converse(engine, system, request):
    """A conversation until /exit; Ctrl-C stops an answer, /clear forgets. `system` is the messages that it begins with,
    `request` makes one of an entry of prompts."""
    history, context = system, engine.model.config.context
    while (line := tp.agreed(read_line, alone=True)()) != "/exit":
        history = system if line == "/clear" else history
        if line in ("", "/clear"):
            continue
        turns, answer = [*history, message("user", line)], ""
        with contextlib.suppress(KeyboardInterrupt):
            ids = engine.tokenizer.encode_chat(turns)
            if len(ids) > context:  # no reason to lose the conversation
                tp.say(f"{len(ids)} tokens do not fit the context of {context}: /clear starts over")
                continue
            for _, text in engine.generate([request({"id": "conversation", "prompt": line, "prompt_ids": ids})]):
                answer += text
                print(text, end="", flush=True)
        print(flush=True)
        history = [*turns, message("assistant", answer)]
