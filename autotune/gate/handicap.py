"""A worker that is made slower or larger on purpose: `python -m autotune.gate.handicap JOB FOLDER PRODUCTS BYTES`.

It proves gates (see autotune.gate.trials) and nothing else starts it: no recipe, plan or flag of the command line can
name it. Each step of its interpreter first computes so many matrix products more, on the stream that the step computes
on, and holds so many bytes more on its device: real work and a real allocation, that the clocks and counts of a worker
see as they see the plan's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from autotune.runners.interpreter import Interpreter
from autotune.runners.launch import WORKER
from autotune.runners.worker import main

SIDES = {"cpu": (96, torch.float32), "cuda": (2048, torch.bfloat16)}  # of a square matrix: a small part of a step


def burdened(step: Callable[..., None], products: int, size: int) -> Callable[..., None]:
    """`Interpreter.step` with the handicap."""
    operands: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def burdened_step(self: Interpreter, *arguments: Any, **named: Any) -> None:
        side, dtype = SIDES[self.device.type]
        if self.device not in operands:
            operands[self.device] = tuple(torch.ones(side, side, dtype=dtype, device=self.device) for _ in range(2))  # type: ignore[assignment]
        matrix, out = operands[self.device]
        held = torch.empty(size, dtype=torch.uint8, device=self.device) if size else None
        for _ in range(products):
            torch.mm(matrix, matrix, out=out)
        step(self, *arguments, **named)
        del held

    return burdened_step


def worker(products: int, size: int) -> tuple[str, ...]:
    """What runners.launch is given to start such workers; a worker as it is where there is no handicap."""
    return ("autotune.gate.handicap", str(products), str(size)) if products or size else (WORKER,)


if __name__ == "__main__":
    Interpreter.step = burdened(Interpreter.step, int(sys.argv[3]), int(sys.argv[4]))  # type: ignore[method-assign]
    main(sys.argv[1:3])
