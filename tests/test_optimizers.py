"""`adam3` and `adam3w`: Optax's contract, the chain, Adam, hyperparameters."""

import inspect
import itertools
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from adam3_optax import BlowUpWarning, adam3, adam3w, convert_state, scale_by_adam3
from tests import reference, settings
from tests.settings import (
    BF16,
    F32,
    F64,
    FORMS,
    PARAMS,
    STORAGE,
    assert_same,
    first_step,
    types,
)

A, B = jnp.array([1.0, -2.0]), jnp.array(0.5)


# What Optax asks of every optimizer.

EACH_FORM = pytest.mark.parametrize("form", [*FORMS, None])
EACH_FACTORY = pytest.mark.parametrize("factory", [adam3, adam3w])


def parabola(x: jax.Array) -> jax.Array:
    return jnp.sum((x - jnp.array([1.0, -1.0, 1.0], x.dtype)) ** 2)


def rosenbrock(x: jax.Array) -> jax.Array:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


@EACH_FACTORY
@pytest.mark.parametrize(
    ("chosen", "dtype"),
    [
        *(({"third_moment": x}, dtype) for x in (*FORMS, None) for dtype in (F32, F64)),
        ({"third_moment": FORMS[-1], **STORAGE["float8"]}, F32),
        (STORAGE["bfloat16"], F32),
        (STORAGE["smallest"], F32),
    ],
)
def test_converges(chosen: Any, dtype: Any, factory: Any, x64: None) -> None:
    # On both functions at once: elements do not meet in the optimizer.
    rate = lambda count: 1e-2 * jnp.minimum(1.0, 2.0 - count / 5000)  # noqa: E731
    optimizer = factory(rate, **chosen)
    params = {"a": jnp.array([-1.0, 10.0, 1.0], dtype), "b": jnp.zeros(2, dtype)}

    def loss(params: Any) -> jax.Array:
        return parabola(params["a"]) + rosenbrock(params["b"])

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=10_000)[0])
    found, state = run(start)
    assert types((found, state)) == types(start)
    np.testing.assert_allclose(found["a"], [1.0, -1.0, 1.0], atol=0.03)
    np.testing.assert_allclose(found["b"], [1.0, 1.0], atol=0.03)


def numbers(factory: Any) -> dict[str, float]:
    """Returns the arguments of a factory that are numbers, with their defaults."""
    parameters = inspect.signature(factory).parameters
    defaults = {name: x.default for name, x in parameters.items()}
    return {name: x for name, x in defaults.items() if isinstance(x, float)}


@EACH_FORM
@EACH_FACTORY
def test_all_numbers_may_be_injected_or_scheduled(form: Any, factory: Any) -> None:
    # No check needs a value, and nothing leans on weak types.
    known = numbers(factory)
    assert len(known) == (9 if factory is adam3w else 8)
    chosen = {k: lambda count, x=x: jnp.float32(x) for k, x in [*known.items()][::2]}
    inject = optax.inject_hyperparams(factory, hyperparam_dtype=F32)
    optimizer = inject(**chosen, third_moment=form)  # the others by their defaults
    params = {"w": PARAMS["w"], "half": jnp.ones(2, jnp.float16)}
    state = jax.jit(optimizer.init)(params)
    assert set(state.hyperparams) == set(known)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    want, after = first_step(factory(third_moment=form), params)
    settings.assert_close(updates, want, rtol=1e-3)
    settings.assert_close(state.inner_state, after)


@EACH_FORM
@EACH_FACTORY
def test_trees_keep_their_structure_and_types(form: Any, factory: Any) -> None:
    optimizer = factory(third_moment=form)
    frozen = {"a": None, "b": optax.MaskedNode(), "c": ((), {}), "d": jnp.ones((0, 3))}
    four = (A, [A], {"a": A}, optax.TraceState(A))  # a state is a tuple of four, too
    params = {**PARAMS, "half": jnp.ones((2, 3), BF16), "frozen": frozen}
    masked = optax.masked(optimizer, {**dict.fromkeys(params, True), "b": False})
    pairs = [(optimizer, x) for x in (params, {}, frozen, four, A)]
    for made, tree in (*pairs, (masked, params)):
        state = made.init(tree)
        updates, after = jax.eval_shape(made.update, tree, state, tree)
        assert types(updates) == types(tree)
        assert types(after) == types(state)
        # Optax knows what of the state belongs to a parameter.
        new = optax.tree.map_params(made, lambda x: x + 1, state)
        assert all((x == 1).all() for x in jax.tree.leaves(settings.moments(new)))
        assert optax.tree.get(new, "count") == 0


