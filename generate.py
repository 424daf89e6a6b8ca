"""The front door: arguments, tokenizer, chat, sampling, the generate() iterator, printing. See --help."""

import argparse
import ctypes
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from kernels import FAST
from model import InputError, ModelConfig, Transformer, load_checkpoint, randomize, read_json

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "SmolLM2-135M-Instruct"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORD = 0xFFFFFFFF


def mix(x):
    """A 32-bit integer hash, of an int or an int64 tensor below 2^32: xor-shifts and multiplications with constants
    from Wellons' hash-prospector. Both are below 2^31, so that no product overflows."""
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
    """Gumbel noise [B, K], fp32: a pure function of (key, absolute position, vocabulary id), with no state and no
    rows. u = (hi + lo 2^-32) 2^-32 keeps its resolution near zero, where the large values come from."""
    a, b = mix(key_B2 ^ mix(pos_B)[:, None]).split(1, dim=1)
    hi, lo = mix(a ^ mix(ids_BK ^ b)).float(), mix(b ^ mix(ids_BK ^ a)).float()
    return -torch.log(-torch.log1p(-(hi * 2**-32 + (lo + 0.5) * 2**-64)))


def top(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest fp32 logits and their ids, by (value descending, id ascending), exactly: value and id are packed
    into one integer, so there is no tie for a kernel to break as it likes."""
    bits = (logits_BV + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    bits = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    packed = bits << 32 | (WORD - torch.arange(logits_BV.shape[-1], device=logits_BV.device))
    packed = packed.amax(-1, keepdim=True) if k == 1 else packed.topk(min(k, packed.shape[-1])).values
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
        idle = Request(0, "", [], temperature=0.0)
        rows = [request or idle for request in requests]
        self.temperature_B = torch.tensor([r.temperature for r in rows], device=device)
        self.top_k_B = torch.tensor([r.top_k for r in rows], device=device)
        self.top_p_B = torch.tensor([r.top_p for r in rows], device=device, dtype=torch.float64)
        self.key_B2 = torch.tensor([noise_key(r.seed, r.sample) for r in rows], device=device)
        self.k = max(1 if r.temperature == 0 else r.top_k for r in rows)
        self.greedy = all(r.temperature == 0 for r in rows)

    def __call__(self, logits_BV: Tensor, pos_B: Tensor) -> Tensor:
        """Tokens [B] for absolute positions `pos_B` from fp32 logits: the argmax of logits / temperature + Gumbel
        noise over the ids that top-k, then top-p keep, the lowest id on a tie; at temperature 0 the plain argmax."""
        values, ids = top(logits_BV, self.k)
        if self.greedy:
            return ids[:, 0]
        temperature = self.temperature_B[:, None]
        scaled = (values - values[:, :1]) / torch.where(temperature == 0, 1.0, temperature)
        keep = torch.arange(ids.shape[1], device=ids.device) < self.top_k_B[:, None]
        weight = (scaled.exp() * keep * 2.0**40).long()  # fixed point: integers add up alike in any order
        upto, top_p = weight.cumsum(-1), self.top_p_B[:, None]
        keep = keep & ((upto - weight < top_p * upto[:, -1:]) | (top_p == 1))
        score = torch.where(keep, scaled + gumbel(self.key_B2, pos_B, ids), float("-inf"))
        drawn = torch.where(score == score.amax(-1, keepdim=True), ids, logits_BV.shape[-1]).amin(-1)
        return torch.where(self.temperature_B == 0, ids[:, 0], drawn)


class Tokenizer:
    """Text to ids and back, the end ids and the chat template of a checkpoint directory."""

    def __init__(self, directory: Path, config: ModelConfig):
        files = [directory / name for name in ("tokenizer_config.json", "generation_config.json")]
        self.settings, generation = (read_json(path) if path.exists() else {} for path in files)
        eos = generation.get("eos_token_id", list(config.eos_ids))
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        template = directory / "chat_template.jinja"
        self.template = template.read_text() if template.exists() else self.settings.get("chat_template")
        try:
            if (directory / "tokenizer.json").exists():
                self._use_tokenizers(str(directory / "tokenizer.json"))
            elif (directory / "tokenizer.model").exists():
                self._use_sentencepiece(str(directory / "tokenizer.model"))
            else:
                raise InputError("expected a tokenizer.json or a tokenizer.model")
        except Exception as e:  # tokenizers raises plain Exception for a broken file
            raise InputError(f"{directory}: no tokenizer: {e}") from e

    def _use_tokenizers(self, path: str) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        tokenizer = HFTokenizer.from_file(path)
        self.encode = lambda text, bos=True: tokenizer.encode(text, add_special_tokens=bos).ids
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)

    def _use_sentencepiece(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        sp = SentencePieceProcessor(model_file=path)
        special = {t["content"]: int(i) for i, t in self.settings.get("added_tokens_decoder", {}).items()}
        special |= {sp.id_to_piece(i): i for i in range(sp.get_piece_size()) if sp.is_control(i)}
        marks = re.compile("(" + "|".join(re.escape(mark) for mark in sorted(special, key=len, reverse=True)) + ")")
        first = [sp.bos_id()] if self.settings.get("add_bos_token", True) and sp.bos_id() >= 0 else []
        lead = sp.encode("a")  # sentencepiece drops the space before the first word, so another goes first
        known = len(sp.decode(lead))

        def encode(text: str, bos: bool = True) -> list[int]:
            if bos:
                return first + sp.encode(text)
            pieces = [piece for piece in marks.split(text) if piece]
            return [i for piece in pieces for i in ([special[piece]] if piece in special else sp.encode(piece))]

        self.encode = encode
        self.decode = lambda ids: sp.decode(lead + [i for i in ids if i < sp.get_piece_size()])[known:]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, ready for the next answer, by the checkpoint's template: untrusted code, sandboxed."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self.template
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not template:
            raise InputError("this checkpoint has no chat template: leave out --chat and --interactive")

        def refuse(message: str):
            raise InputError(message)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        tokens = {n: self.settings.get(n) or "" for n in ("bos_token", "eos_token", "unk_token", "pad_token")}
        tokens = {n: token["content"] if isinstance(token, dict) else token for n, token in tokens.items()}
        try:
            text = env.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as e:  # whatever a template can do wrong
            raise InputError(f"the chat template failed: {e}") from e
        return self.encode(text, bos=False)


class NoTokenizer:
    """Stands in where there are weights but no checkpoint: synthetic prompts only."""

    eos_ids: set[int] = set()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        raise InputError("random weights have no tokenizer: give --prompt a number of tokens, and leave --chat out")

    encode_chat = encode

    def decode(self, ids: list[int]) -> str:
        return ""


class TextStream:
    """Turns tokens into text as they come: no half characters, nothing of a stop string."""

    def __init__(self, decode: Callable, stops: tuple[str, ...]):
        self.decode, self.stops = decode, stops
        self.ids, self.base, self.read = [], 0, 0
        self.text, self.shown, self.stopped = "", 0, False

    def push(self, token: int | None) -> str:
        """Add a token, None for the end; returns the text that became certain."""
        self.ids += [] if token is None else [token]
        # A short window is enough: what a token adds depends on its neighbours only.
        before, now = self.decode(self.ids[self.base : self.read]), self.decode(self.ids[self.base :])
        if token is None or not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self.base, self.read = self.read, len(self.ids)
        cuts = [i for stop in self.stops if (i := self.text.find(stop, self.shown)) >= 0]
        if cuts:
            self.text, self.stopped = self.text[: min(cuts)], True
        held = 0 if self.stopped or token is None else max(map(self._started, self.stops), default=0)
        new = self.text[self.shown : len(self.text) - held]
        self.shown += len(new)
        return new

    def _started(self, stop: str) -> int:
        return next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n], self.shown)), 0)


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

    def __init__(self, model: Transformer, tokenizer, batch_size: int, cache_length: int, prefill_chunk: int = 0):
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk
        self.batch_size, self.cache = batch_size, model.new_cache(batch_size, cache_length)
        self.stats = dict.fromkeys(("decode_tokens", "prefill_tokens", "new_tokens", "steps"), 0)
        self.stats |= dict.fromkeys(("decode_s", "prefill_s", "time_to_first_token_s"), 0.0)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run each graph, so that compiling is not counted as generating."""
        self._prefill([0, 0, 0], 0)
        for end in (1, self.model.ops.key_block + 1, 1):  # two spans, and CUDA graphs record on the second call
            zeros = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.model.device)
            self.model(zeros, zeros, self.cache, min(end, self.cache.k[0].shape[2]), decode=True)

    def _prefill(self, ids: list[int], slot: int) -> Tensor:
        """fp32 logits [1, V] after a prompt, whose keys and values are left in the slot."""
        cache, chunk = self.cache.row(slot), self.prefill_chunk or len(ids)
        tokens = torch.tensor([ids], device=self.model.device)
        pos = torch.arange(len(ids), device=self.model.device)[None]
        for i in range(0, len(ids), chunk):
            end = min(i + chunk, len(ids))
            logits = self.model(tokens[:, i:end], pos[:, i:end], cache, end, last=True)
        return logits[:, -1]

    def _draw(self, logits_BV: Tensor, pos_B: Tensor, sampler: Sampler) -> Iterator[tuple[int, float]]:
        tokens_B = sampler(logits_BV, pos_B)
        logprobs_B = self.model.ops.log_softmax(logits_BV).gather(-1, tokens_B[:, None])[:, 0]
        return zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)

    def _start(self, request: Request, slot: int) -> tuple[Completion, str]:
        """Prefill a request into a slot and draw its first token."""
        completion = Completion(request, TextStream(self.tokenizer.decode, request.stop))
        if request.max_new_tokens == 0:
            completion.finish_reason = "length"
            return completion, ""
        start, n = time.perf_counter(), len(request.prompt_ids)
        logits = self._prefill(request.prompt_ids, slot)
        drawn = self._draw(logits, torch.tensor([n], device=logits.device), Sampler([request], logits.device))
        self._count("prefill", n, start)
        return completion, self._push(completion, *next(drawn))

    def _step(self, slots: list[Completion | None], sampler: Sampler) -> list[tuple[int, float]]:
        """A token for every slot; an idle one computes at position 0, which its next prompt overwrites."""
        start = time.perf_counter()
        tokens = [[c.tokens[-1] if c else 0] for c in slots]
        pos = [[len(c.request.prompt_ids) + len(c.tokens) - 1 if c else 0] for c in slots]
        tokens_B1, pos_B1 = (torch.tensor(x, device=self.model.device) for x in (tokens, pos))
        logits = self.model(tokens_B1, pos_B1, self.cache, max(pos)[0] + 1, decode=True)
        drawn = list(self._draw(logits[:, -1], pos_B1[:, 0] + 1, sampler))
        self._count("decode", sum(map(bool, slots)), start)
        self.stats["steps"] += 1
        return drawn

    def _count(self, phase: str, tokens: int, start: float) -> None:
        self.stats[f"{phase}_tokens"] += tokens
        self.stats[f"{phase}_s"] += time.perf_counter() - start

    def _push(self, completion: Completion, token: int, logprob: float) -> str:
        """Add a drawn token to a completion, finish it where it ends; returns the new text."""
        request, stream = completion.request, completion.stream
        completion.tokens.append(token)
        completion.logprobs.append(logprob)
        self.stats["new_tokens"] += 1
        text = stream.push(token)
        if stream.stopped or (token in self.tokenizer.eos_ids and not request.ignore_eos):
            completion.finish_reason = "stop"
        elif len(completion.tokens) >= request.max_new_tokens:
            completion.finish_reason = "length"
        return text + stream.push(None) if completion.finish_reason and not stream.stopped else text

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Iterator[tuple[Completion, str]]:
        """Yield (completion, new text) for each token of each request as it is made. A finished slot takes the next
        request at once."""
        queue, began = iter(requests), time.perf_counter()
        slots: list[Completion | None] = [None] * self.batch_size
        sampler = None
        while True:
            for b in range(self.batch_size):
                while slots[b] is None and (request := next(queue, None)):
                    completion, text = self._start(request, b)
                    self.stats["time_to_first_token_s"] = (
                        self.stats["time_to_first_token_s"] or time.perf_counter() - began
                    )
                    slots[b], sampler = None if completion.finish_reason else completion, None
                    yield completion, text
            if not any(slots):
                return
            sampler = sampler or Sampler([c and c.request for c in slots], self.model.device)
            for b, (completion, drawn) in enumerate(zip(slots, self._step(slots, sampler), strict=True)):
                if completion:
                    text = self._push(completion, *drawn)
                    slots[b] = None if completion.finish_reason else completion
                    yield completion, text


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable:
    """An argparse type: a number in [low, high], or (low, high] with `open_low`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or value > high or value == math.inf:
            span = f"{'above' if open_low else 'of at least'} {low}" + (
                f" and at most {high}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is not {'an integer' if kind is int else 'a number'} {span}")
        return value

    return parse


def build_parser() -> Parser:
    p = Parser(
        description="Text from an open-weight language model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    positive, d = number(int, 1), Request(0, "", [])
    g = p.add_argument_group("model")
    g.add_argument(
        "--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR", help="Hugging Face directory"
    )
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    g.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of weights and cache")
    g.add_argument("--random_weights", type=Path, metavar="CONFIG.json", help="a model of that shape, for benchmarks")
    g = p.add_argument_group("prompts")
    g.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable; an integer means that many random tokens"
    )
    g.add_argument(
        "--prompts_file",
        metavar="FILE",
        help=".jsonl with prompt, id, seed, max_new_tokens, or a prompt a line; - is stdin",
    )
    g.add_argument("--chat", action="store_true", help="apply the checkpoint's chat template")
    g.add_argument("--system", metavar="TEXT", help="system prompt of the chat")
    g.add_argument("--interactive", action="store_true", help="a conversation in the terminal")
    g = p.add_argument_group("sampling")
    g.add_argument("--max_new_tokens", type=positive, default=d.max_new_tokens, metavar="N", help="of each completion")
    g.add_argument(
        "--temperature", type=number(float, 0), default=d.temperature, metavar="X", help="0: the likeliest token"
    )
    g.add_argument("--top_k", type=positive, default=d.top_k, metavar="N", help="draw from the N likeliest")
    g.add_argument("--top_p", type=number(float, 0, 1, True), default=d.top_p, metavar="X", help="draw from this share")
    g.add_argument("--seed", type=int, default=d.seed, metavar="N", help="keys the noise")
    g.add_argument("--num_samples", type=positive, default=1, metavar="N", help="completions of each prompt")
    g.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end there; repeatable")
    g.add_argument("--ignore_eos", action="store_true", help="go on past the end token")
    g = p.add_argument_group("running")
    g.add_argument("--batch_size", type=positive, default=1, metavar="N", help="slots that prompts stream through")
    g.add_argument(
        "--prefill_chunk", type=number(int, 0), default=0, metavar="N", help="feed prompts N tokens at a time; 0: whole"
    )
    g.add_argument("--compile", action="store_true", help="torch.compile the decode step")
    g.add_argument("--compile_prefill", action="store_true", help="torch.compile the prefill")
    g.add_argument("--profile", metavar="FILE", help="write a trace for chrome://tracing")
    g = p.add_argument_group("output")
    g.add_argument("--json", action="store_true", help="a JSON object a line")
    g.add_argument("--output", type=Path, metavar="FILE", help="append the lines to FILE; a rerun skips what is there")
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that exclude each other."""
    lone = [f for f in ("prompt", "prompts_file", "json", "output", "random_weights") if getattr(args, f)]
    if args.interactive and (lone or args.num_samples > 1 or args.batch_size > 1):
        raise InputError(f"--interactive excludes --{(lone or ['num_samples and --batch_size'])[0]}")
    if args.system is not None and not (args.chat or args.interactive):
        raise InputError("--system needs --chat or --interactive")
    if args.random_weights and args.checkpoint_path != DEFAULT_CHECKPOINT:
        raise InputError("--random_weights excludes --checkpoint_path")
    if args.prompt and args.prompts_file:
        raise InputError("--prompts_file excludes --prompt")
    if "" in args.stop:
        raise InputError("--stop is empty, expected some text")


