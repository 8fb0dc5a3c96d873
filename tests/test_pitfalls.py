"""Twenty-eight ways in which JAX optimizers are known to break, each with its test.

Optax's own Adam (0.2.8) breaks in the first nine. Those tests are functions of any
optimizer: ours must pass them, and Optax's must fail them, which shows that they can
fail. Wrappers of optimizers, checkpoints and frameworks are in `test_interop.py`.
"""

import functools
import inspect
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import BlowUpWarning, adam3, adam3w, scale_by_adam3
from adam3_optax._rule import FORMS as THIRD_MOMENTS
from tests import reference

Make = Callable[..., optax.GradientTransformationExtraArgs]

FORMS = pytest.mark.parametrize("third_moment", THIRD_MOMENTS)
FACTORIES = pytest.mark.parametrize("factory", [scale_by_adam3, adam3, adam3w])
OURS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            functools.partial(factory, third_moment=form),
            id=f"{factory.__name__}-{form}",
        )
        for factory in (scale_by_adam3, adam3, adam3w)
        for form in THIRD_MOMENTS
    ],
)
BF16, F16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64


def first_step(optimizer: Any, gradients: Any, params: Any = None) -> tuple[Any, Any]:
    """Returns the first updates and state; the gradients may stand for parameters."""
    params = gradients if params is None else params
    return optimizer.update(gradients, optimizer.init(params), params)


def types(tree: Any) -> Any:
    """Returns shapes, types, weak types and shardings."""
    return jax.tree.map(jax.typeof, tree)


def compiles(jitted: Any) -> int:
    count: int = jitted._cache_size()
    return count


def structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def assert_finite(tree: Any) -> None:
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def assert_same(got: Any, want: Any) -> None:
    """Asserts equal structures and equal bits."""
    assert structure(got) == structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# 1 to 9: Optax's Adam fails these.


def check_1_float16_keeps_eps(make: Make) -> None:
    # eps = 1e-8 rounds to 0 in float16, and so does g² (optax #1754): 0/0 or x/0.
    gradients = jnp.array([0.0, 6e-8, 1e-4, -1e-4], F16)
    updates, _ = first_step(make(eps=1e-8), gradients, jnp.zeros(4, F16))
    assert updates.dtype == F16
    assert_finite(updates)
    assert updates[0] == 0
    assert abs(updates[2]) == abs(updates[3]) > 0


def check_2_injected_into_bfloat16(make: Make) -> None:
    # Injected hyperparameters take the parameters' type: b2 = .999 becomes 1, and all
    # updates NaN (optax #1414). Either it works, or an error names the remedy.
    params = jnp.ones(3, BF16)
    try:
        updates, _ = first_step(optax.inject_hyperparams(make)(), params)
    except ValueError as error:
        assert "hyperparam_dtype=jnp.float32" in str(error)  # noqa: PT017
    else:
        assert_finite(updates)
    remedy = optax.inject_hyperparams(make, hyperparam_dtype=F32)()
    updates, _ = first_step(remedy, params)
    assert_finite(updates)
    assert updates.dtype == BF16


def check_3_types_never_drift(make: Make) -> None:
    # Moments made in the parameters' type come back in the gradients' (optax #1207),
    # and neither `scan` nor `cond` nor a donated buffer accepts them.
    for p, g in itertools.permutations((BF16, F16, F32), 2):
        optimizer, params = make(), jnp.ones(2, p)
        updates, state = first_step(optimizer, jnp.ones(2, g), params)
        assert types(state) == types(optimizer.init(params))
        assert updates.dtype == g


def check_4_weak_types_never_flip(make: Make) -> None:
    # zeros_like of a weakly typed parameter is weak until the first step, so the second
    # one compiles again (optax #1440).
    optimizer, params = make(), {"w": jnp.asarray(1.0), "b": jnp.asarray(-2.0)}
    update = jax.jit(optimizer.update)
    before = state = optimizer.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert types(state) == types(before)
    assert compiles(update) == 1


def check_5_array_hyperparameters_keep_types(make: Make) -> None:
    # A float32 array or NumPy scalar is no weak type: it turns bfloat16 updates into
    # float32 (optax #1405).
    known = inspect.signature(make).parameters
    for cast in (jnp.float32, np.float32, np.array, jnp.array):
        for name, value in {"learning_rate": 0.1, "b1": 0.5, "eps": 1e-3}.items():
            if name in known:
                made = make(**{name: cast(value)})
                updates, _ = first_step(made, jnp.ones(2, BF16))
                assert updates.dtype == BF16


