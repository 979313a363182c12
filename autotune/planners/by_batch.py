"""How many tokens to propose a round, by how many sequences go together: what pays for one may not pay for thirty.

The more sequences a pass has, the less room there is in it for tokens that may not be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.planners.decoding.strategies import AXES, STRATEGIES
from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.planners.predict_generation import acceptance_of
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload

MEMORY_FRACTION = 0.92  # of a device's memory, as a recipe's [objective] limits has it


@dataclass(frozen=True)
class AtBatch:
    """For `batch` sequences of each replica: the tokens to propose (0: none), and what that is predicted to give."""

    batch: int
    speculate: int
    tokens_per_s: float
    plain_tokens_per_s: float


def by_batch(
    plan: Plan,
    model: ModelSpec,
    workload: Workload,
    profile: Profile,
    batches: Sequence[int],
    memory_fraction: float = MEMORY_FRACTION,
) -> tuple[AtBatch, ...]:
    """The best number for each of `batches`, as far as the plan's acceptance covers it; none for what does not fit.

    Empty where nothing proposes, or nobody knows how much of it is kept.
    """
    known = acceptance_of(plan, workload)
    if plan.decoding == PLAIN or known is None:
        return ()
    most = len(known.rates)
    # Where fewer tokens are proposed otherwise than more, an acceptance is of its own number alone.
    speculates = range(1, most + 1) if STRATEGIES[plan.decoding].nested else (plan.speculate,)
    plans = [plain(plan), *(plan.altered(speculate=count) for count in speculates)]
    predictor = Predictor(model, workload, profile)
    allowed = profile.device.memory_bytes * memory_fraction / profile.sharing(plan.world) - profile.device.context_bytes
    found = []
    for batch in batches:
        rows = [tried for each in plans if (tried := _at(predictor, each, batch, allowed))]
        if rows and rows[0].plan.decoding == PLAIN:
            best = max(rows, key=lambda row: row.tokens_per_s)  # of equals the first: the fewest tokens
            found.append(AtBatch(batch, best.plan.speculate, best.tokens_per_s, rows[0].tokens_per_s))
    return tuple(found)


def plain(plan: Plan) -> Plan:
    """The plan without anybody who proposes tokens."""
    return plan.altered(decoding=PLAIN, **{axis: getattr(Plan(), axis) for axis in AXES})


def _at(predictor: Predictor, plan: Plan, batch: int, allowed: float) -> Prediction | None:
    """The prediction with `batch` sequences a replica; None where it cannot run, or not in `allowed` bytes."""
    plan = plan.altered(micro_batch=batch)
    workload = replace(predictor.workload, batch=plan.data * batch)
    if why_not(predictor.model, workload, plan):
        return None
    found = replace(predictor, workload=workload, _rounds={}).predict(plan, timeline=False)
    return found if max(found.peak_bytes) <= allowed else None
