"""`bfloat16_state`: the averages of any optimizer in bfloat16."""

import dataclasses
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib
from sklearn.datasets import load_digits

from adam3_optax import (
    _xla,
    adam3w,
    bfloat16_parameters,
    bfloat16_state,
    state_shardings,
)
from tests.settings import mesh_of, on

# Optax's optimizers lean on implicit promotion.
pytestmark = pytest.mark.usefixtures("standard_promotion")
RATE = 3e-3
# Each optimizer, and the fields that become narrow. One that has none is refused.
OPTIMIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "adam": (lambda: optax.adam(RATE), "mu nu"),
    "adamw": (lambda: optax.adamw(RATE), "mu nu"),
    "adamax": (lambda: optax.adamax(RATE), "mu nu"),
    "amsgrad": (lambda: optax.amsgrad(RATE), "mu nu nu_max"),
    "nadamw": (lambda: optax.nadamw(RATE), "mu nu"),
    "radam": (lambda: optax.radam(RATE), "mu nu"),
    "adabelief": (lambda: optax.adabelief(RATE), "mu nu"),
    "yogi": (lambda: optax.yogi(RATE), "mu nu"),
    "adan": (lambda: optax.adan(RATE), "m v n"),
    "novograd": (lambda: optax.novograd(RATE), "mu"),
    "lamb": (lambda: optax.lamb(RATE), "mu nu"),
    "lion": (lambda: optax.lion(1e-3), "mu"),
    "rmsprop": (lambda: optax.rmsprop(RATE, momentum=0.9), "nu trace"),
    "centered rmsprop": (
        lambda: optax.rmsprop(RATE, centered=True, momentum=0.9),
        "trace",
    ),
    "adagrad": (lambda: optax.adagrad(0.1), "sum_of_squares"),
    "adadelta": (lambda: optax.adadelta(1.0), "e_g e_x"),
    "adafactor": (
        lambda: optax.adafactor(RATE, min_dim_size_to_factor=8, momentum=0.9),
        "v_row v_col v ema",
    ),
    "sm3": (lambda: optax.sm3(0.1), "nu"),
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9), "trace"),
    "lars": (lambda: optax.lars(0.1), "trace"),
    "optimistic adam": (lambda: optax.optimistic_adam_v2(RATE), "mu nu"),
    "muon": (lambda: contrib.muon(0.02), "mu nu"),
    "ademamix": (lambda: contrib.ademamix(RATE), "m1 m2 nu"),
    "simplified ademamix": (lambda: contrib.simplified_ademamix(1e-4), "m n"),
    "prodigy": (lambda: contrib.prodigy(), "exp_avg exp_avg_sq"),
    "dadapt": (lambda: contrib.dadapt_adamw(), "exp_avg exp_avg_sq"),
    "schedule-free": (lambda: contrib.schedule_free_adamw(RATE), "nu"),
    "madgrad": (lambda: contrib.madgrad(RATE), "s grad_sum_sq"),
    "galore": (lambda: contrib.galore(RATE, rank=4), "mu nu"),
    "sophia": (lambda: contrib.sophia(RATE), "mu nu"),
    "momo": (lambda: contrib.momo(0.1), "exp_avg"),
    "momo adam": (lambda: contrib.momo_adam(RATE), "exp_avg exp_avg_sq"),
    "acprop": (lambda: contrib.acprop(RATE), "mu nu"),
    "mechanize": (lambda: contrib.mechanize(optax.adam(RATE)), "mu nu"),
    "adam3w": (lambda: adam3w(RATE, third_moment=None), ""),
    "rprop": (lambda: optax.rprop(RATE), ""),
    "cocob": (lambda: contrib.cocob(), ""),
    "dog": (lambda: contrib.dog(1.0), ""),
    "dowg": (lambda: contrib.dowg(1.0), ""),
    "polyak": (lambda: optax.polyak_sgd(), ""),
    "sgd without momentum": (lambda: optax.sgd(0.1), ""),
    "centered rmsprop without momentum": (
        lambda: optax.rmsprop(RATE, centered=True),
        "",
    ),
    "two wrappers": (lambda: bfloat16_state(optax.adam(RATE)), ""),
}
for later in ("madgrad", "galore"):  # than the oldest Optax that is supported
    if not hasattr(contrib, later):
        del OPTIMIZERS[later]
