"""Compile the Triton kernels for a card that need not be there, in every way that they are launched, and print of each:
kernel, weight, launch, bytes of shared memory, loads ahead of their use and not, in the loop, and kinds of products.

python tests/compile_triton.py 90"""

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

HALF, WHOLE = "*bf16", "i32"
LINEAR = {  # types of x, w, scale and grid, bytes of a number of w, and its group
    "bf16": (HALF, HALF, None, None, 2, 1),
    "int8": (HALF, "*i8", HALF, None, 1, 1),
    "int4": (HALF, "*u8", None, "*i32", 1, 32),
    "fp32": ("*fp32", "*fp32", None, None, 4, 1),
}


def compiled(function, options, constants, **types):
    """(bytes of shared memory, PTX); pointers and sizes are multiples of 16, as of all models, but for a call's own."""
    constants |= {name: None for name, kind in types.items() if kind is None}
    order, place = function.arg_names, lambda name: (function.arg_names.index(name),)
    types = {name: "constexpr" if name in constants else types[name] for name in order}
    even = [name for name in order if types[name][0] in "*i" and name not in ("M", "T", "L", "window")]
    attrs = {place(name): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(function, types, {place(name): x for name, x in constants.items()}, attrs)
    target, options = GPUTarget("cuda", int(sys.argv[1]), 32), options | {"enable_fp_fusion": False}
    made = triton.compile(source, target, options)
    return made.metadata.shared, made.asm["ptx"]


def main():
    functions = kernels.triton_kernels()
    for name, (x, w, scale, grid, size, group) in LINEAR.items():
        for most, launch in kernels.TritonPacked.LAUNCHES.items():
            blocks = {key: n for key, n in launch.items() if key.startswith("BLOCK")}
            blocks |= {"BLOCK_K": min(128 // size, launch["BLOCK_K"]), "GROUP": group}
            options = {key: n for key, n in launch.items() if key.startswith("num")}
            types = {"x": x, "w": w, "scale": scale, "grid": grid, "bias": HALF, "y": x}
            types |= dict.fromkeys(("M", "N", "K", "leaf"), WHOLE)
            shared, ptx = compiled(functions.linear, options, blocks, **types)
            loop = ptx[ptx.find("cp.async.wait") : ptx.rfind("mma")]
            kinds = set(re.findall(r"(wgmma.mma_async|mma).sync.aligned.m\d+n\d+(k\d+)", ptx))
            kinds = ", ".join(" ".join(kind) for kind in kinds)
            row = len(re.findall("cp.async.c[ag]", ptx)), len(re.findall("ld.global", loop)), kinds
            print("linear", name, most, shared, *row, sep="|")
    for x, tile, stages in (HALF, 64, 2), ("*fp32", 32, 1):
        for absent in "parts", "y", "k_cache":  # all at once, one split, the sum of splits
            constants = {"G": 8, "GROUP": 4, "D": 128, "D_PAD": 128, "SPLIT": kernels.SPLIT, "TILE": tile, absent: None}
            types = {"q": x, "k_cache": x, "v_cache": x, "pos": "*i64", "parts": "*fp32", "y": x, "scale": "fp32"}
            types |= dict.fromkeys(("T", "L", "window"), WHOLE)
            options = {"num_warps": 4, "num_stages": stages}
            shared, _ = compiled(functions.attention, options, constants, **types)
            print("attention", x[1:], f"no {absent}", shared, "", "", "", sep="|")


if __name__ == "__main__":
    main()
