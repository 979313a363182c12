"""The tables as SQLAlchemy's typed ORM sees them. Migrations make them; a test holds the two together.

Four storage types only, TEXT, REAL, INTEGER and BLOB, because SQLite's STRICT tables take no others. Times are
ISO-8601 UTC text, digests are hexadecimal sha256, structured values are JSON text.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from sqlalchemy import REAL, BigInteger, Dialect, Double, ForeignKey, ForeignKeyConstraint, Index, Integer, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from autotune.spec.errors import EnvironmentFault


class JsonText(TypeDecorator[Any]):
    """A value kept as compact JSON text. NaN and infinities become null, because JSON has no words for them."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else dump(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        try:
            return json.loads(value)
        except ValueError as error:
            raise EnvironmentFault(
                f"the plan database holds a cell that is not JSON: {value[:60]!r} ({error})",
                hint="restore a copy of the database, or move it away and start a new one",
            ) from None


def dump(value: Any) -> str:
    """Compact JSON with sorted keys."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads this name from the class
        str: Text(),
        float: Double().with_variant(REAL(), "sqlite"),
        int: BigInteger().with_variant(Integer(), "sqlite"),
        dict[str, Any]: JsonText(),
        list[Any]: JsonText(),
    }


Key = Annotated[str, mapped_column(primary_key=True)]
Number = Annotated[int, mapped_column(primary_key=True, autoincrement=False)]


class Machine(Base):
    """A machine that was profiled or that ran something."""

    __tablename__ = "machines"
    fingerprint: Mapped[Key]
    name: Mapped[str]
    facts: Mapped[dict[str, Any]]
    created: Mapped[str]


class ProfileRow(Base):
    """A machine profile; `body` is the file form "autotune.machine/1". `saved` orders profiles of one name."""

    __tablename__ = "profiles"
    digest: Mapped[Key]
    machine: Mapped[str] = mapped_column(ForeignKey("machines.fingerprint"))
    name: Mapped[str]
    grade: Mapped[str]
    created: Mapped[str]
    saved: Mapped[str]
    body: Mapped[dict[str, Any]]


class Model(Base):
    __tablename__ = "models"
    digest: Mapped[Key]
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]


class WorkloadRow(Base):
    __tablename__ = "workloads"
    digest: Mapped[Key]
    kind: Mapped[str]
    spec: Mapped[dict[str, Any]]


class Recipe(Base):
    """A recipe as it was after defaults, file, environment and flags were merged."""

    __tablename__ = "recipes"
    digest: Mapped[Key]
    path: Mapped[str]
    merged: Mapped[dict[str, Any]]


class PlanRow(Base):
    """`id` is the short name: the first ten digits of the digest."""

    __tablename__ = "plans"
    digest: Mapped[Key]
    id: Mapped[str] = mapped_column(index=True)
    axes: Mapped[dict[str, Any]]
    created: Mapped[str]


class Context(Base):
    """What a prediction holds for: one model, workload, profile, number of devices and cost-model version.

    `updated` is when predictions were last added.
    """

    __tablename__ = "contexts"
    digest: Mapped[Key]
    model: Mapped[str] = mapped_column(ForeignKey("models.digest"))
    workload: Mapped[str] = mapped_column(ForeignKey("workloads.digest"))
    profile: Mapped[str] = mapped_column(ForeignKey("profiles.digest"))
    devices: Mapped[int]
    cost_model: Mapped[str]
    updated: Mapped[str]


class PredictionRow(Base):
    """`peak_bytes` is a list, one figure a pipeline rank; `body` is the rest of a Prediction without its timeline."""

    __tablename__ = "predictions"
    __table_args__ = (Index("predictions_rank", "context", "step_s", "plan"),)
    context: Mapped[Key] = mapped_column(ForeignKey("contexts.digest"))
    plan: Mapped[Key] = mapped_column(ForeignKey("plans.digest"))
    step_s: Mapped[float]
    created: Mapped[str]
    peak_bytes: Mapped[list[Any]]
    body: Mapped[dict[str, Any]]


class Search(Base):
    """`question` is a summary without budgets; `result` what finish_search was told."""

    __tablename__ = "searches"
    digest: Mapped[Key]
    model: Mapped[str] = mapped_column(ForeignKey("models.digest"))
    workload: Mapped[str] = mapped_column(ForeignKey("workloads.digest"))
    profile: Mapped[str] = mapped_column(ForeignKey("profiles.digest"))
    devices: Mapped[int]
    question: Mapped[dict[str, Any]]
    state: Mapped[str]  # running | finished | interrupted
    started: Mapped[str]
    updated: Mapped[str]
    result: Mapped[dict[str, Any] | None]


class Trial(Base):
    """A value that a search obtained for a plan, in seconds.

    `number` counts repeated measurements of a plan from 1; its predicted trial is number 0.
    """

    __tablename__ = "trials"
    search: Mapped[Key] = mapped_column(ForeignKey("searches.digest"))
    plan: Mapped[Key] = mapped_column(ForeignKey("plans.digest"))
    kind: Mapped[Key]  # predicted | measured
    number: Mapped[Number]
    value: Mapped[float]
    created: Mapped[str]


class Run(Base):
    """An execution of a plan. `prediction` is what the cost model said of it when it started."""

    __tablename__ = "runs"
    __table_args__ = (Index("runs_started", "started"),)
    id: Mapped[Key]
    plan: Mapped[str] = mapped_column(ForeignKey("plans.digest"))
    model: Mapped[str] = mapped_column(ForeignKey("models.digest"))
    workload: Mapped[str] = mapped_column(ForeignKey("workloads.digest"))
    machine: Mapped[str] = mapped_column(ForeignKey("machines.fingerprint"))
    recipe: Mapped[str | None] = mapped_column(ForeignKey("recipes.digest"))
    git_sha: Mapped[str]
    environment: Mapped[dict[str, Any]]
    prediction: Mapped[dict[str, Any] | None]
    status: Mapped[str]  # running | finished | failed | interrupted
    started: Mapped[str]
    finished: Mapped[str | None]
    losses: Mapped[list[Any] | None]
    peak_bytes: Mapped[list[Any] | None]
    mfu: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    equal: Mapped[int | None]  # 0 or 1; null: not checked
    max_difference: Mapped[float | None]
    error: Mapped[str | None]
    facts: Mapped[dict[str, Any] | None]  # whatever else is worth keeping: texts, host figures
    timeline: Mapped[str | None] = mapped_column(ForeignKey("artefacts.digest"))


class Launch(Base):
    """One start of all worker processes: the sampling unit of comparisons."""

    __tablename__ = "launches"
    run: Mapped[Key] = mapped_column(ForeignKey("runs.id"))
    number: Mapped[Number]
    started: Mapped[str]
    log_dir: Mapped[str]


class Step(Base):
    __tablename__ = "steps"
    __table_args__ = (ForeignKeyConstraint(["run", "launch"], ["launches.run", "launches.number"]),)
    run: Mapped[Key]
    launch: Mapped[Number]
    number: Mapped[Number]
    seconds: Mapped[float]


class Artefact(Base):
    """A large value kept as a compressed JSON file beside the database; `size` is its bytes before compression."""

    __tablename__ = "artefacts"
    digest: Mapped[Key]
    kind: Mapped[str]
    size: Mapped[int]
    created: Mapped[str]


class AcceptanceRow(Base):
    """How often proposed tokens are kept under `conditions`, a digest of all that it depends on but the strategy:
    models and their weights, and how tokens are chosen. `facts` says these conditions in words."""

    __tablename__ = "acceptances"
    conditions: Mapped[Key]
    strategy: Mapped[Key]
    model: Mapped[str] = mapped_column(ForeignKey("models.digest"))
    rates: Mapped[list[Any]]
    traces: Mapped[list[Any]]
    facts: Mapped[dict[str, Any]]
    created: Mapped[str]
    ranks: Mapped[list[Any] | None]


class ValidationRow(Base):
    """A suite of plans or published figures, predicted and measured. `question` is a digest of all that its rows depend
    on: the suite, its plans, the machine and the cost model; an interrupted one with the same question is gone on with
    from `visits`. `rows` and `summary` are the answer, once it is whole."""

    __tablename__ = "validations"
    __table_args__ = (Index("validations_question", "question", "started"),)
    id: Mapped[Key]
    question: Mapped[str]
    suite: Mapped[str]
    machine: Mapped[str]  # its fingerprint; "": none at hand is judged
    profile: Mapped[str]  # the name of the profile that predicts; "": each row's own
    cost_model: Mapped[str]
    state: Mapped[str]  # running | finished
    started: Mapped[str]
    updated: Mapped[str]
    visits: Mapped[list[Any]]
    rows: Mapped[list[Any] | None]
    summary: Mapped[list[Any] | None]
