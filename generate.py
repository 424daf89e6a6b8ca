"""The front door: arguments, tokenizer, chat, sampling, the generate() iterator, printing. See --help."""

import argparse
import contextlib
import ctypes
import json
import math
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels import FAST
from model import InputError, ModelConfig, Transformer, load_checkpoint, randomize, read_json, refuse

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "SmolLM2-135M-Instruct"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORD = 0xFFFFFFFF


def mix(x):
    """A 32-bit hash of an int, or of an int64 tensor, below 2^32: xor-shifts and multiplications, by constants from
    Wellons' hash-prospector, both below 2^31 so that no product overflows."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & WORD
    return x ^ (x >> 15)


def noise_key(seed: int, sample: int) -> list[int]:
    """Two 32-bit words that key the noise of one completion."""
    keys = [0x9E3779B9, 0x85EBCA6B]
    for word in (seed & WORD, seed >> 32 & WORD, sample):
        keys = [mix(key ^ mix(word)) for key in keys]
    return keys


def gumbel(key_B2: Tensor, pos_B: Tensor, ids_BK: Tensor) -> Tensor:
    """Gumbel noise [B, K], fp32: a pure function of (key, absolute position, vocabulary id), no state, no rows.
    u = (hi + lo 2^-32) 2^-32 keeps its resolution near zero, where the large values come from."""
    keys = mix(key_B2 ^ mix(pos_B)[:, None]).T[:, :, None]
    hi, lo = mix(keys ^ mix(ids_BK ^ keys.flip(0))).float()
    return -torch.log(-torch.log1p(-(hi * 2**-32 + (lo + 0.5) * 2**-64).clamp(max=1 - 2**-24)))


def top(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest fp32 logits and their ids, by (value descending, id ascending), exactly: value and id are packed
    into one integer, so there is no tie for a kernel to break as it likes."""
    (B, V), device = logits_BV.shape, logits_BV.device
    values, ids = logits_BV + 0.0, torch.arange(V, device=device).expand(B, V)  # adding 0 turns -0 into 0
    if V % 64 == 0 and V > 128 * k:  # all k lie in the k blocks of 64 with the largest maxima, by the same order
        blocks = top(values.view(B, -1, 64).amax(-1), k)[1]
        ids = (blocks[:, :, None] * 64 + torch.arange(64, device=device)).flatten(1)
        values = values.gather(1, ids)
    bits = values.view(torch.int32)
    packed = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32 | (WORD - ids)
    packed = packed.amax(-1, keepdim=True) if k == 1 else packed.topk(min(k, V)).values
    ids = WORD - (packed & WORD)
    return logits_BV.gather(-1, ids), ids


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
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Sampler:
    """Draws a token for each row of a batch by that row's own request; an idle row, None, takes its argmax."""

    def __init__(self, requests: list[Request | None], device: torch.device):
        rows = [request or Request(0, "", [], temperature=0.0) for request in requests]
        self.temperature_B = torch.tensor([r.temperature for r in rows], device=device)
        self.top_k_B = torch.tensor([r.top_k for r in rows], device=device)
        self.top_p_B = torch.tensor([r.top_p for r in rows], device=device, dtype=torch.float64)
        self.key_B2 = torch.tensor([noise_key(r.seed, r.sample) for r in rows], device=device)
        self.k = max(1 if r.temperature == 0 else r.top_k for r in rows)
        self.nucleus = any(r.top_p < 1 for r in rows)

    def __call__(self, logits_BV: Tensor, pos_B: Tensor) -> Tensor:
        """Tokens [B] for absolute positions `pos_B` from fp32 logits: the argmax of logits / temperature + Gumbel
        noise over the ids that top-k, then top-p keep, the lowest id on a tie; at temperature 0 the plain argmax."""
        values, ids = top(logits_BV, self.k)
        if self.k == 1:
            return ids[:, 0]
        temperature, top_p = self.temperature_B[:, None], self.top_p_B[:, None]
        scaled = (values - values[:, :1]) / torch.where(temperature == 0, 1.0, temperature)
        keep = torch.arange(ids.shape[1], device=ids.device) < self.top_k_B[:, None]
        if self.nucleus:
            weight = (scaled.exp() * keep * 2.0**40).long()  # fixed point: integers add up alike in any order
            upto = weight.cumsum(-1)
            keep = keep & ((upto - weight < top_p * upto[:, -1:]) | (top_p == 1))
        score = torch.where(keep, scaled + gumbel(self.key_B2, pos_B, ids), float("-inf"))
        drawn = torch.where(score == score.amax(-1, keepdim=True), ids, logits_BV.shape[-1]).amin(-1)
        return torch.where(self.temperature_B == 0, ids[:, 0], drawn)


