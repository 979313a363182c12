"""A generation as a worker does it: prompts in, tokens out, timed after a warm-up, with the cache's peak memory."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from autotune.runners.decoding.ranked import ranks_of
from autotune.runners.generation import Generated, Generator
from autotune.runners.interpreter import Trace
from autotune.runners.job import Job, RankReport
from autotune.runners.judge import drifted, judge
from autotune.runners.kernels import NAME, record_kernels
from autotune.runners.memory import peak_during
from autotune.runners.prompts import Prompts, prompt_tokens
from autotune.runners.state import Loader
from autotune.runners.stops import cut, ended
from autotune.runners.stream import Teller
from autotune.runners.tokens import decode
from autotune.spec.plan import PLAIN


def generate_run(
    job: Job, rank: int, device: torch.device, load: Loader, folder: Path, load_draft: Loader | None = None
) -> RankReport:
    """One step is one whole generation; rank 0 reports the tokens and, with `check`, judges them."""
    prompts = prompt_tokens(job.model, job.workload, job.prompts, job.apart)
    generator = Generator.build(job.plan, job.model, job.round, rank, device, load, job.seed, load_draft)
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
    if job.kernels:
        record_kernels(partial(generator.generate, rounds[0]), device, None if rank else folder / NAME)
    every = [part for step in ran for part in step]
    checked = job.check and rank == 0
    equal, margin = judge(job, rounds, ran[-1]) if checked else (None, None)
    changed = drifted(job, rounds, ran[-1]) if checked else None
    answers = [cut(row, job.stops) for part in ran[-1] for row in part.answers] if rank == 0 else []
    plain = job.plan.decoding == PLAIN
    text = job.model.vocab <= 256 or bool(job.prompts)
    ranks: list[str] = []
    if job.ranks and (heads := generator.proposer.rankers()):
        texts = [
            ([*prompt[:length], *answer], length)
            for part, made in zip(rounds, ran[-1], strict=True)
            for prompt, length, answer in zip(part.tokens.tolist(), part.lengths, made.answers, strict=True)
        ]
        ranks = list(ranks_of(heads, job.plan, job.model, job.round, load, texts, device))
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
        decode_s=statistics.median(
            [s for part in every for s in (part.token_s if plain else (a_token(part),))] or [0.0]
        ),
        taken=[] if plain else counts(ran[-1]),
        round_s=0.0 if plain else statistics.median([s for part in every for s in part.token_s] or [0.0]),
        ranks=ranks,
        drift=asdict(changed) if changed else {},
        host={"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(device)},
    )


def a_token(part: Generated) -> float:
    """Seconds of a further token of each sequence, where rounds commit several."""
    return sum(part.token_s) / max(1, part.tokens.shape[1] - 1)


def counts(parts: list[Generated]) -> list[list[int]]:
    """Of each sequence the tokens that its rounds committed."""
    rows = [row for part in parts if part.taken is not None for row in part.taken.tolist()]
    return [[count for count in row if count] for row in rows]


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
            here = made[-1].answers[generator.mesh.data * each : (generator.mesh.data + 1) * each]
            teller.tell(first, here, last=True)
    return made
