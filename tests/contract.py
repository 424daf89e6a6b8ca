"""The promises of the determinism contract as comparisons, and its rules broken on purpose: the tests try them on small
models, scripts/verify.py on any checkpoint. A comparison is one completion, its tokens and the exact bits of its
logprobs, against the same request alone with nothing varied."""

import copy
import multiprocessing
from dataclasses import replace

import torch
import torch.nn.functional as F

import generate
import tp
from generate import BATCH_INVARIANT, Engine, Request, Tokenizer, gumbel

LENGTHS, NEW, ROOM = (1, 9, 10, 64, 65, 256, 511), 16, 527  # tokens of the prompts, generated, of both at most
OPTIONS = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}]  # of the requests in turns


def complete(model, requests, slots=1, length=ROOM, threads=0, **settings) -> list[tuple]:
    """(request id, (tokens, logprobs)) of requests that stream through an engine of such settings."""
    before, engine = torch.get_num_threads(), Engine(model, Tokenizer(None), slots, length, **settings)
    torch.set_num_threads(threads or before)
    answers = [(c.request.id, (c.tokens, c.logprobs)) for c, _ in engine.generate(requests) if c.finish_reason]
    torch.set_num_threads(before)
    return answers


def rescore(args, alone: dict, requests, ranks: int) -> list[tuple]:
    """The same with logprobs by prefill of what came alone, by a model loaded once more."""
    engine = Engine(generate.load(args, ranks)[0], Tokenizer(None), 1, ROOM)
    return [(r.id, (alone[r.id][0], engine.score(r.prompt_ids, alone[r.id][0]))) for r in requests]


def tally(alone: dict, answers: list[tuple]) -> tuple[str, bool]:
    """How many differ from what `alone` has, and the first token at which one does; whether any does."""
    first = []
    for name, now in answers:
        pairs = zip(*(x[: len(now[0])] for x in alone[name]), *now, strict=True)
        first += [i for i, x in enumerate(pairs) if x[:2] != x[2:]][:1]
    return f"{len(first)} of {len(answers)}" + (f", {min(first)}" if first else ""), bool(first)


def prepare(args, deterministic: bool) -> tuple:
    """The arguments of `promises`: a model as the flags say, and requests with random prompts."""
    args.deterministic = deterministic
    (model, _), draw = generate.load(args), torch.Generator().manual_seed(0)
    ids = [torch.randint(model.config.vocab_size, (n,), generator=draw).tolist() for n in LENGTHS * args.size]
    requests = [Request(i, "", row, max_new_tokens=NEW, **OPTIONS[i % 3]) for i, row in enumerate(ids)]
    return args, model, requests


class HalfRight(dict):
    """Drafts what came alone, every third token wrong, so that some drafts are accepted and others are not."""

    pays = 0

    def __call__(self, slots, sampler, k: int) -> list[list[int]]:
        texts = [self[c.request.id][0][len(c.tokens) :] if c else [] for c in slots]
        return [[token ^ (i % 3 == 2) for i, token in enumerate((text + [0] * k)[:k])] for text in texts]


def promises(args, model, requests: list[Request]):
    """(what varies, how many differ, whether any does) for each row of the table."""
    whole = generate.load(args, 1)[0] if tp.world > 1 else model
    same, compiled = replace(requests[1], id="same", temperature=0.0), copy.copy(model)
    generate.set_up(compiled, True, args.deterministic)  # with the flag off, one graph is enough to see a difference
    alone = dict(complete(whole, [*requests, same]))
    row = lambda name, *runs: (name, *tally(alone, sum(runs, [])))
    others = [replace(r, max_new_tokens=1 + 3 * i % r.max_new_tokens) for i, r in enumerate(requests)]
    # The first of them are the short ones.
    mixed = sum(zip([same] * max(25, len(others)), others + others[:4] * 5, strict=False), ())
    batches = [complete(model, mixed, n) for n in ((5, 9, 17, 33) if args.size == 1 else range(1, 51))]
    yield row("C1 batch size, neighbours, refilled slots", *batches)
    # What happens before the first token shows in it and in the next two, which read the cache.
    short = [replace(r, max_new_tokens=3) for r in requests]
    chunks = [(1, short[:4]), (3, short[:4]), (7, short[:6]), (64, short), (200, short)]
    yield row("C2 prefill in chunks", *(complete(model, some, chunk=n) for n, some in chunks))
    yield row("C2 rescored by prefill", rescore(args, alone, requests, tp.world))
    settings = [(n, {"propose": HalfRight(alone), "k": k}) for n, k in ((1, 1), (1, 4), (3, 5), (8, 8))]
    yield row("C3 speculation, 1 to 8 drafts", *(complete(model, requests, n, **drafts) for n, drafts in settings))
    if tp.world > 1:
        yield row(f"C4 {tp.world} ranks, as in all rows, against one", complete(model, requests))
    yield row("C5 compiled", *(complete(compiled, short, n) for n in ((1, 4) if args.deterministic else (1,))))
    yield row("C6 cache length", *(complete(model, requests[3:], 2, n) for n in (1024, 2500)))
    yield row("C7 threads 1 to 32", *(complete(model, short[1:6:2], 2, threads=n) for n in (1, 2, 4, 8, 16, 32)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield row("C7 another process", pool.apply(rescore, (args, alone, requests, 1)))
    identical = [str(answer) for name, answer in sum(batches, []) if name == "same"]
    unique = len(set(identical))
    yield f"unique completions of {len(identical)} identical requests, mixed batches", str(unique), unique > 1


def plain_linear(x, packed):
    """No padding, no leaves, no probe. The weight, however it is packed, is what it makes of the unit vectors."""
    if not hasattr(packed, "plain"):
        bias, units = packed(x.new_zeros(1, x.shape[-1])), torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        packed.plain = (packed(units) - bias).T.to(x).contiguous(), bias[0].to(x)
    return F.linear(x, *packed.plain)


def causal_flag(q, k, v, k_cache, v_cache, pos, mask, scale):
    """Whole prompts through SDPA's is_causal, which looks at no cache."""
    y = BATCH_INVARIANT.attention(q, k, v, k_cache, v_cache, pos, mask, scale)
    if q.shape[1] == 1 or pos[0, 0]:
        return y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
    return y.transpose(1, 2).flatten(2)


def noise_by_row(key, pos, ids):
    return gumbel(key + torch.arange(len(key)).to(key)[:, None], pos, ids)


def follow(model, rules, noise=gumbel, **broken):
    """Put rules into force, some of them broken."""
    generate.gumbel = noise
    for layer in model.modules():
        layer.ops = replace(rules, **broken)


CONTROLS = {
    "F.linear with no tiles, leaves or probe": {"linear": plain_linear},
    "leaves for several rows only": {"linear": lambda x, w: plain_linear(x, w) if x.numel() == x.shape[-1] else w(x)},
    "is_causal for whole prompts": {"attention": causal_flag},
    "noise by row": {"noise": noise_by_row},
}


def controls(model, requests: list[Request]):
    """(rule, how many differ, whether any does) for each rule broken, beside the answers alone of a model that breaks
    it as well."""
    rules, some = model.ops, [replace(r, temperature=1.5 * r.temperature, max_new_tokens=8) for r in requests[1:5]]
    for name, broken in CONTROLS.items():
        if name == "leaves for several rows only" and tp.world > 1:
            continue  # a rank may have but one; that ranks differ from one process with the flag off stands for it
        follow(model, rules, **broken)
        answers = complete(model, some, slots=4) + complete(model, some, chunk=7)
        yield (name, *tally(dict(complete(model, some)), answers))
    follow(model, rules)
