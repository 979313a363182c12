"""The models of ours as plain torch under autograd, and their optimizer: what scripts here put beside our executor.

Weights have the numbers that ours start from. Nothing is compiled unless asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autotune.runners.reference import BETAS, EPSILON, init_weight
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

Rope = tuple[Tensor, Tensor]  # cos and sin, [sequence, head_dim]
LLAMA_1B = ModelSpec("llama-1b-untied", "LlamaForCausalLM", 2048, 16, 32, 8, 64, 8192, 128256, rope_theta=500000.0)
TINY = replace(LLAMA_1B, hidden=64, layers=8, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)


class Attention(nn.Module):
    """Causal grouped-query attention: q [batch, sequence, heads * head_dim], k and v narrower, o like q.

    `grouped`: the kernel is told of groups; without, key heads are repeated. The heads may be some of the model's.
    """

    def __init__(self, model: ModelSpec, rope: Rope, grouped: bool) -> None:
        super().__init__()
        self.width, self.groups, self.grouped = model.head_dim, model.heads // model.kv_heads, grouped
        self.cos, self.sin = rope

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-b, a), dim=-1) * self.sin

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, sequence, _ = q.shape
        q, k, v = (x.view(batch, sequence, -1, self.width).transpose(1, 2) for x in (q, k, v))
        q, k = self.turn(q), self.turn(k)
        if self.groups > 1 and not self.grouped:
            k, v = (x.repeat_interleave(self.groups, 1) for x in (k, v))
        # Looked up in its module at each call: context_parallel puts another function there.
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1 and self.grouped)
        return o.transpose(1, 2).reshape(batch, sequence, -1)


class Piece(nn.Module):
    """One block of ours as plain torch: the embedding, a layer, or the head up to its logits."""

    def __init__(self, block: Block, model: ModelSpec, dtype: torch.dtype, rope: Rope, grouped: bool = False) -> None:
        super().__init__()
        self.kind, self.model, self.attention = block.kind, model, Attention(model, rope, grouped)
        self.widths = [heads * model.head_dim for heads in (model.heads, model.kv_heads, model.kv_heads)]
        for weight in block.weights():
            value = init_weight(weight, 0, dtype, rope[0].device)
            setattr(self, weight.name.split(".")[0], nn.Parameter(value))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.model.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "embed":
            return F.embedding(x, self.embed)
        if self.kind == "head":
            return F.linear(self.norm(x, self.final_norm), self.lm_head)
        qkv = F.linear(self.norm(x, self.attn_norm), self.qkv)
        x = x + F.linear(self.attention(*qkv.split(self.widths, dim=-1)), self.out)
        gate, up = F.linear(self.norm(x, self.mlp_norm), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Recomputed(nn.Module):
    """A module whose input alone is kept for its backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)
        return found


def sequential(
    some: Sequence[Block],
    model: ModelSpec,
    dtype: torch.dtype,
    rope: Rope,
    grouped: bool = False,
    recompute: bool = False,
    compiled: bool = False,
) -> nn.Sequential:
    """The blocks one after another; their layers compiled, and recomputed in the backward, where asked."""
    made: list[nn.Module] = []
    for block in some:
        piece: nn.Module = Piece(block, model, dtype, rope, grouped)
        if block.kind == "layer" and compiled:
            piece.compile()
        made.append(Recomputed(piece) if block.kind == "layer" and recompute else piece)
    return nn.Sequential(*made)


def loss_of(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """The mean negative log-likelihood over `tokens`, of those that are here."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / tokens


def here(x: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of x, laid out as the parameter `like` is: sums that are still to be made are made."""
    if isinstance(x, DTensor) and isinstance(like, DTensor):
        return x.redistribute(placements=like.placements).to_local()
    return x


@dataclass
class Update:
    """AdamW on fp32 masters of what this rank holds of the parameters, or on that itself where it is fp32."""

    parameters: list[nn.Parameter]
    rates: Workload
    held: list[Tensor] = field(init=False)
    masters: list[Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.held = [here(p.detach(), p) for p in self.parameters]
        self.masters = [x.float() for x in self.held]  # the same tensors where they are fp32
        if not self.wide:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        decay = {"lr": self.rates.learning_rate, "weight_decay": self.rates.weight_decay}
        self.optimizer = torch.optim.AdamW(self.masters, betas=BETAS, eps=EPSILON, fused=True, **decay)

    @property
    def wide(self) -> bool:
        return self.held[0].dtype == torch.float32

    @torch.no_grad()
    def step(self) -> None:
        grads = [here(p.grad, p) for p in self.parameters if p.grad is not None]
        if self.wide:
            for master, grad in zip(self.masters, grads, strict=True):
                master.grad = grad
        else:
            torch._foreach_copy_([m.grad for m in self.masters], grads)
        self.optimizer.step()
        if not self.wide:
            torch._foreach_copy_(self.held, self.masters)
        for parameter in self.parameters:
            parameter.grad = None
