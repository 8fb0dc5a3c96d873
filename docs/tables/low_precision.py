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
    """Returns the last run of each arm and seed."""
    runs = pd.read_json(folder / "runs.jsonl", lines=True, precise_float=True)
    return runs.drop_duplicates(["arm", "seed"], keep="last")


def tables(folder: Path) -> list[str]:
    """Returns the table in Markdown; arms by form, then by state."""
    runs = read(folder)
    losses = runs.pivot(index="seed", columns="arm", values="validation")
    forms = list(runs["arm"].str.split(", ").str[0].unique())
    compared, places = {}, {}
    for arm in losses:
        form, state = arm.split(", ", 1)
        places[arm] = forms.index(form), STATES.index(state)
        if state != BASELINE:
            compared[arm] = (losses[arm] - losses[f"{form}, {BASELINE}"]).dropna()
    corrected = holm([equivalence(d, MARGIN) for d in compared.values()])
    p = dict(zip(compared, corrected, strict=True))
    rows = []
    for arm in sorted(places, key=places.__getitem__):
        found, shift, equal = runs[runs["arm"] == arm], "", ""
        if arm in compared:
            d = compared[arm]
            ends = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
            shift, equal = parts.between(d.mean(), *ends, "+.4f"), f"{p[arm]:.0e}"
        size = (found["state_bytes"] / found["parameters"]).iloc[0]
        cells = [arm, f"{size:.2f}", str(len(found)), f"{losses[arm].mean():.4f}"]
        largest = found["largest"].max() / PEAK_RATE
        rows.append([*cells, shift, equal, f"{largest:.2f}"])
    return [table(HEAD, rows)]
