"""Gradients that are not finite show in the state; finite ones never spoil it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import _formats, _rule, scale_by_adam3
from tests.settings import BOUNDED, EACH_FORM, all_at, first_step

GOOD = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
MAXIMUM = float(jnp.finfo(jnp.float32).max)


NARROW = ["bfloat16", "float8"]


def stored(setting: Any, form: Any) -> dict[str, Any]:
    """Returns the settings; 8 bits for v where the form allows it."""
    v = "bfloat16" if setting == "float8" and form in BOUNDED else setting
    return {"third_moment": form, **all_at(setting), "v_dtype": v}


def loaded(state: Any, form: Any) -> list[Any]:
    """Returns the moments as numbers."""
    formats = _formats.formats_of(state.moments, _rule.FORMS[form])
    return [np.asarray(x) for x in _formats.loaded(formats, state.moments)]


@EACH_FORM
@pytest.mark.parametrize("setting", [None, "float32", *NARROW])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_gradient_that_is_not_finite_shows_in_every_moment(
    form: Any, setting: Any, bad: float
) -> None:
    optimizer = scale_by_adam3(b1=0.8, b2=0.95, b3=0.9, **stored(setting, form))
    update = optimizer.update  # its step of a leaf is compiled
    _, state = update(GOOD, optimizer.init(GOOD))
    for g in (GOOD.at[1, 5].set(bad), GOOD):  # and it stays, for the user to see
        updates, state = update(g, state)
        assert not np.isfinite(updates[1, 5])
        for x in loaded(state, form):
            finite = np.isfinite(x)
            assert not finite[1, 5]
            assert finite.sum() == finite.size - 1


@EACH_FORM
@pytest.mark.parametrize("setting", [None, *NARROW])
def test_optax_can_keep_it_out(form: Any, setting: Any) -> None:
    inner = scale_by_adam3(b2=0.95, b3=0.9, **stored(setting, form))
    optimizer = optax.apply_if_finite(inner, 3)
    state = optimizer.init(GOOD)
    updates, state = optimizer.update(GOOD.at[0, 0].set(jnp.inf), state)
    assert not updates.any()
    assert all(np.isfinite(x).all() for x in loaded(state.inner_state, form))


@EACH_FORM
@pytest.mark.parametrize("setting", [None, *NARROW])
@pytest.mark.parametrize("size", [1e20, 1e30, MAXIMUM])
def test_a_square_that_overflows_is_finite_in_the_state(
    form: Any, setting: Any, size: float
) -> None:
    optimizer = scale_by_adam3(b2=0.95, b3=0.9, **stored(setting, form))
    g = jnp.asarray([[size, -size] * 16], jnp.float32)
    state = optimizer.init(g)
    for sign in (1.0, -1.0, -1.0, 1.0):
        _, state = optimizer.update(sign * g, state)
        found = loaded(state, form)
        assert all(np.isfinite(x).all() for x in found)
        assert (found[1] > 0).all()


EACH_NARROW = pytest.mark.parametrize("setting", ["float32", *NARROW])


@EACH_NARROW
def test_wide_gradients_keep_a_narrow_state_finite(setting: str, x64: None) -> None:
    # Every moment is beyond float32, and is stored as a quarter of its maximum, or as
    # the largest of its format. From there the next update is neither infinite nor 0.
    optimizer = scale_by_adam3(b2=0.95, b3=0.9, **stored(setting, "cubic"))
    narrow = jnp.ones((2, 32), jnp.float32)
    _, state = first_step(optimizer, jnp.full((2, 32), 1e60), narrow)
    for x in loaded(state, "cubic"):
        assert np.isfinite(x).all()
        assert (x > 0).all()
    updates, _ = optimizer.update(narrow, state._replace(count=jnp.int32(1000)))
    assert np.isfinite(updates).all()
    assert (updates > 0).all()


@EACH_NARROW
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_wide_gradients_that_are_not_finite_show_in_a_narrow_state(
    setting: str, bad: float, x64: None
) -> None:
    g = jnp.ones((2, 32)).at[0, 3].set(bad)
    assert g.dtype == jnp.float64
    optimizer = scale_by_adam3(**stored(setting, "cubic"))
    _, state = first_step(optimizer, g, jnp.ones((2, 32), jnp.float32))
    for x in loaded(state, "cubic"):
        finite = np.isfinite(x)
        assert not finite[0, 3]
        assert finite[1].all()


def test_m_goes_to_the_edge_of_float32() -> None:
    # With no average to overflow, nothing of it is clipped.
    g = jnp.asarray([MAXIMUM, -3e38, 1.0], jnp.float32)
    _, state = first_step(scale_by_adam3(b1=0.0), g)
    np.testing.assert_array_equal(state.m, g)


@pytest.mark.parametrize("eps", [1e-8, 1.0, 1e26, MAXIMUM])
@EACH_FORM
def test_every_eps_keeps_the_state_finite(form: Any, eps: float) -> None:
    optimizer = scale_by_adam3(b3=0.9, eps=eps, third_moment=form)
    state = optimizer.init(GOOD)
    for size in (1.0, 1e20, 1e38):
        updates, state = optimizer.update(size * GOOD / jnp.abs(GOOD).max(), state)
        assert all(np.isfinite(x).all() for x in state.moments)
        assert np.isfinite(updates).all()


@pytest.mark.parametrize("name", ["eps", "eps_root"])
def test_an_eps_beyond_float32_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf\) \(finite"):
        scale_by_adam3(**{name: 1e300})  # type: ignore[arg-type]


@EACH_FORM
@pytest.mark.parametrize("b1", [0.5, 0.85, 0.93])
def test_updates_are_finite_to_the_edge_of_float32(form: Any, b1: float) -> None:
    # With the maximum itself m̂, rounded, may be infinite. The documentation says so.
    optimizer = scale_by_adam3(b1=b1, b3=0.9, third_moment=form)
    g = jnp.asarray([3e38, -3e38], jnp.float32)
    state = optimizer.init(g)
    for _ in range(10):
        updates, state = optimizer.update(g, state)
        assert np.isfinite(updates).all()
        assert all(np.isfinite(x).all() for x in state.moments)


@EACH_FORM
def test_zero_gradients_are_not_spoiled_by_rounding(form: Any) -> None:
    optimizer = scale_by_adam3(b2=0.95, b3=0.9, **stored("float8", form))
    updates, state = first_step(optimizer, jnp.zeros((2, 32)))
    assert not updates.any()
    assert not any(x.any() for x in loaded(state, form))


@EACH_FORM
@pytest.mark.parametrize("lam", [0.0, 0.01])
@pytest.mark.parametrize("traced", [False, True])
def test_no_clip_is_no_infinity(form: Any, lam: float, traced: bool) -> None:
    # After an isolated gradient s decays more slowly than v, until the skewness
    # overflows.
    def run(tau: Any) -> Any:
        made = scale_by_adam3(b2=0.95, b3=0.97, lam=lam, tau=tau, third_moment=form)

        def step(state: Any, g: Any) -> Any:
            updates, state = made.update(g, state)
            return state, updates

        gradients = jnp.zeros(3000).at[1].set(1.0)
        return jax.lax.scan(step, made.init(jnp.zeros(())), gradients)[1]

    updates = jax.jit(run)(jnp.float32(jnp.inf)) if traced else run(float("inf"))
    assert np.isfinite(updates).all()
    if lam == 0.0:
        assert np.abs(updates).max() <= 1.01