class Tokenizer:
    """Text to ids and back, the end ids and the chat template of a checkpoint directory. With no directory, as for
    random weights, there is no text: synthetic prompts only."""

    def __init__(self, directory: Path | None):
        if directory is None:
            self.eos_ids, self.settings, self.template, self.decode = set(), {}, None, lambda ids: ""
            self.encode = lambda text: refuse("random weights have no tokenizer: give --prompt a number of tokens")
            return
        self.settings = read_json(directory / "tokenizer_config.json", {})
        configs = read_json(directory / "config.json", {}), read_json(directory / "generation_config.json", {})
        eos = (configs[0] | configs[1]).get("eos_token_id")
        self.eos_ids = set(eos if isinstance(eos, list) else [eos]) - {None}
        jinja = directory / "chat_template.jinja"
        self.template = jinja.read_text() if jinja.exists() else self.settings.get("chat_template")
        if isinstance(self.template, list):
            self.template = {t["name"]: t["template"] for t in self.template}.get("default")
        try:
            if (directory / "tokenizer.json").exists():
                self._use_tokenizers(str(directory / "tokenizer.json"))
            else:
                self._use_sentencepiece(str(directory / "tokenizer.model"))
        except Exception as e:  # the libraries raise plain Exception for a broken file
            raise InputError(f"{directory}: expected a readable tokenizer.json or tokenizer.model: {e}") from e

    def _use_tokenizers(self, path: str) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        tokenizer = HFTokenizer.from_file(path)
        self.encode = lambda text, bos=True: tokenizer.encode(text, add_special_tokens=bos).ids
        lead = self.encode("a", bos=False)  # some decoders drop the space before the first word, so another goes first
        known = len(tokenizer.decode(lead))
        self.decode = lambda ids: tokenizer.decode(lead + ids, skip_special_tokens=True)[known:]

    def _use_sentencepiece(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        sp = SentencePieceProcessor(model_file=path)
        special = {t["content"]: int(i) for i, t in self.settings.get("added_tokens_decoder", {}).items()}
        special |= {sp.id_to_piece(i): i for i in range(sp.get_piece_size()) if sp.is_control(i)}
        marks = re.compile("(" + "|".join(re.escape(mark) for mark in sorted(special, key=len, reverse=True)) + ")")
        first = [sp.bos_id()] if self.settings.get("add_bos_token", True) and sp.bos_id() >= 0 else []
        lead = sp.encode("a")  # sentencepiece drops the space before the first word, so another goes first

        def encode(text: str, bos: bool = True) -> list[int]:
            if bos:  # a plain prompt: what looks like a special token is text
                return first + sp.encode(text)
            pieces = [piece for piece in marks.split(text) if piece]
            return [i for piece in pieces for i in ([special[piece]] if piece in special else sp.encode(piece))]

        self.encode = encode
        self.decode = lambda ids: sp.decode(lead + [i for i in ids if i < sp.get_piece_size()])[len(sp.decode(lead)) :]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, ready for the next answer, by the checkpoint's template: untrusted code, sandboxed."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        tokens = {n: self.settings.get(n) or "" for n in ("bos_token", "eos_token", "unk_token", "pad_token")}
        tokens = {n: token["content"] if isinstance(token, dict) else token for n, token in tokens.items()}
        try:
            template = env.from_string(self.template or refuse("this checkpoint has none"))
            text = template.render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as e:  # whatever a template can do wrong
            raise InputError(f"the chat template failed: {e}") from e
        return self.encode(text, bos=False)


class TextStream:
    """Turns tokens into text as they come: no half characters, nothing of a stop string."""

    def __init__(self, decode: Callable, stops: tuple[str, ...]):
        self.decode, self.stops, self.stopped = decode, stops, False
        self.ids, self.base, self.read, self.text, self.shown = [], 0, 0, "", 0

    def push(self, token: int | None) -> str:
        """Add a token, None for the end; returns the text that became certain."""
        self.ids += [] if token is None else [token]
        # A short window is enough: what a token adds depends on its neighbours only.
        before, now = self.decode(self.ids[self.base : self.read]), self.decode(self.ids[self.base :])
        if token is None or not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self.base, self.read = self.read, len(self.ids)
        if cuts := [i for stop in self.stops if (i := self.text.find(stop, self.shown)) >= 0]:
            self.text, self.stopped = self.text[: min(cuts)], True
        starts = [s[:n] for s in self.stops for n in range(1, len(s))] if token is not None and not self.stopped else []
        held = max((len(start) for start in starts if self.text.endswith(start, self.shown)), default=0)
        new = self.text[self.shown : len(self.text) - held]
        self.shown += len(new)
        return new


@dataclass
class Completion:
    """A request and what came of it so far; `finish_reason` is None while it runs."""

    request: Request
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def json(self) -> str:
        r = self.request
        line = {"id": r.id, "sample": r.sample, "prompt": r.prompt, "prompt_ids": r.prompt_ids}
        line |= {"text": self.stream.text, "tokens": self.tokens, "logprobs": self.logprobs}
        line |= {"finish_reason": self.finish_reason, "prompt_tokens": len(r.prompt_ids), "seed": r.seed}
        return json.dumps(line, ensure_ascii=False)


class Engine:
    """A model, its tokenizer, and a cache of `batch_size` slots through which requests stream."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int, length: int, prefill_chunk: int = 0):
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk
        self.batch_size, self.cache = batch_size, model.new_cache(batch_size, length)
        self.tokens, self.seconds = {"prefill": 0, "decode": 0, "new": 0}, {"prefill": 0.0, "decode": 0.0}
        self.steps, self.first_token_s = 0, 0.0

    def _prefill(self, ids: list[int], slot: int) -> tuple[Tensor, Tensor]:
        """Leave a prompt's keys and values in a slot; fp32 logits [1, V], and the position [1] they are for."""
        cache, chunk, device = self.cache.row(slot), self.prefill_chunk or len(ids), self.model.device
        tokens, pos = torch.tensor([ids], device=device), torch.arange(len(ids) + 1, device=device)[None]
        for i in range(0, len(ids), chunk):
            end = min(i + chunk, len(ids))
            logits = self.model(tokens[:, i:end], pos[:, i:end], cache, end, last=True)
        return logits[:, -1], pos[:, -1]

    def _decode(self, slots: list[Completion | None]) -> tuple[Tensor, Tensor]:
        """Feed each slot its last token; fp32 logits [B, V], and the positions [B] they are for. An idle slot computes
        at position 0, which its next prompt overwrites."""
        tokens = torch.tensor([[c.tokens[-1] if c else 0] for c in slots], device=self.model.device)
        pos = [len(c.request.prompt_ids) + len(c.tokens) - 1 if c else 0 for c in slots]
        pos_B = torch.tensor(pos, device=self.model.device)
        self.steps += 1
        return self.model(tokens, pos_B[:, None], self.cache, max(pos) + 1, decode=True)[:, -1], pos_B + 1

    def _draw(self, sampler: Sampler, logits_BV: Tensor, pos_B: Tensor) -> list[tuple[int, float]]:
        tokens_B = sampler(logits_BV, pos_B)
        logprobs_B = self.model.ops.log_softmax(logits_BV).gather(-1, tokens_B[:, None])[:, 0]
        return list(zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True))

    def _push(self, completion: Completion, token: int, logprob: float) -> str:
        """Add a drawn token to a completion, finish it where it ends; returns the new text."""
        request, stream = completion.request, completion.stream
        completion.tokens.append(token)
        completion.logprobs.append(logprob)
        self.tokens["new"] += 1
        text = stream.push(token)
        if stream.stopped or (token in self.tokenizer.eos_ids and not request.ignore_eos):
            completion.finish_reason = "stop"
        elif len(completion.tokens) >= request.max_new_tokens:
            completion.finish_reason = "length"
        return text + stream.push(None) if completion.finish_reason and not stream.stopped else text

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Iterator[tuple[Completion, str]]:
        """Yield (completion, new text) for each token as it is made; a finished slot takes the next request at once."""
        queue, slots, began = list(requests)[::-1], [None] * self.batch_size, time.perf_counter()
        while queue or any(slots):
            start, free = time.perf_counter(), slots.index(None) if None in slots else None
            if queue and free is not None:
                request, phase, rows, sampler = queue.pop(), "prefill", [free], None
                slots[free] = Completion(request, TextStream(self.tokenizer.decode, request.stop))
                if request.max_new_tokens == 0:  # the prompt fills the context
                    slots[free].finish_reason = "length"
                    yield slots[free], ""
                    slots[free] = None
                    continue
                prefilled = self._prefill(request.prompt_ids, free)
                drawn = self._draw(Sampler([request], self.model.device), *prefilled)
                self.first_token_s = self.first_token_s or time.perf_counter() - began
            else:
                phase, rows = "decode", [b for b, completion in enumerate(slots) if completion]
                sampler = sampler or Sampler([c and c.request for c in slots], self.model.device)
                drawn = self._draw(sampler, *self._decode(slots))
                drawn = [drawn[b] for b in rows]
            self.tokens[phase] += len(request.prompt_ids) if phase == "prefill" else len(rows)
            self.seconds[phase] += time.perf_counter() - start
            for b, (token, logprob) in zip(rows, drawn, strict=True):
                text = self._push(slots[b], token, logprob)
                yield slots[b], text
                slots[b] = None if slots[b].finish_reason else slots[b]


