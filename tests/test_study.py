"""The study: its statistics, its design, its rules and tasks, its records, a run."""

import functools
import importlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam3_optax

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "studies"
SMALL = {"classes": 16, "examples": 512, "features": 4, "distance": 6.0}
SHARED = {"lr": 1e-2, "warm_up": 0.1, "b2": 0.99, "weight_decay": 0.01}
stats: Any = importlib.import_module("scipy.stats")  # it has no types


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its modules import one another as scripts do; its threads run Optax's code."""
    monkeypatch.syspath_prepend(str(FOLDER))
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def part(name: str) -> Any:
    return importlib.import_module(f"study.{name}")


def test_statistics_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    base, d = rng.normal(2.0, 0.3, 10), rng.normal(0.02, 0.03, 10)
    compare = part("statistics").compare
    found = compare(base + d, base, 0.05)
    sd = math.sqrt(sum((x - sum(d) / 10) ** 2 for x in d) / 9)
    assert (found.n, found.sd) == (10, pytest.approx(sd))
    assert found.difference == pytest.approx(sum(d) / 10)
    half = 2.26216 * sd / math.sqrt(10)  # the t quantile of 9 degrees of freedom
    wanted = found.difference - half, found.difference + half
    assert found.interval == pytest.approx(wanted, rel=1e-4)
    assert found.p == pytest.approx(stats.ttest_rel(base + d, base).pvalue)
    assert found.detectable == pytest.approx(2.8 * sd / math.sqrt(10))
    assert np.ptp(found.bootstrap) == pytest.approx(3.92 * sd / math.sqrt(10), rel=0.25)
    # Equivalence: the 90% interval lies within the margin just where p < .05.
    reach = abs(found.difference) + 1.83311 * sd / math.sqrt(10)
    assert compare(base + d, base, reach * 1.001).p_equivalence < 0.05
    assert compare(base + d, base, reach * 0.999).p_equivalence > 0.05
    for shift, p, equivalence in ((0.0, 1, 0), (0.5, 0, 1)):  # without spread
        same = compare([1.0 + shift, 2.0 + shift], [1.0, 2.0], 0.1)
        assert [same.difference, same.p, same.p_equivalence] == [shift, p, equivalence]


def test_holm_and_verdicts_by_hand() -> None:
    holm, verdict = part("statistics").holm, part("statistics").verdict
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdict(-0.1, 0.01, 0.9, 0.05) == "better"
    assert verdict(0.1, 0.01, 0.01, 0.05) == "worse, within the margin"
    assert verdict(0.1, 0.2, 0.01, 0.05) == "equivalent"
    assert verdict(-0.1, 0.2, 0.2, 0.05) == "undecided"


def test_the_best_of_fewer_settings_against_all_draws() -> None:
    best_of, by_eps = part("statistics").best_of, part("statistics").best_by_eps
    losses = [3.0, math.inf, 1.0, 2.0, 5.0, 1.5]
    for count in (2, 3, 6):
        draws = itertools.combinations(losses, count)
        assert best_of(losses, count) == pytest.approx(np.mean([*map(min, draws)]))
    assert best_of(losses, 1) is None  # which may be the one that diverged
    settings = [{"eps": x} for x in (1e-6, 1e-8, 5e-5, 0.1, 0.01)]
    assert by_eps(settings, [2, 1, 0.1, 3, math.inf]) == {"small": 1, "large": 3}


@pytest.mark.parametrize("name", ["fair", "fair_language", "quick"])
def test_every_arm_is_tuned_as_hard(name: str) -> None:
    plan = part("plan")
    study = plan.load(FOLDER / "configurations" / f"{name}.toml")
    used = {*study.tuning["seeds"], *study.sweeps["seeds"]}
    assert not used & set(study.final_seeds())
    counts = Counter((trial.task, trial.arm) for trial in plan.tune(study))
    each = study.tuning["trials"] * len(study.tuning["seeds"])
    assert counts == dict.fromkeys(itertools.product(study.tasks, study.arms), each)
    for task, arm in counts:
        mine, _ = plan.settings(study, task, arm)
        base, _ = plan.settings(study, task, study.baseline)
        for ours, theirs in zip(mine, base, strict=True):
            assert all(ours[x] == theirs[x] for x in (*SHARED, "b1"))
        if name != "quick":  # eps and learning rate: no two of 16 in a sixteenth
            eps = np.log10([x["eps"] for x in mine])
            eps += np.log10(0.004) if arm == "cubic_at_scale_1" else 0
            lr = np.log10([x["lr"] / 5e-2 for x in mine])
            for cells in ((eps + 8) / 7, (lr + 1.75) / 3.5):
                assert set(np.floor(cells[:16] * 16)) == set(range(16)), (task, arm)


def direction(rule: str, gradients: list[Any], **changes: float) -> Any:
    arms = part("arms")
    h = {**arms.RULES[rule].numbers, **SHARED, **changes}
    made = arms.RULES[rule].make(arms.Setting(h, jax.random.key(0), 20, 4.0))
    state = made.init(gradients[0])
    for g in gradients:
        u, state = made.update(g, state, gradients[0])
    return np.asarray(u, np.float64), state


