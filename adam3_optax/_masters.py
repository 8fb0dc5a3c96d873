"""From float32 parameters to bfloat16 ones with remainders, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax import _boxes, _halves, _rounding
from adam3_optax._bfloat16 import BFloat16ParametersState, check_fits, is_narrow
from adam3_optax._states import find


def to_bfloat16_parameters(
    params: optax.Params, state: optax.OptState, mask: Any = None
) -> tuple[optax.Params, Any]:
    """Turns float32 parameters into bfloat16 ones, and loses nothing.

    Args:
        params: The parameters; float32 leaves become bfloat16.
        state: Of an optimizer with `bfloat16_parameters` anywhere in it: what `init`
            has returned for these parameters, or a later one, into which these
            parameters are swapped.
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

    def is_state(x: Any) -> bool:
        return isinstance(x, BFloat16ParametersState)

    def convert(one: Any) -> Any:
        if not is_state(one):
            return one
        rests = _rests(treedef, one.remainder)
        for i, box in enumerate(boxes):
            master, rest = _boxes.opened((box, rests[i]))
            is_wide = jnp.result_type(master) == jnp.float32
            if chosen[i] and is_wide and not isinstance(rest, optax.MaskedNode):
                key = _rounding.leaf_key(i, purpose=1)
                param, rest = _halves.split(master, rest, one.count, key)
                narrowed[i] = _boxes.refilled(box, param)
                rests[i] = _boxes.refilled(box, rest)
        if isinstance(one.remainder, optax.EmptyState):
            return one
        return one._replace(remainder=treedef.unflatten(rests))

    state = jax.tree.map(convert, state, is_leaf=is_state)
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
            if is_narrow(param) and not isinstance(rest, optax.MaskedNode):
                check_fits((jax.tree_util.SequenceKey(i),), param, rest)
                boxes[i] = _boxes.refilled(boxes[i], _halves.join(param, rest))
    return treedef.unflatten(boxes)


def _rests(treedef: Any, remainder: Any) -> list[Any]:
    """Returns the remainder of each parameter; None where none are kept."""
    if isinstance(remainder, optax.EmptyState):
        return [None] * treedef.num_leaves
    return treedef.flatten_up_to(remainder)
