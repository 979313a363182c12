"""The plan that an engineer would write first, by the rules of thumb in use: what a search has to beat.

Training, as Narayanan et al. give it (Megatron-LM, 2104.04473, section 3): tensor parallel within a node and no
further, then pipeline across nodes (3.2, takeaway 1); of both together as little as the model needs to fit, data
parallel with all other devices (3.3, takeaway 2); the micro-batch trades a stage's efficiency against the pipeline's
bubble (3.4, takeaway 3), so 1 with a pipeline, and without one the largest that fits; 1F1B. Recompute is selective
where that makes a plan fit that would not otherwise, and of whole layers where nothing else does (Korthikanti et al.,
2205.05198). The optimizer is shared by the data ranks and norms by the tensor ranks, as in Megatron-LM's own
examples/llama/train_llama3_8b_h100_fp8.sh; routed experts are divided by as many ranks of a node as tensor ranks leave
(megatron/core/transformer/moe/README.md, guidelines 2 and 4).

Generation, as vLLM's documentation gives it (serving/parallelism_scaling): one device if the model fits, else tensor
parallel within the node, else as many tensor ranks as a node has and a pipeline stage a node. The whole batch at a
time, a token at a time, by the libraries' kernels.

Nothing of it looks at a predicted time, and of the recipe only at the work and the machine: its [search] is no part of
the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from autotune.planners.feasible import unsharded, why_not
from autotune.planners.predict import Predictor, TooLarge
from autotune.planners.search import limit_bytes
from autotune.planners.space import divisors
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question

RULES = {
    "train": "as little model parallelism as fits, tensor within a node, then pipeline; data parallel with the rest; "
    "micro-batch 1 with a pipeline, else the largest that fits; 1F1B (Narayanan et al., 2104.04473, section 3)",
    "generate": "one device if the model fits, else tensor parallel within a node, then a pipeline stage a node; the "
    "whole batch at a time, plain decoding, libraries' kernels (vLLM, serving/parallelism_scaling)",
}
POLICIES = (("none", "selective"), ("full",))  # of recompute: more ranks come before whole layers


@dataclass(frozen=True)
class Room:
    """Says which plans can run and fit into `allowed` bytes of a device."""

    question: Question
    predictor: Predictor
    allowed: int

    def fits(self, plan: Plan) -> bool:
        question = self.question
        if why_not(question.model, question.workload, plan, question.devices):
            return False
        # A training plan is left as soon as its memory is known: its time is of no interest here.
        found = self.predictor.attempt(plan, self.allowed, limit=0.0)
        return (
            max(found.peak_bytes) <= self.allowed if isinstance(found, Prediction) else not isinstance(found, TooLarge)
        )


def rule_of_thumb(question: Question) -> Plan | None:
    """The plan that the rules lead to; None where nothing they lead to fits."""
    room = Room(question, Predictor(question.model, question.workload, question.profile), limit_bytes(question))
    return (_training if question.workload.kind == "train" else _generation)(room)


def degrees(question: Question) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) with the fewest ranks first: tensor ranks as far as a node and the model's widths go, and
    beyond that pipeline stages."""
    node = question.profile.device.count or question.devices
    inside = [t for t in divisors(question.devices) if t <= node and not unsharded(question.model, t)]
    yield from ((tensor, 1) for tensor in inside)
    yield from ((inside[-1], stages) for stages in divisors(question.devices // inside[-1])[1:])


def _training(room: Room) -> Plan | None:
    question = room.question
    for policies in POLICIES:
        for tensor, pipeline in degrees(question):
            for recompute in policies:
                plan = _meshed(question, tensor, pipeline).altered(recompute=recompute)
                if room.fits(plan):
                    return plan if pipeline > 1 else _largest(room, plan)
    return None


def _meshed(question: Question, tensor: int, pipeline: int) -> Plan:
    """The training plan of these degrees, with data parallel on all other devices."""
    data = question.devices // (tensor * pipeline)
    node, experts = question.profile.device.count or question.devices, question.model.experts
    expert = gcd(experts.count, data, max(1, node // tensor)) if experts else 1
    return Plan(data, tensor, pipeline, zero=int(data > 1), sequence_parallel=tensor > 1, expert=expert)


def _largest(room: Room, plan: Plan) -> Plan:
    """The plan with its micro-batch doubled as often as the batch and the memory let it."""
    doubled = plan.altered(micro_batch=2 * plan.micro_batch)
    return _largest(room, doubled) if room.fits(doubled) else plan


def _generation(room: Room) -> Plan | None:
    question, plan = room.question, Plan()
    for tensor, pipeline in degrees(question):
        data = question.devices // (tensor * pipeline)
        plan = Plan(data, tensor, pipeline, micro_batch=max(1, question.workload.batch // data))
        if room.fits(plan):
            return plan
    # Not the whole batch at a time, then: as much of it as fits where there is most room.
    fewer = (plan.altered(micro_batch=many) for many in reversed(divisors(plan.micro_batch)[:-1]))
    return next((each for each in fewer if room.fits(each)), None)
