"""The machine: how fast it reads memory, how much of it a run takes, and what makes it read faster.
Also random weights, for where there is no checkpoint, and the stats of a run."""

import contextlib
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import timeit
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from scripts import drafts, hardware, outputs
from scripts.checkpoint import Refusal
from scripts.requests import Request
from scripts.sampler import Sampler, compile_integer_parts

M_TRIM_THRESHOLD = -1  # names of glibc's mallopt and of Linux's madvise
M_MMAP_THRESHOLD = -3
MADV_COLLAPSE = 25
HUGE_PAGE = 2 << 20
LEAST_READ = 256 << 20  # bytes that tell how fast memory is


def seconds_to_read(data: Tensor) -> float:
    if data.is_cuda:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # it counts milliseconds

    began = time.perf_counter()
    data.sum()
    return time.perf_counter() - began


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a device reads from its memory: the best of five sums of four times
    what its caches hold, of 256 MB at least, and otherwise of no more than half of what is
    free."""
    size = int(min(4 * hardware.caches(), hardware.free_memory() / 2))
    size = max(size, LEAST_READ)
    if device.type == "cuda":
        # A card reads 256 MB in the time of a few launches.
        free, _ = torch.cuda.mem_get_info(device)
        size = min(4 << 30, free // 2)
    data = torch.ones(size // 4, device=device)
    return data.nbytes / min(seconds_to_read(data) for _ in range(5))


def peak_memory(device: torch.device) -> int:
    """Bytes. On a GPU, the most that PyTorch has had at once. On Linux, the anonymous memory now:
    the peak that the system knows (VmHWM) counts mapped files as well. Elsewhere 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else []:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def memory(device: torch.device) -> float:
    """Bytes that a device has in all, with what can be swapped out; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    path = Path("/proc/meminfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line.split() for line in text.splitlines()]
    found = {words[0]: int(words[1]) << 10 for words in lines}
    return found["MemTotal:"] + found["SwapTotal:"] if found else math.inf


def check_fits(device: torch.device, needed: int, what: str) -> None:
    """Raise Refusal for more than all memory of a device, before any is asked for."""
    total = memory(device)
    if needed > total:
        size = f"{needed / 1e9:.0f} GB"
        raise Refusal(f"{what} takes {size} or more, and {device} has {total / 1e9:.0f} GB")


def check_cache_fits(model, batch_size: int, length: int) -> None:
    """Raise Refusal for a KV cache of more than all memory."""
    numbers = 2 * len(model.layers) * len(model.heads) * model.config.head_dim
    needed = batch_size * length * numbers * model.dtype.itemsize
    check_fits(model.device, needed, f"a cache of {batch_size} x {length} tokens")


def tune_memory(device: torch.device, huge_pages: bool) -> None:
    """After loading: have the allocator keep the memory it has, and move that to huge pages."""
    if sys.platform != "linux" or device.type != "cpu":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return

    # glibc gives freed buffers back to the kernel and takes page faults for the next ones, which is
    # a third of the time of a prefill.
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 20)
    libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)
    if huge_pages:
        collapse_pages(libc)


def collapse_pages(libc: ctypes.CDLL) -> None:
    """Move anonymous memory to huge pages. It takes up to four seconds for each gigabyte; what it
    brings depends on the CPU, from nothing to a third of the time of a step."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses = line.split()[0]
        start, end = (int(address, 16) for address in addresses.split("-"))
        is_file = "/" in line
        if end - start >= HUGE_PAGE and not is_file:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


def randomize(model, seed: int = 0) -> None:
    """Fill a model with random weights: matrices normal, deviation 0.02; vectors all ones. Modules
    that name the same tensor, as a tied head does, get the same."""
    generator = torch.Generator(model.device).manual_seed(seed)
    options = {"generator": generator, "device": model.device, "dtype": model.dtype}
    takers = Counter(name for module in model.loaders for name in module.shapes)
    shared = {}
    for module in model.loaders:
        tensors = []
        for name, shape in module.shapes.items():
            if name in shared:
                tensor = shared[name]
            else:
                tensor = torch.randn(shape, **options).mul_(0.02)
                tensor = tensor if len(shape) > 1 else torch.ones_like(tensor)
            if takers[name] > 1:
                shared[name] = tensor
            tensors.append(tensor)
        model.nbytes += module.load(tensors)


