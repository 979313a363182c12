"""Hugging Face checkpoints: headers first, then only the slices that a tensor rank needs. Safetensors only.

A checkpoint is `model.safetensors`, or `model.safetensors.index.json` with the files that it names. A safetensors file
is 8 bytes of header length, a JSON header of names, types, shapes and offsets, then the data: nothing in it is code.
Pickled checkpoints are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autotune.spec.errors import Problem, UsageError, nearest_divisor, nearest_name
from autotune.spec.graph import Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the types we load; others are quantised and need more than a cast
HEADER_LIMIT = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor is, and what its header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint. `source` is the file that names its tensors, for errors."""

    source: Path
    entries: Mapping[str, Entry]

    def verify(self, weights: Iterable[Weight]) -> None:
        """Nothing, or a UsageError that lists every tensor of `weights` that is missing, misshapen or quantised."""
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

    def load(
        self, weight: Weight, rank: int, ranks: int, dtype: torch.dtype, device: torch.device | str
    ) -> torch.Tensor:
        """Tensor rank `rank` of `ranks`'s shard of a weight: what `shard` gives of the whole, reading only that.

        Raises UsageError for a tensor that is missing or whose data cannot be read; call `verify` first to learn of
        all of them at once.
        """
        self.verify([weight])
        result = torch.empty(_shard_shape(weight, ranks), dtype=dtype, device=device)
        row = 0
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            for name, rows in weight.parts:
                file = self.entries[name].file
                try:
                    if file not in handles:
                        handles[file] = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
                    piece = handles[file].get_slice(name)[_index(weight, rows, rank, ranks)]
                except (SafetensorError, OSError) as error:
                    raise UsageError(f"{file}: {name}: cannot be read: {error}") from None
                result[row : row + piece.shape[0]].copy_(piece)
                row += piece.shape[0]
        return result


def _index(weight: Weight, rows: int, rank: int, ranks: int) -> tuple[slice, ...]:
    """The part of one part, `rows` long, that a tensor rank holds."""
    if weight.shard is None:
        return (slice(0, rows),)
    size = rows if weight.shard == 0 else weight.shape[1]
    if size % ranks:
        near = str(nearest_divisor(ranks, size))
        problem = Problem(
            weight.parts[0][0], f"dimension {weight.shard}", f"{ranks} ranks", f"a divisor of {size}", near
        )
        raise UsageError(f"{weight.name}: cannot be divided over the tensor ranks", problems=[problem])
    mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
    return (mine,) if weight.shard == 0 else (slice(0, rows), mine)


def _shard_shape(weight: Weight, ranks: int) -> tuple[int, ...]:
    """The shape of every tensor rank's shard."""
    shape = list(weight.shape)
    if weight.shard is not None:
        shape[weight.shard] //= ranks
    return tuple(shape)


def _rows(weight: Weight) -> list[int]:
    return [rows for _, rows in weight.parts]


def shard(weight: Weight, full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Rank `rank` of `ranks`'s share of a whole weight (or its gradient): of each part by itself, stacked again.

    A weight that is not sharded comes back as it is.
    """
    if weight.shard is None:
        return full
    parts = torch.split(full, _rows(weight))
    return torch.cat([part[_index(weight, len(part), rank, ranks)] for part in parts])


def unshard(weight: Weight, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole weight of the shards of ranks 0, 1, ...: the inverse of `shard`. Not sharded: the first of them."""
    if weight.shard is None:
        return shards[0]
    if weight.shard == 1:
        return torch.cat(tuple(shards), dim=1)
    rows = [count // len(shards) for count in _rows(weight)]
    by_part = zip(*(torch.split(piece, rows) for piece in shards), strict=True)
    return torch.cat([piece for pieces in by_part for piece in pieces])


def split_parts(weight: Weight, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole weight (or its gradient) as the checkpoint's tensors, by name; views of it."""
    return dict(zip((name for name, _ in weight.parts), torch.split(tensor, _rows(weight)), strict=True))


def open_checkpoint(folder: str | Path) -> Checkpoint:
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
        return Checkpoint(folder / SINGLE, _header(folder / SINGLE))
    if (folder / INDEX).is_file():
        return _open_index(folder / INDEX)
    there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    found = ", ".join(there[:5]) if there else "no weights"
    problem = Problem(str(folder), "", found, f"{SINGLE} or {INDEX}; pickled weights are never read")
    raise UsageError(f"{folder}: no safetensors checkpoint", problems=[problem])


def _open_index(index: Path) -> Checkpoint:
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
    return Checkpoint(index, {name: headers[file][name] for name, file in named.items()})


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


def save_checkpoint(
    folder: str | Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], file_bytes: int = 5 << 30
) -> None:
    """Writes whole tensors by their checkpoint names and `config` as config.json, as transformers reads them.

    More than `file_bytes` go into several files with an index. The folder appears complete or not at all; one that
    already holds something is refused with UsageError.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = Problem(str(folder), "", "something there already", "a folder that does not exist or is empty")
        raise UsageError(f"{folder}: not overwritten", problems=[problem])
    files: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if files[-1] and filled + tensor.nbytes > file_bytes:
            files.append({})
            filled = 0
        files[-1][name] = tensor.detach().cpu().contiguous()
        filled += tensor.nbytes
    names = (
        [SINGLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        for name, content in zip(names, files, strict=True):
            save_file(content, partial / name, metadata={"format": "pt"})
        if len(files) > 1:
            index: dict[str, Any] = defaultdict(dict, metadata={"total_size": sum(t.nbytes for t in tensors.values())})
            for name, content in zip(names, files, strict=True):
                index["weight_map"].update(dict.fromkeys(content, name))
            (partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (partial / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
