"""The op tables. Every reduction of the model goes through one `Ops`, chosen once when the model is built.

A table is plain functions, so a fork that wants another one writes another `Ops(...)`. A mask_mod has FlexAttention's
signature, (b, h, q_idx, kv_idx) -> bool tensor, over absolute positions. Shapes: B rows, T new tokens, H query heads,
G KV heads, D head_dim, L cached positions, N x K a weight."""

import contextlib
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(window: int) -> Callable:
    """Causal, and only the last `window` keys, the query's own among them."""
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < window)


@dataclass(frozen=True)
class Ops:
    """One implementation of each reduction; `pack` and `mask` make what `linear` and `attention` want to be given."""

    pack: Callable  # (weight_NK, bias_N or None) -> packed
    linear: Callable  # (x, packed) -> x W^T + b
    rms_norm: Callable  # (x, weight, eps), over the last dimension
    silu_mul: Callable  # (gate_up) -> silu(gate) * up, of the two halves
    mask: Callable  # (mask_mod, pos_BT, span, n_heads, dtype) -> mask over the first `span` keys
    attention: Callable  # (q_BTHD, k_BTGD, v_BTGD, k_cache_BGLD, v_cache, pos_BT, mask, scale) -> [B, T, H * D]
    log_softmax: Callable  # (logits) -> fp32, over the last dimension
    key_block: int  # attention is given spans of keys that are a multiple of this


def opaque(schema: str, fake: Callable) -> Callable:
    """Register a function as an op that torch.compile calls and never looks into; eager code calls it directly."""

    def register(impl: Callable) -> Callable:
        name = schema.partition("(")[0]
        _lib.define(schema)
        _lib.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gpt_exact::{name}", fake, lib=_lib)
        op = getattr(torch.ops.gpt_exact, name).default
        return lambda *args: op(*args) if torch.compiler.is_compiling() else impl(*args)

    return register


_lib = torch.library.Library("gpt_exact", "DEF")
_onednn_linear = torch.ops.mkldnn._linear_pointwise.default  # resolved once: called 121 times a token


class Packed:
    """A weight in its kernel's layout: on a CPU oneDNN's blocks, at one row twice as fast as F.linear. Inductor cannot
    trace through those, so a graph names a weight by an integer; the table forgets it when its layer dies."""

    table: dict[int, "Packed"] = weakref.WeakValueDictionary()
    handles = itertools.count()  # alike in every run, so that compiled graphs are found in Inductor's cache

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias, self.out_features, self.blocked = weight, bias, len(weight), False
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        if weight.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # a dtype or a CPU that oneDNN does not take
                self.weight, self.blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1), True
        self.handle = next(self.handles)
        self.table[self.handle] = self


@opaque("onednn_linear(Tensor x, int handle, int n) -> Tensor", lambda x, handle, n: x.new_empty(*x.shape[:-1], n))
def onednn_linear(x, handle, n):
    packed = Packed.table[handle]
    return _onednn_linear(x, packed.weight, packed.bias, "none", [], "")


def fast_linear(x: Tensor, packed: Packed) -> Tensor:
    if packed.blocked:
        return onednn_linear(x, packed.handle, packed.out_features)
    return F.linear(x, packed.weight, packed.bias)


def fast_silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def dense_mask(mask_mod: Callable, pos_BT: Tensor, span: int, n_heads: int, dtype: torch.dtype) -> tuple:
    """A mask_mod written out, once for all layers: 0 where a query may look and -inf elsewhere [B, 1 or H, T, span],
    and one past the last key that any row's query t sees [T]."""
    b, h, keys = (torch.arange(n, device=pos_BT.device) for n in (pos_BT.shape[0], n_heads, span))
    keep = mask_mod(b[:, None, None, None], h[:, None, None], pos_BT[:, None, :, None], keys)
    bias = torch.zeros(keep.shape, device=pos_BT.device, dtype=dtype).masked_fill_(~keep, float("-inf"))
    torch._dynamo.maybe_mark_dynamic(bias, 3)  # the span grows with the text: one graph for all
    return bias, (keep.flatten(0, 1).any(0) * (keys + 1)).amax(-1)


