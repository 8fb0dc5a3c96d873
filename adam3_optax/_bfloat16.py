"""Parameters in bfloat16 that lose no update: what rounding cuts off is kept as state.

A float32 number is cut in two: its upper half, rounded, is the bfloat16 parameter, and
its lower half is the remainder. All of it is done on integers, because XLA on a GPU
drops a conversion to bfloat16 and back.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from adam3_optax import _boxes, _rounding
from adam3_optax._states import find
from adam3_optax._transform import check_not_stacked

Remainder = Literal["int16", "int8"]

# Patterns of float32.
_SIGN, _SIZE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_INFINITY, _NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)


class BFloat16ParametersState(NamedTuple):
    """The state of `bfloat16_parameters`.

    Attributes:
        inner_state: That of the wrapped optimizer.
        remainder: A tree like the parameters, of int16 or int8. It has their shapes;
            for a leaf that is not bfloat16 there is one 0. `optax.EmptyState()` if no
            remainder is kept.
        count: Steps taken: int32, of shape (). Stays at its maximum.
    """

    inner_state: optax.OptState
    remainder: optax.Updates
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count


def bfloat16_parameters(
    inner: optax.GradientTransformation, remainder: Remainder | None = "int16"
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters in bfloat16 as if they were float32.

    A bfloat16 has 8 significant bits. Added to it, an update below 1/512 of the
    parameter is lost, and most updates are that small. This wrapper keeps what is lost:

    ======== =============== =========================================================
    setting  bytes kept      promise
    ======== =============== =========================================================
    "int16"  2 a parameter   parameter and remainder are one float32, the master weight
    "int8"   1 a parameter   the same with 24 bits, rounded stochastically: right on
                             average, and within 2^-15
    None     none            the parameter itself is rounded stochastically: right on
                             average, and within 2^-7
    ======== =============== =========================================================

    `inner` sees master weights and gradients in float32. So weight decay, masks, trust
    ratios and norms are what they are in float32 training. Leaves that are not bfloat16
    pass through: float32 norms beside bfloat16 matrices are a usual mix.

    **Bit for bit.** Splitting and joining are exact for masters up to 0x7f7f7fff, which
    is 3.39e38; beyond, the parameter is inf. A step is exact where the new parameter is
    at least 2^-16 of the old one in size. Where it is smaller, the master is off by
    less than 2^-23 of the old parameter. A parameter of -0.0 may become 0.0.

    **Place.** Put it last in a chain, and what wraps an optimizer inside of it, as in
    `bfloat16_parameters(optax.apply_if_finite(adamw, 5))`. Its updates are differences
    between bfloat16 numbers, in float32: nothing may change them afterwards, and
    `optax.apply_updates` must add them.

    **Changes from outside.** Parameters may be replaced between steps, by an average, a
    checkpoint or zeros. Then the old remainder is added to the new parameter: at most
    half a unit in its last place. Call `init` again if that is too much. The remainder
    of inf or NaN is ignored.

    Args:
        inner: Any optimizer of Optax's kind.
        remainder: "int16", "int8" or None, as above.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16ParametersState`. Its
        updates are float32 for bfloat16 parameters, and the inner optimizer's for
        others. The state is sharded as the parameters are.

    Raises:
        ValueError: Another `remainder`; at init, float16 parameters; at update, no
            parameters, or a parameter whose dtype or shape does not fit the state.

    Example:
        A thousand updates of 1e-5, each of which bfloat16 alone would lose.

        >>> import jax, jax.numpy as jnp, optax
        >>> from adam3_optax import bfloat16_parameters, to_float32_parameters
        >>> optimizer = bfloat16_parameters(optax.sgd(1e-5))
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = optimizer.update(-jnp.ones(2), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(1000):
        ...     params, state = step(params, state)
        >>> params
        Array([1.00781, 1.00781], dtype=bfloat16)
        >>> bool(jnp.allclose(to_float32_parameters(params, state), 1.01, atol=1e-5))
        True

    Source:
        `docs/low_precision.md`. Remainders beside bfloat16 parameters are also kept by
        FlashOptim and by TransformerEngine (`store_param_remainders`).
    """
    if remainder not in ("int16", "int8", None):
        raise ValueError(
            f"remainder must be 'int16', 'int8' or None, got {remainder!r}"
        )
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> BFloat16ParametersState:
        jax.tree.map_with_path(_check_parameter, params)
        kept: Any = optax.EmptyState()
        if remainder:
            zeros = functools.partial(_zeros, remainder)
            kept = jax.tree.map(zeros, params, is_leaf=_boxes.is_box)
        masters = jax.tree.map(lambda x: _wide(x) if _is_narrow(x) else x, params)
        count = jnp.zeros((), jnp.int32)
        return BFloat16ParametersState(wrapped.init(masters), kept, count)

    def update(
        updates: optax.Updates,
        state: BFloat16ParametersState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BFloat16ParametersState]:
        if params is None:
            raise ValueError(
                "bfloat16_parameters needs params: update(g, state, params)"
            )
        check_not_stacked(state)
        count = optax.safe_increment(state.count)
        treedef: Any  # JAX says Unknown
        paths, treedef = jax.tree.flatten_with_path(_boxes.opened(params))

        def leaves_of(tree: Any) -> list[Any]:
            return treedef.flatten_up_to(_boxes.opened(tree))

        def tree_like(tree: Any, leaves: list[Any]) -> Any:
            return _boxes.refilled(tree, treedef.unflatten(leaves))

        old = [param for _, param in paths]
        kept = leaves_of(state.remainder) if remainder else [None] * len(old)
        for (path, param), rest in zip(paths, kept, strict=True):
            _check_fits(path, param, rest)
        narrow = [i for i, param in enumerate(old) if _is_narrow(param)]
        masters, gradients = list(old), leaves_of(updates)
        for i in narrow:
            masters[i] = _join(old[i], kept[i])
            gradients[i] = jax.tree.map(_wide, gradients[i])  # it may be None

        inner_updates, inner_state = wrapped.update(
            tree_like(updates, gradients),
            state.inner_state,
            tree_like(params, masters),
            **extra_args,
        )
        steps = leaves_of(inner_updates)
        for i in narrow:
            if jax.tree.leaves(steps[i]):
                key = _rounding.leaf_key(i, purpose=1)
                landed = _land(old[i], masters[i], steps[i], kept[i], count, key)
                steps[i], kept[i] = landed
        rests = tree_like(state.remainder, kept) if remainder else state.remainder
        new_state = BFloat16ParametersState(inner_state, rests, count)
        return tree_like(inner_updates, steps), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def to_bfloat16_parameters(
    params: optax.Params, state: optax.OptState, mask: Any = None
) -> tuple[optax.Params, Any]:
    """Turns float32 parameters into bfloat16 ones, and loses nothing.

    Args:
        params: The parameters; float32 leaves become bfloat16.
        state: What `init` has returned for these parameters, of an optimizer with
            `bfloat16_parameters` anywhere in it.
        mask: Which leaves shall become bfloat16: a tree of bools like the parameters,
            or a function that makes one of them, as in `optax.masked`. All by default.

    Returns:
        The parameters, and the state, which now holds their remainders.

    Raises:
        ValueError: No state of `bfloat16_parameters`, or one of other parameters.

    Example:
        Matrices become bfloat16, and norms and biases stay float32.

        >>> import jax, jax.numpy as jnp, optax
        >>> import adam3_optax
        >>> optimizer = adam3_optax.bfloat16_parameters(adam3_optax.adam3w(1e-3))
        >>> master = {"w": jnp.full((2, 16), 0.1), "b": jnp.full(16, 0.1)}
        >>> params, state = adam3_optax.to_bfloat16_parameters(
        ...     master, optimizer.init(master), {"w": True, "b": False}
        ... )
        >>> params["w"].dtype.name, params["b"].dtype.name
        ('bfloat16', 'float32')
        >>> back = adam3_optax.to_float32_parameters(params, state)
        >>> bool((back["w"] == master["w"]).all())
        True

    Source:
        `docs/low_precision.md`.
    """
    find(state, BFloat16ParametersState)
    treedef: Any
    boxes, treedef = jax.tree.flatten(params, is_leaf=_boxes.is_box)
    chosen = mask(params) if callable(mask) else mask
    chosen = [True] * len(boxes) if mask is None else treedef.flatten_up_to(chosen)
    narrowed = list(boxes)

    def convert(one: Any) -> Any:
        if not isinstance(one, BFloat16ParametersState):
            return one
        rests = _rests(treedef, one.remainder)
        for i, box in enumerate(boxes):
            master, rest = _boxes.opened((box, rests[i]))
            is_wide = jnp.result_type(master) == jnp.float32
            if chosen[i] and is_wide and not isinstance(rest, optax.MaskedNode):
                key = _rounding.leaf_key(i, purpose=1)
                param, rest = _split(master, rest, one.count, key)
                narrowed[i] = _boxes.refilled(box, param)
                rests[i] = _boxes.refilled(box, rest)
        if isinstance(one.remainder, optax.EmptyState):
            return one
        return one._replace(remainder=treedef.unflatten(rests))

    state = jax.tree.map(convert, state, is_leaf=_is_state)
    return treedef.unflatten(narrowed), state