def check_6_no_implicit_promotion(make: Make) -> None:
    # What mixes types or ranks silently is refused in strict programs.
    params = {
        "matrix": jnp.ones((2, 3)),
        "scalar": jnp.ones(()),
        "half": jnp.ones(2, F16),
    }
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for update in (make().update, jax.jit(make().update)):
            update(params, make().init(params), params)
        # Traced hyperparameters are strongly typed arrays.
        injected = optax.inject_hyperparams(make, hyperparam_dtype=F32)()
        jax.eval_shape(injected.update, params, injected.init(params), params)


def check_7_bfloat16_parameters_keep_slow_averages(make: Make) -> None:
    # In bfloat16, .999·v rounds back to v: the average never decays (optax #1552).
    gradients = jnp.concatenate([jnp.ones(500), jnp.full(1500, 2.0**-4)])

    def last_update(dtype: Any) -> Any:
        optimizer, params = make(), jnp.zeros((), dtype)

        def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
            updates, state = optimizer.update(g, state, params)
            return state, updates

        return jax.lax.scan(step, optimizer.init(params), gradients.astype(dtype))[1][
            -1
        ]

    np.testing.assert_allclose(float(last_update(BF16)), last_update(F32), rtol=1e-2)


def check_8_bias_correction_is_exact(make: Make) -> None:
    # 1 - b2ᵗ as a difference of float32 is off by 1.4e-3 at b2 = .99999; the first
    # update is then not the learning rate.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlowUpWarning)  # b1 = 0 makes d = s = 0
        slow, fast = (make(b1=0.0, b2=b2, eps=0.0) for b2 in (0.99999, 0.0))
    updates, _ = first_step(slow, jnp.ones(1), jnp.zeros(1))
    expected, _ = first_step(fast, jnp.ones(1), jnp.zeros(1))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def check_9_range_is_checked(make: Make) -> None:
    # b1 = 1 divides by zero, b2 = 2 takes the root of a negative number, both silently.
    for name, value in [
        ("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", 2.0), ("b2", float("nan")),
        ("eps", -1.0), ("eps", float("inf")), ("eps_root", -1e-8),
        ("b1", jnp.float32(1.0)), ("b2", np.float64(-1.0)), ("eps", np.array(-1.0)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} must be in"):
            make(**{name: value})


CHECKS: dict[Callable[[Make], None], Any] = {
    check_1_float16_keeps_eps: AssertionError,
    check_2_injected_into_bfloat16: AssertionError,
    check_3_types_never_drift: AssertionError,
    check_4_weak_types_never_flip: AssertionError,
    check_5_array_hyperparameters_keep_types: AssertionError,
    check_6_no_implicit_promotion: jax.dtypes.TypePromotionError,
    check_7_bfloat16_parameters_keep_slow_averages: AssertionError,
    check_8_bias_correction_is_exact: AssertionError,
    check_9_range_is_checked: pytest.fail.Exception,  # of pytest.raises
}


@OURS
@pytest.mark.parametrize("check", CHECKS)
def test_1_to_9_we_pass(check: Callable[[Make], None], make: Make) -> None:
    check(make)


@pytest.mark.parametrize("theirs", [optax.adam, optax.adamw])
@pytest.mark.parametrize(("check", "failure"), CHECKS.items())
def test_1_to_9_optax_fails(
    check: Callable[[Make], None], failure: Any, theirs: Any, standard_promotion: None
) -> None:
    # Under standard promotion, which Optax's Adam needs, so that nothing else fails.
    with pytest.raises(failure):
        check(functools.partial(theirs, learning_rate=0.1))


@FORMS
@FACTORIES
def test_2_narrow_decays_are_refused_traced_or_not(
    factory: Make, third_moment: str
) -> None:
    # Traced, the value is unknown, but the type tells that it is lost.
    def step(b2: jax.Array) -> Any:
        made = factory(b2=b2, third_moment=third_moment)
        return first_step(made, jnp.ones(2, BF16))[0]

    for call in (step, jax.jit(step)):
        with pytest.raises(
            ValueError, match=r"b2 must .* hyperparam_dtype=jnp.float32"
        ):
            call(jnp.asarray(0.999, BF16))
        assert_finite(call(jnp.asarray(0.999, F32)))


@OURS
def test_3_mixed_types_scan_and_branch(make: Make) -> None:
    # What a drifting type breaks: a carry, two branches and a donated buffer.
    optimizer, params = make(), jnp.ones(2, BF16)
    gradients, state = jnp.ones((3, 2)), make().init(params)

    def step(state: Any, g: jax.Array) -> tuple[Any, Any]:
        branch = jax.lax.cond(
            g[0] > 0, lambda: optimizer.update(g, state, params)[1], lambda: state
        )
        return branch, None

    scan = jax.jit(lambda s: jax.lax.scan(step, s, gradients)[0], donate_argnums=0)
    assert optax.tree.get(scan(state), "s").dtype == F32


@pytest.mark.parametrize("name", ["learning_rate", "lam", "tau"])
@pytest.mark.parametrize("how", ["traced", "scheduled"])
def test_6_hyperparameters_take_the_type_of_the_leaf(
    name: str, how: str, x64: None
) -> None:
    # A strongly typed float32 among float64, and among the others.
    params = {"half": jnp.ones(2, F16), "double": jnp.ones(2, F64)}

    def step(value: jax.Array) -> Any:
        number: Any = value if how == "traced" else lambda count: value
        return first_step(adam3w(**{name: number}), params)[0]

    updates = jax.eval_shape(step, jnp.float32(0.1))
    assert {k: u.dtype for k, u in updates.items()} == {"half": F16, "double": F64}


@OURS
def test_7_moments_of_narrow_parameters_rest_in_float32(make: Make) -> None:
    for dtype in (BF16, F16):
        state = make().init(jnp.ones(2, dtype))
        assert [optax.tree.get(state, k).dtype for k in "mvs"] == [F32] * 3


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("b3", 1.0, ValueError),
        ("b3", -1e-3, ValueError),
        ("tau", 0.0, ValueError),
        ("tau", float("nan"), ValueError),
        ("lam", float("inf"), ValueError),
        ("lam", jnp.nan * jnp.ones(()), ValueError),
        ("lam", "0.01", TypeError),
        ("lam", 1j, TypeError),
        ("tau", None, TypeError),
        ("b3", True, TypeError),
        ("b1", lambda count: 0.9, TypeError),
        ("b2", np.array([0.9, 0.99]), ValueError),
        ("third_moment", "fourth", ValueError),
        ("third_moment", None, ValueError),
    ],
)
@FACTORIES
def test_9_our_own_hyperparameters_are_checked(
    factory: Make, name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"{name} must be"):
        factory(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_9_rates_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        adam3w(**{name: value})


# 10. One tree of zeros for m, v and s: "donate the same buffer twice".


@OURS
def test_10_every_buffer_can_be_donated(make: Make) -> None:
    optimizer, params = make(), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state = optimizer.init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(*step(params, state))
    assert_finite(params)


# 11. Trees: tuples taken for leaves, None and MaskedNode taken for arrays.


class Layer(NamedTuple):
    w: Any
    b: Any


A, B = jnp.array([1.0, -2.0]), jnp.array(0.5)
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


@OURS
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_11_trees_of_all_kinds(make: Make, tree: Any) -> None:
    optimizer = make(lam=0.1)
    state = optimizer.init(tree)
    for _ in range(2):
        updates, state = optimizer.update(tree, state, tree)
    for result in (updates, *(optax.tree.get(state, name) for name in "mvs")):
        assert structure(result) == structure(tree)
    # Every leaf is treated as if it were alone.
    for u, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True):
        alone = optimizer.init(leaf)
        for _ in range(2):
            expected, alone = optimizer.update(leaf, alone, leaf)
        np.testing.assert_array_equal(u, expected)


