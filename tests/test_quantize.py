"""int8 and int4 weights: codes, layouts on disk, directories, and the same bits with --deterministic. Each comparison
of bits is also made where it must fail."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import generate
import quantize
from kernels import BATCH_INVARIANT, FAST, add_leaves
from model import InputError, ModelConfig, Transformer, load_checkpoint
from quantize import Int4Linear, Int8Linear
from tests.contract import HalfRight

ROOT = Path(__file__).parent.parent
ROWS = (1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 257, 500)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("int8", "int4")
CPU = torch.device("cpu")
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


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nibbles(codes):
    """uint8 [N, K] of the two numbers in each byte [N, K / 2]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def cut(part, dim, rank, size):
    """One of `size` shares of a quantized weight, its scale or its zero, along N (dim 0) or K (1)."""
    return part if part.shape[dim] == 1 else part.chunk(size, dim)[rank]


def floats(parts, group=None):
    """What quantized parts stand for, fp32 [N, K]."""
    codes, scale = parts["weight"], parts["scale"].float()
    if "zero" not in parts:
        return codes * scale
    codes = nibbles(codes).float().unflatten(1, (scale.shape[1], -1))
    return ((codes - parts["zero"].float()[..., None]) * scale[..., None]).flatten(1)


def packed(mode, weight, ops=FAST, bias=None, leaves=1, group=32):
    parts = quantize.LINEARS[mode].from_float(weight, group)
    return quantize.pack(ops, **parts, bias=bias, leaves=leaves), floats(parts)


def directory(path, config=CONFIG, dtype=torch.bfloat16, seed=0):
    """A checkpoint of random weights on disk."""
    from safetensors.torch import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    model = Transformer(ModelConfig.from_file(path / "config.json"), FAST, CPU, dtype)
    shapes = {name: shape for layer in model.takers for name, shape in layer.shapes.items()}
    tensors = {n: randn(*s, seed=seed + i) * (0.1 if len(s) == 2 else 0.5) for i, (n, s) in enumerate(shapes.items())}
    tensors = {n: (t + 1 if "norm" in n else t).to(dtype) for n, t in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def load(path, *flags):
    args = generate.parse_args(["--checkpoint_path", str(path), "--device", "cpu", *flags])
    config = ModelConfig.from_file(path / "config.json", args.quantize, args.group_size)
    ops = BATCH_INVARIANT if args.deterministic else FAST
    model = Transformer(config, ops, CPU, generate.PRECISIONS[args.precision])
    load_checkpoint(model, path)
    return model


@torch.inference_mode()
def logits(model, ids, chunk=None, batch=1):
    """fp32 logits [T, V] of the first row of a batch fed in chunks."""
    cache, chunk, out = model.new_cache(batch, len(ids)), chunk or len(ids), []
    others = torch.arange(len(ids)).flip(0) % 100
    tokens = torch.stack([torch.tensor(ids), *[others] * (batch - 1)])
    for start in range(0, len(ids), chunk):
        now = tokens[:, start : start + chunk]
        pos = torch.arange(start, start + now.shape[1]).expand(batch, -1)
        out.append(model(now, pos, cache, start + now.shape[1])[0])
    return torch.cat(out)


IDS = [(7 * i * i + 3 * i) % 160 for i in range(70)]


def command(*args, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "quantize.py"), *map(str, args)], capture_output=True, text=True, **options
    )


