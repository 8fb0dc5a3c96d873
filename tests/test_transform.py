"""`scale_by_adam3` over trees: types, buffers, counts, debugging flags, errors.

The arithmetic is in `test_rule.py`. `adam3w` stands for the whole chain; where the form
cannot matter, it is the default.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import adam3_optax
from adam3_optax import adam3, adam3w, scale_by_adam3, third_moment_report
from tests import settings
from tests.settings import BF16, F32, F64, PARAMS, STORAGE, first_step, moments, types

A, B = jnp.array([1.0, -2.0]), jnp.array(0.5)
SMALLEST = STORAGE["smallest"]


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


# Types.


@pytest.mark.parametrize("factory", [scale_by_adam3, adam3w])
@settings.EACH_STORAGE
def test_types_never_drift(factory: Any, storage: Any) -> None:
    # Or neither `scan` nor `cond` nor a donated buffer takes the state. The chain
    # widens the gradients before `scale_by_adam3` sees them.
    optimizer = factory(**storage)
    for p, g in itertools.product((BF16, jnp.float16, F32), repeat=2):
        params, gradients = cast(PARAMS, p), cast(PARAMS, g)
        state = optimizer.init(params)
        # Shapes are enough to know them.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        assert types(jax.eval_shape(optimizer.init, shapes)) == types(state)
        updates, after = jax.eval_shape(optimizer.update, gradients, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(gradients)


def test_types_are_each_leafs_own(x64: None) -> None:
    params = {"half": jnp.ones(2, BF16), "one": jnp.ones(2, F32), "two": jnp.ones(2)}
    for setting, wide in ((None, F64), ("float32", F32)):
        updates, state = first_step(adam3w(v_dtype=setting), params)
        assert types(updates) == types(params)
        for moment, dtype in zip(moments(state), (F64, wide, F64), strict=True):
            assert [moment[k].dtype for k in params] == [F32, F32, dtype]


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 8), (jnp.float16, 11)])
def test_narrow_gradients_are_computed_in_float32(dtype: Any, bits: int) -> None:
    # In float16 eps is 0, and so are most g². In bfloat16 .999·v is v.
    optimizer = scale_by_adam3()
    gradients = jnp.array([[0.0, 6e-8, 1e-4, -1.0], [0.0, 0.0, -1e-3, 3.0]], dtype)
    narrow = wide = optimizer.init(gradients[0])
    for g in gradients:
        u, narrow = optimizer.update(g, narrow)
        exact, wide = optimizer.update(g.astype(F32), wide)
        settings.assert_close(narrow, wide, rtol=1e-6)
        settings.assert_close(u.astype(F32), exact, rtol=2.0**-bits)


@settings.each_storage("default", "float8", "smallest")
@pytest.mark.parametrize("state_of", [F32, F64])
def test_gradients_of_another_width_than_the_state(
    storage: Any, state_of: Any, x64: None
) -> None:
    # Float64 gradients on a float32 state, and the reverse: computed in float64, stored
    # as the state is, and returned as the gradients are.
    optimizer, of = scale_by_adam3(**storage), F64 if state_of == F32 else F32
    state = optimizer.init(cast(PARAMS, state_of))
    updates, after = optimizer.update(cast(settings.GRADIENTS[0], of), state)
    assert types(after) == types(state)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(of)}
    same, _ = first_step(optimizer, settings.GRADIENTS[0])
    settings.assert_close(cast(updates, F32), same, rtol=1e-4)


def test_weak_types_never_flip() -> None:
    # `zeros_like` of a weakly typed parameter is weak, and the second step would
    # compile again.
    optimizer, params = adam3w(), {"w": jnp.asarray(1.0), "b": jnp.asarray(-2.0)}
    update: Any = jax.jit(optimizer.update)
    before = state = optimizer.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert types(state) == types(before)
    assert update._cache_size() == 1


# Buffers.


def test_every_buffer_can_be_donated() -> None:
    # One tree of zeros for m, v and s could not.
    for storage in STORAGE.values():
        state = adam3w(**storage).init(PARAMS)
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((PARAMS, state))]
        assert len(set(buffers)) == len(buffers)


@settings.each_storage("default", "mixed", "smallest")
def test_a_gradient_of_none_leaves_its_parameter_alone(storage: Any) -> None:
    # The parameters are whole; the gradients have None where nothing is trained.
    optimizer = scale_by_adam3(**storage)
    params = {"trained": A, "frozen": jnp.ones((2, 16)), "integer": jnp.arange(3)}
    before = optimizer.init(params)
    gradients = {"trained": A, "frozen": None, "integer": None}
    updates, state = optimizer.update(gradients, before, params)
    assert updates["frozen"] is updates["integer"] is None
    want, _ = first_step(optimizer, {"trained": A})
    settings.assert_same(updates["trained"], want["trained"])
    assert types(state) == types(before)
    for x, y in zip(moments(state), moments(before), strict=True):
        settings.assert_same((x["frozen"], x["integer"]), (y["frozen"], y["integer"]))
        assert x["trained"] is not y["trained"]


# The count, and what is meant for others.


def test_the_count_saturates() -> None:
    # One that wraps to -2³¹ makes 1 - bᵗ negative and the root NaN.
    optimizer, last = scale_by_adam3(), jnp.int32(2**31 - 1)
    state = optimizer.init(A)._replace(count=last - 1)
    for _ in range(2):
        updates, state = optimizer.update(A, state)
        assert state.count == last
        settings.assert_finite((updates, state))


def test_extra_arguments_are_ignored() -> None:
    optimizer = adam3w()
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    extra = optimizer.update(A, optimizer.init(A), A, value=1.0, grad=A, seed=object())
    settings.assert_same(extra, first_step(optimizer, A))


# Modes of JAX.

FLAGS = "debug_nans", "debug_infs", "enable_checks", "disable_jit", "check_tracer_leaks"


@pytest.mark.parametrize(
    "flag",
    [*FLAGS[:3], *(pytest.param(x, marks=pytest.mark.slow) for x in FLAGS[3:])],
)
def test_debugging_flags_find_nothing(flag: str) -> None:
    # A run, eager and jitted, and all that can be done with its state, in all formats.
    known: Any = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
    known |= {"third_moment": "cubic"}
    params = {"w": PARAMS["w"]}
    gradients = {"w": settings.GRADIENTS[0]["w"].at[0].set(0.0)}
    with getattr(jax, flag)(True):
        optimizer = adam3w(0.1, tau=float("inf"), eps_root=1e-8, **STORAGE["mixed"])
        state = optimizer.init(params)
        assert "nothing to say" in third_moment_report(state, **known).verdict()
        for update in (optimizer.update, jax.jit(optimizer.update)):
            updates, state = update(gradients, state, params)
        settings.assert_finite(updates)
        adam = optax.ScaleByAdamState(state[0].count, *(params, params))
        for name in ("bfloat16", "float8", "smallest"):
            adam3_optax.from_adam_state(adam, **STORAGE[name])
            state = adam3_optax.convert_state(state, **STORAGE[name])
        update = jax.jit(adam3w(0.1, **SMALLEST).update)
        settings.assert_finite(update(gradients, state, params)[0])
        third_moment_report(state, **known).table()


# Errors.

TWO = {"a": A, "b": B}
IMAGINARY = {"a": {"z": A.astype(jnp.complex64)}}
TREE = "tree does not fit the state's m"
# What init gets, what update gets, and what is said.
MISFITS: list[tuple[Any, Any, str]] = [
    (IMAGINARY, None, r"params\['a'\]\['z'\] .*split_real_and_imag"),
    ({"a": {"z": A}}, IMAGINARY, r"^updates\['a'\]\['z'\] must be"),
    (TWO, {"a": A.astype(int), "b": B}, r"^updates\['a'\] must be"),
    *((TWO, x, TREE) for x in ({"a": A}, {"a": A, "c": B}, (A, B), {**TWO, "c": B})),
    (PARAMS, {**PARAMS, "w": A}, r"^updates\['w'\] has shape .2,., .* m has .4, 32."),
    ({"a": None, "b": B}, TWO, r"^updates\['a'\] has shape .* m has None"),
]


@pytest.mark.parametrize(("params", "gradients", "message"), MISFITS)
def test_what_does_not_fit_is_refused(
    params: Any, gradients: Any, message: str
) -> None:
    for optimizer in (scale_by_adam3(), adam3w(**STORAGE["mixed"])):
        with pytest.raises(ValueError, match=message):
            optimizer.update(gradients, optimizer.init(params), gradients)


@settings.each_storage(*(name for name in STORAGE if name != "default"))
def test_a_state_that_is_stored_in_another_way_is_refused(storage: Any) -> None:
    made, used = scale_by_adam3(), scale_by_adam3(**storage)
    for one, other in ((made, used), (used, made)):
        with pytest.raises(ValueError, match=r"_dtype says\. .*convert_state"):
            other.update(PARAMS, one.init(PARAMS))


def test_a_state_of_another_optimizer_is_named() -> None:
    for optimizer, other, got in (
        (scale_by_adam3(), adam3(), "tuple"),
        (adam3w(), optax.adamw(1e-3), "ScaleByAdamState"),
        (adam3_optax.bfloat16_parameters(adam3w()), adam3w(), "tuple"),
    ):
        with pytest.raises(TypeError, match=f"must be a .*, got {got}. Was it made"):
            optimizer.update(PARAMS, other.init(PARAMS), PARAMS)


# Shapes that are not known yet.


@pytest.mark.usefixtures("on_cpu")
@settings.EACH_STORAGE
def test_a_step_exports_with_symbolic_shapes(storage: Any) -> None:
    # Called with numbers, it is the plain step bit for bit.
    shape = jax.export.symbolic_shape("rows, columns")
    symbolic = {"w": jax.ShapeDtypeStruct(shape, F32)}
    optimizer = adam3w(0.1, **storage)
    shapes = jax.eval_shape(optimizer.init, symbolic)
    update = jax.jit(optimizer.update)
    exported = jax.export.export(update)(symbolic, shapes, symbolic)
    params = {"w": PARAMS["w"]}
    state = optimizer.init(params)
    for g in settings.GRADIENTS[:3]:
        got = exported.call({"w": g["w"]}, state, params)
        want = update({"w": g["w"]}, state, params)
        settings.assert_same(got, want)
        _, state = want
