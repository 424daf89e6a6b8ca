"""A decoder of the Llama family: its configuration, layers and KV cache. Letters are dimensions: B
rows, T new tokens, D head_dim, H query heads, G KV heads, V vocabulary, N x K a weight."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import quantize
import tp
from kernels import Fast, InputError, SlidingWindow, causal, leaf_count

KVCache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, G, length, head_dim]


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
    windows: list[int | None]  # each layer's sliding window, None where attention is full
    ropes: dict[int | None, dict]  # by window: rope_type, rope_theta and what else that kind takes
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False  # of the output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    quantization: str | None = None  # of linear layers: None, "int8" or "int4"
    group_size: int = 32  # weights of int4 that share a scale
    stored: bool = False  # whether the checkpoint is quantized, or will be while loading
    settings: dict = field(default_factory=dict)  # all of config.json, for what is not named here


def frequencies(config: ModelConfig, rope: dict) -> tuple[Tensor, float]:
    """How far pairs turn at each position, fp32 (RoFormer, eq. 15), and a factor of cos and sin."""
    size = int(config.head_dim * rope.get("partial_rotary_factor", 1))
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2) / size), 1.0


def rope_table(config: ModelConfig, rope: dict, length: int) -> Tensor:
    """cos and sin by position and pair, fp32 [length, 2, pairs]."""
    freq, factor = ROPES[rope["rope_type"]](config, rope)
    angle = torch.arange(length).float()[:, None] * freq
    return torch.stack((angle.cos(), angle.sin()), dim=1) * factor


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (i, i + pairs) is rotated by its angle, in fp32, and rounded once."""
    pairs = cos.shape[-1]
    a, b, rest = x_BTHD.float().tensor_split((pairs, 2 * pairs), dim=-1)
    turned_a = (a * cos).sub_(b * sin)
    turned_b = (b * cos).add_(a * sin)
    return torch.cat((turned_a, turned_b, rest), dim=-1).to(x_BTHD.dtype)


class Layer(nn.Module):
    """`load` is given the checkpoint tensors named in `shapes`, and returns what a step reads."""

    def __init__(self, model: "Transformer", shapes: dict | None = None):
        super().__init__()
        self.config = model.config
        self.ops = model.ops  # looked up at each call: a test may give a layer others
        self.device, self.dtype = model.device, model.dtype
        self.ranks = model.ranks
        self.mode = None  # of quantization
        self.shapes = shapes or {}
        if shapes:
            model.loaders.append(self)


class Linear(Layer):
    """y = x W^T + b of checkpoint layers of one input, stacked: `outputs` by name. Ranks cut these,
    in whole units, or if `axis` is 1 the inputs: sums of leaves. `config` says how to quantize."""

    def __init__(self, model, outputs, in_features, bias=False, axis=0, unit=1, config=None):
        config = config or model.config
        if config.quantization == "int4" and in_features % config.group_size:
            group = f"group_size {config.group_size} does not divide {in_features} inputs"
            raise InputError(f"{group}, choose one of 32, 64, 128 that does")
        stored = config.quantization if config.stored else None
        kinds = quantize.quantized(stored, torch.zeros(1, in_features), config.group_size)
        if bias:
            kinds["bias"] = torch.zeros(1)  # as of one row, like the others
        shapes = {}
        for name, rows in outputs.items():
            for kind, row in kinds.items():
                shapes[f"{name}.{kind}"] = (rows, *row.shape[1:])
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
        if self.axis == 0:
            tensors = [tp.part(t, 0, self.ranks, self.unit) for t in tensors]
        stacked = {}  # copies, which leave the mapped file
        for i, kind in enumerate(self.kinds):  # each checkpoint layer has these in turn
            stacked[kind] = torch.cat(tensors[i :: len(self.kinds)]).to(self.device)
        if "scale" not in stacked:
            stacked = {kind: tensor.to(self.dtype) for kind, tensor in stacked.items()}
            stacked |= quantize.quantized(self.mode, stacked["weight"], self.group_size)
        bias = stacked.pop("bias", None)
        self.register_buffer("bias", bias if self.split else None)
        if self.split:  # cut only now, as a scale may be of a whole row
            bias = None
            parts = {kind: tp.part(x, 1, self.ranks) for kind, x in stacked.items()}
            stacked = {kind: x.contiguous() for kind, x in parts.items()}
        self.packed = quantize.pack(self.mode, self.ops, stacked, bias, self.leaves, self.split)
        return self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.linear(x, self.packed)
        return tp.add_up(y, self.bias, self.ops.exact) if self.split else y


