"""The outer program of one training step: the schedule's order, completed by the passes, with the size of every buffer.

The lists depend on the plan's traits alone and are kept: plans that differ in micro-batch, recompute or attention share
them, and with them everything that has been found out about their order. See passes.compute for the buffers' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from autotune.planners.lower.stage import Sizes
from autotune.planners.lower.subgroups import split, subgroup_bytes
from autotune.planners.lower.traits import Traits, micro_batches, stage_sizes, traits
from autotune.planners.passes import PASSES
from autotune.planners.passes.clip import CARRIED, NORM, WHOLE
from autotune.planners.passes.compute import compute
from autotune.planners.resolve import Shared, uncollected
from autotune.planners.schedules import SCHEDULES, Place
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import HOST, Buffer, Instruction, Program
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload

TEMPORARY = "xakbdhtfre"  # first letters of the buffers that live within a step


def state_bytes(parameters: int, precision: str, shards: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of `parameters` elements; states over `shards` data ranks.

    bf16 trains with fp32 gradients, master weights and two moments (Micikevicius et al., 1710.03740): 18 bytes.
    """
    padded = -(-parameters // shards)
    if precision == "bf16":
        return 2 * parameters, 4 * parameters, 12 * padded
    width = BYTES[precision]
    return width * parameters, width * parameters, 2 * width * padded


def resident_bytes(plan: Plan, parameters: int, precision: str) -> int:
    """Bytes of the optimizer states of a stage that stay in the device's memory."""
    return state_bytes(split(parameters, plan.data if plan.zero else 1, plan.optimizer_offload)[0], precision, 1)[2]


def kind_of(name: str) -> str:
    """What the size of a buffer depends on: its name without the micro-batch."""
    return name.rpartition(".")[0] if name.count(".") == 2 else name


def _kinds(plan: Plan, sizes: tuple[Sizes, ...], w: Workload) -> Mapping[str, Buffer]:
    """The buffer of every kind: sizes, and whether it outlives the step."""
    tokens = Buffer(micro_batches(plan, w) * plan.micro_batch * w.sequence_length * 8, persistent=True)
    shards = plan.data if plan.zero else 1
    kinds = {"tokens": tokens, "targets": tokens, "loss": Buffer(max(4, BYTES[w.precision]), persistent=True)}
    kinds |= {name: Buffer(16, persistent=True) for name in (NORM, CARRIED, WHOLE)}
    for s, size in enumerate(sizes):
        parts = (*state_bytes(size.parameters, w.precision, 1)[:2], resident_bytes(plan, size.parameters, w.precision))
        states, gradient, weight = subgroup_bytes(
            split(size.parameters, shards, plan.optimizer_offload)[1], w.precision
        )
        kinds |= {f"oh.{s}": Buffer(states, HOST, persistent=True), f"f.{s}": Buffer(states)}
        kinds |= {f"hg.{s}": Buffer(gradient, HOST), f"hw.{s}": Buffer(weight, HOST)}
        kinds |= {f"r.{s}": Buffer(), f"e.{s}": Buffer()}
        kinds |= {f"{n}.{s}": Buffer(b, persistent=True) for n, b in zip("wgo", parts, strict=True)}
        kinds |= {f"x.{s + 1}": Buffer(size.output), f"d.{s - 1}": Buffer(size.inputs), f"b.{s}": Buffer(size.made)}
        early, late = size.saved - size.kept, size.kept
        kinds |= {f"a.{s}": Buffer(early), f"k.{s}": Buffer(late), f"t.{s}": Buffer()}
        kinds |= {f"ha.{s}": Buffer(early, HOST), f"hk.{s}": Buffer(late, HOST)}
    return kinds


class Outline(NamedTuple):
    """What plans of equal traits share: the lists, and the kind of every buffer they name."""

    ranks: Shared
    kinds: tuple[dict[str, str], ...]
    place: Place


MOST_INSTRUCTIONS = 300_000  # of the outlines that are kept: about 1 kB each with what is resolved about them
_outlines: dict[Traits, Outline] = {}  # the one used last is last


def outline(key: Traits) -> Outline:
    """The outline of these traits; made once."""
    found = _outlines.pop(key, None)
    if found is None:
        with uncollected():
            found = _draw(key)
    _outlines[key] = found
    while len(_outlines) > 1 and sum(len(r) for o in _outlines.values() for r in o.ranks) > MOST_INSTRUCTIONS:
        del _outlines[next(iter(_outlines))]
    return found


def _declared(ranks: Sequence[tuple[Instruction, ...]]) -> Program:
    """The lists with a buffer for every name that they read or write; the sizes come later."""
    found = []
    for listing in ranks:
        names = dict.fromkeys(name for i in listing for name in (*i.reads, *i.writes))
        found.append({name: Buffer(persistent=name[0] not in TEMPORARY or "." not in name) for name in names})
    return Program(tuple(ranks), tuple(found))


def _draw(key: Traits) -> Outline:
    listed = compute(SCHEDULES[key.schedule].order(key.pipe), key)
    program = _declared(tuple(map(tuple, listed)))
    for apply in PASSES.values():
        program = _declared(apply(program, key).ranks)
    kinds = tuple({name: kind_of(name) for name in buffers} for buffers in program.buffers)
    return Outline(Shared(program.ranks), kinds, key.place)


def lower_training(plan: Plan, model: ModelSpec, workload: Workload) -> Program:
    """The step's program over pipeline ranks. Data and tensor peers run the same one: `expand` makes them explicit."""
    made = outline(traits(plan, model, workload))
    kinds = _kinds(plan, stage_sizes(plan, model, workload), workload)
    buffers = tuple({name: kinds[kind] for name, kind in held.items()} for held in made.kinds)
    return Program(made.ranks, buffers, facts={"place": made.place})
