"""`third_moment_report` against float64 NumPy, in every state that may hold AdaM3."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adam3_optax import (
    ScaleByAdam3State,
    ThirdMomentReport,
    adam3,
    adam3w,
    third_moment_report,
)
from tests import reference
from tests.settings import EACH_FORM, FORMS, STORAGE, UNBOUNDED, mesh_of, on

RULE: dict[str, Any] = {"b1": 0.9, "b2": 0.99, "b3": 0.98, "lam": 0.02, "tau": 0.3}
CUBIC: dict[str, Any] = {**RULE, "third_moment": "cubic"}
SIZES = {"default": 12, "mixed": 7, "bfloat16": 6, "float8": 4, "smallest": 3}
NAMES = [
    "skewness", "skewness_tail", "ratio", "ratio_tail", "clipped", "without_effect",
    "elements", "state_bytes",
]  # fmt: skip
# The relative error of float32, 2⁻²⁴ being half a unit in the last place: v̂ is within
# 7 of them (a correction of 6, a product), so that 1/σ³ is within 3·(7/2 + 2) = 17;
# ŝ adds 7, a root and products 6, lam and the quotient by m̂ (7) 10 more, and sigma³ as
# the unit of a float8 6. Quantiles are off by at most what their elements are.
BOUND = 50 * 2.0**-24


def gradients(scale: float, steps: int = 12) -> list[Any]:
    """Returns skewed gradients of many sizes, of which some stay 0."""
    rng = np.random.default_rng(3)
    wide = scale * 10 ** rng.uniform(-2, 0.5, (30, 40))
    wide[3] = 0
    wide[4, ::2] = 0

    def one() -> Any:
        skewed = rng.exponential(size=(30, 40)) - 0.7
        return {"b": None, "v": rng.normal(size=9) * scale, "w": wide * skewed}

    return [
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), one()) for _ in range(steps)
    ]


def run(optimizer: Any, grads: list[Any], params: Any = None) -> Any:
    params = jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params
    state = optimizer.init(params)
    for g in grads:
        _, state = optimizer.update(g, state, params)
    return state


def loaded(state: Any, form: Any) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Returns the moments of each leaf in float64, however they are stored."""

    def wide(field: Any) -> list[np.ndarray[Any, Any]]:
        return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(field)]

    found: list[tuple[np.ndarray[Any, Any], ...]] = []
    leaves = zip(*map(wide, state.moments), jax.tree.leaves(state.v), strict=True)
    for m, v, s, stored in leaves:
        if stored.dtype == jnp.uint8:  # 7 bits of exponent, 1 of mantissa
            exponent, half = np.divmod(v - 1, 2)
            v = np.where(v == 0, 0, 2.0 ** (exponent - 72) * (1 + half / 2))
        sigma = np.sqrt(np.maximum(v, 2.0**-120))
        if jax.tree.leaves(state.m)[0].dtype == jnp.float8_e4m3fn:
            m = m * sigma / 4
        if jax.tree.leaves(state.s)[0].dtype == jnp.float8_e4m3fn:
            s = s * sigma ** reference.FORMS[form].exponent
        found.append((m, v, s))
    return found


