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

from adam3_optax import ScaleByAdam3State, adam3, scale_by_adam3, third_moment_report
from tests import reference, settings
from tests.settings import EACH_FORM, FORMS, STORAGE, UNBOUNDED, mesh_of, on, train

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


def run(optimizer: Any, grads: list[Any]) -> Any:
    return train(optimizer, jax.tree.map(jnp.zeros_like, grads[0]), grads)[1]


def loaded(state: Any, form: Any) -> list[Any]:
    """Returns the moments of each leaf in float64, however they are stored."""
    rows = zip(*map(jax.tree.leaves, state.moments), strict=True)
    leaves = [dict(zip("mvs", row, strict=True)) for row in rows]
    return [settings.loaded(state._replace(**leaf), form) for leaf in leaves]


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
        (UNBOUNDED[0], "smallest"),
    ],
)
def test_statistics_are_those_of_the_definitions(form: Any, name: str) -> None:
    h = {**RULE, "third_moment": form}
    scale = 0.3 if form == "cubic" else 1.0
    state = run(adam3(1e-3, **h, **STORAGE[name]), gradients(scale))
    report = third_moment_report(state, **h)
    moments = loaded(state[0], form)
    assert report.names == ("['v']", "['w']")
    sizes = 9 * SIZES[name], 1200 * SIZES[name]
    check(report.overall, moments, 12, h, sum(sizes))
    for leaf, moment, size in zip(report.names, moments, sizes, strict=True):
        check(report.leaves[leaf], [moment], 12, h, size)
    assert float(report.lam) == pytest.approx(0.02)
    # So that the test is of something.
    assert 0.005 < float(report.overall.clipped) < 0.9
    unseen = 40 + 20
    assert 1209 - unseen - 2 <= float(report.overall.elements) <= 1209 - unseen


# The states that hold it.


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
    assert report.scalars() == pytest.approx(wanted.scalars(), rel=1e-4)
    # What is given goes before: a `lam` of the state may be another transformation's.
    given = third_moment_report(state, lam=0.125, third_moment="cubic")
    half = float(wanted.overall.ratio) / 2
    assert float(given.overall.ratio) == pytest.approx(half, rel=1e-4)


def test_wrong_input_is_named() -> None:
    state: Any = scale_by_adam3().init(jnp.ones(3))
    cast = jax.tree.map(lambda x: x.astype(jnp.float16), state)
    stacked = jax.vmap(scale_by_adam3().init)(jnp.ones((4, 3)))
    without = scale_by_adam3(third_moment=None).init(jnp.ones(3))
    size = jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (optax.adam(1e-3).init(jnp.ones(3)), {}, "no ScaleByAdam3State in"),
        (state, {"third_moment": "quartic"}, "third_moment must be one of 'cubic'"),
        (state, {"b2": 1.0}, r"b2 must be in \[0, 1\), got 1"),
        (state, {"b2": None, "tau": None}, "^b2, tau must be given, as to the"),
        (stacked, {}, r"count has shape \(4,\).* of several"),
        (cast, {}, "the state's count must be an integer"),
        (cast._replace(count=state.count), {}, "state's . is of float16; it must be"),
        (state, {"third_moment": None}, "no third moment to report"),
        (without, {}, "no third moment to report"),
        (jax.eval_shape(scale_by_adam3().init, size), {}, "2³² elements or more"),
    ]
    for wrong, changed, message in cases:
        rule = {**CUBIC, **changed}
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda x, rule=rule: third_moment_report(x, **rule), wrong)
    # The dict that made the optimizer is taken, but what is no argument of it is not.
    rest: Any = {"learning_rate": 1e-2, "weight_decay": 0.1, "m_dtype": "bfloat16"}
    third_moment_report(state, **CUBIC, **rest, eps=1e-6)
    with pytest.raises(TypeError, match="adam3w has no argument lamda, tauu"):
        third_moment_report(state, **CUBIC, tauu=1.0, lamda=0.1)


# Numbers at their edges.


@EACH_FORM
def test_skewness_is_finite_for_tiny_gradients(form: Any) -> None:
    h = {**CUBIC, "third_moment": form}
    draws = np.random.default_rng(0).exponential(size=(10, 1000))
    scales = [1e-12, 1e-13, 1e-14, 1e-15, 1e-16]
    grads = [[jnp.asarray(g * x, jnp.float32) for x in scales] for g in draws]
    leaves = third_moment_report(run(adam3(1e-3, **h), grads), **h).leaves
    found = [(x.skewness, x.skewness_tail) for x in leaves.values()]
    assert np.isfinite(found).all()
    assert found[-1][1] == 0


def state_of(*fields: Any) -> Any:
    """Returns a state with corrections of 1."""
    m, v, s = (jnp.asarray(np.asarray(x, np.float32)) for x in fields)
    return ScaleByAdam3State(m, v, s, jnp.int32(10**6))


PLAIN: dict[str, Any] = {"b1": 0.9, "b2": 0.9, "b3": 0.9, "lam": 0.01, "tau": 1.0}
PLAIN["third_moment"] = "cubic"


