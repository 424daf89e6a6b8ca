"""int8 and int4 weights of linear layers, and the command that writes a checkpoint directory of them.

python quantize.py --mode int4 --group_size 64 --checkpoint_path DIR --out NEW     without them: the default model, 32

On disk a weight [N, K] is (code - zero) * scale: int8 [N, K] with a scale a row and no zero, or uint8 [N, K / 2], the
low nibble at even k, with scale and zero [N, K / group]. The head is int8 either way, or on disk a tied embedding."""

import itertools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import AMX, Ops, Packed, TritonPacked, add_leaves, opaque_linear
from scripts import download


class Int8Linear(Packed):
    """8-bit weights with a scale a row. On a CPU, an input is two 7-bit numbers and a scale for each token and leaf:
    sums of integers have no order, so bits are the same at any number of rows, and 8-bit units make them. With an
    eighth bit, units without VNNI would cut off pairs of products at 2^15."""

    @staticmethod
    def from_float(weight: Tensor, group_size: int) -> dict[str, Tensor]:
        scale = (weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127).bfloat16()
        return {"weight": (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}

    def pack(self, weight: Tensor, leaves: int, scale: Tensor) -> None:
        self.parts, self.fast = max(leaves, 1), AMX and not leaves
        # Leaves are stacked: one product of them all and of those of an input has all that is wanted, and is quick.
        weight, scale = torch.cat(weight.chunk(self.parts, dim=1)), scale.float().flatten().repeat(self.parts)
        zeros = torch.zeros_like(scale, dtype=torch.int64)
        if AMX:  # oneDNN, quick at many rows with AMX
            args = torch.ops.onednn.qlinear_prepack(weight, None), scale, zeros, None, 1.0, 0
            self.op, self.args = torch.ops.onednn.qlinear_pointwise.default, (*args, torch.float32, "none", [], "")
        else:  # FBGEMM, of which a call takes half the time
            with warnings.catch_warnings(action="ignore"):  # there is no other way in than a type that is deprecated
                codes = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            self.args = (torch.ops.quantized.linear_prepack(codes, None),)
            self.op = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def products(self, codes: Tensor) -> Tensor:
        return self.op(codes, 1.0, 64, *self.args)

    def __call__(self, x: Tensor) -> Tensor:
        if self.fast and x.dtype != torch.float16 and x.shape[:-1].numel() >= 64 and not torch.compiler.is_compiling():
            y = x @ self.args[0].to_dense().to(x.dtype) * self.args[1].to(x.dtype)
            return y if self.bias is None else (y + self.bias).to(x.dtype)
        x_GK = x.unflatten(-1, (self.parts, -1)).float()
        step = x_GK.abs().amax(-1, keepdim=True).clamp(min=1e-30) * (1 / 63)
        high = (x_GK := x_GK / step).round()
        codes = torch.stack((high, (x_GK - high).mul_(126).round_()), dim=-3)
        codes = (codes + 64).to(torch.uint8) if AMX else codes
        sums = opaque_linear(codes.flatten(0, -2), self.handle, (self.parts * self.out_features,), torch.float32)
        sums = sums.view(*codes.shape[:-1], self.parts, -1).diagonal(dim1=-3, dim2=-2).transpose(-1, -2)
        high, low = sums.unbind(-3)
        y = add_leaves((low * (1 / 126)).add_(high).mul_(step), self.bias)
        return y if self.parts > 1 or self.partial else y.to(x.dtype)


class Int4Linear(Packed):
    """4-bit weights with a scale and a zero for each group along K. On a CPU, PyTorch's kernel adds up in one order at
    every number of rows, but slowly for many: there, if no leaf is asked for, the weight is expanded."""

    @staticmethod
    def from_float(weight: Tensor, group_size: int) -> dict[str, Tensor]:
        """Rounded to nearest between two limits, 0 among them: of the least and the largest of a group, and of some
        narrower pairs, each group has those that change it least (clipping of AWQ, Lin et al. 2023, without data)."""
        w = weight.float().unflatten(1, (-1, group_size))
        least, most, best = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0), None
        for low, high in itertools.product((1, 0.92, 0.84, 0.76), repeat=2):
            scale = ((high * most - low * least) / 15).clamp(min=1e-30).bfloat16()
            zero = (-low * least / scale).half()
            codes = (w / scale + zero).round().clamp(0, 15)
            now = (w - (codes - zero) * scale).square().sum(-1, keepdim=True), codes, scale, zero
            best = [torch.where(now[0] < best[0], *pair) for pair in zip(now, best, strict=True)] if best else now
        _, codes, scale, zero = (x.flatten(1) for x in best)
        return {"weight": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), "scale": scale, "zero": zero}

    def pack(self, weight: Tensor, leaves: int, scale: Tensor, zero: Tensor) -> None:
        self.parts, self.leaves = max(leaves, 1), []
        self.many = math.inf if leaves or torch.backends.cpu.get_cpu_capability() != "AVX512" else 32 if AMX else 80
        self.group = 2 * weight.shape[1] // scale.shape[1]
        for part in zip(*(x.chunk(self.parts, dim=1) for x in (weight, scale, zero)), strict=True):
            codes, scale, zero = (F.pad(x, (0, 0, 0, -len(x) % 64)) for x in part)
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).int()
            grid = torch.stack((scale, scale.float() * (8 - zero.float())), dim=-1).to(scale.dtype)
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.leaves.append((codes, grid.transpose(0, 1).contiguous()))

    def products(self, x: Tensor, op=torch.ops.aten._weight_int4pack_mm_for_cpu.default) -> Tensor:
        x_MK, N = x.reshape(-1, x.shape[-1]), self.out_features
        if len(x_MK) >= self.many:
            y = [x_MK @ self.expanded(x.dtype)]
        else:
            pairs = zip(x_MK.chunk(self.parts, dim=1) if self.parts > 1 else [x_MK], self.leaves, strict=True)
            y = [op(part.contiguous(), codes, self.group, grid.to(x.dtype)) for part, (codes, grid) in pairs]
        y = [leaf[:, :N].view(*x.shape[:-1], N) for leaf in y]
        return y if self.parts > 1 else y[0] if self.bias is None else (y[0] + self.bias).to(x.dtype)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight [K, N] out of the kernel's layout with AVX-512, where a byte holds rows i and i + 32 of 64."""
        codes, grid = self.leaves[0]
        bytes_KN = codes.view(-1, len(grid) * self.group, 32).transpose(0, 1)
        codes = torch.cat((bytes_KN & 15, bytes_KN >> 4), dim=-1).view(-1, self.group, grid.shape[1])
        scale, low = (x.to(dtype).contiguous().unsqueeze(1) for x in grid.unbind(-1))
        return torch.addcmul(low - 8 * scale, codes.to(dtype), scale).flatten(0, 1)


LINEARS = {"int8": Int8Linear, "int4": Int4Linear}


def parts(mode: str | None, weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """A float weight as a checkpoint of that mode has it, by kind."""
    return LINEARS[mode].from_float(weight, group_size) if mode else {"weight": weight}


def pack(ops: Ops, weight: Tensor, bias: Tensor | None = None, leaves: int = 1, **grid: Tensor) -> Packed:
    """What `parts` makes, in the layout of the kernel that an op table has for it."""
    kind = TritonPacked if weight.is_cuda else Int4Linear if "zero" in grid else Int8Linear
    return kind(weight, bias, leaves if ops.exact else 0, *grid.values()) if grid else ops.pack(weight, bias, leaves)


def main() -> None:
    args = generate.parse_args(mode="", out="")
    args.mode in LINEARS or generate.refuse("expected --mode int8 or --mode int4")
    download.write_quantized(args.checkpoint_path or download.DEFAULT, args.out, args.mode, args.group_size)


if __name__ == "__main__":
    import generate

    generate.command(main)
