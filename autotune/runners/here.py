"""The profile of this machine, with what our own executor adds, and its refinement by the operations of given plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context

from autotune.planners.costs.in_place import IN_PLACE, body_mark, pass_mark
from autotune.planners.decoding.passes import draft_pieces
from autotune.planners.decoding.strategies import AXES
from autotune.planners.lower.generate import block_shape, pass_lengths, text_columns
from autotune.planners.lower.shape import generation_shape, training_shape
from autotune.planners.lower.stage import canonical, canonical_stages, cut_of
from autotune.planners.predict import Predictor
from autotune.planners.refine import refined, unmeasured
from autotune.profiles_db.profiling import measure, profile_machine
from autotune.spec.graph import Block, blocks
from autotune.spec.heads import HeadsSpec
from autotune.spec.heads_graph import frozen_blocks
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.prediction import Question
from autotune.spec.words import counted

SOURCE = "measured by running the bodies of a tiny layer on this machine's executor"


def profile_here(quick: bool, progress: Callable[[str], None], only: Sequence[str] = ()) -> Profile:
    """Measures the machine, and what one instruction of ours costs on it however small it is."""
    profile = profile_machine(quick, progress, only)
    if only and "launch" not in only:
        return profile
    import torch

    from autotune.runners.overhead import instruction_seconds

    cuda = profile.device.kind != "cpu"
    found = instruction_seconds(torch.device("cuda" if cuda else "cpu"), "bf16" if cuda else "fp32")
    names = {f"instruction_seconds.{form}": seconds for form, seconds in found.items()}
    progress(
        f"executor: {found['train'] * 1e6:.1f} us an instruction in training, {found['decode'] * 1e6:.1f} decoding"
    )
    return replace(
        profile,
        coefficients={**profile.coefficients, **names},
        sources={**profile.sources, **{f"coefficients.{name}": SOURCE for name in names}},
    )


def refine_for(
    question: Question, plans: Sequence[Plan], progress: Callable[[str], None], seconds_each: float = 0.1
) -> Profile:
    """The question's profile with every operation of `plans` that it lacks measured here."""
    from autotune.profiles_db.probes.memory import probed

    profile = TIMED[question.workload.kind](question, plans, progress)
    lacking = unmeasured(Predictor(question.model, question.workload, profile), plans)
    missing = {ranks: found for ranks, works in lacking.items() if (found := list(filter(probed, works)))}
    device = "cpu" if profile.device.kind == "cpu" else "cuda"
    for ranks, works in missing.items():
        progress(f"measuring {counted(len(works), 'operation')} of the best plans with {counted(ranks, 'worker')}")
        profile = refined(profile, measure(works, ranks, device, seconds_each=seconds_each))
    return profile


def _passes(question: Question, plans: Sequence[Plan], progress: Callable[[str], None]) -> Profile:
    """The question's profile with the operations of the plans' passes timed where they stand."""
    profile, workload = question.profile, question.workload
    from autotune.runners.bench_parts import PassPiece
    from autotune.runners.bench_pass import time_passes, time_passes_together

    predictor = Predictor(question.model, workload, profile)
    cpu = profile.device.kind == "cpu"
    by_ranks: dict[tuple[int, ModelSpec], dict[str, PassPiece]] = {}
    for plan in plans:
        ranks, together = predictor.ranks(plan.world) if cpu else 1, predictor.round(plan).workload
        layout = canonical_stages(question.model, cut_of(plan, question.model))
        kinds = {block for stage in layout for block in stage}
        proposes = Plan().altered(**{axis: getattr(plan, axis) for axis in ("decoding", *AXES)})
        pieces: list[tuple[ModelSpec, PassPiece]] = []
        for block, (queries, keys) in product(kinds, pass_lengths(plan, together)):
            piece = PassPiece(block, block_shape(block, generation_shape(plan, together, queries, keys)))
            apart = (block.kind == "head" and plan.decoding != PLAIN) or piece.shape.masked
            if apart and queries < keys:
                piece = replace(piece, columns=text_columns(plan, together), round=proposes)
            pieces.append((question.model, piece))
        for block, whole in draft_pieces(plan, together):
            assert together.draft is not None
            pieces.append((together.draft, PassPiece(block, block_shape(block, whole))))
        for model, piece in pieces:
            around = (piece.columns, piece.round) if piece.round else ()
            mark = pass_mark(piece.block, piece.shape, ranks, *around)
            if mark not in profile.sources:
                by_ranks.setdefault((ranks, model), {})[mark] = piece
    for (ranks, model), wanted in by_ranks.items():
        many, timed = counted(len(wanted), "body", "bodies"), list(wanted.values())
        if cpu:
            progress(f"timing the operations of {many} of the best plans with {counted(ranks, 'worker')}")
            samples = time_passes_together(model, timed, ranks)
        else:
            progress(f"timing the operations of {many} of the best plans as they are captured")
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # its device's memory goes with it
                samples = alone.submit(time_passes, model, timed, "cuda").result()
        profile = refined(profile, samples)
        placed = [body_mark(piece.block, piece.shape, "", ranks) for piece in timed]
        profile = replace(profile, sources={**profile.sources, **dict.fromkeys([*wanted, *placed], IN_PLACE)})
    return profile


def _trained(model: ModelSpec, plan: Plan) -> set[tuple[ModelSpec, Block]]:
    """The kinds of blocks of a training, each with the model that it is of: in the place of one that runs a frozen
    model the blocks of that."""
    own = {block for stage in canonical_stages(model, cut_of(plan, model)) for block in stage}
    inner = set(map(canonical, frozen_blocks(blocks(model))))
    target = model.target if isinstance(model, HeadsSpec) and model.target else model
    return {(model, block) for block in own if not frozen_blocks((block,))} | {(target, block) for block in inner}


def _bodies(question: Question, plans: Sequence[Plan], progress: Callable[[str], None]) -> Profile:
    """The question's profile with the operations of the plans' training bodies timed where they stand."""
    profile, predictor = question.profile, Predictor(question.model, question.workload, question.profile)
    from autotune.runners.bench import Piece, time_pieces

    cpu = profile.device.kind == "cpu"
    wanted: dict[tuple[int, ModelSpec], dict[str, Piece]] = {}
    for plan in plans:
        ranks = predictor.ranks(plan.world) if cpu else 1
        shape = training_shape(plan, question.workload)
        for model, block in _trained(question.model, plan):
            mark = body_mark(block, shape, plan.recompute, ranks)
            if mark not in profile.sources:
                wanted.setdefault((ranks, model), {})[mark] = Piece(block, shape, plan.recompute)
    for (ranks, model), pieces in wanted.items():
        many = counted(len(pieces), "body", "bodies")
        progress(f"timing the operations of {many} of the best plans with {counted(ranks, 'worker')}")
        known, device = predictor.pricer(ranks).seconds, "cpu" if cpu else "cuda"
        samples = time_pieces(model, list(pieces.values()), ranks, device, progress, known)
        if samples:
            profile = refined(profile, samples)
            profile = replace(profile, sources={**profile.sources, **dict.fromkeys(pieces, IN_PLACE)})
    return profile


# By kind of workload: how the operations of the bodies that a plan runs are timed where they stand.
TIMED: Mapping[str, Callable[[Question, Sequence[Plan], Callable[[str], None]], Profile]] = {
    "train": _bodies,
    "generate": _passes,
}