def test_large_leaves_are_counted_exactly() -> None:
    # A sum in float32 would stop at 2²⁴ = 16,777,216.
    count = 2**24 + 2**20
    with_term = np.arange(count) % 4 == 0
    state = state_of(np.ones(count), np.ones(count), 2.0 * with_term)
    found = third_moment_report(state, **PLAIN).overall
    assert (float(found.elements), float(found.clipped)) == (count, 0.25)
    assert float(found.without_effect) == 0.75
    assert (float(found.ratio), float(found.skewness_tail)) == (0, 2)


# What it says.

# Fields of the state, what is unlike PLAIN, and words of the sentence.
VERDICTS: list[tuple[Any, dict[str, Any], str]] = [
    ((0, 0, 0), {}, "No element has had a gradient yet"),
    ((1, 1, math.nan), {}, "The state holds NaN"),
    ((1, 1, 0.5), {"lam": 0.0}, "for lam is 0: this step is Adam's."),
    ((1, 1, 1e-7), {}, "median ratio 1e-09, 0.999 quantile 1e-09; rescale the loss"),
    ((1, 1, [1e-7] * 3 + [0.5] * 2), {}, "nothing in 60.0% of the elements: med"),
    ((1, 1, 1e-7), {"third_moment": "standardized"}, "; a larger lam or tau,"),
    ((1, 1, 3), {}, "clipped in 100% of the elements, where only its sign"),
    ((1, 1, 3), {"tau": math.inf}, "median ratio 3e-02, by 3.0% of it. Only a run"),
    ((1, 1, 0.5), {"lam": -9.0}, "outweighs the momentum: median ratio 4e+00"),
    ((1, 1, 0.01), {}, "hardly shifts the momentum: median ratio 1e-04, too little"),
    ((1, 1, -0.5), {}, "shifts the momentum: median ratio 5e-03, by 0.5% of it."),
    ((0, 1, 0.5), {}, "outweighs the momentum: median ratio inf; a smaller"),
]


@pytest.mark.parametrize(("fields", "changed", "wanted"), VERDICTS)
def test_verdict(fields: Any, changed: dict[str, Any], wanted: str) -> None:
    state = state_of(*(np.broadcast_to(x, 5) for x in fields))
    report = third_moment_report(state, **{**PLAIN, **changed})
    assert wanted in report.verdict()
    # A logger gets numbers that leave a chart's axis readable.
    assert not any(x > 1e6 for x in report.scalars().values())


def test_no_step_and_no_parameters() -> None:
    for params in ({}, {"w": None}, jnp.ones(3), jnp.ones(()), jnp.ones((0, 4))):
        report = third_moment_report(adam3(1e-3).init(params), **CUBIC)
        assert report.verdict().startswith("No element has had a gradient yet")
        found = report.scalars("")
        assert found.pop("elements") == 0
        found.pop("state_bytes")
        assert all(map(math.isnan, found.values()))


def test_scalars_and_table() -> None:
    report = third_moment_report(run(adam3(1e-3, **CUBIC), gradients(1.0, 2)), **CUBIC)
    found = report.scalars("opt/", leaves=True)
    suffixes = ("", "['v']", "['w']")
    assert [*found] == [f"opt/{name}{leaf}" for leaf in suffixes for name in NAMES]
    assert {type(x) for x in found.values()} == {float}
    assert [*report.scalars()] == [f"third_moment/{name}" for name in NAMES]
    head, *lines = report.table().splitlines()
    titles = "leaf elements skewness (tail) |b|/|m| (tail) clipped no effect bytes"
    assert head.split() == titles.split()
    cells = [line.split() for line in lines]
    assert [(x[0], x[1], x[-1]) for x in cells] == [
        ("['v']", "9", "108"),
        ("['w']", "1,140", "14,400"),
        ("all", "1,149", "14,508"),
    ]
    assert cells[2][4] == f"{found['opt/ratio']:.1e}"
    assert len({len(line) for line in (head, *lines)}) == 1


# Under jit, under vmap, on a mesh.


def test_several_reports_are_named() -> None:
    states = jax.vmap(adam3(1e-3).init)(jnp.ones((4, 3)))
    found = jax.vmap(lambda state: third_moment_report(state, **CUBIC))(states)
    for method in (found.scalars, found.verdict, found.table):
        with pytest.raises(ValueError, match=r"jax\.vmap made several reports"):
            method()
    one = jax.tree.map(lambda x: x[2], found)
    assert one.verdict().startswith("No element has had a gradient yet")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "spec"),
    [(AxisType.Explicit, P("data", "model")), (AxisType.Auto, P(None, "model"))],
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
    want = third_moment_report(state, **CUBIC).scalars()
    assert jitted(split).scalars() == pytest.approx(want, rel=1e-6)
    program = jitted.lower(split).compile().as_text() or ""
    call = r"= \(?\w+\[([\d,]*)\]\S* (all|reduce-scatter|collective)[\w-]*\("
    shapes = [found[1] for found in re.finditer(call, program)]
    assert shapes
    for shape in shapes:  # one number for each device
        assert math.prod(int(n) for n in shape.split(",") if n) <= 8, shape
