"""Speed on this machine, as a table: prefill and decode, beside what its memory can deliver.

python scripts/bench.py --compile                                    the default model
python scripts/bench.py --random_weights scripts/configs/Llama-3.1-8B.json --batches 1
python scripts/bench.py --compile --against ../other                 two checkouts in turns
python scripts/bench.py --serve --batch_size 4                       measure what others ask for

All flags of generate.py that choose a model or a way to run it apply. A figure is the median of
--runs; of a step of decoding with --batches of slots after --contexts of tokens, or of the prefill
of one of --prompts tokens. With --deterministic it is measured without and with the flag, in turns.
--output FILE gets a line of JSON a row. Processes that name the same --lock FILE load and compile
side by side, but measure one at a time. --plot FILE.svg draws what is in --output, as plot.py does.

With --against DIR, another checkout runs with the same flags, in turns with this one: `ratio` is
the median of this one's speed over the other's turn by turn, `from` and `to` bound the middle half.

With --serve, `ready` is printed, and then tokens per second for each line on standard input: of
`decode N`, N steps of --batch_size slots after 16 tokens, or `prefill N`, N prompts of 500; of
`decode N T` or `prefill N T`, with as many tokens as --contexts or --prompts have."""

import argparse
import datetime
import fcntl
import functools
import shlex
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts import interrupts

    interrupts.end_quietly()

import torch

import generate
import tp
from model import Transformer
from scripts import cli, hardware, loading, machine, plot, ranks, turns
from scripts.cells import Cell, check, choose_cells, context_of, read_list, work
from scripts.checkpoint import Refusal, refusing
from scripts.outputs import Output
from scripts.tables import Table, check_rows

COLUMNS = "what batch tokens tokens/s GB/s of_the_limit".split()
COLUMNS_OF_THE_FLAG = ["deterministic", "cost"]  # its tokens/s, and its time over that without
STEPS = 32  # of decoding, that are timed as one


# ---- the table


def load_models(args: argparse.Namespace, batch: int) -> list[Transformer]:
    """The model without the flag, and if it is given, another one with it; for so many slots."""
    models = []
    for deterministic in (False, True) if args.deterministic else (False,):
        own = {"deterministic": deterministic, "batch_size": batch}
        flags = argparse.Namespace(**vars(args) | own)
        model, _ = generate.load(flags)
        machine.set_up(model, args.compile, args.compile_prefill)
        models.append(model)
    return models


def measure(models, cell: Cell, length: int, args, lock, table: Table) -> list[float]:
    """The median seconds of a cell with each model, in turns, while no other process holds the
    lock."""
    works = [work(model, cell, length, args.prefill_chunk) for model in models]
    for run in works:  # warms up and compiles
        run()
    number = 1 if cell.kind == "prefill" else STEPS
    fcntl.flock(lock, fcntl.LOCK_EX)
    taken = []
    for _ in range(args.runs):
        taken.append([timeit.timeit(run, number=number) / number for run in works])
        table.turn(f"{cell.kind}, batch {cell.batch}, {cell.tokens} tokens")
    fcntl.flock(lock, fcntl.LOCK_SH)
    return [statistics.median(times) for times in zip(*taken, strict=True)]


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


def describe(args: argparse.Namespace, device: torch.device) -> dict:
    """What must be known of a row: of which model on which machine it is, when and by what."""
    model = args.random_weights or loading.find(args.checkpoint_path).resolve()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.cpu_name()
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name += f", {threads} thread" + "s" * (threads > 1)
    flags = turns.without(sys.argv[1:], ["output", "plot", "lock"])
    return {
        "model": model.stem + ", random weights" if args.random_weights else model.name,
        "hardware": f"{tp.world} x {name}" if tp.world > 1 else name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "precision": args.precision,
        "quantize": args.quantize,
        "compile": args.compile,
        "runs": args.runs,
        "command": shlex.join(["python", "scripts/bench.py", *flags]),
    }


def tabulate(args: argparse.Namespace) -> None:
    cells = choose_cells(args)
    output = Output(None if tp.rank else args.output)
    check_rows(output)
    about = describe(args, machine.find_device(args.device, tp.world))
    drawing = args.plot and not tp.rank
    if drawing:
        plot.check_target(Path(args.plot))
        plot.check_same([*plot.read_rows(args.output), about])
    lock = open(args.lock, "w", encoding="utf-8") if args.lock else tempfile.TemporaryFile()
    fcntl.flock(lock, fcntl.LOCK_SH)  # nobody measures while others load
    several = cells[0].batch > 1
    models = load_models(args, cells[0].batch)
    model = models[0]
    check(cells, model.config.max_position_embeddings)
    fcntl.flock(lock, fcntl.LOCK_EX)
    limit = machine.read_bandwidth(model.device)
    fcntl.flock(lock, fcntl.LOCK_SH)
    length = 1 + max(cell.tokens for cell in cells)

    how = args.precision + (", compiled" if args.compile else "")
    reads = f"this machine reads {limit / 1e9:.1f} GB/s; medians\n"
    heading = f"{model.nbytes / 1e9:.2f} GB of weights, {how}; {reads}"
    names = COLUMNS + COLUMNS_OF_THE_FLAG * (len(models) - 1)
    about["limit_GB/s"] = limit / 1e9
    with Table(names, len(cells) * args.runs, output, about, heading) as table:
        for cell in cells:
            if args.compile and model.device.type == "cpu" and several != (cell.batch > 1):
                several = not several
                model = models = None  # gone before there are others: one slot has its own
                models = load_models(args, cell.batch)
                model = models[0]
            seconds = measure(models, cell, length, args, lock, table)
            table.add(row(model, cell, seconds, limit))
    if drawing:
        plot.draw(plot.read_rows(args.output), Path(args.plot))


