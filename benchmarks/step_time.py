"""Time of an optimizer step, of its compilation, and of eager updates, against Adam's.

Steps are jitted, donated and warm, with `apply_updates`. All optimizers live in one
process and take turns: each round gives every one of them a window of steps, in an
order drawn anew. A ratio is that of two windows in one round, so that drift of the
machine cancels. Results are added to results.jsonl as they come; Ctrl-C keeps them.

    python benchmarks/step_time.py --trees one large --only cubic
"""

import argparse
import functools
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import common
import pytorch_cpu
from common import BASELINE

MEASURES = ("step", "compile", "eager")
ROUNDS, COMPILE_ROUNDS, EAGER_ROUNDS = 9, 3, 5
MOST_STEPS = 1000  # in a window
ENOUGH_LEAVES = 50  # for a compile time to say what another leaf costs
COPY = "copy"
QUICK_TREES = ("one", "small")
FLATTENED_TREES = ("small", "tiny")
# Unless --dtypes asks for them: they would take minutes to compile, and the time of
# small leaves is hardly that of their bytes.
LEFT_OUT = (("small", "bfloat16"), ("tiny", "bfloat16"))
COMPILED_ARMS = (
    BASELINE,
    "adam3 cubic, float32",
    "adam3 cubic, bfloat16 m, s",
    "adam3 cubic, float8",
    "adam3 stabilized, float32",
    "adam3 standardized, float32",
    "optax.flatten(adam3 cubic, float32)",
)


class Report(NamedTuple):
    """Where to say what happens."""

    say: Callable[[str], None]  # in a line that stays
    now: Callable[[str], None]  # beside the progress bar


@dataclass
class Arm:
    """Something that takes steps."""

    advance: Callable[[int], None]  # takes so many, and returns when they are done
    counts: dict[str, Any] = field(default_factory=dict)
    steps: int = 1  # in a window


# --- Compiled steps -----------------------------------------------------------------