@OURS
def test_11_a_gradient_of_none_leaves_its_parameter_alone(make: Make) -> None:
    # The parameters are whole; the gradients have None where nothing is trained.
    optimizer = make()
    params = {"trained": A, "frozen": B, "integer": jnp.arange(3)}
    before = optimizer.init(params)
    updates, state = optimizer.update(
        {"trained": A, "frozen": None, "integer": None}, before, params
    )
    assert updates["frozen"] is updates["integer"] is None
    np.testing.assert_array_equal(updates["trained"], first_step(optimizer, A)[0])
    for moment, old in zip(
        (optax.tree.get(state, name) for name in "mvs"),
        (optax.tree.get(before, name) for name in "mvs"),
        strict=True,
    ):
        assert_same(
            [moment["frozen"], moment["integer"]], [old["frozen"], old["integer"]]
        )


@OURS
@pytest.mark.parametrize(
    "gradients",
    [{"a": A}, {"a": A, "b": A}, {"a": A, "c": B}, (A, B), {"a": A, "b": B, "c": B}],
)
def test_11_a_tree_that_does_not_fit_is_refused(make: Make, gradients: Any) -> None:
    # Matched by position, leaves of another tree would take each other's moments.
    params = {"a": A, "b": B}
    optimizer = make()
    with pytest.raises(ValueError, match=r"gradients' tree|has shape|structure"):
        optimizer.update(gradients, optimizer.init(params), params)


