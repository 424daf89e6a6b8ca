"""Text from an open-weight language model: arguments, sampling, speculation, the generate() iterator, printing."""

import argparse
import contextlib
import os
import shutil
import sys
import time
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import OutOfMemoryError, Tensor

import quantize
import tp
from kernels import BATCH_INVARIANT, FAST
from model import InputError, ModelConfig, SafetensorError, Transformer, load_checkpoint, refuse, refusing, replace
from scripts import bench, download, prompts
from scripts.prompts import Completion, Request, Tokenizer, make_requests, message, read_requests, resume

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORD = 0xFFFFFFFF
agreement = lambda a, b: [*map(int.__eq__, a, b), False].index(False)  # how many ids two texts begin with alike


def mix(x):
    """A 32-bit hash of an int or int64 tensor (Wellons' hash-prospector); constants < 2^31, so no product overflows."""
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
    """The k largest fp32 logits and their ids, by (value descending, id ascending): as one integer, none are a tie."""
    ids = torch.arange(V := logits_BV.shape[1], device=logits_BV.device)
    bits = (logits_BV + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    packed = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32 | (WORD - ids)
    ids = WORD - (packed.topk(min(k, V)).values & WORD)
    return logits_BV.gather(-1, ids), ids


class Sampler:
    """Draws a token for each row of a batch by that row's own request; None is an idle row."""

    def __init__(self, requests: list[Request | None], device: torch.device):
        likeliest = Request(0, "", [], temperature=1.0, top_k=1)  # what temperature 0 means
        rows = [request if request and request.temperature > 1e-30 else likeliest for request in requests]
        settings = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float64}
        self.rows = [torch.tensor([[getattr(r, n)] for r in rows], device=device, dtype=d) for n, d in settings.items()]
        self.rows += [torch.tensor([noise_key(r.seed, r.sample) for r in rows], device=device)]
        self.k, self.nucleus = max(r.top_k for r in rows), any(r.top_p < 1 for r in rows)

    def __call__(self, logits_NV: Tensor, pos_N: Tensor, rows: list[Tensor] | None = None) -> Tensor:
        """Tokens [N] for absolute positions from fp32 logits, N / B for each row in turn: the argmax of logits
        / temperature + Gumbel noise over the ids that top-k, then top-p keep, the lowest id on a tie."""
        values, ids = top(logits_NV, self.k)
        temp_N1, top_k_N1, top_p_N1, key_N2 = (x.repeat_interleave(len(pos_N) // len(x), 0) for x in rows or self.rows)
        scaled = (values - values[:, :1]) / temp_N1
        keep = torch.arange(ids.shape[1], device=ids.device) < top_k_N1
        if self.nucleus:
            weight = (scaled.exp() * keep * 2.0**40).long()  # fixed point: integers add up alike in any order
            upto = weight.cumsum(-1)
            keep = keep & ((upto - weight < top_p_N1 * upto[:, -1:]) | (top_p_N1 == 1))
        score = torch.where(keep, scaled + gumbel(key_N2, pos_N, ids), float("-inf"))
        return torch.where(score < score.amax(-1, keepdim=True), logits_NV.shape[-1], ids).amin(-1)


def logprobs(model: Transformer, logits: Tensor, ids: Tensor) -> Tensor:
    """Of ids, shaped as the rows of the logits."""
    return model.ops.log_softmax(logits).gather(-1, ids[..., None])[..., 0]


def draw(model: Transformer, logits_BTV: Tensor, pos_BT: Tensor, sampler: Sampler, rows=None) -> tuple[Tensor, Tensor]:
    """Tokens for those positions and their logprobs, both [B, T]."""
    drawn_BT = sampler(logits_BTV.flatten(0, 1), pos_BT.flatten(), rows).view(pos_BT.shape)
    return drawn_BT, logprobs(model, logits_BTV, drawn_BT)


class Engine:
    """A model and a cache of `batch_size` slots that requests stream through. Each round checks `k` drafts in one pass;
    one is accepted iff the model draws it there. What is wrong in the cache is overwritten before it is read."""

    def __init__(self, model, tokenizer: Tokenizer, batch_size: int, length: int, chunk=0, propose=None, k=0):
        self.model, self.tokenizer, self.chunk, self.propose, self.k = model, tokenizer, chunk or length, propose, k
        self.batch_size, self.cache, self.graphs = batch_size, model.new_cache(batch_size, length + k), {}  # of CUDA
        self.tokens, self.seconds = {"prefill": 0, "decode": 0, "new": 0}, {"prefill": 0.0, "decode": 0.0}
        self.steps, self.first_token_s, self.accept_counts = 0, 0.0, [0] * (k + 1 if k else 0)
        # A round pays with so many accepted drafts in most slots. Where the last ones gained less, drafts that cost
        # nothing are only compared with what comes, and others, checked from the start, are made after longer pauses.
        self.cost, self.pays = hasattr(propose, "pays"), getattr(propose, "pays", 1)
        self.gain, self.trial, self.failed, self.wait = self.pays * self.cost, [], 0, 0

    def feed(self, ids: list[int], start: int, slot: int, last=False) -> Tensor:
        """Feed a slot ids from a position on; fp32 logits [1, T, V], T = 1 with `last`."""
        end, cache = start + len(ids), [[x[slot, None] for x in kv] for kv in self.cache]
        tokens_BT, pos_BT = (torch.tensor([x], device=self.model.device) for x in (ids, range(start, end)))
        return self.model(tokens_BT, pos_BT, cache, end, last)

    def prefill(self, ids: list[int], slot: int, start: int = 0) -> Tensor:
        """Feed a slot ids[start:] in chunks; the last logits [1, 1, V]."""
        for i in range(start, len(ids), self.chunk):
            logits_BTV = self.feed(ids[i : i + self.chunk], i, slot, last=True)
        return logits_BTV

    def step(self, tokens, starts: list[int], sampler: Sampler) -> tuple[Tensor, Tensor]:
        """Feed every slot its tokens from its start on and draw what follows each; on a GPU, compiled, as a CUDA graph:
        all that a step launches, at once."""
        T, model, cache = len(tokens[0]), self.model, self.cache
        pos_BT = torch.tensor([range(start, start + T) for start in starts], device=model.device)
        given = torch.as_tensor(tokens, device=model.device), pos_BT, *sampler.rows

        def run(tokens_BT, pos_BT, *rows):  # not of this engine, which else were a cycle that keeps its cache alive
            logits_BTV = model(tokens_BT, pos_BT, cache, max(starts) + T, decode=True)
            return draw(model, logits_BTV, pos_BT + 1, sampler, rows)

        if model.graphed and (key := (pos_BT.shape, sampler.k, sampler.nucleus)) not in self.graphs:
            self.graphs[key] = torch.cuda.make_graphed_callables(run, tuple(x.clone() for x in given))
        # What a graph returns is overwritten by its next replay.
        return tuple(x.clone() for x in self.graphs[key](*given)) if model.graphed else run(*given)

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Iterator[tuple[Completion, str]]:
        """Yield (completion, new text) for each token as it is made; a finished slot takes the next request at once."""
        queue, slots, began = list(requests)[::-1], [None] * self.batch_size, time.perf_counter()
        while queue or any(slots):
            start, drafts = time.perf_counter(), [[]] * self.batch_size
            if queue and None in slots:
                slot, completion = slots.index(None), Completion(queue.pop(), self.tokenizer)
                if completion.finish_reason:
                    yield completion, ""
                    continue
                slots[slot], batch, phase = completion, [completion], "prefill"
                sampler = Sampler([completion.request], self.model.device)
                pos_BT = torch.tensor([[len(completion.ids)]], device=self.model.device)
                drawn_BT, logprobs_BT = draw(self.model, self.prefill(completion.ids, slot), pos_BT, sampler)
                self.tokens["prefill"] += len(completion.ids)
            else:
                if phase == "prefill":  # since the last step a slot has changed hands
                    phase, sampler = "decode", Sampler([c and c.request for c in slots], self.model.device)
                if self.propose and not self.wait:
                    drafts = self.propose(slots, sampler, self.k) or drafts
                if drafts[0] and not self.cost and self.gain < self.pays:
                    self.trial = [(c, len(c.ids), draft) for c, draft in zip(slots, drafts, strict=True) if c]
                    self.wait, drafts = min(round(2 * self.pays), self.k), [[]] * self.batch_size
                # An idle slot computes at position 0, which its next prompt overwrites.
                batch, fed = slots, [[c.tokens[-1] if c else 0, *drafts[i]] for i, c in enumerate(slots)]
                drawn_BT, logprobs_BT = self.step(fed, [len(c.ids) - 1 if c else 0 for c in slots], sampler)
                self.steps, self.wait = self.steps + 1, max(self.wait - 1, 0)
            lengths, rows = [c and len(c.ids) for c in batch], (batch, drafts, drawn_BT.tolist(), logprobs_BT.tolist())
            self.first_token_s = self.first_token_s or time.perf_counter() - began
            self.seconds[phase] += time.perf_counter() - start
            for completion, draft, drawn, logprobs in [row for row in zip(*rows, strict=False) if row[0]]:
                for token, logprob in zip(drawn[: agreement(draft, drawn) + 1], logprobs, strict=False):
                    if not completion.finish_reason:
                        yield completion, completion.push(token, logprob)
            made = [len(c.ids) - before for c, before in zip(batch, lengths, strict=True) if c]
            self.tokens["new"] += sum(made)
            self.tokens["decode"] += sum(made) if phase == "decode" else 0
            self.accept_counts = [c + made.count(n) * bool(drafts[0]) for n, c in enumerate(self.accept_counts, 1)]
            trial = [agreement(draft, c.ids[start:]) for c, start, draft in self.trial if not self.wait]
            if accepted := [n - 1 for n in made if drafts[0]] or trial:
                self.gain, self.trial = (self.gain + sorted(accepted)[(len(accepted) - 1) // 2]) / 2, []
                self.failed = 0 if self.gain >= self.pays else self.failed + max(round(self.pays), 1)
                self.wait = min(2**self.failed // 4, 64) if self.cost else 0
            slots = [None if c and c.finish_reason else c for c in slots]

    @torch.inference_mode()
    def score(self, prompt_ids: list[int], tokens: list[int], measure: Callable | None = None) -> list:
        """The logprobs of `tokens` after a prompt, by prefill in chunks: whole logits of a long text are gigabytes. A
        `measure` in place of `logprobs` is given fp32 logits [T, V] and tokens [T], and returns a list of T."""
        ids, chunk, scores, start = prompt_ids + tokens, min(self.chunk, 512), [], time.perf_counter()
        for i in range(0, len(ids) - 1, chunk):
            targets_T = torch.tensor(ids[i + 1 : i + 1 + chunk], device=self.model.device)
            logits_TV = self.feed(ids[i : i + len(targets_T)], i, slot=0)[0]
            scores += measure(logits_TV, targets_T) if measure else logprobs(self.model, logits_TV, targets_T).tolist()
        self.tokens["prefill"] += len(ids)
        self.seconds["prefill"] += time.perf_counter() - start
        return scores[len(prompt_ids) - 1 :]


def prompt_lookup(slots: list[Completion | None], sampler: Sampler, k: int) -> list[list[int]] | None:
    """k drafts a slot (Saxena 2023): what followed the last tokens before. None where under half of them have any."""
    drafts = []
    for ids in [c.ids if c else [] for c in slots]:
        text = "".join(map(chr, ids))  # quick to search
        end = next((text.rfind(text[-n:], 0, -1) + n for n in (4, 3, 2) if text[-n:] in text[:-1]), len(ids))
        drafts.append((ids[end : end + k] * k)[:k])  # what was drafted is text as well, so that it comes again
    return [draft or [0] * k for draft in drafts] if 2 * sum(map(bool, drafts)) >= sum(map(bool, slots)) else None


class DraftModel:
    """Drafts by a smaller model, which draws with the noise that the model itself will draw with."""

    def __init__(self, engine: Engine, k: int):
        self.engine, self.pays, self.read = engine, k / 2, [[]] * engine.batch_size

    def __call__(self, slots, sampler, k):
        """As prompt_lookup; None where a text outgrows the context of the smaller model."""
        engine, texts = self.engine, [c.ids if c else [0, 0] for c in slots]
        if max(map(len, texts)) + k > engine.model.config.context:
            return None
        for slot, ids in enumerate(texts):
            if slots[slot] and (start := agreement(self.read[slot], ids)) < len(ids) - 2:
                engine.prefill(ids[:-2], slot, start)
        # The last token but one may be a draft that was accepted, which nobody has read.
        drafts, fed = [], [ids[-2:] for ids in texts]
        for i in range(k):  # all on the device, which nobody waits for
            drawn_BT, _ = engine.step(fed, [len(ids) + i - len(fed[0]) for ids in texts], sampler)
            drafts.append(fed := drawn_BT[:, -1:])
        drafts = torch.cat(drafts, dim=1).tolist()
        self.read = [ids + draft[:-1] for ids, draft in zip(texts, drafts, strict=True)]
        return drafts


@tp.agreed
def parse_args(argv: list[str] | None = None, **own) -> argparse.Namespace:
    """The command line, with a script's `own` flags and their defaults; raises InputError for values out of range and
    flags that exclude each other."""
    about = {"description": sys.modules["__main__"].__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    p = argparse.ArgumentParser(**about, allow_abbrev=False)
    p.error = refuse
    add, count, d = p.add_argument, {"type": int, "metavar": "N"}, Request(0, "", [])
    add("--checkpoint_path", type=Path, metavar="DIR", help=f"Hugging Face directory ({download.DEFAULT.name})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1 (%(default)s)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of weights and cache (%(default)s)")
    add("--quantize", choices=quantize.LINEARS, help="weights of linear layers, while loading")
    add("--group_size", type=int, choices=(32, 64, 128), default=32, help="of int4 (%(default)s)")
    add("--random_weights", type=Path, metavar="CONFIG.json", help="a model of that shape, for benchmarks")
    add("--prompt", action="append", metavar="TEXT", help="repeatable; an integer means so many random tokens")
    add("--prompts_file", type=Path, metavar="FILE", help=".jsonl (prompt, id, seed, max_new_tokens) or text; -: stdin")
    add("--chat", action="store_true", help="apply the checkpoint's chat template")
    add("--system", type=lambda text: [message("system", text)], default=[], metavar="TEXT", help="prompt of a chat")
    add("--interactive", action="store_true", help="a conversation in the terminal: /clear, /exit")
    add("--max_new_tokens", **count, default=d.max_new_tokens, help="of each completion (%(default)s)")
    add("--temperature", type=float, default=d.temperature, help="0: the likeliest token (%(default)s)")
    add("--top_k", **count, default=d.top_k, help="draw from the N likeliest (%(default)s)")
    add("--top_p", type=float, default=d.top_p, help="draw from the likeliest of this sum (%(default)s)")
    add("--seed", **count, default=d.seed, help="of the noise (%(default)s)")
    add("--num_samples", **count, default=1, help="completions of each prompt (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a completion there; repeatable")
    add("--ignore_eos", action="store_true", help="go on past the end token")
    add("--batch_size", **count, default=1, help="slots that prompts stream through (%(default)s)")
    add("--prefill_chunk", **count, default=0, help="feed prompts in chunks of N; 0: whole")
    add("--speculate_k", **count, default=5, help="drafts a round, by one of the next three (%(default)s)")
    add("--draft_checkpoint_path", type=Path, metavar="DIR", help="speculate: a smaller model drafts")
    add("--draft_quantize", choices=quantize.LINEARS, help="speculate: that model, or the model itself, quantized")
    add("--prompt_lookup", action="store_true", help="speculate: draft what followed the same words before")
    add("--compile", action="store_true", help="torch.compile decoding")
    add("--compile_prefill", action="store_true", help="torch.compile prefill")
    add("--profile", metavar="FILE", help="write a trace for chrome://tracing")
    add("--deterministic", action="store_true", help="the same bits at any batch size, chunking or compiler setting")
    add("--score", type=Path, metavar="FILE.jsonl", help="print such lines again, logprobs recomputed by prefill")
    add("--json", action="store_true", help="one JSON object a line")
    add("--output", type=Path, metavar="FILE", help="append those lines to FILE; a rerun skips what is there")
    for name, default in own.items():
        add(f"--{name}", type=type(default), default=default, help="see above (%(default)r)")
    args = p.parse_args(argv)
    args.device += f":{os.environ.get('LOCAL_RANK')}" if tp.world > 1 and args.device == "cuda" else ""
    counts = [name for name, default in own.items() if type(default) is int and default]
    ranges = dict.fromkeys((*counts, "max_new_tokens", "top_k", "num_samples", "batch_size"), (1, 2**62))
    ranges |= {"prefill_chunk": (0, 2**62), "temperature": (0, 2**62), "top_p": (1e-9, 1), "speculate_k": (1, 64)}
    for flag, (low, high) in ranges.items():
        low <= (value := getattr(args, flag)) <= high or refuse(f"--{flag} {value}: expected {low} to {high:g}")
    rivals = ["score interactive prompts_file prompt", "interactive prompts_file prompt json output"]
    rivals += ["random_weights checkpoint_path chat interactive", "prompts_file prompt"]
    rivals += ["prompt_lookup draft_checkpoint_path draft_quantize"]
    for flag, *others in map(str.split, rivals):
        if getattr(args, flag) and (given := [other for other in others if getattr(args, other)]):
            refuse(f"--{flag} excludes --{given[0]}")
    args.chat or args.interactive or not args.system or refuse("--system needs --chat or --interactive")
    "" in args.stop and refuse("expected some text after --stop")
    return args


@tp.agreed
def load(args: argparse.Namespace, ranks: int = tp.world) -> tuple[Transformer, Tokenizer]:
    """The model, a part of it where `ranks` share it, and its tokenizer; fetches a missing default checkpoint."""
    names = ", ".join(["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())])
    with refusing(f"--device {args.device} is not available, choose from {names}", RuntimeError, AssertionError):
        torch.zeros(1, device=args.device).item()
        args.device.startswith("cuda:") and torch.cuda.set_device(args.device)  # where Triton launches its kernels
    directory, shape = args.checkpoint_path or download.DEFAULT, args.random_weights
    if not (shape or args.checkpoint_path or directory.exists()):
        tp.say(f"{directory} is missing, fetching it")
        with refusing("the default checkpoint cannot be had", ValueError, ImportError):
            download.fetch(directory)
    config = ModelConfig.from_file(shape or directory / "config.json", args.quantize, args.group_size)
    config = replace(config, stored=False) if shape else config  # random weights are quantized while loading
    tokenizer, ops = Tokenizer(None if shape else directory), BATCH_INVARIANT if args.deterministic else FAST
    model = Transformer(config, ops, torch.device(args.device), PRECISIONS[args.precision], ranks)
    bench.randomize(model) if shape else load_checkpoint(model, directory)
    return model, tokenizer


def set_up(model: Transformer, compile_decode: bool, compile_prefill: bool) -> None:
    """Make every global setting, after loading."""
    bench.tune_memory(model.device, huge_pages=compile_decode)
    if (compile_decode or compile_prefill) and model.device.type == "cpu":
        # Before 2.13, compiled code keeps fp32 where eager code rounds.
        model.ops.exact and torch.__version__ < (2, 13) and refuse("--deterministic --compile needs PyTorch 2.13 here")
        shutil.which(os.environ.get("CXX", "g++")) or refuse("--compile needs a C++ compiler, g++ or that of $CXX")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")  # its own, of int8
    options = model.ops.compile_options | {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}

    def compiled(code=Transformer.stack.__code__, **more):  # torch keeps graphs by code: a model has some of its own
        stack = type(compiled)(code.replace(), Transformer.stack.__globals__).__get__(model)
        return torch.compile(stack, fullgraph=True, options=options, **more)

    model.prefill_stack = compiled(dynamic=True) if compile_prefill else model.stack
    if compile_decode:
        model.decode_stack, model.verify_stack = compiled(), compiled()
        # A CUDA graph cannot ask which experts are chosen.
        model.graphed = model.device.type == "cuda" and model.config.n_experts == 1


@tp.agreed
def build(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, length: int, k: int = 0) -> Engine:
    """An engine and what drafts, by the flags, warm. Raises InputError for a draft model of another vocabulary."""
    propose = prompt_lookup if args.prompt_lookup else None
    if ((directory := args.draft_checkpoint_path) or args.draft_quantize) and not k:  # a draft model has no other one
        other = {"checkpoint_path": directory, "random_weights": None} if directory else {}
        other = argparse.Namespace(**vars(args) | other | {"quantize": args.draft_quantize})
        draft, words = load(other, 1 if directory else model.ranks)  # a smaller model is whole at every rank
        if words.vocab() != tokenizer.vocab() or draft.config.vocab_size != model.config.vocab_size:
            refuse(f"--draft_checkpoint_path {directory} has another vocabulary than the model, expected the same")
        # It is fed at most two tokens a row, as where there is one draft.
        propose = DraftModel(build(other, draft, words, length + args.speculate_k, k=1), args.speculate_k)
    set_up(model, args.compile, args.compile_prefill)
    k = args.speculate_k if propose else k
    engine = Engine(model, tokenizer, args.batch_size, length, args.prefill_chunk, propose, k)
    if args.compile or args.compile_prefill or args.deterministic or propose:
        tp.progress("compiling" if args.compile or args.compile_prefill else "probing")
        rows = [Request(0, "", [], 0, 1, args.temperature, args.top_k, args.top_p)] * args.batch_size
        step = lambda n: engine.step([[0] * n for _ in rows], [0] * len(rows), Sampler(rows, model.device))[0].tolist()
        with torch.inference_mode():
            engine.prefill([0] * 5, 0)
            one, more = (min(timeit.repeat(lambda n=n: step(n), repeat=3, number=1)) for n in (1, k + 1))
        engine.pays = tp.agreed(lambda: getattr(propose, "pays", more / one - 1), alone=True)()
    return engine


def run(engine: Engine, requests: list[Request], args: argparse.Namespace) -> None:
    """Print completions as they come, or those read, with logprobs by prefill; each is appended to --output."""
    as_json, end = args.json or args.score, "\n\n"[: len(requests)]
    with open((not tp.rank and args.output) or os.devnull, "a", encoding="utf-8") as file:
        for completion, text in engine.generate(requests):
            done, lead = completion.finish_reason, "" if args.chat else completion.request.prompt
            if read := completion.request.line:
                tp.progress("scoring", completion.request.id, end="\r")
                completion.logprobs = engine.score(read["prompt_ids"], read["tokens"])
            if done:
                print(completion.json(), file=file, flush=True)
            if engine.batch_size == 1 and not as_json:
                print(text if len(completion.tokens) > 1 else lead + text, end=end if done else "", flush=True)
            elif done:
                print(completion.json() if as_json else lead + completion.text + end[1:], flush=True)


def main(argv: list[str] | None = None) -> None:
    args, start = parse_args(argv), time.perf_counter()
    model, tokenizer = load(args)
    load_s = time.perf_counter() - start
    read = lambda: [] if args.interactive else read_requests(args, model.config, tokenizer)
    requests = tp.agreed(lambda: resume(args.output, read()), alone=True)()
    sizes = [model.config.context] if args.interactive else [len(r.prompt_ids) + r.max_new_tokens for r in requests]
    start = time.perf_counter()
    engine = build(args, model, tokenizer, max(sizes, default=1))
    compile_s = time.perf_counter() - start
    trace = torch.profiler.profile(on_trace_ready=lambda profile: profile.export_chrome_trace(args.profile))
    with trace if args.profile and not tp.rank and open(args.profile, "w") else contextlib.nullcontext():
        if args.interactive:
            return prompts.converse(engine, args.system, lambda e: make_requests(args, model.config, tokenizer, e)[0])
        run(engine, requests, args)
    tp.rank or bench.report(engine, load_s, compile_s, args.json)


def command(main: Callable) -> None:
    """Run main() and exit with its status; what a user got wrong is one line and status 2."""
    try:
        tp.start()
        status = main() or 0
        print(end="", flush=True)
    except (InputError, OSError, UnicodeError, SafetensorError, MemoryError, RecursionError, OutOfMemoryError) as e:
        tp.say("error:", *(str(e) or "out of memory").split())
        status, sys.stdout = 2, None  # an orderly end would once more print what could not be printed
    except KeyboardInterrupt:
        status = 130
    (os._exit if tp.world > 1 else sys.exit)(status)  # of several ranks, gloo's threads may abort an orderly end


if __name__ == "__main__":
    command(main)
