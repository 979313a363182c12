"""Names of the bodies whose operations a profile has timed where they stand: what issuing them takes is in those times
already, so that nothing is added for it."""

from __future__ import annotations

from autotune.planners.lower.shape import Shape
from autotune.spec.digest import digest
from autotune.spec.graph import Block

IN_PLACE = "operations timed inside this body"  # what a profile says of such a body's name among its sources


def body_mark(block: Block, shape: Shape, policy: str, ranks: int) -> str:
    """A training body under a recompute policy, or a generation's under none, timed by so many workers at once."""
    return f"bodies.{digest([block, shape, policy, ranks])[:16]}"


def pass_mark(block: Block, shape: Shape, ranks: int, *around: object) -> str:
    """A generation's body with what was timed `around` it: how its round's tokens are proposed."""
    return f"passes.{digest([block, shape, ranks, *around])[:16]}"
