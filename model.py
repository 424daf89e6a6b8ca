"""config.json -> Transformer, its KV cache, and the loader that streams safetensors into it. Shapes in names: B rows,
T new tokens, D dim, H heads, V vocabulary, N x K a weight."""

import contextlib
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import quantize
import tp
from kernels import Ops, Packed, causal, leaf_count, opaque_linear, sliding_window

KVCache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, n_kv_heads, length, head_dim]
called = lambda name: field(metadata={"name": name})  # by config.json, where that has another name for it


class InputError(ValueError):
    """The user gave something that cannot work; the message is the one line they read."""


def refuse(message: str):
    raise InputError(message)


@contextlib.contextmanager
def refusing(message: str, *errors: type[Exception]):
    """Within, such errors are what the user gave: they become an InputError of the message and the cause."""
    try:
        yield
    except errors as e:
        cause = f"{e.args[0]} is missing" if isinstance(e, KeyError) else getattr(e, "strerror", None) or e
        raise InputError(f"{message}: {cause}") from e


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file, or `default` where there is no file; raises InputError."""
    with refusing(f"{path}: expected a JSON file", OSError, ValueError):
        raw = json.loads(path.read_text(encoding="utf-8")) if default is None or path.exists() else default
    return raw if isinstance(raw, dict) else refuse(f"{path}: expected a JSON object")


# What sets a family apart, the settings of each kind of rope scaling, and more, all in the words of config.json.
KNOWN = read_json(Path(__file__).parent / "scripts/configs/models.json")
FAMILIES, ROPE_TYPES, MODES = KNOWN["families"], KNOWN["rope_types"], [None, *quantize.LINEARS]
SUPPORTED = {"architectures": FAMILIES, "rope_type": ROPE_TYPES, "quantization mode": MODES} | KNOWN["supported"]


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    dim: int = called("hidden_size")
    n_layers: int = called("num_hidden_layers")
    n_heads: int = called("num_attention_heads")
    n_kv_heads: int = called("num_key_value_heads")
    head_dim: int
    ffn_dim: int = called("intermediate_size")
    n_experts: int = called("num_experts")  # 1: a dense model
    experts_per_token: int = called("num_experts_per_tok")
    norm_topk_prob: bool  # whether the weights of a token's experts add up to 1
    ffn_names: list[str]  # of the checkpoint: the block, gate, up and down
    context: int = called("max_position_embeddings")
    tied: bool = called("tie_word_embeddings")
    qkv_bias: bool
    o_bias: bool = called("attention_bias")
    ffn_bias: bool = called("mlp_bias")
    qk_norm: bool
    norm_eps: float = called("rms_norm_eps")
    windows: tuple[int | None, ...]  # each layer's sliding window, None where attention is full
    rope: dict  # rope_theta, rope_type and what ROPE_TYPES names for it
    mode: str | None = called("quantization mode")  # of linear layers, in the checkpoint if `stored`, or loading
    group_size: int  # weights of int4 that share a scale
    stored: bool = called("quantization mode")

    @classmethod
    def from_file(cls, path: Path, mode: str | None = None, group_size: int = 32) -> "ModelConfig":
        """Read a Hugging Face config.json, of a model that is quantized while loading if a `mode` is given; raises
        InputError naming what is missing, wrong or not supported."""
        given = {name: value for name, value in read_json(path).items() if value is not None}
        raw = KNOWN["defaults"] | {"num_experts": given.get("num_local_experts", 1)} | given
        fits = lambda value: type(value) is int and value > 0
        size = lambda name: raw[name] if fits(raw[name]) else refuse(f"{name} is {raw[name]}, expected an integer > 0")
        with refusing(str(path), LookupError, TypeError, AttributeError, ArithmeticError, ValueError):
            rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")} | raw.get("rope_scaling", {})
            rope = {"rope_type": rope.get("type", "default")} | rope
            raw |= rope | {"rope": rope, "architectures": (raw["architectures"] or [None])[0]}
            how = {"group_size": 32} | raw.get("quantization_config", {})
            raw |= {"quantization mode": how.get("mode", how.get("quant_method")), "group_size": how["group_size"]}
            for name, choices in SUPPORTED.items():
                if raw[name] not in choices:
                    refuse(f"{name} {raw[name]} is not supported, choose from {', '.join(map(str, choices))}")
            raw |= {"qkv_bias": raw.get("attention_bias")} | FAMILIES[raw["architectures"]]
            raw |= {"intermediate_size": raw.get("moe_intermediate_size", raw["intermediate_size"])}
            n_heads, n_layers = size("num_attention_heads"), size("num_hidden_layers")
            raw = {"num_key_value_heads": n_heads, "head_dim": size("hidden_size") // n_heads} | raw
            # Without layer_types, a Qwen config names the first layer that slides; in a Mistral every layer does.
            slides = [kind == "sliding_attention" for kind in raw.get("layer_types", ())]
            slides = slides or [i >= raw.get("max_window_layers", 0) for i in range(n_layers)]
            windowed = raw.get("use_sliding_window") and "sliding_window" in raw
            raw["windows"] = tuple(size("sliding_window") if windowed and slide else None for slide in slides)
            read = {int: size, float: lambda name: float(raw[name]), bool: lambda name: bool(raw.get(name))}
            config = cls(*(read.get(f.type, raw.get)(f.metadata.get("name", f.name)) for f in fields(cls)))
            rope_table(config, 1)  # raises for settings that are missing or wrong
            if n_heads % config.n_kv_heads or config.head_dim % 2 or len(slides) != n_layers:
                refuse("expected KV heads that divide the heads, an even head_dim and a layer_type for each layer")
            if config.experts_per_token > config.n_experts:
                refuse(f"{config.experts_per_token} experts a token, expected at most the {config.n_experts} there are")
            mode and config.mode and refuse(f"the checkpoint is {config.mode} already")
            return replace(config, mode=mode, group_size=group_size) if mode else config


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin by position and frequency, fp32 [length, 2, head_dim / 2] (RoFormer, eq. 34); "linear" divides
    the frequencies, "llama3" (Llama 3.1) divides the long wavelengths, keeps the short and blends those between."""
    settings = [float(config.rope[name]) for name in ROPE_TYPES[config.rope["rope_type"]]]
    factor, low, high, original_context = settings + [1.0, 0.0, 1.0, 0.0][len(settings) :]  # which change nothing
    freq = 1.0 / float(config.rope["rope_theta"] or 10000.0) ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    keep = ((original_context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    freq = keep * freq + (1 - keep) * freq / factor
    angle = torch.arange(length).float()[:, None] * freq
    return torch.stack((angle.cos(), angle.sin()), dim=1)


class Layer(nn.Module):
    """A part of a model. Where `shapes` names checkpoint tensors, its `load` is given them all, in that order; it
    returns the bytes that every step then reads. `mode` is of quantization."""

    def __init__(self, model: "Transformer", shapes: dict[str, tuple[int, ...]] | None = None):
        super().__init__()
        self.ops, self.config, self.device, self.dtype = model.ops, model.config, model.device, model.dtype
        self.ranks, self.heads = model.ranks, model.heads.shape
        self.shapes, self.mode = shapes or {}, None
        model.takers += [self] if shapes else []


class Linear(Layer):
    """y = x W^T + b of the checkpoint layers of one input, stacked. Ranks share the outputs, in whole units, or where
    `axis` is 1 the inputs: there, sums are made of leaves. A `router` is whole at every rank, and never quantized."""

    def __init__(self, model, parts: dict[str, int], in_features: int, bias: bool, axis=0, unit=1, router=False):
        config = model.config
        # In a head, int4 would be no faster on a CPU.
        mode = None if router else config.mode and "int8" if "lm_head" in parts else config.mode
        if mode == "int4" and in_features % config.group_size:
            refuse(f"group_size {config.group_size} does not divide {in_features} inputs, choose from 32, 64, 128")
        kinds = quantize.parts(mode if config.stored else None, torch.zeros(1, in_features), config.group_size)
        kinds |= {"bias": torch.zeros(1)} if bias else {}  # as of one row
        shapes = {f"{x}.{kind}": (N, *kinds[kind].shape[1:]) for x, N in parts.items() for kind in kinds}
        super().__init__(model, shapes)
        self.mode, self.kinds, multiple = mode, list(kinds), config.group_size if mode == "int4" else 32
        self.leaves = leaf_count(config.n_kv_heads, in_features, multiple) if axis else 1
        self.axis, self.unit, self.split = axis, unit, axis == 1 and self.ranks > 1
        self.dtype = torch.float32 if router else self.dtype

    def load(self, tensors: list[Tensor]) -> int:
        # Each checkpoint layer has the same kinds in turn; to stack them makes a copy, outside the file.
        tensors = tensors if self.axis else [tp.part(t, 0, self.ranks, self.unit) for t in tensors]
        parts = {kind: torch.cat(tensors[i :: len(self.kinds)]).to(self.device) for i, kind in enumerate(self.kinds)}
        if "scale" not in parts:
            parts = {kind: tensor.to(self.dtype) for kind, tensor in parts.items()}
            parts |= quantize.parts(self.mode, parts["weight"], self.config.group_size)
        self.bias = parts.pop("bias", None) if self.split else None
        ranks = self.ranks if self.split else 1  # cut only now, as a scale may be of a whole row
        parts = {kind: tp.part(tensor, 1, ranks).contiguous() for kind, tensor in parts.items()}
        self.packed = quantize.pack(self.ops, **parts, leaves=self.leaves // ranks)
        self.packed.partial = self.split
        return self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.linear(x, self.packed)
        return tp.add_up(y, self.bias, self.ops.exact) if self.split else y


class RMSNorm(Layer):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def load(self, tensors: list[Tensor]) -> int:
        self.weight = tensors[0].to(self.device, self.dtype, copy=True).float()
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x.float(), self.weight, self.config.norm_eps).to(self.dtype)


class Embedding(Layer):
    """The token embedding, and with it the head of a model that ties the two. On a CPU its rows are read where they
    lie in the mapped file, one a token, so the only copy of a tied table in memory is the one packed for the head."""

    def load(self, tensors: list[Tensor]) -> int:
        self.weight = tensors[0] if self.device.type == "cpu" else tensors[0].to(self.device, self.dtype)
        rows, mode = tp.part(self.weight, 0, self.ranks), self.config.mode and "int8"
        self.packed = self.config.tied and quantize.pack(self.ops, **quantize.parts(mode, rows.to(self.dtype), 0))
        return self.packed.nbytes if self.packed else 0

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BT, self.weight).to(self.dtype)


class Attention(Layer):
    """Grouped-query attention with rotary positions, over a KV cache, of norm(x) and added to x."""

    def __init__(self, model: "Transformer", prefix: str):
        super().__init__(model)
        config, D, attn = model.config, model.config.head_dim, f"{prefix}.self_attn"
        self.norm = RMSNorm(model, {f"{prefix}.input_layernorm.weight": (config.dim,)})
        parts = {f"{attn}.q_proj": config.n_heads * D} | {f"{attn}.{x}_proj": config.n_kv_heads * D for x in "kv"}
        self.qkv = Linear(model, parts, config.dim, config.qkv_bias, unit=D)
        self.o = Linear(model, {f"{attn}.o_proj": config.dim}, config.n_heads * D, config.o_bias, axis=1)
        self.qk_norms = nn.ModuleList(RMSNorm(model, {f"{attn}.{x}_norm.weight": (D,)}) for x in "qk" if config.qk_norm)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, pos_BT: Tensor, mask, *kv_cache: Tensor) -> Tensor:
        D, G, H = self.config.head_dim, self.heads[0], self.heads.numel()
        qk, v = self.qkv(self.norm(x_BTD)).unflatten(-1, (-1, D)).split((H + G, G), dim=2)
        if self.qk_norms:
            qk = torch.cat([norm(x) for norm, x in zip(self.qk_norms, qk.split((H, G), dim=2), strict=True)], dim=2)
        # Rotary positions: each pair (i, i + D / 2) of q and k is rotated by its angle, in fp32, rounded once.
        a, b = qk.float().chunk(2, dim=-1)
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(qk.dtype).split((H, G), dim=2)
        return x_BTD + self.o(self.ops.attention(q, k, v, *kv_cache, pos_BT, mask, D**-0.5))


