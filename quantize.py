"""int8 and int4 weights of linear layers, and the command that writes a checkpoint directory of them.

python quantize.py --mode int4                                   the default model, into DIR-int4-g32
python quantize.py --mode int8 --checkpoint_path DIR --out NEW
python quantize.py --mode int4-gptq --calibration FILE --group_size 64      least change of outputs on that text

A weight [N, K] is (code - zero) * scale on disk: int8 [N, K] with a scale a row and no zero, or uint8 [N, K / 2], the
low nibble at even k, with scale and zero [N, K / group]. Packing for a device happens at load. The head is int8 in either
mode (its int4 product is no faster on a CPU), a copy of its own where it was tied."""

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
from model import Layer, ModelConfig, Transformer, load_checkpoint, read_json, refuse
from scripts import bench

DEFAULT = Path(__file__).parent / "checkpoints" / "SmolLM2-135M-Instruct"
TINY = 1e-30  # stands in for the scale of zeros


def cut(part: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """One of `size` shares of a quantized weight, its scale or its zero, along N (dim 0) or K (1)."""
    return part if part.shape[dim] == 1 else part.chunk(size, dim)[rank]


class Int8Linear(Packed):
    """8-bit weights with a scale a row. On a CPU activations are two 8-bit numbers, the second for what the first leaves
    (one alone costs 4 % of perplexity), with a scale a token and leaf. Sums of integers are exact at every M."""

    def __init__(self, weight: Tensor, bias: Tensor | None, leaves: int, scale: Tensor):
        super().__init__(weight[:0], bias)
        self.nbytes, self.opaque, self.leaves = self.nbytes + weight.nbytes + scale.nbytes, False, leaves
        self.weight, self.out_features = torch.ops.onednn.qlinear_prepack(weight, None), len(weight)
        self.scale, self.zero = scale.float().flatten(), torch.zeros(len(weight), dtype=torch.int32)

    @staticmethod
    def from_float(weight: Tensor, group_size: int) -> dict[str, Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=TINY) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "scale": scale}

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (self.leaves, -1))
        top = parts.abs().amax(-1, keepdim=True).clamp(min=TINY)
        exact = parts * (127 / top)
        high = exact.round()
        codes = torch.stack((high, ((exact - high) * 254).round()), dim=-2).to(torch.int8)
        if self.leaves > 1:  # zero outside a leaf: all of them in one product
            codes = (codes.unsqueeze(-2) * torch.eye(self.leaves, dtype=torch.int8)[:, None, :, None]).flatten(-2)
        high, low = int8_product(codes, self.handle, self.out_features).unbind(-2)
        return add_leaves(((high + low * (1 / 254)) * (top * (1 / 127))).movedim(-2, 0), self.bias, x.dtype)


@opaque(
    "int8_product(Tensor codes, int handle, int n) -> Tensor",
    lambda codes, handle, n: codes.new_empty(*codes.shape[:-1], n, dtype=torch.float32),
)
def int8_product(codes, handle, n, op=torch.ops.onednn.qlinear_pointwise.default):
    w = Packed.table[handle]
    return op(codes, 1.0, 0, w.weight, w.scale, w.zero, None, 1.0, 0, torch.float32, "none", [], "")


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] of the two numbers in each byte [N, K / 2]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


