"""What a config.json says: its settings in one spelling, with what it leaves out, and checked. What
means nothing raises a Refusal, or what Python raises where a value is of another type."""

from scripts.checkpoint import Refusal

BOOLEANS = ["tie_word_embeddings", "attention_bias", "mlp_bias"]
BOOLEANS += ["use_sliding_window", "norm_topk_prob"]
NULLS = ("head_dim", "num_key_value_heads", "sliding_window")  # which are settings where null

# What is meant by what is left out, as the classes of transformers have it. What is supported of
# the settings that are words is in loading.SUPPORTED.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **dict.fromkeys(BOOLEANS, False)}
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
FAMILY_DEFAULTS = {
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "MixtralForCausalLM": {
        "num_key_value_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "Qwen2ForCausalLM": QWEN,
    "Qwen3ForCausalLM": QWEN | {"head_dim": 128},
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "sliding_window": 4096,
    },
}
OLD_THETA = 10000.0  # where there is no rope_parameters, which states it
ROPE_PLACES = ("rope_scaling", "rope_parameters")  # of both, the first counts

LARGEST_NUMBER = 1e38  # of fp32
LARGEST_SIZES = {  # far beyond any model; sizes that are larger are mistakes
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "head_dim": 10**4,
    "intermediate_size": 10**7,
    "moe_intermediate_size": 10**7,
    "max_position_embeddings": 2 * 10**7,
    "num_experts": 10**4,
}


def in_one_spelling(config: dict) -> dict:
    """The settings of a config.json, with the defaults of its family, and without those that are
    null, which most files write for the default. `architecture` is the first of `architectures`;
    `num_experts` is there where `num_local_experts` is; `quantization` has the `mode` and the
    `group_size` of a directory that quantize.py wrote, or is empty. All else is as given."""
    given = {name: value for name, value in config.items() if value is not None or name in NULLS}
    architecture = first_name(given, "architectures")
    if "num_local_experts" in given:
        given.setdefault("num_experts", given["num_local_experts"])
    given = DEFAULTS | FAMILY_DEFAULTS.get(architecture, {}) | given
    given["architecture"] = architecture
    given["quantization"] = quantization(given)
    return given


def first_name(settings: dict, name: str) -> str | None:
    """The first of a list of names, None where it is empty."""
    names = settings.get(name) or []
    if not isinstance(names, list) or not isinstance((names or [""])[0], str):
        raise Refusal(f"{name} is {names!r}, expected a list of names")
    return names[0] if names else None


def check(settings: dict) -> None:
    """What means the same in all families."""
    for name in BOOLEANS:
        if settings[name] not in (True, False):
            raise Refusal(f"{name} is {settings[name]!r}, expected true or false")
    for name, largest in LARGEST_SIZES.items():
        if type(settings.get(name)) is int and settings[name] > largest:
            raise Refusal(f"{name} is {settings[name]}, expected {largest} at most")
    number("rms_norm_eps", settings["rms_norm_eps"], zero=True)
    ends = settings.get("eos_token_id")
    for i in ends if isinstance(ends, list) else [ends]:
        if i is not None and type(i) is not int:
            raise Refusal(f"eos_token_id has {i!r}, expected an integer or a list of them")


def quantization(given: dict) -> dict:
    """Of our own directories. That of any other tool is refused, by its name."""
    if given.get("quantization"):
        found = given["quantization"]
        raise Refusal(f"quantization {found}, as MLX writes it, is not supported")
    config = json_object(given, "quantization_config")
    method = config.get("quant_method", "gpt-exact")
    if config and (method != "gpt-exact" or not config.get("mode")):
        name = method if "quant_method" in config else config
        how = "expected floats, or what quantize.py writes"
        raise Refusal(f"quantization_config {name} is not supported, {how}")
    return config


def json_object(settings: dict, name: str) -> dict:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise Refusal(f"{name} is {value!r}, expected a JSON object")
    return value


def size(settings: dict, name: str) -> int:
    value = settings[name]
    if type(value) is not int or value < 1:
        raise Refusal(f"{name} is {value}, expected an integer > 0")
    return value


def number(name: str, value, zero: bool = False) -> float:
    """One that is finite, and more than 0 or, with `zero`, not less."""
    least = "0 or more" if zero else "more than 0"
    right = type(value) in (int, float) and 0 <= value < LARGEST_NUMBER and (zero or value)
    if not right:
        raise Refusal(f"{name} is {value!r}, expected a finite number, {least}")
    return float(value)


def windows(settings: dict) -> list[int | None]:
    """Each layer's sliding window. Without layer_types, max_window_layers is the first layer that
    slides."""
    first = settings.get("max_window_layers", 0)
    if type(first) is not int:
        raise Refusal(f"max_window_layers is {first!r}, expected an integer")
    slides = [i >= first for i in range(size(settings, "num_hidden_layers"))]
    if kinds := settings.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in kinds]
    if not settings["use_sliding_window"] or settings.get("sliding_window") is None:
        return [None for _ in slides]
    window = size(settings, "sliding_window")
    return [window if slide else None for slide in slides]


def check_layer_types(settings: dict) -> None:
    """Also of a family whose layers are all alike, and that looks at none of them."""
    kinds = settings.get("layer_types") or []
    if not isinstance(kinds, list):
        raise Refusal(f"layer_types is {kinds!r}, expected a list of names")
    for kind in kinds:
        if kind not in ("full_attention", "attention", "sliding_attention"):
            expected = "expected full_attention or sliding_attention"
            raise Refusal(f"layer_types has {kind!r}, {expected}")
    if kinds and len(kinds) != size(settings, "num_hidden_layers"):
        raise Refusal(f"layer_types has {len(kinds)} entries, expected one for each layer")


def rope_places(settings: dict) -> list[dict]:
    """All settings of RoPE that there are, in the order in which they count: for all layers, then
    for types of layers. They may be empty."""
    places = [json_object(settings, name) for name in ROPE_PLACES]
    return places + [x for place in places for x in place.values() if isinstance(x, dict)]


def rope_type(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def rope_parameters(settings: dict, sliding: list[bool]) -> dict:
    """The settings of RoPE, whose `rope_type`, `rope_theta` and
    `original_max_position_embeddings` may stand elsewhere. Layers that are `sliding` may have their
    own."""
    scaling, parameters, *_ = rope_places(settings)
    rope = of_all_layers(scaling or parameters, sliding)
    rope = {name: value for name, value in rope.items() if value is not None}
    found = rope | {"rope_type": rope_type(rope)}
    if "rope_theta" in settings:
        found.setdefault("rope_theta", settings["rope_theta"])
    elif scaling or not parameters:
        found.setdefault("rope_theta", OLD_THETA)
    original = settings.get("original_max_position_embeddings")
    return found if original is None else found | {"original_max_position_embeddings": original}


def of_all_layers(rope: dict, sliding: list[bool]) -> dict:
    """Settings that are the same for all layers, out of those by type of layer, as transformers 5
    may write them."""
    by_type = {kind: own for kind, own in rope.items() if isinstance(own, dict)}
    if not by_type:
        return rope
    rest = {name: value for name, value in rope.items() if name not in by_type}
    kinds = ["sliding_attention" if slide else "full_attention" for slide in set(sliding)]
    found = [by_type.get(kind, {}) for kind in kinds]
    # What stands beside them must not say otherwise.
    found = [rest | own for own in found] + [own | rest for own in found]
    if not all(found) or any(own != found[0] for own in found):
        raise Refusal(f"rope_parameters {rope} differ by layer, expected the same for all layers")
    return found[0]
