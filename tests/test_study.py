"""The study: its statistics, its design, its pairing, its record, and a tiny run."""

import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam3_optax
from tests.settings import EACH_FORM, FORMS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "studies"
STUDIES = FOLDER / "configurations"
stats: Any = importlib.import_module("scipy.stats")  # it has no types
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
SHARED = {"lr": 1e-2, "warm_up": 0.1, "b2": 0.99, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, standard_promotion: None) -> None:
    """The scripts import one another as scripts do, and run Optax's own code."""
    monkeypatch.syspath_prepend(str(FOLDER))


def slow(*kinds: str) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def part(name: str) -> Any:
    return importlib.import_module(f"study.{name}")


# --- Statistics ---------------------------------------------------------------------


def test_statistics_of_paired_differences() -> None:
    compare = part("statistics").compare
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.3, 10)
    arm = base + rng.normal(0.02, 0.03, 10)
    found = compare(arm, base, 0.05)
    d = arm - base
    assert found.n == 10
    assert found.difference == pytest.approx(d.mean())
    assert found.sd == pytest.approx(np.std(d, ddof=1))
    # By hand: mean ± 2.262·sd/sqrt(10), the t quantile of 9 degrees of freedom.
    half = 2.26216 * found.sd / math.sqrt(10)
    assert found.interval == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-4)
    assert found.p == pytest.approx(stats.ttest_rel(arm, base).pvalue)
    assert found.detectable == pytest.approx(2.8 * found.sd / math.sqrt(10))
    low, high = found.bootstrap
    assert low < found.difference < high
    assert high - low == pytest.approx(2 * 1.96 * found.sd / math.sqrt(10), rel=0.25)
    # Equivalence: the 90% interval lies within the margin just where p < .05.
    reach = abs(d.mean()) + 1.83311 * found.sd / math.sqrt(10)
    assert compare(arm, base, reach * 1.001).p_equivalence < 0.05
    assert compare(arm, base, reach * 0.999).p_equivalence > 0.05


def test_differences_without_spread_need_no_test() -> None:
    compare = part("statistics").compare
    same = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.01)
    assert (same.difference, same.p, same.p_equivalence) == (0, 1, 0)
    apart = compare([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], 0.1)
    assert (apart.difference, apart.p, apart.p_equivalence) == (0.5, 0, 1)
    with pytest.raises(ValueError, match="two pairs at least"):
        compare([1.0], [1.0], 0.1)


def test_holm_by_hand() -> None:
    holm = part("statistics").holm
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("difference", "p", "p_equivalence", "said"),
    [
        (-0.1, 0.01, 0.9, "better"),
        (0.1, 0.01, 0.9, "worse"),
        (0.1, 0.01, 0.01, "worse, within the margin"),
        (0.1, 0.2, 0.01, "equivalent"),
        (-0.1, 0.2, 0.2, "undecided"),
    ],
)
def test_verdict(difference: float, p: float, p_equivalence: float, said: str) -> None:
    assert part("statistics").verdict(difference, p, p_equivalence, 0.05) == said


def test_the_best_of_fewer_settings_against_all_draws() -> None:
    effort = part("effort")
    losses = [3.0, None, 1.0, 2.0, 5.0, 1.5]
    for count in (2, 3, 6):
        draws = itertools.combinations(
            [math.inf if x is None else x for x in losses], count
        )
        want = np.mean([min(draw) for draw in draws])
        assert effort.best_of(losses, count) == pytest.approx(want)
    assert effort.best_of(losses, 1) is None  # which may be the one that diverged


def test_the_best_with_a_small_and_with_a_large_eps() -> None:
    effort = part("effort")
    settings = [({"eps": 1e-6}, 2.0), ({"eps": 1e-8}, 1.0), ({"eps": 5e-5}, 0.1)]
    assert effort.best_by_eps(settings) == {"small": 1.0, "large": None}
    more = [*settings, ({"eps": 0.1}, 3.0), ({"eps": 0.01}, None), ({}, 0.0)]
    assert effort.best_by_eps(more) == {"small": 1.0, "large": 3.0}


def test_settings_against_settings_by_hand() -> None:
    effort = part("effort")
    ours, theirs = [1.0, 3.0, None, None, 2.0], [2.0, 2.0, 1.0, None, None]
    better, median = effort.matched(ours, theirs)
    assert better == 0.5  # the first and the last of four
    assert median == pytest.approx((-0.5 + 0.5) / 2)


def test_steps_to_the_baseline() -> None:
    steps_to = part("statistics").steps_to
    assert steps_to(1.5, [3.0, 2.0, 1.0, 0.5], 400) == 250
    assert steps_to(5.0, [3.0, 2.0], 400) == 200
    assert steps_to(0.1, [3.0, 2.0], 400) is None


# --- The design ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.toml")))
def test_every_arm_has_as_many_trials_on_shared_points(name: str) -> None:
    plan = part("plan")
    study = plan.load(STUDIES / f"{name}.toml")
    for task in study.tuned_tasks():
        base = plan.settings(study, task, study.baseline)
        for arm in study.arms:
            mine = plan.settings(study, task, arm)
            assert len(mine) == study.tuning["trials"]
            ratio = study.arms[arm].get("rate", 1.0)
            for ours, theirs in zip(mine, base, strict=True):
                assert ours["lr"] == pytest.approx(ratio * theirs["lr"], rel=1e-5)
                for x in ("warm_up", "b2", "weight_decay"):
                    assert ours[x] == theirs[x]


@pytest.mark.parametrize(
    "name",
    ["main", "search", "confirm", "characters", "fair", "fair_language"],
)
def test_the_design_has_five_learning_rates_a_decade(name: str) -> None:
    plan = part("plan")
    study = plan.load(STUDIES / f"{name}.toml")
    assert study.final["seeds"] >= 8
    for task in study.tuned_tasks():
        for arm in study.arms:
            settings = plan.settings(study, task, arm)
            lr = np.log10([x["lr"] for x in settings])
            low = math.log10(plan.centre(study, task, arm)) - study.space["decades"] / 2
            for decade in range(int(study.space["decades"])):
                begin = low + decade
                assert ((lr >= begin) & (lr < begin + 1)).sum() >= 5
            # Stratified: no two of the first 16 in the same sixteenth.
            cells = np.floor((lr[:16] - low) / study.space["decades"] * 16)
            assert len(set(cells)) == 16


def test_a_task_may_be_tuned_on_more_seeds(tmp_path: Path) -> None:
    plan = part("plan")
    line = 'kind = "digits"'
    study = plan.load(edited(tmp_path, (line, line + "\ntuning_seeds = [0, 7, 8]")))
    of_digits = {x.seed for x in plan.tune(study) if x.task == "digits"}
    assert of_digits == {0, 7, 8}
    others = {x.seed for x in plan.tune(study) if x.task != "digits"}
    assert others <= set(study.tuning["seeds"])
    # A trial is the same with them as without: what has run is not run again.
    before = plan.load(edited(tmp_path))
    [old, new] = (
        next(y for y in plan.tune(x) if y.task == "digits" and y.seed == 0)
        for x in (before, study)
    )
    assert before.key(old, "text") == study.key(new, "text")


def test_numbers_stay_in_their_ranges() -> None:
    plan = part("plan")
    assert plan.spread("warm_up", [0.0, 0.2], 0.5) == 0.1
    assert plan.spread("lam", [0.01, 1.0], 0.5) == pytest.approx(0.1)
    assert plan.spread("b2", [0.9, 0.999], 0.5) == pytest.approx(0.99)
    assert plan.spread("b2", [0.9, 0.999], 0.0) == pytest.approx(0.9)


