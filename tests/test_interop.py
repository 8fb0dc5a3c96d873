"""AdaM3 inside Optax's wrappers, JAX's transformations, Flax, Orbax and Equinox.

Trees, types, sharding, many devices, counts of compiles and `nnx.Optimizer` are in
`test_pitfalls.py`.
"""

import dataclasses
import functools
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
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3, adam3w, scale_by_adam3
from adam3_optax._rule import FORMS as THIRD_MOMENTS

FORMS = pytest.mark.parametrize("third_moment", THIRD_MOMENTS)


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"w": normal(2, 3, seed=0), "b": normal(3, seed=1)}
# Squares are skewed, so that the third moment matters.
GRADIENTS = [
    {"w": normal(2, 3, seed=i) ** 2 - 0.5, "b": normal(3, seed=i) ** 2 - 0.5}
    for i in range(4)
]


def run(
    optimizer: Any, gradients: Any = None, params: Any = PARAMS, **extra: Any
) -> tuple[Any, Any]:
    """Returns the parameters and the state after a compiled step for each gradient."""
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    state = optimizer.init(params)
    for g in GRADIENTS if gradients is None else gradients:
        updates, state = update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (got, want)]
    assert structures[0] == structures[1]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * 1e-2)


assert_same = functools.partial(assert_close, rtol=0.0)


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
    "monitor": lambda o: optax.chain(
        o,
        optax.monitor({"size": optax.measure_with_ema(optax.tree.norm, decay=0.9)}),
    ),
    "flatten": optax.flatten,
    "split": optax.contrib.split_real_and_imaginary,
    "reduce_on_plateau": lambda o: optax.chain(
        o, optax.contrib.reduce_on_plateau(0.5, patience=1)
    ),
}


@functools.cache
def adamw_in(wrapper: Wrapper) -> Any:
    return run(wrapper(optax.adamw(0.1, eps=1e-6)), value=1.0)[0]


@FORMS
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_with_lam_zero_it_is_wrapped_adamw(
    wrapper: Wrapper, third_moment: Any, standard_promotion: None
) -> None:
    # Standard promotion for the wrappers and for Optax's AdamW, which do not hold to
    # the strict one.
    optimizer = adam3w(0.1, lam=0.0, eps=1e-6, third_moment=third_moment)
    params, state = run(wrapper(optimizer), value=1.0)
    assert_close(params, adamw_in(wrapper), rtol=2e-4)
    third = optax.tree.get(state, "ScaleByAdam3State").s
    assert all(bool(jnp.all(x != 0)) for x in jax.tree.leaves(third))


@FORMS
def test_chain_clips_before(third_moment: Any) -> None:
    # The third moment is that of the clipped gradients.
    ours = adam3(0.1, lam=0.1, third_moment=third_moment)
    clip = optax.clip_by_global_norm(0.5)
    clipped = [clip.update(g, clip.init(g))[0] for g in GRADIENTS]
    params, (_, state) = run(optax.chain(clip, ours))
    assert_close((params, state), run(ours, clipped))


@FORMS
def test_masked_and_partitioned_leaves_step_as_if_alone(third_moment: Any) -> None:
    # MaskedNode stands where a leaf is someone else's.
    ours = adam3w(0.1, lam=0.1, third_moment=third_moment)
    expected, _ = run(ours, [g["w"] for g in GRADIENTS], PARAMS["w"])
    masked, _ = run(optax.masked(ours, {"w": True, "b": False}))
    np.testing.assert_array_equal(masked["w"], expected)
    untouched = PARAMS["b"] + sum(g["b"] for g in GRADIENTS)
    np.testing.assert_allclose(masked["b"], untouched, rtol=1e-6)
    parts = {"a": ours, "rest": optax.set_to_zero()}
    for labels in ({"w": "a", "b": "rest"}, lambda p: {"w": "a", "b": "rest"}):
        partitioned, _ = run(optax.partition(parts, labels))
        np.testing.assert_array_equal(partitioned["w"], expected)
        np.testing.assert_array_equal(partitioned["b"], PARAMS["b"])


