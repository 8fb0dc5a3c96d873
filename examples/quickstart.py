"""Fits a line by AdaM3, in plain JAX, and compares it with the exact solution."""

import jax
import jax.numpy as jnp
import optax

from adam3_optax import adam3

x = jnp.linspace(-1.0, 1.0, 100)
y = 2.0 * x - 1.0 + 0.1 * jax.random.normal(jax.random.key(0), x.shape)
line = jnp.zeros(2)  # slope and intercept

optimizer = adam3(
    optax.cosine_decay_schedule(0.1, decay_steps=300), third_moment="cubic"
)
state = optimizer.init(line)


@jax.jit
def step(line: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
    gradient = jax.grad(lambda line: jnp.mean((jnp.polyval(line, x) - y) ** 2))(line)
    updates, state = optimizer.update(gradient, state, line)
    return optax.apply_updates(line, updates), state


for _ in range(300):
    line, state = step(line, state)

exact = jnp.polyfit(x, y, deg=1)
print(f"AdaM3: {line[0]:.3f} x {line[1]:+.3f}", end=", ")
print(f"least squares: {exact[0]:.3f} x {exact[1]:+.3f}")
