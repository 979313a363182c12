"""Tensor parallelism as torch has it: a decoder of plain modules under `parallelize_module`, with or without sequence
parallelism. Embedding, layers and head are laid out as torchtitan's are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch_model import Attention, Rope, Update, loss_of
from torch_side import Choices, Side

from autotune.runners.job import Job
from autotune.runners.reference import init_weight
from autotune.runners.standing import Standing
from autotune.spec.graph import Block, blocks
from autotune.spec.model import ModelSpec


def linear(weight: Tensor) -> nn.Linear:
    """The product with weight [out, in], which it takes as its own."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def norm(weight: Tensor, eps: float) -> nn.RMSNorm:
    made = nn.RMSNorm(weight.shape[0], eps, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def drawn(block: Block, dtype: torch.dtype, device: torch.device) -> dict[str, list[Tensor]]:
    """The weights of one block of ours by name, each apart in what a checkpoint has it in: q, k and v; gate and up."""
    found = {}
    for weight in block.weights():
        whole = init_weight(weight, 0, dtype, device)
        rows = [many for _, many in weight.parts]
        found[weight.name.split(".")[0]] = [part.clone() for part in whole.split(rows)]
    return found


class SelfAttention(nn.Module):
    """Attention of the heads that are here, x [batch, sequence, hidden], between its products."""

    def __init__(self, weights: dict[str, list[Tensor]], model: ModelSpec, rope: Rope, grouped: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = map(linear, weights["qkv"])
        self.o = linear(*weights["out"])
        self.core = Attention(model, rope, grouped)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.o(self.core(self.q(x), self.k(x), self.v(x)))
        return found


class FeedForward(nn.Module):
    """The gated SiLU feed-forward."""

    def __init__(self, weights: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.gate, self.up = map(linear, weights["gate_up"])
        self.down = linear(*weights["down"])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return found


class Layer(nn.Module):
    def __init__(self, weights: dict[str, list[Tensor]], model: ModelSpec, rope: Rope, grouped: bool) -> None:
        super().__init__()
        self.attention_norm = norm(*weights["attn_norm"], model.norm_eps)
        self.attention = SelfAttention(weights, model, rope, grouped)
        self.ffn_norm = norm(*weights["mlp_norm"], model.norm_eps)
        self.ffn = FeedForward(weights)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        found: Tensor = x + self.ffn(self.ffn_norm(x))
        return found


class Decoder(nn.Module):
    """Tokens [batch, sequence] to logits [batch, sequence, vocabulary]."""

    def __init__(self, model: ModelSpec, dtype: torch.dtype, rope: Rope, grouped: bool) -> None:
        super().__init__()
        device = rope[0].device
        first, *middle, last = (drawn(block, dtype, device) for block in blocks(model))
        self.embed = nn.Embedding(model.vocab, model.hidden, _weight=first["embed"][0])
        self.layers = nn.ModuleList(Layer(weights, model, rope, grouped) for weights in middle)
        self.norm = norm(*last["final_norm"], model.norm_eps)
        self.head = linear(*last["lm_head"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(self.norm(x))
        return found


def outer(between: Replicate | Shard, sequence: bool) -> dict[str, ParallelStyle]:
    """How embedding and head lie; `between` is how activations do from layer to layer. Logits stay divided."""
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    return plan | ({"norm": SequenceParallel()} if sequence else {})


def inner(between: Replicate | Shard, sequence: bool) -> dict[str, ParallelStyle]:
    """How a layer lies.

    The input of several products is laid out once before them, in both ways: otherwise each of them would sum (or
    scatter) its own gradient of it.
    """
    whole = {"input_layouts": (between,), "desired_input_layouts": (Replicate(),)}
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(**whole),
        "attention.o": RowwiseParallel(output_layouts=between),
        "ffn": PrepareModuleInput(**whole),
        "ffn.down": RowwiseParallel(output_layouts=between),
    }
    plan |= {name: ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v", "ffn.gate", "ffn.up")}
    return plan | ({"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()} if sequence else {})


class TensorParallel(Side):
    """`parallelize_module` over all ranks, the loss computed on divided logits."""

    def __init__(self, job: Job, world: Standing, choices: Choices) -> None:
        super().__init__(job, world, choices)
        mesh = init_device_mesh(world.device.type, (world.size,))
        sequence = job.plan.sequence_parallel
        between = Shard(1) if sequence else Replicate()
        self.model = Decoder(job.model, self.dtype, self.rope, choices.grouped)
        parallelize_module(self.model, mesh, outer(between, sequence))
        for layer in self.model.layers:
            parallelize_module(layer, mesh, inner(between, sequence))
            if choices.compiled:
                layer.compile()
        self.update = Update(list(self.model.parameters()), job.workload)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        losses = []
        for mine, wanted in self.micro_batches(tokens, targets):
            with loss_parallel():
                loss = loss_of(self.model(mine), wanted, self.job.workload.tokens)
                loss.backward()
            assert isinstance(loss, DTensor)
            losses.append(loss.detach().full_tensor())
            del loss
        self.update.step()
        whole = float(torch.stack(losses).sum())
        return whole if self.world.rank == 0 else 0.0  # all have the same, and what they give is added up
