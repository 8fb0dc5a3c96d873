"""The figure of a record of compiled.py."""

from pathlib import Path

import common
from compiled_record import DEVICES, Rows, arms
from matplotlib.figure import Figure


def draw(rows: Rows, path: Path) -> None:
    """Draws the bytes of a step on one matrix, beside the least possible."""
    names = arms(rows)
    figure = Figure(figsize=(8, 1 + 0.34 * len(names)), dpi=120, layout="constrained")
    panel = figure.subplots()
    largest = 60
    for shift, (device, title), colour in zip(
        (-0.19, 0.19), DEVICES.items(), ("C0", "C1"), strict=True
    ):
        for i, arm in enumerate(names):
            row = rows.get((device, "float32", "one", arm))
            if row is None or "hbm" not in row:
                continue
            label = title if arm == common.BASELINE else None
            y = i + shift
            panel.barh(y, min(row["hbm"], largest), 0.36, color=colour, label=label)
            if row["hbm"] > largest:
                text = f"goes on to {row['hbm']:.0f} "
                style = {"ha": "right", "va": "center", "size": "small", "color": "w"}
                panel.text(largest, y, text, **style)
            least = "least possible" if label and device == "v5e" else None
            panel.plot(
                [row["floor"]] * 2, [y - 0.19, y + 0.19], "k-", lw=2, label=least
            )
    panel.axvline(28, c="0.6", lw=1, zorder=0)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, largest)
    panel.set_xlabel("bytes a parameter and step (grey line: optax.adam)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
