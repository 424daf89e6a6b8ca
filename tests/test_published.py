"""Weights that others have quantized, packed here by plain loops, converted and compared with what
their formulas give; and names of the hub in place of directories."""

import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import train_bpe, write_json
from packers import AWQ, FORMATS, GPTQ, awq, float8, mlx, of_int, packed, words_of
from safetensors.torch import load_file, save_file
from test_download import Peer, page, run_script
from test_tp import Ranks, lines

import generate
import quantize
from scripts import cli, download, loading, published
from scripts.checkpoint import Refusal

ROOT = Path(__file__).resolve().parent.parent
# Three ranks can share it in groups of 64; no block of 128 divides its inner size.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 192,
    "vocab_size": 384,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
PART = "model.layers.0.mlp.down_proj"
OTHERS = ("model.embed_tokens", "lm_head")


def floats_of(config=CONFIG):
    """A random model's tensors by name: F32 for those that are quantized, else bfloat16."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes_of(config).items():
        tensor = torch.randn(shape, generator=generator) * (0.15 if len(shape) == 2 else 0.3)
        tensors[name] = tensor if is_linear(name) else (tensor + ("norm" in name)).bfloat16()
    return tensors


def shapes_of(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config["head_dim"] * config[f"num_{x}_heads"] for x in ("attention", "key_value"))
    shapes = {"model.norm.weight": (hidden,)}
    for name in OTHERS[: 1 if config["tie_word_embeddings"] else 2]:
        shapes[f"{name}.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (hidden,)
        for name, rows in {"q": q, "k": kv, "v": kv}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes


def is_linear(name):
    return name.endswith("_proj.weight")


def write_directory(path, tensors, how, config=CONFIG):
    """A checkpoint of those tensors, with a tokenizer."""
    path.mkdir()
    own = {"quantization_config": how} if how else {}
    if how and "quant_method" not in how:
        own["quantization"] = how  # MLX writes both
    write_json(path / "config.json", config | own)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    train_bpe().save(str(path / "tokenizer.json"))
    return path


def packed_tensors(name, config=CONFIG, keep=()):
    """(tensors of a checkpoint in that format, the fp32 weights that they stand for by name)."""
    pack, options, how, _ = FORMATS[name]
    tensors, weights = {}, {}
    for tensor_name, tensor in floats_of(config).items():
        stem = tensor_name.removesuffix(".weight")
        is_other = stem in OTHERS and "quant_method" not in how  # which MLX quantizes as well
        if (is_linear(tensor_name) or is_other) and stem not in keep:
            parts, weights[tensor_name] = pack(tensor.float(), **options)
            tensors |= {f"{stem}.{kind}": part for kind, part in parts.items()}
        else:
            tensors[tensor_name] = tensor.bfloat16()
            weights[tensor_name] = tensors[tensor_name].float()
    return tensors, weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from the name of a format to (its directory, that directory converted, weights),
    each of which is made once."""
    folder = tmp_path_factory.mktemp("published")
    done = {}

    def make(name):
        if name not in done:
            tensors, weights = packed_tensors(name)
            path = write_directory(folder / name, tensors, FORMATS[name][2])
            download.fetch(folder / f"{name} converted", str(path))
            done[name] = (path, folder / f"{name} converted", weights)
        return done[name]

    return make