def to_float32_parameters(params: optax.Params, state: optax.OptState) -> Any:
    """Returns float32 parameters: the master weights, for evaluation or a checkpoint.

    Args:
        params: The parameters, some of them in bfloat16.
        state: The state after the same step, of an optimizer with `bfloat16_parameters`
            anywhere in it.

    Returns:
        The parameters, with each bfloat16 leaf joined to its remainder. Without
        remainders (None) they have the same values in float32.

    Raises:
        ValueError: No state of `bfloat16_parameters`, or one of other parameters.

    Example:
        As in `bfloat16_parameters` and `to_bfloat16_parameters`.

    Source:
        `docs/low_precision.md`.
    """
    treedef: Any
    boxes, treedef = jax.tree.flatten(params, is_leaf=_boxes.is_box)
    for _, one, _ in find(state, BFloat16ParametersState):
        for i, rest in enumerate(_rests(treedef, one.remainder)):
            param, rest = _boxes.opened((boxes[i], rest))
            if _is_narrow(param) and not isinstance(rest, optax.MaskedNode):
                _check_fits((jax.tree_util.SequenceKey(i),), param, rest)
                boxes[i] = _boxes.refilled(boxes[i], _join(param, rest))
    return treedef.unflatten(boxes)


def _is_state(x: object) -> bool:
    return isinstance(x, BFloat16ParametersState)


