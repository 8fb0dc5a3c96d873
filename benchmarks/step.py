"""Time and memory of an optimizer's step, where the time goes: on the device.

Many steps run in one program, so that the host's work for a call, which grows with the
number of buffers, is not measured. It is reported apart. XLA may neither take work out
of the loop nor compile it in another way than a step alone. All optimizers live in one
process and take turns: each round has all of them, in an order drawn anew. A ratio is
that of two times of one round. On a GPU, and with --profile, a time is the sum of the
durations of the kernels, from `jax.profiler`. Ctrl-C keeps the trees that are done.

    python benchmarks/step.py --trees one gpt2 --only cubic
"""

import argparse
import importlib.util
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent))
import common

from adam3_optax import adam3w, bfloat16_state

BASELINE = "optax.adamw"
TORCH = "torch AdamW, fused"
HOST = (BASELINE, "adam3w cubic, float32", "adam3w cubic, bfloat16")
# The matrix's side, and the width and the layers of GPT-2.
SIZES = {"tiny": (64, 8, 1), "cpu": (4096, 256, 6), "gpu": (16384, 768, 12)}
# Without these a loop is compiled as a step is: nothing is computed before it once for
# all steps, and on a CPU no small loop becomes one program of one thread.
PASSES = (
    "while-loop-invariant-code-motion",
    "while-loop-expensive-invariant-code-motion",
)
PASSES += ("small-while-loop-hoisting",)
OPTIONS: Any = {"xla_disable_hlo_passes": ",".join(PASSES)}
ON_GPU = jax.default_backend() == "gpu"


def optimizers(tree: str) -> common.Makers:
    """Returns functions that make the optimizers of a tree: fewer, if it is large."""
    rate, mu = common.RATE, {"mu_dtype": jnp.bfloat16}
    made: common.Makers = {
        BASELINE: lambda: optax.adamw(rate),
        "optax.adamw, mu bfloat16": lambda: optax.adamw(rate, **mu),
        "optax.contrib.ademamix": lambda: optax.contrib.ademamix(rate),
        **common.ours(adam3w),
    }
    if tree == "one":
        made["bfloat16_state(optax.adamw)"] = lambda: bfloat16_state(optax.adamw(rate))
        return made | common.peers(fused=ON_GPU)
    if tree == "small":
        made["optax.flatten(optax.adamw)"] = lambda: optax.flatten(optax.adamw(rate))
    few = ("optax", "adam3w cubic")
    return {x: make for x, make in made.items() if x.startswith(few)}


# --- What takes turns ---------------------------------------------------------------


class Steps:
    """An optimizer at work, many steps in one program."""

    def __init__(self, optimizer: Any, shapes: Any, gradients: list[Any]) -> None:
        """Compiles, and starts from zeros."""
        step = common.step_of(optimizer)

        def steps(params: Any, state: Any, gradients: Any, count: Any) -> Any:
            def body(_: Any, carry: Any) -> Any:
                return step(*carry, gradients)

            return jax.lax.fori_loop(0, count, body, (params, state))

        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.carry: Any = params, optimizer.init(params)
        self.gradients = [*gradients]
        donated = jax.jit(steps, donate_argnums=(0, 1))
        lowered = donated.lower(*self.carry, gradients[0], jnp.int32(1))
        self.program = lowered.compile(OPTIONS)
        memory: Any = self.program.memory_analysis()
        count = common.elements(shapes)
        self.counts = {  # bytes are those a parameter
            "buffers": len(jax.tree.leaves((self.carry, shapes))),
            "state": common.nbytes(self.carry[1]) / count,
            "temporary": memory.temp_size_in_bytes / count,
        }

    def run(self, count: int) -> None:
        """Takes so many steps. The gradients alternate from one run to the next."""
        self.gradients.reverse()
        given = *self.carry, self.gradients[0], jnp.int32(count)
        self.carry = jax.block_until_ready(self.program(*given))


class Calls:
    """A program that is called for each step."""

    def __init__(self, program: Callable[..., Any], like: Steps) -> None:
        """Compiles it for the arguments of a step."""
        self.carry = jax.tree.map(jnp.copy, like.carry)
        self.gradients = like.gradients[0]
        donated = jax.jit(program, donate_argnums=(0, 1))
        self.program = donated.lower(*self.carry, self.gradients).compile()

    def run(self, count: int) -> None:
        """Calls it so often."""
        for _ in range(count):
            self.carry = self.program(*self.carry, self.gradients)
        jax.block_until_ready(self.carry)


class TorchSteps:
    """PyTorch's fused AdamW."""

    def __init__(self, of_jax: Any) -> None:
        """Starts from zeros, with gradients of JAX."""
        import torch

        gradients = [torch.tensor(np.asarray(x)) for x in jax.tree.leaves(of_jax)]
        params = [torch.zeros_like(g, requires_grad=True) for g in gradients]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        self.step = torch.optim.AdamW(params, lr=common.RATE, fused=True).step
        self.counts = {"state": 8.0}

    def run(self, count: int) -> None:
        """Takes so many steps."""
        for _ in range(count):
            self.step()