def say(*words, **options) -> None:
    print(*words, file=sys.stderr, flush=True, **options)


def number(low: float, kind: type = int, high: float = 2**62) -> Callable:
    """An argparse type: a number in [low, high]."""

    def parse(text: str):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low} to {high:g}")
        return value

    parse.__name__ = "number"  # argparse names it where the text is none
    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; raises InputError for values out of range and flags that exclude each other."""
    p = argparse.ArgumentParser(description="Text from an open-weight language model.")
    p.error = refuse
    add, count, d = p.add_argument, {"type": number(1), "metavar": "N"}, Request(0, "", [])
    add("--checkpoint_path", type=Path, metavar="DIR", help=f"Hugging Face directory ({DEFAULT_CHECKPOINT.name})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1 (%(default)s)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of weights and cache (%(default)s)")
    add("--random_weights", type=Path, metavar="CONFIG.json", help="a model of that shape, for benchmarks")
    add("--prompt", action="append", metavar="TEXT", help="repeatable; an integer means so many random tokens")
    add("--prompts_file", metavar="FILE", help=".jsonl of prompt, id, seed, max_new_tokens, or one a line; - is stdin")
    add("--chat", action="store_true", help="apply the checkpoint's chat template")
    add("--system", metavar="TEXT", help="system prompt of a chat")
    add("--interactive", action="store_true", help="a conversation in the terminal: /clear, /exit")
    add("--max_new_tokens", **count, default=d.max_new_tokens, help="of each completion (%(default)s)")
    add("--temperature", type=number(0, float), default=d.temperature, help="0: the likeliest token (%(default)s)")
    add("--top_k", **count, default=d.top_k, help="draw from the N likeliest (%(default)s)")
    add("--top_p", type=number(0, float, 1), default=d.top_p, help="draw from the likeliest of this sum (%(default)s)")
    add("--seed", type=int, default=d.seed, metavar="N", help="of the noise (%(default)s)")
    add("--num_samples", **count, default=1, help="completions of each prompt (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a completion there; repeatable")
    add("--ignore_eos", action="store_true", help="go on past the end token")
    add("--batch_size", **count, default=1, help="slots that prompts stream through (%(default)s)")
    add("--prefill_chunk", type=number(0), default=0, metavar="N", help="feed prompts in chunks of N; 0: whole")
    add("--compile", action="store_true", help="torch.compile decoding")
    add("--compile_prefill", action="store_true", help="torch.compile prefill")
    add("--profile", metavar="FILE", help="write a trace for chrome://tracing")
    add("--json", action="store_true", help="one JSON object a line")
    add("--output", type=Path, metavar="FILE", help="append those lines to FILE; a rerun skips what is there")
    args = p.parse_args(argv)
    excluded = [("random_weights", "checkpoint_path"), ("random_weights", "chat"), ("prompt", "prompts_file")]
    excluded += [("interactive", f) for f in ("prompt", "prompts_file", "random_weights", "json", "output")]
    if clash := [pair for pair in excluded if all(getattr(args, flag) for flag in pair)]:
        refuse("--{} excludes --{}".format(*clash[0]))
    if args.system is not None and not (args.chat or args.interactive):
        refuse("--system needs --chat or --interactive")
    if args.top_p == 0 or "" in args.stop:
        refuse("expected --top_p above 0 and some text after --stop")
    args.opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    return args


def load(args: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, from the flags; fetches the default checkpoint where it is missing."""
    try:
        device = (probe := torch.zeros(1, device=args.device)).device
        probe.item()
    except (RuntimeError, AssertionError) as e:
        names = ", ".join(["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())])
        raise InputError(f"--device {args.device} is not available, choose from {names}") from e
    directory = args.checkpoint_path or DEFAULT_CHECKPOINT
    if not args.random_weights and not args.checkpoint_path and not directory.exists():
        from scripts import download

        say(f"{directory} is missing, fetching it")
        try:
            download.fetch_default(directory)
        except (ValueError, ImportError) as e:
            raise InputError(f"the default checkpoint cannot be had: {e}") from e
    config = ModelConfig.from_file(args.random_weights or directory / "config.json")
    tokenizer = Tokenizer(None if args.random_weights else directory)
    model, show = Transformer(config, FAST, device, PRECISIONS[args.precision]), sys.stderr.isatty()
    if args.random_weights:
        randomize(model)
    else:
        load_checkpoint(model, directory, lambda i, n: show and say(f"\rloading {i}/{n}", end="\r" if i < n else "\n"))
    return model, tokenizer


def set_up(model: Transformer, compile_decode: bool, compile_prefill: bool) -> None:
    """Make every global setting, after loading."""
    if sys.platform == "linux" and model.device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives freed buffers back to the kernel and takes page faults for the next: a third of a prefill's time.
        libc.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}  # the model never changes

    def own_stack() -> Callable:  # Dynamo keeps graphs by code object: with a copy, no model runs another's
        stack = Transformer.stack
        return types.MethodType(types.FunctionType(stack.__code__.replace(), stack.__globals__), model)

    if compile_decode:
        graphs = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
        model.decode_stack = torch.compile(own_stack(), fullgraph=True, options=options | graphs)
    if compile_prefill:
        model.prefill_stack = torch.compile(own_stack(), fullgraph=True, dynamic=True, options=options)


def warm_up(model: Transformer, batch_size: int, length: int) -> None:
    """Run each graph before the clock: a few short prompts, as many tokens as CUDA graphs need to be recorded."""
    engine = Engine(model, Tokenizer(None), batch_size, length)
    list(engine.generate([Request(0, "", [0, 0], max_new_tokens=4)] * batch_size))


def read_prompts(name: str) -> list[dict]:
    """The prompts of a file, as dicts with id and prompt and, where a line gives them, seed and max_new_tokens."""
    try:
        data = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except (OSError, ValueError) as e:
        raise InputError(f"--prompts_file {name} cannot be read: {e}") from e
    is_json, prompts = name.endswith(".jsonl") or (name == "-" and data.lstrip().startswith('{"')), {}
    for i, line in enumerate(data.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = {"id": len(prompts)} | (json.loads(line) if is_json else {"prompt": line.removesuffix("\r")})
            ints = [entry.get("seed", 0), entry.get("max_new_tokens", 1)]
            if type(entry["prompt"]) is not str or [type(x) for x in ints] != [int, int] or ints[1] < 1:
                raise ValueError("expected a text as prompt, integers as seed and max_new_tokens")
            if not isinstance(entry["id"], str | int) or entry["id"] in prompts:
                raise ValueError("expected an id of its own, a text or an integer")
        except (ValueError, TypeError, KeyError) as e:
            raise InputError(f"--prompts_file {name}, line {i}: {e}") from e
        prompts[entry["id"]] = entry
    return list(prompts.values()) or refuse(f"--prompts_file {name} has no prompt")


def make_request(args: argparse.Namespace, config: ModelConfig, entry: dict, ids: list[int]) -> Request:
    """Check an encoded prompt against the model and cut max_new_tokens to its context; raises InputError."""
    room, wanted = config.context - len(ids), entry.get("max_new_tokens", args.max_new_tokens)
    if not ids or room < 0 or max(ids) >= config.vocab_size:
        expected = f"1 to {config.context} tokens (the model's context) with ids below {config.vocab_size}"
        raise InputError(f"prompt {entry['id']} has {len(ids)} tokens, expected {expected}")
    if wanted > room:
        say(f"warning: prompt {entry['id']} meets the context of {config.context} after {room} new tokens")
    fields = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "ignore_eos")}
    fields |= {"seed": entry.get("seed", args.seed), "max_new_tokens": min(wanted, room), "stop": tuple(args.stop)}
    return Request(entry["id"], entry["prompt"], ids, **fields)


