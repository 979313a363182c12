"""Every strategy gives what decoding a token at a time gives, whoever proposes and under whichever plan; and commits as
many tokens at a time as it says."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import pytest
import torch

from autotune.planners.decoding.rounds import replayed
from autotune.planners.decoding.strategies import STRATEGIES, scored
from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import lower_generation
from autotune.planners.predict_generation import rounds as rounds_of
from autotune.planners.resolve import resolve
from autotune.planners.validate import validate
from autotune.runners.decoding.propose import DRAFTERS, PROPOSERS
from autotune.spec.model import ModelSpec
from autotune.spec.plan import FUSED, PLAIN, Plan
from autotune.spec.workload import Acceptance, Workload
from tests.fitted import fitted, heads_of
from tests.pool import Pool
from tests.tasks import random_prompts
from tests.test_answers import LENGTHS, SAMPLED, expected
from tests.test_generation import MODELS, WORK, lively

# One line a strategy, and one more for each of its axes: a new one joins by being in the table.
SHAPES = {
    "ngram": (
        Plan(decoding="ngram", speculate=3, match=1),
        Plan(decoding="ngram", speculate=2, match=1, branches=3),
    ),
    "lookahead": (Plan(decoding="lookahead", speculate=2, branches=3, window=4),),
    "jacobi": (Plan(decoding="jacobi", speculate=4),),
    "draft": (Plan(decoding="draft", speculate=1), Plan(decoding="draft", speculate=3)),
    "parallel": (Plan(decoding="parallel", speculate=2), Plan(decoding="parallel", speculate=4)),
    "masks": (Plan(decoding="masks", speculate=1), Plan(decoding="masks", speculate=3)),
    "heads": (
        Plan(decoding="heads", speculate=3),
        Plan(decoding="heads", speculate=2, tree="0,0,1,0,1,2"),
        Plan(decoding="heads", speculate=3, refine="ngram"),
    ),
}
# Of the target's own shape: with a mask for all places (PARD), with one for each (ParallelSpec).
SHARED, OWN = (replace(MODELS["llama"], drafts=4, masks=masks) for masks in (1, 3))
WITH_WEIGHTS = [name for name, strategy in STRATEGIES.items() if strategy.draft]
MESHES = (Plan(), Plan(data=2), Plan(tensor=2), Plan(pipeline=2), Plan(tensor=2, pipeline=2), Plan(pipeline=4))
CASES = [
    (shape.altered(data=mesh.data, tensor=mesh.tensor, pipeline=mesh.pipeline, attention="math"), work)
    for shapes in SHAPES.values()
    for number, shape in enumerate(shapes)
    for index, mesh in enumerate(MESHES)
    for work in (WORK, SAMPLED)[: 2 if index in (0, 4) else 1]
]


def proposing(plan: Plan, name: str) -> ModelSpec | None:
    """What proposes to a model: itself, with mask tokens where these are needed, or heads of it."""
    if plan.decoding not in WITH_WEIGHTS:
        return None
    if plan.decoding == "parallel":
        return OWN if plan.speculate == 4 else SHARED
    return heads_of(MODELS[name]) if plan.decoding == "heads" else MODELS[name]


@lru_cache
def fitted_to(name: str, work: Workload) -> dict[str, torch.Tensor]:
    """Projections of three heads that know most of what half of the answers go on with."""
    model, whole = MODELS[name], random_prompts(work, MODELS[name].vocab)
    answers = expected(name, work)
    texts = [whole[row, :length].tolist() + answers[row] for row, length in enumerate(LENGTHS)]
    return dict(fitted(model, lively(model, "fp64"), [text for text in texts if len(text) > 8], 3))


def test_every_strategy_is_tested_and_proposes() -> None:
    assert {PLAIN, *SHAPES} == set(STRATEGIES) == {*PROPOSERS, *DRAFTERS}


@pytest.mark.parametrize(
    ("plan", "work"), CASES, ids=lambda case: case.describe() if isinstance(case, Plan) else str(case.temperature)
)
def test_answers_are_those_of_plain_decoding(pool: Pool, plan: Plan, work: Workload) -> None:
    name = "window" if plan.speculate == 3 and plan.decoding not in WITH_WEIGHTS else "llama"
    given, model = replace(work, draft=proposing(plan, name)), MODELS[name]
    model = replace(model, drafts=4, masks=3) if plan.decoding == "masks" else model  # which no token of a text meets
    heads = fitted_to(name, work) if plan.decoding == "heads" else None
    runs = pool.run(
        "answer",
        plan.world,
        plan=plan,
        model=model,
        workload=given,
        lengths=LENGTHS,
        noise=0.02,
        heads=heads,
    )
    for answers, taken in runs:
        assert answers == expected(name, work)
        for row in taken:
            assert sum(row) >= WORK.new_tokens - 1 and max(row) <= 1 + plan.speculate
    if plan.decoding in WITH_WEIGHTS:  # some of what it proposes is kept, and not all
        kept = [n - 1 for row in runs[0][1] for n in row if n]
        assert 0 < sum(kept) < plan.speculate * len(kept)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_that_is_the_target_is_always_right(pool: Pool, temperature: float) -> None:
    plan = Plan(decoding="draft", speculate=2)
    work = replace(WORK, draft=MODELS["llama"], temperature=temperature)
    ((answers, taken),) = pool.run("answer", 1, plan=plan, model=MODELS["llama"], workload=work, lengths=LENGTHS)
    assert all(row == [3, 3] for row in taken)  # the first token comes from the prompt's pass
    if not temperature:
        assert answers == expected("llama", WORK)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_programs_are_sound(shapes: tuple[Plan, ...]) -> None:
    for mesh in MESHES:
        for shape in shapes:
            plan = shape.altered(data=mesh.data, tensor=mesh.tensor, pipeline=mesh.pipeline)
            work = replace(WORK, draft=proposing(plan, "llama"))
            assert why_not(OWN, work, plan) is None
            new = scored(plan)
            for sizes in ((7, 7), (new, 9 + new)):
                program = expand(lower_generation(plan, OWN, work, *sizes), plan)
                validate(program)
                resolve(program, inline=True)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"decoding": "ngrams", "speculate": 2}, "decoding 'ngrams' is unknown (nearest ngram)"),
        ({"speculate": 2}, "speculate has no meaning with decoding plain (found 2; nearest 0)"),
        ({"decoding": "jacobi"}, "speculate must be at least 1 with decoding jacobi (found 0; nearest 1)"),
        ({"decoding": "ngram", "speculate": 2}, "match must be at least 1 with decoding ngram (found 0; nearest 1)"),
        ({"decoding": "jacobi", "speculate": 2, "branches": 2}, "branches has no meaning with decoding jacobi"),
        ({"decoding": "draft", "speculate": 2}, "needs a draft model: a [draft] section in the recipe"),
        ({"decoding": "ngram", "speculate": 2, "match": 99}, "match must be at most 16"),
        ({"decoding": "jacobi", "speculate": 2, "commit": "rejection"}, "commit has no meaning with decoding jacobi"),
    ],
)
def test_what_cannot_decode_is_refused(axes: dict[str, object], said: str) -> None:
    reason = why_not(MODELS["llama"], WORK, Plan().altered(**axes))
    assert reason is not None and said in reason


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    draft = replace(MODELS["llama"], vocab=260)
    plan = Plan(decoding="draft", speculate=2)
    reason = why_not(MODELS["llama"], replace(WORK, draft=draft), plan)
    assert reason is not None and "the model's 272 (found 260 of tiny-llama)" in reason
    reason = why_not(MODELS["llama"], replace(WORK, draft=MODELS["llama"]), plan.altered(commit="rejection"))
    assert reason is not None and "[workload] temperature above 0" in reason


@pytest.mark.parametrize(
    ("axes", "changes", "said"),
    [
        ({}, {"hidden": 20}, "the heads' hidden_size must be the model's 16 (found 20 of heads-of-tiny-llama)"),
        ({}, {"vocab": 260}, "vocabulary must be the model's 272 (found 260 of heads-of-tiny-llama)"),
        ({"speculate": 4}, {}, "speculate must be at most the 3 heads (found 4)"),
        ({"tree": "0,2"}, {}, 'parent of node 2 must be the number of an earlier node, 0 to 1 (found "2")'),
        ({"tree": "0,0,1", "refine": "ngram"}, {}, "refine ngram needs tokens in a row (found tree '0,0,1'"),
        ({"refine": "ngrm"}, {}, "refine 'ngrm' is unknown (nearest ngram)"),
        ({"tree": "0,1,2"}, {}, "speculate must be the depth of tree (found 2; nearest 3)"),
        ({"decoding": "draft"}, {}, "decoding draft cannot use what [draft] names (found MedusaHeads; nearest heads)"),
    ],
)
def test_heads_that_do_not_fit_are_refused(axes: dict[str, object], changes: dict[str, int], said: str) -> None:
    heads = replace(heads_of(MODELS["llama"]), **changes)  # type: ignore[arg-type]
    plan = Plan(decoding="heads", speculate=2).altered(**axes)
    reason = why_not(MODELS["llama"], replace(WORK, draft=heads), plan)
    assert reason is not None and said in reason
    reason = why_not(MODELS["llama"], replace(WORK, draft=MODELS["llama"]), Plan(decoding="heads", speculate=2))
    assert reason is not None and "(found LlamaForCausalLM; nearest draft)" in reason


@pytest.mark.parametrize("mesh", [Plan(prompt_chunk=3), Plan(prompt_chunk=2, pipeline=2), Plan(kernels=FUSED)])
def test_heads_read_the_rows_of_any_pass(pool: Pool, mesh: Plan) -> None:
    """Of a prompt that is read in parts, and of joined kernels."""
    plan = mesh.altered(decoding="heads", speculate=2, tree="0,0,1,2", attention="math")
    work, heads = replace(WORK, draft=heads_of(MODELS["llama"])), fitted_to("llama", WORK)
    runs = pool.run("answer", plan.world, plan=plan, model=MODELS["llama"], workload=work, lengths=LENGTHS, heads=heads)
    plain = pool.run(
        "answer",
        1,
        plan=Plan(decoding="heads", speculate=2, tree="0,0,1,2", attention="math"),
        model=MODELS["llama"],
        workload=work,
        lengths=LENGTHS,
        heads=heads,
    )
    for answers, taken in runs:
        assert answers == expected("llama", WORK) and taken == plain[0][1]


def test_lookup_by_hand() -> None:
    from autotune.runners.decoding.ngram import lookup

    text = torch.tensor([[1, 2, 3, 4, 1, 2, 5, 1, 2, 0, 0, 0], [7, 8, 9, 7, 8, 9, 7, 3, 3, 3, 3, 3]])
    filled = torch.tensor([8, 6])
    # The latest place of "1 2" goes on with 5 1 2; the other one with 3.
    assert lookup(text, filled, 3, 1, 2)[0].tolist() == [5, 1, 2]
    assert lookup(text, filled, 2, 2, 2)[0].tolist() == [5, 1, 3, 4]
    # "7 8 9 7" is the longest: what follows runs into the end of the text, and goes on as it began.
    assert lookup(text, filled, 6, 1, 2)[1].tolist() == [8, 9, 7, 8, 9, 7]


def test_shorter_rounds_replayed_from_longer_ones() -> None:
    """Of a text of which it is known which tokens would be proposed right, for any number of proposals a round."""
    generator = torch.Generator().manual_seed(5)

    def rounds(right: list[bool], most: int) -> list[int]:
        found, at = [], 0
        while at < len(right):
            count = 1
            while count < most and at + count < len(right) and right[at + count - 1]:
                count += 1
            found.append(count)
            at += count
        return found

    for share in (0.3, 0.7):
        right = (torch.rand(2000, generator=generator) < share).tolist()
        runs = max(len(list(group)) for value, group in groupby(right) if value)
        trace = rounds(right, runs + 2)  # so long that no round is kept whole: every token's fate is known
        for most in (2, 4, 7):
            assert replayed(trace, runs + 2, most) == tuple(rounds(right, most))
        assert replayed(trace, runs + 2, runs + 2) == tuple(trace)
        assert sum(replayed(rounds(right, 4), 4, 2)) == 2000


def test_a_batch_waits_for_its_slowest() -> None:
    known = Acceptance("ngram match=1", (0.5, 0.5), "measured", ((1, 1, 1, 1), (3, 1), (2, 2)))
    plan, work = Plan(decoding="ngram", speculate=2, match=1), replace(WORK, new_tokens=9, acceptance=(known,))
    # 8 tokens after the first: 8, 4 and 4 rounds.
    assert rounds_of(plan, replace(work, batch=1)) == pytest.approx(16 / 3)
    assert rounds_of(plan, replace(work, batch=2)) == pytest.approx(8 * 5 / 9 + 4 * 4 / 9)
    assert rounds_of(plan.altered(speculate=1), replace(work, batch=1)) == pytest.approx((8 + 4 + 4) / 3)
    told = replace(work, batch=1, acceptance=(Acceptance("ngram match=1", (1.0, 1.0)),))
    assert rounds_of(plan, told) == 3 and rounds_of(Plan(), told) == 8