@FORMS
@pytest.mark.parametrize("factory", [scale_by_adam3, adam3])
@pytest.mark.parametrize(
    "params", [None, FrozenDict(a=A, b=B), {"a": A, "b": optax.MaskedNode()}, [A, B]]
)
def test_11_parameters_that_are_not_needed_may_be_anything(
    factory: Make, third_moment: str, params: Any
) -> None:
    # As with optax.adam: only a decay reads them, so that dicts of gradients go with
    # Flax's FrozenDict of parameters.
    optimizer, gradients = factory(third_moment=third_moment), {"a": A, "b": B}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), params)
    assert_same(updates, first_step(optimizer, gradients)[0])


# 12. Complex parameters: g² of a complex g is no second moment.


@OURS
def test_12_complex_parameters_are_refused(make: Make) -> None:
    params = {"real": A, "complex": jnp.ones(2, jnp.complex64)}
    with pytest.raises(ValueError, match=r"optax\.contrib\.split_real_and_imaginary"):
        make().init(params)
    with pytest.raises(ValueError, match=r"updates\['complex'\].* real floating type"):
        make().update(params, make().init({"real": A, "complex": A}), params)


@OURS
def test_12_complex_parameters_can_be_split(
    make: Make, standard_promotion: None
) -> None:
    # Standard promotion for Optax's wrapper, which adds a complex to a real array.
    params = jnp.array([3.0 - 4.0j, 1.0 + 0.0j])
    updates, _ = first_step(optax.contrib.split_real_and_imaginary(make()), params)
    parts = jnp.stack([params.real, params.imag])
    expected, _ = first_step(make(), parts)
    np.testing.assert_array_equal(updates, expected[0] + 1j * expected[1])


# 13. float64 parameters: moments or arithmetic in float32.


@FORMS
@FACTORIES
def test_13_float64_is_kept(factory: Make, third_moment: str, x64: None) -> None:
    gradients = np.random.default_rng(0).normal(size=(5, 8))
    optimizer = factory(third_moment=third_moment)
    params = jnp.zeros(8, F64)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(jnp.asarray(g), state, params)
    assert [optax.tree.get(state, name).dtype for name in "mvs"] == [F64] * 3
    rate = 1.0 if factory is scale_by_adam3 else -1e-3
    *_, last = reference.steps(gradients, reference.Setting(third_moment))
    np.testing.assert_allclose(updates, rate * last.u, rtol=1e-11)


@OURS
def test_13_types_are_each_leafs_own(make: Make, x64: None) -> None:
    kinds = {"half": BF16, "single": F32, "double": F64}
    params = {name: jnp.ones(2, kind) for name, kind in kinds.items()}
    updates, state = first_step(make(), params)
    assert types(updates) == types(params)
    for name in "mvs":
        got = {k: x.dtype for k, x in optax.tree.get(state, name).items()}
        assert got == {"half": F32, "single": F32, "double": F64}
    # Gradients in another type change neither.
    narrow = jax.tree.map(lambda p: jnp.ones(2, BF16), params)
    updates, after = make().update(narrow, state, params)
    assert types(updates) == types(narrow)
    assert types(after) == types(state)


# 14. A count that wraps to -2³¹ makes 1 - bᵗ negative and the root NaN.


@OURS
def test_14_the_count_saturates(make: Make) -> None:
    optimizer, last = make(), jnp.int32(2**31 - 1)
    state = optax.tree.set(optimizer.init(A), count=last - 1)
    for update in (optimizer.update, jax.jit(optimizer.update), optimizer.update):
        updates, state = update(A, state, A)
        assert optax.tree.get(state, "count") == last
        assert_finite((updates, state))


# 15. State made without regard to the parameters' sharding.


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


