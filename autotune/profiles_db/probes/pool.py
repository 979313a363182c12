"""Operands for probes: views into one pool of random numbers, so that nothing is zero and making them costs nothing.

Zeros run measurably faster than data on some devices (less switching, less power), and drawing fresh numbers for every
shape would take longer than timing it. Successive views walk through a pool larger than twice the largest cache, so
operands that a program meets cold (weights) are cold here too.
"""

from __future__ import annotations

from math import prod

import torch

from autotune.profiles_db.facts import cache_bytes

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
ALIGN = 128  # elements: every view starts on a cache line, as an allocator's would
MOST_COPIES = 512


class Pool:
    """Random data of one device, by dtype. Views are to be read only: other views share their memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self.cache = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
        else:
            self.cache = min(cache_bytes(), 256 << 20)
        self._data: dict[torch.dtype, torch.Tensor] = {}
        self._next: dict[torch.dtype, int] = {}
        self._targets: dict[torch.dtype, torch.Tensor] = {}

    def _room(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        data = self._data.get(dtype)
        if data is None:
            count = max(2 * self.cache // dtype.itemsize, 1 << 20)
            data = torch.empty(count, dtype=torch.float32, device=self.device).uniform_(-1, 1).to(dtype)
            self._next[dtype] = 0
        if data.numel() < elements:
            data = data.repeat(-(-elements // data.numel()))
        self._data[dtype] = data
        return data

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous view of `shape` with values in (-1, 1), after the views taken before it (wrapping round)."""
        elements = prod(shape)
        data = self._room(2 * elements if elements * dtype.itemsize < self.cache else elements, dtype)
        first = self._next[dtype]
        if first + elements > data.numel():
            first = 0
        self._next[dtype] = -(-(first + elements) // ALIGN) * ALIGN
        return data[first : first + elements].view(shape)

    def rotation(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """Enough views of `shape` that using them in turn finds each one evicted from the cache."""
        size = max(1, prod(shape) * dtype.itemsize)
        copies = max(1, min(MOST_COPIES, -(-2 * self.cache // size)))
        return [self.take(shape, dtype) for _ in range(copies)]

    def targets(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """Like `rotation`, to be written to: apart from what `take` gives, shared with every other call."""
        size = prod(shape)
        data = self._targets.get(dtype)
        if data is None or data.numel() < size:
            data = self._room(size, dtype).clone()
            self._targets[dtype] = data
        copies = max(1, min(MOST_COPIES, data.numel() // size))
        return [data[i * size : (i + 1) * size].view(shape) for i in range(copies)]

    def fresh(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A writable copy of random data."""
        return self.take(shape, dtype).clone()

    def release(self) -> None:
        """Gives the pool's memory back."""
        self._data.clear()
        self._targets.clear()
        if self.device == "cuda":
            torch.cuda.empty_cache()
