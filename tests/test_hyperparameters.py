"""Bad input gets one clear error; good input passes in every disguise."""

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam3_optax
from adam3_optax import BlowUpWarning, adam3, adam3w, scale_by_adam3
from tests.settings import (
    BF16,
    BOUNDED,
    EACH_FORM,
    F16,
    F32,
    F64,
    FORMS,
    GRADIENTS,
    PARAMS,
    SAFE,
    STORAGE,
    UNBOUNDED,
    assert_close,
    assert_finite,
    compiles,
    first_step,
    train,
)

INF, NAN = math.inf, math.nan
A = jnp.array([1.0, -2.0, 3.0])


# Errors. Every factory has the same checks, for the chains pass their arguments on.


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        *((b, [1.0, 2, -0.1, NAN, INF], "[0, 1)") for b in ("b1", "b2", "b3")),
        ("eps", [-1e-8, -1, NAN, INF], "[0, inf)"),
        ("eps_root", [-1e-8, NAN, INF], "[0, inf)"),
        ("lam", [NAN, INF, -INF], "finite"),
        ("tau", [0, -1.0, NAN, -INF], "(0, inf]"),
        ("learning_rate", [NAN, INF], "finite"),
        ("weight_decay", [NAN, INF], "finite"),
    ],
)
@pytest.mark.parametrize("kind", [float, np.float64, np.array, jnp.float32])
def test_out_of_range(name: str, values: list[float], allowed: str, kind: Any) -> None:
    for value in values:
        within = allowed if allowed == "finite" else f"in {allowed}"
        message = re.escape(f"{name} must be {within}")
        with pytest.raises(ValueError, match=f"^{message}.*, got ") as caught:
            adam3w(**{name: kind(value)})
        got = float(str(caught.value).split()[-1])
        np.testing.assert_allclose(got, value, rtol=1e-6)


@pytest.mark.parametrize("factory", [scale_by_adam3, adam3, adam3w])
def test_every_factory_checks(factory: Any) -> None:
    for name in ("b1", "b2", "b3", "lam", "tau", "eps", "eps_root"):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            factory(**{name: NAN})
        with pytest.raises(TypeError, match=f"^{name} must be a real number"):
            factory(**{name: None})
    with pytest.raises(ValueError, match="third_moment must be one of"):
        factory(third_moment="fourth")
    for moment in "mvs":
        with pytest.raises(ValueError, match=f"^{moment}_dtype must be one of"):
            factory(**{f"{moment}_dtype": "int4"})


@pytest.mark.parametrize("value", ["Cubic", "", 3, jnp.zeros(()), abs])
def test_an_unknown_form_lists_the_known_ones(value: Any) -> None:
    # A number is what a schedule's place in `optax.inject_hyperparams` makes of it.
    with pytest.raises(ValueError, match=r"^third_moment must be one of") as caught:
        scale_by_adam3(third_moment=value)
    for text in map(repr, (*FORMS, None, value)):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        None,
        True,
        0.5j,
        [0.5],
        np.True_,
        np.complex64(0.5),
        np.str_("1"),
        np.array("1"),
    ],
)
def test_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^lam must be a real number"):
        scale_by_adam3(lam=value)


@pytest.mark.parametrize("value", [np.full(3, 0.5), jnp.full((1,), 0.5)])
def test_no_scalar(value: Any) -> None:
    for name in ("b1", "lam", "tau", "eps"):
        with pytest.raises(ValueError, match=rf"^{name} must be .* of shape \(\d,\)"):
            scale_by_adam3(**{name: value})


def test_a_schedule_where_none_is_taken_names_the_remedy() -> None:
    for name in ("b1", "b2", "b3", "eps", "eps_root"):
        constant: Any = {name: lambda count: 0.9}
        with pytest.raises(TypeError, match=rf"^{name} .*optax\.inject_hyperparams"):
            scale_by_adam3(**constant)