@FORMS
def test_both_parts_of_a_partition_can_be_ours(third_moment: Any) -> None:
    # Two states of one kind, two counts, two settings.
    fast = adam3(0.1, third_moment=third_moment)
    slow = adam3w(0.01, lam=0.3, third_moment=third_moment)
    both = optax.partition({"fast": fast, "slow": slow}, {"w": "fast", "b": "slow"})
    params, _ = run(both)
    for name, optimizer in (("w", fast), ("b", slow)):
        alone, _ = run(optimizer, [g[name] for g in GRADIENTS], PARAMS[name])
        np.testing.assert_array_equal(params[name], alone)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@FORMS
def test_multi_steps_average_gradients(
    third_moment: Any, dtype: Any, standard_promotion: None
) -> None:
    # Standard promotion for MultiSteps, which multiplies by booleans. Its `cond` and
    # the scan need types that do not drift, also in bfloat16.
    ours = adam3w(0.25, third_moment=third_moment)
    multi = optax.MultiSteps(ours, every_k_schedule=2).gradient_transformation()
    params = jnp.array([1.0, -2.0], dtype)
    gradients = jnp.array([[1.0, 3.0], [2.0, -1.0], [0.5, 0.5], [1.5, 2.5]], dtype)

    def step(carry: Any, g: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = multi.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (got, state), _ = jax.lax.scan(step, (params, multi.init(params)), gradients)
    want, inner = run(ours, gradients.reshape(2, 2, 2).mean(axis=1), params)
    assert_close((got, state.inner_opt_state), (want, inner))


@FORMS
def test_apply_if_finite_skips_what_is_not(
    third_moment: Any, standard_promotion: None
) -> None:
    # Standard promotion for apply_if_finite. A NaN must leave no trace in the state.
    ours = adam3w(0.1, third_moment=third_moment)
    broken = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), GRADIENTS[0])
    gradients = [GRADIENTS[0], broken, GRADIENTS[1]]
    params, state = run(optax.apply_if_finite(ours, 5), gradients)
    assert_close((params, state.inner_state), run(ours, GRADIENTS[:2]))
    assert state.total_notfinite == 1


@pytest.mark.parametrize("reset", [False, True])
@FORMS
def test_lookahead_interpolates(
    third_moment: Any, reset: bool, standard_promotion: None
) -> None:
    # Standard promotion for lookahead.
    ours = adam3(0.1, lam=0.1, third_moment=third_moment)
    optimizer = optax.lookahead(
        ours, sync_period=2, slow_step_size=0.5, reset_state=reset
    )
    start = optax.LookaheadParams.init_synced(PARAMS)
    got, state = run(optimizer, GRADIENTS[:2], start)
    fast, inner = run(ours, GRADIENTS[:2])
    middle = jax.tree.map(lambda p, f: p + 0.5 * (f - p), PARAMS, fast)
    assert_close(got, optax.LookaheadParams(fast=middle, slow=middle))
    assert_close(state.fast_state, ours.init(PARAMS) if reset else inner)


def test_snapshot_and_monitor_see_the_updates() -> None:
    snapshot = optax.snapshot("direction", lambda u: u["b"])
    monitor = optax.monitor({"norm": optax.tree.norm})
    optimizer = optax.chain(scale_by_adam3(), snapshot, monitor, optax.scale(-0.1))
    params, state = run(optimizer, GRADIENTS[:1])
    direction = optax.tree.get(state, "direction")
    np.testing.assert_allclose(params["b"], PARAMS["b"] - 0.1 * direction, rtol=1e-6)
    assert optax.tree.get(state, "norm") == pytest.approx(3.0, rel=0.01)  # 9 signs


