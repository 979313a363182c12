"""Decoding strategies: who proposes the tokens that one pass of the target scores, a line each.

A round is always the same: propose, score under a visibility mask, commit. What proposes is `runners/decoding`'s table
of the same names, what a proposal costs is in `planners/costs/propose.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.planners.decoding.trees import Tree
from autotune.spec.errors import nearest_name
from autotune.spec.model import ModelSpec
from autotune.spec.plan import MATCH, PLAIN, REJECTION, Plan
from autotune.spec.workload import Workload

AXES = ("speculate", "branches", "match", "commit")  # of a plan, that say how it decodes
COMMITS = (MATCH, REJECTION)
LONGEST = 16  # newest tokens that a continuation is looked up by, at most


@dataclass(frozen=True)
class Strategy:
    """`axes`: of AXES those that say something about it. `lengths`, `matches`, `widths`: what a search tries of them."""

    axes: tuple[str, ...] = ("speculate",)
    draft: bool = False  # whether a draft model proposes
    lengths: tuple[int, ...] = (2, 4, 8, 16)
    matches: tuple[int, ...] = (0,)
    widths: tuple[int, ...] = (1,)


STRATEGIES: dict[str, Strategy] = {
    PLAIN: Strategy(axes=(), lengths=(0,)),
    # What came after the newest tokens where they last stood in the text (prompt lookup; n-gram in vLLM and SGLang).
    "ngram": Strategy(("speculate", "branches", "match"), matches=(2, 4), widths=(1, 2)),
    # What the target chose in the last round, right or not: a fixed-point iteration (Santilli et al., 2305.10427).
    "jacobi": Strategy(),
    # A smaller model (Leviathan et al., 2211.17192; Chen et al., 2302.01318).
    "draft": Strategy(("speculate", "commit"), draft=True, lengths=(1, 2, 3, 4, 5, 6, 8)),
}


def tree_of(plan: Plan) -> Tree:
    """The tokens that a round scores: rows of `speculate` in a row, each after the newest token."""
    rows, places = range(plan.branches), range(plan.speculate)
    return Tree(tuple(row * plan.speculate + place if place else 0 for row in rows for place in places))


def scored(plan: Plan) -> int:
    """Tokens of a sequence that a round scores: the newest, and those that are proposed after it."""
    return 1 + plan.speculate * plan.branches


def acceptance_key(plan: Plan) -> str:
    """What an acceptance is of: all that says how tokens are proposed but how many, `ngram match=2`."""
    strategy, plain = STRATEGIES[plan.decoding], Plan()
    axes = [axis for axis in strategy.axes if axis != "speculate" and getattr(plan, axis) != getattr(plain, axis)]
    return " ".join([plan.decoding, *(f"{axis}={getattr(plan, axis)}" for axis in axes)])


def refused(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    """What is wrong with how a plan decodes."""
    strategy = STRATEGIES.get(plan.decoding)
    if strategy is None:
        return [f"decoding {plan.decoding!r} is unknown (nearest {nearest_name(plan.decoding, STRATEGIES) or PLAIN})"]
    found: list[str | None] = [
        f"{axis} has no meaning with decoding {plan.decoding} (found {getattr(plan, axis)!r}; nearest {usual!r})"
        for axis in AXES
        if axis not in strategy.axes and getattr(plan, axis) != (usual := getattr(Plan(), axis))
    ]
    for axis in strategy.axes:
        value = getattr(plan, axis)
        if isinstance(value, int) and value < 1:
            found.append(f"{axis} must be at least 1 with decoding {plan.decoding} (found {value}; nearest 1)")
    if plan.match > LONGEST:
        found.append(f"match must be at most {LONGEST} (found {plan.match}; nearest {LONGEST})")
    if plan.commit not in COMMITS:
        found.append(f"commit {plan.commit!r} is unknown (nearest {nearest_name(plan.commit, COMMITS) or MATCH})")
    elif plan.commit == REJECTION and not workload.temperature:
        found.append(
            f"commit {REJECTION} needs drawn tokens: [workload] temperature above 0 (found 0; nearest {MATCH})"
        )
    return found + (_draft(model, workload) if strategy.draft else [])


def _draft(model: ModelSpec, workload: Workload) -> list[str | None]:
    """What is wrong with the draft model."""
    draft = workload.draft
    if draft is None:
        return ["decoding draft needs a draft model: a [draft] section in the recipe"]
    found: list[str | None] = []
    if draft.vocab != model.vocab:
        found.append(f"the draft's vocabulary must be the model's {model.vocab} (found {draft.vocab} of {draft.name})")
    if draft.latent:
        found.append(
            f"{draft.architecture}'s latent attention has no key-value cache in this version: it drafts nothing"
        )
    return found


def proposing(strategies: Sequence[str]) -> tuple[str, ...]:
    """Those of them that propose something."""
    return tuple(name for name in strategies if name != PLAIN)