@pytest.mark.parametrize("name", ["b1", "b2", "b3", "eps", "eps_root"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_values_lost_to_half_precision_are_refused(name: str, dtype: Any) -> None:
    make: Any = scale_by_adam3
    message = rf"^{name} must be .*hyperparam_dtype=jnp\.float32"
    with pytest.raises(ValueError, match=message):
        make(**{name: jnp.asarray(0.5, dtype)})
    with pytest.raises(ValueError, match=message):  # a tracer has its type, no value
        jax.eval_shape(lambda x: make(**{name: x}).init(A), jnp.asarray(0.5, dtype))


@pytest.mark.parametrize("value", [1e39, 10**400, -(10**400)])
def test_numbers_beyond_float32(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^lam must be finite \(in float32\), got"):
        scale_by_adam3(lam=value)


@pytest.mark.parametrize("name", ["learning_rate", "lam", "tau", "weight_decay"])
def test_a_bad_schedule_is_caught_when_it_speaks(name: str) -> None:
    for value in (jnp.ones(3), NAN):
        schedule: Any = {name: lambda count, value=value: value}
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            first_step(adam3w(**schedule), A)


# What passes.


def test_an_integer_is_a_number() -> None:
    scale_by_adam3(b1=0, lam=0, tau=1, eps=0)


@pytest.mark.parametrize("name", ["learning_rate", "lam", "tau", "weight_decay"])
@pytest.mark.parametrize(
    "kind", [np.float16, np.float64, np.array, jnp.bfloat16, jnp.float32]
)
def test_numbers_in_every_disguise(name: str, kind: Any) -> None:
    # Not weakly typed, they would turn bfloat16 updates into float32.
    make: Any = adam3w
    plain, disguised = (make(**{name: x}) for x in (0.5, kind(0.5)))
    for dtype in (F32, BF16):
        g = A.astype(dtype)
        updates, _ = first_step(disguised, g)
        np.testing.assert_array_equal(updates, first_step(plain, g)[0])
        assert updates.dtype == dtype


@EACH_FORM
def test_no_check_needs_a_value(form: Any) -> None:
    # All numbers traced at once; a check of their range would need them.
    numbers = {
        name: parameter.default
        for name, parameter in inspect.signature(adam3w).parameters.items()
        if isinstance(parameter.default, float)
    }
    assert len(numbers) == 9
    make = functools.partial(adam3w, third_moment=form)
    traced = jax.jit(lambda kwargs: first_step(make(**kwargs), A)[0])
    np.testing.assert_allclose(traced(numbers), first_step(make(), A)[0], rtol=1e-4)
    traced({**numbers, "b1": 2.0, "tau": -1.0})  # nothing is known of them
    np.testing.assert_allclose(traced({**numbers, "b1": 0}), -1e-3 * np.sign(A), 0.02)


@pytest.mark.parametrize("name", ["learning_rate", "lam", "tau"])
@pytest.mark.parametrize("how", ["traced", "scheduled"])
def test_numbers_take_the_type_of_the_leaf(name: str, how: str, x64: None) -> None:
    # A strongly typed float32 among float64, and among the others.
    params = {"half": jnp.ones(2, F16), "double": jnp.ones(2, F64)}

    def step(value: jax.Array) -> Any:
        number: Any = value if how == "traced" else lambda count: value
        return first_step(adam3w(**{name: number}), params)[0]

    updates = jax.eval_shape(step, jnp.float32(0.1))
    assert {k: u.dtype for k, u in updates.items()} == {"half": F16, "double": F64}


# Changed on the way: injected, scheduled.

OTHER = {
    "learning_rate": 0.5,
    "b1": 0.5,
    "b2": 0.9,
    "b3": 0.5,
    "lam": 0.5,
    "tau": 1e-4,
    "eps": 0.3,
    "eps_root": 0.3,
    "weight_decay": 0.5,
}
FIXED: dict[str, Any] = {"learning_rate": 0.1, "b3": 0.8, "lam": 0.1}


@functools.cache
def injected() -> tuple[Any, Any]:
    optimizer = optax.inject_hyperparams(adam3w)(**FIXED)
    return optimizer, jax.jit(optimizer.update)


@pytest.mark.parametrize("name", OTHER)
def test_an_injected_value_that_is_changed_acts(name: str) -> None:
    # Two steps, a change through the state, two more: as two optimizers on one state.
    # One compiled step serves them all.
    optimizer, update = injected()
    state = optimizer.init(PARAMS)
    expected = unchanged = state.inner_state
    plain = adam3w(**FIXED)
    for i, g in enumerate(GRADIENTS[:4]):
        if i == 2:
            state = optax.tree.set(state, **{name: jnp.float32(OTHER[name])})
        updates, state = update(g, state, PARAMS)
        changed = adam3w(**{**FIXED, name: OTHER[name]}) if i >= 2 else plain
        want, expected = changed.update(g, expected, PARAMS)
        same, unchanged = plain.update(g, unchanged, PARAMS)
        assert_close(updates, want, rtol=1e-4)
    assert float(state.hyperparams[name]) == pytest.approx(OTHER[name])
    assert np.max(abs(want["w"] / same["w"] - 1)) > 0.01
    assert compiles(update) == 1


def schedule_of(name: str) -> Callable[[Any], Any]:
    """Returns a schedule from .8 of the value to the value in three steps."""
    return lambda count: OTHER[name] * (0.8 + 0.1 * jnp.float32(count))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((x, "native") for x in ("learning_rate", "lam", "tau", "weight_decay")),
        *((x, "injected") for x in ("learning_rate", "lam", "b2")),
    ],
)
def test_schedules_get_the_count_before_the_step(name: str, how: str) -> None:
    # As everywhere in Optax: the first step takes schedule(0).
    factory = optax.inject_hyperparams(adam3w) if how == "injected" else adam3w
    optimizer = factory(**{**FIXED, name: schedule_of(name)})
    update, state = jax.jit(optimizer.update), optimizer.init(A)
    expected = adam3w(**FIXED).init(A)
    for count in range(3):
        g = (-1.0) ** count * (A - 0.5)
        updates, state = update(g, state, A)
        value = float(schedule_of(name)(count))
        manual = adam3w(**{**FIXED, name: value})
        want, expected = manual.update(g, expected, A)
        assert_close(updates, want, rtol=1e-4)
    assert compiles(update) == 1


def test_optax_schedules_fit_everywhere(standard_promotion: None) -> None:
    # Standard promotion for Optax's schedules.
    for schedule in (
        optax.warmup_cosine_decay_schedule(0.1, 0.2, 1, 3),
        optax.piecewise_constant_schedule(0.1, {1: 0.5}),
    ):
        everywhere = dict.fromkeys(("lam", "tau", "weight_decay"), schedule)
        assert_finite(train(adam3w(schedule, **everywhere), A, [A] * 4)[0])


@EACH_FORM
def test_decays_that_change_leave_a_float8_state_right(form: Any) -> None:
    # Its unit is sqrt(v) without bias correction. With it, m would grow sevenfold here
    # when b2 falls.
    def falling(first: float, then: float) -> Any:
        return lambda count: jnp.where(count < 30, F32(first), F32(then))

    b1, b2 = falling(0.95, 0.8), falling(0.999, 0.95)
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.exponential(size=(60, 4096)) - 0.5, F32)

    def along(storage: Any) -> jax.Array:
        made = optax.inject_hyperparams(scale_by_adam3)
        optimizer = made(b1=b1, b2=b2, third_moment=form, **storage)
        start = optimizer.init(gradients[0])
        found: jax.Array = jax.lax.scan(
            lambda state, g: optimizer.update(g, state)[::-1], start, gradients
        )[1]
        return found

    want, got = along(STORAGE["default"]), along(STORAGE["float8"])
    assert jnp.abs(got).max() < 1.2 * jnp.abs(want).max()
    error = jnp.sum((got - want) ** 2, 1) / jnp.sum(want**2, 1)
    assert jnp.max(error) < 0.15**2
    assert float(jnp.sum(got * want) / jnp.sum(want**2)) == pytest.approx(1, abs=2e-3)


