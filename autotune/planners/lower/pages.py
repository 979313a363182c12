"""How many positions a sequence's key-value cache has, and in how many pages (plan axis `page`) those of all lie.

With pages a sequence has those that its own prompt and answer take, and not as many as the longest one's. Where the
workload says how long each prompt is, so many are set aside; where it does not, every prompt is taken to be as long as
the longest. Sequences go together in the order of their prompts, some at a time: the pool has room for those that take
most, and one page more, which takes what a prompt's pass makes of the places behind a shorter prompt's end.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.planners.decoding.strategies import scored
from autotune.spec.plan import Plan
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload

NOWHERE = 1  # the page that nobody reads
NUMBER_BYTES = 8  # of a page's number in a table


def beyond(plan: Plan, workload: Workload) -> int:
    """Positions of a sequence's cache behind its prompt: its answer, and what a last round may propose beyond it."""
    return workload.new_tokens + scored(plan) - 1


def room(plan: Plan, workload: Workload) -> int:
    """Positions of the longest sequence's cache."""
    return workload.prompt_length + beyond(plan, workload)


def pages_of(positions: int, page: int) -> int:
    return -(-positions // page)


def taken(lengths: Sequence[int], plan: Plan, workload: Workload) -> int:
    """Pages that sequences with prompts of these lengths take together."""
    return sum(pages_of(length + beyond(plan, workload), plan.page) for length in lengths)


def pool_pages(plan: Plan, workload: Workload) -> int:
    """Pages of a replica's pool."""
    each, lengths = workload.batch // plan.data, workload.prompt_lengths
    if not lengths:
        return NOWHERE + taken((workload.prompt_length,) * each, plan, workload)
    together = [lengths[start : start + each] for start in range(0, len(lengths), each)]
    return NOWHERE + max(taken(some, plan, workload) for some in together)


def table_columns(plan: Plan, workload: Workload) -> int:
    """Pages that a sequence may have: those of the longest."""
    return pages_of(room(plan, workload), plan.page)


def cache_positions(plan: Plan, workload: Workload) -> int:
    """Positions of a replica's cache, of all its sequences."""
    if plan.page:
        return pool_pages(plan, workload) * plan.page
    return workload.batch // plan.data * room(plan, workload)


def table_bytes(plan: Plan, workload: Workload) -> int:
    """Bytes of the table that says where each sequence's pages lie."""
    return workload.batch // plan.data * table_columns(plan, workload) * NUMBER_BYTES if plan.page else 0


def gathered_bytes(batch: int, positions: int, page: int, heads: int, width: int, dtype: str) -> int:
    """Bytes of so many positions' keys and values where they are put side by side, whole pages, for attention that
    takes no table."""
    return 2 * batch * pages_of(positions, page) * page * heads * width * BYTES[dtype]
