"""AdaM3: the optimizers, the transformation over trees, and the step of one leaf.

A gradient goes through this file from its top to its end, then through `_rule.py`, and
through `_formats.py`, which stores the moments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import PyTreeDef, keystr

from adam3_optax import _boxes, _formats, _rounding, _rule, _trees, _xla
from adam3_optax import _hyperparameters as hp
from adam3_optax._formats import Absent, DTypeSetting, Field, Format
from adam3_optax._rule import Coefficients, Form, Moments, ThirdMoment


class ScaleByAdam3State(NamedTuple):
    """The state of AdaM3. Immutable; `update` returns a new one.

    Attributes:
        m: First moment: a tree like the parameters, of float32 (float64 for float64
            parameters), bfloat16, or float8_e4m3fn: multiples of sqrt(v).
        v: Second moment, likewise; its 8-bit codes are uint8.
        s: Third moment, likewise; `optax.EmptyState()` if there is none.
        count: Steps taken: int32, of shape (). Stays at its maximum.
    """

    m: optax.Updates
    v: optax.Updates
    s: optax.Updates
    count: Array  # type: ignore[assignment]  # shadows tuple.count

    @property
    def moments(self) -> Moments[Field]:
        """m, v and s."""
        return Moments(self.m, self.v, self.s)


@hp.named
def adam3(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b3: jax.typing.ArrayLike = 0.999,
    lam: optax.ScalarOrSchedule = 0.01,
    tau: optax.ScalarOrSchedule = 1.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.GradientTransformationExtraArgs:
    """The AdaM3 optimizer: Adam with a third moment that shifts the momentum.

    Its update is -learning_rate·u_t, with the u_t of `scale_by_adam3`, which describes
    the arguments from `b1` on, the state, the errors and the warning.

    Args:
        learning_rate: A number, a scalar array, or a schedule: a function of the count
            of steps before this one. The source recommends warm-up.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        b3: Decay of the third moment, in [0, 1).
        lam: Weight of the skewness term: any finite number, or a schedule.
        tau: Threshold of the skewness term, in (0, inf], or a schedule.
        eps: Added to the denominator; in [0, inf).
        eps_root: Added under the root of the denominator; in [0, inf).
        third_moment: The form of the third moment, or None for Adam.
        m_dtype: How m is stored: None, `"float32"`, `"bfloat16"` or `"float8"`.
        v_dtype: How v is stored.
        s_dtype: How s is stored.

    Returns:
        A `GradientTransformationExtraArgs`. Updates have the gradients' dtype, whatever
        the learning rate's is: all is computed in float32 or wider, and rounded once.
        An update below 1/512 of its bfloat16 parameter is lost when it is added. Below
        1/256 it may be lost. `bfloat16_parameters` keeps such updates.

    Example:
        On the first step every element moves by the learning rate, nearly as with
        Adam: the cubic term has just begun.

        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3
        >>> optimizer = adam3(learning_rate=0.1, third_moment="cubic")
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> bool(jnp.allclose(updates, jnp.array([-0.1, 0.1]), rtol=1e-3))
        True

    Source:
        `docs/algorithm.md`, section 1.
    """
    rule = functools.partial(scale_by_adam3, b1, b2, b3=b3, lam=lam, tau=tau, eps=eps)
    rule = functools.partial(rule, eps_root=eps_root, third_moment=third_moment)
    scale = rule(m_dtype=m_dtype, v_dtype=v_dtype, s_dtype=s_dtype)
    return in_float32(optax.chain(scale, _scale_by_rate(learning_rate)))


@hp.named
def adam3w(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b3: jax.typing.ArrayLike = 0.999,
    lam: optax.ScalarOrSchedule = 0.01,
    tau: optax.ScalarOrSchedule = 1.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.GradientTransformationExtraArgs:
    """`adam3` with decoupled weight decay, as `optax.adamw` is to `optax.adam`.

    Its update is -learning_rate·(u_t + weight_decay·θ), with the u_t of
    `scale_by_adam3`: the decay is multiplied by the learning rate.

    Args:
        learning_rate: A number, a scalar array, or a schedule, as in `adam3`.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        b3: Decay of the third moment, in [0, 1).
        lam: Weight of the skewness term: any finite number, or a schedule.
        tau: Threshold of the skewness term, in (0, inf], or a schedule.
        eps: Added to the denominator; in [0, inf).
        eps_root: Added under the root of the denominator; in [0, inf).
        weight_decay: Any finite number, a scalar array, or a schedule.
        mask: Where to decay: a tree of booleans like the parameters, or a prefix of it
            with more than one boolean, or a function that makes such a tree from the
            parameters. None decays all. With `optax.inject_hyperparams`, name it in
            `static_args`: a function would be taken for a schedule there.
        third_moment: The form of the third moment, or None for Adam.
        m_dtype: How m is stored: None, `"float32"`, `"bfloat16"` or `"float8"`.
        v_dtype: How v is stored.
        s_dtype: How s is stored.

    Returns:
        A `GradientTransformationExtraArgs`, whose `update` needs the parameters. Dtypes
        and the caution on bfloat16 parameters are as in `adam3`. The decay is computed
        in float32 too, and rounded together with the rest of the update.

    Raises:
        ValueError: As `scale_by_adam3`; at update, no parameters.
        TypeError: As `scale_by_adam3`; a `mask` that arrives as a number.

    Example:
        Where the gradient is zero, only the decay acts.

        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3w
        >>> optimizer = adam3w(0.1, weight_decay=0.5, third_moment="cubic")
        >>> params = jnp.array([1.0, -2.0])
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.zeros(2), state, params)
        >>> bool(jnp.allclose(updates, -0.1 * 0.5 * params))
        True

    Source:
        `docs/algorithm.md`, section 1; Loshchilov and Hutter, arXiv 1711.05101.
    """
    # If a mask function was taken for a schedule, its result arrives here.
    if isinstance(mask, bool | int | float | np.generic | np.ndarray | Array):
        raise TypeError(
            "mask must be a tree of booleans, not one alone, or a function that makes "
            f"one, got {mask}. With optax.inject_hyperparams, pass static_args='mask'."
        )
    rule = functools.partial(scale_by_adam3, b1, b2, b3=b3, lam=lam, tau=tau, eps=eps)
    rule = functools.partial(rule, eps_root=eps_root, third_moment=third_moment)
    scale = rule(m_dtype=m_dtype, v_dtype=v_dtype, s_dtype=s_dtype)
    decay = _add_decayed_weights(weight_decay, mask)
    return in_float32(optax.chain(scale, decay, _scale_by_rate(learning_rate)))


def _add_decayed_weights(weight_decay: optax.ScalarOrSchedule, mask: Any) -> Any:
    """Adds decay to updates, with the rate and the parameters cast to their dtype.

    The state is that of `optax.add_decayed_weights`, masked if there is a mask.
    """
    rate_at = hp.value_at("weight_decay", weight_decay)
    is_schedule = callable(weight_decay)
    plain = optax.add_decayed_weights(rate_at if is_schedule else 0.0)

    def init(params: optax.Params) -> optax.OptState:
        if jax.tree.leaves(params):  # `optax.tree.map_params` has a placeholder
            _trees.choices(mask(params) if callable(mask) else mask, params)
        state = plain.init(params)
        return state if mask is None else optax.MaskedState(state)

    def update(updates: optax.Updates, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("weight decay needs params: pass them to update")
        inner = state if mask is None else state.inner_state
        rate = rate_at(inner.count if is_schedule else 0)
        us, treedef = jax.tree.flatten_with_path(updates, is_leaf=lambda x: x is None)
        ps = _trees.leaves_like(treedef, params, "params", "updates")
        # A mask function gets the parameters as they were passed: not cast.
        choices = iter(_trees.choices(mask(params) if callable(mask) else mask, params))
        new = []
        for (path, u), p in zip(us, ps, strict=True):
            p = _boxes.opened(p)  # gradients may be plain where parameters are in boxes
            if p is not None and next(choices) and u is not None:
                if u.shape != jnp.shape(p):
                    raise ValueError(
                        f"params{keystr(path)} has shape {jnp.shape(p)}, but its "
                        f"update has {u.shape}"
                    )
                u = u + jnp.asarray(rate, u.dtype) * jnp.asarray(p, u.dtype)
            new.append(u)
        if is_schedule:
            inner = inner._replace(count=optax.safe_increment(inner.count))
        state = inner if mask is None else optax.MaskedState(inner)
        return jax.tree.unflatten(treedef, new), state

    return optax.GradientTransformation(init, update)


def _scale_by_rate(learning_rate: optax.ScalarOrSchedule) -> Any:
    """Scales by -learning_rate, cast to the updates' dtype: they are not promoted."""
    rate_at = hp.value_at("learning_rate", learning_rate)
    if callable(learning_rate):
        return optax.scale_by_learning_rate(rate_at)

    def scale(updates: optax.Updates, params: Any) -> optax.Updates:
        return jax.tree.map(lambda u: -jnp.asarray(rate_at(0), u.dtype) * u, updates)

    return optax.stateless(scale)


