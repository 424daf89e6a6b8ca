"""What a request may ask for, and what a checkpoint asks for where the user does not: in a chat its
generation_config.json has the defaults of sampling."""

import argparse
import json
from pathlib import Path

from scripts.checkpoint import Refusal, read_json, refusing

INFINITY = 2**62  # what fits a tensor of int64, with room to add
COUNT = (1, INFINITY)
RANGES = {
    "max_new_tokens": COUNT,
    "temperature": (0, INFINITY),
    "top_k": COUNT,
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),
}
EXAMPLE = '{"5": -100}'
BIASES = (-1e30, 1e30)  # times any penalty, they stay numbers of fp32
# Of transformers, for what a generation_config.json that samples leaves out.
OF_TRANSFORMERS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    low, high = limits
    if not low <= value <= high:  # nan is not, either
        raise Refusal(f"{name} {value}: expected {low:g} to {high:g}")


# ---- a bias


def bias_of_flag(text: str) -> dict[int, float]:
    """As --logit_bias has it. Raises what argparse expects of a type."""
    try:
        with refusing("expected JSON", json.JSONDecodeError, RecursionError):
            given = json.loads(text)
        return read_bias(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_bias(given) -> dict[int, float]:
    """What to add to the logits of tokens, of a JSON object of their ids. Raises Refusal."""
    if not isinstance(given, dict):
        raise Refusal(f"logit_bias is {given!r:.40}, expected an object such as {EXAMPLE}")
    found = {}
    for name, value in given.items():
        if not (name.isdecimal() and name.isascii() and name == str(int(name[:18]))):
            raise Refusal(f"logit_bias of {name!r:.40}, expected ids of tokens as in {EXAMPLE}")
        if type(value) not in (int, float):
            raise Refusal(f"logit_bias of {name} is {value!r:.40}, expected a number")
        check_range(f"logit_bias of {name}:", value, BIASES)
        found[int(name)] = float(value)
    return found


def check_bias(bias: dict[int, float] | None, vocab_size: int) -> None:
    """Raise Refusal where a model has no such token."""
    highest = max(bias or [0])
    if highest >= vocab_size:
        raise Refusal(f"logit_bias has token {highest}, expected ids below {vocab_size}")


# ---- a checkpoint


def given(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """Which settings of sampling are flags that the user gave, if only with their default."""
    unset = argparse.Namespace(**dict.fromkeys(OF_TRANSFORMERS))
    args, _ = parser.parse_known_args(argv, unset)
    return [name for name in OF_TRANSFORMERS if getattr(args, name) is not None]


def of_checkpoint(directory: Path) -> dict[str, float]:
    """The sampling of transformers' generate() by a generation_config.json: without do_sample
    temperature 0, and its own defaults for what is left out. Empty where the file says nothing of
    sampling. Raises Refusal."""
    path = directory / "generation_config.json"
    stated = {name: value for name, value in read_json(path, {}).items() if value is not None}
    samples = stated.get("do_sample", False)
    if type(samples) is not bool:
        raise Refusal(f"{path}: do_sample is {samples!r:.40}, expected true or false")
    if stated.keys().isdisjoint({"do_sample", *OF_TRANSFORMERS}):
        return {}
    found = {}
    for name, default in OF_TRANSFORMERS.items():
        value = stated.get(name, default)
        kinds = [int] if type(default) is int else [int, float]
        if type(value) not in kinds:
            kind = kinds[-1].__name__
            raise Refusal(f"{path}: {name} is {value!r:.40}, expected a number, {kind}")
        if name == "top_k" and value == 0:  # which means all
            value = INFINITY
        check_range(f"{path}: {name}", value, RANGES[name])
        found[name] = type(default)(value)
    return found if samples else found | {"temperature": 0.0}


def take(args: argparse.Namespace, directory: Path) -> str:
    """Put the defaults of a checkpoint in the place of flags that are not given, and say so; empty
    where there are none."""
    taken = {}
    for name, value in of_checkpoint(directory).items():
        if name not in args.given:
            taken[name] = value
            setattr(args, name, value)
    words = [f"{name} {'all' if value == INFINITY else value}" for name, value in taken.items()]
    return f"sampling by generation_config.json: {', '.join(words)}" if words else ""
