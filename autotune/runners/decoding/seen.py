"""What a proposer may look at once a round has committed its tokens, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from autotune.runners.decoding.sequences import Sequences

Ranker = Callable[[Tensor], Tensor]  # hidden rows [batch, hidden] -> logits [batch, vocabulary]


class Seen(NamedTuple):
    """A round that has committed its tokens."""

    sequences: Sequences
    news: Tensor  # int64 [batch, 1 + tokens + ...]: how many were committed, and what the target chose
    depth: int  # of `news` so many are tokens
    first: bool  # whether the round was the prompt's pass
    choices: Tensor  # int64 [batch, scored]: what the target chose after each token of the round
    slate: Tensor  # int64 [batch, scored]: those tokens
    rows: Tensor | None = None  # [batch * scored, hidden]: their hidden rows, where the strategy reads them


class Proposer(Protocol):
    """A strategy's own part of a round. On a GPU it is captured: the same list of calls each time but the first."""

    def propose(self, seen: Seen) -> Tensor:
        """int64 [batch, scored - 1]: the strategy's tree (planners.decoding.strategies) but for its root, node after
        node. Nothing of it may be a view of what `seen` holds."""

    def rankers(self) -> Sequence[Ranker]:
        """Of each place after a token who says, of any hidden row, how likely it holds every token there. Nobody where
        a proposal depends on more than such a row: then no ranks can be told of texts that are there already."""
        return ()

    def probabilities(self) -> Tensor | None:
        """[batch, speculate, vocabulary]: what the last round's proposals were drawn by, where a rule needs it."""
        return None


class Drafter(Proposer, Protocol):
    """One that has weights of its own."""

    def held(self) -> dict[str, Any]:
        """What it keeps, by the names of the program's buffers."""
