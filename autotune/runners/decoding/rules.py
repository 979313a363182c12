"""By which rule a round's tokens are committed: a line each, by the name that a plan has for it. What a rule keeps is
in commit.py and typical.py; here it is asked with what the target says and what was drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autotune.planners.decoding.strategies import kept_nodes, tree_of
from autotune.runners.decoding.choosing import Chooser
from autotune.runners.decoding.commit import Levels, match, rejection
from autotune.runners.decoding.typical import Typical
from autotune.spec.plan import MATCH, REJECTION, TYPICAL, Plan
from autotune.spec.workload import Workload


class Kept(NamedTuple):
    """What a round commits, as `settle` is told: as `news`, or as choices after the tokens of a row."""

    news: Tensor | None
    choices: Tensor | None = None
    slate: Tensor | None = None


class Rule(Protocol):
    """On a GPU it is captured: the same list of calls each time."""

    def kept(self, logits: Tensor, slate: Tensor, depths: Tensor) -> Kept:
        """`logits` [batch * scored, this rank's vocabulary] of the scored tokens, `slate` int64 [batch, scored];
        `depths` int64 [scored]: how many of them come before each in its text."""


class Asked(NamedTuple):
    """What a rule is built of. `choices`, int64 [batch, scored]: where those who propose look for what the target chose
    after each token of the last round. `q`: the probabilities that were proposed by, where there are any."""

    plan: Plan
    workload: Workload
    device: torch.device
    chooser: Chooser
    choices: Tensor
    q: Tensor | None


@dataclass(frozen=True)
class Row(Rule):
    """Tokens in a row that are the target's own choices."""

    chooser: Chooser

    def kept(self, logits: Tensor, slate: Tensor, depths: Tensor) -> Kept:
        return Kept(None, self.chooser.tokens(logits, depths), slate)


@dataclass(frozen=True)
class Scored(Rule):
    """Tokens of a tree, or of a row, that `keep` says of: (slate, choices, logits) to news."""

    chooser: Chooser
    choices: Tensor
    keep: Callable[[Tensor, Tensor, Tensor], Tensor]

    def kept(self, logits: Tensor, slate: Tensor, depths: Tensor) -> Kept:
        choices = self.chooser.tokens(logits, depths)
        self.choices.copy_(choices)
        return Kept(self.keep(slate, choices, logits))


@dataclass(frozen=True)
class Rejection(Rule):
    """Tokens by speculative sampling."""

    chooser: Chooser
    q: Tensor | None  # of the last stage, which commits

    def kept(self, logits: Tensor, slate: Tensor, depths: Tensor) -> Kept:
        assert self.q is not None
        numbers = (self.chooser.drawn_by(*which) for which in (("accept", depths[:-1]), ("", depths)))
        return Kept(rejection(slate, self.chooser.chances(logits), self.q, *numbers))


def _match(asked: Asked) -> Rule:
    """The target's own choices."""
    tree = tree_of(asked.plan)
    if tree.chain:
        return Row(asked.chooser)
    levels = Levels.of(tree, asked.device, kept_nodes(asked.plan))
    return Scored(asked.chooser, asked.choices, lambda slate, choices, logits: match(levels, slate, choices))


def _typical(asked: Asked) -> Rule:
    """What the target holds likely enough."""
    typical, whole = Typical.of(tree_of(asked.plan), asked.workload, asked.device), asked.chooser.whole
    return Scored(
        asked.chooser, asked.choices, lambda slate, choices, logits: typical.commit(slate, choices, whole(logits))
    )


class Committing(NamedTuple):
    """`purposes`: what numbers are drawn for (see Chooser); `drafts`: which of them a draft draws its tokens by."""

    rule: Callable[[Asked], Rule]
    purposes: tuple[str, ...] = ("",)
    drafts: str = ""


RULES: dict[str, Committing] = {
    MATCH: Committing(_match),
    REJECTION: Committing(lambda asked: Rejection(asked.chooser, asked.q), ("", "accept", "draft"), "draft"),
    TYPICAL: Committing(_typical),
}
