"""The determinism contract, tried on a checkpoint: how many comparisons differ with the flag off and on.

python scripts/verify.py                              the default model, a few minutes on 2 cores
python scripts/verify.py --precision fp32 --size 4    four times the requests, every batch size from 1 to 50
All flags of generate.py that choose a model or a device apply. A comparison is one completion, its tokens and the exact
bits of its logprobs, against the same request alone with nothing varied. Exit status 1 where the flag does not hold."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import generate  # noqa: E402
from kernels import invariant_attention  # noqa: E402

LENGTHS, NEW = (1, 9, 10, 64, 65, 256, 511), 16  # tokens of the prompts, and generated


class Subject:
    """A model, and what it answers when each request is alone."""

    def __init__(self, argv: list[str], size: int, **broken):
        self.argv, self.size = argv, size
        self.model, _ = generate.load(generate.parse_args(argv))
        for module in self.model.modules() if broken else ():
            module.ops = replace(self.model.ops, **broken)
        vocab, draw = self.model.config.vocab_size, torch.Generator().manual_seed(0)
        ids = [torch.randint(vocab, (n,), generator=draw).tolist() for n in LENGTHS * size]
        options = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}]
        self.requests = [
            generate.Request(i, "", row, max_new_tokens=NEW, **options[i % 3]) for i, row in enumerate(ids)
        ]
        self.alone = dict(self.complete(self.requests, 1))

    def complete(self, requests: list, capacity: int, chunk: int = 0, room: int = 0) -> list[tuple]:
        """(id, (tokens, logprobs)) of requests that stream through `capacity` slots."""
        engine = generate.Engine(self.model, generate.Tokenizer(None), capacity, room or max(LENGTHS) + NEW, chunk)
        return [(c.request.id, (c.tokens, c.logprobs)) for c, _ in engine.generate(requests) if c.finish_reason]

    def compare(self, *args, **options) -> list[tuple]:
        return [(self.alone[name], answer) for name, answer in self.complete(*args, **options)]

    def batches(self):
        for capacity in (2, 5, 17, 33) if self.size == 1 else range(1, 51):
            yield from self.compare(self.requests * (1 + capacity // len(self.requests)), capacity)

    def chunks(self):
        for chunk in (1, 3, 7, 64, 200):
            yield from self.compare(self.requests[: 6 if chunk < 7 else None], 1, chunk)

    def rescored(self):
        engine = generate.Engine(self.model, generate.Tokenizer(None), 1, max(LENGTHS) + NEW)
        for r in self.requests:
            tokens, logprobs = self.alone[r.id]
            yield (tokens, logprobs), (tokens, engine.score(r.prompt_ids, tokens))

    def compiled(self):
        generate.set_up(self.model, True, True)
        for capacity in (1, 4):
            yield from self.compare(self.requests, capacity)
        self.model.decode_stack = self.model.prefill_stack = self.model.stack

    def rooms(self):
        for room in (1024, 2500):
            yield from self.compare(self.requests[3:], 2, room=room)

    def threads(self):
        before, short = torch.get_num_threads(), [replace(r, max_new_tokens=2) for r in self.requests[1:6:2]]
        for threads in (1, 2, 4, 8, 16, 32):
            torch.set_num_threads(threads)
            for name, answer in self.complete(short, 2):
                yield tuple(x[:2] for x in self.alone[name]), answer
        torch.set_num_threads(before)

    def process(self):
        """Another process scores what this one generated."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "completions.jsonl")
            lines = [{"id": r.id, "prompt_ids": r.prompt_ids, "tokens": self.alone[r.id][0]} for r in self.requests]
            path.write_text("\n".join(map(json.dumps, lines)))
            command = [sys.executable, ROOT / "generate.py", *self.argv, "--score", path]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in map(json.loads, out.splitlines()):
            yield self.alone[line["id"]], (line["tokens"], line["logprobs"])

    def unique(self) -> int:
        """How many different completions one greedy request gets in batches that other requests come and go in."""
        same = replace(self.requests[3], id="same", temperature=0.0)
        others = [replace(r, max_new_tokens=1 + 3 * i) for i, r in enumerate(self.requests[:6])]
        mixed = [r for i in range(25 * self.size) for r in (same, others[i % len(others)])]
        answers = [answer for slots in (3, 8, 21, 40) for answer in self.complete(mixed, slots)]
        return len({str(answer) for name, answer in answers if name == "same"})


