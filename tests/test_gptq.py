"""scripts/gptq.py on tiny random models: the algorithm beside its textbook form, what it brings,
the directory that it writes, and what it refuses."""

import contextlib
import functools
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_config
import test_model
import torch
from helpers import CORPUS, load, silent, write_checkpoint
from safetensors.torch import load_file, save_file
from test_config import MIXTRAL, QWEN3_MOE
from test_families import CASES
from test_quantize import floats, nibbles, randn

import generate
import quantize
from model import Linear, Transformer
from scripts import gptq, quantized
from scripts.files import Refusal
from scripts.loading import load_weights, read_config
from scripts.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
TOKENS = torch.randint(6, 300, (3, 80), generator=torch.Generator().manual_seed(1))


def correlated(rows: int, K: int, seed=0):
    """Inputs [rows, K] that depend on each other, as those of a model do."""
    return randn(rows, K // 4, seed=seed) @ randn(K // 4, K, seed=9) + 0.3 * randn(
        rows, K, seed=seed + 1
    )


def hessian_of(x):
    return 2 * x.T @ x


def error(x, weight, values) -> float:
    return (x @ (weight - values).T).square().sum().item()


# ---- the algorithm


@pytest.mark.parametrize("group", [32, 64, 128])
def test_inputs_without_correlation_give_the_nearest_codes(group):
    """Those of quantize.py, bit for bit; the negative control is a Hessian with correlations."""
    weight = randn(48, 256).bfloat16()
    want = quantize.quantized("int4", weight, group)
    found, values = gptq.quantize(weight, 3 * torch.eye(256), group)
    assert found.keys() == want.keys()
    for kind, tensor in want.items():
        assert found[kind].dtype == tensor.dtype and torch.equal(found[kind], tensor)
    assert torch.equal(values, floats(want))
    found, _ = gptq.quantize(weight, hessian_of(correlated(512, 256)), group)
    assert not torch.equal(found["weight"], want["weight"])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_outputs_err_less(group):
    """Than those of the nearest codes, also for inputs that it has not seen; with the Hessian of
    other inputs, the negative control, they err more."""
    weight = randn(96, 256)
    rounded = floats(quantize.quantized("int4", weight, group))
    seen, unseen = correlated(1024, 256), correlated(1024, 256, seed=5)
    parts, values = gptq.quantize(weight, hessian_of(seen), group)
    assert torch.equal(values, floats(parts))
    assert error(seen, weight, values) < 0.6 * error(seen, weight, rounded)
    assert error(unseen, weight, values) < 0.7 * error(unseen, weight, rounded)
    other = randn(1024, 64, seed=11) @ randn(64, 256, seed=12)
    _, values = gptq.quantize(weight, hessian_of(other), group)
    assert error(seen, weight, values) > error(seen, weight, rounded)


def test_it_is_the_textbook_algorithm():
    """Column by column, with the inverse of what is left of the Hessian each time (equation 2 of
    the paper), in fp64. The negative control leaves the updates out."""
    weight, group = randn(6, 64), 32
    hessian = hessian_of(correlated(256, 64))
    parts, _ = gptq.quantize(weight, hessian, group)
    grids = [parts[kind].double().repeat_interleave(group, 1) for kind in ("scale", "zero")]

    def textbook(updates: bool):
        w, H = weight.double(), hessian.double()
        H.diagonal().add_(gptq.DAMPING * H.diagonal().mean())
        codes = torch.empty_like(w)
        for j in range(64):
            scale, zero = (grid[:, j] for grid in grids)
            codes[:, j] = (w[:, j] / scale + zero).round().clamp(0, 15)
            inverse = H[j:, j:].inverse()
            change = (w[:, j] - (codes[:, j] - zero) * scale) / inverse[0, 0]
            if updates:
                w[:, j + 1 :] -= torch.outer(change, inverse[0, 1:])
        return codes

    codes = nibbles(parts["weight"]).double()
    assert torch.equal(codes, textbook(updates=True))
    assert not torch.equal(codes, textbook(updates=False))


HESSIANS = {
    "never any input": torch.zeros(64, 64),
    "an input of zeros": torch.diag(torch.arange(64.0)),
    "one input": hessian_of(randn(1, 64)),
    "alike inputs": hessian_of(randn(90, 1).expand(-1, 64)),
    "tiny ones": 1e-30 * hessian_of(randn(90, 64)),
    "large ones": 1e30 * hessian_of(randn(90, 64)),
    "one that outshines the others": hessian_of(randn(90, 64) * torch.tensor([1e5] + [1] * 63)),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_any_inputs_give_finite_weights(name):
    weight = randn(8, 64)
    U = gptq.inverse_root(HESSIANS[name])
    assert U.isfinite().all() and torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
    parts, values = gptq.quantize(weight, HESSIANS[name], 32)
    assert all(part.float().isfinite().all() for part in parts.values())
    assert (values - weight).abs().max() < 4


def test_the_root_is_that_of_the_inverse():
    hessian = hessian_of(correlated(500, 96))
    U = gptq.inverse_root(hessian).double()
    damped = hessian.double() + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(96).double(), atol=1e-3, rtol=0)