class Int4Linear(Packed):
    """4-bit weights with a scale and a zero for each group along K. PyTorch's kernel for a CPU adds up in one order at
    every M; many rows are faster, and other bits, with the weight expanded: for those who do not mind (`exact`)."""

    EXPAND = 48  # rows

    def __init__(self, weight: Tensor, bias: Tensor | None, leaves: int, scale: Tensor, zero: Tensor, exact: bool):
        super().__init__(weight[:0], bias)
        N, K, self.out_features = len(weight), 2 * weight.shape[1], len(weight)
        self.nbytes, self.exact, self.opaque, self.leaves = self.nbytes + weight.nbytes, exact, leaves == 1, []
        if leaves > 1:
            chunks = zip(*(part.chunk(leaves, dim=1) for part in (weight, scale, zero)), strict=True)
            self.leaves = [Int4Linear(w, None, 1, s, z, exact) for w, s, z in chunks]
            self.nbytes += sum(leaf.nbytes - leaf.weight.nbytes for leaf in self.leaves)
            self.weight = None
            return
        codes = F.pad(nibbles(weight).int(), (0, 0, 0, -N % 64))  # whole blocks of the kernel
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = F.pad(scale.float(), (0, 0, 0, -N % 64)).T
        low = scale * (8 - F.pad(zero.float(), (0, 0, 0, -N % 64)).T)
        self.group, self.scales = K // len(scale), torch.stack((scale, low), dim=-1)
        self.nbytes += scale.numel() * 4

    @staticmethod
    def from_float(weight: Tensor, group_size: int) -> dict[str, Tensor]:
        """Rounded to nearest between the least and the largest of each group, zero among them."""
        groups = weight.float().unflatten(1, (-1, group_size))
        scale, zero = Int4Linear.grid(groups)
        codes = (groups / scale[..., None].float() + zero[..., None]).round().clamp(0, 15)
        return Int4Linear.parts(codes.flatten(1), scale, zero)

    @staticmethod
    def grid(groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (bf16) and zero (fp16) of groups of weights that lie along the last dimension."""
        least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((most - least) / 15).clamp(min=TINY).bfloat16()
        return scale, (-least / scale.float()).half()

    @staticmethod
    def parts(codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        codes = codes.to(torch.uint8)
        return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale, "zero": zero}

    def __call__(self, x: Tensor) -> Tensor:
        if self.leaves:
            pairs = zip(x.chunk(len(self.leaves), dim=-1), self.leaves, strict=True)
            return add_leaves(torch.stack([linear(*pair) for pair in pairs]), self.bias, x.dtype)
        x_MK = x.reshape(-1, x.shape[-1])
        if self.scales.dtype != x.dtype:
            self.scales = self.scales.to(x.dtype)
        if len(x_MK) < self.EXPAND or self.exact or not expands(x.dtype):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.contiguous(), self.weight, self.group, self.scales)
        else:
            y = x_MK @ self.expanded()
        y = y[:, : self.out_features].view(*x.shape[:-1], -1)
        return y if self.bias is None else add_leaves(y[None], self.bias, x.dtype)

    def expanded(self) -> Tensor:
        """The weight [K, N] that the kernel computes with, out of the layout that it has with AVX-512: blocks of 64
        rows, a byte for rows i and i + 32."""
        bytes_KN = self.weight.view(-1, self.scales.shape[0] * self.group, 32).transpose(0, 1)
        codes = torch.cat((bytes_KN & 15, bytes_KN >> 4), dim=-1).sub_(8).view(torch.int8)
        scale, low = self.scales.unsqueeze(1).unbind(-1)
        return torch.addcmul(low, codes.view(-1, self.group, scale.shape[-1]).to(scale.dtype), scale).flatten(0, 1)


@functools.cache
def expands(dtype: torch.dtype) -> bool:
    """Whether a product with one-hot rows gives back the expanded weight: this machine has the layout expected."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (128, 32), dtype=torch.uint8, generator=draw)
    scale, zero = torch.rand(2, 128, 2, generator=draw)
    layer = Int4Linear(codes, None, 1, scale, zero, exact=True)
    return torch.equal(layer(torch.eye(64, dtype=dtype)), layer.expanded())


LINEARS = {"int8": Int8Linear, "int4": Int4Linear}


def table(ops: Ops) -> Ops:
    """The same table, which also packs quantized weights."""

    def pack(weight, bias=None, leaves=1, scale=None, zero=None):
        if scale is None:
            return ops.pack(weight, bias, leaves)
        exact = ops is BATCH_INVARIANT
        leaves = leaves if exact else 1
        if weight.is_cuda:
            return TritonPacked(weight, bias, leaves, scale, zero)
        return (
            Int8Linear(weight, bias, leaves, scale)
            if zero is None
            else Int4Linear(weight, bias, leaves, scale, zero, exact)
        )

    return replace(ops, pack=pack)


def quantized(config: ModelConfig, mode: str, group_size: int) -> ModelConfig:
    """What a model is after quantization; a head that was tied is a copy."""
    if config.mode:
        refuse(f"the checkpoint is {config.mode} already, expected one that is not quantized")
    return replace(config, mode=mode, group_size=group_size, tied=False)


def convert(source: Transformer, config: ModelConfig, fill: Callable, sink: Callable, rounded: Callable | None = None):
    """Have `fill` load the source; instead, each layer's tensors, quantized as `config` says, go by name to `sink`."""
    nearest = lambda layer, weight, mode: LINEARS[mode].from_float(weight, config.group_size)

    def feed(layer: Layer, tensors: list[Tensor], mapped: bool) -> int:
        named = dict(zip(layer.shapes, tensors, strict=True))
        weights = {name: tensor for name, tensor in named.items() if tensor.dim() == 2}
        if layer is source.embed:
            weights = {"lm_head.weight": tensors[0]} if source.config.tied else {}
        for name, weight in weights.items():
            mode = "int8" if name == "lm_head.weight" else config.mode
            parts = (nearest if mode == "int8" else rounded or nearest)(layer, weight, mode)
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


class Calibration:
    """GPTQ (Frantar et al. 2022): the inputs of a layer are rounded one after the other, and those still to come
    make up for what that changes in the outputs on a text. The `model` that reads it has its blocks rounded one by one."""

    def __init__(self, model: Transformer, windows_NT: Tensor, group_size: int):
        self.model, self.group_size, self.factors, self.blocks = model, group_size, {}, iter(())
        (_, T), config, self.cache = windows_NT.shape, model.config, model.new_cache(1, windows_NT.shape[1])
        pos = torch.arange(T)[None]
        self.rotary_pos = *model.rope[pos].unsqueeze(2).unbind(3), pos
        sizes = pos, T, (config.n_heads, config.n_kv_heads), model.dtype
        self.masks = [model.ops.mask(model.mask_mods[window], *sizes) for window in config.windows]
        self.hidden, self.done = [model.embed(tokens_T[None]).float() for tokens_T in windows_NT], 0

    def forward(self) -> list[Tensor]:
        """What the next block makes of every window."""
        attention, ffn = self.model.layers[self.done]
        args = (
            *self.rotary_pos,
            self.masks[self.done],
            *(x[:, :, : len(self.hidden[0][0])] for x in self.cache[self.done]),
        )
        return [ffn(attention(x, *args)) for x in self.hidden]

    def measure(self) -> None:
        """For each linear layer of the next block, the factor U of H^-1 = U^T U, H the sum of x^T x over its inputs."""
        if self.factors:
            self.hidden, self.done = self.forward(), self.done + 1
        sums, self.factors = {}, {}

        def add(layer, args):
            x = args[0].flatten(0, -2).float()
            sums[layer] = sums.get(layer, 0) + x.T @ x

        layers = [layer for layer in self.model.layers[self.done].modules() if hasattr(layer, "packed")]
        hooks = [layer.register_forward_pre_hook(add) for layer in layers]
        self.forward()
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            diagonal = sums[layer].diagonal()
            diagonal += 0.01 * diagonal.mean() + (diagonal == 0)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(sums[layer]))
            self.factors[tuple(layer.shapes)] = torch.linalg.cholesky(inverse, upper=True)

    def __call__(self, layer: Layer, weight: Tensor, mode: str) -> dict[str, Tensor]:
        while tuple(layer.shapes) not in self.factors:
            self.measure()
        w, factor, codes, grids = weight.float(), self.factors[tuple(layer.shapes)], [], []
        for start in range(0, w.shape[1], self.group_size):
            group, later = w[:, start : start + self.group_size], w[:, start + self.group_size :]
            rows = factor[start : start + self.group_size, start:]
            grids.append(Int4Linear.grid(group))
            scale, zero = (part.float() for part in grids[-1])
            errors = []
            for j, row in enumerate(rows):
                codes.append((group[:, j] / scale + zero).round().clamp(0, 15))
                errors.append((group[:, j] - (codes[-1] - zero) * scale) / row[j])
                group[:, j:] -= errors[-1][:, None] * row[j : self.group_size]
            later -= torch.stack(errors, dim=1) @ rows[:, self.group_size :]
        return Int4Linear.parts(*(torch.stack(parts, dim=1) for parts in (codes, *zip(*grids, strict=True))))


