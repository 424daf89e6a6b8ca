"""Kinds of RoPE beyond the core: functions that change the frequencies of a head, entered into
model.ROPES. Their settings are complete and right, as rope_settings.py leaves them. None depends on
the length of a call: the bits of a token would depend on what follows it."""

import math

import torch
from torch import Tensor

from model import ROPES, ModelConfig, frequencies

Frequencies = tuple[Tensor, float]  # and what cos and sin are multiplied by


def linear(config: ModelConfig, rope: dict) -> Frequencies:
    """All are divided (Chen et al. 2023)."""
    freq, one = frequencies(config, rope)
    return freq / rope["factor"], one


def llama3(config: ModelConfig, rope: dict) -> Frequencies:
    """Long wavelengths are divided, short ones kept, those between blended (Llama 3.1)."""
    freq, one = frequencies(config, rope)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / freq)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / rope["factor"], one


def yarn(config: ModelConfig, rope: dict) -> Frequencies:
    """Pairs that turn often within the original context keep their frequency, those that turn
    seldom are divided, and between the two it changes pair by pair (Peng et al. 2023)."""
    size, periods = size_and_periods(config, rope)
    first = size * turning(rope, rope["beta_fast"])
    last = size * turning(rope, rope["beta_slow"])
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001
    keep = 1 - ((torch.arange(len(periods)) - first) / width).clamp(0, 1)
    freq = keep * (1 / periods) + (1 - keep) * (1 / (rope["factor"] * periods))
    return freq, yarn_attention(rope)


def size_and_periods(config: ModelConfig, rope: dict) -> tuple[int, Tensor]:
    """How many numbers of a head are rotated, and of their pairs 1 over the frequency. What is
    divided is multiplied here, so that it is rounded as elsewhere: far into a text, that shows."""
    size = int(config.head_dim * rope["partial_rotary_factor"])
    return size, rope["rope_theta"] ** (torch.arange(0, size, 2) / size)


def turning(rope: dict, turns: float) -> float:
    """The number of the pair that turns so often within the original context, over that of the
    numbers in all pairs."""
    wavelength = rope["original_max_position_embeddings"] / (2 * math.pi * turns)
    return math.log(wavelength) / (2 * math.log(rope["rope_theta"]))


def yarn_attention(rope: dict) -> float:
    """Where nothing is said, sqrt(1 / t) of the paper's section 3.4; DeepSeek's two scales of it
    count where there are both."""
    if "attention_factor" in rope:
        return rope["attention_factor"]
    growth = 0.1 * math.log(max(rope["factor"], 1))
    above, below = rope.get("mscale", 0), rope.get("mscale_all_dim", 0)
    if above and below:
        return (1 + above * growth) / (1 + below * growth)
    return 1 + growth


def longrope(config: ModelConfig, rope: dict) -> Frequencies:
    """Each pair has a divisor of its own (Ding et al. 2024), from one of two lists: the long one
    where the context that the config states is longer than the original, else the short one. So a
    short text in a long context has the long one as well. (transformers takes the short one until
    a text is longer than the original context, and then the long one for all of it.)"""
    _, periods = size_and_periods(config, rope)
    original = rope["original_max_position_embeddings"]
    name = "long_factor" if config.max_position_embeddings > original else "short_factor"
    growth = math.log(max(rope["factor"], 1))
    attention = math.sqrt(1 + growth / math.log(original))
    return 1 / (torch.tensor(rope[name]) * periods), rope.get("attention_factor", attention)


# Within the context that a config states, dynamic NTK changes nothing.
ROPES |= {"linear": linear, "dynamic": frequencies, "llama3": llama3}
ROPES |= {"yarn": yarn, "longrope": longrope}