@OURS
def test_15_explicit_shardings_are_kept(make: Make) -> None:
    mesh, optimizer = mesh_of(AxisType.Explicit), make()
    specs = [P("x"), P(None, "x"), P("y", "x"), P(("x", "y")), P()]
    params = [
        jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec)) for spec in specs
    ]
    with jax.set_mesh(mesh):
        eager = optimizer.init(params)
        assert types(jax.jit(optimizer.init)(params)) == types(eager)
        for name in "mvs":
            assert types(optax.tree.get(eager, name)) == types(params)
        for update in (optimizer.update, jax.jit(optimizer.update)):
            updates, state = update(params, eager, params)
            assert types(state) == types(eager)
            assert types(updates) == types(params)
            for leaf, spec in zip(optax.tree.get(state, "s"), specs, strict=True):
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@OURS
def test_15_explicit_shardings_need_no_mesh_context(make: Make) -> None:
    # There the count, which belongs to no mesh, becomes replicated; the moments follow
    # the parameters. A state made before can be carried through a scan.
    optimizer = make()
    sharding = NamedSharding(mesh_of(AxisType.Explicit), P(None, "x"))
    params = jax.device_put(jnp.ones((2, 8)), sharding)
    state = optimizer.init(params)

    @jax.jit
    def scan(state: Any, params: Any) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            return optimizer.update(params, state, params)[1], None

        return jax.lax.scan(step, state, length=2)[0]

    for after in (state, scan(state, params), scan(scan(state, params), params)):
        for name in "mvs":
            assert types(optax.tree.get(after, name)) == types(params)


# 16. Abstract initialisation: code that needs values, or arrays.


@OURS
def test_16_shapes_are_enough(make: Make) -> None:
    optimizer, params = make(), {"w": jnp.ones((2, 3), BF16), "b": jnp.ones(3)}
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = optimizer.init(params)
    assert types(optimizer.init(shapes)) == types(state)
    abstract = jax.eval_shape(optimizer.init, shapes)
    assert types(abstract) == types(state)
    updates, abstract = jax.eval_shape(optimizer.update, shapes, abstract, shapes)
    assert types((updates, abstract)) == types((params, state))


# 17. Gradients whose squares or cubes overflow or vanish.


@OURS
@pytest.mark.parametrize("size", [1e30, 1e18, 1e9, 1e-6, 1e-30])
def test_17_gradients_of_any_size(make: Make, size: float) -> None:
    optimizer, params = make(), jnp.zeros(2)
    state = optimizer.init(params)
    for sign in (1.0, -1.0, 1.0, 1.0):
        g = sign * size * jnp.array([1.0, -0.5])
        updates, state = optimizer.update(g, state, params)
        assert_finite((updates, state))
    if size == 1e-6:  # a full step, first
        updates, _ = first_step(optimizer, g, params)
        unit, _ = first_step(optimizer, jnp.array([1.0, -1.0]), params)
        np.testing.assert_allclose(updates, unit, rtol=0.03)


@FORMS
def test_17_an_overflow_is_forgotten(third_moment: str) -> None:
    # An infinite v or s would stay so, and the parameter would never move again.
    optimizer = adam3w(b2=0.9, b3=0.9, third_moment=third_moment)  # type: ignore[arg-type]
    params = jnp.zeros(())

    def step(state: Any, g: jax.Array) -> tuple[Any, jax.Array]:
        updates, state = optimizer.update(g, state, params)
        return state, updates

    gradients = jnp.ones(2000).at[0].set(1e30)
    _, updates = jax.lax.scan(step, optimizer.init(params), gradients)
    np.testing.assert_allclose(updates[-1], -1e-3, rtol=0.03)


# 18. More than one compile.


@OURS
def test_18_one_compile(make: Make) -> None:
    optimizer = make()
    update = jax.jit(optimizer.update)
    state = optimizer.init(A)
    for _ in range(3):
        _, state = update(A, state, A)
    assert compiles(update) == 1


@pytest.mark.parametrize("factory", [adam3, adam3w])
def test_18_one_compile_with_schedules(factory: Make) -> None:
    optimizer = factory(
        learning_rate=optax.linear_schedule(1.0, 0.0, 2),
        lam=lambda count: 0.1 / (1.0 + count.astype(F32)),
        tau=optax.constant_schedule(1.0),
    )
    update = jax.jit(optimizer.update)
    state, sizes = optimizer.init(A), []
    for _ in range(3):
        updates, state = update(A, state, A)
        sizes.append(float(jnp.abs(updates[0])))
    assert compiles(update) == 1
    assert sizes[0] > sizes[1] > sizes[2] == 0