def check(
    found: Any, leaves: list[Any], count: int, h: dict[str, Any], size: int
) -> None:
    """Checks statistics against the definitions, for (m, v, s) of some leaves."""
    m, v, s = (
        np.concatenate([x.ravel() for x in xs]) for xs in zip(*leaves, strict=True)
    )
    seen = (m != 0) | (v > 0)
    m, v, s = m[seen], v[seen], s[seen]
    m_hat = np.abs(m) / (1 - h["b1"] ** count)
    sigma = np.sqrt(v / (1 - h["b2"] ** count))
    s_hat = np.abs(s) / (1 - h["b3"] ** count)
    form = reference.FORMS[h["third_moment"]]
    skewness = s_hat / sigma**form.exponent
    if form.free_of_scale:
        compared, unit = skewness, sigma
    else:
        compared, unit = np.abs(s), np.ones_like(s)
    b = abs(h["lam"]) * unit * np.minimum(compared, h["tau"])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(b == 0, 0, b / m_hat)
    for name, values in (("skewness", skewness), ("ratio", ratio)):
        for suffix, q in (("", 0.5), ("_tail", 0.999)):
            # The smallest value with at least a share q at or below it.
            wanted = np.sort(values)[math.ceil(q * len(values)) - 1]
            got = float(getattr(found, name + suffix))
            assert got == pytest.approx(wanted, rel=BOUND), name + suffix
    # Between what is so, and what may be so, within the bound.
    low, high = 1 - BOUND, 1 + BOUND
    clipped = [np.mean(compared * x > h["tau"]) for x in (low, high)]
    below, above = (np.spacing((m_hat * x).astype(np.float32)) / 2 for x in (low, high))
    silent = [np.mean(b * high <= below), np.mean(b * low <= above)]
    for name, (least, most) in (("clipped", clipped), ("without_effect", silent)):
        assert least - 1e-6 <= float(getattr(found, name)) <= most + 1e-6, name
    assert int(found.elements) == len(m)
    assert found.state_bytes == size


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, "float8") for form in FORMS),
        *((FORMS[-1], name) for name in ("default", "bfloat16", "mixed")),
        *((form, "smallest") for form in UNBOUNDED),
    ],
)
def test_statistics_are_those_of_the_definitions(form: Any, name: str) -> None:
    h = {**RULE, "third_moment": form}
    scale = 0.3 if form == "cubic" else 1.0
    state = run(adam3(1e-3, **h, **STORAGE[name]), gradients(scale))
    eager = third_moment_report(state, **h)
    jitted = jax.jit(lambda state: third_moment_report(state, **h))(state)
    moments = loaded(state[0], form)
    assert eager.names == ("['v']", "['w']")
    sizes = 9 * SIZES[name], 1200 * SIZES[name]
    for report in (eager, jitted):
        check(report.overall, moments, 12, h, sum(sizes))
        for leaf, moment, size in zip(report.names, moments, sizes, strict=True):
            check(report.leaves[leaf], [moment], 12, h, size)
        assert float(report.lam) == pytest.approx(0.02)
    # So that the test is of something.
    assert 0.005 < float(eager.overall.clipped) < 0.9
    assert 9 + 1200 - 40 - 20 - 2 <= float(eager.overall.elements) <= 9 + 1200 - 40 - 20


@pytest.mark.parametrize("scale", [1e-4, 3e-4])
def test_small_gradients_have_no_effect_in_the_cubic_form(scale: float) -> None:
    state = run(adam3(1e-3, **CUBIC), gradients(scale))
    report = third_moment_report(state, **CUBIC)
    moments = loaded(state[0], "cubic")
    check(report.overall, moments, 12, CUBIC, 12 * 1209)
    assert 0.5 < float(report.overall.without_effect) < 1
    with_term, without = (
        jnp.concatenate([u.ravel() for u in jax.tree.leaves(updates)])
        for updates in (
            adam3(1.0, **{**CUBIC, "lam": lam}).update(gradients(scale)[0], state)[0]
            for lam in (RULE["lam"], 0.0)
        )
    )
    # And so say the updates of the next step, but for a compiler that fuses the sum.
    equal = float(jnp.mean(with_term == without))
    assert equal == pytest.approx(float(report.overall.without_effect), abs=0.15)


def scalars(report: ThirdMomentReport) -> dict[str, float]:
    return report.scalars(leaves=True)


