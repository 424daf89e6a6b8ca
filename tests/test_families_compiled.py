"""The families of test_families.py compiled, with --deterministic: the bits of eager code. Where
all layers of a family are alike there is one, as compiling takes its time."""

import pytest
import torch
from helpers import needs_compiler
from test_families_exact import EXACT, checkpoint, completed
from test_quantize import load

from scripts import activations, machine
from scripts.contract import HalfRight

pytestmark = [needs_compiler, pytest.mark.slow]
LAYERS = {"smollm3": 2, "olmo3": 2, "gemma3": 2}


@pytest.mark.parametrize("name", EXACT)
def test_graphs_change_no_bits(tmp_path, name):
    """In int4; of Granite also those of rounds with drafts."""
    path = checkpoint(tmp_path, name, num_hidden_layers=LAYERS.get(name, 1))
    model = load(path, "--deterministic", "--quantize", "int4")
    want, _ = completed(model)
    machine.set_up(model, True, False)
    drafter = HalfRight(want, 3) if name == "granite" else None
    assert completed(model, drafter)[0] == want


def test_a_compilers_own_exp_has_other_bits(tmp_path, monkeypatch):
    """The negative control: the GELU of Gemma 3 with an op that a compiler knows."""

    def sigmoid(x):
        return 1 / (torch.exp(-x) + 1)

    monkeypatch.setattr(activations, "sigmoid", sigmoid)
    shape = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    path = checkpoint(tmp_path, "gemma3", **shape)
    model = load(path, "--deterministic", "--precision", "fp32")
    want, _ = completed(model)
    machine.set_up(model, True, False)
    assert completed(model)[0] != want
