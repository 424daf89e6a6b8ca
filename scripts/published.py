"""A checkpoint directory in our own format of one that somebody else has quantized."""

import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import quantize
from kernels import FAST, InputError
from model import Layer, ModelConfig, Transformer
from scripts import checkpoint, codes, formats, settings
from scripts.checkpoint import EMBEDDING, HEAD
from scripts.codes import Codes, Weight
from scripts.configuration import read_config
from scripts.directories import check_finite, copy_files
from scripts.files import Refusal, refusing
from scripts.fused import Rows

SHARD = 1 << 27  # bytes of a file, or of one layer where that is larger
BLOCK = 1 << 22  # weights that are floats at a time
GROUPS = (128, 64, 32)  # of int4, the best first
# Of activations and the cache, which stay floats.
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "activation_scale")
ACTIVATIONS += ("q_scale", "k_scale", "v_scale")
WRONG = (LookupError, TypeError, AttributeError, ArithmeticError, InputError)


def convert(source: Path, work: Path) -> None:
    """Fill the directory `work` from that of a published checkpoint. What is 4 bits becomes int4,
    8 bits with a scale a row int8, to the bit; all else bfloat16. Its memory is that of a shard or
    of a layer. Raises Refusal for what is not supported, or not what its config.json says."""
    config = checkpoint.read_json(source / "config.json")
    method = settings.published_by(config)
    if method is None:
        name = settings.json_object(config, "quantization_config").get("quant_method")
        valid = ", ".join(name for name in formats.METHODS if name != "mlx")
        expected = f"expected a quant_method of {valid}, or what MLX writes"
        found = f"quantized by {name!r}" if name else "not quantized"
        raise Refusal(f"{source} is {found}, {expected}")
    with refusing(f"{source}: it is not what its config.json says", *WRONG):
        slices = open_slices(source, config, method)
        write_config(work, config)
        target = configure(source, work, slices)
        model = new_model(target)
        shapes = {name: shape for layer in model.loaders for name, shape in layer.shapes.items()}
        slices = checkpoint.fitted(source, slices, shapes)
    with torch.inference_mode():
        write_weights(model, source, slices, work)
    write_config(work, config, target)
    copy_files(source, work)
    tell(model, slices, method)  # last, for what is refused is one line


def open_slices(source: Path, config: dict, method: str) -> dict:
    """The tensors of a checkpoint by name, those of quantized layers as a Weight each."""
    how = settings.json_object(config, "quantization_config" if method != "mlx" else "quantization")
    found, markers = formats.METHODS[method]
    with refusing(str(source / "config.json"), Refusal):
        weight_of = found(how)
    slices = checkpoint.open_tensors(source)
    weights, taken = {}, set()
    for name in slices:
        stem, _, kind = name.rpartition(".")
        if kind in ACTIVATIONS:
            taken.add(name)
        if kind in markers:
            layer = codes.Layer(stem, slices)
            with refusing(str(source), Refusal):
                weights[f"{stem}.weight"] = weight_of(layer)
            taken |= layer.taken
    if not weights:
        expected = " or ".join(f"*.{marker}" for marker in markers)
        raise Refusal(f"{source} has no tensor {expected}, expected those of {method}")
    return {name: part for name, part in slices.items() if name not in taken} | weights


def configure(source: Path, work: Path, slices: dict) -> ModelConfig:
    """Of the model that is to be written, from the config.json that is in `work`."""
    config = read_config(work / "config.json")
    if config.tie_word_embeddings and HEAD in slices:
        is_quantized = isinstance(slices[HEAD], Weight) or isinstance(slices[EMBEDDING], Weight)
        tied = not (is_quantized or checkpoint.has_own_head(source))
        config = replace(config, tie_word_embeddings=tied)
    # Of any mode, to see which of the layers have one.
    model = new_model(replace(config, quantization="int8"))
    shapes = {name: shape for layer in model.loaders for name, shape in layer.shapes.items()}
    mode, group = mode_of(linear_weights(model, checkpoint.fitted(source, slices, shapes)))
    return replace(config, quantization=mode, group_size=group)


def new_model(config: ModelConfig) -> Transformer:
    return Transformer(config, FAST, torch.device("cpu"), torch.bfloat16)


def linear_weights(model: Transformer, slices: dict) -> list:
    """Of the layers that are quantized as the whole model is: not the head."""
    found = []
    for layer in model.loaders:
        if layer.mode and layer is not model.head:
            found += [slices[name] for name in layer.shapes if name.endswith(".weight")]
    return found


def mode_of(linears: list) -> tuple[str | None, int]:
    """The mode in which those that are quantized stay what they are, and its group size."""
    weights = [whole(part)[0] for part in linears if isinstance(whole(part)[0], Weight)]
    for group in GROUPS:
        if weights and all(weight.fits(group) for weight in weights):
            return "int4", group
    if weights and all(weight.is_int8() for weight in weights):
        return "int8", GROUPS[-1]
    return None, GROUPS[-1]


