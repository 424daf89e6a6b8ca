"""The promises of the determinism contract as comparisons, and its rules broken on purpose. Tests
try them on small models, scripts/verify.py on any checkpoint.

A comparison is one completion, its tokens and the exact bits of its logprobs, against the same
request alone with nothing varied."""

import argparse
import copy
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import generate
import tp
from generate import Engine
from kernels import BATCH_INVARIANT, BatchInvariant, Fast
from model import Transformer
from scripts import machine, sampler
from scripts.files import Refusal
from scripts.requests import Completion, Request
from scripts.sampler import gumbel
from scripts.tokenizer import Tokenizer

LENGTHS = (1, 9, 10, 64, 65, 256, 511)  # tokens of the prompts
NEW = 16  # tokens of a completion
ROOM = max(LENGTHS) + NEW
OPTIONS = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}]  # of requests in turns

Answer = tuple[list[int], list[float]]  # tokens and their logprobs
Answers = list[tuple[int | str, Answer]]  # with the id of the request
Row = tuple[str, str, bool]  # what varies, how many differ, whether any does


def prepare(args: argparse.Namespace, deterministic: bool) -> tuple:
    """The arguments of `promises`: the flags, a model as they say, and requests with random prompts
    of all lengths, `args.size` times."""
    args = argparse.Namespace(**vars(args) | {"deterministic": deterministic})
    model, _ = generate.load(args)
    context = model.config.max_position_embeddings
    if context < ROOM:
        raise Refusal(f"a context of {context} tokens is too short, expected {ROOM} or more")
    generator = torch.Generator().manual_seed(0)
    requests = []
    for i, length in enumerate(LENGTHS * args.size):
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        options = OPTIONS[i % len(OPTIONS)]
        requests.append(Request(i, "", ids, max_new_tokens=NEW, **options))
    return args, model, requests


def complete(model, requests, slots=1, length=ROOM, threads=0, **settings) -> Answers:
    """Stream requests through an engine with other `settings`; 0 threads are those of now."""
    engine = Engine(model, Tokenizer(None), slots, length, **settings)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    answers = []
    for completion, _ in engine.generate(requests):
        if completion.finish_reason:
            answer = (completion.tokens, completion.logprobs)
            answers.append((completion.request.id, answer))
    torch.set_num_threads(before)
    return answers


def rescore(args, alone: dict[int | str, Answer], requests: list[Request], ranks: int) -> Answers:
    """What came alone, with logprobs by prefill, of a model that is loaded once more."""
    model, _ = generate.load(args, ranks)
    engine = Engine(model, Tokenizer(None), 1, ROOM)
    answers = []
    for request in requests:
        tokens, _ = alone[request.id]
        answers.append((request.id, (tokens, engine.score(request.prompt_ids, tokens))))
    return answers


def first_difference(alone: Answer, answer: Answer) -> int | None:
    """The first token that is other than alone, or has another logprob. An answer may be the
    shorter one."""
    before = list(zip(*alone, strict=True))
    for i, pair in enumerate(zip(*answer, strict=True)):
        if i == len(before) or pair != before[i]:
            return i
    return None


def tally(alone: dict[int | str, Answer], answers: Answers) -> tuple[str, bool]:
    """How many answers differ from what `alone` has, and the first token at which one does; whether
    any does."""
    firsts = [first_difference(alone[name], answer) for name, answer in answers]
    found = [first for first in firsts if first is not None]
    words = f"{len(found)} of {len(answers)}"
    if found:
        words += f", {min(found)}"
    return words, bool(found)


# ---- what may vary


def in_mixed_batches(model, requests: list[Request], same: Request, sizes) -> Answers:
    """A request again and again, in batches of several sizes, with others that end sooner or
    later."""
    others = []
    for i, request in enumerate(requests):
        others.append(replace(request, max_new_tokens=1 + (3 * i) % request.max_new_tokens))
    neighbours = others + others[:4] * 5  # the first four are the short ones
    mixed = []
    for other in neighbours[: max(25, len(others))]:
        mixed += [same, other]
    answers = []
    for size in sizes:
        answers += complete(model, mixed, size)
    return answers


def in_chunks(model, requests: list[Request]) -> Answers:
    answers = []
    for chunk, count in ((1, 4), (3, 4), (7, 6), (64, len(requests)), (200, len(requests))):
        answers += complete(model, requests[:count], prefill_chunk=chunk)
    return answers


class HalfRight:
    """Drafts what came alone, every third token wrong: some drafts are accepted, others are not."""

    def __init__(self, alone: dict[int | str, Answer], k: int):
        self.alone = alone
        self.k = k

    def propose(self, slots: list[Completion | None], sampler) -> list[list[int]]:
        return [self.drafts(completion) for completion in slots]

    def drafts(self, completion: Completion | None) -> list[int]:
        rest = []
        if completion:
            tokens, _ = self.alone[completion.request.id]
            rest = tokens[len(completion.tokens) :]
        rest = (rest + [0] * self.k)[: self.k]
        return [token ^ 1 if i % 3 == 2 else token for i, token in enumerate(rest)]


def speculated(model, requests: list[Request], alone: dict[int | str, Answer]) -> Answers:
    answers = []
    for slots, k in ((1, 1), (1, 4), (3, 5), (8, 8)):
        answers += complete(model, requests, slots, drafter=HalfRight(alone, k))
    return answers


def compiled(model, requests: list[Request], exact: bool) -> Answers:
    other = copy.copy(model)
    # With the flag off, one graph is enough to see a difference.
    machine.set_up(other, True, exact)
    answers = []
    for slots in (1, 4) if exact else (1,):
        answers += complete(other, requests, slots)
    return answers