# ---- directories


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source"), bos=True, **SHAPE)


def write(source, out, tokens_BT=TOKENS, group=32):
    make = functools.partial(gptq.calibrated, tokens_BT)
    return quantized.write(source, str(out), "int4", group, make, gptq.Watching())


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    return write(source, tmp_path_factory.mktemp("written") / "out")


def tensors_of(directory) -> dict:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def values_of(tensors: dict) -> dict:
    """What quantized tensors stand for, and the others, by the names of the source."""
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight")
        if tensor.dtype == torch.uint8:
            parts = {kind: tensors[stem + kind] for kind in ("weight", "scale", "zero")}
            found[name] = floats(parts)
        elif not name.endswith((".scale", ".zero")):
            found[name] = tensor
    return found


def watched(source, tensors: dict, index: int) -> dict:
    """Of a model with these tensors, loaded whole and run by its own forward, the Hessian of each
    linear layer of a block, by the names of its weights."""
    config = read_config(source / "config.json")
    model = Transformer(config, gptq.Watching(), torch.device("cpu"), torch.bfloat16)
    load_weights(model, tensors, silent)
    linears = [m for m in model.layers[index].modules() if isinstance(m, Linear)]
    for linear in linears:
        K = tensors[next(iter(linear.shapes))].shape[1]
        model.ops.hessians[linear.packed] = torch.zeros(K, K)
    B, T = TOKENS.shape
    model(TOKENS, torch.arange(T)[None], model.new_cache(B, T), T)
    return {tuple(linear.shapes): model.ops.hessians[linear.packed] for linear in linears}


@torch.inference_mode()
def test_streaming_gives_what_the_whole_model_would(source, written):
    """Each block is calibrated by what those before it give once they are quantized. The negative
    control: by what they gave before."""
    original, stored = tensors_of(source), tensors_of(written)
    differing = 0
    for index in range(SHAPE["num_hidden_layers"]):
        before = tuple(f"model.layers.{i}." for i in range(index))
        quantized_before = values_of({k: v for k, v in stored.items() if k.startswith(before)})
        wrong = watched(source, original, index)
        for names, hessian in watched(source, original | quantized_before, index).items():
            weight = torch.cat([original[name] for name in names])
            codes = gptq.quantize(weight, hessian, 32)[0]["weight"]
            assert torch.equal(codes, torch.cat([stored[name] for name in names]))
            wrong_codes = gptq.quantize(weight, wrong[names], 32)[0]["weight"]
            differing += not torch.equal(codes, wrong_codes)
    assert differing == 4 * (SHAPE["num_hidden_layers"] - 1)


@torch.inference_mode()
def test_logits_err_less_than_those_of_nearest_codes(source, tmp_path):
    """Of tokens that are alike, as those of a language are: embeddings have eight dimensions. Also
    for a text that it was not calibrated with."""
    copied = tmp_path / "m"
    shutil.copytree(source, copied)
    tensors = {name: tensor.float() for name, tensor in tensors_of(copied).items()}
    for name, tensor in tensors.items():
        if "layers" in name and tensor.dim() == 2:
            tensors[name] = tensor * 0.3  # else layers amplify any error
    tensors["model.embed_tokens.weight"] = randn(364, 8) @ randn(8, 64, seed=1)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    generator = torch.Generator().manual_seed(2)
    seen, unseen = torch.randint(6, 300, (2, 8, 128), generator=generator)

    def logits(path) -> torch.Tensor:
        model, _ = load(path)
        pos_BT = torch.arange(128)[None]
        texts = (seen, unseen)
        return torch.stack([model(x, pos_BT, model.new_cache(8, 128), 128) for x in texts])

    want = logits(copied)
    paths = [write(copied, tmp_path / "calibrated", seen)]
    paths.append(quantized.write(copied, str(tmp_path / "rounded"), "int4", 32))
    calibrated, rounded = ((logits(p) - want).square().mean((1, 2, 3)) for p in paths)
    print(calibrated, rounded)
    assert (calibrated < 0.7 * rounded).all()


KINDS = {name: CASES[name] for name in ("phi3", "olmo2, biases", "gemma3", "granite")}
KINDS |= {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}