def in_float32(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that computes in float32 or wider.

    Its updates have the gradients' dtype, if that is not an integer's.
    """

    def as_given(u: Any, g: Any) -> Any:
        dtype = jnp.result_type(g)
        return u.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else u

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        us = jax.tree.map(_formats.widened, updates)
        us, state = inner.update(us, state, params, **extra_args)
        return jax.tree.map(as_given, us, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@hp.named
def scale_by_adam3(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b3: jax.typing.ArrayLike = 0.999,
    lam: optax.ScalarOrSchedule = 0.01,
    tau: optax.ScalarOrSchedule = 1.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients by AdaM3: Adam with a third moment that shifts the momentum.

    Per element, with t counted from 1 and m = v = s = 0 before::

        m_t = b1·m + (1-b1)·g
        v_t = b2·v + (1-b2)·g²
        s_t = b3·s + (1-b3)·(g - m_t)³
        b_t = lam·clip(s_t, -tau, tau)
        u_t = (m_t/(1-b1ᵗ) + b_t) / (sqrt(v_t/(1-b2ᵗ) + eps_root) + eps)

    That is the form `"cubic"`. There are two others, and None:

    - `"stabilized"`: s averages sign(d)·(|d| + eps)^(3/2), d = g - m_t, in place of d³.
    - `"standardized"`: the skewness has no unit. With d = g - m_t/(1-b1ᵗ),
      ŝ = s_t/(1-b3ᵗ) and v̂ = v_t/(1-b2ᵗ), s averages d³, and
      b_t = lam·sqrt(v̂)·clip(ŝ/v̂^(3/2), -tau, tau). This is 0 where v̂ is 0 (below
      2e-31 in float32), and moves u_t by at most |lam|·tau.
    - None: b_t = 0, and there is no s. This is Adam, with what this package does better
      than `optax.adam`. `b3`, `lam` and `tau` have no effect.

    In the first two forms b_t has units of g³ or g^(3/2), so rescaling the loss changes
    the method. Where |g| is below about 1e-3, the cubic form is Adam to rounding in
    most elements. With both forms keep b3 <= sqrt(b2): `BlowUpWarning` says why.

    This is not the AdaM³ of Wang et al. (arXiv 2106.11514), which has no third moment.
    There is no `nesterov`: the rule defines no look-ahead for its skewness term.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        b3: Decay of the third moment, in [0, 1).
        lam: Weight λ of the skewness term: any finite number; 0 makes it Adam. The
            source recommends 0.001 to 0.1. A number, a scalar array or a schedule.
        tau: Threshold τ, in (0, inf]; inf means no clip. It has the units of s (g³ or
            g^(3/2)); in the standardized form it has none. A number, a scalar array or
            a schedule.
        eps: Added to the denominator and, in the stabilized form, to |d|; in [0, inf).
            In units of g. With 0, an element that has had no gradient yet becomes NaN.
        eps_root: Added under the root of the denominator alone; in [0, inf). In units
            of g². Above 0, derivatives can be taken through steps at zero gradient.
        third_moment: The form, as above, or None.
        m_dtype: How m is stored between steps: None (float32, or float64 for float64
            parameters), `"float32"`, `"bfloat16"` or `"float8"`, or the dtype of that
            name. With `optax.inject_hyperparams` use a string, because it would call a
            dtype as a schedule. float16 is refused: (g - m)³ underflows in it.
            Arithmetic stays in float32, and the update is made from the moments as they
            are stored. See `docs/low_precision.md`.
        v_dtype: How v is stored: likewise. `"float8"` makes steps 3 to 8% longer, and
            is refused with `"standardized"`.
        s_dtype: How s is stored. Must be None with `third_moment=None`.

    Returns:
        A `GradientTransformationExtraArgs` with a `ScaleByAdam3State`. Arithmetic is in
        float32 (float64 for float64) for gradients of every dtype. Updates have the
        gradients' dtypes and shapes, and the state keeps its dtypes. If a gradient is
        None, its part of the state stays as it is. Finite gradients keep the state
        finite.

    Raises:
        ValueError: A hyperparameter out of range, or given as an array narrower than
            float32; an unknown storage setting; at init, complex parameters; at
            update, gradients whose structure, shapes or dtypes do not fit, a state made
            with other settings, or a state stacked by `jax.vmap`.
        TypeError: A hyperparameter that is no number, or a storage setting that is a
            number.

    Warns:
        BlowUpWarning: In the first two forms, once, if b3 > sqrt(b2).

    Example:
        The first step is the sign of the gradient, as Adam's. Later, a rare large
        gradient leaves its mark in s.

        >>> import jax.numpy as jnp
        >>> from adam3_optax import scale_by_adam3
        >>> optimizer = scale_by_adam3(lam=0.1, third_moment="standardized")
        >>> params = jnp.zeros(2)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([3.0, -1e-3]), state)
        >>> bool(jnp.allclose(updates, jnp.array([1.0, -1.0]), rtol=1e-3))
        True
        >>> for g in (-1.0, -1.0, 5.0, -1.0, -1.0, -1.0):
        ...     updates, state = optimizer.update(jnp.array([g, -g]), state)
        >>> float(state.s[0]) > 0 > float(state.s[1])
        True

    Source:
        `docs/algorithm.md`, sections 1 to 3. Where the source document contradicts
        itself, section 1 says what was chosen.
    """
    b1, b2, b3 = hp.number("b1", b1), hp.number("b2", b2), hp.number("b3", b3)
    eps, eps_root = hp.number("eps", eps), hp.number("eps_root", eps_root)
    lam_at, tau_at = hp.value_at("lam", lam), hp.value_at("tau", tau)
    form = hp.form(third_moment)
    formats = _formats.formats_for(form, m_dtype, v_dtype, s_dtype)
    hp.warn_of_blow_up(b2, b3, lam, form)
    hp.warn_of_float8(b1, b2, b3, form, formats)

    def init(params: optax.Params) -> ScaleByAdam3State:
        for path, param in jax.tree.leaves_with_path(params):
            dtype = jnp.result_type(param)
            if jnp.issubdtype(dtype, jnp.complexfloating):
                raise ValueError(
                    f"params{keystr(path)} is {dtype}; AdaM3 needs real parameters. "
                    "Wrap the optimizer in optax.contrib.split_real_and_imaginary."
                )
        m, v, s = (f.zeros(params) for f in formats)
        return ScaleByAdam3State(m, v, s, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _check_state(state, formats)
        count = optax.safe_increment(state.count)
        lam_t, tau_t = lam_at(state.count), tau_at(state.count)
        h = (b1, b2, b3, lam_t, tau_t, eps, eps_root)
        # Once a step and dtype, not once a leaf: this would dominate compile time.
        coefficients = functools.cache(functools.partial(_rule.coefficients, h, count))

        def step(path: tuple[Any, ...], item: Any, *stored: Any) -> Any:
            if not jax.tree.leaves(item):
                return item, *stored
            g, old = jnp.asarray(_boxes.opened(item)), Moments(*_boxes.opened(stored))
            _check_gradient(path, g, old, formats)
            k = coefficients(_formats.computed_in(*jax.tree.leaves((g, old))))
            key = _rounding.leaf_key(path, "moments")
            u, new = _step_leaf(formats, form, g, old, k, count, key)
            return _boxes.refilled((item, *stored), (u, *new))

        leaves, treedef = jax.tree.flatten_with_path(updates, is_leaf=_boxes.is_place)
        rows = _rows(treedef, state.moments, "the gradients'")
        stepped = [step(*leaf, *row) for leaf, row in zip(leaves, rows, strict=True)]

        def tree(i: int) -> Any:
            return jax.tree.unflatten(treedef, [x[i] for x in stepped])

        s = state.s if form is None else tree(3)
        return tree(0), ScaleByAdam3State(tree(1), tree(2), s, count)

    return optax.GradientTransformationExtraArgs(init, update)


_FROM_ADAM = "adam3_optax.from_adam_state converts a state of optax.adam or adamw."


# Jitted, and with everything but arrays as static arguments. So it is traced once for
# each shape, not for each leaf. An update that is not itself jitted costs one call a
# leaf, and an optimizer that is built again compiles nothing.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_leaf(
    formats: Moments[Format],
    form: Form | None,
    g: Array,
    old: Moments[Any],
    k: Coefficients,
    count: Array,
    key: _rounding.Key,
) -> tuple[Array, Moments[Any]]:
    """Returns the update of one leaf, and its moments after the step, as stored."""
    dtype = k.c1.dtype
    bits: Moments[Any] = Moments(None, None, None)
    if any(f.rounds for f in formats):
        bits = _rounding.for_moments(_rounding.random_bits(count, key, g))
    has_unit = _formats.needs_sigma(formats)

    def load(f: Format, stored: Any, sigma: Any = None) -> Array:
        return f.load(stored, sigma).astype(dtype)

    def store(f: Format, x: Array, like: Any, sigma: Any, bits: Any) -> Any:
        return f.store(_formats.narrowed(x, _formats.computed_in(like)), sigma, bits)

    def wide(g: Array) -> Array:
        return formats.v.within(g.astype(dtype))

    def sigma_of(v: Any) -> Any:
        return _formats.sigma_of(load(formats.v, v)) if has_unit else None

    def new_m(g: Array, m: Any, v: Any) -> Array:
        return _rule.update_m(wide(g), load(formats.m, m, sigma_of(v)), k)

    def new_v(g: Array, v: Any) -> tuple[Array, Any]:
        """Returns v_t, exact and stored. Each use has the same random bits."""
        v_t = _rule.update_v(wide(g), load(formats.v, v), k)
        return v_t, store(formats.v, v_t, v, None, bits.v)

    # Everything is computed from the old moments. s comes before m, which it needs, and
    # both before v, which is the unit of both in float8.
    g_t, (m, v, s) = g, old
    if form is not None:
        m_t, s_old = new_m(g_t, m, v), load(formats.s, s, sigma_of(v))
        s_t = _rule.update_s(wide(g_t), m_t, s_old, k, form)
        s = store(formats.s, s_t, s, sigma_of(new_v(g_t, v)[1]), bits.s)
        s, (g_t, m, v) = _in_order(formats.s, s, (g_t, m, v))
    m_t = new_m(g_t, m, v)
    m = store(formats.m, m_t, m, sigma_of(new_v(g_t, v)[1]), bits.m)
    m, (g_t, v) = _in_order(formats.m, m, (g_t, v))
    v_t, v = new_v(g_t, v)
    v, _ = _in_order(formats.v, v, ())

    # The update is made from the moments as stored. If it were made from the exact
    # ones, XLA would keep these in memory.
    sigma = sigma_of(v)
    v_t = _rounding.straight_through(v_t, load(formats.v, v))
    m_t = _rounding.straight_through(m_t, load(formats.m, m, sigma))
    b_t: Array | float = 0.0
    if form is not None:
        s_t = _rounding.straight_through(s_t, load(formats.s, s, sigma))
        b_t = form.term(s_t, v_t, sigma, k)
    u_t = _rule.direction(m_t, v_t, b_t, sigma, k)
    return u_t.astype(g.dtype), Moments(m, v, s)


def _in_order(f: Format, stored: Any, later: Any) -> tuple[Any, Any]:
    return _xla.in_order(stored, later) if f.rounds else (stored, later)


def _rows(treedef: PyTreeDef, moments: Moments[Field], whose: str) -> Any:
    """Returns the stored moments of each leaf, in the order of a tree's leaves."""

    def column(name: str, field: Field) -> list[Any]:
        if isinstance(field, optax.EmptyState):
            return [None] * treedef.num_leaves
        where = f"{whose} tree does not fit the state's {name}, which"
        model = "it, made by init from the same parameters"
        return _trees.leaves_like(treedef, field, where, model)

    return map(Moments, *map(column, _formats.NAMES, moments))


def stored_leaves(state: ScaleByAdam3State) -> list[tuple[Any, Moments[Any]]]:
    """Returns the path of each leaf, and its stored moments, out of their boxes."""
    paths, treedef = jax.tree.flatten_with_path(state.m, is_leaf=_boxes.is_box)
    rows = _boxes.opened(list(_rows(treedef, state.moments, "m's")))
    return [(path, row) for (path, _), row in zip(paths, rows, strict=True)]


def _check_state(state: Any, formats: Moments[Format]) -> None:
    """Raises if a state is of another kind, or its moments are of other formats."""
    _trees.check_state(state, ScaleByAdam3State, _FROM_ADAM)
    for name, field, f in zip(_formats.NAMES, state.moments, formats, strict=True):
        if not _formats.fits(f, field):
            raise ValueError(
                f"the state's {name} is not stored as {name}_dtype says. To change a "
                f"dtype or third_moment, use convert_state. {_trees.CAST}"
            )


def _check_gradient(path: Any, g: Array, stored: Any, formats: Any) -> None:
    """Raises if a gradient is of no real dtype, or does not fit the moments."""
    where = f"updates{keystr(path)}"
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise ValueError(f"{where} must be real and floating, or None; got {g.dtype}")
    for name, leaf, f in zip(_formats.NAMES, stored, formats, strict=True):
        shape = getattr(leaf, "shape", None)
        if shape != g.shape and f != Absent():
            raise ValueError(
                f"{where} has shape {g.shape}, but the state's {name} has {shape} "
                "there; was it made by init from other parameters?"
            )
