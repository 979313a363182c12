"""Context parallelism as torch has it: replicas whose sequences are divided by its `context_parallel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring  # 2.11 to 2.13, as below
from torch_side import Choices, Replicas

from autotune.runners.job import Job
from autotune.runners.standing import Standing

aten = torch.ops.aten
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
BACK_ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Context(Replicas):
    """Each sequence over all ranks, in a ring balanced for causal masks; keys and values go round as `rotate` says
    ("allgather" or "alltoall"). Gradients are summed by DistributedDataParallel."""

    def __init__(self, job: Job, world: Standing, choices: Choices, rotate: str) -> None:
        super().__init__(job, world, choices)
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        ring.set_rotate_method(rotate)  # no public place has it
        if world.device.type == "cpu":
            divide_on_cpu()

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        # They are resized in place: tensors of their own, however the batch keeps them.
        tokens, targets = (x.clone(memory_format=torch.contiguous_format) for x in (tokens, targets))
        buffers = [tokens, targets, *self.rope]
        with context_parallel(
            self.mesh, buffers=buffers, buffer_seq_dims=[1, 1, 0, 0], no_restore_buffers={tokens, targets}
        ):
            return super().step(tokens, targets)


def divide_on_cpu() -> None:
    """Has `context_parallel` divide the CPU's attention too, which it knows nothing of: its own ring, merging and
    backward over another kernel. For trying a comparison where there is no GPU, and for nothing else."""
    handlers = {ON_CPU: _forward_on_cpu, BACK_ON_CPU: _backward_on_cpu}
    ring.custom_ops.update(handlers)


def _local(values: tuple[Any, ...]) -> tuple[list[Any], DeviceMesh]:
    mesh = next(x.device_mesh for x in values if isinstance(x, DTensor))
    return [x.to_local() if isinstance(x, DTensor) else x for x in values], mesh


def _divided(values: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in values)


def _forward_on_cpu(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    (q, k, v, *rest), mesh = _local(args)
    dropout, causal = (*rest, *(0.0, False)[len(rest) :])
    assert dropout == 0.0 and kwargs.get("attn_mask") is None
    given = {"query": q, "key": k, "value": v, "is_causal": causal, "scale": kwargs.get("scale")}
    return _divided(ring._templated_ring_attention(mesh.get_group(), 2, op, **given), mesh)


def _backward_on_cpu(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    (g, q, k, v, o, lse, dropout, causal), mesh = _local(args)
    given = {"query": q, "key": k, "value": v, "out": o, "logsumexp": lse, "is_causal": causal, "dropout_p": dropout}
    back = ring._templated_ring_attention_backward
    return _divided(back(mesh.get_group(), 2, op, grad_out=g, grad_out_name="grad_out", **given), mesh)
