"""AdaM3's state in 12, 8, 6 and 4 bytes a parameter: bytes and losses side by side.

A small network learns a function with each storage setting, in plain JAX. All settings
have the same initialisation and the same batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax import adam3w

WIDTH, BATCH, STEPS = 256, 128, 300
WAYS: dict[str, dict[str, Any]] = {
    "all float32": {},
    "m, s bfloat16": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "all bfloat16": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "bfloat16"),
    "m, s float8": {"m_dtype": "float8", "v_dtype": "bfloat16", "s_dtype": "float8"},
}


def network(params: Any, x: jax.Array) -> jax.Array:
    """Returns the sine of each row's sum, as the network has it."""
    hidden = jax.nn.gelu(x @ params["in"] + params["bias"])
    return (jax.nn.gelu(hidden @ params["middle"]) @ params["out"])[:, 0]


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    """Returns the mean squared error."""
    return jnp.mean((network(params, x) - jnp.sin(x.sum(axis=1))) ** 2)


def train(optimizer: optax.GradientTransformation) -> tuple[float, float]:
    """Returns bytes of state a parameter, and the loss on fresh points."""
    keys = jax.random.split(jax.random.key(0), 5)
    params: Any = {
        "in": jax.random.normal(keys[0], (8, WIDTH)) / 8**0.5,
        "bias": jnp.zeros(WIDTH),
        "middle": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5,
        "out": jax.random.normal(keys[2], (WIDTH, 1)) / WIDTH**0.5,
    }

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        gradients = jax.grad(loss_of)(params, jax.random.normal(key, (BATCH, 8)))
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any) -> Any:
        batches = jax.random.split(keys[3], STEPS)
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0]

    params, state = run(params)
    size = sum(p.size for p in jax.tree.leaves(params))
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    points = jax.random.normal(keys[4], (4096, 8))
    return state_bytes / size, float(loss_of(params, points))


print(f"{'state':14} {'bytes a parameter':>17}  {'loss':>7}")
for name, way in WAYS.items():
    schedule = optax.cosine_decay_schedule(3e-3, STEPS)
    bytes_each, loss = train(adam3w(schedule, third_moment="standardized", **way))
    print(f"{name:14} {bytes_each:17.2f}  {loss:.5f}")
