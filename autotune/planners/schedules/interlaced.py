"""The interlaced pipeline: the vocabulary's work cut over all ranks and done by all of them at once, 1F1B around it.

nnScaler's (Lin et al., OSDI 2024), as 2411.05288 compares itself with (table 5): a period is the
vocabulary's work of one micro-batch, a forward and a backward, the same on every rank. As all ranks start each period
together, those of even stages go forward first and those of odd stages last, a forward passes two stages a period and a
backward one: a micro-batch is alive for 1.5 p periods on the first rank, and so many activations are held there.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Step
from autotune.planners.schedules.vocabulary import EMBED, EMBED_W, Vocabulary


def interlaced(pipe: Pipe, vocabulary: Vocabulary) -> Order:
    """Every rank's steps, each rank with one stage; the passes are under the stage number `pipe.stages`."""
    return [_of_rank(rank, pipe, vocabulary) for rank in range(pipe.ranks)]


def _of_rank(stage: int, pipe: Pipe, vocabulary: Vocabulary) -> list[Step]:
    p, output = pipe.ranks, pipe.stages
    whole = (p - 1) // 2 + 1  # the period of micro-batch 0's work on the vocabulary, and of its last stage's backward
    even = stage % 2 == 0
    found: list[tuple[int, int, Step]] = []  # period, place in the period, step
    for item in range(pipe.items):
        back = item + whole + p - 1 - stage
        found.append((item + stage // 2, 10 if even else 12, Step("F", stage, item)))
        found.append((back, 11, Step("BW", stage, item)))
        found += [(item + whole, 2 + number, Step(op, output, item)) for number, op in enumerate(vocabulary.passes)]
        found.append((item, 1, Step(EMBED, output, item)))
        found.append((item + whole + p, 0, Step(EMBED_W, output, item)))
    return [step for _, _, step in sorted(found)]
