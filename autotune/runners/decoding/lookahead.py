"""Lookahead decoding (Fu et al., 2402.02057, section 3): guesses of a fixed-point iteration, kept as n-grams, of which
those that begin with the newest token are verified.

A window of places after the newest token has lines of guesses, each line a sweep later than the one above it. What the
target chooses after the last line completes an n-gram at every place, and is the next last line. The n-grams of each
first token are a ring: newer ones replace the oldest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.runners.decoding.seen import Proposer, Seen
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan

NOTHING = -1  # no token


@dataclass
class Lookahead(Proposer):
    """`pool` int64 [batch, vocabulary, branches + 1, length]: what follows each token; the last of its rows takes what
    has no place. `at` int64 [batch, vocabulary]: the row that is next to be replaced."""

    length: int
    branches: int
    window: int
    pool: Tensor
    at: Tensor

    @classmethod
    def build(cls, plan: Plan, model: ModelSpec, batch: int, device: torch.device) -> Lookahead:
        rows = (batch, model.vocab, plan.branches + 1, plan.speculate)
        pool = torch.full(rows, NOTHING, dtype=torch.int64, device=device)
        at = torch.zeros((batch, model.vocab), dtype=torch.int64, device=device)
        return cls(plan.speculate, plan.branches, plan.window, pool, at)

    def propose(self, seen: Seen) -> Tensor:
        lines = self._begin(seen) if seen.first else self._sweep(seen)
        newest = seen.sequences.newest()
        rows = self.pool[torch.arange(len(newest), device=newest.device), newest[:, 0], : self.branches]
        rows = torch.where(rows == NOTHING, newest[:, :, None], rows)
        return torch.cat((rows.flatten(1), lines.flatten(1)), dim=1)

    def _begin(self, seen: Seen) -> Tensor:
        """Lines [batch, length, window] of tokens of the prompt: any are as good."""
        self.pool.fill_(NOTHING)
        self.at.zero_()
        steps = torch.arange(self.length * self.window, device=self.pool.device)
        texts = seen.sequences
        return texts.text.gather(1, steps % texts.own[:, None]).view(-1, self.length, self.window)

    def _sweep(self, seen: Seen) -> Tensor:
        """Keeps the window's n-grams; the lines of the next round, each a sweep later."""
        rows = 1 + self.branches * self.length
        shape = (-1, self.length, self.window)
        old, after = seen.slate[:, rows:].view(shape), seen.choices[:, rows:].view(shape)[:, -1:]
        found = torch.cat((old[:, 1:], after), dim=1)  # what follows the first line, place by place
        self._keep(old[:, 0], found.transpose(1, 2))
        # The newest token is `count` places further: so are the places that the lines are of.
        steps = torch.arange(self.window, device=found.device)
        places = (steps + (seen.news[:, :1] - 1).clamp_min(0)) % self.window
        return found.gather(2, places[:, None].expand(-1, self.length, -1))

    def _keep(self, first: Tensor, following: Tensor) -> None:
        """N-grams [batch, window]: a first token, and following ones [batch, window, length]. Of several with one first
        token each has a row of its own, as many of the last as there are rows."""
        alike = first[:, :, None] == first[:, None]
        earlier = alike.tril(-1).sum(dim=2)
        later = alike.triu(1).sum(dim=2)
        row = (self.at.gather(1, first) + earlier) % self.branches
        row = torch.where(later < self.branches, row, self.branches)
        batch = torch.arange(len(first), device=first.device)[:, None].expand_as(first)
        # What has no place all goes to one row, which nobody reads.
        self.pool[batch, first, row] = following
        self.at.scatter_(1, first, (self.at.gather(1, first) + earlier + later + 1) % self.branches)
