"""Speed on this machine, as a table: prefill and decode at several batch sizes, beside what its memory can deliver.

python scripts/bench.py --compile                                    the default model
python scripts/bench.py --random_weights scripts/configs/Llama-3.1-8B.json --batches 1
All flags of generate.py that choose a model or a way to run it apply; a figure is the median of --runs."""

import ctypes
import json
import statistics
import sys
import timeit
from pathlib import Path

import torch

PROMPT, CONTEXT, NEW = 500, 16, 128  # tokens: of a prompt to prefill, of a prompt to decode after, and decoded


def read_bandwidth(device):
    """Bytes per second that a device reads from its memory: the best of five sums of 256 MB."""
    data = torch.ones(1 << 26, device=device)
    return data.nbytes / min(timeit.repeat(lambda: data.sum().item(), number=1))


def peak_memory(device):
    """Bytes: CUDA's own peak; on Linux the anonymous memory now, without the mapped files that VmHWM counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) << 10 if status.exists() else 0


def measure(generate, model, batch_size, prompt, new, runs):
    """Medians over engine runs of `batch_size` random prompts: [prefill tokens/s, decode tokens/s, first token s]."""
    rates = []
    for _ in range(runs + 1):
        engine = generate.Engine(model, generate.Tokenizer(None), batch_size, prompt + new)
        ids = torch.randint(model.config.vocab_size, (batch_size, prompt)).tolist()
        list(engine.generate([generate.Request(i, "", row, max_new_tokens=new) for i, row in enumerate(ids)]))
        speeds = [engine.tokens[phase] / (engine.seconds[phase] or 1) for phase in ("prefill", "decode")]
        rates.append([*speeds, engine.first_token_s])
    return list(map(statistics.median, zip(*rates[1:], strict=True)))  # the first only warms up and compiles


def tune_memory(device, huge_pages):
    """What the loaded weights and the allocator need to be read fast."""
    if sys.platform == "linux" and device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives freed buffers back to the kernel and takes page faults for the next: a third of a prefill's time.
        libc.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD
        # Weights move to huge pages, a second or two for each gigabyte; decoding then reads 6% more a second.
        for line in Path("/proc/self/maps").read_text().splitlines() if huge_pages else ():
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            if end - start >= 2 << 20 and "/" not in line:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 25)  # MADV_COLLAPSE


def randomize(model, seed=0):
    """Fill a model with random weights (normal, 0.02; vectors one), where there is no checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.takers:
        tensors = [torch.randn(shape, generator=generator, dtype=model.dtype) for shape in layer.shapes.values()]
        tensors = [t.mul_(0.02) if t.dim() > 1 else torch.ones_like(t) for t in tensors]
        model.nbytes += layer.load(tensors)


def report(engine, load_s, compile_s, as_json):
    """The stats line, and the same for a person."""
    model, tokens, seconds = engine.model, engine.tokens, engine.seconds
    decode, prefill = (tokens[phase] / (seconds[phase] or 1) for phase in ("decode", "prefill"))  # of nothing: 0
    new, first, rate = tokens["new"], engine.first_token_s, model.nbytes * engine.steps / (seconds["decode"] or 1) / 1e9
    stats = {"decode_tokens_per_sec": decode, "prefill_tokens_per_sec": prefill, "time_to_first_token_s": first}
    stats |= {"load_s": load_s, "compile_s": compile_s, "new_tokens": new, "model_bytes": model.nbytes}
    stats |= {"bandwidth_gb_s": rate, "accept_counts": engine.accept_counts}
    stats |= {"peak_memory_gb": peak_memory(model.device) / 1e9, "deterministic": model.ops.exact}
    if as_json:
        print(json.dumps({"stats": stats}), flush=True)
    limit = read_bandwidth(model.device) / 1e9  # only now: it takes memory
    say = lambda text: print(text, file=sys.stderr)
    say(f"{new} tokens: decode {decode:.1f} tokens/s, prefill {prefill:.0f} tokens/s, first token after {first:.2f} s")
    share = f"{rate:.1f} GB/s, {rate / limit:.0%} of the {limit:.0f} GB/s that this machine reads"
    say(f"load {load_s:.1f} s, compile {compile_s:.1f} s, weights {model.nbytes / 1e9:.2f} GB at {share}")


def main():
    args = generate.parse_args(batches="1,4,16", runs=5)
    with generate.refusing("--batches is a list such as 1,4,16", ValueError):
        batches = [int(n) for n in args.batches.split(",")]
        min(batches) > 0 or generate.refuse(args.batches)
    model, _ = generate.load(args)
    generate.set_up(model, args.compile, args.compile_prefill)
    limit = read_bandwidth(model.device)
    how = f"{args.precision}, {'compiled' if args.compile else 'eager'}, {torch.get_num_threads()} threads"
    print(f"{model.nbytes / 1e9:.2f} GB of weights, {how}; this machine reads {limit / 1e9:.1f} GB/s; medians\n")
    print(f"| batch | prefill of {PROMPT}, tokens/s | first token, s | decode, tokens/s | GB/s | of the limit |")
    print("|---|---|---|---|---|---|")
    for batch_size in batches:
        prefill, _, first = measure(generate, model, batch_size, PROMPT, 1, args.runs)
        _, decode, _ = measure(generate, model, batch_size, CONTEXT, NEW, args.runs)
        rate = model.nbytes * decode / batch_size  # each step reads all weights and gives every row a token
        print(f"| {batch_size} | {prefill:.0f} | {first:.2f} | {decode:.1f} | {rate / 1e9:.1f} | {rate / limit:.0%} |")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import generate

    generate.command(main)