WRAPPED: dict[str, Any] = {
    "chain": lambda o: optax.chain(optax.clip_by_global_norm(1e9), o),
    "masked": lambda o: optax.masked(o, {"b": True, "v": True, "w": True}),
    "multi-step": lambda o: optax.MultiSteps(o, 1),
    "if finite": lambda o: optax.apply_if_finite(o, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_is_found_inside(wrapper: str, standard_promotion: None) -> None:
    grads = [
        {k: x for k, x in g.items() if k != "b"} | {"b": jnp.ones(2)}
        for g in gradients(1.0, 3)
    ]
    plain = third_moment_report(run(adam3(1e-3, **CUBIC), grads), **CUBIC)
    state = run(WRAPPED[wrapper](adam3(1e-3, **CUBIC)), grads)
    found = scalars(third_moment_report(state, **CUBIC))
    # MultiSteps compiles the update, which rounds differently where m nearly cancels.
    assert found == pytest.approx(scalars(plain), rel=1e-4)


def test_masked_leaves_are_left_out() -> None:
    grads = [{"v": g["v"], "w": g["w"]} for g in gradients(1.0, 3)]
    state = run(optax.masked(adam3(1e-3, **CUBIC), {"v": False, "w": True}), grads)
    assert third_moment_report(state, **CUBIC).names == ("['w']",)


def test_several_states_count_together() -> None:
    grads = [{"v": g["v"], "w": g["w"]} for g in gradients(1.0, 3)]
    arms = {"x": adam3(1e-3, **CUBIC), "y": adam3(1e-2, **CUBIC)}
    state = run(optax.partition(arms, {"v": "x", "w": "y"}), grads)
    plain = third_moment_report(run(adam3(1e-3, **CUBIC), grads), **CUBIC)
    report = third_moment_report(state, **CUBIC)
    assert report.scalars() == plain.scalars()
    assert [name[-5:] for name in report.names] == ["['v']", "['w']"]
    assert all("inner_states['" in name for name in report.names)


def test_injected_hyperparameters_are_those_used() -> None:
    g = {"w": gradients(1.0, 1)[0]["w"]}
    make = optax.inject_hyperparams(adam3, hyperparam_dtype=jnp.float32)
    settings = {**CUBIC, "lam": lambda count: 0.5 / (1.0 + jnp.float32(count))}
    state = run(make(1e-3, **settings), [g, g])
    report = third_moment_report(state, third_moment="cubic")
    plain = run(adam3(1e-3, **CUBIC), [g, g])
    wanted = third_moment_report(plain, **{**CUBIC, "lam": 0.25})
    for name, value in scalars(report).items():
        assert value == pytest.approx(scalars(wanted)[name], rel=1e-4), name
    # A schedule of ours is taken at the same count.
    assert scalars(third_moment_report(plain, **settings)) == scalars(wanted)
    # What is given goes before: a `lam` of the state may be another transformation's.
    given = third_moment_report(state, lam=0.125, third_moment="cubic")
    half = float(wanted.overall.ratio) / 2
    assert float(given.overall.ratio) == pytest.approx(half, rel=1e-4)


def test_wrong_input_is_named() -> None:
    state = adam3(1e-3).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"^b2, b3, tau must be given, as to the opti"):
        third_moment_report(state, b1=0.9, lam=0.1, third_moment="cubic")
    with pytest.raises(ValueError, match="no ScaleByAdam3State in"):
        third_moment_report(optax.adam(1e-3).init(jnp.ones(3)), **CUBIC)
    with pytest.raises(ValueError, match="third_moment must be one of 'cubic'"):
        third_moment_report(state, **{**CUBIC, "third_moment": "quartic"})
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1"):
        third_moment_report(state, **{**CUBIC, "b2": 1.0})
    stacked = jax.vmap(adam3(1e-3).init)(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"count has shape .* of several"):
        third_moment_report(stacked, **CUBIC)
    short = jax.tree.map(lambda x: x.astype(jnp.float16), state)
    with pytest.raises(ValueError, match="the state's count must be an integer"):
        third_moment_report(short, **CUBIC)
    short = (short[0]._replace(count=state[0].count), *short[1:])
    with pytest.raises(ValueError, match=r"the state's . is of float16; it must be"):
        third_moment_report(short, **CUBIC)
    shape = jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32)
    huge = jax.eval_shape(adam3(1e-3).init, shape)
    with pytest.raises(ValueError, match="2³² elements or more"):
        jax.eval_shape(lambda state: third_moment_report(state, **CUBIC), huge)


def test_the_dict_that_made_the_optimizer_is_taken() -> None:
    rule: Any = {"b1": 0.9, "b2": 0.99, "b3": 0.9, "lam": 0.1, "tau": 1.0}
    rule["third_moment"] = "cubic"
    rest: Any = {"learning_rate": 1e-2, "weight_decay": 0.1, "m_dtype": "bfloat16"}
    optimizer = adam3w(**rule, **rest, eps=1e-6)
    params = jnp.ones(8)
    _, state = optimizer.update(params, optimizer.init(params), params)
    got = third_moment_report(state, **rule, **rest, eps=1e-6).scalars()
    assert got == third_moment_report(state, **rule).scalars()
    with pytest.raises(TypeError, match="adam3w has no argument lamda, tauu"):
        third_moment_report(state, **rule, tauu=1.0, lamda=0.1)


