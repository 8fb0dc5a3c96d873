"""The text of the language models, as indices into its alphabet.

It is read as the examples read theirs.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from char_input import Corpus, load

__all__ = ["Corpus", "fingerprint", "load", "windows_of"]


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