@pytest.fixture
def gradients() -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.exponential(size=256) - 1, jnp.float32) for _ in range(6)]


def test_arms_are_those_of_their_libraries(gradients: list[Any]) -> None:
    arms, rate = part("arms"), part("arms").schedule(1e-2, 0.1, 20)
    options: dict[str, Any] = {"b2": 0.99, "weight_decay": 0.01}
    theirs = {"adamw": optax.adamw(rate, **options)}
    for form in ("cubic", "stabilized", "standardized"):
        theirs[form] = adam3_optax.adam3w(rate, b3=0.9, third_moment=form, **options)
    for rule, wanted in theirs.items():
        h = {**arms.RULES[rule].numbers, **SHARED, "b3": 0.9}
        ours = arms.optimizer(rule, arms.Setting(h, jax.random.key(0), 20, 1.0))
        params = jnp.ones(256)
        a, b = ours.init(params), wanted.init(params)
        for g in gradients:
            (u, a), (w, b) = ours.update(g, a, params), wanted.update(g, b, params)
            np.testing.assert_allclose(u, w, rtol=1e-6)


def test_controls(gradients: list[Any]) -> None:
    adam, _ = direction("adamw", gradients)
    true, state = direction("standardized", gradients, lam=0.1)
    negative, _ = direction("negative", gradients, lam=0.1)
    np.testing.assert_allclose(negative - adam, adam - true, atol=5e-5)
    flipped, other = direction("random_sign", gradients, lam=0.1)
    np.testing.assert_array_equal(state.s, other.s)  # moments are not touched
    np.testing.assert_allclose(abs(flipped - adam), abs(true - adam), atol=5e-5)
    same = np.sign(flipped - adam) == np.sign(true - adam)
    assert 0.4 < same.mean() < 0.6  # of 256: sd .03
    smaller = [g / 4 for g in gradients]  # by the scale, and so is eps
    scaled, _ = direction("cubic_at_scale_1", gradients, lam=10.0, b3=0.9, eps=0.1)
    cubic, _ = direction("cubic", smaller, lam=10.0, b3=0.9, eps=0.1)
    np.testing.assert_array_equal(scaled, cubic)
    # Magnitude, by NumPy.
    found, _ = direction("magnitude", gradients, lam=0.3, b3=0.9, tau=0.5)
    m = v = s = np.zeros(256)
    for t, g in enumerate(map(np.asarray, gradients), 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        s = 0.9 * s + 0.1 * (g - m / (1 - 0.9**t)) ** 3
    m_hat, v_hat = m / (1 - 0.9**6), v / (1 - 0.99**6)
    size = np.minimum(np.abs(s / (1 - 0.9**6) / v_hat**1.5), 0.5)
    assert 0.1 < (size == 0.5).mean() < 0.9
    wanted = m_hat * (1 + 0.3 * size) / (np.sqrt(v_hat) + 1e-8)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6)


def test_scores_and_smoothing_against_numpy() -> None:
    tasks, rng = part("tasks"), np.random.default_rng(0)
    task = tasks.softmax(None, tasks.Sizes(**SMALL))
    data = jax.jit(task.data)(jax.random.key(5))
    rare, w = rng.random(512) < 0.2, rng.normal(size=(4, 16))
    params = {"output": jnp.asarray(w, jnp.float32), "bias": jnp.zeros(16)}
    logits, y = np.asarray(data.x_out, np.float64) @ w, np.asarray(data.y_out)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, wrong = -np.log(share[np.arange(512), y]), logits.argmax(axis=1) != y
    found = jax.jit(task.validate)(params, data._replace(rare=jnp.asarray(rare)))
    for name, value in {"loss": loss, "error": wrong}.items():
        mine = [float(found[f"{name}{x}"]) for x in ("", "_rare", "_frequent")]
        wanted = value.mean(), value[rare].mean(), value[~rare].mean()
        assert mine == pytest.approx(wanted, rel=1e-4)
    smoothed = -((0.9 * np.eye(16)[y] + 0.1 / 16) * np.log(share)).sum(axis=1).mean()
    batch = data.x_out, data.y_out
    assert float(task.loss(params, batch, smoothing=0.1)) == pytest.approx(smoothed)


def test_rules_see_the_same_data_and_batches_and_seeds_their_own() -> None:
    # With a learning rate of 0 the parameters stay, so losses are those of the data.
    task = part("tasks").softmax(None, part("tasks").Sizes(**SMALL))

    def train(rule: str, seed: int, lr: float = 0.0) -> Any:
        h = {**part("arms").RULES[rule].numbers, **SHARED, "lr": lr}
        return part("training").Program(task, rule, 4, 2, 1.0).train(h, seed)

    first = train("adamw", 3)
    for name in ("training_loss", "validation_error"):
        assert train("random_sign", 3)[name] == first[name]
    assert train("adamw", 4)["validation_error"] != first["validation_error"]
    assert train("adamw", 3, 1e30)["final"] is None  # it diverged


