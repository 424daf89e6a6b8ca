"""Families beyond those of test_model.py: logits beside those of transformers, in the spellings of
published files. What --deterministic promises of each is in test_families_exact.py."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_config import BASE, DEFAULT, by_type, without, write, write_config
from test_model import feed_all, load
from transformers import AutoModelForCausalLM

from scripts.checkpoint import Refusal
from scripts.loading import read_config

LENGTH = 150  # beyond the original context, and several windows
TEXT = torch.randint(0, 128, (LENGTH,), generator=torch.Generator().manual_seed(1))


def family(architecture, kind, **more):
    """A config.json of six layers, without what is the same in all but a few families."""
    names = {"architectures": [f"{architecture}ForCausalLM"], "model_type": kind}
    base = without(BASE, "hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 6}
    return base | names | ids | more


LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.1, 3.2, 4.3, 5.4, 6.5],
}
PARTS = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}
SCALARS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.15,
    "residual_multiplier": 0.22,
    "logits_scaling": 7.0,
}
SMOLLM3 = family("SmolLM3", "smollm3", use_sliding_window=False)
OLMO2 = family("Olmo2", "olmo2", rope_theta=500000)
OLMO3 = family("Olmo3", "olmo3", sliding_window=17, rope_theta=5000.0, rope_scaling=YARN)
PHI3 = family("Phi3", "phi3", rope_theta=5000.0, sliding_window=70)
GEMMA3 = family("Gemma3", "gemma3_text", head_dim=32, sliding_window=17, query_pre_attn_scalar=20)
GRANITE = family("Granite", "granite", rope_theta=5000.0, **SCALARS)
FAMILIES = {
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi3": PHI3,
    "gemma3": GEMMA3,
    "granite": GRANITE,
}
CASES = {
    # HuggingFaceTB/SmolLM3-3B
    "smollm3": SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0, 1, 1], "no_rope_layer_interval": 4},
    "smollm3, by interval": SMOLLM3 | {"no_rope_layer_interval": 2, "rope_theta": 5000.0},
    "smollm3, nothing said": SMOLLM3,
    "smollm3, biases": SMOLLM3 | {"attention_bias": True, "mlp_bias": True},
    "smollm3, windows": SMOLLM3
    | {"use_sliding_window": True, "sliding_window": 17, "no_rope_layers": [1, 0] * 4},
    "smollm3, long": SMOLLM3 | {"rope_scaling": YARN},
    # allenai/OLMo-2-1124-7B
    "olmo2": OLMO2 | {"rope_scaling": None, "attention_bias": False, "rms_norm_eps": 1e-6},
    "olmo2, nothing said": without(OLMO2, "rope_theta", "num_key_value_heads"),
    "olmo2, biases": OLMO2 | {"attention_bias": True},
    "olmo2, long": OLMO2 | {"rope_parameters": YARN | {"rope_theta": 5000.0}},
    # older and newer files, as the class of transformers reads both
    "olmo3": OLMO3
    | {"layer_types": ["sliding_attention", "full_attention"] * 3, "attention_bias": False},
    "olmo3, nothing said": without(OLMO3, "rope_theta", "rope_scaling", "num_key_value_heads"),
    "olmo3, no window in sight": without(OLMO3, "sliding_window"),
    "olmo3, words of Gemma": OLMO3 | {"sliding_window_pattern": 2, "rope_local_base_freq": 500.0},
    "olmo3, biases": OLMO3 | {"attention_bias": True},
    "olmo3, by type": without(OLMO3, "rope_theta", "rope_scaling")
    | {"rope_parameters": by_type(YARN | {"rope_theta": 3e4}, DEFAULT | {"rope_theta": 5e3})},
    # microsoft/Phi-3-mini-4k-instruct, -128k-instruct and Phi-4-mini-instruct
    "phi3": PHI3 | {"rope_scaling": None, "attention_bias": False},
    "phi3, nothing said": without(PHI3, "rope_theta", "num_key_value_heads", "sliding_window"),
    "phi3, long": PHI3 | PARTS | {"rope_scaling": {"type": "longrope"} | LONG},
    "phi3, yarn": PHI3 | PARTS | {"rope_scaling": {"type": "yarn"} | LONG},
    "phi3, short": PHI3
    | {"rope_scaling": {"type": "longrope"} | LONG, "partial_rotary_factor": 0.75}
    | {"original_max_position_embeddings": 512},
    "phi3, part": PHI3 | {"partial_rotary_factor": 0.5},
    "phi4, tied": PHI3 | {"tie_word_embeddings": True, "attention_bias": False},
    # google/gemma-3-1b-it, and the text of -4b-it
    "gemma3": GEMMA3
    | {"rope_theta": 50000, "rope_local_base_freq": 500, "sliding_window_pattern": 6}
    | {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
    "gemma3, scaled": GEMMA3
    | {"rope_scaling": LINEAR, "rope_theta": 5e4, "rope_local_base_freq": 500.0}
    | {"sliding_window_pattern": 3, "rms_norm_eps": 1e-3},
    "gemma3, nothing said": without(GEMMA3, "query_pre_attn_scalar") | {"hidden_act": "silu"},
    "gemma3, by type": GEMMA3
    | {"layer_types": ["full_attention", "sliding_attention"] * 3, "attention_bias": True}
    | {"rope_parameters": by_type(YARN | {"rope_theta": 3e4}, {"rope_type": "default"})},
    "gemma3, head of its own": GEMMA3 | {"tie_word_embeddings": False},
    # ibm-granite/granite-3.1-2b-instruct
    "granite": GRANITE | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "granite, nothing said": without(GRANITE, "rope_theta", "num_key_value_heads", *SCALARS)
    | {"attention_multiplier": 0.15},
    "granite, biases": GRANITE | {"attention_bias": True, "mlp_bias": True},
}


def difference(path, chunks=(LENGTH,)) -> float:
    """The worst difference of a logprob in fp32 from that of transformers."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    with torch.inference_mode():
        want = reference(TEXT[None]).logits[0].log_softmax(-1)
    assert want.std() > 0.1
    got = feed_all(load(path), TEXT, chunks).log_softmax(-1)
    return (got - want).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_logprobs_are_those_of_transformers(tmp_path, name):
    path = write(tmp_path / "m", CASES[name])
    assert difference(path) <= 1e-4


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_so_they_are_in_chunks(tmp_path, config):
    path = write(tmp_path / "m", config)
    assert difference(path, [1] * 30 + [70] + [5] * 10) <= 1e-4