def test_reduce_on_plateau_takes_the_value(standard_promotion: None) -> None:
    # Standard promotion for reduce_on_plateau. The value reaches it past ours.
    ours = adam3(0.1)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    optimizer = optax.chain(ours, plateau)
    state, plain = optimizer.init(PARAMS), ours.init(PARAMS)
    for g, scale in zip(GRADIENTS, (1.0, 1.0, 0.5, 0.5), strict=True):
        updates, state = optimizer.update(g, state, PARAMS, value=jnp.float32(1.0))
        expected, plain = ours.update(g, plain, PARAMS)
        assert_close(updates, jax.tree.map(lambda u, k=scale: k * u, expected))


@FORMS
def test_flattened_it_is_the_same(third_moment: Any) -> None:
    ours = adam3w(0.1, lam=0.1, third_moment=third_moment)
    assert_same(run(optax.flatten(ours))[0], run(ours)[0])


# Hyperparameters: injected, scheduled, changed on the way.

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


@functools.cache
def injected_step(third_moment: Any) -> tuple[Any, Any]:
    optimizer = optax.inject_hyperparams(adam3w)(
        0.1, b3=0.8, lam=0.1, third_moment=third_moment
    )
    return optimizer, jax.jit(optimizer.update)


@functools.cache
def plain_step(third_moment: Any, **changed: float) -> Any:
    settings: Any = {"learning_rate": 0.1, "b3": 0.8, "lam": 0.1} | changed
    return adam3w(**settings, third_moment=third_moment).update


@pytest.mark.parametrize("name", OTHER)
@FORMS
def test_an_injected_value_that_is_changed_acts(third_moment: Any, name: str) -> None:
    # Two steps, a change through the state, two more: as two optimizers on one state.
    optimizer, update = injected_step(third_moment)
    state = optimizer.init(PARAMS)
    params, expected, unchanged = PARAMS, state.inner_state, state.inner_state
    for i, g in enumerate(GRADIENTS):
        if i == 2:
            state.hyperparams[name] = jnp.float32(OTHER[name])
        updates, state = update(g, state, params)
        changed = {name: OTHER[name]} if i >= 2 else {}
        want, expected = plain_step(third_moment, **changed)(g, expected, params)
        same, unchanged = plain_step(third_moment)(g, unchanged, params)
        assert_close(updates, want, rtol=1e-4)
    assert float(state.hyperparams[name]) == pytest.approx(OTHER[name])
    assert np.max(abs(want["w"] / same["w"] - 1)) > 0.01


def schedule_of(name: str) -> Callable[[Any], Any]:
    """Returns a schedule from .8 of the value to the value in three steps."""
    return lambda count: OTHER[name] * (0.8 + 0.1 * jnp.float32(count))


NATIVE = ("learning_rate", "lam", "tau", "weight_decay")


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "injected") for name in OTHER] + [(name, "native") for name in NATIVE],
)
def test_schedules_get_the_count_before_the_step(name: str, how: str) -> None:
    # As everywhere in Optax: the first step takes schedule(0).
    fixed: Any = {"learning_rate": 0.1, "b3": 0.8, "lam": 0.1}
    factory = optax.inject_hyperparams(adam3w) if how == "injected" else adam3w
    scheduled: Any = fixed | {name: schedule_of(name)}
    optimizer = factory(**scheduled)
    update = jax.jit(optimizer.update)
    state = optimizer.init(PARAMS)
    expected = adam3w(**fixed).init(PARAMS)
    for count, g in enumerate(GRADIENTS[:3]):
        updates, state = update(g, state, PARAMS)
        value = float(schedule_of(name)(count))
        manual = adam3w(**(fixed | {name: value}))
        want, expected = manual.update(g, expected, PARAMS)
        assert_close(updates, want, rtol=1e-4)
        if how == "injected":
            assert float(state.hyperparams[name]) == pytest.approx(value)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(0.1, 3),
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 1, 3),
        optax.piecewise_constant_schedule(0.1, {1: 0.5}),
    ],
)
def test_optax_schedules_fit_everywhere(
    schedule: Any, standard_promotion: None
) -> None:
    # Standard promotion for Optax's schedules.
    def positive(count: Any) -> Any:
        return 0.1 + schedule(count)

    params, _ = run(adam3w(schedule, lam=schedule, tau=positive, weight_decay=schedule))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in params.values())


