"""What a GGUF file says of a model: its config.json, and its tensors by the names of Hugging Face.
What would change a model and is not known here is refused."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from scripts import rope_settings, settings
from scripts.files import Refusal

# What a GGUF calls things and Hugging Face does, and what its metadata may say without effect.
TABLES = json.loads((Path(__file__).parent / "configs" / "gguf.json").read_text(encoding="utf-8"))
FAMILIES = TABLES["families"]
ROPE_FACTORS = "rope_freqs.weight"  # a tensor: what the period of each pair is multiplied by
# As llama.cpp has them, where a file does not say it.
DEFAULT_THETA = 10000.0
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
# Of all published Llama 3.1 to 3.3, which differ in the factor. A GGUF has their result alone.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
ROUNDING = 2e-6  # of the factors, which are computed in fp32


class Metadata:
    """Those of one architecture, by their names without it. Each is taken once; what nobody takes
    is not known, and would be ignored if it were not refused."""

    def __init__(self, meta: dict, architecture: str):
        self.prefix = f"{architecture}."
        self.left = {}
        for key, value in meta.items():
            if key.startswith(self.prefix):
                self.left[key.removeprefix(self.prefix)] = value

    def refusal(self, name: str, value, expected: str) -> Refusal:
        return Refusal(f"{self.prefix}{name} is {value!r:.60}, expected {expected}")

    def take(self, name: str, default=None):
        """Raises KeyError for what is missing and has no default."""
        if name not in self.left and default is None:
            raise KeyError(f"{self.prefix}{name}")
        return self.left.pop(name, default)

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.take(name, default)
        if type(value) is not int or value < least:
            raise self.refusal(name, value, f"an integer, {least} or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refusal(name, value, "a finite number, more than 0")
        return value

    def expect(self, name: str, values: list) -> None:
        """Raise Refusal where it is there and says something else."""
        value = self.left.pop(name, values[0])
        if value not in values:
            raise self.refusal(name, value, " or ".join(map(str, values)))

    def refuse_rest(self) -> None:
        for name, value in self.left.items():
            raise Refusal(f"{self.prefix}{name} {value!r:.60} is not supported")


def model_config(meta: dict, shapes: dict[str, list[int]], factors: list[float] | None) -> dict:
    """config.json without its special tokens. `factors` are those of the tensor ROPE_FACTORS.
    Raises Refusal, or KeyError for metadata that are missing."""
    name = architecture(meta)
    given = Metadata(meta, name)
    config = {
        "architectures": [FAMILIES[name]["architecture"]],
        "model_type": name,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
    }
    heads = given.left.get("attention.head_count")
    defaults = {"attention.head_count_kv": heads, "rope.freq_base": DEFAULT_THETA}
    for key, setting in TABLES["fields"].items():
        is_size = key not in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
        read = given.size if is_size else given.number
        config[setting] = read(key, defaults.get(key))
    config["head_dim"] = head_dim(given, config)
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    for optional in FAMILIES[name]["optional"]:
        if any(f"blk.0.{tensor}" in shapes for tensor in TABLES["tensors"][optional]):
            config[optional] = True
    config["rope_scaling"] = rope_scaling(given, config, factors)
    config |= sliding_window(given, config)
    given.expect("vocab_size", [config["vocab_size"]])
    for key, values in TABLES["without_effect"].items():
        given.expect(key, values)
    given.refuse_rest()
    check(config)
    return config


def check(config: dict) -> None:
    """Raise Refusal for what a loader of the directory would refuse."""
    given = settings.in_one_spelling(config)
    settings.check(given)
    rope_settings.rope_parameters(given, "full_attention", config["head_dim"])


def architecture(meta: dict) -> str:
    """The name of one that is known. Raises Refusal for others, and for what is no model."""
    name = meta.get("general.architecture")
    known = {"general.architecture": list(FAMILIES)}
    known |= {"general.type": [None, "model"], "general.quantization_version": [None, 2]}
    for key, values in known.items():
        if meta.get(key) not in values:
            expected = " or ".join(str(value) for value in values if value is not None)
            raise Refusal(f"{key} is {meta.get(key)!r:.60}, expected {expected}")
    return name


def head_dim(given: Metadata, config: dict) -> int:
    """The numbers of a head of keys, to which others must be equal."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads:
        expected = f"one that divides the {heads} heads"
        raise given.refusal("attention.head_count_kv", kv_heads, expected)
    size = given.size("attention.key_length", config["hidden_size"] // heads, least=2)
    if size % 2:
        raise given.refusal("attention.key_length", size, "an even number")
    given.expect("attention.value_length", [size])
    given.expect("rope.dimension_count", [size])
    return size


def sliding_window(given: Metadata, config: dict) -> dict:
    """What a window changes. Of a Llama with one Hugging Face says Mistral; a Qwen may have one in
    some of its layers, and a GGUF does not say in which."""
    window = given.size("attention.sliding_window", 0, least=0)
    if window == 0 or window >= config["max_position_embeddings"]:
        return {}
    if config["model_type"] != "llama" or "attention_bias" in config or "mlp_bias" in config:
        raise given.refusal("attention.sliding_window", window, "none")
    names = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return names | {"sliding_window": window}


def rope_scaling(given: Metadata, config: dict, factors: list[float] | None) -> dict | None:
    """As config.json has it. What llama.cpp calls by these names are the formulas of
    transformers."""
    factor = given.left.pop("rope.scaling.factor", 0)
    kind = given.left.pop("rope.scaling.type", "linear" if factor else "none")
    context = config["max_position_embeddings"]
    original = given.size("rope.scaling.original_context_length", context)
    betas = {name: given.number(f"rope.scaling.yarn_{name}", x) for name, x in YARN_BETAS.items()}
    if kind not in ("none", "linear", "yarn"):
        raise given.refusal("rope.scaling.type", kind, "none, linear or yarn")
    if kind == "none":
        return None if factors is None else of_factors(factors, config)
    if type(factor) not in (int, float) or not 1 <= factor < math.inf:
        raise given.refusal("rope.scaling.factor", factor, "a finite number, 1 or more")
    if factors is not None:
        raise Refusal(f"{ROPE_FACTORS} is there and rope.scaling.type is {kind}, expected none")
    rope = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": original} | betas
    return rope


def of_factors(factors: list[float], config: dict) -> dict | None:
    """What the periods of the pairs of a head are multiplied by, either as the settings of Llama 3
    from which such factors come, or one by one: LongRoPE with one list for all lengths."""
    if not all(0 < factor < math.inf for factor in factors):
        raise Refusal(f"{ROPE_FACTORS} has other than finite numbers, more than 0")
    if all(factor == 1 for factor in factors):
        return None
    factor = max(factors)
    pairs = zip(factors, llama3_factors(factor, config), strict=True)
    if all(math.isclose(found, expected, rel_tol=ROUNDING) for found, expected in pairs):
        rope = {"rope_type": "llama3", "factor": factor} | LLAMA3
        return rope | {"original_max_position_embeddings": LLAMA3_CONTEXT}
    rope = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    rope |= {"short_factor": factors, "long_factor": factors}
    return rope | {"original_max_position_embeddings": config["max_position_embeddings"]}


def llama3_factors(factor: float, config: dict) -> list[float]:
    """Short periods stay, long ones are multiplied, those between blended (Llama 3.1)."""
    low, high = LLAMA3.values()
    found = []
    for i in range(0, config["head_dim"], 2):
        period = 2 * math.pi * config["rope_theta"] ** (i / config["head_dim"])
        keep = (LLAMA3_CONTEXT / period - low) / (high - low)
        keep = min(max(keep, 0.0), 1.0)
        found.append(1 / (keep + (1 - keep) / factor))
    return found


def new_names(config: dict, meta: dict, shapes: dict[str, list[int]]) -> dict[str, str]:
    """The names at Hugging Face of the tensors of a GGUF, by theirs. They are those that its
    architecture has, in their shapes, and no others, or a Refusal names the culprit."""
    names = {}
    for name, new, expected in expected_tensors(config, architecture(meta)):
        if name not in shapes:
            raise Refusal(f"tensor {name} is missing")
        if shapes[name] != expected:
            raise Refusal(f"tensor {name} is {shapes[name]}, expected {expected}")
        names[name] = new
    extra = shapes.keys() - names.keys() - {ROPE_FACTORS}
    if extra:
        raise Refusal(f"tensor {min(extra)} is not expected ({len(extra)} such in all)")
    return names


def expected_tensors(config: dict, family: str) -> Iterator[tuple[str, str, list[int]]]:
    """The name of each tensor in a GGUF and at Hugging Face, and its shape there."""
    dim = config["head_dim"]
    sizes = config | {"q_size": config["num_attention_heads"] * dim}
    sizes["kv_size"] = config["num_key_value_heads"] * dim

    def of_group(group: str) -> Iterator[tuple[str, str, list[int]]]:
        for name, (new, *shape) in TABLES["tensors"][group].items():
            yield name, new, [sizes[size] for size in shape]

    yield from of_group("once")
    if not config["tie_word_embeddings"]:
        yield from of_group("head")
    groups = FAMILIES[family]["layer"]
    groups = groups + [group for group in FAMILIES[family]["optional"] if group in config]
    for i in range(config["num_hidden_layers"]):
        for group in groups:
            for name, new, shape in of_group(group):
                yield f"blk.{i}.{name}", f"model.layers.{i}.{new}", shape


def in_pairs(names: dict, head_dim: int, meta: dict) -> dict[str, int]:
    """head_dim by the names of tensors where RoPE turns rows 2i and 2i + 1 of a head together: so
    the converter of llama.cpp puts them for some architectures."""
    stems = FAMILIES[architecture(meta)]["in_pairs"]
    return {name: head_dim for name in names if name.split(".")[-2] in stems}
