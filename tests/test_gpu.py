"""Bit comparisons of the deterministic kernels on a CUDA device, in bfloat16: run with pytest -m gpu."""

import math

import pytest
import torch

import kernels
from kernels import BATCH_INVARIANT, TritonPacked

pytestmark = pytest.mark.gpu
ROWS = (1, 2, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def weights(N, K, dtype):
    """One of each layout: as it is, 8 bits by row, 4 bits by groups of 64."""
    scale = torch.rand(N, K // 64, device="cuda") / 8
    zero = torch.randint(0, 16, scale.shape, device="cuda").float()
    yield randn(N, K, dtype=dtype), None, None
    yield torch.randint(-128, 128, (N, K), device="cuda").to(torch.int8), scale[:, :1].contiguous(), None
    yield torch.randint(0, 256, (N, K // 2), device="cuda").to(torch.uint8), scale, zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leaves", [1, 2, 3, 8])
def test_rows_keep_their_bits_at_every_m_and_with_every_launch(leaves, dtype, monkeypatch):
    """fp32 outputs of whole sums are compared through fp32 activations; half precision only after its one rounding."""
    N, K = 333, 1536
    x = randn(max(ROWS), K, dtype=dtype)
    launches = dict(TritonPacked.LAUNCHES)
    for weight, scale, zero in weights(N, K, dtype):
        packed = TritonPacked(weight, randn(N, dtype=dtype), leaves, scale, zero)
        want = packed(x)
        for M in ROWS:
            assert torch.equal(packed(x[:M]), want[:M]), (weight.dtype, M)
            assert torch.equal(packed(x[-M:].flip(0)), want[-M:].flip(0)), (weight.dtype, M)
        for launch in launches.values():
            monkeypatch.setattr(TritonPacked, "LAUNCHES", {math.inf: launch})
            assert torch.equal(packed(x), want), (weight.dtype, launch)
        monkeypatch.setattr(TritonPacked, "LAUNCHES", launches)


def test_a_leaf_in_fp32_has_the_same_bits_with_every_launch(monkeypatch):
    """Before the one rounding, which hides much: the partial sums that `linear` writes, added with no other leaf's."""
    x, w = randn(257, 2048), randn(333, 2048)
    x[:, 1024:] = 0  # the second leaf: what is left is the first leaf's sum
    wide = TritonPacked(w, None, 2)
    outputs = []
    for launch in TritonPacked.LAUNCHES.values():
        parts = x.new_empty(len(x), 2, len(w), dtype=torch.float32)
        grid = -(-len(w) // launch["BLOCK_N"]), -(-len(x) // launch["BLOCK_M"]), 2
        args = x, wide.weight, None, None, None, parts, len(x), len(w), 2048, 1024, 1
        kernels.triton_kernels().linear[grid](*args, **launch | {"BLOCK_K": 64}, enable_fp_fusion=False)
        outputs.append(parts)
    assert all(torch.equal(parts, outputs[0]) for parts in outputs)
    assert not torch.equal(outputs[0][:, 0], x.float() @ w.float().T)  # a negative control: another order, other bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(1 << 30), 700])
@pytest.mark.parametrize(("G", "group", "D"), [(2, 1, 64), (1, 3, 96), (2, 4, 128)])
def test_decode_and_chunks_have_the_bits_of_prefill(G, group, D, window, dtype):
    B, T, L = 2, 1100, 1152
    q, k, v = (randn(B, T, heads, D, dtype=dtype) for heads in (G * group, G, G))
    caches = [torch.zeros(B, G, L, D, device="cuda", dtype=dtype) for _ in "kv"]
    pos = torch.arange(T, device="cuda").expand(B, T)

    def attend(start, end, rows=slice(0, B)):
        new = (x[rows, start:end] for x in (q, k, v))
        return kernels.triton_attention(*new, *(c[rows] for c in caches), pos[rows, start:end], window, D**-0.5)

    whole = attend(0, T)
    for start, end in [(t, t + 1) for t in (0, 63, 511, 512, 700, 1023, 1024, 1099)] + [(508, 516), (300, 1100)]:
        assert torch.equal(attend(start, end), whole[:, start:end]), (start, end)
        assert torch.equal(attend(start, end, slice(1, 2)), whole[1:, start:end]), (start, end)


def test_another_split_size_changes_bits(monkeypatch):
    """The negative control of the test above."""
    q, k, v = (randn(1, 1, 4, 64, dtype=torch.float32) for _ in range(3))
    caches, pos = [randn(1, 4, 1152, 64, dtype=torch.float32) for _ in "kv"], torch.tensor([[1100]], device="cuda")
    want = kernels.triton_attention(q, k, v, *caches, pos, (1 << 30), 0.125)
    monkeypatch.setattr(kernels, "SPLIT", 256)
    assert not torch.equal(kernels.triton_attention(q, k, v, *caches, pos, (1 << 30), 0.125), want)


@pytest.mark.parametrize("n", [77, 128, 4096])
def test_norms_and_log_softmax_do_not_depend_on_other_rows(n):
    x, weight = randn(1000, n, dtype=torch.float32), randn(n, dtype=torch.float32)
    for op in (lambda x: kernels.gpu_rms_norm(x, weight, 1e-5), BATCH_INVARIANT.log_softmax):
        want = op(x)
        for M in ROWS:
            assert torch.equal(op(x[:M]), want[:M])
            assert torch.equal(op(x[-M:]), want[-M:])  # begins at another alignment


def test_compiled_and_captured_equal_eager():
    packed = TritonPacked(randn(512, 512), None, 8)
    caches = [torch.zeros(1, 2, 1152, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv"]

    def layer(q, k, v, pos):
        y = kernels.triton_attention(q, k, v, *caches, pos, (1 << 30), 0.125)
        return kernels.gpu_rms_norm(packed(y).float(), packed.weight[0].float(), 1e-5)

    args = [randn(1, 1, heads, 64) for heads in (8, 2, 2)] + [torch.tensor([[600]], device="cuda")]
    want = layer(*args)  # which also compiles the kernels, before a graph is captured
    assert torch.equal(torch.compile(layer, fullgraph=True)(*args), want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer(*args)
    got.fill_(math.nan)
    graph.replay()
    assert torch.equal(got, want)
