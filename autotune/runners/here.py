"""The profile of this machine, with what our own executor adds, and its refinement by the operations of given plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autotune.planners.lower.shape import training_shape
from autotune.planners.lower.stage import canonical_stages, cut_of
from autotune.planners.predict import Predictor
from autotune.planners.refine import refined, unmeasured
from autotune.profiles_db.profiling import measure, profile_machine
from autotune.spec.digest import digest
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.words import counted

IN_PLACE = "operations timed inside this body"
SOURCE = "measured by running the bodies of a tiny layer on this machine's executor"


def profile_here(quick: bool, progress: Callable[[str], None], only: Sequence[str] = ()) -> Profile:
    """Measures the machine, and what one instruction of ours costs on it however small it is."""
    profile = profile_machine(quick, progress, only)
    if only and "launch" not in only:
        return profile
    return _issuing(profile, progress)


def _issuing(profile: Profile, progress: Callable[[str], None]) -> Profile:
    """The profile with what one instruction costs here now, however small it is."""
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
    profile = _bodies(question, plans, progress)
    missing = unmeasured(Predictor(question.model, question.workload, profile), plans)
    device = "cpu" if profile.device.kind == "cpu" else "cuda"
    if missing and device == "cuda" and question.workload.kind == "generate":
        # Decoding waits for the host, whose pace differs by the hour on a machine that others share.
        profile = _passes(_issuing(profile, progress), question, plans, progress)
    for ranks, works in missing.items():
        progress(f"measuring {counted(len(works), 'operation')} of the best plans with {counted(ranks, 'worker')}")
        profile = refined(profile, measure(works, ranks, device, seconds_each=seconds_each))
    return profile


def _passes(profile: Profile, question: Question, plans: Sequence[Plan], progress: Callable[[str], None]) -> Profile:
    """The profile with what one instruction costs in the passes of the plans' own layers, by how many go together.

    Tensor-parallel ranks issue what one rank alone would, on narrower operands.
    """
    import torch

    from autotune.runners.overhead import pass_seconds

    model, workload, found = question.model, question.workload, dict[str, float]()
    for plan in {plan.micro_batch: plan for plan in plans}.values():
        cost = pass_seconds(
            model, plan.attention, workload.precision, plan.micro_batch, workload.prompt_length, torch.device("cuda")
        )
        found |= {f"instruction_seconds.{form}.{plan.micro_batch}": seconds for form, seconds in cost.items()}
        told = ", ".join(f"{seconds * 1e6:.1f} us {form}" for form, seconds in cost.items())
        progress(f"executor: batch {plan.micro_batch}: an instruction takes {told}")
    source = f"measured by running a layer of {model.name} on this machine's executor"
    return replace(
        profile,
        coefficients={**profile.coefficients, **found},
        sources={**profile.sources, **{f"coefficients.{name}": source for name in found}},
    )


def _bodies(question: Question, plans: Sequence[Plan], progress: Callable[[str], None]) -> Profile:
    """The question's profile with the operations of the plans' training bodies timed where they stand."""
    profile, predictor = question.profile, Predictor(question.model, question.workload, question.profile)
    if question.workload.kind != "train":
        return profile
    from autotune.runners.bench import Piece, time_pieces

    cpu = profile.device.kind == "cpu"
    wanted: dict[int, dict[str, Piece]] = {}
    for plan in plans:
        ranks = predictor.ranks(plan.world) if cpu else 1
        shape = training_shape(plan, question.workload)
        for block in {b for stage in canonical_stages(question.model, cut_of(plan, question.model)) for b in stage}:
            mark = f"bodies.{digest([block, shape, plan.recompute, ranks])[:16]}"
            if mark not in profile.sources:
                wanted.setdefault(ranks, {})[mark] = Piece(block, shape, plan.recompute)
    for ranks, pieces in wanted.items():
        many = counted(len(pieces), "body", "bodies")
        progress(f"timing the operations of {many} of the best plans with {counted(ranks, 'worker')}")
        samples = time_pieces(question.model, list(pieces.values()), ranks, "cpu" if cpu else "cuda", progress)
        if samples:
            profile = refined(profile, samples)
            profile = replace(profile, sources={**profile.sources, **dict.fromkeys(pieces, IN_PLACE)})
    return profile
