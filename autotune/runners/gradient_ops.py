"""What follows the backwards: gradients summed over whoever holds a part of them, and the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels.exchange import Several
from autotune.planners.lower.traits import partial_weights
from autotune.runners.clip_ops import early, factor
from autotune.runners.interpreter import Started
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.state import Key, Segment, StageState
    from autotune.runners.training import Trainer

Store = Mapping[str, Any]


def _over_holders(
    trainer: Trainer, instruction: Instruction, start: Callable[[StageState, Segment, Any], Any]
) -> Several:
    """A collective on each segment of a stage, between those that hold the same; none where nobody else does."""
    state = trainer.states[instruction.stage]
    held = [(segment, trainer.mesh.holders(segment.axis, instruction)) for segment in state.segments]
    return Several([start(state, segment, group) for segment, group in held if group is not None], ())


def all_reduce(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """A stage's gradients over the data ranks."""

    def start(state: StageState, segment: Segment, group: Any) -> Any:
        return dist.all_reduce(state.grad[segment.where], group=group, async_op=True)

    return Started((trainer.states[instruction.stage].grad,), _over_holders(trainer, instruction, start))


def reduce_scatter(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """A stage's gradients over the data ranks, each summing its own shard (ZeRO-1)."""

    def start(state: StageState, segment: Segment, group: Any) -> Any:
        mine, whole = state.grad[segment.mine], state.grad[segment.where]
        return dist.reduce_scatter_tensor(mine, whole, group=group, async_op=True)

    return Started((trainer.states[instruction.stage].grad,), _over_holders(trainer, instruction, start))


def all_gather(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """A stage's new weights, every data rank's shard of them."""

    def start(state: StageState, segment: Segment, group: Any) -> Any:
        mine, whole = state.weight[segment.mine], state.weight[segment.where]
        return dist.all_gather_into_tensor(whole, mine, group=group, async_op=True)

    return Started((trainer.states[instruction.stage].weight,), _over_holders(trainer, instruction, start))


def sync(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """A stage's gradients over the two directions that hold it."""
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    grad = trainer.states[instruction.stage].grad
    return Started((grad,), dist.all_reduce(grad, group=group, async_op=True))


def sum_partial(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """Gradients of weights held whole by every tensor rank, each of which saw only its heads or its tokens."""
    state, plan = trainer.states[instruction.stage], trainer.plan
    places = [
        state.places[block.index, weight.name].range
        for block in state.blocks
        for weight in partial_weights(block, plan.tensor, plan.sequence_parallel)
    ]
    parts = [state.part(state.grad, state.known(place)) for place in places]
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=trainer.mesh.axes["tensor"])
    for part, summed in zip(parts, torch.split(flat, [p.numel() for p in parts]), strict=True):
        part.copy_(summed)
    return (state.grad,)


def _embedding(state: StageState, stage: int) -> Key:
    """Of the first stage the embedding, of the last the head: one tensor under two names."""
    block = state.blocks[0 if stage == 0 else -1]
    return block.index, next(w.name for w in block.weights() if w.name in ("embed.weight", "lm_head.weight"))


def _embedding_gradient(trainer: Trainer, stage: int) -> Tensor:
    state = trainer.states[stage]
    return state.grads[_embedding(state, stage)]


def tie_gather(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """The embedding's whole gradient from the data ranks' shares, flat: each puts in what it has of it."""
    state = trainer.states[instruction.stage]
    place = state.places[_embedding(state, instruction.stage)].range
    whole = state.grad.new_zeros(place.stop - place.start)
    known = state.known(place)
    if known.start < known.stop:
        whole[known.start - place.start : known.stop - place.start] = state.part(state.grad, known)
    return Started((whole,), dist.all_reduce(whole, group=trainer.mesh.axes["data"], async_op=True))


def tie_share(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """This rank's share of the summed gradient back into its place."""
    state = trainer.states[instruction.stage]
    place = state.places[_embedding(state, instruction.stage)].range
    known = state.known(place)
    if known.start < known.stop:
        whole = values[f"te.{instruction.stage}"]
        state.part(state.grad, known).copy_(whole[known.start - place.start : known.stop - place.start])
    return (state.grad,)


def tie(trainer: Trainer, instruction: Instruction, values: Store) -> Started | tuple[Any, ...]:
    """Tied embeddings in two stages: the sum of both gradients, in both; here or between two ranks."""
    parts = [
        values[name] if kind == "te" else _embedding_gradient(trainer, int(stage))
        for name in instruction.reads
        for kind, _, stage in [name.partition(".")]
    ]
    grads = tuple(values[name] for name in instruction.writes)
    first = parts[0]
    if len(parts) == 2:
        second = parts[1]
        second.copy_(first.add_(second))
        return grads
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    return Started(grads, dist.all_reduce(first, group=group, async_op=True))


def update(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """The optimizer step, clipped where a norm is read; part 1 is one that knows only a part of the norm.

    It empties the gradients where nothing after it reads them: not where the step may yet be taken back, nor where some
    of it is still to be done elsewhere.
    """
    state, limit = trainer.states[instruction.stage], trainer.workload.clip
    scale: float | None = 1.0
    if "n" in instruction.reads:
        scale = (early if instruction.part else factor)(float(values["n"][0]), limit)
    trainer.take(state, scale)
    state.unsettled = f"g.{instruction.stage}" not in instruction.writes
    if not state.unsettled and not trainer.plan.optimizer_offload:
        state.grad.zero_()
    return tuple(values.get(name) for name in instruction.writes)


OPERATIONS = {
    "ALL_REDUCE": all_reduce,
    "REDUCE_SCATTER": reduce_scatter,
    "ALL_GATHER": all_gather,
    "SYNC": sync,
    "SUM_PARTIAL": sum_partial,
    "TIE": tie,
    "TIE_GATHER": tie_gather,
    "TIE_SHARE": tie_share,
    "OPT": update,
}
