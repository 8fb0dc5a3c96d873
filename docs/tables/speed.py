"""The table of docs/speed.md, from a record of step_time.py."""

import json
from pathlib import Path

from benchmarks import common
from studies.study.markdown import table

OPTAX = ("optax.adamw", "optax.contrib.ademamix")
OURS = tuple(x for x in common.optimizers() if x.startswith("adam3"))
ARMS = (*OPTAX, *OURS, "optax.flatten(adam3 cubic, float32)")


def tables(folder: Path) -> list[str]:
    """Returns the median ratios to Adam with float32 parameters, in Markdown."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found, labels = {}, {}
    for row in map(json.loads, lines):
        if row["measure"] == "step" and row["dtype"] == "float32":
            found[row["tree"], row["arm"]] = row["ratio"][1]
            sizes = row["leaves"], row["parameters"]
            labels[row["tree"]] = common.label(row["tree"], *sizes)
    head = ["ratio to `optax.adam`, float32 parameters", *labels.values()]
    rows = []
    for arm in ARMS:
        ratios = [found.get((tree, arm)) for tree in labels]
        if any(ratios):
            rows.append([arm, *("" if x is None else f"{x:.2f}" for x in ratios)])
    return [table(head, rows)]
