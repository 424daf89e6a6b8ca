"""The op tables. Every reduction of the model goes through one `Ops`, chosen once when the model is built: FAST is what
PyTorch does best, BATCH_INVARIANT gives the logits of a token the same bits whatever else is computed beside it.

A table is plain functions, so a fork that wants another one writes another `Ops(...)`. A mask_mod has FlexAttention's
signature, (b, h, q_idx, kv_idx) -> bool tensor, over absolute positions. Shapes: B rows, T new tokens, H query heads,
G KV heads, D head_dim, L cached positions, N x K a weight, M rows of its input."""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    pack: Callable  # (weight_NK, bias_N or None, leaves, see leaf_count) -> packed
    linear: Callable  # (x, packed) -> x W^T + b
    rms_norm: Callable  # (x, weight, eps), over the last dimension
    silu_mul: Callable  # (gate_up) -> silu(gate) * up, of the two halves
    mask: Callable  # (mask_mod, pos_BT, span, n_heads, dtype) -> mask over the first `span` keys
    attention: Callable  # (q_BTHD, k_BTGD, v_BTGD, k_cache_BGLD, v_cache, pos_BT, mask, scale) -> [B, T, H * D]
    log_softmax: Callable  # (logits) -> fp32, over the last dimension
    key_block: int  # attention is given spans of keys that are a multiple of this
    compile_options: dict  # what torch.compile needs so that it changes no bits that matter


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


def blocked(weight_NK: Tensor) -> Tensor:
    """A weight in oneDNN's blocks, at one row twice as fast as F.linear; as it is where oneDNN does not take it."""
    with contextlib.suppress(RuntimeError):
        if weight_NK.device.type == "cpu":
            return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), 1)
    return weight_NK.contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _onednn_linear(x, weight, bias, "none", [], "") if weight.is_mkldnn else F.linear(x, weight, bias)


class Packed:
    """A weight in its kernel's layout. Inductor cannot trace through those, so a graph names a weight by an integer;
    the table forgets it when its layer dies."""

    table: dict[int, "Packed"] = weakref.WeakValueDictionary()
    handles = itertools.count()  # alike in every run, so that compiled graphs are found in Inductor's cache

    def __init__(self, weight: Tensor, bias: Tensor | None = None, leaves: int = 1):
        self.weight, self.bias, self.out_features = blocked(weight), bias, len(weight)
        self.opaque, self.nbytes = self.weight.is_mkldnn, weight.nbytes + (0 if bias is None else bias.nbytes)
        self.handle = next(self.handles)
        self.table[self.handle] = self

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


@opaque("linear(Tensor x, int handle, int n) -> Tensor", lambda x, handle, n: x.new_empty(*x.shape[:-1], n))
def opaque_linear(x, handle, n):
    return Packed.table[handle](x)


def linear(x: Tensor, packed: Packed) -> Tensor:
    return opaque_linear(x, packed.handle, packed.out_features) if packed.opaque else packed(x)


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


class Tiling(NamedTuple):
    """How attention by batched products is cut. The bits depend on none of it where `tiling` has seen so."""

    queries: int = 128  # tokens in a block, which skips the keys behind the last one that it may see
    rows: int = 1  # the least number of query rows in a product
    keys: int = 64  # products span a multiple of this: whole blocks keep oneDNN fast


SPLIT = 512  # keys in one product with the values


