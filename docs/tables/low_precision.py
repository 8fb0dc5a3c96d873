"""The table of accuracy in docs/low_precision.md, from a record.

Each setting is compared with float32 in the same form, seed by seed: the same
initialisation and the same batches. "Equivalent" means that two one-sided t-tests put
the mean difference within the margin, with Holm's correction over all rows.
"""

from pathlib import Path

import pandas as pd
from scipy import stats

from docs.tables import parts
from studies.study.markdown import table
from studies.study.statistics import equivalence, holm

HEAD = ["form, state", "B a parameter", "n", "validation loss", "minus float32 (95%)"]
HEAD += ["p, equivalent", "largest update, lr"]
MARGIN = 0.005  # nats a character
BASELINE = "float32"
STATES = [BASELINE, "float32, rate times 1.07", "bfloat16", "float8, v bfloat16"]
STATES += ["float8", "bfloat16 alone"]
STATES += [f"bfloat16, remainder {x}" for x in (None, "int8", "int16")]
PEAK_RATE = 4e-3  # of the schedule; the update is that of the chain, decay included


def read(folder: Path) -> pd.DataFrame:
    """Returns the last run of each arm, that is, of a form with a state, and seed."""
    runs = pd.read_json(folder / "runs.jsonl", lines=True, precise_float=True)
    runs[["form", "state"]] = runs["arm"].str.split(", ", n=1, expand=True)
    return runs.drop_duplicates(["arm", "seed"], keep="last")


def tables(folder: Path) -> list[str]:
    rows, compared = [], []
    for form, arms in read(folder).groupby("form", sort=False):
        losses = arms.pivot(index="seed", columns="state", values="validation")
        for state in sorted(losses, key=STATES.index):
            runs, mean = arms[arms["state"] == state], losses[state].mean()
            size = (runs["state_bytes"] / runs["parameters"]).iloc[0]
            row = [f"{form}, {state}", f"{size:.2f}", str(len(runs)), f"{mean:.4f}"]
            row += ["", "", f"{runs['largest'].max() / PEAK_RATE:.2f}"]
            rows.append(row)
            if state != BASELINE:
                d = (losses[state] - losses[BASELINE]).dropna()
                ends = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
                row[4] = parts.between(d.mean(), *ends, "+.4f")
                compared.append((row, equivalence(d, MARGIN)))
    for (row, _), p in zip(compared, holm([p for _, p in compared]), strict=True):
        row[5] = f"{p:.0e}"
    return [table(HEAD, rows)]
