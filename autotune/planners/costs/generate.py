"""The cost table of a pass of generation: one line of the table an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autotune.planners.costs import propose
from autotune.planners.costs.between import settle_work
from autotune.planners.costs.body import NOTHING, BodyCosts, Cost
from autotune.planners.decoding.strategies import scored
from autotune.planners.lower.generate import (
    ENDS,
    ID,
    block_shape,
    counted_blocks,
    inference_body,
    news,
    program_sizes,
    prompt_parts,
)
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import cut_of
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.plan import PLAIN, TYPICAL, Plan
from autotune.spec.program import Instruction
from autotune.spec.work import Collective, Launch, Memory, Work
from autotune.spec.workload import Workload


@dataclass
class PassCosts:
    """Prices every instruction of `lower_generation(plan, model, workload, queries, keys)` on a machine."""

    plan: Plan
    model: ModelSpec
    workload: Workload
    bodies: BodyCosts
    queries: int
    keys: int
    blocks: dict[tuple[Block, Shape], Cost] = field(default_factory=dict)  # may be shared by passes of one plan
    _known: dict[tuple[str, int, tuple[str, ...]], Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.keys == self.queries  # the prompt's pass
        parts = prompt_parts(self.plan, self.workload) if self.first else ((self.queries, self.keys),)
        self.shapes = tuple(generation_shape(self.plan, self.workload, *part) for part in parts)
        site = self.bodies.site
        self.every = program_sizes(self.plan, self.model, self.workload, self.queries, self.keys, site)
        self.shape, self.sizes = self.shapes[-1], self.every[-1]

    def cost(self, instruction: Instruction) -> Cost:
        key = (instruction.op, instruction.stage, (str(instruction.item), *instruction.reads, *instruction.writes))
        if key not in self._known:
            self._known[key] = COSTS[instruction.op](self, instruction)
        return self._known[key]

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return self.cost(instruction).seconds

    def sent(self, rank: int, instruction: Instruction) -> int:
        return self.cost(instruction).sent if instruction.op != "RECV" else 0

    def transient(self, rank: int, instruction: Instruction) -> int:
        if instruction.op == "PROPOSE":
            return propose.PROPOSALS[self.plan.decoding].transient(self, self.first)
        return self.every[instruction.item][instruction.stage].transient if instruction.op == "F" else 0

    def piece(self, *works: Work, issued: bool = True) -> Cost:
        """Primitives in a row. `issued`: as an instruction, which costs the host something where it does the work
        itself; a device's host runs ahead of it."""
        inline = self.bodies.profile.inline
        total, launch = NOTHING, self.bodies.pricer.seconds(Launch(1)) if issued and inline else 0.0
        for work in works:
            seconds = self.bodies.pricer.seconds(work)
            kinds = {work.kind: seconds, "launch": launch}
            sent = int(work.bytes) if isinstance(work, Collective) else 0
            total += Cost(seconds + launch, kinds, {self.bodies.pricer.grade(work): seconds}, sent)
        return total

    def block(self, block: Block, part: int = -1) -> Cost:
        """A block's forward; of a layer also the copies of its new keys and values into the cache."""
        return self.priced(block, self.shapes[part], "prefill" if self.first else "decode")

    def priced(self, block: Block, whole: Shape, form: str) -> Cost:
        """The same of a pass of any shape."""
        shape = block_shape(block, whole)
        key = (block, shape)
        if key not in self.blocks:
            body = inference_body(block, whole)
            placed = self.bodies.placed(block, shape, "")
            cost = self.bodies.price(block, body, body.forward, shape, form, placed)
            for instruction in body.forward.ranks[0]:
                if instruction.op == "attention":
                    copies = (Memory("append", 2 * body.sizes[name], shape.dtype) for name in instruction.reads[1:])
                    cost += self.piece(*copies, issued=False)  # the instruction they belong to is issued already
            self.blocks[key] = cost
        return self.blocks[key]

    def forward(self, stage: int, part: int) -> Cost:
        """The bodies of a stage's blocks; in a prefill the last rows are copied out for the head, which of a prompt in
        parts comes after the last."""
        total, whole = NOTHING, True  # whether every token's row is there still
        for block, count in counted_blocks(self.model, cut_of(self.plan, self.model), stage).items():
            if block.kind in ENDS and part < len(self.shapes) - 1:
                continue
            total += self.block(block, part).times(count)
            if block.kind in ENDS and whole and self.queries > self.shape.scored:
                whole = False
                rows = self.shape.batch * self.model.hidden * self.shape.width
                total += self.piece(Memory("copy", 2 * rows, self.shape.dtype))
        return total

    def commit(self, stage: int) -> Cost:
        """A token after each that was scored, and which of those that were proposed are kept."""
        choice = self.choice(self.sizes[stage].output, self.plan.tensor)
        if self.first or self.plan.decoding == PLAIN:
            return choice + self.piece(settle_work(self.shape.batch, self.shape.dtype))
        if self.plan.commit == TYPICAL:  # of every row its distribution, as for a draw
            whole = self.sizes[stage].output * self.plan.tensor
            choice += self.piece(Memory("sample", whole, self.shape.dtype)) + self._gathered(whole, self.plan.tensor)
        return choice + propose.commit(self)

    def choice(self, logits: int, tensor: int) -> Cost:
        """The largest logit of each row of so many bytes, over this rank's vocabulary and then over the tensor ranks;
        or a draw from all logits, which every tensor rank makes by itself."""
        if self.workload.temperature:
            whole = logits * tensor
            cut = self.workload.top_k or self.workload.top_p < 1  # which takes all in order
            choice = self.piece(Memory("sample_cut" if cut else "sample", whole, self.shape.dtype))
            return choice + self._gathered(whole, tensor)
        best = self.piece(Memory("pick", logits, self.shape.dtype))
        return best + self._gathered(2 * ID * self.shape.batch * self.shape.scored * tensor, tensor)

    def _gathered(self, size: int, tensor: int) -> Cost:
        if tensor == 1:
            return NOTHING
        captured = not self.bodies.profile.inline
        return self.piece(Collective("all_gather", size, tensor, self.bodies.level, self.bodies.inner, captured))

    def hop(self, instruction: Instruction) -> Cost:
        """A boundary activation, or the picked tokens, between two pipeline ranks."""
        (name,) = instruction.reads + instruction.writes
        columns = {"t": scored(self.plan), "n": news(self.plan, self.first)}
        stage, part = (*map(int, name.split(".")[1:]), 0, 0)[:2] if name not in columns else (0, 0)
        size = columns[name] * self.shape.batch * ID if name in columns else self.every[part][stage].inputs
        level = self.bodies.pricer.level(self.plan.world)
        return self.piece(Collective("send_recv", size, 2, level), issued=False)


COSTS: dict[str, Callable[[PassCosts, Instruction], Cost]] = {
    "F": lambda c, i: c.forward(i.stage, i.item),
    "COMMIT": lambda c, i: c.commit(i.stage),
    "MOVE": lambda c, i: propose.moved(c, i.stage),
    "PROPOSE": lambda c, i: propose.PROPOSALS[c.plan.decoding].cost(c, c.first),
    "TAKE": lambda c, i: c.piece(Memory("copy", 2 * ID * c.shape.batch, c.shape.dtype)),
    "SEND": lambda c, i: c.hop(i),
    "RECV": lambda c, i: c.hop(i),
}
