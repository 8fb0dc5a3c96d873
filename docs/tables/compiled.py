"""Tables and the figure of a record of benchmarks/compiled.py."""

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
KEYS = ["device", "dtype", "tree", "arm"]
# Columns: the head, the field, the digits, the devices.
BYTES = [(f"{name}: bytes", "hbm", 1, device) for device, name in DEVICES.items()]
FLOOR = ("least possible, without padding", "floor", 1, *DEVICES)
ONE = [*BYTES, FLOOR]
ONE += [(f"{x.upper()}: instructions", "instructions", 0, x) for x in ("h100", "a100")]
KERNELS = [("kernels", "kernels", 0, device) for device in DEVICES]
MANY = [BYTES[0], KERNELS[0], BYTES[1], KERNELS[1]]
MANY += [("H100: CPU seconds to compile", "compile_cpu_seconds", 1, "h100")]
WRAPPED = [*BYTES, FLOOR, ("temporary", "temporary", 2, "h100", "v5e")]
WRAPPED += [("peak, with gradients", "peak", 2, "v5e")]


def read(folder: Path) -> pd.DataFrame:
    """Returns what was found off the mesh; for a name "adam3" stands for all forms."""
    rows = [x for x in common.read(folder, "compiled") if "split" not in x]
    for row in common.read(folder, "instructions"):  # in some records a file of its own
        rows.append({**row, "dtype": "float32", "tree": "one"})
    for row in common.read(folder, "compile"):
        seconds = {"compile_cpu_seconds": statistics.median(row["seconds"])}
        rows.append({**row, **seconds, "dtype": "float32", "tree": "gpt2"})
    found = pd.DataFrame(rows).groupby(KEYS, sort=False, as_index=False).last()
    fields = {column[1] for column in (*ONE, *MANY, *WRAPPED)}
    arms = found["arm"].str
    names = arms.replace(FORMS, "adam3, ", regex=True)
    wrapped = arms.extract("(?P<remainder>.*) remainder over (?P<over>.*)")
    return found.reindex(columns=[*KEYS, *fields]).assign(name=names).join(wrapped)


def of(rows: pd.DataFrame, field: str, digits: int, *devices: str) -> str:
    """Returns a number, or the least and the largest, for devices that differ in it."""
    texts = {}
    for device in devices:
        found = rows[field][rows["device"] == device]
        ends = [parts.cell(x, digits) for x in (found.min(), found.max())]
        texts[" to ".join(dict.fromkeys(ends))] = device
    return "; ".join(x for x in texts if x != "-") or "-"


def shown(rows: pd.DataFrame, keys: dict[str, str], columns: list[tuple]) -> str:
    """Returns a table with a row for each value of the keys, which are by head."""
    groups = rows.groupby([*keys.values()], sort=False)
    lines = [[*key, *(of(x, *column[1:]) for column in columns)] for key, x in groups]
    return table([*keys, *(column[0] for column in columns)], lines)


def tables(folder: Path) -> list[str]:
    """Returns the tables of one matrix, of GPT-2 and of `bfloat16_parameters`."""
    every = read(folder)
    # Those of other packages stand beside one another: `compared`.
    single = every[(every["dtype"] == "float32") & ~every["arm"].str.contains("flash")]
    one, gpt2 = (single[single["tree"] == x] for x in ("one", "gpt2"))
    few = gpt2[gpt2["arm"].isin(FEW)]
    return [
        shown(one, {"optimizer and state": "name"}, ONE),
        shown(few, {"optimizer and state": "arm"}, MANY),
        shown(every, {x: x for x in ("remainder", "over")}, WRAPPED),
    ]


def draw(folder: Path) -> None:
    """Draws the bytes of a step on one matrix, beside the least possible."""
    one, largest = read(folder).query("dtype == 'float32' and tree == 'one'"), 60
    names = one["name"].unique()
    figure, panel = parts.panel_of(names, height=0.34, base=28)
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
    panel.set(xlim=(0, largest), ylim=(len(names) - 0.5, -0.5))
    panel.set_xlabel("bytes a parameter and step (grey line: optax.adam)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "bytes.png")
