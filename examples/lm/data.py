"""Bytes of real text that every machine has: the standard library's sources."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCABULARY = 256  # a token is a byte
# Installed packages and tests differ from machine to machine; the codec tables and
# the pydoc topics are data in a .py file, not source.
LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
)
VALIDATION_SHARE = 0.1  # of the files, not of the bytes


class Corpus(NamedTuple):
    """Two disjoint sets of files, each joined to one array of bytes."""

    train: np.ndarray
    validation: np.ndarray


def stdlib_sources(root: Path) -> list[Path]:
    """Lists the source files under ``root`` in the order of their relative paths."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in found if not LEFT_OUT.intersection(path.parts))
    return sorted(kept, key=lambda path: path.as_posix())


def is_validation(path: Path) -> bool:
    """Says on which side of the split a file lies, by a hash of its relative path."""
    # Not hash(): Python salts it, and a resumed run would see another split.
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads the sources under ``root`` (default: this Python's standard library)."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in stdlib_sources(root):
        sides[is_validation(path)].append((root / path).read_bytes())
    if not all(sides):
        raise FileNotFoundError(
            f"{root} holds too few .py files to split into train and validation; "
            "this Python seems to come without the sources of its standard library."
        )
    return Corpus(*(np.frombuffer(b"\n".join(side), np.uint8) for side in sides))


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    # One byte more than the context: the inputs and, shifted by one, the targets.
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def train_batch(
    text: np.ndarray, seed: int, step: int, batch: int, context: int
) -> np.ndarray:
    """Draws the batch of one step: a pure function, so a resumed run needs no cursor.

    Args:
      text: the bytes to draw from.
      seed: of the run.
      step: which batch of the run.
      batch: the number of windows.
      context: the number of predictions in a window.

    Returns:
      Tokens of shape ``[batch, context + 1]``.
    """
    generator = np.random.default_rng((seed, step))
    starts = generator.integers(0, len(text) - context, size=batch)
    return _windows(text, starts, context)


def validation_windows(text: np.ndarray, count: int, context: int) -> np.ndarray:
    """Cuts ``count`` evenly spaced windows, the same for every run and optimizer."""
    starts = np.linspace(0, len(text) - context - 1, count).astype(np.int64)
    return _windows(text, starts, context)