def load(args: argparse.Namespace) -> tuple[Transformer, Tokenizer | NoTokenizer]:
    """The model and its tokenizer, from the flags; fetches the default checkpoint if it is not there yet."""
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise InputError(f"--device {args.device} is not available, choose from {', '.join(found)}") from None
    directory, dtype = args.checkpoint_path, PRECISIONS[args.precision]
    if args.random_weights:
        model = Transformer(ModelConfig.from_file(args.random_weights), FAST, device, dtype)
        randomize(model)
        return model, NoTokenizer()
    if directory == DEFAULT_CHECKPOINT and not directory.exists():
        from scripts import download

        say(f"{directory} is not there yet, fetching it")
        download.fetch_default(directory)
    if not directory.is_dir():
        raise InputError(
            f"--checkpoint_path {directory} is no directory, expected one with config.json and *.safetensors"
        )
    config = ModelConfig.from_file(directory / "config.json")
    tokenizer, model = Tokenizer(directory, config), Transformer(config, FAST, device, dtype)
    show = sys.stderr.isatty()
    load_checkpoint(model, directory, lambda i, n: show and say(f"\rloading {i}/{n}", end="" if i < n else "\n"))
    return model, tokenizer


def say(*words, **options) -> None:
    print(*words, file=sys.stderr, flush=True, **options)


