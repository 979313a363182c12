"""A training plan as it is handed over, and what is said of it whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.export.served import Lost
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

NODE = 8  # processes of a node, where the machine does not say
BETAS, EPSILON = (0.9, 0.95), 1e-8  # of AdamW, as the executor has it


@dataclass(frozen=True)
class TrainJob:
    """A plan of a training run. `checkpoint`: where it begins from, or "". `node`: devices of one node."""

    plan: Plan
    workload: Workload
    model: ModelSpec
    checkpoint: str = ""
    steps: int = 0
    node: int = NODE

    @property
    def micro_batches(self) -> int:
        """Of each replica in a step."""
        return self.workload.global_batch // (self.plan.data * self.plan.micro_batch)

    def torchrun(self) -> tuple[str, ...]:
        """The launcher's words: one process a device."""
        here = min(self.node, self.plan.world)
        nodes = -(-self.plan.world // here)
        if nodes == 1:
            return "torchrun", "--standalone", "--nproc-per-node", str(here)
        return "torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(here)


def text_alone(engine: str, job: TrainJob) -> list[Lost]:
    """The masks beside a sequence's text, which no engine trains with."""
    if not (many := sum(job.workload.masks)):
        return []
    found = f"{many} rows beside each sequence"
    return [Lost("masks", found, f"{engine} trains on the text alone: to draft is not learned")]


def differs(plan: Plan, axis: str) -> bool:
    """Whether a plan says something about an axis."""
    return bool(getattr(plan, axis) != getattr(Plan(), axis))


def only(axis: str, plan: Plan, instead: str) -> list[Lost]:
    """The axis as lost, where the plan says something about it."""
    return [Lost(axis, str(getattr(plan, axis)), instead)] if differs(plan, axis) else []
