"""A decoder of the Llama family: its configuration, layers and KV cache.
Letters in names are dimensions: B rows of a batch, T new tokens, D head_dim, H query heads, G KV
heads, V vocabulary, N x K a weight."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import quantize
import tp
from kernels import Fast, InputError, causal, leaf_count, sliding_window

KVCache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, G, length, head_dim]

ROPE_SETTINGS = {  # by rope_type, those that change the frequencies
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, by the names of config.json where that has one."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict  # rope_theta, rope_type and what ROPE_SETTINGS names for it
    windows: list[int | None]  # each layer's sliding window, None where attention is full
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False  # of the output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    quantization: str | None = None  # of linear layers: None, "int8" or "int4"
    group_size: int = 32  # weights of int4 that share a scale
    stored: bool = False  # whether the checkpoint is quantized, or will be while loading
    settings: dict = field(default_factory=dict)  # all of config.json, for what is not named here


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin by position and frequency, fp32 [length, 2, head_dim / 2] (RoFormer, eq. 34).
    "linear" divides the frequencies; "llama3" (Llama 3.1) divides the long wavelengths, keeps the
    short and blends those between."""
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_SETTINGS:
        choices = ", ".join(ROPE_SETTINGS)
        raise InputError(f"rope_type {rope['rope_type']} is not supported, choose from {choices}")
    settings = [float(rope[name]) for name in ROPE_SETTINGS[rope["rope_type"]]]
    neutral = [1.0, 0.0, 1.0, 0.0]
    factor, low, high, original_context = settings + neutral[len(settings) :]
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    freq = 1.0 / float(rope["rope_theta"]) ** exponents
    turns = original_context * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    freq = keep * freq + (1 - keep) * freq / factor
    angle = torch.arange(length).float()[:, None] * freq
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (i, i + D / 2) is rotated by its angle, in fp32, and rounded once."""
    a, b = x_BTHD.float().chunk(2, dim=-1)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    return torch.cat((turned_a, turned_b), dim=-1).to(x_BTHD.dtype)


class Layer(nn.Module):
    """A part of a model. Where `shapes` names checkpoint tensors, its `load` is given them all, in
    that order, and returns the bytes that every step then reads. `ops` is looked up at each call:
    a test may give a layer others."""

    mode = None  # of quantization

    def __init__(self, model: "Transformer", shapes: dict[str, tuple[int, ...]] | None = None):
        super().__init__()
        self.ops, self.config = model.ops, model.config
        self.device, self.dtype = model.device, model.dtype
        self.ranks = model.ranks
        self.shapes = shapes or {}
        if shapes:
            model.loaders.append(self)


class Linear(Layer):
    """y = x W^T + b of the checkpoint layers of one input, stacked: `outputs` by name. Ranks share
    the outputs, in whole units, or where `axis` is 1 the inputs: there, sums are made of leaves. It
    is quantized as `config` says, by default the model's."""

    def __init__(self, model, outputs, in_features, bias=False, axis=0, unit=1, config=None):
        config = config or model.config
        if config.quantization == "int4" and in_features % config.group_size:
            group = f"group_size {config.group_size} does not divide {in_features} inputs"
            raise InputError(f"{group}, choose from 32, 64, 128")
        stored = config.quantization if config.stored else None
        kinds = quantize.quantized(stored, torch.zeros(1, in_features), config.group_size)
        if bias:
            kinds["bias"] = torch.zeros(1)  # as of one row, like the others
        pairs = [(name, kind) for name in outputs for kind in kinds]
        shapes = {f"{x}.{kind}": (outputs[x], *kinds[kind].shape[1:]) for x, kind in pairs}
        super().__init__(model, shapes)
        self.mode, self.group_size = config.quantization, config.group_size
        self.kinds = list(kinds)
        self.axis, self.unit = axis, unit
        self.leaves = 1
        self.split = axis == 1 and self.ranks > 1
        if axis == 1:
            multiple = config.group_size if self.mode == "int4" else 32
            leaves = leaf_count(config.num_key_value_heads, in_features, multiple)
            self.leaves = 1 if leaves % self.ranks else leaves // self.ranks

    def load(self, tensors: list[Tensor]) -> int:
        # Each checkpoint layer has the same kinds in turn; stacked, they leave the mapped file.
        if self.axis == 0:
            tensors = [tp.part(t, 0, self.ranks, self.unit) for t in tensors]
        stacked = {}
        for i, kind in enumerate(self.kinds):
            stacked[kind] = torch.cat(tensors[i :: len(self.kinds)]).to(self.device)
        if "scale" not in stacked:
            stacked = {kind: tensor.to(self.dtype) for kind, tensor in stacked.items()}
            stacked |= quantize.quantized(self.mode, stacked["weight"], self.group_size)
        bias = stacked.pop("bias", None)
        self.register_buffer("bias", bias if self.split else None)
        if self.split:  # cut only now, as a scale may be of a whole row
            bias = None
            stacked = {k: tp.part(t, 1, self.ranks).contiguous() for k, t in stacked.items()}
        how = (bias, self.leaves, self.split)
        self.packed = quantize.pack(self.mode, self.ops, stacked, *how)
        return self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.linear(x, self.packed)
        return tp.add_up(y, self.bias, self.ops.exact) if self.split else y


