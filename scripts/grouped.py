"""With --deterministic: all leaves of a float weight in one call of oneDNN, where few rows would
take longer for calls than for products. It is a convolution over a picture of one line, whose
points are the rows; their channels are in groups, and a group is a leaf."""

import functools

import torch
from torch import Tensor

import kernels
from kernels import LeafPacked, fill_up

MOST_ROWS = 32  # of more, oneDNN has the weight in another layout
COUNTS = (*range(1, 17), 24, 32)  # of rows that are computed together


def grouped(leaves: list[Tensor], rows: int = MOST_ROWS) -> Tensor:
    """Leaves [N, K], in the blocks that oneDNN has for so many rows. Raises RuntimeError."""
    weight = torch.cat(leaves)[:, :, None, None]
    channels = len(leaves) * leaves[0].shape[1]
    fixed = ([0, 0], [1, 1], [1, 1])  # padding, stride and dilation
    size = [1, channels, 1, rows]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *fixed, len(leaves), size)


def grouped_product(x: Tensor, weight: Tensor, leaves: int) -> Tensor:
    """The products [M, leaves, N] of rows [M, leaves * K], of a weight that `grouped` returned."""
    picture = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
    fixed = ([0, 0], [1, 1], [1, 1], leaves, "none", [], "")
    y = torch.ops.mkldnn._convolution_pointwise.default(picture, weight, None, *fixed)
    return y.permute(0, 2, 3, 1).reshape(len(x), leaves, -1)


def layout(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._get_mkldnn_serialized_md(weight)


@functools.cache
def grouped_counts(N: int, K: int, dtype: torch.dtype, threads: int, leaves: int) -> list[int]:
    """The numbers of rows whose products in groups have the bits of each leaf alone."""
    x, weights = kernels.cancelling((MOST_ROWS,), (leaves, N), K, dtype)
    alone = [kernels.exact_product(x, kernels.blocked(leaf)) for leaf in weights]
    want = torch.stack(alone, dim=1)
    x = x.repeat(1, leaves)  # each leaf has the same part of an input here
    try:
        weight = grouped(list(weights))
        layouts = [layout(grouped(list(weights), rows)) for rows in (1, 16)]
        if not all(torch.equal(other, layout(weight)) for other in layouts):
            return []
        return [n for n in COUNTS if torch.equal(grouped_product(x[:n], weight, leaves), want[:n])]
    except RuntimeError:  # of a dtype that it has not here
        return []


class GroupedLeaves(LeafPacked):
    """A weight that is there twice: few rows multiply its leaves in groups, others one by one."""

    def pack(self, weight: Tensor) -> None:
        super().pack(weight)
        self.register_buffer("groups", grouped(list(weight.chunk(self.leaves, dim=1))))

    def products(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows > MOST_ROWS:
            return super().products(x)
        N, K = self.leaf_weights[0].shape
        counts = grouped_counts(N, K, x.dtype, torch.get_num_threads(), self.leaves)
        count = next((n for n in counts if n >= rows), None)
        if count is None:
            return super().products(x)
        x_MK = fill_up(x.reshape(rows, -1), 0, 0, 0, count - rows).contiguous()
        y = grouped_product(x_MK, self.groups, self.leaves)[:rows]
        return y.view(*x.shape[:-1], *self.shape)


def with_groups(packed: LeafPacked, dtype: torch.dtype) -> LeafPacked:
    """The same weight, with its leaves in groups where these have the same bits for an input of
    that dtype."""
    N, K = packed.leaf_weights[0].shape
    if not grouped_counts(N, K, dtype, torch.get_num_threads(), packed.leaves):
        return packed
    weight = torch.cat([leaf.to_dense() for leaf in packed.leaf_weights], dim=1)
    return GroupedLeaves(weight, packed.bias, packed.leaves, packed.partial)