# Codes.


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_are_within_half_a_step(group):
    weight = randn(48, 256)
    parts = Int4Linear.from_float(weight, group)
    assert parts["weight"].dtype == torch.uint8 and parts["weight"].shape == (48, 128)
    assert parts["scale"].shape == parts["zero"].shape == (48, 256 // group)
    step = parts["scale"].float().repeat_interleave(group, dim=1)
    inside = (nibbles(parts["weight"]) > 0) & (nibbles(parts["weight"]) < 15)  # of limits that may be narrower
    assert ((floats(parts) - weight).abs() <= 0.53 * step)[inside].all()  # scale and zero are rounded as well
    assert inside.float().mean() > 0.9 - 2 / group
    parts = Int8Linear.from_float(weight, group)
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
    parts = Int4Linear.from_float(codes.float(), 32)
    assert torch.equal(nibbles(parts["weight"]), codes.to(torch.uint8))
    assert parts["weight"][0, 1] == 2 | 3 << 4


# Products.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "exact"])
@pytest.mark.parametrize("N", [96, 72])  # the second is no whole number of the kernel's blocks
def test_products_are_close_to_those_of_the_floats(mode, dtype, ops, N):
    weight, bias, x = randn(N, 192) * 0.1, randn(N), randn(70, 192, seed=1).to(dtype)
    for leaves in (1, 3):
        layer, floated = packed(mode, weight, ops, bias, leaves)
        want = x.float() @ floated.T + bias
        for rows in (1, 70):
            got = layer(x[:rows])
            assert got.dtype == (torch.float32 if leaves > 1 and ops.exact else dtype) and got.shape == (rows, N)
            error = (got.float() - want[:rows]).abs().max() / want.abs().max()
            assert error < (0.02 if dtype == torch.bfloat16 else 0.002)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "leaves"), [(96, 192, 3), (72, 256, 4), (576, 1536, 3), (960, 576, 1)])
def test_rows_keep_their_bits_at_every_m(mode, dtype, N, K, leaves):
    layer, _ = packed(mode, randn(N, K), BATCH_INVARIANT, randn(N), leaves)
    x = randn(max(ROWS), K, seed=1).to(dtype)
    want = layer(x)
    for M in ROWS:
        assert torch.equal(layer(x[:M]), want[:M]), M
        assert torch.equal(layer(x[-M:].flip(0)), want[-M:].flip(0)), M


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the layout that is known")
def test_a_weight_is_expanded_to_what_the_kernel_computes_with():
    weight = randn(128, 64).bfloat16()
    layer, want = packed("int4", weight)
    one_hot = torch.eye(64)
    kernel = quantize.pack(BATCH_INVARIANT, **quantize.parts("int4", weight, 32)).products(one_hot)
    torch.testing.assert_close(layer.expanded(torch.float32), kernel, rtol=0, atol=1e-6)
    torch.testing.assert_close(kernel.T, want, rtol=0.01, atol=0.01)


def test_expanding_many_rows_changes_bits():
    """The negative control: what FAST does with many rows."""
    layer, _ = packed("int4", randn(960, 576))
    x = randn(128, 576, seed=1).bfloat16()
    assert not torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("mode", MODES)
def test_leaves_change_bits(mode):
    """Another negative control: the sum of whole rows has other bits than that of leaves."""
    x, weight = randn(16, 192, seed=1), randn(96, 192)
    assert not torch.equal(*(packed(mode, weight, BATCH_INVARIANT, None, n)[0](x) for n in (1, 3)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32])
def test_threads_change_no_bits(mode, threads):
    layer, _ = packed(mode, randn(576, 1536), BATCH_INVARIANT, None, 3)
    x = randn(20, 1536, seed=1).bfloat16()
    torch.set_num_threads(1)
    want = layer(x)
    torch.set_num_threads(threads)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("leaves", [0, 1, 3])
def test_both_kernels_of_int8_have_the_same_bits(leaves, monkeypatch):
    """One for CPUs with AMX and one for others, whose sums are exact."""
    parts, x = quantize.parts("int8", randn(576, 1536), 0), randn(40, 1536, seed=1)
    y = []
    for amx in (False, True):
        monkeypatch.setattr(quantize, "AMX", amx)
        y.append(quantize.Int8Linear(parts["weight"], None, leaves, parts["scale"])(x))
    assert torch.equal(*y)
    assert not torch.equal(y[0], quantize.Int8Linear(parts["weight"], None, 2, parts["scale"])(x))


SATURATED = """
import torch, quantize
quantize.AMX = False
weight, x = torch.randn(96, 576).abs(), torch.randn(7, 576).abs()  # all sums of two products are large
parts = quantize.parts("int8", weight, 0)
y = quantize.Int8Linear(parts["weight"], None, 0, parts["scale"])(x)
want = x.double() @ (parts["weight"].double() * parts["scale"].double()).T
print((y - want).abs().max().item() / want.abs().max().item())
"""


