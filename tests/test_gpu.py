"""Bit comparisons of the deterministic kernels on a CUDA device: run with pytest -m gpu. Without
one, that command runs them in Triton's interpreter, with fewer and smaller cases: it shows that the
tests work, and nothing about a card."""

import copy
import json
import math

import pytest
import torch

import kernels
from kernels import BATCH_INVARIANT, SlidingWindow, TritonPacked, causal
from model import Transformer
from scripts import machine, row_kernels, row_loops
from scripts.loading import read_config

masks = pytest.importorskip("tests.masks")  # where there is Triton
pytestmark = pytest.mark.gpu
CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CARD else "cpu")
ROWS = (1, 2, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
if not CARD:
    # Half precision would be another dot of the interpreter.
    ROWS, DTYPES = (1, 2, 17, 65), (torch.float32,)


@pytest.fixture(autouse=True)
def dot_in_ascending_k(monkeypatch):
    """Where kernels are interpreted."""
    if not CARD:
        pytest.importorskip("tests.interpreter").install(monkeypatch.setattr)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def randint(low, high, *shape):
    return torch.randint(low, high, shape, device=DEVICE)


# ---- linear layers


def weights(N, K, dtype):
    """One of each layout, with what comes with it: as it is, 8 bits by row, 4 bits by groups of
    64."""
    scale = torch.rand(N, K // 64, device=DEVICE) / 8
    zero = randint(0, 16, *scale.shape).float()
    yield randn(N, K, dtype=dtype), {}
    yield randint(-128, 128, N, K).to(torch.int8), {"scale": scale[:, :1].contiguous()}
    yield randint(0, 256, N, K // 2).to(torch.uint8), {"scale": scale, "zero": zero}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leaves", [1, 2, 3, 8])
def test_rows_keep_their_bits_at_every_m_and_with_every_launch(leaves, dtype, monkeypatch):
    """Of one leaf, in half precision only after its one rounding; of several, in fp32."""
    N, K = (333, 1536) if CARD else (70, 64 * leaves)
    x = randn(max(ROWS), K, dtype=dtype)
    launches = dict(TritonPacked.LAUNCHES)
    for weight, grid in weights(N, K, dtype):
        packed = TritonPacked(weight, randn(N, dtype=dtype), leaves, **grid)
        want = packed(x)
        for M in ROWS:
            assert torch.equal(packed(x[:M]), want[:M]), (weight.dtype, M)
            assert torch.equal(packed(x[-M:].flip(0)), want[-M:].flip(0)), (weight.dtype, M)
        for launch in launches.values():
            monkeypatch.setattr(TritonPacked, "LAUNCHES", {math.inf: launch})
            assert torch.equal(packed(x), want), (weight.dtype, launch)
        monkeypatch.setattr(TritonPacked, "LAUNCHES", launches)


def test_a_sum_in_fp32_has_the_same_bits_with_every_launch(monkeypatch):
    """Before the one rounding, which hides much."""
    M, N, K = (257, 333, 1024) if CARD else (17, 70, 128)
    x, w = randn(M, K, dtype=DTYPES[0]), randn(N, K, dtype=DTYPES[0])
    packed = TritonPacked(w, partial=True)
    outputs = []
    for launch in TritonPacked.LAUNCHES.values():
        monkeypatch.setattr(TritonPacked, "LAUNCHES", {math.inf: launch})
        outputs.append(packed.products(x))
    assert outputs[0].dtype == torch.float32
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    # A negative control: another order, other bits.
    assert not torch.equal(outputs[0], x.float() @ w.float().T)


# ---- attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask_mod",
    [causal, SlidingWindow(700), masks.Sinks(4, 700), masks.odd_or_near]
    if CARD
    else [SlidingWindow(200)],
)
@pytest.mark.parametrize(
    ("G", "R", "D"), [(2, 1, 64), (1, 3, 96), (2, 4, 128)] if CARD else [(1, 3, 16)]
)
def test_decode_and_chunks_have_the_bits_of_prefill(G, R, D, mask_mod, dtype):
    B, T, L = (2, 1100, 1152) if CARD else (2, 530, 576)
    q, k, v = (randn(B, T, heads, D, dtype=dtype) for heads in (G * R, G, G))
    caches = [torch.zeros(B, G, L, D, device=DEVICE, dtype=dtype) for _ in "kv"]
    pos = torch.arange(T, device=DEVICE).expand(B, T)
    mask = masks.on_gpu(mask_mod, G, R, DEVICE)

    def attend(start, end, rows=slice(0, B)):
        new = (x[rows, start:end] for x in (q, k, v))
        own = (cache[rows] for cache in caches)
        return masks.attend(*new, *own, pos[rows, start:end], mask, D**-0.5)

    whole = attend(0, T)
    singles = (0, 63, 511, 512, 700, 1023, 1024, 1099)
    pieces = [(t, t + 1) for t in singles if t < T] + [(508, 516), (300, T)]
    for start, end in pieces:
        assert torch.equal(attend(start, end), whole[:, start:end]), (start, end)
        assert torch.equal(attend(start, end, slice(1, 2)), whole[1:, start:end]), (start, end)


def test_another_split_size_changes_bits(monkeypatch):
    """The negative control of the test above."""
    q, k, v = (randn(1, 1, 4, 64, dtype=torch.float32) for _ in range(3))
    caches = [randn(1, 4, 1152, 64, dtype=torch.float32) for _ in "kv"]
    mask = masks.on_gpu(causal, 4, 1, DEVICE)
    args = (q, k, v, *caches, torch.tensor([[1100]], device=DEVICE), mask, 0.125)
    want = masks.attend(*args)
    monkeypatch.setattr(kernels, "SPLIT", 256)
    assert not torch.equal(masks.attend(*args), want)


# ---- one row at a time


@pytest.mark.parametrize("n", [77, 128, 4096] if CARD else [77])
def test_norms_and_log_softmax_do_not_depend_on_other_rows(n):
    x, weight = randn(1000, n, dtype=torch.float32), randn(n, dtype=torch.float32)

    def norm(x):
        return kernels.gpu_rms_norm(x, weight, 1e-5)

    def own_norm(x):
        return row_kernels.rms_norm(x, weight, 1e-5, torch.float32)

    for op in (norm, own_norm, BATCH_INVARIANT.log_softmax):
        want = op(x)
        for M in ROWS:
            assert torch.equal(op(x[:M]), want[:M])
            assert torch.equal(op(x[-M:]), want[-M:])  # begins at another alignment


# ---- compiled code


def compiled(function, **others):
    options = BATCH_INVARIANT.compile_options | others
    return torch.compile(function, fullgraph=True, options=options)


def test_compiled_and_captured_equal_eager():
    packed = TritonPacked(randn(512, 512, dtype=DTYPES[0]), None, 8)
    caches = [torch.zeros(1, 2, 1152, 64, device=DEVICE, dtype=DTYPES[0]) for _ in "kv"]
    mask = masks.on_gpu(causal, 2, 4, DEVICE)

    def layer(q, k, v, pos):
        y = masks.attend(q, k, v, *caches, pos, mask, 0.125)
        return kernels.gpu_rms_norm(packed(y).float(), packed.weight[0].float(), 1e-5)

    args = [randn(1, 1, heads, 64, dtype=DTYPES[0]) for heads in (8, 2, 2)]
    args.append(torch.tensor([[600]], device=DEVICE))
    want = layer(*args)  # which also compiles the kernels, before a graph is captured
    assert torch.equal(compiled(layer)(*args), want)
    if not CARD:
        return
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer(*args)
    got.fill_(math.nan)
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_silu_equals_eager(dtype):
    """Of as many numbers as a layer of a large model has in a batch, of which a wrong division
    would show in some."""
    gate_up = randn(64, 2 * 28672 if CARD else 2 * 64, dtype=dtype) * 3
    want = BATCH_INVARIANT.silu_mul(gate_up)
    assert torch.equal(compiled(BATCH_INVARIANT.silu_mul)(gate_up), want)
    if CARD and dtype == torch.float32:  # the negative control: elsewhere, rounding may hide it
        settings = {"eager_numerics.division_rounding": False}
        approximate = compiled(BATCH_INVARIANT.silu_mul, **settings)
        assert not torch.equal(approximate(gate_up), want)


SETTINGS = {
    "architectures": ["Qwen3ForCausalLM"],  # which has norms of queries and keys
    "hidden_size": 256,
    "intermediate_size": 768,
    "vocab_size": 640,
    "num_hidden_layers": 2 if CARD else 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 300,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


@torch.inference_mode()
def logits(model):
    """Of three prompts of 40 tokens and of one token behind each."""
    tokens = randint(0, 640, 3, 41)
    cache = model.new_cache(3, 64)
    found = []
    for start, end in ((0, 40), (40, 41)):
        pos = torch.arange(start, end, device=DEVICE).expand(3, -1)
        found.append(model(tokens[:, start:end], pos, cache, end, decode=end - start == 1))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("mode", [None, "int8", "int4"] if CARD else [None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_model_equals_eager(dtype, mode, tmp_path):
    """Rotary positions, norms, silu and sums between layers, in prefill and in decoding behind
    it."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SETTINGS))
    model = Transformer(read_config(path, mode), BATCH_INVARIANT, DEVICE, dtype)
    machine.randomize(model)
    row_loops.put_in(model)
    fast = copy.copy(model)
    machine.set_up(fast, True, True)
    torch.manual_seed(0)
    want = logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(fast), want)
