"""Decoding strategies: who proposes the tokens that one pass of the target scores, a line each.

A round is always the same: propose, score under a visibility mask, commit. What proposes is `runners/decoding`'s table
of the same names, what a proposal costs is in `planners/costs/propose.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from autotune.planners.decoding.ranks import trees as ranked_trees
from autotune.planners.decoding.trees import Tree
from autotune.spec.errors import UsageError, nearest_name
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.plan import MATCH, PLAIN, REJECTION, TYPICAL, Plan
from autotune.spec.workload import Workload

AXES = ("speculate", "branches", "match", "window", "tree", "refine", "commit")  # of a plan, that say how it decodes
COMMITS = (MATCH, REJECTION)  # that a search tries where tokens are drawn
REFINES = ("none", "ngram")  # what becomes of heads' proposals before they are verified
RULES = (MATCH, REJECTION, TYPICAL)
LONGEST = 16  # newest tokens that a continuation is looked up by, at most
LATTICE = 8  # tokens of each head that refined proposals are chosen among
LARGEST = 512  # nodes of a tree, at most
Given = Mapping[str, tuple[object, ...]]  # the values of axes that somebody wants


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


def planned(plan: Plan) -> Tree:
    """The plan's own tree, or `speculate` tokens in a row."""
    return _parsed(plan.tree) if plan.tree else Tree.chain_of(plan.speculate)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Tree:
    return Tree.parse(text)


def row_and_masks(plan: Plan) -> Tree:
    """A row to be verified, then groups of as many masks: after the newest token, and after each token of the row."""
    parents, many = list(rows(plan).parents), plan.speculate
    for node in range(1 + many):
        parents += [len(parents) + place if place else node for place in range(many)]
    return Tree(tuple(parents))


@dataclass(frozen=True)
class Strategy:
    """`axes`: of AXES those that say something about it. `tree`: what a round scores, of which those of `kept` come
    first and may be kept. `tried`: the values of its axes that a search tries. `nested`: whether fewer tokens are
    proposed as they would be among more, so that one acceptance tells them all. `draft`: whether the model of [draft]
    proposes, and `rows`: whether that is heads, which read the target's hidden rows. `masks`: whether who proposes
    needs mask tokens: the draft model, else the model itself. `choices`: of its axes together what a search tries, or
    what of it is given; all combinations without it. `told`: axes of which one acceptance tells every value.
    `acceptance`: the key of the one whose ranks its trees follow from. `swapped`: the strategy for what else [draft]
    may name, `maskless`: the one for a model without mask tokens."""

    axes: tuple[str, ...] = ("speculate",)
    tree: Callable[[Plan], Tree] = rows
    kept: Callable[[Plan], Tree] = rows
    commits: tuple[str, ...] = (MATCH, REJECTION)  # where `commit` is one of its axes
    draft: bool = False
    rows: bool = False
    masks: bool = False
    nested: bool = True
    tried: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"speculate": (2, 4, 8, 16)})
    choices: Callable[[Strategy, Workload, Given], Iterator[dict[str, object]]] | None = None
    told: tuple[str, ...] = ()
    acceptance: str = ""
    swapped: str = PLAIN
    maskless: str = PLAIN