def whole(part) -> tuple:
    """A slice, or the fused one of which it is some rows; and the first of these rows."""
    return (part.whole, part.start) if isinstance(part, Rows) else (part, 0)


def tell(model: Transformer, slices: dict, method: str) -> None:
    """Say what has become of the weights."""
    config = model.config
    kind = config.quantization or "bfloat16"
    group = f" in groups of {config.group_size}" if kind == "int4" else ""
    checkpoint.say(f"converted weights from {method} to {kind}{group}")
    floats = [x for x in linear_weights(model, slices) if not isinstance(whole(x)[0], Weight)]
    if floats:
        checkpoint.say(f"{len(floats)} linear layers that were floats became {kind} as well")
    if config.quantization:
        checkpoint.say("the head became int8")


def write_weights(model: Transformer, source: Path, slices: dict, work: Path) -> None:
    shard, done = {}, set()
    files = 0
    for count, layer in enumerate(model.loaders, start=1):
        for name in layer.shapes.keys() - done:  # a tied head shares its tensor with the embedding
            with refusing(f"{source}: tensor {name}", Refusal):
                stored = stored_tensors(layer, name, slices[name], work.parent)
            check_finite(stored, f"{source}: tensor {name}")
            shard |= stored
            done.add(name)
            is_last = layer is model.loaders[-1] and layer.shapes.keys() <= done
            if is_last or sum(t.nbytes for t in shard.values()) > SHARD:
                save(shard, work / f"model-{files:05}.safetensors")
                shard, files = {}, files + 1
            del stored
        checkpoint.progress(f"converting {count}/{len(model.loaders)}", end="\r")
    checkpoint.progress("")


def save(shard: dict[str, Tensor], path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in shard.items()}
    with refusing(f"{path.parent.name}/{path.name} cannot be written", OSError, SafetensorError):
        save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it closed to other users


def stored_tensors(layer: Layer, name: str, part, folder: Path) -> dict[str, Tensor]:
    """Those of a weight on disk, by name. Codes stay what they are where the mode has such."""
    weight, first = whole(part)
    N, *rest = part.get_shape()
    if not isinstance(weight, Weight) and (layer.mode is None or not rest):
        return {name: part[:]}
    rows = slice(first, first + N)
    if not isinstance(weight, Weight):
        kinds = in_blocks(layer, weight.__getitem__, rows, rest, folder)
    else:
        codes = weight.read()
        kinds = exact_kinds(layer, weight, codes)
        if kinds is None:
            kinds = in_blocks(layer, codes.floats, rows, rest, folder)
        else:
            kinds = {kind: tensor[rows] for kind, tensor in kinds.items()}
    return {name.removesuffix("weight") + kind: tensor for kind, tensor in kinds.items()}


def exact_kinds(layer: Layer, weight: Weight, codes: Codes) -> dict | None:
    if layer.mode == "int4" and weight.fits(layer.group_size):
        return codes.int4(layer.group_size)
    if layer.mode == "int8" and weight.is_int8():
        return codes.int8()
    return None


def in_blocks(layer: Layer, floats: Callable, rows: slice, rest: list[int], folder: Path) -> dict:
    """Some rows of a weight as a layer has them, of which few are floats at a time."""
    found = {}
    step = max(1, BLOCK // math.prod(rest))
    for start in range(rows.start, rows.stop, step):
        block = floats(slice(start, min(start + step, rows.stop)))
        kinds = {"weight": block.to(layer.dtype)}
        if layer.mode:
            kinds = quantize.quantized(layer.mode, block, layer.group_size)
        for kind, part in kinds.items():
            if kind not in found:
                shape = (rows.stop - rows.start, *part.shape[1:])
                found[kind] = empty(shape, part.dtype, folder)
            found[kind][start - rows.start :][: len(part)] = part
    return found


def empty(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """One to be filled. A large one, such as an embedding in floats, is in a file that has no name,
    and no memory to itself. Raises Refusal where that cannot be made."""
    size = math.prod(shape) * dtype.itemsize
    if size <= SHARD:
        return torch.empty(shape, dtype=dtype)
    unable = refusing(f"a temporary file of {size} bytes cannot be written", OSError)
    with unable, tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # of a full disk one reads here, not by SIGBUS
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)


def write_config(work: Path, config: dict, target: ModelConfig | None = None) -> None:
    """config.json, without what it says of weights that others have quantized, and with what
    becomes of them in the `target`."""
    wrong = ("quantization", "quantization_config")
    config = {name: value for name, value in config.items() if name not in wrong}
    if target and target.quantization:
        how = {"quant_method": "gpt-exact", "mode": target.quantization}
        config["quantization_config"] = how | {"group_size": target.group_size}
    if target and not target.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2) + "\n"
    with refusing(f"{work.name}/config.json cannot be written", OSError):
        (work / "config.json").write_text(text, encoding="utf-8")
