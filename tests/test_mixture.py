"""Mixtures of experts beyond what test_model.py compares with transformers and what the models of
test_deterministic.py keep: graphs, drafts, quantized experts, ranks, ties of the router."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_compiler
from safetensors.torch import load_file, save_file
from test_quantize import CONFIG as DENSE
from test_quantize import answers, command, directory, floats, load, logits

import generate
import quantize
from generate import Engine
from model import InputError
from scripts import machine
from scripts.checkpoint import Refusal
from scripts.contract import HalfRight
from scripts.families import Mixture
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
MIXTURES = {"mixtral": CONFIG | MIXTRAL, "qwen3-moe": CONFIG | QWEN3_MOE}
MODES = {
    "bf16": [],
    "fp32": ["--precision", "fp32"],
    "int8": ["--quantize", "int8"],
    "int4": ["--quantize", "int4"],
}
IDS = torch.randint(160, (90,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """A function from a name in MIXTURES to a directory of random weights, which nobody changes."""

    @functools.cache
    def make(name):
        return directory(tmp_path_factory.mktemp("mixture") / name, MIXTURES[name])

    return make


def by_expert_if_several(layer, x_BTD):
    """Broken: where there are several tokens, what experts say is added in their order, not in the
    token's own."""
    probs = layer.router(x_BTD.float()).softmax(-1)
    kept, chosen = probs.sort(dim=-1, descending=True, stable=True)
    kept = kept[..., :3] / kept[..., :3].sum(-1, keepdim=True)
    weights = torch.zeros_like(probs).scatter(-1, chosen[..., :3], kept)
    terms = [weights[..., i, None] * expert(x_BTD) for i, expert in enumerate(layer.experts)]
    return functools.reduce(torch.add, terms)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_batches_keep_the_bits_of_prefill(path_of, mode):
    model = load(path_of("qwen3-moe"), "--deterministic", *MODES[mode])
    want = logits(model, IDS)
    for chunk, batch in ((1, 1), (7, 1), (64, 1), (None, 3), (1, 5)):
        assert torch.equal(logits(model, IDS, chunk, batch), want), (chunk, batch)


def test_adding_by_expert_has_other_bits(path_of, monkeypatch):
    """The negative control: close to the mixture, and not the same."""
    model = load(path_of("qwen3-moe"), "--deterministic", "--precision", "fp32")
    want, products = logits(model, IDS), Mixture.products
    monkeypatch.setattr(Mixture, "products", by_expert_if_several)
    torch.testing.assert_close(logits(model, IDS), want, rtol=1e-3, atol=1e-3)

    def either(layer, x_BTD):
        return (by_expert_if_several if x_BTD.shape[1] > 1 else products)(layer, x_BTD)

    monkeypatch.setattr(Mixture, "products", either)
    assert not torch.equal(logits(model, IDS, 1), logits(model, IDS))


def test_the_flag_off_has_other_bits(path_of):
    model = load(path_of("qwen3-moe"), "--precision", "fp32")
    assert not torch.equal(logits(model, IDS, 1), logits(model, IDS))


def completed(model, drafter=None, **options):
    """Answers to five requests, some of them at a temperature, in a batch of 3, and how many rounds
    have accepted so many drafts."""
    asked = []
    for i in range(5):
        settings = {"temperature": 0.6 * (i % 2)} | options
        asked.append(Request(i, "", IDS[i : 4 * i + 2], max_new_tokens=12, **settings))
    engine = Engine(model, Tokenizer(None), 3, 80, drafter=drafter)
    return answers(engine, asked), engine.stats.accept_counts


@pytest.mark.parametrize(("name", "mode"), [("mixtral", "bf16"), ("qwen3-moe", "int4")])
def test_drafts_change_no_bits(path_of, name, mode):
    """The negative control is another seed."""
    model = load(path_of(name), "--deterministic", *MODES[mode])
    want, _ = completed(model)
    found, counts = completed(model, HalfRight(want, 3))
    assert found == want and counts[0] + counts[1] + counts[2] and sum(counts[1:])
    assert completed(model, seed=5)[0] != want


@needs_compiler
@pytest.mark.slow
def test_graphs_change_no_bits(tmp_path):
    """Of prefill, and of rounds with drafts. The dense parts are as large as in test_quantize.py,
    which then finds much compiled already."""
    path = directory(tmp_path / "m", DENSE | MIXTRAL | {"num_hidden_layers": 1})
    model = load(path, "--deterministic", "--quantize", "int4")
    want, _ = completed(model)
    whole = logits(model, IDS)
    machine.set_up(model, True, True)
    assert torch.equal(logits(model, IDS), whole)
    assert completed(model, HalfRight(want, 3))[0] == want


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_experts_are_those_of_their_weights(tmp_path, mode):
    """Beside the same model with what the codes stand for as weights; the router keeps its own."""
    path = directory(tmp_path / "m", MIXTURES["mixtral"], torch.float32)
    flags = ["--precision", "fp32", "--deterministic"]
    got = logits(load(path, "--quantize", mode, *flags), IDS)
    plain = logits(load(path, *flags), IDS)
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2 and "embed" not in name and not name.endswith(".gate.weight"):
            kind = "int8" if "lm_head" in name else mode
            tensors[name] = floats(quantize.quantized(kind, weight, 32)).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    want = logits(load(path, *flags), IDS)

    def distance(logits):
        return (logits - want).abs().mean() / want.std()

    assert distance(got) < 0.005 < 0.01 < distance(plain)