def of_heads(strategy: Strategy, workload: Workload, given: Given) -> Iterator[dict[str, object]]:
    """Rows of as many tokens as there are heads or fewer, and where ranks are known the trees that follow from them.
    What changes answers comes of the recipe's own word alone."""
    heads = workload.draft.count if isinstance(workload.draft, HeadsSpec) else 1
    deep = given.get("speculate", tuple(range(1, heads + 1)))
    for text in map(str, given.get("tree", ("",))):
        # What cannot be read is refused with the plan.
        depth = (Tree.parse(text).depth,) if text and not _tree(Plan(tree=text, speculate=-1), False) else deep
        wide = depth if "speculate" not in given else deep
        ways = given.get("refine", REFINES if not text else REFINES[:1])
        for count, way, rule in product(wide, ways, given.get("commit", (MATCH,))):
            yield {"speculate": count, "tree": text, "refine": way, "commit": rule}
    if "tree" not in given and REFINES[0] in given.get("refine", REFINES):
        ranks = next((one.ranks for one in workload.acceptance if one.key == strategy.acceptance and one.ranks), ())
        depths = [count for count in deep if isinstance(count, int) and count <= heads]
        for tree in ranked_trees(ranks, heads, depths) if ranks else ():
            yield {"speculate": tree.depth, "tree": tree.text}


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
    "draft": Strategy(("speculate", "commit"), draft=True, tried={"speculate": (1, 2, 3, 4, 5, 6, 8)}, swapped="heads"),
    # One with mask tokens, in one pass (PARD, 2504.18583; ParallelSpec, 2410.05589). A token further ahead is drafted
    # worse, so what a long round keeps says too little of shorter ones.
    "parallel": Strategy(
        ("speculate", "commit"),
        draft=True,
        masks=True,
        nested=False,
        tried={"speculate": (2, 3, 4, 6, 8, 12, 16)},
        swapped="heads",
        maskless="draft",
    ),
    # Heads on the target's hidden rows (Stern et al., 1811.03115; Cai et al., 2401.10774): a node of depth k and rank r
    # is what head k holds the (r + 1)-th likeliest.
    "heads": Strategy(
        ("speculate", "tree", "refine", "commit"),
        planned,
        planned,
        commits=(MATCH, TYPICAL),
        draft=True,
        rows=True,
        choices=of_heads,
        told=("speculate", "tree"),
        acceptance="heads",
        swapped="draft",
    ),
}


@lru_cache(maxsize=1024)
def tree_of(plan: Plan) -> Tree:
    """The tokens that a round scores: the newest one, and what is proposed."""
    return STRATEGIES[plan.decoding].tree(plan)


def kept_nodes(plan: Plan) -> int:
    """Of a round's tokens after the newest the first ones, that may be kept."""
    return STRATEGIES[plan.decoding].kept(plan).size


def reads_rows(plan: Plan) -> bool:
    """Whether what proposes reads the target's hidden rows."""
    return plan.decoding in STRATEGIES and STRATEGIES[plan.decoding].rows


def tells_ranks(plan: Plan) -> bool:
    """Whether a generation of it tells ranks from which other trees' rounds follow: not where what is committed or
    proposed is no head's own word."""
    return reads_rows(plan) and plan.commit == MATCH and plan.refine == REFINES[0]


def scored(plan: Plan) -> int:
    """Tokens of a sequence that a round scores: the newest, and those that are proposed after it."""
    return 1 + tree_of(plan).size


def variants(name: str, workload: Workload, given: Given) -> Iterator[dict[str, object]]:
    """Every choice of a strategy's axes: those that are given, or those that a search tries. What is given of an axis
    that says nothing about it is for other strategies."""
    strategy, usual = STRATEGIES[name], Plan()
    tried: dict[str, tuple[object, ...]] = {axis: (getattr(usual, axis),) for axis in AXES} | dict(strategy.tried)
    if "commit" in strategy.axes and workload.temperature:
        tried["commit"] = COMMITS
    if strategy.choices is not None:
        plain: dict[str, object] = {axis: getattr(usual, axis) for axis in AXES}
        yield from ({"decoding": name, **plain, **choice} for choice in strategy.choices(strategy, workload, given))
        return
    values = {axis: given.get(axis, some) if axis in strategy.axes else some for axis, some in tried.items()}
    for choice in product(*values.values()):
        yield {"decoding": name, **dict(zip(values, choice, strict=True))}


def acceptance_key(plan: Plan) -> str:
    """What an acceptance is of: all that says how tokens are proposed, `ngram match=2`, but how many where fewer are
    proposed as they would be among more."""
    strategy, plain = STRATEGIES[plan.decoding], Plan()
    if plan.commit == TYPICAL or plan.refine != REFINES[0]:  # what follows depends on all that was proposed
        told: tuple[str, ...] = ()
    else:
        told = strategy.told or (("speculate",) if strategy.nested else ())
    names = [axis for axis in strategy.axes if axis not in told]
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
        if axis == "tree":
            found.append(_tree(plan, True))
        elif isinstance(value, int) and value < 1:
            found.append(f"{axis} must be at least 1 with decoding {plan.decoding} (found {value}; nearest 1)")
    if plan.match > LONGEST:
        found.append(f"match must be at most {LONGEST} (found {plan.match}; nearest {LONGEST})")
    if plan.refine not in REFINES:
        found.append(f"refine {plan.refine!r} is unknown (nearest {nearest_name(plan.refine, REFINES) or REFINES[0]})")
    elif plan.refine != REFINES[0] and plan.tree:
        found.append(f"refine {plan.refine} needs tokens in a row (found tree {plan.tree!r}; nearest '')")
    if plan.commit not in RULES:
        found.append(f"commit {plan.commit!r} is unknown (nearest {nearest_name(plan.commit, RULES) or MATCH})")
    elif "commit" in strategy.axes and plan.commit not in strategy.commits:
        rules = " or ".join(strategy.commits)
        found.append(f"commit must be {rules} with decoding {plan.decoding} (found {plan.commit}; nearest {MATCH})")
    elif plan.commit == REJECTION and not workload.temperature:
        found.append(
            f"commit {REJECTION} needs drawn tokens: [workload] temperature above 0 (found 0; nearest {MATCH})"
        )
    if strategy.draft:
        found += _draft(plan, model, workload)
    drafts = workload.draft if strategy.draft else model
    return found + (_masks(plan, drafts, ahead=not strategy.draft) if strategy.masks and drafts else [])


