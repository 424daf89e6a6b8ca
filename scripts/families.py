"""Families of models beyond Llama: what their config.json means, and subclasses of Block where they
differ, entered into model.FAMILIES."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

import tp
from kernels import InputError, Packed, opaque_linear
from model import FAMILIES, Block, Embedding, FeedForward, Layer, Linear, RMSNorm
from scripts.activations import GeluFeedForward

UNBIASED = {"attention_bias": False, "mlp_bias": False}
WINDOWED = {"use_sliding_window": True, "mlp_bias": False}
ALIKE = {"max_window_layers": 0, "layer_types": None}  # all layers have the window, or none
# What transformers has fixed in OLMo 3, by the names that Gemma 3 gives it.
OLMO3 = WINDOWED | {"sliding_window_pattern": 4, "rope_local_base_freq": 5e5}


class Mixture(Layer):
    """A mixture of feed-forward experts (Shazeer et al. 2017): the sum of those k that a router
    finds likeliest for a token, of a tie the first, times their probabilities. A graph sees one
    opaque op."""

    def __init__(self, model, prefix: str, names: tuple[str, str, str]):
        super().__init__(model)
        config = model.config
        count = config.settings["num_experts"]
        self.k = config.settings["num_experts_per_tok"]
        if type(count) is not int or type(self.k) is not int or not 0 < self.k <= count:
            raise InputError(f"{self.k} experts a token, expected 1 to the {count} there are")
        self.normalized = bool(config.settings["norm_topk_prob"])
        # The router is whole at every rank, in fp32, and never quantized.
        plain = replace(config, quantization=None, stored=False)
        outputs = {f"{prefix}.gate": count}
        self.router = Linear(model, outputs, config.hidden_size, unit=count, config=plain)
        self.router.dtype = torch.float32
        experts = ([f"{prefix}.experts.{i}.{name}" for name in names] for i in range(count))
        self.experts = torch.nn.ModuleList(FeedForward(model, *e) for e in experts)
        self.handle = torch.tensor(next(Packed.handles))
        Packed.table[self.handle.item()] = self

    def forward(self, x: Tensor) -> Tensor:
        return opaque_linear(x, self.handle, (self.config.hidden_size,), torch.float32)

    def choose(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and numbers of the K experts of a token, both [B, T, K]."""
        probabilities = self.router(x_BTD.float()).softmax(-1)
        ordered = probabilities.sort(dim=-1, descending=True, stable=True)
        probs_BTK, chosen_BTK = ordered.values[..., : self.k], ordered.indices[..., : self.k]
        if self.normalized:
            probs_BTK = probs_BTK / in_order(probs_BTK)[..., None]
        return probs_BTK, chosen_BTK

    def products(self, x_BTD: Tensor) -> Tensor:
        """Only experts that are chosen are read, each once for all its tokens."""
        probs_BTK, chosen_BTK = self.choose(x_BTD)
        hidden = self.config.hidden_size
        y_BTKD = x_BTD.new_empty(*chosen_BTK.shape, hidden, dtype=torch.float32)
        for i in chosen_BTK.unique().tolist():
            at, expert = (chosen_BTK == i).nonzero(as_tuple=True), self.experts[i]
            inner = expert.inner(x_BTD[at[:2]])
            y_BTKD[at] = self.ops.linear(inner, expert.down.packed).float()
        if self.ops.exact and self.ranks > 1:
            y_BTKD = tp.add_up(y_BTKD, None, exact=True)
        y_BTD = in_order(y_BTKD * probs_BTK[..., None])
        if not self.ops.exact and self.ranks > 1:  # after the sum: less to send
            y_BTD = tp.add_up(y_BTD, None, exact=False)
        return y_BTD


def in_order(y_BTK: Tensor) -> Tensor:
    """The sum over dimension 2, from left to right."""
    return functools.reduce(torch.add, y_BTK.unbind(2))


class MixtralBlock(Block):
    capturable = False  # which experts are chosen is asked of the device

    def make_ffn(self, model, prefix: str) -> Mixture:
        return Mixture(model, f"{prefix}.block_sparse_moe", ("w1", "w3", "w2"))


