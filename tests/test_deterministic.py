"""BATCH_INVARIANT on a CPU, --deterministic and --score: bits are compared, and each comparison is also made with a
rule broken on purpose, where it must fail. "Telling" data cancels, so that rounding hides no order of additions."""

import functools
import json
import runpy
import sys
from dataclasses import replace
from itertools import product as pairs
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_generate import needs_compiler, write_checkpoint

import generate
import kernels
from generate import Engine, Request, Tokenizer
from kernels import BATCH_INVARIANT, FAST, LeafPacked, add_leaves, causal, leaf_count, sliding_window
from model import InputError, ModelConfig, Transformer
from tests.contract import causal_flag, noise_by_row

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = [1, 2, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000]
CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- leaves


@pytest.mark.parametrize(
    "heads, width, leaves",
    [
        (8, 4096, 8),
        (16, 4096, 8),  # never more than 8
        (4, 4096, 4),
        (12, 4608, 4),
        (6, 4608, 2),
        (3, 576, 3),
        (3, 1536, 3),
        (9, 576, 3),
        (15, 960, 3),
        (5, 640, 5),
        (25, 800, 5),
        (7, 896, 7),
        (1, 4096, 1),
        (11, 1408, 1),
        (3, 512, 1),  # 512 is no multiple of 3: an odd count becomes 1
        (8, 1280, 8),
        (8, 128, 4),  # 4 leaves of 32
        (8, 64, 2),
        (8, 32, 1),
        (8, 1088, 2),  # 34 x 32
        (8, 14336, 8),
    ],
)
def test_leaf_count(heads, width, leaves):
    assert leaf_count(heads, width) == leaves


@pytest.mark.parametrize("group, leaves", [(32, 8), (64, 8), (128, 4), (256, 2), (1024, 1)])
def test_leaf_count_by_group(group, leaves):
    """A quantization group lies in one leaf: 512 columns would be 8 leaves of 64."""
    assert leaf_count(8, 1024 if group == 1024 else 512, group) == leaves
    assert leaf_count(3, 3 * group, group) == 3 and leaf_count(3, 4 * group, group) == 1


def left_to_right(parts):
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total


SMALL = 2**-15  # 1024 + SMALL is 1024 in fp32


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
    parts = torch.tensor(values, dtype=FP32)
    assert add_leaves(parts[:, None]).tolist() == [tree]
    assert add_leaves(parts[:, None].expand(5, -1, 33)).eq(tree).all()


def test_order_probe_tells():
    """The values above tell the tree from left to right and from backwards."""
    parts = torch.tensor([[1024], [SMALL], [-1024], [SMALL]])
    assert left_to_right(parts) == SMALL != add_leaves(parts)
    parts = torch.tensor([[1024], [-1024], [SMALL]])
    assert left_to_right(parts.flip(0)) != add_leaves(parts)


def test_bias_and_no_rounding():
    """The bias comes after the tree, and the sum stays in fp32: in bf16, 1 + 2^-9 would be 1."""
    parts = torch.tensor([[1024], [SMALL], [-1024], [SMALL]])
    assert add_leaves(parts, torch.tensor([SMALL])).tolist() == [SMALL]
    assert add_leaves(parts[:2], torch.tensor([-1024.0])).tolist() == [0]
    parts, bias = torch.tensor([[1.0], [2**-9]], dtype=BF16), torch.tensor([2**-9], dtype=BF16)
    total = add_leaves(parts, bias)
    assert total.dtype == FP32 and total.item() == 1 + 2**-8 != ((parts[0] + parts[1]) + bias).item()


# ---- linear


class LeavesByRows(LeafPacked):
    """Broken: one row is summed by another plan than several are."""

    def __init__(self, weight, bias, leaves):
        super().__init__(weight, bias, leaves)
        self.single = LeafPacked(weight, bias, 2 if leaves == 1 else 1)

    def __call__(self, x):
        return self.single(x) if x.numel() == x.shape[-1] else super().__call__(x)


def layer(kind, dtype, leaves, n=67, k=192, bias=True):
    return kind(randn(n, k, dtype=dtype) / k**0.5, randn(n, seed=1, dtype=dtype) if bias else None, leaves)


def whole(packed, x):
    """What the reference, in which no number of rows is safe, makes of all rows."""
    alone, bias = len(packed.leaves) == 1, packed.bias
    parts = zip(x.chunk(len(packed.leaves), 1), packed.leaves, strict=True)
    parts = [kernels.in_tiles(*part, range(0), bias if alone else None) for part in parts]
    return parts[0] if alone else add_leaves(torch.stack(parts, dim=-2), bias)


def differing(packed, x, rows=ROWS):
    """Numbers of rows at which the product differs from that of each row alone."""
    alone = torch.cat([packed(row[None]) for row in x[: max(rows)]])
    return [n for n in rows if not torch.equal(packed(x[:n]), alone[:n])]


