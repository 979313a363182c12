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
from autotune.runners.vocabulary_shard import Piece, assemble


def _file(folder: Path, kind: str, rank: int) -> Path:
    return folder / f"{kind}-{rank}.safetensors"


def asked(trainer: Trainer) -> set[Key]:
    """The weights that this rank is asked for: all it has, or of a replica but the first its experts alone."""
    if trainer.mesh.replica >= trainer.plan.expert:
        return set()
    every = (
        (block, weight) for state in trainer.states.values() for block in state.blocks for weight in block.weights()
    )
    return {(block.index, w.name) for block, w in every if trainer.mesh.replica == 0 or w.experts}


def gathered(trainer: Trainer, tensors: Mapping[Key, Tensor], folder: Path, kind: str) -> dict[Key, Tensor] | None:
    """The whole tensors by (block, weight name) on rank 0, on the CPU; None on the others. Every rank calls it.

    `tensors`: this rank's, on the CPU, already whole over the data ranks, of which the first alone is asked, and for
    experts the first with each run of them; no two of them may share memory. `kind` is what their files are called
    meanwhile.
    """
    rank, plan = trainer.mesh.rank, trainer.plan
    if trainer.mesh.replica < plan.expert:
        told = asked(trainer)
        named = {f"{b}/{name}": tensor.contiguous() for (b, name), tensor in tensors.items() if (b, name) in told}
        save_file(named, _file(folder, kind, rank))
    barrier(trainer.mesh.device)
    if rank:
        return None
    pieces = []
    for other in range(dist.get_world_size()):
        pipeline, replica, tensor = coordinates(plan, other)
        if replica < plan.expert:
            file = _file(folder, kind, other)
            pieces.append(Piece(pipeline, replica, tensor, load_file(file)))
            file.unlink()
    return assemble(plan, trainer.model, pieces)
