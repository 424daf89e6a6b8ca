"""A float weight for one row: loops that Inductor writes into a compiled graph over several outputs
side by side. A row of a weight alone ends in a sum over the numbers of a vector, which takes as
long as many of its products."""

import functools

import torch
from torch import Tensor, nn

import kernels
from kernels import Packed

LANES = 16  # outputs that are added up side by side


class RowInLanes(nn.Module):
    """A packed weight that multiplies one row in a compiled graph by a copy of its own. Each of the
    leaves [N, K] is cut into `size` numbers at a time along K, whose sums are added up in turn: of
    each such part, a buffer [leaves, N / LANES, size, LANES] in the order of these sums."""

    def __init__(self, packed: Packed, leaves: list[Tensor], size: int):
        super().__init__()
        self.packed = packed
        weight = torch.stack([leaf.to_dense() for leaf in leaves])
        weight = in_turn(weight).unflatten(1, (-1, LANES)).mT
        self.size = size
        for i, part in enumerate(weight.split(size, dim=2)):
            self.register_buffer(f"part_{i}", part.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or x.shape[:-1].numel() > 1:
            return self.packed.forward(x)
        row = in_turn(x.flatten().float())
        # A strided view is of a tensor in memory: else each output would compute its input anew.
        row = row.as_strided(row.shape, row.stride()).view(len(self.part_0), 1, -1, 1)
        sums = []
        for i, part in enumerate(row.split(self.size, dim=2)):
            weight = self.get_buffer(f"part_{i}")
            sums.append((weight.float() * part).sum(2))
        leaves = functools.reduce(torch.add, sums).flatten(1)
        bias = self.packed.bias
        if len(leaves) == 1 and bias is not None:
            leaves = leaves + bias
        leaves = [leaf.view(*x.shape[:-1], -1) for leaf in leaves.to(x.dtype)]
        return leaves[0] if len(leaves) == 1 else kernels.add_leaves(leaves, bias)


def in_turn(x: Tensor) -> Tensor:
    """Numbers along K as the instruction for dot products of bf16 adds them: of each pair, the
    second one first."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
