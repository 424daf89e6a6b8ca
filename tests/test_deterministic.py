"""BATCH_INVARIANT on a CPU, --deterministic and --score: bits are compared, and each comparison is
also made with a rule broken on purpose, where it must fail. "Telling" data cancels, so that
rounding hides no order of additions."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_compiler, write_checkpoint

import generate
import kernels
from generate import Engine
from kernels import (
    BATCH_INVARIANT,
    FAST,
    BatchInvariant,
    LeafPacked,
    SlidingWindow,
    add_leaves,
    causal,
    leaf_count,
)
from model import Transformer
from scripts import machine, sampler
from scripts.contract import (
    CausalFlag,
    HalfRight,
    LeavesForSeveralRows,
    complete,
    follow,
    noise_by_row,
)
from scripts.loading import read_config
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = [1, 2, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65]
ROWS += [127, 128, 129, 255, 256, 257, 1000]
CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


# ---- leaves


@pytest.mark.parametrize(
    "heads, width, leaves",
    [
        (8, 4096, 8),
        (16, 4096, 8),  # never more than 8
        (12, 4608, 4),
        (6, 4608, 2),
        (3, 576, 3),
        (9, 576, 3),
        (25, 800, 5),
        (7, 896, 7),
        (1, 4096, 1),
        (11, 1408, 1),
        (3, 512, 1),  # 512 is no multiple of 3: an odd count becomes 1
        (8, 1280, 8),
        (8, 128, 4),  # 4 leaves of 32
        (8, 32, 1),
        (8, 1088, 2),  # 34 x 32
    ],
)
def test_leaf_count(heads, width, leaves):
    assert leaf_count(heads, width) == leaves


@pytest.mark.parametrize("group, leaves", [(32, 8), (64, 8), (128, 4), (256, 2), (512, 1)])
def test_leaf_count_by_group(group, leaves):
    """A quantization group lies in one leaf: 512 columns would be 8 leaves of 64."""
    assert leaf_count(8, 512, group) == leaves
    assert leaf_count(3, 3 * group, group) == 3
    assert leaf_count(3, 4 * group, group) == 1


SMALL = 2**-15  # 1024 + SMALL is 1024 in fp32


def leaves_of(*values):
    """Leaves of one output each."""
    return [torch.tensor([float(value)]) for value in values]


@pytest.mark.parametrize(
    "values, tree",
    [
        ([1024, SMALL], 1024),
        ([1024, SMALL, -1024, SMALL], 0),  # left to right: SMALL
        ([1024, -1024, SMALL, SMALL], 2 * SMALL),
        ([SMALL, 1024, SMALL, -1024], 0),
        ([1024, SMALL, -1024, SMALL, 1024, -1024, SMALL, SMALL], 2 * SMALL),
        ([1024, SMALL, SMALL, -1024, 0, 0, 0, SMALL], SMALL),
        ([1024, SMALL, -1024], 0),  # an odd count runs from left to right
        ([1024, -1024, SMALL], SMALL),
        ([SMALL, 1024, -1024, SMALL, SMALL], 2 * SMALL),
        ([SMALL, SMALL, 1024, -1024, SMALL], SMALL),
        ([1024, SMALL, SMALL, SMALL, SMALL, SMALL, -1024], 0),
    ],
)
def test_order_of_leaves(values, tree):
    leaves = leaves_of(*values)
    assert add_leaves(leaves).tolist() == [tree]
    assert add_leaves([leaf.expand(5, 33) for leaf in leaves]).eq(tree).all()


def test_order_probe_tells():
    """The values above tell the tree from left to right and from backwards."""
    leaves = leaves_of(1024, SMALL, -1024, SMALL)
    assert functools.reduce(torch.add, leaves) == SMALL != add_leaves(leaves)
    leaves = leaves_of(1024, -1024, SMALL)
    assert add_leaves(leaves[::-1]) != add_leaves(leaves)


def test_bias_and_no_rounding():
    """The bias comes after the tree, and the sum stays in fp32: in bf16, 1 + 2^-9 would be 1."""
    leaves = leaves_of(1024, SMALL, -1024, SMALL)
    assert add_leaves(leaves, torch.tensor([SMALL])).tolist() == [SMALL]
    assert add_leaves(leaves[:2], torch.tensor([-1024.0])).tolist() == [0]
    leaves = [torch.tensor([x], dtype=BF16) for x in (1.0, 2**-9)]
    bias = torch.tensor([2**-9], dtype=BF16)
    total = add_leaves(leaves, bias)
    assert total.dtype == FP32
    assert total.item() == 1 + 2**-8 != (leaves[0] + leaves[1] + bias).item()


# ---- linear


class LeavesByRows(LeafPacked):
    """Broken: one row is summed by another plan than several are."""

    def __init__(self, weight, bias=None, leaves=1):
        super().__init__(weight, bias, leaves)
        self.single = LeafPacked(weight, bias, 2 if leaves == 1 else 1)

    def forward(self, x):
        if x.shape[:-1].numel() > 1:
            return super().forward(x)
        return self.single(x).to(x.dtype if self.leaves == 1 else FP32)


def plain(weight, bias=None, leaves=1):
    """The flag off."""
    return FAST.pack(weight, bias, leaves, False)


def layer(kind, dtype, leaves, n=67, k=192, bias=True):
    weight = randn(n, k, dtype=dtype) / k**0.5
    return kind(weight, randn(n, seed=1, dtype=dtype) if bias else None, leaves)


def reference(packed, x):
    """What one thread makes of 16 rows at a time."""
    alone = packed.leaves == 1
    parts = []
    with kernels.one_thread():
        for i, part in enumerate(x.chunk(packed.leaves, dim=-1)):
            weight = packed.get_buffer(f"leaf_{i}")
            bias = packed.bias if alone else None
            parts.append(kernels.product_in_tiles(part, weight, bias, [16]))
    return parts[0] if alone else add_leaves(parts, packed.bias)


def differing(packed, x, rows=ROWS):
    """Numbers of rows at which the product differs from that of each row alone."""
    alone = torch.cat([packed(row[None]) for row in x[: max(rows)]])
    return [n for n in rows if not torch.equal(packed(x[:n]), alone[:n])]


@pytest.mark.parametrize(
    "leaves, n, k, bias",
    [(1, 67, 192, True), (2, 64, 192, False), (3, 1, 192, True), (8, 67, 512, True)],
)
@dtypes
def test_linear_rows(dtype, leaves, n, k, bias):
    x = randn(1030, k, seed=2, dtype=dtype)
    packed = layer(LeafPacked, dtype, leaves, n, k, bias)
    rows = ROWS + [512, 513, 514, 1025]  # in tiles, with one row left over
    assert differing(packed, x, rows) == []
    assert torch.equal(packed(x), reference(packed, x))
    for batch, tokens in ((2, 4), (2, 3), (5, 1)):
        count = batch * tokens
        assert packed(x[:count].view(batch, tokens, k)).flatten(0, 1).equal(packed(x[:count]))
    broken = layer(LeavesByRows, dtype, leaves, n, k, bias)
    assert len(differing(broken, x[:260], ROWS[-6:-1])) == 5


def test_plain_linear_differs():
    """With the flag off, one row and several are different products in fp32."""
    x = randn(64, 192, seed=2)
    assert differing(layer(plain, FP32, 1), x, [2, 9, 64]) == [2, 9, 64]


def scattered(packed, x):
    """Whether a row is the same among others: permuted, repeated, among zeros and among huge
    values."""
    alone = torch.cat([packed(row[None]) for row in x])
    order = torch.tensor([5, 2, 2, 7, 0, 5, 39, 2, 11])
    same = [torch.equal(packed(x[order]), alone[order])]
    same += [torch.equal(packed(x.flip(0)), alone.flip(0))]
    same += [torch.equal(packed(x[3:4].expand(33, -1)), alone[3:4].expand(33, -1))]
    for other in (0.0, 100.0):
        batch = torch.full_like(x, other)
        batch[17] = x[17]
        same += [torch.equal(packed(batch)[17], alone[17])]
    return all(same)


@pytest.mark.parametrize("leaves", [1, 3])
@dtypes
def test_linear_neighbours(dtype, leaves):
    x = randn(40, 192, seed=3, dtype=dtype)
    assert scattered(layer(LeafPacked, dtype, leaves), x)
    assert not scattered(layer(LeavesByRows, dtype, leaves), x)


@pytest.mark.parametrize("leaves", [1, 3])
@dtypes
def test_linear_threads(dtype, leaves):
    packed = layer(LeafPacked, dtype, leaves, 300)
    x = randn(257, 192, seed=4, dtype=dtype)
    want = packed(x)
    for threads in (2, 4, 8):
        torch.set_num_threads(threads)  # conftest.py sets it back
        for n in (1, 2, 9, 64, 257):
            assert torch.equal(packed(x[:n]), want[:n])
        assert torch.get_num_threads() == threads
    assert not torch.equal(layer(LeafPacked, dtype, 2, 300)(x), want)  # another plan shows


@pytest.mark.parametrize("leaves", [1, 3])
@dtypes
def test_linear_accuracy(dtype, leaves):
    packed = layer(LeafPacked, dtype, leaves)
    x = randn(50, 192, seed=7, dtype=dtype)
    weight = (randn(67, 192, dtype=dtype) / 192**0.5).double()
    bias = packed.bias.double()
    exact = F.linear(x.double(), weight, bias)
    size = F.linear(x.double().abs(), weight.abs()) + 1
    error = ((packed(x).double() - exact).abs() / size).max().item()
    assert error < 2 * torch.finfo(dtype).eps
    added_twice = ((packed(x).double() - exact + bias).abs() / size).max().item()
    assert added_twice > 50 * error


def telling(n, m, k, dtype):
    """Weights and rows whose products nearly cancel: what is left is rounding, and shows the order
    of additions."""
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    a, b = randn(m, k // 2), randn(n, k // 2)
    weight = torch.cat((b, -b), 1)[:, order].contiguous().to(dtype)
    return weight, torch.cat((a, a), 1)[:, order].contiguous().to(dtype)


@pytest.mark.parametrize("k", [576, 1536, 4096])
@dtypes
def test_linear_telling(dtype, k):
    """Where rounding hides nothing."""
    weight, x = telling(40, 130, k, dtype)
    assert differing(LeafPacked(weight), x, [2, 8, 17, 128, 130]) == []


def test_telling_tells():
    weight, x = telling(40, 130, 576, FP32)
    rows = [2, 8, 17, 128, 130]
    assert differing(plain(weight), x, rows) == rows
    halves = F.linear(x[:, :300], weight[:, :300]) + F.linear(x[:, 300:], weight[:, 300:])
    assert not torch.equal(F.linear(x, weight), halves)


# ---- which numbers of rows a product is given


def watch_products(monkeypatch):
    """A list that gets the rows and threads of each product."""
    seen, product = [], kernels.product

    def watched(x, *args):
        seen.append((x.shape[:-1].numel(), torch.get_num_threads()))
        return product(x, *args)

    monkeypatch.setattr(kernels, "product", watched)
    return seen


@pytest.mark.parametrize("leaves", [1, 3])
@dtypes
def test_linear_without_tiles(dtype, leaves, monkeypatch):
    """Where nothing agrees with the reference, the reference runs, and gives the same bits."""
    packed = layer(LeafPacked, dtype, leaves)
    x = randn(130, 192, seed=5, dtype=dtype)
    want = packed(x)
    torch.set_num_threads(2)
    monkeypatch.setattr(kernels, "exact_tiles", lambda *shape: [])
    seen = watch_products(monkeypatch)
    assert all(torch.equal(packed(x[:n]), want[:n]) for n in (1, 2, 17, 130))
    assert seen == [(16, 1)] * leaves * (1 + 1 + 2 + 9)
    assert torch.get_num_threads() == 2
    assert not torch.equal(layer(LeafPacked, dtype, 2 if leaves == 1 else 1)(x), want)


@pytest.mark.parametrize("leaves", [1, 3])
def test_linear_in_tiles(leaves, monkeypatch):
    """Of all exact tiles or of some: the same bits, and no other number of rows at once."""
    packed = layer(LeafPacked, BF16, leaves)
    x = randn(129, 192, seed=6, dtype=BF16)
    want = packed(x)
    exact = kernels.exact_tiles(67, 192 // leaves, BF16, 1)
    assert len(exact) > 6
    seen = watch_products(monkeypatch)
    for tiles in (exact, exact[:1], exact[:2], exact[2:5], exact[-1:]):
        monkeypatch.setattr(kernels, "exact_tiles", lambda *shape, tiles=tiles: tiles)
        seen.clear()
        for n in (1, 2, 8, 17, 50, 129):
            assert torch.equal(packed(x[:n]), want[:n])
        assert {rows for rows, _ in seen} <= set(tiles)


WRONG_PRODUCTS = {  # when a kernel sums in another order, and the rows that are left
    "many rows": (lambda rows, outputs, threads: rows > 32, range(33)),
    "few rows": (lambda rows, outputs, threads: rows < 16, range(16, 1024)),
    "all but 16 rows": (lambda rows, outputs, threads: rows != 16, [16]),
    "threads": (lambda rows, outputs, threads: threads > 1, []),
}


def break_product(monkeypatch, is_wrong):
    """A product that is summed backwards where `is_wrong` says so, and nothing known of it."""
    product = kernels.product

    def broken(x, weight, bias=None):
        rows, outputs = x.shape[:-1].numel(), weight.shape[0]
        if not is_wrong(rows, outputs, torch.get_num_threads()):
            return product(x, weight, bias)
        dense = weight.to_dense() if weight.is_mkldnn else weight
        return F.linear(x.flip(-1), dense.flip(-1), bias)

    monkeypatch.setattr(kernels, "product", broken)
    fresh = functools.cache(kernels.exact_tiles.__wrapped__)
    monkeypatch.setattr(kernels, "exact_tiles", fresh)


@pytest.mark.parametrize("mistake", WRONG_PRODUCTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_wrong_product_is_seen(dtype, mistake, monkeypatch):
    """The rows at which it is wrong are not used; where there are no others, the reference runs."""
    is_wrong, left = WRONG_PRODUCTS[mistake]
    weight, x = telling(40, 140, 576, dtype)
    packed = LeafPacked(weight)
    want = packed(x)
    known = kernels.exact_tiles(40, 576, dtype, 1)
    threads = 2 if mistake == "threads" else 1
    torch.set_num_threads(threads)
    break_product(monkeypatch, is_wrong)
    found = kernels.exact_tiles(40, 576, dtype, threads)
    assert found == [n for n in known if n in left]
    for n in (1, 2, 16, 33, 140):
        assert torch.equal(packed(x[:n]), want[:n])
    monkeypatch.setattr(kernels, "exact_tiles", lambda *shape: [1 << i for i in range(10)])
    blind = [packed(x[:n]) for n in (1, 2, 16, 33, 140)]
    assert not all(torch.equal(y, want[: len(y)]) for y in blind)


# ---- attention


class Case:
    """Random queries, keys and values of texts, to be attended to in pieces."""

    def __init__(self, dtype, heads, group, head_dim, length, mask_mod=causal, rows=1):
        self.mask_mod, self.length = mask_mod, length
        self.q = randn(rows, length, heads * group, head_dim, dtype=dtype)
        self.k = randn(rows, length, heads, head_dim, seed=1, dtype=dtype)
        self.v = randn(rows, length, heads, head_dim, seed=2, dtype=dtype)

    def row(self, i):
        """The case of one row alone."""
        case = Case(self.q.dtype, 1, 1, 2, 1, self.mask_mod)
        case.length = self.length
        case.q, case.k, case.v = (x[i, None] for x in (self.q, self.k, self.v))
        return case

    def cache(self, extra=0):
        rows, _, heads, head_dim = self.k.shape
        length = -(-(self.length + extra) // 512) * 512
        return [torch.zeros(rows, heads, length, head_dim, dtype=self.q.dtype) for _ in "kv"]

    def piece(self, ops, cache, starts, count, extra=0):
        """One call on so many tokens of each row, from that row's start on."""
        pos = torch.stack([torch.arange(start, start + count) for start in starts])
        span = -(-(int(pos.max()) + 1) // 64) * 64 + extra
        rows = torch.arange(len(starts))[:, None]
        q, k, v = (x[rows, pos] for x in (self.q, self.k, self.v))
        heads_GR = torch.arange(q.shape[2]).view(k.shape[2], -1)
        mask = ops.mask(self.mask_mod, pos, span, heads_GR, cache[0])
        return ops.attention(q, k, v, *cache, pos, mask, q.shape[-1] ** -0.5)

    def run(self, ops, sizes=None, extra=0):
        """All tokens, in pieces of these sizes, the last size over and over."""
        sizes = list(sizes or [self.length])
        cache = self.cache(extra)
        out, start = [], 0
        while start < self.length:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            size = min(size, self.length - start)
            out.append(self.piece(ops, cache, [start] * len(self.q), size, extra))
            start += size
        return torch.cat(out, 1)


class OtherRecipe(BatchInvariant):
    """Broken: one token takes another way than several, in which every sum runs backwards, where
    `when` says so of the lengths of cache and mask."""

    def __init__(self, when):
        self.when = when

    def attention(self, q, k, v, k_cache, v_cache, pos, mask, scale):
        y = super().attention(q, k, v, k_cache, v_cache, pos, mask, scale)
        span = mask[0].shape[-1]
        if q.shape[1] > 1 or not self.when(k_cache.shape[2], span):
            return y
        keys, values = (cache[:, :, :span].flip(2).float() for cache in (k_cache, v_cache))
        heads = q[:, 0].unflatten(1, (keys.shape[1], -1)).flip(-1).float()
        scores = heads @ keys.flip(-1).mT * scale + mask[0][:, :, 0].flip(-1)
        return (scores.softmax(-1) @ values).flatten(1)[:, None].to(q.dtype)


TWO_RECIPES = OtherRecipe(lambda cache, span: True)
CAUSAL_FLAG = CausalFlag()
WINDOW = SlidingWindow(20)
shapes = pytest.mark.parametrize("heads, group, head_dim", [(2, 3, 64), (1, 4, 16), (3, 1, 16)])
masks = pytest.mark.parametrize("mask_mod", [causal, WINDOW], ids=["causal", "window"])


@masks
@shapes
@dtypes
def test_attention_pieces(dtype, heads, group, head_dim, mask_mod):
    """All tokens at once, in chunks, and one by one, over the cache they need and a longer one."""
    case = Case(dtype, heads, group, head_dim, 90, mask_mod)
    want = case.run(BATCH_INVARIANT)
    for sizes, extra in (([1], 0), ([7, 1], 64), ([3], 128), ([64], 0), ([90], 512)):
        assert torch.equal(case.run(BATCH_INVARIANT, sizes, extra), want)


@pytest.mark.parametrize("broken", [TWO_RECIPES, CAUSAL_FLAG], ids=["two recipes", "is_causal"])
@dtypes
def test_attention_pieces_differ(dtype, broken):
    case = Case(dtype, 2, 3, 64, 90)
    assert not torch.equal(case.run(broken), case.run(broken, [1]))


def telling_keys(case):
    """Scores of 0 up to rounding, blown up: the order of additions along head_dim decides where a
    query looks."""
    half = case.q.shape[-1] // 2
    q, k = case.q[..., :half], case.k[..., :half]
    case.q = torch.cat((q, q), -1) * 2.0**9
    case.k = torch.cat((k, -k), -1) * 2.0**9
    return case


def telling_values(case):
    """Keys in equal pairs and values in opposite ones: a query that sees whole pairs gets 0 up to
    rounding."""
    case.k[:, 1::2] = case.k[:, ::2]
    case.v[:, 1::2] = -case.v[:, ::2]
    return case


@pytest.mark.parametrize("tell", [telling_keys, telling_values])
@shapes
@dtypes
def test_attention_telling(dtype, heads, group, head_dim, tell):
    """Where rounding hides nothing."""
    case = tell(Case(dtype, heads, group, head_dim, 90))
    want = case.run(BATCH_INVARIANT)
    assert want.isfinite().all()
    for sizes in ([1], [7, 1], [64]):
        assert torch.equal(case.run(BATCH_INVARIANT, sizes), want)
    assert not torch.equal(case.run(TWO_RECIPES, [1]), case.run(TWO_RECIPES))


@pytest.mark.parametrize("group, window", [(1, None), (3, None), (3, 300)])
@dtypes
def test_attention_long(dtype, group, window):
    """Across the splits of 512 keys, one by one where it matters."""
    case = Case(dtype, 2, group, 64, 620, SlidingWindow(window) if window else causal)
    want, sizes = case.run(BATCH_INVARIANT), [500, *[1] * 30, 90]
    for pieces, extra in ((sizes, 0), ([200], 0), ([511, 1, 108], 512)):
        assert torch.equal(case.run(BATCH_INVARIANT, pieces, extra), want)
    assert not torch.equal(case.run(TWO_RECIPES, sizes), case.run(TWO_RECIPES))


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_attention_of_any_number_of_tokens(dtype, group):
    """Whatever number of rows is left over after whole tiles: at every length, the last token as it
    is alone."""
    case = Case(dtype, 2, group, 64, 140)
    lengths = range(2, 141)

    def that_differ(ops):
        alone = case.run(ops, [1])
        last = {n: case.piece(ops, case.cache(), [0], n)[:, -1] for n in lengths}
        return [n for n in lengths if not torch.equal(last[n], alone[:, n - 1])]

    assert that_differ(BATCH_INVARIANT) == []
    assert that_differ(TWO_RECIPES) != []


@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "invariant"])
def test_attention_is_laid_out_as_its_fake_says(ops, monkeypatch):
    """Compiled code reads a result by these strides. 2 and 11 tokens of 3 heads leave rows over,
    which are filled up where bits count."""
    case = Case(FP32, 1, 3, 64, 90, rows=2)

    def results():
        return [case.piece(ops, case.cache(), [0, 0], count) for count in (2, 11)]

    as_called = results()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    as_op = results()
    assert all(y.is_contiguous() for y in as_op)
    assert all(torch.equal(*pair) for pair in zip(as_called, as_op, strict=True))


