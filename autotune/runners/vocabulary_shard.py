"""A rank's rows of the input and output embedding: its state, and the whole again from all ranks' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autotune.planners.lower.vocabulary import shard_of, shards, vocabulary_blocks
from autotune.runners.checkpoint import unshard
from autotune.runners.state import Loader
from autotune.spec.graph import Weight, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan


def loaded_rows(load: Loader, model: ModelSpec, number: int) -> Loader:
    """A loader of shard `number`'s rows, zero beyond the vocabulary, from one of tensors: asked for those that no
    tensor ranks share, it gives them whole."""
    whole = {(b.index, weight.name): replace(weight, shard=None) for b in blocks(model) for weight in b.weights()}

    def rows(index: int, weight: Weight) -> Tensor:
        tensor, count = load(index, whole[index, weight.name]), weight.shape[0]
        mine = tensor[number * count : (number + 1) * count]
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
                by_rank = {shard_of(plan, p, t): tensors[key] for p, t, tensors in pieces if key in tensors}
                stacked = torch.cat([by_rank[number] for number in range(shards(plan))])
                found[block.index, weight.name] = stacked[: weight.shape[0]]
            else:
                by_rank = {tensor: tensors[key] for _, tensor, tensors in pieces if key in tensors}
                if by_rank:  # what is frozen has no gradient
                    found[block.index, weight.name] = unshard(weight, [by_rank[rank] for rank in sorted(by_rank)])
    return found


def _names(model: ModelSpec, plan: Plan) -> set[str]:
    cut = vocabulary_blocks(model, shards(plan))
    return {f"{block.index}/{weight.name}" for block in cut for weight in block.weights()}
