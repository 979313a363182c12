"""A generation as a worker does it: prompts in, tokens out, timed after a warm-up, with the cache's peak memory."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autotune.runners.check import BOUNDS
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.generation import Generated, Generator
from autotune.runners.interpreter import Trace
from autotune.runners.job import Job, RankReport
from autotune.runners.memory import peak_during
from autotune.runners.prompts import Prompts, prompt_tokens
from autotune.runners.reference import Key, init_weights, reference_generate, reference_logits
from autotune.runners.sampling import drawn, draws, shares
from autotune.runners.state import DTYPES, Loader
from autotune.runners.stops import cut, ended
from autotune.runners.stream import Teller
from autotune.runners.tokens import decode


def generate_run(job: Job, rank: int, device: torch.device, load: Loader, folder: Path) -> RankReport:
    """One step is one whole generation; rank 0 reports the tokens and, with `check`, judges them."""
    prompts = prompt_tokens(job.model, job.workload, job.prompts)
    generator = Generator.build(job.plan, job.model, job.round, rank, device, load, job.seed)
    rounds = prompts.rounds(job.round.batch)
    # The first time: once captured, a pass keeps its memory to itself and the allocator's count no longer shows it.
    peak = peak_during(lambda: generator.generate(rounds[0]), generator.values, device)
    for _ in range(job.warmup):
        generator.generate(rounds[0])
    end = partial(ended, stops=job.stops) if job.stops else None
    ran = [_streamed(job, rank, generator, rounds, folder)] if job.stream else []
    ran += [[generator.generate(part, None, end) for part in rounds] for _ in range(max(1, job.steps) - len(ran))]
    trace, middle = Trace(), max(1, job.workload.new_tokens // 2)
    if job.trace and job.workload.new_tokens > 1:
        generator.generate(rounds[0], {middle: trace})
    every = [part for step in ran for part in step]
    equal, margin = judge(job, rounds, ran[-1]) if job.check and rank == 0 else (None, None)
    answers = [cut(row, job.stops) for part in ran[-1] for row in part.tokens.tolist()] if rank == 0 else []
    text = job.model.vocab <= 256 or bool(job.prompts)
    return RankReport(
        rank,
        [sum(part.prefill_s + sum(part.token_s) for part in step) for step in ran],
        peak,
        [],
        trace.spans,
        trace.memory,
        tokens=[tokens for tokens, _ in answers],
        texts=[decode(tokens) for tokens, _ in answers] if text else [],
        ends=[why for _, why in answers],
        equal=equal,
        max_difference=margin,
        prefill_s=statistics.median(part.prefill_s for part in every),
        decode_s=statistics.median([s for part in every for s in part.token_s] or [0.0]),
        host={"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(device)},
    )


def _streamed(job: Job, rank: int, generator: Generator, rounds: list[Prompts], folder: Path) -> list[Generated]:
    """A whole generation whose answers are told as they grow, by the first tensor rank of each replica's last stage."""
    has = "out" in generator.values and generator.mesh.tensor == 0
    teller = Teller.open(folder, rank, job.stops) if has else None
    each, made = job.round.batch // job.plan.data, []
    for part in rounds:
        first = part.first + generator.mesh.data * each

        def look(rows: list[list[int]], first: int = first) -> bool:
            if teller:
                teller.tell(first, rows, last=False)
            return bool(job.stops) and ended(rows, job.stops)

        made.append(generator.generate(part, None, look))
        if teller:
            here = made[-1].tokens[generator.mesh.data * each : (generator.mesh.data + 1) * each]
            teller.tell(first, here.tolist(), last=True)
    return made


def judge(job: Job, rounds: list[Prompts], made: list[Generated]) -> tuple[bool, float]:
    """Whether these are the reference's tokens, and how far off the worst first divergence is (0: none).

    A choice may differ where the reference itself is undecided. Greedy: its own logit for our token is as good as for
    its own, within the bound of the precision, relative to its largest. Drawn: the draw is as close to our token's
    share of [0, 1).
    """
    dtype = torch.float64 if job.workload.precision != "bf16" else torch.float32
    weights: dict[Key, torch.Tensor] = init_weights(job.model, job.seed, DTYPES[job.workload.precision])
    if job.checkpoint:
        weights = open_checkpoint(job.checkpoint).whole(job.model, DTYPES[job.workload.precision])
    worst = 0.0
    for prompts, tokens in ((p, g.tokens) for p, g in zip(rounds, made, strict=True)):
        numbers = draws(job.seed, prompts.first, *tokens.shape)
        for length in sorted(set(prompts.lengths)):  # what is as long is continued together
            rows = [row for row, of in enumerate(prompts.lengths) if of == length]
            prompt, ours, own = prompts.tokens[rows, :length], tokens[rows], numbers[rows]

            def choose(logits: Tensor, step: int, own: Tensor = own) -> Tensor:
                return drawn(logits, own[:, step], job.workload) if job.workload.temperature else logits.argmax(-1)

            expected = reference_generate(job.model, weights, prompt, ours.shape[1], dtype, choose)
            for row in range(len(rows)):
                differ = (ours[row] != expected[row]).nonzero()
                if len(differ):
                    at = int(differ[0])
                    prefix = torch.cat((prompt[row], expected[row, :at]))[None]
                    logits = reference_logits(job.model, weights, prefix, dtype)[:, -1]
                    worst = max(worst, _off(logits, ours[row, at], own[row, at], job))
    return worst <= BOUNDS[job.workload.precision], worst


def _off(logits: Tensor, token: Tensor, draw: Tensor, job: Job) -> float:
    """How far a token is from what logits [1, vocabulary] give."""
    if not job.workload.temperature:
        return float(logits.max() - logits[0, token]) / float(logits.abs().max())
    begin, end = shares(logits, token[None], job.workload)
    return max(0.0, float(begin - draw), float(draw - end))
