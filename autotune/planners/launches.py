"""Whether the host or the device is what a model waits for, by batch, and what capturing a graph gains.

After SKIP (Vellaisamy et al., 2504.11750): a kernel's launch and queue time runs from the beginning of the call that
launches it to its own beginning. While the host is slower than the device that is the launch alone, whatever the batch;
beyond, kernels queue, and the total grows with the batch. The batch where a body's instructions take the device longer
than they take the host is where a model stops being launch-bound. A captured graph is handed over at once, so that only
the device's time remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat

from autotune.planners.costs.generate import PassCosts
from autotune.planners.costs.step import StepCosts
from autotune.planners.costs.works import issued
from autotune.planners.decoding.strategies import scored
from autotune.planners.feasible import why_not
from autotune.planners.lower.body import Body
from autotune.planners.lower.generate import block_shape, counted_blocks, inference_body
from autotune.planners.lower.join import joined_body
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import cut_of
from autotune.planners.predict import Predictor
from autotune.planners.predict_generation import contexts
from autotune.spec.graph import Block
from autotune.spec.plan import Plan
from autotune.spec.program import Program
from autotune.spec.work import Launch
from autotune.spec.workload import Workload

MOST = 2**16  # sequences at a time: beyond, nobody asks


@dataclass(frozen=True)
class Phase:
    """What a rank's bodies take in one pass at one batch, in seconds. `batch`: sequences a replica takes at a time;
    `queue_s`: the sum of launch and queue times; `eager_s`: each instruction handed over by the host, `device_s`: none.
    """

    batch: int
    launches: int
    host_s: float
    device_s: float
    queue_s: float
    eager_s: float

    @property
    def launch_bound(self) -> bool:
        return self.host_s > self.device_s

    @property
    def gain(self) -> float:
        """How much longer the pass takes than captured, as a fraction."""
        return self.eager_s / self.device_s - 1


@dataclass(frozen=True)
class Launches:
    """One kind of pass. `own` is at the plan's batch; `swept` by doubling batches. `turn`: the least batch at which it
    is no longer launch-bound, None where none that can run is; `last`: the largest that can run and was looked at."""

    name: str
    own: Phase
    swept: tuple[Phase, ...]
    turn: int | None
    last: int


Pass = tuple[Block, Body, Program, Shape, str, int]  # and the count of such blocks in a row


def launches(predictor: Predictor, plan: Plan) -> tuple[Launches, ...]:
    """Of a training plan a micro-batch there and back; of a generation its prefill and a round at mid context. Of a
    pipeline the stage that takes longest."""
    kinds = TRAINING if predictor.workload.kind == "train" else GENERATION
    return tuple(_swept(name, partial(at, predictor, plan), predictor, plan) for name, at in kinds)


def _swept(name: str, at: Callable[[int], Phase], predictor: Predictor, plan: Plan) -> Launches:
    def runs(batch: int) -> bool:
        moved = plan.altered(micro_batch=batch)
        return batch <= MOST and why_not(predictor.model, _work(predictor, plan, batch), moved) is None

    found: list[Phase] = []
    batch = 1
    while runs(batch):
        found.append(at(batch))
        if not found[-1].launch_bound and batch >= plan.micro_batch:
            break
        batch *= 2
    turn = next((phase.batch for phase in found if not phase.launch_bound), None)
    if turn is not None and turn > 1:
        low = turn // 2  # launch-bound still
        while turn - low > 1:
            middle = (low + turn) // 2
            low, turn = (middle, turn) if at(middle).launch_bound else (low, middle)
    return Launches(name, at(plan.micro_batch), tuple(found), turn, found[-1].batch if found else 0)


def _work(predictor: Predictor, plan: Plan, batch: int) -> Workload:
    """The workload in which every replica takes so many sequences at a time."""
    together, work = plan.data * batch, predictor.workload
    if work.kind == "train":
        return replace(work, global_batch=together * max(1, work.global_batch // (plan.data * plan.micro_batch)))
    return replace(work, batch=together, prompt_lengths=())


def _micro_batch(predictor: Predictor, plan: Plan, batch: int) -> Phase:
    """The F and the BW of a stage."""
    moved, work = plan.altered(micro_batch=batch), _work(predictor, plan, batch)
    costs = StepCosts(moved, predictor.model, work, predictor.profile, predictor.bodies(moved))

    def stage(number: int) -> Iterator[Pass]:
        for op in ("F", "BW"):
            for block, count in costs.stages[number]:
                body = joined_body(block, costs.shape, plan.recompute, 1)
                yield block, body, body.program(op), costs.shape, "train", count

    def spent(number: int) -> tuple[float, float]:
        both = [costs.stage(number, op) for op in ("F", "BW")]
        launch = sum(cost.kinds.get("launch", 0.0) for cost in both)
        whole = sum(cost.seconds for cost in both)
        return whole, whole - launch

    longest = max(range(moved.stages), key=lambda s: spent(s)[0])
    return _phase(predictor, moved, batch, list(stage(longest)), *spent(longest))


def _pass(predictor: Predictor, plan: Plan, batch: int, queries: int, keys: int) -> Phase:
    """A forward of a stage over so many new tokens of each sequence."""
    moved, work = plan.altered(micro_batch=batch), _work(predictor, plan, batch)
    moved = moved.altered(prompt_chunk=0)  # one pass
    model, bodies, cut = predictor.model, predictor.bodies(moved), cut_of(moved, predictor.model)
    costs = PassCosts(moved, model, work, bodies, queries, keys)
    form = "prefill" if costs.first else "decode"

    def stage(number: int) -> Iterator[Pass]:
        for block, count in counted_blocks(model, cut, number).items():
            body = inference_body(block, costs.shape)
            yield block, body, body.forward, block_shape(block, costs.shape), form, count

    def spent(number: int) -> tuple[float, float]:
        cost = costs.forward(number, 0)
        device = cost.seconds - cost.kinds.get("launch", 0.0)
        hosted = sum(bodies.hosting(b, program, shape, how) * n for b, _, program, shape, how, n in stage(number))
        return cost.seconds if predictor.profile.inline else max(device, hosted), device

    longest = max(range(moved.stages), key=lambda s: spent(s)[0])
    return _phase(predictor, moved, batch, list(stage(longest)), *spent(longest))


def _phase(
    predictor: Predictor, plan: Plan, batch: int, bodies: Sequence[Pass], eager_s: float, device_s: float
) -> Phase:
    costs = predictor.bodies(plan)
    call = costs.pricer.seconds(Launch(1))

    def instructions(part: Pass) -> Iterator[tuple[float, float]]:
        block, body, program, shape, form, _ = part
        for instruction in program.ranks[0]:
            device = sum(map(costs.pricer.seconds, costs.works(block, body, instruction, shape, form)))
            many = issued(block, instruction, shape)
            yield from repeat((costs.handing(instruction, form), device / max(1, many)), many)

    parts = [(list(instructions(part)), part[-1]) for part in bodies]
    every = list(chain.from_iterable(chain.from_iterable(repeat(each, count)) for each, count in parts))
    host_s = sum(hosted for hosted, _ in every)
    return Phase(batch, len(every), host_s, device_s, queued(every, call), eager_s)


def queued(instructions: Sequence[tuple[float, float]], call: float) -> float:
    """The sum of launch and queue times of instructions that take (host, device) seconds each and run on one stream in
    order, where the last `call` seconds of the host's are the launch itself."""
    total = handed = free = 0.0
    for host, device in instructions:
        handed += host
        start = max(handed, free)
        total += start - (handed - min(call, host))
        free = start + device
    return total


def _prefill(predictor: Predictor, plan: Plan, batch: int) -> Phase:
    length = predictor.workload.prompt_length
    return _pass(predictor, plan, batch, length, length)


def _round(predictor: Predictor, plan: Plan, batch: int) -> Phase:
    points, new = contexts(predictor.workload), scored(plan)
    middle = points[len(points) // 2] if points else predictor.workload.prompt_length + 1
    return _pass(predictor, plan, batch, new, middle - 1 + new)


TRAINING = (("micro-batch, forward and backward", _micro_batch),)
GENERATION = (("prefill", _prefill), ("a round of decoding", _round))
