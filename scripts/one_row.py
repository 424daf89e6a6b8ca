"""Linear layers for one compiled row: loops over a weight that Inductor writes into the code around
them. The call of a library takes as long as the product of a small weight, and at one row such
loops read memory faster than oneDNN does."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels import Fast, Packed
from model import Linear, Transformer
from quantize import AMX, Int4Linear, Int8Linear

MOST_INPUTS = 4096  # of more, a row does not stay in a core's first cache
MOST_CODES = 6 << 20  # a larger weight in 8 bits is quicker by FBGEMM, and it is there twice


class OneRow(nn.Module):
    """A packed weight that multiplies one row in a compiled graph by what it is made of: weight
    [N, K], and of codes a scale a row. Without these, PyTorch's own op goes into the graph."""

    def __init__(self, packed: Packed, weight: Tensor | None = None, scale: Tensor | None = None):
        super().__init__()
        self.packed = packed
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        if not torch.compiler.is_compiling() or x.shape[:-1].numel() > 1:
            return packed.forward(x)
        if self.weight is None:
            return packed.products(x)

        row = x.flatten().float()
        # A strided view is of a tensor in memory: else each output would compute its input anew.
        row = row.as_strided(row.shape, row.stride())
        y = (self.weight.float() * row).sum(-1)
        if self.scale is not None:
            y = y * self.scale
        if packed.bias is not None:
            y = y + packed.bias
        y = y.view(*x.shape[:-1], -1)
        return y if packed.partial else y.to(x.dtype)


def stream(model: Transformer) -> None:
    """Give the layers of a loaded model what one compiled row takes. A float weight leaves its
    blocks, without which products of several rows take up to twice the time, and prompts of
    hundreds of tokens 1.04 times."""
    if type(model.ops) is not Fast or model.device.type != "cpu":
        return
    for layer in traced_layers(model):
        layer.packed = one_row(layer.packed, layer.dtype)


def traced_layers(module: nn.Module) -> Iterator[Linear]:
    """Those that a compiled graph looks into: of a mixture of experts, it sees a handle."""
    for child in module.children():
        if isinstance(child, Linear):
            yield child
        elif not hasattr(child, "handle"):
            yield from traced_layers(child)


def one_row(packed: Packed, dtype: torch.dtype) -> nn.Module:
    """For an input of that dtype; the layer itself where nothing would be gained."""
    kind = type(packed)
    if kind is Int4Linear:
        # Another grid would be converted at each step, which Inductor does not take there.
        return OneRow(packed) if packed.grid_0.dtype == dtype else packed
    if kind is Int8Linear:
        codes, scale = codes_of(packed)
        small = codes.shape[1] <= MOST_INPUTS and codes.numel() <= MOST_CODES
        return OneRow(packed, codes, scale) if small else packed
    if kind is not Packed or packed.weight.shape[1] > MOST_INPUTS:
        return packed
    if packed.weight.is_mkldnn:
        packed.weight = packed.weight.to_dense()
        packed.operands = (packed.weight, packed.bias)
        packed.opaque = False
    return OneRow(packed, packed.weight)


def codes_of(packed: Int8Linear) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and fp32 [N] out of the kernel's layout."""
    if AMX:
        return packed.weight.to_dense().T.contiguous(), packed.scale
    weight, _ = torch.ops.quantized.linear_unpack(*packed.packed)
    return weight.int_repr(), weight.q_per_channel_scales().float()
