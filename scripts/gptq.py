"""Write a directory of int4 weights as quantize.py does, but calibrated: the codes of a layer are
those that change least what it makes of a text that you give, not those nearest to its weights.

python scripts/gptq.py --calibration TEXT.txt --group_size 64 --out NEW

Any UTF-8 text serves, best one like those that the model will see; - is standard input. Sequences
of 512 tokens are taken evenly from all of it. It runs on a CPU. Beside the weights of a layer, and
up to a gigabyte of what is to be written, memory holds what the layer before made of those tokens,
4 bytes x tokens x hidden_size (0.3 GB where that is 4096), and four times the square of the inputs
of a weight (3.3 GB for 14336). The same text, flags and number of threads give the same bytes.

The algorithm is GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), layer by layer."""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts import interrupts

    interrupts.end_quietly()

import torch
from torch import Tensor

import generate
from kernels import Fast, Packed
from model import Block, Layer, Linear, Transformer
from scripts import checkpoint, cli, loading, machine, quantized
from scripts.defaults import check_range
from scripts.directories import check_finite
from scripts.files import Refusal, read_stream, text_of
from scripts.tokenizer import Tokenizer

LENGTH = 512  # tokens of a sequence
AT_ONCE = 8  # sequences that a block is given together
DAMPING = 0.01  # of the mean of a Hessian's diagonal
NARROWER = (1, 0.92, 0.84, 0.76)  # by how much limits may be, as quantize.py has it


