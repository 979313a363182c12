"""TFLOP/s a GPU of Megatron-LM's tensor, pipeline and data parallelism (Narayanan et al., 2104.04473, table 1).

A100 80 GB, sequences of 2048, vocabulary 51200, full recompute, interleaved 1F1B where a stage has chunks. FLOPs are
those of the paper's section 5.1, which count the second forward. Of the rows some are kept here.
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

SEQUENCE, VOCABULARY = 2048, 51200


@dataclass(frozen=True)
class Setting:
    """A model of the paper with its degrees and batch, and the TFLOP/s that every GPU reached."""

    name: str
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    devices: int
    batch: int
    micro_batch: int
    chunks: int
    reached: float

    @property
    def flops(self) -> float:
        """Of one step on all devices: 96 B s l h^2 (1 + s / 6h + V / 16lh)."""
        more = 1 + SEQUENCE / (6 * self.hidden) + VOCABULARY / (16 * self.layers * self.hidden)
        return 96.0 * self.batch * SEQUENCE * self.layers * self.hidden**2 * more


SETTINGS = (
    Setting("3.6B", 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138),
    Setting("18.4B", 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135),
    Setting("145.6B", 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148),
    Setting("1008B", 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163),
)


def step(setting: Setting) -> Prediction:
    model = gpt(f"gpt-{setting.name}", setting.layers, setting.hidden, setting.heads, VOCABULARY, setting.tensor)
    plan = Plan(
        data=setting.devices // (setting.tensor * setting.pipeline),
        tensor=setting.tensor,
        pipeline=setting.pipeline,
        micro_batch=setting.micro_batch,
        schedule="interleaved-1f1b" if setting.chunks > 1 else "1f1b",
        chunks=setting.chunks,
        recompute="full",
        attention="math",
    )
    workload = Workload(sequence_length=SEQUENCE, global_batch=setting.batch)
    return predicted(model, workload, plan)


def reached(setting: Setting, said: Prediction) -> float:
    """TFLOP/s a GPU of the predicted step."""
    return setting.flops / (setting.devices * said.step_s) / 1e12


def rows() -> Iterator[Row]:
    for s in SETTINGS:
        setup = f"t={s.tensor} p={s.pipeline} d={s.devices // (s.tensor * s.pipeline)}"
        told = telling(partial(step, s), partial(reached, s))
        yield Row("2104.04473, table 1", setup, s.name, "TFLOP/s a GPU", s.reached, *told)


TABLE = Table("Megatron-LM on clusters", f"shipped profile {A100}", True, rows)
