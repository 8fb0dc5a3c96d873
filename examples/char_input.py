"""The text that char_lm.py and others learn: a file, or Python's own help."""

import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

BATCH, CONTEXT = 16, 64  # windows in a batch; characters that the model sees
SHORTEST = 10 * (CONTEXT + 1)  # its last tenth, held out, is one window to validate on


class Corpus(NamedTuple):
    """A text, its characters as indices into its alphabet."""

    alphabet: list[str]
    training: np.ndarray
    held_out: np.ndarray  # windows, evenly spread over the last tenth


def windows_at(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns from each start CONTEXT characters and the one after them."""
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)]


def load(path: Path | None) -> Corpus:
    """Returns a file, or the topics of Python's help; the last tenth is held out."""
    if path is None:  # without its rulers
        text = re.sub(r"([=*])\1{3,}", r"\1\1\1", "\n".join(topics.values()))
    else:
        text = path.read_text("utf-8-sig")
    if len(text) < SHORTEST:
        raise ValueError(f"{len(text)} characters, but {SHORTEST} are needed")
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    alphabet, tokens = np.unique(codes, return_inverse=True)
    training, rest = np.split(tokens.astype(np.int32), [-(len(tokens) // 10)])
    count = min(512, len(rest) // CONTEXT)
    starts = np.linspace(0, len(rest) - CONTEXT - 1, count, dtype=int)
    return Corpus([chr(c) for c in alphabet], training, windows_at(rest, starts))
