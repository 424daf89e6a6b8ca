"""The determinism contract, tried on a checkpoint: how many comparisons differ with the flag off and on.

python scripts/verify.py                              the default model, seven minutes on 2 cores
python scripts/verify.py --precision fp32 --size 4    four times the requests, every batch size from 1 to 50
All flags of generate.py that choose a model or a device apply. A comparison is one completion, its tokens and the exact
bits of its logprobs, against the same request alone with nothing varied. Exit status 1 where the flag does not hold."""

import argparse
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate  # noqa: E402
from generate import Engine, Request, Tokenizer, gumbel  # noqa: E402
from kernels import invariant_attention  # noqa: E402
from scripts import bench  # noqa: E402

LENGTHS, NEW, ROOM = (1, 9, 10, 64, 65, 256, 511), 16, 527  # tokens of the prompts, generated, of both at most
OPTIONS = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}]  # of the requests in turns


def complete(model, requests, slots: int, chunk: int = 0, room: int = ROOM, propose=None, k: int = 0) -> list[tuple]:
    """(request id, (tokens, logprobs)) of requests that stream through `slots`, each with `room` tokens of cache."""
    engine = Engine(model, Tokenizer(None), slots, room, chunk, propose, k)
    return [(c.request.id, (c.tokens, c.logprobs)) for c, _ in engine.generate(requests) if c.finish_reason]


def rescore(model, texts: list[tuple]) -> list[list[float]]:
    """Logprobs by prefill of (prompt_ids, tokens); arguments in place of a model say which to load."""
    model = generate.load(model)[0] if isinstance(model, argparse.Namespace) else model
    engine = Engine(model, Tokenizer(None), 1, ROOM)
    return [engine.score(*text) for text in texts]


def tally(alone: dict, answers: list[tuple]) -> tuple[str, bool]:
    """How many differ from what `alone` has, and the first token at which one does; whether any does."""
    first = []
    for name, now in answers:
        pairs = zip(*(x[: len(now[0])] for x in alone[name]), *now, strict=True)
        first += [i for i, x in enumerate(pairs) if x[:2] != x[2:]][:1]
    return f"{len(first)} of {len(answers)}" + (f", {min(first)}" if first else ""), bool(first)


def half_right(alone: dict):
    """Drafts that say what came alone, every third token wrong, so that some are accepted and others are not."""

    def propose(slots, sampler, k: int) -> list[list[int]]:
        texts = [[] if c is None else alone[c.request.id][0][len(c.tokens) :] for c in slots]
        return [[token ^ (i % 3 == 2) for i, token in enumerate((text + [0] * k)[:k])] for text in texts]

    propose.pays = 0
    return propose


