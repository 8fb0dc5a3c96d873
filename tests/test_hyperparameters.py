"""Bad input gets one clear error; good input passes in every disguise."""

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

FACTORIES = pytest.mark.parametrize("factory", [scale_by_adam3, adam3, adam3w])
INF, NAN = math.inf, math.nan
PARAMS = jnp.array([1.0, -2.0, 3.0])


@FACTORIES
@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        *((b, [1.0, 2, -0.1, NAN, INF], "[0, 1)") for b in ("b1", "b2", "b3")),
        ("eps", [-1e-8, -1, NAN, INF], "[0, inf)"),
        ("eps_root", [-1e-8, NAN, INF], "[0, inf)"),
        ("lam", [NAN, INF, -INF], "finite"),
        ("tau", [0, -1.0, NAN, -INF], "(0, inf]"),
    ],
)
@pytest.mark.parametrize("kind", [float, np.float64, np.array, jnp.float32])
def test_out_of_range(
    factory: Any, name: str, values: list[float], allowed: str, kind: Any
) -> None:
    for value in values:
        within = allowed if allowed == "finite" else f"in {allowed}"
        message = re.escape(f"{name} must be {within}")
        with pytest.raises(ValueError, match=f"^{message}.*, got ") as caught:
            factory(**{name: kind(value)})
        got = float(str(caught.value).split()[-1])
        np.testing.assert_allclose(got, value, rtol=1e-6)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_rates(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be finite .*, got"):
        adam3w(**{name: value})  # type: ignore[arg-type]


@FACTORIES
@pytest.mark.parametrize("value", ["Cubic", "", None, 3, jnp.zeros(()), abs])
def test_unknown_form_lists_the_three(factory: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="third_moment") as caught:
        factory(third_moment=value)
    for form in ("'cubic'", "'stabilized'", "'standardized'", repr(value)):
        assert form in str(caught.value)


@FACTORIES
@pytest.mark.parametrize("name", ["b1", "b2", "b3", "lam", "tau", "eps", "eps_root"])
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
def test_no_number(factory: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a real number"):
        factory(**{name: value})


@FACTORIES
@pytest.mark.parametrize("name", ["b1", "lam", "tau", "eps"])
@pytest.mark.parametrize("value", [np.full(3, 0.5), jnp.full((1,), 0.5)])
def test_no_scalar(factory: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .* of shape \(\d,\)"):
        factory(**{name: value})


def test_a_schedule_where_none_is_taken_names_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"^b1 .*optax\.inject_hyperparams"):
        adam3(b1=lambda count: 0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["b1", "b2", "b3", "eps", "eps_root"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_lost_to_half_precision_are_refused(name: str, dtype: Any) -> None:
    message = rf"^{name} must be .*hyperparam_dtype=jnp\.float32"
    with pytest.raises(ValueError, match=message):
        adam3(**{name: jnp.asarray(0.5, dtype)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):  # a tracer has its type, no value
        jax.jit(lambda x: adam3(**{name: x}).init(PARAMS))(jnp.asarray(0.5, dtype))


@pytest.mark.parametrize("name", ["learning_rate", "lam", "tau", "weight_decay"])
@pytest.mark.parametrize(
    "kind", [float, np.float16, np.float64, np.array, jnp.bfloat16, jnp.float32]
)
def test_numbers_in_every_disguise(name: str, kind: Any) -> None:
    plain = adam3w(**{name: 0.5}, third_moment="standardized")
    disguised = adam3w(**{name: kind(0.5)}, third_moment="standardized")
    g = jnp.array([3.0, -1e-3, 0.0])
    for optimizer in (plain, disguised):
        state = optimizer.init(PARAMS)
        for _ in range(3):
            updates, state = optimizer.update(g * g, state, PARAMS)
        if optimizer is plain:
            expected = updates
    np.testing.assert_array_equal(updates, expected)
    assert updates.dtype == jnp.float32


def test_traced_values_pass_unchecked() -> None:
    @jax.jit
    def first_update(b1: jax.Array, tau: jax.Array) -> Any:
        optimizer = scale_by_adam3(b1=b1, tau=tau)
        return optimizer.update(PARAMS, optimizer.init(PARAMS))[0]

    np.testing.assert_allclose(first_update(0.9, 1.0), [1, -1, 1], rtol=1e-2)
    np.testing.assert_allclose(first_update(0, 1), [1, -1, 1], rtol=1e-2)
    first_update(2.0, -1.0)


@pytest.mark.parametrize("value", [1e39, 10**400, -(10**400)])
def test_numbers_beyond_float32(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^lam must be finite \(in float32\), got"):
        adam3(lam=value)


def test_an_integer_is_a_number() -> None:
    scale_by_adam3(b1=0, lam=0, tau=1, eps=0)


@pytest.mark.parametrize("name", ["learning_rate", "lam", "tau", "weight_decay"])
def test_a_bad_schedule_is_caught_when_it_speaks(name: str) -> None:
    for value in (jnp.ones(3), NAN):
        schedule: Any = {name: lambda count, value=value: value}
        optimizer = adam3w(**schedule)
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_adam3_has_no_use_for_parameters() -> None:
    optimizer = adam3()
    optimizer.update({"w": PARAMS}, optimizer.init({"w": PARAMS}), {"w": 1})


@pytest.mark.parametrize("mask", [True, False, np.True_, 1.0])
def test_a_mask_taken_for_a_schedule_is_refused(mask: Any) -> None:
    with pytest.raises(TypeError, match=r"^mask must be .*static_args='mask'"):
        adam3w(mask=mask)


@pytest.mark.parametrize("make", [scale_by_adam3, adam3, adam3w])
def test_complex_parameters_are_refused_at_init(make: Callable[[], Any]) -> None:
    params = {"w": {"re": PARAMS, "z": PARAMS.astype(jnp.complex64)}}
    with pytest.raises(
        ValueError, match=r"params\['w'\]\['z'\] .*optax\.contrib\.split_real_and_imag"
    ):
        make().init(params)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_gradients_of_other_types_are_refused(dtype: Any) -> None:
    optimizer = scale_by_adam3()
    state = optimizer.init({"w": PARAMS})
    with pytest.raises(ValueError, match=r"^updates\['w'\] must be .* got "):
        optimizer.update({"w": PARAMS.astype(dtype)}, state)


def test_gradients_that_do_not_fit_the_state() -> None:
    optimizer = scale_by_adam3()
    state = optimizer.init({"w": PARAMS})
    with pytest.raises(ValueError, match=r"^updates\['w'\] has shape \(2,\)"):
        optimizer.update({"w": PARAMS[:2]}, state)
    with pytest.raises(ValueError, match="does not fit the state's m"):
        optimizer.update({"v": PARAMS}, state)


def test_weight_decay_needs_parameters() -> None:
    optimizer = adam3w()
    with pytest.raises(ValueError, match="params"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


# The warning of a blow-up. Each test has decays of its own, for one is given once.


@FACTORIES
def test_blow_up_warns_once_at_the_users_line(factory: Any) -> None:
    b3 = {"scale_by_adam3": 0.991, "adam3": 0.992, "adam3w": 0.993}[factory.__name__]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factory(b2=0.95, b3=b3)
        factory(b2=0.95, b3=b3)
        factory(b2=0.95, b3=b3, third_moment="stabilized")
    (warning,) = caught
    assert warning.category is adam3_optax.BlowUpWarning
    assert warning.filename == __file__
    assert f"b3 = {b3}" in str(warning.message)
    assert "0.974679" in str(warning.message)


def test_blow_up_warns_when_errors_are_wanted_each_time() -> None:
    for _ in range(2):
        with pytest.raises(BlowUpWarning, match=r"b3 = 0\.994"):
            adam3(b2=0.95, b3=0.994)


def test_blow_up_warns_once_over_rebuilds_at_traces() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = optax.inject_hyperparams(adam3, static_args=("b2", "b3"))(
            learning_rate=lambda count: 0.1, b2=0.95, b3=0.995
        )
        state = optimizer.init(PARAMS)
        for size in (1, 2, 3):  # three traces
            _, _ = jax.jit(optimizer.update)(PARAMS, state, PARAMS)
            jax.jit(optimizer.init)(PARAMS[:size])
    assert [w.category for w in caught] == [BlowUpWarning]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"b2": 0.95, "b3": 0.95**0.5},
        {"b2": 0.95, "b3": jnp.float32(0.95**0.5)},
        {"b2": 0.95, "b3": 0.996, "third_moment": "standardized"},
        {"b2": 0.95, "b3": 0.996, "lam": 0},
    ],
)
def test_safe_settings_are_silent(kwargs: dict[str, Any]) -> None:
    adam3(**kwargs)  # warnings are errors here