def resume(path: Path) -> set[tuple]:
    """(id, sample) of each completion in an --output file, whose torn last line, if it has one, is cut off."""
    try:
        with path.open("a+b") as file:
            file.seek(0)
            *lines, torn = file.read().split(b"\n")
            entries = [json.loads(line) for line in lines]
            if torn[:7] != b'{"id": '[: len(torn)]:
                raise ValueError
            done = {(entry["id"], entry["sample"]) for entry in entries if "stats" not in entry}
            file.truncate(sum(len(line) + 1 for line in lines))
            return done
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"--output {path} holds something else than completions, which would be lost") from e


def report(engine: Engine, load_s: float, compile_s: float, as_json: bool) -> None:
    """The stats line, and the same for a person."""
    from scripts.bench import peak_memory, read_bandwidth

    size, device, new = engine.model.nbytes, engine.model.device, engine.tokens["new"]
    decode, prefill = (engine.tokens[phase] / (engine.seconds[phase] or math.inf) for phase in ("decode", "prefill"))
    rate, first = size * engine.steps / (engine.seconds["decode"] or math.inf), engine.first_token_s
    stats = {"decode_tokens_per_sec": decode, "prefill_tokens_per_sec": prefill, "time_to_first_token_s": first}
    stats |= {"load_s": load_s, "compile_s": compile_s, "new_tokens": new, "model_bytes": size}
    stats |= {"bandwidth_gb_s": rate / 1e9, "accept_counts": [], "peak_memory_gb": peak_memory(device) / 1e9}
    if as_json:
        print(json.dumps({"stats": stats | {"deterministic": False}}), flush=True)
    limit = read_bandwidth(device)
    say(f"{new} tokens: decode {decode:.1f} tokens/s, prefill {prefill:.0f} tokens/s, first token after {first:.2f} s")
    share = f"{rate / limit:.0%} of the {limit / 1e9:.0f} GB/s that this machine reads"
    say(
        f"load {load_s:.1f} s, compile {compile_s:.1f} s, weights {size / 1e9:.2f} GB at {rate / 1e9:.1f} GB/s, {share}"
    )


