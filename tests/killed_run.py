"""A small training run that is killed, again and again, and resumed by its checkpoints.

    python killed_run.py '["int8", [FOLDER, [["arrays", 4], ["between", 7]]], ...]'

Each kill takes a process, forked before JAX has started anything in it, so that the
imports are paid for once. It kills itself with SIGKILL at an event and a step. The last
process of a run goes to its end, and writes what it has. Each prints from where it
resumed, and which folders the one before it left unfinished.
"""

import functools
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam3_optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
checkpoints: Any = import_module("checkpoints")
os_: Any = os  # whose functions are replaced

STEPS, EVERY, KEEP = 12, 2, 2


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(event: str) -> None:
    """Lets the next save of a checkpoint kill this process."""
    save, replace = checkpoints.ocp.StandardCheckpointer.save, os.replace

    def save_and_die(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)  # goes on writing in the background
        die()

    def replace_and_die(*arguments: Any) -> None:
        replace(*arguments)
        if Path(arguments[1]).name == checkpoints.MANIFEST:
            die()

    def die_before_replace(*arguments: Any) -> None:
        if Path(arguments[1]).name == checkpoints.MANIFEST:
            die()
        replace(*arguments)

    match event:
        case "writing":  # Orbax is about it
            checkpoints.ocp.StandardCheckpointer.save = save_and_die
        case "arrays":  # they are there, the manifest is not
            checkpoints._commit = die
        case "manifest":  # under its unfinished name alone
            os_.replace = die_before_replace
        case "committed":
            os_.replace = replace_and_die
        case "removal":  # of an old checkpoint, whose manifest is gone already
            checkpoints.shutil.rmtree = die


def train(folder: Path, state_dtype: str, kill: list[Any] | None) -> None:
    """Trains to the end, or to the kill."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("x"))
    rests: dict[str, Any] = dict.fromkeys(
        ("m_dtype", "v_dtype", "s_dtype"), state_dtype
    )
    rate = optax.cosine_decay_schedule(0.01, STEPS)
    optimizer = adam3_optax.adam3w(rate, third_moment="standardized", **rests)
    description = {"third_moment": "standardized", **rests}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["in"] + params["b"]) @ params["out"]) ** 4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        gradients = jax.grad(loss)(params, x)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(0))
    params = {
        "in": jax.random.normal(keys[0], (16, 64)),
        "b": jnp.zeros(64),
        "out": jax.random.normal(keys[1], (64, 32)),
    }
    params = jax.device_put(params, rows)
    where = adam3_optax.state_shardings(optimizer, params, rows)
    state = jax.jit(optimizer.init, out_shardings=where)(params)
    done = checkpoints.latest(folder) or 0
    steps = sorted(folder.glob("step_*"))
    unfinished = [x.name for x in steps if not (x / "manifest.json").exists()]
    how = {"resumed": done, "unfinished": unfinished}
    print(json.dumps({"folder": str(folder), "how": how}), flush=True)
    if done:
        tree = {"params": params, "state": state}
        tree = checkpoints.restore(folder, done, tree, description)
        params, state = tree["params"], tree["state"]
    for count in range(done + 1, STEPS + 1):
        if kill and count == kill[1]:
            if kill[0] == "between":
                die()
            kill_at(kill[0])
        x = np.random.default_rng((0, count)).normal(size=(32, 16)).astype(np.float32)
        params, state = step(params, state, jax.device_put(x, rows))
        if count % EVERY == 0:
            tree = {"params": params, "state": state}
            checkpoints.save(folder, count, tree, description, KEEP)
    leaves = jax.tree.leaves({"params": params, "state": state})
    arrays = [np.asarray(x) for x in leaves]
    # NumPy's files know no bfloat16: the bits are what is compared.
    np.savez(folder / "end.npz", *(x.view(f"u{x.dtype.itemsize}") for x in arrays))


def main() -> None:
    """Takes the runs one by one, each with its kills and then to the end."""
    state, *runs = json.loads(sys.argv[1])
    for folder, kills in runs:
        Path(folder).mkdir()
        for kill in [*kills, None]:
            child = os.fork()
            if not child:
                train(Path(folder), state, kill)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status != (-signal.SIGKILL if kill else 0):
                sys.exit(f"{kill}: ended with status {status}")


if __name__ == "__main__":
    main()
