"""The cost table of a training step's outer program: one line of the table an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from autotune.planners.costs.body import BodyCosts, Cost, added
from autotune.planners.costs.price import Pricer
from autotune.planners.costs.vocabulary import VOCABULARY_WORKS, ShardSizes
from autotune.planners.lower.body import PROGRAMS
from autotune.planners.lower.shape import Shape, training_shape
from autotune.planners.lower.sharding import sharding
from autotune.planners.lower.stage import Runs, Sizes, cut_of, stage_blocks, stage_runs, weight_transient
from autotune.planners.lower.subgroups import split, subgroup_bytes, wide
from autotune.planners.lower.train import StageBytes, own_share, segments, stage_bytes, state_bytes
from autotune.planners.lower.traits import micro_batches, partial_weights, place_of, stage_sizes
from autotune.planners.lower.workspace import staging
from autotune.planners.passes.clip import POST_VALIDATED
from autotune.planners.schedules import Place
from autotune.spec.graph import Block
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import COPIES, Instruction
from autotune.spec.work import Collective, Copy, Memory, Optimizer, Work
from autotune.spec.workload import Workload


@dataclass
class StepCosts:
    """Prices every instruction of a plan's step on a machine. All it needs to know is the operation and the stage."""

    by_stage: ClassVar[bool] = True  # the simulator may ask once for each (op, stage, part)

    plan: Plan
    model: ModelSpec
    workload: Workload
    profile: Profile
    bodies: BodyCosts
    _known: dict[tuple[str, int, int], Cost] = field(default_factory=dict)

    @cached_property
    def shape(self) -> Shape:
        return training_shape(self.plan, self.workload)

    @cached_property
    def place(self) -> Place:
        return place_of(self.plan, micro_batches(self.plan, self.workload))

    @cached_property
    def stages(self) -> tuple[Runs, ...]:
        return stage_runs(self.model, cut_of(self.plan, self.model))

    @cached_property
    def sizes(self) -> tuple[Sizes, ...]:
        return stage_sizes(self.plan, self.model, self.workload, self.bodies.site)

    @cached_property
    def shard(self) -> ShardSizes:
        plan, level = self.plan, self.pricer.level(self.plan.world)
        # The tensor ranks of each pipeline rank lie next to each other, those of the next one beyond all its replicas.
        near = plan.tensor if level > self.bodies.level else self.bodies.inner
        inner = near * self.pricer.spread(plan.pipeline, plan.replicas * plan.tensor)[1]
        return ShardSizes.of(plan, self.model, self.workload, level, inner)

    @property
    def pricer(self) -> Pricer:
        return self.bodies.pricer

    def cost(self, instruction: Instruction) -> Cost:
        key = (instruction.op, instruction.stage, instruction.part)
        if key not in self._known:
            op, stage, part = key
            inside = op in PROGRAMS
            self._known[key] = self.stage(stage, op, max(1, part)) if inside else self.piece(*self.pieces(op, stage))
        return self._known[key]

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return self.cost(instruction).seconds

    def sent(self, rank: int, instruction: Instruction) -> int:
        return self.cost(instruction).sent if instruction.op != "RECV" else 0

    def transient(self, rank: int, instruction: Instruction) -> int:
        op, stage = instruction.op, instruction.stage
        if op == "W" and instruction.part > 1:
            runs, policy = self.stages[stage], self.plan.recompute
            return weight_transient(runs, self.shape, policy, self.bodies.site, instruction.part)
        if op in PROGRAMS:
            return int(getattr(self.sizes[stage], PROGRAMS[op]))
        if op == "SUM_PARTIAL":
            return self.partial(stage).size  # they are summed as one flat copy
        return sum(staging(w.op, w.size, self.bodies.site) for w in self.pieces(op, stage) if isinstance(w, Collective))

    def stage(self, stage: int, op: str, joined: int = 1) -> Cost:
        """The bodies of a stage's blocks for one F, BW, B or W, one after another; `joined`: of so many micro-batches
        whose W is one."""
        return self.bodies.stage(self.stages[stage], self.shape, self.plan.recompute, op, joined)

    def block(self, block: Block) -> float:
        """Seconds of one block's forward and backward."""
        return sum(self.bodies.of(block, self.shape, self.plan.recompute, op).seconds for op in ("F", "BW"))

    def pieces(self, op: str, stage: int) -> tuple[Work, ...]:
        """The primitives of an instruction outside the bodies."""
        if op in VOCABULARY_WORKS:
            return VOCABULARY_WORKS[op](self.shard)
        return PIECES[op](self, stage) if op in PIECES else ()

    def move(self, direction: str, stage: int) -> Work:
        """A chunk activation to the host or back; a CPU's device memory is the host's."""
        direction = "h2h" if self.profile.inline else direction
        return Copy(direction, self.sizes[stage].saved)

    def piece(self, *works: Work) -> Cost:
        """A few primitives in a row as a cost."""
        costs = []
        for work in works:
            seconds = self.pricer.seconds(work)
            sent = int(work.bytes) if isinstance(work, Collective) else 0
            costs.append(Cost(seconds, {work.kind: seconds}, {self.pricer.grade(work): seconds}, sent))
        return added(costs)

    def over_data(self, op: str, stage: int, which: int, padded: bool = False) -> tuple[Work, ...]:
        """A collective over those that hold the same of a stage, on its weights (0) or gradients (1)."""
        plan, size, found = self.plan, self.sizes[stage], list[Work]()
        for segment in segments(plan, size.parameters, size.routed):
            elements = segment.share * segment.ranks if padded else segment.elements
            whole = state_bytes(elements, self.workload.precision, 1)[which]
            apart = plan.tensor * (plan.expert if segment.axis == COPIES else 1)
            if segment.ranks > 1 and whole:
                found.append(Collective(op, whole, segment.ranks, *self.pricer.spread(segment.ranks, apart)))
        return tuple(found)

    def along_data(self, op: str, size: int) -> Work:
        return Collective(op, size, self.plan.replicas, *self.pricer.spread(self.plan.replicas, self.plan.tensor))

    def hop(self, stage: int) -> Work:
        """A boundary activation or its gradient between two pipeline ranks."""
        size = self.sizes[stage].output or self.sizes[stage].inputs
        level = self.pricer.level(self.plan.world)
        return Collective("send_recv", size, 2, level)

    def optimizer(self, stage: int) -> tuple[Work, ...]:
        """The update of what is on the device."""
        resident, _ = self.shares(stage)
        return (Optimizer(resident, self.mixed),) if resident else ()

    @property
    def mixed(self) -> str:
        return "mixed" if self.workload.precision == "bf16" else self.workload.precision

    def shares(self, stage: int) -> tuple[int, int]:
        """Elements whose optimizer states stay on the device, and those of one subgroup on the host."""
        size = self.sizes[stage]
        return split(own_share(self.plan, size.parameters, size.routed), 1, self.plan.optimizer_offload)

    def subgroup(self, stage: int, direction: str, which: int) -> tuple[Work, ...]:
        """A subgroup's states (0), gradients (1) or weights (2) to the host or to the device."""
        size = subgroup_bytes(self.shares(stage)[1], self.workload.precision)[which]
        return (Copy("h2h" if self.profile.inline else direction, size, not self.profile.inline),) if size else ()

    def update(self, stage: int, place: str) -> tuple[Work, ...]:
        """A subgroup's update by the device or by the host."""
        _, each = self.shares(stage)
        place = "device" if self.profile.inline else place
        return (Optimizer(each, self.mixed, place),) if each else ()

    @property
    def keeps_gradients(self) -> bool:
        """Whether something after OPT still reads the gradients, and empties them in its place."""
        return self.plan.optimizer == POST_VALIDATED or self.plan.optimizer_offload > 0

    @property
    def wide(self) -> str:
        """The precision of gradients."""
        return wide(self.workload.precision)

    def bytes(self, stage: int) -> StageBytes:
        size = self.sizes[stage]
        return stage_bytes(self.plan, stage, size.parameters, self.workload.precision, size.routed)

    def clear(self, stage: int) -> Work:
        """The gradients that outlive the step set to zero after the update."""
        return Memory("fill", self.bytes(stage).gradients, self.wide)

    def gather(self, stage: int) -> tuple[Work, ...]:
        """A stage's whole weights from the data ranks' shares."""
        return self.over_data("all_gather", stage, 0, padded=True)

    def scatter(self, stage: int) -> tuple[Work, ...]:
        """Whole gradients summed over the data ranks, and each one's share added to what it has."""
        own = self.bytes(stage)
        summed = self.over_data("reduce_scatter", stage, 1, padded=True)
        return *summed, Memory("accumulate", 3 * own.gradients, self.wide)

    def norm(self, stage: int) -> Work:
        """The gradients read once. Scaling them is not priced: it happens only in steps that clip."""
        plan, size = self.plan, self.sizes[stage]
        if plan.expert > 1 and plan.zero:
            elements = own_share(plan, size.parameters, size.routed)
            return Memory("read", state_bytes(elements, self.workload.precision, 1)[1], self.wide)
        whole = state_bytes(size.parameters, self.workload.precision, 1)[1]
        return Memory("read", whole // (plan.replicas if plan.zero else 1), self.wide)

    def numbers(self, op: str, group: int, span: int) -> Work:
        """The two fp64 numbers of a norm, between `group` ranks of a mesh part of `span` ranks."""
        return Collective(op, 16, group, self.pricer.level(span))

    @property
    def embedding(self) -> int:
        """Bytes of the embedding's gradient."""
        width = 8 if self.workload.precision == "fp64" else 4
        return self.model.vocab * self.model.hidden // self.plan.tensor * width

    def tie(self, stage: int) -> Work:
        """The tied embedding's gradient, summed over the two ranks that hold it, or on the one that holds both."""
        size = self.embedding
        if self.place[0] == self.place[-1]:
            return Memory("accumulate", 3 * size, self.workload.precision)
        return Collective("all_reduce", size, 2, self.pricer.level(self.plan.world))

    def sync(self, stage: int) -> Work:
        """A stage's gradients, summed over the two directions that hold it."""
        size = self.bytes(stage).gradients
        return Collective("all_reduce", size, len(self.place[stage]), self.pricer.level(self.plan.world))

    def partial(self, stage: int) -> Collective:
        """The gradients of weights that every tensor rank holds whole."""
        plan, blocks = self.plan, stage_blocks(self.model, cut_of(self.plan, self.model))[stage]
        weights = (w for block in blocks for w in partial_weights(block, plan.tensor, plan.sequence_parallel))
        size = sum(w.size for w in weights) * (8 if self.workload.precision == "fp64" else 4)
        if sharding(plan.zero, stage, plan.stages).gradients:
            size = -(-size // plan.replicas)
        return Collective("all_reduce", size, self.plan.tensor, self.bodies.level, self.bodies.inner)


PIECES: dict[str, Callable[[StepCosts, int], tuple[Work, ...]]] = {
    "SEND": lambda c, s: (c.hop(s),),
    "RECV": lambda c, s: (c.hop(s),),
    "SUM_PARTIAL": lambda c, s: (c.partial(s),),
    "TIE": lambda c, s: (c.tie(s),),
    "TIE_GATHER": lambda c, s: (c.along_data("all_reduce", c.embedding),),
    "TIE_SHARE": lambda c, s: (Memory("accumulate", 2 * c.embedding // c.plan.replicas, c.wide),),
    "SYNC": lambda c, s: (c.sync(s),),
    "ALL_REDUCE": lambda c, s: c.over_data("all_reduce", s, 1),
    "REDUCE_SCATTER": lambda c, s: c.over_data("reduce_scatter", s, 1),
    "ALL_GATHER": lambda c, s: c.over_data("all_gather", s, 0),
    "UNSHARD": lambda c, s: c.gather(s),
    "FRESH": lambda c, s: (Memory("fill", c.bytes(s).whole_gradients, c.wide),),
    "SCATTER": lambda c, s: c.scatter(s),
    "OFFLOAD": lambda c, s: (c.move("d2h", s),),
    "RELOAD": lambda c, s: (c.move("h2d", s),),
    "RELEASE": lambda c, s: (),
    "MARK": lambda c, s: (),
    "OPT": lambda c, s: (*c.optimizer(s), *(() if c.keeps_gradients else (c.clear(s),))),
    "FETCH": lambda c, s: c.subgroup(s, "h2d", 0),
    "OPT_FETCHED": lambda c, s: c.update(s, "device"),
    "RETURN": lambda c, s: c.subgroup(s, "d2h", 0),
    "GRADIENT_DOWN": lambda c, s: c.subgroup(s, "d2h", 1),
    "OPT_HOST": lambda c, s: c.update(s, "host"),
    "WEIGHT_UP": lambda c, s: c.subgroup(s, "h2d", 2),
    "JOIN": lambda c, s: (c.clear(s),),
    "NORM": lambda c, s: (c.norm(s),),
    "NORM_TENSOR": lambda c, s: (c.numbers("all_reduce", c.plan.tensor, c.plan.tensor),),
    "NORM_DATA": lambda c, s: (c.numbers("all_reduce", c.plan.replicas, c.plan.tensor * c.plan.replicas),),
    "NORM_PIPELINE": lambda c, s: (c.numbers("all_reduce", c.plan.pipeline, c.plan.world),),
    "NORM_SEND": lambda c, s: (c.numbers("send_recv", 2, c.plan.world),),
    "NORM_RECV": lambda c, s: (c.numbers("send_recv", 2, c.plan.world),),
    "NORM_ADD": lambda c, s: (),
    "STATE_SEND": lambda c, s: (c.numbers("send_recv", 2, c.plan.world),),
    "STATE_RECV": lambda c, s: (c.numbers("send_recv", 2, c.plan.world),),
    "VALIDATE": lambda c, s: (),
    "CLEAR": lambda c, s: (c.clear(s),),
}
