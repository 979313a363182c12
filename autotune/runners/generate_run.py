"""A generation as a worker does it: prompts in, tokens out, timed after a warm-up, with the cache's peak memory."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from autotune.runners.check import BOUNDS
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.generation import Generator, prompt_tokens
from autotune.runners.interpreter import Trace
from autotune.runners.job import Job, RankReport
from autotune.runners.memory import peak_during
from autotune.runners.reference import Key, init_weights, reference_generate, reference_logits
from autotune.runners.state import DTYPES, Loader
from autotune.runners.tokens import decode


def generate_run(job: Job, rank: int, device: torch.device, load: Loader, folder: Path) -> RankReport:
    """One step is one whole generation; rank 0 reports the tokens and, with `check`, judges them."""
    prompts = prompt_tokens(job.model, job.workload, job.prompts)
    generator = Generator.build(job.plan, job.model, job.round, rank, device, load)
    rounds = torch.split(prompts, job.round.batch)
    # The first time: once captured, a pass keeps its memory to itself and the allocator's count no longer shows it.
    peak = peak_during(lambda: generator.generate(rounds[0]), generator.values, device)
    for _ in range(job.warmup):
        generator.generate(rounds[0])
    ran = [[generator.generate(part) for part in rounds] for _ in range(max(1, job.steps))]
    trace, middle = Trace(), max(1, job.workload.new_tokens // 2)
    if job.trace and job.workload.new_tokens > 1:
        generator.generate(rounds[0], {middle: trace})
    tokens = torch.cat([part.tokens for part in ran[-1]])
    every = [part for step in ran for part in step]
    equal, margin = judge(job, prompts, tokens) if job.check and rank == 0 else (None, None)
    text = job.model.vocab <= 256 or bool(job.prompts)
    return RankReport(
        rank,
        [sum(part.prefill_s + sum(part.token_s) for part in step) for step in ran],
        peak,
        [],
        trace.spans,
        trace.memory,
        tokens=tokens.tolist() if rank == 0 else [],
        texts=[decode(row) for row in tokens.tolist()] if rank == 0 and text else [],
        equal=equal,
        max_difference=margin,
        prefill_s=statistics.median(part.prefill_s for part in every),
        decode_s=statistics.median(s for part in every for s in part.token_s) if job.workload.new_tokens > 1 else 0.0,
        host={"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(device)},
    )


def judge(job: Job, prompts: torch.Tensor, tokens: torch.Tensor) -> tuple[bool, float]:
    """Whether these are the reference's tokens, and the largest relative logit margin at a first divergence (0: none).

    A greedy choice may differ where the reference itself is undecided: within the bound of the precision, its own
    logit for our token is as good as for its own.
    """
    dtype = torch.float64 if job.workload.precision != "bf16" else torch.float32
    weights: dict[Key, torch.Tensor] = init_weights(job.model, job.seed, DTYPES[job.workload.precision])
    if job.checkpoint:
        weights = open_checkpoint(job.checkpoint).whole(job.model, DTYPES[job.workload.precision])
    expected = reference_generate(job.model, weights, prompts, job.workload.new_tokens, dtype)
    worst = 0.0
    for row in range(tokens.shape[0]):
        differ = (tokens[row] != expected[row]).nonzero()
        if len(differ):
            at = int(differ[0])
            prefix = torch.cat((prompts[row], expected[row, :at]))[None]
            logits = reference_logits(job.model, weights, prefix, dtype)[0, -1]
            margin = float(logits.max() - logits[tokens[row, at]]) / float(logits.abs().max())
            worst = max(worst, margin)
    return worst <= BOUNDS[job.workload.precision], worst