CONTROLS = {
    "smollm3": {"no_rope_layers": [1] * 6},
    "olmo2": {"rms_norm_eps": 0.1},
    "olmo3": {"rope_parameters": {"sliding_attention": YARN}},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma3": {"rope_local_base_freq": 1e6},
    "granite": {"residual_multiplier": 0.23},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_it_matters(tmp_path, name):
    """The comparison sees a setting that is another one."""
    path = write(tmp_path / "m", FAMILIES[name])
    right = feed_all(load(path), TEXT).log_softmax(-1)
    write_config(path, FAMILIES[name] | CONTROLS[name])
    wrong = feed_all(load(path), TEXT).log_softmax(-1)
    assert (wrong - right).abs().max() > 1e-2


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_bf16_rounds_no_more_than_transformers_does(tmp_path, config):
    path = write(tmp_path / "m", config)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        with torch.inference_mode():
            found.append(reference(TEXT[None]).logits[0].float())
    want, theirs = found
    ours = feed_all(load(path, torch.bfloat16), TEXT)
    assert (ours - want).abs().mean() <= 1.5 * (theirs - want).abs().mean()


def test_the_first_phi3_calls_it_su(tmp_path):
    """transformers 5.23 refuses what its class says it knows."""
    found = []
    for kind in ("su", "longrope"):
        config = PHI3 | PARTS | {"rope_scaling": {"type": kind} | LONG}
        found.append(read_config(write_config(tmp_path, config)).ropes[70])
    assert found[0]["rope_type"] == "longrope"
    assert without(found[0], "type") == without(found[1], "type")


def test_multipliers_that_are_left_out_are_one(tmp_path):
    config = read_config(write_config(tmp_path, without(GRANITE, *SCALARS)))
    assert [config.settings[name] for name in SCALARS] == [1.0] * 4


BAD = {
    "capped scores": (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    "capped logits": (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "both ways": (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "gelu": (GEMMA3, {"hidden_activation": "gelu"}, "hidden_act gelu .*gelu_pytorch_tanh"),
    "relu": (PHI3, {"hidden_act": "relu"}, "hidden_act relu .*silu"),
    "no window": (GEMMA3, {"sliding_window": None}, "sliding_window is None"),
    "no window of an OLMo": (OLMO3, {"sliding_window": None}, "sliding_window is None"),
    "one RoPE of an OLMo": (OLMO3, {"rope_parameters": YARN}, "expected those of each type"),
    "pattern": (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "scalar": (GEMMA3, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
    "scalar of text": (GEMMA3, {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"),
    "local base": (GEMMA3, {"rope_local_base_freq": 0}, "rope_theta is 0"),
    "flat": (GEMMA3, {"rope_parameters": LINEAR}, "expected those of each type of layer"),
    "local type": (
        GEMMA3,
        {"rope_parameters": by_type({}, {"rope_type": "mrope"})},
        "rope_type mrope is not",
    ),
    "many layers": (GEMMA3, {"num_hidden_layers": 10**12}, "num_hidden_layers is 10000"),
    "layers of text": (SMOLLM3, {"num_hidden_layers": "6"}, "num_hidden_layers is 6, expected an"),
    "few flags": (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers is .*for each layer"),
    "flags of text": (SMOLLM3, {"no_rope_layers": ["1"] * 6}, "no_rope_layers is"),
    "a flag": (SMOLLM3, {"no_rope_layers": 1}, "no_rope_layers is 1"),
    "interval": (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    "part": (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    "no part": (PHI3, {"partial_rotary_factor": 0.01}, "partial_rotary_factor is 0.01"),
    "a part of text": (PHI3, {"partial_rotary_factor": "1"}, "partial_rotary_factor is '1'"),
    "part of an OLMo": (OLMO2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
}
for name in SCALARS:
    for bad in (0, -1.0, float("nan"), float("inf"), "1", True, [1.0]):
        BAD[f"{name} {bad}"] = (GRANITE, {name: bad}, f"{name} is")


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(tmp_path, name):
    base, changes, message = BAD[name]
    with pytest.raises(Refusal, match=rf"config.json: .*{message}"):
        read_config(write_config(tmp_path, base | changes))


@pytest.mark.parametrize("layer", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_a_fused_tensor_of_other_rows_is_refused(tmp_path, layer):
    path = write(tmp_path / "m", PHI3)
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.1.{layer}.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=rf"{path}: tensor {name} is F32 .*, expected .* \+ .* rows"):
        load(path)


def test_a_fused_tensor_beside_its_parts_is_refused(tmp_path):
    path = write(tmp_path / "m", PHI3)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.randn(32, 64)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="q_proj.weight is missing|v_proj.weight is missing"):
        load(path)