def test_smoothing_takes_no_column_of_the_others() -> None:
    # A further dimension would move the points of all; they are those of the records.
    plan = part("plan")
    points = plan.design(8, 2)
    wanted = stats.qmc.Sobol(11, scramble=True, rng=2).random(8)
    np.testing.assert_array_equal(points[:, :11], wanted)
    own = plan.DIMENSIONS.index("smoothing")
    np.testing.assert_array_equal(points[:, own], wanted[:, 10])  # that of beta
    study = plan.load(STUDIES / "fair.toml")
    found = [x["smoothing"] for x in plan.settings(study, "spelling", "smoothed")]
    assert 0 <= min(found) < 0.01
    assert 0.19 < max(found) <= 0.2
    assert np.mean(found) == pytest.approx(0.1, abs=0.005)  # spread evenly


def test_the_fair_study_tunes_eps_in_every_arm() -> None:
    plan = part("plan")
    study = plan.load(STUDIES / "fair.toml")
    for task in study.tasks:
        for arm in study.arms:
            eps = np.log10([x["eps"] for x in plan.settings(study, task, arm)])
            if arm == "cubic_at_scale_1":
                eps += np.log10(0.004)  # in units of the gradient
            cells = np.floor((eps + 8) / 7 * 16)
            assert set(cells[:16]) == set(range(16)), (task, arm)


@pytest.mark.parametrize(
    ("name", "ends", "value", "wanted"),
    [
        ("warm_up", [0.1, 0.3], 0.15, 0.25),
        ("smoothing", [0.0, 0.2], 0.01, 0.05),
        ("b2", [0.9, 0.999], 0.99, 0.5),
        ("eps", [1e-8, 0.1], 0.1, 1.0),
        ("lam", [0.01, 1.0], 0.1, 0.5),
    ],
)
def test_the_place_of_a_number(
    name: str, ends: list[float], value: float, wanted: float
) -> None:
    plan = part("plan")
    assert plan.position(name, ends, value) == pytest.approx(wanted)
    assert plan.spread(name, ends, wanted) == pytest.approx(value)


def test_edges_of_every_number(tmp_path: Path) -> None:
    plan, record = part("plan"), part("record").Record(tmp_path)
    study = plan.load(STUDIES / "fair.toml")
    settings = plan.settings(study, "spelling", "smoothed")
    # The best is the setting with the least smoothing, and has a large loss elsewhere.
    chosen = min(settings, key=lambda h: h["smoothing"])
    for h in settings:
        for seed in (0, 1):
            trial = plan.Trial("tune", "spelling", "smoothed", "smoothed", h, seed)
            final = 1.0 if h == chosen else 2.0 + seed
            key = study.key(trial, "text")
            record.rows[key] = {"key": key, "final": final}
    found = plan.best(study, record, "text", "spelling", "smoothed")
    assert found.h == chosen
    tuned = {"lr", "warm_up", "b2", "weight_decay", "b1", "eps", "smoothing"}
    assert set(found.positions) == tuned
    half, lr = 3.5 / 2, math.log10(chosen["lr"] / 5e-2)
    assert found.positions["lr"] == pytest.approx((lr + half) / 3.5, abs=1e-5)
    eps = (math.log10(chosen["eps"]) + 8) / 7
    assert found.positions["eps"] == pytest.approx(eps, abs=1e-5)
    outer = {x for x, y in found.positions.items() if y < 0.1 or y > 0.9}
    assert set(found.edges) == outer
    assert "smoothing" in found.edges
    assert outer != tuned