def test_a_router_stays_in_fp32(path_of):
    for mode in MODES.values():
        for layer in routers(load(path_of("mixtral"), *mode)):
            tensors = [*layer.router.buffers()]
            assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors)


def test_a_quantized_directory(tmp_path):
    path = directory(tmp_path / "m", MIXTURES["qwen3-moe"])
    ran = command("--checkpoint_path", path, "--mode", "int4")
    assert ran.returncode == 0, ran.stderr
    stored, loaded = load(Path(ran.stdout.strip())), load(path, "--quantize", "int4")
    assert torch.equal(logits(stored, IDS), logits(loaded, IDS))
    assert stored.nbytes == loaded.nbytes


def routers(model):
    return [layer for layer in model.modules() if isinstance(layer, Mixture)]


def say(model, *scores):
    """Have every router find the same scores for every token."""

    def forward(x_BTD):
        return torch.tensor(scores).expand(*x_BTD.shape[:2], len(scores))

    for layer in routers(model):
        layer.router.forward = forward


def test_experts_that_nobody_chose_are_not_read(path_of):
    """Experts without a weight fail where they are asked."""
    model = load(path_of("mixtral"))
    want = logits(model, IDS)
    say(model, 1.0, 3.0, -1.0, 2.0)
    for layer in routers(model):
        layer.experts[0] = layer.experts[2] = None
    found = logits(model, IDS)
    assert torch.isfinite(found).all() and not torch.equal(found, want)
    for layer in routers(model):
        layer.experts[1] = None
    with pytest.raises(AttributeError):
        logits(model, IDS)


def test_of_a_tie_the_first_are_chosen(path_of):
    """At any number of rows: what comes out is what a router that prefers them by a hair says."""
    model = load(path_of("mixtral"), "--deterministic")
    say(model, 0.5, 0.5, 0.5, 0.5)
    tie = logits(model, IDS)
    assert torch.equal(logits(model, IDS, 1), tie)
    say(model, 0.5, 0.5, 0.0, 0.0)
    assert torch.equal(logits(model, IDS), tie)
    say(model, 0.0, 0.5, 0.5, 0.0)
    assert not torch.equal(logits(model, IDS), tie)


def test_two_ranks_say_what_one_does(tmp_path, capsys):
    """Without the flag, whose sums in fp32 have other bits: with it, see test_tp.py."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTURES["qwen3-moe"]))
    flags = ["--random_weights", str(path), "--device", "cpu", "--json", "--precision", "fp32"]
    flags += ["--prompt", "5", "--prompt", "70", "--batch_size", "2", "--max_new_tokens", "12"]

    def completions(printed):
        *lines, stats = map(json.loads, printed.splitlines())
        assert len(lines) == 2 and "stats" in stats
        lines.sort(key=lambda line: line["id"])
        return [line["tokens"] for line in lines], [line["logprobs"] for line in lines]

    generate.main(flags)
    tokens, logprobs = completions(capsys.readouterr().out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, "--", "generate.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    tokens_of_two, logprobs_of_two = completions(done.stdout)
    assert tokens_of_two == tokens
    assert logprobs_of_two != logprobs
    torch.testing.assert_close(
        torch.tensor(logprobs_of_two), torch.tensor(logprobs), rtol=0, atol=1e-4
    )


BAD_CONFIGS = [
    ({"num_experts_per_tok": 7}, "7 experts a token"),
    ({"num_experts": 0}, "expected 1 to the 0 there are"),
    ({"moe_intermediate_size": "64"}, "intermediate_size is 64"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    path = directory(tmp_path / "m", MIXTURES["qwen3-moe"])
    (path / "config.json").write_text(json.dumps(MIXTURES["qwen3-moe"] | change))
    with pytest.raises((Refusal, InputError), match=message):
        load(path)


def test_layers_without_experts_are_refused(tmp_path):
    """A Qwen3-MoE may have some dense layers, which is another model."""
    path = directory(tmp_path / "m", MIXTURES["qwen3-moe"])
    tensors = load_file(path / "model.safetensors")
    for name in list(tensors):
        if "layers.1.mlp.experts.3" in name:
            del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    missing = r"model.layers.1.mlp.experts.3.down_proj.weight is missing \(3 in all\)"
    with pytest.raises(Refusal, match=missing):
        load(path)