def like_turned(x):
    return torch.empty_like(x.mT, memory_format=torch.contiguous_format)


def test_an_op_is_laid_out_as_its_fake_says(monkeypatch):
    """Whatever the function returns, which eager code takes as it is."""
    turned = kernels.opaque("turned(Tensor x) -> Tensor", like_turned)(torch.t)
    x = torch.randn(3, 5)
    assert not turned(x).is_contiguous()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert turned(x).is_contiguous() and torch.equal(turned(x), x.T)


def staggered(case, ops):
    """Rows at different positions in one call, and each by itself."""
    starts = [0, 3, 40, 64, 127]
    together, alone = case.cache(), []
    for i, start in enumerate(starts):
        one = case.row(i)
        cache = one.cache()
        if start:
            one.piece(ops, cache, [0], start)
        for x, y in zip(together, cache, strict=True):
            x[i] = y[0]
        alone.append(torch.cat([one.piece(ops, cache, [start + n], 1) for n in range(6)], 1))
    steps = [case.piece(ops, together, [start + n for start in starts], 1) for n in range(6)]
    return torch.cat(steps, 1), torch.cat(alone)


@masks
@shapes
@dtypes
def test_attention_rows(dtype, heads, group, head_dim, mask_mod):
    case = Case(dtype, heads, group, head_dim, 140, mask_mod, rows=5)
    assert torch.equal(*staggered(case, BATCH_INVARIANT))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_attention_rows_differ(dtype):
    """A query that has neighbours with longer texts takes another way."""
    case = Case(dtype, 2, 3, 16, 140, rows=5)
    by_span = OtherRecipe(lambda cache, span: span > 64)
    assert not torch.equal(*staggered(case, by_span))


