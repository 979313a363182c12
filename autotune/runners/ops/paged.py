"""A key-value cache in pages: a pool of them, and a table that says which of them a sequence has, and in what order.

The table is a tensor that stays where it is, so that captured passes read what the host has written into it before a
generation. Page 0 is nobody's: places that a table does not know lie there, and what is written there is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.planners.lower.pages import NOWHERE, pages_of
from autotune.runners.ops.cache import KVCache
from autotune.spec.errors import Problem, UsageError
from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class PagedCache(KVCache):
    """`k` and `v`: [layers of this rank, pages, positions of a page, kv heads of this rank, head_dim]; `pages`, int64
    [batch, pages of the longest sequence]: the number of each sequence's pages in order, 0 behind its last."""

    pages: Tensor

    @classmethod
    def of_pages(
        cls,
        model: ModelSpec,
        layers: int,
        pages: int,
        page: int,
        table: tuple[int, int],
        *,
        tensor_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PagedCache:
        """A cache of so many pages, zeros. `table`: sequences, and pages of the longest."""
        whole = KVCache.empty(model, layers, pages, page, tensor_size=tensor_size, dtype=dtype, device=device)
        return cls(whole.k, whole.v, torch.zeros(table, dtype=torch.int64, device=device))

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.k.shape[2]

    @property
    def max_len(self) -> int:
        return self.pages.shape[1] * self.page

    @property
    def table(self) -> Tensor | None:
        return self.pages

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.pages

    def assign(self, positions: Sequence[int]) -> None:
        """Gives each sequence the pages for so many positions, one sequence after another.

        Raises UsageError for more than the pool has.
        """
        many = [pages_of(count, self.page) for count in positions]
        most = self.k.shape[1] - NOWHERE
        if sum(many) > most:
            expected = f"at most the {most} that the cache was made with, for [workload] prompt_lengths"
            problem = Problem("prompts", "lengths", f"{sum(many)} pages of {self.page} positions", expected, str(most))
            raise UsageError("these prompts do not fit the cache:", problems=[problem])
        rows, first = torch.zeros(self.pages.shape, dtype=torch.int64), NOWHERE
        for row, count in zip(rows, many, strict=True):
            row[:count] = torch.arange(first, first + count)
            first += count
        self.pages.copy_(rows)

    def rows(self, places: Tensor) -> Tensor:
        return (self.pages.view(-1)[places // self.page] * self.page).add_(places % self.page)

    def append(self, layer: int, k: Tensor, v: Tensor, position: int) -> None:
        end = position + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"tokens {position}..{end - 1} do not fit a key-value cache of {self.max_len} tokens")
        begins = torch.arange(len(self.pages), device=self.pages.device) * self.max_len
        self.append_at(layer, k, v, (begins[:, None] + torch.arange(position, end, device=begins.device)).flatten())

    def _gathered(self, layer: int, first: int, last: int) -> tuple[Tensor, ...]:
        """Pages `first`..`last`-1 of every sequence side by side: copies [batch, positions, kv_heads, head_dim]."""
        numbers = self.pages[:, first:last].reshape(-1)
        shape = (len(self.pages), -1, *self.k.shape[3:])
        return tuple(part[layer].index_select(0, numbers).view(shape) for part in (self.k, self.v))

    def view(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """As of a cache without pages, but of copies."""
        first = start // self.page
        here = slice(start - first * self.page, end - first * self.page)
        k, v = self._gathered(layer, first, pages_of(end, self.page))
        return k[:, here].transpose(1, 2), v[:, here].transpose(1, 2)

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self._gathered(layer, 0, self.pages.shape[1])
        return k.flatten(0, 1), v.flatten(0, 1)