@pytest.mark.parametrize("n, bias", [(67, True), (64, False), (1, True)])
@pytest.mark.parametrize("leaves", [1, 2, 3, 8])
@dtypes
def test_linear_rows(dtype, leaves, n, bias):
    k = 512 if leaves == 8 else 192
    x = randn(1030, k, seed=2, dtype=dtype)
    packed = layer(LeafPacked, dtype, leaves, n, k, bias)
    rows = ROWS + [512, 513, 514, 1025]  # in tiles, with one row left over
    assert differing(packed, x, rows) == []
    assert torch.equal(packed(x), whole(packed, x))
    assert packed(x[:6].view(2, 3, k)).equal(packed(x[:6]).view(2, 3, n))
    assert len(differing(layer(LeavesByRows, dtype, leaves, n, k, bias), x[:260], ROWS[-6:-1])) == 5


def test_plain_linear_differs():
    """The flag off: one row and several are different products in fp32."""
    x = randn(1000, 192, seed=2)
    assert differing(layer(FAST.pack, FP32, 1), x, [2, 9, 64]) == [2, 9, 64]


def scattered(packed, x):
    """A row among others: permuted, repeated, among zeros and among huge values."""
    alone, order = torch.cat([packed(row[None]) for row in x]), torch.tensor([5, 2, 2, 7, 0, 5, 39, 2, 11])
    assert torch.equal(packed(x[order]), alone[order])
    assert torch.equal(packed(x.flip(0)), alone.flip(0))
    assert torch.equal(packed(x[3:4].expand(33, -1)), alone[3:4].expand(33, -1))
    for other in (0.0, 100.0):
        batch = torch.full_like(x, other)
        batch[17] = x[17]
        assert torch.equal(packed(batch)[17], alone[17])


@pytest.mark.parametrize("leaves", [1, 2, 3])
@dtypes
def test_linear_neighbours(dtype, leaves):
    x = randn(40, 192, seed=3, dtype=dtype)
    scattered(layer(LeafPacked, dtype, leaves), x)
    with pytest.raises(AssertionError):
        scattered(layer(LeavesByRows, dtype, leaves), x)


@pytest.mark.parametrize("leaves", [1, 3])
@dtypes
def test_linear_threads(dtype, leaves):
    packed, x, want = layer(LeafPacked, dtype, leaves, 300), randn(257, 192, seed=4, dtype=dtype), {}
    for threads, n in pairs((1, 2, 4), (1, 2, 9, 64, 257)):
        torch.set_num_threads(threads)
        assert torch.equal(packed(x[:n]), want.setdefault(n, packed(x[:n])))
        assert torch.equal(packed(x[:n]), want[n])
        assert torch.get_num_threads() == threads
    assert not torch.equal(layer(LeafPacked, dtype, 2, 300)(x), want[257])  # another plan shows


@pytest.mark.parametrize("leaves", [1, 2, 3])
@dtypes
def test_linear_without_probe(dtype, leaves, monkeypatch):
    """Where nothing agrees with the reference, the reference runs, and gives the same bits."""
    x, fast = randn(130, 192, seed=5, dtype=dtype), layer(LeafPacked, dtype, leaves)
    want = {n: fast(x[:n]) for n in (1, 2, 17, 130)}
    asked, product = [], kernels.product
    monkeypatch.setattr(kernels, "safe_rows", lambda *shape: range(0))
    monkeypatch.setattr(kernels, "product", lambda x, *args: asked.append(len(x)) or product(x, *args))
    slow = layer(LeafPacked, dtype, leaves)
    assert all(torch.equal(slow(x[:n]), y) for n, y in want.items())
    assert asked == [16] * leaves * (1 + 1 + 2 + 9)
    assert not torch.equal(layer(LeafPacked, dtype, 2 if leaves == 1 else 1)(x), want[130])


@pytest.mark.parametrize("safe", [range(1, 3), range(2, 8), range(2, 17), range(1, 65)])
@pytest.mark.parametrize("beside", [range(0), range(1, 6), range(3, 17)])
@pytest.mark.parametrize("leaves", [1, 3])
def test_linear_in_tiles(safe, beside, leaves, monkeypatch):
    """Whatever numbers of rows a probe allows: same bits, and no others at once."""
    packed, sizes, product = layer(LeafPacked, BF16, leaves), [], kernels.product
    x = randn(129, 192, seed=6, dtype=BF16)
    want = whole(packed, x)
    monkeypatch.setattr(kernels, "safe_rows", lambda n, k, dtype, copies, threads: safe if copies == 1 else beside)
    together = lambda weight: leaves > 1 and weight is packed.stacked
    rows = lambda x: x.shape[:-1].numel()
    counted = lambda x, weight, *bias: sizes.append((rows(x), together(weight))) or product(x, weight, *bias)
    monkeypatch.setattr(kernels, "product", counted)
    for n in (1, 2, 8, 17, 50, 129):
        assert torch.equal(packed(x[:n]), want[:n])
    assert {n for n, whole in sizes if not whole} <= set(safe) and safe[-1] in dict(sizes)
    assert {n for n, whole in sizes if whole} == ({n for n in (3, 6, 24) if n in beside} if leaves > 1 else set())


@pytest.mark.parametrize("leaves", [1, 2, 3])
@dtypes
def test_linear_accuracy(dtype, leaves):
    packed, x = layer(LeafPacked, dtype, leaves), randn(50, 192, seed=7, dtype=dtype)
    weight = (randn(67, 192, dtype=dtype) / 192**0.5).double()
    exact, size = F.linear(x.double(), weight, packed.bias.double()), F.linear(x.double().abs(), weight.abs()) + 1
    error = ((packed(x).double() - exact).abs() / size).max().item()
    assert error < 2 * torch.finfo(dtype).eps
    assert (
        (packed(x).double() - exact + packed.bias.double()).abs() / size
    ).max() > 100 * error / 2  # a bias added twice


