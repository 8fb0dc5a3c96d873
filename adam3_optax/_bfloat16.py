"""Parameters in bfloat16. The remainders of their rounding are kept as state.

The wrapper first, then the way into bfloat16 parameters and back.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import keystr

from adam3_optax import _boxes, _remainder, _rounding, _trees

_REMEDY = "To wrap a state of inner: init(params)._replace(inner_state=state)."


class BFloat16ParametersState(NamedTuple):
    """The state of `bfloat16_parameters`.

    Attributes:
        inner_state: The state of the wrapped optimizer.
        remainder: A tree like the parameters, of int16 or int8. It has their shapes;
            for a leaf that is not bfloat16 there is one 0. If no remainders are kept,
            there is one boolean for each leaf.
        steps: How many were taken: int32, of shape (). Stays at its maximum. It is not
            called count, so that `optax.tree.get(state, "count")` finds the inner one.
    """

    inner_state: optax.OptState
    remainder: optax.Updates
    steps: Array


def bfloat16_parameters(
    inner: optax.GradientTransformation,
    remainder: Literal["int16", "int8"] | None = "int16",
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters in bfloat16 as if they were float32, with any optimizer.

    A bfloat16 has 8 significant bits. Added to it, an update below 1/512 of the
    parameter is lost, and most updates are that small. Here none is lost, or none on
    average:

    - `"int16"`: 2 bytes a parameter. Parameter and remainder are together a float32,
      the master weight.
    - `"int8"`: 1 byte. The master has the upper 24 of 32 bits, 16 of them significant,
      and is rounded stochastically: right on average, and within 2^-15.
    - None: nothing is kept. The parameter itself is rounded stochastically: right on
      average, and within 2^-7.

    `inner` sees master weights, and gradients in float32. So weight decay, masks, trust
    ratios and norms are what they are in float32 training. Leaves that are not bfloat16
    pass through: float32 norms beside bfloat16 matrices are a usual mix.

    **Bit for bit**, with int16. Split and join are exact for masters up to 0x7f7f7fff,
    which is 3.39e38; beyond, the parameter is inf. A step between sizes of 1e-30 and
    3.39e38 is exact where the new parameter is at least 2^-16 of the old one. Where it
    is smaller, the master is off by less than 2^-22 of the old parameter. A parameter
    of -0.0 may become 0.0.

    **Place.** Put it last in a chain. Put wrappers inside it, as in
    `bfloat16_parameters(optax.apply_if_finite(adamw, 5))`. Its updates are differences
    of bfloat16 numbers, in float32. Nothing may change them afterwards, and
    `optax.apply_updates` must add them.

    **Changes from outside.** Parameters may be replaced between steps: by an average, a
    checkpoint, zeros. Then the old remainder is added to the new parameter: half a unit
    in its last place at most. If that is too much, pass the new parameters in float32
    to `to_bfloat16_parameters`. The remainder of inf or NaN is ignored.

    **Derivatives** through a step are those without rounding.

    Args:
        inner: Any optimizer of Optax's kind.
        remainder: `"int16"`, `"int8"` or None, as above.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16ParametersState`, sharded as
        the parameters are. Updates are float32 for bfloat16 parameters, and the inner
        optimizer's for others.

    Raises:
        TypeError: `inner` is no optimizer.
        ValueError: Another `remainder`; at init, float16 parameters; at update, no
            parameters, a state made with another `remainder`, or a parameter whose
            dtype or shape does not fit its remainder (without remainders, and for
            leaves of one element, nothing can tell the dtype).

    Example:
        A thousand updates of 1e-5, each of which bfloat16 alone would lose.

        >>> import jax, jax.numpy as jnp, optax
        >>> from adam3_optax import bfloat16_parameters, to_float32_parameters
        >>> optimizer = bfloat16_parameters(optax.sgd(1e-5))
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = optimizer.update(-jnp.ones(2), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> state = optimizer.init(params)
        >>> for _ in range(1000):
        ...     params, state = step(params, state)
        >>> bool(jnp.allclose(to_float32_parameters(params, state), 1.01, atol=1e-5))
        True

    Source:
        `docs/low_precision.md`. FlashOptim and TransformerEngine
        (`store_param_remainders`) keep remainders, too.
    """
    if remainder not in ("int16", "int8", None):
        raise ValueError(f"remainder must be 'int16', 'int8' or None: {remainder!r}")
    wrapped = _trees.optimizer(inner)

    def init(params: optax.Params) -> BFloat16ParametersState:
        def zeros(path: tuple[Any, ...], box: Any) -> Any:
            """Returns a remainder of 0; for a leaf that needs none, a single 0."""
            param = _boxes.opened(box)
            if jnp.result_type(param) == jnp.float16:
                raise ValueError(
                    f"params{keystr(path)} is float16; it must be bfloat16 or float32"
                )
            if remainder is None or not _is_narrow(param):
                return jnp.zeros((1,) * jnp.ndim(param), remainder or bool)
            return _boxes.refilled(box, jnp.zeros_like(param, dtype=remainder))

        kept = jax.tree.map_with_path(zeros, params, is_leaf=_boxes.is_box)
        masters = jax.tree.map(lambda x: _wide(x) if _is_narrow(x) else x, params)
        count = jnp.zeros((), jnp.int32)
        return BFloat16ParametersState(wrapped.init(masters), kept, count)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError("bfloat16_parameters needs params, as the third argument")
        _trees.check_state(state, BFloat16ParametersState, _REMEDY)
        count = optax.safe_increment(state.steps)
        paths, treedef = jax.tree.flatten_with_path(_boxes.opened(params))

        def leaves_of(tree: Any, name: str) -> list[Any]:
            return _trees.leaves_like(treedef, _boxes.opened(tree), name, "params")

        def tree_like(tree: Any, leaves: list[Any]) -> Any:
            return _boxes.refilled(tree, jax.tree.unflatten(treedef, leaves))

        masters = [param for _, param in paths]
        gradients = leaves_of(updates, "updates")
        kept = leaves_of(state.remainder, "the remainder")
        for i, (path, param) in enumerate(paths):
            made_with = kept[i].dtype.name.replace("bool", "None")
            if made_with != str(remainder):
                raise ValueError(
                    f"the state of params{keystr(path)} has remainder {made_with}, but "
                    f"the optimizer has {remainder}. To change the remainder, use "
                    f"to_float32_parameters, then to_bfloat16_parameters. {_trees.CAST}"
                )
            _check_fits(path, param, kept[i])
            if _is_narrow(param):
                masters[i] = _remainder.join(param, _remainder_of(kept[i]))
                gradients[i] = jax.tree.map(_wide, gradients[i])  # it may be None
        gs, ps = tree_like(updates, gradients), tree_like(params, masters)
        new, inner_state = wrapped.update(gs, state.inner_state, ps, **extra_args)
        us = leaves_of(new, "the updates of inner")
        for i, (path, param) in enumerate(paths):
            if _is_narrow(param) and jax.tree.leaves(us[i]):
                master = masters[i] + _wide(us[i])
                key = _rounding.leaf_key(path, "parameters")
                rest = _remainder_of(kept[i])
                us[i], rest = _remainder.land(param, master, rest, count, key)
                kept[i] = kept[i] if rest is None else rest
        rests = tree_like(state.remainder, kept)
        return tree_like(new, us), BFloat16ParametersState(inner_state, rests, count)

    return optax.GradientTransformationExtraArgs(init, update)