class FeedForward(Layer):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, model: "Transformer", prefix: str):
        super().__init__(model)
        config, bias = model.config, model.config.ffn_bias and model.config.n_experts == 1  # experts have none
        gate, up, down = (f"{prefix}.{name}" for name in config.ffn_names[1:])
        self.gate_up = Linear(model, {gate: config.ffn_dim, up: config.ffn_dim}, config.dim, bias)
        self.down = Linear(model, {down: config.dim}, config.ffn_dim, bias, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x)))


class Mixture(Layer):
    """Of feed-forward experts (Shazeer et al. 2017): the sum of those k that a router finds likeliest for a token, of a
    tie the first, times their probabilities. A graph sees one opaque op."""

    def __init__(self, model: "Transformer", prefix: str):
        super().__init__(model)
        n, self.handle = model.config.n_experts, next(Packed.handles)
        self.router = Linear(model, {f"{prefix}.gate": n}, model.config.dim, False, unit=n, router=True)
        self.experts = nn.ModuleList(FeedForward(model, f"{prefix}.experts.{i}") for i in range(n))
        Packed.table[self.handle] = self

    def forward(self, x: Tensor) -> Tensor:
        return opaque_linear(x, self.handle, (self.config.dim,), torch.float32)

    def products(self, x_BTD: Tensor) -> Tensor:
        """Only experts that are chosen are read, each once for all its tokens. K experts a token."""
        add_up = lambda y_BTK: functools.reduce(torch.add, y_BTK.unbind(2))
        likeliest = self.router(x_BTD.float()).softmax(-1).sort(dim=-1, descending=True, stable=True)
        probs_BTK, chosen_BTK = (z[..., : self.config.experts_per_token] for z in likeliest)
        probs_BTK = probs_BTK / add_up(probs_BTK)[..., None] if self.config.norm_topk_prob else probs_BTK
        y_BTKD = x_BTD.new_empty(*chosen_BTK.shape, self.config.dim, dtype=torch.float32)
        for i in chosen_BTK.unique().tolist():
            at, expert = (chosen_BTK == i).nonzero(as_tuple=True), self.experts[i]
            y_BTKD[at] = self.ops.linear(self.ops.silu_mul(expert.gate_up(x_BTD[at[:2]])), expert.down.packed).float()
        weigh = lambda y_BTKD: add_up(y_BTKD * probs_BTK[..., None])
        over_ranks = lambda y: tp.add_up(y, None, self.ops.exact) if self.ranks > 1 else y
        return weigh(over_ranks(y_BTKD)) if self.ops.exact else over_ranks(weigh(y_BTKD))  # which sends less


