"""From a running Adam to AdaM3 and back, and between storage settings."""

from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import (
    ScaleByAdam3State,
    adam3,
    adam3w,
    convert_state,
    from_adam_state,
    scale_by_adam3,
    to_adam_state,
)
from tests import reference
from tests.settings import (
    EACH_NARROW,
    F32,
    FORMS,
    GRADIENTS,
    PARAMS,
    STORAGE,
    UNBOUNDED,
    assert_close,
    assert_same,
    each_storage,
    moments,
    step,
    train,
    types,
)


@pytest.fixture(autouse=True)
def _standard(standard_promotion: None) -> None:
    """Optax's Adam needs it."""


SCHEDULE = optax.linear_schedule(1e-2, 0.0, 100)
CHAINS = {
    "alone": (optax.adam(1e-2), adam3),
    "decayed": (optax.adamw(SCHEDULE), adam3w),
    "clipped": (optax.chain(optax.clip(1.0), optax.adamw(SCHEDULE)), adam3w),
    "masked": (optax.masked(optax.adam(1e-2), {"w": True, "b": False}), adam3),
    "steps": (optax.MultiSteps(optax.adamw(SCHEDULE), 2), adam3w),
}


@each_storage("default", "mixed")
@pytest.mark.parametrize("name", CHAINS)
def test_switch_in_mid_training(name: str, storage: Any) -> None:
    adam, factory = CHAINS[name]
    rate = 1e-2 if factory is adam3 else SCHEDULE
    ours: Any = factory(rate, **storage)
    if name == "clipped":
        ours = optax.chain(optax.clip(1.0), ours)
    elif name == "masked":
        ours = optax.masked(ours, {"w": True, "b": False})
    elif name == "steps":
        ours = optax.MultiSteps(ours, 2)
    params, state = train(adam, gradients=GRADIENTS[:4])
    switched = from_adam_state(state, **storage)
    assert types(switched) == types(ours.init(PARAMS))
    loaded: Any = optax.tree.get(convert_state(switched), "ScaleByAdam3State")
    assert not any(map(np.any, jax.tree.leaves(loaded.s)))
    assert all(map(np.any, jax.tree.leaves((loaded.m, loaded.v))))
    for count in optax.tree.get_all_with_path(switched, "count"):
        assert int(count[1]) in (2, 4)
    jax.eval_shape(ours.update, GRADIENTS[4], switched, params)


def test_with_lam_zero_the_switch_changes_nothing() -> None:
    adam, ours = optax.adamw(1e-2), adam3w(1e-2, lam=0.0)
    got = want = train(adam, gradients=GRADIENTS[:3])
    got = got[0], from_adam_state(got[1])
    for g in GRADIENTS[3:]:
        got, want = step(ours, *got, g), step(adam, *want, g)
    assert_close(got[0], want[0])
    assert_close(to_adam_state(got[1]), want[1], rtol=0.0)


@EACH_NARROW
def test_the_way_back_is_to_the_type_computed_in(storage: Any) -> None:
    _, state = train(adam3(**storage))
    adam, wide = to_adam_state(state)[0], convert_state(state)[0]
    assert_same((adam.mu, adam.nu), (wide.m, wide.v))
    assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(F32)}


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
    *product(UNBOUNDED[:1], FORMATS, FORMATS),
    *((form, "default", "smallest") for form in UNBOUNDED[1:]),
    *((form, "smallest", "default") for form in UNBOUNDED[1:]),
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
    assert_same(convert_state(full, third_moment=form, **storage), low)
    jax.eval_shape(optimizer.update, PARAMS, low)


def test_what_has_its_format_and_its_unit_is_not_touched() -> None:
    storage = STORAGE["float8"]
    _, state = train(scale_by_adam3(**storage))

    def kept(**changed: Any) -> str:
        new = convert_state(state, **{**storage, **changed})
        pairs = zip("mvs", moments(new), moments(state), strict=True)
        return "".join(name for name, x, y in pairs if x is y)

    assert kept() == "mvs"
    assert kept(m_dtype="bfloat16") == "vs"
    assert kept(s_dtype=None) == "mv"
    # The unit of m and s is made of v, so they are stored anew.
    assert kept(v_dtype=None) == ""
    other = convert_state(state, **STORAGE["smallest"])
    assert np.mean(other.m["w"].astype(F32) != state.m["w"].astype(F32)) > 0.5


