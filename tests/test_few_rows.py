"""Linear layers of one compiled row, or a few of int8, in scripts/few_rows.py."""

import pytest
import torch
from helpers import needs_compiler, write_checkpoint
from torch import randn

import quantize
from kernels import BATCH_INVARIANT, FAST, Packed, cancelling
from scripts import cli, exact_rows, few_rows, lanes, loading, machine

MODES = [None, "int8", "int4"]
CASES = [(mode, fits_twice, 0) for mode in MODES for fits_twice in (True, False)]
KINDS = {None: lanes.RowInLanes, "int8": exact_rows.ExactCodes, "int4": exact_rows.InGraph}


def packed(mode, ops=FAST, shape=(96, 128), bias=True, dtype=torch.float32, leaves=1):
    """A random weight, packed, and what its codes stand for in fp64."""
    torch.manual_seed(0)
    tensors = quantize.quantized(mode, randn(shape).to(dtype), 32)
    floats = tensors["weight"].double()
    if mode == "int8":
        floats = floats * tensors["scale"].double()
    if mode == "int4":
        codes = torch.stack((tensors["weight"] & 15, tensors["weight"] >> 4), dim=-1)
        codes = codes.view(len(codes), -1, 32)
        floats = (codes - tensors["zero"].double()[..., None]) * tensors["scale"].double()[
            ..., None
        ]
        floats = floats.flatten(1)
    bias = randn(shape[0]).to(dtype) if bias else None
    return quantize.pack(mode, ops, tensors, bias, leaves), floats, bias


def error(y, x, floats, bias):
    """The largest, over the largest output."""
    want = x.double() @ floats.T + (0 if bias is None else bias.double())
    assert y.shape == want.shape
    return (y - want).abs().max() / want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode, fits_twice, least", [*CASES, (None, True, 1 << 20)])
def test_one_row_is_the_product(monkeypatch, mode, fits_twice, least, bias, dtype):
    """In code that a compiler would trace, and as before for many rows."""
    monkeypatch.setattr(few_rows, "LEAST_IN_LANES", least)
    monkeypatch.setattr(few_rows, "MOST_IN_TURN", 48)
    layer, floats, bias = packed(mode, bias=bias, dtype=dtype)
    x = randn(few_rows.FEW_ROWS + 1, 1, 128).to(dtype)
    many, one = layer.forward(x), layer.forward(x[:1])
    if mode == "int4":
        layer = exact_rows.InGraph(layer)
    layer = few_rows.prepared(layer, dtype, True, fits_twice)
    in_lanes = mode is None and fits_twice and not least
    assert isinstance(layer, lanes.RowInLanes) == in_lanes
    torch.testing.assert_close(layer.forward(x), many)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = layer.forward(x[:1])
    monkeypatch.undo()
    assert y.dtype == dtype
    if mode == "int4":
        assert torch.equal(y, one)
    else:
        assert error(y, x[:1], floats, bias) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 128), (33, 48), (50, 36)])
