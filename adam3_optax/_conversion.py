"""From a running Adam to AdaM3 and back, and from one storage setting to another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax import _hyperparameters as hp
from adam3_optax import _storage
from adam3_optax._boxes import is_box, opened, refilled
from adam3_optax._checks import check_not_stacked
from adam3_optax._rounding import for_moments, leaf_key, random_bits
from adam3_optax._rule import Moments, ThirdMoment
from adam3_optax._states import find
from adam3_optax._storage import NAMES, DTypeSetting, Field, Format, Stored
from adam3_optax._transform import ScaleByAdam3State


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
    fades in over the next 1/(1-b3) steps. That is a warm-up of it; nothing corrects it.

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
        >>> state = from_adam_state(optax.adamw(1e-3).init(params), s_dtype="bfloat16")
        >>> optimizer = adam3w(1e-3, s_dtype="bfloat16")
        >>> updates, state = optimizer.update(params, state, params)
        >>> int(state[0].count), state[0].s.dtype.name
        (1, 'bfloat16')
    """
    formats = _storage.formats_for(hp.form(third_moment), m_dtype, v_dtype, s_dtype)

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(_storage.computed_in(x))

    def convert(adam: optax.ScaleByAdamState) -> ScaleByAdam3State:
        # Adam's moments have the dtypes of their parameters, which may differ.
        mu, nu = jax.tree.map(widen, (adam.mu, adam.nu))
        without_s = ScaleByAdam3State(mu, nu, optax.EmptyState(), adam.count)
        return _stored_as(formats, without_s)

    return _replace(state, optax.ScaleByAdamState, convert, "from_adam_state")


def to_adam_state(
    state: optax.OptState, *, mu_dtype: jax.typing.DTypeLike | None = None
) -> optax.OptState:
    """Turns a state of AdaM3 into one of Adam: the way back from `from_adam_state`.

    Args:
        state: An optimizer state, with m, v and s stored in any way.
        mu_dtype: The dtype of mu, as in `optax.adam`: a floating one. None keeps the
            dtype computed in.

    Returns:
        The state, with every `ScaleByAdam3State` replaced by a `ScaleByAdamState` with
        mu = m, nu = v and the same count. s is dropped.

    Raises:
        ValueError: No `ScaleByAdam3State` in `state`, or one in a state of
            `optax.inject_hyperparams`; a `mu_dtype` that is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3, to_adam_state
        >>> state = to_adam_state(adam3().init(jnp.ones(3)))
        >>> type(state[0]).__name__, state[0].mu.shape
        ('ScaleByAdamState', (3,))
    """
    if mu_dtype is not None and not _is_floating(mu_dtype):
        raise ValueError(f"mu_dtype must be a floating dtype or None, got {mu_dtype!r}")

    def convert(adam3: ScaleByAdam3State) -> optax.ScaleByAdamState:
        treedef, loaded = _load(adam3)
        mu, nu = treedef.unflatten(loaded.m), treedef.unflatten(loaded.v)
        if mu_dtype is not None:
            mu = jax.tree.map(lambda x: x.astype(mu_dtype), mu)
        return optax.ScaleByAdamState(count=adam3.count, mu=mu, nu=nu)

    return _replace(state, ScaleByAdam3State, convert, "to_adam_state")


def _is_floating(dtype: jax.typing.DTypeLike) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no dtype at all
        return False


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
        ValueError: No `ScaleByAdam3State` in `state`; an unknown setting.

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
    formats = _storage.formats_for(hp.form(third_moment), m_dtype, v_dtype, s_dtype)
    return _replace(state, ScaleByAdam3State, lambda x: _stored_as(formats, x))


def _load(state: ScaleByAdam3State) -> tuple[Any, Moments[list[Any]]]:
    """Returns the structure of the parameters, and the moments' leaves in its boxes."""
    formats = NAMES.map(_storage.format_of, state.moments)
    items, treedef = jax.tree.flatten(formats.m.trees(state.m)[0], is_leaf=is_box)

    def load(f: Format, field: Field) -> list[Any]:
        loaded = [f.load(opened(x)) for x in f.split(treedef, field)]
        return list(map(refilled, items, loaded))

    loaded = formats.map(load, state.moments)
    if isinstance(formats.s, _storage.Absent):
        loaded = loaded._replace(s=jax.tree.map(jnp.zeros_like, loaded.v))
    return treedef, loaded


def _stored_as(formats: Moments[Format], state: ScaleByAdam3State) -> ScaleByAdam3State:
    """Returns the state with its moments in other formats."""
    check_not_stacked(state)
    treedef, loaded = _load(state)

    def bits(f: Format, leaf: int, x: jax.Array) -> jax.Array:
        drawn = random_bits(state.count, leaf_key(leaf), x)
        return getattr(for_moments(drawn), f.moment)

    def store_leaf(f: Format, leaf: int, x: Any, old: Any) -> Stored:
        x, old = opened((x, old))
        return f.store(x, old, bits(f, leaf, x), lambda: x)

    def store(f: Format, field: Field, leaves: list[Any]) -> Field:
        if f.fits(field):
            return field
        olds = f.split(treedef, f.zeros(treedef.unflatten(leaves)))
        pairs = enumerate(zip(leaves, olds, strict=True))
        rounded = [store_leaf(f, leaf, x, old) for leaf, (x, old) in pairs]
        return f.join(treedef, list(map(refilled, olds, rounded)))

    fields = formats.map(store, state.moments, loaded)
    return ScaleByAdam3State(*fields, count=state.count)


def _replace(
    state: optax.OptState,
    kind: type,
    convert: Callable[[Any], Any],
    other_optimizer: str = "",
) -> optax.OptState:
    """Returns the state with every state of a kind converted.

    `other_optimizer` names the function that converts to the state of another one. That
    one would go on with this one's hyperparameters if they were injected.
    """
    injected = [hyperparams for _, _, hyperparams in find(state, kind)]
    if any(injected) and other_optimizer:
        raise ValueError(
            "the state of optax.inject_hyperparams also holds the old optimizer's "
            "hyperparameters, and would go on with them. Make a new state, and convert "
            "only what is inside: new.init(params)._replace(count=state.count, "
            f"inner_state={other_optimizer}(state.inner_state))"
        )

    def is_node(x: object) -> bool:
        return isinstance(x, kind)

    return jax.tree.map(
        lambda x: convert(x) if is_node(x) else x, state, is_leaf=is_node
    )