class RMSNorm(Layer):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, model, name: str, size: int):
        super().__init__(model, {f"{name}.weight": (size,)})

    def load(self, tensors: list[Tensor]) -> int:
        weight = tensors[0].to(self.device, self.dtype, copy=True)
        self.register_buffer("weight", weight.float())
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.rms_norm(x.float(), self.weight, self.config.rms_norm_eps)
        return y.to(self.dtype)


class Embedding(Layer):
    """The token embedding. A CPU reads rows in the mapped file: only a tied head has a copy."""

    def load(self, tensors: list[Tensor]) -> int:
        on_cpu = self.device.type == "cpu"
        weight = tensors[0] if on_cpu else tensors[0].to(self.device, self.dtype)
        self.register_buffer("weight", weight)
        return 0

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BT, self.weight).to(self.dtype)


class FeedForward(Layer):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, model, gate: str, up: str, down: str):
        super().__init__(model)
        config, inner = model.config, model.config.intermediate_size
        self.gate_up = Linear(model, {gate: inner, up: inner}, config.hidden_size, config.mlp_bias)
        self.down = Linear(model, {down: config.hidden_size}, inner, config.mlp_bias, axis=1)

    def inner(self, x: Tensor) -> Tensor:
        return self.ops.silu_mul(self.gate_up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))


