"""Choices of a plan that change results: a line each, with what is said wherever such a plan is shown.

A search tries none of them unless the recipe names it; `run --check` compares with an emulation of the same choice, and
says how far its answers are from those without it (runners/drift.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from autotune.spec.plan import INT8, Plan

CHANGES: Mapping[tuple[str, object], str] = {
    ("weights", INT8): "the layers' linear weights are rounded to 8 bits: answers are not the exact model's",
}


def changes(plan: Plan) -> tuple[str, ...]:
    """What of a plan changes results, `weights = int8: why`; nothing of most plans."""
    return tuple(f"{axis} = {value}: {why}" for (axis, value), why in CHANGES.items() if getattr(plan, axis) == value)


def unchanged(plan: Plan) -> Plan:
    """The plan without what changes results."""
    usual = Plan()
    axes = [axis for axis, value in CHANGES if getattr(plan, axis) == value]
    return plan.altered(**{axis: getattr(usual, axis) for axis in axes})