def run(engine: Engine, requests: list[Request], args: argparse.Namespace) -> None:
    """Generate, print as it comes, and append each completion to --output as it ends."""
    with args.output.open("a", encoding="utf-8") if args.output else contextlib.nullcontext() as file:
        for completion, text in engine.generate(requests):
            lead = "" if args.chat else completion.request.prompt
            if engine.batch_size == 1 and not args.json:
                print(text if len(completion.tokens) > 1 else lead + text, end="", flush=True)
            if completion.finish_reason and file:
                file.write(completion.json() + "\n")
                file.flush()
            if completion.finish_reason and args.json:
                print(completion.json(), flush=True)
            elif completion.finish_reason:
                print(lead + completion.stream.text if engine.batch_size > 1 else "", end="\n\n"[: len(requests)])


def converse(engine: Engine, args: argparse.Namespace) -> None:
    """A conversation in the terminal; Ctrl-C stops an answer, /clear forgets, /exit or the end of input leaves."""
    history = args.opening
    with contextlib.suppress(EOFError):
        while (line := input("> " if sys.stdin.isatty() else "").strip()) != "/exit":
            if line in ("", "/clear"):
                history = history if not line else args.opening
                continue
            turn, answer = [{"role": "user", "content": line}], ""
            with contextlib.suppress(KeyboardInterrupt):
                ids = engine.tokenizer.encode_chat(history + turn)
                try:
                    request = make_request(args, engine.model.config, {"id": "conversation", "prompt": line}, ids)
                except InputError as e:  # no reason to lose the conversation
                    say(f"{e}: /clear starts over")
                    continue
                for _, text in engine.generate([request]):
                    answer += text
                    print(text, end="", flush=True)
            print(flush=True)
            history = history + turn + [{"role": "assistant", "content": answer}]


