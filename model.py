"""config.json -> Transformer, its KV cache, and the loader that streams safetensors into it.

Shapes in names: B rows, T new tokens of a row, D dim, H heads, V vocabulary, N x K a weight."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels import Ops, causal, sliding_window

# What sets a family apart, as entries of its config.json, and the settings that a kind of rope scaling needs.
FAMILIES = {"LlamaForCausalLM": {"sliding_window": None}, "MistralForCausalLM": {"use_sliding_window": True}}
FAMILIES |= {"Qwen2ForCausalLM": {"qkv_bias": True}, "Qwen3ForCausalLM": {"qk_norm": True}}
ROPE_TYPES = {"default": (), "linear": ("factor",)}
ROPE_TYPES["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class InputError(ValueError):
    """The user gave something that cannot work; the message is the one line they read."""


def refuse(message: str):
    raise InputError(message)


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file, or `default` where there is no file; raises InputError."""
    if default is not None and not path.exists():
        return default
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: expected a JSON file: {getattr(e, 'strerror', None) or e}") from e
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object")
    return raw


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    context: int
    norm_eps: float
    windows: tuple[int | None, ...]  # each layer's sliding window, None where attention is full
    rope: dict  # rope_theta, rope_type and what ROPE_TYPES names for it
    tied: bool
    qkv_bias: bool
    o_bias: bool
    ffn_bias: bool
    qk_norm: bool

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read a Hugging Face config.json; raises InputError naming what is missing, wrong or not supported."""
        raw = read_json(path)
        try:
            return cls._parse(raw)
        except KeyError as e:
            raise InputError(f"{path}: {e.args[0]} is missing") from e
        except (TypeError, AttributeError, ArithmeticError, ValueError) as e:
            raise InputError(f"{path}: {e}") from e

    @classmethod
    def _parse(cls, raw: dict) -> "ModelConfig":
        def size(name: str, default: int | None = None) -> int:
            value = raw[name] if default is None or raw.get(name) is not None else default
            return (
                value if type(value) is int and value > 0 else refuse(f"{name} is {value}, expected a positive integer")
            )

        rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_scaling") or {})
        rope = {"rope_type": rope.get("type", "default"), "partial_rotary_factor": 1} | rope
        family, act = raw["architectures"][0], raw.get("hidden_act", "silu")
        found = (
            (family, FAMILIES),
            (act, ["silu"]),
            (rope["rope_type"], ROPE_TYPES),
            (rope["partial_rotary_factor"], [1]),
        )
        for value, choices in found:
            if value not in choices:
                refuse(f"{value} is not supported, choose from {', '.join(map(str, choices))}")
        raw = raw | FAMILIES[family]
        n_heads, n_layers = size("num_attention_heads"), size("num_hidden_layers")
        window = size("sliding_window", 1 << 62) if raw.get("use_sliding_window") else None
        # Without layer_types, a Qwen config names the first layer that slides; in a Mistral every layer does.
        slides = [kind == "sliding_attention" for kind in raw.get("layer_types") or ()]
        slides = slides or [i >= raw.get("max_window_layers", 0) for i in range(n_layers)]
        bias = bool(raw.get("attention_bias"))
        config = cls(
            vocab_size=size("vocab_size"),
            dim=size("hidden_size"),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=size("num_key_value_heads", n_heads),
            head_dim=size("head_dim", size("hidden_size") // n_heads),
            ffn_dim=size("intermediate_size"),
            context=size("max_position_embeddings"),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            windows=tuple(window if slide and window != 1 << 62 else None for slide in slides),
            rope=rope,
            tied=bool(raw.get("tie_word_embeddings")),
            qkv_bias=bias or "qkv_bias" in raw,
            o_bias=bias,
            ffn_bias=bool(raw.get("mlp_bias")),
            qk_norm="qk_norm" in raw,
        )
        rope_table(config, 1)  # raises for settings that are missing or wrong
        if n_heads % config.n_kv_heads or config.head_dim % 2 or len(slides) != n_layers:
            refuse("expected KV heads that divide the heads, an even head_dim and a layer_type for each layer")
        return config


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin by position and frequency, fp32 [length, 2, head_dim / 2] (RoFormer, eq. 34); "linear" divides
    the frequencies, "llama3" (Llama 3.1) divides the long wavelengths, keeps the short and blends those between."""
    rope, kind = config.rope, config.rope["rope_type"]
    settings = [float(rope[name]) for name in ROPE_TYPES[kind]]
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    freq = 1.0 / float(rope["rope_theta"] or 10000.0) ** (pairs / config.head_dim)
    if kind == "linear":
        freq = freq / settings[0]
    elif kind == "llama3":
        factor, low, high, original_context = settings
        keep = ((original_context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / factor
    angle = torch.arange(length).float()[:, None] * freq
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def rotate(x_BTHD: Tensor, rope_BT: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) by their angles; in fp32, rounded once."""
    cos, sin = rope_BT.unsqueeze(2).unbind(3)
    a, b = x_BTHD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHD.dtype)


class Loadable(nn.Module):
    """A layer built from named checkpoint tensors, `shapes`, as they arrive in any order."""

    def __init__(self, ops: Ops, shapes: dict[str, tuple[int, ...]], device, dtype):
        super().__init__()
        self.ops, self.shapes, self.device, self.dtype = ops, shapes, device, dtype
        self.arrived: dict[str, Tensor] = {}

    def load(self, name: str, tensor: Tensor, mapped: bool) -> None:
        """Take one tensor, `mapped` if it lies in a file; the last to come builds the layer."""
        self.arrived[name] = tensor
        if len(self.arrived) == len(self.shapes):
            weights = [self.arrived[n] for n in self.shapes if n.endswith("weight")]
            biases = [self.arrived[n] for n in self.shapes if n.endswith("bias")]
            self.arrived = {}
            self.finish(self._join(weights), self._join(biases) if biases else None)

    def _join(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).to(self.device, self.dtype)  # cat copies, so nothing stays in the mapped file


class Linear(Loadable):
    """y = x W^T + b, over one or several checkpoint layers of the same input, stacked along the output."""

    def __init__(self, ops: Ops, parts: dict[str, int], in_features: int, bias: bool, **where):
        shapes = {f"{name}.weight": (rows, in_features) for name, rows in parts.items()}
        shapes |= {f"{name}.bias": (rows,) for name, rows in parts.items() if bias}
        super().__init__(ops, shapes, **where)

    def finish(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = self.ops.pack(weight, bias)
        self.nbytes = self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.packed)


class RMSNorm(Loadable):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, ops: Ops, name: str, dim: int, eps: float, **where):
        super().__init__(ops, {f"{name}.weight": (dim,)}, **where)
        self.eps = eps

    def finish(self, weight: Tensor, bias: None) -> None:
        self.weight, self.nbytes = weight.float(), 4 * len(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x.float(), self.weight, self.eps).to(self.dtype)


class Embedding(Loadable):
    """The token embedding, and with it the head of a model that ties the two. On a CPU its rows are read where they
    lie in the mapped file, one a token, so the only copy of a tied table in memory is the one packed for the head."""

    def __init__(self, ops: Ops, name: str, config: ModelConfig, **where):
        super().__init__(ops, {f"{name}.weight": (config.vocab_size, config.dim)}, **where)
        self.tied = config.tied

    def load(self, name: str, tensor: Tensor, mapped: bool) -> None:
        held = tensor.to(self.device, self.dtype)
        self.packed = self.ops.pack(held, None) if self.tied else None
        self.weight = tensor if self.device.type == "cpu" else held
        shared = self.packed and self.packed.weight is self.weight
        in_memory = not shared and not (mapped and self.weight is tensor)
        self.nbytes = (self.packed.nbytes if self.packed else 0) + (self.weight.nbytes if in_memory else 0)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.dtype)

    def as_head(self, x_BTD: Tensor) -> Tensor:
        return self.ops.linear(x_BTD, self.packed)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over a KV cache."""

    def __init__(self, ops: Ops, prefix: str, config: ModelConfig, **where):
        super().__init__()
        self.ops, self.config = ops, config
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        parts = {f"{prefix}.q_proj": q_dim, f"{prefix}.k_proj": kv_dim, f"{prefix}.v_proj": kv_dim}
        self.qkv = Linear(ops, parts, config.dim, config.qkv_bias, **where)
        self.o = Linear(ops, {f"{prefix}.o_proj": config.dim}, q_dim, config.o_bias, **where)
        if config.qk_norm:
            self.q_norm = RMSNorm(ops, f"{prefix}.q_norm", config.head_dim, config.norm_eps, **where)
            self.k_norm = RMSNorm(ops, f"{prefix}.k_norm", config.head_dim, config.norm_eps, **where)

    def forward(self, x_BTD: Tensor, rope_BT: Tensor, pos_BT: Tensor, mask, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        heads = (self.config.n_heads, self.config.n_kv_heads, self.config.n_kv_heads)
        q, k, v = self.qkv(x_BTD).unflatten(-1, (sum(heads), self.config.head_dim)).split(heads, dim=2)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope_BT), rotate(k, rope_BT)
        return self.o(self.ops.attention(q, k, v, k_cache, v_cache, pos_BT, mask, self.config.head_dim**-0.5))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, ops: Ops, prefix: str, config: ModelConfig, **where):
        super().__init__()
        self.ops = ops
        parts = {f"{prefix}.gate_proj": config.ffn_dim, f"{prefix}.up_proj": config.ffn_dim}
        self.gate_up = Linear(ops, parts, config.dim, config.ffn_bias, **where)
        self.down = Linear(ops, {f"{prefix}.down_proj": config.dim}, config.ffn_dim, config.ffn_bias, **where)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x_BTD)))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, ops: Ops, prefix: str, config: ModelConfig, **where):
        super().__init__()
        self.attention_norm = RMSNorm(ops, f"{prefix}.input_layernorm", config.dim, config.norm_eps, **where)
        self.attention = Attention(ops, f"{prefix}.self_attn", config, **where)
        self.ffn_norm = RMSNorm(ops, f"{prefix}.post_attention_layernorm", config.dim, config.norm_eps, **where)
        self.ffn = FeedForward(ops, f"{prefix}.mlp", config, **where)

    def forward(self, x_BTD: Tensor, *attention_args) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), *attention_args)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, n_kv_heads, length, head_dim] each, zeroed: 0 x NaN would poison a row."""

    k: list[Tensor]
    v: list[Tensor]

    def row(self, b: int) -> "KVCache":
        """A view of one row, to prefill it while the others rest."""
        return KVCache([k[b : b + 1] for k in self.k], [v[b : b + 1] for v in self.v])


class Transformer(nn.Module):
    """A decoder of the Llama family, empty until `load_checkpoint` or `randomize` fills it."""

    def __init__(self, config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config, self.ops, self.device, self.dtype = config, ops, device, dtype
        where = {"device": device, "dtype": dtype}
        self.embed = Embedding(ops, "model.embed_tokens", config, **where)
        self.blocks = nn.ModuleList(Block(ops, f"model.layers.{i}", config, **where) for i in range(config.n_layers))
        self.norm = RMSNorm(ops, "model.norm", config.dim, config.norm_eps, **where)
        self.head = None if config.tied else Linear(ops, {"lm_head": config.vocab_size}, config.dim, False, **where)
        self.rope = rope_table(config, config.context).to(device)
        self.mask_mods = {w: causal if w is None else sliding_window(w) for w in set(config.windows)}
        self.decode_stack = self.prefill_stack = self.stack  # what compiling replaces

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """A zeroed cache of `batch_size` rows and at least `length` positions, a whole number of key blocks."""
        length = -(-length // self.ops.key_block) * self.ops.key_block
        shape = (batch_size, self.config.n_kv_heads, length, self.config.head_dim)
        k, v = ([torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in self.blocks] for _ in "kv")
        return KVCache(k, v)

    def forward(self, tokens_BT: Tensor, pos_BT: Tensor, cache: KVCache, end: int, last=False, decode=False) -> Tensor:
        """fp32 logits [B, T, V] (T = 1 with `last`) of tokens at absolute positions `pos_BT`; `end` is one past the
        highest. Their keys and values are written to the cache, which must hold every earlier position."""
        block = self.ops.key_block
        # A CUDA graph needs one shape, so there every step looks over the whole cache.
        span = -(-end // block) * block if self.device.type == "cpu" else cache.k[0].shape[2]
        args = (pos_BT, span, self.config.n_heads, self.dtype)
        masks = {window: self.ops.mask(mask_mod, *args) for window, mask_mod in self.mask_mods.items()}
        stack = self.decode_stack if decode else self.prefill_stack if tokens_BT.shape[1] > 1 else self.stack
        return stack(tokens_BT, pos_BT, masks, cache.k, cache.v, last)

    def stack(self, tokens_BT: Tensor, pos_BT: Tensor, masks: dict, k: list, v: list, last: bool) -> Tensor:
        """Every layer and the head: all that torch.compile gets to see."""
        # Sums over layers stay in fp32: cheap, and it takes away much of what rounding to half precision costs.
        x_BTD, rope_BT = self.embed(tokens_BT).float(), self.rope[pos_BT]
        for i, (block, window) in enumerate(zip(self.blocks, self.config.windows, strict=True)):
            x_BTD = block(x_BTD, rope_BT, pos_BT, masks[window], k[i], v[i])
        x_BTD = self.norm(x_BTD[:, -1:] if last else x_BTD)
        return (self.head or self.embed.as_head)(x_BTD).float()

    def takers(self) -> dict[str, Loadable]:
        """Which layer takes which checkpoint tensor."""
        return {name: layer for layer in self.modules() if isinstance(layer, Loadable) for name in layer.shapes}

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, every packed copy counted."""
        return sum(layer.nbytes for layer in self.modules() if isinstance(layer, Loadable))


