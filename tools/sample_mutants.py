"""Keeps a seeded sample of Cosmic Ray's mutants, and lists the survivors.

The same source, seed and size give the same mutants, whatever the tests are. So the
survivors of two test suites can be compared.
"""

import argparse
import random

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome


def sample(session: WorkDB, size: int, seed: int) -> None:
    """Replaces the session's work by a sample of it."""
    items = sorted(session.work_items, key=lambda item: str(item.mutations))
    session.clear()
    session.add_work_items(random.Random(seed).sample(items, min(size, len(items))))


def report(session: WorkDB) -> None:
    """Prints each mutant that no test has found, and the count of them."""
    results = dict(session.results)
    survivors = [
        k for k, x in results.items() if x.test_outcome == TestOutcome.SURVIVED
    ]
    for job in sorted(survivors, key=lambda job: results[job].diff):
        print(results[job].diff)
    print(f"{len(survivors)} of {len(results)} mutants survived.")


def main() -> None:
    """Samples, or reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("session", help="the file that `cosmic-ray init` made")
    parser.add_argument("--sample", type=int, metavar="N", help="keep N mutants")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with use_db(args.session, WorkDB.Mode.open) as session:
        sample(session, args.sample, args.seed) if args.sample else report(session)


if __name__ == "__main__":
    main()