def telling(n, m, k, dtype):
    """Weights and rows whose products nearly cancel: what is left is rounding, and shows the order of additions."""
    order, a, b = torch.randperm(k, generator=torch.Generator().manual_seed(0)), randn(m, k // 2), randn(n, k // 2)
    return torch.cat((b, -b), 1)[:, order].contiguous().to(dtype), torch.cat((a, a), 1)[:, order].contiguous().to(dtype)


@pytest.mark.parametrize("k", [576, 1024, 1536, 4096])
@dtypes
def test_linear_telling(dtype, k):
    """Where rounding hides nothing."""
    weight, x = telling(40, 130, k, dtype)
    assert differing(LeafPacked(weight), x, [2, 8, 17, 128, 130]) == []


def test_telling_tells():
    weight, x = telling(40, 130, 576, FP32)
    assert differing(FAST.pack(weight), x, [2, 8, 17, 128, 130]) == [2, 8, 17, 128, 130]
    assert not torch.equal(F.linear(x, weight), F.linear(x[:, :300], weight[:, :300]) + x[:, 300:] @ weight[:, 300:].T)


# ---- attention


class Case:
    """Random queries, keys and values of a text, to be attended in pieces by `ops`."""

    def __init__(self, dtype, heads, group, head_dim, length, mask_mod=causal, rows=1, seed=0):
        self.dtype, self.mask_mod, self.heads, self.length = dtype, mask_mod, heads * group, length
        self.q = randn(rows, length, self.heads, head_dim, seed=seed, dtype=dtype)
        self.k, self.v = (randn(rows, length, heads, head_dim, seed=seed + i, dtype=dtype) for i in (1, 2))

    def cache(self, length=None):
        rows, length, heads, head_dim = *self.k.shape[:1], length or -(-self.length // 512) * 512, *self.k.shape[2:]
        return [torch.zeros(rows, heads, length, head_dim, dtype=self.dtype) for _ in "kv"]

    def piece(self, ops, cache, start, end, extra=0):
        """One call on tokens [start, end) of all rows, which have their own starts where `start` is a list."""
        starts = start if isinstance(start, list) else [start] * len(self.q)
        count = end - start if isinstance(start, int) else end
        pos = torch.stack([torch.arange(s, s + count) for s in starts])
        span = -(-(int(pos.max()) + 1) // 64) * 64 + extra
        q, k, v = (torch.stack([row[s : s + count] for row, s in zip(x, starts, strict=True)]) for x in self.qkv())
        mask = ops.mask(self.mask_mod, pos, span, torch.arange(self.heads).view(self.k.shape[2], -1), self.dtype)
        return ops.attention(q, k, v, *cache, pos, mask, q.shape[-1] ** -0.5)

    def qkv(self):
        return self.q, self.k, self.v

    def run(self, ops, sizes, extra=0):
        """All tokens, in pieces of these sizes, the last size over and over."""
        cache, out, start, sizes = self.cache(-(-(self.length + extra) // 512) * 512), [], 0, list(sizes)
        while start < self.length:
            end = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), self.length)
            out.append(self.piece(ops, cache, start, end, extra))
            start = end
        return torch.cat(out, 1)


def two_recipes(q, k, v, k_cache, v_cache, pos, mask, scale):
    """Broken: one token takes another way than several, in which every sum runs backwards."""
    y = BATCH_INVARIANT.attention(q, k, v, k_cache, v_cache, pos, mask, scale)
    if q.shape[1] > 1:
        return y
    k, v = (cache[:, :, : mask[0].shape[-1]].flip(2).float() for cache in (k_cache, v_cache))
    scores = q[:, 0].unflatten(1, (k.shape[1], -1)).flip(-1).float() @ k.flip(-1).mT * scale
    scores += mask[0][:, :, 0].flip(-1)
    return (scores.softmax(-1) @ v).flatten(1)[:, None].to(q.dtype)


IS_CAUSAL, TWO_RECIPES = (replace(BATCH_INVARIANT, attention=broken) for broken in (causal_flag, two_recipes))
shapes = pytest.mark.parametrize("heads, group, head_dim", [(2, 1, 16), (2, 3, 64), (1, 4, 16), (2, 4, 64), (3, 3, 16)])
WINDOW = sliding_window(20)


@pytest.mark.parametrize("mask_mod", [causal, WINDOW], ids=["causal", "window"])
@shapes
@dtypes
def test_attention_pieces(dtype, heads, group, head_dim, mask_mod):
    """All tokens at once, in chunks, and one by one, over the cache they need and a longer one."""
    case = Case(dtype, heads, group, head_dim, 90, mask_mod)
    want = case.run(BATCH_INVARIANT, [90])
    for sizes, extra in (([1], 0), ([3], 0), ([7, 1], 64), ([64], 128), ([90], 512)):
        assert torch.equal(case.run(BATCH_INVARIANT, sizes, extra), want)


def telling_keys(case):
    """Scores of 0 up to rounding, blown up: the order of additions along head_dim decides where a query looks."""
    half = case.q.shape[-1] // 2
    case.q = torch.cat((case.q[..., :half], case.q[..., :half]), -1) * 2.0**9
    case.k = torch.cat((case.k[..., :half], -case.k[..., :half]), -1) * 2.0**9
    return case


def telling_values(case):
    """Keys in equal pairs and values in opposite ones: a query that sees whole pairs gets 0 up to rounding."""
    case.k[:, 1::2], case.v[:, 1::2] = case.k[:, ::2], -case.v[:, ::2]
    return case


@pytest.mark.parametrize("tell", [telling_keys, telling_values])
@shapes
@dtypes
def test_attention_telling(dtype, heads, group, head_dim, tell):
    """Where rounding hides nothing."""
    case = tell(Case(dtype, heads, group, head_dim, 90))
    want = case.run(BATCH_INVARIANT, [90])
    assert want.isfinite().all()
    for sizes in ([1], [3], [7, 1], [64]):
        assert torch.equal(case.run(BATCH_INVARIANT, sizes), want)


@pytest.mark.parametrize("tell", [telling_keys, telling_values])
@dtypes
def test_attention_telling_differs(dtype, tell):
    case = tell(Case(dtype, 2, 3, 64, 90))
    assert not torch.equal(case.run(TWO_RECIPES, [1]), case.run(TWO_RECIPES, [90]))


@pytest.mark.parametrize("broken", [TWO_RECIPES, IS_CAUSAL], ids=["two recipes", "is_causal"])
@dtypes
def test_attention_pieces_differ(dtype, broken):
    case = Case(dtype, 2, 3, 64, 90)
    assert not torch.equal(case.run(broken, [90]), case.run(broken, [1]))


@pytest.mark.parametrize("mask_mod", [causal, sliding_window(300)], ids=["causal", "window"])
@pytest.mark.parametrize("group", [1, 3])
@dtypes
def test_attention_long(dtype, group, mask_mod):
    """Across the splits of 512 keys, one by one where it matters."""
    case = Case(dtype, 2, group, 64, 620, mask_mod)
    want, sizes = case.run(BATCH_INVARIANT, [620]), [500, *[1] * 30, 90]
    for pieces, extra in ((sizes, 0), ([200], 0), ([511, 1, 108], 512)):
        assert torch.equal(case.run(BATCH_INVARIANT, pieces, extra), want)
    assert not torch.equal(case.run(TWO_RECIPES, sizes), case.run(TWO_RECIPES, [620]))


@pytest.mark.parametrize("group", [1, 3, 5, 7])
@dtypes
def test_attention_of_any_number_of_tokens(dtype, group):
    """Whatever number of rows is left over after whole tiles: at every length, the last token as it is alone."""
    case = Case(dtype, 2, group, 64, 150)
    want, lengths = case.run(BATCH_INVARIANT, [1]), range(2, 151)
    last = lambda ops, n: case.piece(ops, case.cache(), 0, n)[:, -1]
    assert [n for n in lengths if not torch.equal(last(BATCH_INVARIANT, n), want[:, n - 1])] == []
    alone = case.run(TWO_RECIPES, [1])
    assert any(not torch.equal(last(TWO_RECIPES, n), alone[:, n - 1]) for n in lengths)


@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "invariant"])
@dtypes
def test_attention_is_laid_out_as_its_fake_says(dtype, ops, monkeypatch):
    """Compiled code reads a result by these strides. 11 tokens of 3 heads leave one row over, which is padded where a
    recipe wants whole tiles, as that of a processor without AMX does."""
    monkeypatch.setattr(kernels, "recipe", lambda *_: functools.partial(kernels.attend, tokens=2))
    case = Case(dtype, 1, 3, 64, 90, rows=2)
    as_called = [case.piece(ops, case.cache(), 0, count) for count in (1, 2, 11)]
    assert any(not y.is_contiguous() for y in as_called) == (ops is BATCH_INVARIANT)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    as_op = [case.piece(ops, case.cache(), 0, count) for count in (1, 2, 11)]
    assert all(y.is_contiguous() for y in as_op)
    assert all(torch.equal(*pair) for pair in zip(as_called[1:], as_op[1:], strict=True))


@pytest.mark.parametrize("mask_mod", [causal, WINDOW], ids=["causal", "window"])
@dtypes
def test_attention_of_one_token_compiled(dtype, mask_mod):
    """The loops that Inductor writes for FAST agree with SDPA, and look where the mask lets them."""
    case = Case(dtype, 2, 3, 64, 90, mask_mod, rows=2)
    eager, compiled = (case.cache() for _ in range(2))
    step = torch.compile(FAST.attention, fullgraph=True)
    for cache in (eager, compiled):
        case.piece(FAST, cache, 0, 70)
    want = case.piece(FAST, eager, 70, 71)
    got = case.piece(replace(FAST, attention=step), compiled, 70, 71)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == FP32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got, want, **tolerance)
    assert all(torch.equal(*pair) for pair in zip(eager, compiled, strict=True))
    case.mask_mod = sliding_window(5)
    wrong = case.piece(replace(FAST, attention=step), compiled, 70, 71)
    assert (wrong - want).abs().max() > 0.05


