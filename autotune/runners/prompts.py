"""Prompts as a worker gets them: rows of tokens, of different lengths, some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.runners.corpus import HELD_OUT, PROFILED, open_corpus, windows
from autotune.runners.data import batch
from autotune.runners.tokens import check_generation, encode
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


class Prompts(NamedTuple):
    """`tokens`: int64 [sequences, prompt_length], each row its prompt and then anything; `lengths`: of each prompt;
    `first`: number of the first sequence among all that are generated, which draws are made for."""

    tokens: Tensor
    lengths: tuple[int, ...]
    first: int = 0

    def rounds(self, batch: int) -> list[Prompts]:
        """So many sequences at a time."""
        starts = range(0, len(self.lengths), batch)
        return [Prompts(self.tokens[i : i + batch], self.lengths[i : i + batch], self.first + i) for i in starts]


def prompt_tokens(model: ModelSpec, workload: Workload, prompts: Sequence[str] = (), apart: bool = False) -> Prompts:
    """The prompts as bytes; without any, real text from the workload's corpus that the default training does not read,
    as long as the workload says; `apart`: from other files than those, or the second half of the workload's own, which
    other prompts are not cut from as long as they are few.

    Raises UsageError (see tokens.encode, corpus.open_corpus).
    """
    if prompts:
        rows = encode(prompts, model, workload)
        padded = [row + (0,) * (workload.prompt_length - len(row)) for row in rows]
        return Prompts(torch.tensor(padded), tuple(map(len, rows)))
    check_generation(model, workload)
    corpus = open_corpus(workload.data, model.vocab, PROFILED if apart else HELD_OUT)
    halfway = windows(corpus, workload.prompt_length) // 2 // workload.batch if apart and workload.data else 0
    tokens = batch(corpus, halfway, workload.batch, workload.prompt_length, 0, workload.batch)[0]
    return Prompts(tokens, workload.prompt_lengths or (workload.prompt_length,) * workload.batch)