@pytest.mark.skipif(not quantize.AMX, reason="needs a processor that can act as an older one")
@pytest.mark.parametrize("units", ["AVX2", "AVX512", "AVX512_E1"])
def test_int8_on_older_processors(units):
    """Without VNNI, products are added in pairs of 16 bits, which must hold them."""
    environment = os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": units}
    done = subprocess.run([sys.executable, "-c", SATURATED], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert float(done.stdout) < 1e-3, done


def test_int8_of_large_sums_in_half_precision():
    """Codes times numbers in fp16 pass its range where the products of the floats do not."""
    layer, floated = packed("int8", randn(96, 576).abs())
    x = randn(70, 576, seed=1).abs().half() * 10
    torch.testing.assert_close(layer(x).float(), x.float() @ floated.T, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [32, 64])
def test_shares_of_ranks_make_the_whole(mode, group):
    """Cut along N the outputs are stacked; along K, leaf by leaf, the sums are those of the whole, bit for bit."""
    weight, x = randn(96, 256), randn(5, 256, seed=1).bfloat16()
    parts, pack = quantize.parts(mode, weight, group), functools.partial(quantize.pack, BATCH_INVARIANT)
    whole = pack(**parts, leaves=4)
    share = lambda dim, rank, size, leaves: pack(
        **{kind: cut(part, dim, rank, size) for kind, part in parts.items()}, leaves=leaves
    )
    leaf = lambda y, packed: packed(y.float() if mode == "int8" else y)  # which rounds to the type of y
    rows = [share(0, rank, 3, 4)(x) for rank in range(3)]
    assert torch.equal(torch.cat(rows, dim=1), whole(x))
    columns = [floats({kind: cut(part, 1, rank, 4) for kind, part in parts.items()}) for rank in range(4)]
    assert torch.equal(torch.cat(columns, dim=1), floats(parts))
    leaves = torch.stack([leaf(y, share(1, rank, 4, 1)) for rank, y in enumerate(x.chunk(4, dim=1))], dim=1)
    assert torch.equal(add_leaves(leaves), whole(x))


# Models.


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_batches_keep_the_bits_of_prefill(tmp_path, mode, precision):
    model = load(directory(tmp_path / "m"), "--quantize", mode, "--deterministic", "--precision", precision)
    want = logits(model, IDS)
    for chunk, batch in ((1, 1), (7, 1), (64, 1), (None, 3), (1, 5)):
        assert torch.equal(logits(model, IDS, chunk, batch), want), (chunk, batch)


def test_int4_without_the_flag_has_other_bits(tmp_path):
    """A negative control. FAST adds up int8 weights as exactly as the other table does."""
    model = load(directory(tmp_path / "m"), "--quantize", "int4")
    assert not torch.equal(logits(model, IDS, 1), logits(model, IDS, None, 3))


def test_int8_with_one_scale_for_all_rows_has_other_bits(tmp_path, monkeypatch):
    """The other negative control: inputs scaled by the largest of all rows."""
    model, amax = load(directory(tmp_path / "m"), "--quantize", "int8", "--deterministic"), torch.Tensor.amax
    of_all = lambda x, dim, keepdim=False: amax(x, None if keepdim else dim)
    monkeypatch.setattr(torch.Tensor, "amax", of_all)
    assert not torch.equal(logits(model, IDS, 7), logits(model, IDS))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_has_the_bits_of_eager(tmp_path, mode):
    model = load(directory(tmp_path / "m"), "--quantize", mode, "--deterministic")
    want = logits(model, IDS)
    generate.set_up(model, True, True)
    assert torch.equal(logits(model, IDS), want)
    assert torch.equal(logits(model, IDS, 1), want)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("mode", MODES)
def test_a_directory_has_the_bits_of_quantizing_while_loading(tmp_path, mode, group):
    path = directory(tmp_path / "m")
    ran = command("--checkpoint_path", path, "--mode", mode, "--group_size", group)
    out = Path(ran.stdout.strip())
    assert ran.returncode == 0 and out.parent == tmp_path, ran.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gpt-exact", "mode": mode, "group_size": group}
    a, b = load(out), load(path, "--quantize", mode, "--group_size", str(group))
    assert torch.equal(logits(a, IDS), logits(b, IDS)) and a.nbytes == b.nbytes
    plain = load(path)
    assert a.nbytes < plain.nbytes
    assert not torch.equal(logits(a, IDS), logits(plain, IDS))
    again = command("--checkpoint_path", out, "--mode", mode)
    assert again.returncode == 2 and f"{mode} already" in again.stderr and again.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", MODES)
def test_random_weights_are_quantized(tmp_path, mode):
    """While loading, by the flag or by the config.json of a quantized directory."""
    how = {"quantization_config": {"quant_method": "gpt-exact", "mode": mode, "group_size": 32}}

    def random(name, config, *flags):
        (tmp_path / name).write_text(json.dumps(config))
        model, _ = generate.load(generate.parse_args(["--random_weights", str(tmp_path / name), *flags]))
        return logits(model, IDS)

    asked = random("plain.json", CONFIG, "--quantize", mode)
    assert torch.isfinite(asked).all() and torch.equal(random("quantized.json", CONFIG | how), asked)
    assert not torch.equal(random("plain.json", CONFIG), asked)


@pytest.mark.parametrize("mode", MODES)
def test_drafts_from_the_text_change_no_bits(tmp_path, mode, monkeypatch):
    """And beside drafts of which some are right; the negative control is that all are accepted."""
    model, words = load(directory(tmp_path / "m"), "--quantize", mode, "--deterministic"), generate.Tokenizer(None)
    asked = [generate.Request(i, "", IDS[i : i + 9] * 2, max_new_tokens=40, temperature=0.3) for i in range(5)]

    def answers(**speculation):
        engine = generate.Engine(model, words, 2, 80, **speculation)
        engine.pays = 0  # so that every draft is checked
        found = {c.request.id: (c.tokens, c.logprobs) for c, _ in engine.generate(asked) if c.finish_reason}
        return found, engine.accept_counts

    want, _ = answers()
    found, counts = answers(propose=generate.prompt_lookup, k=3)
    assert found == want and sum(counts)
    found, counts = answers(propose=HalfRight(want), k=3)
    assert found == want and counts[0] + counts[1] + counts[2] and sum(counts[1:])
    monkeypatch.setattr(generate, "agreement", lambda a, b: len(a))
    assert answers(propose=HalfRight(want), k=3)[0] != want


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_quantized_draft_of_the_model_itself_changes_no_bits(tmp_path, mode, monkeypatch):
    words = generate.Tokenizer(None)
    monkeypatch.setattr(generate, "Tokenizer", lambda directory: words)
    flags = ["--checkpoint_path", str(directory(tmp_path / "m")), "--device", "cpu", "--deterministic"]
    flags += ["--batch_size", "2", "--speculate_k", "3", "--draft_quantize", "int4"]
    flags += ["--quantize", mode] if mode else []
    args = generate.parse_args(flags)
    model, _ = generate.load(args)
    speculating = generate.build(args, model, words, 80)
    plain = generate.Engine(model, words, 2, 80)
    hot = [generate.Request(i, "", IDS[i : 2 * i + 3], max_new_tokens=40, temperature=0.7 * (i % 2)) for i in range(5)]
    answers = lambda engine: {c.request.id: (c.tokens, c.logprobs) for c, _ in engine.generate(hot) if c.finish_reason}
    want = answers(plain)
    assert answers(speculating) == want
    assert speculating.accept_counts[-1]
    assert bool(speculating.accept_counts[0]) == (mode != "int4")  # then the model drafts for itself
    # The negative control: as many requests that draw with other noise.
    hot = [replace(request, seed=5) for request in hot]
    assert answers(speculating) != want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq is not supported"),
        ({"quantization_config": {"mode": "int4", "group_size": 7}}, "group_size 7 is not supported"),
        ({"quantization_config": {"mode": "int4", "group_size": 32}}, "is BF16 [192, 192], expected U8 [192, 96]"),
        ({"quantization_config": {"mode": "int8"}}, "is BF16 [192, 192], expected I8 [192, 192]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    path = directory(tmp_path / "m", CONFIG | {"tie_word_embeddings": False})
    (path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False} | change))
    with pytest.raises(InputError) as error:
        load(path)
    assert message in str(error.value) or "is missing" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "int4", "--group_size", "128"], "group_size 128 does not divide 192 inputs"),
        (["--mode", "int4", "--group_size", "48"], "choose from 32, 64, 128"),
        (["--mode", "int5"], "expected --mode int8"),
        (["--mode", "int4", "--grop_size", "64"], "--grop_size"),
        (["--mode", "int4-gptq"], "expected --mode int8"),
        (["--mode", "int8", "--checkpoint_path", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, flags, message):
    path = directory(tmp_path / "m")
    ran = command("--checkpoint_path", path, *flags)
    assert ran.returncode == 2 and message in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_truncated_file_is_one_line_and_writes_nothing(tmp_path):
    path = directory(tmp_path / "m")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    ran = command("--checkpoint_path", path, "--mode", "int8")
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "truncated" in ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """Files of more than 20 kB cannot be written, as to a disk that is full."""
    path = directory(tmp_path / "m")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    ran = command("--checkpoint_path", path, "--mode", "int8", preexec_fn=limit)
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_killed_command_leaves_nothing_that_looks_whole(tmp_path):
    path = directory(tmp_path / "m", CONFIG | {"num_hidden_layers": 24, "intermediate_size": 6144})
    process = subprocess.Popen([sys.executable, ROOT / "quantize.py", "--checkpoint_path", path, "--mode", "int4"])
    while not (begun := [p for p in tmp_path.iterdir() if p.name.startswith(".")]) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert begun
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["m"]
    assert not list(tmp_path.rglob(".*/**/config.json"))


# Limits.


def nearest(weight, group):
    """What rounding between the least and the largest of each group makes of a weight."""
    w = weight.unflatten(1, (-1, group))
    least, most = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / 15).bfloat16().float()
    zero = (-least / scale).half().float()
    return (((w / scale + zero).round().clamp(0, 15) - zero) * scale).flatten(1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_narrower_limits_lower_the_error(group):
    """Of each group, and by a tenth of all where weights have the tails of a normal distribution; never where the
    whole range is in use, which the last assertion holds against it."""
    error = lambda a, b: (a - b).unflatten(1, (-1, group)).square().sum(-1)
    weight = randn(256, 512)
    found, plain = floats(Int4Linear.from_float(weight, group)), nearest(weight, group)
    assert (error(found, weight) <= 1.001 * error(plain, weight)).all()
    assert error(found, weight).sum() < 0.93 * error(plain, weight).sum()
    even = torch.linspace(-1, 1, 16).repeat(8, 512 // 16)
    assert error(floats(Int4Linear.from_float(even, group)), even).sum() == error(nearest(even, group), even).sum()


def test_the_codes_of_a_gguf_come_back():
    """Groups of 32 as Q4_1 makes them, d * code + m with fp16 d and m, rounded to bf16: the codes survive."""
    codes = torch.randint(16, (512, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15  # its least and its largest are in each group
    d, m = (randn(512, 2).abs() * 0.02 + 1e-3).half(), -(randn(512, 2, seed=1).abs() * 0.05 + 0.01).half()
    weight = codes.unflatten(1, (2, 32)) * d.float()[..., None] + m.float()[..., None]
    keep = (weight.amin(-1) < 0) & (weight.amax(-1) > 0)
    got = nibbles(Int4Linear.from_float(weight.flatten(1).bfloat16(), 32)["weight"]).unflatten(1, (2, 32))
    assert keep.float().mean() > 0.5 and torch.equal(got[keep].long(), codes.unflatten(1, (2, 32))[keep])