def test_a_language_model_begins_at_chance() -> None:
    tasks = part("tasks")
    corpus = tasks.Corpus([*"ab "], np.arange(999) % 2, np.zeros((9, 65), np.int32))
    task = tasks.characters(corpus, tasks.Sizes(batch=2, context=8, width=8, layers=1))
    loss = jax.jit(lambda key: task.loss(task.init(key), task.batch(key, ())))
    assert float(loss(jax.random.key(0))) == pytest.approx(math.log(3), rel=0.5)


@pytest.mark.parametrize("name", ["fair", "fair_language"])
def test_a_record_is_of_its_study_and_shows_its_results(name: str) -> None:
    plan, report, record = part("plan"), part("report"), part("record")
    folder = FOLDER / "records" / f"2026-11-27_{name}"
    rows, corpus = record.Record(folder), record.runs_of(folder)[-1]["corpus"]
    study = plan.load(FOLDER / "configurations" / f"{name}.toml")
    state = study, rows, corpus
    trials = [*plan.tune(study), *plan.final(*state), *plan.sweep(*state)]
    assert {study.key(x, corpus) for x in trials} == set(rows.rows)
    found = report.results(*state)
    kept = json.loads((folder / "results.json").read_text("utf-8"))
    assert report.page(found) == (folder / "results.md").read_text("utf-8")
    assert report.page(kept) == report.page(found)


def test_the_finding_from_the_columns_alone() -> None:
    text, found = (ROOT / "docs" / "evidence.md").read_text("utf-8"), {}
    with np.load(FOLDER / "records" / "2026-11-27_fair" / "trials.npz") as file:
        phase, task, arm = file["phase"], file["task"], file["arm"]
        seed, final = file["seed"], file["final"]
    for name in np.unique(task):
        of_task = (phase == "final") & (task == name)
        both = [np.flatnonzero(of_task & (arm == x)) for x in ("standardized", "adamw")]
        ours, base = (final[x[np.argsort(seed[x])]] for x in both)
        d, unit = ours - base, base.mean() / 100
        half = 2.09302 * d.std(ddof=1) / math.sqrt(20)  # t, 19 degrees of freedom
        found[name] = d.mean() / unit
        ends = f"({(d.mean() - half) / unit:+.2f} to {(d.mean() + half) / unit:+.2f})"
        assert f"| {name} | {found[name]:+.2f} {ends} |" in text
    finding = f"{-min(found.values()):.1f}% better to {max(found.values()):.1f}% worse"
    assert (len(found), finding) == (6, "1.2% better to 4.2% worse")
    assert finding in text


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a part of the quick study."""
    script = importlib.import_module("compare")
    text = (FOLDER / "configurations" / "quick.toml").read_text()
    for part_of in ("[arms.smoothed]", "[tasks.spelling]"):
        begin = text.index(part_of)
        text = text[:begin] + text[text.index("\n[", begin) :]
    (tmp_path / "quick.toml").write_text(text.replace("workers = 2", "workers = 1"))
    monkeypatch.setattr(script, "CONFIGURATIONS", tmp_path)
    made = functools.cache(part("tasks").softmax)  # compiles once for all runs
    monkeypatch.setitem(part("tasks").KINDS, "softmax", lambda _, x: made(None, x))
    return script


@pytest.mark.program
def test_a_resumed_run_equals_an_uninterrupted_one(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    record = part("record").Record
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert compare.main(["--quick", "--out", str(whole)]) == 0
    text = (whole / "results.md").read_text()
    assert capsys.readouterr().out.endswith(text + "\n")
    assert len(record(whole).rows) == 2 * 2 * 2 + 2 * 3 + 2 * 2  # tune, final, sweep
    add, count = record.add, itertools.count(1)

    def interrupted(self: Any, row: Any) -> None:
        if next(count) > 5:
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(record, "add", interrupted)
    assert compare.main(["--quick", "--out", str(again)]) == 130
    monkeypatch.setattr(record, "add", add)
    assert "Interrupted: 5 trainings are in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--report", str(again)])
    assert "trainings are missing" in capsys.readouterr().err
    lines = again / "trials.jsonl"
    lines.write_text(lines.read_text() + '\n{"key": "cut o')
    assert compare.main(["--quick", "--out", str(again)]) == 0
    assert len(lines.read_text().splitlines()) == 1 + 18 + 1  # none ran twice
    assert record(again).rows == record(whole).rows
    assert compare.main(["--report", str(again)]) == 0
    assert capsys.readouterr().out.endswith((text + "\n") * 2)


def test_mistakes_in_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for option, complaint in {
        "--study": "invalid choice: 'none'",
        "--text": "compare.py: error: none: No such file or directory",
        "--report": "study.toml: No such file or directory",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module("compare").main([option, "none"])
        assert complaint in capsys.readouterr().err
