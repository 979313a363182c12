"""Each rank of a CPU run computes on cores of its own, and what it measures with is what it runs with."""

from __future__ import annotations

from autotune.profiles_db.cores import all_cores, share_of
from tests.pool import Pool

RANKS = 2


def test_shares_do_not_overlap() -> None:
    assert [share_of(rank, 3, range(8)) for rank in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert share_of(0, 1, (2, 5)) == (2, 5)
    assert share_of(3, 4, (0, 1)) == (0, 1), "more processes than cores share all of them"


def test_a_rank_is_bound_and_let_go(pool: Pool) -> None:
    bound = pool.run("bind", RANKS)
    assert [cores for cores, _ in bound] == [share_of(rank, RANKS, all_cores()) for rank in range(RANKS)]
    assert all(threads == max(1, len(all_cores()) // RANKS) for _, threads in bound)
