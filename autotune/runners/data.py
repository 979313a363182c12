"""Real text as token streams, the same for every split over data-parallel ranks.

A sample is named by (step, index in the global batch) alone, so that any plan reads the same sequences in any step.
Without a data file the corpus is the source of Python's own standard library, which every machine has.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name

BYTE_VOCAB = 256
LIBRARY_CAP = 16 << 20  # bytes of library source; a whole one without its tests is smaller
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SCANNED = 64 << 20  # tokens of a token file that are checked when it is opened; every batch is checked too


@dataclass(frozen=True, eq=False)
class Corpus:
    """A stream of token ids below `vocab`: `tokens` is one-dimensional, of any integer type, often memory-mapped."""

    name: str
    tokens: np.ndarray[Any, np.dtype[Any]]
    vocab: int

    @cached_property
    def digest(self) -> str:
        """sha256 of the element type and the tokens, in hexadecimal; reads all of them, once."""
        state = hashlib.sha256(self.tokens.dtype.str.encode())
        for start in range(0, len(self.tokens), 1 << 24):
            state.update(np.ascontiguousarray(self.tokens[start : start + (1 << 24)]).data)
        return state.hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)


def open_corpus(path: str, vocab: int) -> Corpus:
    """The corpus of `[workload] data`: "" (the standard library), a .npy file of token ids, or any file as bytes.

    Raises UsageError: no such file, a vocabulary too small for bytes, a .npy that is not one line of whole numbers or
    that holds ids the vocabulary does not have.
    """
    if not path:
        corpus = Corpus("python standard library", _library(), vocab)
    else:
        file = Path(path)
        if not file.is_file():
            beside = (p.name for p in file.parent.iterdir()) if file.parent.is_dir() else ()
            problem = Problem(path, "", "no such file", "a text or .npy file", nearest_name(file.name, beside))
            raise UsageError(f"{path}: no such data file", problems=[problem])
        corpus = Corpus(path, _token_file(file) if file.suffix == ".npy" else _text_file(file), vocab)
    if corpus.tokens.dtype == np.uint8 and not path.endswith(".npy") and vocab < BYTE_VOCAB:
        expected = f"at least {BYTE_VOCAB}, or a .npy file of token ids"
        problem = Problem(corpus.name, "vocab_size of the model", str(vocab), expected, str(BYTE_VOCAB))
        raise UsageError(f"{corpus.name}: bytes need a larger vocabulary", problems=[problem])
    if path.endswith(".npy"):
        for start in range(0, min(len(corpus), SCANNED), 1 << 22):
            _check_range(corpus, corpus.tokens[start : start + (1 << 22)], start)
    return corpus


@lru_cache(maxsize=1)
def _library() -> np.ndarray[Any, np.dtype[Any]]:
    """The library's *.py files in the order of their paths, as bytes, up to the cap; tests and packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = bytearray()
    for file in sorted(_sources(root), key=lambda p: p.relative_to(root).as_posix()):
        if len(content) >= LIBRARY_CAP:
            break
        content += file.read_bytes()
    if not content:
        raise EnvironmentFault(f"{root}: this Python has no library sources", hint="name a file in [workload] data")
    return np.frombuffer(bytes(content[:LIBRARY_CAP]), dtype=np.uint8)


def _sources(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name not in SKIPPED and not entry.is_symlink():
                yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


def _text_file(file: Path) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        return np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


def _token_file(file: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Token ids of a .npy file, memory-mapped. Pickled arrays are refused."""
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{file}: not a plain .npy file: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        shape = f"{tokens.dtype} of shape {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "no array"
        problem = Problem(str(file), "", shape, "whole numbers in one dimension (a stream of token ids)")
        raise UsageError(f"{file}: not a file of token ids", problems=[problem])
    return tokens


def _check_range(corpus: Corpus, tokens: np.ndarray[Any, np.dtype[Any]], start: int) -> None:
    """UsageError if a token id is not below the vocabulary; `start` is the first one's place in the corpus."""
    if not tokens.size or (int(tokens.min()) >= 0 and int(tokens.max()) < corpus.vocab):
        return
    place = int(np.flatnonzero((tokens < 0) | (tokens >= corpus.vocab))[0])
    found = f"token id {int(tokens[place])}"
    problem = Problem(corpus.name, f"position {start + place}", found, f"0 to {corpus.vocab - 1}")
    raise UsageError(f"{corpus.name}: a token id that the model's vocabulary does not have", problems=[problem])


def _window(number: int, windows: int) -> int:
    """The window that the sample of this number reads: all `windows` once, spread out, before any comes again.

    An affine map with a factor that has no common divisor with `windows` is a permutation; a factor near the golden
    section of it puts neighbours far apart.
    """
    factor = max(1, round(windows * 0.6180339887498949))
    while gcd(factor, windows) != 1:
        factor += 1
    return factor * number % windows


def batch(
    corpus: Corpus, step: int, global_batch: int, sequence_length: int, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets), both int64 [count, sequence_length]: samples first .. first + count - 1 of a step's batch.

    Targets are the tokens one place on. A sample depends on (step * global_batch + its index) alone; samples do not
    overlap until the corpus has been read once. Raises UsageError for a corpus shorter than one sample.
    """
    if step < 0 or first < 0 or count < 1 or first + count > global_batch:
        raise ValueError(f"samples {first} to {first + count - 1} of step {step} are not in a batch of {global_batch}")
    windows = (len(corpus) - 1) // sequence_length
    if windows < 1:
        expected = f"at least {sequence_length + 1}: a sequence and the token after it"
        problem = Problem(corpus.name, "", f"{len(corpus)} tokens", expected, str(max(len(corpus) - 1, 1)))
        raise UsageError(f"{corpus.name}: too short for sequence_length = {sequence_length}", problems=[problem])
    rows = np.empty((count, sequence_length + 1), dtype=np.int64)
    for row in range(count):
        start = _window(step * global_batch + first + row, windows) * sequence_length
        sample = corpus.tokens[start : start + sequence_length + 1]
        _check_range(corpus, sample, start)
        rows[row] = sample
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
