"""From flags and a checkpoint directory to a model and its tokenizer."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import quantize
import scripts.families  # noqa: F401  (it enters them into FAMILIES)
import tp
from kernels import BATCH_INVARIANT, FAST, InputError
from model import FAMILIES, ModelConfig, Transformer
from scripts import checkpoint, cli, download, drafts, machine
from scripts.tokenizer import Tokenizer

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"]
FLAGS = ["tie_word_embeddings", "qkv_bias", "attention_bias", "mlp_bias", "qk_norm"]
SUPPORTED = {
    "hidden_act": ["silu"],
    "partial_rotary_factor": [1],
    "quantization mode": [None, *quantize.LINEARS],
    "group_size": [32, 64, 128],
}
DEFAULTS = {"hidden_act": "silu", "partial_rotary_factor": 1, "rms_norm_eps": 1e-6}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(args, ranks: int | None = None) -> tuple[Transformer, Tokenizer]:
    """The model that the flags choose, or a part of it where `ranks` share it (tp.world if None),
    and its tokenizer. Fetches a missing default checkpoint."""
    if args.deterministic:
        refuse_rocm(args.device)
    device = machine.find_device(args.device, tp.world)
    shape, directory = args.random_weights, args.checkpoint_path or download.DEFAULT
    if not (shape or args.checkpoint_path or directory.exists()):
        cli.say(f"{directory} is missing, fetching it")
        with checkpoint.refusing("the default checkpoint cannot be had", ValueError, ImportError):
            download.fetch(directory)
    config = read_config(shape or directory / "config.json", args.quantize, args.group_size)
    tokenizer = Tokenizer(None if shape else directory)
    if shape:
        config = replace(config, stored=False)  # random weights are quantized while loading
    ops = BATCH_INVARIANT if args.deterministic else FAST
    model = Transformer(config, ops, device, PRECISIONS[args.precision], ranks or tp.world)
    if shape:
        machine.randomize(model)
    else:
        slices = checkpoint.open_weights(directory, tensor_shapes(model))
        load_weights(model, slices, cli.progress_of("loading"))
    return model, tokenizer


def tensor_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Of the checkpoint tensors that a model takes, by name."""
    return {name: shape for layer in model.loaders for name, shape in layer.shapes.items()}


def load_weights(model: Transformer, slices: dict, progress: Callable) -> None:
    """Stream the tensors of a checkpoint into place: `slices` has those of safetensors' get_slice
    by name. `progress` is told how many layers of how many are done."""
    for done, layer in enumerate(model.loaders, start=1):
        model.nbytes += layer.load([slices[name][:] for name in layer.shapes])
        progress(done, len(model.loaders))


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
    with tp.together():
        draft, words = load(own, 1 if args.draft_checkpoint_path else None)
        same_size = draft.config.vocab_size == model.config.vocab_size
        if not same_size or words.vocab() != tokenizer.vocab():
            which = f"--draft_checkpoint_path {args.draft_checkpoint_path}"
            raise checkpoint.Refusal(
                f"{which} has another vocabulary than the model, expected the same"
            )
    engine = build(own, draft, words, length + args.speculate_k)
    return drafts.DraftModel(engine, args.speculate_k)


def refuse_rocm(device: str | None) -> None:
    """Above 16 rows AMD's matrix units get another instruction, which adds in another order."""
    on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
    if torch.version.hip and on_gpu:
        why = "where sums depend on the number of rows"
        raise InputError(f"--deterministic is not available on ROCm, {why}; try --device cpu")


def read_config(path: Path, quantization: str | None = None, group_size=32) -> ModelConfig:
    """What a config.json says, or else what its family means, of a model that is quantized while
    loading if a `quantization` is given. Raises Refusal for what is missing, wrong or not
    supported."""
    given = DEFAULTS | checkpoint.read_settings(path)
    wrong = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError)
    with checkpoint.refusing(str(path), *wrong):
        architecture = one_of("architectures", given.get("architecture"), FAMILIES)
        _, family = FAMILIES[architecture]
        given = {"qkv_bias": given.get("attention_bias")} | given | family
        stored = given.get("quantization", {})
        mode, given["group_size"] = stored.get("mode"), stored.get("group_size", 32)
        given["quantization mode"] = mode
        for name, choices in SUPPORTED.items():
            one_of(name, given[name], choices)
        if quantization and mode:
            raise checkpoint.Refusal(f"the checkpoint is {mode} already")
        heads = size(given, "num_attention_heads")
        given.setdefault("num_key_value_heads", heads)
        given.setdefault("head_dim", size(given, "hidden_size") // heads)
        if "moe_intermediate_size" in given:
            given["intermediate_size"] = given["moe_intermediate_size"]
        config = {name: size(given, name) for name in SIZES}
        config |= {name: bool(given.get(name)) for name in FLAGS}
        if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
            raise checkpoint.Refusal(
                "expected KV heads that divide the heads, and an even head_dim"
            )
        return ModelConfig(
            **config,
            architecture=architecture,
            rms_norm_eps=float(given["rms_norm_eps"]),
            rope_parameters=given["rope_parameters"],
            windows=windows(given),
            quantization=quantization or mode,
            group_size=group_size if quantization else given["group_size"],
            stored=mode is not None,
            settings=given,
        )


def one_of(name: str, value, choices):
    if value not in choices:
        valid = ", ".join(map(str, choices))
        raise checkpoint.Refusal(f"{name} {value} is not supported, choose from {valid}")
    return value


def size(settings: dict, name: str) -> int:
    value = settings[name]
    if type(value) is not int or value < 1:
        raise checkpoint.Refusal(f"{name} is {value}, expected an integer > 0")
    return value


def windows(settings: dict) -> list[int | None]:
    """Each layer's sliding window. Without layer_types, a Qwen config names the first layer that
    slides; in a Mistral every layer does."""
    first = settings.get("max_window_layers", 0)
    slides = [i >= first for i in range(size(settings, "num_hidden_layers"))]
    if kinds := settings.get("layer_types"):
        if len(kinds) != len(slides):
            raise checkpoint.Refusal("expected a layer_type for each layer")
        slides = [kind == "sliding_attention" for kind in kinds]
    if not settings.get("use_sliding_window") or "sliding_window" not in settings:
        return [None for _ in slides]
    window = size(settings, "sliding_window")
    return [window if slide else None for slide in slides]