@FORMS
def test_injected_float32_keeps_bfloat16_exact(third_moment: Any) -> None:
    # With the remedy the updates are those of the plain optimizer, in bfloat16.
    inject = optax.inject_hyperparams(adam3w, hyperparam_dtype=jnp.float32)
    params = jnp.asarray([0.5, -1.25, 3.0], jnp.bfloat16)
    got, state = run(inject(0.1, third_moment=third_moment), [params] * 2, params)
    want, _ = run(adam3w(0.1, third_moment=third_moment), [params] * 2, params)
    assert_close(got, want, rtol=2.0**-7)
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype(jnp.float32)}


# Transformations of JAX.


@FORMS
def test_vmap_over_lam(third_moment: Any) -> None:
    # A sweep in one program.
    def final(lam: Any) -> Any:
        return run(adam3(0.1, lam=lam, third_moment=third_moment))[0]

    lams = [0.0, 0.1, -0.5]
    got = jax.vmap(final)(jnp.array(lams))
    for i, lam in enumerate(lams):
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), final(lam), rtol=1e-4)


@pytest.mark.parametrize("name", ["learning_rate", "lam", "b1", "b3", "weight_decay"])
@FORMS
def test_hypergradients(third_moment: Any, name: str, x64: None) -> None:
    # The derivative of training by a hyperparameter is the difference quotient.
    gradients = [g["b"].astype(jnp.float64) for g in GRADIENTS[:3]]
    params = PARAMS["b"].astype(jnp.float64)

    def loss(value: Any) -> jax.Array:
        settings: Any = {"learning_rate": 0.1, "b2": 0.9, "b3": 0.6, "lam": 0.1}
        optimizer = adam3w(**(settings | {name: value}), third_moment=third_moment)
        final: jax.Array = run(optimizer, gradients, params)[0]
        return jnp.sum(jnp.sin(final))

    at, h = {"b1": 0.5, "b3": 0.6}.get(name, 0.2), 1e-5
    quotient = (loss(at + h) - loss(at - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float64(at)), quotient, rtol=1e-5)


@FORMS
def test_checkpointed_steps_have_the_same_derivative(third_moment: Any) -> None:
    optimizer = adam3w(0.1, eps_root=1e-8, third_moment=third_moment)

    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jnp.sin(params), state, params)
        return optax.apply_updates(params, updates), state

    def loss(params: Any, step: Any) -> jax.Array:
        return jnp.sum(step(*step(params, optimizer.init(params)))[0] ** 2)

    derivative = jax.jit(jax.grad(loss), static_argnums=1)
    params = PARAMS["b"]
    np.testing.assert_allclose(
        derivative(params, jax.checkpoint(step)), derivative(params, step), rtol=1e-6
    )


@FORMS
def test_automatic_sharding_by_map_params(third_moment: Any) -> None:
    # With automatic axes, jit(init) needs to be told where the state lies.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(3)}
    where = {"w": NamedSharding(mesh, P("x")), "b": NamedSharding(mesh, P())}
    optimizer = adam3w(third_moment=third_moment)
    shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        where,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    params = jax.device_put(params, where)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    _, state = jax.jit(optimizer.update)(params, state, params)
    for name in "mvs":
        for key, x in optax.tree.get(state, name).items():
            assert x.sharding.is_equivalent_to(where[key], x.ndim)


# Flax. `nnx.Optimizer` is in `test_pitfalls.py`.


