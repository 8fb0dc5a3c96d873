"""Draws where training settles under skewed noise, and what b3 > sqrt(b2) does.

    python studies/mechanism.py

It trains x²/2, with noise of variance 1 and skewness 1 in the gradient, for a minute.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from adam3_optax import adam3, scale_by_adam3

FILE = Path(__file__).resolve().parents[1] / "docs" / "images" / "mechanism.png"
LAMS, TAUS = (-0.1, 0.0, 0.01, 0.03, 0.1, 0.3), (0.5, 10.0)
B2 = 0.95  # of the isolated gradient
B3S = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)


@jax.jit
def settles(lam: jax.Array, tau: jax.Array) -> jax.Array:
    """Returns the mean of 512 elements after 10,000 steps at a falling rate."""
    form: Any = {"b3": 0.999, "lam": lam, "tau": tau, "third_moment": "standardized"}
    rate = optax.schedules.cosine_decay_schedule(1e-2, 10_000)
    rule = adam3(rate, 0.9, 0.999, **form)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        x, state = carry
        # The sum of four exponential variables: skewness 2 / sqrt(4).
        noise = (jax.random.exponential(key, (4, 512)).sum(axis=0) - 4.0) / 2.0
        update, state = rule.update(x + noise, state)
        return (x + update, state), None

    x, keys = jnp.zeros(512), jax.random.split(jax.random.key(0), 10_000)
    return jax.lax.scan(step, (x, rule.init(x)), keys)[0][0].mean()


def closed_form(lam: float, tau: float, b1: float = 0.9) -> float:
    """Returns where the mean update is 0: x = -lam·sqrt(v)·clip(γ, ±tau), v = 1 + x².

    γ is the skewness that AdaM3 sees. d = g - m is a sum of b1 and of -b1·(1-b1)·b1ʲ,
    j = 0, 1, ..., times independent noises of third moment 1; and v^(3/2) divides.
    """
    third, x = 3 * b1**4 / (1 + b1 + b1**2), 0.0
    for _ in range(100):  # a contraction, for |lam|·tau is small
        v = 1 + x * x
        x = -lam * v**0.5 * float(np.clip(third / v**1.5, -tau, tau))
    return x


@partial(jax.jit, static_argnums=0)
def largest(form: Any, b3: jax.Array) -> jax.Array:
    """Returns the largest update after one gradient of 1 and then none."""
    rule = scale_by_adam3(0.9, B2, b3=b3, third_moment=form)

    def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        update, state = rule.update(g, state)
        return state, jnp.abs(update)

    gradients = jnp.zeros(2000).at[0].set(1.0)
    return jax.lax.scan(step, rule.init(jnp.zeros(())), gradients)[1].max()


def main() -> None:
    """Writes the figure, and prints what it shows."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for tau, colour in zip(TAUS, ("C0", "C4"), strict=True):
        wanted = [closed_form(lam, tau) for lam in LAMS]
        found = [float(settles(lam, tau) - settles(0.0, tau)) for lam in LAMS]
        left.plot(LAMS, wanted, c=colour, lw=1)
        left.plot(LAMS, found, "o", c=colour, mfc="none", label=f"tau = {tau:g}")
        print(f"tau {tau:g}, measured:", *(f"{x:+.4f}" for x in found))
    left.set(xlabel="lam", ylabel="shift of the stationary point")
    left.legend(frameon=False, title="lines: closed form")
    styles = {"cubic": "C1^-", "stabilized": "C2v-", "standardized": "C3D-"}
    for form, style in styles.items():
        sizes = [float(largest(form, b3)) for b3 in B3S]
        right.loglog(1 - np.array(B3S), sizes, style, mfc="none", label=form)
        print(f"{form}, largest:", *(f"{x:.3g}" for x in sizes))
    right.axvline(1 - B2**0.5, c="0.6", lw=0.8, ls=":")
    right.set(xlabel="1 - b3 (dotted: b3 = sqrt(b2))", ylabel="largest update / rate")
    right.legend(frameon=False)
    figure.savefig(FILE, dpi=120)


if __name__ == "__main__":
    main()
