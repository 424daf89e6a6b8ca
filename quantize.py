"""int8 and int4 weights of linear layers, and the command that writes a directory of them:

python quantize.py --mode int4 --group_size 64 --checkpoint_path DIR --out NEW

On disk a weight [N, K] is (code - zero) * scale: int8 [N, K] with a scale a row [N, 1] and no zero,
or uint8 [N, K / 2], low nibbles at even k, with both [N, K / group]. The head is int8, or tied."""

import itertools
import math
import warnings

if __name__ == "__main__":  # the command imports this file as a module
    from scripts import interrupts

    interrupts.end_quietly()
    from scripts import quantized

    quantized.main()

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Fast, Packed, TritonPacked, add_leaves, opaque_linear

AMX = torch.cpu._is_amx_tile_supported()
MOST_EXACT = 2**24 // (64 * 127)  # products of 7 and 8 bits that fp32 adds exactly, int32 of 14


class Int8Linear(Packed):
    """8-bit weights with a scale a row. On a CPU, an input is a 14-bit number and a scale a token
    and leaf, and multiplied as two of 7 bits: sums of integers have no order. (Of 8 bits, units
    without VNNI cut off at 2^15.)"""

    @staticmethod
    def from_float(weight: Tensor, group_size: int) -> dict[str, Tensor]:
        largest = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
        scale = (largest / 127).bfloat16()
        codes = (weight / scale.float()).round().clamp(-127, 127)
        return {"weight": codes.to(torch.int8), "scale": scale}

    def pack(self, weight: Tensor, scale: Tensor, exact: bool) -> None:
        # Leaves are stacked: one quick product of them all and those of an input has all we want.
        weight = torch.cat(weight.chunk(self.leaves, 1))
        self.register_buffer("scale", scale.float().flatten())
        ones = torch.ones(len(weight))
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        if AMX:  # oneDNN, quick at many rows with AMX
            self.register_buffer("weight", torch.ops.onednn.qlinear_prepack(weight, None))
            self.op = torch.ops.onednn.qlinear_pointwise.default
            self.packed = (self.weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        else:  # FBGEMM: oneDNN without AMX takes twice the time, and 20 times that for a head
            with warnings.catch_warnings(action="ignore"):  # of the only type that leads there
                codes = torch._make_per_channel_quantized_tensor(weight, ones.double(), zeros, 0)
            self.op = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
            self.packed = (torch.ops.quantized.linear_prepack(codes, None),)

    def products(self, codes: Tensor) -> Tensor:
        return self.op(codes, 1.0, 64, *self.packed)

    def forward(self, x: Tensor) -> Tensor:
        x_GK = x.unflatten(-1, (self.leaves, -1)).float()
        largest = x_GK.abs().amax(-1, keepdim=True)
        step = largest.clamp(min=1e-30) * (1 / 8127)  # 63 x 128 + 63
        sums = self.sums((x_GK / step).round_())
        leaves = sums.mul_(step).mul_(self.scale)
        y = add_leaves(leaves.unbind(-2), self.bias)
        return y if self.leaves > 1 or self.partial else y.to(x.dtype)

    def sums(self, steps: Tensor) -> Tensor:
        """Of whole numbers, fp32 [..., leaves, K / leaves], sums [..., leaves, N], rounded once."""
        high = (steps + 64).mul_(1 / 128).floor_()
        codes = torch.stack((high, torch.sub(steps, high, alpha=128)))
        if AMX:
            codes = (codes + 64).to(torch.uint8)
        outputs = (math.prod(self.shape),)
        sums = opaque_linear(codes.flatten(0, -2), self.handle, outputs, torch.float32)
        sums = sums.view(*codes.shape[:-1], self.leaves, -1)
        high, low = sums.diagonal(dim1=-3, dim2=-2).mT  # of each leaf, with its part of the input
        return torch.add(low, high, alpha=128)


class Int4Linear(Packed):
    """4-bit weights with a scale and a zero for each group along K. PyTorch's kernel adds up in one
    order at every number of rows; where bits may differ, many take the weight expanded, quicker."""

    @staticmethod
    def from_float(weight: Tensor, group_size: int) -> dict[str, Tensor]:
        """Rounded to nearest between limits, 0 among them: of the least and the largest of a group,
        or narrower ones that change it less (clipping of AWQ, Lin et al. 2023, without data)."""
        w = weight.float().unflatten(1, (-1, group_size))
        least = w.amin(-1, keepdim=True).clamp(max=0)
        most = w.amax(-1, keepdim=True).clamp(min=0)
        best = None
        for low, high in itertools.product((1, 0.92, 0.84, 0.76), repeat=2):
            width = high * most - low * least
            scale = (width / 15).clamp(min=1e-30).bfloat16()
            zero = (-low * least / scale).half()
            codes = (w / scale).add_(zero).round_().clamp_(0, 15)
            changed = codes.sub_(zero).mul_(scale)
            error = changed.sub_(w).square_().sum(-1, keepdim=True)
            found = [error, scale, zero]
            best = best or found
            better = error < best[0]
            best = [torch.where(better, *pair) for pair in zip(found, best, strict=True)]
        _, scale, zero = best
        codes = (w / scale).add_(zero).round_().clamp_(0, 15)
        low, high = codes.flatten(1).unflatten(1, (-1, 2)).unbind(2)
        pairs = (low + 16 * high).to(torch.uint8)
        return {"weight": pairs, "scale": scale.flatten(1), "zero": zero.flatten(1)}

    def pack(self, weight: Tensor, scale: Tensor, zero: Tensor, exact: bool) -> None:
        self.group = 2 * weight.shape[1] // scale.shape[1]
        self.expands_from = math.inf  # so many rows
        if not exact and torch.backends.cpu.get_cpu_capability() == "AVX512":
            self.expands_from = 32 if AMX else 80
        self.leaf_weights = []
        chunks = (x.chunk(self.leaves, 1) for x in (weight, scale, zero))
        for i, leaf in enumerate(zip(*chunks, strict=True)):
            rows = (0, 0, 0, -len(weight) % 64)
            pairs, scale, zero = (F.pad(x, rows) for x in leaf)
            codes = torch.stack((pairs & 15, pairs >> 4), dim=-1)
            codes = codes.flatten(1).int()
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            middle = (scale.float() * (8 - zero.float())).to(scale.dtype)  # the value of code 8
            grid = torch.stack((scale, middle), dim=-1).transpose(0, 1)
            self.leaf_weights.append((codes, grid.contiguous()))
            self.register_buffer(f"codes_{i}", codes)  # where tools look for them
            self.register_buffer(f"grid_{i}", self.leaf_weights[i][1])

    def products(self, x: Tensor) -> Tensor:
        x_MK, N = x.reshape(-1, x.shape[-1]), self.shape[-1]
        if len(x_MK) >= self.expands_from:
            leaves = [x_MK @ self.expanded(x.dtype)]
        else:
            parts = x_MK.chunk(self.leaves, 1)
            leaves = [self.leaf_product(part, i) for i, part in enumerate(parts)]
        y = torch.stack(leaves, 1) if self.leaves > 1 else leaves[0]
        y = y[..., :N].reshape(*x.shape[:-1], *self.shape)
        if self.leaves > 1:
            return y
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def leaf_product(self, x_MK: Tensor, i: int) -> Tensor:
        codes, grid = self.leaf_weights[i]
        op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return op(x_MK.contiguous(), codes, self.group, grid.to(x_MK.dtype))

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight [K, N], of whose rows a byte of AVX-512's layout holds i and i + 32 of 64."""
        grid = self.grid_0.to(dtype)
        bytes_KN = self.codes_0.view(-1, len(grid) * self.group, 32).transpose(0, 1)
        codes = torch.cat((bytes_KN & 15, bytes_KN >> 4), dim=-1)
        codes = codes.view(-1, self.group, grid.shape[1]).to(dtype)
        scale, middle = (x.contiguous().unsqueeze(1) for x in grid.unbind(-1))
        return torch.addcmul(middle - 8 * scale, codes, scale).flatten(0, 1)


LINEARS = {"int8": Int8Linear, "int4": Int4Linear}


def quantized(mode: str | None, weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """The tensors of a float weight [N, K] in a checkpoint of that mode, by kind."""
    if mode is None:
        return {"weight": weight}
    rows = len(weight) if weight.is_cuda else max(1, 2**17 // weight.shape[1])  # in a CPU's cache
    parts = [LINEARS[mode].from_float(part, group_size) for part in weight.split(rows)]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


def pack(mode: str | None, ops: Fast, tensors: dict, bias=None, leaves=1, partial=False) -> Packed:
    """What `quantized` makes, in the layout of the kernel that an op table has for it."""
    if mode is None:
        return ops.pack(tensors["weight"], bias, leaves, partial)
    if tensors["weight"].is_cuda:  # where leaves are programs of their own: quicker in any case
        return TritonPacked(bias=bias, leaves=leaves, partial=partial, **tensors)
    leaves = leaves if ops.exact else 1
    return LINEARS[mode](bias=bias, leaves=leaves, partial=partial, exact=ops.exact, **tensors)
