"""Where a state lies on a mesh: beside its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adam3_optax._boxes import opened
from adam3_optax._trees import spread


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    shardings: Any,
    memory_kind: str | None = None,
) -> Any:
    """Returns the shardings of an optimizer's state, from those of its parameters.

    It is for `jax.jit(optimizer.init, out_shardings=...)`, for the `out_shardings` of
    a training step, and for restoring checkpoints. On a mesh of Auto axes
    `jax.jit(optimizer.init)` alone puts the whole state on each device, or on one.

    Args:
        optimizer: `adam3`, `adam3w`, `scale_by_adam3`, or one of Optax's; in chains,
            masks, `inject_hyperparams`, `MultiSteps` and the like, too.
        params: The parameters: arrays, or `jax.ShapeDtypeStruct`s. Nothing is computed.
        shardings: A tree of `jax.sharding.NamedSharding` like the parameters, or a
            prefix of one, such as a single sharding for all. For ZeRO-1, give those
            that the state shall have: they need not be the parameters' own.
        memory_kind: Where the state is kept: `"pinned_host"` for the memory of the
            host, `"device"`, or None for what `shardings` say. What belongs to no
            parameter (the count) stays where it is.

    Returns:
        A tree like the state. A leaf in the shape of its parameter (m, v, s) has the
        parameter's sharding. All else (the count, injected hyperparameters, factored
        moments of `optax.adafactor`) is replicated.

    Raises:
        ValueError: Shardings of another structure than the parameters', that do not fit
            their shapes, or on more than one mesh; no shardings at all.
        TypeError: A sharding that is no `NamedSharding`; a `memory_kind` that is no
            string.

    Example:
        The state never lies on one device as a whole, not even at first.

        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> from adam3_optax import adam3w, state_shardings
        >>> mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
        >>> rows = NamedSharding(mesh, P("x", None))
        >>> params = jax.device_put(jnp.ones((8, 64)), rows)
        >>> optimizer = adam3w(third_moment=None, m_dtype="float8")
        >>> where = state_shardings(optimizer, params, rows)
        >>> state = jax.jit(optimizer.init, out_shardings=where)(params)
        >>> state[0].m.sharding.shard_shape(state[0].m.shape)
        (2, 64)

    Source:
        `docs/distributed.md`.
    """
    # Without shardings of their own, because `init` is asked for shapes only.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params
    )
    paths, treedef = jax.tree.flatten_with_path(shapes)
    wanted = spread(shardings, shapes, "shardings")
    for (path, shape), sharding in zip(paths, wanted, strict=True):
        where = f"shardings{jax.tree_util.keystr(path)}"
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"{where} must be a NamedSharding, got {sharding!r}")
        try:
            sharding.check_compatible_aval(shape.shape)  # or the next may fail in JAX
            sharding.shard_shape(shape.shape)
        except ValueError as error:
            raise ValueError(f"{where} does not fit params: {error}") from error
    if not isinstance(memory_kind, str | None):
        raise TypeError(f"memory_kind must be a string or None, got {memory_kind!r}")
    wanted = [x.with_memory_kind(memory_kind or x.memory_kind) for x in wanted]
    meshes = {x.mesh for x in wanted}
    if len(meshes) != 1:
        raise ValueError(f"shardings must be on one mesh, got {len(meshes)} of them")
    replicated = NamedSharding(meshes.pop(), PartitionSpec())

    def beside(leaf: Any, param: Any, sharding: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        # A leaf without a box may belong to a parameter in a box.
        param, sharding = opened((param, sharding))
        fits = leaf.shape == param.shape
        return sharding if fits else replicated.with_memory_kind(sharding.memory_kind)

    state = jax.eval_shape(optimizer.init, shapes)
    try:
        return optax.tree.map_params(
            optimizer,
            beside,
            state,
            shapes,
            jax.tree.unflatten(treedef, wanted),
            transform_non_params=lambda _: replicated,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "optimizer must keep its state in trees like the parameters (optax.flatten "
            f"does not); optax.tree.map_params fails on it: {error}"
        ) from error