@FORMS
def test_linen_train_state(third_moment: Any) -> None:
    model = flax.linen.Dense(2)
    x = normal(4, 3, seed=5)
    params = model.init(jax.random.key(0), x)
    optimizer = adam3w(0.1, third_moment=third_moment)

    def gradients(params: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.asarray(model.apply(p, x)) ** 2))(params)

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    step = jax.jit(lambda s: s.apply_gradients(grads=gradients(s.params)))
    opt_state = optimizer.init(params)
    for _ in range(3):
        state = step(state)
        updates, opt_state = optimizer.update(gradients(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(state.params, params)
    assert state.step == optax.tree.get(state.opt_state, "count") == 3


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


@pytest.mark.parametrize("store", [by_bytes, by_state_dict, by_orbax])
@pytest.mark.parametrize("wrap", ["plain", "injected", "masked"])
@FORMS
def test_a_restored_run_is_the_straight_run(
    third_moment: Any, wrap: str, store: Any, tmp_path: Path
) -> None:
    # Bit for bit: nothing is kept outside the state, nothing loses its type on disk.
    def fresh() -> Any:
        if wrap == "injected":
            return optax.inject_hyperparams(adam3w)(0.1, third_moment=third_moment)
        ours = adam3w(0.1, third_moment=third_moment)
        return optax.masked(ours, {"w": True, "b": False}) if wrap == "masked" else ours

    optimizer, again = fresh(), fresh()
    update, resume = jax.jit(optimizer.update), jax.jit(again.update)
    state = optimizer.init(PARAMS)
    for g in GRADIENTS[:2]:
        _, state = update(g, state, PARAMS)
    restored = store(state, again.init(PARAMS), tmp_path)
    for g in GRADIENTS[2:]:
        straight, state = update(g, state, PARAMS)
        resumed, restored = resume(g, restored, PARAMS)
        assert_same((resumed, restored), (straight, state))


@FORMS
def test_orbax_restores_shardings(third_moment: Any, tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    params = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("x")))
    optimizer = adam3(third_moment=third_moment)
    with jax.set_mesh(mesh):
        _, state = optimizer.update(params, optimizer.init(params))
        restored = by_orbax(state, optimizer.init(params), tmp_path)
        assert_same(restored, state)
        assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, state)


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
@pytest.mark.parametrize("factory", [scale_by_adam3, adam3, adam3w])
@FORMS
def test_equinox_modules(factory: Any, third_moment: Any, keep: Any) -> None:
    # filter_grad gives None for integer arrays, which is_array counts as parameters.
    optimizer = factory(third_moment=third_moment)
    model = Module(normal(3, seed=6), jnp.array([2, 0, 1]), jnp.sin, 3)
    x = normal(3, seed=7)
    state = optimizer.init(eqx.filter(model, keep))
    weight, table, plain = model.weight, model.table, optimizer.init(model.weight)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        gradients = eqx.filter_grad(lambda m: m(x))(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, keep))
        return eqx.apply_updates(model, updates), state

    for _ in range(3):
        model, state = step(model, state)
        g = jax.grad(lambda w: jnp.sum(jnp.sin(w * x[table])))(weight)
        updates, plain = optimizer.update(g, plain, weight)
        weight = optax.apply_updates(weight, updates)
    np.testing.assert_allclose(model.weight, weight, rtol=1e-5)
    np.testing.assert_array_equal(model.table, table)
    assert model.width == 3


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
@FORMS
def test_parameters_in_dataclasses(third_moment: Any, container: Any) -> None:
    # State and updates come in the container of the parameters.
    optimizer = adam3w(0.1, third_moment=third_moment)
    expected, _ = run(optimizer)
    gradients = [container(**g) for g in GRADIENTS]
    params, state = run(optimizer, gradients, container(**PARAMS))
    assert isinstance(params, container)
    assert isinstance(optax.tree.get(state, "ScaleByAdam3State").s, container)
    np.testing.assert_array_equal(params.w, expected["w"])
    np.testing.assert_array_equal(params.b, expected["b"])
