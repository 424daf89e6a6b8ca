"""How the picture of plot.py looks: speeds by the number of slots, and what the flag costs."""

import itertools
import operator
import statistics
import textwrap

DARK = {  # what a colour is where people like their screens dark
    "#ffffff": "#0d1117",
    "#1f2328": "#e6edf3",
    "#d1d9e0": "#3d444d",
    "#6e7781": "#9198a1",
    "#0969da": "#58a6ff",
    "#bc4c00": "#f0883e",
}
PAPER, INK, GRID, LIMIT, OFF, ON = DARK
LINES = ["-", "--", ":", "-."]  # of one way to run after the other
WIDTH = 105  # characters of a command in a line
STYLE = {
    "svg.fonttype": "none",  # text remains text
    "svg.hashsalt": "",  # the same rows make the same file
    "text.parse_math": False,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
} | dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor"], PAPER)
STYLE |= dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], INK)
STYLE |= dict.fromkeys(["xtick.color", "ytick.color"], INK)


def add_dark(svg: str) -> str:
    """The picture with a style for dark schemes; what knows no styles shows it as it was."""
    rules = []
    for light, dark in DARK.items():
        for kind in ("fill", "stroke"):
            rules.append(f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}')
    style = "<style>@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}</style>\n"
    end = svg.index(">", svg.index("<svg")) + 1
    return svg[:end] + style + svg[end:]


def unique(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def way(row: dict) -> tuple[str, ...]:
    """How it ran, in words: what has a line of its own."""
    compiled = "compiled" if row["compile"] else "eager"
    return row["quantize"] or row["precision"], compiled, f"after {row['tokens']} tokens"


def points(rows: list[dict], key: str) -> tuple[list, list[float]]:
    """The batches of rows that have a key, and the median of its values at each."""
    values = {}
    for row in sorted(rows, key=operator.itemgetter("batch")):
        if key in row:
            values.setdefault(row["batch"], []).append(row[key])
    return list(values), [statistics.median(found) for found in values.values()]


def paint(rows: list[dict], Figure):
    """A figure of rows of one model and machine, of matplotlib's class: its head, speeds, the
    flag's cost where that was measured, and the commands."""
    ways = {}
    for row in rows:
        ways.setdefault(way(row), []).append(row)
    shared = [word for word in next(iter(ways)) if all(word in each for each in ways)]
    has_cost = any("cost" in row for row in rows)
    commands = []
    for command in unique(rows, "command"):
        commands += textwrap.wrap(command, WIDTH, subsequent_indent="    ")

    # Inches from below: the commands, the cost, speeds, the head.
    foot = 0.7 + 0.14 * len(commands)
    low = foot + (1.45 if has_cost else 0)
    height = low + 3.9
    figure = Figure((8, height))
    speeds = figure.add_axes((0.09, low / height, 0.88, 3.2 / height))
    costs = figure.add_axes((0.09, foot / height, 0.88, 1.1 / height)) if has_cost else None
    for style, (words, some) in zip(itertools.cycle(LINES), ways.items(), strict=False):
        label = ", ".join(word for word in words if word not in shared)
        paint_speeds(speeds, some, style, label, len(ways) == 1)
        if has_cost:
            paint_cost(costs, some, style)
    finish(speeds, costs or speeds, unique(rows, "batch"))

    about = [rows[0]["hardware"], "PyTorch " + ", ".join(unique(rows, "torch"))]
    about += [", ".join(unique(rows, "date")), *shared]
    title = f"{rows[0]['model']}: speed of decoding"
    figure.text(0.03, 1 - 0.27 / height, title, size=13, weight="bold")
    figure.text(0.03, 1 - 0.5 / height, "  ·  ".join(about), size=9)
    where = {"size": 7.5, "color": LIMIT, "family": "monospace", "va": "bottom"}
    figure.text(0.03, 0.1 / height, "\n".join(commands), **where)
    return figure


def paint_speeds(axes, rows: list[dict], style: str, label: str, has_numbers: bool) -> None:
    """Those of one way to run, without the flag and with it, and what the memory allows: every step
    reads the weights and what is cached."""
    more = f", {label}" if label else ""
    limit = max(row["limit_GB/s"] for row in rows)
    roof = [row | {"roof": row["tokens/s"] * limit / row["GB/s"]} for row in rows]
    name = f"what memory allows, {limit:.3g} GB/s{more}"
    axes.plot(*points(roof, "roof"), ".", color=LIMIT, linestyle=style, linewidth=1, label=name)
    lines = [("tokens/s", OFF, "without", 6), ("deterministic", ON, "with", -14)]
    for key, colour, word, offset in lines:
        batches, rates = points(rows, key)
        if batches:
            name = f"{word} --deterministic{more}"
            axes.plot(batches, rates, color=colour, linestyle=style, marker="o", label=name)
        if has_numbers:
            write_numbers(axes, batches, rates, colour, offset)


def paint_cost(axes, rows: list[dict], style: str) -> None:
    batches, costs = points(rows, "cost")
    axes.axhline(1, color=LIMIT, linewidth=1)
    axes.plot(batches, costs, color=ON, linestyle=style, marker="o")
    write_numbers(axes, batches, costs, ON, 6)


def write_numbers(axes, batches: list, values: list[float], colour: str, offset: float) -> None:
    """Each beside its point, so many points of type above it."""
    for batch, value in zip(batches, values, strict=True):
        text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        where = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center"}
        axes.annotate(text, (batch, value), color=colour, size=8.5, **where)


def finish(speeds, lowest, batches: list) -> None:
    speeds.legend(loc="upper left")
    speeds.set_yscale("log", base=2)
    speeds.set_ylabel("tokens per second")
    bottom, top = speeds.get_ylim()
    speeds.set_ylim(bottom / 1.4, top * 1.4)
    speeds.yaxis.set_major_formatter("{x:g}")
    for axes in dict.fromkeys([speeds, lowest]):
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(batches) / 1.2, max(batches) * 1.2)
        axes.set_xticks(sorted(batches), labels=[f"{batch:g}" for batch in sorted(batches)])
        axes.minorticks_off()
    lowest.set_xlabel("slots that are decoded at once (--batches)")
    if lowest is not speeds:
        lowest.set_ylabel("cost of the flag,\ntimes")
        low, high = lowest.get_ylim()
        lowest.set_ylim(low, high + (high - low) / 3)  # room for the numbers