# The chain.


def test_float64_follows_the_reference(x64: None) -> None:
    # With the rate and the decay in float64, too.
    gradients = np.random.default_rng(0).normal(size=(5, 8))
    optimizer = adam3w(0.3, weight_decay=0.7)
    params = jnp.linspace(-1.0, 1.0, 8, dtype=F64)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(jnp.asarray(g), state, params)
    *_, last = reference.steps(gradients, reference.Setting())
    np.testing.assert_allclose(updates, -0.3 * (last.u + 0.7 * params), rtol=1e-11)


@settings.each_storage("default", "mixed")
def test_adam3_is_adam3w_without_decay(storage: Any) -> None:
    # Each argument unlike its default and the others.
    chosen: Any = dict(
        zip(numbers(adam3), (0.3, 0.5, 0.8, 0.6, 0.4, 0.2, 1e-3, 1e-4), strict=True)
    )
    other = {"third_moment": FORMS[-1], **storage}  # the default is the first
    got = settings.train(adam3(**chosen, **other))
    want = settings.train(adam3w(**chosen, weight_decay=0.0, **other))
    settings.assert_close(got[0], want[0])
    assert types(got[1][0]) == types(want[1][0])


@pytest.mark.parametrize(
    "params", [None, FrozenDict(a=A, b=B), {"a": A, "b": optax.MaskedNode()}, [A, B]]
)
def test_parameters_that_are_not_needed_may_be_anything(params: Any) -> None:
    # Only a decay reads them, so that dicts of gradients go with Flax's FrozenDict of
    # parameters.
    optimizer, gradients = adam3(), {"a": A, "b": B}
    updates, state = optimizer.update(gradients, optimizer.init(gradients), params)
    assert_same((updates, state), first_step(optimizer, gradients))
    with pytest.raises(ValueError, match="pass them to update"):
        adam3w().update(A, adam3w().init(A))


@pytest.mark.parametrize("rate", [0.3, lambda count: 0.3])
def test_all_is_rounded_once(rate: Any) -> None:
    # The bfloat16 update is the float32 one, rounded; of 512 that are rounded between
    # the decay, the rate and the update many differ.
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.normal(size=512), BF16) for _ in range(2))
    optimizer = adam3w(rate, weight_decay=0.7)
    exact, _ = first_step(optimizer, g.astype(F32), p.astype(F32))
    assert_same(first_step(optimizer, g, p)[0], exact.astype(BF16))


# The mask. More of it is in `test_mask.py`.


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def test_a_mask_that_is_a_number_is_refused() -> None:
    message = r"^mask must be .*static_args='mask'"
    masks: Any = [True, False, np.True_, 1.0]
    for mask in masks:
        with pytest.raises(TypeError, match=message):
            adam3w(mask=mask)
    # Taken for a schedule and called with the count, it says False: no decay, silently.
    lost = optax.inject_hyperparams(adam3w)(1.0, weight_decay=0.5, mask=matrices)
    with pytest.raises(TypeError, match=message):
        lost.init(PARAMS)


# No third moment: Adam from the same code.


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, "default") for form in FORMS),
        *((FORMS[0], name) for name in ("bfloat16", "float8", "smallest")),
    ],
)
def test_none_is_lam_0_bit_for_bit(form: Any, name: str) -> None:
    storage, without = STORAGE[name], settings.without_s(STORAGE[name])
    # Where b3, lam and tau have no effect, and do not warn.
    ignored: Any = {"b3": 0.9999, "lam": 7.0, "tau": 1e-3}
    params, state = settings.train(adam3w(0.1, **ignored, **without))
    zero = adam3w(0.1, lam=0.0, third_moment=form, **storage)
    expected, with_s = settings.train(zero)
    assert_same((params, *state[0][:2]), (expected, *with_s[0][:2]))
    # One node without children stands for s, and states convert both ways.
    assert type(state[0].s) is optax.EmptyState
    assert_same(convert_state(with_s, **without), state)
    back: Any = convert_state(state, third_moment=form, **storage)
    assert_same((back[0].m, back[0].v), (with_s[0].m, with_s[0].v))
    assert not any(np.any(np.asarray(x, np.float32)) for x in back[0].s.values())


