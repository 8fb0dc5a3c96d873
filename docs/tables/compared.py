"""The table of AdamW with little state, of several packages, from three records."""

from pathlib import Path

import pandas as pd

from docs.tables import compiled, parts, speed
from studies.study.markdown import table

BYTES = ("2026-11-29_compiled", "2026-11-30_compiled_peers")
TIMES = "2026-11-30_speed"
NAMES = [
    "optax.adamw",
    "optax.adamw, mu bfloat16",
    "bfloat16_state(optax.adamw)",
    *(f"adam3w None, {x}" for x in ("bfloat16", "float8", "float8 all")),
    "rollfast adamw, bfloat16",
    "rollfast adamw8",
    "rollfast adamw8, stochastic",
    "flashoptim, int8",
    "flashoptim, int8, own kernel",
]
# As in `compiled`: the head, the field, the digits, the devices.
COLUMNS = [("state", "state", 1, *compiled.DEVICES), *compiled.BYTES]
COLUMNS += [(f"{x}, temporary", "temporary", 1, y) for y, x in compiled.DEVICES.items()]


def tables(folder: Path) -> list[str]:
    """Returns a table of bytes and one of times, for the peers and what is beside."""
    every = pd.concat(compiled.read(folder.parent / x) for x in BYTES)
    every = every.query("dtype == 'float32' and tree == 'one'")
    # The gradient and the parameter are read, and the latter written: 12 bytes.
    every = every.assign(state=(every["floor"] - 12) / 2)
    lines = []
    for name in NAMES:
        # The bytes were counted without weight decay, which has no state.
        arm = "optax.adam" if name == NAMES[0] else name.replace("adam3w", "adam3")
        found = every[every["arm"] == arm]
        lines.append([name, *(compiled.of(found, *column[1:]) for column in COLUMNS)])
    times = speed.read(folder.parent / TIMES).query("tree == 'one'").set_index("arm")
    on_cpu = times.reindex([x for x in NAMES if x in times.index])
    return [
        table(["AdamW", *(column[0] for column in COLUMNS)], lines),
        parts.table("AdamW, on a CPU", on_cpu[["time", "temporary"]]),
    ]
