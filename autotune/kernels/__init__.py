"""Kernels of our own, in Triton, where torch and cuDNN have none: import a module only where `usable` says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether the kernels take it: on a GPU, and no wider than the fp32 that they compute in."""
    return x.is_cuda and x.element_size() <= 4
