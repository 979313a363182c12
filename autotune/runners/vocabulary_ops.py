"""The passes of a sharded vocabulary and what meets between them (see planners.passes.vocabulary for the buffers).

Statistics a shard hands on are [2, tokens]: the logarithm of its sum of exponentials and, where it has the target's
row, the target's logit. The naive passes exchange the maximum, then [sum, target's logit less the maximum].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from autotune.planners.lower.vocabulary import shard_of, shards
from autotune.runners.interpreter import Started
from autotune.runners.ops import Env, embedding, linear, sharded_softmax
from autotune.runners.ops.env import wide
from autotune.runners.ops.sharded_softmax import Columns
from autotune.runners.state import DTYPES
from autotune.spec.graph import Node
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer

Made = tuple[Any, ...]
Store = Mapping[str, Any]


def _part(trainer: Trainer, which: int) -> tuple[Env, Node]:
    """This rank's rows of the embedding (0) or the head (1), as an operation sees them."""
    state = trainer.states[trainer.plan.stages]
    env = trainer.block_env(trainer.plan.stages, state.blocks[which])
    place = {"tensor_rank": _shard(trainer), "tensor_size": shards(trainer.plan), "all_reduce": None}
    return replace(env, **place), state.blocks[which].nodes[0]  # type: ignore[arg-type]


def _shard(trainer: Trainer) -> int:
    return shard_of(trainer.plan, trainer.mesh.pipeline, trainer.mesh.tensor)


def _columns(trainer: Trainer) -> Columns:
    rows = trainer.states[trainer.plan.stages].blocks[1].nodes[0].weights[0].shape[0]
    return Columns.of(trainer.model.vocab, _shard(trainer), rows)


def _named(instruction: Instruction, values: Store) -> dict[str, Any]:
    """The instruction's reads by the first letter of their names."""
    return {name[0]: values[name] for name in instruction.reads if name.count(".") == 2}


