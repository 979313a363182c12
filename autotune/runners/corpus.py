"""Token streams from files, memory-mapped: opened and checked before any worker starts. No torch here.

Without a data file the corpus is the source of Python's own standard library, which every machine has. About one of
its files in sixteen is held out: training reads the others. Prompts are cut from half of these, and from the other half
the prompts that tell how often proposed tokens are kept.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name

BYTE_VOCAB = 256
LIBRARY_CAP = 16 << 20  # bytes of library source; a whole one without its tests is smaller
APART = 16  # one file in so many is held out
TRAINED, HELD_OUT, PROFILED = 0, 1, 2  # parts of it: to train on; to be continued; to measure acceptances on
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


def open_corpus(path: str, vocab: int, part: int = TRAINED) -> Corpus:
    """The corpus of `[workload] data`: "" (the standard library), a .npy file of token ids, or any file as bytes.

    `part` of the standard library's files. A file of the user's own is not divided.
    Raises UsageError: no such file, a vocabulary too small for bytes, a .npy that is not one line of whole numbers or
    that holds ids the vocabulary does not have.
    """
    if not path:
        name = "python standard library" + (", held-out files" if part else "")
        corpus = Corpus(name, _library()[part], vocab)
    else:
        file = Path(path)
        if not file.is_file():
            beside = (p.name for p in file.parent.iterdir()) if file.parent.is_dir() else ()
            problem = Problem(path, "", "no such file", "a text or .npy file", nearest_name(file.name, beside))
            raise UsageError(f"{path}: no such data file", problems=[problem])
        corpus = Corpus(path, _token_file(file) if file.suffix == ".npy" else _text_file(file), vocab)
    if corpus.tokens.dtype == np.uint8 and not path.endswith(".npy") and vocab < BYTE_VOCAB:
        expected = f"a vocabulary of at least {BYTE_VOCAB}, or a .npy file of token ids"
        problem = Problem(corpus.name, "", f"bytes for a vocabulary of {vocab}", expected, f"vocab_size = {BYTE_VOCAB}")
        raise UsageError(f"{corpus.name}: bytes need a larger vocabulary", problems=[problem])
    if path.endswith(".npy"):
        for start in range(0, min(len(corpus), SCANNED), 1 << 22):
            check_range(corpus, corpus.tokens[start : start + (1 << 22)], start)
    return corpus


@lru_cache(maxsize=1)
def _library() -> tuple[np.ndarray[Any, np.dtype[Any]], ...]:
    """The library's *.py files in the order of their paths, as bytes, up to the cap; tests and packages left out: its
    three parts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, bytes] = {}
    room = LIBRARY_CAP
    for file in sorted(_sources(root), key=lambda p: p.relative_to(root).as_posix()):
        if room <= 0:
            break
        files[file.relative_to(root).as_posix()] = content = file.read_bytes()[:room]
        room -= len(content)
    parts = divided(files)
    if not all(parts):
        raise EnvironmentFault(f"{root}: this Python has no library sources", hint="name a file in [workload] data")
    return tuple(np.frombuffer(part, dtype=np.uint8) for part in parts)


def divided(files: Mapping[str, bytes]) -> tuple[bytes, ...]:
    """The text of each part, of files by their paths.

    A path's hash decides, so that every machine holds out the same files and one that comes or goes moves no other. A
    file whose text one of an earlier part has as well is in neither.
    """
    parts: list[list[bytes]] = [[], [], []]
    seen: set[bytes] = set()
    for part, texts in enumerate(parts):
        here = [text for path, text in files.items() if _part(path) == part]
        texts += (text for text in here if hashlib.sha256(text).digest() not in seen)
        seen |= {hashlib.sha256(text).digest() for text in here}
    return tuple(map(b"".join, parts))


def _part(path: str) -> int:
    first, second = hashlib.sha256(path.encode()).digest()[:2]
    return TRAINED if first % APART else HELD_OUT + second % 2


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
        problem = Problem(str(file), "", error.strerror or str(error), "a readable file")
        raise UsageError(f"{file}: cannot be read", problems=[problem]) from None


def _token_file(file: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Token ids of a .npy file, memory-mapped. Pickled arrays are refused."""
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        problem = Problem(str(file), "", str(error), "a .npy file as numpy.save writes it, without pickled objects")
        raise UsageError(f"{file}: not a plain .npy file", problems=[problem]) from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        shape = f"{tokens.dtype} of shape {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "no array"
        problem = Problem(str(file), "", shape, "whole numbers in one dimension (a stream of token ids)")
        raise UsageError(f"{file}: not a file of token ids", problems=[problem])
    return tokens


def check_range(corpus: Corpus, tokens: np.ndarray[Any, np.dtype[Any]], start: int) -> None:
    """UsageError if a token id is not below the vocabulary; `start` is the first one's place in the corpus."""
    if not tokens.size or (int(tokens.min()) >= 0 and int(tokens.max()) < corpus.vocab):
        return
    place = int(np.flatnonzero((tokens < 0) | (tokens >= corpus.vocab))[0])
    found = f"token id {int(tokens[place])}"
    problem = Problem(corpus.name, f"position {start + place}", found, f"0 to {corpus.vocab - 1}")
    raise UsageError(f"{corpus.name}: a token id that the model's vocabulary does not have", problems=[problem])


def windows(corpus: Corpus, sequence_length: int) -> int:
    """How many samples, each a sequence and the token after it, the corpus has. UsageError where it has none."""
    count = (len(corpus) - 1) // sequence_length
    if count < 1:
        expected = f"at least {sequence_length + 1}: a sequence and the token after it"
        near = f"sequence_length = {len(corpus) - 1}" if len(corpus) > 1 else None
        problem = Problem(corpus.name, "", f"{len(corpus)} tokens", expected, near)
        raise UsageError(f"{corpus.name}: too short for sequence_length = {sequence_length}", problems=[problem])
    return count
