"""The op tables, through which the reductions of a model go: `Fast`, what PyTorch does best, and
`BatchInvariant`, with which the logits of a token have the same bits whatever is computed beside
it. A fork writes a third. Letters in names are dimensions: B rows of a batch, T new tokens, H query
heads, G KV heads, R = H / G, D head_dim, L cached positions, N x K a weight, M rows of x."""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InputError(ValueError):
    """The user gave something that cannot work; the message is the line that they read."""


class SlidingWindow(NamedTuple):
    """A mask_mod, as FlexAttention has it: causal, and only the last `window` keys, the query's own
    among them. A GPU's kernel compiles this source: a mask is a function of absolute positions, or
    a NamedTuple of its numbers with such a call. It never looks at keys before its `first`."""

    window: int

    def __call__(self, b, h, q_idx, kv_idx):
        back = q_idx - kv_idx
        return (back >= 0) & (back < self.window)

    def first(self, q_idx):
        return q_idx - self.window + 1


causal = SlidingWindow(1 << 30)
masks = {}  # those that a GPU has met, each with its type, and their numbers
library = torch.library.Library("gpt_exact", "DEF")


def opaque(schema: str, fake: Callable) -> Callable:
    """Register a function as an op that torch.compile calls and never looks into. Eager code calls
    it itself. `fake` returns an empty tensor of its shape and dtype, and contiguous as it is."""

    def register(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, lambda *args: function(*args).contiguous(), "CompositeExplicitAutograd")
        torch.library.register_fake(f"gpt_exact::{name}", fake, lib=library)
        op = getattr(torch.ops.gpt_exact, name).default

        def call(*args):
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return register


def blocked(weight_NK: Tensor) -> Tensor:
    """In oneDNN's blocks, at one row twice as fast as F.linear; as it is where there are none."""
    if weight_NK.device.type == "cpu":
        with contextlib.suppress(RuntimeError):
            return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), 1)
    return weight_NK.contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, of a weight that `blocked` returned."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def add_leaves(leaves: list[Tensor], bias: Tensor | None = None) -> Tensor:
    """The fp32 sum of leaves [..., N], an even number as a tree, else in turn; then the bias."""
    while len(leaves) % 2 == 0:
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        leaves = [a.float() + b for a, b in pairs]
    more = leaves[1:] if bias is None else [*leaves[1:], bias]
    return functools.reduce(torch.add, more, leaves[0].float())


def leaf_count(n_kv_heads: int, in_features: int, multiple: int = 32) -> int:
    """Into how many leaves K is cut where ranks may share it: the largest power of two up to 8 that
    divides the KV heads, else their smallest odd prime up to 7; each a multiple of `multiple`."""
    candidates = (math.gcd(n_kv_heads, 8), 3, 5, 7)
    count = next((n for n in candidates if n > 1 and n_kv_heads % n == 0), 1)
    while count > 1 and in_features % (count * multiple):
        count = count // 2 if count % 2 == 0 else 1
    return count