def attend(q_BTHD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, bias: Tensor, limit_T: Tensor, scale: float, tile: Tiling):
    """Attention by batched products, the query heads of one KV head folded into the rows: [B, T, H * D]."""
    (B, T, H, D), (_, G, L, _) = q_BTHD.shape, k_BGLD.shape
    bias = bias.unsqueeze(3) if bias.shape[1] == 1 else bias.unflatten(1, (G, -1)).transpose(2, 3)
    if extra := -L % tile.keys:
        bias, L = F.pad(bias, (0, extra), value=float("-inf")), L + extra
        k_BGLD, v_BGLD = F.pad(k_BGLD, (0, 0, 0, extra)), F.pad(v_BGLD, (0, 0, 0, extra))
    k, v, group = k_BGLD.flatten(0, 1), v_BGLD.flatten(0, 1), H // G
    if T == 1:
        y = _attend_block(q_BTHD.reshape(B * G, group, D), k, v, bias, (B, G, 1, group), scale, tile.rows)
        return y.reshape(B, 1, H * D)
    q = q_BTHD.unflatten(2, (G, group)).transpose(1, 2).reshape(B * G, T * group, D)
    y = q.new_empty(B, T, H, D)
    for t in range(0, T, tile.queries):
        end, block = min(t + tile.queries, T), slice(t, t + tile.queries)
        keys = min(-(-int(limit_T[block].max()) // tile.keys) * tile.keys, L)
        args = q[:, t * group : end * group], k[:, :keys], v[:, :keys], bias[:, :, block, :, :keys]
        out = _attend_block(*args, (B, G, end - t, group), scale, tile.rows)
        y[:, block] = out.view(B, G, end - t, group, D).transpose(1, 2).flatten(2, 3)
    return y.view(B, T, H * D)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rows_BGTH: tuple, scale: float, least: int) -> Tensor:
    """One block of queries [B * G, rows, D], of `rows_BGTH`, over all its keys [B * G, L, D]."""
    rows, L = q.shape[1], k.shape[1]
    q = F.pad(q, (0, 0, 0, least - rows)) if rows < least else q
    # oneDNN reorders what stands on the right, so a few queries stand there and not all the keys.
    scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2) if rows <= 32 else torch.bmm(q, k.transpose(1, 2))
    scores = (scores[:, :rows] if rows < least else scores).view(*rows_BGTH, L)
    weights = torch.add(bias, scores, alpha=scale, out=torch.empty_like(scores, memory_format=torch.contiguous_format))
    weights = weights.view(-1, rows, L).softmax(-1)
    weights = F.pad(weights, (0, 0, 0, least - rows)) if rows < least else weights
    if L <= SPLIT:
        y = torch.bmm(weights, v)
    else:
        parts = [torch.bmm(weights[..., i : i + SPLIT], v[:, i : i + SPLIT]) for i in range(0, L, SPLIT)]
        y = functools.reduce(torch.add, parts[1:], parts[0].float()).to(q.dtype)
    return y[:, :rows] if rows < least else y


