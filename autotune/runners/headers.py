"""The headers of Hugging Face checkpoints: which tensors, of which type and shape, in which files. No torch here.

A checkpoint is `model.safetensors`, or `model.safetensors.index.json` with the files that it names. A safetensors file
is 8 bytes of header length, a JSON header of names, types, shapes and offsets, then the data: nothing in it is code.
Pickled checkpoints are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

from autotune.spec.errors import Problem, UsageError, nearest_name
from autotune.spec.graph import Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the types we load; others are quantised and need more than a cast
SAMPLED_PARTS, SAMPLED_BYTES = 256, 16 << 10  # of a weights file, for its digest
HEADER_LIMIT = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor is, and what its header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Headers:
    """What a checkpoint says of its tensors. `source` is the file that names them, for errors."""

    source: Path
    entries: Mapping[str, Entry]

    def lacks(self, weight: Weight) -> bool:
        """Whether it has nothing of a weight that a training may begin without."""
        return weight.fresh and all(name not in self.entries for name, _ in weight.parts)

    def verify(self, weights: Iterable[Weight], train: bool = False) -> None:
        """Nothing, or a UsageError that lists every tensor of `weights` that is missing, misshapen or quantised.
        `train`: those that a training may begin without may be missing."""
        weights = (w for w in weights if not (train and self.lacks(w)))
        wanted = {name: (rows, *w.shape[1:]) for w in weights for name, rows in w.parts}
        problems: list[Problem] = []
        for name, shape in wanted.items():
            entry = self.entries.get(name)
            expected = f"a tensor of shape {list(shape)}"
            if entry is None:
                near = nearest_name(name, self.entries) if len(problems) < 8 else None  # a search of all names each
                problems.append(Problem(str(self.source), name, "no such tensor", expected, near))
            elif entry.shape != shape:
                problems.append(Problem(str(entry.file), name, f"shape {list(entry.shape)}", expected))
            elif entry.dtype not in WIDTHS:
                problems.append(Problem(str(entry.file), name, entry.dtype, f"one of {', '.join(WIDTHS)}"))
        if problems:
            count = f"{len(problems)} of {len(wanted)} tensors"
            raise UsageError(f"{self.source}: {count} are not as the model needs them", problems=problems)


def read_headers(folder: str | Path) -> Headers:
    """Reads the headers of a checkpoint folder and no weights.

    Raises UsageError: no such folder, no safetensors in it, an index or a header that does not hold together, files
    that an index names but that are not there (all of them at once) or that are outside the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        beside = (p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else ()
        near = nearest_name(folder.name, beside)
        problem = Problem(str(folder), "", "no such folder", "a folder with a Hugging Face checkpoint", near)
        raise UsageError(f"{folder}: no such checkpoint", problems=[problem])
    if (folder / SINGLE).is_file():
        return Headers(folder / SINGLE, _header(folder / SINGLE))
    if (folder / INDEX).is_file():
        return _open_index(folder / INDEX)
    there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    found = ", ".join(there[:5]) if there else "no weights"
    problem = Problem(str(folder), "", found, f"{SINGLE} or {INDEX}; pickled weights are never read")
    raise UsageError(f"{folder}: no safetensors checkpoint", problems=[problem])


def _open_index(index: Path) -> Headers:
    """The checkpoint that an index file spells out."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{index}: cannot be read as a JSON file: {error}") from None
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        problem = Problem(str(index), "weight_map", "no table of file names", "tensor names with their files")
        raise UsageError(f"{index}: not a checkpoint index", problems=[problem])
    headers: dict[str, Mapping[str, Entry]] = {}
    problems: list[Problem] = []
    for file in sorted(set(named.values())):
        path = PurePosixPath(file)
        inside = not path.is_absolute() and ".." not in path.parts and "\\" not in file and ":" not in file
        if not inside or path.suffix != ".safetensors":
            problems.append(Problem(str(index), "weight_map", repr(file), "a .safetensors file inside the folder"))
        elif not (index.parent / path).is_file():
            near = nearest_name(path.name, (p.name for p in index.parent.glob("*.safetensors")))
            problems.append(Problem(str(index), "weight_map", f"{file}, which is not there", "a file", near))
        else:
            try:
                headers[file] = _header(index.parent / path)
            except UsageError as error:
                problems.extend(error.problems)
    for name, file in named.items():
        if file in headers and name not in headers[file]:
            near = nearest_name(name, headers[file])
            problems.append(Problem(str(index.parent / file), name, "no such tensor", "what the index says", near))
    if problems:
        raise UsageError(f"{index}: the index and its files do not agree", problems=problems)
    return Headers(index, {name: headers[file][name] for name, file in named.items()})


def _header(file: Path) -> dict[str, Entry]:
    """Name, type and shape of every tensor of one file, its offsets checked against its size."""

    def wrong(key: str, found: str, expected: str) -> UsageError:
        problem = Problem(str(file), key, found, expected)
        return UsageError(f"{file}: not a whole safetensors file", problems=[problem])

    try:
        with file.open("rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or not 0 < length <= min(HEADER_LIMIT, total - 8):
                raise wrong("header", f"a length of {length} bytes in a file of {total}", "a safetensors header")
            content = json.loads(stream.read(length))
    except OSError as error:
        raise wrong("", str(error), "a file that can be read") from None
    except (ValueError, RecursionError) as error:
        raise wrong("header", f"no JSON: {error}", "a safetensors header") from None
    if not isinstance(content, dict):
        raise wrong("header", f"{type(content).__name__}", "a table of tensors")
    entries = {}
    for name, fields in content.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = str(fields["dtype"]), tuple(map(int, fields["shape"])), fields["data_offsets"]
            held, needed = end - begin, prod(shape) * WIDTHS.get(dtype, 0)
            sound = 0 <= begin <= end and min(shape, default=0) >= 0 and (dtype not in WIDTHS or held == needed)
        except (KeyError, TypeError, ValueError):
            raise wrong(name, "an entry without dtype, shape and data_offsets", "all three") from None
        if not sound:
            raise wrong(name, f"{held} bytes for {dtype}{list(shape)}", f"{needed} bytes")
        if end > total - 8 - length:
            raise wrong(name, f"a file of {total} bytes", f"at least {8 + length + end} bytes: it is cut short")
        entries[name] = Entry(file, dtype, shape)
    return entries


def weights_digest(folder: str | Path) -> str:
    """A name for a checkpoint's weights that changes with them, without reading all of a large one: the sha256 of every
    file's name, size, header and some of its content, spread evenly."""
    files = sorted({entry.file for entry in read_headers(folder).entries.values()})
    state = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        state.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for part in range(SAMPLED_PARTS):
                stream.seek(part * max(0, size - SAMPLED_BYTES) // (SAMPLED_PARTS - 1))
                state.update(stream.read(SAMPLED_BYTES))
    return state.hexdigest()