@pytest.mark.parametrize("dtype, length", [(FP32, 530), (BF16, 70)], ids=str)
def test_attention_without_spans(dtype, length, monkeypatch):
    """Where no span agrees with the reference, the reference runs, and gives the same bits."""
    case = Case(dtype, 2, 3, 64, length, rows=2)
    sizes = [length - 5, 1]
    want = case.run(BATCH_INVARIANT, sizes)
    monkeypatch.setattr(kernels, "exact_spans", lambda *shape: ([], 16))
    torch.set_num_threads(2)
    sdpa, seen = F.scaled_dot_product_attention, []

    def watched(q, k, *args, **options):
        seen.append((len(q), q.shape[2] % 16, k.shape[2] % 512, torch.get_num_threads()))
        return sdpa(q, k, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert torch.equal(case.run(BATCH_INVARIANT, sizes), want)
    assert set(seen) == {(1, 0, 0, 1)}  # a row of the batch, multiples of 16 and 512, one thread
    assert torch.get_num_threads() == 2
    assert not torch.equal(case.run(TWO_RECIPES, sizes), want)


EVERY = range(64, 1024)
# When a kernel sums in another way, and what is left: spans, and a number that its rows multiply.
WRONG_ATTENTIONS = {
    "some keys": (lambda batch, rows, keys, threads: keys == 128, ([64, *EVERY[128:]], 4)),
    "a batch": (lambda batch, rows, keys, threads: batch > 1, ([], 16)),
    "threads": (lambda batch, rows, keys, threads: threads > 1, ([], 16)),
    "few rows": (lambda batch, rows, keys, threads: rows % 16 > 0, (EVERY, 16)),
}


def break_attention(monkeypatch, is_wrong):
    """Attention in fp64 where `is_wrong` says so, and nothing known of it."""
    sdpa = F.scaled_dot_product_attention

    def broken(q, k, v, mask, scale):
        if not is_wrong(len(q), q.shape[2], k.shape[2], torch.get_num_threads()):
            return sdpa(q, k, v, mask, scale=scale)
        y = sdpa(*(x.double() for x in (q, k, v, mask)), scale=scale)
        return y.to(q.dtype)

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    fresh = functools.cache(kernels.exact_spans.__wrapped__)
    monkeypatch.setattr(kernels, "exact_spans", fresh)


@pytest.mark.parametrize("mistake", WRONG_ATTENTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_wrong_attention_is_seen(dtype, mistake, monkeypatch):
    """The spans and rows with which it is wrong are not used; where there are no others, the
    reference runs."""
    is_wrong, (spans, rows) = WRONG_ATTENTIONS[mistake]
    case = telling_values(Case(dtype, 2, 3, 16, 140, rows=2))
    want = case.run(BATCH_INVARIANT)
    known = kernels.exact_spans(2, 2, 16, 3, dtype, 1)
    assert 128 in known[0] and known[1] == 4
    threads = 2 if mistake == "threads" else 1
    torch.set_num_threads(threads)
    break_attention(monkeypatch, is_wrong)
    found = kernels.exact_spans(2, 2, 16, 3, dtype, threads)
    assert found == ([span for span in known[0] if span in spans], rows)
    for sizes in ([140], [100, 1]):
        assert torch.equal(case.run(BATCH_INVARIANT, sizes), want)
    monkeypatch.setattr(kernels, "exact_spans", lambda *shape: known)
    assert not torch.equal(case.run(BATCH_INVARIANT, [100, 1]), want)


def all_but_itself(mask_mod):
    """The same mask with one key too few for each query."""

    def narrower(b, h, q_idx, kv_idx):
        is_itself = (q_idx == kv_idx) & (kv_idx > 0)
        return mask_mod(b, h, q_idx, kv_idx) & ~is_itself

    return narrower


@masks
@dtypes
def test_attention_accuracy(dtype, mask_mod):
    case = Case(dtype, 2, 3, 64, 600, mask_mod)
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    i = torch.arange(600)
    scores = torch.einsum("btghd,bsgd->bghts", q.unflatten(2, (2, 3)), k) / 8
    scores.masked_fill_(~mask_mod(0, 0, i[:, None], i), float("-inf"))
    weights = scores.softmax(-1)
    exact = torch.einsum("bghts,bsgd->btghd", weights, v).flatten(2)
    size = torch.einsum("bghts,bsgd->btghd", weights, v.abs()).flatten(2)

    def error():
        return ((case.run(BATCH_INVARIANT).double() - exact).abs() / size).max().item()

    right = error()
    assert right < 16 * torch.finfo(dtype).eps
    case.mask_mod = all_but_itself(mask_mod)
    assert error() > 10 * right


# ---- norms and other rows


def rms_norm(x):
    return BATCH_INVARIANT.rms_norm(x, randn(x.shape[-1], seed=1), 1e-6)


def silu_mul_bf16(x):
    return BATCH_INVARIANT.silu_mul(x.bfloat16())


def silu_mul_fp16(x):
    return BATCH_INVARIANT.silu_mul(x.half())


def halves_if_alone(function):
    """Broken: a factor that is summed over another split of a row when there is only one."""

    def broken(x):
        summed = x.view(1, 2, -1).sum(1) if len(x) == 1 else x
        return function(x) * torch.linalg.vector_norm(summed, dim=-1)[:, None]

    return broken


def per_row(function, x):
    """Numbers of rows at which a function of rows differs from that of each row alone."""
    alone = torch.cat([function(row[None]) for row in x])
    return [n for n in ROWS if n <= len(x) and not torch.equal(function(x[:n]), alone[:n])]


ROWWISE = [rms_norm, BATCH_INVARIANT.silu_mul, silu_mul_bf16, silu_mul_fp16]
ROWWISE += [BATCH_INVARIANT.log_softmax]


@pytest.mark.parametrize("width", [64, 134, 1002])
@pytest.mark.parametrize("function", ROWWISE, ids=lambda function: function.__name__)
def test_rowwise(function, width):
    x = randn(257, width) * 3
    assert per_row(function, x) == []
    assert torch.equal(function(x.flip(0)), function(x).flip(0))
    assert torch.equal(function(x[5:6].expand(9, -1)), function(x)[5:6].expand(9, -1))
    want = function(x)
    torch.set_num_threads(4)  # conftest.py sets it back
    assert torch.equal(function(x), want)
    assert per_row(halves_if_alone(function), x)


def test_rowwise_values():
    x, weight = randn(20, 134).double(), randn(134, seed=1)
    close = {"rtol": 1e-6, "atol": 1e-6}
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    got = BATCH_INVARIANT.rms_norm(x.float(), weight, 1e-6)
    torch.testing.assert_close(got.double(), exact, **close)
    exact = F.silu(x[:, :67]) * x[:, 67:]
    got = BATCH_INVARIANT.silu_mul(x.float())
    torch.testing.assert_close(got.double(), exact, **close)
    extreme = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])
    assert BATCH_INVARIANT.silu_mul(extreme).tolist() == [[0.0, 200.0, 0.0]]


