"""What scripts/gpu.sh asks of a card beyond the tests and the commands: a line of JSON for each
answer, exit status 1 where one is not as it should be. Without a card everything is smaller, and
kernels run in Triton's interpreter.

python tests/card.py --what device                       versions, and what the memory delivers
python tests/card.py --what bits                         what the determinism stands on
python tests/card.py --what logits                       a small model beside fp32 on the CPU
torchrun --nproc_per_node 1 tests/card.py --what graph   NCCL within a captured graph
torchrun --nproc_per_node 2 tests/card.py --what ranks   two processes on one card against one
python tests/card.py --what shapes                       matrix products and attention alone, timed
python tests/card.py --what trace                        where the time of a --profile FILE goes

All flags of generate.py that choose a model or a device apply; --output FILE gets the lines too."""

import argparse
import collections
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import timeit
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # its own folder is tests/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import generate
import kernels
import quantize
import tp
from kernels import BATCH_INVARIANT, InputError, TritonPacked
from scripts import cli, contract, loading, machine
from scripts.checkpoint import Refusal
from scripts.tokenizer import Tokenizer

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CARD else "cpu")
HALF = torch.bfloat16 if CARD else torch.float32
MODES = {None: 2, "int8": 1, "int4": 0.625}  # bytes of a weight, of int4 by groups of 32


def randn(*shape, dtype=HALF):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def random_weight(mode, N, K, leaves=1, partial=False):
    """As a GPU has it, of 4 bits by groups of 32."""
    tensors = quantize.quantized(mode, randn(N, K).mul_(0.02), 32)
    return TritonPacked(bias=None, leaves=leaves, partial=partial, **tensors)


# ---- versions


def device(args):
    """What there is."""
    names = ("triton", "safetensors", "tokenizers", "transformers", "pytest", "gguf")
    found = {}
    for package in importlib.metadata.distributions():
        if package.metadata["Name"] in names:
            found[package.metadata["Name"]] = package.version
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    found["python"] = platform.python_version()
    found["cores"] = os.cpu_count()
    if CARD:
        card = torch.cuda.get_device_properties(DEVICE)
        found |= {"card": card.name, "sm": f"{card.major}{card.minor}"}
        found |= {"units": card.multi_processor_count, "memory_gb": card.total_memory / 1e9}
    yield found
    yield {"bandwidth_gb_s": machine.read_bandwidth(DEVICE) / 1e9}


# ---- bits


def differing(a, b):
    """In how many numbers two tensors differ, as an answer."""
    return {"differ": int((a != b).sum()), "of": a.numel(), "holds": torch.equal(a, b)}


def sums_by_launch(packed, x):
    """The fp32 sums of a row by every launch, at several numbers of rows."""
    launches = TritonPacked.LAUNCHES
    want = packed.products(x)
    rows = (1, 7, 16, 17, 64, 130) if CARD else (1, 17)
    try:
        for (most, launch), M in itertools.product(launches.items(), rows):
            TritonPacked.LAUNCHES = {math.inf: launch}
            answer = differing(packed.products(x[:M]), want[:M])
            yield {"bits": "launches", "launch": f"up to {most} rows", "rows": M} | answer
    finally:
        TritonPacked.LAUNCHES = launches


def sums_by_place(packed, x):
    """The fp32 sums of a row wherever it lies in a tile of rows."""
    want = packed.products(x)
    for shift in (1, 5, 8, 15):
        moved = packed.products(x.roll(shift, 0)).roll(-shift, 0)
        yield {"bits": "place of a row", "by": shift} | differing(moved, want)


def sums_of_a_row():
    N, K, M = (512, 4096, 130) if CARD else (130, 256, 17)
    for mode in MODES:
        packed = random_weight(mode, N, K, partial=True)  # so that sums are not rounded
        x = randn(M, K)
        for answer in itertools.chain(sums_by_launch(packed, x), sums_by_place(packed, x)):
            yield answer | {"mode": mode}
        if mode is None:  # the negative control: another order
            answer = differing(x.float() @ packed.weight.float().T, packed.products(x))
            answer["holds"] = not answer["holds"]
            yield {"bits": "another order differs"} | answer


def zero_keeps_a_sum():
    """acc + 0 x V is acc: what a tile of masked keys adds."""
    keep = keeping_kernel()
    D = 128 if CARD else 16
    for tile in (64, 32) if CARD else (16,):
        acc, values = randn(tile, D, dtype=torch.float32), randn(tile, D)
        acc *= 2.0 ** torch.randint(-40, 40, acc.shape, device=DEVICE)
        weights = torch.zeros(tile, tile, device=DEVICE, dtype=HALF)
        y = torch.empty_like(acc)
        keep[(1,)](acc, weights, values, y, tile, D)
        yield {"bits": "acc + 0 x V", "tile": tile} | differing(y, acc)


