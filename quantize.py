"""int8 and int4 weights of linear layers, and the command that writes a checkpoint directory of them.

python quantize.py --mode int4                                   the default model, into DIR-int4-g32
python quantize.py --mode int8 --checkpoint_path DIR --out NEW
python quantize.py --mode int4-gptq --calibration FILE --group_size 64      least change of outputs on that text

A weight [N, K] is (code - zero) * scale on disk: int8 [N, K] with a scale a row and no zero, or uint8 [N, K / 2], the
low nibble at even k, with scale and zero [N, K / group]. Packing for a device happens at load. The head is int8 in
either mode; one that is tied to the embedding is quantized at load, and the embedding stays as it is."""

import functools
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kernels import Ops, Packed, TritonPacked, add_leaves, opaque_linear
from scripts import bench, download


class Int8Linear(Packed):
    """8-bit weights with a scale a row. On a CPU, an input is two 8-bit numbers and a scale for each token and leaf:
    sums of integers have no order, so at any number of rows bits are the same, and the speed is that of 8-bit units."""

    @staticmethod
    def from_float(weight: Tensor, group_size: int, factor: None = None) -> dict[str, Tensor]:
        scale = (weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127).bfloat16()
        return {"weight": (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}

    def pack(self, weight: Tensor, leaves: int, scale: Tensor) -> None:
        self.weight, self.scale = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None), scale.float().flatten()
        self.zeros, self.parts, self.parts_dtype = torch.zeros_like(self.scale, dtype=torch.int64), leaves, torch.float
        self.minus, self.times = torch.tensor([[0.0, -1.0], [1.0, 254.0]])[..., None, None]
        self.places = torch.eye(leaves, dtype=torch.int8)[:, :, None]

    def products(self, codes: Tensor, op=torch.ops.onednn.qlinear_pointwise.default) -> Tensor:
        rest = self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        return op(codes.flatten(0, -2), 1.0, 0, *rest).view(*codes.shape[:-1], -1)

    def __call__(self, x: Tensor) -> Tensor:
        x_G = x.unflatten(-1, (self.parts, -1))
        size = torch.linalg.vector_norm(x_G, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
        step = size.clamp(min=1e-30) * (1 / 127)
        x_G = (x_G / step).unsqueeze(-3)
        codes = (torch.addcmul(x_G, x_G.round(), self.minus) * self.times).round().to(torch.int8)
        if self.parts > 1:  # rows that are zero outside one leaf
            codes = (codes.unsqueeze(-2) * self.places).flatten(-2)
        high, low = opaque_linear(codes, self.handle, self.out_features, torch.float32).unbind(-3)
        y = add_leaves((high + low * (1 / 254)) * step, self.bias)
        return y if self.parts > 1 else y.to(x.dtype)


class Int4Linear(Packed):
    """4-bit weights with a scale and a zero for each group along K. PyTorch's kernel on a CPU adds up in one order at
    every number of rows."""

    @staticmethod
    def grid(weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (bf16) and zero (fp16) of a group along the last dimension: 0 and what lies farthest can be had."""
        least, most = weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0)
        scale = ((most - least) / 15).clamp(min=1e-30).bfloat16()
        return scale, (-least / scale.float()).half()

    @staticmethod
    def from_float(weight: Tensor, group_size: int, factor: Tensor | None = None) -> dict[str, Tensor]:
        """Rounded to nearest; with a factor U of H^-1 = U^T U, where H is the sum of x^T x over inputs x, one input
        after the other, and those still to come make up for it (GPTQ, Frantar et al. 2022)."""
        weight, codes, grids = weight.to(torch.float32, copy=True), [], []
        for start in range(0, weight.shape[1], group_size):
            group, later = weight[:, start:].split((group_size, weight.shape[1] - start - group_size), dim=1)
            grids.append(Int4Linear.grid(group))
            scale, zero = (x.float().unsqueeze(1) for x in grids[-1])
            nearest = lambda w, scale=scale, zero=zero: (w / scale + zero).round().clamp(0, 15)
            if factor is None:
                codes.append(nearest(group))
                continue
            errors, rows = torch.zeros_like(group), factor[start : start + group_size, start:]
            for j, row in enumerate(rows):
                codes.append(nearest(group[:, j, None]))
                errors[:, j, None] = (group[:, j, None] - (codes[-1] - zero) * scale) / row[j]
                group[:, j:] -= errors[:, j, None] * row[j:group_size]
            later -= errors @ rows[:, group_size:]
        codes, (scale, zero) = torch.cat(codes, dim=1).to(torch.uint8), zip(*grids, strict=True)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return {"weight": packed, "scale": torch.stack(scale, dim=1), "zero": torch.stack(zero, dim=1)}

    def pack(self, weight: Tensor, leaves: int, scale: Tensor, zero: Tensor) -> None:
        self.parts, self.group, self.leaves = leaves, 2 * weight.shape[1] // scale.shape[1], []
        for part in zip(*(x.chunk(leaves, dim=1) for x in (weight, scale, zero)), strict=True):
            codes, scale, zero = (F.pad(x, (0, 0, 0, -len(x) % 64)) for x in part)
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).int()
            grid = torch.stack((scale, scale.float() * (8 - zero.float())), dim=-1).to(scale.dtype)
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.leaves.append((codes, grid.transpose(0, 1).contiguous()))

    def products(self, x: Tensor, op=torch.ops.aten._weight_int4pack_mm_for_cpu.default) -> Tensor:
        pairs = zip(x.reshape(-1, x.shape[-1]).chunk(self.parts, dim=1), self.leaves, strict=True)
        y = [op(part.contiguous(), codes, self.group, grid.to(x.dtype)) for part, (codes, grid) in pairs]
        return self.whole(y, x)

    def whole(self, leaves: list[Tensor], x: Tensor) -> Tensor:
        """Leaves [M, N or more] side by side, or the only one with its bias, shaped as x."""
        y = torch.cat([leaf[:, : self.out_features] for leaf in leaves], dim=1)
        if self.parts == 1 and self.bias is not None:
            y = (y.float() + self.bias).to(x.dtype)
        return y.view(*x.shape[:-1], -1)


class FastInt4Linear(Int4Linear):
    """The same, which expands the weight for many rows, where that kernel is slow; with other bits."""

    MANY = 32

    def products(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < self.MANY or not self.expands(x.dtype):
            return super().products(x)
        return self.whole([x.reshape(-1, x.shape[-1]) @ self.expanded(x.dtype)], x)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight [K, N] out of the kernel's layout with AVX-512, where a byte holds rows i and i + 32 of 64."""
        codes, grid = self.leaves[0]
        bytes_KN = codes.view(-1, len(grid) * self.group, 32).transpose(0, 1)
        codes = torch.cat((bytes_KN & 15, bytes_KN >> 4), dim=-1).view(-1, self.group, grid.shape[1])
        scale, low = (x.to(dtype).contiguous().unsqueeze(1) for x in grid.unbind(-1))
        return torch.addcmul(low - 8 * scale, codes.to(dtype), scale).flatten(0, 1)

    @staticmethod
    @functools.cache
    def expands(dtype: torch.dtype) -> bool:
        """Whether this machine has that layout: one-hot rows give back the same weight either way."""
        codes, ones = torch.arange(4096).view(128, 32).to(torch.uint8), torch.ones(128, 2)
        layer, one_hot = FastInt4Linear(codes, None, 1, ones, ones), torch.eye(64, dtype=dtype)
        return torch.equal(Int4Linear.products(layer, one_hot), layer.expanded(dtype))


LINEARS = {"int8": Int8Linear, "int4": Int4Linear}


def parts(mode: str | None, weight: Tensor, group_size: int, factor: Tensor | None = None) -> dict[str, Tensor]:
    """A float weight as a checkpoint of that mode has it, by kind."""
    return LINEARS[mode].from_float(weight, group_size, factor) if mode else {"weight": weight}


def shapes(mode: str | None, rows: int, in_features: int, group_size: int) -> dict[str, tuple[int, int]]:
    """The shapes of what `parts` makes."""
    groups = rows, in_features // group_size
    grid = {"int8": {"scale": (rows, 1)}, "int4": {"scale": groups, "zero": groups}}
    return {"weight": (rows, in_features // 2 if mode == "int4" else in_features)} | grid.get(mode, {})


def pack(ops: Ops, weight: Tensor, bias: Tensor | None = None, leaves: int = 1, **grid: Tensor) -> Packed:
    """What `parts` makes, in the layout of the kernel that an op table has for it."""
    if not grid:
        return ops.pack(weight, bias, leaves)
    kind = Int8Linear if "zero" not in grid else Int4Linear if ops.exact else FastInt4Linear
    return (TritonPacked if weight.is_cuda else kind)(weight, bias, leaves if ops.exact else 1, *grid.values())


def calibration(model, tokens_NT: Tensor) -> dict[str, Tensor]:
    """The factors that from_float takes, by the names of weights, from one pass of a float model over a text."""
    (N, T), factors = tokens_NT.shape, {}

    def measure(layer, args):
        x = args[0].flatten(0, -2).float()
        squares = x.T @ x
        squares.diagonal().add_(0.01 * squares.diagonal().mean() + (squares.diagonal() == 0))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares))
        factors.update(dict.fromkeys(layer.shapes, torch.linalg.cholesky(inverse, upper=True)))

    for layer in model.layers.modules():
        if hasattr(layer, "packed"):
            layer.register_forward_pre_hook(measure)
    model(tokens_NT, torch.arange(T).expand(N, T), model.new_cache(N, T), T, last=True)
    return factors


@torch.inference_mode()
def main(own, argv: list[str]) -> None:
    from generate import FAST, ModelConfig, Tokenizer, Transformer, load_checkpoint, read_json, refuse, refusing, say

    mode, source, factors = own.mode.removesuffix("-gptq"), Path(own.checkpoint_path), {}
    if argv or own.mode not in ("int8", "int4", "int4-gptq") or bool(own.calibration) != (own.mode == "int4-gptq"):
        refuse("expected --mode int8, --mode int4 or --mode int4-gptq --calibration FILE, see --help")
    config = ModelConfig.from_file(source / "config.json")
    suffix = f"-g{own.group_size}" if mode == "int4" else ""
    out = Path(own.out or f"{source.resolve()}-{own.mode}{suffix}")
    if out.exists():
        refuse(f"{out} exists: move it away or choose another --out")
    build = lambda config: Transformer(config, FAST, torch.device("cpu"), torch.bfloat16)
    progress = lambda i, n: sys.stderr.isatty() and say(f"\r{i}/{n}", end="\r" if i < n else "\n")
    target = build(config.quantized(mode, own.group_size))
    if own.calibration:
        with refusing(f"--calibration {own.calibration} cannot be read", OSError, ValueError):
            ids = Tokenizer(source).encode(Path(own.calibration).read_text(encoding="utf-8"))[: own.tokens]
        window = min(1024, config.context, len(ids)) or refuse(f"--calibration {own.calibration} has no token")
        load_checkpoint(reader := build(config), source, progress)
        factors = calibration(reader, torch.tensor(ids[: len(ids) // window * window]).view(-1, window))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as tmp:
        (work := Path(tmp, out.name)).mkdir()  # a TemporaryDirectory itself is closed to other users
        shard, written = {}, 0

        def write(layer, tensors: list[Tensor], mapped: bool) -> int:
            nonlocal shard, written
            for name, tensor in zip(layer.shapes, tensors, strict=True):
                mode = layer.mode if tensor.dim() == 2 else None
                named = parts(mode, tensor, own.group_size, factors.get(name))
                shard |= (
                    {f"{name.rpartition('.')[0]}.{kind}": t for kind, t in named.items()} if mode else {name: tensor}
                )
            if layer is target.takers[-1] or sum(t.nbytes for t in shard.values()) > 1 << 30:
                save_file(shard, path := work / f"model-{written:05}.safetensors", {"format": "pt"})
                path.chmod(0o644)  # safetensors leaves it closed to other users
                shard, written = {}, written + 1
            return 0

        for layer in target.takers:
            layer.load = functools.partial(write, layer)
        load_checkpoint(target, source, progress)
        for path in [path for kind in ("json", "jinja", "model", "txt") for path in source.glob(f"*.{kind}")]:
            if path.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(path, work)
        how = {"quant_method": "gpt-exact", "mode": mode, "group_size": own.group_size}
        raw = read_json(source / "config.json") | {"quantization_config": how}
        (work / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        work.rename(out)
    print(out)


if __name__ == "__main__":
    defaults = {"checkpoint_path": str(download.DEFAULT), "mode": "", "group_size": 32, "out": "", "calibration": ""}
    bench.command(main, **defaults, tokens=16384)