def _is_narrow(x: jax.typing.ArrayLike) -> bool:
    return jnp.result_type(x) == jnp.bfloat16


def _wide(x: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _rests(treedef: Any, remainder: Any) -> list[Any]:
    """Returns the remainder of each parameter; None where none are kept."""
    if isinstance(remainder, optax.EmptyState):
        return [None] * treedef.num_leaves
    return treedef.flatten_up_to(remainder)


def _zeros(remainder: Remainder, item: Any) -> Any:
    """Returns a remainder of 0; for a parameter that needs none, a single 0."""
    param = _boxes.opened(item)
    if _is_narrow(param):
        return _boxes.refilled(item, jnp.zeros_like(param, dtype=remainder))
    return jnp.zeros((1,) * jnp.ndim(param), remainder)


def _check_parameter(path: tuple[Any, ...], param: jax.typing.ArrayLike) -> None:
    """Raises if a parameter is float16."""
    if jnp.result_type(param) == jnp.float16:
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} is float16; bfloat16_parameters needs "
            "bfloat16, and leaves float32 as it is"
        )


def _check_fits(path: tuple[Any, ...], param: jax.Array, rest: Any) -> None:
    """Raises if a parameter is not what it was when its remainder was made."""
    if not jax.tree.leaves(rest):
        return
    expected = param.shape if _is_narrow(param) else (1,) * param.ndim
    if rest.shape != expected:
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} is {param.dtype} of shape "
            f"{param.shape}, and its remainder in the state has shape {rest.shape}: "
            "the state was made for other shapes or dtypes. Add updates with "
            "optax.apply_updates, which keeps the parameters' dtypes."
        )


