"""The study: AdaM3 against other optimizers, tuned alike, on fresh seeds.

    python studies/compare.py --study main --text FILE --out FOLDER
    python studies/compare.py --report FOLDER

A study is a file in studies/configurations/ (such as main, search, quick), or any path.
Each arm is tried in the same number of settings (tune); the best is rerun on seeds that
tuning never saw, paired across arms (final); learning rate, lam and b3 are varied about
it (sweeps). Every training is a line of FOLDER/trials.jsonl once it has ended. The same
command goes on where it was interrupted, and never repeats a finished training.
pack.py makes a small file of a finished record.

Without --text the text is the English that ships with every CPython; nothing is
downloaded. Status: 0 done, 2 a mistake in the command, 130 interrupted.
"""

import argparse
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from study import arms, checks, class_means, plan, report, tasks, texts
from study.command_line import Parser
from study.plan import POINTS, Study, Trial
from study.record import Record, environment, lock
from study.training import Program, StoppedError

STUDIES = Path(__file__).resolve().parent / "configurations"
BAR = (
    TextColumn("{task.description}"),
    BarColumn(None),
    MofNCompleteColumn(),
    TimeRemainingColumn(elapsed_when_finished=True),
)
LINES = 30.0  # seconds between two lines, where there is no terminal for a bar


class Runner:
    """Runs the trials that are not in the record yet."""

    def __init__(self, study: Study, corpus: Any, record: Record) -> None:
        self.study, self.corpus, self.record = study, corpus, record
        self.fingerprint = texts.fingerprint(corpus)
        self.stop = threading.Event()
        self.scales: dict[str, float] = {}
        self.made: dict[str, tasks.Task] = {}
        self.programs: dict[tuple[str, str, int], Program] = {}

    def task(self, name: str) -> tasks.Task:
        """Returns a task, made once."""
        if name not in self.made:
            kind, options = self.study.tasks[name]["kind"], self.study.options(name)
            self.made[name] = tasks.make(kind, options, self.corpus)
        return self.made[name]

    def draws(self, name: str) -> bool:
        """Returns whether a task draws its data from the seed."""
        return self.task(name).data is not tasks.no_data

    def pending(self, trials: list[Trial]) -> list[Trial]:
        """Returns the trials without a line in the record, each once."""
        found = {self.study.key(x, self.fingerprint): x for x in trials}
        return [x for key, x in found.items() if key not in self.record.rows]

    def program(self, task: str, rule: str, phase: str) -> Program:
        """Returns the program of a task and a rule, made once for all phases.

        Tuning looks at the last loss alone. To find a loss on all that is held out
        takes as long as many steps.
        """
        points = 1 if phase == "tune" else POINTS
        if (task, rule, points) in self.programs:
            return self.programs[task, rule, points]
        table, made = self.study.tasks[task], self.task(task)
        if task not in self.scales:
            self.scales[task] = tasks.gradient_scale(made)
        self.programs[task, rule, points] = Program(
            made,
            arms.RULES[rule],
            steps=table["steps"],
            points=points,
            lanes=table["lanes"],
            scale=self.scales[task],
        )
        return self.programs[task, rule, points]

    def run(self, trials: list[Trial], phase: str, console: Console) -> None:
        """Trains, `workers` programs at a time.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was in progress is lost, and no more.
        """
        by_program: dict[tuple[str, str], list[Trial]] = {}
        for trial in self.pending(trials):
            by_program.setdefault((trial.task, trial.rule), []).append(trial)
        total = sum(map(len, by_program.values()))
        if not total:
            return
        # Data are made here, for the threads would make them twice.
        programs = {pair: self.program(*pair, phase) for pair in by_program}
        # All tasks of a rule, then the next rule: tasks differ in what they take,
        # and so the time left is right from early on.
        order = sorted(by_program, key=lambda pair: list(arms.RULES).index(pair[1]))
        shown = Progress(*BAR, console=console, disable=not console.is_terminal)
        began = spoke = time.monotonic()
        done, lock = 0, threading.Lock()  # workers call `note`
        with shown, ThreadPoolExecutor(self.study.workers) as pool:
            bar = shown.add_task(f"{phase:10}", total=total)

            def note(count: int) -> None:
                nonlocal done, spoke
                with lock:
                    done += count
                    shown.update(bar, advance=count)
                    now = time.monotonic()
                    if shown.disable and (done == total or now - spoke > LINES):
                        spoke = now
                        left = (now - began) / done * (total - done) / 60
                        text = f"{done:,} of {total:,}, {left:.1f} min left"
                        print(f"{phase:10} {text}", flush=True)

            waiting: set[Future[None]] = {
                pool.submit(self.train, programs[pair], by_program[pair], note)
                for pair in order
            }
            try:
                while waiting:
                    # A wait without an end would not see Ctrl-C on every system.
                    ended, waiting = wait(waiting, 0.2, FIRST_COMPLETED)
                    for future in ended:
                        future.result()
            except BaseException:
                self.stop.set()
                for future in waiting:
                    future.cancel()
                raise

    def train(self, program: Program, trials: list[Trial], note: Any) -> None:
        """Trains the trials of one program and adds them to the record."""
        lanes = program.lanes
        for group in (trials[i : i + lanes] for i in range(0, len(trials), lanes)):
            try:
                rows = program.train([(x.h, x.seed) for x in group], self.stop)
            except StoppedError:
                return
            for trial, row in zip(group, rows, strict=True):
                key = self.study.key(trial, self.fingerprint)
                self.record.add({"key": key, **trial._asdict(), **row})
            note(len(group))

    def check(self, folder: Path) -> dict[str, Any]:
        """Returns what needs no training, from checks.json where it is done already."""
        path = folder / "checks.json"
        wanted = {x: y for x, y in self.study.checks.items() if x != "stationary"}
        if "identity" in wanted:
            wanted["its_task"] = self.study.tasks[wanted["identity"]["task"]]
        drawn: list[str] = []
        seeds = plan.final_seeds(self.study)
        if "class_means" in wanted:
            drawn = [x for x in self.study.tuned_tasks() if self.draws(x)]
            wanted["drawn"] = {
                "tasks": {x: self.study.options(x) for x in drawn},
                "tuning": {x: self.study.tuning_seeds(x) for x in drawn},
                "final": list(seeds),
                "corpus": self.fingerprint,
            }
        found: dict[str, Any] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("study") == wanted:
            return found
        found = {"study": wanted}
        if "identity" in wanted:
            check = wanted["identity"]
            found["identity"] = checks.identity(
                self.task(check["task"]), check["steps"]
            )
        if "blow_up" in wanted:
            found["blow_up"] = checks.blow_up(**wanted["blow_up"])
        if "class_means" in wanted:
            check = wanted["class_means"]
            found["class_means"] = {
                name: class_means.evaluate(
                    self.task(name),
                    check["shrinkage"],
                    check["variance"],
                    self.study.tuning_seeds(name),
                    seeds,
                )
                for name in drawn
            }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        return found

    def phases(self) -> Iterator[tuple[str, list[Trial]]]:
        """Yields the phases, each of which builds on the record of those before."""
        yield "tune", plan.tune(self.study)
        yield "final", plan.final(self.study, self.record, self.fingerprint)
        yield "sweeps", plan.sweeps(self.study, self.record, self.fingerprint)
        yield "stationary", plan.stationary(self.study)


