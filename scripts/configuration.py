"""From a config.json to the configuration of a model."""

from dataclasses import replace
from pathlib import Path

import quantize
import scripts.families  # noqa: F401  (it enters them into FAMILIES)
from model import FAMILIES, ModelConfig, rope_table
from scripts import checkpoint, settings
from scripts.rope_settings import places, rope_parameters, rope_type
from scripts.ropes import ROPES

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"]
BOOLEANS = ["tie_word_embeddings", "qkv_bias", "attention_bias", "mlp_bias", "qk_norm"]
SUPPORTED = {
    "attn_logit_softcapping": [None],
    "final_logit_softcapping": [None],
    "use_bidirectional_attention": [None, False],
    "quantization mode": [None, *quantize.LINEARS],
    "group_size": [32, 64, 128],
    "per_layer_config": [None, {}],
    "transformers_weights": [None, "model.safetensors", checkpoint.INDEX],
}


def read_config(path: Path, quantization: str | None = None, group_size=32) -> ModelConfig:
    """That of a checkpoint, whose weights beside it may have a head of their own although it says
    that there is none. See read_shape."""
    config = read_shape(path, quantization, group_size)
    if config.tie_word_embeddings and checkpoint.has_own_head(path.parent):
        return replace(config, tie_word_embeddings=False)
    return config


def read_shape(path: Path, quantization: str | None = None, group_size=32) -> ModelConfig:
    """What a config.json says, or else what its family means, of a model that is quantized while
    loading if a `quantization` is given. Raises Refusal for what is missing, wrong or not
    supported."""
    raw = checkpoint.read_json(path)
    wrong = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError)
    with checkpoint.refusing(str(path), *wrong):
        given = settings.in_one_spelling(raw)
        architecture = one_of("architectures", given["architecture"], list(FAMILIES))
        settings.check_layer_types(given)
        _, family = FAMILIES[architecture]
        given |= family  # of which one may be what the next line reads
        given |= {"qkv_bias": given["attention_bias"], "qk_norm": False} | family
        settings.check(given)
        settings.complete(given)
        one_of("hidden_act", given["hidden_act"], settings.activations(architecture))
        stored = given["quantization"]
        mode, given["group_size"] = stored.get("mode"), stored.get("group_size", 32)
        given["quantization mode"] = mode
        for name, choices in SUPPORTED.items():
            one_of(name, given.get(name), choices)
        if quantization and mode:
            raise checkpoint.Refusal(f"the checkpoint is {mode} already")
        windows = settings.windows(given)
        shape = sizes(given)
        config = ModelConfig(
            **shape,
            **{name: bool(given[name]) for name in BOOLEANS},
            architecture=architecture,
            rms_norm_eps=float(given["rms_norm_eps"]),
            windows=windows,
            ropes=ropes(given, windows, shape["head_dim"]),
            quantization=quantization or mode,
            group_size=group_size if quantization else given["group_size"],
            stored=mode is not None,
            settings=given,
        )
        for rope in config.ropes.values():
            if not rope_table(config, rope, 2).isfinite().all():
                raise checkpoint.Refusal(f"RoPE with {rope} has angles that are no numbers")
        return config


def one_of(name: str, value, choices):
    if value not in choices:
        valid = ", ".join(map(str, choices))
        raise checkpoint.Refusal(f"{name} {value} is not supported, choose from {valid}")
    return value


def sizes(given: dict) -> dict[str, int]:
    """Those of ModelConfig. The experts of a mixture have an intermediate size of their own."""
    given = dict(given)
    heads = settings.size(given, "num_attention_heads")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = heads
    if given.get("head_dim") is None:
        given["head_dim"] = settings.size(given, "hidden_size") // heads
    found = {name: settings.size(given, name) for name in SIZES}
    if "moe_intermediate_size" in settings.FAMILY_DEFAULTS.get(given["architecture"], {}):
        found["intermediate_size"] = settings.size(given, "moe_intermediate_size")
    kv_heads, head_dim = found["num_key_value_heads"], found["head_dim"]
    if heads % kv_heads:
        expected = f"expected KV heads that divide the {heads} heads"
        raise checkpoint.Refusal(f"num_key_value_heads is {kv_heads}, {expected}")
    if head_dim % 2:
        raise checkpoint.Refusal(f"head_dim is {head_dim}, expected an even number")
    return found


def ropes(given: dict, windows: list[int | None], head_dim: int) -> dict[int | None, dict]:
    """As ModelConfig has them. A kind that is not supported is refused wherever it stands."""
    partial = "partial_rotary_factor" in settings.FAMILY_DEFAULTS.get(given["architecture"], {})
    for rope in places(given):
        one_of("rope_type", rope_type(given, rope), list(ROPES))
    for rope in [given, *places(given)]:
        if not partial:
            one_of("partial_rotary_factor", rope.get("partial_rotary_factor"), [None, 1])
    found = {}
    for window in windows:
        layers = "full_attention" if window is None else "sliding_attention"
        if window not in found:
            found[window] = rope_parameters(given, layers, head_dim)
    return found
