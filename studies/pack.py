"""Packs a finished record: trials.jsonl becomes trials.npz, a tenth of its size.

    python studies/pack.py FOLDER

Before the lines are taken away, the packed file must give the same results to the last
digit. Curves of tuning are dropped. Status: 0 done, 2 a mistake or a difference.
"""

import argparse
import json
import sys
from pathlib import Path

from study import report
from study.command_line import Parser
from study.record import Record, pack


def main(argv: list[str] | None = None) -> int:
    """Packs a record, and returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("pack.py", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="where trials.jsonl is")
    folder = parser.parse_args(argv).folder

    def results(record: Record) -> str:
        return json.dumps(report.shown(study, record, corpus, folder))

    try:
        study, corpus = report.study_of(folder), report.corpus_of(folder)
        pack(folder, results)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except KeyError:
        parser.error(f"{folder}: its tuning has not ended")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
