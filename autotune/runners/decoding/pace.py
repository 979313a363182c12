"""How the host learns that all answers are whole, without holding up a device.

Decoding a token at a time it counts. With proposals only the device knows what was kept: it says so round by round, and
the host, some rounds ahead, reads what it said about an earlier one. So a device does a few rounds too many, after the
last one that counts. Every rank of a replica reads the same numbers at the same rounds, and stops at the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autotune.runners.decoding.sequences import SPARE, Sequences

BEHIND = SPARE - 2  # rounds that the host's knowledge is old


@dataclass
class Pace:
    """`sure`: every round gives each sequence one token."""

    sequences: Sequences
    lengths: Sequence[int]  # of their prompts
    device: torch.device
    sure: bool
    _said: dict[int, tuple[torch.Tensor, Any]] = field(default_factory=dict)

    def after(self, step: int) -> int | None:
        """Called after step `step` was issued (0: the prefill): the step after which all answers were whole, None as
        long as that is not known."""
        if self.sure:
            return step if step + 1 >= self.sequences.new_tokens else None
        if self.device.type != "cuda":
            return step if self._whole(self.sequences.filled) else None
        held = torch.empty(len(self.lengths), dtype=torch.int64, pin_memory=True)
        held.copy_(self.sequences.filled, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._said[step] = held, event
        earlier = self._said.pop(step - BEHIND, None)
        if earlier is None:
            return None
        earlier[1].synchronize()
        return step - BEHIND if self._whole(earlier[0]) else None

    def _whole(self, filled: torch.Tensor) -> bool:
        """Whether all answers are, of texts with so many positions in the cache."""
        new = self.sequences.new_tokens
        return all(now + 1 >= own + new for now, own in zip(filled.tolist(), self.lengths, strict=True))