def test_injected_into_bfloat16() -> None:
    # Injected numbers take the parameters' type, in which b2 = .999 is 1.
    params = jnp.asarray([0.5, -1.25, 3.0], BF16)
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        first_step(optax.inject_hyperparams(adam3w)(0.1), params)
    # With the remedy the updates are those of the plain optimizer.
    inject = optax.inject_hyperparams(adam3w, hyperparam_dtype=F32)
    got, state = train(inject(0.1), params, [params] * 2)
    want, _ = train(adam3w(0.1), params, [params] * 2)
    assert_close(got, want, rtol=2.0**-7)
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype(F32)}


# The warning of a blow-up. Each test has decays of its own, for one is given once.


@pytest.mark.parametrize("factory", [scale_by_adam3, adam3, adam3w])
def test_blow_up_warns_once_at_the_users_line(factory: Any) -> None:
    b3 = {"scale_by_adam3": 0.991, "adam3": 0.992, "adam3w": 0.993}[factory.__name__]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for form in UNBOUNDED:
                factory(b2=0.95, b3=b3, third_moment=form)
    (warning,) = caught
    assert warning.category is adam3_optax.BlowUpWarning
    assert warning.filename == __file__
    assert f"b3 = {b3}" in str(warning.message)
    assert "0.974679" in str(warning.message)


def test_blow_up_warns_when_errors_are_wanted_each_time() -> None:
    for _ in range(2):
        for form in UNBOUNDED:
            with pytest.raises(BlowUpWarning, match=r"b3 = 0\.994"):
                scale_by_adam3(b2=0.95, b3=0.994, third_moment=form)


@pytest.mark.parametrize(("static", "b3"), [((), 0.995), (("b2", "b3"), 0.9955)])
def test_blow_up_warns_once_over_rebuilds_at_traces(static: Any, b3: float) -> None:
    # `optax.inject_hyperparams` builds the optimizer anew at each of them.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = optax.inject_hyperparams(adam3, static_args=static)(
            learning_rate=lambda count: 0.1, b2=0.95, b3=b3
        )
        state = optimizer.init(A)
        optimizer.update(A, state, A)
        for size in (1, 2):
            jax.eval_shape(optimizer.update, A, state, A)
            jax.eval_shape(optimizer.init, A[:size])
    assert [w.category for w in caught] == [BlowUpWarning]
    assert caught[0].filename == __file__


@EACH_FORM
def test_safe_settings_are_silent(form: Any) -> None:
    for decays in ({}, SAFE, {"b2": 0.95, "b3": 0.95**0.5},
                   {"b2": 0.95, "b3": jnp.float32(0.95**0.5)},
                   {"b2": 0.95, "b3": 0.996, "lam": 0}):  # fmt: skip
        scale_by_adam3(**decays, third_moment=form)  # warnings are errors here


def test_a_bounded_term_needs_no_warning() -> None:
    for form in BOUNDED:
        scale_by_adam3(b2=0.95, b3=0.996, third_moment=form)


def test_a_warning_needs_no_module_around_it() -> None:
    code = "import adam3_optax; adam3_optax.adam3(b2=0.9101, b3=0.9991)"
    with pytest.warns(BlowUpWarning):
        exec(code, {})
