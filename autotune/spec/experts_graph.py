"""Mixture-of-experts feed-forwards as nodes of a block graph: a router, the routed experts, shared experts if any.

Declared and counted; no operation table executes these nodes yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from autotune.spec.model import Experts, ModelSpec
from autotune.spec.nodes import Node, Weight, linear, norm

# Where each architecture keeps them in its checkpoint: (module below the layer, gate, up and down of one expert).
TENSORS = {
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "DeepseekV2ForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "DeepseekV3ForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def experts_feed_forward(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x1 -> h2 -> route (which experts, with which weight) -> d (their weighted sum) -> y.

    `prefix` is the layer's name in the checkpoint. Needs `model.experts` and an architecture of `TENSORS`.
    """
    experts = model.experts
    assert experts is not None
    module = f"{prefix}.{TENSORS[model.architecture][0]}"
    yield norm("mlp_norm", "x1", "h2", f"{prefix}.post_attention_layernorm.weight", model.hidden, model.norm_eps)
    yield _router(model, experts, module)
    yield _routed(model, experts, module)
    joined = "d"
    if experts.shared_ffn:
        yield from _shared(model, experts.shared_ffn, module)
        yield Node("add", "experts_add", ("d", "sd"), ("ds",), attrs=(("width", model.hidden),))
        joined = "ds"
    yield Node("add", "mlp_add", ("x1", joined), ("y",), attrs=(("width", model.hidden),))


def _router(model: ModelSpec, experts: Experts, module: str) -> Node:
    """h2 -> route: `top_k` of `experts` for each token, within `top_groups` of `groups` groups of experts.

    A correction bias (`score_bias`) is a buffer of `experts` elements, updated by no gradient: not a weight here.
    """
    weight = Weight("router.weight", (experts.count, model.hidden), ((f"{module}.gate.weight", experts.count),))
    attrs: tuple[tuple[str, int | float | str], ...] = (
        ("inputs", model.hidden),
        ("experts", experts.count),
        ("top_k", experts.top_k),
        ("groups", experts.groups),
        ("top_groups", experts.top_groups),
        ("scoring", experts.scoring),
        ("normalise", int(experts.normalise)),
        ("scale", experts.scale),
        ("score_bias", int(experts.score_bias)),
    )
    return Node("router", "router", ("h2",), ("route",), (weight,), attrs=attrs)


def _routed(model: ModelSpec, experts: Experts, module: str) -> Node:
    """(h2, route) -> d: all experts as two stacked weights, gate and up of one expert side by side.

    Split "experts" under tensor parallelism: each expert's width is divided, so gate and up are column-parallel, down
    is row-parallel and d is a partial sum.
    """
    _, gate, up, down = TENSORS[model.architecture]
    wide = tuple(
        (f"{module}.experts.{i}.{name}.weight", experts.ffn) for i in range(experts.count) for name in (gate, up)
    )
    narrow = tuple((f"{module}.experts.{i}.{down}.weight", model.hidden) for i in range(experts.count))
    weights = (
        Weight("experts.gate_up.weight", (experts.count * 2 * experts.ffn, model.hidden), wide, 0),
        Weight("experts.down.weight", (experts.count * model.hidden, experts.ffn), narrow, 1),
    )
    attrs = (
        ("inputs", model.hidden),
        ("width", experts.ffn),
        ("experts", experts.count),
        ("top_k", experts.top_k),
    )
    return Node("experts", "experts", ("h2", "route"), ("d",), weights, "experts", attrs)


def _shared(model: ModelSpec, width: int, module: str) -> Iterator[Node]:
    """h2 -> sd: the experts that every token visits, as one gated feed-forward of their total width."""
    shared = f"{module}.shared_experts"
    parts = tuple((f"{shared}.{name}_proj", width) for name in ("gate", "up"))
    yield linear("shared_gate_up", "h2", "sgu", model.hidden, parts, "column")
    yield Node("swiglu", "shared_swiglu", ("sgu",), ("ss",), (), "heads", (("width", width),))
    yield linear("shared_down", "ss", "sd", width, ((f"{shared}.down_proj", model.hidden),), "row")
