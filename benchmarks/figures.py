"""Tables and figures of a record, from its numbers alone.

Writes README.md, ratios.png, bytes.png and memory.png beside results.jsonl; of a
record of compiled.py bytes.png alone. Where a cell was measured more than once its last
line counts. What was not measured is called so.

    python benchmarks/figures.py benchmarks/records/2026-01-31_speed
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
import common
import compiled_figure
import compiled_record
from common import BASELINE

MISSING = "not measured"
COPY = "copy"
Row = dict[str, Any]
Cells = dict[tuple[str, str], Row]  # by column and arm


class Column:
    """Cells in a table: its title, and what it shows of a row."""

    def __init__(self, title: str, show: Callable[[Row], str | None]) -> None:
        self.title = title
        self.show = show

    def of(self, row: Row | None) -> str:
        """Returns the cell's text."""
        return (row and self.show(row)) or MISSING


# --- Reading ------------------------------------------------------------------------


def last(rows: Iterable[Row], measure: str) -> list[Row]:
    """Returns the rows of a measure, the last one of each cell."""
    found = {}
    for row in rows:
        if row["measure"] == measure:
            key = (row["tree"], row["leaves"], row["parameters"], row["dtype"])
            found[*key, row["arm"]] = row
    return list(found.values())


def name_of(row: Row) -> str:
    """Returns the label of a row's tree."""
    return common.label(row["tree"], row["leaves"], row["parameters"])


def unique(names: Iterable[str]) -> list[str]:
    """Returns names once each, in the order of their first appearance."""
    return list(dict.fromkeys(names))


def arms_of(rows: list[Row]) -> list[str]:
    """Returns the arms, in the benchmark's order; what else there is comes last."""
    order = [*common.optimizers(), *common.flattened()]
    present = unique(row["arm"] for row in rows if row["arm"] != COPY)
    return sorted(present, key=lambda x: order.index(x) if x in order else len(order))


# --- Cells --------------------------------------------------------------------------


def spread(quartiles: list[float]) -> str:
    """Returns a median with its quartiles."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def ratio(row: Row) -> str:
    """Returns a ratio to Adam; for Adam itself the time."""
    if row["arm"] == BASELINE:
        return f"1 = {duration(row['step_seconds'][1])}"
    return spread(row["ratio"])


def duration(seconds: float) -> str:
    """Returns a time with its unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"


def count(field: str) -> Callable[[Row], str | None]:
    """Returns what shows a count of bytes a parameter."""

    def show(row: Row) -> str | None:
        value = row.get(field)
        return None if value is None else f"{value:.2f}"

    return show


def bandwidth(row: Row) -> str | None:
    """Returns the bytes moved in a second."""
    values = row.get("bytes_a_second")
    return f"{values[1] / 1e9:.1f}" if values else None


def share(row: Row) -> str | None:
    """Returns the bandwidth relative to a copy's."""
    return spread(row["share_of_copy"]) if "share_of_copy" in row else None


def median_of(field: str) -> Callable[[Row], str]:
    """Returns what shows the median of a list of seconds."""
    return lambda row: duration(common.quartiles(row[field])[1])


# --- Tables -------------------------------------------------------------------------


