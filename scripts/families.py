"""Families of models beyond the core, as a fork would add them: subclasses of Block, and what their
config.json means, entered into model.FAMILIES."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

import tp
from kernels import Packed, opaque_linear
from model import ALIKE, FAMILIES, UNBIASED, Block, FeedForward, InputError, Layer, Linear


class Mixture(Layer):
    """A mixture of feed-forward experts (Shazeer et al. 2017): the sum of those k that a router
    finds likeliest for a token, of a tie the first, times their probabilities. A graph sees one
    opaque op."""

    def __init__(self, model, prefix: str, names: tuple[str, str, str], inner: int):
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
        self.experts = torch.nn.ModuleList(FeedForward(model, *e, inner, False) for e in experts)
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
        names = ("w1", "w3", "w2")
        return Mixture(model, f"{prefix}.block_sparse_moe", names, model.config.intermediate_size)


class Qwen3MoeBlock(Block):
    capturable = False

    def make_ffn(self, model, prefix: str) -> Mixture:
        settings = model.config.settings
        for name, expected in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
            if (found := settings.get(name, expected)) != expected:
                raise InputError(f"{name} {found} is not supported, expected {expected}")
        names = ("gate_proj", "up_proj", "down_proj")
        return Mixture(model, f"{prefix}.mlp", names, model.config.intermediate_size)


FAMILIES["MixtralForCausalLM"] = (
    MixtralBlock,
    {"use_sliding_window": True, "norm_topk_prob": True} | UNBIASED | ALIKE,
)
FAMILIES["Qwen3MoeForCausalLM"] = (
    Qwen3MoeBlock,
    {"qk_norm": True, "mlp_bias": False} | ALIKE,
)
