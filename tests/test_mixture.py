"""Mixtures of experts beyond what test_model.py compares with transformers and what the models of test_deterministic.py
keep: graphs, drafts, quantized experts, ranks, ties of the router."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_quantize import command, directory, floats, load, logits

import generate
import model as model_module
import quantize
from generate import Engine, InputError, ModelConfig, Request, Tokenizer
from model import Mixture
from tests.contract import HalfRight

ROOT = Path(__file__).parent.parent
CONFIG = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG |= {"intermediate_size": 192, "vocab_size": 160, "max_position_embeddings": 256, "tie_word_embeddings": False}
MIXTURES = {
    "mixtral": CONFIG | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-moe": CONFIG
    | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6, "num_experts_per_tok": 3}
    | {"moe_intermediate_size": 64, "norm_topk_prob": True},
}
MODES = {"bf16": [], "fp32": ["--precision", "fp32"], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4"]}
IDS = torch.randint(160, (90,), generator=torch.Generator().manual_seed(3)).tolist()


def mixture(tmp_path, name="qwen3-moe", *flags):
    return load(directory(tmp_path / name, MIXTURES[name]), *flags)


def by_expert_if_several(layer, x_BTD):
    """Broken: where there are several tokens, what experts say is added in their order, not in the token's own."""
    probs = layer.router(x_BTD.float()).softmax(-1)
    kept, chosen = probs.sort(dim=-1, descending=True, stable=True)
    weights = torch.zeros_like(probs).scatter(-1, chosen[..., :3], kept[..., :3] / kept[..., :3].sum(-1, keepdim=True))
    terms = [weights[..., i, None] * expert(x_BTD) for i, expert in enumerate(layer.experts)]
    return functools.reduce(torch.add, terms)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_batches_keep_the_bits_of_prefill(tmp_path, mode):
    model = mixture(tmp_path, "qwen3-moe", "--deterministic", *MODES[mode])
    want = logits(model, IDS)
    for chunk, batch in ((1, 1), (7, 1), (64, 1), (None, 3), (1, 5)):
        assert torch.equal(logits(model, IDS, chunk, batch), want), (chunk, batch)


def test_adding_by_expert_has_other_bits(tmp_path, monkeypatch):
    """The negative control: close to the mixture, and not the same."""
    model = mixture(tmp_path, "qwen3-moe", "--deterministic", "--precision", "fp32")
    want, products = logits(model, IDS), Mixture.products
    monkeypatch.setattr(Mixture, "products", by_expert_if_several)
    torch.testing.assert_close(logits(model, IDS), want, rtol=1e-3, atol=1e-3)
    either = lambda layer, x: (by_expert_if_several if x.shape[1] > 1 else products)(layer, x)
    monkeypatch.setattr(Mixture, "products", either)
    assert not torch.equal(logits(model, IDS, 1), logits(model, IDS))


def test_the_flag_off_has_other_bits(tmp_path):
    model = mixture(tmp_path, "qwen3-moe", "--precision", "fp32")
    assert not torch.equal(logits(model, IDS, 1), logits(model, IDS))


@pytest.mark.parametrize(("name", "mode"), [("mixtral", "bf16"), ("qwen3-moe", "int4")])
def test_graphs_and_drafts_change_no_bits(tmp_path, name, mode):
    """Neither alone nor together; the negative control is another seed."""
    model = mixture(tmp_path, name, "--deterministic", *MODES[mode])
    asked = [Request(i, "", IDS[i : 4 * i + 2], max_new_tokens=12, temperature=0.6 * (i % 2)) for i in range(5)]

    def answers(slots=1, **speculation):
        engine = Engine(model, Tokenizer(None), slots, 80, **speculation)
        found = {c.request.id: (c.tokens, c.logprobs) for c, _ in engine.generate(asked) if c.finish_reason}
        return found, engine.accept_counts

    want, whole = answers()[0], logits(model, IDS)
    found, counts = answers(3, propose=HalfRight(want), k=3)
    assert found == want and counts[0] + counts[1] + counts[2] and sum(counts[1:])
    generate.set_up(model, True, True)
    assert answers(2)[0] == want and answers(2, propose=HalfRight(want), k=3)[0] == want
    assert torch.equal(logits(model, IDS), whole)
    asked = [Request(r.id, "", r.prompt_ids, max_new_tokens=12, temperature=0.6, seed=5) for r in asked]
    assert answers()[0] != want


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_experts_are_those_of_their_weights(tmp_path, mode):
    """Beside the same model with what the codes stand for as weights; the router keeps its own."""
    path = directory(tmp_path / "m", MIXTURES["mixtral"], torch.float32)
    got = logits(load(path, "--quantize", mode, "--precision", "fp32", "--deterministic"), IDS)
    model = load(path, "--precision", "fp32", "--deterministic")
    layers = [x for x in model.modules() if isinstance(x, model_module.Linear)]
    assert sum(layer.dtype == torch.float32 and layer.axis == 0 for layer in layers)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2 and "embed" not in name and not name.endswith(".gate.weight"):
            kind = "int8" if "lm_head" in name else mode
            tensors[name] = floats(quantize.parts(kind, weight, 32)).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    want = logits(load(path, "--precision", "fp32", "--deterministic"), IDS)
    far = lambda logits: (logits - want).abs().mean() / want.std()
    assert far(got) < 0.005 < 0.01 < far(logits(model, IDS))