class RMSNorm(Layer):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, model: "Transformer", name: str, size: int):
        super().__init__(model, {f"{name}.weight": (size,)})

    def load(self, tensors: list[Tensor]) -> int:
        weight = tensors[0].to(self.device, self.dtype, copy=True)
        self.register_buffer("weight", weight.float())
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.rms_norm(x.float(), self.weight, self.config.rms_norm_eps)
        return y.to(self.dtype)


class Embedding(Layer):
    """The token embedding. On a CPU its rows are read where they lie in the mapped file, one a
    token: so the only copy in memory of a table that is the head as well is the head's."""

    def load(self, tensors: list[Tensor]) -> int:
        on_cpu = self.device.type == "cpu"
        weight = tensors[0] if on_cpu else tensors[0].to(self.device, self.dtype)
        self.register_buffer("weight", weight)
        return 0

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BT, self.weight).to(self.dtype)


class FeedForward(Layer):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, model: "Transformer", gate: str, up: str, down: str, inner: int, bias: bool):
        super().__init__(model)
        hidden = model.config.hidden_size
        self.gate_up = Linear(model, {gate: inner, up: inner}, hidden, bias)
        self.down = Linear(model, {down: hidden}, inner, bias, axis=1)

    def inner(self, x: Tensor) -> Tensor:
        return self.ops.silu_mul(self.gate_up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))