def test_adam_becomes_float8() -> None:
    _, adam = train(optax.scale_by_adam())
    for storage in (STORAGE["float8"], STORAGE["smallest"]):
        low = convert_state(from_adam_state(adam, **storage))
        zeros = jax.tree.map(jnp.zeros_like, adam.mu)
        wide = ScaleByAdam3State(adam.mu, adam.nu, zeros, adam.count)
        assert_near(low, wide, storage, "cubic")
        assert_same(low.s, zeros)


def test_between_forms_s_stays() -> None:
    # To None and back is in `test_without_third_moment.py`.
    _, state = train(adam3(1e-2, third_moment=FORMS[-1]), gradients=GRADIENTS[:3])
    assert_close(convert_state(state, third_moment=FORMS[0]), state, rtol=0.0)


def test_s_fades_in_after_the_switch() -> None:
    # k steps after the switch the term has grown to 1 - b3ᵏ of what it becomes.
    ours = adam3(1e-2, b3=0.9)
    zeros = jnp.zeros(20_000)
    adam3_state = ScaleByAdam3State(zeros, zeros + 2.0, zeros, jnp.int32(100_000))
    state: Any = (adam3_state, optax.EmptyState())
    key = jax.random.key(0)
    update = jax.jit(ours.update)
    means = {}
    for k in range(1, 61):
        g = jax.random.exponential(jax.random.fold_in(key, k), zeros.shape) - 1.0
        _, state = update(g, state)
        means[k] = float(state[0].s.mean())
    end = np.mean([means[k] for k in range(50, 61)])
    for k in (5, 10, 20):
        assert means[k] / end == pytest.approx(1 - 0.9**k, abs=0.2)


@pytest.mark.parametrize("convert", [from_adam_state, to_adam_state, convert_state])
def test_nothing_to_convert(convert: Any) -> None:
    with pytest.raises(ValueError, match=r"there is no ScaleByAdam3?State"):
        convert(optax.sgd(0.1, momentum=0.9).init(PARAMS))


def test_unknown_setting() -> None:
    with pytest.raises(ValueError, match=r"^v_dtype must be one of"):
        from_adam_state(optax.adam(0.1).init(PARAMS), v_dtype="int4")


def test_injected_hyperparameters_are_not_carried_over() -> None:
    adam = optax.inject_hyperparams(optax.adamw)(1e-2)
    ours = optax.inject_hyperparams(adam3w)(1e-2, lam=5.0, b3=0.9)
    _, state = train(adam, gradients=GRADIENTS[:2])
    with pytest.raises(ValueError, match=r"inner_state=from_adam_state\(state\.inner"):
        from_adam_state(state)
    switched = ours.init(PARAMS)._replace(
        count=state.count, inner_state=from_adam_state(state.inner_state)
    )
    assert float(switched.hyperparams["lam"]) == 5.0
    _, state = ours.update(PARAMS, switched, PARAMS)
    with pytest.raises(ValueError, match=r"inner_state=to_adam_state\(state\.inner"):
        to_adam_state(state)
    # Another storage is no other optimizer.
    assert types(convert_state(convert_state(state, **STORAGE["smallest"]))) == types(
        state
    )


def test_conversions_of_leaves_and_counts_round_apart() -> None:
    x = jnp.full((32, 32), 1 + 2.0**-9)
    s = ScaleByAdam3State
    states = [s([x, x], [x, x], [x, x], jnp.int32(count)) for count in (1, 2)]
    low: Any = [convert_state(state, **STORAGE["bfloat16"]) for state in states]
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(low)]
    masks = [(leaf > 1).ravel() for leaf in leaves if leaf.ndim]
    assert len(masks) == 12
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.2


def test_adam_of_parameters_of_several_dtypes() -> None:
    params = {"w": jnp.ones((4, 32), jnp.bfloat16), "b": jnp.ones(4)}
    for half in (jnp.bfloat16, jnp.float16):
        params["w"] = params["w"].astype(half)
        state = from_adam_state(optax.scale_by_adam().init(params))
        assert {x.dtype for x in jax.tree.leaves(state[:3])} == {jnp.dtype("float32")}
        scale_by_adam3().update(params, state)


def test_a_stacked_state_is_named_by_conversion() -> None:
    state = jax.vmap(scale_by_adam3().init)(jnp.ones((5, 4, 32)))
    with pytest.raises(ValueError, match=r"count has shape \(5,\).*jax.vmap"):
        convert_state(state, m_dtype="bfloat16")
    converted = jax.vmap(lambda x: convert_state(x, m_dtype="bfloat16"))(state)
    assert converted.m.dtype == jnp.bfloat16