class NormByPow(BatchInvariant):
    """Broken: a compiler rounds pow otherwise."""

    def rms_norm(self, x, weight, eps):
        mean = kernels.row_sum(x * x) / x.shape[-1]
        return x / (mean + eps).pow(0.5) * weight


@pytest.fixture
def dynamo():
    """The compiler as a new process finds it; leaves nothing compiled behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_compiler
def test_rowwise_compiled(dynamo):
    """rms_norm and silu_mul in one graph, roundings between them and all, in bf16 and in fp32."""
    weight = randn(134, seed=1)

    def both(ops, *inputs):
        normed = [ops.rms_norm(x.float(), weight, 1e-6).to(x.dtype) for x in inputs]
        return torch.cat([ops.silu_mul(x).float().flatten() for x in normed])

    def alike(ops, **options):
        """Whether a compiled graph gives what eager code does."""
        options["cpp.vec_isa_ok"] = True  # to try vector instructions takes long
        compiled = torch.compile(both, fullgraph=True, dynamic=True, options=options)
        texts = [(randn(n, 134, dtype=BF16) * 3, randn(4 * n, 134) * 3) for n in (2, 7, 33, 257)]
        return all(torch.equal(compiled(ops, *text), both(ops, *text)) for text in texts)

    assert alike(BATCH_INVARIANT, **BATCH_INVARIANT.compile_options)
    assert not alike(NormByPow(), **BATCH_INVARIANT.compile_options)
    assert not alike(FAST)


# ---- models

MODELS = {
    "2 KV heads": {},
    "3 KV heads, biases": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "mixture": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "int8": {},
    "int4": {},
}


def build(folder, ops, dtype, name="2 KV heads"):
    """A random model, norms and biases random too."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config | MODELS[name]))
    quantization = name if name in ("int8", "int4") else None
    model = Transformer(read_config(path, quantization), ops, CPU, dtype)
    for i, loader in enumerate(model.loaders):
        tensors = [randn(*shape, seed=i) * 0.3 for shape in loader.shapes.values()]
        is_norm = len(loader.shapes) == 1 and tensors[0].dim() == 1
        loader.load([(tensor + is_norm).to(dtype) for tensor in tensors])
    return model


