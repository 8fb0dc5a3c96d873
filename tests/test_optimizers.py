"""`adam3` and `adam3w`: the learning rate, the decay, its mask, and one rounding."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from adam3_optax import adam3, adam3w
from tests import reference
from tests.settings import (
    BF16,
    EACH_FORM,
    F32,
    F64,
    FORMS,
    GRADIENTS,
    PARAMS,
    assert_close,
    assert_same,
    each_storage,
    first_step,
    moments,
    train,
    types,
)

A, B = jnp.array([1.0, -2.0]), jnp.array(0.5)


@EACH_FORM
def test_float64_follows_the_reference(form: Any, x64: None) -> None:
    # With the rate and the decay in float64, too.
    gradients = np.random.default_rng(0).normal(size=(5, 8))
    optimizer = adam3w(0.3, weight_decay=0.7, third_moment=form)
    params = jnp.linspace(-1.0, 1.0, 8, dtype=F64)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(jnp.asarray(g), state, params)
    assert [x.dtype for x in moments(state)] == [F64] * 3
    *_, last = reference.steps(gradients, reference.Setting(form))
    np.testing.assert_allclose(updates, -0.3 * (last.u + 0.7 * params), rtol=1e-11)


@each_storage("default", "mixed")
def test_adam3_is_adam3w_without_decay(storage: Any) -> None:
    # Each argument unlike its default and the others.
    numbers = (0.3, 0.5, 0.8, 0.6, 0.4, 0.2, 1e-3, 1e-4)
    names = list(inspect.signature(adam3).parameters)[: len(numbers)]
    assert names[0] == "learning_rate"
    chosen: Any = dict(zip(names, numbers, strict=True))
    other = {"third_moment": FORMS[-1], **storage}  # the default is the first
    got = train(adam3(**chosen, **other))
    want = train(adam3w(**chosen, weight_decay=0.0, **other))
    assert_close(got[0], want[0])
    assert types(got[1][0]) == types(want[1][0])


@pytest.mark.parametrize(
    "params", [None, FrozenDict(a=A, b=B), {"a": A, "b": optax.MaskedNode()}, [A, B]]
)
def test_parameters_that_are_not_needed_may_be_anything(params: Any) -> None:
    # Only a decay reads them, so that dicts of gradients go with Flax's FrozenDict of
    # parameters.
    optimizer, gradients = adam3(), {"a": A, "b": B}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), params)
    assert_same(updates, first_step(optimizer, gradients)[0])


def test_weight_decay_needs_parameters() -> None:
    optimizer = adam3w()
    with pytest.raises(ValueError, match="params"):
        optimizer.update(A, optimizer.init(A))


# In bfloat16: rounding between the decay, the learning rate and the update.


def test_decay_is_added_before_rounding() -> None:
    # u = 1 and wd·p = .001: their sum in bfloat16 is 1. The learning rate is such that
    # 1 and 1.001 times it round to different numbers.
    rate, p = 1.0035, jnp.ones((), BF16)
    decayed, _ = first_step(adam3w(rate, weight_decay=1e-3), p)
    plain, _ = first_step(adam3w(rate, weight_decay=0.0), p)
    assert plain == jnp.asarray(-rate, BF16)
    assert decayed == jnp.asarray(-rate * 1.001, BF16) != plain


@pytest.mark.parametrize("scheduled", [False, True])
def test_all_is_rounded_once(scheduled: bool) -> None:
    # The bfloat16 update is the float32 one, rounded; of 512 that are rounded twice
    # many differ.
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.normal(size=512), BF16) for _ in range(2))
    rate = (lambda count: 0.3) if scheduled else 0.3
    optimizer = adam3w(rate, weight_decay=0.7)
    exact, _ = first_step(optimizer, g.astype(F32), p.astype(F32))
    updates, _ = first_step(optimizer, g, p)
    assert_same(updates, exact.astype(BF16))


# The mask.


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize("how", ["function", "tree", "injected"])
def test_a_mask_says_what_decays(how: str) -> None:
    mask: Any = {"w": True, "b": False} if how == "tree" else matrices
    make: Any = adam3w
    if how == "injected":
        make = optax.inject_hyperparams(adam3w, static_args="mask")
    optimizer = make(1.0, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = first_step(optimizer, zeros, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.5 * PARAMS["w"])
    np.testing.assert_array_equal(updates["b"], 0.0)


@pytest.mark.parametrize("mask", [True, False, np.True_, 1.0])
def test_a_mask_that_is_a_number_is_refused(mask: Any) -> None:
    with pytest.raises(TypeError, match=r"^mask must be .*static_args='mask'"):
        adam3w(mask=mask)


def test_a_mask_taken_for_a_schedule_is_refused() -> None:
    # Called with the count, it says False: no decay at all, silently.
    lost = optax.inject_hyperparams(adam3w)(1.0, weight_decay=0.5, mask=matrices)
    with pytest.raises(TypeError, match="static_args='mask'"):
        lost.init(PARAMS)


def test_a_gradient_of_none_decays_nothing() -> None:
    updates, _ = first_step(
        adam3w(1.0, weight_decay=0.5), {"w": None, "b": GRADIENTS[0]["b"]}, PARAMS
    )
    assert updates["w"] is None
