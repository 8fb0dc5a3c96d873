"""Several processes train one language model, whose parameters lie on all devices.

Each process has devices of its own; JAX joins them, and one program runs on all. The
parameters and the optimizer's state of char_lm.py's model are fully sharded: no device
holds the whole. The same command goes on from the last checkpoint, also after a kill,
on as many processes and devices as there are then.

On one machine, with simulated devices:

    python multi_process.py --processes 2 --devices-per-process 4

On real machines start it on each of them, with a folder that all share:

    python multi_process.py --pod                        # TPU pod, Slurm or Open MPI
    python multi_process.py --processes 2 --process-id 0 --coordinator 10.0.0.1:1234
"""

import argparse
import functools
import os
import socket
import sys
import traceback
from argparse import RawDescriptionHelpFormatter as AsWritten
from pathlib import Path
from typing import Any

import char_lm
import jax
import jaxlib._jax
import numpy as np
import optax
from char_input import Parser, number
from checkpoints import CheckpointError, Checkpoints
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from launch import LOOPBACK, end_with_the_launcher, launch, say

from adam3_optax import adam3w, state_shardings

SETTINGS = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
SETTINGS |= {"third_moment": "standardized", "weight_decay": 1e-4}
LEARNING_RATE, SEED = 4e-3, 0


def simulate(devices: int) -> None:
    """Lets the CPU simulate devices, which speak over the loopback address."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Gloo would listen where the machine's name points, and JAX has no option for it.
    jaxlib._jax.make_gloo_tcp_collectives = functools.partial(
        jaxlib._jax.make_gloo_tcp_collectives, hostname=LOOPBACK
    )
    # Gloo writes each connection to the standard output, which is ours alone.
    sys.stdout = open(os.dup(1), "w", closefd=False)  # noqa: SIM115
    os.dup2(2, 1)


def work(options: argparse.Namespace) -> None:
    """Joins the other processes and trains."""
    try:
        # The coordinator listens there alone: by default it would on every address.
        named = (
            {}
            if options.pod
            else {
                "coordinator_address": options.coordinator,
                "num_processes": options.processes,
                "process_id": options.process_id,
                "coordinator_bind_address": options.coordinator,
            }
        )
        jax.distributed.initialize(
            **named, heartbeat_timeout_seconds=10, initialization_timeout=60
        )
        train(options)
    except Exception as error:
        known = isinstance(error, CheckpointError)
        say(str(error)) if known else traceback.print_exc()
        # At an orderly exit JAX would wait for the others, and they for this one.
        os._exit(2 if known else 1)


def set_up(steps: int, characters: int, mesh: jax.sharding.Mesh) -> Any:
    """Returns the model's graph, the optimizer, init, and a template."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, min(100, steps // 10), steps, LEARNING_RATE / 10
    )
    optimizer = adam3w(schedule, **SETTINGS)

    def model() -> Any:
        return char_lm.Transformer(characters, nnx.Rngs(SEED))

    def init() -> Any:
        params = nnx.state(model())
        return {"params": params, "state": optimizer.init(params)}

    def place(x: Any) -> NamedSharding:  # by the first axis that divides evenly
        even = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        return NamedSharding(mesh, P(*[None] * even[0], "all") if even else P())

    graph, shapes = nnx.split(nnx.eval_shape(model))
    params = jax.tree.map(place, shapes)
    where = {"params": params, "state": state_shardings(optimizer, shapes, params)}
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init),
        where,
    )
    return graph, optimizer, init, template


def settings_of(steps: int) -> dict[str, Any]:
    """Returns what a run must share with its checkpoints, beside the arrays."""
    return SETTINGS | {"lr": LEARNING_RATE, "seed": SEED, "steps": steps}


