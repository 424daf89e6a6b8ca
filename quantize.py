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

from kernels import BATCH_INVARIANT, FAST, Ops, Packed, TritonPacked, add_leaves, linear, opaque
from model import ModelConfig, Transformer, load_checkpoint, read_json, refuse, refusing
from scripts import bench, download


def cut(part: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """One of `size` shares of a quantized weight, its scale or its zero, along N (dim 0) or K (1)."""
    return part if part.shape[dim] == 1 else part.chunk(size, dim)[rank]


class Int8Linear(Packed):
    """8-bit weights with a scale a row. On a CPU an activation is two 8-bit numbers, the second for what the first one
    leaves (one alone costs 4 % of perplexity), with a scale a token and leaf. Sums of integers are exact at every M."""

    def __init__(self, weight: Tensor, bias: Tensor | None, leaves: int, scale: Tensor):
        super().__init__(weight[:0], bias)
        self.nbytes, self.opaque, self.leaves = self.nbytes + weight.nbytes + scale.nbytes, False, leaves
        self.weight, self.out_features = torch.ops.onednn.qlinear_prepack(weight, None), len(weight)
        self.scale, self.zero = scale.float().flatten(), torch.zeros(len(weight), dtype=torch.int32)

    @staticmethod
    def from_float(weight: Tensor, group_size: int, factor: None = None) -> dict[str, Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "scale": scale}

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (self.leaves, -1))
        top = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        whole = parts * (127 / top)
        high = whole.round()
        codes = torch.stack((high, ((whole - high) * 254).round()), dim=-2).to(torch.int8)
        if self.leaves > 1:  # zero outside a leaf: all of them in one product
            codes = (codes.unsqueeze(-2) * torch.eye(self.leaves, dtype=torch.int8)[:, None, :, None]).flatten(-2)
        high, low = int8_product(codes, self.handle, self.out_features).unbind(-2)
        return add_leaves(((high + low * (1 / 254)) * (top * (1 / 127))).movedim(-2, 0), self.bias, x.dtype)


def int8_output(codes: Tensor, handle: int, n: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], n, dtype=torch.float32)


@opaque("int8_product(Tensor codes, int handle, int n) -> Tensor", int8_output)
def int8_product(codes, handle, n, op=torch.ops.onednn.qlinear_pointwise.default):
    w = Packed.table[handle]
    return op(codes, 1.0, 0, w.weight, w.scale, w.zero, None, 1.0, 0, torch.float32, "none", [], "")


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] of the two numbers in each byte [N, K / 2]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


class Int4Linear(Packed):
    """4-bit weights with a scale and a zero for each group along K. PyTorch's kernel for a CPU adds up in one order at
    every M; for many rows it is slow, and where bits do not matter (not `exact`) the weight is expanded."""

    def __init__(self, weight: Tensor, bias: Tensor | None, leaves: int, scale: Tensor, zero: Tensor, exact: bool):
        super().__init__(weight[:0], bias)
        self.nbytes += weight.nbytes + 4 * scale.numel()
        self.exact, self.opaque, self.leaves, self.out_features = exact, leaves == 1, [], len(weight)
        if leaves > 1:
            chunks = zip(*(part.chunk(leaves, dim=1) for part in (weight, scale, zero)), strict=True)
            self.leaves, self.weight = [Int4Linear(w, None, 1, s, z, exact) for w, s, z in chunks], None
            return
        weight, scale, zero = (F.pad(x, (0, 0, 0, -len(x) % 64)) for x in (nibbles(weight).int(), scale, zero))
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)
        self.group, scale = weight.shape[1] // scale.shape[1], scale.float()
        self.scale_low = torch.stack((scale, scale * (8 - zero.float())), dim=-1).transpose(0, 1).contiguous()

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

    def __call__(self, x: Tensor) -> Tensor:
        if self.leaves:
            pairs = zip(x.chunk(len(self.leaves), dim=-1), self.leaves, strict=True)
            return add_leaves(torch.stack([linear(*pair) for pair in pairs]), self.bias, x.dtype)
        x_MK, self.scale_low = x.reshape(-1, x.shape[-1]).contiguous(), self.scale_low.to(x.dtype)
        if self.exact or len(x_MK) < 48 or not expands(x.dtype):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, self.weight, self.group, self.scale_low)
        else:
            y = x_MK @ self.expanded()
        y = y[:, : self.out_features].view(*x.shape[:-1], -1)
        return y if self.bias is None else add_leaves(y[None], self.bias, x.dtype)

    def expanded(self) -> Tensor:
        """The weight [K, N] that the kernel computes with, out of its layout with AVX-512: bytes for rows i, i + 32."""
        bytes_KN = self.weight.view(-1, len(self.scale_low) * self.group, 32).transpose(0, 1)
        codes = torch.cat((bytes_KN & 15, bytes_KN >> 4), dim=-1).sub_(8).view(torch.int8)
        scale, low = self.scale_low.unsqueeze(1).unbind(-1)
        return torch.addcmul(low, codes.view(-1, self.group, scale.shape[-1]).to(scale.dtype), scale).flatten(0, 1)