# Hyperparameters: bad ones get one clear error; good ones pass in every disguise.


INF, NAN = math.inf, math.nan
EXACT = "b1", "b2", "b3", "eps", "eps_root"
SCHEDULED = "learning_rate", "lam", "tau", "weight_decay"
make: Any = adam3w


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        *((b, [1.0, 2, -0.1, NAN, INF], "in [0, 1)") for b in ("b1", "b2", "b3")),
        *((x, [-1e-8, -1, NAN, INF, 1e39], "in [0, inf)") for x in ("eps", "eps_root")),
        ("lam", [NAN, INF, -INF, 1e39], "finite"),
        ("tau", [0, -1.0, NAN, -INF], "in (0, inf]"),
        *((x, [NAN, INF], "finite") for x in ("learning_rate", "weight_decay")),
    ],
)
def test_out_of_range(name: str, values: list[float], allowed: str) -> None:
    message = f"^{re.escape(f'{name} must be {allowed}')}.*, got "
    kinds: Any = float, np.float64, np.array, F32
    for kind, value in itertools.product(kinds, values):
        with np.errstate(over="ignore"):
            x = kind(value)
        with pytest.raises(ValueError, match=message) as caught:
            make(**{name: x})
        got = float(str(caught.value).split()[-1])
        assert got == pytest.approx(float(x), nan_ok=True)


def test_what_is_no_number_is_refused() -> None:
    for value in ("1", True, 1j, [1], np.array("1")):
        with pytest.raises(TypeError, match=r"^lam must be a real number"):
            make(lam=value)
    for array in (np.full(3, 0.5), jnp.full(3, 0.5)):
        with pytest.raises(ValueError, match=r"^lam must be .* of shape \(3,\)"):
            make(lam=array)
    with pytest.raises(
        ValueError, match=r"^lam must be finite \(in float32\), got inf"
    ):
        make(lam=10**400)


@pytest.mark.parametrize("value", ["Cubic", "", 3, jnp.zeros(()), abs])
def test_an_unknown_form_lists_the_known_ones(value: Any) -> None:
    # A number is what a schedule's place in `optax.inject_hyperparams` makes of it.
    with pytest.raises(ValueError, match=r"^third_moment must be one of") as caught:
        make(third_moment=value)
    for text in map(repr, (*FORMS, None, value)):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", EXACT)
def test_what_must_be_exact_and_constant_names_the_remedy(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} .*optax\.inject_hyperparams"):
        make(**{name: lambda count: 0.9})
    message = rf"^{name} must be .*hyperparam_dtype=jnp\.float32"
    for dtype in (BF16, jnp.float16):
        half = jnp.asarray(0.5, dtype)
        with pytest.raises(ValueError, match=message):
            make(**{name: half})
        with pytest.raises(ValueError, match=message):  # a tracer has no value
            jax.eval_shape(lambda x: make(**{name: x}).init(A), half)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_bad_schedule_is_caught_when_it_speaks(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        first_step(make(**{name: lambda count: NAN}), A)


# What passes.


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.array, BF16, F32])
def test_numbers_in_every_disguise(kind: Any) -> None:
    # Not weakly typed, they would turn bfloat16 updates into float32.
    plain, disguised = (
        make(**dict.fromkeys(SCHEDULED, x), b1=0) for x in (0.5, kind(0.5))
    )
    for dtype in (F32, BF16):
        g = A.astype(dtype)
        updates, _ = first_step(disguised, g)
        np.testing.assert_array_equal(updates, first_step(plain, g)[0])
        assert updates.dtype == dtype


# Changed on the way: injected, scheduled.

OTHER = {"learning_rate": 0.5, "b1": 0.5, "b2": 0.9, "b3": 0.5, "lam": 0.5, "tau": 1e-4}
OTHER |= {"eps": 0.3, "eps_root": 0.3, "weight_decay": 0.5}
FIXED: dict[str, Any] = {"learning_rate": 0.1, "b3": 0.8, "lam": 0.1}