def table(head: str, arms: list[str], columns: list[str], cells: Any) -> str:
    """Returns a Markdown table; `cells` gives the text of (arm, column)."""
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1)]
    lines[1] += "|"
    for arm in arms:
        texts = (cells(arm, column) for column in columns)
        lines.append(f"| {arm} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def by_tree(rows: list[Row], show: Callable[[Row], str | None]) -> str:
    """Returns a table with a column for each tree."""
    cells = {(row["arm"], name_of(row)): row for row in rows}
    column = Column("", show)
    names = unique(name_of(row) for row in rows)
    return table(
        "optimizer", arms_of(rows), names, lambda a, n: column.of(cells.get((a, n)))
    )


def by_column(rows: list[Row], columns: list[Column], *, copy: bool = False) -> str:
    """Returns a table of one tree, with a column for each quantity."""
    cells = {row["arm"]: row for row in rows}
    shown = {column.title: column for column in columns}
    arms = [COPY] * (copy and COPY in cells) + arms_of(rows)
    return table("optimizer", arms, list(shown), lambda a, t: shown[t].of(cells.get(a)))


def step_sections(rows: list[Row]) -> list[str]:
    """Returns the tables of compiled steps."""
    parts = []
    for dtype in unique(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        windows = unique(str(len(row["seconds"])) for row in mine)
        parts += [
            f"## A step, {dtype} parameters and gradients",
            f"Time relative to `{BASELINE}` in the same round: median (quartiles) of "
            f"{' or '.join(windows)} rounds.",
            by_tree([row for row in mine if row["arm"] != COPY], ratio),
            f"Temporary memory of the compiled step, {dtype}, bytes a parameter:",
            by_tree(
                [row for row in mine if row["arm"] != COPY], count("temporary_bytes")
            ),
        ]
        for name in unique(
            name_of(row) for row in mine if row["tree"] in ("one", "transformer")
        ):
            parts += [
                f"### Bytes, {name}, {dtype}",
                "A parameter. Necessary: gradient, parameter and state read, the "
                "latter two written. XLA: its own count of the compiled step. "
                "Bandwidth: the necessary bytes over the measured time.",
                by_column(
                    [row for row in mine if name_of(row) == name],
                    [
                        Column("state", count("state_bytes")),
                        Column("necessary", count("necessary_bytes")),
                        Column("XLA", count("xla_bytes")),
                        Column("temporary", count("temporary_bytes")),
                        Column("GB a second", bandwidth),
                        Column("share of the copy's", share),
                    ],
                    copy=True,
                ),
            ]
    return parts


def sections(rows: list[Row]) -> list[str]:
    """Returns all tables, each under its heading."""
    parts = step_sections(last(rows, "step"))
    compiled, eager = last(rows, "compile"), last(rows, "eager")
    for name in unique(name_of(row) for row in compiled):
        mine = [row for row in compiled if name_of(row) == name]
        columns = [
            Column("ratio", ratio),
            Column("tracing and lowering", median_of("trace")),
            Column("compiling", median_of("compile")),
        ]
        rounds = max(len(row["seconds"]) for row in mine)
        parts += [
            f"## Tracing and compiling, {name}, float32",
            f"Medians of {rounds} rounds, with a fresh jit in each.",
            by_column(mine, columns),
        ]
    for name in unique(name_of(row) for row in eager):
        mine = [row for row in eager if name_of(row) == name]
        columns = [
            Column("ratio", ratio),
            Column("an update", median_of("seconds")),
        ]
        parts += [
            f"## `update` without jit, {name}, float32",
            by_column(mine, columns),
        ]
    for measure, heading in (
        ("step", "## A step"),
        ("compile", "## Tracing and compiling"),
        ("eager", "## `update` without jit"),
    ):
        if not last(rows, measure):
            parts += [heading, f"{MISSING.capitalize()}."]
    return parts + memory_sections(last(rows, "memory"))


def memory_sections(rows: list[Row]) -> list[str]:
    """Returns the tables of peak memory."""
    heading = "## Peak memory"
    if not rows:
        return [heading, f"{MISSING.capitalize()}."]
    parts = [
        heading,
        "Of init and three donated steps, in a process for each optimizer; bytes a "
        "parameter. Arrays: parameters, gradients and state.",
    ]
    columns = [
        Column("arrays", count("arrays_bytes")),
        Column("peak", count("peak_bytes")),
    ]
    for name, dtype in dict.fromkeys((name_of(row), row["dtype"]) for row in rows):
        mine = [x for x in rows if (name_of(x), x["dtype"]) == (name, dtype)]
        parts += [f"{name}, {dtype}:", by_column(mine, columns)]
    return parts


def conditions(rows: list[Row]) -> list[str]:
    """Returns what was measured where, with which versions and commands."""
    runs = [row for row in rows if row["measure"] == "run"]
    run = runs[-1]
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "torch", "adam3_optax")
    versions = [f"{x} {run[x]}" for x in packages if run[x]]
    lines = [
        f"- Device: {run['device']} ({run['platform']}; {run['runtime']})",
        f"- Processor: {run['cpu']}, {run['cores']} cores",
        f"- Versions: Python {run['python']}, {', '.join(versions)}",
    ]
    for run in runs:
        commit = (run["commit"] or "no commit")[:12]
        changed = " with changes" * run["changed"]
        load = f"load {run['load'][0]:g} before it"
        settings = " ".join(f"{k}={v}" for k, v in run["environment"].items())
        lines.append(
            f"- {run['run'][:19]} UTC, {commit}{changed}, {load}: "
            f"`{settings} {run['command']}`".replace("` ", "`")
        )
    return ["\n".join(lines)]


# --- Figures ------------------------------------------------------------------------


def draw_ratios(rows: list[Row], path: Path) -> None:
    """Draws the ratios to Adam, a panel for each type, a colour for each tree."""
    dtypes = unique(row["dtype"] for row in rows)
    arms, trees = arms_of(rows), unique(name_of(row) for row in rows)
    size = (1.5 + 4.5 * len(dtypes), 1.5 + 0.32 * len(arms))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        for i, tree in enumerate(trees):
            mine = [x for x in rows if (name_of(x), x["dtype"]) == (tree, dtype)]
            if not mine:
                continue
            y = [arms.index(x["arm"]) + 0.14 * (i - len(trees) / 2) for x in mine]
            low, middle, high = np.array([x["ratio"] for x in mine]).T
            errors = (middle - low, high - middle)
            panel.errorbar(
                middle, y, xerr=errors, fmt="o", ms=4, lw=1, label=tree, c=f"C{i}"
            )
        panel.axvline(1, c="0.6", lw=1)
        panel.set_xscale("log")
        panel.set_xticks(TICKS, [f"{x:g}" for x in TICKS], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(axis="x", c="0.9")
        panel.set_axisbelow(True)
        panel.set_title(f"{dtype} parameters", loc="left", size="medium")
        panel.set_xlabel(f"time of a step / {BASELINE}'s")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw_bytes(rows: list[Row], path: Path) -> None:
    """Draws the necessary bytes, XLA's, and the achieved bandwidth, on one tree."""
    first = name_of(rows[0]), rows[0]["dtype"]
    mine = {x["arm"]: x for x in rows if (name_of(x), x["dtype"]) == first}
    arms = [COPY, *arms_of(list(mine.values()))]
    figure = Figure(figsize=(10, 1 + 0.3 * len(arms)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for shift, field, colour, name in (
        (-0.2, "necessary_bytes", "C0", "necessary"),
        (0.2, "xla_bytes", "0.7", "by XLA's count"),
    ):
        y = [i + shift for i in range(len(arms))]
        left.barh(y, [mine[a][field] for a in arms], 0.4, color=colour, label=name)
    left.set_xlabel("bytes a parameter")
    left.legend(frameon=False)
    speeds = [[x / 1e9 for x in mine[a]["bytes_a_second"]] for a in arms]
    for i, (low, middle, high) in enumerate(speeds):
        right.barh(i, middle, 0.6, color="C0")
        right.plot((low, high), (i, i), "k-", lw=1)
    right.set_xlabel("necessary GB a second (line: quartiles)")
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(", ".join(first), size="medium")
    figure.savefig(path)


def draw_memory(rows: list[Row], path: Path) -> None:
    """Draws the peak memory: the arrays, and what comes on top."""
    first = name_of(rows[0]), rows[0]["dtype"]
    mine = {x["arm"]: x for x in rows if (name_of(x), x["dtype"]) == first}
    arms = arms_of(list(mine.values()))
    figure = Figure(figsize=(8, 1 + 0.3 * len(arms)), dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.barh(arms, [mine[a]["peak_bytes"] for a in arms], color="0.7", label="peak")
    held = [mine[a]["arrays_bytes"] for a in arms]
    label = "parameters, gradients and state"
    panel.barh(arms, held, color="C0", label=label)
    panel.invert_yaxis()
    panel.set_xlabel("bytes a parameter")
    panel.set_title(", ".join(first), loc="left", size="medium")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def drawn_ratio(row: Row) -> bool:
    """Returns whether a row has a ratio that is not 1 by definition."""
    return row["arm"] not in (COPY, BASELINE)


def drawn_bytes(row: Row) -> bool:
    """Returns whether XLA's count is known."""
    return row.get("xla_bytes") is not None


FIGURES: tuple[tuple[str, str, str, Any, Any], ...] = (
    ("ratios.png", "step", "Time of a step against Adam's", drawn_ratio, draw_ratios),
    ("bytes.png", "step", "Bytes and bandwidth of a step", drawn_bytes, draw_bytes),
    ("memory.png", "memory", "Peak memory", lambda _: True, draw_memory),
)


# --- The command line ---------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Draws, and returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser("figures.py", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="where results.jsonl is")
    folder = parser.parse_args(argv).folder
    try:
        rows = common.read(folder / "results.jsonl")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not any(row["measure"] != "run" for row in rows):
        parser.error(f"{folder}: no measurement is in results.jsonl")
    if compiled := compiled_record.read(folder):
        compiled_figure.draw(compiled, folder / "bytes.png")
        return 0
    pictures = []
    for file, measure, title, needed, draw in FIGURES:
        if mine := [row for row in last(rows, measure) if needed(row)]:
            draw(mine, folder / file)
            pictures.append(f"![{title}]({file})")
    text = [
        f"# {folder.resolve().name}",
        "Drawn from `results.jsonl` by `benchmarks/figures.py`, which says how to read "
        "it; [benchmarks/README.md](../../README.md) says how it was measured.",
        *conditions(rows),
        *pictures,
        *sections(rows),
    ]
    (folder / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(f"Drawn: {folder / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
