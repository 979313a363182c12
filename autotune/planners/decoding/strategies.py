"""Decoding strategies: who proposes the tokens that one pass of the target scores, a line each.

A round is always the same: propose, score under a visibility mask, commit. What proposes is `runners/decoding`'s table
of the same names, what a proposal costs is in `planners/costs/propose.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from autotune.planners.decoding.trees import Tree
from autotune.spec.errors import nearest_name
from autotune.spec.model import ModelSpec
from autotune.spec.plan import MATCH, PLAIN, REJECTION, Plan
from autotune.spec.workload import Workload

AXES = ("speculate", "branches", "match", "window", "commit")  # of a plan, that say how it decodes
COMMITS = (MATCH, REJECTION)
LONGEST = 16  # newest tokens that a continuation is looked up by, at most


def rows(plan: Plan) -> Tree:
    """Rows of `speculate` tokens in a row, each after the newest token."""
    each = range(plan.speculate)
    return Tree(tuple(row * plan.speculate + place if place else 0 for row in range(plan.branches) for place in each))


def lookahead(plan: Plan) -> Tree:
    """Rows to be verified, then the window: its first line follows the newest token, a place after the other; in each
    further line a token follows the one above it (Fu et al., 2402.02057, figure 2)."""
    parents = list(rows(plan).parents)
    for line in range(plan.speculate):
        for place in range(plan.window):
            node = len(parents) + 1
            parents.append((node - plan.window) if line else (node - 1 if place else 0))
    return Tree(tuple(parents))


def row_and_masks(plan: Plan) -> Tree:
    """A row to be verified, then groups of as many masks: after the newest token, and after each token of the row."""
    parents, many = list(rows(plan).parents), plan.speculate
    for node in range(1 + many):
        parents += [len(parents) + place if place else node for place in range(many)]
    return Tree(tuple(parents))


@dataclass(frozen=True)
class Strategy:
    """`axes`: of AXES those that say something about it. `tree`: what a round scores, of which the rows come first and
    may be kept. `tried`: the values of its axes that a search tries. `nested`: whether fewer tokens are proposed as
    they would be among more, so that one acceptance tells them all."""

    axes: tuple[str, ...] = ("speculate",)
    tree: Callable[[Plan], Tree] = rows
    draft: bool = False  # whether a draft model proposes
    masks: bool = False  # whether who proposes needs mask tokens: the draft model, else the model itself
    nested: bool = True
    tried: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"speculate": (2, 4, 8, 16)})


STRATEGIES: dict[str, Strategy] = {
    PLAIN: Strategy(axes=(), tried={"speculate": (0,)}),
    # What came after the newest tokens where they last stood in the text (prompt lookup; n-gram in vLLM and SGLang).
    "ngram": Strategy(
        ("speculate", "branches", "match"),
        tried={"speculate": (2, 4, 8, 16), "match": (2, 4), "branches": (1, 2)},
    ),
    # What the target chose in the last round, right or not: a fixed-point iteration (Santilli et al., 2305.10427).
    "jacobi": Strategy(nested=False),
    # Such guesses kept as n-grams, and the best of these verified (Fu et al., 2402.02057).
    "lookahead": Strategy(
        ("speculate", "branches", "window"),
        lookahead,
        nested=False,
        tried={"speculate": (3, 4), "branches": (4, 7), "window": (5, 10)},
    ),
    # The model itself after mask tokens, in the pass that verifies (PaSS, 2311.13581; PPD, 2405.18628).
    "masks": Strategy(("speculate",), row_and_masks, masks=True, nested=False, tried={"speculate": (1, 2, 3, 4)}),
    # A smaller model (Leviathan et al., 2211.17192; Chen et al., 2302.01318).
    "draft": Strategy(("speculate", "commit"), draft=True, tried={"speculate": (1, 2, 3, 4, 5, 6, 8)}),
    # One with mask tokens, in one pass (PARD, 2504.18583; ParallelSpec, 2410.05589). A token further ahead is drafted
    # worse, so what a long round keeps says too little of shorter ones.
    "parallel": Strategy(
        ("speculate", "commit"), draft=True, masks=True, nested=False, tried={"speculate": (2, 3, 4, 6, 8, 12, 16)}
    ),
}


@lru_cache(maxsize=1024)
def tree_of(plan: Plan) -> Tree:
    """The tokens that a round scores: the newest one, and what is proposed."""
    return STRATEGIES[plan.decoding].tree(plan)


def scored(plan: Plan) -> int:
    """Tokens of a sequence that a round scores: the newest, and those that are proposed after it."""
    return 1 + tree_of(plan).size


def variants(name: str, workload: Workload, given: Mapping[str, tuple[object, ...]]) -> Iterator[dict[str, object]]:
    """Every choice of a strategy's axes: those that are given, or those that a search tries. What is given of an axis
    that says nothing about it is for other strategies."""
    strategy, usual = STRATEGIES[name], Plan()
    tried: dict[str, tuple[object, ...]] = {axis: (getattr(usual, axis),) for axis in AXES} | dict(strategy.tried)
    if "commit" in strategy.axes and workload.temperature:
        tried["commit"] = COMMITS
    values = {axis: given.get(axis, some) if axis in strategy.axes else some for axis, some in tried.items()}
    for choice in product(*values.values()):
        yield {"decoding": name, **dict(zip(values, choice, strict=True))}


def acceptance_key(plan: Plan) -> str:
    """What an acceptance is of: all that says how tokens are proposed, `ngram match=2`, but how many where fewer are
    proposed as they would be among more."""
    strategy, plain = STRATEGIES[plan.decoding], Plan()
    names = [axis for axis in strategy.axes if axis != "speculate" or not strategy.nested]
    axes = [axis for axis in names if getattr(plan, axis) != getattr(plain, axis)]
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
    if strategy.draft:
        found += _draft(plan, model, workload)
    drafts = workload.draft if strategy.draft else model
    return found + (_masks(plan, drafts, ahead=not strategy.draft) if strategy.masks and drafts else [])


def _masks(plan: Plan, model: ModelSpec, ahead: bool) -> list[str | None]:
    """What is wrong with the mask tokens of who proposes. `ahead`: the first token that is proposed is a mask's too."""
    if not model.masks:
        who = "a draft with mask tokens" if STRATEGIES[plan.decoding].draft else "a model with mask tokens"
        near = "draft" if STRATEGIES[plan.decoding].draft else PLAIN
        how = "parallel_draft in the config that it was trained with"
        return [f"decoding {plan.decoding} needs {who}: {how} (found none in {model.name}; nearest decoding {near})"]
    most = model.drafts - ahead
    if plan.speculate <= most:
        return []
    what = "the places of its masks" if ahead else f"the tokens that {model.name} drafts at once"
    return [f"speculate must be at most {most}, {what} (found {plan.speculate}; nearest {most})"]


def _draft(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    """What is wrong with the draft model."""
    draft = workload.draft
    if draft is None:
        return [f"decoding {plan.decoding} needs a draft model: a [draft] section in the recipe"]
    found: list[str | None] = []
    if draft.vocab != model.vocab:
        found.append(f"the draft's vocabulary must be the model's {model.vocab} (found {draft.vocab} of {draft.name})")
    if draft.latent:
        found.append(
            f"{draft.architecture}'s latent attention has no key-value cache in this version: it drafts nothing"
        )
    return found


def unknown(plan: Plan, workload: Workload) -> str | None:
    """Why nobody can say how fast a plan decodes, or None: how often its proposals are kept must be known."""
    if workload.kind == "train" or plan.decoding == PLAIN:
        return None
    key = acceptance_key(plan)
    known = max((len(one.rates) for one in workload.acceptance if one.key == key), default=0)
    if known >= plan.speculate:
        return None
    tokens = f"of {plan.speculate} tokens, known of {known}" if known else "which is not known"
    how = "`autotune profile --acceptance RECIPE` measures it"
    return f"decoding {plan.decoding} needs the acceptance of {key!r} (found {tokens}; {how})"
