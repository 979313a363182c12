"""Speculative decoding in numbers: closed forms, brute force over small trees, simulations with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil, sqrt
from random import Random
from time import process_time
from typing import Any

import numpy as np
import pytest

from autotune.planners.decoding import chains, growth, rounds, sequoia, states
from autotune.planners.decoding.choose import Choice, Costs, choose_chain, choose_tree
from autotune.planners.decoding.trees import Scored, Tree
from autotune.spec.errors import UsageError

COSTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
BEST = {  # acceptance -> best length / speedup for each of COSTS
    0.3: "3/1.38 3/1.34 2/1.26 1/1.18 1/1.08 0/1.00 0/1.00",
    0.5: "5/1.88 4/1.79 3/1.63 2/1.46 1/1.25 1/1.15 0/1.00",
    0.6: "7/2.30 6/2.17 4/1.92 3/1.67 2/1.40 1/1.23 1/1.07",
    0.7: "9/2.97 8/2.76 6/2.35 4/1.98 3/1.58 2/1.37 1/1.13",
    0.8: "14/4.23 11/3.82 8/3.09 6/2.47 4/1.87 3/1.55 2/1.22",
    0.9: "24/7.49 19/6.37 13/4.67 10/3.43 7/2.37 5/1.87 3/1.38",
    0.95: "40/12.54 31/9.95 21/6.60 15/4.48 10/2.87 8/2.18 5/1.51",
}


def seconds_of(call: Callable[[], object]) -> float:
    """Of this process alone, the least of a few: others use the machine too."""
    times = []
    for _ in range(5):
        start = process_time()
        call()
        times.append(process_time() - start)
    return min(times)


def within(sample: np.ndarray, mean: float) -> bool:
    """Whether a mean agrees with independent draws to four standard errors."""
    return abs(float(sample.mean()) - mean) <= 4 * float(sample.std(ddof=1)) / sqrt(len(sample))


def drawn(share: Sequence[float], shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Tokens of many rounds."""
    return np.random.default_rng(seed).choice(np.arange(1, len(share) + 1), size=shape, p=np.array(share))


# Trees


def test_tree_of_two_branches() -> None:
    tree = Tree.parse("0,0,1,1,2")
    assert tree == Tree((0, 0, 1, 1, 2), (0, 1, 0, 1, 0))
    assert (tree.size, tree.depth, tree.depths) == (5, 2, (0, 1, 1, 2, 2, 2))
    assert tree.paths == ((0, 1, 3), (0, 1, 4), (0, 2, 5))
    assert not tree.chain
    seen = [{other for other, sees in enumerate(row) if sees} for row in tree.visible()]
    assert seen == [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 2, 5}]


@pytest.mark.parametrize("length", [0, 1, 5])
def test_chain(length: int) -> None:
    tree = Tree.chain_of(length)
    assert tree.chain and tree.size == tree.depth == length and set(tree.ranks) <= {0}
    assert tree.paths == (tuple(range(length + 1)),)
    assert tree.visible() == tuple(tuple(j <= i for j in range(length + 1)) for i in range(length + 1))


@pytest.mark.parametrize("seed", range(20))
def test_text_is_reversible_and_a_node_sees_its_path(seed: int) -> None:
    random = Random(seed)
    tree = Tree(tuple(random.randrange(node) for node in range(1, random.randint(1, 20))))
    assert Tree.parse(tree.text) == tree and hash(Tree.parse(tree.text)) == hash(tree)
    for node, row in enumerate(tree.visible()):
        assert tuple(other for other, sees in enumerate(row) if sees) == tree.path(node)
        assert len(tree.path(node)) == tree.depths[node] + 1
    assert {path[-1] for path in tree.paths} == set(range(tree.size + 1)) - set(tree.parents)


@pytest.mark.parametrize("text", ["1", "0,2", "0,,1", "0,x", "0,-1", "0,1.0", ",", "0,1,3", "0," + "9" * 5000])
def test_text_that_is_no_tree(text: str) -> None:
    with pytest.raises(UsageError, match=r"parent of node \d: found .*; expected"):
        Tree.parse(text)


def test_invalid_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="node 2: a parent from 0 to 1"):
        Tree((0, 2))
    with pytest.raises(ValueError, match="a parent from 0 to 0"):
        Tree((-1,))
    with pytest.raises(ValueError, match="order of the siblings"):
        Tree((0, 0), (1, 0))
    with pytest.raises(ValueError, match="length"):
        Tree.chain_of(-1)