def read_all(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def stored_floats(tensors, stem):
    """What a weight of our own format stands for, fp32, code by code."""
    codes = tensors[f"{stem}.weight"]
    if f"{stem}.scale" not in tensors:
        return codes.float()
    scale = tensors[f"{stem}.scale"].float()
    if f"{stem}.zero" not in tensors:
        return codes.float() * scale
    zero = tensors[f"{stem}.zero"].float()
    K = 2 * codes.shape[1]
    weight = torch.zeros(len(codes), K)
    for k in range(K):
        code = codes[:, k // 2] % 16 if k % 2 == 0 else codes[:, k // 2] // 16
        g = k * scale.shape[1] // K
        weight[:, k] = (code.float() - zero[:, g]) * scale[:, g]
    return weight


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_formula(made, name):
    """To the bit where they stay codes, of MLX but for the rounding of a quotient in fp32; else
    rounded once to bfloat16. The head is int8, or as it was."""
    mode = FORMATS[name][3]
    _, converted, weights = made(name)
    tensors = read_all(converted)
    how = json.loads((converted / "config.json").read_text()).get("quantization_config", {})
    assert how.get("mode") == mode and "quantization" not in how
    for tensor_name, want in weights.items():
        stem, _, kind = tensor_name.rpartition(".")
        found = stored_floats(tensors, stem) if kind == "weight" else tensors[tensor_name].float()
        if stem == "lm_head" and mode:
            step = want.abs().amax(1, keepdim=True) / 127
            assert ((found - want).abs() <= 0.51 * step + 0.004 * want.abs()).all()
        elif name == "mlx" and is_linear(tensor_name):
            largest = want.abs().max()
            assert 0 < (found - want).abs().max() <= 2e-7 * largest
        elif is_linear(tensor_name) and mode:
            assert torch.equal(found, want), tensor_name
            assert not torch.equal(found.bfloat16().float(), want), "the control"
        else:
            assert torch.equal(found, want.bfloat16().float()), tensor_name


def test_formats_differ():
    """The control of the test above: a weight of one format is not that of another."""
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found = [pack(w, **options)[1] for pack, options, *_ in FORMATS.values()]
    different = {tuple(weight.flatten().tolist()) for weight in found}
    assert len(different) >= 14 and all((w - x).abs().max() < 0.5 for x in found)


LIBRARY = {  # the settings that compressed-tensors itself takes for a format
    "packed": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}),
    "packed 8 of rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "packed with zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    ),
    "integers": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "float8 of rows": ("float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_compressed_tensors_packs_alike(name):
    """The library reads what is packed here, and finds the same weights."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    format, args = LIBRARY[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    pack, options, *_ = FORMATS[name]
    w = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    tensors, want = pack(w, **options)
    tensors["weight_scale"] = tensors["weight_scale"].float()  # else it multiplies in bfloat16
    found = BaseCompressor.get_value_from_registry(format).decompress(tensors, scheme)["weight"]
    assert torch.equal(found, want)
    other = pack(w.flip(0), **options)[1]
    assert not torch.equal(found, other)


def test_a_zero_that_borrowed(tmp_path):
    """In the format gptq, 1 is taken from each zero of a word at once: a zero of 0 borrows from the
    next one, and gets it back. The control is a zero of 0 that wraps alone."""
    tensors, _ = packed_tensors("gptq_v2")
    zeros = torch.tensor([[0, 5, 7, 0, 0, 9, 1, 15] * 16] * 3)
    words = words_of(zeros, 4).long()
    tensors[f"{PART}.qzeros"] = (words - 0x11111111).int()
    found, _ = converted_of(tmp_path, tensors, GPTQ | {"checkpoint_format": "gptq"})
    assert torch.equal(found[f"{PART}.zero"].long(), zeros.t())
    assert not torch.equal(words_of((zeros - 1) % 16, 4), tensors[f"{PART}.qzeros"])


# ---- text


def text_of(capsys, path, *flags):
    """What generate.py prints of two prompts: tokens and logprobs."""
    argv = ["--checkpoint_path", path, "--device", "cpu", "--json", "--max_new_tokens", 12]
    argv += ["--prompt", "The quick brown fox", "--prompt", "A dog", "--temperature", 0, *flags]
    capsys.readouterr()
    generate.main([*map(str, argv)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["tokens"], line["logprobs"]) for line in lines if "stats" not in line]


def own_directory(path, tensors, weights, mode):
    """The same weights in our own format, written by hand: of int4 from the tensors of `gptq` or
    `packed`, of no mode in bfloat16."""
    own = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and mode:
            parts = quantize.quantized("int8", weight, 64)
        elif is_linear(name) and mode == "int4":
            codes = tensors[f"{stem}.weight_packed"].view(torch.uint8)
            scale = tensors[f"{stem}.weight_scale"]
            parts = {"weight": codes, "scale": scale, "zero": torch.full_like(scale, 8)}
        elif is_linear(name) and mode == "int8":
            parts = {"weight": tensors[name], "scale": tensors[f"{stem}.weight_scale"]}
        else:
            own[name] = weight.bfloat16()
            continue
        own |= {f"{stem}.{kind}": part for kind, part in parts.items()}
    how = {"quant_method": "gpt-exact", "mode": mode, "group_size": 64} if mode else None
    return write_directory(path, own, how)


@pytest.mark.parametrize("name", ["packed", "integers", "fp8"])
@pytest.mark.parametrize("flags", [[], ["--precision", "fp32", "--deterministic"]], ids=str)
def test_text_is_that_of_the_same_weights(made, tmp_path, capsys, name, flags):
    """Tokens and logprobs, to the bit; the control is another format of the same model."""
    _, converted, weights = made(name)
    mode = FORMATS[name][3]
    own = own_directory(tmp_path / "own", packed_tensors(name)[0], weights, mode)
    want = text_of(capsys, own, *flags)
    assert text_of(capsys, converted, *flags) == want
    assert text_of(capsys, made("awq")[1], *flags) != want
    assert len({token for tokens, _ in want for token in tokens}) > 8


@pytest.mark.parametrize("name", ["awq", "gptq", "packed with zeros", "mlx"])
def test_in_fp32_kernels_have_the_weights(made, name):
    """Logits are those of a model in floats with the weights of the formula, and the same head: the
    kernel rounds neither scales nor zeros. In bf16, the control, it does."""
    _, converted, weights = made(name)
    tensors = read_all(converted)
    weights = weights | {"lm_head.weight": stored_floats(tensors, "lm_head")}
    weights["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    worst = {}
    for precision in ("fp32", "bf16"):
        args = cli.parse_args(["--device", "cpu", "--precision", precision])
        args.checkpoint_path = converted
        model, _ = loading.load(args)
        for linear, stem in linears(model):
            parts = [weights[f"{name}.weight"] for name in stem]
            want = torch.cat(parts)
            found = linear.packed(torch.eye(want.shape[1], dtype=model.dtype)).float().t()
            error = (found - want).abs().max() / want.abs().max()
            worst[precision] = max(worst.get(precision, 0), error.item())
    assert worst["fp32"] < 1e-6 and 1e-4 < worst["bf16"] < 1e-2


def linears(model):
    """Each linear layer but the head, with the names that it has in a checkpoint."""
    for layer in model.loaders:
        names = [name for name in layer.shapes if name.endswith("_proj.weight")]
        if names:
            layer.packed.bias = None
            yield layer, [name.removesuffix(".weight") for name in names]


@pytest.mark.parametrize("name", ["awq", "packed 8 of rows"])
def test_deterministic(made, capsys, name):
    """The same bits in batches, in chunks and with drafts, several of which the control has not."""
    converted = made(name)[1]
    alone = text_of(capsys, converted, "--deterministic")
    for flags in (["--batch_size", 2], ["--prefill_chunk", 3], ["--prompt_lookup"]):
        assert text_of(capsys, converted, "--deterministic", *flags) == alone, flags
    assert text_of(capsys, converted, "--deterministic", "--precision", "fp32") != alone


@pytest.mark.slow
def test_three_ranks(made, tmp_path):
    """The bits of one process."""
    flags = ["--device", "cpu", "--json", "--deterministic", "--prompt", "The fox", "--seed", 3]
    flags += ["--max_new_tokens", 12]
    ranks = Ranks(tmp_path)
    for name in ("gptq", "integers", "float8 in blocks"):
        path = ["--checkpoint_path", made(name)[1]]
        statuses, printed = ranks.run(1, "command", *flags, *path)
        assert statuses == [0], printed
        one = lines(printed[0][0])
        assert ranks.generate(*flags, *path, world=3) == one
        (tokens, _) = one[0, 0]
        assert len(set(tokens)) > 4
    assert ranks.generate(*flags, "--checkpoint_path", made("awq")[1], world=3) != one
    ranks.process.stdin.close()
    ranks.process.wait(timeout=60)


# ---- whole models


def converted_of(tmp_path, tensors, how, config=CONFIG):
    """What becomes of a checkpoint: its tensors and its config."""
    path = write_directory(tmp_path / "m", tensors, how, config)
    download.fetch(tmp_path / "new", str(path))
    return read_all(tmp_path / "new"), json.loads((tmp_path / "new" / "config.json").read_text())


def test_a_linear_in_float_is_quantized_with_a_line(tmp_path, capsys):
    """By our own rounding, as are those of layers that the config leaves out."""
    tensors, weights = packed_tensors("awq", keep=[PART])
    found, _ = converted_of(tmp_path, tensors, AWQ | {"modules_to_not_convert": ["down_proj"]})
    want = quantize.quantized("int4", weights[f"{PART}.weight"].bfloat16(), 64)
    for kind, tensor in want.items():
        assert torch.equal(found[f"{PART}.{kind}"], tensor)
    assert "1 linear layers that were floats became int4 as well" in capsys.readouterr().err


def test_a_tied_embedding_of_mlx(tmp_path, capsys):
    config = CONFIG | {"tie_word_embeddings": True}
    tensors, weights = packed_tensors("mlx", config)
    found, written = converted_of(tmp_path, tensors, FORMATS["mlx"][2], config)
    want = weights["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(found["model.embed_tokens.weight"], want)
    assert written["tie_word_embeddings"] and "lm_head.weight" not in found
    assert text_of(capsys, tmp_path / "new")


@pytest.mark.parametrize("own", [False, True])
def test_a_head_beside_a_config_that_ties_it(tmp_path, own):
    """One that repeats the embedding is left out; another is kept, and the config says so."""
    tensors, weights = packed_tensors("awq")
    if not own:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    found, written = converted_of(tmp_path, tensors, AWQ, CONFIG | {"tie_word_embeddings": True})
    assert written["tie_word_embeddings"] is not own
    assert ("lm_head.scale" in found) is own


def test_several_widths_become_bfloat16(tmp_path):
    """MLX has settings of single layers, of which some are wider."""
    tensors, weights = packed_tensors("mlx")
    parts, weight = mlx(floats_of()[f"{PART}.weight"], bits=8, group=32)
    tensors |= {f"{PART}.{kind}": part for kind, part in parts.items()}
    how = FORMATS["mlx"][2] | {PART: {"group_size": 32, "bits": 8}}
    found, _ = converted_of(tmp_path, tensors, how)
    assert torch.equal(found[f"{PART}.weight"], weight.bfloat16())
    name = PART.replace("down", "up") + ".weight"
    assert torch.equal(found[name], weights[name].bfloat16())


def test_groups_are_split_where_they_differ(tmp_path):
    """Two groups of settings; the larger groups become several of the smaller, alike."""
    tensors, weights = packed_tensors("packed")
    parts, weight = packed(floats_of()[f"{PART}.weight"], group=32)
    tensors |= {f"{PART}.{kind}": part for kind, part in parts.items()}
    how = of_int("group", group_size=64)
    how["config_groups"] |= {"b": of_int("group", group_size=32)["config_groups"]["group_0"]}
    found, written = converted_of(tmp_path, tensors, how)
    assert written["quantization_config"]["group_size"] == 32
    weights[f"{PART}.weight"] = weight
    for name, want in weights.items():
        if is_linear(name):
            assert torch.equal(stored_floats(found, name.removesuffix(".weight")), want)


@pytest.mark.parametrize("pack, how", [(awq, AWQ), (float8, FORMATS["fp8"][2])])
def test_fused_tensors_are_taken_apart(tmp_path, pack, how):
    """A Phi-3, whose queries, keys and values are one tensor, and halves of the rest another."""
    changes = {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0, "bos_token_id": 0}
    tensors, weights = {}, {}
    layer = "model.layers.0"
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    given = {name: x for name, x in floats_of().items() if not name.endswith("_proj.bias")}
    for whole, parts in fused.items():
        prefix = f"{layer}.self_attn" if whole == "qkv_proj" else f"{layer}.mlp"
        rows = [given.pop(f"{prefix}.{part}.weight") for part in parts]
        made, weight = pack(torch.cat(rows))
        tensors |= {f"{prefix}.{whole}.{kind}": part for kind, part in made.items()}
        for part, own in zip(parts, weight.split([len(x) for x in rows]), strict=True):
            weights[f"{prefix}.{part}"] = own
    for name, tensor in given.items():
        stem = name.removesuffix(".weight")
        if is_linear(name):
            made, weights[stem] = pack(tensor)
            tensors |= {f"{stem}.{kind}": part for kind, part in made.items()}
        else:
            tensors[name] = tensor.bfloat16()
    found, _ = converted_of(tmp_path, tensors, how, CONFIG | changes)
    assert len(weights) == 7
    for stem, want in weights.items():
        got = stored_floats(found, stem)
        assert torch.equal(got, want if pack is awq else want.bfloat16().float()), stem


def test_scales_of_activations_are_left_out(tmp_path):
    name = "integers"
    tensors, _ = packed_tensors(name)
    tensors[f"{PART}.input_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    found, _ = converted_of(tmp_path, tensors, FORMATS[name][2])
    assert not [name for name in found if name.endswith(("input_scale", "k_scale"))]


@pytest.mark.parametrize("name", ["mlx", "mlx 8", "fp8"])
def test_large_tensors_are_made_in_files(tmp_path, monkeypatch, made, name):
    """What is in them is the same, and nothing is left of them."""
    large = []
    real = published.mmap.mmap
    monkeypatch.setattr(published.mmap, "mmap", lambda *args: large.append(args[1]) or real(*args))
    monkeypatch.setattr(published, "SHARD", 40_000)
    path, converted, _ = made(name)
    download.fetch(tmp_path / "new", str(path))
    assert large and min(large) > 40_000
    found, want = read_all(tmp_path / "new"), read_all(converted)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert os.listdir(tmp_path) == ["new"]


def test_a_large_tensor_for_which_there_is_no_room(tmp_path, monkeypatch, made):
    monkeypatch.setattr(published, "SHARD", 40_000)
    path = made("mlx")[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(Refusal, match="tensor .*temporary file of 98304 bytes .*too large"):
            download.fetch(tmp_path / "new", str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


# ---- what is refused


def changed(name, how=None, drop=(), **tensors):
    """A format with other settings, without some tensors, or with others of PART."""
    return name, how or {}, drop, tensors


NOT_PLAIN = torch.arange(192).flip(0).int() // 64
GROUPS = {"config_groups": {"a": {"weights": {"num_bits": 2, "type": "int"}}}}
REFUSED = {
    "awq gemv": (changed("awq", {"version": "gemv"}), "version 'gemv' .* gemm"),
    "awq 3 bits": (changed("awq", {"bits": 3}), "bits 3 .* 4"),
    "awq group": (changed("awq", {"group_size": 32}), "qzeros is I32 .*expected I32"),
    "awq odd group": (changed("awq", {"group_size": "64"}), "group_size is '64'"),
    "awq as gptq": (changed("awq", GPTQ), "tensor .* is I32 .*, expected"),
    "awq of nothing": (changed("fp8", AWQ), r"no tensor \*.qweight"),
    "awq without scales": (changed("awq", drop=["scales"]), "scales is missing"),
    "awq NaN": (changed("awq", scales=torch.full((3, 128), torch.nan).half()), "has NaN"),
    "gptq 3": (changed("gptq", {"checkpoint_format": "gptq_v3"}), "'gptq_v3' .* gptq_v2"),
    "gptq bits": (changed("gptq", {"bits": 2}), "bits 2 .* 4, 8"),
    "gptq as 8": (changed("gptq", {"bits": 8}), "expected I32"),
    "gptq true bits": (changed("gptq", {"bits": 4.0}), "bits 4.0 .* 4, 8"),
    "gptq order": (changed("gptq", g_idx=NOT_PLAIN), "act-order"),
    "gptq order missing": (changed("gptq", {"desc_act": True}, ["g_idx"]), "g_idx is missing"),
    "gptq zeros": (changed("gptq 8 of rows", qzeros=torch.zeros(1, 32).int()), "besides 128"),
    "packed format": (changed("packed", {"format": "pack-3"}), "format 'pack-3' .* pack-quantized"),
    "packed bits": (changed("packed", GROUPS), "num_bits 2"),
    "packed order": (changed("packed", weight_g_idx=NOT_PLAIN), "act-order"),
    "packed order missing": (
        changed("packed", of_int("group", group_size=64, actorder="group")),
        "weight_g_idx is missing",
    ),
    "packed shape": (changed("packed", weight_shape=torch.tensor([128, 100])), "weight_shape says"),
    "packed status": (changed("packed", {"quantization_status": "frozen"}), "'frozen'"),
    "packed rotated": (changed("packed", {"transform_config": {"a": {}}}), "transform_config"),
    "no groups": (changed("packed", {"config_groups": {}}), "config_groups is empty"),
    "groups of a list": (changed("packed", {"config_groups": [1]}), "config_groups is"),
    "a group of a list": (changed("packed", {"config_groups": {"W8A8": ["x"]}}), "W8A8 is"),
    "fp8 fmt": (changed("fp8", {"fmt": "e5m2"}), "fmt 'e5m2'"),
    "fp8 blocks": (changed("fp8", {"weight_block_size": [64, 64]}), "weight_scale_inv is"),
    "fp8 odd blocks": (changed("fp8", {"weight_block_size": [0, 64]}), "two integers"),
    "fp8 empty": (changed("fp8", weight=torch.zeros(0, 192).to(torch.float8_e4m3fn)), "a matrix"),
    "fp8 dtype": (changed("fp8", weight=torch.zeros(128, 192)), "is F32 .* expected F8_E4M3"),
    "mlx mode": (changed("mlx", {"mode": "mxfp4"}), "mode 'mxfp4' .* affine"),
    "mlx bits": (changed("mlx", {"bits": 8}), "scales is BF16 .*, expected"),
    "mlx constant": (
        changed("mlx", scales=torch.full((128, 3), 1e-9).bfloat16()),
        "a group has one value",
    ),
    "mlx NaN": (changed("mlx", biases=torch.full((128, 3), torch.nan).bfloat16()), "has NaN"),
    "mlx inf": (changed("mlx", biases=torch.full((128, 3), torch.inf).bfloat16()), "has NaN"),
    "another method": (
        changed("awq", {"quant_method": "quip"}),
        "by 'quip', expected .* awq, gptq",
    ),
    "another shape": (changed("awq", drop=["qweight", "qzeros", "scales"]), "weight is missing"),
    "an extra tensor": (changed("awq", extra=torch.ones(1)), "extra is not expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, monkeypatch, capsys, case):
    (name, settings, drop, more), message = REFUSED[case]
    tensors, _ = packed_tensors(name)
    tensors |= {f"{PART}.{kind}": tensor for kind, tensor in more.items()}
    tensors = {name: x for name, x in tensors.items() if name not in [f"{PART}.{d}" for d in drop]}
    path = write_directory(tmp_path / "m", tensors, FORMATS[name][2] | settings)
    status, said = run_script(monkeypatch, capsys, path, "--out", tmp_path / "new")
    assert (status, len(said)) == (2, 1) and said[0].startswith("error: "), said
    assert re.search(message, said[0]), said
    assert said[0].count(str(path)) == 1 and str(tmp_path / ".new") not in said[0]
    assert os.listdir(tmp_path) == ["m"]


def test_an_error_names_what_is_there(tmp_path, monkeypatch, capsys):
    """Not a directory that is gone by then, in which it was to be made or the hub's files were."""
    config = CONFIG | {"architectures": ["Other"]}
    path = write_directory(tmp_path / "m", packed_tensors("awq")[0], AWQ, config)
    for source in (f"{path}", f"{path}/"):
        found = run_script(monkeypatch, capsys, source, "--out", tmp_path / "new")
        assert found[0] == 2 and len(found[1]) == 1
        assert found[1][0].startswith(f"error: {path}/config.json: architectures Other is not")

    def fetch(name, work):
        shutil.copytree(path, work, dirs_exist_ok=True)

    monkeypatch.setattr(download, "fetch_from_hub", fetch)
    with pytest.raises(Refusal, match="^org/name/config.json: architectures Other is not"):
        download.fetch(tmp_path / "new", "org/name")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_cut_file_is_refused(tmp_path, monkeypatch, capsys, part):
    path = write_directory(tmp_path / "m", packed_tensors("awq")[0], AWQ)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    status, said = run_script(monkeypatch, capsys, path, "--out", tmp_path / "new")
    assert (status, len(said)) == (2, 1) and "truncated or corrupt" in said[0]
    assert os.listdir(tmp_path) == ["m"]


def test_other_directories_are_refused(tmp_path, monkeypatch, capsys, made):
    """Floats, our own, no checkpoint, and one without a place for what is made of it."""
    plain = write_directory(tmp_path / "plain", packed_tensors("awq")[0], None)
    (tmp_path / "empty").mkdir()
    before = sorted(os.listdir(tmp_path))
    ours = made("awq")[1]
    capsys.readouterr()
    for path in (plain, ours, tmp_path / "empty"):
        status, said = run_script(monkeypatch, capsys, path, "--out", tmp_path / "new")
        assert (status, len(said)) == (2, 1) and said[0].startswith("error: "), said
    status, said = run_script(monkeypatch, capsys, made("awq")[0])
    assert (status, len(said)) == (2, 1) and "expected --out" in said[0]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["awq", "gptq", "packed", "fp8", "mlx"])
