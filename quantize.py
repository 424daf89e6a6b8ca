"""int8 and int4 weights of linear layers, and the command that writes a checkpoint directory of them.

python quantize.py --mode int4                                   the default model, into DIR-int4-g32
python quantize.py --mode int8 --checkpoint_path DIR --out NEW
python quantize.py --mode int4-gptq --calibration FILE --group_size 64      least change of outputs on that text

A weight [N, K] is (code - zero) * scale on disk: int8 [N, K] with a scale a row and no zero, or uint8 [N, K / 2], the
low nibble at even k, with scale and zero [N, K / group]. Packing for a device happens at load. The head is int8 in
either mode (int4 would be no faster on a CPU), and a copy of its own where it was tied."""

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kernels import BATCH_INVARIANT, FAST, Ops, Packed, TritonPacked, add_leaves, linear
from model import ModelConfig, Transformer, load_checkpoint, read_json, refuse, refusing
from scripts import bench, download


def cut(part: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """One of `size` shares of a quantized weight, its scale or its zero, along N (dim 0) or K (1)."""
    return part if part.shape[dim] == 1 else part.chunk(size, dim)[rank]


class Quantized(Packed):
    """A weight [N, K] packed for PyTorch's kernels on a CPU, which add up in one order at every M but are slow for many
    rows: there, where bits do not matter (not `exact`), the weight is expanded. Each leaf is rounded once."""

    def __init__(self, weight, bias, leaves: int, exact: bool, scale, zero=None):
        super().__init__(weight[:0], bias)
        parts = {"weight": weight, "scale": scale} | ({} if zero is None else {"zero": zero})
        self.nbytes += sum(part.nbytes for part in parts.values())
        self.exact, self.opaque, self.out_features, self.leaves = exact, leaves == 1, len(weight), []
        if leaves > 1:
            shares = ({kind: cut(part, 1, i, leaves) for kind, part in parts.items()} for i in range(leaves))
            self.leaves, self.weight = [type(self)(bias=None, leaves=1, exact=exact, **share) for share in shares], None
        else:
            self.pack(**parts)

    def __call__(self, x: Tensor) -> Tensor:
        if self.leaves:
            pairs = zip(x.chunk(len(self.leaves), dim=-1), self.leaves, strict=True)
            return add_leaves(torch.stack([linear(*pair) for pair in pairs]), self.bias, x.dtype)
        x_MK, self.scale = x.reshape(-1, x.shape[-1]).contiguous(), self.scale.to(x.dtype)
        few = self.exact or len(x_MK) < self.MANY or not self.expands(x.dtype)
        y = (self.few if few else self.many)(x_MK)[:, : self.out_features].view(*x.shape[:-1], -1)
        return y if self.bias is None else add_leaves(y[None], self.bias, x.dtype)


class Int8Linear(Quantized):
    """8-bit weights with a scale a row."""

    MANY, expands = 12, staticmethod(lambda dtype: True)

    @staticmethod
    def from_float(weight: Tensor, group_size: int, factor: None = None) -> dict[str, Tensor]:
        scale = (weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127).bfloat16()
        return {"weight": (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}

    def pack(self, weight: Tensor, scale: Tensor) -> None:
        self.weight, self.scale = weight.contiguous(), scale.flatten()

    def few(self, x_MK: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_MK, self.weight, self.scale)

    def many(self, x_MK: Tensor) -> Tensor:
        return F.linear(x_MK, self.weight.to(x_MK.dtype)) * self.scale


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] of the two numbers in each byte [N, K / 2]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


class Int4Linear(Quantized):
    """4-bit weights with a scale and a zero for each group along K."""

    MANY = 48

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

    def pack(self, weight: Tensor, scale: Tensor, zero: Tensor) -> None:
        weight, scale, zero = (F.pad(x, (0, 0, 0, -len(x) % 64)) for x in (nibbles(weight).int(), scale, zero))
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)
        self.group, scale = weight.shape[1] // scale.shape[1], scale.float()
        self.scale = torch.stack((scale, scale * (8 - zero.float())), dim=-1).transpose(0, 1).contiguous()

    def few(self, x_MK: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, self.weight, self.group, self.scale)

    def many(self, x_MK: Tensor) -> Tensor:
        """The weight [K, N] that the kernel computes with, out of its layout with AVX-512: bytes for rows i, i + 32."""
        bytes_KN = self.weight.view(-1, len(self.scale) * self.group, 32).transpose(0, 1)
        codes = torch.cat((bytes_KN & 15, bytes_KN >> 4), dim=-1).sub_(8).view(torch.int8)
        scale, low = self.scale.unsqueeze(1).unbind(-1)
        return x_MK @ torch.addcmul(low, codes.view(-1, self.group, scale.shape[-1]).to(scale.dtype), scale).flatten(
            0, 1
        )

    @staticmethod
    @functools.cache
    def expands(dtype: torch.dtype) -> bool:
        """Whether this machine has that layout: one-hot rows give back the same weight either way."""
        codes, one_hot = torch.arange(4096).view(128, 32).to(torch.uint8), torch.eye(64, dtype=dtype)
        layer = Int4Linear(codes, None, 1, True, *torch.rand(2, 128, 2))
        return torch.equal(layer(one_hot), layer.many(one_hot))


