"""The Triton kernels against fp64, and their order of summation bit by bit: in Triton's interpreter
where there is no GPU (conftest.py switches it on), with a dot that adds as a GPU does."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import BATCH_INVARIANT, FAST, SlidingWindow, TritonPacked, add_leaves, causal
from scripts import row_kernels

masks = pytest.importorskip("tests.masks")  # where there is Triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest output. The interpreter rounds to bfloat16 by truncation.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
BIG, TINY = 1024.0, 2.0**-15  # in fp32, BIG + TINY is BIG


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs and workspaces start as NaN, so that a result shows what was never written."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        x = new_empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def dot_in_ascending_k(monkeypatch):
    """Where kernels are interpreted."""
    if DEVICE == "cpu":
        pytest.importorskip("tests.interpreter").install(monkeypatch.setattr)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_close(got, want):
    assert (got.double() - want).abs().max() <= TOLERANCE[got.dtype] * want.abs().max()


def bits(x):
    """The bits of floating point numbers: -0 and 0 told apart."""
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


def same(a, b):
    return torch.equal(bits(a), bits(b))


def test_packed_kernels_stay_behind_the_import_of_triton():
    with open(kernels.__file__) as f:
        lines = [line for line in f if "import triton" in line]
    assert lines and all(line.startswith("    ") for line in lines)


# ---- linear layers


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("M", "N", "K", "leaves", "bias"),
    [
        (1, 70, 160, 1, True),
        (1, 64, 96, 3, False),
        (3, 33, 512, 8, True),
        (16, 1, 64, 2, True),
        (17, 130, 96, 1, False),
        (65, 129, 192, 2, True),
        (130, 40, 224, 7, False),
    ],
)
def test_linear_against_fp64(M, N, K, leaves, bias, dtype):
    x, w = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype)
    b = randn(N, dtype=dtype) * 9 if bias else None
    want = x.double() @ w.double().T
    if bias:
        want += b.double()
    packed = TritonPacked(w, b, leaves)
    assert_close(packed(x), want)
    assert_close(packed(x.view(M, 1, 1, K)).view(M, N), want)


def quantized(N, K, bits, group):
    """A random weight of TritonPacked's layout, what comes with it, and the weight that both stand
    for: a code of 4 bits is as many steps from the value of code 8, which is kept in bfloat16."""
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (N, K)).to(DEVICE)
    scale = ((torch.rand(N, K // group) + 0.5).to(DEVICE) / high).bfloat16().double()
    steps = scale.repeat_interleave(group, dim=1)
    if bits == 8:
        return codes.to(torch.int8), {"scale": scale.float()}, codes * steps
    zero = (torch.rand(N, K // group) * 15).half().double().to(DEVICE)
    middle = (scale * (8 - zero)).float().bfloat16().double()
    weight = (codes - 8) * steps + middle.repeat_interleave(group, dim=1)
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return pairs, {"scale": scale.float(), "zero": zero.float()}, weight


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("bits", "group", "leaves"),
    [(8, 256, 1), (8, 256, 2), (8, 256, 8), (4, 32, 2), (4, 64, 1), (4, 128, 2)],
)
def test_quantized_linear_is_the_linear_of_its_weight(bits, group, leaves, dtype):
    codes, grid, weight = quantized(70, 256, bits, group)
    for M in (1, 18, 70):
        x, bias = randn(M, 256, dtype=dtype), randn(70, dtype=dtype)
        y = TritonPacked(codes, bias, leaves, **grid)(x)
        # 8 bits are scaled after their sum, in fp32; 4 bits are rounded once, to the dtype of x.
        rounded = weight.to(dtype) if bits == 4 else weight
        assert_close(y, x.double() @ rounded.double().T + bias.double())
        if bits == 4:
            assert same(y, TritonPacked(weight.to(dtype), bias, leaves)(x))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_codes_of_8_bits_are_exact(dtype):
    """Each that there is, in each place of a word."""
    codes = torch.arange(-128, 128, device=DEVICE).repeat(8, 1)
    codes = torch.stack([row.roll(i) for i, row in enumerate(codes)]).to(torch.int8)
    ones = torch.ones(8, 1, device=DEVICE)
    x = torch.eye(256, device=DEVICE, dtype=dtype)
    assert same(TritonPacked(codes, scale=ones)(x), codes.T.to(dtype))


def test_4_bits_are_a_thirtieth_of_a_step_from_what_they_stand_for_at_most():
    """In fp32, which shows the rounding of what comes with them alone."""
    codes, grid, _ = quantized(32, 256, 4, 32)
    scale, zero = (x.double().repeat_interleave(32, dim=1) for x in grid.values())
    exact = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    x = torch.eye(256, device=DEVICE)
    error = (TritonPacked(codes, **grid)(x).T - (exact - zero) * scale).abs() / scale
    assert 0 < error.max() < 0.03


def test_few_programs_read_further_ahead(monkeypatch):
    """Of up to 16 rows. Programs of the same weight stand side by side."""
    launched = []

    class Linear:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, options["num_stages"]))

    monkeypatch.setattr(kernels, "triton_kernels", lambda: SimpleNamespace(linear=Linear()))
    for N, M, leaves in ((64 * 132, 16, 1), (64 * 133, 1, 1), (64 * 33, 1, 8), (64, 17, 1)):
        TritonPacked(torch.empty(N, 32 * leaves), None, leaves)(torch.empty(M, 32 * leaves))
    TritonPacked(torch.empty(256, 32))(torch.empty(300, 32))
    assert launched[:2] == [((1, 132, 1), 7), ((1, 133, 1), 4)]
    assert launched[2:] == [((1, 33, 8), 4), ((1, 1, 1), 4), ((3, 2, 1), 3)]


def sums_of_leaves(values):
    """The sum of each row [P, leaves] as a product makes it: of a row of ones with weights that
    have each value once, somewhere in its leaf."""
    P, leaves = values.shape
    w = torch.zeros(P, 32 * leaves)
    for i in range(leaves):
        w[:, 32 * i + 7 * i % 32] = values[:, i]
    ones = torch.ones(1, 32 * leaves, device=DEVICE)
    return TritonPacked(w.to(DEVICE), None, leaves)(ones)[0].cpu()


def telling_rows(length, count):
    """BIG, -BIG and TINY, or the first of them, in all their places among zeros: the sum of a row
    tells in which order it was added."""
    telling = (BIG, -BIG, TINY)[:count]
    rows = []
    for places in itertools.permutations(range(length), count):
        row = [0.0] * length
        for place, value in zip(places, telling, strict=True):
            row[place] = value
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("leaves", [2, 3, 4, 5, 7, 8])
def test_leaves_are_added_in_the_fixed_tree(leaves):
    values = telling_rows(leaves, min(leaves, 3))
    got = sums_of_leaves(values)
    parts = list(values.unbind(1))
    assert torch.equal(got, add_leaves(parts))
    # A negative control: from left to right is another order wherever there is a tree.
    is_left_to_right = torch.equal(got, functools.reduce(torch.add, parts))
    assert is_left_to_right == (leaves not in (4, 8))


def test_one_leaf_is_added_in_ascending_k():
    values = telling_rows(5, 3)
    w = torch.zeros(len(values), 160)
    w[:, ::32] = values  # fp32 walks 32 at a time
    got = TritonPacked(w.to(DEVICE))(torch.ones(1, 160, device=DEVICE))[0].cpu()
    for row, total in zip(values.tolist(), got.tolist(), strict=True):
        tiny_is_last = row.index(TINY) > max(row.index(BIG), row.index(-BIG))
        assert total == (TINY if tiny_is_last else 0)


def test_bias_is_added_once_and_after_the_tree():
    w, x = torch.zeros(1, 256, device=DEVICE), torch.ones(1, 256, device=DEVICE)
    w[0, 0], w[0, 128] = BIG, -BIG
    bias = torch.full((1,), TINY, device=DEVICE)
    assert TritonPacked(w, bias, 8)(x).item() == TINY


@pytest.mark.parametrize("leaves", [1, 8])
def test_a_row_keeps_its_bits_among_others(leaves):
    x, packed = randn(130, 256), TritonPacked(randn(70, 256), None, leaves)
    want = packed(x)
    for M in (1, 7, 16, 17, 33, 64, 65, 130):
        assert same(packed(x[:M]), want[:M])
        assert same(packed(x[:M].flip(0)), want[:M].flip(0))


def test_another_order_of_leaves_changes_bits():
    """The negative control of the two tests above."""
    x, w = randn(4, 512), randn(70, 512)
    order = torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])
    moved = [t.view(-1, 8, 64)[:, order].reshape(t.shape) for t in (x, w)]
    assert not same(TritonPacked(w, None, 8)(x), TritonPacked(moved[1], None, 8)(moved[0]))


# ---- attention


def attention_case(pos, T, G, group, D, L, dtype=torch.float32):
    """Random queries, keys and values of rows whose new tokens begin at `pos`, over a cache that
    ends in NaN."""
    pos_BT = torch.tensor(pos, device=DEVICE)[:, None] + torch.arange(T, device=DEVICE)
    q, k, v = (randn(len(pos), T, heads, D, dtype=dtype) for heads in (G * group, G, G))
    caches = [randn(len(pos), G, L, D, dtype=dtype) for _ in "kv"]
    for cache in caches:
        for b, first in enumerate(pos):
            cache[b, :, first:] = math.nan
    return q, k, v, *caches, pos_BT


def run(case, mask_mod=causal, ops=FAST):
    q, k, v, k_cache, v_cache, pos = case
    caches = k_cache.clone(), v_cache.clone()
    G = k.shape[2]
    mask = masks.on_gpu(mask_mod, G, q.shape[2] // G, DEVICE, ops)
    return masks.attend(q, k, v, *caches, pos, mask, q.shape[3] ** -0.5)


def attention_in_fp64(case, mask_mod):
    q, k, v, k_cache, v_cache, pos = (x.double() if x.is_floating_point() else x for x in case)
    kernels.write_cache(k, v, k_cache, v_cache, pos)
    group, end = q.shape[2] // k.shape[2], int(pos.max()) + 1
    keys, values = (
        x[:, :, :end].nan_to_num().repeat_interleave(group, dim=1) for x in (k_cache, v_cache)
    )
    b, h = (torch.arange(n, device=DEVICE) for n in (len(q), q.shape[2]))
    kv_idx = torch.arange(end, device=DEVICE)
    keep = mask_mod(b.view(-1, 1, 1, 1), h.view(-1, 1, 1), pos[:, None, :, None], kv_idx)
    scores = q.transpose(1, 2) @ keys.mT * q.shape[3] ** -0.5
    scores = scores.masked_fill(~keep, -math.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


CASES = {
    "one token": ([0], 1, 1, 1, 16, 64),
    "short prompt, ragged rows": ([0, 3], 37, 2, 3, 16, 64),
    "decode at several positions": ([5, 511, 512, 1030], 1, 2, 3, 32, 1088),
    "verify over a split's edge": ([508, 100], 9, 1, 4, 128, 1024),
    "prefill over splits": ([500], 70, 1, 1, 96, 640),
    "a chunk behind 1000 keys": ([1000], 30, 1, 4, 64, 1030),
}


SINKS = masks.Sinks(first_tokens=4, window=21)


@pytest.mark.parametrize(
    ("mask_mod", "dtype"),
    [
        (causal, torch.float32),
        (SlidingWindow(21), torch.float32),
        (SlidingWindow(600), torch.float32),
        (SlidingWindow(600), torch.bfloat16),
        (SINKS, torch.float32),
        (masks.odd_or_near, torch.float32),
    ],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_against_fp64(case, mask_mod, dtype):
    case = attention_case(*case, dtype)
    assert_close(run(case, mask_mod), attention_in_fp64(case, mask_mod))


@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "exact"])
@pytest.mark.parametrize("mask_mod", [SlidingWindow(21), SINKS, masks.odd_or_near])
def test_a_mask_has_the_bits_of_a_dense_one(mask_mod, ops):
    """Which PyTorch has made of the same source. A window skips what is behind it."""
    for case in ([5, 511, 1030], 1, 2, 3, 32, 1088), ([500], 70, 1, 2, 16, 640):
        B, G, R, length = len(case[0]), case[2], case[3], case[5]
        case = attention_case(*case)
        got = run(case, mask_mod, ops)
        tables = [masks.dense(other, B, G * R, length) for other in (mask_mod, causal)]
        want, other = (run(case, masks.Table(x.to(DEVICE), G * R, length), ops) for x in tables)
        assert same(got, want) and not same(got, other)


def test_queries_are_read_where_they_lie():
    """Among keys, as a model has them, or each head apart."""
    q, k, v, *others = case = attention_case([5, 37], 9, 2, 3, 16, 64)
    want = run(case)
    among = torch.cat((q, k), dim=2).split((6, 2), dim=2)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not among[0].is_contiguous() and not apart[0].is_contiguous()
    assert same(run((*among, v, *others)), want)
    assert same(run((*apart, *others)), want)
    first = [x[:1] for x in (*apart, *others)]
    assert same(run(first), want[:1])


def test_masks_of_one_kind_are_one_kernel(monkeypatch):
    """They differ in numbers that it is given; masks of two kinds do not."""
    kernel = kernels.triton_kernels()
    seen = []

    class Attention:
        def __getitem__(self, grid):
            def launch(*args, **options):
                seen.append((args[7], args[13:15]))
                return kernel.attention[grid](*args, **options)

            return launch

    watched = SimpleNamespace(attention=Attention(), jit=kernel.jit)
    monkeypatch.setattr(kernels, "triton_kernels", lambda: watched)
    case = attention_case(*CASES["one token"])
    kinds = [SlidingWindow(21), SlidingWindow(64), masks.Sinks(21, 64), masks.odd_or_near]
    for mask_mod in kinds:
        run(case, mask_mod)
    numbers, functions = zip(*seen, strict=True)
    assert numbers == (((21,),), ((64,),), ((21, 64),), ())
    assert functions[0] == functions[1] and len(set(functions)) == 3


def piece(case, rows, tokens):
    """What these rows and new tokens are given when their predecessors are in the cache."""
    q, k, v, k_cache, v_cache, pos = case
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    before = slice(tokens.start)
    kernels.write_cache(k[:, before], v[:, before], k_cache, v_cache, pos[:, before])
    new = (x[rows, tokens] for x in (q, k, v))
    return *new, k_cache[rows], v_cache[rows], pos[rows, tokens]


@pytest.mark.parametrize(
    ("G", "group", "mask_mod"),
    [
        pytest.param(2, 1, SlidingWindow(530), marks=pytest.mark.slow),
        (1, 3, causal),
        (1, 4, SlidingWindow(21)),
        pytest.param(1, 2, SINKS, marks=pytest.mark.slow),
    ],
)
def test_decode_verify_and_chunks_have_the_bits_of_prefill(G, group, mask_mod):
    case = attention_case([490, 958], 72, G, group, 16, 1088)
    whole = run(case, mask_mod)
    both = slice(0, 2)
    first, second = slice(0, 1), slice(1, 2)
    pieces = [(both, t, t + 1) for t in (0, 21, 22, 53, 71)]  # 511 and 512 among them, and 1011
    pieces += [(second, 65, 66), (second, 66, 67), (both, 20, 25), (second, 60, 69)]
    pieces += [(first, 3, 72), (both, 0, 70), (second, 5, 72)]
    for rows, start, end in pieces:
        part = run(piece(case, rows, slice(start, end)), mask_mod)
        assert same(part, whole[rows, start:end]), (rows, start, end)


def test_another_split_size_changes_bits(monkeypatch):
    """The negative control of the test above, in prefill, and in decode, where only the last 9
    tokens are new."""
    case = attention_case([958], 72, 1, 3, 16, 1088)
    want = run(case)
    monkeypatch.setattr(kernels, "SPLIT", 256)
    assert not same(run(case), want)
    assert not same(run(piece(case, slice(0, 1), slice(63, 72))), want[:, 63:])


def test_both_ways_through_attention_were_taken(monkeypatch):
    taken = []
    kernel = kernels.triton_kernels()

    class Attention:
        def __getitem__(self, grid):
            taken.append(grid)
            return kernel.attention[grid]

    watched = SimpleNamespace(attention=Attention(), jit=kernel.jit)
    monkeypatch.setattr(kernels, "triton_kernels", lambda: watched)
    run(attention_case([958], 72, 1, 3, 16, 1088))
    assert taken == [(4, 1, 1)]
    run(attention_case([958], 9, 1, 3, 16, 1088))
    assert taken[1:] == [(1, 1, 3), (1, 1, 1)]


# ---- one row at a time


@pytest.mark.parametrize("n", [16, 77, 128, 5000])
def test_rms_norm_against_fp64(n):
    x, weight = randn(2, 5, n)[:, 1:], randn(n)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = kernels.gpu_rms_norm(x, weight, 1e-5)
    assert_close(got, want)
    for b, t in itertools.product(range(2), range(4)):
        assert same(kernels.gpu_rms_norm(x[b, t], weight, 1e-5), got[b, t])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [16, 77, 5000])
def test_row_kernels_against_fp64(n, dtype):
    """Rows that begin anywhere, and those of a table whose rows do not follow each other."""
    x, weight = randn(2, 5, n)[:, 1:], randn(n)
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(row_kernels.rms_norm(x, weight, 1e-5, dtype), wide / root * weight.double())

    gate_up = (3 * randn(2, 5, 2 * n)[:, 1:]).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(row_kernels.silu_mul(gate_up), gate * gate.sigmoid() * up)
    extreme = torch.tensor([[-200.0, 200.0, -0.0, 3.0, 1.0, 5.0]], device=DEVICE, dtype=dtype)
    assert row_kernels.silu_mul(extreme).tolist() == [[0.0, 200.0, 0.0]]


def test_a_row_alone_has_the_bits_of_row_kernels():
    n = 1001
    x, weight, gate_up = randn(2, 5, n)[:, 1:], randn(n), randn(2, 5, 2 * n)[:, 1:]
    normed = row_kernels.rms_norm(x, weight, 1e-5, torch.float32)
    gated = row_kernels.silu_mul(gate_up)
    for b, t in itertools.product(range(2), range(4)):
        alone = row_kernels.rms_norm(x[b, t], weight, 1e-5, torch.float32)
        assert same(alone, normed[b, t])
        assert same(row_kernels.silu_mul(gate_up[b, t]), gated[b, t])
    # A negative control: PyTorch's kernel adds in another order.
    assert not same(kernels.gpu_rms_norm(x, weight, 1e-5), normed)


@pytest.mark.parametrize("n", [5, 4096, 9001])
def test_log_softmax_against_fp64(n):
    logits = randn(3, n) * 5
    logits[1, n // 2 :] = -math.inf
    want, got = logits.double().log_softmax(-1), BATCH_INVARIANT.log_softmax(logits)
    assert torch.equal(got == -math.inf, want == -math.inf)
    assert_close(got[want > -math.inf], want[want > -math.inf])
    for i in range(3):
        assert same(BATCH_INVARIANT.log_softmax(logits[i : i + 1]), got[i : i + 1])


def test_compiled_graphs_call_the_kernels_whole():
    packed = TritonPacked(randn(48, 48), None, 1)
    case = attention_case([3], 5, 1, 3, 16, 64)
    mask = masks.on_gpu(causal, 1, 3, DEVICE)

    def layer(q, k, v, k_cache, v_cache, pos):
        y = masks.attend(q, k, v, k_cache, v_cache, pos, mask, 0.25)
        y = kernels.gpu_rms_norm(packed(y), packed.weight[0], 1e-5)
        y = row_kernels.rms_norm(y, packed.weight[1], 1e-5, torch.float16)
        return row_kernels.silu_mul(y)

    want = layer(*(x.clone() for x in case))
    caches = [x.clone() for x in case]
    assert same(torch.compile(layer, backend="aot_eager", fullgraph=True)(*caches), want)
    assert (
        not caches[3][:, :, :8].isnan().any()
    )  # what the op wrote is in the cache that it was given
