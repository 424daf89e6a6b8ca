"""Write a checkpoint directory of another one, with int8 or int4 weights: what quantize.py does."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import generate
import quantize
from kernels import FAST
from model import Layer, ModelConfig, Transformer
from scripts import checkpoint, cli, download, loading

SHARD = 1 << 30  # bytes of a file, or of one layer where that is larger


def write(source: Path, out: str, mode: str, group_size: int) -> Path:
    """The new directory, whole or not at all; its memory is that of a shard. Without `out`, its
    name is that of the source and the mode. Raises Refusal or InputError."""
    group = f"-g{group_size}" if mode == "int4" else ""
    target = Path(out or f"{source.resolve()}-{mode}{group}")
    if target.exists():
        raise checkpoint.Refusal(f"{target} exists: move it away or choose another --out")
    config = loading.read_config(source / "config.json", mode, group_size)
    model = Transformer(config, FAST, torch.device("cpu"), torch.bfloat16)
    slices = checkpoint.open_weights(source, loading.tensor_shapes(model))
    temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    with temporary as folder, torch.inference_mode():
        work = Path(folder, target.name)
        work.mkdir()  # a TemporaryDirectory itself is closed to other users
        write_weights(model, slices, work)
        copy_files(source, work)
        write_config(source, work, config)
        return work.rename(target)


def write_weights(model: Transformer, slices: dict, work: Path) -> None:
    shard, files = {}, 0
    done = set()
    for layer in model.loaders:
        for name in layer.shapes.keys() - done:  # a tied head shares its tensor with the embedding
            shard |= stored_tensors(layer, name, slices[name][:])
            done.add(name)
        if layer is model.loaders[-1] or sum(t.nbytes for t in shard.values()) > SHARD:
            path = work / f"model-{files:05}.safetensors"
            save_file(shard, path, {"format": "pt"})
            path.chmod(0o644)  # safetensors leaves it closed to other users
            shard, files = {}, files + 1


def stored_tensors(layer: Layer, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.dim() < 2 or layer.mode is None:
        return {name: tensor}
    kinds = quantize.quantized(layer.mode, tensor, layer.group_size)
    return {name.removesuffix("weight") + kind: part for kind, part in kinds.items()}


def copy_files(source: Path, work: Path) -> None:
    for kind in ("json", "jinja", "model", "txt"):
        for path in source.glob(f"*.{kind}"):
            if path.name != "model.safetensors.index.json":
                shutil.copy(path, work)


def write_config(source: Path, work: Path, config: ModelConfig) -> None:
    settings = checkpoint.read_json(source / "config.json")
    how = {"quant_method": "gpt-exact", "mode": config.quantization}
    settings["quantization_config"] = how | {"group_size": config.group_size}
    if not config.tie_word_embeddings:  # whatever it says: there may be a head in the files
        settings["tie_word_embeddings"] = False
    text = json.dumps(settings, indent=2) + "\n"
    (work / "config.json").write_text(text, encoding="utf-8")


def main() -> None:
    generate.command(run)


def run() -> None:
    args = cli.parse_args(mode="", out="")
    if args.mode not in quantize.LINEARS:
        choices = " or ".join(f"--mode {mode}" for mode in quantize.LINEARS)
        raise checkpoint.Refusal(f"expected {choices}")
    source = args.checkpoint_path or download.DEFAULT
    print(write(source, args.out, args.mode, args.group_size))