def tally(pairs) -> tuple[int, int, int | None]:
    """(compared, different, the first token at which one differs)"""
    first = []
    for want, got in pairs:
        differs = [i for i, pairs in enumerate(zip(*want, *got, strict=True)) if pairs[:2] != pairs[2:]]
        first.append(min(differs, default=None))
    found = [i for i in first if i is not None]
    return len(first), len(found), min(found, default=None)


PROMISES = {
    "C1 batch size, neighbours, refilled slots": Subject.batches,
    "C2 prefill in chunks": Subject.chunks,
    "C2 rescored by prefill": Subject.rescored,
    "C5 compiled": Subject.compiled,
    "C6 cache length": Subject.rooms,
    "C7 threads 1 to 32": Subject.threads,
    "C7 another process": Subject.process,
}


def plain_linear(x, packed):
    """No padding, no leaves, no probe."""
    weight = torch.cat([leaf.to_dense() if leaf.is_mkldnn else leaf for leaf in packed.leaves], dim=1)
    return F.linear(x, weight, packed.bias)


def leaves_by_rows(x, packed):
    """One row alone is summed whole, several are summed leaf by leaf."""
    return packed(x) if x.numel() > x.shape[-1] or len(packed.leaves) == 1 else plain_linear(x, packed)


def causal_flag(q, k, v, k_cache, v_cache, pos, mask, scale):
    """Whole prompts through SDPA's is_causal, which looks at no cache."""
    y = invariant_attention(q, k, v, k_cache, v_cache, pos, mask, scale)
    if q.shape[1] == 1 or pos[0, 0]:
        return y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def noise_by_row(gumbel):
    return lambda key, pos, ids: gumbel(key + torch.arange(len(key), device=key.device)[:, None], pos, ids)


CONTROLS = {
    "F.linear with no tiles, leaves or probe": {"linear": plain_linear},
    "leaves for several rows only": {"linear": leaves_by_rows},
    "is_causal for whole prompts": {"attention": causal_flag},
    "noise by row": {},
}


def main(argv: list[str]) -> int:
    size = 1
    if "--size" in argv:
        i = argv.index("--size")
        size, argv = int(argv[i + 1]), argv[:i] + argv[i + 2 :]
    columns, unique, show = [], [], sys.stderr.isatty()
    for flags in ([], ["--deterministic"]):
        subject, column = Subject(argv + flags, size), []
        for name, check in PROMISES.items():
            column.append(tally(check(subject)))
            show and generate.say(f"flag {'on' if flags else 'off'}, {name}: {column[-1]}")
        columns.append(column)
        unique.append(subject.unique())
    print("| what varies | flag off: differ of compared, first token | flag on |\n|---|---|---|")
    for name, *cells in zip(PROMISES, *columns, strict=True):
        cells = [f"{differ} of {compared}" + f", {at}" * (differ > 0) for compared, differ, at in cells]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| unique completions of {100 * size} identical requests, mixed batches | {unique[0]} | {unique[1]} |\n")
    print("| a rule broken on purpose, the flag on | differ of compared, first token |\n|---|---|")
    holds, gumbel = unique[1] == 1 and not any(differ for _, differ, _ in columns[1]), generate.gumbel
    for name, broken in CONTROLS.items():
        if "attention" in broken and subject.model.device.type != "cpu":
            continue
        subject = Subject([*argv, "--deterministic"], size, **broken)
        generate.gumbel = gumbel if broken else noise_by_row(gumbel)
        try:
            pairs = subject.compare(subject.requests[2:], 5) + subject.compare(subject.requests[2:], 1, 7)
            compared, differ, at = tally(pairs)
        finally:
            generate.gumbel = gumbel
        holds = holds and differ > 0
        print(f"| {name} | {differ} of {compared}, {at} |")
    print("\nThe contract holds." if holds else "\nThe contract does not hold, or a control did not fail.")
    return 0 if holds else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (generate.InputError, ValueError, IndexError) as e:
        generate.say("error:", *str(e).split())
        sys.exit(2)
