"""What a config.json says: its settings in one spelling, with what it leaves out, and checked. What
means nothing raises a Refusal, or what Python raises where a value is of another type."""

from scripts.checkpoint import Refusal

BOOLEANS = ["tie_word_embeddings", "attention_bias", "mlp_bias"]
BOOLEANS += ["use_sliding_window", "norm_topk_prob"]
NULLS = ("head_dim", "num_key_value_heads", "sliding_window")  # which are settings where null
PUBLISHED = ("awq", "gptq", "compressed-tensors", "fp8")  # quant_method of what is converted

# What is meant by what is left out, as the classes of transformers have it. What is supported of
# the settings that are words is in configuration.SUPPORTED.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **dict.fromkeys(BOOLEANS, False)}
MULTIPLIERS = ["embedding_multiplier", "attention_multiplier"]
MULTIPLIERS += ["residual_multiplier", "logits_scaling"]
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
    "SmolLM3ForCausalLM": {
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "Olmo2ForCausalLM": {"rms_norm_eps": 1e-5},
    "Olmo3ForCausalLM": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    "Phi3ForCausalLM": {
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,  # only families that know of it have it here
        "original_max_position_embeddings": 4096,
    },
    "Gemma3ForCausalLM": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "GraniteForCausalLM": dict.fromkeys(MULTIPLIERS, 1.0),
}
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
    if method := published_by(given):
        how = "convert it: python scripts/download.py DIRECTORY --out NEW"
        raise Refusal(f"the checkpoint is quantized by {method}; {how}")
    config = json_object(given, "quantization_config")
    method = config.get("quant_method", "gpt-exact")
    if config and (method != "gpt-exact" or not config.get("mode")):
        name = method if "quant_method" in config else config
        how = "expected floats, or what quantize.py writes"
        raise Refusal(f"quantization_config {name} is not supported, {how}")
    return config


def published_by(given: dict) -> str | None:
    """The method by which somebody else has quantized a checkpoint, where it is one of those that
    download.py converts. MLX has no name for its own."""
    if given.get("quantization"):
        return "mlx"
    method = json_object(given, "quantization_config").get("quant_method")
    return method if method in PUBLISHED else None


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


def activations(architecture: str) -> list[str]:
    """The names of the only one that a family has."""
    name = (DEFAULTS | FAMILY_DEFAULTS.get(architecture, {}))["hidden_act"]
    return ["silu", "swish"] if name == "silu" else [name]


def complete(settings: dict) -> None:
    """What a family makes of its own settings, which are checked as well."""
    known = {"SmolLM3": smollm3, "Olmo3": two_kinds, "Gemma3": gemma3, "Granite": granite}
    name = settings["architecture"].removesuffix("ForCausalLM")
    if name in known:
        known[name](settings)


def smollm3(settings: dict) -> None:
    """`no_rope_layers` has a 0 for each layer without positions, which are those that slide."""
    count = size(settings, "num_hidden_layers")
    rotary = settings.get("no_rope_layers")
    if rotary is None:
        interval = size(settings, "no_rope_layer_interval")
        rotary = [int(i % interval != 0) for i in range(1, count + 1)]
    is_list = isinstance(rotary, list) and all(x in (0, 1) for x in rotary)
    if not is_list or len(rotary) < count:
        raise Refusal(f"no_rope_layers is {rotary!r}, expected a list of 0 or 1 for each layer")
    settings["no_rope_layers"] = rotary
    if not settings.get("layer_types"):
        settings["layer_types"] = layer_types([not x for x in rotary[:count]])


def gemma3(settings: dict) -> None:
    settings["hidden_act"] = settings["hidden_activation"]
    number("query_pre_attn_scalar", settings["query_pre_attn_scalar"])
    two_kinds(settings)


def two_kinds(settings: dict) -> None:
    """Full and sliding layers, with a RoPE each. Older files have the number of layers from one of
    full attention to the next, and other names for what is now `rope_parameters` by type of layer:
    rope_theta and rope_scaling are of full attention alone."""
    size(settings, "sliding_window")  # it cannot do without
    if not settings.get("layer_types"):
        pattern = size(settings, "sliding_window_pattern")
        count = size(settings, "num_hidden_layers")
        settings["layer_types"] = layer_types([i % pattern != 0 for i in range(1, count + 1)])
    parameters = json_object(settings, "rope_parameters")
    if any(not isinstance(own, dict) for own in parameters.values() if own is not None):
        raise Refusal(f"rope_parameters is {parameters}, expected those of each type of layer")
    full = {"rope_theta": settings.pop("rope_theta")}
    full |= json_object(parameters, "full_attention") | json_object(settings, "rope_scaling")
    sliding = {"rope_theta": settings.pop("rope_local_base_freq")}
    sliding |= json_object(parameters, "sliding_attention")
    settings["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    settings["rope_scaling"] = {}


def granite(settings: dict) -> None:
    for name in MULTIPLIERS:
        settings[name] = number(name, settings[name])


def layer_types(slides: list[bool]) -> list[str]:
    return ["sliding_attention" if slide else "full_attention" for slide in slides]