KINDS = [("2 KV heads", BF16), ("2 KV heads", FP32), ("3 KV heads, biases", BF16), ("window", FP16)]
KINDS += [("mixture", FP32), ("int8", BF16), ("int4", BF16)]
MORE = [("2 KV heads", FP16), ("3 KV heads, biases", FP32), ("int8", FP32), ("int4", FP32)]
KINDS += [pytest.param(*kind, marks=pytest.mark.slow) for kind in MORE]
kinds = pytest.mark.parametrize("name, dtype", KINDS, ids=str)
REPEATED = [("2 KV heads", FP32), ("3 KV heads, biases", BF16)]  # of which others say as much
FEWER = [
    pytest.param(*kind, marks=pytest.mark.slow) if kind in REPEATED else kind for kind in KINDS
]


@torch.inference_mode()
def stacked(model, sizes, length=72):
    """Logits of a text, fed in pieces of these sizes, over and over."""
    ids = torch.randint(300, (1, length), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, length)
    out, start = [], 0
    for size in sizes * length:
        end = min(start + size, length)
        if start < end:
            pos_BT = torch.arange(start, end)[None]
            out.append(model(ids[:, start:end], pos_BT, cache, end))
        start = end
    return torch.cat(out, 1)


@kinds
def test_stack(tmp_path, name, dtype):
    """One call of T tokens equals T calls of one."""
    model = build(tmp_path, BATCH_INVARIANT, dtype, name)
    want = stacked(model, [72])
    assert torch.equal(stacked(model, [1]), want)
    assert torch.equal(stacked(model, [5, 1, 30]), want)


