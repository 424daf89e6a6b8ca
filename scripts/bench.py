"""Speed on this machine, as a table: prefill and decode at several batch sizes, beside what its memory can deliver.

python scripts/bench.py --compile                                    the default model
python scripts/bench.py --random_weights scripts/configs/Llama-3.1-8B.json --batches 1
All flags of generate.py that choose a model or a way to run it apply. A figure is the median of --runs; of a step of
decoding with --batches of slots after --contexts of tokens, or of the prefill of one of --prompts tokens. With
--deterministic it is measured without and with the flag, in turns. --output FILE gets a line of JSON a row."""

import ctypes
import json
import statistics
import sys
import timeit
from pathlib import Path

import torch


def read_bandwidth(device):
    """Bytes per second that a device reads from its memory: the best of five sums of 256 MB."""
    data = torch.ones(1 << 26, device=device)
    return data.nbytes / min(timeit.repeat(lambda: data.sum().item(), number=1))


def peak_memory(device):
    """Bytes: CUDA's own peak; on Linux the anonymous memory now, without the mapped files that VmHWM counts."""
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "RssAnon: 0"
    anonymous = int(status.split("RssAnon:")[1].split()[0]) << 10
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else anonymous


def work(generate, model, kind, batch_size, tokens):
    """A function that prefills so many tokens, or that takes a step of decoding after so many in every slot."""
    engine = generate.Engine(model, generate.Tokenizer(None), batch_size, tokens + 1)
    [x.normal_() for keys_and_values in engine.cache for x in keys_and_values]
    sampler = generate.Sampler([generate.Request(0, "", [])] * batch_size, model.device)
    step = lambda: engine.step([[0]] * batch_size, [tokens] * batch_size, sampler)[0].tolist()
    return (lambda: engine.prefill([0] * tokens, 0).argmax().item()) if kind == "prefill" else step


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
    how = {"generator": torch.Generator(model.device).manual_seed(seed), "device": model.device, "dtype": model.dtype}
    for layer in model.takers:
        tensors = (torch.randn(shape, **how) for shape in layer.shapes.values())
        model.nbytes += layer.load([t.mul_(0.02) if t.dim() > 1 else torch.ones_like(t) for t in tensors])


def report(engine, load_s, compile_s, as_json):
    """The stats line, and the same for a person."""
    model, tokens, seconds = engine.model, engine.tokens, engine.seconds
    decode, prefill = (tokens[phase] / (seconds[phase] or 1) for phase in ("decode", "prefill"))  # of nothing: 0
    new, first, rate = tokens["new"], engine.first_token_s, model.nbytes * engine.steps / (seconds["decode"] or 1) / 1e9
    stats = {"decode_tokens_per_sec": decode, "prefill_tokens_per_sec": prefill, "time_to_first_token_s": first}
    stats |= {"load_s": load_s, "compile_s": compile_s, "new_tokens": new, "model_bytes": model.nbytes}
    stats |= {"bandwidth_gb_s": rate, "accept_counts": engine.accept_counts}
    stats |= {"peak_memory_gb": peak_memory(model.device) / 1e9, "deterministic": model.ops.exact}
    as_json and print(json.dumps({"stats": stats}), flush=True)
    limit = read_bandwidth(model.device) / 1e9  # only now: it takes memory
    say = lambda text: print(text, file=sys.stderr)
    say(f"{new} tokens: decode {decode:.1f} tokens/s, prefill {prefill:.0f} tokens/s, first token after {first:.2f} s")
    share = f"{rate:.1f} GB/s, {rate / limit:.0%} of the {limit:.0f} GB/s that this machine reads"
    say(f"load {load_s:.1f} s, compile {compile_s:.1f} s, weights {model.nbytes / 1e9:.2f} GB at {share}")


@torch.inference_mode()
def main():
    args, models = generate.parse_args(batches="1,4,16", contexts="16", prompts="500", runs=5), []
    with generate.refusing("--batches, --contexts and --prompts are lists such as 1,4,16", ValueError):
        lists = [[int(n) for n in given.split(",")] for given in (args.batches, args.contexts, args.prompts)]
    for args.deterministic in [False, True][: 1 + args.deterministic]:  # noqa: B020
        models.append(generate.load(args)[0])
        generate.set_up(models[-1], args.compile, args.compile_prefill)
    limit, size, config = read_bandwidth(models[0].device), models[0].nbytes, models[0].config
    fit = 0 < min(sum(lists, [])) <= max(lists[1] + lists[2]) < config.context
    fit or generate.refuse(f"expected --batches from 1, --contexts and --prompts from 1 to {config.context - 1} tokens")
    how = args.precision + ", compiled" * args.compile
    print(f"{size / 1e9:.2f} GB of weights, {how}; this machine reads {limit / 1e9:.1f} GB/s; medians\n")
    names = "what batch tokens tokens/s GB/s of_the_limit deterministic cost".split()[: 4 + 2 * len(models)]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * models[0].dtype.itemsize  # bytes in the cache
    cells = [("prefill", 1, n) for n in lists[2]] + [("decode", b, n) for n in lists[1] for b in lists[0]]
    for kind, batch, tokens in cells:
        number, works = 1 if kind == "prefill" else 32, [work(generate, model, kind, batch, tokens) for model in models]
        # In turns; the first only warm up and compile.
        times = [[timeit.timeit(run, number=number) / number for run in works] for _ in range(args.runs + 1)][1:]
        off, *on = map(statistics.median, zip(*times, strict=True))
        # Without `works`, their caches are freed before others are made.
        new, rate, works = tokens if kind == "prefill" else batch, (size + batch * tokens * token) / off, None
        row = [kind, batch, tokens, new / off, rate / 1e9, rate / limit] + [x for s in on for x in (new / s, s / off)]
        print("| " + " | ".join(x if x is kind else f"{x:.4g}" for x in row) + " |", flush=True)
        args.output and args.output.open("a").write(json.dumps(dict(zip(names, row, strict=True))) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import generate

    generate.command(main)