def measure_lanes(runner: Runner, counts: list[int]) -> None:
    """Prints the seconds a trial takes, for several numbers of lanes, in turn."""
    study = runner.study
    for name, table in study.tasks.items():
        task, rule = runner.task(name), arms.RULES["standardized"]
        h = {**rule.numbers, "lr": table["lr"], "warm_up": 0.1, "b2": 0.99}
        h["weight_decay"] = 0.01
        seconds: dict[int, list[float]] = {x: [] for x in counts}
        programs = {
            x: Program(task, rule, steps=table["steps"], points=POINTS, lanes=x)
            for x in counts
        }
        for turn in range(3):
            for lanes, program in programs.items():
                rows = program.train([(h, i) for i in range(lanes)])
                if turn:  # the first one warms up
                    seconds[lanes].append(rows[0]["seconds"])
        medians = {x: float(np.median(y)) for x, y in seconds.items()}
        one = medians[counts[0]]
        cells = (f"{x}: {y:.2f} s ({y / one:.2f})" for x, y in medians.items())
        print(f"{name:20} {', '.join(cells)}", flush=True)


def lanes(text: str) -> int:
    """Returns a number of lanes from the command line."""
    if not (text.isdecimal() and 1 <= int(text) <= 1000):
        wanted = "a whole number from 1 to 1,000"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options, all checked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("compare.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    names = ", ".join(sorted(x.stem for x in STUDIES.glob("*.toml")))
    add("--study", default="main", help=f"{names}, or a path; default: %(default)s")
    add("--quick", action="store_true", help="the same as --study quick")
    add("--text", type=Path, help="a UTF-8 file; default: Python's help topics")
    add("--out", type=Path, help="folder of the record; default: out/study_NAME")
    add("--report", type=Path, metavar="FOLDER", help="report on a record, no more")
    add(
        "--lanes",
        type=lanes,
        nargs="+",
        help="measure the seconds a trial takes with so many at once, no more",
    )
    options = parser.parse_args(argv)
    try:
        if options.report:
            options.study = report.study_of(options.report)
            options.environment = report.corpus_of(options.report)
            options.record = Record(options.report)
            return options
        name = "quick" if options.quick else options.study
        path = STUDIES / f"{name}.toml"
        options.path = path if path.exists() else Path(name)
        options.out = options.out or Path("out", f"study_{options.path.stem}")
        if not options.path.exists():
            parser.error(f"--study must be one of {names}, or a path; got {name!r}")
        options.study = plan.load(options.path)
        options.corpus = texts.load(options.text)
        for task, table in options.study.tasks.items():
            if table["kind"] in tasks.OF_TEXT:  # a text may be too short for them
                tasks.make(table["kind"], options.study.options(task), options.corpus)
        if not options.lanes:
            options.out.mkdir(parents=True, exist_ok=True)
            options.lock = lock(options.out)  # which `main` releases
            options.record = Record(options.out)
            environment(options.out, texts.fingerprint(options.corpus))
            copy = options.out / "study.toml"
            if copy.resolve() != options.path.resolve():
                shutil.copyfile(options.path, copy)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the study or its report, and returns the exit status."""
    options = parse(argv)
    study, folder = options.study, options.report or options.out
    if options.report:
        text = report.write(study, options.record, options.environment, folder)
        print(text)
        return 0
    if options.lanes:
        measure_lanes(Runner(study, options.corpus, Record(folder)), options.lanes)
        return 0
    console = Console()
    runner = Runner(study, options.corpus, options.record)
    # Not where the shell ignores it, as in a background job.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with options.lock:
            runner.check(folder)
            for phase, trials in runner.phases():
                runner.run(trials, phase, console)
    except KeyboardInterrupt:
        count = len(runner.record.rows)
        where = f"{count:,} trials are in {runner.record.path}"
        print(f"Interrupted: {where}; the same command goes on from there")
        return 130
    print(report.write(study, runner.record, runner.fingerprint, folder))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
