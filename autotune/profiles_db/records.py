"""What the plan database answers with: plain frozen records, free of SQLAlchemy, and how specs become JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from autotune.spec.errors import EnvironmentFault
from autotune.spec.heads import kind_of
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload, acceptance_from


@dataclass(frozen=True)
class ProfileEntry:
    """A stored profile without its samples. Times are ISO-8601 UTC."""

    digest: str
    name: str
    grade: str
    fingerprint: str
    created: str
    saved: str


@dataclass(frozen=True)
class PlanEntry:
    """A plan with what is known of it for one model and workload; seconds are None where nothing is known."""

    plan: Plan
    id: str
    digest: str
    created: str
    model: str = ""  # name
    workload: str = ""  # kind
    devices: int = 0
    predicted_s: float | None = None
    peak_bytes: tuple[int, ...] = ()  # predicted, a pipeline rank
    measured_s: float | None = None  # median of the searches' measurements of this model, workload and plan
    runs: int = 0


@dataclass(frozen=True)
class Asked:
    """Which predicted plans to list: of each question the `top` fastest (0: all), and only those that match the rest.

    `model` is a name or digest, `kind` a workload's, `search` a digest; `measured` ones were measured or run.
    """

    top: int = 5
    model: str = ""
    kind: str = ""
    search: str = ""
    measured: bool = False


@dataclass(frozen=True)
class SearchEntry:
    """A search: what was asked (without budgets), where it stands, and how many trials it holds."""

    digest: str
    model: str
    workload: str
    devices: int
    question: Mapping[str, Any]
    state: str  # running | finished | interrupted
    started: str
    updated: str
    result: Mapping[str, Any] | None
    predicted: int = 0
    measured: int = 0

    @property
    def id(self) -> str:
        return self.digest[:10]


@dataclass(frozen=True)
class LaunchEntry:
    """One start of all workers and the seconds of each step that it timed."""

    number: int
    started: str
    log_dir: str
    steps: tuple[float, ...]


@dataclass(frozen=True)
class RunEntry:
    """One execution of a plan. Fields after `started` are None or empty until finish_run gave them."""

    id: str
    plan: Plan
    model: ModelSpec
    workload: Workload
    machine: str  # fingerprint
    recipe: str | None  # digest
    git_sha: str
    environment: Mapping[str, Any]
    prediction: Prediction | None
    status: str  # running | finished | failed | interrupted
    started: str
    finished: str | None = None
    losses: tuple[float | None, ...] = ()  # None: not a finite number
    peak_bytes: tuple[int, ...] = ()  # a rank
    mfu: float | None = None
    tokens_per_s: float | None = None
    equal: bool | None = None
    max_difference: float | None = None
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    timeline: str | None = None  # digest of the measured timeline: Store.timeline(run)
    launches: tuple[LaunchEntry, ...] = ()

    @property
    def step_s(self) -> float | None:
        """Median over launches of each launch's median step: the launch is the sampling unit."""
        medians = [median(launch.steps) for launch in self.launches if launch.steps]
        return median(medians) if medians else None


@dataclass(frozen=True)
class Origin:
    """Where a stored plan comes from: the question it was last predicted (or run) for.

    `profile` is the digest that Store.profile takes; None: the plan was run without having been predicted here.
    """

    plan: Plan
    model: ModelSpec
    workload: Workload
    profile: str | None
    devices: int


@dataclass(frozen=True)
class DatabaseInfo:
    """What `autotune db info` says. `path` is "" for a server; sizes are bytes."""

    shown: str
    path: str
    version: int
    supported: int
    dialect: str
    journal_mode: str  # "" for a server
    counts: Mapping[str, int]  # rows by table
    size: int
    files: int
    files_size: int
    notices: tuple[str, ...] = ()
    migrated_from: int | None = None
    backup: Path | None = None


def record(cls: type, raw: Mapping[str, Any]) -> Any:
    """The frozen dataclass `cls` from its `asdict` form. A field that this version does not know is refused."""
    unknown = raw.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise EnvironmentFault(
            f"the plan database holds a {cls.__name__} with the field {min(unknown)!r}, which this autotune lacks",
            hint="upgrade autotune, or name another database with --db",
        )
    return cls(**raw)


def model_from(raw: Mapping[str, Any]) -> ModelSpec:
    """A ModelSpec from its JSON form: nested records and tuples restored."""
    parts = dict(raw)
    if parts.get("experts"):
        experts = dict(parts["experts"])
        parts["experts"] = record(Experts, experts | {"dense_layers": tuple(experts.get("dense_layers", ()))})
    if parts.get("latent"):
        parts["latent"] = record(LatentAttention, parts["latent"])
    scaling = parts.get("rope_scaling", ())
    parts["rope_scaling"] = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in scaling)
    if parts.get("target"):
        parts["target"] = model_from(parts["target"])
    model: ModelSpec = record(kind_of(parts), parts)
    return model


def workload_from(raw: Mapping[str, Any]) -> Workload:
    parts = dict(raw)
    if parts.get("draft"):
        parts["draft"] = model_from(parts["draft"])
    parts["prompt_lengths"] = tuple(parts.get("prompt_lengths", ()))
    parts["acceptance"] = tuple(acceptance_from(one) for one in parts.get("acceptance", ()))
    parts["masks"] = tuple(parts.get("masks", ()))
    workload: Workload = record(Workload, parts)
    return workload


def plan_from(raw: dict[str, Any]) -> Plan:
    """The plan; an axis that this version does not know is refused as a matter of versions, not of usage."""
    plan: Plan = record(Plan, raw)
    return plan


def prediction_body(prediction: Prediction) -> dict[str, Any]:
    """Everything of a prediction but its plan, step seconds, peak bytes (columns of their own) and timeline."""
    return {
        "tokens_per_s": prediction.tokens_per_s,
        "memory": [dict(rank) for rank in prediction.memory],
        "breakdown": dict(prediction.breakdown),
        "grades": dict(prediction.grades),
        "prefill_s": prediction.prefill_s,
        "decode_s": prediction.decode_s,
    }


def prediction_from(plan: Plan, step_s: float, peak_bytes: list[int], body: Mapping[str, Any]) -> Prediction:
    """The inverse of `prediction_body`; the timeline is not kept, `predict` makes it again."""
    parts = dict(body) | {"memory": tuple(body["memory"])}
    unknown = {"plan": plan, "step_s": step_s, "peak_bytes": tuple(peak_bytes)}
    prediction: Prediction = record(Prediction, parts | unknown)
    return prediction


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as a JSON object."""
    return asdict(value)
