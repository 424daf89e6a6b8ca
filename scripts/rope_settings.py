"""What a config.json says of RoPE, in all its spellings, made complete and checked."""

from scripts.checkpoint import Refusal
from scripts.settings import json_object, number

OLD_THETA = 10000.0  # where there is no rope_parameters, which states it
PLACES = ("rope_scaling", "rope_parameters")  # of both, the first counts
CONTEXT = "original_max_position_embeddings"
NEEDED = {  # numbers, by rope_type
    "linear": ["factor"],
    "dynamic": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", CONTEXT],
    "yarn": ["factor", CONTEXT],
    "longrope": ["factor", CONTEXT],
}
POSSIBLE = ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]
LISTS = {"longrope": ["short_factor", "long_factor"]}  # of a number for each pair
RISING = {  # of two numbers, the first is less
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}
PHI3 = {"su": "longrope", "yarn": "longrope"}  # as its first files call it


def places(settings: dict) -> list[dict]:
    """All settings of RoPE that there are, in the order in which they count: for all layers, then
    for types of layers. They may be empty."""
    found = [json_object(settings, name) for name in PLACES]
    return found + [x for place in found for x in place.values() if isinstance(x, dict)]


def rope_type(settings: dict, rope: dict) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if settings["architecture"] == "Phi3ForCausalLM" and isinstance(kind, str):
        return PHI3.get(kind, kind)
    return kind


def rope_parameters(settings: dict, layers: str, head_dim: int) -> dict:
    """The settings of RoPE of one type of layers. What is of all layers may stand elsewhere."""
    scaling, parameters, *_ = places(settings)
    rope = of_layers(scaling or parameters, layers)
    found = {name: value for name, value in rope.items() if value is not None}
    found["rope_type"] = rope_type(settings, found)
    if "rope_theta" in settings:
        found.setdefault("rope_theta", settings["rope_theta"])
    elif scaling or not parameters:
        found.setdefault("rope_theta", OLD_THETA)
    if CONTEXT in settings:
        found[CONTEXT] = settings[CONTEXT]
    found.setdefault("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if found["rope_type"] == "yarn":
        found = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | found
    if found["rope_type"] in ("yarn", "longrope"):
        longest = settings["max_position_embeddings"]
        original = number(CONTEXT, found.setdefault(CONTEXT, longest))
        found.setdefault("factor", longest / original)
    check(found, settings, head_dim)
    return found


def of_layers(rope: dict, layers: str) -> dict:
    """Settings of one type of layers, out of those by type, as transformers 5 may write them."""
    by_type = {kind: own for kind, own in rope.items() if isinstance(own, dict)}
    if not by_type:
        return rope
    rest = {name: value for name, value in rope.items() if name not in by_type}
    if layers not in by_type:
        raise Refusal(f"rope_parameters {rope} have none for {layers}")
    own = by_type[layers]
    # What stands beside them must not say otherwise.
    if own | rest != rest | own:
        raise Refusal(f"rope_parameters {rope} differ from those for {layers}")
    return rest | own


def check(rope: dict, settings: dict, head_dim: int) -> None:
    """Raise Refusal for settings that are wrong; what is missing raises KeyError."""
    kind = rope["rope_type"]
    for name in ["rope_theta", *NEEDED.get(kind, [])]:
        rope[name] = number(name, rope[name])
    for name in POSSIBLE:
        if name in rope:
            rope[name] = number(name, rope[name], zero=name.startswith("mscale"))
    if rope.get("truncate", True) not in (True, False):
        raise Refusal(f"truncate is {rope['truncate']!r}, expected true or false")
    check_partial(rope["partial_rotary_factor"], head_dim)
    pairs = -(-int(head_dim * rope["partial_rotary_factor"]) // 2)
    for name in LISTS.get(kind, []):
        check_list(name, rope[name], pairs)
    check_order(rope)
    if kind == "longrope" and rope[CONTEXT] <= 1:
        raise Refusal(f"{CONTEXT} is {rope[CONTEXT]:g}, expected more than 1")
    longest = settings["max_position_embeddings"]
    if kind == "dynamic" and rope.get(CONTEXT, longest) != longest:
        why = "where it would depend on the length of a text"
        raise Refusal(f"rope_type dynamic is not supported beyond {CONTEXT}, {why}")


def check_partial(factor, head_dim: int) -> None:
    number("partial_rotary_factor", factor)
    if factor > 1 or head_dim * factor < 1:
        expected = f"expected at most 1, and a part of the {head_dim} numbers of a head"
        raise Refusal(f"partial_rotary_factor is {factor}, {expected}")


def check_list(name: str, values, pairs: int) -> None:
    if not isinstance(values, list) or len(values) != pairs:
        found = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
        raise Refusal(f"{name} is {found}, expected a list of {pairs} numbers")
    for value in values:
        number(f"a number of {name}", value)


def check_order(rope: dict) -> None:
    low, high = RISING.get(rope["rope_type"], ("", ""))
    if low in rope and high in rope and rope[low] >= rope[high]:
        found = f"{rope[low]} and {rope[high]}"
        raise Refusal(f"{low} and {high} are {found}, expected the first to be less")
