"""Batches of a corpus, the same for every split over data-parallel ranks.

A sample is named by (step, index in the global batch) alone, so that any plan reads the same sequences in any step.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch

from autotune.runners.corpus import Corpus, check_range, windows


def _window(number: int, available: int) -> int:
    """The window that the sample of this number reads: all that are available once, spread out, before any again.

    An affine map with a factor that has no common divisor with their number is a permutation; a factor near the golden
    section of it puts neighbours far apart.
    """
    factor = max(1, round(available * 0.6180339887498949))
    while gcd(factor, available) != 1:
        factor += 1
    return factor * number % available


def batch(
    corpus: Corpus, step: int, global_batch: int, sequence_length: int, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets), both int64 [count, sequence_length]: samples first .. first + count - 1 of a step's batch.

    Targets are the tokens one place on. A sample depends on (step * global_batch + its index) alone; samples do not
    overlap until the corpus has been read once. Raises UsageError for a corpus shorter than one sample.
    """
    if step < 0 or first < 0 or count < 1 or first + count > global_batch:
        raise ValueError(f"samples {first} to {first + count - 1} of step {step} are not in a batch of {global_batch}")
    available = windows(corpus, sequence_length)
    rows = np.empty((count, sequence_length + 1), dtype=np.int64)
    for row in range(count):
        start = _window(step * global_batch + first + row, available) * sequence_length
        sample = corpus.tokens[start : start + sequence_length + 1]
        check_range(corpus, sample, start)
        rows[row] = sample
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
