"""Whole tensors from a training's ranks: each writes what it has into the log folder, and rank 0 puts it together.

Files, because ranks have shards, stages and rows in every mixture, and rank 0's device may have no room for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from autotune.planners.lower.expand import coordinates
from autotune.runners.mesh import barrier
from autotune.runners.state import Key
from autotune.runners.training import Trainer
from autotune.runners.vocabulary_shard import assemble


def _file(folder: Path, kind: str, rank: int) -> Path:
    return folder / f"{kind}-{rank}.safetensors"


def gathered(trainer: Trainer, tensors: Mapping[Key, Tensor], folder: Path, kind: str) -> dict[Key, Tensor] | None:
    """The whole tensors by (block, weight name) on rank 0, on the CPU; None on the others. Every rank calls it.

    `tensors`: this rank's, on the CPU, already whole over the data ranks, of which the first alone is asked; no two of
    them may share memory. `kind` is what their files are called meanwhile.
    """
    rank, plan = trainer.mesh.rank, trainer.plan
    if trainer.mesh.replica == 0:
        named = {f"{block}/{name}": tensor.contiguous() for (block, name), tensor in tensors.items()}
        save_file(named, _file(folder, kind, rank))
    barrier(trainer.mesh.device)
    if rank:
        return None
    pieces = []
    for other in range(dist.get_world_size()):
        pipeline, replica, tensor = coordinates(plan, other)
        if replica == 0:
            file = _file(folder, kind, other)
            pieces.append((pipeline, tensor, load_file(file)))
            file.unlink()
    return assemble(plan, trainer.model, pieces)
