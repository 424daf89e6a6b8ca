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
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(window: int) -> Callable:
    """Causal, and only the last `window` keys, the query's own among them."""
    mask_mod = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < window)
    mask_mod.window = window
    return mask_mod


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


def dense_mask(mask_mod: Callable, pos_BT: Tensor, span: int, n_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """A mask_mod written out, once for all layers: 0 where a query may look and -inf elsewhere [B, 1 or H, T, span],
    and one past the last key that any row's query t sees [T]."""
    b, h, keys = (torch.arange(n, device=pos_BT.device) for n in (pos_BT.shape[0], n_heads, span))
    keep = mask_mod(b[:, None, None, None], h[:, None, None], pos_BT[:, None, :, None], keys)
    bias = torch.zeros(keep.shape, device=pos_BT.device, dtype=dtype).masked_fill_(~keep, float("-inf"))
    torch._dynamo.maybe_mark_dynamic(bias, 3)  # the span grows with the text: one graph for all
    return [bias, (keep.flatten(0, 1).any(0) * (keys + 1)).amax(-1)]


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


def attention_op(name: str, mask_type: str) -> Callable:
    schema = f"Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pos, {mask_type} mask"
    return opaque(f"{name}({schema}, float scale) -> Tensor", lambda q, *_: q.new_empty(*q.shape[:2], q[0, 0].numel()))


@attention_op("fast_attention", "Tensor[]")
def fast_attention(q, k, v, k_cache, v_cache, pos, mask, scale):
    """SDPA with the query heads of one KV head folded into the query length, so that no key is copied: 5 times as
    fast as enable_gqa on a CPU. `attend` is faster without AMX, for long prompts and large batches in bf16."""
    write_cache(k, v, k_cache, v_cache, pos)
    (B, T, H, D), G, bias, span = q.shape, k_cache.shape[1], mask[0], mask[0].shape[-1]
    k, v = k_cache.narrow(2, 0, span), v_cache.narrow(2, 0, span)
    if (B * T >= 16 or T > 32) and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend(q, k, v, *mask, scale, Tiling())
    if T == 1 and bias.shape[1] == 1:
        return F.scaled_dot_product_attention(q.view(B, G, H // G, D), k, v, bias, scale=scale).view(B, T, H * D)
    q = q.unflatten(2, (G, H // G)).transpose(1, 2)
    bias = bias.unsqueeze(3) if bias.shape[1] == 1 else bias.unflatten(1, (G, -1)).transpose(2, 3)
    bias = bias.expand(B, -1, T, H // G, span).flatten(2, 3)
    y = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, bias, scale=scale)
    return y.view(q.shape).transpose(1, 2).flatten(2)


FAST = Ops(
    pack=Packed,
    linear=linear,
    rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    silu_mul=fast_silu_mul,
    mask=dense_mask,
    attention=fast_attention,
    log_softmax=lambda logits: F.log_softmax(logits, dim=-1, dtype=torch.float32),
    compile_options={},
)


# BATCH_INVARIANT: the logits of a token are a function of its own prefix, bit for bit. Sums along K run leaf by leaf,
# attention over splits of keys at absolute positions, and sums are opaque to torch.compile.
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


def one_thread() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    return stack


class LeafPacked(Packed):
    """A weight on a CPU whose products round each leaf once, add them in fp32 and round the sum. oneDNN's bits do not
    depend on the rows of a product, within limits that each shape is asked for when it is first used."""

    PROBED = (1, 2, 3, 7, 8, 15, 16, 17, 33, 48, 64, 100, 128, 256, 500, 512)  # row counts whose bits are compared
    limits: dict[tuple, tuple[bool, int, int]] = {}  # what `probe` found, by shape and thread count
    alone = False  # whether one row may go alone: elsewhere it takes another kernel, so it is doubled

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
        M, bias = len(x_MK), self.bias if len(self.leaves) == 1 else None
        parts = (x_MK if M > 1 or self.alone else x_MK.expand(2, -1)).chunk(len(self.leaves), 1)
        return [product(x, leaf, bias)[:M] for x, leaf in zip(parts, self.leaves, strict=True)]

    def in_tiles(self, x_MK: Tensor, rows: int) -> list[Tensor]:
        return [torch.cat(leaf) for leaf in zip(*map(self.by_leaf, x_MK.split(rows)), strict=True)]

    def reference(self, x_MK: Tensor) -> list[Tensor]:
        """By one thread and in whole tiles of 16 rows: what faster ways must agree with, and their stand-in."""
        with one_thread():
            return [leaf[: len(x_MK)] for leaf in self.in_tiles(F.pad(x_MK, (0, 0, 0, -len(x_MK) % 16)), 16)]

    def probe(self) -> tuple[bool, int, int]:
        """`alone`, and the most rows that `beside` and `by_leaf` may have at once, 0 if none. The products add up to 0
        but for rounding, so that the order of additions shows in every bit, also after rounding to half precision."""
        (N, K, leaves, dtype), generator = self.shape, torch.Generator().manual_seed(0)
        weight, x = (torch.randn(n, leaves, K // leaves // 2, generator=generator) for n in (min(N, 1 << 14), 512))
        order = torch.randperm(K // leaves // 2 * 2, generator=generator)
        pairs = (torch.cat(z, 2)[..., order].flatten(1) for z in ((weight, -weight), (x, x)))
        weight, x = (F.pad(z, (0, K % 2)).to(dtype) for z in pairs)
        probe = LeafPacked(weight, None, leaves)
        want, probe.alone = probe.reference(x), True

        def agree(way: Callable, n: int) -> bool:
            return all(torch.equal(got, leaf[:n]) for got, leaf in zip(way(x[:n]), want, strict=True))

        few = range(1, 24 // leaves + 1 if self.stacked is not None and probe.stacked is not None else 1)
        few = max(itertools.takewhile(lambda n: agree(probe.beside, n), few), default=0)
        alone, probe.alone = agree(probe.by_leaf, 1), False
        return alone, few, max(itertools.takewhile(lambda n: agree(probe.by_leaf, n), self.PROBED), default=0)

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
        elif M <= self.most:
            parts = self.by_leaf(rows)
        else:
            parts = self.in_tiles(rows, self.most) if self.most else self.reference(rows)
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
def tiling(B: int, G: int, head_dim: int, group: int, dtype: torch.dtype, threads: int) -> Tiling | None:
    """A tiling with which a query's bits are seen to depend on no other query and not on the span; None if none is."""
    generator, T, L = torch.Generator().manual_seed(0), 80, SPLIT + 64
    q, k, v = (torch.randn(B, *shape, head_dim // 2, generator=generator) for shape in ((T, G * group), (G, L), (G, L)))
    # As in LeafPacked.probe: scores and sums of values are 0 but for rounding, the scores scaled up to matter.
    k[:, :, 1::2], v[:, :, 1::2] = k[:, :, ::2], -v[:, :, ::2]
    order = torch.randperm(head_dim // 2 * 2, generator=generator)
    q, k, v = (torch.cat(z, -1)[..., order].to(dtype) for z in ((q * 4096, q * 4096), (k * 4096, k * -4096), (v, v)))
    wanted = []
    for start in (0, SPLIT - 40):
        bias, limit = dense_mask(causal, torch.arange(start, start + T).expand(B, -1), L, G * group, dtype)
        wanted.append((bias, limit, one_by_one(q, k, v, bias, limit, 0.125)))

    def agrees(tile: Tiling, now: slice, bias: Tensor, limit: Tensor, want: Tensor) -> bool:
        span = -(-int(limit[now.stop - 1]) // 64) * 64
        got = attend(q[:, now], k[:, :, :span], v[:, :, :span], bias[:, :, now, :span], limit[now], 0.125, tile)
        return torch.equal(got, want[:, now])

    pieces = [slice(max(end - n, 0), end) for n in (1, 2, 3, 5, 6, 11, 16, 40, T) for end in range(8, T + 1, 8)]
    tiles = (Tiling(), Tiling(rows=16, keys=SPLIT))[head_dim < 64 :]  # short sums hide from the probe
    return next((t for t in tiles if all(agrees(t, now, *case) for now in pieces for case in wanted)), None)


@attention_op("invariant_attention", "Tensor[]")
def invariant_attention(q, k, v, k_cache, v_cache, pos, mask, scale):
    """One recipe for prefill, decode and verify: softmax over a query's keys, products with the values by SPLIT."""
    write_cache(k, v, k_cache, v_cache, pos)
    G, span = k_cache.shape[1], mask[0].shape[-1]
    args = q, k_cache.narrow(2, 0, span), v_cache.narrow(2, 0, span), *mask, scale
    tile = tiling(min(len(q), 2), G, q.shape[3], q.shape[2] // G, q.dtype, torch.get_num_threads())
    return attend(*args, tile) if tile else one_by_one(*args)


# The same on a GPU: a dot adds to one fp32 accumulator in ascending k, BLOCK_K at a time at every M, so bits depend on
# neither the shape of a tile nor its warps. FMA contraction is off, as it may differ between kernels.
@functools.cache
def triton_kernels() -> SimpleNamespace:
    """Triton, imported when a GPU asks. What a kernel calls is global, where the interpreter finds it. What varies from
    call to call is not specialized: another kernel may have another layout, in which sums have another order."""
    global tl, merge
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["M"])
    def linear(x, w, scale, zero, bias, y, M, N, K, leaf, GROUP: tl.constexpr, PER_BYTE: tl.constexpr,
               BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
        """One leaf of one tile of y. The weight is the left operand, where wgmma wants 64 rows: it serves every M."""
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(tl.program_id(2) * leaf, (tl.program_id(2) + 1) * leaf, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(x + m * K + k[:, None], mask=m < M, other=0)
            b = tl.load(w + n * (K // PER_BYTE) + k[None, :] // PER_BYTE, mask=n < N, other=0)
            if scale is not None:
                b = ((b >> (k[None, :] % 2 * 4)) & 15 if PER_BYTE == 2 else b).to(tl.float32)
                group = n * (K // GROUP) + start // GROUP
                if zero is not None:
                    b -= tl.load(zero + group, mask=n < N, other=0).to(tl.float32)
                b = (b * tl.load(scale + group, mask=n < N, other=0).to(tl.float32)).to(a.dtype)
            acc = tl.dot(b, a, acc, input_precision="ieee")
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
        at = tl.program_id(2).to(tl.int64) * M * N + m * N + n
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=(m < M) & (n < N))

    @triton.jit(do_not_specialize=["size"])
    def add_leaves(parts, bias, y, size, N, LEAVES: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(parts + i, mask=i < size, other=0)
        for leaf in tl.static_range(1, LEAVES if LEAVES % 2 else 1):
            total += tl.load(parts + i + leaf * size, mask=i < size, other=0)
        if LEAVES % 2 == 0:
            at = tl.arange(0, LEAVES)[:, None] * size + i[None, :]
            tree = tl.load(parts + at, mask=(i < size)[None, :], other=0)
            for level in tl.static_range(1, 4):  # a sum of two neighbours has one order
                if LEAVES >> level:
                    tree = tl.sum(tl.reshape(tree, (LEAVES >> level, 2, BLOCK)), 1)
            total = tl.reshape(tree, (BLOCK,))
        if bias is not None:
            total += tl.load(bias + i % N, mask=i < size, other=0).to(tl.float32)
        tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)

    @triton.jit
    def merge(top, total, acc, top_2, total_2, acc_2):
        """Softmax over two sets of keys, each given as its highest score in log2, the sum of its weights relative to
        that, and the weighted sum of its values. A set without keys (-inf, 0, 0) changes no bits of the other."""
        both = tl.maximum(top, top_2)
        safe = tl.where(both == float("-inf"), 0.0, both)
        old, new = tl.exp2(top - safe), tl.exp2(top_2 - safe)
        return both, total * old + total_2 * new, acc * old[:, None] + acc_2 * new[:, None]

    @triton.jit(do_not_specialize=["T", "L", "window"])
    def attention(q, k_cache, v_cache, pos, y, stats, parts, T, L, window, scale, G: tl.constexpr, GROUP: tl.constexpr,
        D: tl.constexpr, SPLIT: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """A block of rows, the queries of one KV head, over all their splits; where `parts` is given, over one."""
        b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
        r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D_PAD)
        t, row = r // GROUP, (b * T + r // GROUP) * (G * GROUP) + g * GROUP + r % GROUP
        p = tl.load(pos + b * T + t, mask=t < T, other=-1).to(tl.int32)  # rows of padding see nothing
        last = tl.max(p, 0)
        first = tl.maximum(tl.min(tl.where(t < T, p, last), 0) - window + 1, 0)
        at, real = row[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
        queries = tl.load(q + at, mask=real, other=0)
        none, zero = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D_PAD), tl.float32)
        empty = none - float("inf")
        top, total, acc = empty, none, zero
        begin, end = first // SPLIT, last // SPLIT + 1
        if parts is not None:
            begin, end = tl.program_id(2), tl.program_id(2) + 1
        for split in range(begin, end):
            top_s, total_s, acc_s = empty, none, zero
            start = tl.maximum(split * SPLIT, first // TILE * TILE)
            for key in range(start, tl.minimum(split * SPLIT + SPLIT, last + 1), TILE):
                j = key + tl.arange(0, TILE)
                cell, there = (b * G + g) * L * D + j[:, None] * D + d[None, :], (j <= last)[:, None] & (d < D)[None, :]
                keys = tl.load(k_cache + cell, mask=there, other=0)
                values = tl.load(v_cache + cell, mask=there, other=0)
                scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
                back = p[:, None] - j[None, :]
                scores = tl.where((back >= 0) & (back < window), scores, float("-inf"))
                both = tl.maximum(top_s, tl.max(scores, 1))
                safe = tl.where(both == float("-inf"), 0.0, both)
                weights, old = tl.exp2(scores - safe[:, None]), tl.exp2(top_s - safe)
                top_s, total_s = both, total_s * old + tl.sum(weights, 1)
                acc_s = tl.dot(weights.to(values.dtype), values, acc_s * old[:, None], input_precision="ieee")
            top, total, acc = merge(top, total, acc, top_s, total_s, acc_s)
        if parts is not None:
            row += tl.program_id(2) * (tl.num_programs(1) // G) * T * (G * GROUP)
            tl.store(stats + 2 * row, top, mask=t < T)
            tl.store(stats + 2 * row + 1, total, mask=t < T)
            tl.store(parts + row[:, None] * D + d[None, :], acc, mask=real)
        else:
            tl.store(y + at, (acc / total[:, None]).to(y.dtype.element_ty), mask=real)

    @triton.jit(do_not_specialize=["rows", "window"])
    def combine(pos, y, stats, parts, rows, window, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
                D_PAD: tl.constexpr):  # fmt: skip
        """One row's splits, in ascending order."""
        row, d = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.arange(0, D_PAD)[None, :]
        p = tl.load(pos + tl.program_id(0) // H).to(tl.int32)
        total, acc = tl.zeros((1,), tl.float32), tl.zeros((1, D_PAD), tl.float32)
        top = total - float("inf")
        for split in range(tl.maximum(p - window + 1, 0) // SPLIT, p // SPLIT + 1):
            at = row + split * rows
            part = tl.load(parts + at[:, None] * D + d, mask=d < D, other=0)
            top, total, acc = merge(top, total, acc, tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1), part)
        tl.store(y + row[:, None] * D + d, (acc / total[:, None]).to(y.dtype.element_ty), mask=d < D)

    @triton.jit(do_not_specialize=["x"])
    def rms_norm(x, weight, y, n, eps, BLOCK: tl.constexpr):
        at, j = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BLOCK)
        row = tl.load(x + at + j, mask=j < n, other=0).to(tl.float32)
        row = row / tl.sqrt(tl.sum(row * row, 0) / n + eps) * tl.load(weight + j, mask=j < n, other=0)
        tl.store(y + at + j, row.to(y.dtype.element_ty), mask=j < n)

    @triton.jit(do_not_specialize=["x"])
    def log_softmax(x, y, n, BLOCK: tl.constexpr):
        at, j = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BLOCK)
        top, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(0, n, BLOCK):
            top = tl.maximum(top, tl.load(x + at + i + j, mask=i + j < n, other=float("-inf")).to(tl.float32))
        highest = tl.max(top, 0)
        for i in range(0, n, BLOCK):
            total += tl.exp(tl.load(x + at + i + j, mask=i + j < n, other=float("-inf")).to(tl.float32) - highest)
        log_sum = tl.log(tl.sum(total, 0))
        for i in range(0, n, BLOCK):
            row = tl.load(x + at + i + j, mask=i + j < n, other=0).to(tl.float32)
            tl.store(y + at + i + j, row - highest - log_sum, mask=i + j < n)

    return SimpleNamespace(**locals())


class TritonPacked(Packed):
    """A weight on a GPU, as it is or quantized: int8 [N, K], or uint8 [N, K / 2] of two numbers, the low nibble at
    the even k. Such a weight is (q - zero) * scale, with scale and zero [N, K / group], where None is zero."""

    LAUNCHES = {  # by the most rows M; only what changes no bits. Shared memory fits 99 KB, which is sm_89
        16: {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
        math.inf: {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    }

    def __init__(self, weight, bias=None, leaves=1, scale=None, zero=None):
        super().__init__(weight, bias)
        self.weight, self.opaque, self.leaves, self.scale, self.zero = weight.contiguous(), True, leaves, scale, zero
        self.nbytes += sum(t.nbytes for t in (scale, zero) if t is not None)

    def __call__(self, x):
        kernels, N, K, x_MK = triton_kernels(), self.out_features, x.shape[-1], x.reshape(-1, x.shape[-1]).contiguous()
        M, y = len(x_MK), x.new_empty(*x.shape[:-1], N)
        parts = y if self.leaves == 1 else x.new_empty(self.leaves, M, N, dtype=torch.float32)
        launch = next(launch for most, launch in self.LAUNCHES.items() if M <= most)
        grid = -(-N // launch["BLOCK_N"]), -(-M // launch["BLOCK_M"]), self.leaves
        leaf, group = K // self.leaves, K if self.scale is None else K // self.scale.shape[1]
        block_k = math.gcd(128 // x.itemsize, leaf, group)  # no block straddles a leaf or a group
        args = x_MK, self.weight, self.scale, self.zero, self.bias if self.leaves == 1 else None, parts
        sizes = M, N, K, leaf, group, K // self.weight.shape[1], block_k
        kernels.linear[grid](*args, *sizes, **launch, enable_fp_fusion=False)
        if self.leaves > 1:
            kernels.add_leaves[(-(-M * N // 256),)](parts, self.bias, y, M * N, N, self.leaves, 256)
        return y


def window_mask(mask_mod: Callable, pos_BT: Tensor, span: int, n_heads: int, dtype: torch.dtype):
    """On a GPU, where the kernel computes the mask, the window; on a CPU a dense mask."""
    if not pos_BT.is_cuda:
        return dense_mask(mask_mod, pos_BT, span, n_heads, dtype)
    if (window := 1 << 30 if mask_mod is causal else getattr(mask_mod, "window", None)) is None:
        raise ValueError(f"on a GPU, deterministic attention is causal or a sliding_window, not {mask_mod}")
    return window


@attention_op("triton_attention", "int")
def triton_attention(q, k, v, k_cache, v_cache, pos, window, scale):
    write_cache(k, v, k_cache, v_cache, pos)
    (B, T, H, D), (_, G, L, _), kernels = q.shape, k_cache.shape, triton_kernels()
    q, pos, y, splits, rows = q.contiguous(), pos.contiguous(), q.new_empty(B, T, H * D), -(-L // SPLIT), B * T * H
    # One program for each split where a program would be alone with them; its results are merged by `combine`.
    alone, stats, parts = splits > 1 and T * H // G <= 64, None, None
    if alone:
        stats, parts = (q.new_empty(splits, rows, n, dtype=torch.float32) for n in (2, D))
    sizes, pad = (D, SPLIT, max(16, 1 << (D - 1).bit_length())), {"enable_fp_fusion": False, "num_warps": 4}
    grid, args = (-(-T * H // G // 64), B * G, splits if alone else 1), (q, k_cache, v_cache, pos, y, stats, parts)
    stages = {"num_stages": 2 if q.itemsize == 2 else 1}
    kernels.attention[grid](*args, T, L, window, scale * math.log2(math.e), G, H // G, *sizes, 64, 64, **pad, **stages)
    if alone:
        kernels.combine[(rows,)](pos, y, stats, parts, rows, window, H, *sizes, **pad)
    return y


@opaque("triton_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, *others: x.new_empty(x.shape))
def triton_rms_norm(x, weight, eps):
    x, y, n = x.contiguous(), x.new_empty(x.shape), x.shape[-1]
    triton_kernels().rms_norm[(x.numel() // n,)](x, weight, y, n, eps, 1 << (n - 1).bit_length())
    return y


@opaque("triton_log_softmax(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape, dtype=torch.float32))
def triton_log_softmax(x):
    x, y, n = x.contiguous(), x.new_empty(x.shape, dtype=torch.float32), x.shape[-1]
    triton_kernels().log_softmax[(x.numel() // n,)](x, y, n, 4096)
    return y


BATCH_INVARIANT = Ops(
    pack=lambda weight, *args: (TritonPacked if weight.is_cuda else LeafPacked)(weight, *args),
    linear=linear,
    rms_norm=lambda x, weight, eps: (triton_rms_norm if x.is_cuda else rms_norm)(x, weight, eps),
    silu_mul=silu_mul,
    mask=window_mask,
    attention=lambda q, *args: (triton_attention if q.is_cuda else invariant_attention)(q, *args),
    log_softmax=lambda logits: (triton_log_softmax if logits.is_cuda else FAST.log_softmax)(logits),
    compile_options={"emulate_precision_casts": True},
)