INJECTED = optax.inject_hyperparams(adam3w)(**FIXED)
UPDATE: Any = jax.jit(INJECTED.update)


@pytest.mark.parametrize("name", OTHER)
def test_an_injected_value_that_is_changed_acts(name: str) -> None:
    # Two steps, a change through the state, two more: as two optimizers on one state.
    # One compiled step serves them all.
    state = INJECTED.init(PARAMS)
    expected = unchanged = state.inner_state
    plain, changed = adam3w(**FIXED), make(**{**FIXED, name: OTHER[name]})
    for i, g in enumerate(settings.GRADIENTS[:4]):
        if i == 2:
            state = optax.tree.set(state, **{name: jnp.float32(OTHER[name])})
        updates, state = UPDATE(g, state, PARAMS)
        want, expected = (plain, changed)[i >= 2].update(g, expected, PARAMS)
        same, unchanged = plain.update(g, unchanged, PARAMS)
        settings.assert_close(updates, want, rtol=1e-4)
    assert np.max(abs(want["w"] / same["w"] - 1)) > 0.01
    assert UPDATE._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "factory"),
    [*((x, adam3w) for x in SCHEDULED), ("b2", optax.inject_hyperparams(adam3w))],
)
def test_schedules_get_the_count_before_the_step(name: str, factory: Any) -> None:
    # As everywhere in Optax: the first step takes schedule(0).
    def schedule(count: Any) -> Any:
        return OTHER[name] * (0.8 + 0.1 * jnp.float32(count))

    optimizer = factory(**{**FIXED, name: schedule})
    update: Any = jax.jit(optimizer.update)
    state = optimizer.init(A)
    expected = adam3w(**FIXED).init(A)
    for count in range(3):
        g = (-1.0) ** count * (A - 0.5)
        updates, state = update(g, state, A)
        manual = make(**{**FIXED, name: float(schedule(count))})
        want, expected = manual.update(g, expected, A)
        settings.assert_close(updates, want, rtol=1e-4)
    assert update._cache_size() == 1


# The warning of a blow-up. Each test has decays of its own, for one is given once.


@pytest.mark.parametrize(
    ("factory", "b3"), [(scale_by_adam3, 0.991), (adam3, 0.992), (adam3w, 0.993)]
)
def test_blow_up_warns_once_at_the_users_line(factory: Any, b3: float) -> None:
    for form in settings.UNBOUNDED * 2:  # as an error it is given each time
        with pytest.raises(BlowUpWarning, match=f"b3 = {b3} "):
            factory(b2=0.95, b3=b3, third_moment=form)
    with pytest.warns(BlowUpWarning, match="exceeds .* = 0.974679") as caught:  # noqa: PT031
        for form in settings.UNBOUNDED * 2:
            factory(b2=0.95, b3=b3, third_moment=form)
    assert [x.filename for x in caught] == [__file__]
    with pytest.warns(BlowUpWarning):  # no module is around this
        exec(f"import adam3_optax; adam3_optax.adam3(b2=0.94, b3={b3})", {})


@pytest.mark.parametrize(("static", "b3"), [((), 0.995), (("b2", "b3"), 0.9955)])
def test_blow_up_warns_once_over_rebuilds_at_traces(static: Any, b3: float) -> None:
    # `optax.inject_hyperparams` builds the optimizer anew at each of them.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = optax.inject_hyperparams(adam3, static_args=static)(
            learning_rate=lambda count: 0.1, b2=0.95, b3=b3
        )
        state = optimizer.init(A)
        for _ in range(2):
            jax.eval_shape(optimizer.update, A, state, A)
    assert [(w.category, w.filename) for w in caught] == [(BlowUpWarning, __file__)]


def test_safe_settings_are_silent() -> None:
    # Warnings are errors here. A root that was rounded to float32 is no larger.
    for b3, lam in ((0.95**0.5, 0.01), (jnp.float32(0.95**0.5), 0.01), (0.996, 0)):
        make(b2=0.95, b3=b3, lam=lam)
    for form in FORMS:
        make(**settings.SAFE, third_moment=form)
    for form in settings.BOUNDED:
        make(b2=0.95, b3=0.996, third_moment=form)
