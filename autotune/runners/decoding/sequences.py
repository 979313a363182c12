"""The sequences that a replica generates together: their text, and how much of it the cache has; on the device.

Of a sequence's text all but the newest token has keys and values in the cache: the next pass begins with that one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """What every rank of a replica keeps, each by itself."""

    text: Tensor  # int64 [batch, columns]: prompt and answer, and then what was proposed and anything
    own: Tensor  # int64 [batch]: tokens of each prompt
    filled: Tensor  # int64 [batch]: positions of the cache that are filled, those of all committed tokens but one
    before: Tensor  # int64 [batch]: `filled` before the last round
    taken: Tensor  # int64 [batch, rounds]: tokens that each round committed, 0 once an answer is whole
    round: Tensor  # int64 [batch]: of `taken`, the next
    new_tokens: int

    @classmethod
    def empty(cls, batch: int, columns: int, new_tokens: int, device: torch.device) -> Sequences:
        """Of `batch` sequences, each with room for `columns` tokens and to be given `new_tokens`."""
        own, filled, before, number = torch.zeros((4, batch), dtype=torch.int64, device=device)
        text = torch.zeros((batch, columns), dtype=torch.int64, device=device)
        taken = torch.zeros((batch, new_tokens + SPARE), dtype=torch.int64, device=device)
        return cls(text, own, filled, before, taken, number, new_tokens)

    def begin(self, prompts: Tensor, lengths: Tensor) -> None:
        """New prompts, int64 [batch, longest], of these lengths: the next pass puts all of them into the cache."""
        self.text[:, : prompts.shape[1]].copy_(prompts)
        for tensor in (self.own, self.filled, self.before):
            tensor.copy_(lengths)
        self.taken.zero_()
        self.round.zero_()

    def take(self, news: Tensor, depth: int, first: bool) -> None:
        """Commits tokens. `news`, int64 [batch, 1 + depth + ...]: how many of the `depth` tokens after it are; `first`:
        after a prompt, whose newest token nobody has chosen before."""
        count, tokens = news[:, 0], news[:, 1 : 1 + depth]
        base = self.filled if first else self.filled + 1  # where the first of them goes
        self.text.scatter_(1, base[:, None] + torch.arange(depth, device=news.device), tokens)
        if not first:
            self.taken.scatter_(1, self.round[:, None], count[:, None])
            self.round.add_(1)
        left = self.own + self.new_tokens - base
        self.before.copy_(self.filled)
        torch.add(base - 1, torch.minimum(count, left), out=self.filled)

    @property
    def going_on(self) -> Tensor:
        """bool [batch]: whose answers lack a token."""
        return self.filled + 1 < self.own + self.new_tokens

    def newest(self, many: int = 1) -> Tensor:
        """int64 [batch, many]: the newest tokens, in the order of the text."""
        return self.text.gather(1, self.filled[:, None] + torch.arange(1 - many, 1, device=self.text.device))

    def answers(self) -> list[list[int]]:
        """The answers so far."""
        ends = (self.filled + 1).tolist()
        return [row[own:end] for row, own, end in zip(self.text.tolist(), self.own.tolist(), ends, strict=True)]


SPARE = 4  # rounds that a device may be asked for before the host knows that all answers are whole
