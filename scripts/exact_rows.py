"""Linear layers for one row with --deterministic: loops that Inductor writes into the graph, with
the bits that products of many rows have. Of floats they add in the order of oneDNN, which is probed
(lanes.py); of 8 bits they are sums of integers, which have none. Weights are there twice for
that."""

import functools

import torch
from torch import Tensor, nn

import kernels
from kernels import LeafPacked, Packed
from quantize import AMX, MOST_EXACT, Int4Linear, Int8Linear
from scripts.grouped import with_groups
from scripts.lanes import LANES, RowInLanes, in_turn

MOST_CODES = 6 << 20  # a larger weight in 8 bits is no slower by FBGEMM
MANY_ROWS = 16  # from which on leaves in 8 bits are multiplied apart
MOST_IN_ONE_CALL = 3 << 19  # bytes of 4 bits that a row reads for all products of stacked leaves


class ExactCodes(Int8Linear):
    """A weight in 8 bits whose sums of one row in a compiled graph are loops, in int32 and of
    several outputs side by side: codes [leaves, N / LANES, K / leaves, LANES]. Many rows multiply
    each leaf apart, which is less work than all products of stacked leaves, and more calls."""

    def pack(self, weight: Tensor, scale: Tensor, exact: bool) -> None:
        super().pack(weight, scale, exact)
        leaves = weight.chunk(self.leaves, dim=1)
        codes = None
        if len(weight) % LANES == 0:
            codes = torch.stack(leaves).unflatten(1, (-1, LANES)).mT.contiguous()
        self.register_buffer("codes", codes)
        alone = self.leaves == 1
        self.apart = [] if alone else [Int8Linear(x, scale=scale, exact=exact) for x in leaves]

    def sums(self, steps: Tensor) -> Tensor:
        rows = steps.shape[:-2].numel()
        many = MANY_ROWS
        if torch.compiler.is_compiling():
            if rows == 1 and self.codes is not None:
                return self.sums_in_loops(steps)
            many = 2  # one graph for all
        if self.apart and rows >= many:
            parts = zip(self.apart, steps.split(1, dim=-2), strict=True)
            return torch.cat([leaf.sums(part) for leaf, part in parts], dim=-2)
        return super().sums(steps)

    def sums_in_loops(self, steps: Tensor) -> Tensor:
        row = steps.flatten(0, -2).to(torch.int32)
        # A strided view is of a tensor in memory: else each output would compute its input anew.
        row = row.as_strided(row.shape, row.stride()).view(self.leaves, 1, -1, 1)
        sums = (self.codes.to(torch.int32) * row).sum(2, dtype=torch.int32)
        return sums.float().view(*steps.shape[:-1], -1)


class InGraph(nn.Module):
    """A weight in 4 bits whose products of few rows are PyTorch's own op in a compiled graph, with
    no Python between. Many rows, or a number that varies, may take the weight expanded."""

    def __init__(self, packed: Int4Linear):
        super().__init__()
        self.packed = packed
        codes, grids = zip(*packed.leaf_weights, strict=True)
        stacked = torch.cat(codes)
        packed.leaf_weights = list(zip(stacked.chunk(packed.leaves), grids, strict=True))
        for i, (leaf, _) in enumerate(packed.leaf_weights):
            setattr(packed, f"codes_{i}", leaf)  # a view: nothing is there twice
        self.register_buffer("codes", stacked)
        self.register_buffer("grid", torch.cat(grids, dim=1))
        self.in_one_call = stacked.numel() * packed.leaves <= MOST_IN_ONE_CALL

    def forward(self, x: Tensor) -> Tensor:
        packed, rows = self.packed, x.shape[:-1].numel()
        few = isinstance(rows, int) and rows < packed.expands_from
        if not torch.compiler.is_compiling() or not few:
            return packed.forward(x)
        parts = x.reshape(rows, packed.leaves, -1).movedim(1, 0).contiguous()
        at_once = rows == 1 and self.in_one_call
        products = self.products_at_once(parts) if at_once else self.products_apart(parts)
        leaves = [y[:, : packed.shape[-1]].reshape(*x.shape[:-1], -1) for y in products]
        if packed.leaves > 1:
            return kernels.add_leaves(leaves, packed.bias)
        return leaves[0] if packed.bias is None else (leaves[0] + packed.bias).to(x.dtype)

    def products_at_once(self, parts: Tensor) -> list[Tensor]:
        """Of all leaves with all parts of a row, of which some are wanted: in one call."""
        op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        grid = self.grid.to(parts.dtype)
        y = op(parts.flatten(0, 1), self.codes, self.packed.group, grid)
        return [y[i, None].chunk(len(parts), 1)[i] for i in range(len(parts))]

    def products_apart(self, parts: Tensor) -> list[Tensor]:
        return [self.packed.leaf_product(part, i) for i, part in enumerate(parts)]


@functools.cache
def size_of_parts(N: int, K: int) -> int | None:
    """How many numbers oneDNN adds up before it begins anew, in bf16; None where its order is
    another one, as with AVX2."""
    outputs = min(N, 1 << 14)  # more of them would show nothing new
    x, weight = kernels.cancelling((1,), (outputs,), K, torch.bfloat16)
    with kernels.one_thread():
        want = kernels.product_in_tiles(x, kernels.blocked(weight), None, [16])
    terms = (in_turn(x) * in_turn(weight).float()).T.contiguous()
    for size in sorted({K, 1024, 512, K // 2}):
        parts = [terms[i : i + size] for i in range(0, K, size)]
        sums = [functools.reduce(torch.add, part) for part in parts]
        if torch.equal(functools.reduce(torch.add, sums).to(want.dtype), want[0]):
            return size
    return None


def prepared_exactly(
    packed: Packed, dtype: torch.dtype, one_slot: bool, fits_twice: bool
) -> nn.Module:
    """With --deterministic: what has the same bits in loops, or in the graph as PyTorch's op, or in
    fewer calls. A float weight is there twice for that."""
    kind = type(packed)
    if kind is Int8Linear:
        return with_exact_codes(packed, one_slot and fits_twice)
    if kind is not LeafPacked or not fits_twice:
        return packed
    N, K = packed.leaf_weights[0].shape
    if one_slot and dtype == torch.bfloat16 and N % LANES == K % 2 == 0:
        if size := size_of_parts(N, K):
            return RowInLanes(packed, packed.leaf_weights, size)
    return with_groups(packed, dtype) if packed.leaves > 1 else packed


def with_exact_codes(packed: Int8Linear, one_slot: bool) -> Int8Linear:
    """With each leaf apart, and for one slot with its codes once more if they are few."""
    codes = codes_of(packed)
    looped = one_slot and codes.numel() <= MOST_CODES and codes.shape[1] <= MOST_EXACT
    looped = looped and packed.shape[-1] % LANES == 0
    if packed.leaves == 1 and not looped:
        return packed
    weight = torch.cat(codes.chunk(packed.leaves), dim=1)
    how = (packed.bias, packed.leaves, packed.partial)
    layer = ExactCodes(weight, *how, scale=packed.scale[:, None], exact=True)
    layer.codes = layer.codes if looped else None
    return layer


def codes_of(packed: Int8Linear) -> Tensor:
    """Its codes, int8 [leaves * N, K / leaves], out of the kernel's layout."""
    if AMX:
        return packed.weight.to_dense().T.contiguous()
    weight, _ = torch.ops.quantized.linear_unpack(*packed.packed)
    return weight.int_repr()
