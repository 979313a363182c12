"""The rows of a training sequence: its text, and groups of masks that learn to draft, each after a place of the text.

A mask `ahead` places after place p stands at position p + ahead, sees the text up to p and the masks of its own group
before it, and is to say the token after its position; the text sees text alone, as without masks (group-wise training,
ParallelSpec, 2410.05589, 3.2). So every row learns what it will be asked for when the draft proposes a block.

Few places keep all of their masks: how many there are of those `ahead` places further is the workload's `masks` (PARD,
2504.18583, 3.2, conditional drop). Which places is drawn anew for each step, for all of its sequences alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


class Rows(NamedTuple):
    """Of a sequence's rows, int64 [rows] each, on the CPU: the place of the text that it stands at or its group stands
    after, and how far behind that it is, 0 for text."""

    place: Tensor
    ahead: Tensor

    @property
    def positions(self) -> Tensor:
        return self.place + self.ahead

    def seen(self, device: torch.device, window: int = 0) -> Tensor:
        """bool [rows, rows]: which others each row sees, itself too. Window 0: however far before it."""
        place, ahead = self.place.to(device), self.ahead.to(device)
        text = (ahead == 0) & (place <= place[:, None])
        group = (ahead > 0) & (place == place[:, None]) & (ahead <= ahead[:, None])
        found = text | group
        at = place + ahead
        return found & (at > at[:, None] - window) if window else found


class Batch(NamedTuple):
    """A step's data. `rows`: how the rows of its sequences lie, where they are not text alone."""

    tokens: Tensor  # int64 [sequences of this replica, rows of a sequence]
    targets: Tensor
    rows: Rows | None = None


def drawn_rows(workload: Workload, step: int) -> Rows:
    """Those of a step, the same on every rank: places for groups in a random order, of which the first have most masks;
    then in the order of the text, group after group."""
    text = torch.arange(workload.sequence_length)
    places = workload.sequence_length - len(workload.masks)  # so that there is a token for every mask of a group to say
    order = torch.randperm(places, generator=torch.Generator().manual_seed(step))
    place = torch.cat([order[:many] for many in workload.masks])
    ahead = torch.cat([torch.full((many,), number) for number, many in enumerate(workload.masks, 1)])
    sorted_ = (place * (len(workload.masks) + 1) + ahead).argsort()
    return Rows(torch.cat((text, place[sorted_])), torch.cat((torch.zeros_like(text), ahead[sorted_])))


def with_masks(model: ModelSpec, batch: Batch, rows: Rows) -> Batch:
    """Text, tokens and targets [sequences, text], with its masks after it."""
    masks = rows.ahead[batch.tokens.shape[1] :] - 1
    tokens = (masks.clamp_max(model.masks - 1) + model.vocab).expand(len(batch.tokens), -1)
    targets = batch.targets.index_select(1, rows.positions[batch.tokens.shape[1] :])
    return Batch(torch.cat((batch.tokens, tokens), dim=1), torch.cat((batch.targets, targets), dim=1), rows)


def prepared(model: ModelSpec, workload: Workload, batch: Batch, step: int) -> Batch:
    """A step's text as it is trained on."""
    return with_masks(model, batch, drawn_rows(workload, step)) if workload.masks else batch
