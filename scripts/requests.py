"""What is asked for and what comes of it: requests, their completions, and the lines of JSON that
are written and resumed."""

import contextlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from scripts.checkpoint import Refusal, refusing, say
from scripts.defaults import check_bias
from scripts.jobs import Job
from scripts.outputs import Output
from scripts.tokenizer import Tokenizer


def message(role: str, text: str) -> dict:
    """One of a conversation."""
    return {"role": role, "content": text}


@dataclass(frozen=True)
class Request:
    """One completion to make. What a line of a prompts file may say of it, prompts.LINE_TYPES says,
    and what a flag may, cli.py."""

    id: int | str
    prompt: str
    prompt_ids: list[int]
    sample: int = 0
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None  # by token id
    seed: int = 1234
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    line: dict | None = None  # of --score, to be printed again


class Completion:
    """A request and what came of it so far; `finish_reason` is None while it runs."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request = request
        self.tokenizer = tokenizer
        self.eos_ids = () if request.ignore_eos else tokenizer.eos_ids
        self.names = getattr(tokenizer, "hidden", {})  # of the tokens that print nothing
        self.ids = list(request.prompt_ids)  # of the prompt and of what is new
        self.tokens = []
        self.logprobs = []
        # Where the prompt fills the context, there is no room for a token.
        self.finish_reason = None if request.max_new_tokens else "length"
        self.text = ""  # it ends with the text of tokens[base:read]
        self.base = self.read = 0
        self.shown = 0  # characters of the text that have been returned
        # Stop strings may name special tokens, which print nothing: here they are written out.
        self.spelled = ""
        self.hidden = []  # where such tokens begin and end in it
        self.sought = 0  # before there, nothing of it begins a stop string

    def push(self, token: int, logprob: float) -> str:
        """Add a token that was drawn; returns the text that has become certain: no half characters,
        nothing of a stop string. Raises Refusal where the logprob is no number."""
        check_numbers([logprob])
        self.ids.append(token)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.eos_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.finish_reason = "length"
        self.decode_token()
        start = self.shown
        self.shown = self.certain_length()
        return self.text[start : self.shown]

    def decode_token(self) -> None:
        """Add the text of the last token. What that is depends on its neighbours only, so a short
        window of them is decoded."""
        before = self.tokenizer.decode(self.tokens[self.base : self.read])
        now = self.tokenizer.decode(self.tokens[self.base :])
        is_half_a_character = now.endswith("\ufffd")
        if self.finish_reason or not is_half_a_character:
            self.text += now[len(before) :]
            self.spelled += now[len(before) :]
            self.base = self.read
            self.read = len(self.tokens)
        token = self.names.get(self.tokens[-1])
        if token is not None:
            start = len(self.spelled)
            self.spelled += token
            self.hidden.append((start, len(self.spelled)))

    def certain_length(self) -> int:
        """How many characters of the text nothing that comes can take back. Cuts the text at a stop
        string, and finishes there."""
        stops = self.request.stop
        starts = [self.text.find(stop, self.shown) for stop in stops]
        spelled = [self.spelled.find(stop, self.sought) for stop in stops]
        starts = [i for i in starts if i >= 0] + [self.printed(i) for i in spelled if i >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.finish_reason = "stop"
        elif not self.finish_reason:
            self.sought = begins(self.spelled, self.sought, stops)
            return min(begins(self.text, self.shown, stops), self.printed(self.sought))
        return len(self.text)

    def printed(self, place: int) -> int:
        """Where in the text a place of the spelled one is. Within a token it is before it."""
        return place - sum(min(end, place) - start for start, end in self.hidden if start < place)

    def json(self) -> str:
        """The line of --json; of --score, the line that was read with other logprobs."""
        line = self.request.line or {
            "id": self.request.id,
            "sample": self.request.sample,
            "prompt": self.request.prompt,
            "prompt_ids": self.request.prompt_ids,
            "text": self.text,
            "tokens": self.tokens,
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
            "prompt_tokens": len(self.request.prompt_ids),
            "seed": self.request.seed,
        }
        return json.dumps(line | {"logprobs": self.logprobs}, ensure_ascii=False)


def begins(text: str, start: int, stops: Sequence[str]) -> int:
    """Where, from `start` on, a stop string may begin that goes on behind the end; else the end."""
    for i in range(start, len(text)):
        if any(stop.startswith(text[i:]) for stop in stops):
            return i
    return len(text)


def settings_of(args) -> dict:
    """The fields of Request that are flags as well, by what cli.parse_args returns."""
    names = {field.name for field in fields(Request)} - {"prompt"}  # which is a list there
    return {name: value for name, value in vars(args).items() if name in names}


@dataclass(frozen=True)
class RequestMaker:
    """Makes requests of entries: dicts with `id`, `prompt` and perhaps other fields of Request,
    which go before `settings`; in a chat, perhaps `messages`, all that the prompt is the end of."""

    tokenizer: Tokenizer
    vocab_size: int
    context: int  # tokens of a prompt and its completion together
    settings: dict  # fields of Request, by the flags
    template_args: dict  # what the chat template gets
    num_samples: int = 1
    chat: bool = False  # whether the chat template goes around a prompt
    system: Sequence[dict] = ()  # the messages that a conversation begins with
    synthetic: bool = False  # whether a prompt that is a number means so many random tokens

    @classmethod
    def from_flags(cls, args, tokenizer: Tokenizer, vocab_size: int, context: int):
        """`args` is what cli.parse_args returns. Raises Refusal."""
        check_bias(args.logit_bias, vocab_size)
        return cls(
            tokenizer,
            vocab_size,
            context,
            settings=settings_of(args),
            template_args=args.template_args or {},
            num_samples=args.num_samples,
            chat=args.chat,
            system=args.system,
            synthetic=args.prompts_file is None,
        )

    def make(self, entry: dict) -> list[Request]:
        """The samples of an entry. Raises Refusal for a prompt that does not fit the model."""
        ids = self.prompt_ids(entry)
        name = f"prompt {entry['id']}"
        room = self.context - len(ids)
        are_tokens = all(type(x) is int and 0 <= x < self.vocab_size for x in ids)
        if not ids or room < 0 or not are_tokens:
            expected = f"1 to {self.context} (context), ids below {self.vocab_size}"
            raise Refusal(f"{name}: {len(ids)} tokens, expected {expected}")
        settings = self.settings | entry
        for name in ("messages", "template_args"):  # which are in the ids
            settings.pop(name, None)
        if settings["max_new_tokens"] > room:
            say(f"warning: {name} meets the context of {self.context} after {room} new tokens")
        settings["prompt_ids"] = ids
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        return [Request(**{"sample": i} | settings) for i in range(self.num_samples)]

    def prompt_ids(self, entry: dict) -> list[int]:
        """As given, random, of the chat template or of the plain text."""
        text = entry["prompt"]
        if entry.get("prompt_ids") is not None:
            return entry["prompt_ids"]
        if self.chat:
            alone = [*self.system, message("user", text)]
            given = self.template_args | entry.get("template_args", {})
            return self.tokenizer.encode_chat(entry.get("messages", alone), given)
        if self.synthetic and text.isascii() and text.isdigit():
            return self.random_ids(text)
        return self.tokenizer.encode(text)

    def random_ids(self, digits: str) -> list[int]:
        # One more than fit is as wrong as any number; Python reads no number of 5000 digits.
        size = min(int(digits[:18]), self.context + 1)
        return random.Random(self.settings["seed"]).choices(range(self.vocab_size), k=size)


def resume(output: Output, requests: list[Request]) -> list[Request]:
    """Those of which an --output file has no completion yet. Where its last line is torn, as a run
    that was killed leaves it, that is cut off. Raises Refusal for a file that holds anything else,
    and leaves that as it is."""
    content = output.read()
    *lines, torn = content.split(b"\n")
    done = Counter()
    errors = (ValueError, KeyError, TypeError, RecursionError)
    for number, line in enumerate(lines, start=1):
        with refusing(f"{output.name} holds more than completions, line {number}", *errors):
            entry = json.loads(line)
            if "stats" not in entry:
                check_numbers(entry["logprobs"])
                done[entry.get("id"), entry.get("sample")] += 1
    with refusing(f"{output.name} holds more than completions", *errors):
        check_torn(torn, requests)
    if torn:
        output.cut(len(content) - len(torn))
    left = []
    for request in requests:
        key = (request.id, request.sample)
        if done[key]:
            done[key] -= 1  # of --score, several may have one name or none
        else:
            left.append(request)
    output.done = len(requests) - len(left)
    if output.done:
        say(f"{output.done} of {len(requests)} completions are in {output.path}")
    return left


def check_torn(line: bytes, requests: list[Request]) -> None:
    """Raise Refusal or KeyError for the end of a file that is no part of a completion."""
    first = len('{"id": ')
    beginnings = [Completion(request, Tokenizer(None)).json()[:first] for request in requests]
    if not any(text.encode().startswith(line[:first]) for text in beginnings):
        raise Refusal("its last line")
    with contextlib.suppress(ValueError):  # which a part of a line raises
        json.loads(line)["logprobs"]


def check_numbers(logprobs: list[float]) -> None:
    if any(logprob != logprob for logprob in logprobs):
        raise Refusal("logits that are no numbers: choose another --precision")


def write(
    engine, requests: list[Request], as_json: bool, output: Output, echo_prompt: bool, stream: bool
) -> None:
    """Run the requests and print completions, or of --score the lines that were read with new
    logprobs. With `stream`, which needs an engine of one slot, text is printed as it comes; else a
    completion is printed when it ends. Lines of JSON go to `output` as well."""
    end = "\n\n" if len(requests) > 1 else "\n"
    with Job(requests, output.done, stream and not as_json) as job:
        for completion, piece in job.watch(engine.generate(requests)):
            is_done = completion.finish_reason is not None
            lead = completion.request.prompt if echo_prompt else ""
            if read := completion.request.line:
                completion.logprobs = engine.score(read["prompt_ids"], read["tokens"])
                check_numbers(completion.logprobs)
            if is_done:
                output.write(completion.json())
            if stream and not as_json:
                is_first = len(completion.tokens) <= 1
                text = lead + piece if is_first else piece
                job.print(text, end if is_done else "")
            elif is_done and as_json:
                job.print(completion.json())
            elif is_done:
                job.print(lead + completion.text, end)
