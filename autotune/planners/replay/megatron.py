"""Step times of Megatron-LM with full recompute, and with selective recompute and sequence parallelism (2205.05198).

Table 5: A100 80 GB, tensor 8, sequences of 2048, vocabulary 51200. Attention was not fused then: scores and their
softmax were written out, which is our backend `math`, and what selective recompute makes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from autotune.planners.replay.machine import A100, gpt, predicted, telling
from autotune.planners.replay.row import Row, Table
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload

TENSOR = 8


@dataclass(frozen=True)
class Setting:
    """A model of the paper, and seconds a step with full recompute and with selective and sequence."""

    name: str
    layers: int
    hidden: int
    heads: int
    pipeline: int
    chunks: int
    batch: int
    micro_batch: int
    full: float
    selective: float


SETTINGS = (
    Setting("22B", 48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10),
    Setting("175B", 96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
    Setting("530B", 105, 20480, 128, 35, 3, 280, 1, 49.05, 37.83),
    Setting("1T", 128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
)


def step(setting: Setting, recompute: str, sequence_parallel: bool) -> Prediction:
    model = gpt(f"gpt-{setting.name}", setting.layers, setting.hidden, setting.heads, 51200, TENSOR)
    schedule = "interleaved-1f1b" if setting.chunks > 1 else "1f1b"
    plan = Plan(
        tensor=TENSOR,
        pipeline=setting.pipeline,
        micro_batch=setting.micro_batch,
        schedule=schedule,
        chunks=setting.chunks,
        recompute=recompute,
        attention="math",
        sequence_parallel=sequence_parallel,
    )
    return predicted(model, Workload(sequence_length=2048, global_batch=setting.batch), plan)


def rows() -> Iterator[Row]:
    for setting in SETTINGS:
        setup = f"{setting.name} t=8 p={setting.pipeline}"
        for name, value, recompute, sequence in (
            ("full recompute", setting.full, "full", False),
            ("selective+sequence", setting.selective, "selective", True),
        ):
            asked = partial(step, setting, recompute, sequence)
            yield Row("2205.05198, table 5", setup, name, "step s", value, *telling(asked, lambda said: said.step_s))


TABLE = Table("Megatron-LM with recompute", f"shipped profile {A100}", True, rows)
