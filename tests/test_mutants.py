"""The list of mutants fits the package: each is an edit of text that occurs once."""

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


def test_the_list_is_long_and_nothing_comes_twice() -> None:
    counted = [x for x in MUTANTS if not x.equivalent]
    assert len(counted) >= 75
    assert len({x[:3] for x in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=Mutant.name)
def test_each_mutant_is_another_program(mutant: Mutant) -> None:
    text = (ROOT / "adam3_optax" / f"{mutant.file}.py").read_text()
    # It is valid, or an error of syntax would be what the tests notice.
    assert ast.dump(ast.parse(mutant.applied(text))) != ast.dump(ast.parse(text))


def test_text_that_does_not_occur_once_is_refused() -> None:
    for text in ("", "b b"):
        with pytest.raises(ValueError, match="must occur once"):
            Mutant("_rule", "b", "c").applied(text)
    with pytest.raises(ValueError, match="must occur once"):
        Mutant("_rule", "b", "b").applied("b")
