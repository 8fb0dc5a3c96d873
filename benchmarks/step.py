"""Time and memory of an optimizer's step, where the time goes: on the device.

With many leaves many steps run in one program, so that the host's work for a call,
which grows with the number of buffers, is not measured. It is reported apart. All
optimizers live in one process and take turns: each round has all of them, in an order
drawn anew. A ratio is that of two times of one round. On a GPU, and with --profile, a
time is the sum of the durations of the kernels, from `jax.profiler`.

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
from types import SimpleNamespace
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


class Steps:
    """A step at work, in a program of its own or many in one."""

    def __init__(self, step: Any, carry: Any, gradients: list[Any], loop: bool) -> None:
        """Compiles. `carry` is parameters and state, of which copies are made."""

        def steps(params: Any, state: Any, gradients: Any, count: Any) -> Any:
            def body(_: Any, carry: Any) -> Any:
                return step(*carry, gradients)

            return jax.lax.fori_loop(0, count, body, (params, state))

        self.carry, self.loop = jax.tree.map(jnp.copy, carry), loop
        self.gradients = [*gradients]
        donated: Any = jax.jit(steps if loop else step, donate_argnums=(0, 1))
        count = (jnp.int32(1),) * loop
        lowered = donated.lower(*self.carry, gradients[0], *count)
        self.program = lowered.compile(OPTIONS if loop else None)

    def run(self, count: int) -> None:
        """Takes so many steps. The gradients alternate from one run to the next."""
        self.gradients.reverse()
        given = (jnp.int32(count),) * self.loop
        for _ in range(1 if self.loop else count):
            self.carry = self.program(*self.carry, self.gradients[0], *given)
        jax.block_until_ready(self.carry)


def torch_steps(of_jax: Any) -> Any:
    """Returns PyTorch's fused AdamW at work, with gradients of JAX."""
    import torch

    gradients = [torch.tensor(np.asarray(x)) for x in jax.tree.leaves(of_jax)]
    params = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, lr=common.RATE, fused=True)

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.step()

    return SimpleNamespace(run=run)


def gradients_of(shapes: Any, seed: int) -> Any:
    """Returns normal gradients."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(draw(x.shape, np.float32)), shapes)


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


def in_turns(arms: Any, options: argparse.Namespace, profile: bool) -> dict[str, Any]:
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
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    count, leaves = common.elements(shapes), len(jax.tree.leaves(shapes))
    cell = {"tree": tree, "leaves": leaves, "parameters": count}
    arms, steps, counts = {}, {}, {}
    for name, make in common.chosen(options, optimizers(tree), BASELINE).items():
        optimizer = make()
        carry, step = (params, optimizer.init(params)), common.step_of(optimizer)
        loop = tree != "one" and not options.profile
        arms[name], steps[name] = Steps(step, carry, gradients, loop), step
        memory: Any = arms[name].program.memory_analysis()
        counts[name] = {"buffers": len(jax.tree.leaves((carry, shapes)))}
        counts[name] |= {"state": common.nbytes(carry[1]) / count}  # a parameter
        counts[name] |= {"temporary": memory.temp_size_in_bytes / count}
    if options.torch:
        arms[TORCH], counts[TORCH] = torch_steps(gradients[0]), {"state": 8.0}
    times = in_turns(arms, options, options.profile)
    made = []
    for name, found in times.items():
        ratio = np.percentile(found / times[BASELINE], (25, 50, 75)).tolist()
        row = {"measure": "step", **cell, "arm": name, "ratio": ratio}
        made.append(row | {"seconds": found.tolist(), **counts[name]})
    for name in HOST:
        if name in arms:  # what a call costs the host
            of = {"step": steps[name], "empty": empty}
            carry = arms[name].carry
            called = {x: Steps(y, carry, gradients, loop=False) for x, y in of.items()}
            found = {"inside": times[name], **in_turns(called, options, False)}
            row = {"measure": "host", **cell, "arm": name, **counts[name]}
            made.append(row | {x: float(np.median(y)) for x, y in found.items()})
    return made


def empty(params: Any, state: Any, gradients: Any) -> Any:
    """Returns what it gets. The barrier keeps JAX from leaving the program out."""
    return jax.lax.optimization_barrier((params, state))


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
