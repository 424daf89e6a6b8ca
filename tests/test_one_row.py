"""Linear layers of one compiled row, in scripts/one_row.py."""

import pytest
import torch
from helpers import needs_compiler, write_checkpoint
from torch import randn

import quantize
from kernels import BATCH_INVARIANT, FAST, Packed
from scripts import cli, loading, machine, one_row

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_one_row_is_the_product(monkeypatch, mode, bias, dtype):
    """In code that a compiler would trace, and as before for several rows and in eager code."""
    layer, floats, bias = packed(mode, bias=bias, dtype=dtype)
    x = randn(3, 1, 128).to(dtype)
    before = [layer.forward(rows) for rows in (x, x[:1])]
    row = one_row.one_row(layer, dtype)
    after = [row(rows) for rows in (x, x[:1])]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = row(x[:1])
    monkeypatch.undo()

    want = x[:1].double() @ floats.T + (0 if bias is None else bias.double())
    assert y.shape == want.shape and y.dtype == dtype
    if mode == "int4":
        assert torch.equal(y, before[1])
        assert isinstance(row, one_row.OneRow) == (dtype == torch.bfloat16)
    else:
        assert (y - want).abs().max() < want.abs().max() * torch.finfo(dtype).eps * 4
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("amx", [True, False])
def test_codes_out_of_both_kernels(monkeypatch, amx):
    for module in (quantize, one_row):
        monkeypatch.setattr(module, "AMX", amx)
    tensors = quantize.quantized("int8", randn(96, 128), 0)
    codes, scale = one_row.codes_of(quantize.pack("int8", FAST, dict(tensors)))
    assert torch.equal(codes, tensors["weight"])
    assert torch.equal(scale, tensors["scale"].float().flatten())


def test_which_layers_stay_as_they_are(monkeypatch):
    wide = packed(None, shape=(8, one_row.MOST_INPUTS + 32))[0]
    assert one_row.one_row(wide, wide.weight.dtype) is wide
    exact = packed(None, BATCH_INVARIANT)[0]
    assert one_row.one_row(exact, torch.float32) is exact
    eight = packed("int8")[0]
    monkeypatch.setattr(one_row, "MOST_CODES", 96 * 128 - 1)
    assert one_row.one_row(eight, torch.float32) is eight
    monkeypatch.undo()
    assert one_row.one_row(eight, torch.float32) is not eight


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
@pytest.mark.parametrize("mode", MODES)
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
        assert isinstance(model.layers[0].o.packed, one_row.OneRow) != several
        machine.set_up(model, args.compile, args.compile_prefill)
        got = step(model, cache)
        assert (got - want).abs().max() < 0.03 * want.abs().max()
        with monkeypatch.context() as patch:
            patch.setattr(Packed, "table", {})
            if several:
                with pytest.raises(KeyError):
                    step(model, cache)
            else:
                assert torch.equal(step(model, cache), got)
