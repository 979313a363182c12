"""Whether generated tokens are the reference's, or how near to undecided it was where they are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.decoding.strategies import STRATEGIES, tree_of
from autotune.runners.check import BOUNDS
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.decoding.reference import at_once, one_by_one, speculative, typical
from autotune.runners.drift import Drift, drift
from autotune.runners.emulated import EMULATIONS
from autotune.runners.generation import Generated
from autotune.runners.job import Job
from autotune.runners.prompts import Prompts
from autotune.runners.reference import (
    Key,
    beginning,
    converted,
    head_values,
    heads_logits,
    init_weights,
    reference_generate,
    reference_logits,
)
from autotune.runners.sampling import distribution, drawn, draws, shares
from autotune.runners.state import DTYPES
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.plan import REJECTION, TYPICAL
from autotune.spec.workload import Workload


def judge(job: Job, rounds: list[Prompts], made: list[Generated]) -> tuple[bool, float]:
    """Whether these are the reference's tokens, and how far off the worst first divergence is (0: none).

    A choice may differ where the reference itself is undecided. Greedy: its own logit for our token is as good as for
    its own, within the bound of the precision, relative to its largest. Drawn: the draw is as close to our token's
    share of [0, 1). Committed by rejection or as typical: what decided was as close to deciding otherwise.
    """
    dtype = torch.float64 if job.workload.precision != "bf16" else torch.float32
    weights = EMULATIONS[job.plan.weights](job.model, _whole(job.model, job.checkpoint, job))
    worst = 0.0
    if job.plan.commit == REJECTION:
        worst = max(
            _off_speculative(job, weights, prompts, part, dtype) for prompts, part in zip(rounds, made, strict=True)
        )
        return worst <= BOUNDS[job.workload.precision], worst
    if job.plan.commit == TYPICAL:
        worst = max(
            _off_typical(job, weights, prompts, part, dtype) for prompts, part in zip(rounds, made, strict=True)
        )
        return worst <= BOUNDS[job.workload.precision], worst
    for one in continued(job, weights, rounds, made, dtype):
        differ = (one.ours != one.expected).nonzero()
        if len(differ):
            at = int(differ[0])
            prefix = torch.cat((one.prompt, one.expected[:at]))[None]
            logits = reference_logits(job.model, weights, prefix, dtype)[:, -1]
            worst = max(worst, _off(logits, one.ours[at], one.numbers[at], job))
    return worst <= BOUNDS[job.workload.precision], worst


def drifted(job: Job, rounds: list[Prompts], made: list[Generated]) -> Drift | None:
    """How far answers are from plain decoding's of the unchanged model, greedy or drawn by the same numbers; None of a
    plan that changes no results."""
    if not job.plan.changes:
        return None
    dtype = torch.float64 if job.workload.precision != "bf16" else torch.float32
    weights = _whole(job.model, job.checkpoint, job)
    every = list(continued(job, weights, rounds, made, dtype))
    prompts, ours, plain = (
        [tokens.tolist() for tokens in column] for column in zip(*(one[:3] for one in every), strict=True)
    )
    return drift(job.model, weights, prompts, ours, plain, dtype)


class Continued(NamedTuple):
    """A prompt, our answer to it, the reference's of the same length, and the numbers that both are drawn by."""

    prompt: Tensor
    ours: Tensor
    expected: Tensor
    numbers: Tensor


def continued(
    job: Job, weights: Mapping[Key, Tensor], rounds: list[Prompts], made: list[Generated], dtype: torch.dtype
) -> Iterator[Continued]:
    """Every prompt with the tokens that the reference, with these weights, chooses one at a time."""
    for prompts, part in zip(rounds, made, strict=True):
        tokens, many = part.tokens, torch.tensor(part.many)
        numbers = draws(job.seed, prompts.first, *tokens.shape)
        for length in sorted(set(prompts.lengths)):  # what is as long is continued together
            rows = [row for row, of in enumerate(prompts.lengths) if of == length]
            prompt, ours, own = prompts.tokens[rows, :length], tokens[rows], numbers[rows]

            def choose(logits: Tensor, step: int, own: Tensor = own) -> Tensor:
                return drawn(logits, own[:, step], job.workload) if job.workload.temperature else logits.argmax(-1)

            expected = reference_generate(job.model, weights, prompt, ours.shape[1], dtype, choose)
            for row, count in enumerate(many[rows].tolist()):
                yield Continued(prompt[row], ours[row, :count], expected[row, :count], own[row])


def _whole(model: ModelSpec, checkpoint: str, job: Job) -> Mapping[Key, Tensor]:
    """Every weight of a model, as the workers have them."""
    dtype = DTYPES[job.workload.precision]
    return open_checkpoint(checkpoint).whole(model, dtype) if checkpoint else init_weights(model, job.seed, dtype)