@OURS
def test_18_one_compile_with_injected_values(make: Make) -> None:
    # Also after a value is changed by hand.
    optimizer = optax.inject_hyperparams(make)(lam=0.0, b1=0.5)
    update = jax.jit(optimizer.update)
    state = optimizer.init(A)
    _, state = update(A, state, A)
    state.hyperparams["lam"] = jnp.float32(0.5)
    _, state = update(A, state, A)
    state = optax.tree.set(state, lam=jnp.float32(0.1))
    _, state = update(A, state, A)
    assert compiles(update) == 1


# 19. Transformations of steps.

STEPS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 3)), F32)


def train(optimizer: Any, params: Any, gradients: Any) -> tuple[Any, Any]:
    """Returns the parameters and the moments after a scan over gradients."""

    def step(carry: Any, g: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    params, state = jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0]
    return params, [optax.tree.get(state, name) for name in "mvs"]


@OURS
def test_19_vmap_over_seeds(make: Make) -> None:
    # Four seeds at once are four runs.
    seeds = functools.partial(train, make())
    params = jnp.ones((4, 3))
    got = jax.jit(jax.vmap(seeds))(params, STEPS)
    one = jax.jit(seeds)
    want = [one(p, g) for p, g in zip(params, STEPS, strict=True)]
    jax.tree.map(
        lambda x, *y: np.testing.assert_allclose(x, np.stack(y), rtol=1e-6), got, *want
    )


@OURS
def test_19_scan_is_a_loop(make: Make) -> None:
    optimizer, params = make(), jnp.ones(3)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for g in STEPS[0]:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    scanned, moments = jax.jit(functools.partial(train, optimizer))(
        jnp.ones(3), STEPS[0]
    )
    np.testing.assert_allclose(scanned, params, rtol=1e-6)
    for name, moment in zip("mvs", moments, strict=True):
        np.testing.assert_allclose(moment, optax.tree.get(state, name), rtol=1e-6)


@OURS
def test_19_derivatives_of_steps_at_zero_gradient(make: Make) -> None:
    # The root has an infinite slope at v = 0, and 0·inf is NaN.
    def loss(params: jax.Array) -> jax.Array:
        return train(make(eps_root=1e-8), params, jnp.stack([params] * 3))[0].sum()

    assert_finite(jax.jit(jax.grad(loss))(jnp.array([0.0, 1.0, -1e-3])))


@OURS
def test_19_derivatives_of_steps_near_zero_gradient(make: Make) -> None:
    # Where the value is fine, but the derivative of a quotient or root divides by v² or
    # by a root of v, which underflow sooner. All powers of ten are tried.
    def loss(params: jax.Array) -> jax.Array:
        return train(make(eps_root=1e-8), params, jnp.stack([params] * 3))[0].sum()

    sizes = 10.0 ** jnp.arange(-37, 12, dtype=F32)
    assert_finite(jax.jit(jax.grad(loss))(sizes))


@OURS
def test_19_derivatives_with_a_traced_infinite_tau(make: Make) -> None:
    # inf times the zero derivative of a bound that does not act is NaN; a Python inf is
    # seen, an injected one is not.
    def loss(params: jax.Array, tau: jax.Array) -> jax.Array:
        optimizer = make(eps_root=1e-8, tau=tau)
        return train(optimizer, params, jnp.stack([params, -params, params]))[0].sum()

    derivative = jax.jit(jax.grad(loss))(
        jnp.array([0.0, 1.0, -2.0]), jnp.float32("inf")
    )
    assert_finite(derivative)


# 20. Optax's tools for states. Its wrappers of optimizers are in `test_interop.py`.


@OURS
def test_20_map_params_finds_the_moments(make: Make) -> None:
    # An init that looks at its leaves fails on the placeholder which this passes.
    optimizer, params = make(), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    specs = {"w": P("x"), "b": P()}
    mapped = optax.tree.map_params(
        optimizer,
        lambda _, spec: spec,
        optimizer.init(params),
        specs,
        transform_non_params=lambda _: "other",
    )
    assert [optax.tree.get(mapped, name) for name in "mvs"] == [specs] * 3
    assert optax.tree.get(mapped, "count") == "other"


