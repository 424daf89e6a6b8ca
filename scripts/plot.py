"""A picture of speed: tokens per second of decoding by the number of slots, beside what the memory
allows, and what --deterministic costs.

python scripts/plot.py FILE.svg LINES.jsonl ...

draws what bench.py --output has written, in one run or several: of one model on one machine. What
was measured more than once is its median. Needs matplotlib."""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts import cli
from scripts.files import Refusal, read_file, refusing, text_in
from scripts.outputs import folder_beside
from scripts.picture import STYLE, add_dark, paint, unique

NUMBERS = ["batch", "tokens", "tokens/s", "GB/s", "limit_GB/s"]
OF_THE_FLAG = ["deterministic", "cost"]
TEXTS = ["model", "hardware", "date", "torch", "precision", "command"]


# ---- rows


def read_rows(path: Path) -> list[dict]:
    """All rows of a file. Raises Refusal for what is none of bench.py."""
    rows = []
    for number, line in enumerate(text_in(path).splitlines(), start=1):
        where = f"{path}, line {number}, is no row of bench.py"
        with refusing(where, ValueError, KeyError, RecursionError):
            rows.append(check_row(json.loads(line)))
    return rows


def check_row(row) -> dict:
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    numbers = NUMBERS + OF_THE_FLAG * any(key in row for key in OF_THE_FLAG)
    for key in numbers:
        value = row[key]
        if type(value) not in (int, float) or not 0 < value < 1e18:
            raise ValueError(f"{key} is {value!r:.40}, expected a number above 0")
    for key in TEXTS:
        value = row[key]
        if not isinstance(value, str) or not value.isprintable() or not value:
            raise ValueError(f"{key} is {value!r:.40}, expected text in a line")
    if not isinstance(row["compile"], bool) or row["quantize"] not in (None, *cli.QUANTIZE_MODES):
        raise ValueError("expected true or false for compile, and a mode or null for quantize")
    if row["what"] not in ("prefill", "decode"):
        raise ValueError(f"what is {row['what']!r:.40}, expected prefill or decode")
    return row


# ---- the picture


def load_figure() -> tuple:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refusal("a picture needs matplotlib: pip install matplotlib") from error
    return matplotlib, Figure


def check_target(path: Path) -> None:
    """Raise Refusal where no picture can be made, or where something else would be lost."""
    load_figure()
    if path.suffix != ".svg":
        raise Refusal(f"{path}: expected a name that ends in .svg")
    if path.exists() and b"<svg" not in read_file(path)[:2000]:
        raise Refusal(f"{path} is there and is no SVG, expected a new name")
    with refusing(f"{path} cannot be written", OSError), folder_beside(path):
        pass


def check_same(rows: list[dict]) -> None:
    """Raise Refusal where rows are of several models or machines."""
    for key in ("model", "hardware"):
        if len(found := unique(rows, key)) > 1:
            raise Refusal(f"rows of several kinds of {key}, expected one: {'; '.join(found)}")


def draw(rows: list[dict], path: Path) -> None:
    """Make a file of them, whole or not at all. Raises Refusal where there is nothing to draw, or
    where there are several models or machines."""
    check_target(path)
    rows = [row for row in rows if row["what"] == "decode"]
    if not rows:
        raise Refusal("expected rows of decoding, found none")
    check_same(rows)
    matplotlib, Figure = load_figure()
    with matplotlib.rc_context(STYLE):
        figure = paint(rows, Figure)
        with refusing(f"{path} cannot be written", OSError), folder_beside(path) as folder:
            work = folder / path.name
            figure.savefig(work, format="svg", metadata={"Date": None})
            work.write_text(add_dark(work.read_text(encoding="utf-8")), encoding="utf-8")
            work.replace(path)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("target", type=Path, metavar="FILE.svg")
    parser.add_argument("lines", type=Path, nargs="+", metavar="LINES.jsonl")
    args = parser.parse_args()
    rows = []
    for path in args.lines:
        rows += read_rows(path)
    draw(rows, args.target)


if __name__ == "__main__":
    cli.run([main])
