"""Iteration times of GPT models on 2 to 8 A100 (vTrain's single-node measurements; 2312.12391, MICRO 2024).

`data/vtrain_single.csv`: 706 of the rows that github.com/VIA-Research/vTrain publishes in its folder `data`, under the
MIT licence in `data/vtrain_LICENSE` (Copyright 2024, VIA Research Group at KAIST); the columns are renamed. What ran,
by that folder's README: Megatron-DeepSpeed, GPT of hidden 1024 or 2048 with 16 heads, sequences of 1024, vocabulary
51200 (tied), fp16, every layer recomputed, on one node of A100.

How that is said in our terms (of the backend of attention, 1F1B and late sums no page tells: they are assumed): fp16
is priced as bf16 (as wide and as fast); attention writes its scores out (backend `math`); 1F1B; gradients are summed
after the last backward (`sync = "late"`), as DeepSpeed's pipeline engine does; the feed-forward's two matrices of 4 h
are three of 8/3 h. Which coefficients are fitted was chosen with the errors of both halves in view; their values were
fitted to one half alone.

The rows are halved by a hash of each: to one half a handful of coefficients were fitted (`fit.py`), the other alone is
judged.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache, partial

from autotune.planners.predict import Predictor
from autotune.planners.replay.calibration import DATA, load
from autotune.planners.replay.machine import gpt, telling
from autotune.planners.replay.row import Row, Table
from autotune.planners.replay.split import for_fitting
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload

CALIBRATION = "a100-vtrain"
SOURCE = "2312.12391, data"
VOCABULARY = 51200


@dataclass(frozen=True)
class Run:
    """A row of the set: degrees, batch in sequences, shape, and the milliseconds that an iteration took."""

    gpus: int
    global_batch: int
    micro_batch: int
    hidden: int
    heads: int
    layers: int
    sequence_length: int
    tensor: int
    data: int
    pipeline: int
    iteration_ms: float

    @property
    def fitted(self) -> bool:
        return for_fitting(",".join(map(str, astuple(self))))

    @property
    def model(self) -> ModelSpec:
        named = f"gpt-{self.layers}x{self.hidden}"
        return replace(gpt(named, self.layers, self.hidden, self.heads, VOCABULARY, self.tensor), tied=True)

    @property
    def workload(self) -> Workload:
        return Workload(sequence_length=self.sequence_length, global_batch=self.global_batch)

    @property
    def plan(self) -> Plan:
        return Plan(
            data=self.data,
            tensor=self.tensor,
            pipeline=self.pipeline,
            micro_batch=self.micro_batch,
            recompute="full",
            attention="math",
            sync="late",
        )


@cache
def runs() -> tuple[Run, ...]:
    """Every row, in the order of the file."""
    with (DATA / "vtrain_single.csv").open(newline="") as file:
        return tuple(_run(row) for row in csv.DictReader(file))


def _run(row: dict[str, str]) -> Run:
    whole = {key: int(value) for key, value in row.items() if key != "iteration_ms"}
    return Run(**whole, iteration_ms=float(row["iteration_ms"]))


class Teller:
    """Predicts runs on one profile, remembering what those of one model and batch share."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._predictors: dict[tuple[ModelSpec, Workload], Predictor] = {}
        self._known: dict[Run, Prediction] = {}

    def predict(self, run: Run) -> Prediction:
        if run not in self._known:
            key = run.model, run.workload
            if key not in self._predictors:
                self._predictors[key] = Predictor(*key, self.profile)
            self._known[run] = self._predictors[key].predict(run.plan, timeline=False)
        return self._known[run]


@cache
def calibrated() -> Teller:
    return Teller(load(CALIBRATION).profile())


def prediction(run: Run) -> Prediction:
    return calibrated().predict(run)


def rows() -> Iterator[Row]:
    for run in runs():
        case = f"h={run.hidden} l={run.layers} gpus={run.gpus} batch={run.global_batch}"
        yield Row(
            SOURCE,
            case,
            f"t={run.tensor} d={run.data} p={run.pipeline} mb={run.micro_batch}",
            "step ms",
            run.iteration_ms,
            *telling(partial(prediction, run), lambda said: 1e3 * said.step_s),
            fitted=run.fitted,
            calibrated=True,
            case=case,
            traits={"tensor": run.tensor, "pipeline": run.pipeline, "micro-batch": run.micro_batch, "data": run.data}
            | {"hidden": run.hidden},
        )


TABLE = Table("vTrain, one node", "profile a100-sxm-80gb calibrated to the rows marked as fitted", True, rows)
