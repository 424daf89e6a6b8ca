"""Linear layers for one row, or a few: there, what surrounds the product of a small weight takes
longer than the product. One compiled row has loops over a weight that Inductor writes into the code
around them; at one row they also read memory faster than oneDNN does (large weights: lanes.py). In
eager code a row of 16 bits multiplies a plain weight, and a few rows of int8 need not become codes:
PyTorch has a product of floats with codes, which is slow for many. With --deterministic, see
exact_rows.py."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import BatchInvariant, Fast, Packed
from model import Linear, Transformer
from quantize import AMX, Int4Linear, Int8Linear
from scripts import hardware
from scripts.exact_rows import MOST_CODES, InGraph, codes_of, prepared_exactly
from scripts.lanes import LANES, RowInLanes

MOST_INPUTS = 4096  # of more, a row does not stay in a core's first cache
LEAST_IN_LANES = 2 << 20  # bytes of a weight that gains by them
MOST_IN_TURN = 1024  # numbers that are added up in turn
FEW_CODES, FEW_ROWS = 2 << 20, 8  # so many at most for the product of floats with codes
MANY_ROWS = 64  # from which on AMX multiplies floats in less time than codes


class OneRow(nn.Module):
    """A packed weight that multiplies one row in a compiled graph by what it is made of: weight
    [N, K], and of codes a scale a row."""

    def __init__(self, packed: Packed, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.packed = packed
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or x.shape[:-1].numel() > 1:
            return self.several_rows(x)
        row = x.flatten().float()
        # A strided view is of a tensor in memory: else each output would compute its input anew.
        row = row.as_strided(row.shape, row.stride())
        y = (self.weight.float() * row).sum(-1)
        if self.scale is not None:
            y = y * self.scale
        return self.finished(y.view(*x.shape[:-1], -1), x.dtype)

    def several_rows(self, x: Tensor) -> Tensor:
        return self.packed.forward(x)

    def finished(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """With the bias, and in that dtype unless other ranks have more of the sum."""
        if self.packed.bias is not None:
            y = y + self.packed.bias
        return y if self.packed.partial else y.to(dtype)


class EagerRow(nn.Module):
    """A float weight of 16 bits that multiplies one row in eager code as a plain matrix: PyTorch's
    own product takes two thirds of oneDNN's time, and is called only where oneDNN is off."""

    def __init__(self, packed: Packed, weight: Tensor):
        super().__init__()
        self.packed = packed
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.shape[:-1].numel() > 1:
            return self.packed.forward(x)
        mkldnn = torch.backends.mkldnn
        enabled = mkldnn.enabled
        mkldnn.enabled = False
        try:
            return F.linear(x, self.weight, self.packed.bias)
        finally:
            mkldnn.enabled = enabled


class FewCodes(OneRow):
    """A small weight in 8 bits. A compiler makes little of the codes of inputs, eager code does
    not."""

    def several_rows(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.shape[:-1].numel() > FEW_ROWS:
            return self.packed.forward(x)
        rows = x.flatten(0, -2).contiguous()
        y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        return self.finished(y.view(*x.shape[:-1], -1), x.dtype)


class ManyCodes(nn.Module):
    """A weight in 8 bits on a processor with AMX, where many rows in eager code take it expanded.
    In fp16 sums of codes would not fit."""

    def __init__(self, packed: Int8Linear):
        super().__init__()
        self.packed = packed
        self.bias, self.partial = packed.bias, packed.partial

    def forward(self, x: Tensor) -> Tensor:
        is_few = x.shape[:-1].numel() < MANY_ROWS
        if is_few or torch.compiler.is_compiling() or x.dtype == torch.float16:
            return self.packed.forward(x)
        codes = self.packed.weight.to_dense().to(x.dtype)
        y = x @ codes * self.packed.scale.to(x.dtype)
        return y if self.bias is None else (y + self.bias).to(x.dtype)


def prepare(model: Transformer, compiled: bool, one_slot: bool) -> None:
    """Give the layers of a loaded model what few rows take: also compiled ones, and in one slot one
    row. Weights are there twice for that, in as much as half of the memory that is free.
    Of more, a float weight leaves its blocks, without which products of several rows take up to
    twice the time, and those of hundreds 1.04 times."""
    if model.device.type != "cpu":
        return
    one_compiled = compiled and one_slot
    fits_twice = model.nbytes < hardware.free_memory() / 2
    for layer in traced_layers(model):
        if compiled and type(layer.packed) is Int4Linear:
            # Another grid would be converted at each step, which Inductor does not take there.
            if layer.packed.grid_0.dtype == layer.dtype:
                layer.packed = InGraph(layer.packed)
        if type(model.ops) is Fast:
            layer.packed = prepared(layer.packed, layer.dtype, one_compiled, fits_twice)
            if one_slot and not compiled:
                layer.packed = for_eager_row(layer.packed, fits_twice)
        elif type(model.ops) is BatchInvariant:
            layer.packed = prepared_exactly(layer.packed, layer.dtype, one_compiled, fits_twice)


def traced_layers(module: nn.Module) -> Iterator[Linear]:
    """Those that a compiled graph looks into: of a mixture of experts, it sees a handle."""
    for child in module.children():
        if isinstance(child, Linear):
            yield child
        elif not hasattr(child, "handle"):
            yield from traced_layers(child)


def prepared(packed: Packed, dtype: torch.dtype, one_slot: bool, fits_twice: bool) -> nn.Module:
    """For an input of that dtype; the layer itself where nothing would be gained."""
    kind = type(packed)
    if kind is Int8Linear:
        return with_codes(packed, dtype, one_slot)
    if kind is not Packed or not one_slot:
        return packed
    weight = packed.weight.to_dense()
    N, K = weight.shape
    is_large = weight.nbytes >= LEAST_IN_LANES
    if fits_twice and is_large and not packed.partial and N % LANES == 0 and K % 2 == 0:
        return RowInLanes(packed, [weight], MOST_IN_TURN)
    if K > MOST_INPUTS:
        return packed
    if packed.weight.is_mkldnn and not fits_twice:
        leave_blocks(packed, weight)
    return OneRow(packed, weight)


def leave_blocks(packed: Packed, weight: Tensor) -> None:
    """Have it multiply by that weight, which is not in oneDNN's blocks."""
    packed.weight = weight
    packed.operands = (weight, packed.bias)
    packed.opaque = False


def for_eager_row(packed: Packed, fits_twice: bool) -> nn.Module:
    """With a plain copy of a float weight that is in blocks of 16 bits."""
    if type(packed) is not Packed or not packed.weight.is_mkldnn or packed.weight.itemsize != 2:
        return packed
    weight = packed.weight.to_dense()
    if not fits_twice:
        leave_blocks(packed, weight)
    return EagerRow(packed, weight)


def with_codes(packed: Int8Linear, dtype: torch.dtype, one_slot: bool) -> nn.Module:
    """With its codes, int8 [N, K], and scales [N], if they are few."""
    codes, scale = codes_of(packed), packed.scale
    packed = ManyCodes(packed) if AMX else packed
    # The product of floats with codes takes scales of their dtype, and reads 16 inputs at a time.
    same = scale.to(dtype)
    if codes.numel() <= FEW_CODES and codes.shape[1] % 16 == 0 and torch.equal(same.float(), scale):
        return FewCodes(packed, codes, same)
    if one_slot and codes.numel() <= MOST_CODES and codes.shape[1] <= MOST_INPUTS:
        return OneRow(packed, codes, scale)
    return packed