class Packed(nn.Module):
    """A weight [N, K] in its kernel's layout. As Inductor cannot trace through it, a compiled graph
    is given a tensor with the weight's number, its handle. Where a sum over K is `partial`, other
    ranks have more of its leaves. A subclass has another `pack` and `products`."""

    table = weakref.WeakValueDictionary()  # handle -> Packed, until its layer dies
    handles = itertools.count()  # alike in every run, so that a cache of compiled graphs serves
    opaque = True
    sum_dtype = None  # of what `products` returns; None: as the input

    def __init__(self, weight: Tensor, bias: Tensor | None = None, leaves=1, partial=False, **grid):
        super().__init__()
        self.leaves, self.partial = leaves, partial
        self.shape = (len(weight),) if leaves == 1 else (leaves, len(weight))  # of a row's products
        self.handle = torch.tensor(next(self.handles))
        self.table[self.handle.item()] = self
        self.register_buffer("bias", bias)
        given = (weight, bias, *grid.values())
        self.nbytes = sum(x.nbytes for x in given if isinstance(x, Tensor))
        self.pack(weight, **grid)

    def pack(self, weight: Tensor) -> None:
        self.register_buffer("weight", blocked(weight))
        self.opaque = self.weight.is_mkldnn
        self.operands = (self.weight, self.bias)  # a module takes its time to look up a buffer

    def products(self, x: Tensor) -> Tensor:
        """x W^T + b [..., N], or of several leaves, without the bias, [..., leaves, N]."""
        return product(x, *self.operands)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, in the dtype of x; in fp32 where it is a sum of leaves."""
        if torch.compiler.is_compiling() and self.opaque:
            y = opaque_linear(x, self.handle, self.shape, self.sum_dtype)
        else:
            y = self.products(x)
        return y if self.leaves == 1 else add_leaves(y.unbind(-2), self.bias)


@opaque(
    "linear(Tensor x, Tensor handle, int[] shape, ScalarType? dtype) -> Tensor",
    lambda x, handle, shape, dtype: x.new_empty(*x.shape[:-1], *shape, dtype=dtype),
)
def opaque_linear(x: Tensor, handle: Tensor, shape, dtype) -> Tensor:
    return Packed.table[handle.item()].products(x)


class LeafPacked(Packed):
    """A weight on a CPU whose products round each leaf once, at every number of rows alike."""

    def pack(self, weight: Tensor) -> None:
        self.leaf_weights = [blocked(leaf) for leaf in weight.chunk(self.leaves, dim=1)]
        for i, leaf in enumerate(self.leaf_weights):  # where tools look for them
            self.register_buffer(f"leaf_{i}", leaf)
        self.operands = (self.leaf_weights[0], self.bias)

    def products(self, x: Tensor) -> Tensor:
        if self.leaves == 1:
            return exact_product(x, *self.operands)
        x_GK = x.unflatten(-1, (self.leaves, -1))
        parts = x_GK.movedim(-2, 0).contiguous()
        leaves = list(map(exact_product, parts, self.leaf_weights))
        return torch.stack(leaves, dim=-2)


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tiles = exact_tiles(*weight.shape, x.dtype, torch.get_num_threads())
    if x.shape[:-1].numel() in tiles:
        return product(x, weight, bias)
    with contextlib.nullcontext() if tiles else one_thread():
        return product_in_tiles(x, weight, bias, tiles or [16])


def fill_up(x: Tensor, *more: int, value: float = 0) -> Tensor:
    """F.pad, which would copy what needs none."""
    return F.pad(x, more, value=value) if any(more) else x


def product_in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: list[int]) -> Tensor:
    """A product of as many rows at a time as ascending `tiles` say; zeros fill up the last one."""
    parts = []
    for tile in x.flatten(0, -2).split(tiles[-1]):
        more = next(n for n in tiles if n >= len(tile)) - len(tile)
        whole = fill_up(tile, 0, 0, 0, more)
        parts.append(product(whole, weight, bias)[: len(tile)])
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cancelling(a_shape: tuple, b_shape: tuple, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random [*a_shape, K] and [*b_shape, K]: the bits of their sums, about 0, tell the order."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*a_shape, K // 2, generator=generator)
    b = torch.randn(*b_shape, K // 2, generator=generator)
    order = torch.randperm(K // 2 * 2, generator=generator)
    a = torch.cat((a, a), dim=-1)[..., order]
    b = torch.cat((b, -b), dim=-1)[..., order]
    odd = (0, K % 2)
    a, b = F.pad(a, odd), F.pad(b, odd)
    return a.to(dtype), b.to(dtype)


@functools.cache
def exact_tiles(N: int, K: int, dtype: torch.dtype, threads: int) -> list[int]:
    """The numbers of rows, up to 512, with the bits of one thread and 16 rows at a time."""
    outputs = min(N, 1 << 14)  # more of them would show nothing new
    x, weight = cancelling((512,), (outputs,), K, dtype)
    weight = blocked(weight)
    with one_thread():
        want = product_in_tiles(x, weight, None, [16])
    counts = [*range(1, 17), 24, 32, 48]
    counts += [64, 96, 128, 192, 256, 384, 512]
    return [n for n in counts if torch.equal(product(x[:n], weight), want[:n])]


def write_cache(k_BTGD, v_BTGD, k_cache, v_cache, pos_BT: Tensor) -> None:
    """Put new keys and values into [B, G, L, D] at their positions, before anyone attends."""
    if len(pos_BT) == 1 and not k_cache.is_cuda:  # for which a compiler writes both at once
        index = pos_BT[0]
        k_cache.index_copy_(2, index, k_BTGD.transpose(1, 2))
        v_cache.index_copy_(2, index, v_BTGD.transpose(1, 2))
    else:
        rows = torch.arange(len(pos_BT), device=pos_BT.device)[:, None]
        k_cache[rows, :, pos_BT] = k_BTGD
        v_cache[rows, :, pos_BT] = v_BTGD


def dense_mask(mask_mod: Callable, pos_BT: Tensor, span: int, heads_GR: Tensor, k_cache) -> list:
    """A mask_mod over `span` keys, once for all layers: 0 where a query may look, else -inf,
    [B, G, T, R, span] with 1 for what it does not depend on; and one past the last key seen [T]."""
    b = torch.arange(len(pos_BT), device=pos_BT.device)
    h, q_idx = heads_GR[:, None, :, None], pos_BT[:, None, :, None, None]
    kv_idx = torch.arange(span, device=pos_BT.device)
    keep = mask_mod(b.view(-1, 1, 1, 1, 1), h, q_idx, kv_idx)
    bias = k_cache.new_zeros(keep.shape).masked_fill_(~keep, float("-inf"))
    seen_T = keep.any(3).flatten(0, 1).any(0)
    return [bias, span - seen_T.flip(-1).byte().argmax(-1)]


def attend(q_BTHD, k_BGLD, v_BGLD, bias, limit_T, spans, rows, scale):
    """Attention [B, T, H * D] in blocks of 128 tokens, which skip keys behind the last one they may
    see. Keys are filled up, by others of the cache, to one of `spans` beyond whole blocks of 512,
    as those of the mask are, and the rows of a block to a multiple of `rows`."""
    B, T, H, D = q_BTHD.shape
    G = k_BGLD.shape[1]
    if T == 1:  # in few calls, each of which takes its time
        q = q_BTHD.reshape(B, G, H // G, D)
        y = attend_rows(q, k_BGLD, v_BGLD, bias[:, :, 0], rows, scale)
        return y.reshape(B, 1, H * D)
    q_BGTRD = q_BTHD.unflatten(2, (G, -1)).transpose(1, 2)
    blocks = []
    parts = zip(q_BGTRD.split(128, 2), bias.split(128, 2), limit_T.split(128), strict=True)
    for q, mask, limits in parts:
        span = filled(int(limits.max()), spans)
        mask = mask[..., :span].expand(-1, -1, -1, H // G, -1).flatten(2, 3)
        y = attend_rows(q.flatten(2, 3), k_BGLD, v_BGLD, mask, rows, scale)
        blocks.append(y.unflatten(2, (-1, H // G)))
    return torch.cat(blocks, dim=2).transpose(1, 2).flatten(2)


def attend_rows(q_BGMD, k_BGLD, v_BGLD, mask, rows: int, scale: float) -> Tensor:
    """The queries of a KV head and of all tokens are its rows: five times as fast as enable_gqa."""
    M = q_BGMD.shape[2]
    more = -M % rows
    q = fill_up(q_BGMD, 0, 0, 0, more)
    if mask.shape[2] > 1:  # else all rows see the same
        mask = fill_up(mask, 0, 0, 0, more)
    keys, values = (x[:, :, : mask.shape[-1]] for x in (k_BGLD, v_BGLD))
    y = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale)
    return y[:, :, :M]


def filled(keys: int, spans) -> int:
    return keys // 512 * 512 + next(span for span in (0, *spans) if span >= keys % 512)


@functools.cache
def exact_spans(B: int, G: int, D: int, R: int, dtype, threads: int) -> tuple:
    """The spans, if any, with which multiples of 4 rows, or else of 16, have the bits of the
    reference (a thread, a row of the batch, 16 rows, 512 keys), few and many; and that 4 or 16."""
    T, L = 128, 1024
    q, k = cancelling((1, T, G * R), (1, G, L), D, dtype)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    v[:, :, ::4] *= 1 << 12  # with equal weights these cancel,
    v[:, :, 2::4] = -v[:, :, ::4]  # and leave what they have made of the sums between them
    trials = []  # keys, a mask, arguments of `attend`, and what it should return
    q_B, k_B, v_B = (x.repeat(B, 1, 1, 1) for x in (q, k, v))
    for scale, start in itertools.product((2.0**21, 0.0), range(0, 512, 118)):
        pos_BT = torch.arange(start, start + T)[None]
        bias, limit_T = dense_mask(causal, pos_BT, L, torch.zeros(G, R), k)
        with one_thread():
            want = attend(q, k, v, bias, limit_T, [512], 16, scale)
            want = want.repeat(B, 1, 1)
        for count, end in itertools.product((1, 2, 6, 11, 40, T), (32, T)):
            now = slice(max(end - count, 0), end)
            keys = -(-(start + end) // 64) * 64
            mask, limits = bias[:, :, now], limit_T[now]
            trials.append((keys, q_B[:, now], mask, limits, scale, want[:, now]))

    def agrees(span: int, rows: int) -> bool:
        for keys, q, bias, limit_T, scale, want in trials:
            if keys % 512 <= span:
                mask = bias[..., : filled(keys, [span, 512])]
                y = attend(q, k_B, v_B, mask, limit_T, [span, 512], rows, scale)
                if not torch.equal(y, want):
                    return False
        return True

    for rows in (4, 16):
        if agrees(512, rows):
            return [span for span in range(64, 513, 64) if agrees(span, rows)], rows
    return [], 16


def attend_in_loops(q_BTHD, k_BGLD, v_BGLD, bias, scale: float) -> Tensor:
    """Attention of one token a row, in loops for a compiler: half the time of calling an op."""
    G, span = k_BGLD.shape[1], bias.shape[-1]
    keys = k_BGLD[:, :, None, :span].float()
    values = v_BGLD[:, :, None, :span].float()
    q_BGRD = q_BTHD[:, 0].unflatten(1, (G, -1)).float()
    scores = (q_BGRD.unsqueeze(3) * keys).sum(-1) * scale
    weights = (scores + bias[:, :, 0]).softmax(-1)
    y_BGRD = (weights.unsqueeze(4) * values).sum(3)
    return y_BGRD.to(q_BTHD.dtype).flatten(1).unsqueeze(1)


ATTENTION = "Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pos"
ATTENTION += ", Tensor bias, Tensor limit, int[] spans, int rows, float scale"
GPU_ATTENTION = "Tensor q, Tensor k, Tensor v, Tensor pos, int mask, Tensor heads, float scale"


def like_attention(q, *others):
    return q.new_empty(*q.shape[:2], q[0, 0].numel())


@opaque(f"attend({ATTENTION}) -> Tensor", like_attention)
def cpu_attention(q, k, v, k_cache, v_cache, pos, bias, limit, spans, rows, scale):
    """One recipe for prefill, decode and verify."""
    write_cache(k, v, k_cache, v_cache, pos)
    if spans:
        return attend(q, k_cache, v_cache, bias, limit, spans, rows, scale)
    bias = bias.expand(len(q), -1, -1, -1, -1)
    batches = (x.split(1) for x in (q, k_cache, v_cache, bias))
    alone = zip(*batches, strict=True)
    with one_thread():  # the reference, each row of the batch alone
        return torch.cat([attend(*row, limit, [512], rows, scale) for row in alone])


@opaque("sigmoid(Tensor x) -> Tensor", torch.empty_like)
def sigmoid(x: Tensor) -> Tensor:
    """At the end of a thread's part, numbers that fill no vector would have a formula of their own:
    parts are whole vectors, and too few for a second thread."""
    whole = fill_up(x, 0, -x.shape[-1] % 32).contiguous()
    if x.is_cuda or whole.numel() <= 1 << 14:
        y = whole.sigmoid()
    else:
        parts = [part.sigmoid() for part in whole.view(-1).split(1 << 14)]
        y = torch.cat(parts).view_as(whole)
    return y[..., : x.shape[-1]]


@opaque("row_sum(Tensor x) -> Tensor", lambda x: torch.empty_like(x[..., :1]))
def row_sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


@opaque("norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, *_: x.new_empty(x.shape))
def gpu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own kernel for fp32, which gives each row a block of threads to itself."""
    return F.rms_norm(x.contiguous(), weight.shape, weight, eps)


