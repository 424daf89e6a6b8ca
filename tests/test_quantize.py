"""int8 and int4 weights: codes, layouts on disk, directories, and the same bits with
--deterministic. Each comparison of bits is also made where it must fail."""

import contextlib
import functools
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import needs_compiler, silent
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate
import quantize
from kernels import BATCH_INVARIANT, FAST, add_leaves
from model import Transformer
from scripts import checkpoint, cli, download, drafts, loading, machine, quantized
from scripts.contract import HalfRight, LeavesForSeveralRows, follow
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 32, 33, 64, 65, 129)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("int8", "int4")
CPU = torch.device("cpu")
IS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 384,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": True,
}
IDS = [(7 * i * i + 3 * i) % 160 for i in range(70)]


def randn(*shape: int, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] of the two numbers in each byte [N, K / 2]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def floats(parts: dict[str, Tensor]) -> Tensor:
    """What quantized parts stand for, fp32 [N, K]."""
    codes, scale = parts["weight"], parts["scale"].float()
    if "zero" not in parts:
        return codes * scale
    codes = nibbles(codes).float().unflatten(1, (scale.shape[1], -1))
    return ((codes - parts["zero"].float()[..., None]) * scale[..., None]).flatten(1)


def packed(mode: str, weight: Tensor, ops=FAST, bias=None, leaves=1, group=32):
    """A layer of a quantized weight, and what its codes stand for."""
    parts = quantize.quantized(mode, weight, group)
    return quantize.pack(mode, ops, parts, bias, leaves), floats(parts)


