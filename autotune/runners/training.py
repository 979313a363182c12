"""A trainer: one rank's weights, compiled bodies and interpreter. What instructions do is in the tables it joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.planners.lower.body import PROGRAMS
from autotune.planners.lower.expand import expand
from autotune.planners.lower.join import joined_body, part_of
from autotune.planners.lower.shape import Shape, sight_columns, training_shape
from autotune.planners.lower.sharding import sharding
from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.planners.lower.train import lower_training
from autotune.planners.lower.traits import micro_batches, place_of
from autotune.planners.lower.vocabulary import shard_of, shards, vocabulary_blocks
from autotune.planners.passes.clip import CARRIED, NORM, WHOLE
from autotune.planners.passes.settle import SETTLES
from autotune.planners.schedules import held
from autotune.runners import (
    clip_ops,
    gradient_ops,
    message_ops,
    shard_ops,
    stage_ops,
    subgroup_ops,
    tier_ops,
    vocabulary_ops,
)
from autotune.runners.body import Call, Values, Watch, compile_body, run_body
from autotune.runners.frozen import Frozen
from autotune.runners.interpreter import Interpreter, Operation
from autotune.runners.mesh import Mesh, staged
from autotune.runners.ops import Env
from autotune.runners.rope import tables
from autotune.runners.rows import Batch
from autotune.runners.state import DTYPES, Flat, Key, Loader, Rates, Seat, StageState
from autotune.runners.vocabulary_shard import loaded_rows
from autotune.spec.graph import Block, blocks
from autotune.spec.heads import HeadsSpec
from autotune.spec.heads_graph import frozen_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import COPIES, Program
from autotune.spec.workload import Workload

OPERATIONS: dict[str, Callable[..., Any]] = {
    **stage_ops.OPERATIONS,
    **message_ops.OPERATIONS,
    **tier_ops.OPERATIONS,
    **gradient_ops.OPERATIONS,
    **shard_ops.OPERATIONS,
    **vocabulary_ops.OPERATIONS,
    **clip_ops.OPERATIONS,
    **subgroup_ops.OPERATIONS,
}
NUMBERS = (NORM, CARRIED, WHOLE)


def places(plan: Plan, workload: Workload, context: int) -> Tensor:
    """int64 [tokens of a sequence here]: where in each sequence the tokens of this part of it stand.

    Of twice as many pieces as the ring has ranks, each rank has one from the front and one as far from the end; those
    that exchange heads have the two in equal parts.
    """
    heads = plan.context // plan.context_ring
    at, part = divmod(context, heads)
    tokens = torch.arange(workload.rows)  # of sequences with masks, the numbers of their rows: positions come with them
    if plan.context_ring > 1:
        pieces = tokens.view(2 * plan.context_ring, -1)
        tokens = torch.cat((pieces[at], pieces[-1 - at]))
    return tokens.view(heads, -1)[part]


def sight(workload: Workload, device: torch.device) -> Tensor | None:
    """Room for which rows of a sequence see which (see ops.Env), where they do not see all before them."""
    if not workload.masks:
        return None
    shape = workload.rows, sight_columns(workload.rows)
    return torch.zeros(shape, dtype=DTYPES[workload.precision], device=device)


def _apart(plan: Plan, mesh: Mesh) -> Seat | None:
    """Whose share of its experts a rank has, where replicas hold different ones."""
    if plan.expert == 1:
        return None
    return Seat(mesh.number(COPIES), plan.copies) if plan.zero else Seat()


@dataclass
class Trainer:
    """One rank of a training step. `interpreter.step()` runs it on the batch given to `feed`."""

    plan: Plan
    model: ModelSpec
    workload: Workload
    mesh: Mesh
    states: dict[int, StageState]
    program: Program
    env: Env
    shape: Shape
    calls: dict[tuple[Block, str, int], tuple[Call, ...]] = field(default_factory=dict)
    target: Frozen | None = None
    interpreter: Interpreter = field(init=False)
    watch: list[tuple[Block, str, int, Watch]] | None = None

    @classmethod
    def build(
        cls,
        plan: Plan,
        model: ModelSpec,
        workload: Workload,
        rank: int,
        device: torch.device,
        load: Loader,
        load_target: Loader | None = None,
    ) -> Trainer:
        """Groups, weights and the compiled bodies of this rank's stages. `load_target`: where the weights of a frozen
        model come from that makes the input."""
        program = expand(lower_training(plan, model, workload), plan)
        mesh = Mesh.build(plan, [program], rank, device)
        shape = training_shape(plan, workload)
        place = place_of(plan, micro_batches(plan, workload))
        stages = stage_blocks(model, cut_of(plan, model), mesh.expert)
        build = partial(
            StageState.build,
            precision=workload.precision,
            tensor_size=plan.tensor,
            shards=plan.replicas if plan.zero else 1,
            shard=mesh.replica if plan.zero else 0,
            apart=_apart(plan, mesh),
            device=device,
            offload=plan.optimizer_offload,
        )
        shared = partial(sharding, plan.zero, stages=plan.stages)
        states = {s: build(stages[s], load, shared=shared(s)) for s in held(place, mesh.pipeline)}
        used = {(i.stage, i.op, max(1, i.part)) for i in program.ranks[rank] if i.op in PROGRAMS}
        calls = {
            (block, op, many): compile_body(block, joined_body(block, shape, plan.recompute, many).program(op))
            for stage, op, many in used
            for block in states[stage].blocks
        }
        if plan.vocabulary != "ends":
            rows = loaded_rows(load, model, shard_of(plan, mesh.pipeline, mesh.tensor))
            states[plan.stages] = build(vocabulary_blocks(model, shards(plan)), rows, shared=shared(plan.stages))
        inner, target = frozen_blocks(blocks(model)), None
        if inner:
            assert isinstance(model, HeadsSpec) and model.target and load_target
            target = Frozen.build(model.target, inner, shape, load_target, device)
        env = Env(
            model,
            plan.micro_batch,
            shape.queries,
            places(plan, workload, mesh.context).to(device),
            tables(model, workload.sequence_length + len(workload.masks), device),
            {},
            tensor_rank=mesh.tensor,
            tensor_size=plan.tensor,
            context_size=plan.context // plan.context_ring,
            ring_rank=mesh.context // (plan.context // plan.context_ring),
            ring_size=plan.context_ring,
            expert_size=plan.expert,
            all_reduce=mesh.all_reduce,
            attention=plan.attention,
            loss_scale=1.0 / (workload.global_batch * workload.rows),
            frozen=target.rows if target else None,
            sight=sight(workload, device),
        )
        trainer = cls(plan, model, workload, mesh, states, program, env, shape, calls, target)
        by_host = frozenset(i.lane for i in program.ranks[rank] if i.peers) if staged(device) else frozenset()
        initial = trainer.initial()
        trainer.interpreter = Interpreter(program, rank, trainer.operations(), initial, device, host_lanes=by_host)
        return trainer

    def initial(self) -> dict[str, Any]:
        """The persistent values: weights, gradients and optimizer states of every stage here."""
        values: dict[str, Any] = {}
        for s, state in self.states.items():
            own = state.masters if state.masters[0].dtype != state.weight.dtype else ()
            values |= {
                f"w.{s}": (state.weight, *state.frozen.values()) if state.frozen else state.weight,
                f"g.{s}": state.grad,
                f"o.{s}": (*own, state.exp_avg, state.exp_avg_sq),
                **{f"oh.{s}.{j}": states for j, states in enumerate(state.hosted)},
            }
        if self.target:
            values["tw"] = self.target.state.weight
        if self.workload.clip:
            names = {n for i in self.program.ranks[self.mesh.rank] for n in (*i.reads, *i.writes)} & {*NUMBERS}
            values |= {n: torch.zeros(2, dtype=torch.float64, device=self.mesh.device) for n in names}
        dtype = torch.float64 if self.workload.precision == "fp64" else torch.float32
        if "loss" in self.program.buffers[self.mesh.rank]:
            values["loss"] = torch.zeros((), dtype=dtype, device=self.mesh.device)
        return values

    def feed(self, batch: Batch | tuple[Tensor, Tensor]) -> None:
        """Tokens and targets of a step, on the ranks that need them, each a part of each sequence; clears the loss.
        How its rows lie goes to where the last step's are."""
        batch = Batch(*batch)
        if batch.rows is not None and self.env.sight is not None:
            self.env.positions.copy_(batch.rows.positions)
            seen = batch.rows.seen(self.mesh.device, self.model.window)
            self.env.sight[:, : len(seen)].masked_fill_(seen, 0).masked_fill_(~seen, float("-inf"))
        if self.plan.context > 1:
            here = self.env.positions.to(batch[0].device)
            batch = Batch(batch.tokens[:, here], batch.targets[:, here])
        tokens, targets = (t.to(self.mesh.device) for t in batch[:2])
        needed = {"tokens": tokens, "targets": targets, "sight": self.env.sight}
        named = self.program.buffers[self.mesh.rank]
        self.interpreter.values.update({name: value for name, value in needed.items() if name in named})
        if "loss" in self.interpreter.values:
            self.interpreter.values["loss"].zero_()

    def operations(self) -> Mapping[str, Operation]:
        """The table's functions, given this trainer."""
        return {op: partial(run, self) for op, run in OPERATIONS.items()}

    def rows(self, values: Mapping[str, Any], name: str, item: int) -> Tensor:
        """Tokens or targets of one micro-batch, flat [tokens]."""
        batch: Tensor = values[name]
        return batch[item * self.plan.micro_batch : (item + 1) * self.plan.micro_batch].reshape(-1)

    def block_env(self, stage: int, block: Block) -> Env:
        """What a block's operations see: the stage's weights and gradients, whole ones that are lent where it has but
        a share."""
        state, values = self.states[stage], self.interpreter.values
        lent: list[Flat | None] = [values.get(f"{kind}.{stage}") for kind in ("fw", "fg")]
        weights, grads = state.of(block, *lent)
        return replace(self.env, weights=weights, grads=grads)

    def whole(self, stage: int, flat: Tensor) -> Mapping[Key, Tensor]:
        """A stage's parameters in a flat tensor of weights or gradients, of which this rank may know its share alone.
        Every data rank must ask."""
        state = self.states[stage]
        if not self.plan.zero:
            return state.views(flat)
        gathered = flat.new_empty(state.whole)
        self.gather(state, flat, gathered)
        return state.views(gathered)

    def gather(self, state: StageState, flat: Tensor, whole: Tensor) -> None:
        """This rank's shares of a stage, in `flat`, and all others' into `whole`."""
        for segment in state.segments:
            share, group = state.part(flat, segment.mine).clone(), self.mesh.axes[segment.axis]
            if group is None:
                whole[segment.where].copy_(share)
            else:
                dist.all_gather_into_tensor(whole[segment.where], share, group=group)

    def run(self, block: Block, op: str, stage: int, given: Values, many: int = 1) -> Values:
        """The block's program for an outer instruction, of `many` micro-batches together; gives what it leaves."""
        watch = None
        if self.watch is not None:
            source = block.nodes[0].reads[0]
            parts = {part_of(source, number) for number in range(many)} if many > 1 else {source}
            watch = Watch(outside=frozenset({*parts, "targets"}))
            self.watch.append((block, op, many, watch))
        env = self.block_env(stage, block)
        env = replace(env, batch=many * env.batch) if many > 1 else env
        return run_body(self.calls[block, op, many], env, given, self.mesh.axes, watch)

    def rates(self, step: int) -> Rates:
        """Those of the optimizer step that is a stage's `step`th."""
        return Rates(self.workload.rate(step), self.workload.weight_decay)

    def take(self, state: StageState, scale: float | None) -> None:
        """One optimizer step with the gradients scaled, in place; None: it is skipped."""
        state.taken = scale
        if scale is None:
            return
        if scale != 1.0:
            state.grad.mul_(scale)
        state.update(self.rates(state.steps + 1))

    def redo(self, state: StageState, scale: float | None) -> None:
        """Takes the last step back where there was one, and takes it as it should have been."""
        if state.taken is not None:
            state.revert(self.rates(state.steps))
        self.take(state, scale)
        if state.shared.spreads:
            self.gather(state, state.weight, state.weight)

    def finish(self) -> None:
        """Settles what the last step left open: afterwards the weights are those of all steps. Every rank calls it."""
        self.interpreter.step(only=SETTLES)

    @property
    def items(self) -> int:
        return micro_batches(self.plan, self.workload)