class Qwen3MoeBlock(Block):
    capturable = False

    def make_ffn(self, model, prefix: str) -> Mixture:
        settings = model.config.settings
        for name, expected in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
            if (found := settings.get(name, expected)) != expected:
                raise InputError(f"{name} {found} is not supported, expected {expected}")
        return Mixture(model, f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"))


class SmolLM3Block(Block):
    """Some layers know of no positions."""

    def __init__(self, model, index: int):
        super().__init__(model, index)
        self.rotary = bool(model.config.settings["no_rope_layers"][index])


class Olmo2Block(Block):
    """Norms of what attention and the feed-forward network return, not of what they are given, and
    those of queries and keys over all heads together (OLMo et al. 2025)."""

    norms = {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}

    def __init__(self, model, index: int):
        super().__init__(model, index)
        config, attn = model.config, f"model.layers.{index}.self_attn"
        q, kv = config.num_attention_heads, config.num_key_value_heads
        self.q_norm = RMSNorm(model, f"{attn}.q_norm", q * config.head_dim)
        self.k_norm = RMSNorm(model, f"{attn}.k_norm", kv * config.head_dim)

    def forward(self, x: Tensor, *view) -> Tensor:
        x = x + self.attention_norm(self.attend(x.to(self.dtype), *view))
        return x + self.ffn_norm(self.ffn(x.to(self.dtype)))

    def norm_heads(self, q_BTHD, k_BTGD) -> tuple[Tensor, Tensor]:
        q = self.over_all(q_BTHD, self.q_norm, self.config.num_attention_heads)
        return q, self.over_all(k_BTGD, self.k_norm, self.config.num_key_value_heads)

    def over_all(self, x_BTHD: Tensor, norm: RMSNorm, heads: int) -> Tensor:
        """The norm, of the heads of all ranks, and of it the own heads. A sum that ranks shared
        would have another order."""
        if self.ranks > 1:
            parts = tp.all_gather(x_BTHD)[:: max(self.ranks // heads, 1)]  # ranks may share a head
            x_BTHD = torch.cat(parts.unbind(0), dim=2)
        y_BTHD = norm(x_BTHD.flatten(2)).unflatten(2, (heads, -1))
        return tp.part(y_BTHD, 2, self.ranks)


class GemmaNorm(RMSNorm):
    """The checkpoint has the weight less 1."""

    def load(self, tensors: list[Tensor]) -> int:
        nbytes = super().load(tensors)
        self.weight += 1
        return nbytes


class GemmaEmbedding(Embedding):
    """Times the root of hidden_size, which is rounded first: in bf16, 33.94 is 34."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        root = torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype)
        return super().forward(tokens_BT) * root


class Gemma3Block(Block):
    """Norms before and after, two kinds of layers with a RoPE each (Gemma team 2025)."""

    norm, embedding = GemmaNorm, GemmaEmbedding
    feed_forward = GeluFeedForward
    norms = {
        "attention_norm": "input_layernorm",
        "after_attention": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "after_ffn": "post_feedforward_layernorm",
    }

    def __init__(self, model, index: int):
        super().__init__(model, index)
        self.scale = model.config.settings["query_pre_attn_scalar"] ** -0.5

    def forward(self, x: Tensor, *view) -> Tensor:
        x = x + self.after_attention(self.attend(self.attention_norm(x), *view))
        return x + self.after_ffn(self.ffn(self.ffn_norm(x)))


class GraniteNorm(RMSNorm):
    """Logits are divided by logits_scaling: here, the weight of the last norm, for good."""

    def load(self, tensors: list[Tensor]) -> int:
        nbytes = super().load(tensors)
        if "model.norm.weight" in self.shapes:
            self.weight /= self.config.settings["logits_scaling"]
        return nbytes


class GraniteEmbedding(Embedding):
    def forward(self, tokens_BT: Tensor) -> Tensor:
        return super().forward(tokens_BT) * self.config.settings["embedding_multiplier"]


class GraniteBlock(Block):
    """Four numbers scale what goes in, what comes out and what is in between (Yang et al. 2022)."""

    norm, embedding = GraniteNorm, GraniteEmbedding

    def __init__(self, model, index: int):
        super().__init__(model, index)
        self.scale = model.config.settings["attention_multiplier"]
        self.multiplier = model.config.settings["residual_multiplier"]

    def forward(self, x: Tensor, *view) -> Tensor:
        y = self.attend(self.attention_norm(x), *view)
        x = x + y.float() * self.multiplier
        y = self.ffn(self.ffn_norm(x))
        return x + y.float() * self.multiplier


FAMILIES["MistralForCausalLM"] = (Block, WINDOWED | UNBIASED | ALIKE)
FAMILIES["Qwen2ForCausalLM"] = (Block, UNBIASED | {"qkv_bias": True})
FAMILIES["Qwen3ForCausalLM"] = (Block, {"qk_norm": True, "mlp_bias": False})
FAMILIES["Phi3ForCausalLM"] = (Block, WINDOWED | UNBIASED | ALIKE)
FAMILIES["SmolLM3ForCausalLM"] = (SmolLM3Block, {})
FAMILIES["Olmo2ForCausalLM"] = (Olmo2Block, {"use_sliding_window": False, "mlp_bias": False})
FAMILIES["Olmo3ForCausalLM"] = (Olmo2Block, OLMO3)
FAMILIES["Gemma3ForCausalLM"] = (Gemma3Block, WINDOWED | {"qk_norm": True})
FAMILIES["GraniteForCausalLM"] = (GraniteBlock, {"use_sliding_window": False})
FAMILIES["MixtralForCausalLM"] = (
    MixtralBlock,
    WINDOWED | UNBIASED | ALIKE | {"norm_topk_prob": True},
)
FAMILIES["Qwen3MoeForCausalLM"] = (
    Qwen3MoeBlock,
    {"qk_norm": True, "mlp_bias": False} | ALIKE,
)