def write_cache(k_BTGD: Tensor, v_BTGD: Tensor, k_cache: Tensor, v_cache: Tensor, pos_BT: Tensor) -> None:
    """Put new keys and values at their absolute positions, before anyone attends to them."""
    rows = torch.arange(pos_BT.shape[0], device=pos_BT.device)[:, None]
    for new, cache in ((k_BTGD, k_cache), (v_BTGD, v_cache)):
        if len(pos_BT) == 1:
            cache.index_copy_(2, pos_BT[0], new.transpose(1, 2))
        else:
            cache[rows, :, pos_BT] = new


QUERY_BLOCK = 128


def dense_attention(q, k, v, k_cache, v_cache, pos, bias, limit_T, scale):
    """SDPA with the query heads of one KV head folded into the query length, so that no key is copied: on a CPU
    5 times faster than enable_gqa at one row and 2,048 keys."""
    write_cache(k, v, k_cache, v_cache, pos)
    (B, T, H, D), G, span = q.shape, k_cache.shape[1], bias.shape[-1]
    k, v = k_cache[:, :, :span], v_cache[:, :, :span]
    if T == 1 and bias.shape[1] == 1:  # decode, where every call counts
        return F.scaled_dot_product_attention(q.view(B, G, H // G, D), k, v, bias, scale=scale).view(B, T, H * D)
    q = q.unflatten(2, (G, H // G)).transpose(1, 2).reshape(B, G, T * (H // G), D)
    bias = bias.unflatten(1, (1 if bias.shape[1] == 1 else G, -1)).transpose(2, 3)
    if T > QUERY_BLOCK // 4 and q.device.type == "cpu" and q.dtype != torch.float32:
        y = _blockwise(q * scale, k, v, bias, limit_T)
    else:
        bias = bias.expand(B, -1, T, H // G, span).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return y.unflatten(2, (T, H // G)).transpose(1, 2).flatten(2)


def _blockwise(q_BGRD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, bias: Tensor, limit_T: Tensor) -> Tensor:
    """Long prompts in half precision: batched products over blocks of queries, each without the keys behind the last
    one it may see. Three times as fast as SDPA on a CPU without AMX."""
    B, G, R, D = q_BGRD.shape
    group = R // len(limit_T)
    q, k, v = (x.flatten(0, 1) for x in (q_BGRD, k_BGLD, v_BGLD))
    y = torch.empty_like(q)
    for t in range(0, len(limit_T), QUERY_BLOCK):
        queries, rows = slice(t, t + QUERY_BLOCK), slice(t * group, (t + QUERY_BLOCK) * group)
        end = min(-(-int(limit_T[queries].max()) // 64) * 64, k.shape[1])  # whole blocks keep oneDNN fast
        scores = torch.bmm(q[:, rows], k[:, :end].transpose(1, 2))
        scores.view(B, G, -1, group, end).add_(bias[:, :, queries, :, :end])
        torch.bmm(scores.softmax(-1), v[:, :end], out=y[:, rows])
    return y.view(B, G, R, D)


cpu_attention = opaque(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pos, Tensor bias,"
    " Tensor limit, float scale) -> Tensor",
    lambda q, k, v, k_cache, v_cache, pos, bias, limit, scale: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]),
)(dense_attention)


def fast_attention(q, k, v, k_cache, v_cache, pos, mask, scale):
    attend = cpu_attention if q.device.type == "cpu" else dense_attention
    return attend(q, k, v, k_cache, v_cache, pos, *mask, scale)


FAST = Ops(
    pack=Packed,
    linear=fast_linear,
    rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    silu_mul=fast_silu_mul,
    mask=dense_mask,
    attention=fast_attention,
    log_softmax=lambda logits: F.log_softmax(logits, dim=-1, dtype=torch.float32),
    key_block=64,
)