def make_requests(args: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer) -> list[Request]:
    """The requests of the prompts on the command line or in the file; raises InputError."""
    texts = args.prompt or ["128" if args.random_weights else "Hello, my name is"]
    prompts = [{"id": i, "prompt": text, "size": text.isascii() and text.isdigit()} for i, text in enumerate(texts)]
    requests = []
    for entry in read_prompts(args.prompts_file) if args.prompts_file else prompts:
        text = entry["prompt"]
        text.encode()  # raises UnicodeError for half a character, which no tokenizer takes
        if entry.get("size"):
            generator = torch.Generator().manual_seed(args.seed & WORD)
            size = min(int(text[:18]), config.context + 1)
            ids = torch.randint(config.vocab_size, (size,), generator=generator).tolist()
        elif args.chat:
            ids = tokenizer.encode_chat(args.opening + [{"role": "user", "content": text}])
        else:
            ids = tokenizer.encode(text)
        request = make_request(args, config, entry, ids)
        requests += [replace(request, sample=i) for i in range(args.num_samples)]
    return requests


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    start = time.perf_counter()
    model, tokenizer = load(args)
    load_s = time.perf_counter() - start
    requests = [] if args.interactive else make_requests(args, model.config, tokenizer)
    done = resume(args.output) if args.output else set()
    requests = [r for r in requests if (r.id, r.sample) not in done]
    longest = max(
        (len(r.prompt_ids) + r.max_new_tokens for r in requests),
        default=model.config.context if args.interactive else 1,
    )
    set_up(model, args.compile, args.compile_prefill)
    start = time.perf_counter()
    if args.compile or args.compile_prefill:
        warm_up(model, args.batch_size, longest)
    compile_s = time.perf_counter() - start
    engine = Engine(model, tokenizer, args.batch_size, longest, args.prefill_chunk)
    with torch.profiler.profile() if args.profile else contextlib.nullcontext() as profile:
        converse(engine, args) if args.interactive else run(engine, requests, args)
    if profile:
        profile.export_chrome_trace(args.profile)
    if not args.interactive:
        report(engine, load_s, compile_s, args.json)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError, UnicodeError) as e:
        say("error:", *str(e).split())
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