def staggered(case, ops):
    """Rows at different positions in one call, each against itself alone."""
    starts, alone, together = [0, 3, 40, 64, 127], [], case.cache()
    for row, start in enumerate(starts):
        one = Case.__new__(Case)
        one.__dict__ |= case.__dict__ | {x: getattr(case, x)[row : row + 1] for x in "qkv"}
        cache = one.cache()
        if start:
            one.piece(ops, cache, 0, start)
        for x, y in zip(together, cache, strict=True):
            x[row] = y[0]
        alone.append([one.piece(ops, cache, start + i, start + i + 1) for i in range(6)])
    steps = [case.piece(ops, together, [s + i for s in starts], 1) for i in range(6)]
    return torch.cat(steps, 1), torch.cat([torch.cat(row, 1) for row in alone])


@shapes
@dtypes
def test_attention_rows(dtype, heads, group, head_dim):
    for mask_mod in (causal, WINDOW):
        assert torch.equal(*staggered(Case(dtype, heads, group, head_dim, 140, mask_mod, rows=5), BATCH_INVARIANT))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_attention_rows_differ(dtype):
    """A query that sees its neighbours' longer spans in other tiles: broken on purpose, by the length of the mask."""

    def attention(q, k, v, k_cache, v_cache, pos, mask, scale):
        y = BATCH_INVARIANT.attention(q, k, v, k_cache, v_cache, pos, mask, scale)
        return y if mask[0].shape[-1] <= 64 else two_recipes(q, k, v, k_cache, v_cache, pos, mask, scale)

    case = Case(dtype, 2, 3, 16, 140, rows=5)
    assert not torch.equal(*staggered(case, replace(BATCH_INVARIANT, attention=attention)))


