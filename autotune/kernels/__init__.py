"""What a GPU is driven with where torch and its libraries have nothing as fast: kernels of our own in Triton (import
those only where `usable` says so), and messages that the copy engines carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether the kernels take it: on a GPU, and no wider than the fp32 that they compute in."""
    return x.is_cuda and x.element_size() <= 4