# Chains


@pytest.mark.parametrize("alpha", BEST)
def test_best_length_and_speedup(alpha: float) -> None:
    for cost, cell in zip(COSTS, BEST[alpha].split(), strict=True):
        gamma, value = chains.best_gamma(alpha, cost)
        length, speedup = cell.split("/")
        assert gamma == int(length), (alpha, cost)
        assert value == pytest.approx(float(speedup), abs=0.005)
        assert value == pytest.approx(chains.speedup(alpha, gamma, cost))


def test_expected_tokens_of_the_paper() -> None:
    """Its table 1."""
    assert chains.expected_same(0.8, 5) == pytest.approx(3.689, abs=5e-4)
    assert chains.expected_same(0.9, 10) == pytest.approx(6.862, abs=5e-4)
    assert chains.expected_same(1.0, 7) == 8 and chains.expected_same(0.0, 7) == 1
    assert chains.expected_same(0.7, 4) == pytest.approx((1 - 0.7**5) / 0.3)


def test_some_chain_wins_exactly_if_more_is_accepted_than_a_step_costs() -> None:
    grid = [i / 20 for i in range(21)]
    for alpha in grid:
        for cost in grid:
            gamma, value = chains.best_gamma(alpha, cost)
            assert (gamma > 0) == (alpha > cost)
            assert value >= 1.0 and (alpha <= cost or value >= (1 + alpha) / (1 + cost) - 1e-12)


def test_acceptance_by_position() -> None:
    acceptances = (0.5, 0.8, 0.9)
    assert chains.expected(acceptances) == pytest.approx(1 + 0.5 + 0.4 + 0.36)
    share = chains.distribution(acceptances)
    assert share == pytest.approx((0.5, 0.1, 0.04, 0.36))
    assert sum(k * p for k, p in enumerate(share, start=1)) == pytest.approx(chains.expected(acceptances))
    assert chains.distribution(()) == (1.0,) and chains.expected(()) == 1.0
    for wrong in ((1.1,), (-0.1,), (float("nan"),)):
        with pytest.raises(ValueError, match="from 0 to 1"):
            chains.expected(wrong)


def test_several_speculations() -> None:
    """One is a chain; several keep the longest of independent accepted prefixes."""
    assert chains.expected_of_several(0.6, 4, 1) == pytest.approx(chains.expected_same(0.6, 4))
    draws = np.random.default_rng(1).random((20000, 3, 4)) < 0.6
    longest = draws.cumprod(axis=2).sum(axis=2).max(axis=1)
    assert within(1 + longest, chains.expected_of_several(0.6, 4, 3))


# Growth


def closed_sets(accuracies: Sequence[Sequence[float]], size: int) -> set[frozenset[tuple[int, ...]]]:
    """Every set of that many nodes, each named by its path's ranks, that holds the parents of its nodes."""
    found = {frozenset[tuple[int, ...]]()}
    for _ in range(size):
        found = {
            nodes | {(*parent, rank)}
            for nodes in found
            for parent in [(), *nodes]
            if len(parent) < len(accuracies)
            for rank in range(len(accuracies[len(parent)]))
            if (*parent, rank) not in nodes
        }
    return found


def chance(path: Sequence[int], accuracies: Sequence[Sequence[float]]) -> float:
    found = 1.0
    for depth, rank in enumerate(path):
        found *= accuracies[depth][rank]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_growth_is_best_at_every_size(seed: int) -> None:
    random = Random(seed)
    table = []
    for _ in range(3):
        row = sorted((random.random() for _ in range(3)), reverse=True)
        total = sum(row) + random.random()
        table.append([a / total for a in row])
    grown = growth.grow(table, 4)
    assert [scored.tree.size for scored in grown] == [1, 2, 3, 4]
    for scored in grown:
        size = scored.tree.size
        best = max(1 + sum(chance(path, table) for path in nodes) for nodes in closed_sets(table, size))
        assert scored.expected == pytest.approx(best)
        assert scored.expected == pytest.approx(growth.expected(scored.tree, table))
    for before, after in pairwise(grown):
        assert after.tree.parents[:-1] == before.tree.parents
    share = growth.distribution(grown[-1].tree, table)
    assert sum(share) == pytest.approx(1.0)
    assert sum(k * p for k, p in enumerate(share, start=1)) == pytest.approx(grown[-1].expected)


