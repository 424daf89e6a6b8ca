"""config.json -> Transformer, its KV cache, and the loader that streams safetensors into it. Shapes in names: B rows,
T new tokens of a row, D dim, H heads, V vocabulary, N x K a weight."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels import Ops, causal, leaf_count, sliding_window

# What sets a family apart, as entries of its config.json, and the settings that a kind of rope scaling needs.
FAMILIES = {"LlamaForCausalLM": {"use_sliding_window": False}, "MistralForCausalLM": {"use_sliding_window": True}}
FAMILIES |= {"Qwen2ForCausalLM": {"qkv_bias": True}, "Qwen3ForCausalLM": {"qk_norm": True}}
ROPE_TYPES = {"default": (), "linear": ("factor",)}
ROPE_TYPES["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SUPPORTED = {"architectures": FAMILIES, "hidden_act": ["silu"], "rope_type": ROPE_TYPES, "partial_rotary_factor": [1]}
# What config.json, or a family above, calls the sizes and the switches of a ModelConfig.
SIZES = {"vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers"}
SIZES |= {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
SIZES |= {"ffn_dim": "intermediate_size", "context": "max_position_embeddings"}
SWITCHES = {"tied": "tie_word_embeddings", "qk_norm": "qk_norm"}
SWITCHES |= {"qkv_bias": "qkv_bias", "o_bias": "attention_bias", "ffn_bias": "mlp_bias"}
KVCache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, n_kv_heads, length, head_dim]


class InputError(ValueError):
    """The user gave something that cannot work; the message is the one line they read."""


def refuse(message: str):
    raise InputError(message)


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file, or `default` where there is no file; raises InputError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8")) if default is None or path.exists() else default
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: expected a JSON file: {getattr(e, 'strerror', None) or e}") from e
    return raw if isinstance(raw, dict) else refuse(f"{path}: expected a JSON object")


@dataclass(frozen=True)
class ModelConfig:
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

        def size(name: str) -> int:
            value = raw[name]
            return value if type(value) is int and value > 0 else refuse(f"{name} is {value}, expected an integer > 0")

        try:
            rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_scaling") or {})
            rope = {"rope_type": rope.get("type", "default")} | rope
            given = {"hidden_act": "silu", "partial_rotary_factor": 1} | raw | rope
            given["architectures"] = (raw["architectures"] or [None])[0]
            for name, choices in SUPPORTED.items():
                if given[name] not in choices:
                    refuse(f"{name} {given[name]} is not supported, choose from {', '.join(map(str, choices))}")
            n_heads, n_layers = size("num_attention_heads"), size("num_hidden_layers")
            defaults = {"num_key_value_heads": n_heads, "head_dim": size("hidden_size") // n_heads}
            raw |= {name: default for name, default in defaults.items() if raw.get(name) is None}
            raw |= {"qkv_bias": raw.get("attention_bias")} | FAMILIES[given["architectures"]]
            # Without layer_types, a Qwen config names the first layer that slides; in a Mistral every layer does.
            slides = [kind == "sliding_attention" for kind in raw.get("layer_types") or ()]
            slides = slides or [i >= raw.get("max_window_layers", 0) for i in range(n_layers)]
            windowed = raw.get("use_sliding_window") and raw.get("sliding_window") is not None
            windows = tuple(size("sliding_window") if windowed and slide else None for slide in slides)
            sizes = {field: size(name) for field, name in SIZES.items()}
            switches = {field: bool(raw.get(name)) for field, name in SWITCHES.items()}
            config = cls(**sizes, **switches, norm_eps=float(raw.get("rms_norm_eps", 1e-6)), windows=windows, rope=rope)
            rope_table(config, 1)  # raises for settings that are missing or wrong
            if n_heads % config.n_kv_heads or config.head_dim % 2 or len(windows) != n_layers:
                refuse("expected KV heads that divide the heads, an even head_dim and a layer_type for each layer")
            return config
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as e:
            problem = f"{e.args[0]} is missing" if isinstance(e, KeyError) else e
            raise InputError(f"{path}: {problem}") from e


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin by position and frequency, fp32 [length, 2, head_dim / 2] (RoFormer, eq. 34); "linear" divides
    the frequencies, "llama3" (Llama 3.1) divides the long wavelengths, keeps the short and blends those between."""
    rope = config.rope
    settings = [float(rope[name]) for name in ROPE_TYPES[rope["rope_type"]]]
    factor, low, high, original_context = settings + [1.0, 0.0, 1.0, 0.0][len(settings) :]  # which change nothing
    freq = 1.0 / float(rope["rope_theta"] or 10000.0) ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
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
    """A layer made of the checkpoint tensors that `shapes` names. Its `load` is given them all, in that order, and
    whether they lie in a `mapped` file; `nbytes` is what it then holds in memory."""

    def __init__(self, model: "Transformer", shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self.ops, self.config, self.device, self.dtype = model.ops, model.config, model.device, model.dtype
        self.shapes = shapes


class Linear(Loadable):
    """y = x W^T + b, over one or several checkpoint layers of the same input, stacked along the output."""

    def __init__(self, model: "Transformer", parts: dict[str, int], in_features: int, bias: bool, leaves: int = 1):
        shapes = {f"{name}.weight": (rows, in_features) for name, rows in parts.items()}
        shapes |= {f"{name}.bias": (rows,) for name, rows in parts.items() if bias}
        super().__init__(model, shapes)
        self.leaves = leaves  # into which the sums along in_features are cut, so that tensor parallelism can cut there

    def load(self, tensors: list[Tensor], mapped: bool) -> None:
        parts = [[tensor for tensor in tensors if tensor.dim() == dim] for dim in (2, 1)]
        # cat copies, so nothing stays in the mapped file.
        weight, bias = (torch.cat(part).to(self.device, self.dtype) if part else None for part in parts)
        self.packed = self.ops.pack(weight, bias, self.leaves)
        self.nbytes = self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.packed)


