"""A rank's rows of the input and output embedding: its state, and the whole again from all ranks' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autotune.planners.lower.vocabulary import vocabulary_blocks
from autotune.runners.checkpoint import unshard
from autotune.runners.state import Loader
from autotune.spec.graph import Weight, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan


def loaded_rows(load: Loader, model: ModelSpec, rank: int) -> Loader:
    """A loader of pipeline rank `rank`'s rows, zero beyond the vocabulary, from one of whole tensors."""
    whole = {(block.index, weight.name): weight for block in blocks(model) for weight in block.weights()}

    def rows(index: int, weight: Weight) -> Tensor:
        tensor, count = load(index, whole[index, weight.name]), weight.shape[0]
        mine = tensor[rank * count : (rank + 1) * count]
        return torch.cat([mine, mine.new_zeros(count - len(mine), *mine.shape[1:])])

    return rows


def assemble(
    plan: Plan, model: ModelSpec, pieces: Sequence[tuple[int, int, Mapping[str, Tensor]]]
) -> dict[tuple[int, str], Tensor]:
    """Whole tensors by (block, weight name), from (pipeline rank, tensor rank, its tensors by "block/name")."""
    rows = set() if plan.vocabulary == "ends" else _names(model, plan)
    found = {}
    for block in blocks(model):
        for weight in block.weights():
            key = f"{block.index}/{weight.name}"
            if key in rows:
                by_rank = {pipeline: tensors[key] for pipeline, _, tensors in pieces if key in tensors}
                stacked = torch.cat([by_rank[rank] for rank in range(plan.pipeline)])
                found[block.index, weight.name] = stacked[: weight.shape[0]]
            else:
                by_rank = {tensor: tensors[key] for _, tensor, tensors in pieces if key in tensors}
                found[block.index, weight.name] = unshard(weight, [by_rank[rank] for rank in sorted(by_rank)])
    return found


def _names(model: ModelSpec, plan: Plan) -> set[str]:
    cut = vocabulary_blocks(model, plan.pipeline)
    return {f"{block.index}/{weight.name}" for block in cut for weight in block.weights()}
