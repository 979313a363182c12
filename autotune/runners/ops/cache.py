"""The key-value cache of generation: one static allocation, written at a position and read up to a length.

A sequence's positions follow one another, each with all its heads: as a linear layer leaves them, and as kernels for
sequences of different lengths read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class KVCache:
    """`k` and `v`: [layers of this rank, batch, max_len, kv heads of this rank, head_dim]."""

    k: Tensor
    v: Tensor

    @classmethod
    def empty(
        cls,
        model: ModelSpec,
        layers: int,
        batch: int,
        max_len: int,
        *,
        tensor_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache for `layers` layers of `model`, `batch` sequences of up to `max_len` tokens, zeros (a mask does not
        keep NaN out of a sum)."""
        shape = (layers, batch, max_len, model.kv_heads // tensor_size, model.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All tensors of it."""
        return self.k, self.v

    @property
    def table(self) -> Tensor | None:
        """Where positions lie, where they do not lie one after another (runners/ops/paged.py)."""
        return None

    def assign(self, positions: Sequence[int]) -> None:
        """Makes ready for sequences of so many positions each: here each has room for `max_len`."""

    def rows(self, places: Tensor) -> Tensor:
        """Where places, counted through all sequences, `max_len` each, lie in a layer."""
        return places

    @property
    def max_len(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, layer: int, k: Tensor, v: Tensor, position: int) -> None:
        """Writes `k` and `v` [batch, kv_heads, new tokens, head_dim] at `position` of `layer`.

        Raises ValueError when they would run past `max_len`: a slice would silently keep fewer tokens.
        """
        end = position + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"tokens {position}..{end - 1} do not fit a key-value cache of {self.max_len} tokens")
        self.k[layer, :, position:end].copy_(k.transpose(1, 2))
        self.v[layer, :, position:end].copy_(v.transpose(1, 2))

    def append_at(self, layer: int, k: Tensor, v: Tensor, places: Tensor) -> None:
        """The same at places that only the device knows: int64 [batch * new tokens], positions counted through all
        sequences, `max_len` each."""
        rows = self.rows(places)
        for part, new in ((self.k[layer], k), (self.v[layer], v)):
            part.view(-1, *part.shape[2:]).index_copy_(0, rows, new.transpose(1, 2).flatten(0, 1))

    def view(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions `start`..`end`-1 of `layer`: views [batch, kv_heads, end - start, head_dim]."""
        k, v = self.k[layer, :, start:end], self.v[layer, :, start:end]
        return k.transpose(1, 2), v.transpose(1, 2)

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of `layer`, sequence after sequence: [batch * max_len, kv_heads, head_dim]."""
        return self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
