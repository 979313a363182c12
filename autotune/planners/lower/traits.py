"""Traits: all that the lists of a training program depend on. Plans that share them share the program's outline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from autotune.planners.lower.shape import Shape, training_shape
from autotune.planners.lower.sharding import Sharding, sharding
from autotune.planners.lower.stage import Cut, Sizes, cut_of, sizes, stage_blocks
from autotune.planners.lower.vocabulary import product_share, shard_parameters, shards
from autotune.planners.lower.workspace import Site
from autotune.planners.schedules import SCHEDULES, Pipe, Place, held
from autotune.planners.schedules.times import parse_times
from autotune.spec.graph import Block, Weight, blocks
from autotune.spec.heads_graph import frozen_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload


@dataclass(frozen=True)
class Traits:
    """What passes look at. A plan becomes traits once; no pass sees the plan, the model or a size."""

    schedule: str
    pipe: Pipe
    data: int  # 1, or 2 for any number of replicas
    zero: int
    tied: bool
    partial: tuple[bool, ...]  # [stage] whether tensor ranks must sum some gradients (see partial_weights)
    late: tuple[bool, ...]  # [stage] whether W reads the gradient of the stage's output
    offload: int = 0  # percent of a rank's chunk activations that move to the host
    vocabulary: str = "ends"
    product: float = 0.0  # see lower.vocabulary.product_share
    tensor: int = 1  # 1, or 2 for any number of ranks that share each layer
    clip: bool = False  # whether the step waits for the gradients' global norm
    optimizer: str = "barrier"  # when it waits: before the update, or after it
    subgroups: bool = False  # whether some optimizer states live on the host
    stride: int = 0  # every so manieth subgroup is updated by the device
    ahead: int = 0  # compute steps before the update at which the first of these start to be fetched
    shares: bool = False  # whether tensor ranks share the tokens between stages, of which a shard needs all
    gathered: int = 0  # see spec.plan
    sync: str = "eager"  # when gradients are summed: after the stage's last backward, or the rank's
    gather_each: str = "step"  # see spec.plan
    split: str = "own"  # see spec.plan
    offload_window: int = 2  # compute steps that a copy of them may take
    offload_choice: str = "selective"  # which of them move
    joined: bool = False  # whether W's of a stage in a row are one
    frozen: bool = False  # whether the first stage's input is made by another model, which stays as it is
    masked: bool = False  # whether a sequence's rows see others than those before them: `sight` says which
    divided: bool = False  # whether replicas hold different experts

    @cached_property
    def place(self) -> Place:
        """The ranks of the pipeline's own stages."""
        return SCHEDULES[self.schedule].place(self.pipe)

    @property
    def ends(self) -> bool:
        """Whether the outer stages hold the embedding and the head."""
        return self.vocabulary == "ends"

    def sharding(self, stage: int) -> Sharding:
        """What data ranks share of a stage."""
        return sharding(self.zero, stage, self.pipe.stages)

    def held(self, rank: int) -> tuple[int, ...]:
        """The stages whose weights a rank holds; the one beyond the last is its shard of the vocabulary."""
        return held(self.place, rank) + (() if self.ends else (self.pipe.stages,))


def micro_batches(plan: Plan, workload: Workload) -> int:
    """Micro-batches that one replica runs in a step."""
    return workload.global_batch // (plan.data * plan.micro_batch)


def pipe_of(plan: Plan, items: int) -> Pipe:
    """What the plan's schedule is asked for. `plan.times` must be sound (see planners.feasible)."""
    times = parse_times(plan.times, plan.stages)
    return Pipe(plan.pipeline, items, plan.chunks, plan.group, plan.limit, times, plan.order)


def place_of(plan: Plan, items: int) -> Place:
    """The pipeline ranks that hold each stage."""
    return SCHEDULES[plan.schedule].place(pipe_of(plan, items))


def stage_sizes(plan: Plan, model: ModelSpec, workload: Workload, site: Site | None = None) -> tuple[Sizes, ...]:
    """The bytes of every stage of a plan; of a shard of the vocabulary, where ranks have one, as the stage after.

    `site` matters to what is transient alone.
    """
    shape = training_shape(plan, workload)
    return _stage_sizes(model, cut_of(plan, model), shards(plan), shape, plan.recompute, site or Site())


@lru_cache(maxsize=4096)
def _stage_sizes(model: ModelSpec, cut: Cut, ranks: int, shape: Shape, policy: str, site: Site) -> tuple[Sizes, ...]:
    found = sizes(model, cut, shape, policy, site)
    return found if cut.ends else (*found, Sizes(shard_parameters(model, ranks), 0, 0, 0, 0, 0))


def partial_weights(block: Block, tensor: int, sequence_parallel: bool) -> tuple[Weight, ...]:
    """Weights that every tensor rank holds whole but sees only a part of the work for, its heads or its tokens.

    Their gradients are partial sums (Megatron-LM all-reduces them after the last backward).
    """
    return tuple(
        weight
        for node in block.nodes
        if tensor > 1 and (node.split == "heads" or (sequence_parallel and not node.split))
        for weight in node.weights
        if weight.shard is None and not weight.frozen
    )


@lru_cache(maxsize=1024)
def _sums_partial(model: ModelSpec, cut: Cut, tensor: int, sequence_parallel: bool) -> tuple[bool, ...]:
    """Of each stage, whether it has such weights."""
    found = tuple(
        any(partial_weights(block, tensor, sequence_parallel) for block in stage) for stage in stage_blocks(model, cut)
    )
    return found if cut.ends else (*found, False)  # a shard of the vocabulary is nobody else's


def traits(plan: Plan, model: ModelSpec, workload: Workload) -> Traits:
    """The traits of a feasible plan."""
    return Traits(
        plan.schedule,
        pipe_of(plan, micro_batches(plan, workload)),
        min(plan.replicas, 2),
        plan.zero,
        model.tied,
        _sums_partial(model, cut_of(plan, model), plan.tensor, plan.sequence_parallel),
        tuple(size.late_gradient for size in stage_sizes(plan, model, workload)),
        plan.offload,
        plan.vocabulary,
        0.0 if plan.vocabulary == "ends" else product_share(plan, model, workload),
        min(plan.tensor, 2),
        workload.clip > 0,
        plan.optimizer,
        plan.optimizer_offload > 0,
        plan.optimizer_stride,
        plan.optimizer_window,
        plan.sequence_parallel and plan.vocabulary != "ends",
        plan.gathered,
        plan.sync,
        plan.gather_each,
        plan.split,
        plan.offload_window,
        plan.offload_choice,
        plan.weight_gradients == "joined",
        bool(frozen_blocks(blocks(model))),
        bool(workload.masks),
        plan.expert > 1,
    )
