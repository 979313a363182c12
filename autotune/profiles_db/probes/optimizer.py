"""Probe: one fused AdamW update of a flat tensor; "mixed" also writes the bf16 weights from the fp32 masters."""

from __future__ import annotations

import torch

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.work import Optimizer


def works(setting: Setting) -> list[Optimizer]:
    """Parameter counts a shard may have, the large first: they say the rate, the small ones the fixed cost."""
    if setting.device == "cuda":
        sizes, dtype = (
            ((1 << 28, 1 << 24, 1 << 20) if setting.quick else (1 << 28, 1 << 26, 1 << 24, 1 << 22, 1 << 20)),
            "mixed",
        )
    else:
        sizes, dtype = (
            ((1 << 22, 1 << 16, 1 << 19) if setting.quick else (1 << 24, 1 << 22, 1 << 19, 1 << 16, 1 << 13)),
            "fp32",
        )
    return [Optimizer(size, dtype) for size in sizes]


def on_host(quick: bool) -> list[Optimizer]:
    """Updates by the processor beside an accelerator, of subgroups of the states that live in its memory."""
    return [Optimizer(size, "mixed", "host") for size in ((1 << 24, 1 << 20) if quick else (1 << 26, 1 << 20, 1 << 23))]


def prepare(work: Optimizer, crew: Crew) -> Trial:
    """Weights, gradients and moments rotate through more than the cache: a step touches each of them once."""
    dtype = DTYPES["fp32" if work.dtype == "mixed" else work.dtype]
    size = work.parameters * dtype.itemsize * 4
    copies = max(1, min(64, -(-2 * crew.pool.cache // size)))
    step = torch.ones((), device=crew.place)

    def one() -> list[torch.Tensor]:
        made = [crew.pool.fresh((work.parameters,), dtype) for _ in range(4)]
        return [*made[:3], made[3].abs_()]  # the second moment is never negative

    sets = [one() for _ in range(copies)]
    narrow = torch.empty(work.parameters if work.dtype == "mixed" else 0, dtype=torch.bfloat16, device=crew.place)

    def run(i: int) -> None:
        weight, gradient, mean, square = sets[i % copies]
        torch._fused_adamw_(
            [weight],
            [gradient],
            [mean],
            [square],
            [],
            [step],
            lr=1e-5,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        if work.dtype == "mixed":
            narrow.copy_(weight)

    return Trial(run)