def edited(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = (STUDIES / "tiny.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("alpha = 0.05", "", "the study lacks alpha"),
        ("workers = 2", "workers = 0", "workers must be above 0, got 0"),
        (
            "trials = 2",
            'trials = "two"',
            "tuning.trials must be of type int, got 'two'",
        ),
        (
            'rule = "standardized"',
            'rule = "sgd"',
            "must be one of adamw, .*, got 'sgd'",
        ),
        ('kind = "digits"', 'kind = "letters"', "kind must be one of characters, .*"),
        ("width = 8", "size = 8", "tasks.digits: digits has no option 'size'; it has"),
        ("batch = 8", "batch = 7", "batch must be even, got 7"),
        ("width = 8", "tuning_seeds = []", "digits.tuning_seeds must be whole numbers"),
        ("width = 8", "tuning_seeds = [101]", "must be fresh, but .101. are not"),
        ("lam = [0.001, 0.3]", "lam = [0.3, 0.001]", "space.lam must be a number or a"),
        ("first = 100", "first = 50", "final's seeds must be fresh, but .50. are not"),
        ('baseline = "adamw"', 'baseline = "sgd"', "'sgd' is none of .arms."),
        ("steps = 20", "steps = 30", "must be a multiple of 20"),
        ('task = "quadratic"', 'task = "cubic"', "'cubic' is none of .tasks."),
        ("decades = 2.0", "decades =", "Invalid value"),
        ("[tuning]", '[primary]\narm = "adamw"\n[tuning]', "'adamw' is no arm beside"),
        (
            'rule = "standardized"',
            'rule = "smoothed"\n[tasks.words]\nkind = "words"\nsteps = 20\n'
            "lr = 1.0\nlanes = 1",
            "tasks.words has no labels that an arm could smooth",
        ),
        (
            "[checks.identity]",
            "[checks.class_means]\nshrinkage = []\nvariance = [1.0]\n[checks.identity]",
            "checks.class_means.shrinkage is empty",
        ),
    ],
)
def test_mistakes_in_a_study(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        part("plan").load(edited(tmp_path, (old, new)))


def test_the_key_is_of_what_defines_a_trial(tmp_path: Path) -> None:
    plan = part("plan")
    study = plan.load(STUDIES / "tiny.toml")
    [trial, *_] = plan.tune(study)
    key = study.key(trial, "text")
    assert key == study.key(trial, "another text")  # digits see no text
    assert key != study.key(trial._replace(seed=1), "text")
    assert key != study.key(trial._replace(rule="lion"), "text")
    assert key != study.key(trial._replace(h={**trial.h, "lr": 1.0}), "text")
    wider = plan.load(edited(tmp_path, ("width = 8", "width = 9")))
    assert key != wider.key(trial, "text")
    quick = plan.load(edited(tmp_path, ("lanes = 2", "lanes = 1")))
    assert key == quick.key(trial, "text")
    main = plan.load(STUDIES / "main.toml")
    [trial, *_] = plan.tune(main)
    assert trial.task == "characters"
    assert main.key(trial, "text") != main.key(trial, "another text")


# --- Training -----------------------------------------------------------------------


def program(rule: str, *, lanes: int, task: Any = None, steps: int = 20) -> Any:
    task = task or part("tasks").digits(width=8, batch=8)
    return part("training").Program(
        task, part("arms").RULES[rule], steps=steps, points=20, lanes=lanes
    )


def setting(rule: str, **changes: float) -> dict[str, float]:
    return {**part("arms").RULES[rule].numbers, **SHARED, **changes}


@pytest.mark.slow
def test_lanes_train_as_they_would_alone() -> None:
    # Batched products are summed in another order: an ulp of 6e-8 a step, which 20
    # steps of Adam, whose update does not shrink with the gradient, may carry on.
    task = part("tasks").digits(width=8, batch=8)
    trials = [
        (setting("standardized", lr=x), seed) for x, seed in ((1e-3, 0), (3e-2, 1))
    ]
    alone = program("standardized", lanes=1, task=task)
    together = program("standardized", lanes=2, task=task).train(trials)
    for trial, row in zip(trials, together, strict=True):
        [single] = alone.train([trial])
        np.testing.assert_allclose(
            row["validation_loss"], single["validation_loss"], rtol=2e-4
        )
        assert row["state_bytes"] == single["state_bytes"]
    assert together[0]["validation_loss"] != together[1]["validation_loss"]


@pytest.mark.slow
def test_arms_are_paired_by_the_seed() -> None:
    # With a learning rate of 0 parameters stay, so that the training losses are those
    # of the initialisation on the batches; they must be the same for all rules.
    still = {
        rule: program(rule, lanes=1).train([(setting(rule, lr=0.0), seed)])[0]
        for rule in ("adamw", "random_sign")
        for seed in (3,)
    }
    first, *rest = (row["training_loss"] for row in still.values())
    assert all(losses == first for losses in rest)
    [other] = program("adamw", lanes=1).train([(setting("adamw", lr=0.0), 4)])
    assert other["training_loss"] != first
    assert len(set(first)) > 1  # batches differ from step to step


@pytest.mark.slow
def test_smoothing_of_0_is_adamw_and_more_is_not() -> None:
    train = program("smoothed", lanes=2).train
    found = [(setting("smoothed", smoothing=x), 0) for x in (0.0, 0.2)]
    none, some = (x["training_loss"] for x in train(found))
    [plain] = program("adamw", lanes=1).train([(setting("adamw"), 0)])
    np.testing.assert_allclose(none, plain["training_loss"], rtol=2e-4)
    assert abs(some[-1] / none[-1] - 1) > 0.01


@pytest.mark.slow
def test_the_smoothed_loss_against_numpy() -> None:
    task = part("tasks").digits(width=8, batch=8)
    params = task.init(jax.random.key(0))
    x, y = task.batch(jax.random.key(1), ())
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    hidden = np.maximum(np.asarray(x) @ w["hidden"] + w["hidden_bias"], 0)
    logits = hidden @ w["output"] + w["bias"]
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = 0.9 * np.eye(10)[np.asarray(y)] + 0.1 / 10
    wanted = -(target * np.log(share)).sum(axis=1).mean()
    assert float(task.loss(params, (x, y), smoothing=0.1)) == pytest.approx(wanted)


@pytest.mark.slow
def test_arms_see_the_same_data_and_seeds_their_own() -> None:
    tasks = part("tasks")
    task = tasks.softmax(fresh=True, classes=8, examples=64, features=4, batch=8)
    drawn = {
        seed: task.data(part("training").keys_of(jnp.uint32(seed))[3])
        for seed in (3, 4)
    }
    for rule in ("adamw", "random_sign"):
        train = program(rule, lanes=2, task=task).train
        # With a learning rate of 0 all logits stay 0, and the answer is class 0.
        rows = train([(setting(rule, lr=0.0), seed) for seed in drawn])
        for row, data in zip(rows, drawn.values(), strict=True):
            wrong = np.mean(np.asarray(data.y_out) != 0)
            assert row["validation_error"] == pytest.approx([wrong] * 20)
    keys = part("training").keys_of(jnp.uint32(3))
    key = jax.random.key(3)
    words = jax.random.key_data(keys)
    np.testing.assert_array_equal(
        words[:3], jax.random.key_data(jax.random.split(key, 3))
    )
    assert len({tuple(x) for x in words.tolist()}) == 4
    one, two = drawn.values()
    assert not (np.asarray(one.x) == np.asarray(two.x)).any()
    assert np.mean(one.y_out == 0) != np.mean(two.y_out == 0)


@pytest.mark.slow
def test_what_is_logged() -> None:
    [row] = program("standardized", lanes=1).train([(setting("standardized"), 0)])
    for name in ("validation_loss", "training_loss", "ratio", "ratio_tail", "clipped"):
        assert len(row[name]) == 20
    assert row["finite"] is True
    assert row["final"] == row["validation_loss"][-1] < row["validation_loss"][0]
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    assert row["state_bytes"] == 12 * parameters + 8  # the count, and the schedule's
    assert all(-1 <= x <= 1 for x in row["agreement"] if x is not None)
    assert row["seconds"] > 0
    assert 0 <= row["validation_error"][-1] <= 1


@pytest.mark.slow
def test_a_diverged_run_is_recorded_as_such() -> None:
    [row] = program("adamw", lanes=1).train([(setting("adamw", lr=1e30), 0)])
    assert (row["finite"], row["final"]) == (False, None)
    assert None in row["validation_loss"]
    json.dumps(row, allow_nan=False)


@pytest.mark.slow
def test_halves_of_a_batch_agree_where_the_skewness_is_real() -> None:
    # All elements have the same skewness; the correlation is over elements, and finds
    # none. Elements of opposite skewness it tells apart.
    arms = part("arms")
    h = {"b1": 0.9, "b2": 0.99, "b3": 0.99, "lam": 0.0, "tau": 1.0, "eps": 1e-8}
    rule = adam3_optax.scale_by_adam3(
        h["b1"], h["b2"], b3=h["b3"], third_moment="standardized"
    )
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.exponential(size=(600, 2, 64)) - 1, jnp.float32)
    sign = jnp.asarray(np.repeat([1.0, -1.0], 32), jnp.float32)

    def agreement(gradients: jax.Array) -> float:
        def step(state: Any, g: jax.Array) -> Any:
            return jax.vmap(rule.update)(g, state)[1], None

        state = jax.vmap(rule.init)(jnp.zeros((2, 64)))
        state, _ = jax.lax.scan(step, state, gradients)
        return float(arms.agreement(state, h))

    assert agreement(noise * sign) > 0.9
    assert abs(agreement(noise)) < 0.4  # 64 elements: sd 1/8


@pytest.mark.slow
def test_the_measured_ratio_is_that_of_the_update() -> None:
    arms = part("arms")
    h = setting("standardized", lam=0.1, b3=0.9)
    x = arms.Setting(h, jax.random.key(0), 20, 1.0)
    rng = np.random.default_rng(0)
    ours = arms.RULES["standardized"].make(x)
    plain = arms.RULES["adamw"].make(x)
    params = jnp.zeros(999)
    a, b = ours.init(params), plain.init(params)
    for _ in range(5):
        g = jnp.asarray(rng.exponential(size=999) - 1, jnp.float32)
        (u, a), (w, b) = ours.update(g, a), plain.update(g, b)
    ratio = np.abs(np.asarray(u) - np.asarray(w)) / np.abs(np.asarray(w))
    found = arms.mechanism(arms.RULES["standardized"], a, x)
    assert float(found["ratio"]) == pytest.approx(np.median(ratio), rel=1e-2)
    assert 0 < float(found["clipped"]) < 1
    assert arms.mechanism(arms.RULES["adamw"], b, x) == {}


# --- The arms -----------------------------------------------------------------------


def direction(rule: str, gradients: Any, **changes: float) -> tuple[Any, Any]:
    """Returns the last direction of a rule, and its state."""
    arms = part("arms")
    x = arms.Setting(setting(rule, **changes), jax.random.key(0), 20, 4.0)
    made = arms.RULES[rule].make(x)
    params = {"embed": jnp.ones((8, 16)), "hidden": jnp.ones((4, 4))}
    state = made.init(params)
    for g in gradients:
        u, state = made.update(g, state, params)
    return u, state


@pytest.fixture
def gradients() -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (8, 16), "hidden": (4, 4)}
    return [
        {
            k: jnp.asarray(rng.exponential(size=s) - 1, jnp.float32)
            for k, s in shapes.items()
        }
        for _ in range(6)
    ]


