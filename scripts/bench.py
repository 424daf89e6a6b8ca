"""Speed on this machine, as a table: prefill and decode, beside what its memory can deliver.

python scripts/bench.py --compile                                    the default model
python scripts/bench.py --random_weights scripts/configs/Llama-3.1-8B.json --batches 1
python scripts/bench.py --serve --batch_size 4                       measure what others ask for

All flags of generate.py that choose a model or a way to run it apply. A figure is the median of
--runs; of a step of decoding with --batches of slots after --contexts of tokens, or of the prefill
of one of --prompts tokens. With --deterministic it is measured without and with the flag, in turns.
--output FILE gets a line of JSON a row. Processes that name the same --lock FILE load and compile
side by side, but measure one at a time.

With --serve, `ready` is printed, and then tokens per second for each line on standard input: of
`decode N`, N steps of --batch_size slots after 16 tokens, or `prefill N`, N prompts of 500."""

import argparse
import fcntl
import json
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts import interrupts

    interrupts.end_quietly()

import torch

import generate
import tp
from model import Transformer
from scripts import cli, machine, ranks
from scripts.checkpoint import Refusal, refusing
from scripts.outputs import Output
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

COLUMNS = "what batch tokens tokens/s GB/s of_the_limit".split()
COLUMNS_OF_THE_FLAG = ["deterministic", "cost"]  # its tokens/s, and its time over that without
STEPS = 32  # of decoding, that are timed as one
SERVED_CONTEXT = 16
SERVED_PROMPT = 500


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


# ---- the table


def read_list(given: str) -> list[int]:
    with refusing("--batches, --contexts and --prompts are lists such as 1,4,16", ValueError):
        return [int(n) for n in given.split(",")]


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    cells = [Cell("prefill", 1, n) for n in read_list(args.prompts)]
    for context in read_list(args.contexts):
        cells += [Cell("decode", batch, context) for batch in read_list(args.batches)]
    return cells


def check(cells: list[Cell], context: int) -> None:
    fits = all(cell.batch > 0 and 0 < cell.tokens < context for cell in cells)
    if not fits:
        tokens = f"--contexts and --prompts from 1 to {context - 1} tokens"
        raise Refusal(f"expected --batches from 1, {tokens}")


def load_models(args: argparse.Namespace) -> list[Transformer]:
    """The model without the flag, and if it is given, another one with it."""
    models = []
    for deterministic in (False, True) if args.deterministic else (False,):
        flags = argparse.Namespace(**vars(args) | {"deterministic": deterministic})
        model, _ = generate.load(flags)
        machine.set_up(model, args.compile, args.compile_prefill)
        models.append(model)
    return models


def measure(models, cell: Cell, length: int, chunk: int, runs: int, lock) -> list[float]:
    """The median seconds of a cell with each model, in turns, while no other process holds the
    lock."""
    works = [work(model, cell, length, chunk) for model in models]
    for run in works:  # warms up and compiles
        run()
    number = 1 if cell.kind == "prefill" else STEPS
    fcntl.flock(lock, fcntl.LOCK_EX)
    turns = []
    for _ in range(runs):
        turns.append([timeit.timeit(run, number=number) / number for run in works])
    fcntl.flock(lock, fcntl.LOCK_SH)
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def bytes_read(model: Transformer, cell: Cell) -> int:
    """All weights, and the keys and values of every token before."""
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    bytes_of_token = 2 * heads * config.head_dim * model.dtype.itemsize
    return model.nbytes + cell.batch * cell.tokens * bytes_of_token


def row(model: Transformer, cell: Cell, seconds: list[float], limit: float) -> list:
    off, *on = seconds
    rate = bytes_read(model, cell) / off
    values = [*cell, cell.new_tokens() / off, rate / 1e9, rate / limit]
    for s in on:
        values += [cell.new_tokens() / s, s / off]
    return values


def table(args: argparse.Namespace) -> None:
    cells = choose_cells(args)
    output = Output(None if tp.rank else args.output)
    for number, line in enumerate(output.read().splitlines(), start=1):
        what = f"{output.name} holds more than rows, line {number}"
        with refusing(what, ValueError, KeyError, TypeError):
            json.loads(line)["tokens/s"]
    lock = open(args.lock, "w", encoding="utf-8") if args.lock else tempfile.TemporaryFile()
    fcntl.flock(lock, fcntl.LOCK_SH)  # nobody measures while others load
    models = load_models(args)
    model = models[0]
    check(cells, model.config.max_position_embeddings)
    fcntl.flock(lock, fcntl.LOCK_EX)
    limit = machine.read_bandwidth(model.device)
    fcntl.flock(lock, fcntl.LOCK_SH)
    length = 1 + max(cell.tokens for cell in cells)

    how = args.precision + (", compiled" if args.compile else "")
    reads = f"this machine reads {limit / 1e9:.1f} GB/s; medians\n"
    print(f"{model.nbytes / 1e9:.2f} GB of weights, {how}; {reads}")
    names = COLUMNS + COLUMNS_OF_THE_FLAG * (len(models) - 1)
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for cell in cells:
        seconds = measure(models, cell, length, args.prefill_chunk, args.runs, lock)
        values = row(model, cell, seconds, limit)
        print(f"| {cell.kind} | " + " | ".join(f"{x:.4g}" for x in values[1:]) + " |", flush=True)
        output.write(json.dumps(dict(zip(names, values, strict=True))))


# ---- --serve


def read_lines() -> Iterator[str]:
    """Those of the first rank's standard input, at every rank."""
    while line := ranks.from_first("" if tp.rank else sys.stdin.readline()):
        yield line


def read_order(line: str) -> tuple[str, int]:
    with refusing("expected lines such as `decode 30` or `prefill 1`", ValueError):
        kind, times = line.split()
        if kind not in ("decode", "prefill"):
            raise ValueError(f"there is no {kind}")
        return kind, int(times)


def serve(args: argparse.Namespace) -> None:
    model, _ = generate.load(args)
    machine.set_up(model, args.compile, args.compile_prefill)
    room = model.config.max_position_embeddings - 1
    decode = Cell("decode", args.batch_size, min(SERVED_CONTEXT, room))
    prefill = Cell("prefill", 1, min(SERVED_PROMPT, room))
    works = {}
    for cell in (decode, prefill):
        run = work(model, cell, prefill.tokens + 1, args.prefill_chunk)
        for _ in range(3):  # compiles
            run()
        works[cell.kind] = (run, cell.new_tokens())
    print("ready", flush=True)

    for line in read_lines():
        kind, times = read_order(line)
        run, new_tokens = works[kind]
        run()
        start = time.perf_counter()
        for _ in range(times):
            run()
        print(new_tokens * times / (time.perf_counter() - start), flush=True)


@torch.inference_mode()
def main() -> None:
    flags = sys.argv[1:]
    serves = "--serve" in flags
    if serves:
        flags.remove("--serve")
    args = cli.parse_args(flags, batches="1,4,16", contexts="16", prompts="500", runs=5, lock="")
    if serves:
        serve(args)
    else:
        table(args)


if __name__ == "__main__":
    generate.command(main)