SPLIT = 512  # keys that one program attends to before their sum joins that of others


@functools.cache
def triton_kernels() -> SimpleNamespace:
    """Triton, imported when a GPU asks. What a kernel calls is global, for its interpreter."""
    global tl, floats
    import triton
    import triton.language as tl

    @triton.jit
    def floats(words, dtype: tl.constexpr):
        """[..., 2] of words: their high and their low half. In this order nothing is moved."""
        low = words.to(tl.int16).to(dtype, bitcast=True)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.join(high, low)

    # A dot adds to one fp32 accumulator in ascending k, whatever the shape of a tile and its warps.
    # No product is fused with a sum, nor a number compiled in that varies from call to call.
    @triton.jit(do_not_specialize=["M"])
    def linear(
        x, w, scale, grid, bias, y, M, N, K, leaf,
        GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """One leaf of a tile of y [M, leaves, N]. On the left wgmma wants 64 rows: the weight's."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # first, so that all share a weight
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = m.to(tl.int64)
        n = n.to(tl.int64)[:, None]
        there = (m < M) & (n < N)
        y += (m * tl.num_programs(2) + tl.program_id(2)) * N + n
        n = tl.minimum(n, N - 1)
        begin = tl.program_id(2) * leaf
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(begin, begin + leaf, BLOCK_K):
            here = k + tl.arange(0, BLOCK_K)
            a = tl.load(x + m * K + here[:, None], mask=m < M, other=0)
            if w.dtype.element_ty != tl.int32:
                b = tl.load(w + n * K + here)
            else:
                # A code in the last bits of 128 in bfloat16 or 1024 in float16 adds itself to it.
                HALF: tl.constexpr = tl.float16 if a.dtype == tl.float32 else a.dtype
                BASE: tl.constexpr = 0x43004300 if HALF == tl.bfloat16 else 0x64006400
                BITS: tl.constexpr = 8 if grid is None else 4
                FOUR: tl.constexpr = 128 // BITS  # codes of as many words
                here = k // FOUR * 4 + tl.arange(0, BLOCK_K // FOUR * 4)
                words = tl.load(w + n * (K // FOUR * 4) + here)[:, :, None]
                pairs = words >> tl.arange(0, 16 // BITS) * BITS
                pairs = pairs.reshape(BLOCK_N, BLOCK_K // FOUR, 4, 2, 8 // BITS)
                pairs = pairs.permute(0, 1, 4, 3, 2).reshape(BLOCK_N, BLOCK_K // 2)
                if grid is None:  # a sign bit is -128
                    signs = floats(pairs & 0x00800080 | BASE, HALF)
                    b = floats(pairs & 0x007F007F | BASE, HALF) - signs
                else:  # of one group or several
                    GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
                    b = floats(pairs & 0x000F000F | BASE, HALF)
                    b -= floats(pairs & 0 | BASE | 0x00080008, HALF)
                    pair = k // GROUP + tl.arange(0, GROUPS)
                    pair = tl.load(grid + n * (K // GROUP) + pair)[:, :, None]
                    middle, step = tl.split(floats(pair, tl.bfloat16).to(a.dtype))
                    b = b.to(a.dtype).reshape(BLOCK_N, GROUPS, BLOCK_K // GROUPS)
                    b = tl.fma(b, step, middle).reshape(BLOCK_N, BLOCK_K // 2, 2)
                high, low = tl.split(b)
                b = tl.interleave(low, high)
            acc = tl.dot(b.to(a.dtype), a, acc, input_precision="ieee")
        if scale is not None:
            acc *= tl.load(scale + n)
        if bias is not None:
            acc += tl.load(bias + n)
        tl.store(y, acc, mask=there)

    @triton.jit(do_not_specialize=["T", "L"])
    def attention(
        q, k_cache, v_cache, pos, heads, parts, y, mask, T, L, q_token, q_head, scale,
        SEES: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
        SPLIT: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """A block of rows, the queries of one KV head, over splits in ascending order. Of a split,
        and of all until now, it has the highest score, the sum of the weights relative to that, and
        that of weighted values. Without `y` it leaves one in `parts`, without keys it finds all."""
        b = (tl.program_id(1) // G).to(tl.int64)
        g = tl.program_id(1) % G
        r = tl.program_id(0) * TILE + tl.arange(0, TILE)
        d = tl.arange(0, D_PAD)
        token = b * T + tl.minimum(r // R, T - 1)
        head = g * R + r % R
        row = token * (G * R) + head
        p = tl.load(pos + token).to(tl.int32)
        h = tl.load(heads + head)[:, None]
        first = 0 if FIRST is None else tl.maximum(FIRST(*mask, tl.min(p)), 0)
        last = tl.max(p)
        q += token * q_token + head * q_head
        queries = tl.load(q[:, None] + d, mask=d < D, other=0)
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros((TILE, D_PAD), tl.float32)
        top = total - 3e38
        for split in range(tl.program_id(2), last // SPLIT + 1, tl.num_programs(2)):
            if k_cache is None:
                part = parts + (row * tl.cdiv(L, SPLIT) + split) * (D + 2)
                top_s = tl.load(part)
                total_s = tl.load(part + 1)
                acc_s = tl.load(part[:, None] + 2 + d, mask=d < D, other=0)
            else:
                total_s = tl.zeros([TILE], tl.float32)
                acc_s = tl.zeros((TILE, D_PAD), tl.float32)
                top_s = total_s - 3e38
                start = tl.maximum(split * SPLIT, first // TILE * TILE)
                for key in range(start, tl.minimum(split * SPLIT + SPLIT, last + 1), TILE):
                    j = key + tl.arange(0, TILE)
                    at = ((b * G + g) * L + tl.minimum(j, last)[:, None]) * D + d
                    keys = tl.load(k_cache + at, mask=d < D, other=0)
                    values = tl.load(v_cache + at, mask=d < D, other=0)
                    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
                    seen = SEES(*mask, b, h, p[:, None], j)
                    scores = tl.where(seen, scores, float("-inf"))
                    both = tl.maximum(top_s, tl.max(scores, 1))
                    weights = tl.exp2(scores - both[:, None])
                    old = tl.exp2(top_s - both)
                    top_s = both
                    total_s = total_s * old + tl.sum(weights, 1)
                    acc_s *= old[:, None]
                    acc_s = tl.dot(weights.to(values.dtype), values, acc_s, input_precision="ieee")
            both = tl.maximum(top, top_s)  # a split that a row sees nothing of changes no bits
            old = tl.exp2(top - both)
            new = tl.exp2(top_s - both)
            top = both
            total = total * old + total_s * new
            acc *= old[:, None]
            acc += acc_s * new[:, None]
        real = r < T * R
        if y is None:
            part = parts + (row * tl.cdiv(L, SPLIT) + tl.program_id(2)) * (D + 2)
            tl.store(part, top, mask=real)
            tl.store(part + 1, total, mask=real)
            tl.store(part[:, None] + 2 + d, acc, mask=real[:, None] & (d < D))
        else:
            y += row[:, None] * D + d
            tl.store(y, acc / total[:, None], mask=real[:, None] & (d < D))

    return SimpleNamespace(linear=linear, attention=attention, jit=functools.cache(triton.jit))


class TritonPacked(Packed):
    """A weight on a GPU, as it is or quantized as quantize.py says."""

    LAUNCHES = {  # by the most rows M: what changes no bits, in the 99 KB of shared memory of sm_89
        16: {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        math.inf: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    }

    def pack(self, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> None:
        self.sum_dtype = torch.float32 if self.leaves > 1 or self.partial else None
        self.bits, grid = 8 * weight.itemsize, None
        if zero is not None:  # the value of code 8, as one number with the scale
            self.bits, middle = 4, scale * (8 - zero.float())
            pairs = torch.stack((scale, middle), dim=-1).bfloat16()
            grid, scale = pairs.view(torch.int32).squeeze(-1), None
            codes = torch.stack((weight & 15, weight >> 4), dim=-1)
            low, high = codes.view(len(weight), -1, 2, 16).unbind(2)
            weight = low | high << 4
        if self.bits < 16:  # k and k + 1 stand 16 bits apart, where shifts make two floats of them
            weight = weight.view(len(weight), -1, 2, 4, 2)
            weight = weight.permute(0, 1, 3, 4, 2).flatten(1)
            weight = weight.view(torch.int32)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("grid", grid)

    def products(self, x: Tensor) -> Tensor:
        N, leaves = self.shape[-1], self.leaves
        M, K = x.shape[:-1].numel(), x.shape[-1]
        launch = next(launch for most, launch in self.LAUNCHES.items() if M <= most)
        most_k = min(1024 // self.bits, launch["BLOCK_K"] * 2 // x.itemsize)
        block_k = math.gcd(most_k, K // leaves)  # no block straddles a leaf
        blocks = -(-N // launch["BLOCK_N"])
        programs = (-(-M // launch["BLOCK_M"]), blocks, leaves)
        y = x.new_empty(*x.shape[:-1], *self.shape, dtype=self.sum_dtype)
        bias = self.bias if leaves == 1 else None
        group = 1 if self.grid is None else K // self.grid.shape[1]
        tensors = (x.contiguous(), self.weight, self.scale, self.grid, bias, y)
        options = launch | {"BLOCK_K": block_k, "enable_fp_fusion": False}
        if launch["BLOCK_M"] == 16 and blocks * leaves <= 132:  # alone on a unit, one reads ahead
            options["num_stages"] = 7
        triton_kernels().linear[programs](*tensors, M, N, K, K // leaves, group, **options)
        return y


@opaque(f"triton_attention({GPU_ATTENTION}) -> Tensor", like_attention)
def triton_attention(q, k_cache, v_cache, pos, mask, heads, scale):
    """Over caches that have the new keys and values."""
    kernels = triton_kernels()
    kind, mask_mod = list(masks)[mask]
    mask = (mask_mod,) if isinstance(mask_mod, tuple) else ()
    sees = kernels.jit(kind.__call__ if mask else mask_mod)
    first = kernels.jit(kind.first) if hasattr(kind, "first") else None
    B, T, H, D = q.shape
    G, L = k_cache.shape[1:3]
    q = q.flatten(0, 1)  # no copy of a part of other heads
    tile = 64 if D * q.itemsize <= 256 else 32  # shared memory and registers hold no more
    blocks, splits = -(-T * H // G // tile), -(-L // SPLIT)
    y, parts = q.new_empty(B, T, H * D), None
    launches = [(k_cache, y, 1)]
    if blocks == 1 < splits:  # no program is alone with all splits: each has one, another adds up
        parts = q.new_empty(B * T * H, splits, D + 2, dtype=torch.float32)
        launches = [(k_cache, None, splits), (None, y, 1)]
    d_pad = max(16, 1 << (D - 1).bit_length())
    scale *= math.log2(math.e)
    fixed = (sees, first, G, H // G, D, SPLIT, d_pad, tile)
    sizes = (T, L, *q.stride()[:2], scale, *fixed)
    is_hopper = q.is_cuda and torch.cuda.get_device_capability() == (9, 0)
    stages = 3 if is_hopper and q.itemsize == 2 else 4 // q.itemsize
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": False}
    for keys, out, programs in launches:
        tensors = (q, keys, v_cache, pos.contiguous(), heads, parts, out, mask)
        kernels.attention[blocks, B * G, programs](*tensors, *sizes, **options)
    return y


class Fast:
    """What PyTorch does best. `pack` and `mask` make what `linear` and `attention` are given."""

    exact = False  # whether bits depend on nothing but a token's own prefix
    compile_options = {}  # of Inductor

    def pack(self, weight: Tensor, bias: Tensor | None, leaves: int, partial: bool) -> Packed:
        """A float weight [N, K], and the leaves that `BatchInvariant` cuts K into."""
        return Packed(weight, bias)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """x W^T + b."""
        return packed.forward(x)  # a module's own call takes longer

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Over the last dimension."""
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, weight.shape, weight, eps)
        squares = x * x  # in fewer calls, and in place, which is quicker
        mean = squares.sum(-1, keepdim=True).mul_(1 / x.shape[-1])
        return (x * mean.add_(eps).rsqrt_()).mul_(weight)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, of the two halves."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def mask(self, mask_mod: Callable, pos_BT: Tensor, span: int, heads_GR: Tensor, k_cache):
        """Over `span` keys at least. On a GPU, whose kernel computes it, its number."""
        if pos_BT.is_cuda:
            return masks.setdefault((type(mask_mod), mask_mod), len(masks)), heads_GR
        spans, rows = list(range(64, 513, 64)), 4
        if self.exact:
            G, R = heads_GR.shape
            B, G = min(len(pos_BT), 2), min(G, 3)  # more of them would show nothing new
            D, threads = k_cache.shape[3], torch.get_num_threads()
            spans, rows = exact_spans(B, G, D, R, k_cache.dtype, threads)
        span = filled(span, spans or [512])
        return *dense_mask(mask_mod, pos_BT, span, heads_GR, k_cache), spans, rows

    def attention(self, q_BTHD, k_BTGD, v_BTGD, k_cache, v_cache, pos_BT, mask, scale) -> Tensor:
        """[B, T, H * D]. New keys and values are first written to the caches [B, G, L, D]."""
        tensors = (k_BTGD, v_BTGD, k_cache, v_cache, pos_BT)
        if k_cache.is_cuda:
            write_cache(*tensors)
            return triton_attention(q_BTHD, *tensors[2:], *mask, scale)
        bias, _, spans, _ = mask
        if not torch.compiler.is_compiling() or q_BTHD.shape[1] > 1 or not spans:
            return cpu_attention(q_BTHD, *tensors, *mask, scale)
        write_cache(*tensors)
        if self.exact:
            return attend(q_BTHD, k_cache, v_cache, *mask, scale)
        return attend_in_loops(q_BTHD, k_cache, v_cache, bias, scale)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """fp32, over the last dimension."""
        return F.log_softmax(logits, dim=-1, dtype=torch.float32)