def test_adamw_and_adam3_are_those_of_their_libraries(gradients: list[Any]) -> None:
    arms = part("arms")
    params = {"embed": jnp.ones((8, 16)), "hidden": jnp.ones((4, 4))}
    rate = arms.schedule(1e-2, 0.1, 20)
    adam3w = adam3_optax.adam3w(
        rate, b2=0.99, weight_decay=0.01, third_moment="standardized"
    )
    for rule, theirs in (
        ("adamw", optax.adamw(rate, b2=0.99, weight_decay=0.01)),
        ("standardized", adam3w),
    ):
        x = arms.Setting(setting(rule), jax.random.key(0), 20, 1.0)
        ours = arms.optimizer(arms.RULES[rule], x)
        a, b = ours.init(params), theirs.init(params)
        for g in gradients:
            u, a = ours.update(g, a, params)
            w, b = theirs.update(g, b, params)
            for p, q in zip(jax.tree.leaves(u), jax.tree.leaves(w), strict=True):
                np.testing.assert_allclose(p, q, rtol=1e-6)


def test_the_schedule_warms_up_and_ends_near_0() -> None:
    rate = part("arms").schedule(2.0, 0.25, 100)
    values = np.array([float(rate(jnp.int32(t))) for t in range(100)])
    assert values.argmax() in (24, 25)
    assert values.max() == pytest.approx(2.0, rel=1e-2)
    assert values[0] == pytest.approx(2.0 / 25, rel=0.02)
    assert 0 < values[-1] < 0.01
    assert (np.diff(values[26:]) < 0).all()


@EACH_FORM
def test_lam_0_is_adam(form: str, gradients: list[Any]) -> None:
    ours, _ = direction(form, gradients, lam=0.0)
    theirs, _ = direction("adamw", gradients)
    for u, w in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(u, w, rtol=2e-5)  # Optax's rounding of 1 - b2ᵗ


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["softmax", *slow("digits", "characters")],
)
def test_identity_holds_along_a_training(kind: str, corpus: Any) -> None:
    options = {"characters": {"width": 16, "batch": 4, "windows": 4}}
    task = part("tasks").make(kind, options.get(kind, {}), corpus)
    found = part("checks").identity(task, 100)
    assert set(found["forms"]) == set(FORMS)
    for worst in found["forms"].values():
        assert worst["moments_ulp"] <= 1
        assert 0 < worst["update_ulp"] <= 4


@pytest.mark.slow
def test_identity_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, tasks = part("checks"), part("tasks")
    true: Any = adam3_optax.scale_by_adam3
    monkeypatch.setattr(
        checks, "scale_by_adam3", lambda *b, lam, **more: true(*b, lam=1e-4, **more)
    )
    with pytest.raises(AssertionError, match="update_ulp"):
        checks.identity(tasks.digits(width=8), 20)


@pytest.mark.slow
def test_the_random_sign_keeps_all_but_the_sign(gradients: list[Any]) -> None:
    adam, _ = direction("adamw", gradients)
    true, state = direction("standardized", gradients, lam=0.1)
    flipped, other = direction("random_sign", gradients, lam=0.1)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)  # moments are not touched
    term = np.asarray(true["embed"] - adam["embed"]).ravel()
    found = np.asarray(flipped["embed"] - adam["embed"]).ravel()
    np.testing.assert_allclose(np.abs(found), np.abs(term), rtol=1e-2, atol=2e-5)
    clear = np.abs(term) > 1e-3
    share = np.mean(np.sign(found[clear]) == np.sign(term[clear]))
    assert 0.3 < share < 0.7  # of about 100: sd .05
    again, _ = direction("random_sign", gradients[:-1], lam=0.1)
    before, _ = direction("standardized", gradients[:-1], lam=0.1)
    plain, _ = direction("adamw", gradients[:-1])
    now = np.sign(found) == np.sign(term)
    then = np.sign(again["embed"] - plain["embed"]) == np.sign(
        before["embed"] - plain["embed"]
    )
    assert (now != np.asarray(then).ravel()).any()  # a fresh sign at each step


@pytest.mark.parametrize("rule", ["agreeing", "magnitude"])
def test_multiplicative_variants_against_numpy(rule: str, gradients: list[Any]) -> None:
    h = setting(rule, lam=0.3, b3=0.9, tau=0.5)
    found, _ = direction(rule, gradients, lam=0.3, b3=0.9, tau=0.5)
    m = v = s = np.zeros((8, 16))
    for t, gradient in enumerate(gradients, 1):
        g = np.asarray(gradient["embed"], np.float64)
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
        s = 0.9 * s + 0.1 * (g - m_hat) ** 3
    skew = s / (1 - 0.9**6) / v_hat**1.5
    if rule == "agreeing":
        factor = 1 + 0.3 * np.clip(skew * np.sign(m_hat), -0.5, 0.5)
    else:
        factor = 1 + 0.3 * np.minimum(np.abs(skew), 0.5)
    assert h["tau"] == 0.5
    assert (np.abs(skew) > 0.5).any()
    assert (np.abs(skew) < 0.5).any()
    wanted = m_hat * factor / (np.sqrt(v_hat) + 1e-8)
    np.testing.assert_allclose(found["embed"], wanted, rtol=2e-4, atol=1e-6)


@EACH_FORM
def test_the_formulas_of_the_variants_are_the_packages(
    form: str, gradients: list[Any]
) -> None:
    moments = part("moments")
    changes = {"lam": 0.3, "b3": 0.9, "tau": 0.5}
    wanted, state = direction(form, gradients, **changes)
    k = moments.scalars(setting(form, **changes), state.count)
    for name, u in wanted.items():
        m, v, s = state.m[name], state.v[name], state.s[name]
        b = moments.term(form, v, s, k)
        assert float(jnp.abs(b).max()) > 0
        found = moments.direction(m, v, b, k)
        np.testing.assert_allclose(found, u, rtol=2e-6, atol=1e-6)  # m̂ + b cancels
    # In the first step, with a b of 0, and where nothing was ever seen.
    k = moments.scalars(setting(form, b3=0.0), jnp.int32(1))
    np.testing.assert_allclose([k.m, k.v, k.s], [10.0, 100.0, 1.0], rtol=1e-5)
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(moments.skewness(zero, zero, k), zero)
    np.testing.assert_array_equal(moments.term(form, zero, zero, k), zero)


def test_the_skewness_of_the_variants_is_the_reports() -> None:
    moments = part("moments")
    h = setting("standardized", b3=0.9, tau=1e9, lam=1.0)
    rule = adam3_optax.scale_by_adam3(
        0.9, 0.99, b3=0.9, lam=1.0, tau=1e9, eps=1e-8, third_moment="standardized"
    )
    rng = np.random.default_rng(1)
    state = rule.init(jnp.zeros(99))
    for _ in range(5):
        g = jnp.asarray(rng.exponential(size=99) - 1, jnp.float32)
        u, state = rule.update(g, state)
    k = moments.scalars(h, state.count)
    m, v, s = (np.asarray(x, np.float64) for x in (state.m, state.v, state.s))
    v_hat = v / (1 - 0.99**5)
    term = np.asarray(u, np.float64) * (np.sqrt(v_hat) + 1e-8) - m / (1 - 0.9**5)
    found = moments.skewness(state.v, state.s, k)
    np.testing.assert_allclose(found, term / np.sqrt(v_hat), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found, s / (1 - 0.9**5) / v_hat**1.5, rtol=1e-4)


def test_the_study_imports_public_names_alone() -> None:
    public = {x for x in vars(adam3_optax) if not x.startswith("_")}
    lines = [
        line
        for path in [*FOLDER.glob("*.py"), *FOLDER.glob("study/*.py")]
        for line in path.read_text().splitlines()
        if "adam3_optax" in line and "import" in line.split()[:3]
    ]
    assert len(lines) >= 3
    for line in lines:
        names = line.removeprefix("from adam3_optax import ").split(", ")
        assert set(names) <= public, line