BROKEN = {"flag off": FAST, "is_causal": CAUSAL_FLAG, "leaves by rows": LeavesForSeveralRows()}


@pytest.mark.parametrize(
    "rule, name, dtype",
    [
        ("flag off", "2 KV heads", FP32),
        ("is_causal", "2 KV heads", FP32),
        ("is_causal", "2 KV heads", FP16),
        ("is_causal", "2 KV heads", BF16),
        ("leaves by rows", "2 KV heads", FP32),
        ("leaves by rows", "2 KV heads", FP16),
        ("leaves by rows", "2 KV heads", BF16),
        ("leaves by rows", "mixture", FP32),
        ("leaves by rows", "int8", BF16),
        ("leaves by rows", "int4", BF16),
    ],
    ids=str,
)
def test_stack_broken(tmp_path, rule, name, dtype):
    model = build(tmp_path, BROKEN[rule], dtype, name)
    assert not torch.equal(stacked(model, [1]), stacked(model, [72]))


def ask(i, length, new=8, **fields):
    ids = torch.randint(300, (length,), generator=torch.Generator().manual_seed(i)).tolist()
    return Request(i, "", ids, max_new_tokens=new, **fields)


OPTIONS = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}, {"top_k": 3, "seed": 9}]
LENGTHS = [200, 9, 10, 1, 64, 65, 3, 17, 100, 2]
MIXED = [ask(i, LENGTHS[i % 10], 3 + i % 7, **OPTIONS[i % 4]) for i in range(12)]
ROOM = 220