@dataclass
class Stats:
    """What an engine has done so far."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    new_tokens: int = 0  # those of decoding, and the first one of each completion
    steps: int = 0  # passes of decoding, each of which reads all weights
    first_token_seconds: float = 0.0
    accept_counts: list[int] = field(default_factory=list)  # [i]: rounds that made i + 1 tokens


def per_second(amount: float, seconds: float) -> float:
    """0 where nothing was done."""
    return amount / seconds if seconds else 0.0


def report(
    stats: Stats, model, load_s: float, compile_s: float, as_json: bool, note: str = ""
) -> None:
    """Print the stats: as a line of JSON if that is asked for, and in words on standard error, with
    a note if there is one."""
    decode = per_second(stats.decode_tokens, stats.decode_seconds)
    prefill = per_second(stats.prefill_tokens, stats.prefill_seconds)
    gb_s = per_second(model.nbytes * stats.steps, stats.decode_seconds) / 1e9
    if as_json:
        line = {
            "decode_tokens_per_sec": decode,
            "prefill_tokens_per_sec": prefill,
            "time_to_first_token_s": stats.first_token_seconds,
            "load_s": load_s,
            "compile_s": compile_s,
            "new_tokens": stats.new_tokens,
            "model_bytes": model.nbytes,
            "bandwidth_gb_s": gb_s,
            "accept_counts": stats.accept_counts,
            "peak_memory_gb": peak_memory(model.device) / 1e9,
            "deterministic": model.ops.exact,
        }
        print(json.dumps({"stats": line}), flush=True)

    limit = read_bandwidth(model.device) / 1e9  # only now, as it takes memory
    print(
        f"{stats.new_tokens} tokens: decode {decode:.1f} tokens/s, prefill {prefill:.0f} tokens/s, "
        f"first token after {stats.first_token_seconds:.2f} s\n"
        f"load {load_s:.1f} s, compile {compile_s:.1f} s, weights {model.nbytes / 1e9:.2f} GB at "
        f"{gb_s:.1f} GB/s, {gb_s / limit:.0%} of the {limit:.0f} GB/s that this machine reads",
        file=sys.stderr,
    )
    if note:
        print(note, file=sys.stderr)


def find_device(name: str | None, world: int) -> torch.device:
    """The device of that name; without one a CUDA device, if there is any, else the CPU. Of several
    processes each has its own. Raises Refusal."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK')}"
    choices = ", ".join(["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())])
    why = f"--device {name} is not available, choose from {choices}"
    # PyTorch knows more names than it has devices, and says so in all kinds of ways.
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError, TypeError) as error:
        raise Refusal(why) from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # where Triton launches its kernels
    return torch.device(name)


def set_up(model, compile_decode: bool, compile_prefill: bool) -> None:
    """Make every global setting, after loading, and compile what is to be compiled."""
    tune_memory(model.device, huge_pages=compile_decode)
    if (compile_decode or compile_prefill) and model.device.type == "cpu":
        check_compiler(model)
    if compile_prefill:
        model.prefill = compiled(model, [1], dynamic=True)
    if compile_decode:
        logits = compiled_copy(type(model).logits, model)
        model.decode_logits = logits.__get__(model)
        model.decode = compiled(model, [3, 4, 2])
        model.verify = compiled(model, [3, 4, 2])
        capturable = all(block.capturable for block in model.layers)
        model.graphed = model.device.type == "cuda" and capturable
        if model.device.type == "cuda":
            compile_integer_parts()


def check_compiler(model) -> None:
    if model.ops.exact and torch.__version__ < (2, 13):  # whose code keeps fp32 where eager rounds
        raise Refusal("--deterministic --compile needs PyTorch 2.13 here")
    compiler = os.environ.get("CXX", "g++")
    if not compiles(compiler):
        raise Refusal(f"--compile needs a C++ compiler, g++ or that of $CXX: {compiler} is none")
    # Inductor warns of what it does itself, for int8.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")


def compiles(compiler: str) -> bool:
    """Whether it makes an object of a line of C++."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "line.o")
        argv = [compiler, "-x", "c++", "-c", "-", "-o", str(out)]
        options = {"input": b"int x;", "capture_output": True, "timeout": 60, "check": False}
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            subprocess.run(argv, **options)
        return out.exists()


def compiled(model, sizes: list[int], **more) -> Callable:
    """The model's stack, of which a run of layers is compiled once for all runs that differ in
    nothing but their tensors. Of `sizes` it has the first that divides the layers, else the last
    one: a longer run has fewer calls, and compiles for longer."""
    layers = list(model.layers)
    size = next((n for n in sizes if len(layers) % n == 0), sizes[-1])
    functions, runs = {}, []
    for start in range(0, len(layers), size):
        some = slice(start, start + size)
        kinds = tuple(map(kind_of, layers[some]))
        if kinds not in functions:
            functions[kinds] = compiled_copy(type(model).stack, model, **more)
        runs.append((functions[kinds], layers[some], some))

    def stack_of_runs(layers, x, views, cache):
        masks = {id(mask): mask for *_, mask in views}
        for mask in masks.values():
            if not isinstance(mask[0], int):  # as on a GPU
                # Its keys grow with the text: one graph for all.
                torch._dynamo.maybe_mark_dynamic(mask[0], 4)
        for run, part, some in runs:
            x = run(part, x, views[some], cache[some])
        return x

    return stack_of_runs


def compiled_copy(function: Callable, model, **more) -> Callable:
    """A function of a model, compiled. PyTorch keeps graphs by code object, so each has its own."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options = model.ops.compile_options | {"guard_filter_fn": arguments_alone}
    options |= {"size_asserts": False, "alignment_asserts": False}
    options["cpp.vec_isa_ok"] = True  # to try vector instructions would take most of the time
    return torch.compile(own, fullgraph=True, options=options, **more)


def kind_of(layer) -> str:
    """What its compiled code depends on: the modules in it with their plain attributes, and the
    shapes of its tensors."""
    found = []
    for name, module in layer.named_modules():
        attributes = [item for item in vars(module).items() if is_plain(item[1])]
        shapes = [(key, x.shape, x.dtype) for key, x in module.named_buffers(recurse=False)]
        found.append((name, type(module), attributes, shapes))
    return repr(found)


def is_plain(value) -> bool:
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def arguments_alone(guards) -> list[bool]:
    """Which of them to check at a call: nothing else than a stack's arguments ever changes."""
    modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    marks = "DIMENSION_DYNAMIC_MARKING_GUARD"
    pairs = zip(guards, modules, strict=True)
    return [keep and not guard.is_global and guard.guard_type != marks for guard, keep in pairs]


@torch.inference_mode()
def warm_up(engine, row: Request) -> float:
    """Compile and probe all that steps need. Returns how many accepted drafts make up for what a
    round that checks drafts takes longer than a step, at best of three each."""
    batch = len(engine.slots)
    row = replace(row, max_new_tokens=engine.length)  # as long as any
    sampler = Sampler([row] * batch, engine.model.device)
    engine.prefill([0] * 5, 0)

    def step(engine, tokens: int) -> None:
        engine.step([[0] * tokens] * batch, [0] * batch, sampler)[0].tolist()

    if isinstance(engine.drafter, drafts.DraftModel):
        step(engine.drafter.engine, drafts.FED)
    one = min(timeit.repeat(lambda: step(engine, 1), repeat=3, number=1))
    several = min(timeit.repeat(lambda: step(engine, engine.k + 1), repeat=3, number=1))
    return several / one - 1


@contextlib.contextmanager
def profile(path: Path | None):
    """Write a trace of what runs within to a file, if one is named. Raises Refusal."""
    if path is None:
        yield
        return
    with outputs.new_trace(path) as work:
        with torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(work)