def load_checkpoint(model: Transformer, directory: Path, progress=lambda done, total: None) -> None:
    """Stream every tensor of a Hugging Face directory into place. All names and shapes are checked before the first
    weight is read; raises InputError that names the tensor or file."""
    takers, found = model.takers(), {}
    # Some files repeat a tied head, and the first Llama 2 exports store what config.json already says.
    repeats = {"lm_head.weight"} if model.config.tied else set()
    for path in _checkpoint_files(directory):
        try:
            file = safe_open(path, "pt")
        except SafetensorError as e:
            raise InputError(f"{path}: truncated or corrupt: {e}") from e
        found |= {n: file for n in file.keys() if n not in repeats and not n.endswith("rotary_emb.inv_freq")}
    for problem, names in (("missing", takers.keys() - found.keys()), ("not expected", found.keys() - takers.keys())):
        if names:
            raise InputError(f"{directory}: tensor {min(names)} is {problem} ({len(names)} in all)")
    for name, file in found.items():
        entry, shape = file.get_slice(name), list(takers[name].shapes[name])
        if entry.get_shape() != shape or entry.get_dtype() not in ("BF16", "F16", "F32"):
            got = f"{entry.get_dtype()} {entry.get_shape()}"
            raise InputError(f"{directory}: tensor {name} is {got}, expected BF16, F16 or F32 {shape}")
    for done, (name, file) in enumerate(found.items(), start=1):
        takers[name].load(name, file.get_tensor(name), mapped=True)
        progress(done, len(found))


def _checkpoint_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    shards = read_json(index, {}).get("weight_map", {})
    if not isinstance(shards, dict):
        raise InputError(f"{index}: expected a weight_map of tensor names to files")
    paths = sorted({directory / name for name in shards.values()}) or sorted(directory.glob("model*.safetensors"))
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(f"{missing[0]}: named by {index.name} but missing")
    return paths or refuse(f"{directory}: no model.safetensors and no {index.name}")


def randomize(model: Transformer, seed: int = 0) -> None:
    """Fill a model with random weights (normal, 0.02; vectors one), for benchmarks without a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.takers().items():
        shape = layer.shapes[name]
        tensor = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
        layer.load(name, tensor.to(model.dtype), mapped=False)
