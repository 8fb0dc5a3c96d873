"""JAX's debugging flags, double precision, and the edges of shapes and dtypes."""

from itertools import permutations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import (
    adam3w,
    convert_state,
    from_adam_state,
    scale_by_adam3,
    state_shardings,
    third_moment_report,
)
from adam3_optax._rounding import random_bits
from tests.settings import (
    EACH_STORAGE,
    F32,
    F64,
    GRADIENTS,
    PARAMS,
    STORAGE,
    assert_close,
    assert_finite,
    assert_same,
    each_storage,
    first_step,
    types,
)

KNOWN: Any = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
SMALLEST = STORAGE["smallest"]

FLAGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "checking_leaks": jax.checking_leaks,
    "disable_jit": jax.disable_jit,
}
SLOW_FLAGS = "checking_leaks", "disable_jit"


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(x, id=name, marks=[pytest.mark.slow] * (name in SLOW_FLAGS))
        for name, x in FLAGS.items()
    ],
)
def test_debugging_flags_find_nothing(flag: Any) -> None:
    # A run, eager and jitted, and all that can be done with its state, in all formats.
    known = KNOWN | {"third_moment": "cubic"}
    params, gradients = {"w": PARAMS["w"]}, {"w": GRADIENTS[0]["w"].at[0].set(0.0)}
    with flag():
        optimizer = adam3w(0.1, tau=float("inf"), eps_root=1e-8, **STORAGE["mixed"])
        state = optimizer.init(params)
        report = third_moment_report(state, **known)
        assert "nothing to say" in report.verdict()
        for update in (optimizer.update, jax.jit(optimizer.update)):
            updates, state = update(gradients, state, params)
        assert_finite(updates)
        adam = optax.ScaleByAdamState(state[0].count, *(params, params))
        for name in ("bfloat16", "float8", "smallest"):
            from_adam_state(adam, **STORAGE[name])
            state = convert_state(state, **STORAGE[name])
        update = jax.jit(adam3w(0.1, **STORAGE["smallest"]).update)
        assert_finite(update(gradients, state, params)[0])
        third_moment_report(state, **known).table()


# The dtypes of parameters and gradients, and how moments are stored.
WIDTHS = [
    *product([F32], [F64], ("default", "bfloat16", "float8", "mixed", "adam")),
    *product([F64], [F32], ("default", "bfloat16", "float8", "mixed", "adam")),
    *product([F64], [F64], ("float8", "smallest")),
]