def set_up(model: Transformer, compile_decode: bool, compile_prefill: bool) -> None:
    """Every global setting is made here, after loading."""
    if sys.platform == "linux" and model.device.type == "cpu":
        # glibc hands freed buffers back to the kernel and then takes page faults for the next ones: half of the
        # time of a prefill. Keep up to 512 MB.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}  # the model never changes
    if compile_decode:
        graphs = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
        model.decode_stack = torch.compile(model.stack, fullgraph=True, options=options | graphs)
    if compile_prefill:
        model.prefill_stack = torch.compile(model.stack, fullgraph=True, dynamic=True, options=options)


def read_prompts(args: argparse.Namespace) -> list[dict]:
    """Prompts from the flags: dicts with prompt and, where a line gives them, id, seed and max_new_tokens."""
    name = args.prompts_file
    if not name:
        texts = args.prompt or ["128" if args.random_weights else "Hello, my name is"]
        return [{"prompt": text, "synthetic": text.isascii() and text.isdigit()} for text in texts]
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = [(i, line) for i, line in enumerate(data.decode().splitlines(), start=1) if line.strip()]
    except (OSError, ValueError) as e:
        raise InputError(f"--prompts_file {name} cannot be read: {e}") from e
    is_json = name.endswith(".jsonl") or (name == "-" and data.lstrip().startswith(b'{"'))
    kinds, prompts = {"prompt": str, "id": (str, int), "seed": int, "max_new_tokens": int}, {}
    for i, line in lines:
        try:
            entry = {"id": len(prompts)} | (json.loads(line) if is_json else {"prompt": line})
            wrong = [n for n, kind in kinds.items() if not isinstance(entry.get(n, kind() if n != "id" else 0), kind)]
            if wrong or "prompt" not in entry or entry.get("max_new_tokens", 1) < 1 or entry["id"] in prompts:
                raise ValueError(
                    f"{(wrong or ['prompt, max_new_tokens or id'])[0]} is missing, repeated or of a wrong kind"
                )
        except (ValueError, TypeError) as e:
            raise InputError(f"--prompts_file {name}, line {i}: {e}") from e
        prompts[entry["id"]] = entry
    if not prompts:
        raise InputError(f"--prompts_file {name} has no prompt")
    return list(prompts.values())