AVERAGING = [name for name, (_, fields) in OPTIMIZERS.items() if fields]
OTHERS = [name for name, (_, fields) in OPTIMIZERS.items() if not fields]


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"w": normal(0, 8, 16), "b": normal(1, 16), "scalar": jnp.float32(0.5)}
MATRICES = {"w": PARAMS["w"], "b": PARAMS["b"]}
NARROW = optax.tree.cast(PARAMS, jnp.bfloat16)


def narrow_fields(state: Any) -> set[str]:
    """Returns the fields of a state that hold a leaf of bfloat16."""
    return {
        [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)][-1]
        for path, x in jax.tree.leaves_with_path(state)
        if x.dtype == jnp.bfloat16
    }


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def loss_of(params: Any) -> Any:
    return sum(jnp.sum((x - 0.1) ** 2) for x in jax.tree.leaves(params))


def run(optimizer: Any, params: Any, steps: int) -> Any:
    """Returns parameters and state after some steps on `loss_of`."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, gradients = jax.value_and_grad(loss_of)(params)
        extra = {"value": value, "obj_fn": loss_of}
        updates, state = optimizer.update(gradients, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0]


def both(make: Callable[[Any], Any], params: Any, steps: int) -> Any:
    """Returns `run` of an optimizer in float32, and with `bfloat16_state`."""
    optimizers = make(lambda inner: inner), make(bfloat16_state)
    return jax.jit(lambda p: [run(x, p, steps) for x in optimizers])(params)


# Which leaves.


@pytest.mark.parametrize("name", AVERAGING)
def test_what_becomes_narrow(name: str) -> None:
    make, fields = OPTIMIZERS[name]
    one, other = both(lambda wrap: wrap(make()), MATRICES, 1)
    (params, exact), (narrow_params, state) = one, other
    assert narrow_fields(state) == set(fields.split())
    saved = sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16)
    assert nbytes(state) == nbytes(exact) - 2 * saved + 4  # the count
    # A first step sees averages that are 0, or what init made, rounded.
    for one, other in zip(*map(jax.tree.leaves, (params, narrow_params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", AVERAGING)
def test_narrow_parameters_change_no_dtype(name: str) -> None:
    make, fields = OPTIMIZERS[name]
    params = {"w": NARROW["w"], "b": NARROW["b"]}
    # `lax.scan`, in `run`, asks that a step keeps all dtypes.
    found, state = jax.eval_shape(lambda: run(bfloat16_state(make()), params, 2))
    assert narrow_fields(state) == set(fields.split())
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ["lion", "sgd"])  # Adam fails in Optax alone
def test_strict_promotion(name: str) -> None:
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda: run(bfloat16_state(OPTIMIZERS[name][0]()), NARROW, 2))


@pytest.mark.parametrize("params", [MATRICES, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_without_averages_is_refused(name: str, params: Any) -> None:
    with pytest.raises(ValueError, match=r"inner has no averages.*`where`"):
        bfloat16_state(OPTIMIZERS[name][0]()).init(params)


def test_averages_are_found_whatever_else_there_is() -> None:
    mixed = {"w": NARROW["w"], "b": PARAMS["b"]}
    masked = optax.masked(optax.adam(RATE), {"w": True, "b": False})
    groups = {"one": optax.lion(RATE), "other": optax.sgd(RATE)}
    partition = optax.partition(groups, {"w": "one", "b": "other"})
    for inner in (masked, partition):
        state = bfloat16_state(inner).init(mixed)
        assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))
    # Nothing to be narrow is no fault: a group may be empty, or of scalars.
    bfloat16_state(optax.adam(RATE)).init({"a": optax.MaskedNode(), "b": 0.5})


def test_what_inner_makes_narrow_itself_passes() -> None:
    optimizer = bfloat16_state(optax.trace(0.9, accumulator_dtype="bfloat16"))
    gradient = normal(0, 4096)
    _, state = optimizer.update(gradient, optimizer.init(gradient))
    nearest = gradient.astype(jnp.bfloat16)
    np.testing.assert_array_equal(state.inner_state.trace, nearest)


class Fields(NamedTuple):
    m: Any
    trace: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    v: Any
    mu: Any


@pytest.mark.parametrize(
    "params",
    [
        Fields(normal(0, 4, 8), normal(1, 8)),
        {"mu": Module(normal(0, 4, 8), Fields(normal(1, 8), normal(2, 3)))},
        (normal(0, 4, 8), normal(1, 8)),
        [Module(normal(0, 4, 8), normal(1, 8))],
        normal(0, 4, 8),
    ],
    ids=["NamedTuple", "nested", "tuple", "list", "array"],
)
@pytest.mark.parametrize(
    ("name", "each"), [("schedule-free", 1), ("prodigy", 2), ("sm3", 1)]
)
def test_fields_of_the_parameters_are_none_of_the_state(
    name: str, each: int, params: Any
) -> None:
    state = bfloat16_state(OPTIMIZERS[name][0]()).init(params)
    count = sum(x.size for x in jax.tree.leaves(params))
    narrow = sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16)
    assert narrow == each * count


@pytest.mark.parametrize(
    ("where", "narrow"),
    [
        (
            lambda path, leaf: jax.tree_util.keystr(path).startswith("[0].mu"),
            {"[0].mu.mu", "[0].mu.v"},
        ),
        (lambda path, leaf: leaf.size > 16, {"[0].mu.v", "[0].nu.v"}),
        (lambda path, leaf: leaf.dtype != jnp.bfloat16, None),
    ],
    ids=["path", "size", "dtype"],
)
def test_a_choice_of_ones_own(where: Any, narrow: Any) -> None:
    params = Module(PARAMS["w"], PARAMS["b"])
    optimizer = bfloat16_state(optax.adamw(RATE), where)
    state = optimizer.init(params)
    for _ in range(2):
        found = {
            jax.tree_util.keystr(path)
            for path, x in jax.tree.leaves_with_path(state.inner_state)
            if x.dtype == jnp.bfloat16
        }
        assert found == narrow if narrow else len(found) == 4
        _, state = optimizer.update(params, state, params)
    # A field that is not known is rounded, too.
    optimizer = bfloat16_state(optax.adan(RATE), lambda path, leaf: "g" in str(path[1]))
    state = optimizer.init(normal(0, 4096))
    _, state = optimizer.update(normal(0, 4096), state, normal(0, 4096))
    assert narrow_fields(state) == {"g"}
    nearest = state.inner_state[0].g == normal(0, 4096).astype(jnp.bfloat16)
    assert 0.3 < nearest.mean() < 0.9


def test_float64_passes(x64: None) -> None:
    params = {"w": jnp.ones((4, 8), "float32"), "wide": jnp.ones(8)}
    (_, exact), (_, state) = both(lambda wrap: wrap(optax.adam(RATE)), params, 2)
    assert state.inner_state[0].mu["w"].dtype == jnp.bfloat16
    wide, expected = state.inner_state[0].mu["wide"], exact[0].mu["wide"]
    np.testing.assert_array_equal(wide, expected)
    bfloat16_state(optax.adam(RATE)).init({"wide": params["wide"]})  # is not refused


def test_what_is_no_array_of_the_parameters_passes() -> None:
    # Keys of random numbers, masks that end above the leaves, gradients of None.
    tree = {"first": {"w": PARAMS["w"]}, "second": {"w": PARAMS["w"]}}
    masked = optax.masked(optax.trace(0.9), {"first": True, "second": False})
    inner = optax.chain(optax.add_noise(0.1, 0.1, 0), masked, optax.trace(0.9))
    optimizer = bfloat16_state(inner)
    _, state = optimizer.update(tree, optimizer.init(tree), tree)
    narrow = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert len(narrow) == 3
    single = bfloat16_state(optax.trace(0.9))
    some = {"w": None, "b": PARAMS["b"]}
    _, state = single.update(some, single.init(MATRICES), MATRICES)
    assert state.inner_state.trace["w"] is None
    np.testing.assert_allclose(state.inner_state.trace["b"], PARAMS["b"], rtol=0.01)


# Rounding.


def averages(steps: int, dtype: str = "float32", decay: float = 0.998) -> Any:
    """Returns the average of gradients of 1 at each step, of 4,096 elements."""
    gradients = jnp.ones(4096, dtype)
    narrow = optax.scale_by_adam(b1=decay, mu_dtype=jnp.bfloat16)
    ours = bfloat16_state(optax.scale_by_adam(b1=decay))

    def curve(optimizer: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            state = optimizer.update(gradients, state)[1]
            mu = optax.tree.get(state, "mu").astype(jnp.float32)
            return state, (mu.mean(), mu.std())

        return jax.lax.scan(step, optimizer.init(gradients), length=steps)[1]

    exact = 1 - decay ** np.arange(1, steps + 1)
    return {"exact": exact, "mu_dtype": curve(narrow), "bfloat16_state": curve(ours)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_average_does_not_freeze(dtype: str) -> None:
    found = averages(1000, dtype)
    exact, spread = found["exact"], found["bfloat16_state"][1]
    assert found["mu_dtype"][0][-1] < 0.6 * exact[-1]  # it froze
    error = abs(found["bfloat16_state"][0] - exact)
    assert np.all(error < 5 * np.maximum(spread, 1e-3) / 64)


def test_to_nearest_an_average_stops_short() -> None:
    decays = jnp.array([0.9, 0.99, 0.997, 0.999])

    def step(target: Any, average: Any, _: Any) -> Any:
        new = decays * average.astype(jnp.float32) + (1 - decays) * target
        return new.astype(jnp.bfloat16), None

    for start, ends in ((0, [0.98, 0.80, 0.5, 0.25]), (1, [0, 0, 0.65, 1])):
        average = jnp.full(4, start, jnp.bfloat16)
        end, _ = jax.lax.scan(partial(step, 1 - start), average, length=20_000)
        # The numbers are those of `docs/low_precision.md`.
        np.testing.assert_allclose(end.astype(float), ends, atol=0.006)


def test_each_average_has_bits_of_its_own() -> None:
    # Equal numbers in two leaves, two fields and two groups.
    same = {"a": jnp.full(4096, 0.3), "b": jnp.full(4096, 0.3)}
    inner = optax.chain(optax.trace(0.0), optax.scale_by_lion(b2=0.3))
    groups = {name: bfloat16_state(inner) for name in same}
    optimizer = optax.partition(groups, {name: name for name in same})
    _, state = optimizer.update(same, optimizer.init(same), same)
    leaves = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    rounded = [np.asarray(x, np.float32) for x in leaves]
    ups = [x > x.mean() for x in rounded if x.std()]
    assert len(ups) >= 4
    for i, up in enumerate(ups):
        for other in ups[:i]:
            assert abs(np.corrcoef(up, other)[0, 1]) < 0.1


def test_what_is_not_finite_stays() -> None:
    optimizer = bfloat16_state(optax.adam(RATE))
    gradient = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0])
    _, state = optimizer.update(gradient, optimizer.init(gradient))
    finite = np.isfinite(np.asarray(state.inner_state[0].mu, np.float32))
    np.testing.assert_array_equal(finite, [False, False, False, True])


def test_what_makes_a_tpu_write_all_at_once_changes_no_update() -> None:
    average = optax.TraceState(jnp.array([jnp.nan, jnp.inf, -1, 0], jnp.bfloat16))
    waited = _xla.after(jnp.arange(4.0), average)
    np.testing.assert_array_equal(waited, jnp.arange(4.0))


def test_half_precision_is_widened_before_it_is_squared() -> None:
    optimizer = bfloat16_state(optax.adam(RATE))
    for dtype in (jnp.float16, jnp.bfloat16):  # 1e-8 is 0 in the first
        gradient = jnp.full(8, 1e-4, dtype)
        for params in (None, gradient, gradient.astype(jnp.float32)):
            updates, _ = optimizer.update(gradient, optimizer.init(gradient), params)
            assert updates.dtype == dtype
            np.testing.assert_allclose(updates.astype(float), -RATE, rtol=0.01)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_root_of_a_difference_of_averages_exists(corrected: bool) -> None:
    inner = optax.scale_by_stddev(bias_correction=corrected)
    inner = optax.chain(inner, optax.trace(0.9))
    gradients = 1 + 0.1 * normal(0, 100, 4096)

    def finite(optimizer: Any) -> Any:
        def step(state: Any, gradient: Any) -> Any:
            updates, state = optimizer.update(gradient, state)
            return state, jnp.isfinite(updates)

        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]

    # Corrected, Optax alone takes the root of a negative rounding error at step 1.
    np.testing.assert_array_equal(finite(bfloat16_state(inner)), finite(inner))


@pytest.mark.slow
def test_where_right_on_average_does_not_help() -> None:
    def last(optimizer: Any, gradient: Any, steps: int) -> Any:
        """Returns parameters, state and updates after some steps."""

        def step(carry: Any, key: Any) -> Any:
            params, state, _ = carry
            updates, state = optimizer.update(gradient(params, key), state, params)
            return (optax.apply_updates(params, updates), state, updates), None

        params = jnp.ones(4096)
        carry = params, optimizer.init(params), params
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps))[0]

    # The numbers are those of `docs/low_precision.md`.
    amsgrad = bfloat16_state(optax.amsgrad(0.0))
    _, state, _ = last(amsgrad, lambda x, key: jnp.ones_like(x), 10_000)
    largest = optax.tree.get(state, "nu_max").astype(float).mean()
    assert largest == pytest.approx(1.05, abs=0.01)

    def noise(mean: float, scatter: float, x: Any, key: Any) -> Any:
        return mean * (1 + scatter * jax.random.normal(key, x.shape))

    belief = optax.scale_by_belief(b2=0.99)
    for mean, scatter, expected in ((1, 0.01, 0.92), (1.003, 0.001, 0.27)):
        noisy = partial(noise, mean, scatter)
        exact, all_narrow, nu_narrow = (
            jnp.abs(last(optimizer, noisy, 3000)[2]).mean()
            for optimizer in (
                belief,
                bfloat16_state(belief),
                bfloat16_state(belief, lambda path, _: path[0].name == "nu"),
            )
        )
        assert all_narrow / exact == pytest.approx(expected, abs=0.03)
        assert nu_narrow / exact == pytest.approx(1, abs=0.01)

    if hasattr(contrib, "madgrad"):
        madgrad = bfloat16_state(contrib.madgrad(0.01))
        params, _, _ = last(madgrad, lambda x, key: x - 3, 2000)
        assert params.std() / 2 == pytest.approx(0.002, abs=0.0005)


def test_integers_pass() -> None:
    optimizer = bfloat16_state(optax.sgd(0.1, momentum=0.9))
    gradient = jnp.arange(4)
    updates, _ = optimizer.update(gradient, optimizer.init(normal(0, 4)))
    np.testing.assert_allclose(updates, -0.1 * gradient, rtol=1e-6)
    # So does a count that is at its maximum.
    full = optimizer.init(normal(0, 4))._replace(steps=jnp.int32(2**31 - 1))
    assert optimizer.update(normal(0, 4), full)[1].steps == 2**31 - 1


def test_derivatives_are_those_without_rounding() -> None:
    def second_update(optimizer: Any, first: Any) -> Any:
        _, state = optimizer.update(first, optimizer.init(first))
        return optimizer.update(2 * first, state)[0].sum()

    g = normal(0, 4, 16)
    inner = optax.trace(0.9)
    found = jax.grad(partial(second_update, bfloat16_state(inner)))(g)
    np.testing.assert_allclose(found, jax.grad(partial(second_update, inner))(g), 0.01)


# In company.

LABELS = {"w": "matrix", "b": "vector", "scalar": "vector"}
MASK = {"w": True, "b": False, "scalar": False}
SETTINGS: dict[str, Callable[[Any], Any]] = {
    "in a chain": lambda f: optax.chain(optax.clip(1.0), f(optax.adamw(RATE))),
    "around a chain": lambda f: f(optax.chain(optax.clip(1.0), optax.adamw(RATE))),
    "in a mask": lambda f: optax.masked(f(optax.adam(RATE)), MASK),
    "around a mask": lambda f: f(optax.masked(optax.adam(RATE), MASK)),
    "in groups": lambda f: optax.partition(
        {"matrix": f(optax.lion(RATE)), "vector": optax.sgd(RATE)}, LABELS
    ),
    "around groups": lambda f: f(
        optax.partition({"matrix": optax.lion(RATE), "vector": optax.sgd(RATE)}, LABELS)
    ),
    "in several steps": lambda f: optax.MultiSteps(f(optax.adam(RATE)), 2),
    "around several steps": lambda f: f(
        optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation()
    ),
    "in injected hyperparameters": lambda f: optax.inject_hyperparams(
        lambda learning_rate: f(optax.adam(learning_rate))
    )(RATE),
    "around injected hyperparameters": lambda f: f(
        optax.inject_hyperparams(optax.adam)(RATE)
    ),
    "in apply_if_finite": lambda f: optax.apply_if_finite(f(optax.adam(RATE)), 3),
    "around apply_if_finite": lambda f: f(optax.apply_if_finite(optax.adam(RATE), 3)),
    "in bfloat16_parameters": lambda f: bfloat16_parameters(f(optax.adam(RATE))),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_in_company(name: str) -> None:
    make = SETTINGS[name]
    (exact, _), (params, state) = both(make, PARAMS, 4)
    assert narrow_fields(state)
    for one, other in zip(*map(jax.tree.leaves, (exact, params)), strict=True):
        np.testing.assert_allclose(one, other, atol=0.05 * RATE)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_company_with_narrow_parameters(name: str) -> None:
    optimizer = SETTINGS[name](bfloat16_state)
    params, state = jax.eval_shape(lambda: run(optimizer, NARROW, 3))
    assert narrow_fields(state)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("outer", [optax.flatten, lambda f: optax.lookahead(f, 5, 0.5)])
def test_what_belongs_around(outer: Any) -> None:
    params: Any = MATRICES
    if outer is not optax.flatten:
        params = optax.LookaheadParams.init_synced(MATRICES)
    state = outer(bfloat16_state(optax.adam(RATE))).init(params)
    assert narrow_fields(state) == {"mu", "nu"}
    with pytest.raises(ValueError, match=r"inside of optax\.flatten and lookahead"):
        bfloat16_state(outer(optax.adam(RATE))).init(params)


def test_narrow_parameters_belong_around() -> None:
    wrong = bfloat16_state(bfloat16_parameters(optax.adam(RATE)))
    with pytest.raises(ValueError, match="put bfloat16_parameters around"):
        wrong.init(NARROW)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.usefixtures("on_cpu")
def test_shards_agree_and_send_nothing(kind: AxisType) -> None:
    mesh = mesh_of(kind)
    where = on(mesh, {"w": P("data", "model"), "b": P("data")})
    params = {"w": normal(0, 16, 32), "b": normal(1, 16)}
    optimizer = bfloat16_state(optax.adamw(RATE))

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, gradients: Any) -> Any:
        return optimizer.update(gradients, state, gradients)[1]

    results = []
    for places in (None, where):
        with jax.set_mesh(mesh) if places else nullcontext():
            gradients = jax.device_put(params, places)
            placed = state_shardings(optimizer, params, places) if places else None
            state = jax.jit(optimizer.init, out_shardings=placed)(gradients)
            program = step.lower(state, gradients).compile().as_text() or ""
            for _ in range(3):
                state = step(state, gradients)
            results.append(jax.device_get(state))
    assert not any(x in program for x in ("all-reduce", "all-gather", "permute"))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_under_transformations_of_jax() -> None:
    optimizer = bfloat16_state(optax.lion(RATE))
    scanned = partial(run, optimizer, steps=4)
    params, state = MATRICES, optimizer.init(MATRICES)
    for _ in range(4):
        updates, state = optimizer.update(jax.grad(loss_of)(params), state, params)
        params = optax.apply_updates(params, updates)
    straight = params, state
    members = jax.tree.map(lambda x: jnp.stack([x, x]), MATRICES)
    exported = jax.export.export(jax.jit(scanned))(MATRICES)
    results = [
        jax.jit(scanned)(MATRICES),
        exported.call(MATRICES),
        jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(scanned))(members)),
    ]
    for result in results:
        leaves = zip(*map(jax.tree.leaves, (straight, result)), strict=True)
        for pair in leaves:  # XLA may fuse a product and a sum in one of them alone
            one, other = (np.asarray(x, np.float32) for x in pair)
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_boxes_stay() -> None:
    params: Any = {"w": nn.Partitioned(normal(0, 8, 16), ("rows", None))}
    optimizer = bfloat16_state(optax.adam(RATE))
    updates, state = optimizer.update(params, optimizer.init(params), params)
    box = state.inner_state[0].mu["w"]
    assert isinstance(box, nn.Partitioned)
    assert box.value.dtype == jnp.bfloat16
    assert updates["w"].names == ("rows", None)


def test_nnx_trains_with_it() -> None:
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, bfloat16_state(optax.adam(RATE)), wrt=nnx.Param)
    before = model.kernel[...]
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((2, 8))).sum())(model))
    dtypes = [x.dtype for x in jax.tree.leaves(optimizer.opt_state)]
    assert dtypes.count(jnp.bfloat16) == 4
    np.testing.assert_allclose(before - model.kernel[...], 2 * RATE, rtol=0.01)


# The way in and out, and states that do not fit.


def test_the_way_in_and_out() -> None:
    inner = optax.contrib.muon(0.02)
    optimizer = bfloat16_state(inner)
    params, running = run(inner, MATRICES, 5)
    new = optimizer.init(params)
    into = optax.tree.cast_like(running, new.inner_state)
    state = new._replace(inner_state=into)
    out = optax.tree.cast_like(state.inner_state, inner.init(params))
    for one, other in zip(*map(jax.tree.leaves, (running, out)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2**-8)
    _, state = optimizer.update(params, state, params)
    _, out = inner.update(params, out, params)
    assert int(state.steps) == 1
    assert narrow_fields(state) == {"mu", "nu"}
    assert not narrow_fields(out)
    # Outside of `lax.scan` the first step rounds a state of float32.
    _, state = optimizer.update(params, new._replace(inner_state=running), params)
    assert narrow_fields(state) == {"mu", "nu"}


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    optimizer = bfloat16_state(optax.adam(RATE))
    straight = state = optimizer.init(MATRICES)
    for i in range(4):
        _, straight = optimizer.update(MATRICES, straight)
        _, state = optimizer.update(MATRICES, state)
        if i == 1:
            with ocp.StandardCheckpointer() as orbax:
                orbax.save(tmp_path / "of", state)
                orbax.wait_until_finished()
                state = orbax.restore(tmp_path / "of", state)
            state = pickle.loads(pickle.dumps(jax.device_get(state)))
    for one, other in zip(*map(jax.tree.leaves, (straight, state)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_states_that_do_not_fit() -> None:
    optimizer = bfloat16_state(optax.adam(RATE))
    state = optimizer.init(MATRICES)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    bad: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "restore it in its dtypes", optax.tree.cast(state, jnp.float32)),
        (ValueError, "restore it in its dtypes", optax.tree.cast(state, jnp.bfloat16)),
        (ValueError, "inside jax.vmap", stacked),
        (TypeError, "must be a BFloat16State", state.inner_state),
        (TypeError, "must be a BFloat16State", {"steps": 1}),
    ]
    for kind, message, wrong in bad:
        with pytest.raises(kind, match=message):
            optimizer.update(MATRICES, wrong, MATRICES)
    with pytest.raises(TypeError, match="inner must be an optimizer"):
        bfloat16_state(optax.adam)
    with pytest.raises(TypeError, match="where must be a function of path and leaf"):
        bfloat16_state(optax.adam(RATE), ())  # type: ignore[arg-type]


# Accuracy.


def losses(optimizer: Any, steps: int = 300) -> Any:
    """Returns the loss of a small network on the digits, for 3 seeds."""
    digits = load_digits()
    inputs = jnp.asarray(digits.data / 16 - 0.3, jnp.float32)
    labels = jnp.asarray(digits.target)
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_of(params: Any, x: Any, y: Any) -> Any:
        logits = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return each.mean()

    def train(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), 3)
        params = {
            "w1": jax.random.normal(keys[0], (64, 32)) / 8,
            "b1": jnp.zeros(32),
            "w2": jax.random.normal(keys[1], (32, 10)) / 6,
            "b2": jnp.zeros(10),
        }

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            loss = partial(loss_of, x=inputs[batch], y=labels[batch])
            value, gradients = jax.value_and_grad(loss)(params)
            extra = {"value": value, "obj_fn": loss}
            updates, state = optimizer.update(gradients, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        batches = jax.random.randint(keys[2], (steps, 64), 0, len(labels))
        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, carry, batches)
        return loss_of(params, inputs, labels)

    return np.asarray(jax.jit(jax.vmap(train))(jnp.arange(3)))


# The table and the figure of the page on low precision.
PAGE = Path(__file__).parent.parent / "docs" / "low_precision.md"
FIGURE = PAGE.parent / "images" / "averages.png"


def rows_of_page() -> dict[str, list[str]]:
    """Returns the cells of the page's table of optimizers, by the optimizer's name."""
    text = PAGE.read_text()
    table = text[text.index("| optimizer | narrow |") :].split("\n\n")[0]
    cells = [row.strip("|").split("|") for row in table.splitlines()[2:]]
    return {name.strip(): [x.strip() for x in rest] for name, *rest in cells}


def row_of(name: str, *found: Any) -> list[str]:
    """Returns the cells of an optimizer, but for its name."""
    make, fields = OPTIMIZERS[name]
    shapes = {"w1": (64, 32), "b1": (32,), "w2": (32, 10), "b2": (10,)}
    params = {k: jax.ShapeDtypeStruct(x, jnp.float32) for k, x in shapes.items()}
    count = sum(x.size for x in jax.tree.leaves(params))
    cells = [", ".join(f"`{x}`" for x in fields.split())]
    for optimizer in (make(), bfloat16_state(make())):
        leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        kept = sum(x.size * x.dtype.itemsize for x in leaves if x.ndim)
        cells.append(f"{kept / count:.1f}")
    return cells + [format(x, ".4f" if i == 0 else "+.4f") for i, x in enumerate(found)]


def test_the_page_lists_what_becomes_narrow() -> None:
    page = rows_of_page()
    for name in AVERAGING:
        assert page.pop(name)[:3] == row_of(name)
    assert page.keys() <= {"madgrad", "galore"}


# Two estimate their step size: small differences grow, so there is nothing to compare.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*AVERAGING} - {"prodigy", "dadapt"}))
def test_the_losses_are_those_of_float32(name: str) -> None:
    make = OPTIMIZERS[name][0]
    exact, narrow = losses(make()), losses(bfloat16_state(make()))
    difference = float((narrow - exact).mean())
    assert abs(difference) < 0.002
    # Machines round otherwise, and training carries that on.
    on_page = [float(x) for x in rows_of_page()[name][3:]]
    assert [exact.mean(), difference] == pytest.approx(on_page, abs=0.01)


@pytest.mark.slow
def test_an_average_that_starts_at_0_would_be_of_another_optimizer() -> None:
    inner = optax.scale_by_yogi(initial_accumulator_value=0.0)
    found = losses(optax.chain(inner, optax.scale_by_learning_rate(RATE))).mean()
    assert found == pytest.approx(0.153, abs=0.003)  # as `docs/low_precision.md` says


def draw() -> None:
    """Draws the average that freezes, and prints the table."""
    import matplotlib.pyplot as plt

    found = averages(1000)
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(found["exact"], color="0.6", lw=5, label="exact")
    axes.plot(found["bfloat16_state"][0], "C0", label="bfloat16_state")
    axes.plot(found["mu_dtype"][0], "C1--", label="mu_dtype=bfloat16")
    axes.set(xlabel="step", ylabel="average", title="b1 = 0.998, all gradients 1")
    axes.legend(frameon=False)
    figure.savefig(FIGURE, dpi=150)
    for name in AVERAGING:
        make = OPTIMIZERS[name][0]
        exact, narrow = losses(make()), losses(bfloat16_state(make()))
        row = row_of(name, exact.mean(), (narrow - exact).mean())
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    draw()
