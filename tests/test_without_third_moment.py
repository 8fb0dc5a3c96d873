"""`third_moment=None` is Adam from the same code: no s at all."""

import pickle
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adam3_optax import (
    adam3,
    adam3w,
    convert_state,
    from_adam_state,
    scale_by_adam3,
    state_shardings,
    third_moment_report,
    to_adam_state,
)
from tests.settings import (
    FORMS,
    GRADIENTS,
    PARAMS,
    assert_same,
    first_step,
    mesh_of,
    on,
    train,
)

WITHOUT = partial(scale_by_adam3, third_moment=None)
WITHOUT_S: dict[str, Any] = {
    "default": {},
    "float32": {"m_dtype": "float32", "v_dtype": "float32"},
    "bfloat16": {"m_dtype": "bfloat16", "v_dtype": "bfloat16"},
    "float8": {"m_dtype": "float8", "v_dtype": "bfloat16"},
    "smallest": {"m_dtype": "float8", "v_dtype": "float8"},
}
# Each form once, and each storage once.
PAIRS = [*((form, {}) for form in FORMS), *((FORMS[0], x) for x in WITHOUT_S.values())]
EACH_PAIR = pytest.mark.parametrize(("form", "storage"), PAIRS)
EACH_WITHOUT_S = pytest.mark.parametrize("storage", WITHOUT_S.values(), ids=WITHOUT_S)


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_m_and_v_are_those_of_optax_bit_for_bit(
    b2: float, standard_promotion: None
) -> None:
    rng = np.random.default_rng(0)
    gradients = [{"w": jnp.float32(rng.standard_t(2, (7, 33)))} for _ in range(20)]
    params = {"w": jnp.ones((7, 33))}
    _, ours = train(WITHOUT(b2=b2), params, gradients)
    _, theirs = train(optax.scale_by_adam(b2=b2), params, gradients)
    assert_same((ours.m, ours.v, ours.count), (theirs.mu, theirs.nu, theirs.count))


@EACH_PAIR
def test_the_update_is_that_of_lam_0_bit_for_bit(form: Any, storage: Any) -> None:
    params, state = train(adam3w(0.1, third_moment=None, **storage))
    zero = adam3w(0.1, b3=0.9, lam=0.0, third_moment=form, **storage)
    expected, with_s = train(zero)
    assert_same(params, expected)
    assert_same(state[0].m, with_s[0].m)
    assert_same(state[0].v, with_s[0].v)


def test_s_is_one_node_without_children() -> None:
    optimizer = adam3w(third_moment=None)
    for state in (optimizer.init(PARAMS), train(optimizer)[1]):
        assert state[0].s == optax.tree.get(state, "s") == optax.EmptyState()
        assert type(state[0].s) is optax.EmptyState
    specs = {"w": P("x"), "b": P()}
    for rest in ((), (specs,)):
        mapped = optax.tree.map_params(optimizer, lambda x, *_: x, state, *rest)
        assert_same(mapped, state)


def test_bytes_of_state() -> None:
    # Exactly, in leaves of every shape.
    params = {"w": jnp.ones((7, 33)), "b": jnp.ones(5), "c": jnp.ones(())}
    for name, size in (("default", 8), ("bfloat16", 4), ("float8", 3), ("smallest", 2)):
        state = WITHOUT(**WITHOUT_S[name]).init(params)
        held = sum(x.nbytes for x in jax.tree.leaves(state))
        assert held == size * (7 * 33 + 5 + 1) + 4  # 4: the count


@pytest.mark.parametrize("factory", [scale_by_adam3, adam3, adam3w])
def test_a_dtype_of_what_is_not_there_is_refused(factory: Any) -> None:
    with pytest.raises(ValueError, match="s_dtype must be None with third_moment=None"):
        factory(third_moment=None, s_dtype="bfloat16")


def test_b3_lam_and_tau_are_ignored_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd = WITHOUT(b2=0.95, b3=0.9991, lam=7.0, tau=1e-3)
    assert_same(train(odd), train(WITHOUT(b2=0.95)))