def quantize(weight: Tensor, hessian: Tensor, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that a checkpoint has of a float weight W [N, K], and Q, what they stand for,
    fp32 [N, K]. With H = 2 X^T X, fp32 [K, K], of inputs X [tokens, K], the squared error of the
    output, |X (W - Q)^T|^2, is half the sum of (w - q) H (w - q)^T over the rows w.

    Columns are rounded one after the other, and those still to come make up for it. With U the
    upper triangle for which U^T U is the inverse of H, the best change of them for q_j in place of
    w_j is -(w_j - q_j) / U_jj U_j, of a row U_j (section 3.3). It reaches the columns of the same
    group at once, and all behind in one product when the group is done (lazy batch updates)."""
    w = weight.to(torch.float32, copy=True)
    U = inverse_root(hessian)
    codes, values = torch.empty_like(w), torch.empty_like(w)
    grids = []
    for start in range(0, w.shape[1], group_size):
        group, behind = slice(start, start + group_size), slice(start + group_size, None)
        U_group = U[group, group]
        # A column adds (w_j - q_j)^2 / U_jj^2 to the error (equation 2).
        scale, zero = limits(w[:, group], U_group.diagonal() ** -2)
        rounded = round_columns(w[:, group], U_group, scale.float(), zero.float())
        codes[:, group], values[:, group], errors = rounded
        w[:, behind] -= errors @ U[group, behind]
        grids.append((scale, zero))
    scale, zero = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    pairs = codes[:, ::2] + 16 * codes[:, 1::2]
    return {"weight": pairs.to(torch.uint8), "scale": scale, "zero": zero}, values


def inverse_root(hessian: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = H^-1, fp32 [K, K]. H is damped, as it has no inverse where
    inputs are always 0 or depend on each other, and damped more where fp32 does not hold it."""
    mean = hessian.diagonal().mean().item()
    damping = DAMPING * mean or 1.0
    while True:
        # H = R R^T with R upper triangular is a Cholesky decomposition from the last row up.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10
    torch.eye(len(hessian), out=damped)
    return torch.linalg.solve_triangular(lower, damped, upper=False).flip(0, 1)


def limits(w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, 1] of a group [N, size]: of the pairs of limits that quantize.py tries,
    those with the least squared error, each column times its importance [size]."""
    least = w.amin(1, keepdim=True).clamp(max=0)
    most = w.amax(1, keepdim=True).clamp(min=0)
    importance = importance / importance.max()  # all 1 where they are alike
    best = None
    for low, high in itertools.product(NARROWER, repeat=2):
        width = high * most - low * least
        scale = (width / 15).clamp(min=1e-30).bfloat16()
        zero = (-low * least / scale).half()
        difference = nearest(w, scale, zero)[1].sub_(w)
        error = difference.square_().mul_(importance).sum(1, keepdim=True)
        found = [error, scale, zero]
        if best is None:
            best = found
        better = found[0] < best[0]
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
    return best[1], best[2]


def nearest(w: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of weights, and what these stand for."""
    codes = (w / scale).add_(zero).round_().clamp_(0, 15)
    return codes, (codes - zero).mul_(scale)


def round_columns(w: Tensor, U: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
    """Of a group [N, size] its codes, what they stand for, and (w - q) / U_jj of each column; U has
    the rows and columns of the group."""
    columns = w.T.contiguous()
    codes, values, errors = (torch.empty_like(columns) for _ in range(3))
    scale, zero = scale[:, 0], zero[:, 0]
    for j, column in enumerate(columns):
        codes[j], values[j] = nearest(column, scale, zero)
        errors[j] = (column - values[j]) / U[j, j]
        columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return codes.T, values.T, errors.T


class Watching(Fast):
    """The fast op table, which adds up H = 2 X^T X of the inputs X of the weights in `hessians`."""

    def __init__(self):
        self.hessians: dict[Packed, Tensor] = {}

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        if packed in self.hessians:
            X = x.flatten(0, -2).float()
            self.hessians[packed].addmm_(X.T, X, alpha=2)
        return super().linear(x, packed)


def calibrated(tokens_BT: Tensor, model: Transformer, source: Path, slices: dict) -> Iterator[dict]:
    """The tensors to write of one layer after the other: of blocks calibrated, and each sees what
    those before it give once they are; all else as quantize.py has it. `model` is empty, and its
    op table Watching."""
    inside = set(model.layers.modules())
    outside = [layer for layer in model.loaders if layer not in inside]
    yield from quantized.rounded_layers(outside, source, slices)
    model.embed.load([slices[name][:] for name in model.embed.shapes])
    x_BTD = model.embed(tokens_BT).float()
    began = time.perf_counter()
    pairs = zip(model.layers, views(model, x_BTD.shape[1]), strict=True)
    for done, (block, view) in enumerate(pairs, start=1):
        yield calibrate(block, x_BTD, view, source, slices)
        report(done, len(model.layers), time.perf_counter() - began)


def report(done: int, total: int, seconds: float) -> None:
    left = seconds / done * (total - done)
    minutes = (
        f", {left / 60:.1f} minutes left" if done < total else f" in {seconds / 60:.1f} minutes"
    )
    cli.progress(f"calibrating layers {done}/{total}{minutes}", end="\n" if done == total else "\r")


def views(model: Transformer, T: int) -> list[tuple]:
    """What each layer is told of the positions of a sequence; see Transformer.forward."""
    pos_BT = torch.arange(T)[None]
    cache = torch.empty(1, 1, 0, model.config.head_dim, dtype=model.dtype)  # as those of `run` are
    found = {}
    for window, (table, mask_mod) in model.kinds.items():
        cos, sin = table[pos_BT].unsqueeze(2).unbind(3)
        mask = model.ops.mask(mask_mod, pos_BT, whole_blocks(T), model.heads, cache)
        found[window] = (pos_BT, cos, sin, mask)
    return [found[window] for window in model.config.windows]


def whole_blocks(T: int) -> int:
    """So many keys, of which kernels take blocks."""
    return -(-T // 64) * 64


def run(block: Block, x_BTD: Tensor, view: tuple, keep: bool) -> None:
    """Give a block its input, which becomes its output where that is to be kept."""
    keys = (block.G, whole_blocks(x_BTD.shape[1]), block.config.head_dim)
    for part in x_BTD.split(AT_ONCE):
        cache = (torch.zeros(len(part), *keys, dtype=block.dtype) for _ in range(2))
        y = block(part, *view, *cache)
        if keep:
            part.copy_(y)


def calibrate(block: Block, x_BTD: Tensor, view: tuple, source: Path, slices: dict) -> dict:
    """The tensors to write of a block. `x_BTD` becomes what it makes of that with them."""
    layers = [layer for layer in block.modules() if isinstance(layer, Layer) and layer.shapes]
    linears = [layer for layer in layers if layer.mode]  # not the router of a mixture
    tensors = {}
    for layer in layers:
        layer.mode = None  # loaded as it is
        tensors |= {name: slices[name][:] for name in layer.shapes}
        layer.load([tensors[name] for name in layer.shapes])
    for name, tensor in tensors.items():
        check_finite({name: tensor}, f"{source}: tensor {name}")

    hessians = block.ops.hessians
    for linear in linears:
        inputs = tensors[next(iter(linear.shapes))].shape[1]
        hessians[linear.packed] = torch.zeros(inputs, inputs)
    run(block, x_BTD, view, keep=False)
    for linear in linears:
        tensors |= calibrate_linear(linear, tensors, hessians.pop(linear.packed), source)
    run(block, x_BTD, view, keep=True)
    for linear in linears:
        del linear.packed
    return tensors


def calibrate_linear(linear: Linear, tensors: dict, hessian: Tensor, source: Path) -> dict:
    """What is to be written in place of its weights, and it has from now on."""
    names = [name for name in linear.shapes if name.endswith(".weight")]
    if not hessian.isfinite().all():
        raise Refusal(f"{source}: inputs of {names[0]} are NaN or inf, expected finite ones")
    rows = [len(tensors[name]) for name in names]
    weight = torch.cat([tensors[name] for name in names])
    parts, values = quantize(weight, hessian, linear.group_size)
    values = dict(zip(names, values.split(rows), strict=True))
    linear.load([values.get(name, tensors[name]) for name in linear.shapes])
    stored = {}
    for kind, part in parts.items():
        for name, own in zip(names, part.split(rows), strict=True):
            stored[name.removesuffix("weight") + kind] = own.clone()  # a file shares no memory
    check_finite(stored, f"{source}: tensor {names[0]}")
    return stored


def sequences(path: Path, tokenizer: Tokenizer, length: int, tokens: int) -> Tensor:
    """So many tokens of a text, int64 [B, length], evenly from all of it; each sequence begins as a
    prompt does. Raises Refusal where it has fewer."""
    name = f"--calibration {path}"
    ids = tokenizer.encode(text_of(name, read_stream(name, path)), bos=False)
    if len(ids) < tokens:
        expected = f"expected {tokens} or more (--tokens takes another number)"
        raise Refusal(f"{name} has {len(ids)} tokens, {expected}")
    first = tokenizer.encode("")[: length - 1]
    own = length - len(first)
    count = max(tokens // length, 1)
    starts = [i * (len(ids) - own) // max(count - 1, 1) for i in range(count)]
    return torch.tensor([first + ids[start : start + own] for start in starts])


def main() -> None:
    args = parse_args()
    if checkpoint.is_one_of_several():
        raise Refusal("expected one process, not several by torchrun")
    source = loading.find(args.checkpoint_path)
    out = args.out or f"{source.resolve()}-gptq-g{args.group_size}"
    quantized.check_target(Path(out), source)
    config = loading.read_config(source / "config.json", "int4", args.group_size)
    length = min(LENGTH, config.max_position_embeddings)
    check_range("--tokens", args.tokens, (length, 1 << 24))
    bytes_needed = 4 * args.tokens * config.hidden_size
    machine.check_fits(torch.device("cpu"), bytes_needed, f"--tokens {args.tokens}")
    tokens_BT = sequences(args.calibration, Tokenizer(source), length, args.tokens)
    if tokens_BT.max() >= config.vocab_size:
        expected = f"expected ids below {config.vocab_size}"
        raise Refusal(f"{source}: its tokenizer makes token {tokens_BT.max()}, {expected}")
    make = functools.partial(calibrated, tokens_BT)
    print(quantized.write(source, out, "int4", args.group_size, make, Watching()))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.group("of this command")
    text = "what to calibrate with; needed"
    parser.add("--calibration", type=Path, required=True, metavar="TEXT", help=text)
    parser.checkpoint("--checkpoint_path", "what to quantize (the default model)")
    text = "weights that share a scale (%(default)s)"
    parser.add("--group_size", type=int, choices=cli.GROUP_SIZES, default=64, help=text)
    parser.number("--tokens", 16384, "of the text that are used; more take longer")
    parser.add("--out", type=quantized.named, metavar="NEW", help="what to make (DIR-gptq-gN)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    generate.command(main)
