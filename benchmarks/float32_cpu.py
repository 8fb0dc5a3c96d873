"""Why a float32 step of AdaM3 takes 1.3 to 1.5 times Adam's time on a CPU.

Each way to write the step takes turns with `optax.adam`, in one process, on 8 million
parameters of several shapes. Printed are the ratio of times (median of 9 rounds), the
temporary memory, and the bytes that XLA counts, both a parameter.

    python benchmarks/float32_cpu.py
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam3_optax import adam3

SHAPES = (8 * 2**20,), (4096, 2048), (2048, 4096), (64, 131072), (2896, 2897)
RATE, B1, B2, B3, LAM, EPS = 1e-3, 0.9, 0.999, 0.999, 0.01, 1e-8
Step = Callable[[Any, Any, jax.Array], Any]


def direction(m: Any, v: Any, s: Any, t: Any) -> jax.Array:
    """Returns the update of the cubic form, tau = 1; of Adam with s = 0."""
    root = jnp.sqrt(v / (1 - B2**t)) + EPS
    return (m / (1 - B1**t) + LAM * jnp.clip(s, -1.0, 1.0)) / root


def moments(g: Any, m: Any, v: Any, s: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the new moments."""
    m = B1 * m + (1 - B1) * g
    return m, B2 * v + (1 - B2) * g * g, B3 * s + (1 - B3) * (g - m) ** 3


def adam(p: Any, state: Any, g: jax.Array) -> Any:
    m, v, t = *state[:2], state[2] + 1.0
    m, v, _ = moments(g, m, v, 0.0)
    return p - RATE * direction(m, v, 0.0, t), (m, v, t)


def by_hand(p: Any, state: Any, g: jax.Array) -> Any:
    *old, t = *state[:3], state[3] + 1.0
    new = moments(g, *old)
    return p - RATE * direction(*new, t), (*new, t)


def with_barriers(p: Any, state: Any, g: jax.Array) -> Any:
    m, v, s, t = *state[:3], state[3] + 1.0
    s, m, v = jax.lax.optimization_barrier((moments(g, m, v, s)[2], m, v))
    m, v = jax.lax.optimization_barrier((moments(g, m, v, s)[0], v))
    v = jax.lax.optimization_barrier(moments(g, m, v, s)[1])
    return p - RATE * direction(m, v, s, t), (m, v, s, t)


def moments_stacked(p: Any, state: Any, g: jax.Array) -> Any:
    old, t = state[0], state[1] + 1.0
    new = moments(g, *old)
    return p - RATE * direction(*new, t), (jnp.stack(new), t)


def all_stacked(p: Any, state: Any, g: jax.Array) -> Any:
    (p, *old), t = p, state + 1.0
    new = moments(g, *old)
    return jnp.stack([p - RATE * direction(*new, t), *new]), t


def as_complex_numbers(p: Any, state: Any, g: jax.Array) -> Any:
    mv, t = state[0], state[1] + 1.0
    m, v, s = moments(g, mv.real, mv.imag, p.imag)
    p = jax.lax.complex(p.real - RATE * direction(m, v, s, t), s)
    return p, (jax.lax.complex(m, v), t)


def of_optax(optimizer: optax.GradientTransformation) -> Step:
    def step(p: Any, state: Any, g: jax.Array) -> Any:
        updates, state = optimizer.update(g, state, p)
        return optax.apply_updates(p, updates), state

    return step


def steps(shape: tuple[int, ...]) -> Iterator[tuple[str, Step, Any]]:
    """Yields name, step, and what it starts from."""

    def zeros(*more: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(more + shape, dtype)

    makers = (
        ("optax.adam", optax.adam(RATE)),
        ("the package, cubic", adam3(RATE)),
        ("the package, None", adam3(RATE, third_moment=None)),
    )
    for name, optimizer in makers:
        yield name, of_optax(optimizer), (zeros(), optimizer.init(zeros()))
    of_three = (zeros(), zeros(), zeros(), 0.0)
    yield "Adam by hand", adam, (zeros(), (zeros(), zeros(), 0.0))
    yield "cubic by hand", by_hand, (zeros(), of_three)
    copies = jax.tree.map(lambda x: x + 0, of_three)
    yield "one moment after the other", with_barriers, (zeros(), copies)
    yield "m, v, s in one array", moments_stacked, (zeros(), (zeros(3), 0.0))
    yield "parameter and moments in one", all_stacked, (zeros(4), 0.0)
    pair = functools.partial(zeros, dtype=jnp.complex64)
    yield "pairs as complex numbers", as_complex_numbers, (pair(), (pair(), 0.0))


def main() -> None:
    """Prints a row for each shape and way."""
    for shape in SHAPES:
        g = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        runs = {}
        for name, step, start in steps(shape):
            start = jax.tree.map(jnp.asarray, start)
            donated: Any = jax.jit(step, donate_argnums=(0, 1))
            runs[name] = [donated.lower(*start, g).compile(), start, []]
        for _ in range(10):
            for run in runs.values():
                began = time.perf_counter()
                for _ in range(3):
                    run[1] = run[0](*run[1], g)
                jax.block_until_ready(run[1])
                run[2].append(time.perf_counter() - began)
        base = np.array(runs["optax.adam"][2][1:])  # the first one warms up
        for name, (compiled, _, seconds) in runs.items():
            ratio = np.median(np.array(seconds[1:]) / base)
            temporary = compiled.memory_analysis().temp_size_in_bytes / g.size
            moved = compiled.cost_analysis()["bytes accessed"] / g.size
            print(f"{shape!s:14} {name:30} {ratio:5.2f} {temporary:5.1f} {moved:5.0f}")


if __name__ == "__main__":
    main()