# The patterns of numbers. The first bit of a pattern is the sign; without it, patterns
# are in the order of sizes.


def _pattern(x: jax.Array) -> jax.Array:
    """Returns the 32 bits of a float32, or of a bfloat16 as float32."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(x, jnp.uint32)


def _number(pattern: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(pattern, jnp.float32)


def _join(param: jax.Array, rest: jax.Array | None) -> jax.Array:
    """Returns the master weight of a parameter, in float32."""
    pattern = _pattern(param)
    if rest is None:
        return _number(pattern)
    size = pattern & _SIZE
    lower = rest.astype(jnp.int32) << (8 if rest.dtype == jnp.int8 else 0)
    # Never below 0: a remainder may be older than its parameter, which may be 0 now.
    whole = jnp.maximum(size.astype(jnp.int32) + lower, 0).astype(jnp.uint32)
    return _number((pattern ^ size) | jnp.where(size < _INFINITY, whole, size))


def _upper_half(pattern: jax.Array) -> jax.Array:
    """Returns the pattern of the nearest bfloat16, as float32; of NaN a quiet one.

    A tie goes away from 0. To the even one, a remainder could be 2^15, which int16 does
    not hold.
    """
    rounded = (pattern + 0x8000) >> 16 << 16
    return jnp.where((pattern & _SIZE) > _INFINITY, _NAN, rounded)


def _lower_half(pattern: jax.Array, param: jax.Array, dtype: Any) -> jax.Array:
    """Returns the remainder of a master weight, given its parameter's pattern.

    If the parameter is far from its master, the remainder is the largest there is, and
    0 if it has another sign or is not finite.
    """
    size = param & _SIZE
    lower = (pattern & _SIZE).astype(jnp.int32) - size.astype(jnp.int32)
    fits = (pattern ^ param < _SIGN) & (size < _INFINITY)
    lower = jnp.where(fits, jnp.clip(lower, -(2**15), 2**15 - 1), 0)
    return (lower >> 8 if dtype == jnp.int8 else lower).astype(dtype)


def _prepared(
    master: jax.Array, rest: jax.Array | None, count: jax.Array, key: _rounding.Key
) -> jax.Array:
    """Returns the pattern of a master weight, in as many bits as are kept of it."""
    pattern = _pattern(master)
    if rest is not None and rest.dtype == jnp.int16:
        return pattern
    bits = _rounding.random_bits(count, key, master)
    if rest is None:
        return _pattern(_rounding.to_bfloat16(master, bits))
    # Random bits below the last that is kept carry with the right probability.
    carried = (pattern + (bits >> 24)) >> 8 << 8
    return jnp.where((pattern & _SIZE) < _INFINITY, carried, pattern)


def _narrow(pattern: jax.Array) -> jax.Array:
    """Returns the bfloat16 of a pattern whose lower half is 0."""
    return lax.bitcast_convert_type((pattern >> 16).astype(jnp.uint16), jnp.bfloat16)


# Jitted, so that an update that is not costs one call a leaf.
@jax.jit
def _split(
    master: jax.Array, rest: jax.Array | None, count: jax.Array, key: _rounding.Key
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the parameter and the remainder of a master weight."""
    pattern = _prepared(master, rest, count, key)
    param = _upper_half(pattern)
    rest = None if rest is None else _lower_half(pattern, param, rest.dtype)
    return _narrow(param), rest


@jax.jit
def _land(
    param: jax.Array,
    master: jax.Array,
    u: jax.Array,
    rest: jax.Array | None,
    count: jax.Array,
    key: _rounding.Key,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the update of a parameter, and its remainder after it."""
    pattern = _prepared(master + u.astype(jnp.float32), rest, count, key)
    old = _number(_pattern(param))
    step = _number(_upper_half(pattern)) - old
    if rest is None:
        return step, None
    # What `optax.apply_updates` will make of it: nearly always the upper half. It
    # rounds to nearest even, as `reduce_precision` does.
    landed = _pattern(lax.reduce_precision(old + step, 8, 7))
    return step, _lower_half(pattern, landed, rest.dtype)
