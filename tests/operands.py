"""Operands, environments and oracles for tests of single operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from autotune.runners import reference, rope
from autotune.runners.ops import OPERATIONS, Env
from autotune.spec.graph import Block, Node
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.opset import OPS

BATCH, SEQUENCE = 2, 7


TINY = ModelSpec("tiny", "LlamaForCausalLM", 20, 2, 4, 2, 6, 14, 22, norm_eps=1e-5, max_positions=64)


YARN = (
    ("factor", 4.0),
    ("mscale_all_dim", 0.8),
    ("original_max_position_embeddings", 16),
    ("rope_type", "yarn"),
)
MODELS = {
    "llama": TINY,
    "one key head": replace(TINY, kv_heads=1),
    "all key heads": replace(TINY, kv_heads=4),
    "biases": replace(TINY, qkv_bias=True, out_bias=True),
    "qk norm": replace(TINY, qk_norm=True, qkv_bias=True),
    "window": replace(TINY, window=3),
    "latent": replace(
        TINY,
        architecture="DeepseekV2ForCausalLM",
        kv_heads=4,
        head_dim=10,
        latent=LatentAttention(12, 8, 6, 4, 7),
        rope_scaling=YARN,
    ),
    "direct queries": replace(
        TINY, architecture="DeepseekV2ForCausalLM", kv_heads=4, head_dim=10, latent=LatentAttention(0, 8, 6, 4, 10)
    ),
}
# Feed-forwards of experts, each as its family routes: every expert of any weight, groups by their best expert, and by
# their best two with a bias in the choice.
MIXTURES = {
    "mixtral": ("MixtralForCausalLM", Experts(4, 2, 6)),
    "qwen3": ("Qwen3MoeForCausalLM", Experts(8, 3, 6, normalise=False)),
    "deepseek2": (
        "DeepseekV2ForCausalLM",
        Experts(8, 3, 6, shared_ffn=10, groups=4, top_groups=2, normalise=False, scale=1.7),
    ),
    "deepseek3": (
        "DeepseekV3ForCausalLM",
        Experts(8, 3, 6, shared_ffn=6, groups=4, top_groups=2, scoring="sigmoid", scale=2.5, score_bias=True),
    ),
}
MIXED = {name: replace(TINY, architecture=family, experts=experts) for name, (family, experts) in MIXTURES.items()}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_weights(node: Node, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {w.name: random(*w.shape, seed=i + 1, dtype=dtype) for i, w in enumerate(node.weights)}
    return made | {c.name: random(*c.shape, seed=61 + i) * 0.1 for i, c in enumerate(node.constants)}


def make_env(model: ModelSpec, weights: dict[str, Tensor], **changes: object) -> Env:
    sequence = int(str(changes.get("sequence", SEQUENCE)))
    env = Env(
        model=model,
        batch=BATCH,
        sequence=sequence,
        positions=torch.arange(sequence),
        rope=rope.tables(model, 64),
        weights=weights,
        loss_scale=1 / (BATCH * sequence),
    )
    return replace(env, **changes)  # type: ignore[arg-type]


def columns(model: ModelSpec, name: str) -> int:
    """Features of each value of a block."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    special = {"qkv": q + 2 * kv, "q": q, "o": q, "k": kv, "v": kv, "gu": 2 * model.ffn, "s": model.ffn}
    if model.latent:
        low, heads = model.latent, model.heads
        special |= {"qa": low.q_rank, "cq": low.q_rank, "qh": q, "ckv": low.kv_rank, "kr": low.rope_dim}
        special |= {"kt": low.rope_dim, "kva": low.kv_rank + low.rope_dim, "kvb": heads * (low.nope_dim + low.v_dim)}
        special |= {"v": heads * low.v_dim, "o": heads * low.v_dim}
    if model.experts:
        special["scores"] = model.experts.count
    return {**special, "logits": model.vocab}.get(name, model.hidden)


def make_reads(model: ModelSpec, node: Node) -> list[Tensor]:
    """Random operands [tokens, features] of one node."""
    tokens = BATCH * SEQUENCE
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, model.vocab, (tokens,), generator=generator)
        if name in ("tokens", "targets")
        else random(tokens, columns(model, name), seed=11 + i)
        for i, name in enumerate(node.reads)
    ]


def oracle(
    model: ModelSpec,
    node: Node,
    weights: dict[str, Tensor],
    reads: list[Tensor],
    upstream: Callable[[str, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor | None], dict[str, Tensor]]:
    """Writes, gradients of the reads (None: not floating) and of the weights, by autograd through the reference."""
    leaves = [r.clone().requires_grad_() if r.is_floating_point() else r for r in reads]
    own = {name: w.clone().requires_grad_() for name, w in weights.items()}
    values = {n: t.view(BATCH, SEQUENCE, *t.shape[1:]) for n, t in zip(node.reads, leaves, strict=True)}
    block = Block("layer", 1, (node,))
    reference._run(block, values, {(1, n): w for n, w in own.items()}, rope.tables(model, SEQUENCE))
    writes = [values[name] for name in node.writes]
    writes = [w.reshape(BATCH * SEQUENCE, -1) if w.dim() else w for w in writes]
    total = sum((w * upstream(n, w)).sum() for n, w in zip(node.writes, writes, strict=True) if w.is_floating_point())
    assert isinstance(total, Tensor)
    fixed = {constant.name for constant in node.constants}
    wanted = [leaf for leaf in leaves if leaf.requires_grad] + [w for name, w in own.items() if name not in fixed]
    found = dict(zip(map(id, wanted), torch.autograd.grad(total, wanted), strict=True))
    return (
        [w.detach() for w in writes],
        [found.get(id(leaf)) for leaf in leaves],
        {name: found[id(w)] for name, w in own.items() if name not in fixed},
    )


def upstream(name: str, value: Tensor) -> Tensor:
    """The gradient that reaches a write: random, but 1 for the loss, which has none coming in."""
    return torch.ones_like(value) if name == "loss" else random(*value.shape, seed=len(name) + 29)


def pick(
    rule_part: tuple[tuple[str, int], ...], reads: list[Tensor], results: tuple[Tensor, ...], node: Node
) -> tuple[Tensor, ...]:
    """The saved tensors that opset lists, in its order."""
    count = len(node.writes)
    groups = {"read": reads, "write": list(results[:count]), "stat": list(results[count:])}
    return tuple(groups[where][i].clone() for where, i in rule_part)


def gradients(
    env: Env, node: Node, reads: list[Tensor], results: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Weight gradients into env.grads, then the input gradients; each is given only what opset says it needs."""
    rule, operation = OPS[node.op], OPERATIONS[node.op]
    needed, kept = pick(rule.wgrad, reads, results, node), pick(rule.dgrad, reads, results, node)
    for tensor in (*reads, *results):  # what opset does not list may be gone by now
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    if operation.wgrad:
        operation.wgrad(env, node, grads, needed)
    return operation.dgrad(env, node, grads, kept) if operation.dgrad else ()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.to(wanted.dtype).view(wanted.shape), wanted, rtol=tolerance, atol=tolerance)
