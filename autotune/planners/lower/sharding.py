"""What the data ranks share of a stage: ZeRO's levels (Rajbhandari et al., 1910.02054, section 5) as three answers.

Level 1 shards the optimizer states, 2 the gradients too, 3 the weights too. A level's collectives follow from the
answers: who holds whole gradients sums them once at the end, who holds whole weights gathers them after the update.
"""

from __future__ import annotations

from typing import NamedTuple

LEVELS = (0, 1, 2, 3)


class Sharding(NamedTuple):
    """Of a stage's optimizer states, gradients and weights: whether each data rank keeps its share alone."""

    states: bool
    gradients: bool
    weights: bool

    @property
    def sums(self) -> tuple[str, ...]:
        """The operations that sum gradients over the data ranks once the last of them is there."""
        return () if self.gradients else ("REDUCE_SCATTER",) if self.states else ("ALL_REDUCE",)

    @property
    def spreads(self) -> tuple[str, ...]:
        """The operations that bring the updated weights to all data ranks at the end of the step."""
        return ("ALL_GATHER",) if self.states and not self.weights else ()


NOTHING = Sharding(False, False, False)


def sharding(zero: int, stage: int, stages: int) -> Sharding:
    """A stage's sharding at a level. A rank's rows of the vocabulary, the stage beyond the last, are in use all along:
    of them the optimizer states alone are shared."""
    level = min(zero, 1) if stage == stages else zero
    return Sharding(level >= 1, level >= 2, level >= 3)