class Block(Layer):
    """One layer: grouped-query attention with rotary positions over a KV cache, and a feed-forward
    network, each of a norm of x, and added to x."""

    capturable = True  # whether a CUDA graph can hold it: nothing in it waits for the device
    rotary = True  # whether its queries and keys know of positions

    def __init__(self, model: "Transformer", index: int):
        super().__init__(model)
        config, prefix = model.config, f"model.layers.{index}"
        attn = f"{prefix}.self_attn"
        D, hidden = config.head_dim, config.hidden_size
        q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
        self.attention_norm = RMSNorm(model, f"{prefix}.input_layernorm", hidden)
        outputs = {f"{attn}.q_proj": q, f"{attn}.k_proj": kv, f"{attn}.v_proj": kv}
        self.qkv = Linear(model, outputs, hidden, config.qkv_bias, unit=D)
        self.o = Linear(model, {f"{attn}.o_proj": hidden}, q, config.attention_bias, axis=1)
        self.q_norm = RMSNorm(model, f"{attn}.q_norm", D) if config.qk_norm else None
        self.k_norm = RMSNorm(model, f"{attn}.k_norm", D) if config.qk_norm else None
        self.ffn_norm = RMSNorm(model, f"{prefix}.post_attention_layernorm", hidden)
        self.ffn = self.make_ffn(model, prefix)
        self.G, self.R = model.heads.shape

    def make_ffn(self, model: "Transformer", prefix: str) -> Layer:
        names = (f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        return FeedForward(model, *names, model.config.intermediate_size, model.config.mlp_bias)

    def forward(self, x, cos, sin, pos_BT, mask, k_cache, v_cache) -> Tensor:
        """fp32 [B, T, hidden_size]."""
        D, G = self.config.head_dim, self.G
        H = G * self.R
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, D))
        qk, v = heads.split((H + G, G), dim=2)
        if self.q_norm:
            q, k = qk.split((H, G), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if self.rotary:
            qk = rotate(qk, cos, sin)
        q, k = qk.split((H, G), dim=2)
        y = self.ops.attention(q, k, v, k_cache, v_cache, pos_BT, mask, D**-0.5)
        x = x + self.o(y)
        return x + self.ffn(self.ffn_norm(x))


UNBIASED = {"attention_bias": False, "mlp_bias": False}
ALIKE = {"max_window_layers": 0, "layer_types": None}  # all layers have the window, or none
FAMILIES = {  # by architecture: the layer, and what config.json means, whatever it says
    "LlamaForCausalLM": (Block, {"use_sliding_window": False}),
    "MistralForCausalLM": (Block, {"use_sliding_window": True} | UNBIASED | ALIKE),
    "Qwen2ForCausalLM": (Block, UNBIASED | {"qkv_bias": True}),
    "Qwen3ForCausalLM": (Block, {"qk_norm": True, "mlp_bias": False}),
}


class Transformer(nn.Module):
    """A decoder, empty until each of its `loaders` is given its tensors; one of the `ranks` that
    share it."""

    def __init__(self, config: ModelConfig, ops: Fast, device: torch.device, dtype, ranks: int = 1):
        super().__init__()
        if ranks not in (valid := tp.degrees(config, ops.exact)):
            choices = ", ".join(map(str, valid))
            raise InputError(f"{ranks} processes cannot share this model, choose from {choices}")
        self.config, self.ops = config, ops
        self.device, self.dtype = device, dtype
        self.ranks = ranks
        heads = tp.part(torch.arange(config.num_attention_heads, device=device), 0, ranks)
        G = max(config.num_key_value_heads // ranks, 1)
        self.heads = heads.view(G, -1)  # the numbers of this rank's query heads, by KV head [G, R]
        self.loaders: list[Layer] = []  # those that take checkpoint tensors
        self.nbytes = 0  # of weights that every step reads
        embedding, table = "model.embed_tokens", (config.vocab_size, config.hidden_size)
        self.embed = Embedding(self, {f"{embedding}.weight": table})
        self.head = self.make_head(embedding if config.tie_word_embeddings else "lm_head")
        block, _ = FAMILIES[config.architecture]
        self.layers = nn.ModuleList(block(self, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(self, "model.norm", config.hidden_size)
        # Drafts may reach beyond the end of the context.
        self.rope = rope_table(config, config.max_position_embeddings + 64).to(device)
        self.mask_mods = {w: sliding_window(w) if w else causal for w in set(config.windows)}
        self.decode = self.verify = self.prefill = self.stack  # to be compiled
        self.graphed = False  # whether steps are CUDA graphs

    def make_head(self, name: str) -> Linear:
        """In 8 bits where others have 4, no faster on a CPU; a tied one only while loading."""
        mode, stored = self.config.quantization and "int8", self.config.stored and name == "lm_head"
        config = replace(self.config, quantization=mode, stored=stored)
        return Linear(self, {name: config.vocab_size}, config.hidden_size, config=config)

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """Zeroed, as 0 x NaN would poison a row; with a spare block, as a graph of a part needs."""
        block = 512 if self.ops.exact else 64  # of keys, which kernels take as a whole
        whole = -(-length // block) * block + 64
        shape = (batch_size, len(self.heads), whole, self.config.head_dim)
        options = {"device": self.device, "dtype": self.dtype}
        try:  # keys and values apart: of views of one tensor, compiled code loses what is written
            new = [torch.zeros(shape, **options) for _ in range(2 * len(self.layers))]
            return list(zip(new[::2], new[1::2], strict=True))
        except RuntimeError as e:
            size = f"{batch_size} x {length} tokens"
            raise InputError(f"a cache of {size} does not fit the memory: {e}") from e

    def forward(self, tokens_BT, pos_BT, cache: KVCache, end: int, last=False, decode=False):
        """fp32 logits [B, T, V] (T = 1 with `last`) of tokens at absolute positions `pos_BT`; `end`
        is one past the highest. Their keys and values are written to the cache, which must hold
        every earlier position."""
        # A CPU is quicker in whole blocks. A CUDA graph, of one shape, looks over all the cache.
        span = -(-end // 64) * 64 if self.device.type == "cpu" else cache[0][0].shape[2]
        masks = {}
        for window, mask_mod in self.mask_mods.items():
            masks[window] = self.ops.mask(mask_mod, pos_BT, span, self.heads, self.dtype)
        masks = [masks[window] for window in self.config.windows]
        run = self.verify if decode else self.prefill
        if tokens_BT.shape[1] == 1:
            run = self.decode if decode else self.stack
        x = self.embed(tokens_BT).float()  # sums over layers in fp32: cheap, and much more precise
        cos, sin = self.rope[pos_BT].unsqueeze(2).unbind(3)
        x = run(self.layers, x, cos, sin, pos_BT, masks, cache)
        logits_BTV = self.head(self.norm(x[:, -1:] if last else x)).float()
        if self.ranks > 1:
            logits_BTV = tp.all_gather(logits_BTV).movedim(0, -2).flatten(-2)
        return logits_BTV

    @staticmethod
    def stack(layers, x, cos, sin, pos_BT, masks: list, cache: KVCache) -> Tensor:
        """Some layers, each with its mask and its part of the cache."""
        for layer, mask, kv in zip(layers, masks, cache, strict=True):
            x = layer(x, cos, sin, pos_BT, mask, *kv)
        return x
