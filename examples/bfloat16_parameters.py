"""Parameters in bfloat16: alone they lose most updates, wrapped they learn as float32.

A small network learns a function with float32 parameters, with bfloat16 parameters
alone, and with `bfloat16_parameters` in its three settings. All see the same batches.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from adam3_optax import (
    adam3w,
    bfloat16_parameters,
    lost_updates_report,
    to_bfloat16_parameters,
)

WIDTH, BATCH, STEPS = 128, 128, 1500
SCHEDULE = optax.cosine_decay_schedule(1e-3, STEPS)
REMAINDERS = {f"remainder {x}": x for x in (None, "int8", "int16")}
WAYS = ("float32", "bfloat16 alone", *REMAINDERS)


def network(params: Any, x: jax.Array) -> jax.Array:
    """Returns the sine of each row's sum, as the network has it."""
    p = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    hidden = jax.nn.gelu(x @ p["in"] + p["bias"])
    return (jax.nn.gelu(hidden @ p["middle"]) @ p["out"])[:, 0]


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    """Returns the mean squared error."""
    return jnp.mean((network(params, x) - jnp.sin(x.sum(axis=1))) ** 2)


def start(way: str) -> tuple[optax.GradientTransformation, Any, Any]:
    """Returns the optimizer, the parameters and the state."""
    keys = jax.random.split(jax.random.key(0), 3)
    params: Any = {
        "in": jax.random.normal(keys[0], (8, WIDTH)) / 8**0.5,
        "bias": jnp.zeros(WIDTH),
        "middle": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5,
        "out": jax.random.normal(keys[2], (WIDTH, 1)) / WIDTH**0.5,
    }
    optimizer = adam3w(SCHEDULE, third_moment=None)
    if way == "bfloat16 alone":
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    if way not in REMAINDERS:
        return optimizer, params, optimizer.init(params)
    optimizer = bfloat16_parameters(optimizer, REMAINDERS[way])
    return optimizer, *to_bfloat16_parameters(params, optimizer.init(params))


def train(way: str) -> tuple[np.ndarray, float]:
    """Returns the losses, and the share of the updates that the parameters lost."""
    optimizer, params, state = start(way)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        x = jax.random.normal(key, (BATCH, 8))
        loss, gradients = jax.value_and_grad(loss_of)(params, x)
        updates, state = optimizer.update(gradients, state, params)
        lost = lost_updates_report(params, updates).overall.lost
        return (optax.apply_updates(params, updates), state), (loss, lost)

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        batches = jax.random.split(jax.random.key(1), STEPS)
        return jax.lax.scan(step, (params, state), batches)[1]

    losses, lost = run(params, state)
    return np.asarray(losses), float(np.nanmean(lost))


def main() -> None:
    """Trains in all ways, prints a table, and draws the losses."""
    path = Path("out", "bfloat16_parameters.png")
    path.parent.mkdir(exist_ok=True)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    panel = figure.subplots()
    print(f"{'parameters':15}  {'loss':>7}  updates lost")
    for i, way in enumerate(WAYS):
        losses, lost = train(way)
        # A wrapped optimizer's updates arrive, however they were rounded.
        shown = "-" if way in REMAINDERS else f"{lost:.1%}"
        print(f"{way:15}  {losses[-200:].mean():.5f}  {shown:>12}")
        smooth = losses.reshape(-1, 50).mean(axis=1)
        # The first is wide, because others lie on it.
        width = 5 if i == 0 else 1.5
        panel.plot(np.arange(25, STEPS, 50), smooth, lw=width, label=way, alpha=0.8)
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_ylabel("loss, mean of 50 steps")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path)
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