class Block(Layer):
    """A layer: grouped-query attention over a KV cache and a feed-forward network, added to x."""

    capturable = True  # whether a CUDA graph can hold it: nothing in it waits for the device
    rotary = True  # whether its queries and keys know of positions
    norm, embedding = RMSNorm, Embedding  # classes, for all of the model
    feed_forward = FeedForward
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

    def __init__(self, model, index: int):
        super().__init__(model)
        config, prefix = model.config, f"model.layers.{index}"
        attn = f"{prefix}.self_attn"
        D, hidden = config.head_dim, config.hidden_size
        q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
        for attribute, name in self.norms.items():
            setattr(self, attribute, self.norm(model, f"{prefix}.{name}", hidden))
        outputs = {f"{attn}.q_proj": q, f"{attn}.k_proj": kv, f"{attn}.v_proj": kv}
        self.qkv = Linear(model, outputs, hidden, config.qkv_bias, unit=D)
        self.o = Linear(model, {f"{attn}.o_proj": hidden}, q, config.attention_bias, axis=1)
        self.q_norm = self.norm(model, f"{attn}.q_norm", D) if config.qk_norm else None
        self.k_norm = self.norm(model, f"{attn}.k_norm", D) if config.qk_norm else None
        self.ffn = self.make_ffn(model, prefix)
        self.scale = D**-0.5  # of attention
        self.H, self.G = model.heads.numel(), len(model.heads)

    def make_ffn(self, model, prefix: str) -> Layer:
        names = (f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        return self.feed_forward(model, *names)

    def forward(self, x: Tensor, *view) -> Tensor:
        """fp32 [B, T, hidden_size]; `view` is what `attend` takes beside its input."""
        x = x + self.attend(self.attention_norm(x), *view)
        return x + self.ffn(self.ffn_norm(x))

    def attend(self, x, pos_BT, cos, sin, mask, k_cache, v_cache) -> Tensor:
        H, G = self.H, self.G
        heads = self.qkv(x).unflatten(-1, (-1, self.config.head_dim))
        qk, v = heads.split((H + G, G), dim=2)
        if self.q_norm:
            parts = self.norm_heads(*qk.split((H, G), dim=2))
            qk = torch.cat(parts, dim=2)
        if self.rotary:
            qk = rotate(qk, cos, sin)
        q, k = qk.split((H, G), dim=2)
        y = self.ops.attention(q, k, v, k_cache, v_cache, pos_BT, mask, self.scale)
        return self.o(y)

    def norm_heads(self, q_BTHD, k_BTGD) -> tuple[Tensor, Tensor]:
        return self.q_norm(q_BTHD), self.k_norm(k_BTGD)


ROPES = {"default": frequencies}  # by rope_type; scripts/ropes.py has more
# By architecture: the layer, and what config.json means, whatever it says; scripts/families.py.
FAMILIES = {"LlamaForCausalLM": (Block, {"use_sliding_window": False})}


class Transformer(nn.Module):
    """A decoder, empty until its `loaders` have their tensors; one of the `ranks` that share it."""

    def __init__(self, config: ModelConfig, ops: Fast, device: torch.device, dtype, ranks=1):
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
        block, _ = FAMILIES[config.architecture]
        embedding, shape = "model.embed_tokens", (config.vocab_size, config.hidden_size)
        self.embed = block.embedding(self, {f"{embedding}.weight": shape})
        self.head = self.make_head(embedding if config.tie_word_embeddings else "lm_head")
        self.layers = nn.ModuleList(block(self, i) for i in range(config.num_hidden_layers))
        self.norm = block.norm(self, "model.norm", config.hidden_size)
        length = config.max_position_embeddings + 64  # drafts may reach beyond the end
        self.kinds = {}  # of layers, by window: a table of angles and a mask
        for window, rope in config.ropes.items():
            mask_mod = SlidingWindow(window) if window else causal
            self.kinds[window] = (rope_table(config, rope, length).to(device), mask_mod)
        self.decode = self.verify = self.prefill = self.stack  # to be compiled
        self.decode_logits = self.logits
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
            raise InputError(f"a cache of {batch_size} x {length} tokens does not fit: {e}") from e

    def forward(self, tokens_BT, pos_BT, cache: KVCache, end: int, last=False, decode=False):
        """fp32 logits [B, T, V] (T = 1 with `last`) of tokens at absolute positions `pos_BT`, all
        before `end`. Keys and values are written to the cache, which must hold the earlier ones."""
        span = -(-end // 64) * 64  # a CPU is quicker in whole blocks
        if self.device.type != "cpu":  # a CUDA graph, of one shape, looks over all the cache
            span = cache[0][0].shape[2]
        views = {}
        for window, (table, mask_mod) in self.kinds.items():
            cos, sin = table[pos_BT].unsqueeze(2).unbind(3)
            mask = self.ops.mask(mask_mod, pos_BT, span, self.heads, cache[0][0])
            views[window] = (pos_BT, cos, sin, mask)
        views = [views[window] for window in self.config.windows]
        run = self.verify if decode else self.prefill
        if tokens_BT.shape[1] == 1:
            run = self.decode if decode else self.stack
        x = self.embed(tokens_BT).float()  # sums over layers in fp32: cheap, and much more precise
        x = run(self.layers, x, views, cache)
        logits = self.decode_logits if decode else self.logits
        return logits(x[:, -1:] if last else x)

    @staticmethod
    def stack(layers, x, views: list[tuple], cache: KVCache) -> Tensor:
        """Some layers, each with what it knows of positions and its part of the cache."""
        for layer, view, kv in zip(layers, views, cache, strict=True):
            x = layer(x, *view, *kv)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Of what the last layer gives."""
        logits_BTV = self.head(self.norm(x)).float()
        if self.ranks > 1:
            logits_BTV = tp.all_gather(logits_BTV).movedim(0, -2).flatten(-2)
        return logits_BTV
