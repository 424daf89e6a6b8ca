"""With --deterministic on a CPU: norms and silu that Inductor writes into a compiled graph, with
the bits of the ops that eager code calls. An op would be a call out of the graph, and cut it in
two."""

import functools

import torch
from torch import Tensor

import kernels
from kernels import BatchInvariant
from model import RMSNorm, Transformer
from scripts.row_kernels import RowKernels

LANES = 32  # numbers that PyTorch adds up side by side
BLOCK = 16  # of those it adds up in turn, before it begins anew
VECTORS = ("AVX2", "AVX512")  # where sigmoid is computed by the same code in both


def in_turn(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, as a compiler's loop has it."""
    if torch.compiler.is_compiling():
        return x.sum(dim)
    return functools.reduce(torch.add, x.unbind(dim))


def sum_in_turn(x: Tensor) -> Tensor:
    """The sum over the last dimension, which is kept, in the order of PyTorch's own."""
    rows = x.unflatten(-1, (-1, LANES))
    whole = rows.shape[-2] // BLOCK * BLOCK
    sums = []
    if whole < rows.shape[-2]:
        sums.append(in_turn(rows[..., whole:, :], -2))
    if whole:
        blocks = in_turn(rows[..., :whole, :].unflatten(-2, (-1, BLOCK)), -2)
        sums.append(functools.reduce(torch.add, blocks.unbind(-2)))
    lanes = functools.reduce(torch.add, sums)
    lanes = functools.reduce(torch.add, lanes.chunk(4, dim=-1))
    return functools.reduce(torch.add, lanes.split(1, dim=-1))


@functools.cache
def adds_in_turn(n: int) -> bool:
    """Whether PyTorch adds up n numbers like that."""
    if n % LANES:
        return False
    a, b = kernels.cancelling((64,), (1,), n, torch.float32)
    terms = a * b
    return torch.equal(terms.sum(-1, keepdim=True), sum_in_turn(terms))


class RowLoops(BatchInvariant):
    """With loops for a compiler, where they have the same bits: in norms of so many numbers."""

    def __init__(self, norms: set[int]):
        self.norms = {n for n in norms if adds_in_turn(n)}
        self.has_vectors = torch.backends.cpu.get_cpu_capability() in VECTORS

    def rms_norm(self, x, weight, eps):
        n = x.shape[-1]
        if not torch.compiler.is_compiling() or n not in self.norms:
            return super().rms_norm(x, weight, eps)
        mean = sum_in_turn(x * x) * (1 / n)
        return x * (mean + eps).rsqrt() * weight

    def silu_mul(self, gate_up):
        is_whole = gate_up.shape[-1] % (2 * LANES) == 0
        if not torch.compiler.is_compiling() or not is_whole or not self.has_vectors:
            return super().silu_mul(gate_up)
        gate, up = gate_up.float().chunk(2, dim=-1)
        y = (gate.sigmoid() * gate * up).to(gate_up.dtype)
        # A strided view is of a tensor in memory: a loop of no vectors would have other bits.
        return y.as_strided(y.shape, y.stride())


def put_in(model: Transformer) -> None:
    """Give a model, in place of BATCH_INVARIANT, the op table of its device that is quicker."""
    if model.device.type == "cuda":
        ops = RowKernels(model.dtype)
    else:
        norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
        ops = RowLoops({len(norm.weight) for norm in norms})
    for module in model.modules():
        if type(getattr(module, "ops", None)) is BatchInvariant:
            module.ops = ops
