"""What bench.py measures: the prefill of a prompt, or a step of decoding."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

import generate
from model import Transformer
from scripts import loading
from scripts.checkpoint import Refusal, refusing
from scripts.requests import Request
from scripts.tokenizer import Tokenizer


class Cell(NamedTuple):
    """What a row measures: "prefill" of a prompt of so many tokens, or "decode", a step of so many
    slots (`batch`) after so many tokens in each."""

    kind: str
    batch: int
    tokens: int

    def new_tokens(self) -> int:
        return self.tokens if self.kind == "prefill" else self.batch


def work(model: Transformer, cell: Cell, length: int, chunk: int) -> Callable[[], None]:
    """A function that does what a cell measures, and waits for it. Caches are for `length` tokens:
    one length for all cells, as compiled code is made for one. Their content and the ids are
    random, since some hardware is quicker with data that repeat."""
    engine = generate.Engine(model, Tokenizer(None), cell.batch, length, chunk)
    for keys_and_values in engine.cache:
        for tensor in keys_and_values:
            tensor[:, :, : cell.tokens].normal_()
    generator = torch.Generator().manual_seed(0)
    count = cell.new_tokens()
    ids = torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()
    sampler = generate.Sampler([Request(0, "", [])] * cell.batch, model.device)

    def prefill():
        engine.prefill(ids, 0).argmax().item()

    def decode():
        drawn_BT, _ = engine.step([[i] for i in ids], [cell.tokens] * cell.batch, sampler)
        drawn_BT.tolist()

    return prefill if cell.kind == "prefill" else decode


def read_list(given: str) -> list[int]:
    with refusing("--batches, --contexts and --prompts are lists such as 1,4,16", ValueError):
        return [int(n) for n in given.split(",")]


def has_slots(cell: Cell) -> bool:
    return cell.batch > 1


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    """Those of one slot first, for which a model may be loaded otherwise."""
    cells = [Cell("prefill", 1, n) for n in read_list(args.prompts)]
    for context in read_list(args.contexts):
        cells += [Cell("decode", batch, context) for batch in read_list(args.batches)]
    return sorted(cells, key=has_slots)


def check(cells: list[Cell], context: int) -> None:
    fits = all(cell.batch > 0 and 0 < cell.tokens < context for cell in cells)
    if not fits:
        tokens = f"--contexts and --prompts from 1 to {context - 1} tokens"
        raise Refusal(f"expected --batches from 1, {tokens}")


def context_of(args: argparse.Namespace) -> int:
    """How many tokens the model takes at most."""
    path, read = args.random_weights, loading.read_shape
    if path is None:
        path, read = loading.find(args.checkpoint_path) / "config.json", loading.read_config
    return read(path, args.quantize, args.group_size).max_position_embeddings
