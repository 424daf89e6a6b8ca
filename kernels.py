"""The op tables. Every reduction of the model goes through one `Ops`, chosen once when the model is built: FAST is what
PyTorch does best, BATCH_INVARIANT gives the logits of a token the same bits whatever else is computed beside it.

A fork that wants a third table writes another `Ops(...)`. A mask_mod has FlexAttention's signature, (b, h, q_idx,
kv_idx) -> bool tensor, over absolute positions. Shapes: B rows, T new tokens, H query heads, G KV heads, D head_dim,
L cached positions, N x K a weight, M rows of its input."""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


def sliding_window(window: int) -> Callable:
    """Causal, and only the last `window` keys, the query's own among them."""
    mask_mod = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx < kv_idx + window)
    mask_mod.window = window
    return mask_mod


causal = sliding_window(1 << 30)
AMX = torch.cpu._is_amx_tile_supported()  # 16 rows of half precision or of bytes are as quick as one


@dataclass(frozen=True)
class Ops:
    """One implementation of each reduction; `pack` and `mask` make what `linear` and `attention` want to be given."""

    pack: Callable  # (weight_NK, bias_N or None, leaves, see leaf_count; quantized: scale, zero) -> packed
    linear: Callable  # (x, packed) -> x W^T + b
    rms_norm: Callable  # (x, weight, eps), over the last dimension
    silu_mul: Callable  # (gate_up) -> silu(gate) * up, of the two halves
    mask: Callable  # (mask_mod, pos_BT, span, heads_GR: query heads by KV head, dtype) -> mask over `span` keys
    attention: Callable  # (q_BTHD, k_BTGD, v_BTGD, k_cache_BGLD, v_cache, pos_BT, mask, scale) -> [B, T, H * D]
    log_softmax: Callable  # (logits) -> fp32, over the last dimension
    compile_options: dict  # what torch.compile needs so that it changes no bits that matter
    exact: bool = False  # whether bits depend on nothing but a token's own prefix


_lib = torch.library.Library("gpt_exact", "DEF")


def opaque(schema: str, fake: Callable) -> Callable:
    """Register a function as an op that torch.compile calls and never looks into; eager code calls it directly."""

    def register(impl: Callable) -> Callable:
        name = schema.partition("(")[0]
        _lib.define(schema)
        _lib.impl(name, lambda *args: impl(*args).contiguous(), "CompositeExplicitAutograd")  # as its fake has it
        torch.library.register_fake(f"gpt_exact::{name}", fake, lib=_lib)
        op = getattr(torch.ops.gpt_exact, name).default
        return lambda *args: op(*args) if torch.compiler.is_compiling() else impl(*args)

    return register


def blocked(weight_NK: Tensor) -> Tensor:
    """A weight in oneDNN's blocks, at one row twice as fast as F.linear; as it is where oneDNN does not take it."""
    with contextlib.suppress(RuntimeError):
        if weight_NK.device.type == "cpu":
            return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), 1)
    return weight_NK.contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, op=torch.ops.mkldnn._linear_pointwise.default):
    return op(x, weight, bias, "none", [], "") if weight.is_mkldnn else F.linear(x, weight, bias)