def dense_attention(q, k, v, k_cache, v_cache, pos, bias, limit_T, scale):
    """SDPA with the query heads of one KV head folded into the query length, so that no key is copied: on a CPU
    5 times faster than enable_gqa at one row and 2,048 keys. `attend` is 3 times as fast for long prompts in half
    precision on a CPU without AMX, and ahead in large batches."""
    write_cache(k, v, k_cache, v_cache, pos)
    (B, T, H, D), G, span = q.shape, k_cache.shape[1], bias.shape[-1]
    k, v = k_cache.narrow(2, 0, span), v_cache.narrow(2, 0, span)
    if (B * T >= 16 or T > 32) and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend(q, k, v, bias, limit_T, scale, Tiling())
    if T == 1 and bias.shape[1] == 1:
        return F.scaled_dot_product_attention(q.view(B, G, H // G, D), k, v, bias, scale=scale).view(B, T, H * D)
    q = q.unflatten(2, (G, H // G)).transpose(1, 2)
    bias = bias.unsqueeze(3) if bias.shape[1] == 1 else bias.unflatten(1, (G, -1)).transpose(2, 3)
    bias = bias.expand(B, -1, T, H // G, span).flatten(2, 3)
    y = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, bias, scale=scale)
    return y.view(q.shape).transpose(1, 2).flatten(2)


ATTENTION_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pos, Tensor bias, Tensor limit,"
    " float scale) -> Tensor"
)


def _attention_shape(q, *others):
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


cpu_attention = opaque("fast_attention" + ATTENTION_SCHEMA, _attention_shape)(dense_attention)


def fast_attention(q, k, v, k_cache, v_cache, pos, mask, scale):
    attend = cpu_attention if q.device.type == "cpu" else dense_attention
    return attend(q, k, v, k_cache, v_cache, pos, *mask, scale)


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


FAST = Ops(
    pack=Packed,
    linear=linear,
    rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    silu_mul=fast_silu_mul,
    mask=dense_mask,
    attention=fast_attention,
    log_softmax=log_softmax,
    key_block=64,
    compile_options={},
)


# BATCH_INVARIANT: the logits of a token are a function of its own prefix, bit for bit. Sums along K run leaf by leaf,
# attention over whole splits of keys at absolute positions, and every op below is opaque to torch.compile.


def leaf_count(n_kv_heads: int, in_features: int, multiple: int = 32) -> int:
    """Into how many leaves K is cut where tensor parallelism may cut it: the largest power of two up to 8 that divides
    the KV heads, else their smallest odd prime factor up to 7; fewer until a leaf is whole multiples of `multiple`."""
    count = math.gcd(n_kv_heads, 8)
    count = count if count > 1 else next((p for p in (3, 5, 7) if n_kv_heads % p == 0), 1)
    while in_features % (count * multiple) and count > 1:
        count = count // 2 if count % 2 == 0 else 1
    return count


def add_leaves(parts: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Leaves added in fp32 and in one fixed order, a power of two as a binary tree, an odd number from left to right;
    then the bias, once, and one rounding."""
    while len(parts) % 2 == 0:
        parts = [a.float() + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    total = functools.reduce(torch.add, parts[1:], parts[0].float())
    return (total if bias is None else total + bias).to(dtype)


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class LeafPacked(Packed):
    """A weight on a CPU whose products round each leaf once, add them in fp32 and round the sum. oneDNN's bits do not
    depend on the rows of a product, within limits that each shape is asked for when it is first used."""

    PROBED = (1, 2, 3, 7, 8, 15, 16, 17, 33, 48, 64, 100, 128, 256, 500, 512)  # row counts whose bits are compared
    limits: dict[tuple, tuple[bool, int, int]] = {}  # what `probe` found, by shape and thread count

    def __init__(self, weight: Tensor, bias: Tensor | None = None, leaves: int = 1):
        super().__init__(weight, bias)
        self.opaque, self.shape, self.threads = True, (*weight.shape, leaves, weight.dtype), 0
        self.leaves, self.stacked = [self.weight], None
        if leaves > 1:
            parts = weight.chunk(leaves, dim=1)
            self.weight, self.leaves = None, [blocked(part) for part in parts]
            if weight.nbytes < 4 << 20:  # a second copy saves some 40 us a call, which a large weight does not notice
                self.stacked = blocked(torch.cat(parts))
                self.nbytes += weight.nbytes

    def beside(self, x_MK: Tensor) -> tuple[Tensor, ...]:
        """The leaves of few rows, in one product with all leaves of the weight, without what mixes two."""
        count = len(self.leaves)
        y = product(x_MK.reshape(len(x_MK) * count, -1), self.stacked)
        return y.view(len(x_MK), count, count, -1).diagonal(0, 1, 2).unbind(-1)

    def by_leaf(self, x_MK: Tensor) -> list[Tensor]:
        if len(self.leaves) == 1:
            return [product(x_MK, self.leaves[0], self.bias)]
        return [product(x, leaf) for x, leaf in zip(x_MK.chunk(len(self.leaves), 1), self.leaves, strict=True)]

    def in_tiles(self, x_MK: Tensor, rows: int) -> list[Tensor]:
        return [torch.cat(leaf) for leaf in zip(*map(self.by_leaf, x_MK.split(rows)), strict=True)]

    def reference(self, x_MK: Tensor) -> list[Tensor]:
        """By one thread and in whole tiles of 16 rows: what faster ways must agree with, and their stand-in."""
        with one_thread():
            return [leaf[: len(x_MK)] for leaf in self.in_tiles(F.pad(x_MK, (0, 0, 0, -len(x_MK) % 16)), 16)]

    def probe(self) -> tuple[bool, int, int]:
        """Whether one row may go alone; the most rows that `beside` and `by_leaf` may have at once, 0 if none."""
        x = torch.randn(max(self.PROBED), self.shape[1], generator=torch.Generator().manual_seed(0)).to(self.shape[-1])
        want = self.reference(x)

        def agree(way: Callable, n: int) -> bool:
            return all(torch.equal(got, leaf[:n]) for got, leaf in zip(way(x[:n]), want, strict=True))

        few = [n for n in range(1, 25) if self.stacked is not None and n * len(self.leaves) <= 24]
        few = list(itertools.takewhile(lambda n: agree(self.beside, n), few))
        most = list(itertools.takewhile(lambda n: agree(self.by_leaf, n), self.PROBED[1:]))
        return agree(self.by_leaf, 1), max(few, default=0), max(most, default=0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.threads != torch.get_num_threads():
            self.threads = torch.get_num_threads()
            key = (*self.shape, self.threads)
            self.limits[key] = self.limits.get(key) or self.probe()
            self.alone, self.few, self.most = self.limits[key]
        M = x.numel() // x.shape[-1]
        if self.weight is not None and (1 < M or self.alone) and M <= self.most:
            return product(x, self.weight, self.bias)
        rows = x.reshape(M, -1)
        if M <= self.few:
            parts = self.beside(rows)
        elif M == 1 and not self.alone and self.most:
            parts = [leaf[:1] for leaf in self.by_leaf(rows.expand(2, -1))]
        elif M <= self.most:
            parts = self.by_leaf(rows)
        else:
            tail = int(self.most and M % self.most == 1)  # a tile of one row is another product
            parts = self.in_tiles(F.pad(rows, (0, 0, 0, tail)), self.most) if self.most else self.reference(rows)
            parts = [leaf[:M] for leaf in parts]
        y = parts[0] if len(parts) == 1 else add_leaves(parts, self.bias, x.dtype)
        return y.view(*x.shape[:-1], -1)


@opaque("root_mean_square(Tensor x, float eps) -> Tensor", lambda x, eps: x.new_empty(*x.shape[:-1], 1))
def root_mean_square(x, eps):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).sqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Opaque is what a compiler reorders or rounds in its own way: sums, roots, divisions by a constant, exp."""
    return x / root_mean_square(x, eps) * weight


@opaque("exp(Tensor x) -> Tensor", lambda x: torch.empty_like(x))
def exp(x):
    return torch.exp(x)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + exp(-gate)) * up).to(gate_up.dtype)


def one_by_one(q_BTHD, k_BGLD, v_BGLD, bias, limit_T, scale):
    """What `attend` must agree with, and its stand-in: one thread, and each query of each row alone."""
    tile = Tiling(queries=1, rows=16, keys=SPLIT)
    with one_thread():
        rows = zip(*(x.split(1) for x in (q_BTHD, k_BGLD, v_BGLD, bias)), strict=True)
        return torch.cat([attend(*row, limit_T, scale, tile) for row in rows])


@functools.cache
def tiling(head_dim: int, group: int, dtype: torch.dtype, threads: int) -> Tiling | None:
    """A tiling with which a query's bits are seen to depend on no other query and not on the span; None if none is."""
    draw, T, L = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0)), 80, SPLIT + 64
    q, k, v = (draw(2, *shape, head_dim).to(dtype) for shape in ((T, 2 * group), (2, L), (2, L)))
    wanted = []
    for start in (0, SPLIT - 40):
        bias, limit = dense_mask(causal, torch.arange(start, start + T).expand(2, -1), L, 2 * group, dtype)
        wanted.append((bias, limit, one_by_one(q, k, v, bias, limit, 0.125)))

    def agrees(tile: Tiling, n: int, bias: Tensor, limit: Tensor, want: Tensor) -> bool:
        span = -(-int(limit[n - 1]) // 64) * 64
        for rows in (slice(0, 1), slice(0, 2)):
            args = q[rows, :n], k[rows, :, :span], v[rows, :, :span], bias[rows, :, :n, :span], limit[:n]
            if not torch.equal(attend(*args, 0.125, tile), want[rows, :n]):
                return False
        return True

    for tile in (Tiling(), Tiling(rows=16, keys=SPLIT)):
        if all(agrees(tile, n, *want) for n in (1, 2, 3, 5, 6, 11, 16, 40, T) for want in wanted):
            return tile
    return None


def invariant_attention(q, k, v, k_cache, v_cache, pos, bias, limit_T, scale):
    """One recipe for prefill, decode and verify: softmax over a query's keys, products with the values by SPLIT."""
    write_cache(k, v, k_cache, v_cache, pos)
    G, span = k_cache.shape[1], bias.shape[-1]
    args = q, k_cache.narrow(2, 0, span), v_cache.narrow(2, 0, span), bias, limit_T, scale
    tile = tiling(q.shape[3], q.shape[2] // G, q.dtype, torch.get_num_threads())
    return attend(*args, tile) if tile else one_by_one(*args)


invariant_cpu_attention = opaque("invariant_attention" + ATTENTION_SCHEMA, _attention_shape)(invariant_attention)


BATCH_INVARIANT = Ops(
    pack=LeafPacked,
    linear=linear,
    rms_norm=rms_norm,
    silu_mul=silu_mul,
    mask=dense_mask,
    attention=lambda q, k, v, k_cache, v_cache, pos, mask, scale: invariant_cpu_attention(
        q, k, v, k_cache, v_cache, pos, *mask, scale
    ),
    log_softmax=log_softmax,
    key_block=64,
    compile_options={"emulate_precision_casts": True},
)