def make_requests(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> list[Request]:
    """Encode the prompts and check them against the model; raises InputError."""
    config, requests, cut = model.config, [], 0
    for i, entry in enumerate(read_prompts(args)):
        text, seed, wanted = (
            entry["prompt"],
            entry.get("seed", args.seed),
            entry.get("max_new_tokens", args.max_new_tokens),
        )
        if entry.get("synthetic"):
            generator = torch.Generator().manual_seed(seed & WORD)
            ids = torch.randint(config.vocab_size, (int(text),), generator=generator).tolist()
        elif args.chat:
            ids = tokenizer.encode_chat(opening(args) + [{"role": "user", "content": text}])
        else:
            ids = tokenizer.encode(text)
        room = config.context - len(ids)
        check_prompt(ids, config, f"prompt {entry.get('id', i)}")
        cut += wanted > room
        fields = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "ignore_eos")}
        fields |= {"seed": seed, "max_new_tokens": min(wanted, room), "stop": tuple(args.stop)}
        requests += [Request(entry.get("id", i), text, ids, sample, **fields) for sample in range(args.num_samples)]
    if cut:
        say(f"warning: {cut} prompts meet the context of {config.context} tokens before --max_new_tokens")
    return requests


def check_prompt(ids: list[int], config: ModelConfig, name: str) -> None:
    if not 0 < len(ids) <= config.context:
        raise InputError(f"{name} has {len(ids)} tokens, expected 1 to {config.context}, the model's context")
    if max(ids) >= config.vocab_size:
        raise InputError(f"{name} has token {max(ids)}, expected ids below {config.vocab_size}: is this its tokenizer?")


