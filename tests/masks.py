"""Masks as the attention kernel of a GPU takes them, and those that a fork might write."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import kernels
from kernels import FAST

tl = pytest.importorskip("triton.language")
GPU = SimpleNamespace(is_cuda=True)  # in place of positions that are there


def on_gpu(mask_mod, G, R, device="cpu", ops=FAST):
    """What a model gives to attention of G KV heads with R queries each."""
    heads_GR = torch.arange(G * R, device=device).view(G, R)
    return ops.mask(mask_mod, GPU, 64, heads_GR, None)


def attend(q, k, v, k_cache, v_cache, pos, mask, scale):
    """What a GPU does with new keys and values."""
    kernels.write_cache(k, v, k_cache, v_cache, pos)
    return kernels.triton_attention(q, k_cache, v_cache, pos, *mask, scale)


class Sinks(NamedTuple):
    """A window beside which the first tokens stay in sight (StreamingLLM, Xiao et al. 2023)."""

    first_tokens: int
    window: int

    def __call__(self, b, h, q_idx, kv_idx):
        is_near = q_idx < kv_idx + self.window
        return (q_idx >= kv_idx) & (is_near | (kv_idx < self.first_tokens))


class Table(NamedTuple):
    """A dense mask [B, H, positions, positions] of bytes, which the kernel looks up."""

    seen: torch.Tensor
    heads: int
    length: int

    def __call__(self, b, h, q_idx, kv_idx):
        row = (b * self.heads + h) * self.length + q_idx
        return tl.load(self.seen + row * self.length + kv_idx, mask=kv_idx < self.length) != 0


def odd_or_near(b, h, q_idx, kv_idx):
    """Of no numbers: heads and rows differ in how many keys they see of those that are not odd."""
    return (q_idx >= kv_idx) & ((kv_idx % 2 == 1) | (q_idx - kv_idx <= 3 * h + 7 * b))


def dense(mask_mod, B, H, length):
    """The same as bytes, by PyTorch."""
    b, h, q_idx, kv_idx = (
        x.view([-1 if i == axis else 1 for i in range(4)])
        for axis, x in enumerate(map(torch.arange, (B, H, length, length)))
    )
    return mask_mod(b, h, q_idx, kv_idx).expand(B, H, length, length).to(torch.uint8).contiguous()
