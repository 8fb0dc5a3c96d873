"""The benchmark scripts: the records they make, their counts, and how they fail."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from matplotlib.image import imread

import adam3_optax
from tests.settings import FORMS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
OPTAX = (
    "optax.sgd",
    "optax.sgd, momentum",
    "optax.adam",
    "optax.adamw",
    "optax.adabelief",
    "optax.contrib.ademamix",
)
SETTINGS = ("float32", "bfloat16 m, s", "bfloat16", "float8", "float8 all")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, standard_promotion: None) -> None:
    """The scripts import one another as scripts do, and run Optax's own code."""
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> Any:
    return importlib.import_module(name)


def run(name: str, *arguments: str) -> str:
    """Returns what a script prints, which must succeed and complain of nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / name), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_from_measurement_to_figures(tmp_path: Path) -> None:
    out = str(tmp_path)
    printed = run("step_time.py", "--quick", "--only", "cubic", "--out", out)
    assert "1 x 80 k, float32: " in printed
    first = (tmp_path / "results.jsonl").read_bytes()
    facts, *rows = lines(tmp_path)
    assert facts["measure"] == "run"
    assert (facts["jax"], facts["optax"]) == (jax.__version__, optax.__version__)
    assert facts["adam3_optax"] == adam3_optax.__version__
    assert facts["command"].startswith("python benchmarks/step_time.py --quick --only")
    assert facts["cores"] >= 1
    assert {"device", "cpu", "python", "jaxlib", "commit", "load"} <= facts.keys()
    assert {row["run"] for row in rows} == {facts["run"]}

    cubic = {f"adam3 cubic, {setting}" for setting in SETTINGS}
    flat = {"optax.flatten(adam3 cubic, float32)"}
    arms: dict[Any, dict[str, Any]] = {}
    for row in rows:
        arms.setdefault((row["measure"], row["tree"]), {})[row["arm"]] = row
    assert {key: set(value) for key, value in arms.items()} == {
        ("step", "one"): {"copy", "optax.adam"} | cubic,
        ("step", "small"): {"copy", "optax.adam"} | cubic | flat,
        ("compile", "compiled"): ({"optax.adam"} | cubic | flat)
        - {"adam3 cubic, bfloat16", "adam3 cubic, float8 all"},
        ("eager", "small"): {"optax.adam"} | cubic | flat,
    }
    for measured in arms.values():
        adam = np.array(measured["optax.adam"]["seconds"])
        assert measured["optax.adam"]["ratio"] == [1, 1, 1]
        for row in measured.values():
            seconds = np.array(row["seconds"])
            assert seconds.shape == (3,)
            assert (seconds > 0).all()
            ratios = np.percentile(seconds / adam, (25, 50, 75))
            np.testing.assert_allclose(row["ratio"], ratios, rtol=1e-4)
            np.testing.assert_allclose(
                row["step_seconds"], np.percentile(seconds, (25, 50, 75)), rtol=1e-4
            )
    step = arms["step", "one"]
    copied = np.array(step["copy"]["seconds"]) / 8
    for row in step.values():
        assert (row["leaves"], row["parameters"]) == (1, 80_000)
        speed = row["necessary_bytes"] / np.array(row["seconds"])
        np.testing.assert_allclose(
            row["bytes_a_second"],
            np.percentile(speed, (25, 50, 75)) * 80_000,
            rtol=1e-4,
        )
        np.testing.assert_allclose(
            row["share_of_copy"], np.percentile(speed * copied, (25, 50, 75)), rtol=1e-4
        )
    for row in arms["compile", "compiled"].values():
        total = np.add(row["trace"], row["compile"])
        assert (total > 0).all()
        assert (total <= np.array(row["seconds"])).all()

    run(
        "memory.py", "--parameters", "8000000", "--only", "cubic, float32", "--out", out
    )
    assert (tmp_path / "results.jsonl").read_bytes().startswith(first)
    peaks = {x["arm"]: x for x in lines(tmp_path) if x["measure"] == "memory"}
    assert set(peaks) == {"optax.adam", "adam3 cubic, float32"}
    for arm, held in (("optax.adam", 16), ("adam3 cubic, float32", 20)):
        assert peaks[arm]["arrays_bytes"] == pytest.approx(held, abs=1e-3)
        # Nothing but the arrays, give or take the libraries' own few megabytes.
        assert held - 0.5 < peaks[arm]["peak_bytes"] < held + 3.5

    run("figures.py", out)
    text = (tmp_path / "README.md").read_text()
    assert facts["command"] in text
    assert "## A step, float32" in text
    low, median, high = step["adam3 cubic, float32"]["ratio"]
    assert f"| {median:.2f} ({low:.2f} to {high:.2f}) |" in text
    for name in ("ratios", "bytes", "memory"):
        figure = imread(tmp_path / f"{name}.png")
        assert min(figure.shape[:2]) > 150
        assert figure.std() > 0.05


@pytest.mark.parametrize(
    ("tree", "leaves", "parameters"),
    [
        ("one", 1, 20_000_000),
        ("large", 200, 20_000_000),
        ("small", 300, 300_000),
        ("tiny", 2000, 128_000),
        ("transformer", 100, 27_566_080),
    ],
)
def test_trees(tree: str, leaves: int, parameters: int) -> None:
    common = script("common")
    shapes = common.tree_of(tree, common.Sizes(), "bfloat16")
    assert len(jax.tree.leaves(shapes)) == leaves
    assert common.elements(shapes) == parameters
    assert common.nbytes(shapes) == 2 * parameters


@pytest.mark.parametrize(
    ("count", "text"),
    [((1, 20_000_000), "1 x 20 M"), ((2000, 128_000), "2,000 x 64")],
)
def test_labels(count: tuple[int, int], text: str) -> None:
    assert script("common").label("one", *count) == text


def test_every_optimizer_is_there() -> None:
    ours = {f"adam3 {form}, {x}" for form in (*FORMS, None) for x in SETTINGS}
    ours -= {"adam3 standardized, float8 all"}  # it is refused
    ours -= {"adam3 None, bfloat16 m, s"}
    assert set(script("common").optimizers()) == {*OPTAX, *ours}
    for form in FORMS:
        assert f"optax.flatten(adam3 {form}, float32)" in script("common").flattened()


def arm(name: str, dtype: str, parameters: int = 80_000) -> Any:
    common, step_time = script("common"), script("step_time")
    tree = common.tree_of("one", common.Sizes(parameters), dtype)
    return step_time.Steps(tree).arm(common.optimizers()[name]())


@pytest.mark.parametrize(
    ("name", "state", "necessary"),
    [
        ("optax.sgd", 0, 12),
        ("optax.sgd, momentum", 4, 20),
        ("optax.adam", 8, 28),
        ("optax.contrib.ademamix", 12, 36),
        ("adam3 cubic, float32", 12, 36),
        ("adam3 cubic, bfloat16 m, s", 8, 28),
        ("adam3 cubic, bfloat16", 6, 24),
        ("adam3 cubic, float8", 4, 20),
        ("adam3 cubic, float8 all", 3, 18),
        ("adam3 None, float8", 3, 18),
        ("adam3 None, float8 all", 2, 16),
    ],
)
def test_bytes_a_parameter(name: str, state: float, necessary: float) -> None:
    counts = arm(name, "float32").counts
    assert counts["state_bytes"] == pytest.approx(state, abs=2e-4)  # and the count
    assert counts["necessary_bytes"] == pytest.approx(necessary, abs=4e-4)
    # XLA counts what each of its loops moves, which is more.
    assert counts["xla_bytes"] > counts["necessary_bytes"] - 1e-2


@pytest.mark.slow
def test_counts_are_the_same_in_every_process() -> None:
    code = (
        "import json, sys; sys.path.insert(0, 'benchmarks');"
        "import common, step_time as s;"
        "t = common.tree_of('one', common.QUICK, 'float32');"
        "a = s.Steps(t).arm(common.optimizers()['adam3 cubic, bfloat16']());"
        "print(json.dumps([v for k, v in a.counts.items() if 'bytes' in k]))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=ENVIRONMENT | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            encoding="utf-8",
        ).stdout
        for seed in "12"
    }
    assert len(printed) == 1


@pytest.mark.parametrize("name", ["optax.adam", "adam3 cubic, float32"])
def test_the_float32_step_takes_no_memory_that_grows(name: str) -> None:
    sizes = (80_000, 800_000)
    counts = [arm(name, "float32", n).counts["temporary_bytes"] * n for n in sizes]
    assert counts[0] == counts[1]


def test_steps_and_copies_write_to_the_memory_that_is_there() -> None:
    common, step_time = script("common"), script("step_time")
    steps = step_time.Steps(common.tree_of("one", common.QUICK, "float32"))
    before = steps.params["leaf_0"]
    steps.arm(common.optimizers()["optax.adam"]()).advance(1)
    assert before.is_deleted()
    copied = steps.copy()
    places = set()
    for _ in range(3):
        copied.advance(1)
        held = [x for x in jax.live_arrays() if x.shape == before.shape]
        places.add(frozenset(x.unsafe_buffer_pointer() for x in held))
    # Two gradients, the parameters, the target, and Adam's m and v are gone.
    assert len(places) == 1


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_nothing_compiles_in_a_window(dtype: str) -> None:
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    names = [*OPTAX, *(f"adam3 cubic, {setting}" for setting in SETTINGS)]
    for name in names:
        compiled.clear()
        warm = arm(name, dtype)
        assert compiled  # or the listener listens to nothing
        compiled.clear()
        warm.advance(3)
        assert (name, compiled) == (name, [])


def test_each_compile_time_is_of_one_compilation() -> None:
    common, step_time = script("common"), script("step_time")
    tree = common.tree_of("compiled", common.QUICK, "float32")
    make = common.optimizers()["adam3 cubic, float32"]
    step_time.compile_time(make(), tree)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event.rsplit("/")[-1])
    )
    for count in (1, 2):
        step_time.compile_time(make(), tree)
        assert compiled.count("backend_compile_duration") == count


def quick(folder: Path) -> list[str]:
    only = ["--only", "cubic, float32", "--trees", "one", "--measures", "step"]
    return ["--quick", "--out", str(folder), *only]


def test_an_interruption_keeps_the_complete_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step_time = script("step_time")
    calls = 0

    def timed(advance: Any, steps: int) -> float:
        nonlocal calls
        calls += 1
        if calls == 3 * 2 + 2:  # copy, Adam and AdaM3: in the third round
            raise KeyboardInterrupt
        return float(calls)

    monkeypatch.setattr(step_time, "calibrated", lambda *_: 1)
    monkeypatch.setattr(step_time, "timed", timed)
    assert step_time.main(quick(tmp_path)) == 130
    assert "Interrupted. What was measured is in" in capsys.readouterr().out
    _, *rows = lines(tmp_path)
    assert len(rows) == 3
    assert sorted(x for row in rows for x in row["seconds"]) == [1, 2, 3, 4, 5, 6]


def test_rounds_are_in_another_order_each_time() -> None:
    step_time = script("step_time")
    orders: list[str] = []
    arms = {
        name: step_time.Arm(lambda _, name=name: orders.append(name)) for name in "abc"
    }
    rounds: list[dict[str, float]] = []
    step_time.in_turns(arms, 20, rounds)
    assert [set(x) for x in rounds] == [set("abc")] * 20
    turns = {"".join(orders[i : i + 3]) for i in range(0, 60, 3)}
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(turns) > 3


def test_a_time_is_that_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step_time = script("step_time")
    monkeypatch.setattr(step_time, "timed", lambda advance, steps: advance(steps) or 6)
    taken: list[int] = []
    arms = {"a": step_time.Arm(taken.append, steps=3), "b": step_time.Arm(taken.append)}
    rounds: list[dict[str, float]] = []
    step_time.in_turns(arms, 2, rounds)
    assert rounds == [{"a": 2, "b": 6}] * 2
    assert sorted(taken) == [1, 1, 3, 3]


def test_a_window_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    step_time = script("step_time")
    monkeypatch.setattr(step_time, "timed", lambda _, steps: 1e-3 * steps)
    assert step_time.calibrated(lambda _: None, 0.1) == 100
    assert step_time.calibrated(lambda _: None, 1e-6) == 1
    assert step_time.calibrated(lambda _: None, 1e6) == step_time.MOST_STEPS


def test_what_compiles_too_long_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step_time = script("step_time")
    monkeypatch.setattr(step_time, "ENOUGH_LEAVES", 1)
    arguments = quick(tmp_path)
    arguments += ["--trees", "one", "small", "--compile-limit", "0"]
    assert step_time.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 x 1 k, float32: adam3 cubic, float32 is left out" in printed
    _, *rows = lines(tmp_path)
    arms = {"copy", "optax.adam", "adam3 cubic, float32"}
    assert {x["arm"] for x in rows if x["tree"] == "one"} == arms
    # The flattened one has not been compiled before, so nothing is known of it.
    flat = "optax.flatten(adam3 cubic, float32)"
    assert {x["arm"] for x in rows if x["tree"] == "small"} == {
        "copy",
        "optax.adam",
        flat,
    }


def test_memory_goes_on_where_one_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = script("memory")

    def child(name: str, *_: str) -> Any:
        if name == "facts":
            return script("common").facts()
        if name == "optax.adam":
            raise RuntimeError("optax.adam: out of memory")
        return {"leaves": 1, "parameters": 80_000, "peak_bytes": 20.0}

    monkeypatch.setattr(memory, "child", child)
    assert (
        memory.main(["--quick", "--only", "cubic, float32", "--out", str(tmp_path)])
        == 1
    )
    assert "not measured: optax.adam: out of memory" in capsys.readouterr().out
    assert [x.get("arm") for x in lines(tmp_path)] == [None, "adam3 cubic, float32"]


def test_a_failing_process_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"^no such 80000 float32: KeyError: 'no such'"
    ):
        script("memory").child("no such", "80000", "float32")


# --- Figures of numbers made up here ------------------------------------------------


def write_record(folder: Path, *rows: dict[str, Any]) -> None:
    facts = {"measure": "run", "command": "python x.py", **script("common").facts()}
    text = "".join(json.dumps({"run": "now", **row}) + "\n" for row in (facts, *rows))
    (folder / "results.jsonl").write_text(text)


def row_of(arm: str, ratio: list[float], leaves: int = 1) -> dict[str, Any]:
    return {
        "measure": "step",
        "tree": "one" if leaves == 1 else "large",
        "leaves": leaves,
        "parameters": 20_000_000,
        "dtype": "float32",
        "arm": arm,
        "seconds": [0.02],
        "step_seconds": [0.02, 0.0203, 0.03],
        "ratio": ratio,
        "temporary_bytes": None,
    }


def test_tables_show_what_was_measured_and_no_more(tmp_path: Path) -> None:
    ours = "adam3 cubic, float32"
    write_record(
        tmp_path,
        row_of("optax.adam", [1, 1, 1]),
        row_of(ours, [7, 8, 9]),
        row_of(ours, [1.26, 1.284, 1.31]),  # measured again: the last one counts
        row_of("optax.adam", [1, 1, 1], 200),
    )
    assert script("figures").main([str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| optimizer | 1 x 20 M | 200 x 100 k |" in text
    assert "| optax.adam | 1 = 20.3 ms | 1 = 20.3 ms |" in text
    assert f"| {ours} | 1.28 (1.26 to 1.31) | not measured |" in text
    assert f"| {ours} | not measured | not measured |" in text  # temporary memory
    assert "8.00" not in text
    for heading in ("Tracing and compiling", "`update` without jit", "Peak memory"):
        assert f"## {heading}\n\nNot measured." in text
    assert (tmp_path / "ratios.png").exists()
    assert not (tmp_path / "bytes.png").exists()
    assert not (tmp_path / "memory.png").exists()


def test_one_record_is_of_one_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path)
    record = tmp_path / "results.jsonl"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"device": "another"}) + "\n")
    before = record.read_bytes()
    with pytest.raises(SystemExit):
        script("step_time").main(quick(tmp_path))
    assert "holds runs with device = another" in capsys.readouterr().err
    assert record.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("step_time", ["--only", "lion"], "--only 'lion' is in no name; names are"),
        ("step_time", ["--parameters", "5"], "a multiple of 80,000, got '5'"),
        ("step_time", ["--rounds", "0"], "--rounds: must be a whole number from 1 to"),
        ("step_time", ["--window", "nan"], "--window: must be a number from"),
        ("step_time", ["--trees", "oak"], "invalid choice: 'oak' (choose from "),
        ("memory", ["--dtypes", "int4"], "invalid choice: 'int4' (choose from "),
        ("memory", ["--out", __file__], "--out"),
        ("figures", ["no such folder"], "no measurement is in results.jsonl"),
    ],
)
def test_a_mistake_gets_one_line(
    name: str, arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        script(name).main(arguments)
    printed = capsys.readouterr().err
    assert raised.value.code == 2
    assert wanted in printed.replace("choose from 'one'", "choose from one")
    assert printed.startswith(f"{name}.py: ")
    assert printed.count("\n") == 1


def test_a_broken_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").write_text('{"measure": "run"}\n')
    with pytest.raises(SystemExit):
        script("figures").main([str(tmp_path)])
    assert "results.jsonl, line 1, is no measurement" in capsys.readouterr().err


def test_the_torch_loop_is_the_cubic_rule() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is optional in benchmarks")
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 8)).astype(np.float32)
    optimizer = adam3_optax.adam3(1e-3)
    params = jax.numpy.zeros(8)
    state = optimizer.init(params)
    p = torch.zeros(8)
    mvs = [torch.zeros(8) for _ in "mvs"]
    for t, g in enumerate(gradients, 1):
        updates, state = optimizer.update(jax.numpy.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        script("pytorch_cpu").adam3_leaf(p, torch.tensor(g), mvs, t, 1e-3)
    np.testing.assert_allclose(p.numpy(), params, rtol=1e-5)


def test_the_accuracy_of_float8_is_measured_against_float32() -> None:
    float8 = script("float8")
    rows = {x["state"]: x for x in float8.follow("normal", float8.normal, [(1, 30)])}
    exact = rows.pop("float32")
    assert (exact["error"], exact["slope"]) == (0, 1)
    for state, row in rows.items():
        assert 0 < row["error"] < 0.5, state
        assert row["slope"] == pytest.approx(1, abs=0.1), state
    assert rows["bfloat16"]["error"] < min(
        row["error"] for state, row in rows.items() if "float8" in state
    )