@OURS
def test_20_get_and_set_by_name(make: Make) -> None:
    optimizer = make()
    state = optax.tree.set(optimizer.init(A), s=A, count=jnp.int32(7))
    inner = optax.tree.get(state, "ScaleByAdam3State")
    assert inner.count == 7
    assert inner.s is A
    _, state = optimizer.update(A, state, A)
    assert optax.tree.get(state, "count") == 8


# 21. Keyword arguments that are meant for others in the chain.


@OURS
def test_21_extra_arguments_are_ignored(make: Make) -> None:
    optimizer = make()
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    extra = optimizer.update(A, optimizer.init(A), A, value=1.0, grad=A, seed=object())
    assert_same(extra, first_step(optimizer, A))


# 22. State that is not all in the state. Flax and Orbax are in `test_interop.py`.


@OURS
def test_22_a_pickled_state_resumes_bit_for_bit(make: Make) -> None:
    # By an optimizer made anew, as after a restart.
    step = jax.jit(make().update)
    state = make().init(A)
    for _ in range(3):
        _, state = step(A, state, A)
    resumed = pickle.loads(pickle.dumps(state))
    restarted = jax.jit(make().update)
    for scale in (1.0, -1.0, 0.5):
        straight, state = step(scale * A, state, A)
        after, resumed = restarted(scale * A, resumed, A)
        assert_same((after, resumed), (straight, state))


# 23. Flax NNX gives state back in its own containers at the second step. Linen and
# Equinox are in `test_interop.py`.


class Model(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.array([[1.0, -2.0], [0.5, 3.0]]))
        self.inner = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros(()))  # no parameter: it stays


@OURS
def test_23_nnx_steps_in_and_out_of_jit(make: Make) -> None:
    model = Model()
    nnx_optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    params = {"w": model.w[...], "kernel": model.inner.kernel[...]}

    def loss(w: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(w @ kernel))

    def step(model: Model, nnx_optimizer: Any) -> None:
        gradients = nnx.grad(lambda m: loss(m.w[...], m.inner.kernel[...]))(model)
        nnx_optimizer.update(model, gradients)

    optimizer = make()
    state = optimizer.init(params)
    for stepped in (step, step, nnx.jit(step), nnx.jit(step), step):
        stepped(model, nnx_optimizer)
        gradients = jax.grad(lambda p: loss(**p))(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(model.w[...], params["w"], rtol=1e-5)
    np.testing.assert_allclose(model.inner.kernel[...], params["kernel"], rtol=1e-5)


# 24. Rounding to bfloat16 between the decay, the learning rate and the update.


@FORMS
def test_24_decay_is_added_before_rounding(third_moment: str) -> None:
    # u = 1 and wd·p = .001: their sum in bfloat16 is 1. The learning rate is such that
    # 1 and 1.001 times it round to different numbers.
    form: Any = third_moment
    rate = 1.0035
    p = jnp.ones((), BF16)
    decayed, _ = first_step(adam3w(rate, weight_decay=1e-3, third_moment=form), p)
    plain, _ = first_step(adam3w(rate, weight_decay=0.0, third_moment=form), p)
    assert plain == jnp.asarray(-rate, BF16)
    assert decayed == jnp.asarray(-rate * 1.001, BF16) != plain


@FORMS
@pytest.mark.parametrize("scheduled", [False, True])
def test_24_all_is_rounded_once(third_moment: str, scheduled: bool) -> None:
    # The bfloat16 update is the float32 one, rounded; of 512 that are rounded twice
    # many differ.
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.normal(size=512), BF16) for _ in range(2))
    optimizer = adam3w(
        learning_rate=(lambda count: 0.3) if scheduled else 0.3,
        weight_decay=0.7,
        third_moment=third_moment,  # type: ignore[arg-type]
    )
    exact, _ = first_step(optimizer, g.astype(F32), p.astype(F32))
    updates, _ = first_step(optimizer, g, p)
    assert_same(updates, exact.astype(BF16))


# 25. A mask taken for a schedule.


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def test_25_an_injected_mask_is_refused_or_works() -> None:
    # Called with the count, the mask says False: no decay at all, silently.
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    lost = optax.inject_hyperparams(adam3w)(1.0, weight_decay=0.5, mask=matrices)
    with pytest.raises(TypeError, match="static_args='mask'"):
        lost.init(params)
    kept = optax.inject_hyperparams(adam3w, static_args="mask")
    optimizer = kept(1.0, weight_decay=0.5, mask=matrices)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(functools.partial(first_step, optimizer))(gradients, params)
    np.testing.assert_array_equal(updates["w"], -0.5)
    np.testing.assert_array_equal(updates["b"], 0.0)


