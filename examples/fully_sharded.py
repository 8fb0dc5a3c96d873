"""Fully sharded: each device has a part of the parameters, of the state, of the batch.

The language model of char_lm.py on eight simulated devices, m and v in bfloat16. No
array lies on one device as a whole, not even at first: parameters and state are made
where they stay. `jit` sees where they lie and adds the communication.
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

STEPS = 30
corpus = char_lm.load(None)
optimizer = adam3w(4e-3, third_moment=None, m_dtype="bfloat16", v_dtype="bfloat16")
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def shard(leaf: Any) -> NamedSharding:
    """Returns a sharding along the first axis that the devices divide."""
    for axis, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, P(*[None] * axis, "data"))
    return NamedSharding(mesh, P())


def make_model() -> Any:
    """Returns the model."""
    return char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(0))


graph, shapes = nnx.split(nnx.eval_shape(make_model))
where = jax.tree.map(shard, shapes)
where_state = state_shardings(optimizer, shapes, where)
params = jax.jit(lambda: nnx.state(make_model()), out_shardings=where)()
state = jax.jit(optimizer.init, out_shardings=where_state)(params)


@jax.jit(out_shardings=(where, where_state, None), donate_argnums=(0, 1))
def step(params: Any, state: Any, windows: jax.Array) -> Any:
    """Takes one step."""
    loss, gradients = jax.value_and_grad(char_lm.loss_of)(params, graph, windows)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


rng = np.random.default_rng(0)
batch = NamedSharding(mesh, P("data"))
for number in range(1, STEPS + 1):
    starts = rng.integers(len(corpus.training) - char_lm.CONTEXT, size=char_lm.BATCH)
    windows = char_lm.windows_at(corpus.training, starts)
    params, state, loss = step(params, state, jax.device_put(windows, batch))
    if number % 10 == 0:
        print(f"step {number:2}, loss {loss:.4f}", flush=True)

size = sum(p.size for p in jax.tree.leaves(params))
whole = sum(x.nbytes for x in jax.tree.leaves(state))
here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
print(f"{size:,} parameters on {mesh.size} devices")
print(f"bytes of state: {whole:,} in all, {here:,} on each device")
