"""Typical acceptance: what it keeps, the same answers as an emulation in one process, its label and its drift."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import exp, log
from pathlib import Path

import pytest
import torch

from autotune.planners.decoding.strategies import acceptance_key, variants
from autotune.planners.decoding.trees import Tree
from autotune.planners.feasible import why_not
from autotune.runners.decoding.reference import typical
from autotune.runners.decoding.typical import Typical, least
from autotune.runners.drift import drift
from autotune.runners.judge import Oracle
from autotune.runners.reference import reference_logits
from autotune.runners.sampling import draws
from autotune.spec.graph import blocks
from autotune.spec.plan import TYPICAL, Plan
from autotune.spec.recipe import load_recipe
from autotune.spec.workload import Acceptance, Workload
from tests.fitted import loaded
from tests.pool import Pool
from tests.recipes import RECIPE
from tests.tasks import random_prompts
from tests.test_answers import LENGTHS, SAMPLED, expected
from tests.test_decoding import fitted_to
from tests.test_generation import MODELS, WORK, lively
from tests.test_ranks import LONG

MODEL = MODELS["llama"]
ROW = Plan(decoding="heads", speculate=3, commit=TYPICAL, attention="math")
TREE = ROW.altered(speculate=2, tree="0,0,0,1,1,2")
GREEDY = replace(LONG, new_tokens=6, typical_epsilon=0.02, typical_delta=0.1)
DRAWN = replace(GREEDY, temperature=0.8, top_k=SAMPLED.top_k, top_p=SAMPLED.top_p)
MESHES = (Plan(), Plan(data=2), Plan(tensor=2), Plan(pipeline=2), Plan(tensor=2, pipeline=2))
CASES = [
    (shape.altered(data=mesh.data, tensor=mesh.tensor, pipeline=mesh.pipeline), work)
    for shape in (ROW, TREE)
    for number, mesh in enumerate(MESHES)
    for work in ((GREEDY, DRAWN) if number in (0, 4) else (GREEDY,))
]


@lru_cache
def emulated(parents: tuple[int, ...], work: Workload) -> list[list[int]]:
    """The answers by the emulation; none of its decisions may hang on a rounding."""
    assert work.draft is not None
    whole, known = random_prompts(work, MODEL.vocab), fitted_to("llama", WORK)
    own = {(b.index, w.name): loaded(known, w, torch.float64) for b in blocks(work.draft) for w in b.weights()}
    found, numbers = [], draws(3, 0, work.batch, work.new_tokens)
    for row, length in enumerate(LENGTHS):
        prompt = whole[row, :length].tolist()
        oracle = Oracle(MODEL, lively(MODEL, "fp64"), work.draft, own, work, numbers[row], length)  # type: ignore[arg-type]
        answer, slack = typical(
            oracle.chances,
            oracle.choose,
            oracle.ranked,
            prompt,
            work.new_tokens,
            parents,
            work.typical_epsilon,
            work.typical_delta,
        )
        assert min(slack) > 1e-9
        found.append(answer)
    return found


@pytest.mark.parametrize(
    ("plan", "work"), CASES, ids=lambda case: case.describe() if isinstance(case, Plan) else str(case.temperature)
)
def test_answers_are_the_emulations(pool: Pool, plan: Plan, work: Workload) -> None:
    tree = Tree.parse(plan.tree) if plan.tree else Tree.chain_of(plan.speculate)
    heads = fitted_to("llama", WORK)
    runs = pool.run("answer", plan.world, plan=plan, model=MODEL, workload=work, lengths=LENGTHS, heads=heads)
    wanted = emulated(tree.parents, work)
    for answers, taken in runs:
        assert answers == wanted
        for row in taken:
            assert max(row) <= 1 + plan.speculate


def test_answers_are_other_ones_than_plain_decodings() -> None:
    """Otherwise the cases above would say nothing."""
    plain = expected("llama", WORK)
    for parents in ((0, 1, 2), (0, 0, 0, 1, 1, 2)):
        assert sum(a != b for a, b in zip(emulated(parents, GREEDY), plain, strict=True)) >= 2


def test_what_is_kept_by_hand() -> None:
    """One text, a tree of two first tokens of which only the second has a token that may follow."""
    tree = Tree.parse("0,0,1,2,2")
    p = torch.tensor(
        [
            [0.50, 0.30, 0.19, 0.01],  # after the root: tokens 1 and 2 are proposed
            [0.01, 0.97, 0.01, 0.01],  # after 1: 0 is proposed
            [0.25, 0.25, 0.25, 0.25],  # after 2: 3 and 0 are
            [0.70, 0.10, 0.10, 0.10],
            [0.10, 0.10, 0.10, 0.70],
            [0.10, 0.70, 0.10, 0.10],
        ],
        dtype=torch.float64,
    )
    slate, choices = torch.tensor([[3, 1, 2, 0, 3, 0]]), p.argmax(dim=1)[None]
    work = Workload("generate", typical_epsilon=0.25, typical_delta=0.9)
    bound = least(p.log(), work)
    entropy = -sum(share * log(share) for share in p[0].tolist())
    assert float(bound[0]) == pytest.approx(min(0.25, 0.9 * exp(-entropy)))
    assert float(bound[2]) == pytest.approx(0.9 * 0.25)
    news = Typical.of(tree, work, torch.device("cpu")).commit(slate, choices, p.log())
    # Token 1 passes and 2 does not (0.19 < 0.25): of 1's child nothing is left, so 1 and what follows it are committed.
    assert float(bound[0]) == 0.25 and news.tolist() == [[2, 1, 1, news[0, 3], 1, 0]]
    eased = replace(work, typical_epsilon=0.18)
    news = Typical.of(tree, eased, torch.device("cpu")).commit(slate, choices, p.log())
    # Both of 2's children do, equally likely: the first. After 3 comes the likeliest, 3.
    assert news.tolist() == [[3, 2, 3, 3, 2, 4]]
    none = replace(work, typical_epsilon=0.6, typical_delta=3.0)
    assert Typical.of(tree, none, torch.device("cpu")).commit(slate, choices, p.log())[0, :2].tolist() == [1, 0]


def test_a_certain_token_has_no_entropy() -> None:
    """A token that cannot come is no NaN."""
    log_p = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert float(least(log_p, Workload("generate"))) == pytest.approx(0.09)


def test_drift_by_hand() -> None:
    weights = lively(MODEL, "fp64")
    prompts, plain, ours = [[1, 2, 3], [4, 5]], [[6, 7, 8], [9, 10, 11]], [[6, 7, 8], [9, 12, 11]]
    found = drift(MODEL, weights, prompts, ours, plain, torch.float64)
    assert (found.answers, found.differing, found.equal, found.first) == (2, 1, pytest.approx(5 / 6), 1.0)
    total = 0.0
    for prompt, answer in zip(prompts, ours, strict=True):
        for at, token in enumerate(answer):
            text = torch.tensor([[*prompt, *answer[:at]]])
            total += float(reference_logits(MODEL, weights, text)[0, -1].log_softmax(-1)[token]) / 6
    assert found.log_p == pytest.approx(total) and found.plain_log_p != pytest.approx(total)
    same = drift(MODEL, weights, prompts, plain, plain, torch.float64)
    assert (same.differing, same.equal, same.first, same.log_p) == (0, 1.0, 3.0, same.plain_log_p)


def test_it_says_that_it_changes_results_and_is_never_tried_unasked() -> None:
    assert ROW.changes and "(changes results)" in ROW.describe()
    assert not Plan().changes and "changes" not in ROW.altered(commit="match").describe()
    told = Acceptance("heads", (0.5, 0.5, 0.5), "measured", (), ("012" * 40,))
    for work in (GREEDY, DRAWN):
        known = replace(work, acceptance=(told,))
        assert all(choice["commit"] == "match" for choice in variants("heads", known, {}))
        asked = list(variants("heads", known, {"commit": (TYPICAL,), "tree": ("0,0,1",)}))
        assert [(choice["commit"], choice["speculate"]) for choice in asked] == [(TYPICAL, 2)]
    # What is committed depends on the tree: an acceptance is of its own alone.
    assert acceptance_key(TREE) == "heads speculate=2 tree=0,0,0,1,1,2 commit=typical"
    assert acceptance_key(TREE.altered(commit="match")) == "heads"


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (
            {"commit": "rejection"},
            "commit must be match or typical with decoding heads (found rejection;",
        ),
        ({"commit": "typicl"}, "commit 'typicl' is unknown (nearest typical)"),
    ],
)
def test_other_rules_are_refused(axes: dict[str, object], said: str) -> None:
    reason = why_not(MODEL, DRAWN, ROW.altered(**axes))
    assert reason is not None and said in reason
    draft = Plan(decoding="draft", speculate=2, commit=TYPICAL)
    reason = why_not(MODEL, replace(DRAWN, draft=MODEL), draft)
    assert reason is not None and "commit must be match or rejection with decoding draft (found typical" in reason


def test_what_is_typical_is_part_of_a_recipe_only_where_it_is_said(tmp_path: Path) -> None:
    """A lock of before the keys were there still answers its recipe."""
    text = RECIPE.split("[workload]")[0] + '[workload]\nkind = "generate"\nprompt_length = 8\nnew_tokens = 8\n'
    (tmp_path / "r.toml").write_text(text)
    plain, said, other = (
        load_recipe(tmp_path / "r.toml", given, environ={})
        for given in ((), ("workload.typical_delta=0.3",), ("workload.typical_delta=0.4",))
    )
    assert plain.digest == said.digest != other.digest
    assert other.workload_spec().typical_delta == 0.4
