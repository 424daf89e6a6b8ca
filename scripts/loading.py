"""From flags and a checkpoint directory to a model and its tokenizer."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import quantize
import scripts.families  # noqa: F401  (it enters them into FAMILIES)
import tp
from kernels import BATCH_INVARIANT, FAST, InputError
from model import FAMILIES, ModelConfig, Transformer, rope_table
from scripts import checkpoint, cli, defaults, download, drafts, machine, settings
from scripts.ranks import together
from scripts.rope_settings import places, rope_parameters, rope_type
from scripts.ropes import ROPES
from scripts.tokenizer import Tokenizer

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"]
BOOLEANS = ["tie_word_embeddings", "qkv_bias", "attention_bias", "mlp_bias", "qk_norm"]
SUPPORTED = {
    "attn_logit_softcapping": [None],
    "final_logit_softcapping": [None],
    "use_bidirectional_attention": [None, False],
    "quantization mode": [None, *quantize.LINEARS],
    "group_size": [32, 64, 128],
    "per_layer_config": [None, {}],
    "transformers_weights": [None, "model.safetensors", checkpoint.INDEX],
}
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
    return model, tokenizer


def find(directory: Path | None) -> Path:
    """The directory of a checkpoint, by default that of the default model, which is fetched where
    it is missing. Raises Refusal or OSError."""
    if directory or download.DEFAULT.exists():
        return directory or download.DEFAULT
    cli.say(f"{download.DEFAULT} is missing, fetching it")
    with checkpoint.refusing("the default checkpoint cannot be had", ValueError, ImportError):
        download.fetch(download.DEFAULT)
    return download.DEFAULT


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


def read_config(path: Path, quantization: str | None = None, group_size=32) -> ModelConfig:
    """That of a checkpoint, whose weights beside it may have a head of their own although it says
    that there is none. See read_shape."""
    config = read_shape(path, quantization, group_size)
    if config.tie_word_embeddings and checkpoint.has_own_head(path.parent):
        return replace(config, tie_word_embeddings=False)
    return config


def read_shape(path: Path, quantization: str | None = None, group_size=32) -> ModelConfig:
    """What a config.json says, or else what its family means, of a model that is quantized while
    loading if a `quantization` is given. Raises Refusal for what is missing, wrong or not
    supported."""
    raw = checkpoint.read_json(path)
    wrong = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError)
    with checkpoint.refusing(str(path), *wrong):
        given = settings.in_one_spelling(raw)
        architecture = one_of("architectures", given["architecture"], list(FAMILIES))
        settings.check_layer_types(given)
        _, family = FAMILIES[architecture]
        given |= family  # of which one may be what the next line reads
        given |= {"qkv_bias": given["attention_bias"], "qk_norm": False} | family
        settings.check(given)
        settings.complete(given)
        one_of("hidden_act", given["hidden_act"], settings.activations(architecture))
        stored = given["quantization"]
        mode, given["group_size"] = stored.get("mode"), stored.get("group_size", 32)
        given["quantization mode"] = mode
        for name, choices in SUPPORTED.items():
            one_of(name, given.get(name), choices)
        if quantization and mode:
            raise checkpoint.Refusal(f"the checkpoint is {mode} already")
        windows = settings.windows(given)
        shape = sizes(given)
        config = ModelConfig(
            **shape,
            **{name: bool(given[name]) for name in BOOLEANS},
            architecture=architecture,
            rms_norm_eps=float(given["rms_norm_eps"]),
            windows=windows,
            ropes=ropes(given, windows, shape["head_dim"]),
            quantization=quantization or mode,
            group_size=group_size if quantization else given["group_size"],
            stored=mode is not None,
            settings=given,
        )
        for rope in config.ropes.values():
            if not rope_table(config, rope, 2).isfinite().all():
                raise checkpoint.Refusal(f"RoPE with {rope} has angles that are no numbers")
        return config


def one_of(name: str, value, choices):
    if value not in choices:
        valid = ", ".join(map(str, choices))
        raise checkpoint.Refusal(f"{name} {value} is not supported, choose from {valid}")
    return value


def sizes(given: dict) -> dict[str, int]:
    """Those of ModelConfig. The experts of a mixture have an intermediate size of their own."""
    given = dict(given)
    heads = settings.size(given, "num_attention_heads")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = heads
    if given.get("head_dim") is None:
        given["head_dim"] = settings.size(given, "hidden_size") // heads
    found = {name: settings.size(given, name) for name in SIZES}
    if "moe_intermediate_size" in settings.FAMILY_DEFAULTS.get(given["architecture"], {}):
        found["intermediate_size"] = settings.size(given, "moe_intermediate_size")
    kv_heads, head_dim = found["num_key_value_heads"], found["head_dim"]
    if heads % kv_heads:
        expected = f"expected KV heads that divide the {heads} heads"
        raise checkpoint.Refusal(f"num_key_value_heads is {kv_heads}, {expected}")
    if head_dim % 2:
        raise checkpoint.Refusal(f"head_dim is {head_dim}, expected an even number")
    return found


def ropes(given: dict, windows: list[int | None], head_dim: int) -> dict[int | None, dict]:
    """As ModelConfig has them. A kind that is not supported is refused wherever it stands."""
    partial = "partial_rotary_factor" in settings.FAMILY_DEFAULTS.get(given["architecture"], {})
    for rope in places(given):
        one_of("rope_type", rope_type(given, rope), list(ROPES))
    for rope in [given, *places(given)]:
        if not partial:
            one_of("partial_rotary_factor", rope.get("partial_rotary_factor"), [None, 1])
    found = {}
    for window in windows:
        layers = "full_attention" if window is None else "sliding_attention"
        if window not in found:
            found[window] = rope_parameters(given, layers, head_dim)
    return found