def gradients_of(shapes: Any, seed: int) -> Any:
    """Returns normal gradients."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(draw(x.shape, np.float32)), shapes)


# --- Times --------------------------------------------------------------------------


def kernels(run: Callable[[int], None], steps: int) -> list[float]:
    """Returns the seconds of each kernel of these steps, by the profiler of JAX."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (path,) = Path(folder).glob("**/*.xplane.pb")
        planes = [*jax.profiler.ProfileData.from_file(str(path)).planes]
    on_gpu = [x for x in planes if x.name.startswith("/device:GPU")]
    # A GPU's other lines tell the same again, by operation and by program.
    lines = [x for y in on_gpu for x in y.lines if x.name.startswith("Stream")]
    lines = lines or [x for y in planes for x in y.lines]
    return [x.duration_ns / 1e9 for y in lines for x in y.events if is_kernel(x)]


def is_kernel(event: Any) -> bool:
    """Returns whether an event is an operation of XLA, and none that holds others."""
    if event.name.startswith(("while", "call", "conditional", "end: ", "Memcpy")):
        return False
    with warnings.catch_warnings():  # of JAX's own type, which has no module
        warnings.simplefilter("ignore", DeprecationWarning)
        return "hlo_op" in dict(event.stats)


def seconds(run: Callable[[int], None], steps: int, profile: bool) -> float:
    """Returns the time of one of these steps."""
    if profile:
        return sum(kernels(run, steps)) / steps
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


def in_turns(
    arms: dict[str, Any], options: argparse.Namespace, profile: bool
) -> dict[str, Any]:
    """Returns the times of a step, one of each round."""
    steps: dict[str, int] = {}
    for name, arm in arms.items():
        arm.run(1)  # warm
        steps[name] = max(1, round(options.window / seconds(arm.run, 1, False)))
    rounds = []
    for _ in range(options.rounds):
        order = random.sample([*arms], len(arms))
        rounds.append({x: seconds(arms[x].run, steps[x], profile) for x in order})
    return {name: np.array([x[name] for x in rounds]) for name in arms}


def rows(tree: str, shapes: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what was measured of a tree, a row for each optimizer."""
    gradients = [gradients_of(shapes, seed) for seed in (1, 2)]
    makers = common.chosen(options, optimizers(tree), BASELINE)
    arms: Any = {x: Steps(make(), shapes, gradients) for x, make in makers.items()}
    if options.torch:
        arms[TORCH] = TorchSteps(gradients[0])
    times = in_turns(arms, options, options.profile)
    count, leaves = common.elements(shapes), len(jax.tree.leaves(shapes))
    cell = {"tree": tree, "leaves": leaves, "parameters": count}
    made = []
    for name, found in times.items():
        ratio = np.percentile(found / times[BASELINE], (25, 50, 75)).tolist()
        row = {"measure": "step", **cell, "arm": name, "ratio": ratio}
        made.append(row | {"seconds": found.tolist(), **arms[name].counts})
    for name in HOST if tree != "one" else ():
        if name in arms:  # what a call costs the host
            # The barrier keeps JAX from leaving an empty program out.
            empty = lambda p, s, g: jax.lax.optimization_barrier((p, s))  # noqa: E731
            of = {"step": common.step_of(makers[name]()), "empty": empty}
            calls = {x: Calls(program, arms[name]) for x, program in of.items()}
            found = {"inside": times[name], **in_turns(calls, options, False)}
            row = {"measure": "host", **cell, "arm": name, **arms[name].counts}
            made.append(row | {x: float(np.median(y)) for x, y in found.items()})
    return made


def main(argv: list[str] | None = None) -> None:
    """Measures, and writes a record."""
    parser = common.Parser("step.py", __doc__, "speed")
    add = parser.add_argument
    trees = [*common.trees("float32")]
    add("--trees", nargs="+", choices=trees, default=trees)
    add("--size", choices=SIZES, help="of the trees; by default as fits the device")
    add("--rounds", type=int, default=9)
    add("--window", type=float, default=0.2, help="seconds of a time, at least a step")
    add("--profile", action="store_true", help="sum kernels' times, as on a GPU")
    options = parser.parse_args(argv)
    parser.check_only(options.only, [x for tree in trees for x in optimizers(tree)])
    options.profile |= ON_GPU
    options.torch = importlib.util.find_spec("torch") and not ON_GPU
    sizes = SIZES[options.size or ("gpu" if ON_GPU else "cpu")]
    made = common.trees("float32", *sizes)
    each = (x for y in options.trees for x in rows(y, made[y](), options))
    parser.record(options.out, each)


if __name__ == "__main__":
    main()
