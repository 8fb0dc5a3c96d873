"""Several processes train one language model; after a kill the same command goes on.

Each process has devices of its own; JAX joins them, and one program runs on all. The
parameters and the state of char_lm.py's model are split over all devices, and Orbax's
`CheckpointManager` saves them. On one machine, with simulated devices:

    python multi_process.py --processes 2 --devices 4

On real machines start it on each of them, with a folder that all share:

    python multi_process.py --pod                        # TPU pod, Slurm or Open MPI
    python multi_process.py --processes 2 --process-id 0 --coordinator 10.0.0.1:1234
"""

import argparse
import functools
import os
import signal
import socket
import subprocess
import sys
import traceback
from argparse import RawDescriptionHelpFormatter as AsWritten
from pathlib import Path
from threading import Thread
from typing import Any

import char_lm
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib import _jax

from adam3_optax import adam3w, state_shardings


def launch(options: argparse.Namespace) -> None:
    """Starts the processes on this machine, and ends all if one of them fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--launched", "--coordinator", address]
    # No proxy leads to the loopback address.
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    # Their input closes when this process ends, in whatever way; then they end, too.
    own = {"env": env, "stdin": subprocess.PIPE, "process_group": 0}
    numbers = map(str, range(options.processes))
    workers = [subprocess.Popen([*command, "--process-id", i], **own) for i in numbers]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if any(os.wait()[1] for _ in workers):
        sys.exit("Ended early. The same command goes on from the last checkpoint.")


def be_launched() -> None:
    """Ends this process with the launcher, and keeps it on the loopback address."""
    Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    # Gloo would listen where the machine's name points, and write of each device.
    gloo = functools.partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")
    _jax.make_gloo_tcp_collectives = gloo
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def train(options: argparse.Namespace) -> None:
    """Trains, as one of the processes; the first one also reports."""
    text = char_lm.load(None)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else str
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("all"))
    optimizer = adam3w(optax.linear_schedule(0, 2e-3, 30), third_moment="standardized")

    def model() -> Any:
        return char_lm.Transformer(len(text.alphabet), nnx.Rngs(0))

    def init() -> Any:
        return nnx.state(model()), optimizer.init(nnx.state(model()))

    def place(x: Any) -> NamedSharding:  # by the first axis that divides evenly
        even = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        return NamedSharding(mesh, P(*[None] * even[0], "all") if even else P())

    graph, shapes = nnx.split(nnx.eval_shape(model))
    where = jax.tree.map(place, shapes)
    where = where, state_shardings(optimizer, shapes, where)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(where, None))
    def step(tree: Any, windows: jax.Array) -> Any:
        params, state = tree
        loss, gradients = jax.value_and_grad(char_lm.loss_of)(params, graph, windows)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def batch(number: int) -> jax.Array:
        rng = np.random.default_rng(number)  # so a resumed run sees what it would have
        starts = rng.integers(len(text.training) - char_lm.CONTEXT, size=char_lm.BATCH)
        windows = char_lm.windows_at(text.training, starts)
        return jax.make_array_from_callback(windows.shape, split, windows.__getitem__)

    keep = ocp.CheckpointManagerOptions(options.every, max_to_keep=3)
    with ocp.CheckpointManager(options.checkpoints.absolute(), options=keep) as manager:
        tree, done = jax.jit(init, out_shardings=where)(), manager.latest_step() or 0
        if done:
            tree = manager.restore(done, args=ocp.args.StandardRestore(tree))
        say(f"From step {done}: {jax.process_count()} processes, {mesh.size} devices")
        for number in range(done + 1, options.steps + 1):
            tree, loss = step(tree, batch(number))
            # Wait. Before JAX 0.12 queued steps on simulated devices can hang: with too
            # few cores they take the threads that earlier steps need.
            loss.block_until_ready()
            last = number == options.steps
            if manager.save(number, args=ocp.args.StandardSave(tree), force=last):
                say(f"step {number:>5}  loss {loss:.4f}")


def main() -> None:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=AsWritten)
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    add("--processes", type=int, default=2)
    add("--devices", type=int, default=4, help="simulated ones of each process")
    add("--pod", action="store_true", help="join the processes that the pod names")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add("--process-id", type=int, help="join, as this one")
    add("--launched", action="store_true", help=argparse.SUPPRESS)
    add("--steps", type=int, default=150)
    add("--every", type=int, default=75, help="steps between two checkpoints")
    add("--checkpoints", type=Path, default=Path("out", "multi_process"))
    options = parser.parse_args()
    if options.pod:
        options.processes = None
    elif options.coordinator is None:
        return launch(options)
    try:
        if options.launched:
            be_launched()
        # The coordinator listens there alone: by default it would on every address.
        named = options.coordinator, options.processes, options.process_id
        jax.distributed.initialize(*named, coordinator_bind_address=named[0])
        train(options)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # an orderly exit would wait for the others, and they for this one


if __name__ == "__main__":
    main()