class Packed:
    """A weight in its kernel's layout, which Inductor cannot trace through: a graph names the weight by an integer."""

    parts, opaque = 1, True  # the leaves in what `products` returns: [..., N], or several, to be added
    parts_dtype, partial = None, False  # the type of leaves, None: as the input; whether other ranks have more of them
    table: dict[int, "Packed"] = weakref.WeakValueDictionary()  # or a mixture; forgets it when its layer dies
    handles = itertools.count()  # alike in every run, so that compiled graphs are found in Inductor's cache

    def __init__(self, weight: Tensor, bias: Tensor | None = None, leaves: int = 1, *grid: Tensor):
        self.bias, self.out_features, self.handle = bias, len(weight), next(self.handles)
        self.nbytes, self.table[self.handle] = sum(t.nbytes for t in (weight, bias, *grid) if t is not None), self
        self.pack(weight, leaves, *grid)

    def pack(self, weight: Tensor, leaves: int) -> None:
        self.weight = blocked(weight)
        self.opaque = self.weight.is_mkldnn

    def products(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, in the type of x; in fp32 where it is a sum of leaves, whose additions a compiler may see."""
        traced, sizes = torch.compiler.is_compiling(), (self.parts, self.out_features)[self.parts == 1 :]
        y = opaque_linear(x, self.handle, sizes, self.parts_dtype) if traced and self.opaque else self.products(x)
        return y if self.parts == 1 else add_leaves(y, self.bias)


like_linear = lambda x, handle, sizes, dtype: x.new_empty(*x.shape[:-1], *sizes, dtype=dtype)


@opaque("linear(Tensor x, int handle, int[] sizes, ScalarType? dtype) -> Tensor", like_linear)
def opaque_linear(x, handle, sizes, dtype):
    y = Packed.table[handle].products(x)
    return torch.stack(y, dim=-2) if isinstance(y, list) else y


def dense_mask(mask_mod: Callable, pos_BT: Tensor, span: int, heads_GR: Tensor, dtype: torch.dtype):
    """A mask_mod written out, once for all layers: 0 where a query may look and -inf elsewhere, [B, G, T, H / G, span]
    with 1 for what it does not depend on, and one past the last key that any row's query t sees [T]."""
    b, keys = (torch.arange(n, device=pos_BT.device) for n in (len(pos_BT), span))
    keep = mask_mod(b.view(-1, 1, 1, 1, 1), heads_GR[:, None, :, None], pos_BT[:, None, :, None, None], keys)
    bias = torch.zeros(keep.shape, device=pos_BT.device, dtype=dtype).masked_fill_(~keep, float("-inf"))
    torch._dynamo.maybe_mark_dynamic(bias, 4)  # the span grows with the text: one graph for all
    return [bias, span - keep.any(3).flatten(0, 1).any(0).flip(-1).byte().argmax(-1)]


def write_cache(k_BTGD: Tensor, v_BTGD: Tensor, k_cache: Tensor, v_cache: Tensor, pos_BT: Tensor) -> None:
    """Put new keys and values at their absolute positions, before anyone attends to them."""
    for new, cache in ((k_BTGD, k_cache), (v_BTGD, v_cache)):
        if len(pos_BT) == 1:
            cache.index_copy_(2, pos_BT[0], new.transpose(1, 2))
        else:
            cache[torch.arange(len(pos_BT), device=pos_BT.device)[:, None], :, pos_BT] = new


def attend(q_BTHD, k_BGLD, v_BGLD, bias, limit_T, scale: float, tokens=1, spans=range(64, 513, 64)) -> Tensor:
    """Attention, [B, T, H * D], in blocks of about 128 tokens, which skip keys behind the last one that they may see.
    Tokens are padded to a multiple, and keys, by others of the cache, to a span beyond blocks of 512: see `recipe`."""
    fit = lambda n: n // 512 * 512 + next(span for span in (0, *spans) if span >= n % 512)
    T, L, size, parts = len(limit_T), fit(bias.shape[-1]), 128 // tokens * tokens, []
    k_BGLD, v_BGLD = k_BGLD[:, :, :L], v_BGLD[:, :, :L]
    q_BGTRD = q_BTHD.unflatten(2, (k_BGLD.shape[1], -1)).transpose(1, 2)
    bias = F.pad(bias, (0, L - bias.shape[-1]), value=float("-inf")) if L > bias.shape[-1] else bias
    if T_more := -T % tokens:  # the last token again, as often
        q_BGTRD, bias = (torch.cat([x] + [x[:, :, -1:]] * T_more, dim=2) for x in (q_BGTRD, bias))
    if T == 1 or q_BTHD.is_cuda:  # on a GPU, nobody may wait for `limit_T`
        return sdpa(q_BGTRD, k_BGLD, v_BGLD, bias, scale, tokens)[:, :, :T].transpose(1, 2).flatten(2)
    for start in range(0, T, size):
        span = fit(int(limit_T[now := slice(start, start + size)].max()))
        keys = (x[:, :, :span] for x in (k_BGLD, v_BGLD))
        parts += [sdpa(q_BGTRD[:, :, now], *keys, bias[:, :, now, :, :span], scale, tokens)]
    return torch.cat(parts, dim=2)[:, :, :T].transpose(1, 2).flatten(2)


def sdpa(q_BGTRD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, bias: Tensor, scale: float, tokens: int) -> Tensor:
    """The query heads of a KV head become its rows and no key is copied: on a CPU 5 times as fast as enable_gqa.
    `tokens` are the fewest whose rows a kernel is given; fewer rows, left over by its tiles of 32, are padded."""
    (T, R), least = q_BGTRD.shape[2:4], max(min(tokens * q_BGTRD.shape[3], 32), 2)
    q, bias = q_BGTRD.flatten(2, 3), bias.expand(-1, -1, -1, R, -1).flatten(2, 3)
    if 0 < T * R % 32 < least and q.device.type == "cpu":  # which would take another kernel
        q, bias = (F.pad(x, (0, 0, 0, least - T * R % 32)) for x in (q, bias))
    y = F.scaled_dot_product_attention(q, k_BGLD, v_BGLD, bias.expand(len(q), -1, -1, -1), scale=scale)
    return y[:, :, : T * R].unflatten(2, (T, R))


ATTENTION = "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pos, {}) -> Tensor"
like_attention = lambda q, *_: q.new_empty(*q.shape[:2], q[0, 0].numel())


@opaque("attention" + ATTENTION.format("Tensor[] mask, float scale, bool exact"), like_attention)
def attention(q, k, v, k_cache, v_cache, pos, mask, scale, exact):
    """One recipe for prefill, decode and verify."""
    write_cache(k, v, k_cache, v_cache, pos)
    (B, _, H, D), G = q.shape, k_cache.shape[1]
    way = recipe(min(B, 2), min(G, 3), D, H // G, q.dtype, torch.get_num_threads()) if exact else attend
    return way(q, k_cache, v_cache, *mask, scale)


def fast_attention(q, k, v, k_cache, v_cache, pos, mask, scale):
    """Of one token a row, compiled for a CPU, a few loops that Inductor writes: there, calling an op costs more."""
    if q.shape[1] > 1 or q.device.type != "cpu" or not torch.compiler.is_compiling():
        return attention(q, k, v, k_cache, v_cache, pos, mask, scale, False)
    write_cache(k, v, k_cache, v_cache, pos)
    k, v = (cache[:, :, None, : mask[0].shape[-1]].float() for cache in (k_cache, v_cache))
    scores = (q[:, 0].unflatten(1, (k.shape[1], -1)).unsqueeze(3).float() * k).sum(-1) * scale + mask[0][:, :, 0]
    return (scores.softmax(-1).unsqueeze(4) * v).sum(3).to(q.dtype).flatten(1).unsqueeze(1)


FAST = Ops(
    pack=Packed,
    linear=lambda x, packed: packed(x),
    rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    silu_mul=lambda gate_up: F.silu(gate_up[..., : gate_up.shape[-1] // 2]) * gate_up[..., gate_up.shape[-1] // 2 :],
    mask=lambda mod, pos, *rest: mod.window if pos.is_cuda and hasattr(mod, "window") else dense_mask(mod, pos, *rest),
    attention=lambda *args: (triton_attention if isinstance(args[6], int) else fast_attention)(*args),
    log_softmax=lambda logits: F.log_softmax(logits, dim=-1, dtype=torch.float32),
    compile_options={"size_asserts": False, "alignment_asserts": False, "coordinate_descent_tuning": True},
)


# BATCH_INVARIANT: sums along K run leaf by leaf, attention over keys at absolute positions, opaque to torch.compile.
def leaf_count(n_kv_heads: int, in_features: int, multiple: int = 32) -> int:
    """Into how many leaves K is cut where tensor parallelism may cut it: the largest power of two up to 8 that divides
    the KV heads, else their smallest odd prime factor up to 7; fewer until a leaf is whole multiples of `multiple`."""
    count = next((n for n in (math.gcd(n_kv_heads, 8), 3, 5, 7) if n > 1 and n_kv_heads % n == 0), 1)
    while in_features % (count * multiple) and count > 1:
        count = count // 2 if count % 2 == 0 else 1
    return count


def add_leaves(leaves: Tensor | list[Tensor], bias: Tensor | None = None) -> Tensor:
    """[..., N]: leaves [..., parts, N], or a list, and then the bias, added in fp32, a power of two of them as a binary
    tree, else from left to right."""
    leaves = leaves.unbind(-2) if isinstance(leaves, Tensor) else leaves
    while len(leaves) % 2 == 0:
        leaves = [a.float() + b for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
    return functools.reduce(torch.add, [leaves[0].float(), *leaves[1:]] + ([] if bias is None else [bias]))


def one_thread() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    return stack


def cancelling(a_shape: tuple, b_shape: tuple, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random [*a_shape, K], [*b_shape, K] whose products add up to 0 but for rounding, where their order shows."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, K // 2, generator=generator) for shape in (a_shape, b_shape))
    order = torch.randperm(K // 2 * 2, generator=generator)
    return tuple(F.pad(torch.cat(z, -1)[..., order], (0, K % 2)).to(dtype) for z in ((a, a), (b, -b)))


def in_tiles(x: Tensor, weight: Tensor, safe: range, bias: Tensor | None = None) -> Tensor:
    """A product of as many rows at a time as are safe; where none are, the reference: one thread, tiles of 16 rows."""
    if x.shape[:-1].numel() in safe:
        return product(x, weight, bias)
    least, most = (safe[0], safe[-1]) if safe else (16, 16)  # fewer might be given to another kernel
    with contextlib.nullcontext() if safe else one_thread():
        more = lambda tile: F.pad(tile, (0, 0, 0, max(least - len(tile), 0)))
        y = [product(more(tile), weight, bias)[: len(tile)] for tile in x.flatten(0, -2).split(most)]
    return torch.cat(y).view(*x.shape[:-1], -1)


@functools.cache
def safe_rows(N: int, K: int, dtype: torch.dtype, leaves: int, threads: int) -> range:
    """How many rows, up to 512, a product with such a weight may have to be seen with the bits of the reference; the
    weight may be `leaves` of that shape, stacked, of which each has its own reference."""
    x, weight = cancelling((512,), (leaves, min(N, 1 << 14)), K, dtype)
    want = torch.cat([in_tiles(x, blocked(leaf), range(0)) for leaf in weight], dim=1)
    weight = blocked(weight.flatten(0, 1))
    counts = (2, 3, 6, 7, 8, 9, 12, 15, 16, 17, 24, 33, 48, 64, 100, 128, 256, 500, 512)
    agrees = lambda n: torch.equal(product(x[:n], weight), want[:n])
    return range(1 if agrees(1) else 2, max(itertools.takewhile(agrees, counts), default=0) + 1)


class LeafPacked(Packed):
    """A weight on a CPU whose products round each leaf once."""

    def pack(self, weight: Tensor, leaves: int) -> None:
        parts, self.parts, self.stacked = weight.chunk(leaves, dim=1), leaves, None
        self.parts_dtype = torch.float32 if leaves > 1 else None
        self.leaves, self.shape = list(map(blocked, parts)), (*parts[0].shape, weight.dtype)
        if leaves > 1 and weight.nbytes < 4 << 20:  # a large weight would not notice the 30 us a call that this saves
            self.stacked = blocked(torch.cat(parts))
            self.nbytes += weight.nbytes

    def products(self, x: Tensor) -> Tensor:
        (N, K, dtype), G, threads, rows = self.shape, self.parts, torch.get_num_threads(), x.numel() // self.shape[1]
        if self.stacked is not None and rows <= (48 if AMX else 24) and rows in safe_rows(N, K, dtype, G, threads):
            # A few rows: one product, of all leaves of the weight and of the rows, is cheap to make and quick to call.
            y = product(x.reshape(*x.shape[:-1], G, K), self.stacked).view(*x.shape[:-1], G, G, N)
            return y.diagonal(dim1=-3, dim2=-2).float().movedim(-1, -2)
        safe = safe_rows(N, K, dtype, 1, threads)
        if G == 1:
            return in_tiles(x, *self.leaves, safe, self.bias)
        return [in_tiles(*pair, safe).float() for pair in zip(x.chunk(G, -1), self.leaves, strict=True)]


# Opaque is what a compiler reorders or rounds in its own way: sums and exp. So are torch.sqrt and pow, but not rsqrt.
exp = opaque("exp(Tensor x) -> Tensor", torch.empty_like)(torch.exp)
norm_of = functools.partial(torch.linalg.vector_norm, dim=-1, keepdim=True)
vector_norm = opaque("vector_norm(Tensor x) -> Tensor", lambda x: torch.empty_like(x[..., :1]))(norm_of)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    length = vector_norm(x)
    return (x * (length * length * (1 / x.shape[-1]) + eps).rsqrt()).mul_(weight)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / exp(-gate).add_(1)).mul_(up).to(gate_up.dtype)


def attend_safely(q_BTHD, k_BGLD, v_BGLD, bias, limit_T, scale):
    """What `attend` must agree with, and its stand-in: one thread, rows padded to multiples of 16, each row of a batch
    alone."""
    tokens = -(-16 * k_BGLD.shape[1] // q_BTHD.shape[2])
    rows = zip(*(x.split(1) for x in (q_BTHD, k_BGLD, v_BGLD, bias)), strict=True)
    with one_thread():
        return torch.cat([attend(*row, limit_T, scale, tokens, spans=[512]) for row in rows])


@functools.cache
def recipe(B: int, G: int, head_dim: int, group: int, dtype: torch.dtype, threads: int) -> Callable:
    """The way through `attend` in which a query's bits are seen to depend on no other query and not on the span."""
    T, L, pieces = 128, 640, []
    q, k = cancelling((B, T, G * group), (B, G, 1024), head_dim, dtype)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    v[:, :, ::4] *= 1 << 12  # with equal weights these cancel, and leave what they have made of the sums between them
    v[:, :, 2::4] = -v[:, :, ::4]
    for scale, start in itertools.product((2.0**21, 0.0), range(0, 512, 118)):  # so that all multiples of 64 occur
        pos_BT, heads_GR = torch.arange(start, start + T).expand(B, -1), torch.zeros(G, group)
        bias, limit = dense_mask(causal, pos_BT, L, heads_GR, dtype)
        want = attend_safely(q, k, v, bias, limit, scale)
        for count, end in [*itertools.product((1, 2, 3, 16, 40, T), (16, 32, 64, T)), *((n, T) for n in range(4, 33))]:
            now, span = slice(max(end - count, 0), end), -(-(start + end) // 64) * 64
            pieces += [(span, want[:, now], q[:, now], k, v, bias[:, :, now, :, :span], limit[now], scale)]

    fit = lambda n: (piece for span, *piece in pieces if span % 512 <= n)
    seen = lambda tokens, *spans: all(torch.equal(attend(*args, tokens, spans), y) for y, *args in fit(spans[0]))
    tokens = next((n for n in (1, 2, -(-16 // group)) if seen(n, 512)), 0)
    spans = [n for n in range(64, 513, 64) if tokens and seen(tokens, n, 512)]
    return functools.partial(attend, tokens=tokens, spans=spans) if tokens else attend_safely


# The same on a GPU: a dot adds to one fp32 accumulator in ascending k, BLOCK_K at a time at every M, so bits depend on
# neither the shape of a tile nor its warps. FMA contraction is off, as it may differ between kernels.
SPLIT = 512  # keys that one program attends to before their sum joins that of others


@functools.cache
def triton_kernels() -> SimpleNamespace:
    """Triton, imported when a GPU asks; global, where the interpreter finds it."""
    global tl
    import triton
    import triton.language as tl

    # What varies from call to call is not specialized: another layout may add up in another order.
    @triton.jit(do_not_specialize=["M"])
    def linear(x, w, scale, grid, bias, y, M, N, K, leaf, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
        """One leaf of one tile of y. The weight is the left operand, where wgmma wants 64 rows: it serves every M."""
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(tl.program_id(2) * leaf, (tl.program_id(2) + 1) * leaf, BLOCK_K):
            a = tl.load(x + m * K + start + tl.arange(0, BLOCK_K)[:, None], mask=m < M, other=0)
            if grid is None:
                b = tl.load(w + n * K + start + tl.arange(0, BLOCK_K)[None, :], mask=n < N, other=0)
            else:  # 4 bits, of one group or several
                GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
                b = tl.load(w + (n * K + start) // 2 + tl.arange(0, BLOCK_K // 2)[None, :], mask=n < N, other=0)
                at = n * (K // GROUP) + start // GROUP + tl.arange(0, GROUPS)[None, :]
                pair = tl.load(grid + at, mask=n < N, other=0)[:, :, None]
                zeros = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                b = tl.interleave(b & 15, b >> 4).to(tl.float32).reshape(BLOCK_N, GROUPS, BLOCK_K // GROUPS)
                b = ((b - zeros) * (pair << 16).to(tl.float32, bitcast=True)).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(b.to(a.dtype), a, acc, input_precision="ieee")
        acc *= 1 if scale is None else tl.load(scale + n, mask=n < N, other=0).to(tl.float32)
        acc += 0 if bias is None else tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
        y += (m * tl.num_programs(2) + tl.program_id(2)) * N + n
        tl.store(y, acc.to(y.dtype.element_ty), mask=(m < M) & (n < N))

    @triton.jit(do_not_specialize=["T", "L", "window"])
    def attention(q, k_cache, v_cache, pos, parts, y, T, L, window, scale, G: tl.constexpr, GROUP: tl.constexpr,
                  D: tl.constexpr, SPLIT: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """A block of rows, the queries of one KV head, over their splits in ascending order. Of each split, and of all
        until now, it has the highest score, the sum of the weights relative to that, and the weighted sum of the
        values. Without `y` a program leaves its one split in `parts`, without keys it finds them all there."""
        b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
        r, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, D_PAD)[None, :]
        t, row = r // GROUP, (b * T + r // GROUP) * (G * GROUP) + g * GROUP + r % GROUP
        p = tl.load(pos + b * T + tl.minimum(t, T - 1)).to(tl.int32)
        first, last = tl.maximum(tl.min(p, 0) - window + 1, 0), tl.max(p, 0)  # keys that a row of the block may see
        real = (t < T)[:, None] & (d < D)
        queries = tl.load(q + row[:, None] * D + d, mask=real, other=0)
        none, zero = tl.zeros((TILE,), tl.float32), tl.zeros((TILE, D_PAD), tl.float32)
        top, total, acc = none - 3e38, none, zero
        for split in range(tl.program_id(2), last // SPLIT + 1, tl.num_programs(2)):
            if k_cache is None:
                part = parts + (row * tl.cdiv(L, SPLIT) + split) * (D + 2)
                top_s, total_s = tl.load(part, mask=t < T, other=0), tl.load(part + 1, mask=t < T, other=1)
                acc_s = tl.load(part[:, None] + 2 + d, mask=real, other=0)
            else:
                top_s, total_s, acc_s = none - 3e38, none, zero
                start = tl.maximum(split * SPLIT, first // TILE * TILE)
                for key in range(start, tl.minimum(split * SPLIT + SPLIT, last + 1), TILE):
                    j = key + tl.arange(0, TILE)
                    at, there = ((b * G + g) * L + j[:, None]) * D + d, (j <= last)[:, None] & (d < D)
                    keys = tl.load(k_cache + at, mask=there, other=0)
                    values = tl.load(v_cache + at, mask=there, other=0)
                    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
                    back = p[:, None] - j[None, :]
                    scores = tl.where((back >= 0) & (back < window), scores, float("-inf"))
                    both = tl.maximum(top_s, tl.max(scores, 1))
                    weights, old = tl.exp2(scores - both[:, None]), tl.exp2(top_s - both)
                    top_s, total_s = both, total_s * old + tl.sum(weights, 1)
                    acc_s = tl.dot(weights.to(values.dtype), values, acc_s * old[:, None], input_precision="ieee")
            both = tl.maximum(top, top_s)  # a split that a row sees nothing of changes no bits of it
            old, new = tl.exp2(top - both), tl.exp2(top_s - both)
            top, total, acc = both, total * old + total_s * new, acc * old[:, None] + acc_s * new[:, None]
        if y is None:
            part = parts + (row * tl.cdiv(L, SPLIT) + tl.program_id(2)) * (D + 2)
            tl.store(part, top, mask=t < T)
            tl.store(part + 1, total, mask=t < T)
            tl.store(part[:, None] + 2 + d, acc, mask=real)
        else:
            tl.store(y + row[:, None] * D + d, (acc / total[:, None]).to(y.dtype.element_ty), mask=real)

    return SimpleNamespace(**locals())


class TritonPacked(Packed):
    """A weight on a GPU, as it is or quantized: int8 [N, K], or uint8 [N, K / 2] of two numbers, the low nibble at
    the even k. Such a weight is (q - zero) * scale, with scale and zero [N, K / group], where None is zero."""

    parts_dtype = property(lambda self: torch.float32 if self.parts > 1 or self.partial else None)
    LAUNCHES = {  # by the most rows M; only what changes no bits. Shared memory fits 99 KB, which is sm_89
        16: {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        math.inf: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    }

    def pack(self, weight, leaves, scale=None, zero=None):
        self.weight, self.parts, self.scale, self.grid = weight.contiguous(), max(leaves, 1), scale, None
        if zero is not None:  # with the scale as one number, since a kernel loads no smaller ones ahead
            pairs = torch.stack((scale.bfloat16().view(torch.int16), zero.half().view(torch.int16)), dim=-1)
            self.scale, self.grid = None, pairs.view(torch.int32).squeeze(-1)

    def products(self, x):
        N, K, M, leaves = self.out_features, x.shape[-1], x.shape[:-1].numel(), self.parts
        launch = next(launch for most, launch in self.LAUNCHES.items() if M <= most)
        # No block straddles a leaf.
        block = math.gcd(min(128 // self.weight.itemsize, launch["BLOCK_K"] * 2 // x.itemsize), K // leaves)
        programs = -(-N // launch["BLOCK_N"]), -(-M // launch["BLOCK_M"]), leaves
        y = x.new_empty(*x.shape[:-1], *(leaves, N)[leaves == 1 :], dtype=self.parts_dtype)
        args = x.contiguous(), self.weight, self.scale, self.grid, self.bias if leaves == 1 else None, y
        sizes = M, N, K, K // leaves, 1 if self.grid is None else K // self.grid.shape[1]
        options = launch | {"BLOCK_K": block, "enable_fp_fusion": False}
        triton_kernels().linear[programs](*args, *sizes, **options)
        return y


def window_mask(mask_mod: Callable, pos_BT: Tensor, span: int, heads_GR: Tensor, dtype: torch.dtype):
    """On a GPU, where the kernel computes the mask, the window; on a CPU a dense mask."""
    if pos_BT.is_cuda and not hasattr(mask_mod, "window"):
        raise ValueError(f"on a GPU, deterministic attention is causal or a sliding_window, not {mask_mod}")
    return mask_mod.window if pos_BT.is_cuda else dense_mask(mask_mod, pos_BT, span, heads_GR, dtype)


@opaque("triton_attention" + ATTENTION.format("int window, float scale"), like_attention)
def triton_attention(q, k, v, k_cache, v_cache, pos, window, scale):
    write_cache(k, v, k_cache, v_cache, pos)
    (B, T, H, D), (_, G, L, _), q, pos = q.shape, k_cache.shape, q.contiguous(), pos.contiguous()
    tile = 64 if D * q.itemsize <= 256 else 32  # shared memory and registers hold no more
    blocks, splits, y, parts = -(-T * H // G // tile), -(-L // SPLIT), q.new_empty(B, T, H * D), None
    launches = [(k_cache, y, 1)]
    if blocks == 1 < splits:  # a program would be alone with them all: one for each, and one that adds them up
        parts = q.new_empty(B * T * H, splits, D + 2, dtype=torch.float32)
        launches = [(k_cache, None, splits), (None, y, 1)]
    sizes = T, L, window, scale * math.log2(math.e), G, H // G, D, SPLIT, max(16, 1 << (D - 1).bit_length()), tile
    options = {"num_warps": 4, "num_stages": 2 if q.itemsize == 2 else 1, "enable_fp_fusion": False}
    for keys, out, programs in launches:
        triton_kernels().attention[blocks, B * G, programs](q, keys, v_cache, pos, parts, out, *sizes, **options)
    return y


@opaque("gpu_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, *others: x.new_empty(x.shape))
def gpu_rms_norm(x, weight, eps):
    """In fp32, where PyTorch's own kernel is called, which gives each row a block of threads to itself."""
    return F.rms_norm(x.float().contiguous(), weight.shape, weight.float(), eps).to(x.dtype)


BATCH_INVARIANT = Ops(
    pack=lambda weight, *args: (TritonPacked if weight.is_cuda else LeafPacked)(weight, *args),
    linear=FAST.linear,
    rms_norm=lambda x, w, eps: (gpu_rms_norm if x.is_cuda else rms_norm)(x, w, eps),
    silu_mul=silu_mul,
    mask=window_mask,
    attention=lambda q, *args: triton_attention(q, *args) if q.is_cuda else attention(q, *args, True),
    # On a GPU, a block of threads adds up a row by the alignment of its first number.
    log_softmax=lambda x: FAST.log_softmax(F.pad(x, (0, -x.shape[-1] % 4), value=-math.inf))[..., : x.shape[-1]],
    compile_options={"emulate_precision_casts": True, "pattern_matcher": False},
    exact=True,
)