class Steps:
    """The optimizers on one tree, which share one set of parameters."""

    def __init__(self, tree: Any) -> None:
        """Draws parameters, and two gradients that alternate so that g - m stays."""
        key, *keys = jax.random.split(jax.random.key(0), 3)
        self.params = drawn(key, tree)
        self.gradients = tuple(drawn(key, tree) for key in keys)
        self.parameters = common.elements(tree)
        self.taken = 0

    def arm(self, optimizer: Any) -> Arm:
        """Compiles the step of an optimizer."""
        state = optimizer.init(self.params)
        step = common.donated_step(optimizer)
        began = time.perf_counter()
        lowered = step.lower(self.params, state, self.gradients[0])
        traced = time.perf_counter()
        compiled = lowered.compile()  # of which the call below makes use
        ended = time.perf_counter()

        def advance(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                self.taken += 1
                gradients = self.gradients[self.taken % 2]
                self.params, state = step(self.params, state, gradients)
            jax.block_until_ready((self.params, state))

        bytes_ = {
            "state_bytes": common.nbytes(state),
            # Gradient, parameter and state are read; the latter two are written.
            "necessary_bytes": common.nbytes((self.gradients[0], self.params, state))
            + common.nbytes((self.params, state)),
            **common.compiled_counts(compiled),
        }
        return Arm(
            advance,
            {
                **self.per_parameter(bytes_),
                "trace_seconds": traced - began,
                "compile_seconds": ended - traced,
            },
        )

    def copy(self) -> Arm:
        """Compiles a copy of the gradients into memory that is there already."""

        @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
        def step(target: Any, source: Any) -> Any:
            return jax.tree.map(jnp.copy, source)

        target = jax.tree.map(jnp.zeros_like, self.gradients[0])
        compiled = step.lower(target, self.gradients[0]).compile()

        def advance(steps: int) -> None:
            nonlocal target
            for i in range(steps):
                target = step(target, self.gradients[i % 2])
            jax.block_until_ready(target)

        bytes_ = {
            "state_bytes": 0,
            "necessary_bytes": 2 * common.nbytes(self.gradients[0]),
            **common.compiled_counts(compiled),
        }
        return Arm(advance, self.per_parameter(bytes_))

    def torch(self) -> dict[str, Arm]:
        """Returns PyTorch's optimizers on the same gradients."""
        gradients = tuple(
            [np.asarray(g) for g in jax.tree.leaves(tree)] for tree in self.gradients
        )
        made = pytorch_cpu.arms(gradients, common.RATE)
        return {name: Arm(advance) for name, advance in made.items()}

    def per_parameter(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Returns counts of bytes divided by the parameters."""
        return {
            name: None if count is None else count / self.parameters
            for name, count in counts.items()
        }


def drawn(key: jax.Array, tree: Any) -> Any:
    """Returns a tree of normal numbers; leaf by leaf, to compile little."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(key, len(leaves))
    arrays = [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(jax.block_until_ready(arrays))


def time_steps(
    tree: str,
    dtype: str,
    options: argparse.Namespace,
    record: common.Record,
    leaf_seconds: dict[str, float],
    report: Report,
) -> None:
    """Measures every optimizer on one tree."""
    shapes = common.tree_of(tree, options.sizes, dtype)
    leaves, parameters = len(jax.tree.leaves(shapes)), common.elements(shapes)
    name = f"{common.label(tree, leaves, parameters)}, {dtype}"
    every = common.optimizers()
    if tree in FLATTENED_TREES:
        every |= common.flattened()
    steps = Steps(shapes)
    arms = {COPY: steps.copy()}
    for arm, make in common.chosen(options, every).items():
        expected = leaves * leaf_seconds.get(arm, 0.0)
        if expected > options.compile_limit and arm != BASELINE:
            report.say(
                f"{name}: {arm} is left out, for compiling it would take about "
                f"{expected:.0f} s (--compile-limit {options.compile_limit:g})"
            )
            continue
        report.now(f"{name}: compiling {arm}")
        arms[arm] = steps.arm(make())
        if leaves >= ENOUGH_LEAVES:
            counts = arms[arm].counts
            seconds = counts["trace_seconds"] + counts["compile_seconds"]
            leaf_seconds[arm] = seconds / leaves
    if options.torch and dtype == "float32":
        arms |= {x: arm for x, arm in steps.torch().items() if options.only in x}
    report.now(f"{name}: {len(arms)} arms take turns")
    for each in arms.values():
        each.steps = calibrated(each.advance, options.window)
    rounds: list[dict[str, float]] = []
    cell = {"tree": tree, "leaves": leaves, "parameters": parameters, "dtype": dtype}
    try:
        in_turns(arms, options.rounds, rounds)
    finally:
        write(record, {"measure": "step", **cell}, arms, rounds)
    adam = common.quartiles([x[BASELINE] for x in rounds])[1]
    report.say(f"{name}: {len(arms)} arms, {BASELINE} {adam * 1e3:.3g} ms a step")


def calibrated(advance: Callable[[int], None], window: float) -> int:
    """Returns how many steps fill a window of time; warms up on the way."""
    steps, seconds = 1, 0.0
    advance(1)
    while steps < MOST_STEPS and (seconds := timed(advance, steps)) < window / 4:
        steps *= 2
    per_step = max(seconds / steps, 1e-9)
    return max(1, min(MOST_STEPS, math.ceil(window / per_step)))


def timed(advance: Callable[[int], None], steps: int) -> float:
    """Returns the seconds that steps take."""
    began = time.perf_counter()
    advance(steps)
    return time.perf_counter() - began


def in_turns(arms: dict[str, Arm], count: int, rounds: list[dict[str, float]]) -> None:
    """Adds to `rounds` the seconds a step, by arm, of complete rounds alone."""
    order = list(arms)
    shuffle = random.Random(0).shuffle
    for _ in range(count):
        shuffle(order)  # each arm follows now this one, now that one
        seconds = {x: timed(arms[x].advance, arms[x].steps) for x in order}
        rounds.append({x: seconds[x] / arms[x].steps for x in order})


def write(
    record: common.Record,
    cell: dict[str, Any],
    arms: dict[str, Arm],
    rounds: list[dict[str, float]],
) -> None:
    """Writes a line for every arm: its windows and, round by round, its ratios."""
    if not rounds:
        return
    for name, arm in arms.items():
        seconds = [x[name] for x in rounds]
        line: dict[str, Any] = {"arm": name, "steps": arm.steps, "seconds": seconds}
        line["step_seconds"] = common.quartiles(seconds)
        line["ratio"] = common.quartiles([x[name] / x[BASELINE] for x in rounds])
        if COPY in arms and arm.counts:
            moved, copied = (arms[x].counts["necessary_bytes"] for x in (name, COPY))
            speeds = [moved / x[name] for x in rounds]
            line["bytes_a_second"] = common.quartiles(
                [speed * cell["parameters"] for speed in speeds]
            )
            line["share_of_copy"] = common.quartiles(
                [y * x[COPY] / copied for x, y in zip(rounds, speeds, strict=True)]
            )
        record.append({**cell, **line, **arm.counts})


# --- Tracing and compiling, and eager updates ---------------------------------------


def time_compiling(
    options: argparse.Namespace,
    record: common.Record,
    report: Report,
) -> None:
    """Measures trace and compile time; optimizer and jit are made anew each time."""
    makes = common.optimizers() | common.flattened()
    makes = common.chosen(options, {x: makes[x] for x in COMPILED_ARMS})
    tree = common.tree_of("compiled", options.sizes, "float32")
    few = common.tree_of("warm-up", options.sizes, "float32")
    arms, parts = {}, []
    for name, make in makes.items():

        def advance(_: int, name: str = name, make: Any = make) -> None:
            parts.append((name, *compile_time(make(), tree)))

        compile_time(make(), few)  # what jax.numpy traces once a process is not ours
        arms[name] = Arm(advance)
    report.now(f"compiling {len(tree)} leaves")
    rounds: list[dict[str, float]] = []
    try:
        in_turns(arms, min(options.rounds, COMPILE_ROUNDS), rounds)
    finally:
        for name, arm in arms.items():
            mine = [x[1:] for x in parts if x[0] == name][: len(rounds)]
            if mine:
                traces, compiles = zip(*mine, strict=True)
                arm.counts = {"trace": list(traces), "compile": list(compiles)}
        cell = {"tree": "compiled", "leaves": len(tree), "dtype": "float32"}
        cell["parameters"] = common.elements(tree)
        write(record, {"measure": "compile", **cell}, arms, rounds)
    report.say(f"compile time of {len(tree)} leaves: {len(arms)} arms")


def compile_time(optimizer: Any, tree: Any) -> tuple[float, float]:
    """Returns the seconds of tracing and lowering, and of compiling."""
    state = jax.eval_shape(optimizer.init, tree)
    step = common.donated_step(optimizer)
    began = time.perf_counter()
    lowered = step.lower(tree, state, tree)
    traced = time.perf_counter()
    lowered.compile()
    return traced - began, time.perf_counter() - traced


def time_eager(
    options: argparse.Namespace, record: common.Record, report: Report
) -> None:
    """Measures `optimizer.update` without jit, where the cost is that of dispatch."""
    shapes = common.tree_of("small", options.sizes, "float32")
    gradients = drawn(jax.random.key(0), shapes)
    every = common.optimizers() | common.flattened()
    arms = {
        name: Arm(eager(make(), gradients))
        for name, make in common.chosen(options, every).items()
    }
    report.now(f"eager updates of {len(shapes)} leaves")
    for arm in arms.values():
        arm.advance(1)
    rounds: list[dict[str, float]] = []
    cell = {"tree": "small", "leaves": len(shapes), "dtype": "float32"}
    cell["parameters"] = common.elements(shapes)
    try:
        in_turns(arms, min(options.rounds, EAGER_ROUNDS), rounds)
    finally:
        write(record, {"measure": "eager", **cell}, arms, rounds)
    report.say(f"eager update of {len(shapes)} leaves: {len(arms)} arms")


def eager(optimizer: optax.GradientTransformation, gradients: Any) -> Any:
    """Returns a function that takes eager updates."""
    state = optimizer.init(gradients)

    def advance(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            updates, state = optimizer.update(gradients, state, gradients)
            jax.block_until_ready((updates, state))

    return advance


# --- The command line ---------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns checked options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser("step_time.py", description=__doc__, formatter_class=raw)
    common.add_common(parser)
    add = parser.add_argument
    add(
        "--trees",
        nargs="+",
        choices=common.TREES,
        help=f"default: all, and {' and '.join(QUICK_TREES)} with --quick",
    )
    add("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    add(
        "--rounds",
        type=common.number(int, 1, 10**6),
        help=f"default: {ROUNDS}, and 3 with --quick; of compiling at most "
        f"{COMPILE_ROUNDS}, of eager updates {EAGER_ROUNDS}",
    )
    add(
        "--window",
        type=common.number(float, 1e-6, 1e3),
        help="seconds an optimizer gets in a round; default: .1, and .002 with --quick",
    )
    add(
        "--width",
        type=common.number(int, 64, 2**16, 64),
        help=f"of the transformer; default: {common.Sizes().width}",
    )
    add(
        "--compile-limit",
        type=common.number(float, 0, math.inf),
        default=30.0,
        help="seconds; leave an optimizer out of a tree where the trees before promise "
        "that it compiles longer; default: %(default)g",
    )
    options = parser.parse_args(argv)
    common.settle(parser, options, pytorch_cpu.NAMES)
    options.default_dtypes = options.dtypes is None
    options.trees = options.trees or (QUICK_TREES if options.quick else common.TREES)
    options.dtypes = options.dtypes or common.DTYPES[: 1 if options.quick else 2]
    options.rounds = options.rounds or (3 if options.quick else ROUNDS)
    options.window = options.window or (0.002 if options.quick else 0.1)
    if options.width:
        options.sizes = options.sizes._replace(width=options.width)
    options.error = parser.error
    return options


def jobs_of(
    options: argparse.Namespace, record: common.Record
) -> list[Callable[[Report], None]]:
    """Returns what there is to measure, trees of few leaves first."""
    leaf_seconds: dict[str, dict[str, float]] = {x: {} for x in common.DTYPES}
    jobs: list[Callable[[Report], None]] = []
    if "step" in options.measures:
        cells = [(t, d) for t in common.TREES for d in options.dtypes]
        if options.default_dtypes:
            cells = [x for x in cells if x not in LEFT_OUT]
        jobs += [
            functools.partial(time_steps, t, d, options, record, leaf_seconds[d])
            for t, d in cells
            if t in options.trees
        ]
    if "compile" in options.measures:
        jobs.append(functools.partial(time_compiling, options, record))
    if "eager" in options.measures:
        jobs.append(functools.partial(time_eager, options, record))
    return jobs


def main(argv: list[str] | None = None) -> int:
    """Measures, and returns the exit status."""
    options = parse(argv)
    console = Console(highlight=False)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    known = common.facts()
    try:
        record = common.Record(options.out, known)
    except ValueError as error:
        options.error(str(error))
    on_cpu = known["platform"] == "cpu"
    options.torch = on_cpu and known["torch"]
    if "step" in options.measures and not options.torch:
        why = "not installed" if on_cpu else "measured beside JAX on a CPU alone"
        say(f"PyTorch is left out: {why}.")
    try:
        with common.bar(console) as progress:
            task = progress.add_task("")
            now = functools.partial(progress.update, task, refresh=True)
            report = Report(say, lambda text: now(description=text))
            for job in progress.track(jobs_of(options, record), task_id=task):
                job(report)
    except KeyboardInterrupt:
        say(f"Interrupted. What was measured is in {record.path}")
        return 130
    say(f"Record: {record.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