def test_to_and_from_adam_without_loss(standard_promotion: None) -> None:
    params, adam = train(optax.adamw(0.1))
    ours = from_adam_state(adam, third_moment=None)
    assert_same(to_adam_state(ours), adam)
    optimizer = adam3w(0.1, third_moment=None)
    updates, _ = optimizer.update(GRADIENTS[0], ours, params)
    expected, _ = optax.adamw(0.1).update(GRADIENTS[0], adam, params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), updates, expected)


@EACH_PAIR
def test_to_a_form_and_back(form: Any, storage: Any) -> None:
    _, state = train(WITHOUT(**storage))
    with_s = convert_state(state, third_moment=form, **storage)
    assert_same(with_s.s, jax.tree.map(jnp.zeros_like, PARAMS))
    optimizer = scale_by_adam3(b3=0.9, third_moment=form, **storage)
    optimizer.update(GRADIENTS[0], with_s, PARAMS)
    assert_same(convert_state(with_s, third_moment=None, **storage), state)


def test_other_settings_than_the_states_are_named() -> None:
    with_s, without = scale_by_adam3(), WITHOUT()
    for made, used in ((with_s, without), (without, with_s)):
        with pytest.raises(ValueError, match=r"third_moment=None.*convert_state"):
            used.update(PARAMS, made.init(PARAMS))


def test_a_report_says_that_there_is_nothing_to_report() -> None:
    state = WITHOUT().init(PARAMS)
    known: Any = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
    forms: list[Any] = [None, "cubic"]
    for form in forms:
        with pytest.raises(ValueError, match="no third moment to report"):
            third_moment_report(state, **known, third_moment=form)


@EACH_WITHOUT_S
def test_clients_keep_it(storage: Any) -> None:
    optimizer = adam3w(0.1, third_moment=None, **storage)
    params, state = train(optimizer)
    expected, _ = optimizer.update(GRADIENTS[0], state, params)
    bytes_ = serialization.to_bytes(state)
    copies = [
        pickle.loads(pickle.dumps(state)),
        serialization.from_bytes(optimizer.init(params), bytes_),
        serialization.from_state_dict(state, serialization.to_state_dict(state)),
        nnx.merge(*nnx.split(state)),
    ]
    for copy in copies:
        assert_same(optimizer.update(GRADIENTS[0], copy, params)[0], expected)


@EACH_WITHOUT_S
def test_nnx_takes_more_than_one_step(storage: Any) -> None:
    model = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, adam3(0.1, third_moment=None, **storage), wrt=nnx.Param
    )
    for _ in range(3):
        gradients = nnx.grad(lambda m: m(jnp.ones((1, 32))).sum())(model)
        optimizer.update(model, gradients)
    assert optimizer.opt_state[0].count == 3


def test_transformations_of_steps() -> None:
    # Under vmap, with injected hyperparameters, and with a gradient of None.
    def steps(params: Any, g: Any) -> Any:
        return train(WITHOUT(), params, [g, g])[0]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS[:2])
    both = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    got = jax.vmap(steps)(both, stacked)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], got)
        expected = steps(PARAMS, GRADIENTS[i])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), one, expected)
    injected = optax.inject_hyperparams(adam3w)(0.1, third_moment=None)
    updates, _ = first_step(injected, GRADIENTS[0], PARAMS)
    expected, _ = first_step(adam3w(0.1, third_moment=None), GRADIENTS[0], PARAMS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)
    updates, _ = first_step(WITHOUT(), GRADIENTS[0] | {"b": None}, PARAMS)
    assert updates["b"] is None
    assert first_step(WITHOUT(), {})[0] == {}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind: AxisType) -> None:
    optimizer = WITHOUT(**WITHOUT_S["smallest"])
    shardings = on(mesh_of(kind), {"w": P("data"), "b": P()})
    params = jax.device_put(PARAMS, shardings)
    where = state_shardings(optimizer, params, shardings)
    state = jax.jit(optimizer.init, out_shardings=where)(params)
    gradients = jax.device_put(GRADIENTS[0], shardings)
    updates, _ = jax.jit(optimizer.update)(gradients, state, params)
    expected, _ = jax.jit(optimizer.update)(GRADIENTS[0], optimizer.init(PARAMS))
    assert_same(jax.device_get(updates), jax.device_get(expected))