def keeping_kernel():
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def keep(acc, weights, values, y, TILE: tl.constexpr, D: tl.constexpr):
        row = tl.arange(0, TILE)[:, None]
        at = row * D + tl.arange(0, D)[None, :]
        w = tl.load(weights + row * TILE + tl.arange(0, TILE)[None, :])
        tl.store(y + at, tl.dot(w, tl.load(values + at), tl.load(acc + at), input_precision="ieee"))

    return keep


def compiled_silu():
    """Compiled code against eager code, and how many numbers an approximate division changes."""
    options = BATCH_INVARIANT.compile_options
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = randn(64, 2 * (28672 if CARD else 64), dtype=dtype) * 3
        want = BATCH_INVARIANT.silu_mul(gate_up)
        for division in (True, False):
            settings = options | {"eager_numerics.division_rounding": division}
            silu = torch.compile(BATCH_INVARIANT.silu_mul, fullgraph=True, options=settings)
            answer = differing(silu(gate_up), want)
            if not division:  # that one is only told
                answer["holds"] = True
            which = {"dtype": str(dtype), "exact division": division}
            yield {"bits": "compiled silu"} | which | answer


def bits(args):
    yield from sums_of_a_row()
    yield from zero_keeps_a_sum()
    yield from compiled_silu()


# ---- a model