def test_a_few_rows_of_int8(dtype, shape):
    """Without the rounding of inputs to codes, where scales and sizes allow it."""
    layer, floats, bias = packed("int8", shape=shape, dtype=dtype)
    few = few_rows.prepared(layer, dtype, False, True)
    assert isinstance(few, few_rows.FewCodes) == (shape[1] % 16 == 0)
    for rows in (1, 3, few_rows.FEW_ROWS):
        x = randn(rows, 1, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = few.forward(x)
        assert y.dtype == dtype
        codes = 2e-4 if few is layer else 0
        assert error(y, x, floats, bias) < codes + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", [None, "int8"])
def test_a_part_of_a_sum_stays_in_fp32(monkeypatch, mode):
    """Where other ranks have the rest: rounded first, the parts of a sum would err more."""
    layer, floats, _ = packed(mode, bias=False, dtype=torch.bfloat16)
    layer.partial = True
    monkeypatch.setattr(few_rows, "LEAST_IN_LANES", 0)
    layer = few_rows.prepared(layer, torch.bfloat16, True, True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = randn(1, 128).bfloat16()
    y = layer.forward(x)
    assert y.dtype == torch.float32 and error(y, x, floats, None) < 1e-5
    assert error(y.bfloat16(), x, floats, None) > 1e-4  # the control


@pytest.mark.parametrize("amx", [True, False])
def test_codes_out_of_both_kernels(monkeypatch, amx):
    for module in (quantize, exact_rows, few_rows):
        monkeypatch.setattr(module, "AMX", amx)
    tensors = quantize.quantized("int8", randn(96, 128), 0)
    layer = quantize.pack("int8", FAST, dict(tensors))
    few = few_rows.prepared(layer, torch.float32, True, True)
    assert torch.equal(few.weight, tensors["weight"])
    assert torch.equal(few.scale, tensors["scale"].float().flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_of_int8_with_amx(monkeypatch, dtype):
    """They are products of floats, without the rounding of inputs to codes, but in fp16."""
    for module in (quantize, exact_rows, few_rows):
        monkeypatch.setattr(module, "AMX", True)
    layer, floats, bias = packed("int8", dtype=dtype)
    prepared = few_rows.prepared(layer, dtype, False, True)
    x = randn(few_rows.MANY_ROWS, 1, 128).to(dtype)
    with_codes = error(layer.forward(x), x, floats, bias)
    y = prepared.forward(x)
    assert y.dtype == dtype
    as_floats = error(y, x, floats, bias)
    if dtype == torch.float32:
        assert as_floats < 1e-5 < with_codes
    assert as_floats < 8 * torch.finfo(dtype).eps + with_codes
    assert torch.equal(y, layer.forward(x)) == (dtype == torch.float16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fits_twice", [True, False])
def test_an_eager_row_is_the_product(monkeypatch, fits_twice, bias):
    """Of a plain weight, while oneDNN is off; which is on again, whatever happens."""
    layer, floats, bias = packed(None, bias=bias, dtype=torch.bfloat16)
    if not layer.weight.is_mkldnn:
        pytest.skip("oneDNN has no blocks of bf16 here")
    x = randn(5, 1, 128).bfloat16()
    many = layer.forward(x)
    eager = few_rows.for_eager_row(layer, fits_twice)
    assert layer.weight.is_mkldnn == layer.opaque == fits_twice
    torch.testing.assert_close(eager.forward(x), many)
    if fits_twice:
        assert torch.equal(eager.forward(x), many)

    seen = []
    linear = few_rows.F.linear

    def watched(*args):
        seen.append(torch.backends.mkldnn.enabled)
        return linear(*args)

    monkeypatch.setattr(few_rows.F, "linear", watched)
    y = eager.forward(x[:1])
    assert y.dtype == torch.bfloat16
    assert error(y, x[:1], floats, bias) < 8 * torch.finfo(y.dtype).eps
    with pytest.raises(RuntimeError):
        eager.forward(x[:1, :, 1:])
    assert seen == [False, False]
    assert torch.backends.mkldnn.enabled


def test_which_layers_stay_as_they_are(monkeypatch):
    wide = packed(None, shape=(8, few_rows.MOST_INPUTS + 32))[0]
    exact = packed(None, BATCH_INVARIANT)[0]
    eight = packed("int8")[0]
    for layer in (wide, exact):
        assert few_rows.prepared(layer, torch.float32, True, True) is layer
    for name in ("FEW_CODES", "MOST_CODES"):
        assert few_rows.prepared(eight, torch.float32, True, True) is not eight
        monkeypatch.setattr(few_rows, name, 96 * 128 - 1)
    assert few_rows.prepared(eight, torch.float32, True, True) is eight
    floats = packed(None)[0]
    for layer in (exact, eight, floats):
        assert few_rows.for_eager_row(layer, True) is layer


# ---- with --deterministic

BF16 = torch.bfloat16
# Of N, K and leaves: parts of 512 numbers and of what is left, and leaves of one and of two parts.
SHAPES = [(96, 128, 1), (64, 1152, 1), (64, 576, 3), (32, 2304, 2)]


def of_one_row(layers, rows):
    return [layer.forward(row) for layer, row in zip(layers, rows, strict=True)]


def exact_layers(mode):
    """Of each shape, with a bias and without: what eager code has, what one slot has, and inputs
    whose sums are near 0, so that the order shows."""
    plain, looped, rows = [], [], []
    for N, K, leaves in SHAPES:
        for bias in (True, False):
            x, weight = cancelling((16,), (N,), K, BF16)
            tensors = quantize.quantized(mode, weight, 32)
            bias = x[0, :N] if bias else None
            layer = quantize.pack(mode, BATCH_INVARIANT, tensors, bias, leaves)
            plain.append(layer.forward)
            layer = exact_rows.InGraph(layer) if mode == "int4" else layer
            looped.append(exact_rows.prepared_exactly(layer, BF16, True, True))
            rows.append(x[None])
    return plain, looped, rows


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_row_has_the_bits_of_many(mode):
    """The control: sums that Inductor orders."""
    plain, looped, rows = exact_layers(mode)
    if mode is None and exact_rows.size_of_parts(96, 128) is None:
        pytest.skip("this processor adds up bf16 in another order")
    assert [type(layer) for layer in looped] == [KINDS[mode]] * len(looped)
    want = [forward(x)[:, 5:6] for forward, x in zip(plain, rows, strict=True)]
    options = {"cpp.vec_isa_ok": True} | BATCH_INVARIANT.compile_options
    compiled = torch.compile(of_one_row, fullgraph=True, dynamic=False, options=options)
    found = compiled(looped, [x[:, 5:6] for x in rows])
    assert list(map(torch.equal, found, want)) == [True] * len(want)
    if mode is None:
        fast = few_rows.OneRow(looped[3].packed, looped[3].packed.leaf_weights[0].to_dense())
        (other,) = compiled([fast], [rows[3][:, 5:6]])
        assert not torch.equal(other, want[3])


@needs_compiler
@pytest.mark.parametrize("count", [13, 1])
def test_few_compiled_rows_of_int4_have_the_bits_of_many(monkeypatch, count):
    """In PyTorch's own op in the graph, for each leaf apart. The control: leaves in another
    order."""
    monkeypatch.setattr(exact_rows, "MOST_IN_ONE_CALL", 0)
    plain, looped, rows = exact_layers("int4")
    want = [forward(x)[:, -count:] for forward, x in zip(plain, rows, strict=True)]
    options = {"cpp.vec_isa_ok": True} | BATCH_INVARIANT.compile_options
    compiled = torch.compile(of_one_row, fullgraph=True, dynamic=False, options=options)
    few = [x[:, -count:] for x in rows]
    assert list(map(torch.equal, compiled(looped, few), want)) == [True] * len(want)
    looped[4].packed.leaf_weights.reverse()
    assert not torch.equal(looped[4].packed.forward(few[4]), want[4])


def test_the_order_of_a_row_is_probed(monkeypatch):
    """Where pairs are added in another order than that of the instruction, or parts are of other
    sizes, no size is found."""
    exact_rows.size_of_parts.cache_clear()
    if exact_rows.size_of_parts(64, 1152) is None:
        pytest.skip("this processor adds up bf16 in another order")
    exact_rows.size_of_parts.cache_clear()
    monkeypatch.setattr(exact_rows, "in_turn", lambda x: x)
    assert exact_rows.size_of_parts(64, 1152) is None
    layer, _, _ = packed(None, BATCH_INVARIANT, dtype=BF16)
    assert exact_rows.prepared_exactly(layer, BF16, True, True) is layer
    exact_rows.size_of_parts.cache_clear()


@pytest.mark.parametrize("K, is_exact", [(exact_rows.MOST_EXACT, True), (1 << 16, False)])
def test_sums_of_codes_are_exact_up_to_a_length(K, is_exact):
    """The largest codes, the first ones all alike."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(100, 128, (16, K), generator=generator, dtype=torch.int8)
    weight[0] = 127
    layer = exact_rows.ExactCodes(weight, scale=torch.ones(16, 1), exact=True)
    steps = torch.randint(7000, 8128, (1, 1, K), generator=generator).float()
    steps[..., : K // 2] = 8127
    want = (steps.long() * weight.long()).sum(-1).flatten()
    for sums in (layer.sums_in_loops(steps), layer.sums(steps)):
        assert torch.equal(sums.flatten(), want.float()) == is_exact
    prepared = exact_rows.with_exact_codes(layer, one_slot=True)
    assert (prepared is layer) != is_exact


@pytest.mark.parametrize("one_slot", [True, False])
@pytest.mark.parametrize("N", [64, 50])  # the second one fills no lanes
@pytest.mark.parametrize("rows", [3, exact_rows.MANY_ROWS, 70])
def test_leaves_of_int8_apart_have_the_bits_of_stacked_ones(rows, N, one_slot):
    layer, _, _ = packed("int8", BATCH_INVARIANT, (N, 576), leaves=3)
    apart = exact_rows.prepared_exactly(layer, torch.float32, one_slot, True)
    assert (apart.codes is None) == (N == 50 or not one_slot)
    x = randn(2, rows, 576)
    want = layer.forward(x)
    assert torch.equal(apart.forward(x), want)
    apart.apart.reverse()  # the control
    assert torch.equal(apart.forward(x), want) == (2 * rows < exact_rows.MANY_ROWS)


ASIDE = (few_rows.OneRow, lanes.RowInLanes, exact_rows.InGraph)


def loaded(directory, *flags):
    args = cli.parse_args(["--checkpoint_path", str(directory), *flags])
    model, _ = loading.load(args)
    return args, model


@torch.inference_mode()
def step(model, cache) -> torch.Tensor:
    """Logits of a token in a cache of random keys and values."""
    position = torch.tensor([[40]])
    return model(torch.tensor([[7]]), position, cache, 41, decode=True)


@pytest.mark.parametrize(
    "flags, is_apart",
    [
        ("", True),
        ("--batch_size 2", False),
        ("--prompt_lookup", False),
        ("--deterministic", False),
        ("--precision fp32", False),
        ("--quantize int4", False),
    ],
)
def test_an_eager_row_where_a_step_has_one(tmp_path, flags, is_apart):
    directory = write_checkpoint(tmp_path, num_hidden_layers=1)
    _, model = loaded(directory, *flags.split())
    has_blocks = packed(None, dtype=torch.bfloat16)[0].weight.is_mkldnn
    is_eager_row = isinstance(model.layers[0].o.packed, few_rows.EagerRow)
    assert is_eager_row == (is_apart and has_blocks)


@needs_compiler
@pytest.mark.parametrize("mode", [None, pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_compiled_step_calls_no_library_for_floats_and_codes(tmp_path, monkeypatch, mode):
    """Its logits are those of eager code. The control: without what one row takes, it asks for
    packed weights by their handles."""
    directory = write_checkpoint(tmp_path, num_hidden_layers=1)
    quantized = ["--quantize", mode] if mode else []
    _, eager = loaded(directory, *quantized)
    cache = [tuple(map(torch.randn_like, layer)) for layer in eager.new_cache(1, 64)]
    want = step(eager, cache)

    for several in (False, True):
        args, model = loaded(directory, *quantized, "--compile", *["--prompt_lookup"] * several)
        asks = several and mode is None  # of others a compiled row is always so
        assert isinstance(model.layers[0].o.packed, ASIDE) != asks
        machine.set_up(model, args.compile, args.compile_prefill)
        got = step(model, cache)
        assert (got - want).abs().max() < 0.03 * want.abs().max()
        with monkeypatch.context() as patch:
            patch.setattr(Packed, "table", {})
            if asks:
                with pytest.raises(KeyError):
                    step(model, cache)
            else:
                assert torch.equal(step(model, cache), got)


@pytest.mark.parametrize("precision, wrapped", [("bf16", True), ("fp32", False)])
def test_int4_is_in_the_graph_only_where_there_is_one(tmp_path, precision, wrapped):
    """And its grid, in bfloat16, needs no conversion."""
    directory = write_checkpoint(tmp_path, num_hidden_layers=1)
    flags = ["--quantize", "int4", "--precision", precision, "--batch_size", "2"]
    for more, wanted in ([], False), (["--compile"], wrapped):
        for exact in ([], ["--deterministic"]):
            _, model = loaded(directory, *flags, *more, *exact)
            found = isinstance(model.layers[0].o.packed, exact_rows.InGraph)
            assert found == wanted