LINEARS = {"int8": Int8Linear, "int4": Int4Linear}


def table(ops: Ops) -> Ops:
    """The same table, which also packs quantized weights."""

    def pack(weight, bias=None, leaves=1, scale=None, zero=None):
        exact = ops is BATCH_INVARIANT
        if scale is None:
            return ops.pack(weight, bias, leaves)
        if weight.is_cuda:
            return TritonPacked(weight, bias, leaves if exact else 1, scale, zero)
        rest = (scale,) if zero is None else (scale, zero)
        return (Int8Linear if zero is None else Int4Linear)(weight, bias, leaves if exact else 1, exact, *rest)

    return replace(ops, pack=pack)


def quantized(config: ModelConfig, mode: str, group_size: int) -> ModelConfig:
    """What a model is after quantization."""
    if config.mode:
        refuse(f"the checkpoint is {config.mode} already, expected one that is not quantized")
    return replace(config, mode=mode, group_size=group_size, tied=False)


def convert(source: Transformer, config: ModelConfig, fill: Callable, sink: Callable, factors: dict | None = None):
    """Have `fill` load the source; instead, each layer's tensors, quantized as `config` says, go by name to `sink`."""

    def feed(layer, tensors: list[Tensor], mapped: bool) -> int:
        named = dict(zip(layer.shapes, tensors, strict=True))
        head = {"lm_head.weight": tensors[0]} if source.config.tied else {}
        weights = head if layer is source.embed else {name: w for name, w in named.items() if w.dim() == 2}
        for name, weight in weights.items():
            mode = "int8" if name == "lm_head.weight" else config.mode
            parts = LINEARS[mode].from_float(weight, config.group_size, (factors or {}).get(name))
            named |= {name.removesuffix("weight") + kind: part for kind, part in parts.items()}
        sink(named, mapped)
        return 0

    for layer in source.takers:
        layer.load = functools.partial(feed, layer)
    fill(source)


def load_named(model: Transformer, named: dict[str, Tensor], mapped: bool) -> None:
    """Fill those layers of a model whose tensors are given."""
    for layer in model.takers:
        if named.keys() >= layer.shapes.keys():
            model.nbytes += layer.load([named[name] for name in layer.shapes], mapped)


def calibration(model: Transformer, tokens_NT: Tensor) -> dict[str, Tensor]:
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
    mode, directory = own.mode.removesuffix("-gptq"), Path(own.checkpoint_path)
    if argv or own.mode not in ("int8", "int4", "int4-gptq") or bool(own.calibration) != (own.mode == "int4-gptq"):
        refuse("expected --mode int8, --mode int4 or --mode int4-gptq --calibration FILE, see --help")
    config = ModelConfig.from_file(directory / "config.json")
    target, suffix = quantized(config, mode, own.group_size), f"-g{own.group_size}" if mode == "int4" else ""
    out = Path(own.out or f"{directory.resolve()}-{own.mode}{suffix}")
    if out.exists():
        refuse(f"{out} exists: move it away or choose another --out")
    build = lambda config: Transformer(config, table(FAST), torch.device("cpu"), torch.bfloat16)
    progress = lambda i, n: sys.stderr.isatty() and print(f"\r{i}/{n}", end="\r" if i < n else "\n", file=sys.stderr)
    fill = lambda model: load_checkpoint(model, directory, progress)
    build(target)  # refuses a group_size that does not fit
    tensors, factors = {}, {}
    if own.calibration:
        import generate

        with refusing(f"--calibration {own.calibration} cannot be read", OSError, ValueError):
            ids = generate.Tokenizer(directory).encode(Path(own.calibration).read_text(encoding="utf-8"))[: own.tokens]
        window = min(1024, config.context, len(ids)) or refuse(f"--calibration {own.calibration} has no token")
        fill(reader := build(config))
        factors = calibration(reader, torch.tensor(ids[: len(ids) // window * window]).view(-1, window))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as tmp:
        (work := Path(tmp, out.name)).mkdir()  # a TemporaryDirectory itself is closed to other users
        convert(build(config), target, fill, lambda named, mapped: tensors.update(named), factors)
        save_file(tensors, work / "model.safetensors", {"format": "pt"})
        (work / "model.safetensors").chmod(0o644)  # safetensors leaves it closed to other users
        for path in [path for kind in ("json", "jinja", "model", "txt") for path in directory.glob(f"*.{kind}")]:
            if path.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(path, work)
        how = {"quant_method": "gpt-exact", "mode": mode, "group_size": own.group_size}
        raw = read_json(directory / "config.json") | {"tie_word_embeddings": False, "quantization_config": how}
        (work / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        work.rename(out)
    print(out)


if __name__ == "__main__":
    sys.modules["quantize"] = sys.modules["__main__"]  # what generate.py imports: one copy of this module
    defaults = {"checkpoint_path": str(download.DEFAULT), "mode": "", "group_size": 32, "out": "", "calibration": ""}
    bench.command(main, **defaults, tokens=16384)
