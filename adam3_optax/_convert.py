"""From a running Adam to AdaM3 and back, and from one storage setting to another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax import _formats, _rounding, _trees
from adam3_optax import _hyperparameters as hp
from adam3_optax._adam3 import ScaleByAdam3State, stored_leaves
from adam3_optax._boxes import refilled
from adam3_optax._formats import DTypeSetting, Float8, Format, computed_in
from adam3_optax._rule import Form, Moments, ThirdMoment


def from_adam_state(
    state: optax.OptState,
    *,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.OptState:
    """Turns the state of a running Adam into one of AdaM3, to switch in mid-training.

    Every `optax.ScaleByAdamState` in `state` (in chains, masks, or multi-step states)
    becomes a `ScaleByAdam3State` with m = mu, v = nu, the same count, and s = 0 (or no
    s, with `third_moment=None`). All else stays, such as the counts of schedules. So
    the state of `optax.adamw(schedule)` becomes one for `adam3w(schedule)` with the
    same settings. Buffers that did not have to change are shared with the old state:
    donate only one of the two.

    `optax.adamax` has the same type of state, but its nu is no second moment, and gives
    nonsense here.

    At a large count s = 0 is no estimate yet, and its bias correction 1 - b3ᵗ is near
    1. So k steps after the switch ŝ is 1 - b3ᵏ of what it will be: the skewness term
    fades in over the next 1/(1-b3) steps. This acts as a warm-up of the term.

    Args:
        state: An optimizer state.
        third_moment: The form, as in `scale_by_adam3`.
        m_dtype: How m is stored, as in `scale_by_adam3`.
        v_dtype: How v is stored.
        s_dtype: How s is stored.

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
        >>> form = dict(third_moment="standardized", s_dtype="bfloat16")
        >>> state = from_adam_state(optax.adamw(1e-3).init(params), **form)
        >>> optimizer = adam3w(1e-3, **form)
        >>> updates, state = optimizer.update(params, state, params)
        >>> int(state[0].count), state[0].s.dtype.name
        (1, 'bfloat16')
    """
    form = hp.form(third_moment)
    formats = _formats.formats_for(form, m_dtype, v_dtype, s_dtype)

    def convert(adam: optax.ScaleByAdamState) -> ScaleByAdam3State:
        # Adam's moments have the dtypes of their parameters, which may differ.
        mu, nu = jax.tree.map(lambda x: x.astype(computed_in(x)), (adam.mu, adam.nu))
        without_s = ScaleByAdam3State(mu, nu, optax.EmptyState(), adam.count)
        return _stored_as(formats, form, without_s)

    return _replace(state, optax.ScaleByAdamState, convert, "from_adam_state")


def to_adam_state(state: optax.OptState) -> optax.OptState:
    """Turns a state of AdaM3 into one of Adam: the way back from `from_adam_state`.

    Args:
        state: An optimizer state, with m, v and s stored in any way.

    Returns:
        The state, with every `ScaleByAdam3State` replaced by a `ScaleByAdamState` with
        mu = m, nu = v, in float32 or float64, and the same count. s is dropped.

    Raises:
        ValueError: No `ScaleByAdam3State` in `state`, or one in a state of
            `optax.inject_hyperparams`.

    Example:
        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3, to_adam_state
        >>> state = to_adam_state(adam3(third_moment=None).init(jnp.ones(3)))
        >>> type(state[0]).__name__, state[0].mu.shape
        ('ScaleByAdamState', (3,))
    """

    def convert(adam3: ScaleByAdam3State) -> optax.ScaleByAdamState:
        adam3 = adam3._replace(s=optax.EmptyState())
        formats = _formats.formats_of(adam3.moments, None)
        rows = [_formats.loaded(formats, x) for _, x in stored_leaves(adam3)]
        mu = refilled(adam3.m, [row.m for row in rows])
        nu = refilled(adam3.m, [row.v for row in rows])
        return optax.ScaleByAdamState(count=adam3.count, mu=mu, nu=nu)

    return _replace(state, ScaleByAdam3State, convert, "to_adam_state")


def convert_state(
    state: optax.OptState,
    *,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.OptState:
    """Turns a state of AdaM3 into one for other settings.

    From `third_moment=None` to a form, s starts at 0. From a form to None, s is
    dropped. Between forms s stays as it is: it goes on from an average of something
    else, and forgets that within a few times 1/(1-b3) steps.

    A state does not say of which dtype the parameters are. A moment that was stored in
    less than float64 becomes float32 with None, also for float64 parameters.

    Args:
        state: An optimizer state, with m, v and s stored in any way.
        third_moment: The new form, as in `scale_by_adam3`.
        m_dtype: How m is stored from now on, as in `scale_by_adam3`.
        v_dtype: How v is stored.
        s_dtype: How s is stored.

    Returns:
        The state, with every `ScaleByAdam3State` converted.

    Raises:
        ValueError: No `ScaleByAdam3State` in `state`; an unknown setting; a state
            stacked by `jax.vmap`.

    Example:
        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3, convert_state
        >>> params = jnp.ones(3)
        >>> adam = adam3(third_moment=None).init(params)
        >>> state = convert_state(adam, third_moment="standardized")
        >>> updates, state = adam3(third_moment="standardized").update(params, state)
        >>> adam[0].s, state[0].s.shape
        (EmptyState(), (3,))
    """
    form = hp.form(third_moment)
    formats = _formats.formats_for(form, m_dtype, v_dtype, s_dtype)
    return _replace(state, ScaleByAdam3State, lambda x: _stored_as(formats, form, x))


def _stored_as(formats: Moments[Format], form: Form | None, state: Any) -> Any:
    """Returns the state with its moments in other formats."""
    _trees.check_not_stacked(state)
    if form is None:
        state = state._replace(s=optax.EmptyState())
    # In float8 another form's s is read in the unit of this one.
    was = _formats.formats_of(state.moments, form)
    # What has its format already stays as it is, if its unit stays.
    has_unit = [isinstance(f, Float8) for f in formats]
    fits = list(map(_formats.fits, formats, state.moments))
    is_kept = [fits[i] and (fits[1] or not has_unit[i]) for i in range(3)]
    count = jnp.maximum(state.count, 1)  # with 0, all leaves would have the same bits

    def convert(path: tuple[Any, ...], stored: Moments[Any]) -> Moments[Any]:
        loaded = _formats.loaded(was, stored)
        key = _rounding.leaf_key(path, "conversion")
        bits = _rounding.for_moments(_rounding.random_bits(count, key, loaded.v))

        def store(i: int, sigma: Any = None) -> Any:
            if is_kept[i]:
                return stored[i]
            x = jnp.zeros_like(loaded.v) if stored[i] is None else loaded[i]
            x = _formats.narrowed(x, computed_in(formats[i].zeros(x)))
            return formats[i].store(x, sigma, bits[i])

        v = store(1)  # it comes first, because it is the others' unit
        sigma = _formats.sigma_of(formats.v.load(v, None))
        return Moments(store(0, sigma), v, store(2, sigma))

    rows = [convert(*leaf) for leaf in stored_leaves(state)]
    columns = [[row[i] for row in rows] for i in range(3)]
    new = [state[i] if is_kept[i] else refilled(state.m, columns[i]) for i in range(3)]
    return ScaleByAdam3State(new[0], new[1], new[2], state.count)


def _replace(state: Any, kind: type, convert: Any, other_optimizer: str = "") -> Any:
    """Returns the state with every state of a kind converted by a function.

    `other_optimizer` names the function that converts to the state of another one. That
    one would go on with this one's hyperparameters if they were injected.
    """
    injected = [hyperparams for _, _, hyperparams in _trees.find(state, kind)]
    if any(injected) and other_optimizer:
        raise ValueError(
            "the state of optax.inject_hyperparams also holds the old optimizer's "
            "hyperparameters, and would go on with them. Make a new state, and convert "
            "only what is inside: new.init(params)._replace(count=state.count, "
            f"inner_state={other_optimizer}(state.inner_state))"
        )
    return _trees.replaced(state, kind, convert)
