"""Linear layers of one compiled row, or a few of int8, in scripts/few_rows.py."""

import pytest
import torch
from helpers import needs_compiler, write_checkpoint
from torch import randn

import quantize
from kernels import BATCH_INVARIANT, FAST, Packed
from scripts import cli, few_rows, loading, machine

MODES = [None, "int8", "int4"]


def packed(mode, ops=FAST, shape=(96, 128), bias=True, dtype=torch.float32):
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
    return quantize.pack(mode, ops, tensors, bias), floats, bias


def error(y, x, floats, bias):
    """The largest, over the largest output."""
    want = x.double() @ floats.T + (0 if bias is None else bias.double())
    assert y.shape == want.shape
    return (y - want).abs().max() / want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_one_row_is_the_product(monkeypatch, mode, bias, dtype):
    """In code that a compiler would trace, and as before for many rows."""
    layer, floats, bias = packed(mode, bias=bias, dtype=dtype)
    x = randn(few_rows.FEW_ROWS + 1, 1, 128).to(dtype)
    many, one = layer.forward(x), layer.forward(x[:1])
    layer = few_rows.prepared(layer, dtype, one_slot=True)
    torch.testing.assert_close(layer.forward(x), many)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = layer.forward(x[:1])
    monkeypatch.undo()
    assert y.dtype == dtype
    if mode == "int4":
        assert torch.equal(y, one)
        assert isinstance(layer, few_rows.OneRow) == (dtype == torch.bfloat16)
    else:
        assert error(y, x[:1], floats, bias) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 128), (33, 48), (50, 36)])
def test_a_few_rows_of_int8(dtype, shape):
    """Without the rounding of inputs to codes, where scales and sizes allow it."""
    layer, floats, bias = packed("int8", shape=shape, dtype=dtype)
    few = few_rows.prepared(layer, dtype, one_slot=False)
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
    layer = few_rows.prepared(layer, torch.bfloat16, one_slot=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = randn(1, 128).bfloat16()
    y = layer.forward(x)
    assert y.dtype == torch.float32 and error(y, x, floats, None) < 1e-5
    assert error(y.bfloat16(), x, floats, None) > 1e-4  # the control


@pytest.mark.parametrize("amx", [True, False])
def test_codes_out_of_both_kernels(monkeypatch, amx):
    for module in (quantize, few_rows):
        monkeypatch.setattr(module, "AMX", amx)
    tensors = quantize.quantized("int8", randn(96, 128), 0)
    layer = quantize.pack("int8", FAST, dict(tensors))
    few = few_rows.prepared(layer, torch.float32, one_slot=True)
    assert torch.equal(few.weight, tensors["weight"])
    assert torch.equal(few.scale, tensors["scale"].float().flatten())


def test_which_layers_stay_as_they_are(monkeypatch):
    wide = packed(None, shape=(8, few_rows.MOST_INPUTS + 32))[0]
    exact = packed(None, BATCH_INVARIANT)[0]
    eight = packed("int8")[0]
    for layer in (wide, exact):
        assert few_rows.prepared(layer, torch.float32, True) is layer
    for name in ("FEW_CODES", "MOST_CODES"):
        assert few_rows.prepared(eight, torch.float32, True) is not eight
        monkeypatch.setattr(few_rows, name, 96 * 128 - 1)
    assert few_rows.prepared(eight, torch.float32, True) is eight


def loaded(directory, *flags):
    args = cli.parse_args(["--checkpoint_path", str(directory), *flags])
    model, _ = loading.load(args)
    return args, model


@torch.inference_mode()
def step(model, cache) -> torch.Tensor:
    """Logits of a token in a cache of random keys and values."""
    position = torch.tensor([[40]])
    return model(torch.tensor([[7]]), position, cache, 41, decode=True)


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
        asks = several and mode != "int8"  # of which a compiled row is always so
        assert isinstance(model.layers[0].o.packed, few_rows.OneRow) != asks
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