def test_other_controls(gradients: list[Any]) -> None:
    adam, _ = direction("adamw", gradients)
    true, _ = direction("standardized", gradients, lam=0.1)
    negative, _ = direction("negative", gradients, lam=0.1)
    np.testing.assert_allclose(
        negative["embed"] - adam["embed"], adam["embed"] - true["embed"], atol=5e-5
    )
    ends, _ = direction("ends", gradients, lam=0.1)
    # Partitioned trees are compiled apart: an ulp.
    np.testing.assert_allclose(ends["embed"], true["embed"], rtol=3e-7)
    np.testing.assert_allclose(ends["hidden"], adam["hidden"], rtol=3e-7)
    # Step 6 of 20 has lam·(1 - 5/20).
    fading, _ = direction("fading", gradients, lam=0.1)
    np.testing.assert_allclose(
        fading["embed"] - adam["embed"],
        0.75 * (true["embed"] - adam["embed"]),
        atol=5e-5,
    )
    # The scale of 4 divides the gradients.
    smaller = jax.tree.map(lambda g: g / 4, gradients)
    scaled, _ = direction("cubic_at_scale_1", gradients, lam=10.0, b3=0.9)
    cubic, _ = direction("cubic", smaller, lam=10.0, b3=0.9)
    np.testing.assert_array_equal(scaled["embed"], cubic["embed"])
    # Its eps is relative to the scaled gradients, like all else.
    large, _ = direction("cubic_at_scale_1", gradients, eps=0.1, b3=0.9)
    same, _ = direction("cubic", smaller, eps=0.1, b3=0.9)
    other, _ = direction("cubic", smaller, eps=0.4, b3=0.9)
    np.testing.assert_array_equal(large["embed"], same["embed"])
    assert not np.allclose(large["embed"], other["embed"], rtol=0.05)


# --- The tasks ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return part("texts").load(None)


@pytest.mark.slow
def test_recall_is_of_the_training_text(corpus: Any) -> None:
    make, few = part("tasks").make, {"characters": 40, "context": 32, "windows": 8}
    recall = make("characters", {**few, "recall": True}, corpus)
    held_out = make("characters", few, corpus)
    params = recall.init(jax.random.key(0))
    # Its windows begin at the 0th to 7th character; all of them, and no others.
    tokens = jnp.asarray(corpus.training[:40])
    windows = jnp.stack([tokens[i : i + 33] for i in range(8)])
    assert float(recall.validate(params, ())["loss"]) == float(
        recall.loss(params, windows)
    )
    assert recall.validate(params, ()) != held_out.validate(params, ())


@pytest.mark.parametrize(
    "kind",
    [
        "digits",
        *slow("characters", "words", "softmax", "spelling"),
    ],
)
def test_a_task_begins_at_chance_and_is_pure(kind: str, corpus: Any) -> None:
    task = part("tasks").make(kind, {"batch": 8}, corpus)
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    data = task.data(jax.random.key(2))
    classes = params["output"].shape[-1]
    found = task.validate(params, data)
    assert float(found["loss"]) == pytest.approx(math.log(classes), rel=0.35)
    batch, again = task.batch(key, data), task.batch(key, data)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert all(x.shape[0] == 8 for x in jax.tree.leaves(batch))
    # The mean over halves is the whole: the two shadow states cost no gradient.
    a, b = (jax.tree.map(lambda x, i=i: x[i::2], batch) for i in (0, 1))
    halves = (float(task.loss(params, a)) + float(task.loss(params, b))) / 2
    assert float(task.loss(params, batch)) == pytest.approx(halves, rel=1e-5)


def test_options_of_the_classifiers() -> None:
    tasks = part("tasks")
    key = jax.random.key(0)
    _, labels = tasks.digits(batch=4096, long_tail=True).batch(key, ())
    shares = np.bincount(labels, minlength=10) / 4096
    wanted = 1 / np.arange(1, 11)
    np.testing.assert_allclose(shares, wanted / wanted.sum(), atol=0.03)
    _, labels = tasks.softmax(batch=8192, classes=64).batch(key, ())
    assert np.bincount(labels)[0] / 8192 == pytest.approx(0.21, abs=0.03)
    for name in ("digits", "softmax"):
        clean = tasks.TASKS[name](batch=4096).batch(key, ())[1]
        noisy = tasks.TASKS[name](batch=4096, label_noise=0.5).batch(key, ())[1]
        # Half are replaced, of which one in ten hits the same digit.
        assert 0.4 < float((clean != noisy).mean()) < 0.55


@pytest.mark.slow
def test_fresh_clusters_are_those_that_are_described() -> None:
    # The examples' second moments, which the centres' are part of, and frequencies.
    make = part("tasks").softmax
    sizes = {"classes": 32, "examples": 20000, "features": 16, "distance": 8.0}
    data = make(fresh=True, **sizes).data(jax.random.key(0))
    frequencies = 1 / np.arange(1, 33)
    frequencies /= frequencies.sum()
    for x, y in ((data.x, data.y), (data.x_out, data.y_out)):
        x, y = np.asarray(x), np.asarray(y)
        shares = np.bincount(y, minlength=32) / 20000
        np.testing.assert_allclose(shares, frequencies, atol=0.012)
        means = np.stack([x[y == k].mean(axis=0) for k in range(32)])
        assert np.var(x - means[y]) == pytest.approx(1, abs=0.02)
        gaps = np.linalg.norm(means[:, None] - means[None], axis=-1)
        apart = gaps[np.triu_indices(32, 1)].mean()
        assert apart == pytest.approx(8.0, rel=0.1)
    # Both halves are of the same centres, and of other examples.
    one, two = (np.asarray(x)[np.asarray(y) == 0].mean(axis=0)
                for x, y in ((data.x, data.y), (data.x_out, data.y_out)))  # fmt: skip
    np.testing.assert_allclose(one, two, atol=0.1)
    assert not (np.asarray(data.x) == np.asarray(data.x_out)).any()
    noisy = make(fresh=True, label_noise=0.2, **sizes).data(jax.random.key(0))
    np.testing.assert_array_equal(noisy.x, data.x)
    for name in ("y", "y_out"):
        changed = np.mean(getattr(noisy, name) != getattr(data, name))
        # One random label in 32 is the same; a few more where frequent ones fall.
        assert changed == pytest.approx(0.2 * 31 / 32, abs=0.01)
    with pytest.raises(ValueError, match="data is the seed of constant data"):
        part("tasks").check("softmax", {"fresh": True, "data": 1})


def test_ngrams_against_a_reference() -> None:
    # CRC-32 bit by bit, and windows by slices of zip: nothing of the code's own.
    def crc(text: str) -> int:
        found = 0xFFFFFFFF
        for byte in text.encode():
            found ^= byte
            for _ in range(8):
                found = found >> 1 ^ (0xEDB88320 if found & 1 else 0)
        return found ^ 0xFFFFFFFF

    def reference(word: str) -> list[int]:
        marks = ["<", *word, ">"]
        grams = [*marks, *map("".join, itertools.pairwise(marks))]
        grams += map("".join, zip(marks, marks[1:], marks[2:], strict=False))
        return sorted(crc(x) % 128 for x in grams)

    for word in ("a", "to", "banana", "été", "!"):
        assert sorted(part("tasks").ngrams(word, 128)) == reference(word)