def test_growth_ends_where_the_guesses_do() -> None:
    grown = growth.grow([[0.5, 0.2], [0.4]], 10)
    assert len(grown) == 4  # two nodes, and one below each
    assert grown[-1].expected == pytest.approx(1 + 0.7 + 0.7 * 0.4)
    assert growth.grow([], 5) == () and growth.grow([[0.5]], 0) == ()
    deep = [(scored.tree.depth, scored.tree.text) for scored in growth.candidates([[0.5, 0.2], [0.5]], 3)]
    assert deep == [(1, "0"), (1, "0,0"), (2, "0,1"), (2, "0,1,0")]


def test_growth_with_one_guess_a_depth_is_a_chain() -> None:
    acceptances = (0.5, 0.8, 0.9)
    scored = growth.grow([[a] for a in acceptances], 3)[-1]
    assert scored.tree.chain and scored.expected == pytest.approx(chains.expected(acceptances))
    assert growth.distribution(scored.tree, [[a] for a in acceptances]) == pytest.approx(
        chains.distribution(acceptances)
    )


def test_accuracies_that_are_none() -> None:
    with pytest.raises(ValueError, match="do not rise"):
        growth.grow([[0.3, 0.4]], 2)
    with pytest.raises(ValueError, match="add up to at most 1"):
        growth.grow([[0.6, 0.5]], 2)
    with pytest.raises(ValueError, match="found none for rank 1 at depth 1"):
        growth.expected(Tree((0, 0)), [[0.5]])
    assert growth.falling((0.5, 0.1, 0.2, 0.15, 0.01)) == pytest.approx((0.5, 0.15, 0.15, 0.15, 0.01))
    assert growth.falling((0.1, 0.2, 0.3)) == pytest.approx((0.2, 0.2, 0.2))


# Sequoia


Forest = tuple[Any, ...]  # of what is below each of its roots


def forests(nodes: int, depth: int, most: int, left: int) -> Iterator[Forest]:
    """Every ordered forest of that many nodes, with up to `depth` levels, `left` roots and `most` children a node."""
    if nodes == 0:
        yield ()
    elif depth and left:
        for first in range(1, nodes + 1):
            for below in forests(first - 1, depth - 1, most, most):
                for rest in forests(nodes - first, depth, most, left - 1):
                    yield (below, *rest)


def value(forest: Forest, p: Sequence[float]) -> float:
    return 1.0 + sum(p[i] * value(below, p) for i, below in enumerate(forest))


@pytest.mark.parametrize("p", [(0.5, 0.2, 0.1), (0.3, 0.4, 0.2), (0.9,), (0.2, 0.2, 0.2, 0.2, 0.2), (0.0, 0.7)])
def test_sequoia_is_best_at_every_size_and_depth(p: tuple[float, ...]) -> None:
    table = sequoia.solve(p, 7)
    for depth in range(8):
        most = 0.0
        for size in range(8):
            values = [value(forest, p) for forest in forests(size, depth, len(p), len(p))]
            found = table.value(size, depth)
            if not values:
                assert found == -np.inf
                with pytest.raises(ValueError, match="no tree of"):
                    table.tree(size, depth)
            else:
                assert found == pytest.approx(max(values))
                tree = table.tree(size, depth)
                assert tree.size == size and tree.depth <= depth and max(tree.ranks, default=0) < len(p)
                assert list(tree.depths) == sorted(tree.depths)  # level by level
                assert sequoia.expected(tree, p) == pytest.approx(found)
            most = max(most, found)
            best = sequoia.best_tree(p, size, depth)
            assert best.expected == pytest.approx(most) and best.tree.size <= size and best.tree.depth <= depth
    assert sequoia.best_tree(p, 7).expected == pytest.approx(table.best(7, 7).expected)
    assert sequoia.best_tree(p, 0) == sequoia.best_tree((), 7) == Scored(Tree(()), 1.0)


def test_sequoia_and_growth_agree() -> None:
    """Where every depth has the same accuracies both are optimal, of any depth and of a limited one."""
    p = (0.5, 0.15, 0.08, 0.05, 0.03, 0.02, 0.015, 0.01)
    table = sequoia.solve(p, 40)
    for depth in (2, 4, 40):
        for scored in growth.grow([p] * depth, 40):
            assert table.value(scored.tree.size, depth) == pytest.approx(scored.expected)