@pytest.mark.parametrize("length", [70, 530])
@dtypes
def test_attention_one_by_one(dtype, length, monkeypatch):
    """Where no tiling agrees with it, the reference runs, and gives the same bits."""
    case, calls, slow = Case(dtype, 2, 3, 64, length, rows=2), [], kernels.attend_safely
    sizes = [length - 20, 1]
    want = case.run(BATCH_INVARIANT, sizes)
    monkeypatch.setattr(kernels, "recipe", lambda *shape: kernels.attend_safely)
    monkeypatch.setattr(kernels, "attend_safely", lambda *args: calls.append(1) or slow(*args))
    assert torch.equal(case.run(BATCH_INVARIANT, sizes), want) and len(calls) == 21
    assert not torch.equal(case.run(TWO_RECIPES, sizes), want)


@dtypes
def test_recipe_sees_spans(dtype, monkeypatch):
    """A span over which keys are added up in another way is not used, and the others are."""
    sdpa, recipe = kernels.sdpa, kernels.recipe.__wrapped__
    in_double = lambda q, *others: sdpa(q.double(), *(x.double() for x in others[:3]), *others[3:]).to(q.dtype)
    spans = lambda: getattr(recipe(1, 2, 64, 3, dtype, torch.get_num_threads()), "keywords", {"spans": []})["spans"]
    want = spans()
    monkeypatch.setattr(kernels, "sdpa", lambda q, k, *args: (in_double if k.shape[2] == 128 else sdpa)(q, k, *args))
    assert spans() == [span for span in want if span != 128]


@pytest.mark.parametrize("mask_mod", [causal, WINDOW], ids=["causal", "window"])
@dtypes
def test_attention_accuracy(dtype, mask_mod):
    case = Case(dtype, 2, 3, 64, 600, mask_mod)
    q, k, v = (x.double() for x in case.qkv())
    i = torch.arange(600)
    scores = torch.einsum("btghd,bsgd->bghts", q.unflatten(2, (2, 3)), k) / 8
    weights = scores.masked_fill(~mask_mod(0, 0, i[:, None], i), float("-inf")).softmax(-1)
    exact = torch.einsum("bghts,bsgd->btghd", weights, v).flatten(2)
    size = torch.einsum("bghts,bsgd->btghd", weights, v.abs()).flatten(2)
    error = ((case.run(BATCH_INVARIANT, [600]).double() - exact).abs() / size).max()
    assert error < 16 * torch.finfo(dtype).eps
    blind = replace(BATCH_INVARIANT, mask=lambda mod, *args: FAST.mask(wider(mod), *args))
    assert ((case.run(blind, [600]).double() - exact).abs() / size).max() > 10 * error  # one key too few


def wider(mask_mod):
    return lambda b, h, q, k: mask_mod(b, h, q, k) & ((q != k) | (k == 0))


# ---- norms and other rows


def per_row(function, x):
    """Numbers of rows at which a function of rows differs from that of each row alone."""
    alone = torch.cat([function(row[None]) for row in x])
    return [n for n in ROWS if n <= len(x) and not torch.equal(function(x[:n]), alone[:n])]


ROWWISE = {
    "rms_norm": lambda x: BATCH_INVARIANT.rms_norm(x, randn(x.shape[-1], seed=1), 1e-6),
    "silu_mul": BATCH_INVARIANT.silu_mul,
    "silu_mul bf16": lambda x: BATCH_INVARIANT.silu_mul(x.bfloat16()),
    "silu_mul fp16": lambda x: BATCH_INVARIANT.silu_mul(x.half()),
    "log_softmax": BATCH_INVARIANT.log_softmax,
}


