"""How likely heads held what came: measured, replayed for any tree, and what a search makes of it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch

from autotune.cli._acceptance import spread
from autotune.planners.decoding import growth
from autotune.planners.decoding.ranks import BEYOND, DIGITS, places, replayed, table, trees, word
from autotune.planners.decoding.strategies import acceptance_key, unknown, variants
from autotune.planners.decoding.trees import Tree
from autotune.planners.feasible import why_not
from autotune.planners.predict_generation import rates, rounds
from autotune.planners.search import search
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.runners.decoding.ranked import rank_of
from autotune.runners.judge import Oracle
from autotune.runners.reference import reference_logits
from autotune.spec.graph import blocks
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Acceptance
from tests.fitted import fitted, heads_of, loaded
from tests.pool import Pool
from tests.tasks import random_prompts
from tests.test_answers import LENGTHS, expected
from tests.test_generation import MODELS, WORK, lively

LONG = replace(WORK, new_tokens=24, draft=heads_of(MODELS["llama"]))
TREES = ("0,0,1,1,2,3", "0,0,0,1,2,4,4", "0,1,1,1,2")


@lru_cache
def known_heads() -> dict[str, torch.Tensor]:
    whole, answers = random_prompts(WORK, MODELS["llama"].vocab), expected("llama", WORK)
    texts = [whole[row, :length].tolist() + answers[row] for row, length in enumerate(LENGTHS)]
    return dict(fitted(MODELS["llama"], lively(MODELS["llama"], "fp64"), texts, 3))


def made_up(seed: int, texts: int, long: int, heads: int) -> tuple[str, ...]:
    """Ranks of texts in which some places are easy for all heads, and others for none."""
    draw = random.Random(seed)
    found = []
    for _ in range(texts):
        easy = [draw.choice((0.2, 0.9)) for _ in range(long)]
        at = [[int(draw.expovariate(1.0) / share) for _ in range(heads)] for share in easy]
        found.append("".join(map(word, at)))
    return tuple(found)


def test_rounds_of_any_tree_are_replayed_from_one_measurement(pool: Pool) -> None:
    """What real rounds commit is what the ranks of a generation in rows say of the tree, round by round."""
    row = Plan(decoding="heads", speculate=3, attention="math")
    plans = [row, *(row.altered(speculate=Tree.parse(text).depth, tree=text) for text in TREES)]
    ran = [
        pool.run("ranked", 1, plan=plan, model=MODELS["llama"], workload=LONG, heads=known_heads())[0] for plan in plans
    ]
    ranks = ran[0][1]
    assert all(again == ranks for _, again in ran), "whatever is proposed"
    kept = 0
    for plan, (taken, _) in zip(plans, ran, strict=True):
        tree = Tree.parse(plan.tree) if plan.tree else Tree.chain_of(3)
        for text, real in zip(ranks, taken, strict=True):
            said = replayed(text, 3, tree)
            assert said and list(said) == real[: len(said)]
            kept += sum(said) - len(said)
    assert kept > 20, "some of what is proposed is kept"
    assert any(digit in text for text in ranks for digit in "123"), "and some of it as a second choice"


def test_logits_of_a_tree_are_those_of_each_path_as_a_text(pool: Pool) -> None:
    """Every node of every round: what the masked pass says after it is what its path says, run by itself."""
    tree = Tree.parse(TREES[1])
    plan = Plan(decoding="heads", speculate=tree.depth, tree=tree.text, attention="math")
    (rounds,) = pool.run("verified", 1, plan=plan, model=MODELS["llama"], workload=LONG, heads=known_heads())
    weights, compared = lively(MODELS["llama"], "fp64"), 0
    assert len(rounds) > 8
    for texts, slates, logits in rounds[::3]:
        for row in (0, 5):
            for node in range(tree.size + 1):
                path = [slates[row][at] for at in tree.path(node)]
                alone = reference_logits(MODELS["llama"], weights, torch.tensor([texts[row] + path]))[0, -1]
                assert torch.allclose(logits[row, node], alone, rtol=0, atol=1e-9)
                compared += 1
    assert compared >= 48


def blockwise(oracle: Oracle, prompt: list[int], new_tokens: int, heads: int) -> tuple[list[int], list[int]]:
    """Blockwise parallel decoding as its paper has it (Stern et al., 1811.03115, 3): predict, verify, accept. The
    answer, and what each iteration after the first token accepted."""
    text, taken = [*prompt, oracle.choose(prompt)[0]], list[int]()
    while len(text) - len(prompt) < new_tokens:
        block = [ranked[0][0] for ranked in oracle.ranked(text)][:heads]
        accepted = 0
        while accepted < heads and oracle.choose(text + block[:accepted])[0] == block[accepted]:
            accepted += 1
        text += [*block[:accepted], oracle.choose(text + block[:accepted])[0]]
        taken.append(accepted + 1)
    return text[len(prompt) :][:new_tokens], taken


def test_iterations_are_those_of_blockwise_decoding_in_plain_python(pool: Pool) -> None:
    plan, model = Plan(decoding="heads", speculate=3, attention="math"), MODELS["llama"]
    (ran,) = pool.run("answer", 1, plan=plan, model=model, workload=LONG, lengths=LENGTHS, heads=known_heads())
    whole, weights, heads = random_prompts(LONG, model.vocab), lively(model, "fp64"), heads_of(model)
    own = {(b.index, w.name): loaded(known_heads(), w, torch.float64) for b in blocks(heads) for w in b.weights()}
    for row in (0, 3, 6):
        prompt = whole[row, : LENGTHS[row]].tolist()
        oracle = Oracle(model, weights, heads, own, LONG, torch.zeros(LONG.new_tokens), len(prompt))
        answer, taken = blockwise(oracle, prompt, LONG.new_tokens, 3)
        assert ran[0][row] == answer
        assert [count for count in ran[1][row] if count] == taken
        assert len(taken) < LONG.new_tokens


def test_a_rank_is_the_place_in_the_order_of_proposals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).expand(4, -1)
    assert rank_of(logits, torch.arange(4)).tolist() == [3, 0, 1, 2]


def test_replaying_by_hand() -> None:
    text = "".join(map(word, [(0, 1), (1, 0), (0, 0), (20, 0), (1, 1), (0, 0)]))
    assert list(places(text, 2))[3] == f"{BEYOND}0"
    assert replayed(text, 2, Tree.parse("0,1")) == (2, 3, 3)  # places 0, 2 and 5
    assert replayed(text, 2, Tree.parse("0,0,1,1,2")) == (3, 1, 2)  # places 0, 3 and 4
    assert replayed(text, 2, Tree.parse("")) == (1,) * 6


def test_the_table_is_the_shares_of_places() -> None:
    texts = made_up(1, 3, 50, 4)
    every = [place for text in texts for place in places(text, 4)]
    for head, row in enumerate(table(texts, 4)):
        assert len(row) == len(DIGITS)
        for rank, share in enumerate(row):
            assert share == pytest.approx(sum(place[head] == DIGITS[rank] for place in every) / len(every))


def test_planned_trees_commit_more_than_rows_and_larger_ones_more_than_smaller() -> None:
    texts = made_up(2, 8, 400, 4)

    def mean(tree: Tree) -> float:
        rounds = [count for text in texts for count in replayed(text, 4, tree)]
        return sum(rounds) / len(rounds)

    planned = list(trees(texts, 4, (4,)))
    assert [tree.size for tree in planned] == sorted(tree.size for tree in planned) and planned
    for small, large in pairwise(planned):
        assert mean(small) < mean(large)
    assert mean(planned[-1]) > mean(Tree.chain_of(4)) + 0.3
    # Heads that are right together commit more than as many independent ones would.
    rows = [growth.falling(row) for row in table(texts, 4)]
    assert mean(planned[-1]) != pytest.approx(growth.expected(planned[-1], rows), rel=1e-3)


def test_a_search_tries_the_trees_that_ranks_ask_for_and_takes_the_fastest() -> None:
    profile = load_profile(shipped()["h200-sxm"])
    model = replace(MODELS["llama"], hidden=512, layers=8, heads=8, kv_heads=8, head_dim=64, ffn=1536, vocab=256)
    ranks = made_up(3, 8, 200, 4)
    told = Acceptance("heads", (0.5, 0.4, 0.4, 0.4), "measured", ((2,),), ranks)
    draft = replace(heads_of(model, 4), vocab=256, hidden=512)
    work = replace(WORK, prompt_length=128, new_tokens=128, batch=1, precision="bf16", draft=draft, acceptance=(told,))
    tried = [Plan().altered(**choice) for choice in variants("heads", work, {})]
    assert {plan.tree for plan in tried} > {""} and {plan.speculate for plan in tried} == {1, 2, 3, 4}
    assert all(why_not(model, work, plan) is None for plan in tried)
    assert all((acceptance_key(plan) == "heads") == (plan.refine == "none") for plan in tried)
    axes: dict[str, tuple[object, ...]] = {"decoding": ("plain", "heads"), "attention": ("sdpa",)}
    found = search(Question(model, work, profile, 1, axes=axes, minimize="step_time"))
    best = min((found_.step_s, found_.plan.describe()) for found_ in found.ranking if found_.plan.decoding == "heads")
    assert found.best is not None and found.best.plan.decoding == "heads" and found.best.step_s == best[0]
    assert found.best.plan.tree, "a pass over a few tokens takes as long as one over one: branches pay"
    fixed = list(variants("heads", work, {"tree": ("0,0,1",)}))
    assert [(choice["speculate"], choice["tree"], choice["refine"]) for choice in fixed] == [(2, "0,0,1", "none")]


def test_a_tree_is_priced_by_ranks_alone() -> None:
    plan = Plan(decoding="heads", speculate=2, tree="0,0,1,2")
    by_word = replace(LONG, acceptance=(Acceptance("heads", (0.5, 0.5, 0.5)),))
    reason = unknown(plan, by_word)
    assert reason is not None and "by rank" in reason
    assert unknown(plan.altered(tree=""), by_word) is None
    ranks = made_up(4, 4, 100, 3)
    by_rank = replace(LONG, batch=1, acceptance=(Acceptance("heads", (0.5,) * 3, "measured", ((1,),), ranks),))
    assert unknown(plan, by_rank) is None
    counts = [count for text in ranks for count in replayed(text, 3, Tree.parse(plan.tree))]
    a, b = rates(plan, by_rank)
    assert 1 + a + a * b == pytest.approx(sum(counts) / len(counts))
    texts = [replayed(text, 3, Tree.parse(plan.tree)) for text in ranks]
    mean = sum(23 * len(text) / sum(text) for text in texts) / 4
    assert rounds(plan, by_rank) == pytest.approx(mean)
    assert rounds(plan, replace(by_rank, batch=4)) > mean, "a batch waits for its slowest"


def test_a_mean_is_told_with_its_confidence_over_texts() -> None:
    """Of texts alike nothing is uncertain; of many drawn ones as many means lie within as it says."""
    assert spread(((2, 2), (2, 2, 2))) == 0.0 == spread(((3, 1),))
    draw, within = random.Random(5), 0
    for _ in range(300):
        texts = []
        for _ in range(40):
            easy = draw.choice((0.3, 0.8))  # texts differ
            texts.append(tuple(1 + (draw.random() < easy) for _ in range(draw.randint(20, 40))))
        mean = sum(map(sum, texts)) / sum(map(len, texts))
        within += abs(mean - 1.55) <= spread(texts)
    assert 0.9 < within / 300 < 0.985
