"""Write a checkpoint directory of another one, with int8 or int4 weights: what quantize.py does."""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import generate
import quantize
from kernels import FAST, Fast
from model import Layer, ModelConfig, Transformer
from scripts import checkpoint, cli, loading, outputs
from scripts.checkpoint import Refusal, refusing
from scripts.directories import check_finite, copy_files

SHARD = 1 << 30  # bytes of a file, or of one layer where that is larger


def rounded(model: Transformer, source: Path, slices: dict) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors to write of one layer after the other, each weight rounded by itself."""
    return rounded_layers(model.loaders, source, slices)


def write(
    source: Path,
    out: str | None,
    mode: str,
    group_size: int,
    make: Callable = rounded,
    ops: Fast = FAST,
) -> Path:
    """The new directory, whole or not at all; its memory is that of a shard. Without `out`, its
    name is that of the source and the mode. What is written of the layers of a model with `ops` is
    what `make` yields. Raises Refusal or InputError."""
    group = f"-g{group_size}" if mode == "int4" else ""
    target = Path(out or f"{source.resolve()}-{mode}{group}")
    check_target(target, source)
    config = loading.read_config(source / "config.json", mode, group_size)
    model = Transformer(config, ops, torch.device("cpu"), torch.bfloat16)
    slices = checkpoint.open_weights(source, loading.tensor_shapes(model))
    with outputs.new_directory(target) as work, torch.inference_mode():
        write_weights(make(model, source, slices), work)
        copy_files(source, work)
        write_config(source, work, config)
    return target


def check_target(target: Path, source: Path) -> None:
    """Raise Refusal where nothing can be made, or not without touching what is there."""
    if os.path.lexists(target):
        what = "exists" if target.exists() else "is a link to nothing"
        raise Refusal(f"{target} {what}: move it away or choose another --out")
    if not target.parent.is_dir():
        raise Refusal(f"{target.parent} is no directory, expected one to make {target} in")
    if target.resolve().is_relative_to(source.resolve()):
        raise Refusal(f"{target} is inside of {source}, expected --out elsewhere")


def rounded_layers(layers: list[Layer], source: Path, slices: dict) -> Iterator[dict]:
    done = set()
    for layer in layers:
        stored = {}
        for name in layer.shapes.keys() - done:  # a tied head shares its tensor with the embedding
            parts = stored_tensors(layer, name, slices[name][:])
            check_finite(parts, f"{source}: tensor {name}")
            stored |= parts
            done.add(name)
        yield stored


def write_weights(layers: Iterable[dict[str, torch.Tensor]], work: Path) -> None:
    """Into as many files as it takes. Raises Refusal."""
    shard, files = {}, 0
    for stored in layers:
        shard |= stored
        if sum(t.nbytes for t in shard.values()) > SHARD:
            save(shard, work / f"model-{files:05}.safetensors")
            shard, files = {}, files + 1
    if shard:
        save(shard, work / f"model-{files:05}.safetensors")


def save(shard: dict[str, torch.Tensor], path: Path) -> None:
    with refusing(f"{path.parent.name}/{path.name} cannot be written", OSError, SafetensorError):
        save_file(shard, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it closed to other users


def stored_tensors(layer: Layer, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.dim() < 2 or layer.mode is None:
        return {name: tensor}
    kinds = quantize.quantized(layer.mode, tensor, layer.group_size)
    return {name.removesuffix("weight") + kind: part for kind, part in kinds.items()}


def write_config(source: Path, work: Path, config: ModelConfig) -> None:
    settings = checkpoint.read_json(source / "config.json")
    how = {"quant_method": "gpt-exact", "mode": config.quantization}
    settings["quantization_config"] = how | {"group_size": config.group_size}
    if not config.tie_word_embeddings:  # whatever it says: there may be a head in the files
        settings["tie_word_embeddings"] = False
    text = json.dumps(settings, indent=2) + "\n"
    with refusing(f"{work.name}/config.json cannot be written", OSError):
        (work / "config.json").write_text(text, encoding="utf-8")


def main() -> None:
    generate.command(run)


def run() -> None:
    args = parse_args()
    if checkpoint.is_one_of_several():
        raise Refusal("expected one process, not several by torchrun")
    print(write(loading.find(args.checkpoint_path), args.out, args.mode, args.group_size))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of quantize.py, which has not those of generate.py that would do nothing here."""
    parser = cli.Parser(
        description=quantize.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.group("of this command")
    parser.checkpoint("--checkpoint_path", "what to quantize (the default model)")
    modes = ",".join(quantize.LINEARS)
    text = "of the linear layers; needed"
    parser.add("--mode", type=known_mode, required=True, metavar=f"{{{modes}}}", help=text)
    text = "of int4 (%(default)s)"
    sizes = cli.GROUP_SIZES
    parser.add("--group_size", type=int, choices=sizes, default=sizes[0], help=text)
    text = "what to make (DIR and the mode)"
    parser.add("--out", type=named, metavar="NEW", help=text)
    return parser.parse_args(argv)


def known_mode(text: str) -> str:
    if text not in quantize.LINEARS:
        choices = " or ".join(f"--mode {mode}" for mode in quantize.LINEARS)
        raise argparse.ArgumentTypeError(f"expected {choices}, not {text!r}")
    return text


def named(text: str) -> str:
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} has no name, expected a new directory")
    return text