def test_sequoia_takes_less_than_half_a_second() -> None:
    p = (0.5, 0.15, 0.08, 0.05, 0.03, 0.02, 0.015, 0.01)
    assert seconds_of(lambda: sequoia.best_tree(p, 64, 10)) < 0.5


def test_acceptances_of_children_are_disjoint() -> None:
    assert sequoia.disjoint((0.5, 0.5, 1.0)) == pytest.approx((0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match="add up to at most 1"):
        sequoia.solve((0.5, 0.5, 0.5), 3)


# What pays


def flat(tokens: int) -> float:
    return 10.0


def steep(tokens: int) -> float:
    return 10.0 * tokens


def knee(tokens: int) -> float:
    return 10.0 if tokens <= 8 else 40.0


def test_costs_decide_the_chain() -> None:
    acceptances = (0.8,) * 30
    free = choose_chain(acceptances, Costs(flat))
    assert free.tree.size == 30 and free.seconds == pytest.approx(10.0 / chains.expected(acceptances))
    assert choose_chain(acceptances, Costs(steep)) == Choice(Tree(()), 1.0, 10.0, 10.0)
    assert choose_chain(acceptances, Costs(knee)).tree.size == 7  # a pass over eight tokens
    for cost, cell in zip(COSTS, BEST[0.8].split(), strict=True):  # a pass that costs the same: the table again
        choice = choose_chain(acceptances, Costs(flat, draft=10.0 * cost))
        assert choice.tree == Tree.chain_of(int(cell.split("/")[0]))
        assert choice.speedup == pytest.approx(float(cell.split("/")[1]), abs=0.005)
    assert choose_chain(acceptances, Costs(flat, overhead=100.0)).tree.size == 0
    assert choose_chain((0.0,) * 5, Costs(flat)).tree.size == 0  # nothing wins, even for nothing
    assert choose_chain((), Costs(flat)).speedup == 1.0


@pytest.mark.parametrize("supply", ["growth", "sequoia"])
def test_costs_decide_the_tree(supply: str) -> None:
    p = (0.5, 0.2, 0.1)

    def choose(costs: Costs) -> Tree:
        trees = growth.candidates([p] * 5, 12) if supply == "growth" else sequoia.candidates(p, 12, 5)
        choice = choose_tree(trees, costs)
        assert choice.expected == pytest.approx(sequoia.expected(choice.tree, p))
        round_s = costs.round_s(choice.tree.size, choice.tree.depth)
        assert choice.seconds == pytest.approx(round_s / choice.expected) and choice.plain == costs.pass_s(1)
        return choice.tree

    assert choose(Costs(flat)).size == 12
    assert choose(Costs(knee)).size == 7
    assert choose(Costs(steep)).size == 0
    assert choose(Costs(flat, draft=11.0)).size == 0
    assert choose(Costs(flat, draft=4.0)).depth < choose(Costs(flat, draft=0.1)).depth
    broad = choose(Costs(flat, draft=7.0))  # a step of drafting is dear and its nodes are not
    assert broad.parents == (0, 0, 0)


def test_passes_between_measured_points() -> None:
    costs = Costs({1: 10.0, 4: 16.0, 8: 16.0})
    assert [costs.pass_s(n) for n in (1, 2, 4, 6, 8)] == pytest.approx([10.0, 12.0, 16.0, 16.0, 16.0])
    assert choose_chain((0.9,) * 7, costs).tree.size == 7
    with pytest.raises(ValueError, match="found 1 to 8"):
        choose_chain((0.9,) * 8, costs)
    with pytest.raises(ValueError, match="found none"):
        choose_tree([Scored(Tree((0,)), 1.5)], Costs({}))


# Rounds


@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 7, 64])
def test_rounds_of_nothing_and_of_everything_accepted(gamma: int, length: int) -> None:
    for alpha, count in ((0.0, length), (1.0, ceil(length / (gamma + 1)))):
        found = rounds.rounds(chains.distribution(chains.same(alpha, gamma)), length)
        assert found.sum() == 1.0 and found[count] == 1.0
        assert rounds.mean(found) == rounds.slowest(found, 5) == count


