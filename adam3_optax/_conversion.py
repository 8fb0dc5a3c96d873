"""From a running Adam to AdaM3 and back, and from one storage setting to another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax._rounding import random_bits, stream
from adam3_optax._storage import DTypeSetting, Float, format_of, resting
from adam3_optax._transform import ScaleByAdam3State


def from_adam_state(
    state: optax.OptState,
    *,
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.OptState:
    """Turns the state of a running Adam into one of AdaM3, to switch in mid-training.

    Every `optax.ScaleByAdamState` in `state` (in chains, masks, or multi-step states)
    becomes a `ScaleByAdam3State` with m = mu, v = nu, the same count, and s = 0. All
    else (counts of schedules, say) stays. So the state of `optax.adamw(schedule)`
    becomes one for `adam3w(schedule)` with the same settings. Buffers are shared with
    the old state where nothing had to change: donate only one of the two.

    `optax.adamax` has the same type of state, but its nu is no second moment, and gives
    nonsense here.

    At a large count s = 0 is no estimate yet, and its bias correction 1 - b3ᵗ is near
    1. So k steps after the switch ŝ is 1 - b3ᵏ of what it will be: the skewness term
    fades in over the next 1/(1-b3) steps. That is a warm-up of it; nothing corrects it.

    Args:
        state: An optimizer state.
        m_dtype: How m shall rest, as in `scale_by_adam3`.
        v_dtype: How v shall rest.
        s_dtype: How s shall rest.

    Returns:
        The state, with the Adam states replaced.

    Raises:
        ValueError: No `ScaleByAdamState` in `state`, or one in a state of
            `optax.inject_hyperparams`, which holds Adam's hyperparameters (the message
            says what to do); an unknown setting.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adam3_optax import adam3w, from_adam_state
        >>> params = jnp.ones(3)
        >>> state = from_adam_state(optax.adamw(1e-3).init(params), s_dtype="bfloat16")
        >>> optimizer = adam3w(1e-3, s_dtype="bfloat16")
        >>> updates, state = optimizer.update(params, state, params)
        >>> int(state[0].count), state[0].s.dtype.name
        (1, 'bfloat16')
    """
    formats = _formats(m_dtype, v_dtype, s_dtype)

    def convert(adam: optax.ScaleByAdamState) -> ScaleByAdam3State:
        s = jax.tree.map(jnp.zeros_like, adam.nu)
        return _rest(formats, (adam.mu, adam.nu, s), adam.count)

    _check_not_injected(state, optax.ScaleByAdamState, "from_adam_state")
    return _replace(state, optax.ScaleByAdamState, convert)


def to_adam_state(
    state: optax.OptState, *, mu_dtype: jax.typing.DTypeLike | None = None
) -> optax.OptState:
    """Turns a state of AdaM3 into one of Adam: the way back from `from_adam_state`.

    Args:
        state: An optimizer state, with m, v and s resting in any way.
        mu_dtype: The type of mu, as in `optax.adam`; None keeps the type computed in.

    Returns:
        The state, with every `ScaleByAdam3State` replaced by a `ScaleByAdamState` with
        mu = m, nu = v and the same count. s is dropped.

    Raises:
        ValueError: No `ScaleByAdam3State` in `state`, or one in a state of
            `optax.inject_hyperparams`.
    """

    def convert(adam3: ScaleByAdam3State) -> optax.ScaleByAdamState:
        mu, nu = _load("m", adam3.m), _load("v", adam3.v)
        if mu_dtype is not None:
            mu = jax.tree.map(lambda x: x.astype(mu_dtype), mu)
        return optax.ScaleByAdamState(count=adam3.count, mu=mu, nu=nu)

    _check_not_injected(state, ScaleByAdam3State, "to_adam_state")
    return _replace(state, ScaleByAdam3State, convert)


def convert_state(
    state: optax.OptState,
    *,
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.OptState:
    """Turns a state of AdaM3 into one that rests in another way.

    Args:
        state: An optimizer state, with m, v and s resting in any way.
        m_dtype: How m shall rest, as in `scale_by_adam3`.
        v_dtype: How v shall rest.
        s_dtype: How s shall rest.

    Returns:
        The state, with every `ScaleByAdam3State` converted.

    Raises:
        ValueError: No `ScaleByAdam3State` in `state`; an unknown setting.
    """
    formats = _formats(m_dtype, v_dtype, s_dtype)

    def convert(adam3: ScaleByAdam3State) -> ScaleByAdam3State:
        moments = tuple(_load(name, getattr(adam3, name)) for name in "mvs")
        return _rest(formats, moments, adam3.count)

    return _replace(state, ScaleByAdam3State, convert)


def _formats(*settings: DTypeSetting) -> list[Float]:
    return [resting(*x) for x in zip("mvs", settings, strict=True)]


def _load(moment: str, field: Any) -> Any:
    """Returns a tree of the moment itself, however it rests."""
    f = format_of(moment, field)
    treedef = f.structure(field)
    return treedef.unflatten(map(f.load, f.split(treedef, field)))


def _rest(formats: list[Float], moments: Any, count: jax.Array) -> ScaleByAdam3State:
    """Returns a state in which moments rest in the given formats."""

    def store(i: int, f: Float, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        rests = f.split(treedef, f.zeros(tree))
        pairs = enumerate(zip(leaves, rests, strict=True))
        stored = [
            f.store(x, rest, random_bits(count, stream(3 * index + i)))
            for index, (x, rest) in pairs
        ]
        return f.join(treedef, stored)

    m, v, s = map(store, range(3), formats, moments)
    return ScaleByAdam3State(m, v, s, count)


def _replace(state: optax.OptState, kind: Any, convert: Any) -> optax.OptState:
    """Returns the state with every state of a kind converted."""
    if not _holds(state, kind):
        raise ValueError(f"there is no {kind.__name__} in the optimizer's state")
    return jax.tree.map(
        lambda x: convert(x) if isinstance(x, kind) else x,
        state,
        is_leaf=lambda x: isinstance(x, kind),
    )


def _holds(state: optax.OptState, kind: Any) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(x, kind) for x in leaves)


def _check_not_injected(state: optax.OptState, kind: Any, name: str) -> None:
    """Raises where the other optimizer would go on with this one's hyperparameters."""
    injected = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, injected)):
        if isinstance(x, injected) and _holds(x.inner_state, kind):
            raise ValueError(
                "the state of optax.inject_hyperparams holds the hyperparameters of "
                "the other optimizer, too. Make a new one, and convert what is inside: "
                "new.init(params)._replace(count=state.count, "
                f"inner_state={name}(state.inner_state))"
            )
