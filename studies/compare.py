"""The study: AdaM3 against other optimizers, tuned alike, on fresh seeds.

    python studies/compare.py --study fair --text FILE --out FOLDER
    python studies/compare.py --report FOLDER

Each arm is tried in the same number of settings (tune); the best is rerun on seeds that
tuning never saw, paired across arms (final); lam is varied at the baseline's best
setting (sweep). Every training is a line of FOLDER/trials.jsonl once it has ended. The
same command goes on where it was interrupted, and never repeats a finished training.

Without --text the text is the English that ships with every CPython; nothing is
downloaded. Status: 0 done, 2 a mistake in the command, 130 interrupted.
"""

import argparse
import functools
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from study import plan, record, report
from study.plan import POINTS, Study, Trial
from study.record import Record
from study.tasks import Corpus, fingerprint, gradient_scale, load
from study.training import Program, class_means

CONFIGURATIONS = Path(__file__).resolve().parent / "configurations"
NAMES = sorted(path.stem for path in CONFIGURATIONS.glob("*.toml"))
SECONDS = 30  # between two lines of progress


class Runner:
    """Runs the trials of a study that are not in its record yet."""

    def __init__(self, study: Study, corpus: Corpus, record: Record) -> None:
        self.study, self.record = study, record
        self.fingerprint = fingerprint(corpus)
        self.tasks = {name: study.made(name, corpus) for name in study.tasks}
        self.scale = functools.cache(lambda name: gradient_scale(self.tasks[name]))

    def run(self, trials: list[Trial]) -> None:
        """Trains what is missing; KeyboardInterrupt loses what is in progress alone."""
        keys = {self.study.key(x, self.fingerprint): x for x in trials}
        missing = [x for key, x in keys.items() if key not in self.record.rows]
        phase, total, began, said = trials[0].phase, len(missing), time.time(), 0.0
        with ThreadPoolExecutor(self.study.workers) as pool:
            try:
                futures = [pool.submit(self.train, trial) for trial in missing]
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    if (spent := time.time() - began) > said + SECONDS or done == total:
                        left = f"{spent / done * (total - done) / 60:.0f} min left"
                        print(f"{phase}: {done:,} of {total:,}, {left}", flush=True)
                        said = spent
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def train(self, trial: Trial) -> None:
        """Trains one and adds it to the record; of tuning no curves."""
        points, steps = POINTS, self.study.tasks[trial.task]["steps"]
        if trial.phase == "tune":  # a loss on all that is held out takes long
            points = 1
        scale = self.scale(trial.task)
        program = Program(self.tasks[trial.task], trial.rule, steps, points, scale)
        row = program.train(trial.h, trial.seed)
        if trial.phase == "tune":
            row = {name: x for name, x in row.items() if not isinstance(x, list)}
        key = self.study.key(trial, self.fingerprint)
        self.record.add({"key": key, **trial._asdict(), **row})

    def phases(self) -> None:
        """Runs the whole study; each phase builds on the record of those before."""
        path, study = self.record.folder / "checks.json", self.study
        if "class_means" in study.checks and not path.exists():
            seeds = {"tuning": study.tuning["seeds"], "final": study.final_seeds()}
            numbers = study.checks["class_means"] | seeds
            means = {x: class_means(y, **numbers) for x, y in self.tasks.items()}
            record.write_json(path, {"class_means": means})
        state = self.study, self.record, self.fingerprint
        self.run(plan.tune(self.study))
        self.run([*plan.final(*state), *plan.sweep(*state)])


def main(argv: list[str] | None = None) -> int:
    """Runs the study or its report, and returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("compare.py", None, __doc__, formatter_class=raw)
    add: Any = parser.add_argument
    add("--study", default="fair", choices=NAMES, help="default: %(default)s")
    add("--quick", action="store_true", help="the same as --study quick: a minute")
    add("--text", type=Path, help="a UTF-8 file; default: Python's help topics")
    add("--out", type=Path, help="folder of the record; default: out/study_NAME")
    add("--report", type=Path, metavar="FOLDER", help="report on a record, no more")
    options = parser.parse_args(argv)
    name = "quick" if options.quick else options.study
    folder = options.out or Path("out", f"study_{name}")
    try:
        if options.report:
            study = plan.load(options.report / "study.toml")
            corpus = record.runs_of(options.report)[-1]["corpus"]
            print(report.write(study, Record(options.report), corpus))
            return 0
        path, corpus = CONFIGURATIONS / f"{name}.toml", load(options.text)
        folder.mkdir(parents=True, exist_ok=True)
        runner = Runner(plan.load(path), corpus, Record(folder))
        record.note_run(folder, runner.fingerprint)
        shutil.copyfile(path, folder / "study.toml")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    try:
        runner.phases()
    except KeyboardInterrupt:
        count = f"{len(runner.record.rows):,} trainings are in {folder}"
        print(f"Interrupted: {count}; the same command goes on from there")
        return 130
    print(report.write(runner.study, runner.record, runner.fingerprint))
    return 0


if __name__ == "__main__":
    sys.exit(main())