def answers(model, requests, slots=1, length=ROOM, **settings):
    return dict(complete(model, requests, slots, length, **settings))


def scored(model, alone, chunk):
    """The answers, their logprobs by prefill of prompt and completion."""
    engine = Engine(model, Tokenizer(None), 1, ROOM, chunk)
    found = {}
    for request in MIXED:
        tokens, _ = alone[request.id]
        found[request.id] = tokens, engine.score(request.prompt_ids, tokens)
    return found


def varied(model, kind, alone):
    """Answers of runs in which one thing is other than alone."""
    some = MIXED[:8]
    if kind == "batch":
        return [answers(model, MIXED, 2), answers(model, MIXED[::-1], 9)]
    if kind == "chunks":
        small = [answers(model, some, prefill_chunk=chunk) for chunk in (1, 7)]
        return [*small, answers(model, MIXED, 5, prefill_chunk=64)]
    if kind == "drafts":
        return [answers(model, some, 3, drafter=HalfRight(alone, k)) for k in (1, 5)]
    if kind == "cache":
        return [answers(model, some, 3, length) for length in (210, 600, 1100)]
    return [scored(model, alone, chunk) for chunk in (0, 5)]


VARIED = ("batch", "chunks", "drafts", "cache", "score")


def what_differs(model, kinds=VARIED):
    """What of that changes tokens or logprobs."""
    alone = answers(model, MIXED)
    assert len({str(answer) for answer in alone.values()}) == len(MIXED)
    runs = [(kind, found) for kind in kinds for found in varied(model, kind, alone)]
    return {kind for kind, found in runs if not found.items() <= alone.items()}


@pytest.mark.parametrize("name, dtype", FEWER, ids=str)
def test_nothing_differs(tmp_path, name, dtype):
    """Slots that are refilled, any order, chunks, drafts, caches; and rescoring."""
    assert what_differs(build(tmp_path, BATCH_INVARIANT, dtype, name)) == set()


@pytest.mark.parametrize(
    "rule, dtype, name, what",
    [
        ("flag off", FP32, "2 KV heads", ["batch", "chunks", "drafts", "score"]),
        ("is_causal", FP32, "2 KV heads", ["chunks", "score"]),
        ("leaves by rows", FP32, "2 KV heads", ["batch", "chunks", "drafts", "score"]),
        ("leaves by rows", BF16, "int8", ["batch", "chunks", "drafts", "score"]),
        ("leaves by rows", BF16, "int4", ["batch", "chunks", "drafts", "score"]),
        ("noise by row", FP32, "2 KV heads", ["batch"]),
        ("long caches", FP32, "2 KV heads", ["cache"]),
    ],
    ids=str,
)
def test_something_differs(tmp_path, monkeypatch, rule, dtype, name, what):
    """Each of those comparisons fails where a rule is broken."""
    rules = BROKEN | {
        "noise by row": BATCH_INVARIANT,
        "long caches": OtherRecipe(lambda cache, span: cache > 1000),
    }
    if rule == "noise by row":
        monkeypatch.setattr(sampler, "gumbel", noise_by_row)
    assert what_differs(build(tmp_path, rules[rule], dtype, name), what) == set(what)


@pytest.mark.parametrize("name", ["2 KV heads", "int8", "int4"])
def test_threads(tmp_path, name):
    model = build(tmp_path, BATCH_INVARIANT, BF16, name)
    some = MIXED[2:4]
    want = answers(model, some)
    assert answers(model, some, threads=2) == want
    follow(model, OtherRecipe(lambda cache, span: torch.get_num_threads() > 1))
    assert answers(model, some) == want
    assert answers(model, some, threads=2) != want


def among(model, length, **fields):
    """One request among neighbours with prompts of this length."""
    neighbours = [ask(50 + i, length, 9, **fields) for i in range(4)]
    found = answers(model, [*neighbours[:2], MIXED[1], *neighbours[2:]], 5)
    return found[MIXED[1].id]


def test_neighbours(tmp_path, monkeypatch):
    model = build(tmp_path, BATCH_INVARIANT, FP32)
    want = answers(model, MIXED[1:2])[MIXED[1].id]
    for i, length in enumerate((1, 9, 10, 64, 128)):
        for fields in (OPTIONS[i % 4], OPTIONS[(i + 1) % 4]):
            assert among(model, length, **fields) == want
    monkeypatch.setattr(sampler, "gumbel", noise_by_row)
    assert among(model, 9) != want


# ---- the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), intermediate_size=128)


def lines_of(capsys, tiny, *flags):
    """The JSON lines of a run in this process, as text, and its stats."""
    fixed = ["--checkpoint_path", tiny, "--device", "cpu", "--precision", "fp32", "--json"]
    generate.main([*map(str, fixed), *map(str, flags)])
    *lines, stats = capsys.readouterr().out.split("\n")[:-1]
    return lines, json.loads(stats)["stats"]


@pytest.fixture
def generated(tiny, capsys, tmp_path):
    """A file of completions, with the stats line, and its lines."""
    flags = ["--prompt", "The quick", "--prompt", "ein Wörtchen 🙂", "--prompt", "40"]
    flags += ["--num_samples", "2", "--max_new_tokens", "12", "--batch_size", "4"]
    lines, stats = lines_of(capsys, tiny, *flags, "--ignore_eos", "--deterministic")
    assert stats["deterministic"] is True
    assert len(lines) == 6
    path = tmp_path / "completions.jsonl"
    path.write_text("\n".join([*lines, json.dumps({"stats": stats})]) + "\n", encoding="utf-8")
    return path, lines


def without_logprobs(lines):
    return [json.loads(line) | {"logprobs": 0} for line in lines]


