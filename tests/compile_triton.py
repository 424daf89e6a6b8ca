"""Compile the Triton kernels for a card that need not be there, in every way that they are
launched, and print of each: card, kernel, weight, launch, bytes of shared memory, of registers
moved out to memory, loads ahead of their use and not, in the loop, kinds of products, how many
numbers along k a thread has side by side: 2 where k ascends, more where tensor cores are given it
permuted; and the machine's instructions of the loop.

python tests/compile_triton.py 89 90"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from scripts import row_kernels
from tests import masks

WHOLE = "i32"
VARIES = ("M", "T", "L")  # a call's own, no multiple of anything
ANYWHERE = {"rms_norm": ("x", "weight", "y")}  # pointers that a kernel takes as they come
LAUNCHES = dict(kernels.TritonPacked.LAUNCHES)
LAUNCHES["16, few"] = LAUNCHES[16] | {"num_stages": 7}
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Weight(NamedTuple):
    """The types of x, w, scale and grid, bytes of a number of x and of w, and the group."""

    x: str
    w: str
    scale: str | None
    grid: str | None
    x_size: int
    w_size: int
    group: int


WEIGHTS = {
    "bf16": Weight("*bf16", "*bf16", None, None, 2, 2, 1),
    "int8": Weight("*bf16", "*i32", "*bf16", None, 2, 1, 1),
    "int4": Weight("*bf16", "*i32", None, "*i32", 2, 1, 32),
    "fp32": Weight("*fp32", "*fp32", None, None, 4, 4, 1),
}


class Compiled(NamedTuple):
    shared: int  # bytes of shared memory
    ptx: str
    text: str  # Triton's own
    code: list[tuple[int, str]]  # the instructions of the machine, with their addresses


def compile_kernel(arch: int, function, options, constants: dict, types: dict) -> Compiled:
    """Pointers and sizes are multiples of 16, as those of all models are."""
    constants = constants | {name: None for name, kind in types.items() if kind is None}
    signature = {}
    attributes = {}
    for i, name in enumerate(function.arg_names):
        kind = "constexpr" if name in constants else types[name]
        signature[name] = kind
        varies = VARIES + ANYWHERE.get(function.__name__, ())
        if kind[:1] in ("*", "i") and name not in varies:
            attributes[(i,)] = [["tt.divisibility", 16]]
    placed = {(function.arg_names.index(name),): x for name, x in constants.items()}
    source = ASTSource(function, signature, placed, attributes)
    options = options | {"enable_fp_fusion": False}
    made = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    code = disassembled(made.asm["cubin"])
    return Compiled(made.metadata.shared, made.asm["ptx"], made.asm["ttgir"], code)


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [DISASSEMBLER, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)
    return [(int(address, 16), instruction) for address, instruction in found]


def spilled(made: Compiled) -> int:
    """How many registers are stored to memory, for want of room."""
    return sum("STL" in instruction for _, instruction in made.code)


def length_of_loop(made: Compiled) -> int:
    """The instructions of the innermost loop with a product of tensor cores, 0 without one."""
    lengths = []
    for end, instruction in made.code:
        jump = re.search(r"BRA.*?(0x[0-9a-f]+)", instruction)
        start = int(jump[1], 16) if jump else end
        body = [text for address, text in made.code if start <= address <= end]
        if start < end and any("MMA" in text for text in body):
            lengths.append(len(body))
    return min(lengths, default=0)


def compile_linear(arch: int, function, weight: Weight, launch: dict) -> Compiled:
    blocks = {key: n for key, n in launch.items() if key.startswith("BLOCK")}
    most_k = launch["BLOCK_K"] * 2 // weight.x_size
    blocks["BLOCK_K"] = min(128 // weight.w_size, most_k)
    blocks["GROUP"] = weight.group
    options = {key: n for key, n in launch.items() if key.startswith("num")}
    types = {"x": weight.x, "w": weight.w, "scale": weight.scale, "grid": weight.grid}
    types |= {"bias": "*bf16", "y": weight.x}
    types |= dict.fromkeys(("M", "N", "K", "leaf"), WHOLE)
    return compile_kernel(arch, function, options, blocks, types)


def compile_attention(
    arch: int, function, kind: str, tile, stages, absent: str, mask=kernels.causal
) -> Compiled:
    """Of 8 KV heads with 4 queries each; `absent` is the argument that is None."""
    constants = {"G": 8, "R": 4, "D": 128, "D_PAD": 128, "SPLIT": kernels.SPLIT, "TILE": tile}
    jit = kernels.triton_kernels().jit
    constants[absent] = None
    constants |= {"SEES": mask, "FIRST": None}
    numbers = ()
    if isinstance(mask, tuple):
        numbers = (type(mask)(*[WHOLE] * len(mask)),)
        constants["SEES"] = type(mask).__call__
    constants["SEES"] = jit(constants["SEES"])
    if hasattr(mask, "first"):
        constants["FIRST"] = jit(type(mask).first)
    types = {"q": kind, "k_cache": kind, "v_cache": kind, "pos": "*i64", "parts": "*fp32"}
    types |= {"y": kind, "scale": "fp32", "heads": "*i64", "mask": numbers}
    types |= dict.fromkeys(("T", "L", "q_token", "q_head"), WHOLE)
    options = {"num_warps": 4, "num_stages": stages}
    return compile_kernel(arch, function, options, constants, types)


def compile_row_kernels(arch: int) -> dict[str, Compiled]:
    """By name, of rows of 4096 numbers in fp32, and of twice 14336 in bfloat16."""
    functions = row_kernels.row_kernels()
    options = {"num_warps": 4}
    types = {"x": "*fp32", "weight": "*fp32", "y": "*bf16", "eps": "fp32", "n": WHOLE}
    norm = compile_kernel(arch, functions.rms_norm, options, {"N_PAD": 4096}, types)
    types = {"gate_up": "*bf16", "y": "*bf16", "n": WHOLE}
    block = {"BLOCK": row_kernels.BLOCK}
    silu = compile_kernel(arch, functions.silu_mul, options, block, types)
    return {"rms_norm": norm, "silu_mul": silu}


def describe_product(made: Compiled) -> list:
    """Loads ahead of their use and not, kinds of products, numbers side by side along k, length of
    the loop."""
    loop = made.ptx[made.ptx.find("cp.async.wait") : made.ptx.rfind("mma")]
    kinds = set(re.findall(r"(wgmma.mma_async|mma).sync.aligned.m\d+n\d+(k\d+)", made.ptx))
    ahead = len(re.findall("cp.async.c[ag]", made.ptx))
    late = len(re.findall("ld.global", loop))
    widths = map(int, re.findall(r"kWidth = (\d+)", made.text))
    side_by_side = max(widths, default=2)  # none: it reads shared memory
    kinds = ", ".join(" ".join(kind) for kind in kinds)
    return [ahead, late, kinds, side_by_side, length_of_loop(made)]


def describe_kernels(arch: int) -> None:
    functions = kernels.triton_kernels()
    stages = 3 if arch == 90 else 2
    kinds = {"bf16": (64, stages), "fp32": (32, 1)}  # tile and stages of attention
    weights = dict(WEIGHTS)
    if arch != 90:  # fp32 uses no tensor cores, so its code is that of the other cards
        del kinds["fp32"], weights["fp32"]
    for name, weight in weights.items():
        for most, launch in LAUNCHES.items():
            made = compile_linear(arch, functions.linear, weight, launch)
            row = (arch, "linear", name, most, made.shared, spilled(made))
            print(*row, *describe_product(made), sep="|")

    for kind, (tile, stages) in kinds.items():
        for absent in "parts", "y", "k_cache":  # all at once, one split, the sum of splits
            made = compile_attention(arch, functions.attention, f"*{kind}", tile, stages, absent)
            how = f"no {absent}"
            row = (arch, "attention", kind, how, made.shared, spilled(made), *[""] * 4)
            print(*row, length_of_loop(made), sep="|")

    for name, made in compile_row_kernels(arch).items():
        divisions = ", ".join(re.findall(r"div\.\w+\.f32", made.ptx))
        print(arch, name, "", "", made.shared, spilled(made), *[""] * 2, divisions, "", "", sep="|")

    for mask in (masks.Sinks(4, 21), masks.odd_or_near) if arch == 90 else ():
        made = compile_attention(arch, functions.attention, "*bf16", 64, 2, "parts", mask)
        row = (arch, "attention", "bf16", "a fork's", made.shared, spilled(made), *[""] * 4)
        print(*row, length_of_loop(made), sep="|")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        describe_kernels(int(argument))