@pytest.mark.slow
def test_spelling_counts_the_ngrams_of_words_of_its_part() -> None:
    tasks = part("tasks")
    # 60 words each once a line; the last third of the text has only ten of them.
    words = [a + b + c for a in "abc" for b in "aeiou" for c in "klmn"]
    text = " ".join(words * 40 + words[:10] * 120)
    letters = sorted(set(text))
    tokens = np.array([letters.index(x) for x in text], np.int32)
    corpus = part("texts").Corpus(letters, tokens, np.zeros((1, 65), np.int32))
    task = tasks.spelling(corpus, classes=60, examples=512, features=128)
    data = task.data(jax.random.key(0))
    order = {x: i for i, x in enumerate(dict.fromkeys(words))}  # ties: first seen
    buckets = [tasks.ngrams(x, 128) for x in order]
    whole = np.stack([np.bincount(x, minlength=128) for x in buckets])
    for x, y in ((data.x, data.y), (data.x_out, data.y_out)):
        x, full = np.asarray(x), whole[np.asarray(y)]
        assert (x <= full).all()
        assert (x == np.round(x)).all()
        assert x.sum() / full.sum() == pytest.approx(0.7, abs=0.01)
    assert len(set(np.asarray(data.y).tolist())) == 60
    assert set(np.asarray(data.y_out).tolist()) == set(range(10))
    with pytest.raises(ValueError, match="60 different words, but 61 are needed"):
        tasks.spelling(corpus, classes=61)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_rare_and_frequent_against_numpy(noise: float) -> None:
    tasks = part("tasks")
    options = {"classes": 64, "examples": 256, "features": 8, "fresh": True}
    task = tasks.softmax(label_noise=noise, **options)
    key = jax.random.key(5)
    data = task.data(key)
    clean = tasks.softmax(**options).data(key)  # the same examples, by their classes
    rng = np.random.default_rng(0)
    params = {"output": jnp.asarray(rng.normal(size=(8, 64)), jnp.float32),
              "bias": jnp.asarray(rng.normal(size=64), jnp.float32)}  # fmt: skip
    found = task.validate(params, data)
    counts = [np.sum(np.asarray(clean.y) == k) for k in range(64)]
    rare = np.array([counts[k] <= 3 for k in np.asarray(clean.y_out)])
    assert 10 < rare.sum() < 128
    x, labels = np.asarray(data.x_out, np.float64), np.asarray(data.y_out)
    logits = x @ np.asarray(params["output"]) + np.asarray(params["bias"])
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(256), labels]
    wrong = logits.argmax(axis=1) != labels
    for name, value in (("loss", nll), ("error", wrong)):
        assert float(found[name]) == pytest.approx(value.mean(), rel=1e-4)
        for group, members in (("rare", rare), ("frequent", ~rare)):
            wanted = value[members].mean()
            assert float(found[f"{name}_{group}"]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_class_means_against_numpy() -> None:
    tasks, class_means = part("tasks"), part("class_means")
    options = {"classes": 16, "examples": 64, "features": 4, "fresh": True}
    task = tasks.softmax(**options)
    seeds = {"tuning": [0, 1], "final": range(7, 9)}
    grid = {"shrinkages": [1.0, 2.0, 8.0], "variances": [0.5, 1.0, 4.0]}
    found = class_means.evaluate(task, **grid, **seeds)

    def reference(seed: int, shrinkage: float, variance: float) -> tuple[float, float]:
        data = task.data(part("training").keys_of(jnp.uint32(seed))[3])
        x, y = np.asarray(data.x, np.float64), np.asarray(data.y)
        x_out, y_out = np.asarray(data.x_out, np.float64), np.asarray(data.y_out)
        likelihood = np.zeros((64, 16))
        for k in range(16):
            mine = x[y == k]
            shrunk = mine.sum(axis=0) / max(len(mine) + shrinkage, 1e-9)
            distance = ((x_out - shrunk) ** 2).sum(axis=1)
            likelihood[:, k] = (len(mine) + 1) * np.exp(-distance / (2 * variance))
        share = likelihood / likelihood.sum(axis=1, keepdims=True)
        loss = -np.log(share[np.arange(64), y_out]).mean()
        return loss, float(np.mean(share.argmax(axis=1) != y_out))

    losses = {
        (a, b): np.mean([reference(x, a, b)[0] for x in (0, 1)])
        for a in grid["shrinkages"]
        for b in grid["variances"]
    }
    best = min(losses, key=lambda x: losses[x])
    assert (found["shrinkage"], found["variance"]) == best
    assert found["tuning_loss"] == pytest.approx(losses[best], rel=1e-4)
    wanted = [reference(x, *best) for x in (7, 8)]
    assert found["loss"] == pytest.approx([x for x, _ in wanted], rel=1e-4)
    assert found["error"] == pytest.approx([x for _, x in wanted])
    ends = [best[0] in (1.0, 8.0), best[1] in (0.5, 4.0)]
    names = zip(("shrinkage", "variance"), ends, strict=True)
    assert found["edges"] == [name for name, at_end in names if at_end]


@pytest.mark.slow
def test_the_stationary_point() -> None:
    # Long averages, so that the clip does not bite: skewness 1, of which AdaM3 sees
    # .73; 512 elements, learning rate to 0. Adam's own shift is subtracted.
    tasks = part("tasks")
    task = tasks.quadratic(elements=512, batch=2, shape=2)
    train = program("standardized", lanes=2, task=task, steps=6000).train
    h = setting("standardized", b2=0.999, b3=0.999, tau=10.0, weight_decay=0.0)
    with_term, without = train([({**h, "lam": 0.1}, 0), ({**h, "lam": 0.0}, 0)])
    shift = with_term["validation_mean"][-1] - without["validation_mean"][-1]
    wanted = tasks.stationary_point(1.0, 0.1, 10.0, 0.9)
    assert wanted == pytest.approx(-0.0725, abs=5e-4)
    assert shift == pytest.approx(wanted, rel=0.05)
    assert tasks.stationary_point(1.0, 0.1, 0.5, 0.9) == pytest.approx(-0.05, rel=2e-3)


def test_blow_up_beyond_the_root_of_b2() -> None:
    rows = part("checks").blow_up(0.95, [0.9, 0.999], 1000)
    sizes = {(x["form"], x["b3"]): x["largest"] for x in rows}
    assert sizes["cubic", 0.999] == pytest.approx(318, abs=1)
    assert sizes["stabilized", 0.999] == pytest.approx(293, abs=1)
    assert sizes["standardized", 0.999] == pytest.approx(1, abs=0.01)
    assert sizes["cubic", 0.9] == pytest.approx(1, abs=0.01)


# --- The record ---------------------------------------------------------------------


def test_a_torn_line_is_dropped_and_redone(tmp_path: Path) -> None:
    record = part("record").Record
    first = record(tmp_path)
    first.add({"key": "a", "final": 1.0})
    path = tmp_path / "trials.jsonl"
    with path.open("ab") as file:
        file.write(b'{"key": "b", "fin')
    again = record(tmp_path)
    assert set(again.rows) == {"a"}
    assert path.read_bytes().endswith(b'"fin')  # who only reads changes nothing
    again.add({"key": "c", "final": 2.0})
    assert [json.loads(x)["key"] for x in path.read_text().splitlines()] == ["a", "c"]
    path.write_text('no trial\n{"key": "d"}\n')
    with pytest.raises(ValueError, match="line 1, is no trial"):
        record(tmp_path)


def logged(key: str, phase: str, **more: Any) -> dict[str, Any]:
    """Returns a trial as it is logged: numbers of eight digits, of float32."""
    rng = np.random.default_rng(int(key, 16))
    numbers = rng.lognormal(0, 9, 20).astype(np.float32)
    row = {"key": key, "phase": phase, "task": "a", "arm": "é", "rule": "adamw",
           "h": {"lr": 0.0066054, "b2": 0.998074}, "seed": 3, "finite": True,
           "validation_loss": [float(f"{x:.8g}") for x in numbers],
           "final": float(f"{numbers[-1]:.8g}"), "seconds": 1.6411}  # fmt: skip
    return row | more


def test_a_packed_record_holds_every_digit(tmp_path: Path) -> None:
    record = part("record")
    lines = record.Record(tmp_path)
    rows = [
        logged("a", "tune"),
        logged("b", "final", h={"lr": 0.1, "lam": 0.3}, ratio=[0.1, None]),
        logged("c", "final", ratio=[1.4012985e-45, 3.4028235e38]),
        logged("d", "lam", finite=False, final=None),
    ]
    for row in rows:
        lines.add(row)
    rows[0].pop("validation_loss")
    record.pack(tmp_path, lambda record: len(record.rows))
    assert [x.name for x in tmp_path.iterdir()] == ["trials.npz"]
    again = record.Record(tmp_path)
    assert again.rows == {row["key"]: row for row in rows}
    with np.load(tmp_path / "trials.npz", allow_pickle=False) as file:
        assert file["validation_loss"].shape == (3, 20)

    # A study goes on from it, and the whole is packed anew.
    again.add(logged("e", "final"))
    assert list(record.Record(tmp_path).rows) == ["a", "b", "c", "d", "e"]
    record.pack(tmp_path, lambda record: len(record.rows))
    assert list(record.Record(tmp_path).rows) == ["a", "b", "c", "d", "e"]
    (tmp_path / "trials.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="holds no trials"):
        record.Record(tmp_path)


def test_what_would_be_lost_is_not_packed(tmp_path: Path) -> None:
    record = part("record")
    record.Record(tmp_path).add(logged("a", "final", training_loss=[0.1234567891]))
    before = (tmp_path / "trials.jsonl").read_bytes()
    with pytest.raises(ValueError, match="would not hold all"):
        record.pack(tmp_path, lambda record: None)
    assert (tmp_path / "trials.jsonl").read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["trials.jsonl"]


# Each takes a second or more. One of them is quick.
RECORDS = sorted(x.name for x in (FOLDER / "records").iterdir())
EACH_RECORD = [
    RECORDS[0],
    *(pytest.param(x, marks=pytest.mark.slow) for x in RECORDS[1:]),
]


@pytest.mark.parametrize("name", EACH_RECORD)
def test_results_are_those_of_the_packed_record(name: str) -> None:
    folder = FOLDER / "records" / name
    report, record = part("report"), part("record").Record(folder)
    study, corpus = report.study_of(folder), report.corpus_of(folder)
    found = report.shown(study, record, corpus, folder)
    page = "\n\n".join(report.sections(found)) + "\n"
    assert page == (folder / "results.md").read_text()
    sizes = [x.stat().st_size for x in (FOLDER / "records").glob("*/trials.npz")]
    assert sum(sizes) < 3e6


def test_figures_know_every_arm(tmp_path: Path) -> None:
    drawing, plan = part("drawing"), part("plan")
    for path in STUDIES.glob("*.toml"):
        assert set(plan.load(path).arms) <= set(drawing.ARMS), path
    colours = [colour for colour, _ in drawing.ARMS.values()]
    assert len(set(colours)) == len(colours)


def test_ticks_of_differences_do_not_touch() -> None:
    axes = part("axes")
    figure: Any = importlib.import_module("matplotlib.figure").Figure()
    panel = figure.subplots()
    panel.plot([-95.0, 40.0], [0, 1])
    axes.per_cent(panel.xaxis, "loss")
    low, high = panel.get_xlim()
    assert low < -95 < 40 < high
    transform = panel.xaxis.get_transform().transform
    start, end = transform([low, high])
    places = np.sort((transform(panel.get_xticks()) - start) / (end - start))
    assert len(places) >= 4
    assert np.diff(places).min() > 0.09
    assert panel.get_xlabel() == "loss, % (log beyond ±2)"
    short = figure.subplots()
    short.plot([-0.5, 0.2], [0, 1])
    axes.per_cent(short.xaxis, "loss")
    assert (short.get_xscale(), short.get_xlabel()) == ("linear", "loss, %")


def command(folder: Path, *arguments: str) -> list[str]:
    script = str(FOLDER / "compare.py")
    return [sys.executable, "-W", "error", script, "--out", str(folder), *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments),
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
    )


def lines(folder: Path) -> list[str]:
    path = folder / "trials.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_lines(process: Any, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(lines(folder)) < count:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_one_study_a_folder(tmp_path: Path) -> None:
    with part("record").lock(tmp_path):
        second = run(tmp_path, "--study", "tiny")
    assert (second.returncode, second.stdout) == (2, "")
    assert f"another study is running in {tmp_path}" in second.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["trials.jsonl"]


@pytest.mark.slow
def test_a_tiny_study_killed_interrupted_and_resumed(tmp_path: Path) -> None:
    start = command(tmp_path, "--study", "tiny")
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(start, env=ENVIRONMENT, **quiet) as killed:  # type: ignore[call-overload]
        wait_for_lines(killed, tmp_path, 2)
        killed.kill()
    before = lines(tmp_path)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"key": "torn')
    with subprocess.Popen(start, env=ENVIRONMENT, **quiet) as stopped:  # type: ignore[call-overload]
        wait_for_lines(stopped, tmp_path, len(before) + 3)
        stopped.send_signal(signal.SIGINT)
        out, error = stopped.communicate(timeout=300)
    assert (stopped.returncode, error) == (130, "")
    assert out.splitlines()[-1].startswith("Interrupted: ")
    between = lines(tmp_path)
    assert between[: len(before)] == before

    done = run(tmp_path, "--study", "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(x) for x in lines(tmp_path)]
    assert lines(tmp_path)[: len(between)] == between
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == len(keys) == 4 + 4 + 4 + 2
    phases = {row["phase"] for row in rows}
    assert phases == {"tune", "final", "lr", "lam", "b3", "stationary"}
    assert {row["seed"] for row in rows if row["phase"] == "final"} == {100, 101}
    runs = json.loads((tmp_path / "environment.json").read_text())
    assert len(runs) == 3
    assert runs[0]["command"].startswith("python studies/compare.py --out")
    assert {"jax", "optax", "device", "cores", "commit", "corpus"} <= runs[0].keys()

    # The whole again: nothing is run, and the report is the same.
    text = (tmp_path / "results.md").read_text()
    assert text in done.stdout
    stamp = (tmp_path / "trials.jsonl").stat().st_mtime_ns
    again = run(tmp_path, "--study", "tiny")
    assert (again.returncode, again.stdout) == (0, text + "\n")
    assert (tmp_path / "trials.jsonl").stat().st_mtime_ns == stamp
    report = run(tmp_path, "--report", str(tmp_path))
    assert (report.returncode, report.stdout) == (0, text + "\n")

    drawn = {path.stem for path in tmp_path.glob("*.png")}
    wanted = {"finals", "curves", "ratio", "learning_rate", "lam_and_b3"}
    assert drawn == {*wanted, "stationary", "blow_up"}
    results = json.loads((tmp_path / "results.json").read_text())
    base, ours = results["arms"]
    assert (base["verdict"], ours["n"]) == ("baseline", 2)
    mine = {x["seed"]: x["final"] for x in rows if x["phase"] == "final"
            and x["arm"] == "standardized"}  # fmt: skip
    theirs = {x["seed"]: x["final"] for x in rows if x["phase"] == "final"
              and x["arm"] == "adamw"}  # fmt: skip
    gap = np.mean([mine[x] - theirs[x] for x in (100, 101)])
    assert ours["difference"] == pytest.approx(gap)
    assert "| standardized | 2 |" in text
    assert "## Stationary point" in text


@pytest.fixture
def standard_in_threads() -> Iterator[None]:
    """For tests whose own threads run others' code: a context is of one thread."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.slow
def test_a_study_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], standard_in_threads: None
) -> None:
    # With one trial, and without what is no training of digits.
    head, _, checked = (
        (STUDIES / "tiny.toml").read_text().partition("[tasks.quadratic]")
    )
    identity = checked[checked.index("[checks.identity]") :].split("[checks.stat")[0]
    (tmp_path / "one.toml").write_text(
        head.replace("trials = 2", "trials = 1") + identity
    )
    out = tmp_path / "out"
    compare = importlib.import_module("compare")
    assert compare.main(["--study", str(tmp_path / "one.toml"), "--out", str(out)]) == 0
    rows = [json.loads(x) for x in lines(out)]
    assert len({row["key"] for row in rows}) == len(rows) == 2 + 4 + 4
    text = (out / "results.md").read_text()
    assert "| standardized | 2 |" in text
    assert text in capsys.readouterr().out


FAIR = """
baseline = "adamw"
margin = 0.01
alpha = 0.05
workers = 2
[primary]
arm = "standardized"
[tuning]
trials = 2
seeds = [0, 1]
design = 0
[final]
first = 500
seeds = 3
[sweeps]
lr = []
seeds = []
lam = []
b3 = []
[space]
decades = 2.0
warm_up = [0.02, 0.3]
b2 = [0.9, 0.999]
weight_decay = [1e-4, 1e-1]
eps = [1e-8, 0.1]
[arms.adamw]
rule = "adamw"
[arms.smoothed]
rule = "smoothed"
smoothing = [0.0, 0.2]
[arms.standardized]
rule = "standardized"
[tasks.clusters]
kind = "softmax"
fresh = true
steps = 20
lr = 0.03
lanes = 1
classes = 16
examples = 128
features = 8
batch = 8
[tasks.spelling]
kind = "spelling"
steps = 20
lr = 0.03
lanes = 2
classes = 64
examples = 256
hidden = 8
batch = 8
label_noise = 0.2
[checks.class_means]
shrinkage = [0.0, 1.0, 10.0]
variance = [0.3, 1.0, 3.0]
"""


@pytest.mark.slow
def test_a_study_of_fresh_data_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], standard_in_threads: None
) -> None:
    (tmp_path / "small.toml").write_text(FAIR)
    out, compare = tmp_path / "out", importlib.import_module("compare")
    arguments = ["--study", str(tmp_path / "small.toml"), "--out", str(out)]
    assert compare.main(arguments) == 0
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    rows = [json.loads(x) for x in lines(out)]
    assert len({row["key"] for row in rows}) == len(rows) == 2 * 3 * (2 * 2 + 3)
    finals = {(x["task"], x["arm"], x["seed"]): x for x in rows
              if x["phase"] == "final"}  # fmt: skip
    results = json.loads((out / "results.json").read_text())

    # The primary comparison comes first, by hand: mean differences, Holm over two.
    primary = results["primary"]
    shown = [(x["metric"], x["task"]) for x in primary]
    tasks = ("clusters", "spelling")
    assert shown == [(x, y) for x in ("loss", "error") for y in tasks]
    for metric in ("loss", "error"):
        mine = [x for x in primary if x["metric"] == metric]
        tests = []
        for row in mine:
            arm, base = (
                [
                    finals[row["task"], name, seed][f"validation_{metric}"][-1]
                    for seed in (500, 501, 502)
                ]
                for name in ("standardized", "adamw")
            )
            gap = np.mean(arm) - np.mean(base)
            assert row["difference"] == pytest.approx(gap, abs=1e-9)
            means = row["arm"], row["baseline"]
            assert means == pytest.approx((np.mean(arm), np.mean(base)))
            assert row["margin"] == pytest.approx(0.01 * np.mean(base))
            same = np.ptp(np.subtract(arm, base)) == 0
            none = float(gap == 0)
            tests.append(none if same else stats.ttest_rel(arm, base).pvalue)
        low = min(1, 2 * min(tests))
        assert [x["holm_p"] for x in mine] == pytest.approx(
            [low if x == min(tests) else max(low, max(tests)) for x in tests]
        )
    headings = [x for x in text.splitlines() if x.startswith("#")]
    assert headings[:4] == [
        "# Results", "## The primary comparison", "## All arms", "## clusters"
    ]  # fmt: skip
    assert {"## By class frequency", "## Without training", "## Edges"} <= {*headings}

    # Finals carry the classes' errors into the results, and the table shows them.
    [base] = [x for x in results["arms"] if (x["task"], x["arm"]) ==
              ("spelling", "adamw")]  # fmt: skip
    for name in ("error_rare", "error_frequent", "loss_rare", "loss_frequent"):
        values = [
            finals["spelling", "adamw", x][f"validation_{name}"][-1]
            for x in (500, 501, 502)
        ]
        assert base[name] == pytest.approx(np.mean(values))
    assert f"{base['error_rare']:.2%} |  | {base['error_frequent']:.2%}" in text

    # The class means are there for the same seeds, and are not computed again.
    means = results["class_means"]
    assert list(means) == ["clusters", "spelling"]
    assert all(x["seeds"] == [500, 501, 502] for x in means.values())
    assert f"{np.mean(means['clusters']['loss']):.4f}" in text
    stamps = [(out / x).stat().st_mtime_ns for x in ("checks.json", "trials.jsonl")]
    assert compare.main(arguments) == 0
    assert stamps == [
        (out / x).stat().st_mtime_ns for x in ("checks.json", "trials.jsonl")
    ]


def test_a_primary_comparison_that_is_incomplete_says_so() -> None:
    report, plan = part("report"), part("plan")
    study = plan.load(STUDIES / "fair.toml")
    measured = {"n": 20, "difference": -0.1, "sd": 0.1, "interval": (-0.2, 0.0),
                "bootstrap": (-0.2, 0.0), "p": 0.02, "p_equivalence": 0.9,
                "detectable": 0.1, "margin": 0.01}  # fmt: skip
    whole = {"h": {}, "diverged": 0, "n": 20, "final": 1.0, "error": 0.5}
    ours = {"arm": "standardized", **whole, **measured}
    rows = [
        {"task": "a", "arm": "adamw", **whole},
        {"task": "b", "arm": "adamw", **whole},
        {"task": "a", **ours, "metrics": {"error": measured}},
        {"task": "b", **ours, "diverged": 1, "metrics": {}},
    ]
    found = report._primary(rows, study)
    assert [x["verdict"] for x in found] == [
        "better",
        "1 of its runs diverged",
        "better",
        "1 of its runs diverged",
    ]
    # Holm counts the one that says nothing.
    assert [x["holm_p"] for x in found] == pytest.approx([0.04, 1.0, 0.04, 1.0])


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        (
            "--study",
            "none",
            "--study must be one of characters, confirm, fair, fair_language, main, "
            "quick, search, tiny",
        ),
        ("--text", "no such text", "no such text: No such file or directory"),
        ("--report", "no such folder", "study.toml: No such file or directory"),
    ],
)
def test_mistakes_in_the_command(
    option: str,
    value: str,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare = importlib.import_module("compare")
    with pytest.raises(SystemExit) as raised:
        compare.main(["--out", str(tmp_path / "out"), option, value])
    printed = capsys.readouterr()
    assert (raised.value.code, printed.out) == (2, "")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1


def test_identical_arms_are_called_so() -> None:
    report, plan = part("report"), part("plan")
    study = plan.load(STUDIES / "tiny.toml")
    rows: list[dict[str, Any]] = [
        {"arm": "cubic", "h": {}, "diverged": 0, "ratio": 1e-9, "difference": 0.0,
         "p": 1.0, "p_equivalence": 0.0, "n": 2},
        {"arm": "adamw", "h": {}, "diverged": 0, "n": 2},
        {"arm": "nadamw", "h": {}, "diverged": 0, "n": 1},
        {"arm": "lion", "h": {}, "diverged": 1, "ratio": None},
        {"arm": "muon", "h": None, "diverged": 0},
    ]  # fmt: skip
    report._adjust(rows, study)
    assert [row["verdict"] for row in rows] == [
        "equivalent (identical to AdamW)",
        "baseline",
        "incomplete: 1 of 2 seeds",
        "1 of its runs diverged",
        "every setting diverged",
    ]
