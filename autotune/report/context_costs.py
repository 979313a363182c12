"""What a long context costs a served model, in tables: by context, and by what else the plan or the model could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from autotune.planners.context_costs import ContextCosts, Option
from autotune.report.explanation import Explanation, Section, table
from autotune.report.units import seconds, signed, size
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.words import counted

HEADING = ("", "cache a user", "prefill", "users", "a token, one user", "a token, all", "switch", "sessions an hour")
CHANGED = 0.005  # of a cost: less is no change
COSTS = ("kv_bytes", "prefill_s", "users", "decode_s", "full_s", "switch_s")


def explain_context(
    plan: Plan, profile: Profile, by_length: Sequence[ContextCosts], own: ContextCosts, others: Sequence[Option]
) -> Explanation:
    """Keys "context" (the four costs by context) and "options" (at the recipe's own)."""
    subject = f"{plan.describe()} on {profile.name}: what context costs"
    return Explanation(subject, (_lengths(by_length, own), _options(own, others)))


def _lengths(by_length: Sequence[ContextCosts], own: ContextCosts) -> Section:
    rows = [HEADING, *((f"{costs.context:,}", *_cells(costs)) for costs in by_length)]
    peak = own.peak
    text = (
        *table(rows),
        f"at peak rates, of {own.context:,} tokens: prefill {seconds(peak.prefill_s)}, "
        f"{counted(peak.users, 'user')}, a token of one {seconds(peak.decode_s)}",
        *_shares(by_length, own),
    )
    facts = {"own": _facts(own), "by_context": [_facts(costs) for costs in by_length]}
    return Section("context", "The four costs of a prompt's length (predicted)", text, facts)


def _shares(by_length: Sequence[ContextCosts], own: ContextCosts) -> list[str]:
    """What the own context costs beside the shortest."""
    short = by_length[0]
    if short.context == own.context:
        return []
    users = f"{own.users:,} instead of {short.users:,}"
    token = signed(own.full_s / short.full_s - 1) if short.full_s and own.full_s else "not known"
    ratio = own.prefill_s / short.prefill_s
    return [f"beside {short.context:,} tokens: prefill {ratio:.1f} times, users {users}, a token of all {token}"]


def _options(own: ContextCosts, others: Sequence[Option]) -> Section:
    told = [option for option in others if any(_changes(own, option.costs).values())]
    rows = [HEADING, ("as it is", *_cells(own))]
    rows += [(f"{option.changes}{' *' if option.model else ''}", *_cells(option.costs)) for option in told]
    text = [*table(rows)]
    if len(told) < len(others):
        text.append(f"{counted(len(others) - len(told), 'other step changes', 'other steps change')} none of these")
    if any(option.model for option in told):
        text.append("* another model: a search cannot choose it")
    facts = [
        {
            "changes": option.changes,
            "model": option.model,
            "costs": _facts(option.costs),
            "change": _changes(own, option.costs),
        }
        for option in others
    ]
    return Section("options", f"What would change them, at {own.context:,} tokens", tuple(text), {"options": facts})


def _cells(costs: ContextCosts) -> tuple[str, ...]:
    switch = "-" if costs.switch_s is None else seconds(costs.switch_s)
    full = seconds(costs.full_s) if costs.users else "-"
    times = (seconds(costs.prefill_s), f"{costs.users:,}", seconds(costs.decode_s), full, switch)
    return (size(costs.kv_bytes), *times, f"{costs.sessions_h:,.0f}")


def _changes(own: ContextCosts, other: ContextCosts) -> dict[str, float]:
    """Of the costs that differ, by how much, as a fraction."""
    found = {}
    for name in COSTS:
        a, b = getattr(own, name), getattr(other, name)
        if a and b is not None and abs(b / a - 1) > CHANGED:
            found[name] = b / a - 1
    return found


def _facts(costs: ContextCosts) -> dict[str, Any]:
    return {f.name: asdict(costs)[f.name] for f in fields(costs)}
