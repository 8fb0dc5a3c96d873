"""bfloat16 parameters: every promise of `bfloat16_parameters` and its report."""

from functools import partial
from itertools import permutations
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import (
    adam3w,
    bfloat16_parameters,
    lost_updates_report,
    state_shardings,
    to_bfloat16_parameters,
    to_float32_parameters,
)
from tests.settings import BF16, F32, MIXED, assert_same, mesh_of, normal, step
from tests.test_sharding import collectives

pytestmark = pytest.mark.usefixtures("standard_promotion")
REMAINDERS: list[Any] = ["int16", "int8", None]
EACH = pytest.mark.parametrize("remainder", REMAINDERS)
KEEPS = pytest.mark.parametrize("remainder", REMAINDERS[:2])
SGD = optax.sgd(0.1)


def narrowed(masters: Any, optimizer: Any, mask: Any = None) -> Any:
    """Returns bfloat16 parameters and a state, from masters."""
    return to_bfloat16_parameters(masters, optimizer.init(masters), mask)


def dtypes(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.dtype.name, tree)


# Into two halves and back, for every bit pattern.


def floats(patterns: Any) -> Any:
    return np.asarray(patterns, np.uint32).view(np.float32)


def patterns(x: Any) -> Any:
    return np.asarray(x, np.float32).view(np.uint32)


INFINITY, LARGEST = 0x7F800000, 0x7F7F7FFF  # what is larger rounds to infinity


def assert_rejoins(every: Any) -> None:
    params, state = narrowed(floats(every), bfloat16_parameters(SGD))
    joined = patterns(to_float32_parameters(params, state))
    size = every & 0x7FFFFFFF
    number, kept = size <= INFINITY, size <= LARGEST
    # The parameter is the nearest; a tie goes away from 0.
    nearest = (every + np.uint32(0x8000)) >> 16 << 16
    np.testing.assert_array_equal(patterns(params)[number], nearest[number])
    np.testing.assert_array_equal(joined[kept], every[kept])
    infinite = (every & 0x80000000) | INFINITY
    np.testing.assert_array_equal(joined[number & ~kept], infinite[number & ~kept])
    np.testing.assert_array_equal(joined[~number], 0x7FC00000)
    np.testing.assert_array_equal(np.asarray(state.remainder)[size >= INFINITY], 0)


def test_what_is_split_rejoins() -> None:
    lows = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    assert_rejoins(((np.arange(2**16, dtype=np.uint32)[:, None] << 16) + lows).ravel())


@pytest.mark.slow
def test_all_patterns_rejoin() -> None:
    for start in range(0, 2**32, 2**24):
        assert_rejoins(np.arange(start, start + 2**24, dtype=np.uint32))


# Training: with int16 the masters are those of float32, with any optimizer inside, and
# wherever the wrapper may stand.

MASTERS = {"w": normal(16, 16, seed=0), "b": normal(512, seed=1)}
# Each for three steps, so that the mean which MultiSteps takes of them is exact.
GRADIENTS = {
    k: jnp.repeat(normal(20, *x.shape, seed=2).astype(BF16), 3, axis=0)
    for k, x in MASTERS.items()
}
INNER = optax.adamw(1e-2, weight_decay=0.1)


def trained(optimizer: Any, is_wrapped: bool) -> Any:
    """Returns the masters after training, in float32 or with the wrapper."""

    def one(carry: Any, g: Any) -> Any:
        params, state = carry
        g = jax.tree.map(lambda g, p: g.astype(p.dtype), g, params)
        return step(optimizer, params, state, g), None

    carry = MASTERS, optimizer.init(MASTERS)
    if is_wrapped:
        carry = to_bfloat16_parameters(*carry)
    carry, _ = jax.lax.scan(one, carry, GRADIENTS)
    return to_float32_parameters(*carry) if is_wrapped else carry[0]


def injected(make: Any) -> Any:
    return optax.inject_hyperparams(make, hyperparam_dtype=F32)(1e-2)