@pytest.mark.parametrize("width", [64, 134, 1002])
@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise(name, width):
    function = ROWWISE[name]
    x = randn(257, width) * 3
    assert per_row(function, x) == []
    assert torch.equal(function(x.flip(0)), function(x).flip(0))
    assert torch.equal(function(x[5:6].expand(9, -1)), function(x)[5:6].expand(9, -1))
    torch.set_num_threads(4)  # conftest.py sets it back
    assert torch.equal(function(x), torch.cat([function(row[None]) for row in x]))
    # Broken: sums over another split of a row when there is only one.
    halves = lambda x: torch.linalg.vector_norm(x.view(len(x), 2, -1).sum(1) if len(x) == 1 else x, dim=-1)
    assert per_row(lambda x: function(x) * halves(x)[:, None], x)


def test_rowwise_values():
    x, weight = randn(20, 134).double(), randn(134, seed=1)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(BATCH_INVARIANT.rms_norm(x.float(), weight, 1e-6).double(), exact, rtol=1e-6, atol=1e-6)
    exact = F.silu(x[:, :67]) * x[:, 67:]
    torch.testing.assert_close(BATCH_INVARIANT.silu_mul(x.float()).double(), exact, rtol=1e-6, atol=1e-6)
    extreme = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])
    assert BATCH_INVARIANT.silu_mul(extreme).tolist() == [[0.0, 200.0, 0.0]]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiling_is_refused_where_it_changes_bits(monkeypatch):
    """PyTorch before 2.13 drops roundings on a CPU: with the flag one line, without it as before."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    monkeypatch.setattr(torch, "compile", lambda stack, **options: stack)
    args = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(n_experts=1), stack=None)
    args.ops = FAST
    generate.set_up(args, True, True)
    args.ops = BATCH_INVARIANT
    generate.set_up(args, False, False)
    for flags in ((True, False), (False, True)):
        with pytest.raises(InputError, match="PyTorch 2.13"):
            generate.set_up(args, *flags)


@needs_compiler
def test_rowwise_compiled(dynamo):
    """rms_norm and silu_mul in one graph, roundings between them and all."""
    weight = randn(134, seed=1)

    def both(ops, x):
        return ops.silu_mul(ops.rms_norm(x.float(), weight, 1e-6).to(x.dtype))

    def compiled(ops, **options):
        return torch.compile(both, fullgraph=True, dynamic=True, options=options)

    exact = compiled(BATCH_INVARIANT, **BATCH_INVARIANT.compile_options)
    x = randn(33, 134, dtype=BF16) * 3
    for n in (2, 7, 33):
        assert torch.equal(exact(BATCH_INVARIANT, x[:n]), both(BATCH_INVARIANT, x[:n]))
    x = randn(1000, 134) * 3
    assert torch.equal(exact(BATCH_INVARIANT, x), both(BATCH_INVARIANT, x))
    by_pow = lambda x, w, eps: x / (kernels.vector_norm(x).square() / x.shape[-1] + eps).pow(0.5) * w
    broken = replace(BATCH_INVARIANT, rms_norm=by_pow)
    assert not torch.equal(compiled(broken, **BATCH_INVARIANT.compile_options)(broken, x), both(broken, x))
    x = randn(257, 134, dtype=BF16)
    assert not torch.equal(compiled(FAST)(FAST, x), both(FAST, x))


# ---- models

MODELS = {
    "2 KV heads": {},
    "3 KV heads, biases": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    | {"intermediate_size": 192, "attention_bias": True, "mlp_bias": True},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "mixture": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 5, "num_experts_per_tok": 2},
}


def build(folder, ops, dtype, name="2 KV heads"):
    """A random model, norms and biases random too."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
    config |= {"max_position_embeddings": 256} | MODELS[name]
    (folder / "config.json").write_text(json.dumps(config))
    model = Transformer(ModelConfig.from_file(folder / "config.json"), ops, CPU, dtype)
    for i, taker in enumerate(model.takers):
        tensors = [randn(*shape, seed=i) * 0.3 for shape in taker.shapes.values()]
        is_norm = len(taker.shapes) == 1 and tensors[0].dim() == 1
        taker.load([(t + is_norm).to(dtype) for t in tensors])
    return model


def leaves_by_rows(x, packed):
    """Broken: one row alone is summed whole, several are summed leaf by leaf."""
    if x.numel() > x.shape[-1] or len(packed.leaves) == 1:
        return packed(x)
    weight = torch.cat([leaf.to_dense() if leaf.is_mkldnn else leaf for leaf in packed.leaves], dim=1)
    return F.linear(x, weight, packed.bias)


LEAVES_BY_ROWS = replace(BATCH_INVARIANT, linear=leaves_by_rows)
BROKEN = {"leaves by rows": LEAVES_BY_ROWS, "is_causal": IS_CAUSAL}
kinds = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
names = pytest.mark.parametrize("name", MODELS)