def with_other_caches(model, requests: list[Request]) -> Answers:
    return complete(model, requests, 2, 1024) + complete(model, requests, 2, 2500)


def with_threads(model, requests: list[Request]) -> Answers:
    answers = []
    for threads in (1, 2, 4, 8, 16, 32):
        answers += complete(model, requests, 2, threads=threads)
    return answers


def promises(args, model: Transformer, requests: list[Request]) -> Iterator[Row]:
    """Each row of the table. Under torchrun, `alone` is what one process says."""
    whole = model
    if tp.world > 1:
        whole, _ = generate.load(args, 1)
    same = replace(requests[1], id="same", temperature=0.0)
    alone = dict(complete(whole, [*requests, same]))
    # What happens before the first token shows in it and in the next two, which read the cache.
    short = [replace(request, max_new_tokens=3) for request in requests]

    def row(name: str, answers: Answers) -> Row:
        return (name, *tally(alone, answers))

    sizes = (5, 9, 17, 33) if args.size == 1 else range(1, 51)
    batches = in_mixed_batches(model, requests, same, sizes)
    yield row("C1 batch size, neighbours, refilled slots", batches)
    yield row("C2 prefill in chunks", in_chunks(model, short))
    yield row("C2 rescored by prefill", rescore(args, alone, requests, tp.world))
    yield row("C3 speculation, 1 to 8 drafts", speculated(model, requests, alone))
    if tp.world > 1:
        name = f"C4 {tp.world} ranks, as in all rows, against one"
        yield row(name, complete(model, requests))
    yield row("C5 compiled", compiled(model, short, args.deterministic))
    yield row("C6 cache length", with_other_caches(model, requests[3:]))
    yield row("C7 threads 1 to 32", with_threads(model, short[1:6:2]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield row("C7 another process", pool.apply(rescore, (args, alone, requests, 1)))
    identical = [str(answer) for name, answer in batches if name == "same"]
    unique = len(set(identical))
    name = f"unique completions of {len(identical)} identical requests, mixed batches"
    yield name, str(unique), unique > 1


# ---- rules broken on purpose


def plain_linear(x: Tensor, packed) -> Tensor:
    """No padding, no leaves, no probe. The weight, however it is packed, is what it makes of the
    unit vectors."""
    if not hasattr(packed, "plain"):
        K = x.shape[-1]
        bias = packed(x.new_zeros(1, K))
        columns = packed(torch.eye(K, dtype=x.dtype, device=x.device)) - bias
        packed.plain = (columns.T.to(x).contiguous(), bias[0].to(x))
    return F.linear(x, *packed.plain)


class PlainLinear(BatchInvariant):
    def linear(self, x, packed):
        return plain_linear(x, packed)


class LeavesForSeveralRows(BatchInvariant):
    def linear(self, x, packed):
        rows = x.shape[:-1].numel()
        return plain_linear(x, packed) if rows == 1 else super().linear(x, packed)


class CausalFlag(BatchInvariant):
    """Whole prompts through SDPA's is_causal, which looks at no cache; by plain softmax, as the
    other way of PyTorch has our bits on some CPUs."""

    def attention(self, q_BTHD, k_BTGD, v_BTGD, k_cache, v_cache, pos_BT, mask, scale):
        news = (q_BTHD, k_BTGD, v_BTGD)
        y = super().attention(*news, k_cache, v_cache, pos_BT, mask, scale)
        is_whole = q_BTHD.shape[1] > 1 and pos_BT[0, 0] == 0
        if not is_whole:
            return y
        q, k, v = (x.transpose(1, 2) for x in news)
        how = {"is_causal": True, "enable_gqa": True, "scale": scale}
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v, **how)
        return y.transpose(1, 2).flatten(2)


def noise_by_row(key_B2: Tensor, pos_B: Tensor, ids_BK: Tensor) -> Tensor:
    rows = torch.arange(len(key_B2)).to(key_B2)
    return gumbel(key_B2 + rows[:, None], pos_B, ids_BK)


CONTROLS = {  # the op table and the noise that break a rule
    "F.linear with no tiles, leaves or probe": (PlainLinear(), gumbel),
    "leaves for several rows only": (LeavesForSeveralRows(), gumbel),
    "is_causal for whole prompts": (CausalFlag(), gumbel),
    "noise by row": (BATCH_INVARIANT, noise_by_row),
}


def follow(model: Transformer, ops: Fast, noise=gumbel) -> None:
    """Put an op table and a noise into force, at every module that has kept the table."""
    sampler.gumbel = noise
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


def controls(args, model: Transformer, requests: list[Request]) -> Iterator[Row]:
    """For each rule broken, what differs from the answers alone of a model that breaks it too.
    Under torchrun, that is one process as well: a rank's share of a sum may be too short for a
    product's bits to depend on the number of rows."""
    ops = model.ops
    whole = model
    if tp.world > 1:
        whole, _ = generate.load(args, 1)
    some = []
    for request in requests[1:5]:
        temperature = 1.5 * request.temperature
        some.append(replace(request, temperature=temperature, max_new_tokens=8))
    for name, broken in CONTROLS.items():
        follow(whole, *broken)
        follow(model, *broken)
        alone = dict(complete(whole, some))
        answers = complete(model, some, slots=4) + complete(model, some, prefill_chunk=7)
        yield (name, *tally(alone, answers))
    follow(model, ops)