def opening(args: argparse.Namespace) -> list[dict]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def resume(path: Path) -> set[tuple]:
    """(id, sample) of each completion in an --output file, whose torn last line, if it has one, is cut off."""
    try:
        with path.open("a+b") as file:
            file.seek(0)
            *lines, torn = file.read().split(b"\n")
            entries = [json.loads(line) for line in lines]
            if torn and not torn.startswith(b"{"):
                raise ValueError
            done = {(entry["id"], entry["sample"]) for entry in entries if "stats" not in entry}
            file.truncate(sum(len(line) + 1 for line in lines))
            return done
    except OSError as e:
        raise InputError(f"--output {path} cannot be written: {e.strerror}") from e
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"--output {path} holds something else than completions, expected a new file or ours"
        ) from None


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that this machine reads from memory: the best of five sums of 256 MB."""
    data, times = torch.ones(1 << 26, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        data.sum().item()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def peak_memory(device: torch.device) -> int:
    """Bytes: CUDA's own peak; on a CPU the anonymous memory now, without the mapped files that VmHWM counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def report(engine: Engine, load_s: float, compile_s: float, as_json: bool) -> None:
    """The stats line, and the same for a person."""
    s, model = engine.stats, engine.model
    decode = s["decode_tokens"] / s["decode_s"] if s["steps"] else 0.0
    prefill = s["prefill_tokens"] / s["prefill_s"] if s["prefill_s"] else 0.0
    rate = model.nbytes * s["steps"] / s["decode_s"] if s["steps"] else 0.0
    stats = {"decode_tokens_per_sec": decode, "prefill_tokens_per_sec": prefill}
    stats |= {"time_to_first_token_s": s["time_to_first_token_s"], "load_s": load_s, "compile_s": compile_s}
    stats |= {"new_tokens": s["new_tokens"], "model_bytes": model.nbytes, "bandwidth_gb_s": rate / 1e9}
    stats |= {"accept_counts": [], "peak_memory_gb": peak_memory(model.device) / 1e9, "deterministic": False}
    if as_json:
        print(json.dumps({"stats": stats}), flush=True)
    limit = read_bandwidth(model.device)
    say(
        f"{s['new_tokens']} tokens; decode {decode:.1f} tokens/s, prefill {prefill:.0f} tokens/s, first token after "
        f"{s['time_to_first_token_s']:.2f} s, load {load_s:.1f} s, compile {compile_s:.1f} s\n"
        f"weights {model.nbytes / 1e9:.2f} GB, read at {rate / 1e9:.1f} GB/s: {rate / limit:.0%} of the "
        f"{limit / 1e9:.0f} GB/s that this machine reads"
    )


