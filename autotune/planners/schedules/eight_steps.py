"""The eight steps of DualPipe and DualPipeV, as one rank runs them (DeepSeek-V3, 2412.19437; deepseek-ai/DualPipe).

A rank holds a near stage, which micro-batches reach early, and a far one, near the loss: the two directions' stages in
DualPipe, the two arms of the V in DualPipeV. A rank of DualPipe runs what the rank at the same distance from the turn
runs in DualPipeV on half the ranks ("cut in half"), so the steps are the same and only the items differ.
A forward and a backward that the paper overlaps are emitted one after the other, forward first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from autotune.planners.schedules.schedule import Step


class _Rank:
    """Emits steps of two stages in the order of their items; the weight gradients put off wait in one queue."""

    def __init__(self, stages: tuple[int, int], items: tuple[Sequence[int], Sequence[int]]) -> None:
        self.steps: list[Step] = []
        self._stages = stages
        self._forward = tuple(iter(each) for each in items)
        self._backward = tuple(iter(each) for each in items)
        self._put_off: deque[Step] = deque()

    def forward(self, side: int) -> None:
        self.steps.append(Step("F", self._stages[side], next(self._forward[side])))

    def backward(self, side: int, split: bool = False) -> None:
        stage, item = self._stages[side], next(self._backward[side])
        self.steps.append(Step("B" if split else "BW", stage, item))
        if split:
            self._put_off.append(Step("W", stage, item))

    def weight(self) -> None:
        self.steps.append(self._put_off.popleft())


NEAR, FAR = 0, 1


def eight_steps(
    depth: int, half: int, stages: tuple[int, int], items: tuple[Sequence[int], Sequence[int]]
) -> list[Step]:
    """The steps of the rank that is `depth` ranks from the pipeline's end, of `half` ranks up to the turn.

    `stages` and `items` are of the near and the far side; each side has as many items, at least 2 `half`.
    """
    rank, rest = _Rank(stages, items), half - depth - 1
    for _ in range(2 * rest):  # 1: fill the near side
        rank.forward(NEAR)
    for _ in range(depth + 1):  # 2: fill both
        rank.forward(NEAR)
        rank.forward(FAR)
    for _ in range(rest):  # 3: first backwards, split so that the gradient leaves early
        rank.backward(FAR, split=True)
        rank.weight()
        rank.forward(FAR)
    for _ in range(len(items[NEAR]) - 2 * half + depth + 1):  # 4: the steady state, in overlapped pairs
        rank.forward(NEAR)
        rank.backward(FAR)
        rank.forward(FAR)
        rank.backward(NEAR)
    for _ in range(rest):  # 5: the near side has no forwards left
        rank.backward(FAR)
        rank.forward(FAR)
        rank.backward(NEAR)
    for k in range(depth + 1):  # 6: no forwards left; the second half of these backwards is split
        rank.backward(FAR, split=2 * k >= depth + 1)
        rank.backward(NEAR, split=2 * k + 1 >= depth + 1)
    for _ in range(rest):  # 7: weight gradients fill the wait for the last gradients
        rank.weight()
        rank.backward(NEAR, split=True)
    for _ in range(depth + 1):  # 8: what is left
        rank.weight()
    return rank.steps
