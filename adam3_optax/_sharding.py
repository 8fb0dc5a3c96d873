"""Where a state lies on a mesh: beside its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adam3_optax._boxes import opened


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
        A tree like the state. A leaf in the shape of its parameter (m, v, s; int8
        codes) has the parameter's sharding. In other leaves that belong to a parameter
        (the scales of int8, one number a row), the axes of other length are not
        sharded. All else (the count, injected hyperparameters) is replicated.

    Raises:
        ValueError: Shardings of another structure than the parameters', that do not fit
            their shapes, or on more than one mesh; no shardings at all.
        TypeError: A sharding that is no `NamedSharding`; a `memory_kind` that is no
            string.

    Example:
        The state of int8 never lies on one device as a whole, not even at first.

        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> from adam3_optax import adam3w, state_shardings
        >>> mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
        >>> rows = NamedSharding(mesh, P("x", None))
        >>> params = jax.device_put(jnp.ones((8, 64)), rows)
        >>> optimizer = adam3w(m_dtype="int8", v_dtype="int8", s_dtype="int8")
        >>> where = state_shardings(optimizer, params, rows)
        >>> state = jax.jit(optimizer.init, out_shardings=where)(params)
        >>> [x.sharding.shard_shape(x.shape) for x in state[0].m]
        [(2, 64), (2, 1)]

    Source:
        `docs/distributed.md`.
    """
    shapes = jax.eval_shape(lambda x: x, params)
    # Without shardings of their own, because `init` is asked for shapes only.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    try:
        shardings = jax.tree.map(
            lambda sharding, part: jax.tree.map(lambda _: sharding, part),
            shardings,
            shapes,
        )
    except ValueError as error:
        raise ValueError(
            f"shardings must be a tree like params, or a prefix of it: {error}"
        ) from error
    jax.tree.map_with_path(_check, shapes, shardings)
    if not isinstance(memory_kind, str | None):
        raise TypeError(f"memory_kind must be a string or None, got {memory_kind!r}")
    if memory_kind is not None:
        shardings = jax.tree.map(lambda x: x.with_memory_kind(memory_kind), shardings)
    meshes = {sharding.mesh for sharding in jax.tree.leaves(shardings)}
    if len(meshes) != 1:
        raise ValueError(f"shardings must be on one mesh, got {len(meshes)} of them")
    replicated = NamedSharding(meshes.pop(), PartitionSpec())
    state = jax.eval_shape(optimizer.init, shapes)
    try:
        return optax.tree.map_params(
            optimizer,
            _beside,
            state,
            shapes,
            shardings,
            transform_non_params=lambda _: replicated,
            is_leaf=_is_empty,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "optimizer must keep its state in trees like the parameters (optax.flatten "
            f"does not); optax.tree.map_params fails on it: {error}"
        ) from error


def _check(path: Any, param: Any, sharding: Any) -> None:
    """Raises where a sharding is none, or does not fit its parameter."""
    where = f"shardings{jax.tree_util.keystr(path)}"
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{where} must be a jax.sharding.NamedSharding, got {sharding!r}"
        )
    try:
        sharding.check_compatible_aval(param.shape)  # or `shard_shape` may fail in JAX
        sharding.shard_shape(param.shape)
    except ValueError as error:
        raise ValueError(f"{where} does not fit params: {error}") from error


def _beside(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
    """Returns the sharding of a leaf of the state that belongs to a parameter."""
    # A leaf without a box may belong to a parameter in a box.
    param, sharding = opened((param, sharding))
    if _is_empty(leaf) or leaf.shape == param.shape:
        return leaf if _is_empty(leaf) else sharding
    axes: list[Any] = []
    if len(leaf.shape) == len(param.shape):
        named = (*sharding.spec, *[None] * len(param.shape))
        sizes = zip(named, leaf.shape, param.shape, strict=False)
        axes = [axis if size == whole else None for axis, size, whole in sizes]
    spec = PartitionSpec(*axes)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _is_empty(x: Any) -> bool:
    # None stands for a remainder that `bfloat16_parameters` does not keep.
    return x is None or isinstance(x, optax.MaskedNode)