def _tree(plan: Plan, deep: bool) -> str | None:
    """What is wrong with a plan's own tree, and where `deep` with how deep the plan takes it to be."""
    if not plan.tree:
        return None
    try:
        tree = Tree.parse(plan.tree)
    except UsageError as error:
        problem = error.problems[0]
        return f"tree {plan.tree!r}: {problem.key} must be {problem.expected} (found {problem.found})"
    if tree.size > LARGEST:
        return f"tree must have at most {LARGEST} nodes (found {tree.size})"
    if deep and tree.depth != plan.speculate:
        return f"speculate must be the depth of tree (found {plan.speculate}; nearest {tree.depth})"
    return None


def _masks(plan: Plan, model: ModelSpec, ahead: bool) -> list[str | None]:
    """What is wrong with the mask tokens of who proposes. `ahead`: the first token that is proposed is a mask's too."""
    if not model.masks:
        who = "a draft with mask tokens" if STRATEGIES[plan.decoding].draft else "a model with mask tokens"
        near = STRATEGIES[plan.decoding].maskless
        how = "parallel_draft in the config that it was trained with"
        return [f"decoding {plan.decoding} needs {who}: {how} (found none in {model.name}; nearest decoding {near})"]
    most = model.drafts - ahead
    if plan.speculate <= most:
        return []
    what = "the places of its masks" if ahead else f"the tokens that {model.name} drafts at once"
    return [f"speculate must be at most {most}, {what} (found {plan.speculate}; nearest {most})"]


def _draft(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    """What is wrong with the model that proposes."""
    draft, name, heads = workload.draft, plan.decoding, reads_rows(plan)
    if draft is None:
        what = "heads" if heads else "a draft model"
        return [f"decoding {name} needs {what}: a [draft] section in the recipe"]
    if isinstance(draft, HeadsSpec) != heads:
        nearest = STRATEGIES[name].swapped
        return [f"decoding {name} cannot use what [draft] names (found {draft.architecture}; nearest {nearest})"]
    found: list[str | None] = []
    if isinstance(draft, HeadsSpec):
        if draft.hidden != model.hidden:
            who = f"{draft.hidden} of {draft.name}"
            found.append(f"the heads' hidden_size must be the model's {model.hidden} (found {who})")
        if plan.speculate > draft.count:
            found.append(f"speculate must be at most the {draft.count} heads (found {plan.speculate})")
        if not _tree(plan, False) and (ranks := max(tree_of(plan).ranks, default=0)) >= draft.vocab:
            found.append(f"tree has more siblings than the vocabulary of {draft.vocab} (found {ranks + 1})")
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
    of_key = [one for one in workload.acceptance if one.key == key]
    known = max((len(one.rates) for one in of_key), default=0)
    how = "`autotune profile --acceptance RECIPE` measures it"
    if known >= plan.speculate:
        enough = plan.commit == TYPICAL or tree_of(plan).chain or not STRATEGIES[plan.decoding].told
        if enough or any(one.ranks for one in of_key):
            return None
        return f"a tree needs the acceptance of {key!r} by rank (found by position alone; {how})"
    tokens = f"of {plan.speculate} tokens, known of {known}" if known else "which is not known"
    return f"decoding {plan.decoding} needs the acceptance of {key!r} (found {tokens}; {how})"