@functools.cache
def expands(dtype: torch.dtype) -> bool:
    """Whether this machine has that layout: a product with one-hot rows gives back the expanded weight."""
    layer = Int4Linear(torch.arange(4096).view(128, 32).to(torch.uint8), None, 1, *torch.rand(2, 128, 2), exact=True)
    return torch.equal(layer(torch.eye(64, dtype=dtype)), layer.expanded())


LINEARS = {"int8": Int8Linear, "int4": Int4Linear}


def table(ops: Ops) -> Ops:
    """The same table, which also packs quantized weights."""

    def pack(weight, bias=None, leaves=1, scale=None, zero=None):
        exact = ops is BATCH_INVARIANT
        if scale is None:
            return ops.pack(weight, bias, leaves)
        if weight.is_cuda:
            return TritonPacked(weight, bias, leaves if exact else 1, scale, zero)
        kind, rest = (Int8Linear, ()) if zero is None else (Int4Linear, (zero, exact))
        return kind(weight, bias, leaves if exact else 1, scale, *rest)

    return replace(ops, pack=pack)


def quantized(config: ModelConfig, mode: str, group_size: int) -> ModelConfig:
    """What a model is after quantization."""
    if config.mode:
        refuse(f"the checkpoint is {config.mode} already, expected one that is not quantized")
    return replace(config, mode=mode, group_size=group_size, tied=False)


def convert(source: Transformer, config: ModelConfig, fill: Callable, sink: Callable, factor=lambda name: None) -> None:
    """Have `fill` load the source; instead, each layer's tensors, quantized as `config` says, go by name to `sink`."""

    def feed(layer, tensors: list[Tensor], mapped: bool) -> int:
        named = dict(zip(layer.shapes, tensors, strict=True))
        head = {"lm_head.weight": tensors[0]} if source.config.tied else {}
        weights = head if layer is source.embed else {name: w for name, w in named.items() if w.dim() == 2}
        for name, weight in weights.items():
            mode = "int8" if name == "lm_head.weight" else config.mode
            parts = LINEARS[mode].from_float(weight, config.group_size, factor(name) if mode == "int4" else None)
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


def calibration(model: Transformer, tokens_NT: Tensor) -> Callable[[str], Tensor]:
    """The factor of a weight by name, for from_float. The model reads a text block by block, and whoever asks replaces
    what it has packed for a layer by what was made of that, so that the next block sees inputs as they will be."""
    (N, T), config, factors, passed = tokens_NT.shape, model.config, {}, []
    pos_NT, x_NTD, kv_cache = torch.arange(T).expand(N, T), model.embed(tokens_NT).float(), model.new_cache(N, T)[0]
    cos, sin = model.rope[pos_NT].unsqueeze(2).unbind(3)

    def forward(i: int) -> Tensor:
        mask_mod, heads = model.mask_mods[config.windows[i]], (config.n_heads, config.n_kv_heads)
        mask = model.ops.mask(mask_mod, pos_NT, T, heads, model.dtype)
        return model.layers[i][1](model.layers[i][0](x_NTD, cos, sin, pos_NT, mask, *kv_cache))

    def measure(layer, args):
        x = args[0].flatten(0, -2).float()
        squares = x.T @ x
        squares.diagonal().add_(0.01 * squares.diagonal().mean() + (squares.diagonal() == 0))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares))
        factors.update(dict.fromkeys(layer.shapes, torch.linalg.cholesky(inverse, upper=True)))

    def factor(name: str) -> Tensor:
        nonlocal x_NTD
        while name not in factors:
            x_NTD = forward(len(passed) - 1) if passed else x_NTD
            factors.clear()
            layers = [layer for layer in model.layers[len(passed)].modules() if hasattr(layer, "packed")]
            hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
            passed.append(forward(len(passed)).shape)
            for hook in hooks:
                hook.remove()
        return factors[name]

    return factor


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
    tensors, model, more = {}, build(target), []
    if own.calibration:
        import generate

        with refusing(f"--calibration {own.calibration} cannot be read", OSError, ValueError):
            ids = generate.Tokenizer(directory).encode(Path(own.calibration).read_text(encoding="utf-8"))[: own.tokens]
        window = min(1024, config.context, len(ids))
        if not window:
            refuse(f"--calibration {own.calibration} has no token")
        fill(reader := build(config))
        more = [calibration(reader, torch.tensor(ids[: len(ids) // window * window]).view(-1, window))]

    def sink(named: dict[str, Tensor], mapped: bool) -> None:
        tensors.update(named)
        if own.calibration:
            load_named(model, named, mapped)
            for layer, twin in zip(reader.layers.modules(), model.layers.modules(), strict=True):
                layer.__dict__ |= {"packed": twin.packed} if hasattr(twin, "packed") else {}

    convert(build(config), target, fill, sink, *more)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as tmp:
        (work := Path(tmp, out.name)).mkdir()  # a TemporaryDirectory itself is closed to other users
        save_file(tensors, work / "model.safetensors", {"format": "pt"})
        (work / "model.safetensors").chmod(0o644)  # safetensors leaves it closed to other users
        for path in directory.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and path.stem not in (
                "config",
                "model.safetensors.index",
            ):
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
