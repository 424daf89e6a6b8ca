"""What a checkpoint directory holds: JSON files and those of the weights. Also, for all plumbing,
how one speaks to the user."""

import json
import os
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from scripts.files import Refusal as Refusal  # all plumbing knows it as checkpoint.Refusal
from scripts.files import check_file, is_there, text_in
from scripts.files import refusing as refusing
from scripts.fused import taken_apart

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"


def is_one_of_several() -> bool:
    """Whether torchrun has started this process beside others."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1


def is_first_rank() -> bool:
    """Whether this process is the one that speaks: torchrun numbers those that it starts. A number
    alone, as a shell within a job may have it, says nothing."""
    rank = os.environ.get("RANK", "")
    size = int(os.environ["WORLD_SIZE"]) if is_one_of_several() else 1
    return not (rank.isdecimal() and 0 < int(rank) < size)


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
    if default is not None and not is_there(path):
        return default
    text = text_in(path)
    with refusing(f"{path}: expected a JSON file", ValueError, RecursionError):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise Refusal(f"{path}: expected a JSON object")
    return content


def weight_map(directory: Path) -> dict[str, Path]:
    """The files that an index names for tensors; none where there is no index."""
    index = directory / INDEX
    expected = "expected a weight_map of tensor names to files"
    with refusing(f"{index}: {expected}", AttributeError):
        names = dict((read_json(index, {}).get("weight_map") or {}).items())
    for name, file in names.items():
        if not isinstance(file, str):
            raise Refusal(f"{index}: {name} is in {file}, {expected}")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise Refusal(f"{index}: {name} is in {file}, expected a file of this directory")
    return {name: directory / file for name, file in names.items()}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, else model.safetensors,
    else shards, else all that are called model*. What lies beside them is not read."""
    if indexed := set(weight_map(directory).values()):
        return sorted(indexed)
    for pattern in ("model.safetensors", "model-[0-9]*.safetensors", "model*.safetensors"):
        if found := sorted(directory.glob(pattern)):
            return found
    return []


def open_tensors(directory: Path) -> dict:
    """All tensors by name, of which nothing is read until one is sliced. Of a name that two files
    have, that counts which the index means."""
    indexed = weight_map(directory)
    slices = {}
    for path in weight_files(directory):
        if is_there(path):
            check_file(path)
        wrong = (OSError, ValueError, SafetensorError)
        with refusing(f"{path}: missing, truncated or corrupt", *wrong):
            file = safe_open(path, "pt")
        for name in file.keys():
            if name in slices and not indexed:
                raise Refusal(f"{path}: tensor {name} is in another file too, and no index")
            if name not in slices or indexed.get(name, path) == path:
                slices[name] = file.get_slice(name)
    return slices


def has_own_head(directory: Path) -> bool:
    """Whether the files hold a head that is not the embedding. Both are read if they are alike, a
    few rows at a time."""
    slices = open_tensors(directory)
    if not {HEAD, EMBEDDING} <= slices.keys():
        return False
    head, table = slices[HEAD], slices[EMBEDDING]
    shape = head.get_shape()
    if shape != table.get_shape() or not shape:
        return True
    for start in range(0, shape[0], 4096):
        rows = slice(start, start + 4096)
        if not head[rows].float().equal(table[rows].float()):
            return True
    return False


def open_weights(directory: Path, shapes: dict) -> dict:
    """The tensors of a checkpoint by name, of which nothing is read until one is sliced. They are
    those that a model has, in their `shapes`, and no others, or a Refusal names the culprit."""
    return fitted(directory, open_tensors(directory), shapes)


def fitted(directory: Path, slices: dict, shapes: dict) -> dict:
    """Of a checkpoint that is open. See open_weights."""
    slices = taken_apart(directory, slices, shapes)
    if not slices:
        raise Refusal(f"{directory}: no model.safetensors and no {INDEX}")
    if HEAD in slices and HEAD not in shapes:  # one table for both, by either name
        slices.setdefault(EMBEDDING, slices[HEAD])
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
    known = shapes.keys() | {HEAD}
    extra = {name for name in slices if not name.endswith("rotary_emb.inv_freq")} - known
    for problem, names in (("missing", shapes.keys() - slices.keys()), ("not expected", extra)):
        if names:
            count = f"({len(names)} in all)"
            raise Refusal(f"{directory}: tensor {min(names)} is {problem} {count}")