@pytest.mark.parametrize(("alpha", "gamma", "length"), [(0.6, 3, 50), (0.9, 8, 100), (0.3, 5, 5)])
def test_rounds_equal_a_simulation(alpha: float, gamma: int, length: int) -> None:
    share = chains.distribution(chains.same(alpha, gamma))
    found = rounds.rounds(share, length)
    assert found.sum() == pytest.approx(1.0)
    batch, trials = 8, 4000
    tokens = drawn(share, (trials * batch, length), seed=gamma)
    needed = (tokens.cumsum(axis=1) < length).sum(axis=1) + 1
    assert within(needed, rounds.mean(found))
    assert within(needed.reshape(trials, batch).max(axis=1), rounds.slowest(found, batch))
    for count in np.flatnonzero(found > 0.02):
        error = sqrt(found[count] * (1 - found[count]) / len(needed))
        assert abs(float((needed == count).mean()) - found[count]) <= 4 * error


def test_rounds_of_a_binomial() -> None:
    """Of one or two tokens a round: r rounds reach the length exactly if at least length - r of them gave two."""
    p, length = 0.4, 12
    draws = np.array([1.0])
    for r, chance_of_r in enumerate(np.cumsum(rounds.rounds((1 - p, p), length))):
        assert chance_of_r == pytest.approx(draws[length - r :].sum())
        draws = np.convolve(draws, (1 - p, p))


def test_the_slowest_of_more_is_slower() -> None:
    found = rounds.rounds(chains.distribution((0.7,) * 4), 100)
    means = [rounds.slowest(found, batch) for batch in (1, 2, 8, 64, 512)]
    assert means[0] == pytest.approx(rounds.mean(found))
    assert all(a < b for a, b in pairwise(means)) and means[-1] < 100
    with pytest.raises(ValueError, match="batch"):
        rounds.slowest(found, 0)
    with pytest.raises(ValueError, match="add up to 1"):
        rounds.rounds((0.5, 0.4), 10)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_rounds_take_less_than_50_ms(alpha: float) -> None:
    share = chains.distribution(chains.same(alpha, 63))
    assert seconds_of(lambda: rounds.slowest(rounds.rounds(share, 1000), 64)) < 0.05


# States


STEPS = ((0.5, 0.2, 0.3), (0.3, 0.4, 0.3), (0.25, 0.15, 0.6))
SHARES = ((0.7, 0.3, 0.0, 0.0), (0.5, 0.3, 0.2, 0.0), (0.4, 0.3, 0.2, 0.1))  # tokens a round in each state


def test_steady_state_equals_a_simulation() -> None:
    means = [sum(k * p for k, p in enumerate(share, start=1)) for share in SHARES]
    share = states.steady(STEPS)
    assert sum(share) == pytest.approx(1.0)
    assert np.array(share) @ np.array(STEPS) == pytest.approx(share)
    random, count, steps, warm = np.random.default_rng(7), 4000, 60, 40
    state = np.zeros(count, dtype=int)
    tokens = np.zeros(count)
    for step in range(steps):
        if step >= warm:
            tokens += (random.random((count, 1)) >= np.cumsum(SHARES, axis=1)[state][:, :-1]).sum(axis=1) + 1
        state = (random.random((count, 1)) >= np.cumsum(STEPS, axis=1)[state][:, :-1]).sum(axis=1)
    assert within(tokens / (steps - warm), states.mean_tokens(STEPS, means))
    for s in range(3):
        assert within(state == s, share[s])


def test_states_that_are_left_for_good_and_ones_that_alternate() -> None:
    assert states.steady(((0.5, 0.5), (0.0, 1.0))) == pytest.approx((0.0, 1.0))
    assert states.steady(((1.0, 0.0), (0.5, 0.5))) == pytest.approx((1.0, 0.0))
    assert states.steady(((0.0, 1.0), (1.0, 0.0))) == pytest.approx((0.5, 0.5))
    assert states.mean_tokens(((1.0,),), (2.5,)) == 2.5
    with pytest.raises(ValueError, match="never left"):
        states.steady(((1.0, 0.0), (0.0, 1.0)))
    with pytest.raises(ValueError, match="add up to 1"):
        states.steady(((0.5, 0.4), (0.5, 0.5)))
    with pytest.raises(ValueError, match="a square"):
        states.steady(((0.5, 0.5),))
    with pytest.raises(ValueError, match="each of 1 states"):
        states.mean_tokens(((1.0,),), (1.0, 2.0))