@torch.inference_mode()
def stacked(model, sizes, length=72):
    """Logits of a text, fed in pieces."""
    ids = torch.randint(300, (1, length), generator=torch.Generator().manual_seed(0))
    cache, out, start = model.new_cache(1, length), [], 0
    for size in sizes * length:
        end = min(start + size, length)
        if start < end:
            out.append(model(ids[:, start:end], torch.arange(start, end)[None], cache, end))
        start = end
    return torch.cat(out, 1)


@names
@kinds
def test_stack(tmp_path, dtype, name):
    """One call of T tokens equals T calls of one."""
    model = build(tmp_path, BATCH_INVARIANT, dtype, name)
    want = stacked(model, [72])
    assert torch.equal(stacked(model, [1]), want) and torch.equal(stacked(model, [5, 1, 30]), want)


@pytest.mark.parametrize("broken", BROKEN)
@kinds
def test_stack_broken(tmp_path, dtype, broken):
    model = build(tmp_path, BROKEN[broken], dtype)
    assert not torch.equal(stacked(model, [1]), stacked(model, [72]))


def test_stack_flag_off(tmp_path):
    model = build(tmp_path, FAST, FP32)
    assert not torch.equal(stacked(model, [1]), stacked(model, [72]))


def ask(i, length, new=8, **fields):
    ids = torch.randint(300, (length,), generator=torch.Generator().manual_seed(i)).tolist()
    return Request(i, "", ids, max_new_tokens=new, **fields)


def answers(model, requests, slots=1, room=144, chunk=0):
    engine = Engine(model, Tokenizer(None), slots, room, chunk)
    return {c.request.id: (c.tokens, c.logprobs) for c, _ in engine.generate(requests) if c.finish_reason}


OPTIONS = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}, {"top_k": 3, "seed": 9}]
LENGTHS = [1, 9, 10, 30, 64, 65, 3, 17, 100, 2]
MIXED = [ask(i, LENGTHS[i % 10], 3 + i % 7, **OPTIONS[i % 4]) for i in range(24)]


@names
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_batch(tmp_path, dtype, name):
    """Tokens and logprobs in 2 to 20 slots, refilled as they empty, and in another order."""
    model = build(tmp_path, BATCH_INVARIANT, dtype, name)
    want = answers(model, MIXED)
    assert len({str(answer) for answer in want.values()}) == len(MIXED)
    sizes = range(2, 21) if dtype == FP32 and name == "2 KV heads" else (2, 5, 17)
    for slots in sizes:
        assert answers(model, MIXED, slots) == want
        assert answers(model, MIXED[::-1], slots) == want or slots > 5
    for chunk in (1, 3, 7, 64):
        assert answers(model, MIXED[:10], 3, chunk=chunk).items() <= want.items()
    for room in (108, 200, 256):
        assert answers(model, MIXED[:10], 3, room).items() <= want.items()


@pytest.mark.parametrize("dtype, broken", [(FP32, "leaves by rows"), (FP16, "leaves by rows"), (FP32, "flag off")])
def test_any_batch_broken(tmp_path, dtype, broken):
    model = build(tmp_path, BROKEN.get(broken, FAST), dtype)
    assert answers(model, MIXED, 5) != answers(model, MIXED)


def test_chunks_broken(tmp_path):
    model = build(tmp_path, IS_CAUSAL, FP32)
    assert answers(model, MIXED[:10], chunk=7) != answers(model, MIXED[:10])


def among(model, length, **fields):
    """One request among neighbours with prompts of this length."""
    neighbours = [ask(50 + i, length, 9, **fields) for i in range(4)]
    return answers(model, [*neighbours[:2], MIXED[1], *neighbours[2:]], 5)[MIXED[1].id]


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_neighbours(tmp_path, dtype):
    model = build(tmp_path, BATCH_INVARIANT, dtype)
    want = answers(model, MIXED)[MIXED[1].id]
    for length in (1, 9, 10, 64, 128):
        for fields in OPTIONS:
            assert among(model, length, **fields) == want


def test_neighbours_broken(tmp_path, monkeypatch):
    """Noise by row."""
    model = build(tmp_path, BATCH_INVARIANT, FP32)
    want = answers(model, MIXED)[MIXED[1].id]
    monkeypatch.setattr(generate, "gumbel", noise_by_row)
    assert among(model, 9) != want


@names
@kinds
def test_score_exact(tmp_path, dtype, name):
    model = build(tmp_path, BATCH_INVARIANT, dtype, name)
    for slots, chunk in ((1, 0), (4, 5)):
        want, engine = answers(model, MIXED, slots), Engine(model, Tokenizer(None), 1, 144, chunk)
        for r in MIXED:
            tokens, logprobs = want[r.id]
            assert engine.score(r.prompt_ids, tokens) == logprobs


@pytest.mark.parametrize("broken", ["leaves by rows", "is_causal", "flag off"])
def test_score_broken(tmp_path, broken):
    model = build(tmp_path, BROKEN.get(broken, FAST), FP32)
    want, engine = answers(model, MIXED), Engine(model, Tokenizer(None), 1, 144)
    assert any(engine.score(r.prompt_ids, want[r.id][0]) != want[r.id][1] for r in MIXED)


# ---- the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), intermediate_size=128)