def test_what_is_not_converted_is_refused_with_the_command(made, name):
    args = cli.parse_args(["--checkpoint_path", str(made(name)[0])])
    with pytest.raises(Refusal, match=r"config.json: .*download.py DIRECTORY --out NEW$"):
        loading.load(args)


KILLED = """
import os, signal, sys
from pathlib import Path
from scripts import download, published
def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
{name} = kill
download.fetch(Path(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_conversion_leaves_nothing(tmp_path, made):
    """There is no target, and the next run leaves nothing else."""
    argv = [sys.executable, "-c", KILLED.format(name="published.copy_files"), tmp_path / "new"]
    killed = subprocess.run([*argv, made("awq")[0]], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".new.")
    download.fetch(tmp_path / "new", str(made("awq")[0]))
    assert os.listdir(tmp_path) == ["new"]


ENDED = """
import os, sys, time
from pathlib import Path
from scripts import download, published
def end(source, work):
    os.kill(os.getpid(), int(sys.argv[3]))
    time.sleep(9)
published.copy_files = end
download.fetch(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_conversion_that_is_asked_to_end_leaves_nothing(tmp_path, made, name):
    """Not even the parent that was made for it. The control is the one killed above."""
    number = getattr(signal, name)
    argv = [sys.executable, "-c", ENDED, tmp_path / "a" / "new", made("awq")[0], str(number.value)]
    ended = subprocess.run(argv, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == (-number if name == "SIGINT" else 128 + number), ended.stderr
    assert name == "SIGINT" or ended.stderr == ""
    assert os.listdir(tmp_path) == []


# ---- names of the hub


class Hub(Peer):
    """With a checkpoint in AWQ, and the names of the files that were asked for."""

    def do_GET(self):
        if "/resolve/" in self.path:
            self.asked.append(self.path.rpartition("/")[2])
        super().do_GET()


@pytest.fixture
def hub(tmp_path):
    """The class that answers, and a function that starts generate.py as so many ranks, which ask
    there: [(status, standard output, standard error)]."""

    class Here(Hub):
        asked, moods = [], {}

    path = write_directory(tmp_path / "m", packed_tensors("awq")[0], AWQ)
    Here.files = {file.name: file.read_bytes() for file in path.iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    settings |= {"no_proxy": "*", "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    code = "from scripts import download\n"
    code += f"download.DEFAULT = download.Path({str(tmp_path / 'checkpoints' / 'x')!r})\n"
    code += "import generate\ngenerate.command(generate.main)"

    def run(world, *flags):
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        started = []
        for rank in range(world):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            own = {name: str(value) for name, value in numbers.items()}
            argv = [sys.executable, "-c", code, "--checkpoint_path", "org/name", *flags]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            env = os.environ | settings | own
            started.append(subprocess.Popen(argv, cwd=ROOT, env=env, **pipes))
        return [(*process.communicate(), process.returncode) for process in started]

    yield Here, run
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_name_is_fetched_once_and_converted(tmp_path, hub):
    """By one of three ranks, which says so; then it is there, for one process as well."""
    answers, run = hub
    flags = ["--prompt", "The", "--max_new_tokens", "6", "--json", "--deterministic"]
    (out, err, status), *others = run(3, *flags)
    assert status == 0 and [x[::2] for x in others] == [("", 0)] * 2, (err, others)
    target = tmp_path / "checkpoints" / "org" / "name"
    assert f"{target} is missing, fetching it" in err and f"wrote {target}" in err
    assert "converted weights from awq to int4" in err
    assert not [x[1] for x in others if "fetching" in x[1] or "wrote" in x[1]]
    assert {answers.asked.count(name) for name in answers.files} <= {1, 2}  # of HEAD and GET
    count = len(answers.asked)
    [(again, err, status)] = run(1, *flags)
    assert lines(again) == lines(out) and lines(out) and "fetching" not in err
    assert len(answers.asked) == count
    assert [path.name for path in target.parent.iterdir()] == ["name"]


def test_a_name_that_cannot_be_had(tmp_path, hub):
    """One line, of the first rank alone, and all end."""
    answers, run = hub
    answers.moods = {"/": page}
    (_, err, status), (_, other, end) = run(2)
    assert (status, end) == (2, 2) and "error: " not in other
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(
        "error: org/name of the hub cannot be had: the answer is none of a hub"
    )
    assert sorted(os.listdir(tmp_path)) in (["home", "m"], ["m"])


@pytest.mark.parametrize("flag", ["--checkpoint_path", "--draft_checkpoint_path"])
def test_what_is_a_name(tmp_path, monkeypatch, flag):
    """A directory that is there wins over a name, as does a path with a slip of the pen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "there").mkdir(parents=True)

    def found(text):
        return getattr(cli.parse_args([flag, text]), flag[2:])

    assert found("other/name") == "other/name"
    for text in ("org/there", "org/slip", "name", "/other/name", "a/b/c", "../name", "a--b/c"):
        assert found(text) == Path(text)


def test_without_the_package_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DEFAULT", tmp_path / "checkpoints" / "x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Refusal, match="org/name of the hub cannot be had: .*huggingface_hub"):
        loading.find("org/name")
    assert os.listdir(tmp_path) == []