class Transformer(nn.Module):
    """A decoder of the Llama family, empty until `load_checkpoint` fills it; one of the `ranks` that share it."""

    def __init__(self, config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype, ranks: int = 1):
        super().__init__()
        if ranks not in (fit := tp.degrees(config, ops.exact)):
            refuse(f"{ranks} processes cannot share this model, choose from {', '.join(map(str, fit))}")
        self.ranks, heads = ranks, tp.part(torch.arange(config.n_heads, device=device), 0, ranks)
        self.heads = heads.view(max(config.n_kv_heads // ranks, 1), -1)  # of queries, this rank's, by KV head
        self.config, self.ops, self.device, self.dtype = config, ops, device, dtype
        # Bytes of weights that every step reads; layers that take checkpoint tensors; whether steps are CUDA graphs.
        self.nbytes, self.takers, self.graphed = 0, [], False
        self.embed = Embedding(self, {"model.embed_tokens.weight": (config.vocab_size, config.dim)})
        self.head = None if config.tied else Linear(self, {"lm_head": config.vocab_size}, config.dim, bias=False)
        prefixes = [f"model.layers.{i}" for i in range(config.n_layers)]
        norm = lambda prefix: RMSNorm(self, {f"{prefix}.post_attention_layernorm.weight": (config.dim,)})
        ffn = FeedForward if config.n_experts == 1 else Mixture
        parts = lambda prefix: (Attention(self, prefix), norm(prefix), ffn(self, f"{prefix}.{config.ffn_names[0]}"))
        self.layers = nn.ModuleList(nn.ModuleList(parts(prefix)) for prefix in prefixes)
        self.norm = RMSNorm(self, {"model.norm.weight": (config.dim,)})
        self.rope = rope_table(config, config.context + 64).to(device)  # drafts may reach beyond the end
        self.mask_mods = {w: causal if w is None else sliding_window(w) for w in set(config.windows)}
        self.decode_stack = self.verify_stack = self.prefill_stack = self.stack  # what compiling replaces

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """Zeroed, as 0 x NaN would poison a row; with a spare block, as graphs of a part do not fit the whole."""
        block = 512 if self.ops.exact else 64  # of keys, which kernels take as a whole
        shape = (batch_size, len(self.heads), -(-length // block) * block + 64, self.config.head_dim)
        with refusing(f"a cache of {batch_size} x {length} tokens does not fit the memory", RuntimeError):
            return [tuple(torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in "kv") for _ in self.layers]

    def forward(self, tokens_BT: Tensor, pos_BT: Tensor, cache: KVCache, end: int, last=False, decode=False) -> Tensor:
        """fp32 logits [B, T, V] (T = 1 with `last`) of tokens at absolute positions `pos_BT`; `end` is one past the
        highest. Their keys and values are written to the cache, which must hold every earlier position."""
        # A CPU is faster at whole blocks of keys. A CUDA graph needs one shape: every step looks over the whole cache.
        span = -(-end // 64) * 64 if self.device.type == "cpu" else cache[0][0].shape[2]
        masks = {w: self.ops.mask(mod, pos_BT, span, self.heads, self.dtype) for w, mod in self.mask_mods.items()}
        one, several = (self.decode_stack, self.verify_stack) if decode else (self.stack, self.prefill_stack)
        return (one if tokens_BT.shape[1] == 1 else several)(tokens_BT, pos_BT, masks, cache, last)

    # CPython keeps frames in blocks of 16 KB. Where one ends amid the calls of a step, each maps and unmaps memory: up
    # to twice the time, by how deep the caller is. A frame this large begins a block that has room for them all.
    forward.__code__ = forward.__code__.replace(co_stacksize=1 << 14)

    def stack(self, tokens_BT: Tensor, pos_BT: Tensor, masks: dict, cache: KVCache, last: bool) -> Tensor:
        """Every layer and the head: all that torch.compile gets to see."""
        # Sums over layers stay in fp32: cheap, and it takes away much of what rounding to half precision costs.
        x_BTD, (cos, sin) = self.embed(tokens_BT).float(), self.rope[pos_BT].unsqueeze(2).unbind(3)
        for (attention, norm, ffn), window, kv in zip(self.layers, self.config.windows, cache, strict=True):
            x_BTD = attention(x_BTD, cos, sin, pos_BT, masks[window], *kv)
            x_BTD = x_BTD + ffn(norm(x_BTD))
        x_BTD = self.norm(x_BTD[:, -1:] if last else x_BTD)
        logits_BTV = self.ops.linear(x_BTD, (self.head or self.embed).packed).float()
        return tp.all_gather(logits_BTV).movedim(0, -2).flatten(-2) if self.ranks > 1 else logits_BTV


def load_checkpoint(model: Transformer, directory: Path, load: Callable = lambda layer, tensors: layer.load(tensors)):
    """Stream every tensor of a Hugging Face directory into place. All names and shapes are checked before the first
    weight is read; raises InputError that names the tensor or file."""
    index, slices, layers = directory / "model.safetensors.index.json", {}, model.takers
    with refusing(f"{index}: expected a weight_map of tensor names to files", AttributeError):
        shards = {directory / str(name) for name in read_json(index, {}).get("weight_map", {}).values()}
    paths = sorted(shards or directory.glob("model*.safetensors"))
    for path in paths or refuse(f"{directory}: no model.safetensors and no {index.name}"):
        with refusing(f"{path}: missing, truncated or corrupt", OSError, SafetensorError):
            file = safe_open(path, "pt")
        slices |= {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: list(shape) for layer in layers for name, shape in layer.shapes.items()}
    # Some files repeat a tied head, and the first Llama 2 exports store what config.json already says.
    known = shapes.keys() | {"lm_head.weight"} | {name for name in slices if name.endswith("rotary_emb.inv_freq")}
    for problem, names in (("missing", shapes.keys() - slices.keys()), ("not expected", slices.keys() - known)):
        names and refuse(f"{directory}: tensor {min(names)} is {problem} ({len(names)} in all)")
    for name, shape in shapes.items():
        stem, dtype, got = name.removesuffix("weight"), slices[name].get_dtype(), slices[name].get_shape()
        expected = "U8" if f"{stem}zero" in shapes else "I8" if f"{stem}scale" in shapes else "BF16, F16 or F32"
        if got != shape or dtype not in expected:
            refuse(f"{directory}: tensor {name} is {dtype} {got}, expected {expected} {shape}")
    for done, layer in enumerate(layers, start=1):
        model.nbytes += load(layer, [slices[name][:] for name in layer.shapes])
        tp.progress(f"loading {done}/{len(layers)}", end="\r\n"[done == len(layers)])
