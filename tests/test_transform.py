"""`scale_by_adam3` over trees: types, compiles, donation, counts, derivatives, errors.

The arithmetic is in `test_rule.py`. `adam3w` stands for the whole chain; where the form
cannot matter, it is the default.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import adam3, adam3w, bfloat16_parameters, scale_by_adam3
from tests.settings import (
    BF16,
    EACH_FORM,
    EACH_STORAGE,
    F16,
    F32,
    F64,
    MIXED,
    PARAMS,
    STORAGE,
    assert_close,
    assert_finite,
    assert_same,
    compiles,
    each_storage,
    first_step,
    moments,
    scan,
    structure,
    types,
)

# The chain widens the gradients before `scale_by_adam3` sees them.
FACTORIES = pytest.mark.parametrize("factory", [scale_by_adam3, adam3w])
A, B = jnp.array([1.0, -2.0]), jnp.array(0.5)


# Types.


@FACTORIES
@EACH_STORAGE
def test_types_never_drift(factory: Any, storage: Any) -> None:
    # Or neither `scan` nor `cond` nor a donated buffer takes the state.
    optimizer = factory(**storage)
    for p, g in itertools.product((BF16, F16, F32), repeat=2):
        params, gradients = (
            {k: jnp.ones(x.shape, dtype) for k, x in PARAMS.items()} for dtype in (p, g)
        )
        state = optimizer.init(params)
        # Shapes are enough to know them.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        assert types(jax.eval_shape(optimizer.init, shapes)) == types(state)
        updates, after = jax.eval_shape(optimizer.update, gradients, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(gradients)


DTYPES = {None: F32, "float32": F32, "bfloat16": BF16, "float8": jnp.float8_e4m3fn}


@each_storage(*STORAGE)
def test_every_leaf_of_a_moment_is_one_array_like_its_parameter(storage: Any) -> None:
    params = {"w": jnp.ones((3, 5)), "b": A, "c": B, "e": jnp.ones((0, 4))}
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init(params)
    _, after = jax.eval_shape(optimizer.update, params, state)
    for one in (state, after):
        for name, moment in zip("mvs", moments(one), strict=False):
            setting = storage.get(f"{name}_dtype")
            is_code = (name, setting) == ("v", "float8")
            dtype = jnp.uint8 if is_code else DTYPES[setting]
            expected = jax.tree.map(lambda x, d=dtype: jnp.zeros(x.shape, d), params)
            assert types(moment) == types(expected)


def test_moments_of_narrow_parameters_rest_in_float32() -> None:
    for dtype in (BF16, F16):
        state = scale_by_adam3().init(jnp.ones(2, dtype))
        assert [x.dtype for x in moments(state)] == [F32] * 3
        assert types(state.count) == types(jnp.int32(0))


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 8), (F16, 11)])
def test_narrow_gradients_are_computed_in_float32(dtype: Any, bits: int) -> None:
    # In float16 eps is 0, and so are most g². In bfloat16 .999·v is v.
    optimizer = scale_by_adam3()
    gradients = jnp.array([[0.0, 6e-8, 1e-4, -1.0], [0.0, 0.0, -1e-3, 3.0]], dtype)
    narrow = wide = optimizer.init(gradients[0])
    for g in gradients:
        u, narrow = optimizer.update(g, narrow)
        exact, wide = optimizer.update(g.astype(F32), wide)
        assert_close(narrow, wide, rtol=1e-6)
        assert_close(u.astype(F32), exact, rtol=2.0**-bits)
    assert u.dtype == dtype


def test_types_are_each_leafs_own(x64: None) -> None:
    kinds = {"half": BF16, "single": F32, "double": F64}
    params = {name: jnp.ones(2, kind) for name, kind in kinds.items()}
    updates, state = first_step(adam3w(), params)
    assert types(updates) == types(params)
    for moment in moments(state):
        got = {k: x.dtype for k, x in moment.items()}
        assert got == {"half": F32, "single": F32, "double": F64}
    # Gradients in another type change neither.
    narrow = jax.tree.map(lambda p: jnp.ones(2, BF16), params)
    updates, after = adam3w().update(narrow, state, params)
    assert types(updates) == types(narrow)
    assert types(after) == types(state)


@EACH_FORM
def test_nothing_is_promoted_implicitly(form: Any) -> None:
    # Promotion is strict in all tests. Traced hyperparameters are not weakly typed.
    params = {"matrix": jnp.ones((2, 3)), "scalar": B, "half": jnp.ones(2, F16)}
    make = optax.inject_hyperparams(adam3w, hyperparam_dtype=F32)
    for optimizer in (
        adam3w(third_moment=form),
        make(third_moment=form),
        make(third_moment=form, **STORAGE["float8"]),
    ):
        state = optimizer.init(params)
        jax.eval_shape(optimizer.update, params, state, params)


def test_weak_types_never_flip() -> None:
    # `zeros_like` of a weakly typed parameter is weak, and the second step would
    # compile again.
    optimizer, params = adam3w(), {"w": jnp.asarray(1.0), "b": jnp.asarray(-2.0)}
    update = jax.jit(optimizer.update)
    before = state = optimizer.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert types(state) == types(before)
    assert compiles(update) == 1


@EACH_STORAGE
def test_mixed_types_scan_branch_and_donate(storage: Any) -> None:
    optimizer, params = adam3w(**storage), jnp.ones((2, 16), BF16)
    gradients, state = jnp.ones((3, 2, 16)), optimizer.init(params)

    def step(state: Any, g: jax.Array) -> tuple[Any, None]:
        branch = jax.lax.cond(
            g[0, 0] > 0, lambda: optimizer.update(g, state, params)[1], lambda: state
        )
        return branch, None

    steps = jax.jit(lambda s: jax.lax.scan(step, s, gradients)[0], donate_argnums=0)
    before = types(state)
    assert types(steps(state)) == before


# Buffers.


@EACH_STORAGE
def test_every_buffer_can_be_donated(storage: Any) -> None:
    # One tree of zeros for m, v and s could not.
    optimizer, params = adam3w(**storage), jax.tree.map(jnp.copy, PARAMS)
    state = optimizer.init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(*step(params, state))
    assert_finite(params)


# XLA on a GPU needs eight.
@pytest.mark.usefixtures("on_cpu")
def test_a_step_out_of_order_needs_twelve_bytes_a_parameter() -> None:
    # What users are told: (gradients, state, params) -> (params, state) pairs the new
    # parameters with the old m, m with v, and so on.
    optimizer, size = adam3w(), 4096

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.ShapeDtypeStruct((size,), F32)
    state = jax.eval_shape(optimizer.init, params)
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params)
    found: Any = lowered.compile().memory_analysis()
    assert found.temp_size_in_bytes / size == pytest.approx(12, abs=0.5)


# Trees.


class Layer(NamedTuple):
    w: Any
    b: Any


TREES: dict[str, Any] = {
    "array": A,
    "scalar": B,
    "nested tuples": ((A, (B,)), (), A),
    "four-tuple": (A, B, B, A),
    "named tuple": Layer(A, (B, Layer([B], {"x": A}))),
    "None": {"a": A, "b": None, "c": [None, B]},
    "MaskedNode": {"a": optax.MaskedNode(), "b": A, "c": (optax.MaskedNode(),)},
    "empty tuple": (),
    "empty dict": {},
    "zero size": {"a": jnp.zeros((0, 3)), "b": A, "c": jnp.zeros((2, 0))},
}


@each_storage("default", "float8", "adam")
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees_of_all_kinds(tree: Any, storage: Any) -> None:
    optimizer = adam3w(lam=0.1, **storage)
    state = optimizer.init(tree)
    for _ in range(2):
        updates, state = optimizer.update(tree, state, tree)
    for result in (updates, *moments(state)):
        assert structure(result) == structure(tree)
    if "m_dtype" in storage:  # a leaf's place in the tree tells how it is rounded
        return
    # Every leaf is treated as if it were alone.
    for u, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True):
        alone = optimizer.init(leaf)
        for _ in range(2):
            expected, alone = optimizer.update(leaf, alone, leaf)
        np.testing.assert_array_equal(u, expected)


@each_storage("default", "mixed")
def test_a_gradient_of_none_leaves_its_parameter_alone(storage: Any) -> None:
    # The parameters are whole; the gradients have None where nothing is trained.
    optimizer = adam3w(**storage)
    params = {"trained": A, "frozen": jnp.ones((2, 16)), "other": B}
    before = optimizer.init(params)
    updates, state = optimizer.update(
        {"trained": A, "frozen": None, "other": None}, before, params
    )
    assert updates["frozen"] is updates["other"] is None
    assert_same(updates["trained"], first_step(optimizer, {"trained": A})[0]["trained"])
    for x, y in zip(moments(state), moments(before), strict=True):
        assert_same((x["frozen"], x["other"]), (y["frozen"], y["other"]))
        assert x["trained"] is not y["trained"]


def test_integer_parameters_may_be_frozen() -> None:
    params = {"trained": A, "integer": jnp.arange(3)}
    optimizer = scale_by_adam3()
    gradients = {"trained": A, "integer": None}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["trained"], first_step(optimizer, A)[0])


# The count, and what is meant for others.


def test_the_count_saturates() -> None:
    # One that wraps to -2³¹ makes 1 - bᵗ negative and the root NaN.
    optimizer, last = scale_by_adam3(), jnp.int32(2**31 - 1)
    state = optimizer.init(A)._replace(count=last - 1)
    for _ in range(2):
        updates, state = optimizer.update(A, state)
        assert state.count == last
        assert_finite((updates, state))


def test_extra_arguments_are_ignored() -> None:
    optimizer = adam3w()
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    extra = optimizer.update(A, optimizer.init(A), A, value=1.0, grad=A, seed=object())
    assert_same(extra, first_step(optimizer, A))


# Derivatives through steps. Those at one step are in `test_rule.py`.


def final(optimizer: Any, start: jax.Array, *signs: float) -> jax.Array:
    """Returns the sum of parameters after steps on gradients that are the start."""
    gradients = jnp.stack([sign * start for sign in signs])
    return scan(optimizer, start, gradients)[0].sum()


@EACH_FORM
def test_derivatives_of_steps_near_zero_gradient(form: Any) -> None:
    # Where the value is fine, but the derivative of a quotient or root divides by v² or
    # by a root of v, which underflow sooner. All powers of ten are tried, and 0, where
    # the root has an infinite slope.
    optimizer = adam3w(eps_root=1e-8, third_moment=form)
    sizes = jnp.append(10.0 ** jnp.arange(-37, 12, dtype=F32), jnp.zeros(1))
    assert_finite(jax.jit(jax.grad(lambda x: final(optimizer, x, 1, 1, 1)))(sizes))


@EACH_FORM
def test_derivatives_with_a_traced_infinite_tau(form: Any) -> None:
    # inf times the zero derivative of a bound that does not act is NaN; a Python inf is
    # seen, an injected one is not.
    def loss(x: jax.Array, tau: jax.Array) -> jax.Array:
        optimizer = adam3w(eps_root=1e-8, tau=tau, third_moment=form)
        return final(optimizer, x, 1, -1, 1)

    derivative = jax.jit(jax.grad(loss))
    assert_finite(derivative(jnp.array([0.0, 1.0, -2.0]), jnp.float32("inf")))


@pytest.mark.parametrize("name", ["m_dtype", "v_dtype", "s_dtype"])
def test_a_float8_state_has_no_derivative(name: str) -> None:
    # Its tangents would be float8, too: NaN after a few steps, and no error.
    storage: Any = {name: "float8"}
    optimizer = adam3w(eps_root=1e-8, **storage)

    def loss(x: jax.Array, stop: bool) -> jax.Array:
        params, state = x, optimizer.init(x)
        for _ in range(2):
            g = jax.lax.stop_gradient(params) if stop else params
            updates, state = optimizer.update(g, state, params)
            params += updates
        return params.sum()

    derivative = jax.grad(loss)
    for function in (derivative, jax.jit(derivative, static_argnums=1)):
        with pytest.raises(TypeError, match="in 'float32' or 'bfloat16'"):
            function(A, False)
    # A derivative that does not go through the state is none of it.
    np.testing.assert_allclose(derivative(A, True), 1.0, rtol=1e-6)


# Errors.


@FACTORIES
def test_complex_parameters_are_refused(factory: Any) -> None:
    params = {"w": {"re": A, "z": A.astype(jnp.complex64)}}
    with pytest.raises(
        ValueError, match=r"params\['w'\]\['z'\] .*optax\.contrib\.split_real_and_imag"
    ):
        factory().init(params)


@FACTORIES
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_gradients_of_other_types_are_refused(factory: Any, dtype: Any) -> None:
    state = factory().init({"w": A})
    with pytest.raises(ValueError, match=r"^updates\['w'\] must be .* got "):
        factory().update({"w": A.astype(dtype)}, state, {"w": A})


@pytest.mark.parametrize("storage", [{}, MIXED], ids=["default", "mixed"])
@pytest.mark.parametrize(
    "gradients",
    [{"a": A}, {"a": A, "c": B}, (A, B), {"a": A, "b": B, "c": B}],
)
def test_a_tree_that_does_not_fit_is_refused(gradients: Any, storage: Any) -> None:
    # Matched by position, leaves of another tree would take each other's moments.
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init({"a": A, "b": B})
    with pytest.raises(ValueError, match="tree does not fit the state's m"):
        optimizer.update(gradients, state)


@EACH_STORAGE
def test_a_shape_that_does_not_fit_is_refused(storage: Any) -> None:
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init({"w": jnp.ones((4, 16))})
    with pytest.raises(
        ValueError, match=r"^updates\['w'\] has shape \(2, 16\), .* m has \(4, 16\)"
    ):
        optimizer.update({"w": jnp.ones((2, 16))}, state)


@EACH_STORAGE
def test_a_gradient_where_the_state_has_none_is_refused(storage: Any) -> None:
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init({"w": None, "b": A})
    with pytest.raises(ValueError, match=r"^updates\['w'\] has shape .* m has None"):
        optimizer.update({"w": A, "b": A}, state)


@each_storage(*(name for name in STORAGE if name != "default"))
def test_a_state_that_is_stored_in_another_way_is_refused(storage: Any) -> None:
    made, used = scale_by_adam3(), scale_by_adam3(**storage)
    for one, other in ((made, used), (used, made)):
        with pytest.raises(ValueError, match=r"_dtype says\. .*convert_state"):
            other.update(PARAMS, one.init(PARAMS))


def test_a_state_of_another_optimizer_is_named() -> None:
    params = {"w": jnp.ones(3)}
    for optimizer, other, got in (
        (scale_by_adam3(), adam3(), "tuple"),
        (adam3w(), optax.adamw(1e-3), "ScaleByAdamState"),
        (bfloat16_parameters(adam3w()), adam3w(), "tuple"),
    ):
        with pytest.raises(TypeError, match=f"must be a .*, got {got}. Was it made"):
            optimizer.update(params, other.init(params), params)