def promises(args: argparse.Namespace, size: int, model, requests: list[Request]):
    """(what varies, how many differ, whether any does) for each row of the table."""
    alone, short = dict(complete(model, requests, 1)), [replace(r, max_new_tokens=2) for r in requests[1:6:2]]
    texts = [(r.prompt_ids, alone[r.id][0]) for r in requests]
    run = lambda *calls: tally(alone, [answer for call in calls for answer in complete(model, *call)])
    scored = lambda scores: tally(alone, [(i, (alone[i][0], x)) for i, x in zip(alone, scores, strict=True)])
    batches = (2, 5, 17, 33) if size == 1 else range(1, 51)
    yield (
        "C1 batch size, neighbours, refilled slots",
        *run(*((requests * (1 + n // len(requests)), n) for n in batches)),
    )
    chunks = [(requests[: 5 if n < 7 else None], 1, n) for n in (1, 3, 7, 64, 200)]
    yield "C2 prefill in chunks", *run(*chunks)
    yield "C2 rescored by prefill", *scored(rescore(model, texts))
    drafts = [(requests, slots, 0, ROOM, half_right(alone), k) for slots, k in ((1, 1), (1, 4), (3, 5), (8, 8))]
    yield "C3 speculation, 1 to 8 drafts", *run(*drafts)
    generate.set_up(model, True, True)
    yield "C5 compiled", *run((requests, 1), (requests, 4))
    model.decode_stack = model.prefill_stack = model.stack
    yield "C6 cache length", *run((requests[3:], 2, 0, 1024), (requests[3:], 2, 0, 2500))
    before, answers = torch.get_num_threads(), []
    for threads in (1, 2, 4, 8, 16, 32):
        torch.set_num_threads(threads)
        answers += complete(model, short, 2)
    torch.set_num_threads(before)
    yield "C7 threads 1 to 32", *tally(alone, answers)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield "C7 another process", *scored(pool.apply(rescore, (args, texts)))
    same = replace(requests[3], id="same", temperature=0.0)
    others = [replace(r, max_new_tokens=1 + 3 * i) for i, r in enumerate(requests[:6])]
    mixed = [r for i in range(25 * size) for r in (same, others[i % 6])]
    answers = [answer for slots in (3, 8, 21, 40) for answer in complete(model, mixed, slots)]
    unique = len({str(answer) for name, answer in answers if name == "same"})
    yield f"unique completions of {100 * size} identical requests, mixed batches", str(unique), unique > 1


def plain_linear(x, packed):
    """No padding, no leaves, no probe."""
    leaves = packed.leaves if packed.weight is None else [packed.weight]  # a GPU holds every weight in one piece
    return F.linear(x, torch.cat([w.to_dense() if w.is_mkldnn else w for w in leaves], dim=1), packed.bias)


def leaves_by_rows(x, packed):
    """One row alone is summed whole, several are summed leaf by leaf."""
    whole = x.numel() == x.shape[-1] and (x.is_cuda or packed.weight is None)
    return plain_linear(x, packed) if whole else packed(x)


def causal_flag(q, k, v, k_cache, v_cache, pos, mask, scale):
    """Whole prompts through SDPA's is_causal, which looks at no cache."""
    y = invariant_attention(q, k, v, k_cache, v_cache, pos, mask, scale)
    if q.shape[1] == 1 or pos[0, 0]:
        return y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def noise_by_row(key, pos, ids):
    return gumbel(key + torch.arange(len(key), device=key.device)[:, None], pos, ids)


def follow(model, ops, noise):
    generate.gumbel = noise
    for layer in model.modules():
        layer.ops = ops


CONTROLS = {
    "F.linear with no tiles, leaves or probe": {"linear": plain_linear},
    "leaves for several rows only": {"linear": leaves_by_rows},
    "is_causal for whole prompts": {"attention": causal_flag},
    "noise by row": {},
}


def main(own: argparse.Namespace, argv: list[str]) -> int:
    table = {}
    for flag in ([], ["--deterministic"]):
        args, draw, failed = generate.parse_args(argv + flag), torch.Generator().manual_seed(0), False
        model, _ = generate.load(args)
        ids = [torch.randint(model.config.vocab_size, (n,), generator=draw).tolist() for n in LENGTHS * own.size]
        requests = [Request(i, "", row, max_new_tokens=NEW, **OPTIONS[i % 3]) for i, row in enumerate(ids)]
        for name, found, differs in promises(args, own.size, model, requests):
            table[name], failed = [*table.get(name, []), found], failed or differs
            if sys.stderr.isatty():
                generate.say(f"flag {'on' if flag else 'off'}, {name}: {found}")
    print("| what varies | flag off: differ of compared, first token | flag on |\n|---|---|---|")
    print(*(f"| {name} | {' | '.join(cells)} |" for name, cells in table.items()), sep="\n")
    print("\n| a rule broken on purpose, the flag on | differ of compared, first token |\n|---|---|")
    rules, some = model.ops, requests[2:]
    for name, broken in CONTROLS.items():  # beside the answers alone of a model that breaks the rule as well
        if "attention" in broken and model.device.type != "cpu":
            continue
        follow(model, replace(rules, **broken), gumbel if broken else noise_by_row)
        found, differs = tally(dict(complete(model, some, 1)), complete(model, some, 5) + complete(model, some, 1, 7))
        failed = failed or not differs
        print(f"| {name} | {found} |")
    follow(model, rules, gumbel)
    print("\nThe contract does not hold, or a control did not fail." if failed else "\nThe contract holds.")
    return int(failed)


if __name__ == "__main__":
    bench.command(main, size=1)