@torch.inference_mode()
def main(own, argv: list[str]) -> None:
    mode, directory = own.mode.removesuffix("-gptq"), Path(own.checkpoint_path)
    if argv or mode not in LINEARS or own.mode == "int8-gptq" or bool(own.calibration) != (mode != own.mode):
        refuse("expected --mode int8, --mode int4 or --mode int4-gptq --calibration FILE, see --help")
    config = ModelConfig.from_file(directory / "config.json")
    target = quantized(config, mode, own.group_size)
    name = directory.resolve().name + f"-{own.mode}" + (f"-g{own.group_size}" if mode == "int4" else "")
    out = Path(own.out or directory.resolve().with_name(name))
    if out.exists():
        refuse(f"{out} exists: move it away or choose another --out")
    build = lambda config: Transformer(config, table(FAST), torch.device("cpu"), torch.bfloat16)
    progress = lambda i, n: sys.stderr.isatty() and print(f"\r{i}/{n}", end="\r" if i < n else "\n", file=sys.stderr)
    fill, rounded, model = lambda model: load_checkpoint(model, directory, progress), None, build(target)
    if own.calibration:
        import generate

        ids = generate.Tokenizer(directory).encode(Path(own.calibration).read_text(encoding="utf-8"))
        window = min(1024, config.context, len(ids))
        fill(reader := build(config))
        windows = torch.tensor(ids[: min(own.tokens, len(ids)) // window * window]).view(-1, window)
        rounded = Calibration(reader, windows, own.group_size)
    shard, places = {}, {}

    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as tmp:
        (work := Path(tmp, out.name)).mkdir()  # a TemporaryDirectory itself is closed to other users

        def flush():
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, work / file, {"format": "pt"})
            (work / file).chmod(0o644)  # safetensors leaves it closed to other users
            places.update(dict.fromkeys(shard, file))
            shard.clear()

        def sink(named: dict[str, Tensor], mapped: bool):
            shard.update(named)
            if sum(tensor.nbytes for tensor in shard.values()) > 1 << 30:
                flush()
            if rounded:
                load_named(model, named, mapped)
                for layer, twin in zip(reader.layers.modules(), model.layers.modules(), strict=True):
                    if hasattr(twin, "packed"):
                        layer.packed = twin.packed

        convert(build(config), target, fill, sink, rounded)
        flush()
        for path in directory.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.startswith("model"):
                shutil.copy(path, work)
        (work / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        how = {"quant_method": "gpt-exact", "mode": mode, "group_size": own.group_size}
        config = read_json(directory / "config.json") | {"tie_word_embeddings": False, "quantization_config": how}
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        work.rename(out)
    print(out)


if __name__ == "__main__":
    sys.modules["quantize"] = sys.modules["__main__"]  # what generate.py imports: one copy of this module
    defaults = {"checkpoint_path": str(DEFAULT), "mode": "", "group_size": 32, "out": "", "calibration": ""}
    bench.command(main, **defaults, tokens=16384)
