"""Kinds of RoPE: tables of angles beside those of transformers, in all spellings, up to many times
the original context; what is refused; and that none depends on the length of a call."""

import copy
import math

import pytest
import torch
from test_config import DEFAULT, LLAMA, MISTRAL, QWEN2, QWEN3, by_type, without, write_config
from test_families import GEMMA3, LONG, PHI3
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from model import ROPES, rope_table
from scripts.checkpoint import Refusal
from scripts.loading import read_config

CONTEXT = 512
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
EIGHT = {
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [1.5 * i + 1 for i in range(8)],
}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64} | EIGHT
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
KINDS = {
    "yarn": YARN,
    "yarn, old": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn, no original": without(YARN, "original_max_position_embeddings"),
    "yarn, attention factor": YARN | {"attention_factor": 1.7},
    "yarn, scales": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn, equal scales": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn, one scale": YARN | {"mscale": 0.5},
    "yarn, scale of 0": YARN | {"mscale": 0.5, "mscale_all_dim": 0},
    "yarn, betas": YARN | {"beta_fast": 9.0, "beta_slow": 2},
    "yarn, not truncated": YARN | {"truncate": False, "beta_fast": 9.0},
    "yarn, nulls": YARN | {"attention_factor": None, "beta_fast": None, "mscale": None},
    "yarn, null factor": YARN | {"factor": None},
    "yarn, narrow": YARN | {"beta_fast": 1.01, "beta_slow": 1.0},
    "yarn, shrinking": YARN | {"factor": 0.5},
    "longrope": LONGROPE,
    "longrope, factor": LONGROPE | {"factor": 32.0},
    "longrope, attention factor": LONGROPE | {"attention_factor": 1.19},
    "longrope, no factor at all": LONGROPE | {"factor": 0.5},
    "dynamic": DYNAMIC,
    "dynamic, old": {"type": "dynamic", "factor": 2.0},
    "dynamic, original": DYNAMIC | {"original_max_position_embeddings": CONTEXT},
}


def read(tmp_path, base, **changes):
    """A config.json, as we and as transformers read it."""
    path = write_config(tmp_path, base | copy.deepcopy(changes))
    return read_config(path), AutoConfig.from_pretrained(tmp_path)


def expected(embedding, *layers):
    """The table of a class of transformers, of all positions of the context in one call."""
    found = embedding(torch.zeros(1), torch.arange(CONTEXT)[None], *layers)
    pairs = found[0].shape[-1] // 2
    return torch.stack([x[0, :, :pairs] for x in found], dim=1)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("base", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("name", KINDS)
def test_a_table(tmp_path, name, base, place):
    """Of 512 positions, eight times the original context."""
    config, theirs = read(tmp_path, base, **{place: KINDS[name]})
    got = rope_table(config, config.ropes[None], CONTEXT)
    close(got, expected(LlamaRotaryEmbedding(theirs)))


def test_kinds_differ(tmp_path):
    """The negative control: no two of these settings have the same table, but for those that mean
    the same."""
    same = {"yarn, old", "yarn, nulls", "yarn, equal scales", "yarn, scale of 0", "yarn, one scale"}
    same |= {"yarn, null factor", "dynamic, old", "dynamic, original"}
    tables = []
    for name in KINDS.keys() - same:
        config, _ = read(tmp_path, LLAMA, rope_scaling=KINDS[name])
        tables.append(rope_table(config, config.ropes[None], CONTEXT))
    for i, table in enumerate(tables):
        assert not any(torch.allclose(table, other, atol=1e-3) for other in tables[:i])


PHI = {
    "whole": {},
    "half": {"partial_rotary_factor": 0.5},
    "half within": {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000.0}},
    "an odd part": {"partial_rotary_factor": 0.82},
    "long": {"rope_scaling": LONG | {"type": "longrope"}, "partial_rotary_factor": 0.75},
    "short": {
        "rope_scaling": LONG | {"type": "longrope"},
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": CONTEXT,
    },
}


@pytest.mark.parametrize("name", PHI)
def test_a_part_of_a_head(tmp_path, name):
    """Of 16 numbers: as many pairs as there are in that part."""
    changes = {"original_max_position_embeddings": 64} | PHI[name]
    config, theirs = read(tmp_path, PHI3, **changes)
    got = rope_table(config, config.ropes[70], CONTEXT)
    close(got, expected(Phi3RotaryEmbedding(theirs)))
    assert got.shape[-1] == {"whole": 8, "half": 4, "half within": 4, "an odd part": 7}.get(name, 6)


LOCAL = {"rope_theta": 5e4, "rope_local_base_freq": 500}
TWO = {  # RoPE of full layers and of those that slide, in older and newer files
    "old": LOCAL,
    "nothing": {},
    "scaled": LOCAL | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "new": {"rope_parameters": by_type(YARN | {"rope_theta": 3e4}, DEFAULT)},
    "new, one": {"rope_parameters": {"sliding_attention": DEFAULT}},
    "new, null": {"rope_parameters": by_type(None, DEFAULT)},
    "new, theta beside": LOCAL | {"rope_parameters": by_type(YARN, {"rope_type": "default"})},
}


