"""Several processes train one language model, whose parameters lie on all devices.

Each process has devices of its own; JAX joins them, and one program runs on all. The
parameters and the optimizer's state of char_lm.py's model are fully sharded: no device
holds the whole. Checkpoints are saved on the way, and the same command goes on from the
last one, after a kill, too, on as many processes and devices as there are then.

On one machine, with simulated devices, started and watched from here:

    python multi_process.py --processes 2 --devices-per-process 4

If a process dies, the others are ended at once; if this program dies, they end, too.

On real machines start it on each of them, and nothing else changes:

    python multi_process.py --pod                        # TPU pod, Slurm or Open MPI
    python multi_process.py --processes 2 --process-id 0 --coordinator 10.0.0.1:1234

There JAX itself ends the other processes, within seconds after a heartbeat is missed.
The folder of the checkpoints must be one that all machines share.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import char_lm
import checkpoints
import jax
import jaxlib._jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import Progress

from adam3_optax import adam3w, state_shardings

HEARTBEAT = 10  # seconds of silence after which JAX takes a process for dead
JOIN = 60  # seconds within which all must have started
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent dies
HYPERPARAMETERS = {
    "b1": char_lm.B1,
    "b2": char_lm.B2,
    "b3": char_lm.B3,
    "lam": char_lm.LAM,
    "tau": char_lm.TAU,
    "weight_decay": 1e-4,
}
GO_ON = "the same command goes on from the last checkpoint"
START_AGAIN = "there is no checkpoint yet, so the same command starts again"
LOOPBACK = "127.0.0.1"


class MistakeError(ValueError):
    """What is wrong with the command, found after the processes have joined."""


# --- One process among several ------------------------------------------------------


def join(options: argparse.Namespace) -> None:
    """Makes this process one of the run's: after that, JAX knows all devices."""
    within = {"heartbeat_timeout_seconds": HEARTBEAT, "initialization_timeout": JOIN}
    if options.pod:
        jax.distributed.initialize(**within)
        return
    if options.simulated:
        simulate(options.devices_per_process)
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process_id,
        # By default process 0 would listen on every address of its machine.
        coordinator_bind_address=options.coordinator,
        **within,
    )


def simulate(devices: int) -> None:
    """Splits the CPU into devices that speak with other processes over the loopback."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Gloo also writes each connection to the standard output: that is for us alone.
    sys.stdout = open(os.dup(1), "w", closefd=False)  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Gloo would listen where the machine's name points, and JAX has no option for it.
    jaxlib._jax.make_gloo_tcp_collectives = functools.partial(
        jaxlib._jax.make_gloo_tcp_collectives, hostname=LOOPBACK
    )


def fully_sharded(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the sharding of each array: by its first axis that divides evenly."""

    def place(x: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        axes = ["devices" if axis in even[:1] else None for axis in range(x.ndim)]
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(place, shapes)


def shape_in(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Returns what an array is, and where it shall lie."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def make_step(graph: Any, optimizer: Any, where: Any, mesh: Any) -> Any:
    """Returns the jitted training step."""
    whole = NamedSharding(mesh, P())
    results = (where["params"], where["state"], whole)  # lie as they did before

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        # Whole while they are used, one after the other; the gradient of this line
        # sums what the devices found. Between steps each device keeps its part alone.
        params = jax.lax.with_sharding_constraint(params, whole)
        return char_lm.loss_of(params, graph, windows)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=results)
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, windows)
        gradients = jax.lax.with_sharding_constraint(gradients, where["params"])
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def batch_at(
    corpus: char_lm.Corpus, seed: int, step: int, batch: int, mesh: jax.sharding.Mesh
) -> jax.Array:
    """Returns the batch of a step, of which each process makes its own part alone.

    It depends on nothing but seed and step, so a resumed run sees what it would have.
    """
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(len(corpus.training) - char_lm.CONTEXT, size=batch)
    return jax.make_array_from_callback(
        (batch, char_lm.CONTEXT + 1),
        NamedSharding(mesh, P("devices")),
        lambda part: char_lm.windows_at(corpus.training, starts[part[0]]),
    )