INNERS: dict[str, Any] = {
    "adamw": INNER,
    "adam3w": adam3w(1e-3, **MIXED),
    "muon": optax.contrib.muon(1e-3),
    "lamb": optax.lamb(1e-2),
    "MultiSteps": optax.MultiSteps(INNER, 3),
    "apply_if_finite": optax.apply_if_finite(INNER, 3),
    "schedule_free": optax.contrib.schedule_free(INNER, 1e-2),
    "inject_hyperparams": injected(adam3w),
    "a schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
}
OUTSIDE: dict[str, Any] = {
    "clip outside": lambda wrap: optax.chain(optax.clip(1.0), wrap(INNER)),
    "MultiSteps outside": lambda wrap: optax.MultiSteps(wrap(INNER), 3),
    "partition outside": lambda wrap: optax.partition(
        {"a": wrap(INNER), "b": wrap(SGD)}, {"w": "a", "b": "b"}
    ),
    "inject_hyperparams outside": lambda wrap: injected(
        lambda rate: wrap(optax.adamw(rate))
    ),
}
PLACES = OUTSIDE | {k: lambda wrap, x=x: wrap(x) for k, x in INNERS.items()}
# They sum over axes, or average, and XLA rounds that in another way in each program.
ROUNDED = {"muon": 2e-4} | dict.fromkeys(["lamb", "schedule_free", "MultiSteps"], 1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_masters_are_those_of_float32_training(place: str) -> None:
    got = trained(PLACES[place](bfloat16_parameters), True)
    want = trained(PLACES[place](lambda inner: inner), False)
    tolerance = ROUNDED.get(place.removesuffix(" outside"), 0.0)
    for k, x in want.items():
        np.testing.assert_allclose(got[k], x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("remainder", ["int8", None])
def test_less_memory_is_right_on_average(remainder: Any) -> None:
    # 5,000 steps of 5e-6. Rounding to nearest would not move the parameter at all.
    optimizer, g = bfloat16_parameters(optax.sgd(5e-6), remainder), jnp.full(4096, -1.0)
    params = jnp.ones(4096, BF16)

    def body(i: Any, carry: Any) -> Any:
        return step(optimizer, *carry, g)

    carry = jax.lax.fori_loop(0, 5000, body, (params, optimizer.init(params)))
    moved = np.asarray(to_float32_parameters(*carry), np.float64) - 1
    error = 5 * moved.std() / 64
    assert abs(moved.mean() - 0.025) < error
    assert error < 0.002


def test_updates_land_on_the_master_or_nearly() -> None:
    rng = np.random.default_rng(0)
    old = floats(rng.integers(0, 2**16, 2**18, dtype=np.uint32) << 16)
    old = old[np.isfinite(old) & (np.abs(old) < 1e38) & (np.abs(old) > 1e-30)]
    scale = np.exp2(rng.uniform(-30, 10, old.size))
    exact = old.astype(np.float64) * rng.normal(size=old.size) * scale
    ok = (np.abs(exact) < 1e38) & (np.abs(exact) > 1e-30)
    # And some that cancel the parameter.
    old = np.append(old[ok], [1, -1, 3, 2**100]).astype(np.float32)
    u = np.append(exact[ok], [-1, 1 - 2**-20, -3, -(2**100)]).astype(np.float32)
    optimizer, params = bfloat16_parameters(optax.sgd(1.0)), jnp.asarray(old, BF16)
    params, state = step(optimizer, params, optimizer.init(params), -u)
    masters, want = np.asarray(to_float32_parameters(params, state)), old + u
    near = np.abs(want) >= 2**-16 * np.abs(old)
    assert 0.5 < near.mean() < 1
    np.testing.assert_array_equal(masters[near], want[near])
    error = np.abs(masters.astype(np.float64) - want)[~near]
    assert np.all(error <= 2**-22 * np.abs(old[~near]))


# Parameters that are changed from outside.


@KEEPS
def test_parameters_may_be_replaced(remainder: Any) -> None:
    optimizer, zeros = bfloat16_parameters(SGD, remainder), jnp.zeros(4096, BF16)
    _, state = narrowed(normal(4096, seed=0), optimizer)
    special = jnp.resize(jnp.array([jnp.inf, -jnp.inf, jnp.nan], BF16), (4096,))
    for new in (normal(4096, seed=1).astype(BF16), zeros, special):
        joined = np.asarray(to_float32_parameters(new, state))
        exact = np.asarray(new, np.float32)
        # The old remainder is half a unit at most, and ignored where nothing is finite.
        np.testing.assert_allclose(joined, exact, rtol=2**-8, atol=1e-38)
        after, _ = step(optimizer, new, state, zeros)
        np.testing.assert_allclose(after.astype(F32), exact, rtol=0, atol=1e-38)
    # In float32 nothing of the old ones is left.
    masters = jnp.concatenate([normal(4093, seed=2), special[:3].astype(F32)])
    once = to_float32_parameters(*to_bfloat16_parameters(masters, state))
    within = 0.0 if remainder == "int16" else 2.0**-15
    np.testing.assert_allclose(once, masters, rtol=within)
    # What has 24 bits already is not rounded again.
    later = state._replace(steps=jnp.int32(77))
    assert_same(to_float32_parameters(*to_bfloat16_parameters(once, later)), once)


# The program.


def conversions(jaxpr: Any) -> set[str]:
    """Returns to which types a program converts, in all its parts."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type":
            found.add(eqn.params["new_dtype"].name)
        for part in jax.tree.leaves(list(eqn.params.values())):
            part = getattr(part, "jaxpr", part)
            found |= conversions(part) if hasattr(part, "eqns") else set()
    return found


@EACH
def test_no_conversion_to_bfloat16_and_back_is_in_the_program(remainder: Any) -> None:
    # XLA on a GPU would drop the pair, and with it the rounding.
    optimizer = bfloat16_parameters(SGD, remainder)
    params = jnp.ones((4, 16), BF16)
    state = optimizer.init(params)
    program = jax.make_jaxpr(optimizer.update)(params, state, params)
    assert conversions(program.jaxpr) & {"float32", "bfloat16"} == {"float32"}


def test_a_conversion_in_a_part_of_the_program_is_seen() -> None:
    # What would be missed here would be missed above.
    pair = jax.jit(lambda x: x.astype(BF16).astype(F32))
    part = partial(jax.lax.platform_dependent, cpu=pair, default=jnp.sin)
    for function in (pair, part):
        program = jax.make_jaxpr(function)(jnp.ones(3))
        assert conversions(program.jaxpr) == {"bfloat16", "float32"}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("remainder", "kind"),
    [("int16", AxisType.Auto), ("int8", AxisType.Explicit), (None, AxisType.Explicit)],
)
def test_shards_as_the_parameters_do(remainder: Any, kind: Any) -> None:
    mesh = mesh_of(kind)
    where = NamedSharding(mesh, P("data", "model"))
    optimizer = bfloat16_parameters(adam3w(1e-2), remainder)
    masters, g = normal(64, 128, seed=0), normal(64, 128, seed=1)
    want = step(optimizer, *jax.jit(narrowed, static_argnums=1)(masters, optimizer), g)
    with jax.set_mesh(mesh):
        placed, g = jax.device_put((masters, g), where)
        wheres = state_shardings(optimizer, placed, where)
        state = jax.jit(optimizer.init, out_shardings=wheres)(placed)
        carry = jax.jit(to_bfloat16_parameters)(placed, state)
        compiled = step.lower(optimizer, *carry, g).compile()
        got = compiled(*carry, g)
    if remainder:
        assert got[1].remainder.sharding.is_equivalent_to(where, 2)
    text = str(compiled.as_text())
    assert "[64,128]" not in text
    assert not collectives(text)
    assert_same(jax.device_get(got), jax.device_get(want))


# Which leaves become bfloat16.


@EACH
def test_other_leaves_pass_through(remainder: Any) -> None:
    params = {"bf16": jnp.ones((2, 16), BF16), "one": jnp.ones(1, BF16), "none": None}
    params |= {"f32": jnp.ones(16)}
    g = jax.tree.map(jnp.ones_like, params)
    optimizer = bfloat16_parameters(SGD, remainder)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    updates, _ = update(g, state, params)
    assert_same(updates["f32"], SGD.update(g, SGD.init(params))[0]["f32"])
    assert dtypes(optax.apply_updates(params, updates)) == dtypes(params)
    # Without a gradient a leaf stays as it is.
    updates, after = update({**g, "bf16": None}, state, params)
    assert updates["bf16"] is updates["none"] is None
    assert_same(after.remainder["bf16"], state.remainder["bf16"])


def test_each_state_converts_its_own_leaves() -> None:
    # Wrappers with different settings; one of them over an optimizer without state.
    masters: dict[str, Any] = {x: normal(4, 16, seed=0) for x in "abcd"}
    parts = {
        "a": bfloat16_parameters(adam3w(1e-2)),
        "b": bfloat16_parameters(SGD, None),
        "c": bfloat16_parameters(SGD, "int8"),
        "d": SGD,
    }
    optimizer = optax.partition(parts, {x: x for x in "abcd"})
    params, state = narrowed(masters, optimizer)
    wanted = dict.fromkeys("abc", "bfloat16") | {"d": "float32"}
    assert dtypes(params) == wanted
    back = to_float32_parameters(params, state)
    for x, bound in {"a": 0, "b": 2**-7, "c": 2**-15, "d": 0}.items():
        np.testing.assert_allclose(back[x], masters[x], rtol=bound)
        assert bool((back[x] != masters[x]).any()) == (bound > 0)
    assert dtypes(step(optimizer, params, state, params)[0]) == wanted


def test_a_mask_says_which_leaves() -> None:
    masters = {"w": normal(4, 16, seed=0), "b": jnp.full(16, 0.5)}
    matrices = {"w": True, "b": False}
    optimizer = optax.chain(optax.clip(1.0), bfloat16_parameters(INNER))
    for mask in (matrices, lambda _: matrices, True, None):
        whole = mask in (True, None)
        params, state = narrowed(masters, optimizer, mask)
        assert [params[x].dtype for x in "wb"] == [BF16, BF16 if whole else F32]
        assert dtypes(step(optimizer, params, state, params)[0]) == dtypes(params)
    # A leaf may become float32 again.
    back = to_float32_parameters(params, state)
    some, state = to_bfloat16_parameters(back, state, matrices)
    assert state[1].remainder["b"].shape == (1,)
    assert dtypes(step(optimizer, some, state, some)[0]) == dtypes(some)


def test_masked_leaves_may_be_in_boxes() -> None:
    box: Any = nn.Partitioned(jnp.full((2, 16), 0.1, F32), (None, None))
    masters: Any = {"w": box, "b": box}
    mask = {"w": box.replace(value=True), "b": box.replace(value=False)}
    optimizer = optax.masked(bfloat16_parameters(INNER), mask)
    params, state = narrowed(masters, optimizer)
    assert [params[x].value.dtype for x in "wb"] == [BF16, F32]
    back = to_float32_parameters(params, state)
    assert_same(back, masters)
    assert dtypes(step(optimizer, params, state, params)[0]) == dtypes(params)


@EACH
def test_derivatives_are_those_without_rounding(remainder: Any) -> None:
    optimizer = bfloat16_parameters(optax.sgd(0.25), remainder)

    def after(masters: Any) -> Any:
        params, state = narrowed(masters, optimizer)
        g = jax.grad(lambda p: (p.astype(F32) ** 2).sum())(params)
        return step(optimizer, params, state, g)[0].astype(F32).sum()

    derivative = jax.grad(after)(normal(2, 16, seed=0))
    np.testing.assert_array_equal(derivative, 0.5)  # of p - 0.25 · 2p


# Errors name what was wrong.


@pytest.mark.parametrize(("made", "used"), [*permutations(REMAINDERS, 2)])
def test_a_state_of_another_setting_is_refused(made: Any, used: Any) -> None:
    params = {"w": jnp.ones((2, 2), BF16)}
    state = bfloat16_parameters(SGD, made).init(params)
    said = rf"params\['w'\] has remainder {made}, but the optimizer has {used}\. To"
    with pytest.raises(ValueError, match=said):
        bfloat16_parameters(SGD, used).update(params, state, params)


def test_errors_name_what_was_wrong() -> None:
    make: Any = bfloat16_parameters
    optimizer = make(SGD, "int8")
    params, longer = {"w": jnp.ones((2, 2), BF16)}, {"w": jnp.ones((2, 3), BF16)}
    wide, vector = {"w": jnp.ones((2, 2))}, {"w": jnp.ones(3)}
    half, other = {"w": jnp.ones(2, "half")}, {"v": params["w"]}
    huge = {"w": jax.ShapeDtypeStruct((2**16, 2**16), BF16)}
    state = optimizer.init(params)
    stacked = jax.vmap(optimizer.init)({"w": jnp.ones((3, 2, 2))})
    updates, after = optimizer.update(params, state, params)
    # Equinox adds without a cast, so that the parameters become float32. Without an
    # error they would come back without their remainders.
    widened = eqx.apply_updates(params, updates)
    shape = r"params\['w'\] is bfloat16 of shape \(2, 3\), and its remainder has shape"
    keeps = r"params\['w'\].* Was it bfloat16\? optax\.apply_updates keeps the dtype"
    several = r"several optimizers, as made by jax\.vmap"
    update, back, into = optimizer.update, to_float32_parameters, to_bfloat16_parameters
    report = partial(jax.eval_shape, lost_updates_report)
    for message, call, *arguments in (
        ("remainder must be 'int16', 'int8' or None", make, SGD, "int4"),
        (r"inner must be an optimizer like optax\.sgd", make, optax.sgd),
        (r"\['w'\] is float16", optimizer.init, half),
        ("needs params", update, params, state),
        (
            r"BFloat16ParametersState, .*wrap a state of inner: ",
            update,
            params,
            (),
            params,
        ),
        (several, update, params, stacked, params),
        (several, into, {"w": jnp.ones((3, 2, 2))}, stacked),
        ("updates must be a tree like params", update, other, state, params),
        (shape, update, longer, state, longer),
        (shape, back, longer, state),
        (keeps, update, params, after, widened),
        (keeps, back, widened, after),
        ("the remainder must be a tree like params", back, other, state),
        ("no BFloat16ParametersState", back, params, SGD.init(params)),
        (r"\['w'\] is float32 of shape \(3,\), and its", into, vector, state),
        ("mask must be a tree like params, or", into, wide, state, {"v": True}),
        (r"mask\['w'\] must be a boolean", into, wide, state, {"w": 1}),
        (r"updates\['w'\] has shape \(3,\)", report, wide, vector),
        ("updates must be a tree like params", report, wide, other),
        (r"params\['w'\] must be bfloat16, float32 or", report, half, half),
        (r"params\['w'\] has 2³² elements or more", report, huge, huge),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(*arguments)


# The report on lost updates: it counts what Optax's sum loses, and says it in words.


@pytest.mark.parametrize("u_dtype", [BF16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_what_optax_loses_is_counted(dtype: Any, u_dtype: Any) -> None:
    params = {"w": normal(64, 128, seed=0).astype(dtype)}
    # From none to thrice half a unit in the last place, and 0 for a fifth.
    rng = np.random.default_rng(1)
    size = rng.uniform(0, 3, (64, 128)) * rng.choice([0, 1, 1, 1, 1], (64, 128))
    unit = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    updates = {"w": (size * unit * params["w"].astype(F32)).astype(u_dtype)}
    stays = optax.apply_updates(params, updates)["w"] == params["w"]
    counted = updates["w"] != 0
    share = float(np.mean(stays[counted]))
    assert 0.1 < share < 0.9
    for report in (lost_updates_report, jax.jit(lost_updates_report)):
        found = report(params, updates).leaves["['w']"]
        assert float(found.lost) == pytest.approx(share, rel=1e-6)
        assert int(found.elements) == int(counted.sum())


def test_a_share_is_of_all_elements_that_count() -> None:
    # Not over None, nor over what is not finite.
    infinite = jnp.array([jnp.inf, -jnp.inf, jnp.nan] + 7 * [1.0])
    params = {"a": jnp.ones(21, BF16), "b": infinite, "c": None, "d": jnp.ones(8)}
    small = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        found = lost_updates_report(params, small | {"d": jnp.zeros(8)}).on_host()
        assert (found.overall.lost, found.overall.elements) == (0.75, 28)
        assert np.isnan(found.leaves["['d']"].lost)
        assert "nan" in found.table()
    found = lost_updates_report(params, small | {"a": None})
    assert list(found.leaves) == ["['b']", "['d']"]


def test_the_report_in_words_and_numbers() -> None:
    params = jnp.ones(100, BF16)

    def of(*updates: float) -> Any:
        return lost_updates_report(params, jnp.resize(jnp.array(updates), (100,)))

    assert of(0.0).verdict() == "All updates are 0: there is nothing to say."
    assert of(1e-3).verdict() == (
        "100% of the updates are lost when they are added to the parameters; "
        "adam3_optax.bfloat16_parameters keeps what is rounded off."
    )
    assert of(1.01 * 2**-7).verdict() == (
        "The updates arrive: fewer than 1% of them are lost."
    )
    some = of(1e-3, 1.0)
    assert some.scalars() == {"updates/lost": 0.5, "updates/elements": 100.0}
    assert some.table().splitlines() == [
        "leaf    updates   lost",
        "params      100  50.0%",
        "all         100  50.0%",
    ]


def test_the_report_leaves_shards_where_they_are() -> None:
    where = NamedSharding(mesh_of(AxisType.Auto), P("data", "model"))
    arguments = normal(64, 128, seed=0).astype(BF16), jnp.full((64, 128), 1e-3)
    placed = jax.device_put(arguments, where)
    compiled = jax.jit(lost_updates_report).lower(*placed).compile()
    assert "[64,128]" not in str(compiled.as_text())
    want = lost_updates_report(*arguments)
    assert compiled(*placed).scalars() == want.scalars()


def test_the_report_says_what_the_wrapper_saves() -> None:
    params = normal(64, 64, seed=0).astype(BF16)
    optimizer = bfloat16_parameters(adam3w(1e-4))
    state = optimizer.init(params)
    u, after = jax.jit(optimizer.update)(params, state, params)
    before = to_float32_parameters(params, state)
    difference = to_float32_parameters(optax.apply_updates(params, u), after) - before
    assert float(lost_updates_report(params, difference).overall.lost) > 0.8
    assert float(lost_updates_report(params, u).overall.lost) == 0


@pytest.mark.usefixtures("on_cpu")
def test_the_report_is_exported_with_sizes_that_are_not_known_yet() -> None:
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 3"), BF16)
    lost = jax.jit(lambda *x: lost_updates_report(*x).overall.lost)
    params = jnp.ones((4, 3), BF16)
    exported = jax.export.export(lost)(shape, shape)
    assert float(exported.call(params, params * 1e-3)) == 1.0


@pytest.mark.parametrize("remainder", ["int16", "int8", None])
def test_an_update_leads_to_a_bfloat16_exactly(remainder: Any) -> None:
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    params = jnp.linspace(0.5, 2.0, 4096).astype(BF16)
    gradients = jnp.linspace(-1.0, 1.0, 4096)
    state = optimizer.init(params)
    for _ in range(2):  # the second step starts from remainders that are not 0
        updates, state = optimizer.update(gradients, state, params)
        exact = params.astype(F32) + updates
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(exact, params.astype(F32))