def run(engine: Engine, requests: list[Request], args: argparse.Namespace) -> None:
    """Generate, print as it comes, and append each completion to --output as it ends."""
    stream = not args.json and engine.batch_size == 1
    with args.output.open("a", encoding="utf-8") if args.output else nullcontext() as file:
        for completion, text in engine.generate(requests):
            first = not args.chat and len(completion.tokens) <= 1
            if stream:
                print((completion.request.prompt if first else "") + text, end="", flush=True)
            if not completion.finish_reason:
                continue
            if file:
                file.write(completion.json() + "\n")
                file.flush()
            if args.json:
                print(completion.json(), flush=True)
            elif stream:
                print("\n" if len(requests) > 1 else "")
            else:
                prompt = "" if args.chat else completion.request.prompt
                print(f"[{completion.request.id}.{completion.request.sample}] {prompt}{completion.stream.text}\n")


def converse(engine: Engine, args: argparse.Namespace) -> None:
    """A conversation in the terminal; Ctrl-C stops an answer, /clear forgets, /exit or the end of input leaves."""
    config, history = engine.model.config, opening(args)
    if sys.stdin.isatty():
        say("/clear starts over, /exit leaves, Ctrl-C stops an answer")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line in ("", "/clear"):
            history = history if not line else opening(args)
            continue
        ids = engine.tokenizer.encode_chat(history + [{"role": "user", "content": line}])
        if len(ids) >= config.context:
            say(f"the conversation has outgrown the context of {config.context} tokens: /clear starts over")
            continue
        fields = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "seed", "ignore_eos")}
        fields |= {"max_new_tokens": min(args.max_new_tokens, config.context - len(ids)), "stop": tuple(args.stop)}
        answer = ""
        try:
            for _, text in engine.generate([Request(0, line, ids, **fields)]):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print()
        history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    done = resume(args.output) if args.output else set()
    start = time.perf_counter()
    model, tokenizer = load(args)
    load_s = time.perf_counter() - start
    requests = [] if args.interactive else make_requests(args, model, tokenizer)
    if args.interactive:
        tokenizer.encode_chat(opening(args) + [{"role": "user", "content": ""}])
    requests = [r for r in requests if (r.id, r.sample) not in done]
    longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=model.config.context)
    engine = Engine(model, tokenizer, args.batch_size, longest, args.prefill_chunk)
    set_up(model, args.compile, args.compile_prefill)
    start = time.perf_counter()
    if args.compile or args.compile_prefill:
        engine.warm_up()
    compile_s = time.perf_counter() - start
    with torch.profiler.profile() if args.profile else nullcontext() as profile:
        converse(engine, args) if args.interactive else run(engine, requests, args)
    if profile:
        profile.export_chrome_trace(args.profile)
    if not args.interactive:
        report(engine, load_s, compile_s, args.json)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        say(f"error: {e}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
