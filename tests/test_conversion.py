"""From a running Adam to AdaM3 and back, and between storage settings."""

from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam3_optax
from adam3_optax import convert_state, from_adam_state, scale_by_adam3, to_adam_state
from tests import reference, settings
from tests.settings import FORMS, GRADIENTS, PARAMS, STORAGE, moments, train, types


@pytest.fixture(autouse=True)
def _standard(standard_promotion: None) -> None:
    """Optax's Adam needs it."""


SCHEDULE = optax.linear_schedule(1e-2, 0.0, 100)
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda o: o,
    "clipped": lambda o: optax.chain(optax.clip(1.0), o),
    "masked": lambda o: optax.masked(o, {"w": True, "b": False}),
    "steps": lambda o: optax.MultiSteps(o, 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_switch_in_mid_training(wrapper: Any) -> None:
    ours = wrapper(adam3_optax.adam3w(SCHEDULE, **settings.MIXED))
    params, state = train(wrapper(optax.adamw(SCHEDULE)), gradients=GRADIENTS[:4])
    switched = from_adam_state(state, **settings.MIXED)
    assert types(switched) == types(ours.init(PARAMS))
    m, v, s = moments(switched)
    assert all(map(np.any, jax.tree.leaves((m, v))))
    assert not any(map(np.any, jax.tree.leaves(s)))
    for _, count in optax.tree.get_all_with_path(switched, "count"):
        assert int(count) in (2, 4)
    jax.eval_shape(ours.update, GRADIENTS[4], switched, params)


def test_with_lam_zero_the_switch_changes_nothing() -> None:
    adam, ours = optax.adamw(1e-2), adam3_optax.adam3w(1e-2, lam=0.0)
    got = want = train(adam, gradients=GRADIENTS[:3])
    got = got[0], from_adam_state(got[1])
    for g in GRADIENTS[3:]:
        got, want = settings.step(ours, *got, g), settings.step(adam, *want, g)
    settings.assert_close(got[0], want[0])
    settings.assert_same(to_adam_state(got[1]), want[1])


@settings.each_storage("smallest", "mixed")
def test_the_way_back_is_to_the_type_computed_in(storage: Any) -> None:
    _, state = train(adam3_optax.adam3(**storage))
    adam, wide = to_adam_state(state)[0], convert_state(state)[0]
    settings.assert_same((adam.mu, adam.nu), (wide.m, wide.v))
    assert {x.dtype.name for x in jax.tree.leaves((adam.mu, adam.nu))} == {"float32"}


def assert_near(got: Any, want: Any, storage: Any, form: Any) -> None:
    """Asserts float32 moments that are off by what a storage rounds, at most."""
    powers = {"m": 1.0, "s": reference.FORMS[form].exponent}
    for name in "mvs":
        x, y = (getattr(state, name)["w"] for state in (got, want))
        match storage.get(f"{name}_dtype"):
            case "bfloat16":
                allowed = 2.0**-7 * jnp.abs(y)
            case "float8" if name == "v":
                allowed = y / 2
            case "float8":  # in units of sigma/4 or sigma^p, and least of 2^-9 of them
                unit = got.v["w"] ** (powers[name] / 2) / (4 if name == "m" else 1)
                allowed = 2.0**-3 * jnp.abs(y) + 2.0**-9 * unit
            case _:
                allowed = jnp.zeros(())
        assert np.all(jnp.abs(x - y) <= 1.0001 * allowed), name


FORMATS = "default", "bfloat16", "float8", "smallest"
# The form is the unit of s in float8, and nothing else.
CHANGES = [
    *((settings.UNBOUNDED[0], *pair) for pair in permutations(FORMATS, 2)),
    *((form, "default", "smallest") for form in settings.UNBOUNDED[1:]),
    *((form, "smallest", "default") for form in settings.UNBOUNDED[1:]),
]


@cache
def trained(form: Any, name: str) -> tuple[Any, Any]:
    """Returns a state, and its moments in float32."""
    _, state = train(scale_by_adam3(third_moment=form, **STORAGE[name]))
    return state, convert_state(state, third_moment=form)


@pytest.mark.parametrize(("form", "old", "new"), CHANGES)
def test_every_format_becomes_every_other(form: Any, old: str, new: str) -> None:
    storage = STORAGE[new]
    before, exact = trained(form, old)
    low = convert_state(before, third_moment=form, **storage)
    optimizer = scale_by_adam3(third_moment=form, **storage)
    assert types(low) == types(optimizer.init(PARAMS))
    full = convert_state(low, third_moment=form)
    assert_near(full, exact, storage, form)
    # Nothing is lost twice.
    settings.assert_same(convert_state(full, third_moment=form, **storage), low)


def test_what_has_its_format_and_its_unit_is_not_touched() -> None:
    storage = STORAGE["float8"]
    state, _ = trained(FORMS[0], "float8")

    def kept(**changed: Any) -> str:
        new = convert_state(state, **{**storage, **changed})
        pairs = zip("mvs", moments(new), moments(state), strict=True)
        return "".join(name for name, x, y in pairs if x is y)

    assert kept() == "mvs"
    assert kept(m_dtype="bfloat16") == "vs"
    assert kept(s_dtype=None) == "mv"
    # The unit of m and s is made of v, so they are stored anew.
    assert kept(v_dtype=None) == ""
    # Between forms s stays. To None and back is in `test_optimizers.py`.
    _, state = trained(FORMS[0], "default")
    assert convert_state(state, third_moment=FORMS[-1]).s is state.s


@pytest.mark.parametrize("convert", [from_adam_state, to_adam_state, convert_state])
def test_what_cannot_be_converted_is_named(convert: Any) -> None:
    with pytest.raises(ValueError, match=r"there is no ScaleByAdam3?State"):
        convert(optax.sgd(0.1, momentum=0.9).init(PARAMS))
    if convert is not to_adam_state:
        state = optax.chain(optax.scale_by_adam(), scale_by_adam3()).init(PARAMS)
        with pytest.raises(ValueError, match=r"^v_dtype must be one of"):
            convert(state, v_dtype="int4")


def test_injected_hyperparameters_are_not_carried_over() -> None:
    adam = optax.inject_hyperparams(optax.adamw)(1e-2)
    ours = optax.inject_hyperparams(adam3_optax.adam3w)(1e-2, lam=5.0, b3=0.9)
    _, state = train(adam, gradients=GRADIENTS[:2])
    with pytest.raises(ValueError, match=r"inner_state=from_adam_state\(state\.inner"):
        from_adam_state(state)
    # As the error says.
    inner = from_adam_state(state.inner_state)
    switched = ours.init(PARAMS)._replace(count=state.count, inner_state=inner)
    assert float(switched.hyperparams["lam"]) == 5.0
    _, state = ours.update(PARAMS, switched, PARAMS)
    with pytest.raises(ValueError, match=r"inner_state=to_adam_state\(state\.inner"):
        to_adam_state(state)
    # Another storage is no other optimizer.
    low = convert_state(state, **STORAGE["smallest"])
    assert types(convert_state(low)) == types(state)


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_adam_of_parameters_of_several_dtypes(half: Any) -> None:
    params = {"w": jnp.ones((4, 32), half), "b": jnp.ones(4)}
    state = from_adam_state(optax.scale_by_adam().init(params))
    assert types(state) == types(scale_by_adam3().init(params))


def test_a_stacked_state_is_named_by_conversion() -> None:
    state = jax.vmap(scale_by_adam3().init)(jnp.ones((5, 4, 32)))
    with pytest.raises(ValueError, match=r"count has shape \(5,\).*jax.vmap"):
        convert_state(state, m_dtype="bfloat16")
    converted = jax.vmap(lambda x: convert_state(x, m_dtype="bfloat16"))(state)
    assert converted.m.dtype == jnp.bfloat16