@EACH_FORM
def test_skewness_is_finite_for_tiny_gradients(form: Any) -> None:
    h = {**CUBIC, "third_moment": form}
    scales = np.array([1e-12, 1e-13, 1e-14, 1e-15, 1e-16])
    draws = np.random.default_rng(0).exponential(size=(10, 1000, 1)) * scales
    grads = [
        {str(x): jnp.asarray(g[:, i], jnp.float32) for i, x in enumerate(scales)}
        for g in draws
    ]
    leaves = third_moment_report(run(adam3(1e-3, **h), grads), **h).leaves
    assert len(leaves) == len(scales)
    for found in leaves.values():
        assert np.isfinite(found.skewness)
        assert np.isfinite(found.skewness_tail)
    assert leaves["['1e-16']"].skewness_tail == 0


def test_vmap_gives_each_members_report() -> None:
    optimizer = adam3(1e-3, **CUBIC)
    members = [run(optimizer, gradients(scale, 3)) for scale in (0.1, 1.0, 10.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    found = jax.vmap(lambda state: third_moment_report(state, **CUBIC))(stacked)
    wanted = [third_moment_report(state, **CUBIC).overall.ratio for state in members]
    np.testing.assert_allclose(found.overall.ratio, wanted, rtol=1e-5)


def state_of(m: Any, v: Any, s: Any, count: int = 10**6) -> Any:
    """Returns a state with corrections of 1."""
    m, v, s = (jnp.asarray(np.float32(x)) for x in (m, v, s))
    return ScaleByAdam3State(m, v, s, jnp.int32(count))


PLAIN: dict[str, Any] = {"b1": 0.9, "b2": 0.9, "b3": 0.9, "lam": 0.01, "tau": 1.0}
ONES = np.ones(5)
VERDICTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing yet": (0 * ONES, {}, "No element has had a gradient yet"),
    "NaN": (math.nan * ONES, {}, "The state holds NaN"),
    "lam 0": (0.5 * ONES, {"lam": 0.0}, "for lam is 0: this step is Adam's."),
    "cubic": (
        1e-7 * ONES,
        {},
        "changes nothing: median ratio 1e-09, 0.999 quantile 1e-09; rescale the loss",
    ),
    "half": (
        [1e-7] * 3 + [0.5] * 2,
        {},
        "changes nothing in 60.0% of the elements: med",
    ),
    "standardized": (
        1e-7 * ONES,
        {"third_moment": "standardized"},
        "; a larger lam or tau,",
    ),
    "clipped": (3 * ONES, {}, "clipped in 100% of the elements, where only its sign"),
    "no clip": (
        3 * ONES,
        {"tau": math.inf},
        "momentum: median ratio 3e-02, by 3.0% of it. Only a run with",
    ),
    "outweighs": (
        0.5 * ONES,
        {"lam": -9.0},
        "outweighs the momentum: median ratio 4e+00",
    ),
    "hardly": (
        0.01 * ONES,
        {},
        "hardly shifts the momentum: median ratio 1e-04, too little",
    ),
    "shifts": (
        -0.5 * ONES,
        {},
        "momentum: median ratio 5e-03, by 0.5% of it. Only a run",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case: str) -> None:
    s, changed, wanted = VERDICTS[case]
    h = {**PLAIN, "third_moment": "cubic", **changed}
    still = 0 * ONES if case == "nothing yet" else ONES
    verdict = third_moment_report(state_of(still, still, s), **h).verdict()
    assert wanted in verdict
    assert re.fullmatch(r"[A-Z].*\.", verdict)


def test_verdict_where_m_rests_at_0() -> None:
    m, v, s = jnp.zeros(5, jnp.bfloat16), jnp.ones(5), jnp.full(5, 0.5)
    report = third_moment_report(
        ScaleByAdam3State(m, v, s, jnp.int32(9)), **PLAIN, third_moment="cubic"
    )
    assert "outweighs the momentum: median ratio inf; a smaller" in report.verdict()
    # A logger gets a number that leaves a chart's axis readable.
    assert report.scalars("")["ratio"] == report.scalars("")["ratio_tail"] == 1e6


def test_no_step_and_no_parameters() -> None:
    for params in ({}, {"w": None}, jnp.ones(3), jnp.ones(()), jnp.ones((0, 4))):
        report = third_moment_report(adam3(1e-3).init(params), **CUBIC)
        assert report.verdict().startswith("No element has had a gradient yet")
        found = report.scalars()
        assert found.pop("third_moment/elements") == 0
        found.pop("third_moment/state_bytes")
        assert all(map(math.isnan, found.values()))


def test_a_small_v_is_a_gradient_and_a_zero_skewness() -> None:
    state = state_of([1e-30, 0, 1], [0, 0, 1e-40], [0, 0, 0])
    found = third_moment_report(state, **CUBIC).overall
    assert (float(found.elements), float(found.skewness)) == (2, 0)


def test_large_leaves_are_counted_exactly() -> None:
    # A sum in float32 would stop at 2²⁴ = 16,777,216.
    count = 2**24 + 2**20
    with_term = np.arange(count) % 4 == 0
    state = state_of(np.ones(count), np.ones(count), 2.0 * with_term)
    found = third_moment_report(state, **PLAIN, third_moment="cubic").overall
    assert (float(found.elements), float(found.clipped)) == (count, 0.25)
    assert float(found.without_effect) == 0.75
    assert (float(found.ratio), float(found.skewness_tail)) == (0, 2)


def test_in_double_precision(x64: None) -> None:
    m, v, s = (jnp.full(5, x, jnp.float64) for x in (1.0, 1.0, 1e-12))
    state = ScaleByAdam3State(m, v, s, jnp.int32(9))
    found = third_moment_report(state, **PLAIN, third_moment="cubic").overall
    assert float(found.without_effect) == 0  # 1 + 1e-14 is not 1 in float64
    assert found.ratio.dtype == jnp.float32


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P("data", "model")),
        (AxisType.Explicit, P("data", "model")),
        (AxisType.Auto, P("data", None)),
        (AxisType.Auto, P(None, "model")),
    ],
)
def test_sharded_leaves_stay(kind: Any, spec: Any) -> None:
    mesh = mesh_of(kind)
    grads = [{"w": g["w"][:16]} for g in gradients(1.0, 3)]
    state = run(adam3(1e-3, **CUBIC, **STORAGE["float8"]), grads)
    where, whole = on(mesh, spec), on(mesh, P())
    split = jax.tree.map(
        lambda x: jax.device_put(x, where if x.ndim == 2 else whole), state
    )
    jitted = jax.jit(lambda state: third_moment_report(state, **CUBIC))
    # An Auto mesh sums in the order of its parts, so the last digit may differ.
    want = scalars(third_moment_report(state, **CUBIC))
    assert scalars(jitted(split)) == pytest.approx(want, rel=1e-6)
    program = jitted.lower(split).compile().as_text() or ""
    call = r"= \(?\w+\[([\d,]*)\]\S* (all|reduce-scatter|collective)[\w-]*\("
    shapes = [found[1] for found in re.finditer(call, program)]
    assert shapes
    for shape in shapes:  # one number for each device
        assert math.prod(int(n) for n in shape.split(",") if n) <= 8, shape


