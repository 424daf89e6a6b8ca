"""What a checkpoint directory holds: config.json in one spelling, and the files of the weights.
Also, for all plumbing, how something is refused and how one speaks to the user."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open


class Refusal(ValueError):
    """The user gave something that cannot work; the message is the one line that they read."""


@contextlib.contextmanager
def refusing(message: str, *errors: type[Exception]) -> Iterator[None]:
    """Within, such errors come from what the user gave: each becomes a Refusal of the message and
    the cause."""
    try:
        yield
    except errors as error:
        raise Refusal(f"{message}: {cause(error)}") from error


def cause(error: Exception) -> str:
    """What an error says of itself, in words that one can read after a colon."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(getattr(error, "strerror", None) or error)


def is_first_rank() -> bool:
    """Whether this process is the one that speaks: torchrun numbers those that it starts."""
    return int(os.environ.get("RANK", 0)) == 0


def say(*words, **options) -> None:
    """Print to standard error, which leaves standard output to completions."""
    if is_first_rank():
        print(*words, file=sys.stderr, flush=True, **options)


def progress(*words, **options) -> None:
    """Say what only matters to somebody who watches."""
    if sys.stderr.isatty():
        say(*words, **options)


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file, or `default` where there is no file. Raises Refusal."""
    with refusing(f"{path}: expected a JSON file", OSError, ValueError):
        if default is not None and not path.exists():
            return default
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise Refusal(f"{path}: expected a JSON object")
    return content


def read_settings(path: Path) -> dict:
    """A config.json, whose authors spell some things in several ways, in one of them.

    Entries that are null are left out. `architecture` is the first of `architectures`;
    `rope_parameters` has `rope_type`, `rope_theta` (None where nothing states it) and the settings
    of that type; `num_experts` is there where `num_local_experts` is; `quantization` has `mode` and
    perhaps `group_size`. All else is as given. Raises Refusal."""
    given = {name: value for name, value in read_json(path).items() if value is not None}
    settings = dict(given)
    with refusing(str(path), LookupError, TypeError, AttributeError):
        rope = rope_parameters(given)
        settings["rope_parameters"] = rope
        if "partial_rotary_factor" in rope:  # elsewhere it stands beside them
            settings["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if given.get("architectures"):
            settings["architecture"] = given["architectures"][0]
        if "num_local_experts" in given:
            settings.setdefault("num_experts", given["num_local_experts"])
        if "quantization_config" in given:
            settings["quantization"] = quantization(given["quantization_config"])
    return settings


def rope_parameters(given: dict) -> dict:
    """What newer files call rope_parameters; older ones have rope_theta and rope_scaling."""
    rope = given.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": given.get("rope_theta")} | given.get("rope_scaling", {})
    return {"rope_type": rope.get("type", "default")} | rope


def quantization(config: dict) -> dict:
    """`mode` is our name for it, other tools write quant_method."""
    found = {"mode": config.get("mode", config.get("quant_method"))}
    if "group_size" in config:
        found["group_size"] = config["group_size"]
    return found


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, else all that are called
    model*. There is at least one, or a Refusal."""
    index = directory / "model.safetensors.index.json"
    with refusing(f"{index}: expected a weight_map of tensor names to files", AttributeError):
        names = set(map(str, read_json(index, {}).get("weight_map", {}).values()))
    files = {directory / name for name in names} or directory.glob("model*.safetensors")
    paths = sorted(files)
    if not paths:
        raise Refusal(f"{directory}: no model.safetensors and no {index.name}")
    return paths


def open_weights(directory: Path, shapes: dict) -> dict:
    """The tensors of a checkpoint by name, of which nothing is read until one is sliced. They are
    those that a model has, in their `shapes`, and no others, or a Refusal names the culprit."""
    slices = {}
    for path in weight_files(directory):
        with refusing(f"{path}: missing, truncated or corrupt", OSError, SafetensorError):
            file = safe_open(path, "pt")
        slices |= {name: file.get_slice(name) for name in file.keys()}
    check_names(directory, shapes, slices)
    for name, shape in shapes.items():
        stem = name.removesuffix("weight")
        expected = "BF16, F16 or F32"
        if f"{stem}scale" in shapes:
            expected = "U8" if f"{stem}zero" in shapes else "I8"
        dtype, found = slices[name].get_dtype(), slices[name].get_shape()
        if found != list(shape) or dtype not in expected:
            what = f"is {dtype} {found}, expected {expected} {list(shape)}"
            raise Refusal(f"{directory}: tensor {name} {what}")
    return slices


def check_names(directory: Path, shapes: dict, slices: dict) -> None:
    # Some files repeat a tied head, and the first Llama 2 exports store what config.json says.
    known = shapes.keys() | {"lm_head.weight"}
    extra = {name for name in slices if not name.endswith("rotary_emb.inv_freq")} - known
    for problem, names in (("missing", shapes.keys() - slices.keys()), ("not expected", extra)):
        if names:
            count = f"({len(names)} in all)"
            raise Refusal(f"{directory}: tensor {min(names)} is {problem} {count}")
