"""What a cost model says of a plan, and what a search found: the answers that are stored, explained and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autotune.spec.band import Band
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.timeline import Timeline
from autotune.spec.workload import Workload


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of one plan. Per-rank figures are of pipeline ranks: tensor and data peers are alike."""

    plan: Plan
    step_s: float  # train: one optimizer step; generate: one whole generation (prefill and all new tokens)
    tokens_per_s: float
    peak_bytes: tuple[int, ...]  # device bytes a rank
    memory: tuple[Mapping[str, int], ...]  # a rank: weights, gradients, optimizer, activations, transient, ...
    breakdown: Mapping[str, float]  # seconds of the slowest rank by kind: matmul, attention, memory, collective, ...
    grades: Mapping[str, float]  # share of the busy seconds that rests on measured | interpolated | datasheet
    timeline: Timeline | None = None  # of one step (generate: of one decoded token)
    prefill_s: float = 0.0
    decode_s: float = 0.0  # mean seconds of one decoded token
    # By figure: step_s, tokens_per_s, prefill_s, decode_s, and peak_bytes of the fullest rank. Empty: nobody asked.
    bands: Mapping[str, Band] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Question:
    """Everything a search depends on. Its digest names the search, so that the same command resumes it."""

    model: ModelSpec
    workload: Workload
    profile: Profile
    devices: int
    axes: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # axis name to allowed values; absent: all
    minimize: str = "step_time"  # step_time | peak_memory | latency; tokens_per_s is maximised
    memory_fraction: float = 0.92  # of a device's memory that a plan may use
    simulate_budget: int = 20000
    measure_budget: int = 0
    seconds: float = 60.0
    seed: int = 0


@dataclass(frozen=True)
class Bound:
    """An admissible lower bound over the whole space, and how far the answer is above it (0.02: 2 %).

    A gap of None is unknown: the search ended before every plan was bounded, and `step_s` is of those that were.
    """

    step_s: float
    gap: float | None


@dataclass(frozen=True)
class Space:
    """How many structures were looked at, how many are feasible, and why the others are not.

    `unseen`: choices of the outer axes that the budget left no time for, each one structure or more.
    """

    structures: int
    feasible: int
    infeasible: Mapping[str, int]
    unseen: int = 0


@dataclass(frozen=True)
class Found:
    """A search's answer. `ranking` starts with the winner."""

    question: Question
    ranking: tuple[Prediction, ...]
    bound: Bound
    space: Space
    bounded: int
    simulated: int
    measured: Mapping[str, float]  # plan id to measured step seconds, where plans were run
    finished: bool  # False: the budget or Ctrl-C ended it before the bound closed
    whole: bool = True  # False: Ctrl-C ended the measurements, or a plan failed to run

    @property
    def best(self) -> Prediction:
        return self.ranking[0]
