"""What one block's forward and backward cost on a machine: its body simulated once and remembered."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autotune.planners.costs.in_place import body_mark
from autotune.planners.costs.price import Pricer
from autotune.planners.costs.works import TOGETHER, Around, as_captured, handed, issued, works
from autotune.planners.lower.body import Body
from autotune.planners.lower.join import joined_body, together
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import Runs
from autotune.planners.lower.workspace import Site, workspace
from autotune.planners.simulate import simulate
from autotune.spec.graph import Block
from autotune.spec.machine import Profile
from autotune.spec.program import COMPUTE, Instruction, Program
from autotune.spec.timeline import Timeline, overlap, union
from autotune.spec.work import Launch, Work


@dataclass(frozen=True)
class Cost:
    """Seconds of a body, split by kind of work and by the grade the numbers rest on, and bytes put on links."""

    seconds: float
    kinds: Mapping[str, float]
    grades: Mapping[str, float]
    sent: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            Counter(self.kinds) + Counter(other.kinds),
            Counter(self.grades) + Counter(other.grades),
            self.sent + other.sent,
        )

    def times(self, count: float) -> Cost:
        """The cost of doing it `count` times in a row."""
        return Cost(
            self.seconds * count,
            {kind: seconds * count for kind, seconds in self.kinds.items()},
            {grade: seconds * count for grade, seconds in self.grades.items()},
            int(self.sent * count),
        )


NOTHING = Cost(0.0, {}, {})


def added(costs: Iterable[Cost]) -> Cost:
    """The sum of many costs, one after another: as `+` gives it, without a mapping for each step."""
    every = list(costs)

    def parts(maps: list[Mapping[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for each in dict.fromkeys(map(id, maps)) for name in known[each])
        sums = {name: sum(each.get(name, 0.0) for each in maps) for name in names}
        return {name: seconds for name, seconds in sums.items() if seconds > 0}

    kinds, grades = [cost.kinds for cost in every], [cost.grades for cost in every]
    known = {id(each): each for each in (*kinds, *grades)}
    return Cost(sum(cost.seconds for cost in every), parts(kinds), parts(grades), sum(cost.sent for cost in every))


@dataclass
class BodyCosts:
    """Prices bodies for one profile at one number of concurrent ranks.

    `level` and `inner` say how the tensor group lies on the links (see `Collective`), `around` the same of those
    that share sequences.
    """

    profile: Profile
    pricer: Pricer
    level: int = 0
    inner: int = 1
    around: Around = TOGETHER
    _known: dict[tuple[Block, Shape, str, str, int], Cost] = field(default_factory=dict)
    _stages: dict[tuple[Runs, Shape, str, str, int], Cost] = field(default_factory=dict)

    def of(self, block: Block, shape: Shape, policy: str, op: str, joined: int = 1) -> Cost:
        """What one block does in an F, BW, B or W, or in the W's of so many micro-batches that are joined; a block
        without names (see lower.stage.canonical) is priced once."""
        key = (block, shape, policy, op, joined)
        if key not in self._known:
            body = joined_body(block, shape, policy, joined)
            placed = joined == 1 and self.placed(block, shape, policy)
            self._known[key] = self.price(block, body, body.program(op), together(shape, joined), placed=placed)
        return self._known[key]

    def placed(self, block: Block, shape: Shape, policy: str) -> bool:
        """Whether this body's operations were timed where they stand, issued as they are."""
        return self.profile.inline and body_mark(block, shape, policy, self.pricer.ranks) in self.profile.sources

    def stage(self, runs: Runs, shape: Shape, policy: str, op: str, joined: int = 1) -> Cost:
        """What a stage's blocks do in an F, BW, B or W, one after another."""
        key = (runs, shape, policy, op, joined)
        if key not in self._stages:
            self._stages[key] = added(self.of(block, shape, policy, op, joined).times(count) for block, count in runs)
        return self._stages[key]

    def price(
        self, block: Block, body: Body, program: Program, shape: Shape, form: str = "train", placed: bool = False
    ) -> Cost:
        """Simulates one body program and adds up what its instructions rest on. `form`: train | prefill | decode;
        `placed`: its operations were timed where they stand, issued as they are."""
        table = _Table(self, block, body, shape, form, 0.0 if placed else self.issue(form))
        timeline = simulate(program, table, inline=self.profile.inline)
        kinds: dict[str, float] = defaultdict(float)
        grades: dict[str, float] = defaultdict(float)
        for instruction in program.ranks[0]:
            for work in table.works(instruction):
                seconds = self.pricer.seconds(work)
                kinds[work.kind] += seconds
                grades[self.pricer.grade(work)] += seconds
            kinds["launch"] += table.overhead(instruction)
        slowed = self.contention(timeline)
        kinds["contention"] += slowed
        # A pass of generation is captured: its device does not wait for the host.
        busy = timeline.makespan + slowed
        waited = self.starved(self.hosting(block, program, shape), busy) if form == "train" else 0.0
        kinds["launch"] += waited
        return Cost(timeline.makespan + slowed + waited, kinds, grades, timeline.sent[0])

    def works(
        self, block: Block, body: Body, instruction: Instruction, shape: Shape, form: str = "train"
    ) -> tuple[Work, ...]:
        """The primitives of one instruction of a body: on a GPU the passes of a generation are captured."""
        found = works(block, body, instruction, shape, self.level, self.inner, self.around)
        return found if form == "train" or self.profile.inline else as_captured(found)

    def starved(self, issuing: float, busy: float) -> float:
        """Seconds that a device busy for `busy` waits for a host that takes `issuing` to hand the body over.

        The host runs ahead: a long instruction hides the issuing of the short ones after it, so only the sums count.
        """
        return 0.0 if self.profile.inline else max(0.0, issuing - busy)

    def contention(self, timeline: Timeline) -> float:
        """Seconds that compute loses to collectives running beside it.

        Hidden communication of c seconds takes c x its measured slowdown, and compute beside it advances at one over
        its own: the difference is what the body ends later.
        """
        lanes: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for span in timeline.spans:
            lanes[timeline.instruction(span).lane == COMPUTE].append((span.start, span.end))
        hidden = overlap(union(sorted(lanes[True])), union(sorted(lanes[False])))
        measured = self.pricer.interference()
        return hidden * measured.communication * (1 - 1 / measured.compute)

    @property
    def site(self) -> Site:
        """Workers share a CPU's cores evenly."""
        device = self.profile.device
        return Site(device.kind, max(1, device.cores // self.pricer.ranks) if self.profile.inline else 1)

    def issue(self, form: str) -> float:
        """Seconds that one instruction takes however small it is: measured on our own bodies, else one launch."""
        generic = "decode" if form == "decode" else "train"
        seconds, grade = self.pricer.price(Launch(1, generic))
        known = self.profile.coefficients.get(f"instruction_seconds.{generic}", seconds)
        return seconds if grade == "measured" else known

    def handing(self, instruction: Instruction, form: str = "train") -> float:
        """Seconds of the host for one instruction of a body: a collective's are its own where measured."""
        if instruction.lane != COMPUTE:
            seconds, grade = self.pricer.price(handed(instruction))
            if grade == "measured":
                return seconds
        return self.issue(form)

    def hosting(self, block: Block, program: Program, shape: Shape, form: str = "train") -> float:
        """Seconds of the host to hand over a body's instructions one by one."""
        return sum(self.handing(i, form) * issued(block, i, shape) for i in program.ranks[0])


@dataclass
class _Table:
    """The simulator's cost table of one body."""

    costs: BodyCosts
    block: Block
    body: Body
    shape: Shape
    form: str
    issue: float

    def works(self, instruction: Instruction) -> tuple[Work, ...]:
        return self.costs.works(self.block, self.body, instruction, self.shape, self.form)

    def overhead(self, instruction: Instruction) -> float:
        """What issuing adds where the host itself does the work: the part of it that the work does not hide."""
        if not self.costs.profile.inline:
            return 0.0
        parts = list(map(self.costs.pricer.seconds, self.works(instruction)))
        if issued(self.block, instruction, self.shape) > 1:  # about one primitive each
            return sum(max(0.0, self.issue - seconds) for seconds in parts)
        return max(0.0, self.issue - sum(parts))

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return sum(map(self.costs.pricer.seconds, self.works(instruction))) + self.overhead(instruction)

    def transient(self, rank: int, instruction: Instruction) -> int:
        return workspace(self.block, instruction, self.shape, self.body.sizes, self.costs.site)

    def sent(self, rank: int, instruction: Instruction) -> int:
        return sum(int(work.bytes) for work in self.works(instruction) if work.kind == "collective")
