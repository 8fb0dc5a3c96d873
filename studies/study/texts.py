"""The text of the language models, as indices into its alphabet."""

import hashlib
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

CONTEXT = 64  # characters in a held-out window, before the last one
WINDOWS = 512  # held out, at most
SHORTEST = 10 * (CONTEXT + 1)  # its last tenth, held out, is one window


class Corpus(NamedTuple):
    """A text, its characters as indices into its alphabet."""

    alphabet: list[str]
    training: np.ndarray
    held_out: np.ndarray  # windows, evenly spread over the last tenth


def load(path: Path | None) -> Corpus:
    """Returns a file, or the topics of Python's help; the last tenth is held out.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no text, or too short a one.
    """
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
    count = min(WINDOWS, len(rest) // CONTEXT)
    held_out = windows_of(rest, CONTEXT, count)
    return Corpus([chr(c) for c in alphabet], training, held_out)


def windows_of(tokens: np.ndarray, context: int, count: int) -> np.ndarray:
    """Returns windows of a text, evenly spread, each of context + 1 tokens."""
    starts = np.linspace(0, len(tokens) - context - 1, count, dtype=int)
    return tokens[starts[:, None] + np.arange(context + 1)]


def fingerprint(corpus: Corpus) -> str:
    """Returns a digest of a text."""
    digest = hashlib.sha256("".join(corpus.alphabet).encode())
    for tokens in (corpus.training, corpus.held_out):
        digest.update(np.ascontiguousarray(tokens).tobytes())
    return digest.hexdigest()
