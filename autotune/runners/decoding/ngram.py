"""Proposes what came after the newest tokens where they last stood in the text (prompt lookup, Saxena 2023; the n-gram
drafters of vLLM and SGLang). No weights: a repetition in the text costs nothing to find."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.planners.decoding.strategies import LONGEST

NOTHING = -1  # no token


def lookup(text: Tensor, filled: Tensor, length: int, branches: int, least: int) -> Tensor:
    """int64 [batch, branches * length]: continuations of the texts int64 [batch, columns], whose newest tokens are at
    `filled` [batch].

    A place counts where at least `least` tokens, up to LONGEST, are the newest ones; more of them are better, then the
    later place; the next branch begins with another token. What runs to the end of the text goes on from where it
    began. Without a place anything is proposed.
    """
    columns = text.shape[1]
    device = text.device
    back = torch.arange(LONGEST, device=device)
    at = filled[:, None] - back
    newest = torch.where(at >= 0, text.gather(1, at.clamp_min(0)), NOTHING - 1)
    # windows[b, e, i] = text[b, e - i]
    windows = F.pad(text, (LONGEST - 1, 0), value=NOTHING).unfold(1, LONGEST, 1).flip(2)
    alike = (windows == newest[:, None]).long().cumprod(dim=2).sum(dim=2)
    ends = torch.arange(columns, device=device)
    score = torch.where((ends < filled[:, None]) & (alike >= least), alike * columns + ends, NOTHING)
    following = torch.cat((text[:, 1:], text[:, :1]), dim=1)
    steps, rows = torch.arange(length, device=device), []
    for branch in range(branches):
        best, end = score.max(dim=1, keepdim=True)
        period = (filled[:, None] - end).clamp_min(1)
        rows.append(text.gather(1, (end + 1 + steps % period).clamp_max(columns - 1)))
        if branch + 1 < branches:
            score = torch.where((following == rows[-1][:, :1]) & (best >= 0), NOTHING, score)
    return torch.cat(rows, dim=1)
