"""What --deterministic promises, for the families of test_families.py: the same bits in chunks, in
batches, with drafts and at two ranks. Compiled: test_families_compiled.py."""

from pathlib import Path

import pytest
import test_tp
import torch
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, LONG, PARTS, SCALARS, YARN
from test_quantize import answers, load, logits
from test_tp import Ranks, printed_by_one

from generate import Engine
from scripts import families, quantized
from scripts.contract import HalfRight
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

IDS = torch.randint(128, (90,), generator=torch.Generator().manual_seed(1)).tolist()
# Of each family, what eight KV heads and two ranks can share.
SHAPE = {"num_hidden_layers": 2, "attention_bias": True}
EXACT = {
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "olmo3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 40,
        "rope_scaling": YARN,
    },
    "phi3": PARTS | {"rope_scaling": {"type": "longrope"} | LONG, "sliding_window": 40},
    "gemma3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 40,
        "rope_local_base_freq": 500.0,
    },
    "granite": SCALARS,
}
MODES = {"int4": ["--quantize", "int4"], "fp32": ["--precision", "fp32"]}
names = pytest.mark.parametrize("name", EXACT)
QUICK = ("smollm3", "gemma3")  # which have most of what the others have
RANKED = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXACT]


def checkpoint(folder, name, **changes):
    """A directory of a family; one of Phi-3 has fused tensors."""
    known = {key: FAMILIES[name][key] for key in ("architectures", "model_type")}
    test_tp.write_checkpoint(folder / name, **SHAPE | known | EXACT[name] | changes)
    if name == "phi3":
        fuse(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each, which nobody changes."""
    folder = tmp_path_factory.mktemp("families")
    for name in EXACT:
        checkpoint(folder, name)
    return folder


def fuse(path: Path) -> None:
    """Write the tensors as a Phi-3 has them."""
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    tensors = load_file(path / "model.safetensors")
    for name in list(tensors):
        for fused, (first, *others) in parts.items():
            if f".{first}." in name:
                found = [tensors.pop(name.replace(first, part)) for part in (first, *others)]
                tensors[name.replace(first, fused)] = torch.cat(found)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@names
@pytest.mark.parametrize("mode", ["int4", pytest.param("fp32", marks=pytest.mark.slow)])
def test_chunks_and_batches_keep_the_bits_of_prefill(folder, name, mode):
    model = load(folder / name, "--deterministic", *MODES[mode])
    want = logits(model, IDS)
    for chunk, batch in ((1, 1), (7, 1), (None, 3), (1, 5)):
        assert torch.equal(logits(model, IDS, chunk, batch), want), (chunk, batch)


@names
def test_the_flag_off_has_other_bits(folder, name):
    """The negative control."""
    model = load(folder / name, "--precision", "fp32")
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


@names
def test_drafts_change_no_bits(folder, name):
    """The negative control is another seed."""
    model = load(folder / name, "--deterministic", "--quantize", "int4")
    want, _ = completed(model)
    found, counts = completed(model, HalfRight(want, 3))
    assert found == want and counts[0] + counts[1] + counts[2] and sum(counts[1:])
    assert completed(model, seed=5)[0] != want


@names
def test_a_quantized_directory(folder, tmp_path, name):
    out = quantized.write(folder / name, str(tmp_path / "q"), "int4", 32)
    stored, loaded = load(out), load(folder / name, "--quantize", "int4")
    assert torch.equal(logits(stored, IDS), logits(loaded, IDS))
    assert not torch.equal(logits(load(folder / name), IDS), logits(loaded, IDS))


@pytest.fixture(scope="module")
def ranks(folder):
    ranks = Ranks(folder)
    yield ranks
    ranks.process.stdin.close()
    ranks.process.wait(timeout=60)


def asked(folder, name, *more):
    words = " ".join(f"w{i * i % 384}" for i in range(60))
    flags = ["--checkpoint_path", folder / name, "--json", "--prompt", words, "--prompt", "w1 w2"]
    return [*flags, "--ignore_eos", "--max_new_tokens", "6", *more]


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_say_what_one_does(folder, ranks, capsys, name):
    """In a batch and in chunks. The negative control is the flag off, in fp32."""
    together = ["--batch_size", "2", "--prefill_chunk", "7"]
    flags = asked(folder, name, "--deterministic", "--quantize", "int4")
    want = printed_by_one(capsys, *flags)
    assert len(want) == 2
    assert ranks.generate(*flags, *together) == want
    flags = asked(folder, name, "--precision", "fp32", "--temperature", "0")
    want, found = printed_by_one(capsys, *flags), ranks.generate(*flags, *together)
    assert {i: x[0] for i, x in found.items()} == {i: x[0] for i, x in want.items()}
    assert found != want


@pytest.mark.parametrize("ranks", [2, 8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_norm_of_the_heads_of_all_ranks(folder, monkeypatch, ranks):
    """Each rank has of it, to the bit, what one process has, also where ranks share a KV head. Sums
    of each rank's squares that are added have other bits."""
    torch.manual_seed(0)
    whole = load(folder / "olmo2", "--precision", "fp32", "--deterministic").layers[0]
    other = []
    for heads, norm in ((16, whole.q_norm), (4, whole.q_norm)):
        x = torch.randn(2, 9, heads, 256 // heads)
        want = norm(x.flatten(2)).unflatten(2, (heads, -1))
        parts = [families.tp.part(x, 2, ranks) for families.tp.rank in range(ranks)]
        monkeypatch.setattr(families.tp, "all_gather", lambda x: torch.stack(parts))  # noqa: B023
        monkeypatch.setattr(whole, "ranks", ranks)
        for families.tp.rank in range(ranks):
            got = whole.over_all(parts[families.tp.rank], norm, heads)
            assert torch.equal(got, families.tp.part(want, 2, ranks))
        squares = sum(part.square().sum((2, 3), keepdim=True) for part in x.chunk(ranks, 2))
        root = (squares / 256 + whole.config.rms_norm_eps).rsqrt()
        other.append(torch.equal(x * root * norm.weight.view(heads, -1), want))
    families.tp.rank = 0
    assert not all(other)
