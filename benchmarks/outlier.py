"""One outlier in a row of int8 state: how long its neighbours stand still.

The law of gradients, from one seed: independent normal numbers of mean 0.5 and mean
square 1, in a leaf of 64 rows of 17 elements. After 1,000 such steps, which settle the
moments, the first element of every row gets one gradient of the given size, the spike.
All before and after it is of the law, and the same for every setting. The table has
the mean |u| of the other 16 elements of each row, u the update with learning rate 1,
some steps after the spike; when, averaged over 100 steps, it was last below half of
float32's; and the largest |u| of any element from the spike on.

The rule of thumb is not fitted. After a spike of size x the largest sqrt(v) of its row
is sqrt(1-b2)·x, code 255, and falls as b2^(t/2). The neighbours have sqrt(v) = 1, and
code 1 is theirs again after 2·ln(sqrt(1-b2)·x/255)/(1-b2) steps.

    python benchmarks/outlier.py
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam3_optax

INT8 = dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "int8")
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": dict.fromkeys(INT8, "bfloat16"),
    "int8": INT8,
    "int8, clipped": INT8,
}
STEPS = (10, 100, 1_000, 5_000, 10_000, 30_000)
SPIKES = (1e2, 1e4, 1e6, 1e10)
BEFORE = 1_000  # steps before the spike
WINDOW = 100  # steps over which |u| is averaged to find when it is half
SHAPE = (64, 17)


def optimizer_of(name: str, **options: Any) -> Any:
    """Returns the optimizer of a setting, with learning rate 1."""
    adam3 = adam3_optax.adam3(1.0, **options, **SETTINGS[name])
    if "clipped" in name:
        return optax.chain(optax.clip_by_global_norm(1.0), adam3)
    return adam3


def gradient(key: jax.Array, t: jax.Array, spike: jax.typing.ArrayLike) -> jax.Array:
    """Returns the gradient of step t, counted from 1."""
    noise = jax.random.normal(jax.random.fold_in(key, t), SHAPE)
    is_struck = (t == BEFORE + 1) & (jnp.arange(SHAPE[1])[None] == 0)
    return jnp.where(is_struck, spike, 0.5 + 0.75**0.5 * noise)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sizes(optimizer: Any, steps: int, spike: float, seed: int = 0) -> Any:
    """Returns the neighbours' mean |u|, and every element's largest, after the spike.

    Both are arrays of one number a step, the first that of the spike itself.
    """
    params, key = jnp.zeros(SHAPE), jax.random.key(seed)

    def body(state: Any, t: jax.Array) -> Any:
        updates, state = optimizer.update(gradient(key, t, spike), state, params)
        size = jnp.abs(updates)
        return state, (jnp.mean(size[:, 1:]), jnp.max(size))

    _, (mean, largest) = jax.lax.scan(
        body, optimizer.init(params), jnp.arange(1, BEFORE + steps + 2)
    )
    return mean[BEFORE:], largest[BEFORE:]


def steps_to_half(mean: jax.Array, of: jax.Array) -> int:
    """Returns the steps until |u|, averaged over a window, stays above half of `of`."""
    count = len(mean) // WINDOW
    mean, of = (np.asarray(x)[: count * WINDOW].reshape(count, -1) for x in (mean, of))
    below = np.flatnonzero(mean.mean(1) < of.mean(1) / 2)
    return int(below[-1] + 1) * WINDOW if below.size else 0


def rule_of_thumb(spike: float, b2: float) -> float:
    """Returns the steps after which the neighbours' sqrt(v) is code 1 again."""
    return max(0.0, 2 * np.log((1 - b2) ** 0.5 * spike / 255) / (1 - b2))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", default="cubic", help="of the third moment")
    parser.add_argument("--b2", type=float, default=0.999)
    parser.add_argument("--quick", action="store_true", help="100 steps alone")
    options = parser.parse_args()
    marks = [t for t in STEPS if not options.quick or t <= 100]
    head = "".join(f" {t:,} |" for t in marks)
    print(f"| spike | state |{head} steps to half | rule of thumb | largest |")
    print("|---|---|" + "---|" * (len(marks) + 3))
    b = {"b2": options.b2, "b3": min(0.999, options.b2), "third_moment": options.form}
    optimizers = {name: optimizer_of(name, **b) for name in SETTINGS}
    for spike in SPIKES:
        full: Any = None
        for name, optimizer in optimizers.items():
            mean, largest = sizes(optimizer, marks[-1], spike, options.seed)
            full = mean if full is None else full
            cells = [f"{mean[t]:.{3 if mean[t] > 5e-4 else 5}f}" for t in marks]
            rule = f"{rule_of_thumb(spike, options.b2):,.0f}" if name == "int8" else ""
            half = steps_to_half(mean, full)
            more = "> " if half >= marks[-1] else ""
            cells += [f"{more}{half:,}", rule, f"{largest.max():.1f}"]
            print(f"| {spike:,.0f} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
