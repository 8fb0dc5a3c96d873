"""Tables and the figure of a record of benchmarks/compiled.py.

Some records have the instructions in a file of their own.
"""

import statistics
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import common
from docs.tables import parts
from studies.study.markdown import table

DEVICES = {"v5e": "TPU v5e", "h100": "H100"}
FORMS = f"^adam3 ({'|'.join(filter(None, common.FORMS))}), "
FEW = (common.BASELINE, *(f"adam3 cubic, {name}" for name in common.SETTINGS))
KEYS = ("device", "dtype", "tree", "arm")
FIELDS = ("hbm", "floor", "temporary", "peak", "kernels", "instructions", "compile")
BYTES = [f"{name}: bytes" for name in DEVICES.values()]
MEMORY = ["least possible, without padding", "temporary"]


def read(folder: Path) -> pd.DataFrame:
    """Returns what was found off the mesh; in the names "adam3" stands for all forms."""
    rows = [x for x in common.read(folder, "compiled") if "split" not in x]
    for row in common.read(folder, "instructions"):
        rows.append({**row, "dtype": "float32", "tree": "one"})
    for row in common.read(folder, "compile"):
        seconds = {"compile_cpu_seconds": statistics.median(row["seconds"])}
        rows.append({**row, **seconds, "dtype": "float32", "tree": "gpt2"})
    found = parts.last(rows, *KEYS).rename(columns={"compile_cpu_seconds": "compile"})
    names = found["arm"].str.replace(FORMS, "adam3, ", regex=True)
    return found.reindex(columns=KEYS + FIELDS).assign(name=names)


def on(every: pd.DataFrame, tree: str) -> pd.DataFrame:
    """Returns what was found with float32 parameters on a tree."""
    return every[(every["dtype"] == "float32") & (every["tree"] == tree)]


def of(rows: pd.DataFrame, field: str, *devices: str, digits: int = 1) -> list[str]:
    """Returns a number for each device; where its rows differ, least and largest."""
    texts = []
    for device in devices:
        found = rows[field][rows["device"] == device]
        ends = [parts.number(x, digits) for x in (found.min(), found.max())]
        texts.append(" to ".join(dict.fromkeys(ends)))
    return texts


def one_matrix(every: pd.DataFrame) -> str:
    """Returns the bytes and the instructions of a step on one matrix."""
    head = ["optimizer and state", *BYTES, *MEMORY]
    head += ["H100: instructions", "A100: instructions"]
    lines = []
    for name, rows in on(every, "one").groupby("name", sort=False):
        line = [name, *of(rows, "hbm", *DEVICES)]
        for field in ("floor", "temporary"):
            found = dict.fromkeys(of(rows, field, *DEVICES))
            line.append("; ".join(x for x in found if x != "-"))
        lines.append([*line, *of(rows, "instructions", "h100", "a100", digits=0)])
    return table(head, lines)


def many_leaves(every: pd.DataFrame) -> str:
    """Returns bytes, kernels and compile times on the tree of GPT-2 small."""
    head = ["optimizer and state"]
    for name in BYTES:
        head += [name, "kernels"]
    lines, gpt2 = [], on(every, "gpt2")
    for arm in FEW:
        rows, line = gpt2[gpt2["arm"] == arm], [arm]
        for device in DEVICES:
            line += of(rows, "hbm", device) + of(rows, "kernels", device, digits=0)
        lines.append(line + of(rows, "compile", "h100"))
    return table([*head, "H100: CPU seconds to compile"], lines)


def wrapped(every: pd.DataFrame) -> str:
    """Returns the bytes of `bfloat16_parameters`, on one matrix."""
    lines = []
    found = every[every["arm"].str.contains(" remainder over ")]
    for arm, rows in found.groupby("arm", sort=False):
        line = [*arm.split(" remainder over "), *of(rows, "hbm", *DEVICES)]
        temporary = sorted(set(of(rows, "temporary", *DEVICES, digits=2)))
        line += [*of(rows, "floor", "v5e"), "; ".join(temporary)]
        lines.append(line + of(rows, "peak", "v5e", digits=2))
    head = ["remainder", "over", *BYTES, *MEMORY, "peak, with gradients"]
    return table(head, lines)


def tables(folder: Path) -> list[str]:
    """Returns the tables in Markdown."""
    every = read(folder)
    made = [one_matrix(every)]
    if "gpt2" in set(every["tree"]):  # not of other packages alone
        made += [many_leaves(every), wrapped(every)]
    return made


def draw(folder: Path) -> None:
    """Draws the bytes of a step on one matrix, beside the least possible."""
    one, largest = on(read(folder), "one"), 60
    names = one["name"].unique()
    figure, panel = parts.panel_of(names, 0.34)
    for shift, device in zip((-0.19, 0.19), DEVICES, strict=True):
        rows = one[one["device"] == device].groupby("name").first().reindex(names)
        places, widths = np.arange(len(names)) + shift, rows["hbm"].fillna(0)
        panel.barh(places, widths.clip(upper=largest), 0.36, label=DEVICES[device])
        for y, width in zip(places, widths, strict=True):
            if width > largest:
                style = {"ha": "right", "va": "center", "size": "small", "color": "w"}
                panel.text(largest, y, f"goes on to {width:.0f} ", **style)
        panel.plot([rows["floor"]] * 2, [places - 0.19, places + 0.19], "k-", lw=2)
    panel.plot([], [], "k-", lw=2, label="least possible")
    panel.axvline(28, c="0.6", lw=1, zorder=0)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, largest)
    panel.set_xlabel("bytes a parameter and step (grey line: optax.adam)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "bytes.png")