def _off_speculative(
    job: Job, weights: Mapping[Key, Tensor], prompts: Prompts, part: Generated, dtype: torch.dtype
) -> float:
    """How near the numbers of the worst first divergence from speculative sampling were to deciding otherwise."""
    model, workload, worst = job.workload.draft, job.workload, 0.0
    assert model is not None
    drafts = _whole(model, job.draft_checkpoint, job)

    def chances(of: ModelSpec, whole: Mapping[Key, Tensor], tokens: Tensor) -> Tensor:
        return distribution(reference_logits(of, whole, tokens[None], dtype)[0], workload)

    own = partial(chances, model, drafts)
    proposes = at_once(own, model.mask_token) if STRATEGIES[job.plan.decoding].masks else one_by_one(own)
    many, new = part.tokens.shape
    streams = {p: draws(job.seed, prompts.first, many, new, p).tolist() for p in ("", "accept", "draft")}
    for row, ours in enumerate(part.answers):
        expected, slack = speculative(
            partial(chances, job.model, weights),
            proposes,
            prompts.tokens[row, : prompts.lengths[row]].tolist(),
            part.tokens.shape[1],
            job.plan.speculate,
            {purpose: numbers[row] for purpose, numbers in streams.items()},
        )
        differ = [near for token, other, near in zip(ours, expected, slack, strict=False) if token != other]
        worst = max([worst, *differ[:1]])
    return worst


def _off(logits: Tensor, token: Tensor, draw: Tensor, job: Job) -> float:
    """How far a token is from what logits [1, vocabulary] give."""
    if not job.workload.temperature:
        return float(logits.max() - logits[0, token]) / float(logits.abs().max())
    begin, end = shares(logits, token[None], job.workload)
    return max(0.0, float(begin - draw), float(draw - end))


def _off_typical(
    job: Job, weights: Mapping[Key, Tensor], prompts: Prompts, part: Generated, dtype: torch.dtype
) -> float:
    """The same of typical acceptance in one process."""
    model, work, heads, worst = job.model, job.workload, job.workload.draft, 0.0
    assert isinstance(heads, HeadsSpec)
    own, numbers = _whole(heads, job.draft_checkpoint, job), draws(job.seed, prompts.first, *part.tokens.shape)
    if not job.draft_checkpoint:
        own = beginning(heads, own, model, weights)
    for row, ours in enumerate(part.answers):
        prompt = prompts.tokens[row, : prompts.lengths[row]].tolist()
        oracle = Oracle(model, converted(weights, dtype), heads, converted(own, dtype), work, numbers[row], len(prompt))
        expected, slack = typical(
            oracle.chances,
            oracle.choose,
            oracle.ranked,
            prompt,
            part.tokens.shape[1],
            tree_of(job.plan).parents,
            work.typical_epsilon,
            work.typical_delta,
        )
        differ = [near for token, other, near in zip(ours, expected, slack, strict=False) if token != other]
        worst = max([worst, *differ[:1]])
    return worst


class Oracle(NamedTuple):
    """What the emulation of typical acceptance asks of a model and its heads, by the reference, of one prompt of
    `before` tokens; `numbers` [new tokens] are what is drawn by."""

    model: ModelSpec
    weights: Mapping[Key, Tensor]
    heads: HeadsSpec
    own: Mapping[Key, Tensor]
    work: Workload
    numbers: Tensor
    before: int

    def chances(self, tokens: Tensor) -> Tensor:
        return (reference_logits(self.model, self.weights, tokens[None])[0] / (self.work.temperature or 1.0)).softmax(
            -1
        )

    def choose(self, text: Sequence[int]) -> tuple[int, float]:
        logits = reference_logits(self.model, self.weights, torch.tensor(text)[None])[:, -1]
        if not self.work.temperature:
            top = logits[0].topk(2)
            return int(top.indices[0]), float(top.values[0] - top.values[1]) / float(logits.abs().max())
        number = self.numbers[min(len(text) - self.before, len(self.numbers) - 1)][None]
        token = drawn(logits, number, self.work)
        begin, end = shares(logits, token, self.work)
        return int(token), float(min(number - begin, end - number))

    def ranked(self, text: Sequence[int]) -> list[list[tuple[int, float]]]:
        row = head_values(self.model, self.weights, torch.tensor(text[:-1])[None])["h"][:, -1:]
        found = []
        for logits in heads_logits(self.heads, self.own, row):
            best = logits[0, 0].sort(descending=True, stable=True)
            gaps = (best.values[:-1] - best.values[1:]) / best.values.abs().max()
            found.append(list(zip(best.indices.tolist(), [*gaps.tolist(), 1.0], strict=True)))
        return found
