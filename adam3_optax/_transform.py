"""`scale_by_adam3`: the rule over trees, the count, and the types of state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam3_optax import _boxes, _rounding, _rule, _storage
from adam3_optax import _hyperparameters as hp
from adam3_optax._checks import check_state
from adam3_optax._rule import Coefficients, Form, Moments, ThirdMoment
from adam3_optax._storage import NAMES, DTypeSetting, Field, Format, Stored

_FROM_ADAM = (
    "adam3_optax.from_adam_state makes one of the state of optax.adam or adamw."
)


class ScaleByAdam3State(NamedTuple):
    """The state of AdaM3. Immutable; `update` returns a new one.

    Attributes:
        m: First moment: a tree like the parameters, of float32 (float64 for float64
            parameters), of bfloat16, or an `Int8` of two such trees.
        v: Second moment, likewise.
        s: Third moment, likewise; `optax.EmptyState()` if there is none.
        count: Steps taken: int32, of shape (). Stays at its maximum.
    """

    m: optax.Updates
    v: optax.Updates
    s: optax.Updates
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count

    @property
    def moments(self) -> Moments[Field]:
        """m, v and s."""
        return Moments(self.m, self.v, self.s)


def scale_by_adam3(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b3: jax.typing.ArrayLike = 0.999,
    lam: hp.ScalarOrSchedule = 0.01,
    tau: hp.ScalarOrSchedule = 1.0,
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
    most elements. With both keep b3 <= sqrt(b2): `BlowUpWarning` says why.

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
            parameters), `"float32"`, `"bfloat16"` or `"int8"`, or the dtype of that
            name. With `optax.inject_hyperparams` use a string, for it takes a dtype for
            a schedule. Not float16, in which (g - m)³ is 0 from |g| = 1e-3 down.
            Arithmetic stays in float32, and the update is made from the moments as they
            are stored. See `docs/low_precision.md`.
        v_dtype: How v is stored.
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
    b = Moments("b1", "b2", "b3").map(hp.number, Moments(b1, b2, b3))
    eps, eps_root = hp.number("eps", eps), hp.number("eps_root", eps_root)
    lam_at, tau_at = hp.value_at("lam", lam), hp.value_at("tau", tau)
    form = hp.form(third_moment)
    hp.warn_of_blow_up(b.v, b.s, lam, form)
    formats = _storage.formats_for(form, m_dtype, v_dtype, s_dtype)

    def init(params: optax.Params) -> ScaleByAdam3State:
        jax.tree.map_with_path(_check_parameter, params)
        fields = formats.map(lambda f: f.zeros(params))
        return ScaleByAdam3State(*fields, count=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: ScaleByAdam3State,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdam3State]:
        del params, extra_args
        check_state(state, ScaleByAdam3State, _FROM_ADAM)
        count = optax.safe_increment(state.count)
        lam_t, tau_t = lam_at(state.count), tau_at(state.count)
        h = _rule.Hyperparameters(b, lam_t, tau_t, eps, eps_root)

        # Once a step and dtype, not once a leaf: this would dominate compile time.
        coefficients = functools.cache(functools.partial(_rule.coefficients, h, count))

        def step(
            index: int, path: tuple[Any, ...], item: Any, stored: Moments[Stored]
        ) -> tuple[Any, Moments[Stored]]:
            if not jax.tree.leaves(item):
                return item, stored
            g, old = jnp.asarray(_boxes.opened(item)), _boxes.opened(stored)
            _check_gradient(path, g, old)
            k = coefficients(_storage.computed_in(*jax.tree.leaves((g, old))))
            key = _rounding.leaf_key(index)
            u, new = _step_leaf(formats, form, g, old, k, count, key)
            return _boxes.refilled(item, u), _boxes.refilled(stored, new)

        treedef: Any  # JAX says Unknown
        leaves, treedef = jax.tree.flatten_with_path(updates, is_leaf=_boxes.is_place)
        split = functools.partial(_split, treedef)
        rows = map(Moments, *formats.map(split, NAMES, state.moments))
        pairs = enumerate(zip(leaves, rows, strict=True))
        stepped = [step(index, *leaf, stored) for index, (leaf, stored) in pairs]
        columns = Moments.columns([new for _, new in stepped])
        fields = formats.map(lambda f, leaves: f.join(treedef, leaves), columns)
        u = treedef.unflatten([u for u, _ in stepped])
        return u, ScaleByAdam3State(*fields, count=count)

    return optax.GradientTransformationExtraArgs(init, update)


# Jitted, and with everything but arrays as static arguments. So it is traced once for
# each shape, not for each leaf. An update that is not itself jitted costs one call a
# leaf, and an optimizer that is built again compiles nothing.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_leaf(
    formats: Moments[Format],
    form: Form | None,
    g: jax.Array,
    stored: Moments[Stored],
    k: Coefficients,
    count: jax.Array,
    key: _rounding.Key,
) -> tuple[jax.Array, Moments[Stored]]:
    """Returns the update of one leaf, and its moments after the step, as stored."""
    dtype = k.c.m.dtype
    g_t = g.astype(dtype)
    bits = _rounding.for_moments(_rounding.random_bits(count, key, g))

    def load(f: Format, stored: Stored) -> jax.Array:
        return f.load(stored).astype(dtype)

    def new_m(old: Moments[Stored]) -> jax.Array:
        return _rule.update_m(g_t, load(formats.m, old.m), k)

    def new_v(old: Moments[Stored]) -> jax.Array:
        return _rule.update_v(g_t, load(formats.v, old.v), k)

    def new_s(form: Form, old: Moments[Stored]) -> jax.Array:
        return _rule.update_s(g_t, new_m(old), load(formats.s, old.s), k, form)

    def keep(
        f: Format,
        new: Callable[[Moments[Stored]], jax.Array],
        old: Moments[Stored],
        bits: jax.Array,
        then: str | None,
    ) -> tuple[Stored, jax.Array, Moments[Stored]]:
        """Returns a moment as stored, as loaded from there, and all old moments.

        That of the name `then` may wait until the new one is stored.
        """
        x, mine = new(old), getattr(old, f.moment)
        kept = f.store(x, mine, bits, lambda: new(_storage.apart(old)))
        kept, later = f.in_turn(kept, mine, getattr(old, then) if then else ())
        loaded = _rounding.straight_through(x, load(f, kept))
        return kept, loaded, old._replace(**{then: later}) if then else old

    # The new moments are computed from the old ones, before rounding. So int8 needs two
    # passes: one finds the largest of each row, and one writes. s comes before m,
    # because it needs the old m. The update is made from the moments as stored. If it
    # were made from the exact ones, XLA would keep these in memory.
    old, s = stored, stored.s
    if form is not None:
        s, s_t, old = keep(formats.s, functools.partial(new_s, form), old, bits.s, "m")
    m, m_t, old = keep(formats.m, new_m, old, bits.m, "v")
    v, v_t, _ = keep(formats.v, new_v, old, bits.v, None)
    b_t = 0.0 if form is None else form.term(v_t, s_t, k)
    u_t = _rule.direction(m_t, v_t, b_t, k)
    return u_t.astype(g.dtype), Moments(m, v, s)


def _check_parameter(path: tuple[Any, ...], param: jax.typing.ArrayLike) -> None:
    """Raises if a parameter is complex."""
    dtype = jnp.result_type(param)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} is {dtype}; AdaM3 needs real "
            "parameters. Wrap the optimizer in optax.contrib.split_real_and_imaginary."
        )


def _split(treedef: Any, f: Format, name: str, field: Field) -> list[Any]:
    """Returns the stored leaves of a moment, in the order of the gradients'."""
    if not f.fits(field):
        raise ValueError(
            f"the state's {name} is not stored as {name}_dtype says; was it made with "
            "other settings, or third_moment=None? Use adam3_optax.convert_state."
        )
    try:
        return f.split(treedef, field)
    except ValueError as error:
        raise ValueError(
            f"the gradients' tree does not fit the state's {name}; was the state made "
            f"by init from other parameters? {error}"
        ) from error


def _check_gradient(
    path: tuple[Any, ...], g: jax.Array, stored: Moments[Stored]
) -> None:
    """Raises if a gradient is of no real dtype, or does not fit the moments."""
    where = f"updates{jax.tree_util.keystr(path)}"
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise ValueError(f"{where} must be of a real floating type, got {g.dtype}")
    for name, leaf in zip(NAMES, stored, strict=True):
        shape = getattr(leaf[0], "shape", None) if leaf else g.shape
        if shape != g.shape:
            raise ValueError(
                f"{where} has shape {g.shape}, but the state's {name} has {shape} "
                "there; was it made by init from other parameters?"
            )
