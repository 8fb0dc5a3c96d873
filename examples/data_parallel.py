"""Data parallel: each device has all parameters and state, and a part of the batch.

The language model of char_lm.py, on one device and on eight simulated ones. `jit` sees
where the arrays lie and adds the communication, one sum of the gradients; the training
step itself does not change.
"""

from typing import Any

import char_lm
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3w, state_shardings

# The one line that changes on real devices: leave it out. That is for one host; for
# several see multi_process.py.
jax.config.update("jax_num_cpu_devices", 8)

STEPS = 20
corpus = char_lm.load(None)
optimizer = adam3w(4e-3, third_moment="standardized")


def train(devices: list[jax.Device]) -> tuple[Any, list[float]]:
    """Returns the parameters after the training, and the losses on the way."""
    mesh = jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    graph, params = nnx.split(char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(0)))
    params = jax.device_put(params, replicated)
    where = state_shardings(optimizer, params, replicated)
    state = jax.jit(optimizer.init, out_shardings=where)(params)

    @jax.jit
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(char_lm.loss_of)(params, graph, windows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(0), []
    for number in range(1, STEPS + 1):
        starts = rng.integers(
            len(corpus.training) - char_lm.CONTEXT, size=char_lm.BATCH
        )
        windows = char_lm.windows_at(corpus.training, starts)
        params, state, loss = step(params, state, jax.device_put(windows, split))
        losses.append(float(loss))
        if number % 10 == 0:
            print(f"devices: {mesh.size}, step {number}, loss {loss:.4f}", flush=True)
    return jax.device_get(params), losses


one, losses_of_one = train(jax.devices()[:1])
many, losses = train(jax.devices())
apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), one, many)
leaf, most = max(jax.tree.leaves_with_path(apart), key=lambda found: found[1])
# The loss does not depend on the biases of the keys: their gradients are rounding
# errors, out of which Adam's denominator makes steps like any others.
print(f"parameter furthest from one device's: {jax.tree_util.keystr(leaf)}, {most:.0e}")
furthest = np.abs(np.subtract(losses, losses_of_one)).max()
print(f"loss furthest from one device's in {STEPS} steps: {furthest:.0e}")
