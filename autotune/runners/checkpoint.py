"""Hugging Face checkpoints: only the slices that a tensor rank needs are read, and whole ones are written.

Safetensors only; what a folder holds is in headers.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autotune.runners.headers import INDEX, SINGLE, Headers, read_headers
from autotune.spec.errors import Problem, UsageError, nearest_divisor
from autotune.spec.graph import Weight, blocks
from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class Checkpoint(Headers):
    """A checkpoint whose headers are known and whose tensors can be loaded."""

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

    def whole(
        self,
        model: ModelSpec,
        dtype: torch.dtype,
        begin: Callable[[Weight, torch.dtype], torch.Tensor] | None = None,
    ) -> dict[tuple[int, str], torch.Tensor]:
        """Every tensor of `model`, on the CPU, by (block index, name); what it lacks and a training may begin without
        is as `begin` says."""
        found: dict[tuple[int, str], torch.Tensor] = {}
        for block in blocks(model):
            for weight in block.tensors():
                own = kept(weight, dtype)
                made = begin(weight, own) if begin and self.lacks(weight) else self.load(weight, 0, 1, own, "cpu")
                found[block.index, weight.name] = made
        return found


def kept(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """The type that a tensor has beside weights of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if weight.wide else dtype


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
    """The checkpoint in a folder: its headers are read, no weights. Raises UsageError (see headers.read_headers)."""
    headers = read_headers(folder)
    return Checkpoint(headers.source, headers.entries)


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
        for name in names:  # safetensors makes files that only their owner may read
            shutil.copymode(partial / "config.json", partial / name)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
