"""What char_lm.py is given: options and a text, checked before JAX is imported."""

import argparse
import contextlib
import re
from argparse import RawDescriptionHelpFormatter as AsWritten
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, NoReturn

import numpy as np

BATCH, CONTEXT = 16, 64  # windows in a batch; characters that the model sees
SHORTEST = 10 * (CONTEXT + 1)  # its last tenth, held out, is one window to validate on
STATES: dict[
    str, dict[str, str]
] = {  # how m, v and s are stored: 12, 8, 6 or 4 bytes in all
    "float32": {},
    "mixed": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "bfloat16": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "bfloat16"),
    "float8": {"m_dtype": "float8", "v_dtype": "bfloat16", "s_dtype": "float8"},
}


class Corpus(NamedTuple):
    """A text, its characters as indices into its alphabet."""

    alphabet: list[str]
    training: np.ndarray
    held_out: np.ndarray  # windows, evenly spread over the last tenth


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Returns a parser of a number within bounds."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        wanted = f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return parse


def parse(argv: list[str] | None, about: str | None) -> argparse.Namespace:
    """Returns the options of char_lm.py, with the text as `corpus`."""
    parser = Parser("char_lm.py", description=about, formatter_class=AsWritten)

    def add(name: str, default: Any, **more: Any) -> None:
        more = {"help": "default: %(default)s"} | more
        parser.add_argument(name, default=default, **more)

    add("--text", None, type=Path, help="a UTF-8 file; default: Python's help topics")
    add("--steps", 1500, type=number(int, 1, 1e9))
    add("--seed", 0, type=number(int, 0, 1e9))
    add("--form", "standardized")  # its names are the package's: main checks it
    add("--state", "float32", choices=STATES)
    add("--lr", 4e-3, type=number(float, 1e-9, 1e3))
    add("--out", Path("out"), type=Path, help="a folder; default: %(default)s")
    options = parser.parse_args(argv)
    try:
        options.corpus = load(options.text)
    except OSError as error:
        parser.error(f"--text {options.text}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--text {options.text}: {error}")
    options.figure = options.out / "char_lm.png"
    options.sample = options.out / "char_lm.txt"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for path in (options.figure, options.sample):
            path.open("ab").close()  # fails here rather than after the training
            if path.stat().st_size == 0:
                path.unlink()
    except OSError as error:
        parser.error(f"--out {options.out}: {error.filename}: {error.strerror}")
    return options


def windows_at(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns from each start CONTEXT characters and the one after them."""
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)]


def load(path: Path | None) -> Corpus:
    """Returns a file, or the topics of Python's help; the last tenth is held out."""
    if path is None:  # without its rulers
        text = re.sub(r"([=*])\1{3,}", r"\1\1\1", "\n".join(topics.values()))
    else:
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text, at byte {error.start}") from None
    if "\0" in text:
        raise ValueError("not UTF-8 text, for it contains a NUL")
    if len(text) < SHORTEST:
        raise ValueError(f"{len(text)} characters, but {SHORTEST} are needed")
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    alphabet, tokens = np.unique(codes, return_inverse=True)
    if len(alphabet) < 2:
        raise ValueError("one character over and over: there is nothing to learn")
    training, rest = np.split(tokens.astype(np.int32), [-(len(tokens) // 10)])
    count = min(512, len(rest) // CONTEXT)
    starts = np.linspace(0, len(rest) - CONTEXT - 1, count, dtype=int)
    return Corpus([chr(c) for c in alphabet], training, windows_at(rest, starts))