class RMSNorm(Loadable):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def load(self, tensors: list[Tensor], mapped: bool) -> None:
        self.weight = tensors[0].to(self.device, self.dtype, copy=True).float()
        self.nbytes = self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x.float(), self.weight, self.config.norm_eps).to(self.dtype)


class Embedding(Loadable):
    """The token embedding, and with it the head of a model that ties the two. On a CPU its rows are read where they
    lie in the mapped file, one a token, so the only copy of a tied table in memory is the one packed for the head."""

    def load(self, tensors: list[Tensor], mapped: bool) -> None:
        self.weight = tensors[0] if self.device.type == "cpu" else tensors[0].to(self.device, self.dtype)
        self.packed = self.ops.pack(self.weight.to(self.dtype)) if self.config.tied else None
        shared = self.packed and self.packed.weight is self.weight
        in_memory = not shared and not (mapped and self.weight is tensors[0])
        self.nbytes = (self.packed.nbytes if self.packed else 0) + (self.weight.nbytes if in_memory else 0)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BT, self.weight).to(self.dtype)

    as_head = Linear.forward


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over a KV cache."""

    def __init__(self, model: "Transformer", prefix: str):
        super().__init__()
        self.ops, config = model.ops, model.config
        self.head_dim, self.heads = config.head_dim, (config.n_heads, config.n_kv_heads, config.n_kv_heads)  # q, k, v
        parts = {f"{prefix}.{x}_proj": heads * self.head_dim for x, heads in zip("qkv", self.heads, strict=True)}
        self.qkv = Linear(model, parts, config.dim, config.qkv_bias)
        q_dim = config.n_heads * self.head_dim
        leaves = leaf_count(config.n_kv_heads, q_dim)
        self.o = Linear(model, {f"{prefix}.o_proj": config.dim}, q_dim, config.o_bias, leaves)
        norm = RMSNorm if config.qk_norm else nn.Identity  # which takes any arguments
        self.q_norm = norm(model, {f"{prefix}.q_norm.weight": (config.head_dim,)})
        self.k_norm = norm(model, {f"{prefix}.k_norm.weight": (config.head_dim,)})

    def forward(self, x_BTD: Tensor, rope_BT: Tensor, pos_BT: Tensor, mask, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), rope_BT), rotate(self.k_norm(k), rope_BT)
        return self.o(self.ops.attention(q, k, v, k_cache, v_cache, pos_BT, mask, self.head_dim**-0.5))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, model: "Transformer", prefix: str):
        super().__init__()
        self.ops, config = model.ops, model.config
        parts = {f"{prefix}.gate_proj": config.ffn_dim, f"{prefix}.up_proj": config.ffn_dim}
        self.gate_up = Linear(model, parts, config.dim, config.ffn_bias)
        leaves = leaf_count(config.n_kv_heads, config.ffn_dim)
        self.down = Linear(model, {f"{prefix}.down_proj": config.dim}, config.ffn_dim, config.ffn_bias, leaves)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x_BTD)))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, model: "Transformer", prefix: str):
        super().__init__()
        self.attention_norm = RMSNorm(model, {f"{prefix}.input_layernorm.weight": (model.config.dim,)})
        self.attention = Attention(model, f"{prefix}.self_attn")
        self.ffn_norm = RMSNorm(model, {f"{prefix}.post_attention_layernorm.weight": (model.config.dim,)})
        self.ffn = FeedForward(model, f"{prefix}.mlp")

    def forward(self, x_BTD: Tensor, *attention_args) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), *attention_args)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    """A decoder of the Llama family, empty until `load_checkpoint` or `randomize` fills it."""

    def __init__(self, config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config, self.ops, self.device, self.dtype = config, ops, device, dtype
        self.embed = Embedding(self, {"model.embed_tokens.weight": (config.vocab_size, config.dim)})
        self.head = None if config.tied else Linear(self, {"lm_head": config.vocab_size}, config.dim, bias=False)
        self.blocks = nn.ModuleList(Block(self, f"model.layers.{i}") for i in range(config.n_layers))
        self.norm = RMSNorm(self, {"model.norm.weight": (config.dim,)})
        self.rope = rope_table(config, config.context).to(device)
        self.mask_mods = {w: causal if w is None else sliding_window(w) for w in set(config.windows)}
        self.decode_stack = self.prefill_stack = self.stack  # what compiling replaces

    def whole_blocks(self, length: int) -> int:
        return -(-length // 64) * 64  # keys, whose products oneDNN computes faster in whole blocks

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """A cache of at least `length` positions, a whole number of key blocks, zeroed: 0 x NaN would poison a row."""
        shape = (batch_size, self.config.n_kv_heads, self.whole_blocks(length), self.config.head_dim)
        return [tuple(torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in "kv") for _ in self.blocks]

    def forward(self, tokens_BT: Tensor, pos_BT: Tensor, cache: KVCache, end: int, last=False, decode=False) -> Tensor:
        """fp32 logits [B, T, V] (T = 1 with `last`) of tokens at absolute positions `pos_BT`; `end` is one past the
        highest. Their keys and values are written to the cache, which must hold every earlier position."""
        # A CUDA graph needs one shape, so there every step looks over the whole cache.
        span = self.whole_blocks(end) if self.device.type == "cpu" else cache[0][0].shape[2]
        args = (pos_BT, span, (self.config.n_heads, self.config.n_kv_heads), self.dtype)
        masks = {window: self.ops.mask(mask_mod, *args) for window, mask_mod in self.mask_mods.items()}
        stack = self.decode_stack if decode else self.prefill_stack if tokens_BT.shape[1] > 1 else self.stack
        return stack(tokens_BT, pos_BT, masks, cache, last)

    def stack(self, tokens_BT: Tensor, pos_BT: Tensor, masks: dict, cache: KVCache, last: bool) -> Tensor:
        """Every layer and the head: all that torch.compile gets to see."""
        # Sums over layers stay in fp32: cheap, and it takes away much of what rounding to half precision costs.
        x_BTD, rope_BT = self.embed(tokens_BT).float(), self.rope[pos_BT]
        for block, window, kv in zip(self.blocks, self.config.windows, cache, strict=True):
            x_BTD = block(x_BTD, rope_BT, pos_BT, masks[window], *kv)
        x_BTD = self.norm(x_BTD[:, -1:] if last else x_BTD)
        return (self.head or self.embed.as_head)(x_BTD).float()

    def takers(self) -> list[Loadable]:
        """The layers that take checkpoint tensors."""
        return [layer for layer in self.modules() if isinstance(layer, Loadable)]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, every packed copy counted."""
        return sum(layer.nbytes for layer in self.takers())


