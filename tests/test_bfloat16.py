"""bfloat16 parameters and their remainders: every promise of `bfloat16_parameters`."""

from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import (
    adam3w,
    bfloat16_parameters,
    state_shardings,
    to_bfloat16_parameters,
    to_float32_parameters,
)
from adam3_optax._remainder import join
from adam3_optax._remainder import split as split_halves
from tests.settings import STORAGE, assert_same, mesh_of

pytestmark = pytest.mark.usefixtures("standard_promotion")
BF16, F32 = jnp.bfloat16, jnp.float32
REMAINDERS: list[Any] = ["int16", "int8", None]
EACH = pytest.mark.parametrize("remainder", REMAINDERS)
KEEPS = pytest.mark.parametrize("remainder", ["int16", "int8"])
KEY = np.array([3, 5], np.uint32)
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The data of a test do not depend on the tests before it."""
    global rng
    rng = np.random.default_rng(0)


def floats(patterns: Any) -> np.ndarray:
    return np.asarray(patterns, np.uint32).view(np.float32)


def patterns(x: Any) -> np.ndarray:
    x = np.asarray(x)
    wide = x.view(np.uint16).astype(np.uint32) << 16 if x.dtype == BF16 else None
    return x.view(np.uint32) if wide is None else wide


def split(masters: Any, dtype: str = "int16", count: int = 1) -> Any:
    rest = jnp.zeros(np.shape(masters), dtype)
    return split_halves(jnp.asarray(masters), rest, jnp.int32(count), KEY)


# Split and join.


def expected(pattern: int) -> tuple[int, int]:
    """Returns the upper and the lower half of a pattern, by arithmetic of Python."""
    sign, size = divmod(pattern, 2**31)
    if size > 0x7F800000:  # NaN
        return 0x7FC0, 0
    upper, lower = divmod(size, 2**16)
    if lower >= 2**15:  # half or more goes away from 0
        upper, lower = upper + 1, lower - 2**16
    return sign * 2**15 + upper, lower


def test_halves_are_those_of_integer_arithmetic() -> None:
    lows = [0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    every = [upper * 2**16 + low for upper in range(0, 2**16, 13) for low in lows]
    every += [0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFFFFFFFF]
    param, rest = split(floats(every))
    want = np.array([expected(pattern) for pattern in every])
    np.testing.assert_array_equal(np.asarray(param).view(np.uint16), want[:, 0])
    np.testing.assert_array_equal(rest, want[:, 1])


def assert_rejoins(every: np.ndarray) -> None:
    masters = floats(every)
    param, rest = split(masters)
    joined = patterns(join(param, rest))
    size = every & 0x7FFFFFFF
    exact = size <= 0x7F7F7FFF
    np.testing.assert_array_equal(joined[exact], every[exact])
    beyond = ~exact & (size <= 0x7F800000)
    np.testing.assert_array_equal(joined[beyond] & 0x7FFFFFFF, 0x7F800000)
    np.testing.assert_array_equal(joined[beyond] >> 31, every[beyond] >> 31)
    assert np.all(joined[size > 0x7F800000] == 0x7FC00000)
    assert np.all(np.asarray(rest)[size >= 0x7F800000] == 0)


def test_what_is_split_rejoins() -> None:
    lows = np.array([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)
    every = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) + lows
    assert_rejoins(every.ravel())
    assert_rejoins(rng.integers(0, 2**32, 2**20, dtype=np.uint32))


@pytest.mark.slow
def test_all_patterns_rejoin() -> None:
    for start in range(0, 2**32, 2**26):
        assert_rejoins(np.arange(start, start + 2**26, dtype=np.uint32))


def test_int8_is_right_on_average_and_within_its_bound() -> None:
    masters = floats(rng.integers(0x3F000000, 0x40000000, 64, dtype=np.uint32))
    kept = jax.vmap(lambda count: join(*split_at(masters, count)))(jnp.arange(4000))
    relative = np.asarray(kept, np.float64) / masters - 1
    assert np.max(np.abs(relative)) < 2**-15
    error = np.abs(relative.mean(0))
    assert np.all(error < 5 * relative.std(0) / np.sqrt(4000) + 1e-9)
    # What has 24 bits already stays as it is.
    param, rest = split(kept[0], "int8", 77)
    np.testing.assert_array_equal(join(param, rest), kept[0])


def split_at(masters: Any, count: Any) -> Any:
    return split_halves(jnp.asarray(masters), jnp.zeros(64, jnp.int8), count, KEY)


def test_int8_keeps_what_is_not_finite() -> None:
    every = np.array(
        [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32
    )
    param, rest = split(floats(every), "int8")
    np.testing.assert_array_equal(
        patterns(param),
        np.array([0x7F80, 0xFF80, 0x7FC0, 0x7FC0, 0x7F80], np.uint32) << 16,
    )
    np.testing.assert_array_equal(rest[:4], 0)


# Steps.


def problem(n: int = 512) -> Any:
    """Returns parameters, and gradients that depend on them and on the step."""
    params = {"w": rng.normal(size=(n // 16, 16)), "b": rng.normal(size=n)}
    params = jax.tree.map(lambda x: jnp.asarray(x, F32), params)

    noise = jnp.asarray(rng.normal(size=(50, n)), BF16)

    def gradients(params: Any, i: Any) -> Any:
        # Half of a bfloat16 is exact, so it does not matter how XLA makes the sum.
        return jax.tree.map(
            lambda p: (p.astype(F32) / 2 + noise[i % 50].reshape(p.shape)).astype(BF16),
            params,
        )

    return params, gradients


def trained(optimizer: Any, params: Any, state: Any, gradients: Any, n: int) -> Any:
    def one(carry: Any, i: Any) -> Any:
        params, state = carry
        g = gradients(params, i)
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(n))[0])((params, state))


def both(inner: Any, n: int, remainder: Any = "int16") -> Any:
    """Returns masters after training with and without the wrapper, alike."""
    masters, gradients = problem()
    optimizer = bfloat16_parameters(inner, remainder)
    params, state = to_bfloat16_parameters(masters, optimizer.init(masters))

    def of_rounded(params: Any, i: Any) -> Any:
        # The gradients of the bfloat16 model, also where the masters are at hand.
        rounded, _ = to_bfloat16_parameters(params, optimizer.init(params))
        g = gradients(rounded, i)
        return jax.tree.map(lambda x: x.astype(F32), g)

    wide, _ = trained(inner, masters, inner.init(masters), of_rounded, n)
    params, state = trained(optimizer, params, state, gradients, n)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(BF16)}
    return to_float32_parameters(params, state), wide


INNERS: dict[str, Any] = {
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "adamw, fast": optax.adamw(1e-2),
    "adamw, slow": optax.adamw(1e-4),
    "adam3w": adam3w(1e-3),
    "adam3w, float8": adam3w(1e-3, **STORAGE["float8"]),
    "without third moment": adam3w(1e-3, third_moment=None),
    "lion": optax.lion(1e-4),
    "adafactor": optax.adafactor(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "ademamix": optax.contrib.ademamix(1e-3),
    "prodigy": optax.contrib.prodigy(1e-1),
    "sgd": optax.sgd(1e-3, momentum=0.9),
}


# Each is two scans to compile: these take longest, and are like others of the list.
SLOW_INNERS = "muon", "ademamix", "prodigy"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in SLOW_INNERS else [])
        for x in INNERS
    ],
)
def test_masters_are_those_of_float32_training(name: str) -> None:
    got, want = both(INNERS[name], 200)
    for key, x in want.items():
        if name in ("adafactor", "muon", "prodigy"):
            # They sum over axes, and XLA orders sums in another way in each program.
            np.testing.assert_allclose(got[key], x, rtol=2e-4, atol=2e-4)
        else:
            np.testing.assert_array_equal(patterns(got[key]), patterns(x), name)


@pytest.mark.parametrize("remainder", ["int8", None])
def test_less_memory_is_right_on_average(remainder: Any) -> None:
    # 5,000 steps of 5e-6. Rounding to nearest would not move the parameter at all.
    optimizer = bfloat16_parameters(optax.sgd(5e-6), remainder)
    params = jnp.ones(4096, BF16)

    def gradients(params: Any, i: Any) -> Any:
        return jnp.full(4096, -1.0)

    params, state = trained(optimizer, params, optimizer.init(params), gradients, 5000)
    moved = np.asarray(to_float32_parameters(params, state), np.float64) - 1
    error = 5 * moved.std() / 64
    assert abs(moved.mean() - 0.025) < error
    assert error < 0.002


def test_plain_bfloat16_loses_these_updates() -> None:
    params = jnp.ones(4, BF16)
    assert_same(optax.apply_updates(params, jnp.full(4, 5e-6)), params)


def landed(params: Any, targets: Any) -> Any:
    """Returns the parameters after one step to given masters, and the masters kept."""
    to = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        # As masters + u would round: u is so chosen that it gives the target.
        lambda g, state, params: (g, state),
    )
    optimizer = bfloat16_parameters(to)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(targets, state, params)
    params = optax.apply_updates(params, updates)
    return params, to_float32_parameters(params, state)


def test_updates_land_on_the_parameter_or_nearly() -> None:
    n = 2**20
    old = floats(rng.integers(0, 2**16, n, dtype=np.uint32) << 16)
    old = old[np.isfinite(old) & (np.abs(old) < 1e38)]
    scale = np.exp2(rng.uniform(-30, 10, old.size)).astype(np.float32)
    with np.errstate(over="ignore"):
        u = (old * rng.normal(size=old.size) * scale).astype(np.float32)
    ok = (
        np.isfinite(u)
        & (np.abs(u) < 1e38)
        & (np.abs(old) > 1e-30)
        & (np.abs(u) > 1e-30)
    )
    old, u = old[ok], u[ok]
    params, masters = landed(jnp.asarray(old, BF16), jnp.asarray(u))
    want = old + u
    near = np.abs(want) >= 2**-16 * np.abs(old)
    assert near.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(masters)[near], want[near])
    error = np.abs(np.asarray(masters, np.float64) - want)[~near]
    assert np.all(error <= 2**-22 * np.abs(old[~near]))
    # A parameter is its master, rounded.
    half = np.abs(np.asarray(params, np.float32) - want)[near]
    assert np.all(half <= 2**-8 * np.abs(want[near]))


def test_what_is_infinite_stays_infinite() -> None:
    # inf - inf would be NaN.
    optimizer = bfloat16_parameters(optax.sgd(1.0))
    params = jnp.array([jnp.inf, -jnp.inf, 3.38e38, 1.0], BF16)
    g = jnp.array([0.0, 1.0, -2e36, 0.0])
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(g, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, jnp.array([jnp.inf, -jnp.inf, jnp.inf, 1.0]))


def test_a_cancelled_parameter_is_nearly_right() -> None:
    old = np.array([1, -1, 3, 2**100], np.float32)
    target = np.array([2**-20, -(2**-20), 0, -(2**-10)], np.float32) * np.abs(old)
    _, masters = landed(jnp.asarray(old, BF16), jnp.asarray(target - old))
    assert np.all(np.abs(np.asarray(masters) - target) <= 2**-22 * np.abs(old))


# Parameters that are changed from outside.


@KEEPS
def test_parameters_may_be_reset_to_zero(remainder: Any) -> None:
    masters = jnp.asarray(rng.normal(size=4096), F32)
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    params, state = to_bfloat16_parameters(masters, optimizer.init(masters))
    zeros = jnp.zeros_like(params)
    updates, after = optimizer.update(jnp.zeros(4096), state, zeros)
    assert np.all(np.abs(to_float32_parameters(zeros, state)) < 1e-38)
    assert np.all(np.isfinite(updates))
    params = optax.apply_updates(zeros, updates)
    assert np.all(np.abs(np.asarray(to_float32_parameters(params, after))) < 1e-38)


@KEEPS
def test_swapped_parameters_are_off_by_half_a_unit_at_most(remainder: Any) -> None:
    masters = jnp.asarray(rng.normal(size=4096), F32)
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    _, state = to_bfloat16_parameters(masters, optimizer.init(masters))
    average = jnp.asarray(rng.normal(size=4096), BF16)
    joined = np.asarray(to_float32_parameters(average, state))
    exact = np.asarray(average, np.float32)
    assert np.all(np.abs(joined - exact) <= 2**-8 * np.abs(exact))
    updates, _ = optimizer.update(jnp.zeros(4096), state, average)
    assert_same(optax.apply_updates(average, updates), average)


def test_a_float32_average_is_swapped_in_without_loss() -> None:
    optimizer = bfloat16_parameters(optax.adamw(0.1))
    masters = jnp.asarray(rng.normal(size=4096), F32)
    params, state = to_bfloat16_parameters(masters, optimizer.init(masters))
    params, state = trained(optimizer, params, state, lambda p, i: p, 3)
    average = jnp.asarray(rng.normal(size=4096), F32)
    params, after = to_bfloat16_parameters(average, state)
    assert_same(to_float32_parameters(params, after), average)
    assert_same(after.inner_state, state.inner_state)


@KEEPS
def test_parameters_that_are_not_finite_ignore_their_remainder(remainder: Any) -> None:
    masters = jnp.full(4, 1.001)
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    _, state = to_bfloat16_parameters(masters, optimizer.init(masters))
    params = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0], BF16)
    joined = np.asarray(to_float32_parameters(params, state))
    np.testing.assert_array_equal(joined[:3], [np.inf, -np.inf, np.nan])
    params, state = trained(
        optimizer, params, state, lambda p, i: jnp.array([0.0, 0, 0, jnp.nan]), 1
    )
    assert np.isnan(params[3])
    # A new start from a checkpoint needs no new state.
    params = jnp.ones(4, BF16)
    assert np.all(np.isfinite(to_float32_parameters(params, state)))


# The program.


@EACH
def test_no_conversion_to_bfloat16_and_back_is_in_the_program(remainder: Any) -> None:
    # XLA on a GPU would drop the pair, and with it the rounding.
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    params = jnp.ones((4, 16), BF16)
    state = optimizer.init(params)
    text = str(jax.make_jaxpr(optimizer.update)(params, state, params))
    assert "new_dtype=float32" in text  # the gradients
    assert "convert_element_type[new_dtype=bfloat16" not in text


@EACH
def test_under_jit_vmap_and_donation(remainder: Any) -> None:
    optimizer = bfloat16_parameters(adam3w(1e-2), remainder)
    params = jnp.asarray(rng.normal(size=(3, 4, 16)), BF16)
    g = jnp.asarray(rng.normal(size=(3, 4, 16)), BF16)

    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(g[0], state, params)
        return optax.apply_updates(params, updates), state

    want = jax.jit(step)(params[0], optimizer.init(params[0]))
    donated = jax.jit(step, donate_argnums=(0, 1))
    assert_same(donated(params[0] + 0, optimizer.init(params[0])), want)
    many = jax.jit(jax.vmap(lambda p: step(p, optimizer.init(p))))(params)
    # To an ulp of a float32: XLA contracts products and sums in another way.
    first = to_float32_parameters(*jax.tree.map(lambda x: x[0], many))
    np.testing.assert_allclose(first, to_float32_parameters(*want), rtol=3e-7)
    with pytest.raises(ValueError, match=r"several optimizers.*jax\.vmap"):
        optimizer.update(g, many[1], params)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@EACH
def test_shards_as_the_parameters_do(remainder: Any, kind: Any) -> None:
    mesh = mesh_of(kind)
    where = NamedSharding(mesh, P("data", "model"))
    optimizer = bfloat16_parameters(adam3w(1e-2), remainder)
    params = jnp.asarray(rng.normal(size=(64, 128)), BF16)
    g = jnp.asarray(rng.normal(size=(64, 128)), BF16)

    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    want = jax.jit(step)(params, optimizer.init(params), g)
    with jax.set_mesh(mesh):
        placed, g = jax.device_put((params, g), where)
        wheres = state_shardings(optimizer, placed, where)
        state = jax.jit(optimizer.init, out_shardings=wheres)(placed)
        compiled = jax.jit(step).lower(placed, state, g).compile()
        got = compiled(placed, state, g)
    if remainder:
        assert got[1].remainder.sharding.is_equivalent_to(where, 2)
    text = str(compiled.as_text())
    assert "[64,128]" not in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "permute"):
        assert collective not in text
    assert_same(jax.device_get(got), jax.device_get(want))


def test_remainders_of_float32_parameters_lie_beside_them() -> None:
    mesh = mesh_of(AxisType.Auto)
    where = NamedSharding(mesh, P("data", "model"))
    optimizer = bfloat16_parameters(adam3w(1e-2))
    with jax.set_mesh(mesh):
        masters = jax.device_put(jnp.ones((64, 128)), where)
        before = state_shardings(optimizer, masters, where)
        state = jax.jit(optimizer.init, out_shardings=before)(masters)
        params, state = jax.jit(to_bfloat16_parameters)(masters, state)
        after = state_shardings(optimizer, params, where)
        assert after.remainder == where
        assert state.remainder.sharding.is_equivalent_to(where, 2)


# Trees and clients.


@EACH
def test_other_leaves_pass_through(remainder: Any) -> None:
    params = {
        "bf16": jnp.ones((2, 16), BF16),
        "f32": jnp.ones(16),
        "none": None,
        "one": jnp.ones((1,), BF16),
    }
    inner = optax.adamw(1e-2)
    optimizer = bfloat16_parameters(inner, remainder)
    state = optimizer.init(params)
    g = {**jax.tree.map(jnp.ones_like, params), "none": None}
    updates, state = optimizer.update(g, state, params)
    want, _ = inner.update(
        {"f32": g["f32"]}, inner.init({"f32": params["f32"]}), {"f32": params["f32"]}
    )
    assert_same(updates["f32"], want["f32"])
    assert updates["none"] is None
    assert {
        k: v.dtype
        for k, v in optax.apply_updates(params, updates).items()
        if k != "none"
    } == {"bf16": BF16, "f32": F32, "one": BF16}
    if remainder:
        assert state.remainder["f32"].shape == (1,)
    # Without a gradient a leaf stays as it is.
    optimizer = bfloat16_parameters(optax.sgd(1e-2), remainder)
    state = optimizer.init(params)
    updates, after = optimizer.update({**g, "bf16": None}, state, params)
    assert updates["bf16"] is None
    if remainder:
        assert_same(after.remainder["bf16"], state.remainder["bf16"])


@EACH
def test_within_masks_and_partitions(remainder: Any) -> None:
    params = {"w": jnp.ones((2, 16)), "b": jnp.ones(16)}
    optimizer = optax.partition(
        {"a": bfloat16_parameters(adam3w(1e-2), remainder), "b": optax.sgd(1e-2)},
        {"w": "a", "b": "b"},
    )
    state = optimizer.init(params)
    narrow, state = to_bfloat16_parameters(params, state)
    assert (narrow["w"].dtype, narrow["b"].dtype) == (BF16, F32)
    assert_same(to_float32_parameters(narrow, state), params)
    g = jax.tree.map(jnp.ones_like, narrow)
    updates, state = jax.jit(optimizer.update)(g, state, narrow)
    narrow = optax.apply_updates(narrow, updates)
    wide = adam3w(1e-2)
    want, _ = wide.update(jnp.ones((2, 16)), wide.init(params["w"]), params["w"])
    got, want = to_float32_parameters(narrow, state)["w"], params["w"] + want
    within = {"int16": 0, "int8": 2**-15, None: 2**-7}[remainder]
    np.testing.assert_allclose(got, want, rtol=within, atol=0)


def test_in_and_out_loses_nothing_and_takes_a_mask() -> None:
    masters = {"w": jnp.asarray(rng.normal(size=(4, 16)), F32), "b": jnp.full(16, 0.1)}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), bfloat16_parameters(adam3w(1e-2))
    )
    state = optimizer.init(masters)
    for mask in (None, {"w": True, "b": False}, lambda p: {"w": True, "b": False}):
        params, now = jax.jit(partial(to_bfloat16_parameters, mask=mask))(
            masters, state
        )
        assert params["w"].dtype == BF16
        assert params["b"].dtype == (BF16 if mask is None else F32)
        assert_same(to_float32_parameters(params, now), masters)
        updates, now = optimizer.update(params, now, params)
        assert optax.apply_updates(params, updates)["w"].dtype == BF16
    # A prefix is a mask, too; and a leaf may become float32 again.
    some, now = to_bfloat16_parameters(masters, state, True)
    assert some["b"].dtype == BF16
    back = to_float32_parameters(some, now)
    some, now = to_bfloat16_parameters(back, now, {"w": True, "b": False})
    assert now[1].remainder["b"].shape == (1,)
    updates, now = optimizer.update(some, now, some)
    assert optax.apply_updates(some, updates)["b"].dtype == F32
    with pytest.raises(ValueError, match="mask must be a tree like params, or a pref"):
        to_bfloat16_parameters(masters, state, {"w": True})
    other = {"w": jnp.ones((4, 17)), "b": jnp.ones(16)}
    with pytest.raises(ValueError, match=r"\['w'\] is .*shape \(4, 17\), and its"):
        to_bfloat16_parameters(other, now)
    with pytest.raises(ValueError, match=r"params\['w'\] is bfloat16 of shape \(4, 17"):
        to_float32_parameters({**other, "w": other["w"].astype(BF16)}, now)
    with pytest.raises(ValueError, match="no BFloat16ParametersState"):
        to_float32_parameters(masters, adam3w().init(masters))


def test_each_state_converts_its_own_leaves() -> None:
    # Two wrappers with different settings; one of them over an optimizer without state.
    params = {x: jnp.asarray(rng.normal(size=(4, 16)), F32) for x in "abc"}
    of_label = {
        "a": bfloat16_parameters(adam3w(1e-2)),
        "b": bfloat16_parameters(optax.sgd(1e-2), None),
        "c": optax.sgd(1e-2),
    }
    optimizer = optax.partition(of_label, {x: x for x in "abc"})
    narrow, state = to_bfloat16_parameters(params, optimizer.init(params))
    assert [narrow[x].dtype for x in "abc"] == [BF16, BF16, F32]
    back = to_float32_parameters(narrow, state)
    assert_same({x: back[x] for x in "ac"}, {x: params[x] for x in "ac"})
    np.testing.assert_allclose(back["b"], params["b"], rtol=2**-7)
    assert np.any(back["b"] != params["b"])
    updates, state = jax.jit(optimizer.update)(narrow, state, narrow)
    narrow = optax.apply_updates(narrow, updates)
    assert [narrow[x].dtype for x in "abc"] == [BF16, BF16, F32]


@EACH
@pytest.mark.parametrize("inner", ["muon", "partition"])
def test_inner_optimizers_may_part_the_leaves(inner: str, remainder: Any) -> None:
    params = {"w": jnp.ones((16, 16)), "b": jnp.ones(16)}
    parts = {"w": optax.adam(1e-2), "b": optax.sgd(1e-2)}
    made = {
        "muon": optax.contrib.muon(1e-2),
        "partition": optax.partition(parts, {"w": "w", "b": "b"}),
    }[inner]
    optimizer = bfloat16_parameters(made, remainder)
    narrow, state = to_bfloat16_parameters(params, optimizer.init(params))
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(BF16)}
    updates, _ = jax.jit(optimizer.update)(narrow, state, narrow)
    after = optax.apply_updates(narrow, updates)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(BF16)}


@EACH
def test_masked_leaves_may_be_in_boxes(remainder: Any) -> None:
    params: Any = {
        x: nn.Partitioned(jnp.full((2, 16), 0.1), (None, None)) for x in ("w", "b")
    }
    mask = jax.tree.map_with_path(lambda path, _: path[0].key == "w", params)
    optimizer = optax.masked(bfloat16_parameters(adam3w(1e-2), remainder), mask)
    narrow, state = to_bfloat16_parameters(params, optimizer.init(params))
    assert (narrow["w"].value.dtype, narrow["b"].value.dtype) == (BF16, F32)
    back = to_float32_parameters(narrow, state)
    assert back["w"].value.dtype == F32
    assert_same(back["b"], params["b"])
    if remainder == "int16":
        assert_same(back, params)
    updates, _ = jax.jit(optimizer.update)(narrow, state, narrow)
    assert optax.apply_updates(narrow, updates)["w"].value.dtype == BF16


@EACH
def test_derivatives_are_those_without_rounding(remainder: Any) -> None:
    def after(optimizer: Any, masters: Any) -> Any:
        params, state = to_bfloat16_parameters(masters, optimizer.init(masters))
        g = jax.grad(lambda p: (p.astype(F32) ** 2).sum())(params)
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates).astype(F32)).sum()

    masters = jnp.asarray(rng.normal(size=(2, 16)), F32)
    optimizer = bfloat16_parameters(optax.sgd(0.25), remainder)
    derivative = jax.grad(partial(after, optimizer))(masters)
    np.testing.assert_array_equal(derivative, 0.5)  # of p - 0.25 · 2p


@EACH
@pytest.mark.parametrize("other", REMAINDERS)
def test_a_state_of_another_setting_is_refused(remainder: Any, other: Any) -> None:
    params = {"w": jnp.ones((2, 2), BF16)}
    state = bfloat16_parameters(optax.sgd(1.0), remainder).init(params)
    optimizer = bfloat16_parameters(optax.sgd(1.0), other)
    if other == remainder:
        optimizer.update(params, state, params)
        return
    with pytest.raises(
        ValueError, match=rf"params\['w'\] has remainder {remainder}, and"
    ):
        optimizer.update(params, state, params)


@EACH
def test_leaves_of_a_tree_round_with_bits_of_their_own(remainder: Any) -> None:
    same = jnp.full((64, 16), 1 + 2**-8 + 2**-17, F32)
    masters = {"a": same, "b": same}
    optimizer = bfloat16_parameters(optax.sgd(1.0), remainder)
    params, state = to_bfloat16_parameters(masters, optimizer.init(masters))
    back = to_float32_parameters(params, state)
    assert np.array_equal(back["a"], back["b"]) == (remainder == "int16")


@EACH
def test_a_number_of_python_is_a_parameter(remainder: Any) -> None:
    optimizer = bfloat16_parameters(optax.sgd(1.0), remainder)
    params, state = to_bfloat16_parameters(
        {"a": 0.5}, optimizer.init({"a": jnp.float32(0.5)})
    )
    assert params["a"].dtype == BF16
    assert to_float32_parameters(params, state)["a"] == 0.5


def test_a_stacked_state_is_named() -> None:
    optimizer = bfloat16_parameters(optax.sgd(1.0), "int8")
    params = jnp.ones((3, 2))
    state = jax.vmap(optimizer.init)(params)
    jax.vmap(to_bfloat16_parameters)(params, state)
    with pytest.raises(ValueError, match=r"several optimizers, as made by jax\.vmap"):
        to_bfloat16_parameters(params, state)


def test_errors_name_what_was_wrong() -> None:
    with pytest.raises(ValueError, match="remainder must be 'int16', 'int8' or None"):
        bfloat16_parameters(optax.sgd(1.0), "int4")  # type: ignore[arg-type]
    for inner in (optax.sgd, None):
        with pytest.raises(TypeError, match=r"inner must be an optimizer, such as opt"):
            bfloat16_parameters(inner)
    optimizer = bfloat16_parameters(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"params\['w'\] is float16"):
        optimizer.init({"w": jnp.ones(2, jnp.float16)})
    params = {"w": jnp.ones((2, 2), BF16)}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(params, state)
    with pytest.raises(TypeError, match=r"BFloat16ParametersState, got .* of inner\."):
        optimizer.update(params, state.inner_state, params)
    for other in (jnp.ones((2, 2)), jnp.ones((2, 3), BF16)):
        with pytest.raises(ValueError, match=r"params\['w'\] is .* its remainder"):
            optimizer.update(params, state, {"w": other})
    # Equinox adds without a cast, so that the parameters become float32.
    updates, state = optimizer.update(params, state, params)
    wrong = eqx.apply_updates(params, updates)
    keeps = r"Was it bfloat16\? optax\.apply_updates keeps"
    with pytest.raises(ValueError, match=keeps):
        optimizer.update(params, state, wrong)
    # Without an error the parameters would come back without their remainders.
    with pytest.raises(ValueError, match=keeps):
        to_float32_parameters(wrong, state)


@EACH
def test_in_flax_nnx(remainder: Any) -> None:
    model = nnx.Linear(16, 32, param_dtype=BF16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, bfloat16_parameters(adam3w(1e-3), remainder), wrt=nnx.Param
    )
    x = jnp.asarray(rng.normal(size=(8, 16)), BF16)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, g = nnx.value_and_grad(lambda m: jnp.mean(m(x).astype(F32) ** 2))(model)
        optimizer.update(model, g)
        return loss

    losses = [step(model, optimizer) for _ in range(50)]
    assert losses[-1] < 0.9 * losses[0]
    assert model.kernel[...].dtype == BF16
    split_, state = nnx.split(optimizer)
    nnx.merge(split_, state)
    if remainder:
        masters = to_float32_parameters(
            nnx.state(model, nnx.Param), optimizer.opt_state
        )
        kernel = jax.tree.leaves(masters["kernel"])[0]
        assert kernel.dtype == F32
        assert not np.array_equal(kernel.astype(BF16), kernel)


@EACH
def test_with_boxes_of_metadata_on_a_mesh(remainder: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
    module = nn.Dense(32, kernel_init=init, param_dtype=BF16)
    optimizer = bfloat16_parameters(adam3w(1e-3, **STORAGE["float8"]), remainder)

    def start() -> Any:
        params = module.init(jax.random.key(0), jnp.ones((1, 16)))
        return TrainState.create(apply_fn=module.apply, params=params, tx=optimizer)

    with jax.set_mesh(mesh):
        where = nn.get_sharding(jax.eval_shape(start), mesh)
        state = jax.jit(start, out_shardings=where)()
        g = jax.tree.map(jnp.ones_like, state.params)
        after = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, g)
    kernel = after.params["params"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.value.dtype == BF16
    if remainder:
        rest = after.opt_state.remainder["params"]["kernel"]
        assert isinstance(rest, nn.Partitioned)
        assert rest.value.sharding.spec == P(None, "x")
    masters = to_float32_parameters(after.params, after.opt_state)
    assert masters["params"]["kernel"].value.dtype == F32


# On the default platform, for Orbax restores onto no other without a tree of shardings.
@pytest.mark.usefixtures("on_cpu")
@EACH
def test_checkpoints(remainder: Any, tmp_path: Any) -> None:
    optimizer = bfloat16_parameters(adam3w(1e-2), remainder)
    masters = {"w": jnp.asarray(rng.normal(size=(4, 16)), F32), "b": jnp.ones(16)}
    params, state = to_bfloat16_parameters(
        masters, optimizer.init(masters), {"w": True, "b": False}
    )
    carry = {"params": params, "state": state}
    restored = serialization.from_bytes(carry, serialization.to_bytes(carry))
    assert_same(restored, carry)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "x", jax.eval_shape(lambda: carry))
    assert_same(restored, carry)


# Its place among other transformations.

MASTERS = {"w": jnp.asarray(rng.normal(size=(4, 16)), F32)}


def runs(optimizer: Any, n: int = 6) -> Any:
    params, state = to_bfloat16_parameters(MASTERS, optimizer.init(MASTERS))

    def gradients(params: Any, i: Any) -> Any:
        g = jnp.asarray(rng_w) * (1 + i % 3)
        return {"w": g.astype(params["w"].dtype)}

    params, state = trained(optimizer, params, state, gradients, n)
    return to_float32_parameters(params, state)["w"]


rng_w = np.random.default_rng(5).normal(size=(4, 16)).astype(np.float32)


def wide_runs(optimizer: Any, n: int = 6) -> Any:
    def gradients(params: Any, i: Any) -> Any:
        g = (jnp.asarray(rng_w) * (1 + i % 3)).astype(BF16)
        return {"w": g.astype(F32)}

    return trained(optimizer, MASTERS, optimizer.init(MASTERS), gradients, n)[0]["w"]


def multi(inner: Any) -> Any:
    return optax.MultiSteps(inner, 3).gradient_transformation()


INNER = optax.adamw(1e-2)
PLACES: dict[str, tuple[Any, Any]] = {
    "clip before": (
        optax.chain(optax.clip(1.0), bfloat16_parameters(INNER)),
        optax.chain(optax.clip(1.0), INNER),
    ),
    "MultiSteps inside": (bfloat16_parameters(multi(INNER)), multi(INNER)),
    "MultiSteps outside": (multi(bfloat16_parameters(INNER)), multi(INNER)),
    "apply_if_finite inside": (
        bfloat16_parameters(optax.apply_if_finite(INNER, 3)),
        optax.apply_if_finite(INNER, 3),
    ),
    "schedule_free inside": (
        bfloat16_parameters(optax.contrib.schedule_free(INNER, 1e-2)),
        optax.contrib.schedule_free(INNER, 1e-2),
    ),
    "masked outside": (
        optax.masked(bfloat16_parameters(INNER), {"w": True}),
        optax.masked(INNER, {"w": True}),
    ),
    "inject_hyperparams inside": (
        bfloat16_parameters(optax.inject_hyperparams(optax.adamw)(1e-2)),
        optax.inject_hyperparams(optax.adamw)(1e-2),
    ),
    "inject_hyperparams with ours": (
        bfloat16_parameters(optax.inject_hyperparams(adam3w)(1e-2)),
        optax.inject_hyperparams(adam3w)(1e-2),
    ),
    "inject_hyperparams outside": (
        optax.inject_hyperparams(
            lambda rate: bfloat16_parameters(optax.adamw(rate)), hyperparam_dtype=F32
        )(1e-2),
        optax.inject_hyperparams(lambda rate: optax.adamw(rate))(1e-2),
    ),
    "partition outside": (
        optax.partition({"a": bfloat16_parameters(INNER)}, {"w": "a"}),
        INNER,
    ),
    "a factor inside": (
        bfloat16_parameters(optax.chain(INNER, optax.scale(0.5))),
        optax.chain(INNER, optax.scale(0.5)),
    ),
    "a trust ratio inside": (bfloat16_parameters(optax.lamb(1e-2)), optax.lamb(1e-2)),
    "a schedule inside": (
        bfloat16_parameters(optax.adamw(optax.cosine_decay_schedule(1e-2, 10))),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_work(name: str) -> None:
    optimizer, wide = PLACES[name]
    rounded = ("MultiSteps outside", "schedule_free inside", "a trust ratio inside")
    tolerance = 1e-6 if name in rounded else 0
    np.testing.assert_allclose(runs(optimizer), wide_runs(wide), rtol=tolerance)


def test_apply_if_finite_outside_cannot() -> None:
    optimizer = optax.apply_if_finite(bfloat16_parameters(INNER), 3)
    with pytest.raises(TypeError, match="cond branches must have equal output types"):
        runs(optimizer)


def test_schedule_free_outside_cannot() -> None:
    # Documented: it changes the updates.
    optimizer = optax.contrib.schedule_free(bfloat16_parameters(INNER), 1e-2)
    wide = wide_runs(optax.contrib.schedule_free(INNER, 1e-2))
    assert not np.allclose(runs(optimizer), wide, rtol=1e-4)


def test_lookahead_cannot() -> None:
    # Documented: inside there is an error, and outside it changes the updates.
    start = optax.LookaheadParams.init_synced(
        jax.tree.map(lambda x: x.astype(BF16), MASTERS)
    )
    g = {"w": jnp.asarray(rng_w, BF16)}
    inside = bfloat16_parameters(optax.lookahead(INNER, 2, 0.5))
    with pytest.raises(ValueError, match="Expected named tuple"):
        inside.update(g, inside.init(start), start)

    def slow_after(optimizer: Any, params: Any) -> Any:
        state = optimizer.init(params)
        for _ in range(4):
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params.slow["w"], np.float32)

    outside = slow_after(optax.lookahead(bfloat16_parameters(INNER), 2, 0.5), start)
    wide = jax.tree.map(lambda x: x.astype(F32), start)
    want = slow_after(optax.lookahead(INNER, 2, 0.5), wide)
    assert not np.array_equal(outside, want.astype(BF16).astype(np.float32))


def test_freezing_belongs_before_the_wrapper() -> None:
    # Documented: after it, parameters stay, but remainders move.
    freeze = optax.transforms.freeze(True)
    for optimizer, moves in (
        (optax.chain(bfloat16_parameters(INNER), freeze), True),
        (bfloat16_parameters(optax.chain(INNER, freeze)), False),
    ):
        params, state = to_bfloat16_parameters(MASTERS, optimizer.init(MASTERS))
        updates, state = optimizer.update(params, state, params)
        after = optax.apply_updates(params, updates)
        assert_same(after, params)
        moved = to_float32_parameters(after, state)["w"] != MASTERS["w"]
        assert bool(moved.any()) == moves


def test_map_params_finds_what_stands_for_no_remainder() -> None:
    optimizer = bfloat16_parameters(INNER, None)
    state = optimizer.init(MASTERS)
    names = {"w": "of w"}
    found = optax.tree.map_params(optimizer, lambda x, name: name, state, names)
    assert found.remainder == found.inner_state[0].mu == names


def test_strict_promotion_cannot() -> None:
    optimizer = bfloat16_parameters(INNER)
    params = jnp.ones(2, BF16)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(ValueError, match="promotion"),
    ):
        optax.apply_updates(params, updates)


def test_what_changes_updates_afterwards_breaks_the_landing() -> None:
    # Documented: the wrapper comes last.
    optimizer = optax.chain(bfloat16_parameters(INNER), optax.scale(0.5))
    assert not np.allclose(
        runs(optimizer), wide_runs(optax.chain(INNER, optax.scale(0.5)))
    )


def test_trees_that_do_not_fit_are_named() -> None:
    params = {"w": jnp.ones((2, 16), BF16)}
    optimizer = bfloat16_parameters(INNER)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="updates must be a tree like params"):
        optimizer.update({"b": params["w"]}, state, params)
    with pytest.raises(ValueError, match="the remainder must be a tree like params"):
        to_float32_parameters({"b": params["w"]}, state)
    for mask in ({"w": "no"}, {"w": 1}):
        with pytest.raises(TypeError, match=r"mask\['w'\] must be a boolean"):
            to_bfloat16_parameters({"w": jnp.ones((2, 16))}, state, mask)
