"""Norms and silu with --deterministic: what a compiler writes of them in scripts/row_loops.py has
the bits of eager code."""

import pytest
import torch
from helpers import CPU, needs_compiler, write_checkpoint
from torch import randn

import kernels
from kernels import BATCH_INVARIANT, BatchInvariant
from scripts import cli, loading, row_loops
from scripts.row_loops import RowLoops

SIZES = (32, 64, 128, 576, 1024, 2048, 5120, 8192)  # of rows that PyTorch adds up as is said here
OTHERS = (48, 134, 1002)  # and of those it adds up otherwise
ROWS = (1, 2, 7, 33, 257)
OPTIONS = BATCH_INVARIANT.compile_options | {"cpp.vec_isa_ok": True}


@pytest.fixture(autouse=True)
def fresh():
    row_loops.adds_in_turn.cache_clear()
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    row_loops.adds_in_turn.cache_clear()


def all_of_bf16(n):
    """Every finite number, in rows of n."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    return numbers[: len(numbers) // n * n].view(-1, n)


def compiled(function, dynamic=True):
    """It, and the names of the ops that its graph calls."""
    called = set()

    def backend(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return torch._inductor.compile(graph, inputs, options=OPTIONS)

    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic), called


def test_which_sums_are_added_in_turn(monkeypatch):
    """A probe tells, which can fail."""
    if not row_loops.adds_in_turn(576):
        pytest.skip("this processor adds up in another order")
    assert list(map(row_loops.adds_in_turn, SIZES)) == [True] * len(SIZES)
    assert list(map(row_loops.adds_in_turn, OTHERS)) == [False] * len(OTHERS)
    for name, other in (("LANES", 16), ("LANES", 64), ("BLOCK", 8)):
        row_loops.adds_in_turn.cache_clear()
        monkeypatch.setattr(row_loops, name, other)
        assert not row_loops.adds_in_turn(1024)
        monkeypatch.undo()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_in_loops_have_the_bits_of_eager_code(dtype):
    """At any number of rows. The control: sums that Inductor orders."""
    ops = RowLoops({*SIZES, *OTHERS})
    weights = [randn(n) for n in SIZES + OTHERS]

    def norms(ops, *inputs):
        pairs = zip(inputs, weights, strict=True)
        return [ops.rms_norm(x.float(), w, 1e-6).to(dtype) for x, w in pairs]

    class Broken(BatchInvariant):
        def rms_norm(self, x, weight, eps):
            mean = (x * x).sum(-1, keepdim=True) * (1 / x.shape[-1])
            return x * (mean + eps).rsqrt() * weight

    looped, called = compiled(lambda *inputs: norms(ops, *inputs))
    broken, _ = compiled(lambda *inputs: norms(Broken(), *inputs))
    for rows in ROWS:
        inputs = [(randn(rows, n) * 3).to(dtype) for n in SIZES + OTHERS]
        want = norms(BATCH_INVARIANT, *inputs)
        assert all(map(torch.equal, looped(*inputs), want))
        if dtype == torch.float32:
            assert not all(map(torch.equal, broken(*inputs), want))
    assert "gpt_exact.row_sum.default" in called  # of the others


@needs_compiler
def test_silu_in_loops_has_the_bits_of_eager_code():
    """Of all numbers that there are in bf16. The control: silu by exp."""
    ops = RowLoops(set())
    if not ops.has_vectors:
        pytest.skip("no AVX2")
    gates = all_of_bf16(192)
    gate_up = torch.cat((gates, gates.flip(0)), dim=1)

    def by_exp(gate_up):
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (gate / ((-gate).exp() + 1) * up).to(gate_up.dtype)

    looped, called = compiled(ops.silu_mul)
    broken, _ = compiled(by_exp)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (*ROWS, len(gates)):
            some = gate_up[-rows:].to(dtype)
            want = BATCH_INVARIANT.silu_mul(some)
            assert torch.equal(looped(some).nan_to_num(), want.nan_to_num())
    assert not any("gpt_exact" in name for name in called)
    assert not torch.equal(broken(gate_up.float()).nan_to_num(), want.nan_to_num())


@needs_compiler
def test_silu_of_parts_of_vectors_is_an_op():
    ops = RowLoops(set())
    gate_up = randn(33, 134)
    looped, called = compiled(ops.silu_mul)
    assert torch.equal(looped(gate_up), BATCH_INVARIANT.silu_mul(gate_up))
    assert "gpt_exact.sigmoid.default" in called


@pytest.mark.parametrize("n", [1, 31, 32, 67, 576, 40000])
def test_a_sigmoid_depends_on_no_other(n):
    """Wherever threads part. The control: PyTorch's own, where a part does not end with a vector,
    or has a part of one."""
    x = randn(9, n) * 5
    want = torch.cat([kernels.sigmoid(row[None]) for row in x])
    plain = torch.cat([row.sigmoid()[None] for row in x])
    differs = []
    for threads in range(1, 6):
        torch.set_num_threads(threads)  # conftest.py sets it back
        assert torch.equal(kernels.sigmoid(x), want)
        assert torch.equal(kernels.sigmoid(x.T.contiguous().T), want)
        assert torch.equal(kernels.sigmoid(x[:, : n // 2 + 1]), want[:, : n // 2 + 1])
        differs.append(not torch.equal(x.sigmoid(), plain))
    assert any(differs) or n in (1, 32, 576)


def test_a_model_gets_the_table_of_its_device(tmp_path):
    """Where the flag's own would be; a fork keeps what it has put there."""
    directory = write_checkpoint(tmp_path)
    flags = ["--checkpoint_path", str(directory)]
    for more in ([], ["--deterministic"]):
        model, _ = loading.load(cli.parse_args(flags + more))
        tables = {type(x.ops) for x in model.modules() if hasattr(x, "ops")}
        assert tables == {RowLoops if more else type(kernels.FAST)}
        assert model.device == CPU

    class Forked(BatchInvariant):
        pass

    model.norm.ops = Forked()
    row_loops.put_in(model)
    assert type(model.norm.ops) is Forked