def test_score_prints_the_same(tiny, generated, capsys):
    path, lines = generated
    for flags in ([], ["--prefill_chunk", "5", "--batch_size", "3"]):
        got, stats = lines_of(capsys, tiny, "--deterministic", "--score", path, *flags)
        assert got == lines
        assert stats["deterministic"] is True
        assert stats["new_tokens"] == 0
    got, stats = lines_of(capsys, tiny, "--score", path)
    assert got != lines, "with the flag off, other bits"
    assert stats["deterministic"] is False
    assert without_logprobs(got) == without_logprobs(lines)


def test_score_recomputes(tiny, generated, tmp_path, capsys):
    """Logprobs are not copied, other fields are kept as they are, and none but the ids is
    needed."""
    first = json.loads(generated[1][0])
    bare = {"prompt_ids": first["prompt_ids"], "tokens": first["tokens"]}
    mine = {"mine": {"é": [1, None]}}
    entries = [first | mine | {"logprobs": [0.0]}, bare, bare | {"tokens": []}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    lines, _ = lines_of(capsys, tiny, "--deterministic", "--score", path)
    with_it, alone, empty = map(json.loads, lines)
    assert with_it == first | mine
    assert alone == bare | {"logprobs": first["logprobs"]}
    assert empty == bare | {"tokens": [], "logprobs": []}


def test_score_output(tiny, generated, tmp_path, capsys):
    """A rerun skips what the file holds; a torn line is made again."""
    path, lines = generated
    output = tmp_path / "scored.jsonl"
    text = "".join(line + "\n" for line in lines)

    def printed():
        flags = ["--deterministic", "--score", path, "--output", output]
        return lines_of(capsys, tiny, *flags)[0]

    assert printed() == lines
    assert output.read_text(encoding="utf-8") == text
    assert printed() == []
    output.write_bytes(text.encode()[: -len(lines[-1].encode()) // 2])
    assert printed() == lines[-1:]
    assert output.read_text(encoding="utf-8") == text


def test_score_of_the_whole_context(tiny, tmp_path, capsys):
    path = tmp_path / "full.jsonl"
    path.write_text(json.dumps(GOOD | {"tokens": [1] * 254}))
    (line,), _ = lines_of(capsys, tiny, "--score", path)
    assert len(json.loads(line)["logprobs"]) == 254


GOOD = {"id": 0, "sample": 0, "prompt_ids": [1, 2], "tokens": [3]}
BAD_LINES = {
    "no JSON": "{",
    "no object": "[1]",
    "no tokens": json.dumps({"prompt_ids": [1]}),
    "no prompt_ids": json.dumps({"tokens": [1]}),
    "no prompt": json.dumps(GOOD | {"prompt_ids": []}),
    "id too large": json.dumps(GOOD | {"tokens": [380]}),
    "id below 0": json.dumps(GOOD | {"tokens": [-1]}),
    "id a text": json.dumps(GOOD | {"prompt_ids": ["a"]}),
    "id a boolean": json.dumps(GOOD | {"prompt_ids": [True]}),
    "id a float": json.dumps(GOOD | {"tokens": [1.0]}),
    "ids a text": json.dumps(GOOD | {"tokens": "abc"}),
    "ids an object": json.dumps(GOOD | {"tokens": {"a": 1}}),
    "ids null": json.dumps(GOOD | {"tokens": None}),
    "name a list": json.dumps(GOOD | {"id": [1]}),
    "longer than the context": json.dumps(GOOD | {"tokens": [1] * 255}),
}


@pytest.fixture
def refused(monkeypatch, capsys, tiny):
    """Runs generate.py as a command in this process, which must end with status 2 and one line on
    standard error, and returns that."""

    def run(*flags):
        argv = ["generate.py", "--checkpoint_path", tiny, "--device", "cpu", "--json", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # of which a refusal takes leave
        with pytest.raises(SystemExit) as end:
            generate.command(generate.main)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("line", BAD_LINES)
def test_score_bad_line(refused, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", BAD_LINES[line], json.dumps(GOOD)]))
    err = refused("--score", path, "--output", tmp_path / "out")
    assert "line 3 " in err
    assert str(path) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"stats": {}}\n', b"\xff\xfe", None])
def test_score_bad_file(refused, tmp_path, content):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused("--deterministic", "--score", path)


@pytest.mark.parametrize("other", [["--prompt", "a"], ["--prompts_file", "x"], ["--interactive"]])
def test_score_excludes(refused, tmp_path, other):
    assert "excludes" in refused("--score", tmp_path / "x", *other)


def test_compiling_is_refused_where_it_changes_bits(refused, tiny, capsys, monkeypatch):
    """PyTorch before 2.13 drops roundings on a CPU: with the flag one line, without it as
    before."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    monkeypatch.setattr(machine, "compiled", lambda model, *how, **more: model.stack)
    monkeypatch.setattr(machine, "tune_memory", lambda *args, **more: None)  # it takes a while
    few = ["--prompt", "3", "--max_new_tokens", "1"]
    lines_of(capsys, tiny, *few, "--compile", "--compile_prefill")
    lines_of(capsys, tiny, *few, "--deterministic")
    for flag in ("--compile", "--compile_prefill"):
        assert "PyTorch 2.13" in refused("--deterministic", flag, *few)


@needs_compiler
def test_compiled_equals_eager(dynamo, tmp_path, capsys):
    """The same lines, logprobs and all, from graphs."""
    tiny = write_checkpoint(tmp_path, num_hidden_layers=1, intermediate_size=128)
    flags = [word for n in (1, 9, 40, 70) for word in ("--prompt", n)]
    flags += ["--max_new_tokens", 5, "--ignore_eos", "--repetition_penalty", 1.3, "--min_p", 0.01]
    want, _ = lines_of(capsys, tiny, "--deterministic", *flags)
    graphs = ["--compile", "--compile_prefill", "--batch_size", 3]
    assert lines_of(capsys, tiny, "--deterministic", *flags, *graphs)[0] == want
    assert lines_of(capsys, tiny, *flags)[0] != want
    flags += ["--precision", "bf16"]  # of whose single rows a graph has loops
    want, _ = lines_of(capsys, tiny, "--deterministic", *flags)
    assert lines_of(capsys, tiny, "--deterministic", *flags, "--compile")[0] == want
    assert lines_of(capsys, tiny, *flags)[0] != want