@pytest.mark.parametrize("kind", KINDS)
def test_other_families(tmp_path, kind):
    """With tensors in one, norms elsewhere, biases, experts: the directory has what quantize.py
    would write, but for the codes of blocks."""
    source = test_config.write(tmp_path / "m", KINDS[kind])
    stored = tensors_of(write(source, tmp_path / "q", TOKENS % 128))
    rounded = tensors_of(quantized.write(source, str(tmp_path / "r"), "int4", 32))
    assert stored.keys() == rounded.keys()
    differ = set()
    for name, tensor in rounded.items():
        assert tensor.dtype == stored[name].dtype and tensor.shape == stored[name].shape
        if not torch.equal(tensor, stored[name]):
            differ.add(name)
    codes = {name for name, tensor in rounded.items() if tensor.dtype == torch.uint8}
    assert codes <= differ
    assert all(name in codes or name.endswith((".scale", ".zero")) for name in differ)
    model = test_model.load(tmp_path / "q")
    ids = TOKENS[0] % 128
    assert test_model.feed_all(model, ids, [len(ids)]).isfinite().all()


def command(*args) -> SimpleNamespace:
    """scripts/gptq.py as a command, in this process: to start another takes seconds."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["gptq.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "scripts" / "gptq.py"), run_name="__main__")
    except SystemExit as stop:
        returncode = stop.code
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(CORPUS) * 20)
    return path


def test_the_command_writes_a_directory_that_gives_text(source, text, capsys):
    """The same bytes a second time; others for other tokens, the negative control."""
    contents = []
    for tokens in (1024, 1024, 2048):
        out = text.parent / f"out{len(contents)}"
        flags = ["--group_size", 32, "--tokens", tokens, "--out", out]
        ran = command("--calibration", text, "--checkpoint_path", source, *flags)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{out}\n", "")
        contents.append((out / "model-00000.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert read_config(out / "config.json").quantization == "int4"
    for flags in ([], ["--deterministic"]):
        asked = ["--prompt", "The quick", "--max_new_tokens", "6", "--temperature", "0", "--json"]
        generate.main(["--checkpoint_path", str(out), "--ignore_eos", *asked, *flags])
        completion = json.loads(capsys.readouterr().out.splitlines()[0])
        assert len(completion["tokens"]) == 6 and completion["text"]


def test_sequences_are_taken_evenly_and_begin_like_prompts(source, text):
    tokenizer = Tokenizer(source)
    ids = tokenizer.encode(text.read_text(), bos=False)
    found = gptq.sequences(text, tokenizer, 64, 640)
    assert found.shape == (10, 64) and (found[:, 0] == 0).all()
    assert found[0, 1:].tolist() == ids[:63] and found[-1, 1:].tolist() == ids[-63:]
    assert len(set(map(tuple, found.tolist()))) == 10


REFUSED = {  # flags, and what the error says
    "--tokens 100000": "tokens, expected 100000 or more",
    "--tokens 255": "--tokens",
    "--tokens 0": "--tokens",
    "--group_size 16": "--group_size",
    "--calibration nowhere.txt": "nowhere.txt cannot be read",
    "--calibration latin.txt": "latin.txt is no text",
    "--calibration empty.txt": "has 0 tokens, expected 1024 or more",
    "--out source/new": "is inside of",
    "--out text.txt": "exists",
    "--checkpoint_path nowhere": "nowhere",
    "--mode int4": "unrecognized arguments",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_one_line_and_nothing_is_written(source, text, flags, monkeypatch):
    folder = text.parent
    monkeypatch.chdir(folder)
    shutil.copytree(source, folder / "source")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    (folder / "empty.txt").write_text("")
    before = sorted(os.listdir(folder))
    usual = ["--checkpoint_path", "source", "--calibration", "text.txt", "--tokens", "1024"]
    ran = command(*usual, "--group_size", "32", *flags.split())
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: ") and REFUSED[flags] in ran.stderr
    assert sorted(os.listdir(folder)) == before


def test_a_text_is_needed():
    ran = command()
    assert ran.returncode == 2 and "--calibration" in ran.stderr and ran.stderr.count("\n") == 1


SPOILED = {
    "NaN in a block": ("model.layers.1.self_attn.q_proj.weight", float("nan"), "has NaN, inf"),
    "inf in the head": ("lm_head.weight", float("inf"), "has NaN, inf"),
    "too large": ("model.layers.1.mlp.up_proj.weight", 3e38, "expected finite ones"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_weights_that_are_no_numbers_are_refused(source, text, case):
    name, value, message = SPOILED[case]
    copied = text.parent / "copied"
    shutil.copytree(source, copied)
    tensors = tensors_of(copied)
    tensors[name][:] = value
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=message):
        write(copied, text.parent / "out")
    assert sorted(os.listdir(text.parent)) == ["copied", "text.txt"]


def test_a_quantized_source_is_refused(written, text):
    ran = command("--calibration", text, "--checkpoint_path", written)
    assert ran.returncode == 2 and "is int4 already" in ran.stderr


def test_several_processes_are_refused(source, text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["gptq.py", "--calibration", str(text)])
    with pytest.raises(Refusal, match="one process"):
        gptq.main()
