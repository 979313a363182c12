"""The training operations: what F, BW, SEND, OPT and their like do on this rank. One line of the table each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.planners.lower.body import lower_block
from autotune.planners.lower.expand import expand
from autotune.planners.lower.shape import Shape, training_shape
from autotune.planners.lower.stage import stage_blocks
from autotune.planners.lower.train import lower_training, micro_batches, partial_weights
from autotune.planners.schedules import SCHEDULES
from autotune.runners.body import Call, Values, Watch, compile_body, run_body
from autotune.runners.interpreter import Interpreter, Operation, Started
from autotune.runners.mesh import Mesh
from autotune.runners.ops import Env
from autotune.runners.rope import tables
from autotune.runners.state import DTYPES, Loader, StageState
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction, Program
from autotune.spec.workload import Workload

Batch = tuple[Tensor, Tensor]  # tokens and targets, int64 [sequences of this replica, sequence length]


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
    calls: dict[Block, tuple[tuple[Call, ...], tuple[Call, ...]]] = field(default_factory=dict)
    interpreter: Interpreter = field(init=False)
    watch: list[tuple[Block, str, Watch]] | None = None

    @classmethod
    def build(
        cls, plan: Plan, model: ModelSpec, workload: Workload, rank: int, device: torch.device, load: Loader
    ) -> Trainer:
        """Groups, weights and the compiled bodies of this rank's stages."""
        program = expand(lower_training(plan, model, workload), plan)
        mesh = Mesh.build(plan, program, rank, device)
        shape = training_shape(plan, workload)
        place = SCHEDULES[plan.schedule].place(plan.pipeline, plan.chunks)
        stages = stage_blocks(model, plan.stages)
        states = {
            s: StageState.build(
                stages[s],
                load,
                precision=workload.precision,
                tensor_size=plan.tensor,
                shards=plan.data if plan.zero else 1,
                shard=mesh.data if plan.zero else 0,
                device=device,
            )
            for s, owner in enumerate(place)
            if owner == mesh.pipeline
        }
        env = Env(
            model,
            plan.micro_batch,
            workload.sequence_length,
            torch.arange(workload.sequence_length, device=device),
            tables(model, workload.sequence_length, device),
            {},
            tensor_rank=mesh.tensor,
            tensor_size=plan.tensor,
            all_reduce=mesh.all_reduce,
            attention=plan.attention,
            loss_scale=1.0 / workload.tokens,
        )
        trainer = cls(plan, model, workload, mesh, states, program, env, shape)
        for state in states.values():
            for block in state.blocks:
                body = lower_block(block, shape, plan.recompute)
                trainer.calls[block] = (compile_body(block, body.forward), compile_body(block, body.backward))
        trainer.interpreter = Interpreter(program, rank, trainer.operations(), trainer.initial(), device)
        return trainer

    def initial(self) -> dict[str, Any]:
        """The persistent values: weights, gradients and optimizer states of every stage here."""
        values: dict[str, Any] = {}
        for s, state in self.states.items():
            own = (state.master,) if state.master.dtype != state.weight.dtype else ()
            values |= {
                f"w.{s}": state.weight,
                f"g.{s}": state.grad,
                f"o.{s}": (*own, state.exp_avg, state.exp_avg_sq),
            }
        dtype = torch.float64 if self.workload.precision == "fp64" else torch.float32
        if self.plan.stages - 1 in self.states:
            values["loss"] = torch.zeros((), dtype=dtype, device=self.mesh.device)
        return values

    def feed(self, batch: Batch) -> None:
        """The step's tokens and targets, on the ranks that need them; clears the loss."""
        tokens, targets = (t.to(self.mesh.device) for t in batch)
        if 0 in self.states:
            self.interpreter.values["tokens"] = tokens
        if "loss" in self.interpreter.values:
            self.interpreter.values["targets"] = targets
            self.interpreter.values["loss"].zero_()

    def operations(self) -> Mapping[str, Operation]:
        return {
            "F": self.forward,
            "BW": self.backward,
            "SEND": self.send,
            "RECV": self.receive,
            "ALL_REDUCE": self.over_data("g", dist.all_reduce),
            "REDUCE_SCATTER": self.reduce_scatter,
            "ALL_GATHER": self.all_gather,
            "SUM_PARTIAL": self.sum_partial,
            "TIE": self.tie,
            "OPT": self.update,
        }

    # F and BW: the blocks of a stage, one after another

    def rows(self, values: Mapping[str, Any], name: str, item: int) -> Tensor:
        """Tokens or targets of one micro-batch, flat [tokens]."""
        batch: Tensor = values[name]
        return batch[item * self.plan.micro_batch : (item + 1) * self.plan.micro_batch].reshape(-1)

    def block_env(self, state: StageState, block: Block) -> Env:
        weights, grads = state.of(block)
        return replace(self.env, weights=weights, grads=grads)

    def forward(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        s, m = instruction.stage, instruction.item
        state, group = self.states[s], self.mesh.axes["tensor"]
        x = self.rows(values, "tokens", m) if s == 0 else values[f"x.{s}.{m}"]
        kept: list[Values] = []
        for block in state.blocks:
            given: Values = {block.nodes[0].reads[0]: x}
            if block.kind == "head":
                given["targets"] = self.rows(values, "targets", m)
            left = self.run(block, 0, state, given, group)
            x = left.pop(block.nodes[-1].writes[0])
            left.pop("targets", None)
            if not kept:  # the stage's own input is the store's, not the activations'
                left.pop(block.nodes[0].reads[0])
            kept.append(left)
        if s < self.plan.stages - 1:
            return kept, x
        return kept, values["loss"].add_(x)

    def backward(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        s, m = instruction.stage, instruction.item
        state, group = self.states[s], self.mesh.axes["tensor"]
        kept: list[Values] = values[f"a.{s}.{m}"]
        gradient: Tensor | None = values.get(f"d.{s}.{m}")
        source = self.rows(values, "tokens", m) if s == 0 else values[f"x.{s}.{m}"]
        for block in reversed(state.blocks):
            given = kept.pop()
            body = lower_block(block, self.shape, self.plan.recompute)
            given.setdefault(block.nodes[0].reads[0], source)
            if block.kind == "head":
                given["targets"] = self.rows(values, "targets", m)
            if gradient is not None:
                given[f"d.{body.output}"] = gradient
            gradient = None  # the body frees it where it is last read
            left = self.run(block, 1, state, given, group)
            gradient = left.pop(body.gradient, None)
            left.clear()  # the block's input: nobody needs it any more
        return (values[f"g.{s}"], gradient) if s else (values[f"g.{s}"],)

    def run(
        self, block: Block, which: int, state: StageState, given: Values, group: dist.ProcessGroup | None
    ) -> Values:
        watch = None
        if self.watch is not None:
            watch = Watch(outside=frozenset({block.nodes[0].reads[0], "targets"}))
            self.watch.append((block, "BW" if which else "F", watch))
        return run_body(self.calls[block][which], self.block_env(state, block), given, group, watch)

    # Messages between stages

    def send(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        group = self.mesh.lanes[instruction.lane, instruction.peers]
        work = dist.isend(values[instruction.reads[0]], instruction.peers[1], group=group)
        assert work is not None
        return Started((), work)

    def receive(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        """A boundary activation or gradient: [tokens here, hidden] in the compute precision."""
        group = self.mesh.lanes[instruction.lane, instruction.peers]
        rows = self.shape.rows(self.plan.sequence_parallel and self.plan.tensor > 1)
        empty = torch.empty(rows, self.model.hidden, dtype=DTYPES[self.workload.precision], device=self.mesh.device)
        work = dist.irecv(empty, instruction.peers[0], group=group)
        assert work is not None
        return Started((empty,), work)

    # Gradients and weights over the replicas

    def over_data(self, letter: str, collective: Any) -> Operation:
        def run(instruction: Instruction, values: Mapping[str, Any]) -> Started:
            flat = values[f"{letter}.{instruction.stage}"]
            return Started((flat,), collective(flat, group=self.mesh.axes["data"], async_op=True))

        return run

    def reduce_scatter(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        state = self.states[instruction.stage]
        mine = state.grad[state.shard]
        work = dist.reduce_scatter_tensor(mine, state.grad, group=self.mesh.axes["data"], async_op=True)
        return Started((state.grad,), work)

    def all_gather(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        state = self.states[instruction.stage]
        mine = state.weight[state.shard]
        work = dist.all_gather_into_tensor(state.weight, mine, group=self.mesh.axes["data"], async_op=True)
        return Started((state.weight,), work)

    def sum_partial(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Gradients of weights held whole by every tensor rank, each of which saw only its heads or its tokens."""
        state = self.states[instruction.stage]
        parts = [
            state.grads[block.index, weight.name]
            for block in state.blocks
            for weight in partial_weights(block, self.plan)
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=self.mesh.axes["tensor"])
        for part, summed in zip(parts, torch.split(flat, [p.numel() for p in parts]), strict=True):
            part.copy_(summed.view_as(part))
        return (state.grad,)

    def tie(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        """The embedding's gradient, summed with the head's on the other end of the pipeline."""
        state = self.states[instruction.stage]
        block = state.blocks[0 if instruction.stage == 0 else -1]
        name = next(w.name for w in block.weights() if w.name in ("embed.weight", "lm_head.weight"))
        group = self.mesh.lanes[instruction.lane, instruction.peers]
        work = dist.all_reduce(state.grads[block.index, name], group=group, async_op=True)
        return Started((state.grad,), work)

    def update(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        state = self.states[instruction.stage]
        state.update(self.workload.learning_rate, self.workload.weight_decay)
        return tuple(values[name] for name in instruction.writes)

    @property
    def items(self) -> int:
        return micro_batches(self.plan, self.workload)
