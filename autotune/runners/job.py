"""A job and its result: what a launch hands to its workers and what comes back. JSON both ways, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.runners.saved import Saved
from autotune.spec.heads import kind_of
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.timeline import Timeline
from autotune.spec.workload import Workload, acceptance_from, kept

if TYPE_CHECKING:
    from autotune.spec.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """`steps` are timed after `warmup` that are not; `check` compares with the one-process reference first."""

    plan: Plan
    model: ModelSpec
    workload: Workload
    steps: int = 5
    warmup: int = 2
    check: bool = False
    seed: int = 0
    checkpoint: str = ""  # a folder of safetensors; "": seeded random weights
    draft_checkpoint: str = ""  # the same of the workload's draft model
    target_checkpoint: str = ""  # the same of the frozen model that decoding heads are trained for
    saved: Saved | None = None  # training: the checkpoint that is written after the timed steps
    prompts: tuple[str, ...] = ()
    apart: bool = False  # without prompts they are cut from another part of the corpus than usual
    ranks: bool = False  # whether it is told how likely heads held what came
    stops: tuple[str, ...] = ()  # texts that end an answer
    stream: bool = False  # whether the first timed generation's answers are written as they grow
    device: str = "cpu"  # cpu | cuda
    trace: bool = True  # record one step's timeline
    kernels: bool = False  # record the kernels of one step under torch's profiler (runners.kernels)
    peak_flops: float = 0.0  # of one device, for model FLOPs utilisation; 0: not reported

    @property
    def round(self) -> Workload:
        """Generation: the workload of the sequences that all replicas generate together."""
        return replace(self.workload, batch=self.plan.data * self.plan.micro_batch)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw = json.loads(text)
        raw["plan"] = Plan.from_dict(raw["plan"])
        raw["model"] = _model(raw["model"])
        raw["workload"] = _workload(raw["workload"])
        raw["prompts"], raw["stops"] = tuple(raw["prompts"]), tuple(raw["stops"])
        raw["saved"] = Saved(**raw["saved"]) if raw["saved"] else None
        return cls(**raw)


def job_of(recipe: Recipe | None, plan: Plan, model: ModelSpec, workload: Workload, device: str) -> Job:
    """A job with what the recipe, where there is one, says of weights, prompts, ends of answers and the seed."""
    job = Job(plan, model, workload, device=device)
    if recipe is None:
        return job
    return replace(
        job,
        seed=recipe.seed,
        checkpoint=recipe.checkpoint,
        draft_checkpoint=recipe.draft_checkpoint,
        target_checkpoint=recipe.target_checkpoint,
        prompts=recipe.prompts,
        stops=recipe.stops,
    )


def _workload(raw: dict[str, Any]) -> Workload:
    raw["draft"] = _model(raw["draft"]) if raw["draft"] else None
    raw["prompt_lengths"] = tuple(raw["prompt_lengths"])
    raw["acceptance"] = tuple(acceptance_from(one) for one in raw["acceptance"])
    raw["masks"] = tuple(raw["masks"])
    return Workload(**raw)


def _model(raw: dict[str, Any]) -> ModelSpec:
    raw["rope_scaling"] = tuple((k, v) for k, v in raw["rope_scaling"])
    if raw["experts"]:
        raw["experts"]["dense_layers"] = tuple(raw["experts"]["dense_layers"])
        raw["experts"] = Experts(**raw["experts"])
    if raw["latent"]:
        raw["latent"] = LatentAttention(**raw["latent"])
    if raw.get("target"):
        raw["target"] = _model(raw["target"])
    return kind_of(raw)(**raw)


@dataclass(frozen=True)
class Rounds:
    """What became of proposed tokens: `taken[s][r]` of sequence s were committed by its round r; a round took
    `seconds`."""

    taken: tuple[tuple[int, ...], ...]
    seconds: float
    most: int  # tokens that a round can commit
    ranks: tuple[str, ...] = ()  # see Acceptance

    @property
    def mean(self) -> float:
        """Tokens that a round commits of a sequence."""
        every = [count for row in self.taken for count in row]
        return sum(every) / max(1, len(every))

    @property
    def rates(self) -> tuple[float, ...]:
        """See Acceptance."""
        return kept(self.taken, self.most)


@dataclass(frozen=True)
class RunResult:
    """What ran. Per-rank figures are in world-rank order; `step_s` is the slowest rank's of each step."""

    step_s: tuple[float, ...]
    tokens_per_s: float
    peak_bytes: tuple[int, ...]
    losses: tuple[float, ...] = ()
    mfu: float = 0.0
    tokens: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()  # why each answer ended: see runners.stops
    timeline: Timeline | None = None
    equal: bool | None = None
    max_difference: float | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    rounds: Rounds | None = None
    drift: Mapping[str, float] = field(default_factory=dict)  # see runners.drift
    host: Mapping[str, Any] = field(default_factory=dict)
    log_dir: str = ""


@dataclass(frozen=True)
class RankReport:
    """One worker's part of the result, written as JSON into the log folder."""

    rank: int
    step_s: list[float]
    peak_bytes: int
    losses: list[float]
    spans: list[tuple[int, float, float]] = field(default_factory=list)  # position, start, end of one traced step
    memory: list[int] = field(default_factory=list)  # counted bytes at each position
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    equal: bool | None = None
    max_difference: float | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    taken: list[list[int]] = field(default_factory=list)  # of each sequence the tokens that its rounds committed
    round_s: float = 0.0
    ranks: list[str] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)  # see runners.drift
    host: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        part = folder / f"rank-{self.rank}.json.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(folder / f"rank-{self.rank}.json")

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankReport:
        raw = json.loads((folder / f"rank-{rank}.json").read_text())
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in raw.items() if k in known})
