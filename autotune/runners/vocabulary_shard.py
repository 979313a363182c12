"""A rank's rows of the input and output embedding: its state, and the whole again from all ranks' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.lower.vocabulary import shard_of, shards, vocabulary_blocks
from autotune.runners.checkpoint import unshard
from autotune.runners.state import Loader
from autotune.spec.experts_graph import share
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


class Piece(NamedTuple):
    """What a rank has: its tensors by "block/name"."""

    pipeline: int
    expert: int  # which run of the experts
    tensor: int
    tensors: Mapping[str, Tensor]


def assemble(plan: Plan, model: ModelSpec, pieces: Sequence[Piece]) -> dict[tuple[int, str], Tensor]:
    """Whole tensors by (block, weight name), of all ranks' pieces; of equal ones the last."""
    rows = set() if plan.vocabulary == "ends" else _names(model, plan)
    found = {}
    for block in blocks(model):
        for weight in block.weights():
            key = f"{block.index}/{weight.name}"
            if key in rows:
                by_rank = {shard_of(plan, p.pipeline, p.tensor): p.tensors[key] for p in pieces if key in p.tensors}
                stacked = torch.cat([by_rank[number] for number in range(shards(plan))])
                found[block.index, weight.name] = stacked[: weight.shape[0]]
            else:
                here = [piece for piece in pieces if key in piece.tensors]
                if here:  # what is frozen has no gradient
                    found[block.index, weight.name] = _joined(plan, weight, here, key)
    return found


def _joined(plan: Plan, weight: Weight, pieces: Sequence[Piece], key: str) -> Tensor:
    """A weight of the tensor ranks' shards, each of the runs of experts that ranks divide."""
    runs = plan.expert if weight.experts else 1
    by_rank = {(piece.expert % runs, piece.tensor): piece.tensors[key] for piece in pieces}
    own = share(weight, runs, 0)  # all runs are as long
    whole = [unshard(own, [by_rank[run, tensor] for tensor in range(plan.tensor)]) for run in range(runs)]
    return whole[0] if runs == 1 else torch.cat(whole)


def _names(model: ModelSpec, plan: Plan) -> set[str]:
    cut = vocabulary_blocks(model, shards(plan))
    return {f"{block.index}/{weight.name}" for block in cut for weight in block.weights()}
