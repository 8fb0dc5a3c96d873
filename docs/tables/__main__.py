"""The tables of the documentation, from the records that they show.

    python -m docs.tables studies/records/2026-11-27_fair
    python -m docs.tables --write studies/records/* benchmarks/records/*

Run it where this repository begins. What a record is, its files say. With --write each
table of a record in a folder "records" takes the place of the one with the same head
and first column in docs/; a table that is on no page is left out. The figures of
benchmarks are drawn, too.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from docs.tables import compared, compiled, evidence, low_precision, speed


def kind_of(folder: Path) -> Any:
    """Returns what makes the tables of a record; None where the docs show none."""
    if (folder / "study.toml").exists():
        return evidence
    if (folder / "runs.jsonl").exists():
        return low_precision
    if common.read(folder, "compiled"):
        return compared if folder.name == compared.BYTES[1] else compiled
    return speed if common.read(folder, "step") else None


def replaced(page: str, table: str) -> str:
    """Returns a page with a table in place of the one that it is a new version of."""
    for block in page.split("\n\n"):
        if block.startswith("| ") and names_of(block) == names_of(table):
            return page.replace(block.rstrip("\n"), table)
    return page


def names_of(table: str) -> list[str]:
    """Returns a table's head and its first column: what it is of."""
    head, _, *rows = table.splitlines()
    return [head, *(row.split(" | ")[0] for row in rows)]


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tables", description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help="into docs/")
    parser.add_argument("folders", type=Path, nargs="+", help="records")
    options = parser.parse_args(argv)
    tables = []
    for folder in options.folders:
        kind = kind_of(folder)
        if options.write and kind in (compiled, speed):
            kind.draw(folder)
        if kind and (not options.write or folder.resolve().parent.name == "records"):
            tables += kind.tables(folder)
    if not options.write:
        print("\n\n".join(tables))
        return 0
    for page in sorted(Path("docs").glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = functools.reduce(replaced, tables, old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"Changed: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