def lines_of(capsys, tiny, *flags):
    """The JSON lines of a run in this process, as text, and its stats."""
    generate.main(["--checkpoint_path", str(tiny), "--precision", "fp32", "--json", *map(str, flags)])
    *lines, stats = capsys.readouterr().out.split("\n")[:-1]
    return lines, json.loads(stats)["stats"]


@pytest.fixture(scope="module")
def generated(tiny, tmp_path_factory):
    """A file of completions, with the stats line, and its lines."""
    path = tmp_path_factory.mktemp("run") / "completions.jsonl"
    flags = ["--prompt", "The quick", "--prompt", "ein Wörtchen 🙂", "--prompt", "40", "--num_samples", "2"]
    flags += ["--max_new_tokens", "12", "--batch_size", "4", "--ignore_eos", "--deterministic"]
    with pytest.MonkeyPatch.context() as patch, open(path, "w", encoding="utf-8") as file:
        patch.setattr(sys, "stdout", file)
        generate.main(["--checkpoint_path", str(tiny), "--precision", "fp32", "--json", *flags])
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(lines[-1])["stats"]["deterministic"] is True and len(lines) == 7
    return path, lines[:-1]


def test_score_prints_the_same(tiny, generated, capsys):
    path, lines = generated
    for flags in ([], ["--prefill_chunk", "5"], ["--batch_size", "3"]):
        got, stats = lines_of(capsys, tiny, "--deterministic", "--score", path, *flags)
        assert got == lines and stats["deterministic"] is True and stats["new_tokens"] == 0
    got, stats = lines_of(capsys, tiny, "--score", path)
    assert got != lines and stats["deterministic"] is False, "with the flag off, other bits"
    without = [[json.loads(line) | {"logprobs": 0} for line in some] for some in (got, lines)]
    assert without[0] == without[1]


def test_score_recomputes(tiny, generated, tmp_path, capsys):
    """Logprobs are not copied, other fields are kept as they are, and none but the ids is needed."""
    first = json.loads(generated[1][0])
    bare = {"prompt_ids": first["prompt_ids"], "tokens": first["tokens"]}
    entries = [first | {"logprobs": [0.0], "mine": {"é": [1, None]}}, bare, bare | {"tokens": []}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    got = [json.loads(line) for line in lines_of(capsys, tiny, "--deterministic", "--score", path)[0]]
    assert got[0] == first | {"mine": {"é": [1, None]}}
    assert got[1] == bare | {"logprobs": first["logprobs"]}
    assert got[2] == bare | {"tokens": [], "logprobs": []}


def test_score_output(tiny, generated, tmp_path, capsys):
    """A rerun skips what the file holds, a torn line included."""
    (path, lines), output = generated, tmp_path / "scored.jsonl"
    text = "".join(line + "\n" for line in lines)
    run = lambda: lines_of(capsys, tiny, "--deterministic", "--score", path, "--output", output)[0]
    assert run() == lines and output.read_text(encoding="utf-8") == text
    assert run() == [] and output.read_text(encoding="utf-8") == text
    output.write_bytes(text.encode()[: -len(lines[-1].encode()) // 2])
    assert run() == lines[-1:] and output.read_text(encoding="utf-8") == text


GOOD = {"id": 0, "sample": 0, "prompt_ids": [1, 2], "tokens": [3]}
BAD_LINES = {
    "no JSON": "{",
    "no object": "[1]",
    "a number": "7",
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
    """Runs generate.py as a script in this process, which must end with status 2 and one line on standard error."""
    script = str(generate.download.DEFAULT.parent.parent / "generate.py")

    def run(*flags):
        argv = [script, "--checkpoint_path", tiny, "--precision", "fp32", "--json", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run


@pytest.mark.parametrize("line", BAD_LINES)
def test_score_bad_line(refused, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + BAD_LINES[line] + "\n" + json.dumps(GOOD))
    err = refused("--score", path, "--output", tmp_path / "out")
    assert "line 3 " in err and str(path) in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"stats": {}}\n', b"\xff\xfe", None])
def test_score_bad_file(refused, tmp_path, content):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused("--deterministic", "--score", path)


@pytest.mark.parametrize("other", [["--prompt", "a"], ["--prompts_file", "x"], ["--interactive"]])
def test_score_excludes(refused, generated, other):
    assert "excludes" in refused("--score", generated[0], *other)


def test_score_of_the_whole_context(tiny, tmp_path, capsys):
    path = tmp_path / "full.jsonl"
    path.write_text(json.dumps(GOOD | {"tokens": [1] * 254}))
    (line,), _ = lines_of(capsys, tiny, "--score", path)
    assert len(json.loads(line)["logprobs"]) == 254


@needs_compiler
def test_compiled_equals_eager(dynamo, tmp_path, capsys):
    """The same lines, logprobs and all, from graphs."""
    tiny = write_checkpoint(tmp_path, num_hidden_layers=1, intermediate_size=128)
    flags = [word for n in (1, 9, 40, 70) for word in ("--prompt", n)] + ["--max_new_tokens", 5, "--ignore_eos"]
    want, _ = lines_of(capsys, tiny, "--deterministic", *flags)
    graphs = ["--compile", "--compile_prefill", "--batch_size", 3]
    assert lines_of(capsys, tiny, "--deterministic", *flags, *graphs)[0] == want
    assert lines_of(capsys, tiny, *flags)[0] != want