def fill(model):
    """The same random weights on every device and in every precision; modules that name the same
    tensor, as a tied head does, get the same."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in loading.tensor_shapes(model).items():
        tensor = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        made[name] = tensor if tensor.dim() > 1 else torch.ones_like(tensor)
    for layer in model.loaders:
        layer.load([made[name] for name in layer.shapes])


@torch.inference_mode()
def logits_of(args, **settings):
    """fp32 logits [T, V] of a model that those settings change: a prompt at once, and tokens one by
    one behind it."""
    model, _ = generate.load(argparse.Namespace(**vars(args) | settings))
    fill(model)
    total, prompt = (96, 80) if CARD else (24, 16)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (total,), generator=generator).tolist()
    engine = generate.Engine(model, Tokenizer(None), 1, total)
    found = [engine.feed(ids[:prompt], 0, slot=0)[0]]
    for i in range(prompt, total):
        found.append(engine.feed([ids[i]], i, slot=0)[0])
    return torch.cat(found).cpu()


def logits(args):
    """Relative errors, of all logits together."""
    for mode in MODES:
        settings = {"device": "cpu", "precision": "fp32", "quantize": mode, "deterministic": False}
        want = logits_of(args, **settings)
        for exact in (False, True):
            other = {"device": str(DEVICE), "precision": "bf16", "deterministic": exact}
            got = logits_of(args, **settings | other)
            error = float((got - want).norm() / want.norm())
            answer = {"relative_error": error, "holds": error < 2e-2}
            yield {"logits": mode or "bf16", "deterministic": exact} | answer


def graph(args):
    """The collectives of a step, captured once and replayed with other numbers."""
    x = randn(8, 4096, dtype=torch.float32)
    dist.init_process_group("nccl" if CARD else "gloo")

    def step():
        return tp.all_gather(x * 2), tp.all_reduce(x * 3)

    step()  # connects
    if CARD:
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = step()
    for _ in range(3):
        x.copy_(randn(*x.shape, dtype=torch.float32))
        if CARD:
            captured.replay()
            torch.cuda.synchronize()
        else:
            found = step()
        for name, y, factor in zip(("all_gather", "all_reduce"), found, (2, 3), strict=True):
            yield {"graph": name} | differing(y.view(x.shape), x * factor)


def ranks(args):
    """Completions of processes that share the model, and a card, against one process."""
    dist.init_process_group("gloo")  # NCCL does not let processes share a card
    args, model, requests = contract.prepare(args, True)
    whole, _ = generate.load(args, 1)
    some = [replace(r, max_new_tokens=8) for r in requests[: 7 if CARD else 3]]
    alone = dict(contract.complete(whole, some))
    differ, any_differs = contract.tally(alone, contract.complete(model, some, 3))
    yield {"ranks": tp.world, "differ": differ, "holds": not any_differs}


# ---- time


def time_of(run, copies):
    """Seconds that a device takes for run(copy), one copy after the other: where all are out of its
    caches by their turn."""
    for copy in copies[:2]:
        run(copy)
    if not CARD:
        return timeit.timeit(lambda: run(copies[0]), number=1)

    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for copy in copies:
            run(copy)
    return min(seconds_to_replay(captured) for _ in range(10)) / len(copies)


def seconds_to_replay(captured):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    captured.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # it counts milliseconds


def copies_of(make, nbytes):
    """So many that together they do not fit a cache of 100 MB."""
    enough = math.ceil((300 << 20) / nbytes)
    return [make() for _ in range(min(max(2, enough), 64) if CARD else 2)]


# The matrices of two models: N, K, leaves.
SHAPES = {
    "qkv": (6144, 4096, 1),
    "o": (4096, 4096, 8),
    "gate_up": (28672, 4096, 1),
    "down": (4096, 14336, 8),
    "head": (128256, 4096, 1),
    "gate_up of Qwen3-8B": (24576, 4096, 1),
    "down of Qwen3-8B": (4096, 12288, 8),
    "head of Qwen3-8B": (151936, 4096, 1),
}


def products(limit):
    for (name, (N, K, leaves)), mode in itertools.product(SHAPES.items(), MODES):
        if not CARD:
            N, K = N // 256, 32 * leaves

        def make(mode=mode, shape=(N, K, leaves)):
            return random_weight(mode, *shape)

        weights = copies_of(make, N * K * MODES[mode])
        for M in (1, 16, 64, 2048) if CARD else (1, 17):
            x = randn(M, K)
            taken = time_of(lambda packed, x=x: packed.products(x), weights)
            rate = weights[0].nbytes / taken
            answer = {"product": name, "mode": mode or "bf16", "rows": M}
            answer |= {"us": taken * 1e6, "gb_s": rate / 1e9, "of_the_limit": rate / limit}
            yield answer | {"tflops": 2 * M * N * K / taken / 1e12}
        del weights


def attentions(limit):
    """Of one layer of Llama-3.1-8B: decoding by batch and context, then a prefill."""
    G, R, D = (8, 4, 128) if CARD else (2, 2, 16)
    contexts = (128, 2048, 8192) if CARD else (40, 600)
    batches = (1, 8, 16) if CARD else (1, 2)
    cells = [(B, 1, context) for B in batches for context in contexts]
    cells.append((1, 2048 if CARD else 70, 0))
    for B, T, context in cells:
        length = math.ceil((context + T) / 512) * 512 + 64

        def make(B=B, length=length):
            return [randn(B, G, length, D) for _ in "kv"]

        caches = copies_of(make, 4 * B * G * length * D)
        new = [randn(B, T, heads, D) for heads in (G * R, G, G)]
        pos = torch.arange(context, context + T, device=DEVICE).repeat(B, 1)
        heads = torch.arange(G * R, device=DEVICE).view(G, R)
        on_gpu = SimpleNamespace(is_cuda=True)  # in place of the positions, for a dry run
        mask = BATCH_INVARIANT.mask(kernels.causal, on_gpu, length, heads, None)

        def run(cache, new=new, pos=pos, mask=mask):
            q, *keys_and_values = new
            kernels.write_cache(*keys_and_values, *cache, pos)
            return kernels.triton_attention(q, *cache, pos, *mask, D**-0.5)

        taken = time_of(run, caches)
        rate = 4 * B * G * (context + T) * D / taken
        answer = {"attention": context, "batch": B, "tokens": T, "us": taken * 1e6}
        yield answer | {"gb_s": rate / 1e9, "of_the_limit": rate / limit}
        del caches


def shapes(args):
    limit = machine.read_bandwidth(DEVICE)
    yield from products(limit)
    yield from attentions(limit)


def trace(args):
    """The kernels, or on a CPU the operators, that take most of a trace."""
    events = json.loads(Path(args.profile).read_text())["traceEvents"]
    kind = "kernel" if CARD else "cpu_op"
    total, count = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("cat") == kind:
            total[event["name"]] += event["dur"]
            count[event["name"]] += 1
    for name, taken in total.most_common(25):
        share = taken / total.total()
        yield {"trace": name[:80], "calls": count[name], "ms": taken / 1000, "share": share}


QUESTIONS = {f.__name__: f for f in (device, bits, logits, graph, ranks, shapes, trace)}


def main():
    args = cli.parse_args(what="", size=1)
    if args.what not in QUESTIONS:
        raise Refusal(f"--what {args.what}: expected one of {', '.join(QUESTIONS)}")
    if not CARD:
        from tests import interpreter  # which needs NumPy

        interpreter.install()
    torch.manual_seed(0)
    holds = True
    for answer in QUESTIONS[args.what](args):
        holds = holds and answer.get("holds", True)
        if tp.rank:
            continue
        line = json.dumps(answer)
        print(line, flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(line + "\n")
    return int(not holds)


if __name__ == "__main__":
    # As generate.command, but each question connects the processes in its own way.
    cli.run([main], InputError, SafetensorError, torch.OutOfMemoryError)
