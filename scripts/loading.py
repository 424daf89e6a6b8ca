"""From flags and a checkpoint directory to a model and its tokenizer."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import tp
from kernels import BATCH_INVARIANT, FAST, InputError
from model import Layer, Transformer
from scripts import checkpoint, cli, defaults, download, drafts, machine
from scripts.configuration import read_config, read_shape
from scripts.few_rows import prepare
from scripts.ranks import together
from scripts.row_loops import put_in
from scripts.tokenizer import Tokenizer

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(args, ranks: int | None = None) -> tuple[Transformer, Tokenizer]:
    """The model that the flags choose, or a part of it where `ranks` share it (tp.world if None),
    and its tokenizer. Fetches a missing default checkpoint."""
    if args.deterministic:
        refuse_rocm(args.device)
    device = machine.find_device(args.device, tp.world)
    shape = args.random_weights
    directory = None if shape else find(args.checkpoint_path)
    path = shape or directory / "config.json"
    read = read_shape if shape else read_config
    config = read(path, args.quantize, args.group_size)
    angles = config.max_position_embeddings * config.head_dim // 2 * len(config.ropes)
    # Of each in fp32 itself, its cos and its sin, and these once more in one table.
    machine.check_fits(device, 5 * 4 * angles, f"{path}: a table of positions")
    tokenizer = Tokenizer(directory)
    if shape:
        config = replace(config, stored=False)  # random weights are quantized while loading
    ops = BATCH_INVARIANT if args.deterministic else FAST
    with checkpoint.refusing(str(path), InputError):
        model = Transformer(config, ops, device, PRECISIONS[args.precision], ranks or tp.world)
    machine.check_fits(device, least_bytes(model), f"{path}: a model")
    if shape:
        machine.randomize(model)
    else:
        slices = checkpoint.open_weights(directory, tensor_shapes(model))
        load_weights(model, slices, cli.progress_of("loading"))
    has_drafts = args.prompt_lookup or args.draft_checkpoint_path or args.draft_quantize
    prepare(model, args.compile, one_slot=args.batch_size == 1 and not has_drafts)
    put_in(model)
    return model, tokenizer


def find(given: Path | str | None) -> Path:
    """The directory of a checkpoint: as given, or of a name of the hub or of the default model,
    which are fetched where they are missing. Raises Refusal or OSError."""
    if isinstance(given, Path):
        return given
    target = download.place(given) if given else download.DEFAULT
    # The first rank fetches it for all; on another machine, which may not see that, one there.
    for fetches in (tp.rank == 0, tp.variable("LOCAL_RANK") <= 0):
        with together():
            if fetches and not target.exists():
                fetch(target, given)
    return target


def fetch(target: Path, name: str | None) -> None:
    """Of the hub, or without a name the default model."""
    cli.say(f"{target} is missing, fetching it")
    what = f"{name} of the hub" if name else "the default checkpoint"
    with checkpoint.refusing(f"{what} cannot be had", ValueError, ImportError):
        download.fetch(target, *filter(None, [name]))


def take_defaults(args) -> str:
    """In a chat, sampling is as the checkpoint says where no flag says otherwise; the words for
    what it says. Raises Refusal."""
    if not (args.chat or args.interactive):
        return ""
    taken = defaults.take(args, find(args.checkpoint_path))
    if args.interactive and taken:
        cli.progress(taken)
    return taken


def tensor_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Of the checkpoint tensors that a model takes, by name."""
    return {name: shape for layer in model.loaders for name, shape in layer.shapes.items()}


def least_bytes(model: Transformer) -> int:
    """What its weights take at least, at each rank."""
    needed = 0
    for layer in model.loaders:
        weights = sum(map(math.prod, layer.shapes.values()))
        needed += weights // 2 if layer.mode else weights * model.dtype.itemsize
    return needed // model.ranks


def load_weights(model: Transformer, slices: dict, progress: Callable) -> None:
    """Stream the tensors of a checkpoint into place: `slices` has those of safetensors' get_slice
    by name. `progress` is told how many layers of how many are done."""
    for done, layer in enumerate(model.loaders, start=1):
        model.nbytes += layer.load([read(name, slices[name], layer) for name in layer.shapes])
        progress(done, len(model.loaders))


def read(name: str, part, layer: Layer) -> torch.Tensor:
    """A tensor of a layer. Of int4 others have published scales in fp16 or fp32, which a kernel
    would convert to the dtype of its input at every call."""
    tensor = part[:]
    is_scale = layer.mode == "int4" and name.endswith(".scale")
    return tensor.to(layer.dtype) if is_scale and tensor.dtype != torch.bfloat16 else tensor


def load_drafter(args, model, tokenizer, length: int, build: Callable):
    """What drafts by the flags, or None. A smaller model is whole at every rank; the model itself,
    quantized, is shared like that. `build` makes its engine. Raises Refusal where the smaller one
    has another vocabulary."""
    if args.prompt_lookup:
        return drafts.PromptLookup(args.speculate_k)
    flags = {"quantize": args.draft_quantize, "draft_quantize": None, "draft_checkpoint_path": None}
    if args.draft_checkpoint_path:
        flags |= {"checkpoint_path": args.draft_checkpoint_path, "random_weights": None}
    elif not args.draft_quantize:
        return None
    own = argparse.Namespace(**vars(args) | flags)
    with together():
        draft, words = load(own, 1 if args.draft_checkpoint_path else None)
        if not tokenizer.agrees(words):
            which = f"--draft_checkpoint_path {args.draft_checkpoint_path}"
            raise checkpoint.Refusal(f"{which} has another vocabulary than the model has")
    engine = build(own, draft, words, length + args.speculate_k)
    return drafts.DraftModel(engine, args.speculate_k, model.config.vocab_size)


def refuse_rocm(device: str | None) -> None:
    """Above 16 rows AMD's matrix units get another instruction, which adds in another order."""
    on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
    if torch.version.hip and on_gpu:
        why = "where sums depend on the number of rows"
        raise InputError(f"--deterministic is not available on ROCm, {why}; try --device cpu")
