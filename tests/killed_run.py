"""Saves that are killed, each at another moment, and what is there afterwards.

    python killed_run.py FOLDER 0 7 14

Each number is a moment: how many times Python has touched the folder (made, opened,
renamed or removed something) while a checkpoint is saved and the oldest one removed.
There the process kills itself with SIGKILL. Another one opens the folder, checks every
bit, and saves again. One line of JSON is printed for each moment: what was found, and
whether the save was still killed.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
checkpoints: Any = import_module("checkpoints")

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def tree_of(step: int) -> Any:
    return {"w": jnp.arange(256.0).reshape(16, 16) * step, "count": jnp.int32(step)}


def opened(folder: Path) -> Any:
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        tree_of(0),
    )
    return checkpoints.Checkpoints(folder, template, {"lr": 0.004}, keep=2)


def killed_save(folder: Path, moment: int) -> None:
    left = moment

    def count(event: str, arguments: Any) -> None:
        nonlocal left
        if event in TOUCHES and str(folder) in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with opened(folder) as run:
        tree = tree_of(3)
        sys.addaudithook(count)
        run.save(3, tree)


def look(folder: Path, killed: bool) -> None:
    with opened(folder) as run:
        step, found = run.step, run.restore()
        run.save(4, tree_of(4))
    with opened(folder) as run:
        same = [
            np.asarray(x).tobytes() == np.asarray(y).tobytes()
            for got, wanted in ((found, tree_of(step)), (run.restore(), tree_of(4)))
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        ]
    left = sorted(x.name for x in folder.iterdir())
    result = {"step": step, "same": all(same), "left": left, "killed": killed}
    print(json.dumps(result), flush=True)


def prepare(folder: Path) -> None:
    with opened(folder) as run:
        for step in (1, 2):
            run.save(step, tree_of(step))


def forked(work: Callable[..., None], *arguments: Any) -> int:
    """Returns how a process ended that was forked before JAX started anything."""
    child = os.fork()
    if not child:
        jax.config.update("jax_platforms", "cpu")
        work(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    root = Path(sys.argv[1])
    assert forked(prepare, root / "before") == 0
    for moment in map(int, sys.argv[2:]):
        folder = root / str(moment)
        shutil.copytree(root / "before", folder)
        killed = forked(killed_save, folder, moment) == -signal.SIGKILL
        assert forked(look, folder, killed) == 0


if __name__ == "__main__":
    main()
