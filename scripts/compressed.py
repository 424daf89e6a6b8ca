"""The formats of compressed-tensors, and of FP8 that has a byte a number as well."""

from collections.abc import Callable

import torch

from scripts.codes import FLOATS, Codes, Layer, Weight, bytes_of, chosen, codes_of, group_in
from scripts.files import Refusal
from scripts.settings import json_object

PACKED = "pack-quantized"
TYPES = {  # of numbers, by format
    PACKED: ["int"],
    "int-quantized": ["int"],
    "float-quantized": ["float"],
    "naive-quantized": ["int", "float"],  # the older name of both
}


def compressed_tensors(config: dict) -> Callable[[Layer], Weight]:
    """Of several groups of settings, each layer has that which its tensors fit."""
    chosen(config, "quantization_status", ["compressed"], "compressed")
    for name in ("transform_config", "sparsity_config"):
        more = json_object(config, name)
        if more and more.get("format") != "dense":
            raise Refusal(f"{name} {more} is not supported, expected none")
    found = []
    groups = json_object(config, "config_groups")
    for name in groups:
        scheme = json_object(groups, name)
        weights = json_object(scheme, "weights")
        layout = scheme.get("format") or config.get("format")
        chosen({"format": layout}, "format", list(TYPES))
        chosen(weights, "type", TYPES[layout], "int")
        found.append(pack_quantized(weights) if layout == PACKED else plain(weights))
    if not found:
        raise Refusal("config_groups is empty, expected settings of weights")

    def weight(layer: Layer) -> Weight:
        for scheme in found:
            try:
                return scheme(layer)
            except Refusal as error:
                refusal = error
        raise refusal

    return weight


def pack_quantized(config: dict) -> Callable[[Layer], Weight]:
    """weight_packed I32 [N, K * bits / 32] of codes around 0 and 2^(bits - 1) more, weight_scale
    [N, K / group] and, packed along N, weight_zero_point [N * bits / 32, K / group]."""
    bits = chosen(config, "num_bits", [4, 8])
    strategy = chosen(config, "strategy", ["group", "channel"])
    size = group_in(config) if strategy == "group" else None
    symmetric = chosen(config, "symmetric", [True, False], True)
    is_ordered = config.get("actorder") in ("group", True)  # "weight" has groups of neighbours

    def weight(layer: Layer) -> Weight:
        packed = layer.take("weight_packed", ["I32"])
        N, words = packed.get_shape()
        K = 32 // bits * words
        shape = layer.take("weight_shape", ["I64", "I32"], (2,))[:].tolist()
        if shape != [N, K]:
            raise Refusal(f"{layer.stem}.weight_shape says {shape}, expected {[N, K]} of its codes")
        group = min(size or K, K)
        scale = layer.take("weight_scale", FLOATS, (N, -(-K // group)))
        zeros = None
        if not symmetric:
            rows = -(-N * bits // 32)
            zeros = layer.take("weight_zero_point", ["I32"], (rows, -(-K // group)))
        layer.check_order("weight_g_idx", K, group, is_ordered)

        def read() -> Codes:
            codes, grid = bytes_of(packed[:]), scale[:]
            zero = torch.full(grid.shape, 1 << bits - 1, dtype=torch.uint8)
            if zeros is not None:
                zero = codes_of(zeros[:].t(), bits).t()[:N]
            return Codes(codes, group, grid, zero, in_pairs=bits == 4)

        return Weight((N, K), bits, group, read, symmetric)

    return weight


def plain(config: dict) -> Callable[[Layer], Weight]:
    """weight I8 or F8_E4M3 [N, K] and weight_scale, one of all, of a row, of a group or of a block
    [N / rows, K / columns]; of integers also weight_zero_point."""
    dtype = "F8_E4M3" if config.get("type") == "float" else "I8"
    chosen(config, "num_bits", [8])
    strategy = chosen(config, "strategy", ["tensor", "channel", "group", "block"])
    block = {"tensor": None, "channel": (1, None), "group": (1, group_in(config))}.get(strategy)
    if strategy == "block":
        block = block_in(config, "block_structure")
    symmetric = chosen(config, "symmetric", [True, False], True)

    def weight(layer: Layer) -> Weight:
        more = [] if symmetric else ["weight_zero_point"]
        return in_blocks(layer, dtype, block, "weight_scale", *more)

    return weight


def block_in(config: dict, name: str) -> tuple[int, int]:
    block = config.get(name)
    is_list = isinstance(block, list) and len(block) == 2
    if not is_list or any(type(size) is not int or size < 1 for size in block):
        raise Refusal(f"{name} is {block!r}, expected two integers > 0")
    return tuple(block)


def in_blocks(layer: Layer, dtype: str, block: tuple | None, *grids: str) -> Weight:
    """A weight that has a byte a number, and a scale and perhaps a zero for each block, or one."""
    weight = layer.take("weight", [dtype])
    N, K = weight.get_shape()
    rows, columns = block or (N, K)
    rows, group = min(rows, N), min(columns or K, K)
    counts = (-(-N // rows), -(-K // group))
    shapes = [counts] if block else [(), (1,), (1, 1)]
    if block == (1, None):
        shapes.append((N,))
    slices = [layer.take(grids[0], FLOATS, *shapes)]
    slices += [layer.take(kind, ["I8"], *shapes) for kind in grids[1:]]

    def read() -> Codes:
        found = []
        for part in slices:
            grid = part[...]  # of which some have no dimension
            found.append(grid.reshape(counts).repeat_interleave(rows, dim=0)[:N])
        return Codes(weight[:], group, *found)

    return Weight((N, K), 8, group, read, dtype == "I8" and len(grids) == 1)
