"""AdaM3 inside Optax's wrappers, JAX's transformations, Flax, Orbax and Equinox.

What is wrapped is the default form, and where the wrapper holds on to the state, one
whose moments are stored in several formats.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import equinox as eqx
import flax.linen
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3, adam3w, bfloat16_parameters, scale_by_adam3
from tests.settings import (
    BF16,
    EACH_FORM,
    EACH_STORAGE,
    F32,
    F64,
    GRADIENTS,
    MIXED,
    PARAMS,
    STORAGE,
    assert_close,
    assert_same,
    each_storage,
    first_step,
    mesh_of,
    moments,
    normal,
    on,
    scan,
    step,
    structure,
    train,
    types,
)

FEW = GRADIENTS[:4]


# Optax's wrappers.

Wrapper = Callable[[Any], Any]
WRAPPERS: dict[str, Wrapper] = {
    "chain": lambda o: optax.chain(optax.clip_by_global_norm(0.5), o, optax.scale(0.5)),
    "masked": lambda o: optax.masked(o, {"w": True, "b": False}),
    "partition": lambda o: optax.partition(
        {"ours": o, "sgd": optax.sgd(0.1)}, {"w": "ours", "b": "sgd"}
    ),
    "freeze": lambda o: optax.chain(
        o, optax.transforms.freeze({"w": True, "b": False})
    ),
    "MultiSteps": lambda o: optax.MultiSteps(o, 2).gradient_transformation(),
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 3),
    "conditionally_mask": lambda o: optax.conditionally_mask(o, lambda step: step < 2),
    "schedule_free": lambda o: optax.contrib.schedule_free(o, 0.1),
    "mechanize": optax.contrib.mechanize,
    "snapshot": lambda o: optax.chain(o, optax.snapshot("size", optax.tree.norm)),
    "flatten": optax.flatten,
    "split": optax.contrib.split_real_and_imaginary,
    "reduce_on_plateau": lambda o: optax.chain(
        o, optax.contrib.reduce_on_plateau(0.5, patience=1)
    ),
    "inject_hyperparams": lambda o: optax.inject_hyperparams(
        lambda scale: optax.chain(o, optax.scale(scale))
    )(0.5),
    "named_chain": lambda o: optax.named_chain(
        ("clip", optax.clip(1.0)), ("ours", o), ("scale", optax.scale(0.5))
    ),
    "selective_transform": lambda o: optax.transforms.selective_transform(
        o, freeze_mask={"w": False, "b": False}
    ),
    "skip_not_finite": lambda o: optax.MultiSteps(
        o, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "skip_large_updates": lambda o: optax.MultiSteps(
        o,
        2,
        should_skip_update_fn=functools.partial(
            optax.skip_large_updates, max_squared_norm=1e6
        ),
    ).gradient_transformation(),
    "conditionally_transform": lambda o: optax.conditionally_transform(
        o, lambda step: step < 2
    ),
    "keep_params_nonnegative": lambda o: optax.chain(
        o, optax.keep_params_nonnegative()
    ),
    "clip": lambda o: optax.chain(optax.clip(0.5), o),
    "clip_by_block_rms": lambda o: optax.chain(o, optax.clip_by_block_rms(0.05)),
    "adaptive_grad_clip": lambda o: optax.chain(optax.adaptive_grad_clip(0.1), o),
    "zero_nans": lambda o: optax.chain(optax.zero_nans(), o),
    "apply_every": lambda o: optax.chain(o, optax.apply_every(2)),
    "add_noise": lambda o: optax.chain(
        optax.add_noise(0.01, 0.55, jax.random.key(0)), o
    ),
}
if hasattr(optax, "monitor"):  # Optax 0.2.6 has none
    WRAPPERS["monitor"] = lambda o: optax.chain(
        o,
        optax.monitor({"size": optax.measure_with_ema(optax.tree.norm, decay=0.9)}),
    )


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_with_lam_zero_it_is_wrapped_adamw(
    wrapper: Wrapper, standard_promotion: None
) -> None:
    # Standard promotion for the wrappers and for Optax's AdamW, which do not hold to
    # the strict one.
    value = jnp.float32(1.0)
    ours = wrapper(adam3w(0.1, lam=0.0, eps=1e-6))
    adamw = wrapper(optax.adamw(0.1, eps=1e-6))
    params, state = train(ours, gradients=FEW, value=value)
    assert_close(params, train(adamw, gradients=FEW, value=value)[0], rtol=2e-4)
    third = optax.tree.get(state, "ScaleByAdam3State").s
    assert all(bool(jnp.all(x != 0)) for x in jax.tree.leaves(third))


@pytest.mark.parametrize("name", ["injected", "masked", "MultiSteps"])
def test_the_state_keeps_its_types_in_a_wrapper(
    name: str, standard_promotion: None
) -> None:
    ours = adam3w(0.1, **MIXED)
    optimizer = {
        "injected": optax.inject_hyperparams(adam3w)(0.1, **MIXED),
        "masked": optax.masked(ours, {"w": True, "b": False}),
        "MultiSteps": optax.MultiSteps(ours, 2),
    }[name]
    _, state = train(optimizer, gradients=FEW)
    assert types(state) == types(optimizer.init(PARAMS))
    assert_same(optax.tree.map_params(optimizer, lambda x: x, state), state)


def test_chain_clips_before() -> None:
    # The third moment is that of the clipped gradients.
    ours, clip = adam3(0.1, lam=0.1), optax.clip_by_global_norm(0.5)
    clipped = [clip.update(g, clip.init(g))[0] for g in FEW]
    params, (_, state) = train(optax.chain(clip, ours), gradients=FEW)
    assert_close((params, state), train(ours, gradients=clipped))


def test_masked_and_partitioned_leaves_step_as_if_alone() -> None:
    # MaskedNode stands where a leaf is someone else's.
    ours = adam3w(0.1, lam=0.1)
    expected, _ = train(ours, PARAMS["w"], [g["w"] for g in FEW])
    masked, _ = train(optax.masked(ours, {"w": True, "b": False}), gradients=FEW)
    np.testing.assert_array_equal(masked["w"], expected)
    untouched = PARAMS["b"] + sum(g["b"] for g in FEW)
    np.testing.assert_allclose(masked["b"], untouched, rtol=1e-6)
    parts = {"a": ours, "rest": optax.set_to_zero()}
    for labels in ({"w": "a", "b": "rest"}, lambda p: {"w": "a", "b": "rest"}):
        partitioned, _ = train(optax.partition(parts, labels), gradients=FEW)
        np.testing.assert_array_equal(partitioned["w"], expected)
        np.testing.assert_array_equal(partitioned["b"], PARAMS["b"])


def test_both_parts_of_a_partition_can_be_ours() -> None:
    # Two states of one kind, two counts, two settings.
    fast, slow = adam3(0.1), adam3w(0.01, lam=0.3)
    both = optax.partition({"fast": fast, "slow": slow}, {"w": "fast", "b": "slow"})
    params, _ = train(both, gradients=FEW)
    for name, optimizer in (("w", fast), ("b", slow)):
        alone, _ = train(optimizer, PARAMS[name], [g[name] for g in FEW])
        np.testing.assert_array_equal(params[name], alone)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_multi_steps_average_gradients(dtype: Any, standard_promotion: None) -> None:
    # Standard promotion for MultiSteps, which multiplies by booleans. Its `cond` and
    # the scan need types that do not drift, also in bfloat16.
    ours = adam3w(0.25)
    multi = optax.MultiSteps(ours, every_k_schedule=2).gradient_transformation()
    params = jnp.array([1.0, -2.0], dtype)
    gradients = jnp.array([[1.0, 3.0], [2.0, -1.0], [0.5, 0.5], [1.5, 2.5]], dtype)
    got, state = scan(multi, params, gradients)
    want, inner = train(ours, params, gradients.reshape(2, 2, 2).mean(axis=1))
    assert_close((got, state.inner_opt_state), (want, inner))


def test_apply_if_finite_skips_what_is_not(standard_promotion: None) -> None:
    # Standard promotion for apply_if_finite. A NaN must leave no trace in the state.
    ours = adam3w(0.1)
    broken = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), FEW[0])
    gradients = [FEW[0], broken, FEW[1]]
    params, state = train(optax.apply_if_finite(ours, 5), gradients=gradients)
    assert_close((params, state.inner_state), train(ours, gradients=FEW[:2]))
    assert state.total_notfinite == 1


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead_interpolates(reset: bool, standard_promotion: None) -> None:
    # Standard promotion for lookahead.
    ours = adam3(0.1, lam=0.1)
    optimizer = optax.lookahead(
        ours, sync_period=2, slow_step_size=0.5, reset_state=reset
    )
    start = optax.LookaheadParams.init_synced(PARAMS)
    got, state = train(optimizer, start, FEW[:2])
    fast, inner = train(ours, gradients=FEW[:2])
    middle = jax.tree.map(lambda p, f: p + 0.5 * (f - p), PARAMS, fast)
    assert_close(got, optax.LookaheadParams(fast=middle, slow=middle))
    assert_close(state.fast_state, ours.init(PARAMS) if reset else inner)


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="Optax 0.2.6 has none")
def test_snapshot_and_monitor_see_the_updates() -> None:
    snapshot = optax.snapshot("direction", lambda u: u["b"])
    monitor = optax.monitor({"norm": optax.tree.norm})
    optimizer = optax.chain(scale_by_adam3(), snapshot, monitor, optax.scale(-0.1))
    params, state = train(optimizer, gradients=FEW[:1])
    direction = optax.tree.get(state, "direction")
    np.testing.assert_allclose(params["b"], PARAMS["b"] - 0.1 * direction, rtol=1e-6)
    signs = sum(p.size for p in PARAMS.values())
    assert optax.tree.get(state, "norm") == pytest.approx(signs**0.5, rel=0.01)


def test_reduce_on_plateau_takes_the_value(standard_promotion: None) -> None:
    # Standard promotion for reduce_on_plateau. The value reaches it past ours.
    ours = adam3(0.1)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    optimizer = optax.chain(ours, plateau)
    state, plain = optimizer.init(PARAMS), ours.init(PARAMS)
    for g, scale in zip(FEW, (1.0, 1.0, 0.5, 0.5), strict=True):
        updates, state = optimizer.update(g, state, PARAMS, value=jnp.float32(1.0))
        expected, plain = ours.update(g, plain, PARAMS)
        assert_close(updates, jax.tree.map(lambda u, k=scale: k * u, expected))


def test_flattened_it_is_the_same() -> None:
    ours = adam3w(0.1, lam=0.1)
    flat = train(optax.flatten(ours), gradients=FEW)[0]
    assert_same(flat, train(ours, gradients=FEW)[0])


def test_complex_parameters_can_be_split(standard_promotion: None) -> None:
    # Standard promotion for Optax's wrapper, which adds a complex to a real array.
    params = jnp.array([3.0 - 4.0j, 1.0 + 0.0j])
    updates, _ = first_step(optax.contrib.split_real_and_imaginary(adam3w()), params)
    expected, _ = first_step(adam3w(), jnp.stack([params.real, params.imag]))
    np.testing.assert_array_equal(updates, expected[0] + 1j * expected[1])


# Optax's tools for states.


def test_map_params_finds_the_moments() -> None:
    # An init that looks at its leaves fails on the placeholder which this passes.
    specs = {"w": P("x"), "b": P()}
    mapped = optax.tree.map_params(
        adam3w(),
        lambda _, spec: spec,
        adam3w().init(PARAMS),
        specs,
        transform_non_params=lambda _: "other",
    )
    assert moments(mapped) == [specs] * 3
    assert optax.tree.get(mapped, "count") == "other"


def test_get_and_set_by_name() -> None:
    optimizer, a = adam3w(), PARAMS["b"]
    state = optax.tree.set(optimizer.init(a), s=a, count=jnp.int32(7))
    inner = optax.tree.get(state, "ScaleByAdam3State")
    assert inner.count == 7
    assert inner.s is a
    _, state = optimizer.update(a, state, a)
    assert optax.tree.get(state, "count") == 8


# Transformations of JAX.


@EACH_STORAGE
def test_scans_members_and_donated_steps_are_a_loop(storage: Any) -> None:
    optimizer = adam3w(1e-2, **storage)
    straight = train(optimizer, gradients=FEW)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *FEW)

    def run(params: Any) -> Any:
        return scan(optimizer, params, stacked)

    scanned = run(PARAMS)
    assert types(scanned) == types(straight)
    # The compiler may contract in another way, and an ulp turn a rounding.
    rtol = 1e-2 if "m_dtype" in storage else 1e-5
    assert_close(scanned[0], straight[0], rtol)
    other = jax.tree.map(lambda p: -p, PARAMS)
    both = jax.vmap(run)(jax.tree.map(lambda *p: jnp.stack(p), PARAMS, other))
    for i, params in enumerate((PARAMS, other)):
        member = jax.tree.map(lambda x, i=i: x[i], both[0])
        assert_close(member, run(params)[0], rtol)
    donated = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, (PARAMS, optimizer.init(PARAMS)))
    for g in FEW:
        carry = donated(*carry, g)
    assert_same(carry, straight)


def test_vmap_over_lam() -> None:
    # A sweep in one program.
    def final(lam: Any) -> Any:
        return train(adam3(0.1, lam=lam), gradients=FEW)[0]

    lams = [0.0, 0.1, -0.5]
    got = jax.vmap(final)(jnp.array(lams))
    for i, lam in enumerate(lams):
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), final(lam), rtol=1e-4)


@EACH_FORM
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


def test_checkpointed_steps_have_the_same_derivative() -> None:
    optimizer = adam3w(0.1, eps_root=1e-8)

    def once(params: Any, state: Any) -> Any:
        return step(optimizer, params, state, jnp.sin(params))

    def loss(params: Any, step: Any) -> jax.Array:
        return jnp.sum(step(*step(params, optimizer.init(params)))[0] ** 2)

    derivative = jax.jit(jax.grad(loss), static_argnums=1)
    params = PARAMS["b"]
    np.testing.assert_allclose(
        derivative(params, jax.checkpoint(once)), derivative(params, once), rtol=1e-6
    )


# Flax.


def test_linen_train_state() -> None:
    model, x = flax.linen.Dense(2), normal(4, 3, seed=5)
    params = model.init(jax.random.key(0), x)
    optimizer = adam3w(0.1)

    def gradients(params: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.asarray(model.apply(p, x)) ** 2))(params)

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    jitted = jax.jit(lambda s: s.apply_gradients(grads=gradients(s.params)))
    opt_state = optimizer.init(params)
    for _ in range(3):
        state = jitted(state)
        params, opt_state = step(optimizer, params, opt_state, gradients(params))
    assert_close(state.params, params)
    assert state.step == optax.tree.get(state.opt_state, "count") == 3


class Model(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(normal(4, 16, seed=8))
        self.inner = nnx.Linear(16, 1, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros(()))  # no parameter: it stays


@each_storage("default", "mixed")
def test_nnx_steps_in_and_out_of_jit(storage: Any) -> None:
    # It gives the state back in its own containers at the second step.
    model, optimizer = Model(), adam3w(1e-2, **storage)
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    # In the places of the model's, for those tell how a leaf is rounded.
    params: Any = {"w": model.w[...], "inner": {"kernel": model.inner.kernel[...]}}

    def loss(w: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(w @ kernel))

    def nnx_step(model: Model, nnx_optimizer: Any) -> None:
        gradients = nnx.grad(lambda m: loss(m.w[...], m.inner.kernel[...]))(model)
        nnx_optimizer.update(model, gradients)

    jitted, state = nnx.jit(nnx_step), optimizer.init(params)
    for stepped in (nnx_step, nnx_step, jitted, jitted, nnx_step):
        stepped(model, nnx_optimizer)
        gradients = jax.grad(lambda p: loss(p["w"], p["inner"]["kernel"]))(params)
        params, state = step(optimizer, params, state, gradients)
    rtol, atol = (0.0, 5e-3) if storage else (1e-5, 0.0)
    for got, want in (
        (model.w, params["w"]),
        (model.inner.kernel, params["inner"]["kernel"]),
    ):
        np.testing.assert_allclose(got[...], want, rtol, atol)


# On disk: nothing is kept outside the state, and nothing loses its type.


def by_pickle(state: Any, blank: Any, path: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def by_bytes(state: Any, blank: Any, path: Path) -> Any:
    return flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))


def by_state_dict(state: Any, blank: Any, path: Path) -> Any:
    plain = flax.serialization.to_state_dict(state)
    return flax.serialization.from_state_dict(blank, plain)


def by_orbax(state: Any, blank: Any, path: Path) -> Any:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(
            path / "state",
            jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, blank),
        )


def fresh(wrap: str) -> Any:
    if wrap == "injected":
        return optax.inject_hyperparams(adam3w)(0.1, **MIXED)
    ours = adam3w(0.1, **MIXED)
    return optax.masked(ours, {"w": True, "b": False}) if wrap == "masked" else ours


@functools.cache
def straight(wrap: str) -> tuple[Any, Any]:
    """Returns parameters and state in the middle of a run, and at its end."""
    optimizer = fresh(wrap)
    middle = end = train(optimizer, gradients=FEW[:2])
    for g in FEW[2:]:
        end = step(optimizer, *end, g)
    return middle, end


@pytest.mark.parametrize("wrap", ["plain", "injected", "masked"])
@pytest.mark.parametrize("keep", [by_pickle, by_bytes, by_state_dict, by_orbax])
def test_a_restored_run_is_the_straight_run(
    wrap: str, keep: Any, tmp_path: Path
) -> None:
    # Bit for bit, by an optimizer made anew, as after a restart.
    (params, state), end = straight(wrap)
    again = fresh(wrap)
    resumed = params, keep(state, again.init(PARAMS), tmp_path)
    for g in FEW[2:]:
        resumed = step(again, *resumed, g)
    assert_same(resumed, end)


def test_an_npz_keeps_the_bytes_of_float8_alone(tmp_path: Path) -> None:
    # NumPy does not know the type by its name: whoever restores it must name it.
    _, state = train(adam3(**STORAGE["float8"]), gradients=FEW[:2])
    np.savez(tmp_path / "m.npz", m=state[0].m["w"])
    m = np.load(tmp_path / "m.npz")["m"]
    assert m.dtype == np.dtype("V1")
    assert_same(m.view(jnp.float8_e4m3fn), state[0].m["w"])


def test_orbax_restores_shardings(tmp_path: Path) -> None:
    mesh = mesh_of(AxisType.Explicit)
    params = jax.device_put(jnp.ones((8, 32)), on(mesh, P("data", None)))
    optimizer = adam3(**MIXED)
    with jax.set_mesh(mesh):
        _, state = optimizer.update(params, optimizer.init(params))
        restored = by_orbax(state, optimizer.init(params), tmp_path)
        assert_same(restored, state)
        assert types(restored) == types(state)


# Equinox, and parameters in classes.


class Module(eqx.Module):
    weight: jax.Array
    table: jax.Array  # integers: an array, but no parameter
    activation: Callable[[Any], Any] = eqx.field(static=True)
    width: int = eqx.field(static=True)
    name: str = "plain leaf"

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self.activation(self.weight * x[self.table]))


@pytest.mark.parametrize("keep", [eqx.is_array, eqx.is_inexact_array])
def test_equinox_modules(keep: Any) -> None:
    # filter_grad gives None for integer arrays, which is_array counts as parameters.
    optimizer = adam3w()
    model = Module(normal(3, seed=6), jnp.array([2, 0, 1]), jnp.sin, 3)
    x = normal(3, seed=7)
    state = optimizer.init(eqx.filter(model, keep))
    weight, table, plain = model.weight, model.table, optimizer.init(model.weight)

    @eqx.filter_jit
    def eqx_step(model: Any, state: Any) -> Any:
        gradients = eqx.filter_grad(lambda m: m(x))(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, keep))
        return eqx.apply_updates(model, updates), state

    for _ in range(3):
        model, state = eqx_step(model, state)
        g = jax.grad(lambda w: jnp.sum(jnp.sin(w * x[table])))(weight)
        weight, plain = step(optimizer, weight, plain, g)
    np.testing.assert_allclose(model.weight, weight, rtol=1e-5)
    np.testing.assert_array_equal(model.table, table)
    assert model.width == 3


def test_equinox_in_bfloat16(standard_promotion: None) -> None:
    # eqx.apply_updates adds in float32, and would make the parameters float32.
    model = eqx.nn.Linear(32, 4, dtype=BF16, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer, x = bfloat16_parameters(adam3w(0.01)), normal(16, 32, seed=9)

    def loss(params: Any) -> jax.Array:
        found = jax.vmap(eqx.combine(params, static))(x.astype(BF16))
        return jnp.mean((found.astype(F32) - 1) ** 2)

    @jax.jit
    def bfloat16_step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        widened = eqx.apply_updates(params, updates)
        return optax.apply_updates(params, updates), state, value, widened

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, value, widened = bfloat16_step(params, state)
        losses.append(value)
    assert losses[-1] < 0.7 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(BF16)}
    assert {x.dtype for x in jax.tree.leaves(widened)} == {jnp.dtype(F32)}


@chex.dataclass(frozen=True)
class Chex:
    w: Any
    b: Any


@flax.struct.dataclass
class Struct:
    w: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    w: Any
    b: Any
    name: str = dataclasses.field(default="static", metadata={"static": True})


@pytest.mark.parametrize("container", [Chex, Struct, Frozen])
def test_parameters_in_dataclasses(container: Any) -> None:
    # State and updates come in the container of the parameters.
    optimizer = adam3w(0.1)
    expected, _ = train(optimizer, gradients=FEW)
    gradients = [container(**g) for g in FEW]
    params, state = train(optimizer, container(**PARAMS), gradients)
    for tree in (params, *moments(state)):
        assert structure(tree) == structure(container(**PARAMS))
    np.testing.assert_array_equal(params.w, expected["w"])
    np.testing.assert_array_equal(params.b, expected["b"])