@FACTORIES
def test_25_a_form_that_arrives_as_a_number_is_refused(factory: Make) -> None:
    for wrong in (0, jnp.zeros(()), lambda count: "cubic"):
        with pytest.raises(ValueError, match="third_moment must be one of"):
            factory(third_moment=wrong)


# 26. Buffers donated in an order other than the results'.


def temporary_bytes(optimizer: Any, first: str, size: int = 4096) -> float:
    """Returns temporary bytes a parameter of a step that donates all but gradients."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.ShapeDtypeStruct((size,), F32)
    state = jax.eval_shape(optimizer.init, params)
    if first == "params":
        jitted = jax.jit(step, donate_argnums=(0, 1))
    else:
        jitted = jax.jit(lambda g, s, p: step(p, s, g), donate_argnums=(1, 2))
    analysis: Any = jitted.lower(params, state, params).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= 16 * size  # all four are donated
    return float(analysis.temp_size_in_bytes / size)


@OURS
def test_26_a_step_in_order_needs_no_memory(make: Make) -> None:
    assert temporary_bytes(make(), first="params") < 0.5


def test_26_a_step_out_of_order_needs_twelve_bytes_a_parameter() -> None:
    # What users are told: (gradients, state, params) -> (params, state) pairs the new
    # parameters with the old m, m with v, and so on.
    assert temporary_bytes(adam3w(), first="gradients") == pytest.approx(12, abs=0.5)


# 27. An optimizer that is rebuilt at every trace.

UNWARNED = map(float, np.linspace(0.99, 0.999, 1000))  # each warns once in a process


@OURS
def test_27_a_warning_is_not_repeated(make: Make) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = optax.inject_hyperparams(make)(b2=0.95, b3=next(UNWARNED))
        state = optimizer.init(A)
        for update in (optimizer.update, jax.jit(optimizer.update), optimizer.update):
            _, state = update(A, state, A)
    bounded = (
        inspect.signature(make).parameters["third_moment"].default == "standardized"
    )
    assert [w.category for w in caught] == ([] if bounded else [BlowUpWarning])


@FACTORIES
def test_27_a_warning_points_at_its_cause(factory: Make) -> None:
    with pytest.warns(BlowUpWarning, match=r"b3 <= sqrt\(b2\)") as caught:
        factory(b2=0.95, b3=next(UNWARNED))
    assert caught[0].filename == __file__


@OURS
def test_27_no_check_needs_a_value(make: Make) -> None:
    # All numbers traced at once; a check of their range would need them.
    numbers = {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if isinstance(parameter.default, float)
    }
    step = jax.jit(lambda kwargs: first_step(make(**kwargs), A)[0])
    np.testing.assert_allclose(step(numbers), first_step(make(), A)[0], rtol=1e-4)
    assert len(numbers) >= 7


# 28. The same numbers on many devices as on one.


@FORMS
@pytest.mark.parametrize("how", ["auto", "explicit", "shard_map", "pmap"])
def test_28_devices_change_no_bit(third_moment: Any, how: str) -> None:
    # Whatever looks at other elements, or at where an element lies, would. Rows are of
    # 32, for where a shard does not fill a vector, XLA itself rounds otherwise.
    training = functools.partial(train, adam3w(0.1, lam=0.1, third_moment=third_moment))
    rng = np.random.default_rng(2)
    params = jnp.asarray(rng.normal(size=(8, 32)), F32)
    gradients = jnp.asarray(rng.normal(size=(4, 8, 32)), F32)
    expected = jax.jit(training)(params, gradients)

    mesh = mesh_of(AxisType.Auto if how == "auto" else AxisType.Explicit)
    specs = P("x", "y"), P(None, "x", "y")
    if how == "pmap":
        got = jax.pmap(training, in_axes=(0, 1))(params, gradients)
    else:
        run = jax.shard_map(training, mesh=mesh, in_specs=specs, out_specs=specs[0])
        sharded = jax.device_put(
            (params, gradients), tuple(NamedSharding(mesh, s) for s in specs)
        )
        got = jax.jit(run if how == "shard_map" else training)(*sharded)
    assert len(jax.tree.leaves(got)[0].sharding.device_set) == 8
    assert_same(jax.device_get(got), jax.device_get(expected))
