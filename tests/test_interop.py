"""AdaM3 inside Optax's wrappers, on disk, in Flax NNX and in Equinox."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

from adam3_optax import adam3w, bfloat16_parameters, to_float32_parameters
from tests import settings
from tests.clients import BFLOAT16, FLOAT8, X, mean_square, trains
from tests.settings import BF16, F32, F64, PARAMS, first_step, scan, step, train, types

FEW = settings.GRADIENTS[:4]


# Optax's wrappers.


def first(other: Any) -> Any:
    return lambda ours: optax.chain(other, ours)


def then(other: Any) -> Any:
    return lambda ours: optax.chain(ours, other)


ONE = {"w": True, "b": False}
NONE = {"w": False, "b": False}
PARTS = {"w": "ours", "b": "sgd"}
WRAPPERS: dict[str, Any] = {
    "chain": lambda o: optax.chain(optax.clip_by_global_norm(0.5), o, optax.scale(0.5)),
    "masked": lambda o: optax.masked(o, ONE),
    "partition": lambda o: optax.partition({"ours": o, "sgd": optax.sgd(0.1)}, PARTS),
    "freeze": then(optax.transforms.freeze(ONE)),
    "MultiSteps": lambda o: optax.MultiSteps(o, 2),
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 3),
    "conditionally_mask": lambda o: optax.conditionally_mask(o, lambda i: i < 2),
    "schedule_free": lambda o: optax.contrib.schedule_free(o, 0.1),
    "mechanize": optax.contrib.mechanize,
    "snapshot": then(optax.snapshot("size", optax.tree.norm)),
    "flatten": optax.flatten,
    "split": optax.contrib.split_real_and_imaginary,
    "reduce_on_plateau": then(optax.contrib.reduce_on_plateau(0.5, patience=1)),
    "inject_hyperparams": lambda o: optax.inject_hyperparams(
        lambda scale: optax.chain(o, optax.scale(scale))
    )(0.5),
    "named_chain": lambda o: optax.named_chain(
        ("clip", optax.clip(1.0)), ("ours", o), ("scale", optax.scale(0.5))
    ),
    "selective_transform": lambda o: optax.transforms.selective_transform(
        o, freeze_mask=NONE
    ),
    "skip_not_finite": lambda o: optax.MultiSteps(
        o, 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "skip_large_updates": lambda o: optax.MultiSteps(
        o,
        2,
        should_skip_update_fn=partial(optax.skip_large_updates, max_squared_norm=1e6),
    ),
    "conditionally_transform": lambda o: optax.conditionally_transform(
        o, lambda i: i < 2
    ),
    "keep_params_nonnegative": then(optax.keep_params_nonnegative()),
    "clip": first(optax.clip(0.5)),
    "clip_by_block_rms": then(optax.clip_by_block_rms(0.05)),
    "adaptive_grad_clip": first(optax.adaptive_grad_clip(0.1)),
    "zero_nans": first(optax.zero_nans()),
    "apply_every": then(optax.apply_every(2)),
    "add_noise": first(optax.add_noise(0.01, 0.55, jax.random.key(0))),
    "lookahead": lambda o: optax.lookahead(o, 2, 0.5),
}
if hasattr(optax, "monitor"):  # Optax 0.2.6 has none
    size = optax.measure_with_ema(optax.tree.norm, decay=0.9)
    WRAPPERS["monitor"] = then(optax.monitor({"size": size}))


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_with_lam_zero_it_is_wrapped_adamw(
    name: str, standard_promotion: None
) -> None:
    # Standard promotion for the wrappers and for Optax's AdamW, which do not hold to
    # the strict one.
    value, params, wrapper = jnp.float32(1.0), PARAMS, WRAPPERS[name]
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    got, state = train(
        wrapper(adam3w(0.1, lam=0.0, eps=1e-6)), params, FEW, value=value
    )
    want, _ = train(wrapper(optax.adamw(0.1, eps=1e-6)), params, FEW, value=value)
    settings.assert_close(got, want, rtol=2e-4)
    third = optax.tree.get(state, "ScaleByAdam3State").s
    assert all(bool(jnp.all(x != 0)) for x in jax.tree.leaves(third))


def test_complex_parameters_can_be_split(standard_promotion: None) -> None:
    # Standard promotion for Optax's wrapper, which adds a complex to a real array.
    params = jnp.array([3.0 - 4.0j, 1.0 + 0.0j])
    updates, _ = first_step(optax.contrib.split_real_and_imaginary(adam3w()), params)
    expected, _ = first_step(adam3w(), jnp.stack([params.real, params.imag]))
    np.testing.assert_array_equal(updates, expected[0] + 1j * expected[1])


@settings.EACH_FORM
def test_hypergradients(form: Any, x64: None) -> None:
    # The derivative of training by a hyperparameter is the difference quotient.
    params = PARAMS["b"].astype(F64)
    gradients = jnp.stack([g["b"].astype(F64) for g in FEW[:3]])

    @jax.jit
    def loss(values: dict[str, Any]) -> jax.Array:
        optimizer = adam3w(**values, b2=0.9, third_moment=form)
        final: jax.Array = scan(optimizer, params, gradients)[0]
        return jnp.sum(jnp.sin(final))

    at = {"learning_rate": 0.1, "b1": 0.5, "b3": 0.6, "lam": 0.2, "weight_decay": 0.2}
    at = jax.tree.map(jnp.float64, at)
    derivative, h = jax.grad(loss)(at), 1e-5
    for name, x in at.items():
        quotient = (loss(at | {name: x + h}) - loss(at | {name: x - h})) / (2 * h)
        assert abs(quotient) > 1e-4
        np.testing.assert_allclose(derivative[name], quotient, rtol=1e-5)


# On disk: nothing is kept outside the state, and nothing loses its type.


def by_pickle(state: Any, blank: Any, path: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def by_bytes(state: Any, blank: Any, path: Path) -> Any:
    return flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))


def by_orbax(state: Any, blank: Any, path: Path) -> Any:
    shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, blank)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", shapes)


# On the default platform, for Orbax restores onto no other without a tree of shardings.
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("keep", [by_pickle, by_bytes, by_orbax])
def test_a_restored_run_is_the_straight_run(
    keep: Any, tmp_path: Path, standard_promotion: None
) -> None:
    # Bit for bit, by an optimizer made anew, as after a restart.
    def fresh() -> Any:
        ours = optax.inject_hyperparams(adam3w)(0.1, **settings.MIXED)
        return optax.masked(bfloat16_parameters(ours, "int8"), ONE)

    optimizer, again = fresh(), fresh()
    params = PARAMS | {"w": PARAMS["w"].astype(BF16)}
    blank = again.init(params)
    params, state = straight = train(optimizer, params, FEW[:2])
    assert types(state) == types(blank)
    resumed = params, keep(state, blank, tmp_path)
    for g in FEW[2:]:
        straight, resumed = step(optimizer, *straight, g), step(again, *resumed, g)
    settings.assert_same(resumed, straight)


# Flax NNX and Equinox. NNX outside of jit is in `test_boxes.py`.


class Model(nnx.Module):
    def __init__(self, dtype: Any) -> None:
        self.linear = nnx.Linear(16, 1, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros(()))  # no parameter: it stays


@pytest.mark.usefixtures("standard_promotion")
@trains(FLOAT8, BFLOAT16)
def test_nnx(optimizer: Any, dtype: Any) -> Any:
    model = Model(dtype)
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def nnx_step(model: Model, nnx_optimizer: Any) -> Any:
        def loss(model: Model) -> jax.Array:
            return mean_square(model.linear(X.astype(dtype)))

        value, gradients = nnx.value_and_grad(loss)(model)
        nnx_optimizer.update(model, gradients)
        return value

    jitted: Any = nnx.jit(nnx_step)
    for _ in range(10):
        yield jitted(model, nnx_optimizer)
    assert model.linear.kernel[...].dtype == dtype
    if dtype == BF16:
        params, state = nnx.state(model, nnx.Param), nnx_optimizer.opt_state
        kernel: Any = to_float32_parameters(params, state)["linear"]["kernel"][...]
        assert bool((kernel != kernel.astype(BF16).astype(F32)).any())


class Module(eqx.Module):
    weight: jax.Array
    table: jax.Array  # integers: an array, but no parameter
    activation: Callable[[Any], Any] = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(x.astype(self.weight.dtype)[:, self.table] @ self.weight)


@pytest.mark.usefixtures("standard_promotion")
@trains(FLOAT8, BFLOAT16)
def test_equinox_modules(optimizer: Any, dtype: Any) -> Any:
    # `filter_grad` gives None for integers, which `is_array` counts as parameters.
    keep = eqx.is_array if dtype == F32 else eqx.is_inexact_array
    weight = settings.normal(16, 1, seed=6).astype(dtype)
    model = Module(weight, jnp.arange(16)[::-1], jnp.tanh)
    state = optimizer.init(eqx.filter(model, keep))

    @eqx.filter_jit
    def eqx_step(model: Any, state: Any) -> Any:
        params, static = eqx.partition(model, keep)
        loss = eqx.filter_value_and_grad(lambda model: mean_square(model(X)))
        value, gradients = loss(model)
        updates, state = optimizer.update(gradients, state, params)
        # Equinox adds in float32, and makes the parameters float32.
        if dtype == F32:
            return eqx.apply_updates(model, updates), state, value
        params = optax.apply_updates(params, updates)
        return eqx.combine(params, static), state, value

    for _ in range(10):
        model, state, value = eqx_step(model, state)
        yield value
    assert model.weight.dtype == dtype