def directory(path: Path, config=CONFIG, dtype=torch.bfloat16, seed=0) -> Path:
    """A checkpoint of random weights on disk."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    model = Transformer(loading.read_config(path / "config.json"), FAST, CPU, dtype)
    tensors = {}
    for i, (name, shape) in enumerate(loading.tensor_shapes(model).items()):
        tensor = randn(*shape, seed=seed + i) * (0.1 if len(shape) == 2 else 0.5)
        tensors[name] = (tensor + 1 if "norm" in name else tensor).to(dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def load(path: Path, *flags: str) -> Transformer:
    """The model of a directory that needs no tokenizer."""
    args = cli.parse_args(["--checkpoint_path", str(path), "--device", "cpu", *flags])
    config = loading.read_config(path / "config.json", args.quantize, args.group_size)
    ops = BATCH_INVARIANT if args.deterministic else FAST
    model = Transformer(config, ops, CPU, loading.PRECISIONS[args.precision])
    slices = checkpoint.open_weights(path, loading.tensor_shapes(model))
    loading.load_weights(model, slices, silent)
    return model


@torch.inference_mode()
def logits(model: Transformer, ids: list[int], chunk: int | None = None, batch=1) -> Tensor:
    """fp32 logits [T, V] of the first row of a batch fed in chunks."""
    cache = model.new_cache(batch, len(ids))
    chunk = chunk or len(ids)
    others = torch.arange(len(ids)).flip(0) % 100
    tokens = torch.stack([torch.tensor(ids), *[others] * (batch - 1)])
    found = []
    for start in range(0, len(ids), chunk):
        now = tokens[:, start : start + chunk]
        pos = torch.arange(start, start + now.shape[1]).expand(batch, -1)
        found.append(model(now, pos, cache, start + now.shape[1])[0])
    return torch.cat(found)


def answers(engine, requests: list[Request]) -> dict:
    """Tokens and logprobs of each request, by its id."""
    found = {}
    for completion, _ in engine.generate(requests):
        if completion.finish_reason:
            found[completion.request.id] = (completion.tokens, completion.logprobs)
    return found


def command(*args) -> SimpleNamespace:
    """quantize.py as a command, in this process: to start another takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["quantize.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "quantize.py"), run_name="__main__")
    except SystemExit as stop:
        returncode = stop.code
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


# ---- codes


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_are_within_half_a_step(group):
    weight = randn(48, 256)
    parts = quantize.quantized("int4", weight, group)
    assert parts["weight"].dtype == torch.uint8 and parts["weight"].shape == (48, 128)
    assert parts["scale"].shape == parts["zero"].shape == (48, 256 // group)
    step = parts["scale"].float().repeat_interleave(group, dim=1)
    codes = nibbles(parts["weight"])
    inside = (codes > 0) & (codes < 15)  # of limits that may be narrower
    # Scale and zero are rounded as well.
    assert ((floats(parts) - weight).abs() <= 0.53 * step)[inside].all()
    assert inside.float().mean() > 0.9 - 2 / group
    parts = quantize.quantized("int8", weight, group)
    assert parts["weight"].dtype == torch.int8 and parts["scale"].dtype == torch.bfloat16
    assert ((floats(parts) - weight).abs() <= 1.01 * parts["scale"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_zeros_and_constants_stay_finite(mode):
    weight = torch.stack([torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), -2.0)])
    layer, want = packed(mode, weight)
    assert torch.isfinite(layer(torch.zeros(2, 64))).all()
    torch.testing.assert_close(want, weight, rtol=0.01, atol=1e-6)


def test_low_nibble_is_the_even_input():
    codes = torch.arange(64).remainder(16).expand(2, 64)
    parts = quantize.quantized("int4", codes.float(), 32)
    assert torch.equal(nibbles(parts["weight"]), codes.to(torch.uint8))
    assert parts["weight"][0, 1] == 2 | 3 << 4


def nearest(weight: Tensor, group: int) -> Tensor:
    """What rounding between the least and the largest of each group makes of a weight."""
    w = weight.unflatten(1, (-1, group))
    least = w.amin(-1, keepdim=True).clamp(max=0)
    most = w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / 15).bfloat16().float()
    zero = (-least / scale).half().float()
    return (((w / scale + zero).round().clamp(0, 15) - zero) * scale).flatten(1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_narrower_limits_lower_the_error(group):
    """Of each group, and by a tenth of all where weights have the tails of a normal distribution;
    never where the whole range is in use, which the last assertion holds against it."""

    def errors(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of each group as it is quantized, and as the nearest codes are."""
        found = floats(quantize.quantized("int4", weight, group))
        differences = (found - weight, nearest(weight, group) - weight)
        ours, plain = (x.unflatten(1, (-1, group)).square().sum(-1) for x in differences)
        return ours, plain

    ours, plain = errors(randn(256, 512))
    assert (ours <= 1.001 * plain).all()
    assert ours.sum() < 0.93 * plain.sum()
    ours, plain = errors(torch.linspace(-1, 1, 16).repeat(8, 512 // 16))
    assert ours.sum() == plain.sum()


def test_the_codes_of_a_gguf_come_back():
    """Groups of 32 as Q4_1 makes them, d * code + m with fp16 d and m, rounded to bf16: the codes
    survive."""
    codes = torch.randint(16, (512, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = 0  # its least and its largest are in each group
    codes[:, 1::32] = 15
    codes = codes.unflatten(1, (2, 32))
    d = (randn(512, 2).abs() * 0.02 + 1e-3).half().float()
    m = -(randn(512, 2, seed=1).abs() * 0.05 + 0.01).half().float()
    weight = codes * d[..., None] + m[..., None]
    keep = (weight.amin(-1) < 0) & (weight.amax(-1) > 0)
    parts = quantize.quantized("int4", weight.flatten(1).bfloat16(), 32)
    got = nibbles(parts["weight"]).unflatten(1, (2, 32)).long()
    assert keep.float().mean() > 0.5
    assert torch.equal(got[keep], codes[keep])


# ---- products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "exact"])
@pytest.mark.parametrize("N", [96, 72])  # the second is no whole number of the kernel's blocks
def test_products_are_close_to_those_of_the_floats(mode, dtype, ops, N):
    weight, bias = randn(N, 192) * 0.1, randn(N)
    x = randn(70, 192, seed=1).to(dtype)
    for leaves in (1, 3):
        layer, floated = packed(mode, weight, ops, bias, leaves)
        want = x.float() @ floated.T + bias
        for rows in (1, 70):
            got = layer(x[:rows])
            assert got.dtype == (torch.float32 if leaves > 1 and ops.exact else dtype)
            assert got.shape == (rows, N)
            error = (got.float() - want[:rows]).abs().max() / want.abs().max()
            assert error < (0.02 if dtype == torch.bfloat16 else 0.002)


# Of N, K, leaves and a type; int4 in fp16 is slow.
PRODUCTS = [(576, 1536, 3, torch.bfloat16), (576, 1536, 3, torch.float32)]
PRODUCTS += [(960, 576, 1, torch.bfloat16), (72, 256, 4, torch.float32)]
PRODUCTS += [(72, 256, 4, torch.float16)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("N", "K", "leaves", "dtype"), PRODUCTS, ids=str)
def test_rows_keep_their_bits_at_every_m(mode, dtype, N, K, leaves):
    layer, _ = packed(mode, randn(N, K), BATCH_INVARIANT, randn(N), leaves)
    x = randn(max(ROWS), K, seed=1).to(dtype)
    want = layer(x)
    for M in ROWS:
        assert torch.equal(layer(x[:M]), want[:M]), M
        assert torch.equal(layer(x[-M:].flip(0)), want[-M:].flip(0)), M


@pytest.mark.skipif(not IS_AVX512, reason="the layout that is known")
def test_a_weight_is_expanded_to_what_the_kernel_computes_with():
    weight = randn(128, 64).bfloat16()
    layer, want = packed("int4", weight)
    exact, _ = packed("int4", weight, BATCH_INVARIANT)
    kernel = exact(torch.eye(64))
    torch.testing.assert_close(layer.expanded(torch.float32), kernel, rtol=0, atol=1e-6)
    torch.testing.assert_close(kernel.T, want, rtol=0.01, atol=0.01)


@pytest.mark.skipif(not IS_AVX512, reason="the layout that is known")
def test_expanding_many_rows_changes_bits():
    """The negative control: what FAST does with many rows."""
    layer, _ = packed("int4", randn(960, 576))
    x = randn(128, 576, seed=1).bfloat16()
    assert not torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("mode", MODES)
def test_leaves_change_bits(mode):
    """Another negative control: the sum of whole rows has other bits than that of leaves."""
    x, weight = randn(16, 192, seed=1), randn(96, 192)
    whole, _ = packed(mode, weight, BATCH_INVARIANT)
    leaves, _ = packed(mode, weight, BATCH_INVARIANT, leaves=3)
    assert not torch.equal(whole(x), leaves(x))


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_no_bits(mode):
    layer, _ = packed(mode, randn(576, 1536), BATCH_INVARIANT, leaves=3)
    x = randn(20, 1536, seed=1).bfloat16()
    torch.set_num_threads(1)
    want = layer(x)
    for threads in (2, 4, 32):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), want), threads


def test_both_kernels_of_int8_have_the_same_bits(monkeypatch):
    """One for CPUs with AMX and one for others, whose sums are exact. The control is another number
    of leaves."""
    weight, x = randn(576, 1536), randn(40, 1536, seed=1)

    def product(ops, leaves: int, amx: bool) -> Tensor:
        monkeypatch.setattr(quantize, "AMX", amx)
        layer, _ = packed("int8", weight, ops, leaves=leaves)
        return layer(x)

    for ops, leaves in ((FAST, 1), (BATCH_INVARIANT, 1), (BATCH_INVARIANT, 3)):
        other = product(ops, leaves, True)
        assert torch.equal(product(ops, leaves, False), other)
        assert not torch.equal(product(BATCH_INVARIANT, 2, False), other)


SATURATED = """
import torch, quantize
from kernels import FAST
quantize.AMX = False
weight, x = torch.randn(96, 576).abs(), torch.randn(7, 576).abs()  # all sums of two are large
parts = quantize.quantized("int8", weight, 0)
y = quantize.pack("int8", FAST, parts)(x)
want = x.double() @ (parts["weight"].double() * parts["scale"].double()).T
print((y - want).abs().max().item() / want.abs().max().item())
"""


@pytest.mark.skipif(not IS_AVX512, reason="needs a processor that can act as an older one")
@pytest.mark.parametrize("units", ["AVX2", "AVX512"])
def test_int8_on_older_processors(units):
    """Without VNNI, products are added in pairs of 16 bits, which must hold them."""
    done = subprocess.run(
        [sys.executable, "-c", SATURATED],
        capture_output=True,
        text=True,
        env=os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": units, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert float(done.stdout) < 1e-3, done


def test_int8_of_large_sums_in_half_precision():
    """Codes times numbers in fp16 pass its range where the products of the floats do not."""
    layer, floated = packed("int8", randn(96, 576).abs())
    x = randn(70, 576, seed=1).abs().half() * 10
    torch.testing.assert_close(layer(x).float(), x.float() @ floated.T, rtol=0.01, atol=0.01)


def cut(parts: dict[str, Tensor], dim: int, rank: int, size: int) -> dict[str, Tensor]:
    """One of `size` shares of a quantized weight, its scale and its zero, along N (dim 0) or K."""
    found = {}
    for kind, part in parts.items():
        found[kind] = part if part.shape[dim] == 1 else part.chunk(size, dim)[rank]
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [32, 64])
def test_shares_of_ranks_make_the_whole(mode, group):
    """Cut along N the outputs are stacked; along K, leaf by leaf, the sums are those of the whole,
    bit for bit."""
    x = randn(5, 256, seed=1).bfloat16()
    parts = quantize.quantized(mode, randn(96, 256), group)
    pack = functools.partial(quantize.pack, mode, BATCH_INVARIANT)
    whole = pack(parts, leaves=4)(x)
    rows = [pack(cut(parts, 0, rank, 3), leaves=4)(x) for rank in range(3)]
    assert torch.equal(torch.cat(rows, dim=1), whole)
    columns = [cut(parts, 1, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([floats(column) for column in columns], dim=1), floats(parts))
    leaves = []
    for column, y in zip(columns, x.chunk(4, dim=1), strict=True):
        leaves.append(pack(column, partial=True)(y))
    assert torch.equal(add_leaves(leaves), whole)


# ---- models


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    """The directory of the random Llama that most tests use, and none changes."""
    return directory(tmp_path_factory.mktemp("quantize") / "m")


@pytest.fixture
def copied(checkpoint_path, tmp_path):
    """Another one, alone in a folder, where a command may write."""
    return directory(tmp_path / "m")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_batches_keep_the_bits_of_prefill(checkpoint_path, mode, precision):
    flags = ["--quantize", mode, "--deterministic", "--precision", precision]
    model = load(checkpoint_path, *flags)
    want = logits(model, IDS)
    for chunk, batch in ((1, 1), (7, 1), (64, 1), (None, 3), (1, 5)):
        assert torch.equal(logits(model, IDS, chunk, batch), want), (chunk, batch)


def test_int4_with_leaves_for_several_rows_has_other_bits(checkpoint_path):
    """A negative control. Without the flag, some CPUs have the same bits."""
    model = load(checkpoint_path, "--quantize", "int4", "--deterministic")
    follow(model, LeavesForSeveralRows())
    assert not torch.equal(logits(model, IDS, 1), logits(model, IDS))


def test_int8_with_one_scale_for_all_rows_has_other_bits(checkpoint_path, monkeypatch):
    """The other negative control: inputs scaled by the largest of all rows."""
    model = load(checkpoint_path, "--quantize", "int8", "--deterministic")
    amax = Tensor.amax

    def of_all(x, dim, keepdim=False):
        return amax(x, None if keepdim else dim)

    monkeypatch.setattr(Tensor, "amax", of_all)
    assert not torch.equal(logits(model, IDS, 7), logits(model, IDS))


@pytest.mark.parametrize(("mode", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])
def test_a_directory_has_the_bits_of_quantizing_while_loading(copied, mode, group):
    ran = command("--checkpoint_path", copied, "--mode", mode, "--group_size", group)
    out = Path(ran.stdout.strip())
    assert ran.returncode == 0 and out.parent == copied.parent, ran.stderr
    config = json.loads((out / "config.json").read_text())
    how = {"quant_method": "gpt-exact", "mode": mode, "group_size": group}
    assert config["quantization_config"] == how
    stored = load(out)
    loaded = load(copied, "--quantize", mode, "--group_size", str(group))
    assert torch.equal(logits(stored, IDS), logits(loaded, IDS))
    assert stored.nbytes == loaded.nbytes
    plain = load(copied)
    assert stored.nbytes < plain.nbytes
    assert not torch.equal(logits(stored, IDS), logits(plain, IDS))
    again = command("--checkpoint_path", out, "--mode", mode)
    assert again.returncode == 2 and f"{mode} already" in again.stderr
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", MODES)
def test_random_weights_are_quantized(tmp_path, mode):
    """While loading, by the flag or by the config.json of a quantized directory."""
    how = {"quantization_config": {"quant_method": "gpt-exact", "mode": mode, "group_size": 32}}

    def random(name: str, config: dict, *flags: str) -> Tensor:
        (tmp_path / name).write_text(json.dumps(config))
        args = cli.parse_args(["--random_weights", str(tmp_path / name), *flags])
        model, _ = generate.load(args)
        return logits(model, IDS)

    asked = random("plain.json", CONFIG, "--quantize", mode)
    assert torch.isfinite(asked).all()
    assert torch.equal(random("quantized.json", CONFIG | how), asked)
    assert not torch.equal(random("plain.json", CONFIG), asked)


def short_requests() -> list[Request]:
    requests = []
    for i in range(5):
        ids = IDS[i : i + 9] * 2
        requests.append(Request(i, "", ids, max_new_tokens=24, temperature=0.3))
    return requests


def speculated(model: Transformer, drafter=None):
    """Answers in a batch of 2 to what a text that repeats itself leads to, and how many rounds have
    accepted so many drafts."""
    engine = generate.Engine(model, Tokenizer(None), 2, 80, drafter=drafter)
    return answers(engine, short_requests()), engine.stats.accept_counts


@pytest.mark.parametrize("mode", MODES)
def test_drafts_change_no_bits(checkpoint_path, mode, monkeypatch):
    """Those from the text, and others of which some are right; the negative control is that all are
    accepted."""
    model = load(checkpoint_path, "--quantize", mode, "--deterministic")
    want, _ = speculated(model)
    found, counts = speculated(model, drafts.PromptLookup(3))
    assert found == want and sum(counts)
    found, counts = speculated(model, HalfRight(want, 3))
    assert found == want and counts[0] + counts[1] + counts[2] and sum(counts[1:])
    monkeypatch.setattr(drafts, "agreement", lambda a, b: len(a))
    assert speculated(model, HalfRight(want, 3))[0] != want


@pytest.mark.slow
@needs_compiler
def test_graphs_change_no_bits(tmp_path):
    """Of steps; those of prefill and drafts, and int4, are in test_mixture.py."""
    path = directory(tmp_path / "m", CONFIG | {"num_hidden_layers": 1})
    model = load(path, "--quantize", "int8", "--deterministic")
    want, _ = speculated(model)
    machine.set_up(model, True, False)
    assert speculated(model)[0] == want


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_quantized_draft_of_the_model_itself_changes_no_bits(checkpoint_path, mode, monkeypatch):
    monkeypatch.setattr(loading, "Tokenizer", lambda directory: Tokenizer(None))
    flags = ["--checkpoint_path", str(checkpoint_path), "--device", "cpu", "--deterministic"]
    flags += ["--batch_size", "2", "--speculate_k", "3", "--draft_quantize", "int4"]
    if mode:
        flags += ["--quantize", mode]
    args = cli.parse_args(flags)
    model, words = generate.load(args)
    speculating = generate.build(args, model, words, 80)
    plain = generate.Engine(model, words, 2, 80)
    hot = []
    for i in range(5):
        ids = IDS[i : 2 * i + 3]
        hot.append(Request(i, "", ids, max_new_tokens=24, temperature=0.7 * (i % 2)))
    want = answers(plain, hot)
    assert answers(speculating, hot) == want
    counts = speculating.stats.accept_counts
    assert counts[-1]
    assert bool(counts[0]) == (mode != "int4")  # then the model drafts for itself
    # The negative control: as many requests that draw with other noise.
    assert answers(speculating, [replace(request, seed=5) for request in hot]) != want


UNTIED = CONFIG | {"tie_word_embeddings": False}
BAD_CONFIGS = {  # quantization_config, and the message
    "method": ({"quant_method": "awq", "bits": 4}, "quantized by awq; convert it"),
    "group": ({"mode": "int4", "group_size": 7}, "group_size 7 is not supported"),
    "int4": ({"mode": "int4", "group_size": 32}, "missing"),
    "int8": ({"mode": "int8"}, "missing"),
}


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, message):
    path = directory(tmp_path / "m", UNTIED)
    (path / "config.json").write_text(json.dumps(UNTIED | {"quantization_config": config}))
    with pytest.raises(checkpoint.Refusal, match=message):
        load(path)


def test_a_weight_of_another_type_is_refused(copied):
    ran = command("--checkpoint_path", copied, "--mode", "int8")
    out = Path(ran.stdout.strip())
    path = next(out.glob("*.safetensors"))
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    assert tensors[name].dtype == torch.int8
    save_file(tensors | {name: tensors[name].bfloat16()}, path)
    message = rf"{name} is BF16 \[384, 192\], expected I8 \[384, 192\]"
    with pytest.raises(checkpoint.Refusal, match=message):
        load(out)


# ---- the command


BAD_ARGUMENTS = [
    (["--mode", "int4", "--group_size", "128"], "group_size 128 does not divide 192 inputs"),
    (["--mode", "int4", "--group_size", "48"], "choose from 32, 64, 128"),
    (["--mode", "int5"], "expected --mode int8"),
    (["--mode", "int4", "--grop_size", "64"], "--grop_size"),
    (["--mode", "int8", "--checkpoint_path", "nowhere"], "nowhere"),
]


def assert_one_line_and_nothing_written(ran, message: str, folder: Path) -> None:
    assert ran.returncode == 2, ran
    assert ran.stderr.startswith("error: ") and message in ran.stderr, ran
    assert ran.stderr.count("\n") == 1, ran
    assert [path.name for path in folder.iterdir()] == ["m"]


@pytest.mark.parametrize(("flags", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(copied, flags, message):
    ran = command("--checkpoint_path", copied, *flags)
    assert_one_line_and_nothing_written(ran, message, copied.parent)


def test_a_truncated_file_is_one_line_and_writes_nothing(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ran = command("--checkpoint_path", copied, "--mode", "int8")
    assert_one_line_and_nothing_written(ran, "truncated", copied.parent)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """More cannot be written, as to a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing(copied):
    with files_of_at_most(20_000):
        ran = command("--checkpoint_path", copied, "--mode", "int8")
    assert_one_line_and_nothing_written(ran, "", copied.parent)


def test_a_killed_command_leaves_nothing_that_looks_whole(tmp_path):
    path = directory(tmp_path / "m", CONFIG | {"num_hidden_layers": 8, "intermediate_size": 6144})
    words = [sys.executable, "quantize.py", "--checkpoint_path", path, "--mode", "int4"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(words, cwd=ROOT, env=env)
    begun = []
    while not begun and running.poll() is None:
        begun = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert begun
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["m"]
    assert not list(tmp_path.rglob(".*/**/config.json"))


def test_help_lists_the_flags_of_this_command():
    ran = command("--help")
    assert ran.returncode == 0 and quantize.__doc__.splitlines()[0] in ran.stdout
    flags = set(re.findall(r"--\w+", ran.stdout.split("options:")[1]))
    assert flags == {"--help", "--checkpoint_path", "--mode", "--group_size", "--out"}


NO_USE = [["--device", "cpu"], ["--deterministic"], ["--precision", "fp32"], ["--prompt", "hi"]]
NO_USE += [["--quantize", "int8"], ["--output", "file"], ["--json"], ["more"], ["--chec", "m"]]


@pytest.mark.parametrize("flags", NO_USE, ids=" ".join)
def test_a_flag_that_would_do_nothing_is_refused(copied, flags):
    ran = command("--checkpoint_path", copied, "--mode", "int8", *flags)
    assert_one_line_and_nothing_written(ran, f"unrecognized arguments: {flags[0]}", copied.parent)


def test_a_mode_is_needed_and_the_choices_are_named(copied):
    ran = command("--checkpoint_path", copied)
    assert_one_line_and_nothing_written(ran, "--mode", copied.parent)
    ran = command("--checkpoint_path", copied, "--mode", "int5")
    assert_one_line_and_nothing_written(
        ran, "--mode int8 or --mode int4, not 'int5'", copied.parent
    )


@pytest.mark.parametrize("flag", ["--out", "--checkpoint_path", "--mode", "--group_size"])
def test_two_dashes_are_no_value(copied, flag):
    flags = ["--checkpoint_path", copied, "--mode", "int8", f"{flag}=--"]
    assert_one_line_and_nothing_written(command(*flags), flag, copied.parent)


def test_several_processes_are_refused(copied, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(checkpoint.Refusal, match="one process"):
        monkeypatch.setattr(sys, "argv", ["quantize.py", "--mode", "int8"])
        quantized.run()


def test_a_missing_default_model_is_fetched(tmp_path, monkeypatch):
    """As generate.py does it, and an error of that is one line as well."""
    monkeypatch.setattr(download, "DEFAULT", tmp_path / "m")
    monkeypatch.setattr(download, "fetch", directory)
    ran = command("--mode", "int8")
    assert ran.returncode == 0 and f"{tmp_path / 'm'} is missing, fetching it" in ran.stderr
    assert load(tmp_path / "m-int8").config.quantization == "int8"

    def fail(directory):
        raise ValueError("no network")

    monkeypatch.setattr(download, "DEFAULT", tmp_path / "other")
    monkeypatch.setattr(download, "fetch", fail)
    ran = command("--mode", "int8")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[1:] == [
        "error: the default checkpoint cannot be had: no network"
    ]


PART = "model.layers.1.mlp.down_proj.weight"
NOT_FINITE = [
    (PART, float("nan"), torch.bfloat16),
    (PART, float("-inf"), torch.float32),
    ("model.norm.weight", float("inf"), torch.float16),
    ("model.embed_tokens.weight", float("nan"), torch.float32),
    ("model.layers.0.self_attn.q_proj.bias", float("nan"), torch.bfloat16),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "value", "dtype"), NOT_FINITE, ids=str)
def test_numbers_that_are_none_are_refused(tmp_path, mode, name, value, dtype):
    path = directory(tmp_path / "m", dtype=dtype)
    tensors = load_file(path / "model.safetensors")
    tensors[name].flatten()[-1] = value
    save_file(tensors, path / "model.safetensors")
    ran = command("--checkpoint_path", path, "--mode", mode)
    assert_one_line_and_nothing_written(ran, f"{path}: tensor {name} has NaN", tmp_path)


def test_numbers_whose_codes_would_be_none_are_refused(tmp_path):
    """Finite ones, of which the range of a group is not."""
    path = directory(tmp_path / "m", dtype=torch.float32)
    tensors = load_file(path / "model.safetensors")
    tensors[PART][0, :2] = torch.tensor([3e38, -3e38])
    save_file(tensors, path / "model.safetensors")
    ran = command("--checkpoint_path", path, "--mode", "int4")
    assert_one_line_and_nothing_written(ran, f"{path}: tensor {PART}", tmp_path)
    assert command("--checkpoint_path", path, "--mode", "int8").returncode == 0


@contextlib.contextmanager
def as_somebody_else():
    """Not as root, who may write what is closed to writing."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder():
    """One where everybody may write; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_files_that_are_closed_to_writing_are_copied(open_folder):
    """By a user who is not root; what lies beside them and is no file is left alone."""
    path = directory(open_folder / "m")
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("hello")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("pages")
    for file in filter(Path.is_file, path.rglob("*")):
        file.chmod(0o444)
    (path / "folder.json").mkdir()
    (path / "link.json").symlink_to("nothing")
    os.mkfifo(path / "pipe.txt")
    path.chmod(0o555)
    with as_somebody_else():
        ran = command("--checkpoint_path", path, "--mode", "int8")
    assert ran.returncode == 0, ran.stderr
    names = {file.name: file for file in (open_folder / "m-int8").iterdir()}
    others = {"config.json", "tokenizer.json", "chat_template.jinja"}
    folder = names.pop("additional_chat_templates")
    assert (folder / "rag.jinja").read_text() == "pages"
    assert names.keys() == others | {"model-00000.safetensors"}
    assert names["chat_template.jinja"].read_text() == "hello"


def test_a_source_that_is_quantized_is_refused(copied):
    for mode, other in (MODES, MODES[::-1], ("int4", "int4")):
        out = quantized.write(copied, None, mode, 32)
        ran = command("--checkpoint_path", out, "--mode", other)
        assert ran.stderr == f"error: {out / 'config.json'}: the checkpoint is {mode} already\n"
        assert sorted(os.listdir(copied.parent)) == ["m", out.name]
        shutil.rmtree(out)


TARGETS = {  # of --out, and the message
    "full/file": "full/file exists",
    "full": "full exists",
    "m": "m exists",
    "dangling": "dangling is a link to nothing",
    "nowhere/new": "nowhere is no directory",
    "full/file/new": "file is no directory",
    "dangling/new": "dangling is no directory",
    "m/new": "m/new is inside of",
    "inside/new": "inside/new is inside of",
    "m/../m/./new": "is inside of",
    "n" * 256: "File name too long",
}


@pytest.mark.parametrize("out", TARGETS)
def test_a_target_that_cannot_be_made_is_refused(copied, out):
    folder = copied.parent
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nothing")
    (folder / "inside").symlink_to("m")
    before = sorted(folder.rglob("*"))
    ran = command("--checkpoint_path", copied, "--mode", "int8", "--out", folder / out)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: ") and TARGETS[out] in ran.stderr, ran.stderr
    assert sorted(folder.rglob("*")) == before
    assert (folder / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_target_without_a_name_is_refused(copied, out):
    ran = command("--checkpoint_path", copied, "--mode", "int8", "--out", out)
    assert_one_line_and_nothing_written(ran, "has no name", copied.parent)


@pytest.mark.parametrize("size", [0, 100, 3000, 200_000])
def test_wherever_a_disk_is_full_nothing_is_left(copied, size):
    """While a small file is copied, and while the weights are written. The file is named."""
    (copied / "tokenizer.json").write_text("[" + "0," * 150_000 + "0]")
    with files_of_at_most(size):
        ran = command("--checkpoint_path", copied, "--mode", "int8")
    assert_one_line_and_nothing_written(ran, "m-int8/", copied.parent)
    assert "too large" in ran.stderr


def test_an_error_of_the_disk_is_one_line(copied, monkeypatch):
    for error in (OSError(28, "No space left"), SafetensorError("I/O error: No space left")):

        def fail(tensors, path, metadata, error=error):
            path.write_bytes(b"half")
            raise error

        monkeypatch.setattr(quantized, "save_file", fail)
        ran = command("--checkpoint_path", copied, "--mode", "int4")
        assert_one_line_and_nothing_written(ran, "No space left", copied.parent)


def test_a_run_after_a_killed_one_removes_what_that_left(tmp_path):
    """Wherever it was killed; what a run that is alive has begun stays."""
    path = directory(tmp_path / "m", CONFIG | {"num_hidden_layers": 8, "intermediate_size": 6144})
    words = [sys.executable, "quantize.py", "--checkpoint_path", path, "--mode", "int4"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    killed, stopped = (subprocess.Popen(words, cwd=ROOT, env=env) for _ in range(2))
    end = time.monotonic() + 60
    while len(list(tmp_path.glob(".*.unfinished"))) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.1)  # by then they have locked them
    stopped.send_signal(signal.SIGSTOP)
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.glob(".*"))) == 2
    target = quantized.write(path, None, "int4", 32)
    assert len(list(tmp_path.glob(".*"))) == 1
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(60) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", target.name]
    load(target)