def to_bfloat16_parameters(
    params: optax.Params, state: optax.OptState, mask: Any = None
) -> tuple[optax.Params, optax.OptState]:
    """Turns float32 parameters into bfloat16 ones, and keeps what rounding leaves.

    With int16 nothing is lost. int8 rounds to 24 bits. Without remainders the
    parameters are rounded stochastically.

    Args:
        params: The parameters; float32 leaves become bfloat16.
        state: Of an optimizer with `bfloat16_parameters` anywhere in it: what `init`
            has returned for these parameters, or a later one, into which these
            parameters are swapped.
        mask: Which leaves shall become bfloat16: a tree of bools like the parameters or
            a prefix of it, or a function that returns such a tree. All by default.
            Leaves that belong to other optimizers stay float32.

    Returns:
        The parameters, and the state, which now holds their remainders.

    Raises:
        ValueError: No state of `bfloat16_parameters`; a state of parameters of other
            shapes; a state stacked by `jax.vmap`; a mask that does not fit.
        TypeError: A mask with a leaf that is no boolean.

    Example:
        Matrices become bfloat16, and norms and biases stay float32.

        >>> import jax, jax.numpy as jnp, optax
        >>> import adam3_optax
        >>> adamw = adam3_optax.adam3w(1e-3, third_moment=None)
        >>> optimizer = adam3_optax.bfloat16_parameters(adamw)
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
    _trees.find(state, BFloat16ParametersState)
    paths, treedef = jax.tree.flatten_with_path(params, is_leaf=_boxes.is_box)
    boxes = [box for _, box in paths]
    chosen = _trees.choices(mask(params) if callable(mask) else mask, params)

    def convert(one: Any) -> Any:
        _trees.check_not_stacked(one)
        rests = _trees.leaves_like(treedef, one.remainder, "the remainder", "params")
        for i, (path, box) in enumerate(paths):
            master, rest = _boxes.opened((box, rests[i]))
            # There is none where a mask leaves the parameter to another optimizer.
            if not jax.tree.leaves(rest) or jnp.result_type(master) != jnp.float32:
                continue
            master = jnp.asarray(master)
            _check_fits(path, master, rest, master.shape, (1,) * master.ndim)
            if chosen[i]:
                # At count 0 the random bits of all leaves would be the same.
                key = _rounding.leaf_key(path, "conversion")
                kept = _remainder_of(rest)
                param, kept = _remainder.split(master, kept, one.steps + 1, key)
                boxes[i] = _boxes.refilled(box, param)
                rests[i] = rests[i] if kept is None else _boxes.refilled(box, kept)
            else:  # it may be left from a bfloat16 parameter
                rests[i] = jnp.zeros((1,) * master.ndim, rest.dtype)
        return one._replace(remainder=jax.tree.unflatten(treedef, rests))

    state = _trees.replaced(state, BFloat16ParametersState, convert)
    return jax.tree.unflatten(treedef, boxes), state


def to_float32_parameters(params: optax.Params, state: optax.OptState) -> optax.Params:
    """Returns float32 parameters: the master weights, for evaluation or a checkpoint.

    Args:
        params: The parameters, some of them in bfloat16.
        state: The state after the same step, of an optimizer with `bfloat16_parameters`
            anywhere in it.

    Returns:
        The parameters, with each bfloat16 leaf joined to its remainder. Without
        remainders (None) they have the same values in float32.

    Raises:
        ValueError: No state of `bfloat16_parameters`, or one of parameters of other
            shapes or dtypes.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adam3_optax import bfloat16_parameters, to_float32_parameters
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> state = bfloat16_parameters(optax.adamw(1e-3)).init(params)
        >>> to_float32_parameters(params, state).dtype.name
        'float32'

    Source:
        `docs/low_precision.md`.
    """
    paths, treedef = jax.tree.flatten_with_path(params, is_leaf=_boxes.is_box)
    boxes = [box for _, box in paths]
    for _, one, _ in _trees.find(state, BFloat16ParametersState):
        rests = _trees.leaves_like(treedef, one.remainder, "the remainder", "params")
        for i, (path, box) in enumerate(paths):
            param, rest = _boxes.opened((box, rests[i]))
            if jax.tree.leaves(rest):
                _check_fits(path, param, rest)
                if _is_narrow(param):
                    master = _remainder.join(param, _remainder_of(rest))
                    boxes[i] = _boxes.refilled(box, master)
    return jax.tree.unflatten(treedef, boxes)


def _is_narrow(x: jax.typing.ArrayLike) -> bool:
    """Returns whether a parameter is bfloat16, and so has a remainder."""
    return jnp.result_type(x) == jnp.bfloat16


def _wide(x: jax.typing.ArrayLike) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _remainder_of(rest: Array) -> Array | None:
    """Returns None for the boolean that stands where no remainder is kept."""
    return None if rest.dtype == bool else rest


def _check_fits(path: tuple[Any, ...], param: Any, rest: Any, *shapes: Any) -> None:
    """Raises if a parameter is not what it was when its remainder was made.

    Then the remainder has one of these shapes; that of the dtype if none is given.
    """
    shape, dtype = jnp.shape(param), jnp.result_type(param)
    if not shapes or rest.dtype == bool:
        has_rest = _is_narrow(param) and rest.dtype != bool
        shapes = (shape if has_rest else (1,) * len(shape),)
    if jax.tree.leaves(rest) and rest.shape not in shapes:
        remedy = ""
        if rest.shape == shape:
            remedy = ". Was it bfloat16? optax.apply_updates keeps the dtype"
        raise ValueError(
            f"params{keystr(path)} is {dtype} of shape {shape}, and its remainder has "
            f"shape {rest.shape}, which fits another shape or dtype{remedy}"
        )