@pytest.mark.parametrize("name", TWO)
def test_two_ropes(tmp_path, name):
    config, theirs = read(tmp_path, GEMMA3, **TWO[name])
    embedding = Gemma3RotaryEmbedding(theirs)
    for window, layers in ((None, "full_attention"), (17, "sliding_attention")):
        got = rope_table(config, config.ropes[window], CONTEXT)
        close(got, expected(embedding, layers))


def test_two_ropes_of_a_family_that_has_one(tmp_path):
    slides = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    rope = by_type(DEFAULT, DEFAULT | {"rope_theta": 9.0})
    config = read_config(write_config(tmp_path, QWEN3 | slides | {"rope_parameters": rope}))
    assert {window: own["rope_theta"] for window, own in config.ropes.items()} == {None: 77, 5: 9}


@pytest.mark.parametrize("name", KINDS)
def test_no_table_depends_on_its_length(tmp_path, name):
    """transformers, asked for fewer positions, has other angles with longrope."""
    config, theirs = read(tmp_path, LLAMA, rope_scaling=KINDS[name])
    whole = rope_table(config, config.ropes[None], CONTEXT)
    assert torch.equal(rope_table(config, config.ropes[None], 40), whole[:40])
    embedding = LlamaRotaryEmbedding(theirs)
    long, _ = embedding(torch.zeros(1), torch.arange(CONTEXT)[None])
    short, _ = embedding(torch.zeros(1), torch.arange(40)[None])
    assert torch.equal(short, long[:, :40]) == ("longrope" not in name)


NUMBER = "expected a finite number"
BAD = {
    "su": (LLAMA, LONGROPE | {"rope_type": "su"}, "rope_type su .*yarn, longrope"),
    "proportional": (LLAMA, {"rope_type": "proportional"}, "rope_type proportional"),
    "dynamic": (
        LLAMA,
        DYNAMIC | {"original_max_position_embeddings": 64},
        "rope_type dynamic .*length of a text",
    ),
    "dynamic without": (LLAMA, {"rope_type": "dynamic"}, "factor is missing"),
    "no list": (LLAMA, without(LONGROPE, "long_factor"), "long_factor is missing"),
    "a short list": (
        MISTRAL,
        LONGROPE | {"short_factor": [1.0] * 7},
        "short_factor is a list of 7, expected a list of 8 numbers",
    ),
    "no list but a number": (QWEN2, LONGROPE | {"long_factor": 2.0}, "long_factor is 2.0"),
    "an original of 1": (LLAMA, LONGROPE | {"original_max_position_embeddings": 1}, "more than 1"),
    "truncate": (LLAMA, YARN | {"truncate": "no"}, "truncate is 'no', expected true or false"),
    "betas": (LLAMA, YARN | {"beta_fast": 1, "beta_slow": 2}, "2.0 and 1.0, expected the first"),
    "a slow beta": (LLAMA, YARN | {"beta_slow": 40}, "beta_slow and beta_fast are 40.0 and 32"),
    "theta of 1": (LLAMA, YARN | {"rope_theta": 1}, "division by zero"),
    "far away": (LLAMA, LONGROPE | {"long_factor": [1e-37] * 8, "rope_theta": 1e-9}, "no numbers"),
}
for bad in (0, -1.0, math.inf, math.nan, "8", True, [8.0]):
    for name in ("factor", "attention_factor", "beta_fast", "original_max_position_embeddings"):
        BAD[f"yarn {name} {bad}"] = (LLAMA, YARN | {name: bad}, f"{name} is .*{NUMBER}")
    for name in ("short_factor", "long_factor"):
        lists = LONGROPE | {name: [1.0] * 7 + [bad]}
        BAD[f"longrope {name} {bad}"] = (LLAMA, lists, f"a number of {name} is .*{NUMBER}")


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(tmp_path, name):
    base, rope, message = BAD[name]
    path = write_config(tmp_path, base | {"rope_scaling": rope})
    with pytest.raises(Refusal, match=rf"config.json: .*{message}"):
        read_config(path)


def test_a_kind_of_ones_own(tmp_path, monkeypatch):
    """What is entered is known at once."""

    def slower(config, rope):
        freq, factor = ROPES["default"](config, rope)
        return freq / 3, factor

    monkeypatch.setitem(ROPES, "slower", slower)
    tables = []
    for rope in ({"rope_type": "slower"}, {"rope_type": "linear", "factor": 3.0}):
        config = read_config(write_config(tmp_path, LLAMA | {"rope_scaling": rope}))
        tables.append(rope_table(config, config.ropes[None], CONTEXT))
    assert torch.equal(*tables)
