"""Two Triton kernels for --deterministic on a GPU, each of which has a row of numbers to itself. An
exact norm and an exact sigmoid are ops that a compiler may not look into, so that what stands
before and after them are launches of their own: three launches a layer are there for seven."""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels import BatchInvariant, opaque

BLOCK = 1024  # numbers that one program of silu_mul has


@functools.cache
def row_kernels() -> SimpleNamespace:
    """Triton, imported when a GPU asks. What a kernel calls is global, for its interpreter."""
    global tl
    import triton
    import triton.language as tl

    # Where a tensor begins must not decide how a row is dealt out to threads, which add it up.
    @triton.jit(do_not_specialize_on_alignment=["x", "weight", "y"])
    def rms_norm(x, weight, y, eps, n, N_PAD: tl.constexpr):
        """x / sqrt(mean(x^2) + eps) * weight, of fp32 rows of n numbers."""
        k = tl.arange(0, N_PAD)
        at = tl.program_id(0).to(tl.int64) * n + k
        row = tl.load(x + at, mask=k < n, other=0)
        mean = tl.sum(row * row) / n
        row *= tl.rsqrt(mean + eps)
        row *= tl.load(weight + k, mask=k < n, other=0)
        tl.store(y + at, row, mask=k < n)

    @triton.jit
    def silu_mul(gate_up, y, n, BLOCK: tl.constexpr):
        """A block of a row of y [rows, n], of gate_up [rows, 2 n]."""
        row = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = gate_up + row * 2 * n + k
        gate = tl.load(at, mask=k < n, other=0).to(tl.float32)
        up = tl.load(at + n, mask=k < n, other=0).to(tl.float32)
        silu = tl.div_rn(gate, tl.exp(-gate) + 1)
        tl.store(y + row * n + k, silu * up, mask=k < n)

    return SimpleNamespace(rms_norm=rms_norm, silu_mul=silu_mul)


@opaque(
    "row_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
    lambda x, weight, eps, dtype: x.new_empty(x.shape, dtype=dtype),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Of fp32 numbers over the last dimension, in that dtype."""
    n = x.shape[-1]
    y = x.new_empty(x.shape, dtype=dtype)
    n_pad = 1 << (n - 1).bit_length()
    options = {"num_warps": 4 if n <= 4096 else 8, "enable_fp_fusion": False}
    rows = (x.shape[:-1].numel(),)
    row_kernels().rms_norm[rows](x.contiguous(), weight, y, eps, n, n_pad, **options)
    return y


@opaque(
    "row_silu_mul(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of the two halves, in fp32 and rounded once."""
    n = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], n)
    programs = (gate_up.shape[:-1].numel(), -(-n // BLOCK))
    given = (gate_up.contiguous(), y, n, BLOCK)
    row_kernels().silu_mul[programs](*given, enable_fp_fusion=False)
    return y


class RowKernels(BatchInvariant):
    """Of a model that computes in `dtype`, to which a norm would be rounded next."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def rms_norm(self, x, weight, eps):
        return rms_norm(x, weight, eps, self.dtype)

    def silu_mul(self, gate_up):
        return silu_mul(gate_up)