def schedule(options: argparse.Namespace) -> optax.Schedule:
    """Returns the learning rate: a warm-up, and a cosine to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        options.lr,
        min(100, options.steps // 10),
        options.steps,
        end_value=options.lr / 10,
    )


def set_up(options: argparse.Namespace, corpus: char_lm.Corpus, mesh: Any) -> Any:
    """Returns the model's graph, the optimizer, init, and the shardings it shall have.

    `init` returns the tree of all that is trained and saved.
    """
    optimizer = adam3w(
        schedule(options),
        third_moment=options.form,
        **HYPERPARAMETERS,
        **char_lm.STATES[options.state],
    )

    def init_params() -> Any:
        return char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(options.seed))

    graph, shapes = nnx.split(nnx.eval_shape(init_params))
    shardings = fully_sharded(shapes, mesh)

    def init() -> Any:
        params = nnx.state(init_params())
        return {"params": params, "state": optimizer.init(params)}

    where = {
        "params": shardings,
        "state": state_shardings(optimizer, shapes, shardings),
    }
    return graph, optimizer, init, where


def describe(options: argparse.Namespace, corpus: char_lm.Corpus) -> dict[str, Any]:
    """Returns all that a run must share with its checkpoints, beside the arrays."""
    text = hashlib.sha256("".join(corpus.alphabet).encode() + corpus.training.tobytes())
    rests = char_lm.STATES[options.state]
    return {
        "optimizer": "adam3w",
        "third_moment": options.form,
        **{f"{x}_dtype": rests.get(f"{x}_dtype", "float32") for x in "mvs"},
        **HYPERPARAMETERS,
        "learning_rate": options.lr,
        "steps": options.steps,
        "batch": options.batch,
        "seed": options.seed,
        "text": text.hexdigest(),
    }


def work(options: argparse.Namespace, corpus: char_lm.Corpus) -> None:
    """Joins the others and trains, while other runs are kept away."""
    join(options)
    if options.batch % jax.device_count():
        raise MistakeError(cannot_split(options, jax.device_count()))
    with checkpoints.locked(options.checkpoints):
        train(options, corpus)


def cannot_split(options: argparse.Namespace, devices: int) -> str:
    """Returns what is wrong with the size of the batch."""
    return f"--batch {options.batch} cannot be split over {devices} devices"


def train(options: argparse.Namespace, corpus: char_lm.Corpus) -> None:
    """Trains, as one of the processes; the first one also reports."""
    devices, first = jax.device_count(), jax.process_index() == 0
    mesh = jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    graph, optimizer, init, where = set_up(options, corpus, mesh)
    description = describe(options, corpus)
    done = checkpoints.latest(options.checkpoints) or 0
    if done:
        template = jax.tree.map(shape_in, jax.eval_shape(init), where)
        tree = checkpoints.restore(options.checkpoints, done, template, description)
    else:  # each device makes its own part, and never holds the whole
        tree = jax.jit(init, out_shardings=where)()
    if first:
        how = f"Resumed from step {done}" if done else "Started"
        print(f"{how}: {jax.process_count()} processes, {devices} devices", flush=True)
    step = make_step(graph, optimizer, where, mesh)
    params, state = tree["params"], tree["state"]
    hidden = not (first and sys.stdout.isatty())
    with Progress(*char_lm.BAR, expand=True, disable=hidden) as bar:
        task = bar.add_task("AdaM3W", total=options.steps, completed=done, latest="")
        for count in range(done + 1, options.steps + 1):
            windows = batch_at(corpus, options.seed, count, options.batch, mesh)
            params, state, loss = step(params, state, windows)
            latest = f"loss {float(loss):.4f}"
            bar.update(task, completed=count, latest=latest)
            if count % options.every == 0 or count == options.steps:
                tree = {"params": params, "state": state}
                checkpoints.save(
                    options.checkpoints, count, tree, description, options.keep
                )
                if first and hidden:
                    print(f"step {count:>5}  {latest}  checkpoint saved", flush=True)
    report(graph, params, corpus, options)


def report(
    graph: Any, params: Any, corpus: char_lm.Corpus, options: argparse.Namespace
) -> None:
    """Prints the loss over the held-out text, which the first process computes."""
    whole = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        loss = float(char_lm.evaluate(whole, graph, corpus.held_out))
        print(f"Validation loss {loss:.4f}. Checkpoints: {options.checkpoints}")


# --- The launcher -------------------------------------------------------------------


def launch(options: argparse.Namespace, argv: list[str]) -> int:
    """Starts the workers, waits for them, and returns the exit status."""
    argv = [*argv, "--simulated", "--coordinator", f"{LOOPBACK}:{free_port()}"]
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    workers: list[subprocess.Popen[bytes]] = []
    failed = None
    with contextlib.ExitStack() as stack:
        logs = [
            stack.enter_context(tempfile.TemporaryFile())
            for _ in range(options.processes)
        ]
        try:
            for i, log in enumerate(logs):
                workers.append(stack.enter_context(start(argv, i, log)))
                threading.Thread(target=watch, args=(workers[i], i, ended)).start()
            in_order = (ended.get() for _ in workers)
            failed = next((i for i in in_order if workers[i].returncode), None)
        except KeyboardInterrupt:
            return stopped(130, f"interrupted; {what_next(options)}")
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.wait()
        if failed is not None:
            return explain(
                failed, workers[failed].returncode, logs[failed], what_next(options)
            )
        for log in logs:
            show(log)
    return 0


def free_port() -> int:
    """Returns a port that nobody listens on yet."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def start(argv: list[str], i: int, log: Any) -> subprocess.Popen[bytes]:
    """Starts a worker, which ends when this process does."""
    return subprocess.Popen(
        [sys.executable, sys.argv[0], *argv, "--process-id", str(i)],
        # On the way to the loopback, a proxy could only be an obstacle.
        env={k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        stdin=subprocess.PIPE,  # it closes when this process ends, in whatever way
        stdout=None if i == 0 else subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches this process alone, which ends all
    )


def watch(worker: subprocess.Popen[bytes], i: int, ended: Any) -> None:
    """Notes that a worker ended, when it does."""
    worker.wait()
    ended.put(i)


def end_with_the_launcher() -> None:
    """Ends this worker as soon as the other end of its standard input is closed."""
    if sys.platform == "linux":  # there also a worker that is stopped, or hangs
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def what_next(options: argparse.Namespace) -> str:
    """Returns what the same command would do now."""
    saved = any(options.checkpoints.glob(f"step_*/{checkpoints.MANIFEST}"))
    return GO_ON if saved else START_AGAIN


def explain(i: int, status: int, log: Any, after: str) -> int:
    """Says how a worker died, and returns the exit status."""
    show(log)
    if status == 2:  # it has said what was wrong with the input
        return 2
    died = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return stopped(1, f"worker {i} ended ({died}), and the others were ended; {after}")


def stopped(status: int, message: str) -> int:
    """Says why the run ended early, and returns the exit status."""
    console = Console()
    if console.is_terminal:  # a progress bar was cut short
        console.show_cursor()
        console.print()
    say(message)
    return status


def show(log: Any) -> None:
    """Passes on what a worker wrote to its standard error."""
    log.seek(0)
    sys.stderr.write(log.read().decode(errors="replace"))


def say(message: str) -> None:
    """Writes a line to the standard error."""
    print(f"multi_process.py: {message}", file=sys.stderr, flush=True)


# --- The command line ---------------------------------------------------------------


def parse(argv: list[str]) -> tuple[argparse.Namespace, char_lm.Corpus]:
    """Returns options and text, checked."""
    parser = char_lm.Parser(
        "multi_process.py", description=__doc__, formatter_class=char_lm.AsWritten
    )
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    several, rate = char_lm.number(int, 1, 1e9), char_lm.number(float, 1e-9, 1e3)
    add("--processes", type=several, default=2)
    add("--devices-per-process", type=several, default=4)
    add("--pod", action="store_true", help="join the processes that the pod names")
    add(
        "--process-id",
        type=char_lm.number(int, 0, 1e9),
        help="join as this one of --processes",
    )
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add("--simulated", action="store_true", help=argparse.SUPPRESS)
    add("--text", type=Path, help="a UTF-8 file; default: Python's help topics")
    add("--steps", type=several, default=300)
    add("--batch", type=several, default=char_lm.BATCH)
    add("--seed", type=char_lm.number(int, 0, 1e9), default=0)
    add("--form", choices=char_lm.FORMS, default=char_lm.FORMS[-1])
    add("--state", choices=char_lm.STATES, default="float32")
    add("--lr", type=rate, default=4e-3)
    add("--checkpoints", type=Path, default=Path("out", "multi_process"))
    add(
        "--every", type=several, default=100, help="steps between; default: %(default)s"
    )
    add("--keep", type=several, default=3, help="how many; default: %(default)s")
    options = parser.parse_args(argv)
    devices = options.processes * options.devices_per_process
    options.local = not options.pod and options.process_id is None
    if options.pod and options.process_id is not None:
        parser.error("--pod names the processes, so --process-id cannot")
    if (options.process_id is None) != (options.coordinator is None):
        parser.error("--process-id and --coordinator go together")
    if options.process_id is not None and options.process_id >= options.processes:
        parser.error("--process-id must be below --processes")
    if options.local and options.batch % devices:
        parser.error(cannot_split(options, devices))
    try:
        corpus = char_lm.load(options.text)
        options.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{options.text}: {error}")
    return options, corpus


def main(argv: list[str] | None = None) -> int:
    """Starts the processes, or is one of them, and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options, corpus = parse(argv)
    if options.local:
        return launch(options, argv)
    if options.simulated:
        end_with_the_launcher()
    try:
        work(options, corpus)
    except Exception as error:
        known = isinstance(error, checkpoints.CheckpointError | MistakeError)
        say(str(error)) if known else traceback.print_exc()
        # At an orderly exit JAX would wait for the others, and they may for this one.
        os._exit(2 if known else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
