"""The tables of the documentation, from the records that they show.

    python -m docs.tables studies/records/2026-11-27_fair
    python -m docs.tables --write studies/records/* benchmarks/records/*

Run it where this repository begins. What a record is, its files say. With --write each
table takes the place of the one with the same head and first column in docs/; a table
that is on no page is left out. The figures of benchmarks are drawn, too.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs.tables import compiled, evidence, low_precision, speed

PAGES = sorted(Path(__file__).resolve().parents[1].glob("*.md"))
Maker = Callable[[Path], list[str]]


def maker_of(folder: Path) -> Maker | None:
    """Returns what makes the tables of a record; None where the docs show none."""
    if (folder / "study.toml").exists():
        return evidence.tables
    if (folder / "runs.jsonl").exists():
        return low_precision.tables
    lines = folder / "results.jsonl"
    if not lines.exists():
        return None
    of_compilers = '"measure": "compiled"' in lines.read_text(encoding="utf-8")
    return compiled.tables if of_compilers else speed.tables


def replaced(page: str, table: str) -> str:
    """Returns a page with a table in place of the one that it is a new version of."""
    names = _names(table)
    for block in page.split("\n\n"):
        if block.startswith("| ") and _names(block) == names:
            return page.replace(block.rstrip("\n"), table)
    return page


def _names(table: str) -> list[str]:
    """Returns a table's head and its first column: what it is of."""
    head, _, *rows = table.splitlines()
    return [head, *(row.split(" | ")[0] for row in rows)]


def main(argv: list[str] | None = None) -> int:
    """Prints or writes the tables, and returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tables", description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help="into docs/")
    parser.add_argument("folders", type=Path, nargs="+", help="records")
    options = parser.parse_args(argv)
    makers = {folder: maker_of(folder) for folder in options.folders}
    tables = [x for folder, make in makers.items() if make for x in make(folder)]
    if not options.write:
        print("\n\n".join(tables))
        return 0
    for folder, make in makers.items():
        for kind in (compiled, speed):
            if make == kind.tables:
                kind.draw(folder)
    for page in PAGES:
        text = old = page.read_text(encoding="utf-8")
        for table in tables:
            text = replaced(text, table)
        if text != old:
            page.write_text(text, encoding="utf-8")
            print(f"Changed: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