@pytest.mark.parametrize(("state_of", "of", "name"), WIDTHS)
def test_gradients_of_another_width_than_the_state(
    state_of: Any, of: Any, name: str, x64: None
) -> None:
    # Float64 gradients on a float32 state, and the reverse: computed in float64, stored
    # as the state is, and returned as the gradients are.
    params = jax.tree.map(lambda x: x.astype(state_of), PARAMS)
    gradients = jax.tree.map(lambda x: x.astype(of), GRADIENTS[0])
    optimizer = scale_by_adam3(**STORAGE[name])
    state = optimizer.init(params)
    updates, after = optimizer.update(gradients, state)
    assert types(after) == types(state)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(of)}
    same, _ = first_step(optimizer, GRADIENTS[0])
    for u, x in zip(jax.tree.leaves(updates), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(u, x, rtol=1e-4, atol=1e-6)


@each_storage("default", "adam")
def test_narrow_gradients_are_computed_in_the_width_of_a_wide_state(
    storage: Any, x64: None
) -> None:
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    optimizer = scale_by_adam3(b3=0.9, **storage)
    narrow = wide = optimizer.init(params)
    for g in GRADIENTS[:3]:
        _, narrow = optimizer.update(g, narrow)
        _, wide = optimizer.update(jax.tree.map(lambda x: x.astype(float), g), wide)
    assert_close(narrow, wide, rtol=1e-13)


@EACH_STORAGE
def test_a_count_of_64_bits_stays_one(storage: Any, x64: None) -> None:
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init(PARAMS)
    wide = state._replace(count=state.count.astype(jnp.int64))
    got, after = optimizer.update(GRADIENTS[0], wide)
    want, _ = optimizer.update(GRADIENTS[0], state)
    assert after.count.dtype == jnp.int64
    assert_same(got, want)


def test_float8_of_an_empty_leaf() -> None:
    for shape in ((4, 0), (0, 32), (0,)):
        params = {"empty": jnp.zeros(shape), "w": PARAMS["w"]}
        updates, state = first_step(scale_by_adam3(**SMALLEST), params)
        assert updates["empty"].shape == shape
        assert types(state) == types(scale_by_adam3(**SMALLEST).init(params))


@each_storage(*STORAGE)
def test_integers_without_gradients_are_no_obstacle(storage: Any) -> None:
    params = {"w": PARAMS["w"], "i": jnp.arange(64).reshape(2, 32)}
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init(params)
    updates, after = optimizer.update({"w": PARAMS["w"], "i": None}, state)
    assert updates["i"] is None
    assert types(after) == types(state)
    assert not after.m["i"].any()


@pytest.mark.parametrize("params", [{}, {"b": None}], ids=["none", "None"])
def test_a_state_without_leaves_fits_every_setting(params: Any) -> None:
    # But not one without an s: that is told by its type.
    float8, wide, adam = (
        scale_by_adam3(**STORAGE[name]) for name in ("float8", "default", "adam")
    )
    for made, used in permutations((float8, wide, adam), 2):
        if adam in (made, used):
            with pytest.raises(ValueError, match="s_dtype says"):
                used.update(params, made.init(params))
        else:
            assert used.update(params, made.init(params))[0] == params


@pytest.mark.parametrize(
    ("moment", "foreign"),
    [("m", jnp.uint8), ("v", jnp.float8_e4m3fn), ("s", jnp.float8_e5m2)],
)
def test_another_type_of_8_bits_is_refused(moment: str, foreign: Any) -> None:
    optimizer = scale_by_adam3(**SMALLEST)
    state = optimizer.init(PARAMS)
    field = jax.tree.map(lambda x: jnp.zeros(x.shape, foreign), PARAMS)
    wrong = state._replace(**{moment: field})
    with pytest.raises(ValueError, match=f"{moment}_dtype says"):
        optimizer.update(GRADIENTS[0], wrong)
    with pytest.raises(ValueError, match=f"the state's {moment} is of"):
        convert_state(wrong)


def test_random_bits_of_a_leaf_beyond_32_bits() -> None:
    # The index is taken modulo 2³²; the strides must not overflow on the way there.
    shape = 2**17, 2**16, 3
    key = np.arange(2, dtype=np.uint32)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    traced = jax.eval_shape(lambda x: random_bits(1, key, x), leaf)
    assert traced.shape == shape
    optimizer = scale_by_adam3(**SMALLEST)
    state = jax.eval_shape(optimizer.init, leaf)
    updates, after = jax.eval_shape(optimizer.update, leaf, state)
    assert updates.shape == after.m.shape == shape


def test_strides_are_taken_modulo_two_to_the_32() -> None:
    # Rows of 2³² + 1 elements would have a stride of 1.
    key = np.arange(2, dtype=np.uint32)
    leaf = jax.ShapeDtypeStruct((2, 2**16, 2**16), jnp.float32)
    text = str(jax.make_jaxpr(lambda x: random_bits(1, key, x))(leaf))
    assert "65536" in text
    assert "4294967296" not in text


@EACH_STORAGE
def test_a_stacked_state_is_named(storage: Any) -> None:
    optimizer = adam3w(**storage)
    many = jax.tree.map(lambda x: jnp.stack([x] * 5), PARAMS)
    state = jax.vmap(optimizer.init)(many)
    with pytest.raises(ValueError, match=r"count has shape \(5,\).*jax.vmap"):
        optimizer.update(many, state, many)
    updates, _ = jax.vmap(optimizer.update)(many, state, many)
    assert updates["w"].shape == (5, 4, 32)


def test_a_stacked_report_is_named() -> None:
    optimizer = scale_by_adam3()
    many = jax.tree.map(lambda x: jnp.stack([x] * 5), PARAMS)
    state = jax.vmap(optimizer.init)(many)

    def report(state: Any) -> Any:
        return third_moment_report(state, **KNOWN, third_moment="cubic")

    with pytest.raises(ValueError, match=r"count has shape \(5,\)"):
        report(state)
    stacked = jax.vmap(report)(state)
    for method in (stacked.scalars, stacked.verdict, stacked.table):
        with pytest.raises(ValueError, match=r"jax\.vmap made several reports"):
            method()
    one = jax.tree.map(lambda x: x[2], stacked)
    assert one.table() == report(jax.tree.map(lambda x: x[2], state)).table()


@pytest.mark.usefixtures("on_cpu")
@each_storage(*STORAGE)
def test_a_step_exports_with_symbolic_shapes(storage: Any) -> None:
    # Called with numbers, it is the plain step bit for bit.
    b, d = jax.export.symbolic_shape("b, d")
    symbolic = {"w": jax.ShapeDtypeStruct((b, d), jnp.float32)}
    optimizer = adam3w(0.1, **storage)
    shapes = jax.eval_shape(optimizer.init, symbolic)
    update = jax.jit(optimizer.update)
    exported = jax.export.export(update)(symbolic, shapes, symbolic)
    params = {"w": PARAMS["w"]}
    got = want = optimizer.init(params)
    for g in GRADIENTS[:3]:
        updates, got = exported.call({"w": g["w"]}, got, params)
        expected, want = update({"w": g["w"]}, want, params)
        assert_same((updates, got), (expected, want))


def test_shardings_of_integers() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = {"w": PARAMS["w"], "i": jnp.arange(3)}
    found = state_shardings(scale_by_adam3(**SMALLEST), params, where)
    assert found.m["i"] == found.v["i"] == where