def load_checkpoint(model: Transformer, directory: Path, progress=lambda done, total: None) -> None:
    """Stream every tensor of a Hugging Face directory into place. All names and shapes are checked before the first
    weight is read; raises InputError that names the tensor or file."""
    index, slices, layers = directory / "model.safetensors.index.json", {}, model.takers()
    shards = read_json(index, {}).get("weight_map", {})
    if not isinstance(shards, dict):
        refuse(f"{index}: expected a weight_map of tensor names to files")
    paths = sorted({directory / str(name) for name in shards.values()}) or sorted(directory.glob("model*.safetensors"))
    for path in paths or refuse(f"{directory}: no model.safetensors and no {index.name}"):
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: missing, truncated or corrupt: {e}") from e
        slices |= {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: list(shape) for layer in layers for name, shape in layer.shapes.items()}
    # Some files repeat a tied head, and the first Llama 2 exports store what config.json already says.
    known = shapes.keys() | {"lm_head.weight"} | {name for name in slices if name.endswith("rotary_emb.inv_freq")}
    for problem, names in (("missing", shapes.keys() - slices.keys()), ("not expected", slices.keys() - known)):
        if names:
            refuse(f"{directory}: tensor {min(names)} is {problem} ({len(names)} in all)")
    for name, shape in shapes.items():
        dtype, got = slices[name].get_dtype(), slices[name].get_shape()
        if got != shape or dtype not in ("BF16", "F16", "F32"):
            refuse(f"{directory}: tensor {name} is {dtype} {got}, expected BF16, F16 or F32 {shape}")
    for done, layer in enumerate(layers, start=1):
        layer.load([slices[name][:] for name in layer.shapes], mapped=True)
        progress(done, len(layers))


def randomize(model: Transformer, seed: int = 0) -> None:
    """Fill a model with random weights (normal, 0.02; vectors one), for benchmarks without a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.takers():
        tensors = [torch.randn(shape, generator=generator, dtype=model.dtype) for shape in layer.shapes.values()]
        layer.load([t.mul_(0.02) if t.dim() > 1 else torch.ones_like(t) for t in tensors], mapped=False)