# ---- --against


def compare(args: argparse.Namespace) -> None:
    if tp.world > 1:
        raise Refusal("--against starts processes of its own, expected no torchrun")
    other = Path(args.against).resolve()
    scripts = [turns.find_script(checkout) for checkout in (turns.HERE, other)]
    cells = choose_cells(args)
    check(cells, context_of(args))
    output = Output(args.output)
    check_rows(output)

    flags = turns.without(sys.argv[1:], turns.ASKED_OTHERWISE)
    if not args.random_weights:
        # The other one may have another default, or none.
        flags += ["--checkpoint_path", str(loading.find(args.checkpoint_path))]
    about = describe(args, machine.find_device(args.device, 1))
    about |= {"deterministic": args.deterministic, "against_checkout": str(other)}
    heading = f"tokens/s here and of {other}, medians; their ratio, and its middle half\n"
    with Table(turns.COLUMNS, len(cells) * args.runs, output, about, heading) as table:
        turns.compare(scripts, cells, flags, table)


# ---- --serve


def read_lines() -> Iterator[str]:
    """Those of the first rank's standard input, at every rank."""
    while line := ranks.from_first("" if tp.rank else sys.stdin.readline()):
        yield line


def read_order(line: str) -> tuple[str, int, int | None]:
    """What to measure, how often, and with how many tokens if that is said."""
    with refusing("expected lines such as `decode 30` or `prefill 1 500`", ValueError):
        kind, times, *tokens = line.split()
        if kind not in turns.USUAL_TOKENS or len(tokens) > 1 or int(times) < 1:
            raise ValueError(f"got {line.strip()!r:.40}")
        return kind, int(times), int(tokens[0]) if tokens else None


def serve(args: argparse.Namespace) -> None:
    model, _ = generate.load(args)
    machine.set_up(model, args.compile, args.compile_prefill)
    room = model.config.max_position_embeddings - 1
    usual = {kind: min(tokens, room) for kind, tokens in turns.USUAL_TOKENS.items()}
    asked = read_list(args.contexts) + read_list(args.prompts)
    most = min(max(*asked, *usual.values()), room)

    @functools.lru_cache(2)  # one of each kind, as a rule: caches are large
    def warm(cell: Cell) -> Callable[[], None]:
        run = work(model, cell, most + 1, args.prefill_chunk)
        for _ in range(3):  # compiles
            run()
        return run

    def cell_of(kind: str, tokens: int) -> Cell:
        if not 0 < tokens <= most:
            raise Refusal(f"{kind} of {tokens} tokens, expected 1 to {most}")
        return Cell(kind, 1 if kind == "prefill" else args.batch_size, tokens)

    for kind, tokens in usual.items():
        warm(cell_of(kind, tokens))
    print("ready", flush=True)
    for line in read_lines():
        kind, times, tokens = read_order(line)
        cell = cell_of(kind, usual[kind] if tokens is None else tokens)
        run = warm(cell)
        run()
        start = time.perf_counter()
        for _ in range(times):
            run()
        print(cell.new_tokens() * times / (time.perf_counter() - start), flush=True)


@torch.inference_mode()
def main() -> None:
    flags = sys.argv[1:]
    serves = "--serve" in flags
    if serves:
        flags.remove("--serve")
    own = {"batches": "1,4,16", "contexts": "16", "prompts": "500", "runs": 5, "lock": ""}
    if turns.without(flags, ["against"]) != flags:
        own["runs"] = turns.RUNS
    args = cli.parse_args(flags, **own, against="", plot="")
    if serves and (args.against or args.plot):
        raise Refusal("--serve excludes --against and --plot")
    if args.against and (args.plot or args.lock):
        raise Refusal("--against excludes --plot and --lock")
    if args.plot and not args.output:
        raise Refusal("--plot draws the lines of --output FILE, expected that flag as well")
    if serves:
        serve(args)
    elif args.against:
        compare(args)
    else:
        tabulate(args)


if __name__ == "__main__":
    generate.command(main)
