"""Refining a profile: the pieces of work that the plans at hand are made of, and the profile with them measured.

Only single operations and collectives are measured this way, never a whole step: what a plan's step takes stays a
prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

from autotune.planners.costs.step import StepCosts
from autotune.planners.costs.works import handed
from autotune.planners.decoding.passes import draft_pieces
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.generate import block_shape, inference_body, pass_lengths
from autotune.planners.lower.join import joined_body, together
from autotune.planners.lower.shape import generation_shape, training_shape
from autotune.planners.lower.stage import canonical_stages, cut_of
from autotune.planners.lower.train import lower_training
from autotune.planners.predict import Predictor
from autotune.spec.machine import Profile, Sample
from autotune.spec.plan import Plan
from autotune.spec.program import COMPUTE
from autotune.spec.work import Collective, Work


def step_works(predictor: Predictor, plan: Plan) -> set[Work]:
    """Every distinct primitive of a plan's training step: inside its bodies and between its stages."""
    shape = training_shape(plan, predictor.workload)
    bodies = predictor.bodies(plan)
    found: set[Work] = set()
    for block in {b for stage in canonical_stages(predictor.model, cut_of(plan, predictor.model)) for b in stage}:
        body = lower_block(block, shape, plan.recompute)
        for instruction in (*body.forward.ranks[0], *body.backward.ranks[0]):
            found.update(bodies.works(block, body, instruction, shape))
            if instruction.lane != COMPUTE and not predictor.profile.inline:
                found.add(handed(instruction))
    costs = StepCosts(plan, predictor.model, predictor.workload, predictor.profile, bodies)
    program = lower_training(plan, predictor.model, predictor.workload)
    for op, stage in {(i.op, i.stage) for _, _, i in program}:
        found.update(costs.pieces(op, stage))
    layout = canonical_stages(predictor.model, cut_of(plan, predictor.model))
    for stage, many in {(i.stage, i.part) for _, _, i in program if i.op == "W" and i.part > 1}:
        for block in dict.fromkeys(layout[stage]):
            body, whole = joined_body(block, shape, plan.recompute, many), together(shape, many)
            for instruction in body.weight_gradient.ranks[0]:
                found.update(bodies.works(block, body, instruction, whole))
    return found


def pass_works(predictor: Predictor, plan: Plan) -> set[Work]:
    """Every distinct primitive of a generation's bodies: the prefill, and a decoded token at both ends of it."""
    workload = predictor.workload
    bodies = predictor.bodies(plan)
    found: set[Work] = set()
    wholes = [generation_shape(plan, workload, queries, keys) for queries, keys in pass_lengths(plan, workload)]
    kinds = {b for stage in canonical_stages(predictor.model, cut_of(plan, predictor.model)) for b in stage}
    for block, whole in (*product(kinds, wholes), *draft_pieces(plan, workload)):
        shape, body = block_shape(block, whole), inference_body(block, whole)
        for instruction in body.forward.ranks[0]:
            found.update(bodies.works(block, body, instruction, shape, "decode"))
    return found


def plan_works(predictor: Predictor, plan: Plan) -> set[Work]:
    """The primitives of a plan, whatever its workload."""
    if predictor.workload.kind == "train":
        return step_works(predictor, plan)
    return pass_works(predictor.round(plan), plan)


def unmeasured(predictor: Predictor, plans: Iterable[Plan]) -> dict[int, list[Work]]:
    """By number of ranks a node: what these plans need that the profile has no sample of.

    A processor runs as many workers as a group has members, however few cores they share; a group of more accelerators
    than the node has cannot be measured on it and is left out.
    """
    missing: dict[int, set[Work]] = {}
    for plan in plans:
        ranks, pricer = predictor.ranks(plan.world), predictor.pricer(plan.world)
        for work in plan_works(predictor, plan):
            group = work.group if isinstance(work, Collective) else 1
            if pricer.grade(work) != "measured" and (group <= ranks or predictor.profile.inline):
                missing.setdefault(max(ranks, group), set()).add(work)
    return {ranks: sorted(wanted, key=repr) for ranks, wanted in missing.items()}


def refined(profile: Profile, samples: Sequence[Sample]) -> Profile:
    """The profile with new samples in the place of older ones of the same work."""
    new = {(s.work, s.ranks) for s in samples}
    kept = tuple(s for s in profile.samples if (s.work, s.ranks) not in new)
    return replace(profile, samples=kept + tuple(samples))