def make_step(graph: Any, optimizer: Any, template: Any, mesh: Any) -> Any:
    """Returns the jitted training step."""
    whole = NamedSharding(mesh, P())
    where = jax.tree.map(lambda x: x.sharding, template)

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        # Whole while they are used. The gradient of this line sums over the devices.
        params = jax.lax.with_sharding_constraint(params, whole)
        return char_lm.loss_of(params, graph, windows)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(where, whole))
    def step(tree: Any, windows: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(tree["params"], windows)
        gradients = jax.lax.with_sharding_constraint(gradients, where["params"])
        updates, state = optimizer.update(gradients, tree["state"], tree["params"])
        params = optax.apply_updates(tree["params"], updates)
        return {"params": params, "state": state}, value

    return step


def batch_at(text: np.ndarray, step: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Returns a step's batch, of which each process makes its own part alone.

    It depends on seed and step alone, so a resumed run sees what it would have seen.
    """
    rng = np.random.default_rng((SEED, step))
    starts = rng.integers(len(text) - char_lm.CONTEXT, size=char_lm.BATCH)
    return jax.make_array_from_callback(
        (char_lm.BATCH, char_lm.CONTEXT + 1),
        NamedSharding(mesh, P("all")),
        lambda part: char_lm.windows_at(text, starts[part[0]]),
    )


def train(options: argparse.Namespace) -> None:
    """Trains, as one of the processes; the first one also reports."""
    corpus, count = char_lm.load(None), jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,))
    graph, optimizer, init, template = set_up(options.steps, len(corpus.alphabet), mesh)
    step = make_step(graph, optimizer, template, mesh)

    def report(line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)

    with Checkpoints(
        options.checkpoints, template, settings_of(options.steps)
    ) as checkpoints:
        done = checkpoints.step or 0
        where = jax.tree.map(lambda x: x.sharding, template)
        tree = checkpoints.restore() if done else jax.jit(init, out_shardings=where)()
        how = f"Resumed from step {done}" if done else "Started"
        report(f"{how}: {jax.process_count()} processes, {count} devices")
        for number in range(done + 1, options.steps + 1):
            tree, loss = step(tree, batch_at(corpus.training, number, mesh))
            # Wait. Before JAX 0.12 queued steps on simulated devices can hang: with too
            # few cores they take the threads that earlier steps need.
            loss.block_until_ready()
            if number % options.every == 0 or number == options.steps:
                checkpoints.save(number, tree)
                report(f"step {number:>5}  loss {loss:.4f}  checkpoint saved")
    params = multihost_utils.process_allgather(tree["params"], tiled=True)
    if not jax.process_index():
        loss = char_lm.evaluate(params, graph, corpus.held_out)
        report(f"Validation loss {loss:.4f}. Checkpoints: {options.checkpoints}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options, checked."""
    parser = Parser("multi_process.py", description=__doc__, formatter_class=AsWritten)
    several = number(int, 1, 1e9)
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    add("--processes", type=several, default=2)
    add("--devices-per-process", type=several, default=4)
    add("--pod", action="store_true", help="join the processes that the pod names")
    add("--process-id", type=number(int, 0, 1e9), help="join, as this one")
    add("--simulated", action="store_true", help=argparse.SUPPRESS)
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add("--steps", type=several, default=300)
    add("--every", type=several, default=100, help="steps between two checkpoints")
    add("--checkpoints", type=Path, default=Path("out", "multi_process"))
    options = parser.parse_args(argv)
    if (options.process_id is None) != (options.coordinator is None):
        parser.error("--process-id and --coordinator go together")
    if options.pod and options.coordinator:
        parser.error("--pod and --coordinator exclude each other")
    devices = options.processes * options.devices_per_process
    if options.coordinator is None and not options.pod and char_lm.BATCH % devices:
        parser.error(
            f"the {char_lm.BATCH} texts of a batch cannot go to {devices} devices"
        )
    if options.process_id is not None and options.process_id >= options.processes:
        parser.error("--process-id must be below --processes")
    if options.process_id == 0:
        host, _, port = options.coordinator.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:  # in vain, and JAX would take a minute or many lines to say so
            socket.create_server((host.strip("[]"), int(port)), family=family).close()
        except (OSError, ValueError, OverflowError) as error:
            parser.error(f"--coordinator {options.coordinator}: {error}")
    try:
        options.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--checkpoints {options.checkpoints}: {error.strerror}")
    return options


def main(argv: list[str]) -> int:
    """Starts the processes, or is one of them; returns the exit status."""
    options = parse(argv)
    if not options.pod and options.coordinator is None:
        return launch([sys.argv[0], *argv, "--simulated"], options.processes)
    if options.simulated:
        end_with_the_launcher()
        simulate(options.devices_per_process)
    work(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