def test_pure_and_traced_once() -> None:
    traced = []

    @jax.jit
    def report(state: Any) -> ThirdMomentReport:
        traced.append(1)
        return third_moment_report(state, **CUBIC)

    state = run(adam3(1e-3, **CUBIC), gradients(1.0, 2))
    before = [np.array(x) for x in jax.tree.leaves(state)]
    assert scalars(report(state)) == scalars(report(state))
    report(run(adam3(1e-3, **CUBIC), gradients(2.0, 5)))
    assert len(traced) == 1
    for old, new in zip(before, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_scalars_and_table() -> None:
    report = third_moment_report(run(adam3(1e-3, **CUBIC), gradients(1.0, 2)), **CUBIC)
    found = report.scalars("opt/", leaves=True)
    suffixes = ("", "['v']", "['w']")
    assert [*found] == [f"opt/{name}{leaf}" for leaf in suffixes for name in NAMES]
    assert {type(x) for x in found.values()} == {float}
    assert [*report.scalars()] == [f"third_moment/{name}" for name in NAMES]
    head, *lines = report.table().splitlines()
    assert re.split(r"  +", head) == [
        "leaf", "elements", "skewness", "(tail)", "|b|/|m|", "(tail)", "clipped",
        "no effect", "bytes",
    ]  # fmt: skip
    cells = [line.split() for line in lines]
    assert [(x[0], x[1], x[-1]) for x in cells] == [
        ("['v']", "9", "108"),
        ("['w']", "1,140", "14,400"),
        ("all", "1,149", "14,508"),
    ]
    assert cells[2][4] == f"{found['opt/ratio']:.1e}"
    assert len({len(line) for line in (head, *lines)}) == 1
