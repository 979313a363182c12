"""Whether to speculate, and with which chain or tree: the least seconds a token by measured times.

A round drafts one step a depth, verifies the candidates and the root in one pass and commits E tokens, so a token takes
(depth t_draft + t_verify(n + 1) + overhead) / E seconds (Sequoia 2402.12374, section 4.3). Without speculation it takes
t_verify(1). Passes are measured and not modelled: a roofline promises too much where the batch is large.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from autotune.planners.decoding.chains import prefixes
from autotune.planners.decoding.chances import chances
from autotune.planners.decoding.trees import Scored, Tree


@dataclass(frozen=True)
class Costs:
    """Seconds of a round's parts at one batch and one context.

    `verify`: a pass over that many tokens a sequence, 1 being a plain step; a function, or measured points between
    which the line is taken. `draft`: one step of drafting, which makes all of a depth's nodes. `overhead`: what else a
    round takes that a plain step does not (accepting, moving rows of the cache, reading the count on the host).
    """

    verify: Mapping[int, float] | Callable[[int], float]
    draft: float = 0.0
    overhead: float = 0.0

    def pass_s(self, tokens: int) -> float:
        """Seconds of a pass over `tokens` a sequence. ValueError outside the measured points."""
        if callable(self.verify):
            return self.verify(tokens)
        points = sorted(self.verify)
        if not points or not points[0] <= tokens <= points[-1]:
            measured = f"{points[0]} to {points[-1]}" if points else "none"
            raise ValueError(f"passes measured up to {tokens} tokens a sequence (found {measured})")
        i = bisect_left(points, tokens)
        above = points[i]
        if above == tokens:
            return self.verify[above]
        below = points[i - 1]
        part = (tokens - below) / (above - below)
        return self.verify[below] * (1.0 - part) + self.verify[above] * part

    def round_s(self, size: int, depth: int) -> float:
        """Seconds of a round with `size` candidates `depth` deep; of a plain step where there are none."""
        if not size:
            return self.pass_s(1)
        return depth * self.draft + self.pass_s(size + 1) + self.overhead


@dataclass(frozen=True)
class Choice:
    """What to draft; a tree of size 0 says: do not speculate."""

    tree: Tree
    expected: float  # tokens a round
    seconds: float  # a token of one sequence
    plain: float  # seconds a token without speculation

    @property
    def speedup(self) -> float:
        """Against no speculation; 1 where nothing wins."""
        return self.plain / self.seconds


def choose_chain(acceptances: Sequence[float], costs: Costs) -> Choice:
    """The best chain among those up to as long as there are acceptances by position; of equals the shortest.

    ValueError unless each is from 0 to 1, or where passes were not measured that far.
    """
    tokens = accumulate(prefixes(chances("acceptances", acceptances)), initial=1.0)
    return choose_tree((Scored(Tree.chain_of(n), e) for n, e in enumerate(tokens)), costs)


def choose_tree(candidates: Iterable[Scored], costs: Costs) -> Choice:
    """The best among candidates, from `growth.candidates`, `sequoia.candidates` or elsewhere, and no speculation.

    Of equals no speculation, then the first. ValueError where passes were not measured that far.
    """
    plain = costs.pass_s(1)
    best = Choice(Tree(()), 1.0, plain, plain)
    for scored in candidates:
        seconds = costs.round_s(scored.tree.size, scored.tree.depth) / scored.expected
        if seconds < best.seconds:
            best = Choice(scored.tree, scored.expected, seconds, plain)
    return best
