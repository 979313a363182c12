"""A kernel that starts before the one in front of it has ended: programmatic dependent launch, as CUDA calls it.

Between two kernels a device drains and fills again, which for one decoded token is a good part of the time. A kernel
that knows what it may read early (weights) starts as soon as processors come free, and waits for the others' results
only where it needs them. Recorded in a CUDA graph it stays so. Hopper and newer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["begin", "launched", "possible", "wait"]

HOPPER = 9


@triton.jit
def begin(early: tl.constexpr):
    """What follows this kernel may start when all of it has."""
    if early:
        gdc_launch_dependents()


@triton.jit
def wait(early: tl.constexpr):
    """Until all that came before has ended and its results can be seen. Every program must come here, so that what
    comes after this kernel may rely on what came before it."""
    if early:
        gdc_wait()


@lru_cache(maxsize=8)
def possible(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER


def launched(early: bool) -> dict[str, Any]:
    """What a launch is told besides its arguments."""
    return {"launch_pdl": True} if early else {}
