"""From float32 parameters to bfloat16 ones with remainders, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax import _boxes, _halves, _rounding
from adam3_optax._bfloat16 import BFloat16ParametersState, check_fits, is_narrow
from adam3_optax._checks import check_not_stacked, full_mask, leaves_like
from adam3_optax._states import find


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
        ValueError: No state of `bfloat16_parameters`; one of parameters of other
            shapes, or stacked by `jax.vmap`; a mask that does not fit.
        TypeError: A mask with a leaf that is no boolean.

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
    paths, treedef = jax.tree.flatten_with_path(params, is_leaf=_boxes.is_box)
    boxes = [box for _, box in paths]
    chosen = _chosen(mask(params) if callable(mask) else mask, params)
    narrowed = list(boxes)

    def is_state(x: Any) -> bool:
        return isinstance(x, BFloat16ParametersState)

    def convert(one: Any) -> Any:
        if not is_state(one):
            return one
        check_not_stacked(one)
        rests = leaves_like(treedef, one.remainder, "the remainder", "params")
        for i, (path, box) in enumerate(paths):
            master, rest = _boxes.opened((box, rests[i]))
            if not _owns(rest) or jnp.result_type(master) != jnp.float32:
                continue
            master = jnp.asarray(master)
            _check_shape(path, master, rest)
            if chosen[i]:
                # At count 0 the random bits of all leaves would be the same.
                key = _rounding.leaf_key(i, purpose=2)
                param, rest = _halves.split(master, rest, one.count + 1, key)
                narrowed[i] = _boxes.refilled(box, param)
                rests[i] = None if rest is None else _boxes.refilled(box, rest)
            elif rest is not None:  # it may be left from a bfloat16 parameter
                rests[i] = jnp.zeros((1,) * master.ndim, rest.dtype)
        return one._replace(remainder=treedef.unflatten(rests))

    state = jax.tree.map(convert, state, is_leaf=is_state)
    return treedef.unflatten(narrowed), state


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
    treedef: Any
    paths, treedef = jax.tree.flatten_with_path(params, is_leaf=_boxes.is_box)
    boxes = [box for _, box in paths]
    for _, one, _ in find(state, BFloat16ParametersState):
        rests = leaves_like(treedef, one.remainder, "the remainder", "params")
        for i, rest in enumerate(rests):
            param, rest = _boxes.opened((boxes[i], rest))
            if not _owns(rest):
                continue
            check_fits(paths[i][0], param, rest)
            if is_narrow(param):
                boxes[i] = _boxes.refilled(boxes[i], _halves.join(param, rest))
    return treedef.unflatten(boxes)


def _owns(rest: Any) -> bool:
    """Returns whether a parameter is this state's: it has a remainder there, or None.

    A parameter that `optax.masked` or `optax.partition` leaves to others has neither.
    """
    return rest is None or bool(jax.tree.leaves(rest))


def _chosen(mask: Any, params: optax.Params) -> list[bool]:
    """Returns for each parameter whether it shall become bfloat16."""
    return jax.tree.leaves(full_mask(True if mask is None else mask, params))


def _check_shape(path: tuple[Any, ...], master: jax.Array, rest: Any) -> None:
    """Raises if a remainder is of a parameter of another shape."""
    if rest is not None and rest.shape not in (master.shape, (1,) * master.ndim):
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} has shape {master.shape}, and its "
            f"remainder in the state {rest.shape}: the state was made for another one"
        )