class BatchInvariant(Fast):
    """Sums along K run leaf by leaf, attention over keys at absolute positions. Else fp32; and an
    `opaque` op where a compiler has formulas of its own (exp, tanh, sqrt, pow; not rsqrt)."""

    exact = True
    compile_options = {"emulate_precision_casts": True, "pattern_matcher": False}
    compile_options |= {"eager_numerics.division_rounding": True}  # else a GPU's is approximate

    def pack(self, weight, bias, leaves, partial):
        kind = TritonPacked if weight.is_cuda else LeafPacked
        return kind(weight, bias, leaves, partial)

    def rms_norm(self, x, weight, eps):
        if x.is_cuda:
            return gpu_rms_norm(x, weight, eps)
        mean = row_sum(x * x).mul_(1 / x.shape[-1])
        return (x * mean.add_(eps).rsqrt_()).mul_(weight)

    def silu_mul(self, gate_up):
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (sigmoid(gate) * gate).mul_(up).to(gate_up.dtype)

    def log_softmax(self, logits):
        # On a GPU, a block of threads adds up a row by the alignment of its first number.
        padded = fill_up(logits, 0, -logits.shape[-1] % 4, value=-math.inf)
        return super().log_softmax(padded)[..., : logits.shape[-1]]


FAST = Fast()
BATCH_INVARIANT = BatchInvariant()
