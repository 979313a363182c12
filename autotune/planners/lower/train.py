"""The outer program of one training step: the schedule's order, completed by the passes, with the size of every buffer.

The lists depend on the plan's traits alone and are kept: plans that differ in micro-batch, recompute or attention share
them, and with them everything that has been found out about their order. See passes.compute for the buffers' names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from autotune.planners.lower.shape import sight_columns
from autotune.planners.lower.sharding import sharding
from autotune.planners.lower.stage import local_parameters
from autotune.planners.lower.subgroups import split, subgroup_bytes, wide
from autotune.planners.lower.traits import Traits, micro_batches, stage_sizes, traits
from autotune.planners.lower.vocabulary import vocabulary_bytes
from autotune.planners.passes import OWN, PASSES, Listing, Seat, ways_of
from autotune.planners.passes.clip import CARRIED, NORM, WHOLE
from autotune.planners.passes.compute import compute
from autotune.planners.resolve import Shared, uncollected
from autotune.planners.schedules import Order, Pipe, Place, schedule_of
from autotune.planners.schedules.insertion import insert
from autotune.planners.schedules.vocabulary import VOCABULARIES
from autotune.spec.graph import blocks
from autotune.spec.heads_graph import frozen_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import COPIES, DATA, HOST, Buffer, Instruction, Program, uses_of
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload

TEMPORARY = "xakbdhtyzufrepq"  # first letters of the buffers that live within a step


def state_bytes(parameters: int, precision: str, shards: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of `parameters` elements; states over `shards` data ranks.

    bf16 trains with fp32 gradients, master weights and two moments (Micikevicius et al., 1710.03740): 18 bytes.
    """
    padded = -(-parameters // shards)
    if precision == "bf16":
        return 2 * parameters, 4 * parameters, 12 * padded
    width = BYTES[precision]
    return width * parameters, width * parameters, 2 * width * padded


def segments(plan: Plan, parameters: int, routed: int) -> tuple[Segment, ...]:
    """A stage's elements by who holds the same: `routed` are those of the rank's experts."""
    if plan.expert == 1:
        return (Segment(DATA, parameters, plan.replicas),)
    return Segment(DATA, parameters - routed, plan.replicas), Segment(COPIES, routed, plan.copies)


def own_share(plan: Plan, parameters: int, routed: int) -> int:
    """Elements of a stage whose optimizer states a rank keeps, on its device or on the host."""
    return sum(segment.share for segment in segments(plan, parameters, routed)) if plan.zero else parameters


class Segment(NamedTuple):
    """Elements of a stage that as many ranks hold, along an axis of the mesh."""

    axis: str
    elements: int
    ranks: int

    @property
    def share(self) -> int:
        """Of one of them, padding included."""
        return -(-self.elements // self.ranks)


class StageBytes(NamedTuple):
    """Bytes of a stage: what a data rank keeps of weights, gradients and states, and the whole of the first two while
    it has gathered or not yet scattered them."""

    weights: int
    gradients: int
    states: int
    whole_weights: int
    whole_gradients: int


def stage_bytes(plan: Plan, stage: int, parameters: int, precision: str, routed: int = 0) -> StageBytes:
    """The bytes of one stage of a plan, on one of its ranks; `routed` of its parameters are of experts."""
    shared = sharding(plan.zero, stage, plan.stages)
    held = segments(plan, parameters, routed)
    weights, gradients = state_bytes(parameters, precision, 1)[:2]
    padded, sums = state_bytes(sum(segment.share * segment.ranks for segment in held), precision, 1)[:2]
    share, part = state_bytes(sum(segment.share for segment in held), precision, 1)[:2]
    return StageBytes(
        share if shared.weights else weights,
        part if shared.gradients else gradients,
        state_bytes(split(own_share(plan, parameters, routed), 1, plan.optimizer_offload)[0], precision, 1)[2],
        padded,
        sums,
    )


@lru_cache(maxsize=1 << 16)
def kind_of(name: str) -> str:
    """What the size of a buffer depends on: its name without the micro-batch."""
    kind, dot, _ = name.rpartition(".")
    return kind if dot and "." in kind else name


def _kinds_of(listing: Sequence[Instruction]) -> dict[str, str]:
    """The kind of every buffer that a rank's list names."""
    names = dict.fromkeys(chain.from_iterable(chain.from_iterable(map(uses_of, listing))))
    return dict(zip(names, map(kind_of, names), strict=True))


def kinds_of(plan: Plan, model: ModelSpec, w: Workload, stages: Collection[int] | None = None) -> Mapping[str, Buffer]:
    """The buffer of every kind: sizes, and whether it outlives the step. `stages`: those of these stages alone."""
    each = w.rows // plan.context
    tokens = Buffer(micro_batches(plan, w) * plan.micro_batch * each * 8, persistent=True)
    kinds = {"tokens": tokens, "targets": tokens, "loss": Buffer(max(4, BYTES[w.precision]), persistent=True)}
    kinds |= {name: Buffer(16, persistent=True) for name in (NORM, CARRIED, WHOLE)}
    kinds["tw"] = Buffer(local_parameters(frozen_blocks(blocks(model)), 1) * BYTES[w.precision], persistent=True)
    kinds |= {"sight": Buffer(w.rows * sight_columns(w.rows) * BYTES[w.precision], persistent=True)} if w.masks else {}
    sizes = stage_sizes(plan, model, w)
    for s in range(len(sizes)) if stages is None else stages:
        size = sizes[s]
        own = stage_bytes(plan, s, size.parameters, w.precision, size.routed)
        own = own._replace(weights=own.weights + size.frozen * BYTES[w.precision])
        subgroup = split(own_share(plan, size.parameters, size.routed), 1, plan.optimizer_offload)[1]
        states, gradient, weight = subgroup_bytes(subgroup, w.precision)
        kinds |= {f"oh.{s}": Buffer(states, HOST, persistent=True), f"f.{s}": Buffer(states)}
        kinds |= {f"hg.{s}": Buffer(gradient, HOST), f"hw.{s}": Buffer(weight, HOST)}
        kinds |= {f"r.{s}": Buffer(), f"e.{s}": Buffer()}
        kinds |= {f"{n}.{s}": Buffer(b, persistent=True) for n, b in zip("wgo", own, strict=False)}
        kinds |= {f"fw.{s}": Buffer(own.whole_weights), f"fg.{s}": Buffer(own.whole_gradients), f"p.{s}": Buffer()}
        kinds |= {f"q.{s}": Buffer()}
        if s == plan.stages:  # a rank's rows of the vocabulary: no stage's
            continue
        early, late = size.saved - size.kept, size.kept
        kinds |= {f"x.{s}": Buffer(size.inputs), f"x.{s + 1}": Buffer(size.output)}
        kinds |= {f"d.{s - 1}": Buffer(size.inputs), f"d.{s}": Buffer(size.output), f"b.{s}": Buffer(size.made)}
        kinds |= {f"a.{s}": Buffer(early), f"k.{s}": Buffer(late), f"t.{s}": Buffer()}
        kinds |= {f"ha.{s}": Buffer(early, HOST), f"hk.{s}": Buffer(late, HOST)}
    embedding = Buffer(model.vocab * model.hidden // plan.tensor * BYTES[wide(w.precision)])
    kinds |= {f"te.{s}": embedding for s in (0, plan.stages - 1)}
    return kinds | {name: Buffer(b) for name, b in vocabulary_bytes(plan, model, w).items()}


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


def lasts(name: str) -> bool:
    """Whether a buffer of this name outlives the step."""
    return name[0] not in TEMPORARY or "." not in name


class _Declared(dict[str, Buffer]):
    """Buffers of one rank by name, each there as soon as it is asked for; the sizes come later."""

    def __missing__(self, name: str) -> Buffer:
        buffer = self[name] = PERSISTENT if lasts(name) else PASSING
        return buffer


PERSISTENT, PASSING = Buffer(persistent=True), Buffer()


def completed(order: Order, key: Traits) -> Program:
    """The order's program after all passes; its buffers have no sizes yet."""
    listed = [compute(steps, rank, key) for rank, steps in enumerate(order)]
    program = Program(tuple(map(tuple, listed)), tuple(_Declared() for _ in listed))
    for apply in PASSES.values():
        program = apply(program, key)
    return program


@lru_cache(maxsize=32)
def _order(schedule: str, split: str, pipe: Pipe, vocabulary: str, product: float) -> Order:
    """The schedule's order with the passes over a sharded vocabulary in it."""
    entry = schedule_of(schedule, split)
    order = entry.order(pipe)
    return order if vocabulary == "ends" else insert(order, pipe, entry.place(pipe), VOCABULARIES[vocabulary], product)


def order_of(key: Traits) -> Order:
    """The compute steps of every rank, before the passes over programs."""
    return _order(key.schedule, key.split, key.pipe, key.vocabulary, key.product)


def own_list(key: Traits, rank: int, passes: Iterable[str] = OWN, listing: Listing | None = None) -> Listing:
    """One rank's list as its own passes leave it, or as some of them do; `listing` is what earlier ones have left."""
    order = order_of(key)
    found = compute(order[rank], rank, key) if listing is None else listing
    seat = Seat(rank, ways_of(order, key))
    for name in passes:
        found = OWN[name](found, seat, key)
    return found


def _draw(key: Traits) -> Outline:
    program = completed(order_of(key), key)
    kinds = tuple(map(_kinds_of, program.ranks))
    return Outline(Shared(program.ranks), kinds, key.place)


def lower_training(plan: Plan, model: ModelSpec, workload: Workload) -> Program:
    """The step's program over pipeline ranks. Data and tensor peers run the same one: `expand` makes them explicit."""
    made = outline(traits(plan, model, workload))
    kinds = kinds_of(plan, model, workload)
    buffers = tuple(dict(zip(held, map(kinds.__getitem__, held.values()), strict=True)) for held in made.kinds)
    return Program(made.ranks, buffers, facts={"place": made.place})
