"""A mask function sees the parameters, as they were passed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adam3_optax import adam3w
from tests.settings import BF16, F32, first_step, structure

MIXED = {"w": jnp.full((2, 2), 2.0, BF16), "b": jnp.ones(2, F32)}
ZEROS = {"w": jnp.zeros((2, 2), BF16), "b": jnp.zeros(2, F32)}


def narrow(params: Any) -> Any:
    """Returns where parameters are bfloat16, which is lost if they were cast."""
    return jax.tree.map(lambda p: p.dtype == BF16, params)


@pytest.mark.parametrize("decay", [0.5, optax.constant_schedule(0.5)])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_mask_sees_the_dtypes_of_the_parameters(decay: Any, jitted: bool) -> None:
    optimizer = adam3w(0.1, weight_decay=decay, mask=narrow)
    update = jax.jit(optimizer.update) if jitted else optimizer.update
    state = optimizer.init(MIXED)
    for _ in range(2):
        updates, state = update(ZEROS, state, MIXED)
        np.testing.assert_array_equal(updates["w"], BF16(-0.10009765625))
        np.testing.assert_array_equal(updates["b"], 0.0)


def test_a_mask_sees_the_very_parameters() -> None:
    seen: list[Any] = []

    def mask(params: Any) -> Any:
        seen.append(params)
        return jax.tree.map(lambda p: True, params)

    optimizer = adam3w(0.1, mask=mask)
    first_step(optimizer, ZEROS, MIXED)
    assert seen
    assert all(params is MIXED for params in seen)


def test_the_others_decay_where_a_gradient_is_none() -> None:
    expected = BF16(-0.10009765625)
    for mask in (narrow, {"w": True, "b": True, "n": True}, None):
        optimizer = adam3w(0.1, weight_decay=0.5, mask=mask)
        params = MIXED | {"n": jnp.arange(3)}
        updates, _ = first_step(optimizer, ZEROS | {"b": None, "n": None}, params)
        np.testing.assert_array_equal(updates["w"], expected)
        assert updates["b"] is updates["n"] is None


def test_a_mask_of_a_prefix() -> None:
    params = {"layer": MIXED, "head": jnp.ones(3)}
    zeros = {"layer": ZEROS, "head": jnp.zeros(3)}
    optimizer = adam3w(
        0.1, weight_decay=0.5, mask=lambda _: {"layer": True, "head": False}
    )
    updates, _ = first_step(optimizer, zeros, params)
    np.testing.assert_allclose(updates["layer"]["b"], -0.05)
    np.testing.assert_array_equal(updates["head"], 0.0)


def test_the_state_is_that_of_optax() -> None:
    for decay in (0.5, optax.constant_schedule(0.5)):
        ours = adam3w(0.1, weight_decay=decay, mask=narrow).init(MIXED)[1]
        theirs = optax.add_decayed_weights(decay, narrow).init(MIXED)
        assert structure(ours) == structure(theirs)


def test_nnx_passes_its_parameters_to_the_mask() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = nnx.state(model, nnx.Param)
    shapes: list[Any] = []

    def matrices(params: Any) -> Any:
        shapes.append(jax.tree.map(jnp.shape, params))
        return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)

    transformation = adam3w(0.1, weight_decay=0.5, mask=matrices)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    kernel = np.asarray(before["kernel"][...])
    optimizer.update(model, zeros)
    np.testing.assert_allclose(model.kernel[...], 0.95 * kernel, rtol=1e-6)


def test_no_parameters_are_named() -> None:
    for mask in (None, narrow):
        optimizer = adam3w(mask=mask)
        with pytest.raises(ValueError, match="needs params"):
            optimizer.update(ZEROS, optimizer.init(MIXED))


def test_places_are_for_the_rate_and_two_decays(standard_promotion: None) -> None:
    # In Optax's order a fourth number would be eps; here b3 came next.
    with pytest.raises(TypeError, match="positional"):
        adam3w(1e-3, 0.9, 0.95, 1e-8)  # type: ignore[call-arg]
    for name in ("mu_dtype", "nesterov"):
        with pytest.raises(TypeError, match=name):
            adam3w(1e-3, **{name: None})  # type: ignore[arg-type]
    for static in ((), ("b2",)):
        made = optax.inject_hyperparams(adam3w, static_args=static)
        lam = optax.constant_schedule(0.1)
        updates, _ = first_step(made(1e-3, 0.9, 0.95, b3=0.9, lam=lam), ZEROS, MIXED)
        assert updates["w"].dtype == BF16


@pytest.mark.parametrize("leaf", ["no", 1, 0.5, np.ones(2, bool), jnp.ones(2) > 0])
def test_a_mask_that_is_not_boolean_is_named(leaf: Any) -> None:
    for mask in ({"w": True, "b": leaf}, lambda _: {"w": True, "b": leaf}):
        with pytest.raises(TypeError, match=r"mask\['b'\] must be a boolean"):
            first_step(adam3w(mask=mask), ZEROS, MIXED)


@pytest.mark.parametrize("mask", [{"w": True}, [True, False], {"w": True, "b": None}])
def test_a_mask_of_another_structure_is_named(mask: Any) -> None:
    for optimizer in (adam3w(mask=mask), adam3w(mask=lambda _: mask)):
        with pytest.raises(ValueError, match="mask must be a tree like params, or a "):
            first_step(optimizer, ZEROS, MIXED)


def test_booleans_of_every_kind_are_masks() -> None:
    for true in (True, np.True_, np.array(True), jnp.array(True)):
        optimizer = adam3w(0.1, weight_decay=0.5, mask={"w": true, "b": False})
        updates, _ = first_step(optimizer, ZEROS, MIXED)
        np.testing.assert_array_equal(updates["w"], BF16(-0.10009765625))


def test_a_mask_of_traced_values_is_named() -> None:
    def step(params: Any) -> Any:
        optimizer = adam3w(mask=lambda p: jax.tree.map(lambda x: x.sum() > 0, p))
        return first_step(optimizer, ZEROS, params)

    with pytest.raises(TypeError, match="does not depend on traced values"):
        jax.jit(step)(MIXED)


def test_parameters_of_another_shape_are_not_broadcast() -> None:
    optimizer = adam3w()
    state = optimizer.init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but its update has \(3,\)"):
        optimizer.update(jnp.ones(3), state, jnp.ones((2, 3)))


def test_parameters_of_another_structure_are_named() -> None:
    optimizer = adam3w()
    state = optimizer.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="params must be a tree like updates"):
        optimizer.update({"w": jnp.ones(3)}, state, {"b": jnp.ones(3)})