def embed(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """The embeddings of the tokens whose rows are here; the others' are zero."""
    env, node = _part(trainer, 0)
    return embedding.forward(env, node, trainer.rows(values, "tokens", instruction.item))


def embed_gradient(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    env, node = _part(trainer, 0)
    tokens = trainer.rows(values, "tokens", instruction.item)
    embedding.wgrad(env, node, (_named(instruction, values)["d"],), (tokens,))
    return (values[f"g.{instruction.stage}"],)


def _logits(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Tensor, Tensor]:
    """This shard's logits [tokens, rows], and the targets [tokens]."""
    env, node = _part(trainer, 1)
    (logits,) = linear.forward(env, node, _named(instruction, values)["x"])
    return _columns(trainer).mask(logits), trainer.rows(values, "targets", instruction.item)


def local_softmax(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    logits, targets = _logits(trainer, instruction, values)
    target = _columns(trainer).target_logits(logits, targets)
    return logits, torch.stack((sharded_softmax.softmax(logits), target))


def local_both(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """Also the input's gradient as far as this shard knows it: the softmax's mean row, and the targets' rows."""
    part, statistics = local_softmax(trainer, instruction, values)
    env, node = _part(trainer, 1)
    (mean,) = linear.dgrad(env, node, (part,), ())
    local, here = _columns(trainer).local(trainer.rows(values, "targets", instruction.item))
    rows = F.embedding(local, env.weights[node.weights[0].name]).masked_fill_(~here.unsqueeze(1), 0)
    return part, statistics, mean, rows


def local_maximum(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    logits, _ = _logits(trainer, instruction, values)
    return logits, logits.amax(1).to(wide(logits.dtype))


def local_sum(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """Exponentials less the whole row's maximum, in place."""
    held = _named(instruction, values)
    columns, targets = _columns(trainer), trainer.rows(values, "targets", instruction.item)
    _, here = columns.local(targets)
    target = columns.target_logits(held["y"], targets).sub_(held["z"]).masked_fill_(~here, 0)
    return held["y"], torch.stack((sharded_softmax.exponentials(held["y"], held["z"]), target))


def gradients(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """T: the logits' gradient from the gathered statistics, with it the weights' and, where asked for, the input's."""
    statistics = _named(instruction, values)["u"]
    lse, target = sharded_softmax.joined(statistics)
    factor = (statistics[_shard(trainer), 0] - lse).exp_()
    return _finish(trainer, instruction, values, factor, lse.sub_(target))


def gradients_summed(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """T of the naive passes: the statistics are the whole row's already."""
    total, target = _named(instruction, values)["u"]
    return _finish(trainer, instruction, values, total.reciprocal(), total.log().sub_(target))


def _finish(trainer: Trainer, instruction: Instruction, values: Store, factor: Tensor, losses: Tensor) -> Made:
    held, targets = _named(instruction, values), trainer.rows(values, "targets", instruction.item)
    env, node = _part(trainer, 1)
    scale = trainer.env.loss_scale
    change = sharded_softmax.logits_gradient(held["y"], factor, targets, _columns(trainer), scale)
    linear.wgrad(env, node, (change,), (held["x"],))
    made: dict[str, Any] = {f"g.{instruction.stage}": values[f"g.{instruction.stage}"]}
    for name in instruction.writes:
        if name == "loss":
            made[name] = values["loss"].add_(losses.sum().mul_(scale))
        elif name not in made:
            (made[name],) = linear.dgrad(env, node, (change,), ())
    return tuple(made[name] for name in instruction.writes)


def _group(trainer: Trainer, instruction: Instruction) -> dist.ProcessGroup:
    return trainer.mesh.lanes[instruction.lane, instruction.peers]


def broadcast(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """[tokens, hidden] from the first of the peers to all."""
    if instruction.reads:
        tensor = values[instruction.reads[0]]
    else:
        dtype = DTYPES[trainer.workload.precision]
        tensor = torch.empty(trainer.shape.tokens, trainer.model.hidden, dtype=dtype, device=trainer.mesh.device)
    work = dist.broadcast(tensor, instruction.peers[0], group=_group(trainer, instruction), async_op=True)
    return Started((tensor,) if instruction.writes else (), work)


def reduce(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """The peers' parts summed, in place: on the first of them, and on all where several tensor ranks want the sum."""
    tensor = values[instruction.reads[0]]
    return Started((tensor,) if instruction.writes else (), _sum(trainer, instruction, tensor, async_op=True))


def _sum(trainer: Trainer, instruction: Instruction, tensor: Tensor, async_op: bool) -> Any:
    group = _group(trainer, instruction)
    if trainer.plan.tensor > 1:
        return dist.all_reduce(tensor, group=group, async_op=async_op)
    return dist.reduce(tensor, instruction.peers[0], group=group, async_op=async_op)


def broadcast_shares(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """[tokens, hidden] on all peers from the shares of tokens of the first ones: one pipeline rank's tensor ranks."""
    number, group, mine = trainer.plan.tensor, _group(trainer, instruction), trainer.mesh.tensor
    own = values[instruction.reads[0]] if instruction.reads else None
    dtype = DTYPES[trainer.workload.precision]
    whole = torch.empty(trainer.shape.tokens, trainer.model.hidden, dtype=dtype, device=trainer.mesh.device)

    def exchange() -> None:
        for tensor, (share, root) in enumerate(zip(whole.chunk(number), instruction.peers, strict=False)):
            if own is not None and tensor == mine:
                share.copy_(own)
            dist.broadcast(share, root, group=group)

    return Started((whole,), trainer.mesh.in_order(instruction.lane, exchange))


def reduce_shares(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """The peers' parts summed, of which each tensor rank of the first of them keeps its share of tokens."""
    part = values[instruction.reads[0]]
    share = torch.empty_like(_share(trainer, part)) if instruction.writes else None

    def exchange() -> None:
        _sum(trainer, instruction, part, async_op=False)
        if share is not None:
            share.copy_(_share(trainer, part))

    handle = trainer.mesh.in_order(instruction.lane, exchange)
    return Started((share,) if instruction.writes else (), handle)


def _share(trainer: Trainer, whole: Tensor) -> Tensor:
    """This tensor rank's share of the tokens."""
    return whole.chunk(trainer.plan.tensor)[trainer.mesh.tensor]


def _gathered(trainer: Trainer, statistics: Tensor) -> Tensor:
    return statistics.new_empty(shards(trainer.plan), *statistics.shape)


def gather(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """Every shard's statistics on every rank: [shards, 2, tokens]."""
    own = values[instruction.reads[0]]
    whole = _gathered(trainer, own)
    group = _group(trainer, instruction)
    return Started((whole,), dist.all_gather_into_tensor(whole.view(-1, own.shape[1]), own, group=group, async_op=True))


def gather_reduce(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """Statistics on every rank, and the input's gradient on the first of the peers, each part rescaled before; where
    tensor ranks share the tokens, of each its own."""
    own, mean, rows = (values[name] for name in instruction.reads)
    whole, group, mine = _gathered(trainer, own), _group(trainer, instruction), _shard(trainer)
    scale, last = trainer.env.loss_scale, len(instruction.writes) > 1
    share = torch.empty_like(_share(trainer, mean)) if last and trainer.plan.sequence_parallel else None

    def exchange() -> None:
        dist.all_gather_into_tensor(whole.view(-1, own.shape[1]), own, group=group)
        lse, _ = sharded_softmax.joined(whole)
        factor = (whole[mine, 0] - lse).exp_().unsqueeze(1)
        mean.copy_((mean * factor).sub_(rows).mul_(scale))
        _sum(trainer, instruction, mean, async_op=False)
        if share is not None:
            share.copy_(_share(trainer, mean))

    handle = trainer.mesh.in_order(instruction.lane, exchange)
    return Started((whole, mean if share is None else share) if last else (whole,), handle)


def _all_reduce(how: dist.ReduceOp.RedOpType) -> Any:
    def run(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
        tensor = values[instruction.reads[0]]
        return Started((tensor,), dist.all_reduce(tensor, how, group=_group(trainer, instruction), async_op=True))

    return run


OPERATIONS = {
    "EMBED": embed,
    "EMBED_W": embed_gradient,
    "S": local_softmax,
    "S_BOTH": local_both,
    "S_MAX": local_maximum,
    "S_SUM": local_sum,
    "T": gradients,
    "T_W": gradients,
    "T_SUMMED": gradients_summed,
    "BROADCAST": broadcast,
    "BROADCAST_SHARES": broadcast_shares,
    "REDUCE": reduce,
    "REDUCE_SHARES": reduce_shares,
    "GATHER": gather,
    "GATHER_REDUCE": gather_reduce,
    "GATHER_REDUCE_SHARES": gather_reduce,
    "MAX": _all_reduce(dist.ReduceOp.MAX),
    "SUM": _all_reduce(dist.ReduceOp.SUM),
}