def test_a_quantized_directory(tmp_path):
    path = directory(tmp_path / "m", MIXTURES["qwen3-moe"])
    ran = command("--checkpoint_path", path, "--mode", "int4")
    assert ran.returncode == 0, ran.stderr
    stored, loaded = load(Path(ran.stdout.strip())), load(path, "--quantize", "int4")
    assert torch.equal(logits(stored, IDS), logits(loaded, IDS)) and stored.nbytes == loaded.nbytes


def routers(model):
    return [layer for layer in model.modules() if isinstance(layer, Mixture)]


def test_experts_that_nobody_chose_are_not_read(tmp_path):
    """Experts without a weight fail where they are asked."""
    model = mixture(tmp_path, "mixtral")
    want = logits(model, IDS)
    for layer in routers(model):
        layer.router.forward = lambda x: torch.tensor([1.0, 3.0, -1.0, 2.0]).expand(*x.shape[:2], 4)
        layer.experts[0] = layer.experts[2] = None
    found = logits(model, IDS)
    assert torch.isfinite(found).all() and not torch.equal(found, want)
    for layer in routers(model):
        layer.experts[1] = None
    with pytest.raises(AttributeError):
        logits(model, IDS)


def test_of_a_tie_the_first_are_chosen(tmp_path):
    """At any number of rows: what comes out is what a router that prefers them by a hair says."""
    model = mixture(tmp_path, "mixtral", "--deterministic")

    def routed(*scores):
        for layer in routers(model):
            layer.router.forward = lambda x: torch.tensor(scores).expand(*x.shape[:2], 4)
        return logits(model, IDS), logits(model, IDS, 1)

    tie, by_hair, other = routed(0.5, 0.5, 0.5, 0.5), routed(0.5, 0.5, 0.0, 0.0), routed(0.0, 0.5, 0.5, 0.0)
    assert torch.equal(tie[0], tie[1])
    assert torch.equal(tie[0], by_hair[0]) and not torch.equal(tie[0], other[0])


def test_two_ranks_have_the_bits_of_one(tmp_path):
    """Through the command line, in bf16 and int4; without the flag, sums in fp32 have others."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURES["qwen3-moe"]))
    flags = ["--random_weights", tmp_path / "config.json", "--device", "cpu", "--json", "--max_new_tokens", "12"]
    flags += ["--prompt", "5", "--prompt", "70", "--batch_size", "2"]

    def lines(ranks, *more):
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
        run = [sys.executable, *run, "generate.py", *map(str, flags), *more]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[:-1]

    for more in ([], ["--quantize", "int4"]):
        want = lines(1, "--deterministic", *more)
        assert len(want) == 2 and lines(2, "--deterministic", *more) == want
    assert lines(2, "--precision", "fp32") != lines(1, "--precision", "fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "7 experts a token"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"moe_intermediate_size": "64"}, "intermediate_size is 64"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(MIXTURES["qwen3-moe"] | change))
    with pytest.raises(InputError, match=message):
        ModelConfig.from_file(tmp_path / "config.json")


def test_layers_without_experts_are_refused(tmp_path):
    """A Qwen3-MoE may have some dense layers, which is another model."""
    path = directory(tmp_path / "m", MIXTURES["qwen3-moe"])
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts.3" not in name}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model.layers.1.mlp.experts.3.down_proj.weight is missing \(3 in all\)"):
        load(path)
