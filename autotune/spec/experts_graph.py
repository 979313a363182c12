"""Mixture-of-experts feed-forwards as nodes of a block graph: a router, the routed experts, shared experts if any.

The routed experts are several nodes, so that what lies between dispatch and combine works on rows that belong to an
expert and not to a token. Every token has `top_k` rows, whatever the router says: sizes are known before the routing.
A row is weighted inside its expert, before the last product: that product's output need not be kept for the gradient
of the weight, which would be the largest activation of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autotune.spec.model import Experts, ModelSpec
from autotune.spec.nodes import Block, Node, Weight, linear, norm

# Where each architecture keeps them in its checkpoint: (module below the layer, gate, up and down of one expert).
TENSORS = {
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "DeepseekV2ForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "DeepseekV3ForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def experts_feed_forward(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x1 -> h2 -> scores -> p, ids (each token's experts and their weights) -> d (their weighted sum) -> y.

    `prefix` is the layer's name in the checkpoint. Needs `model.experts` and an architecture of `TENSORS`.
    """
    experts = model.experts
    assert experts is not None
    module = f"{prefix}.{TENSORS[model.architecture][0]}"
    yield norm("mlp_norm", "x1", "h2", f"{prefix}.post_attention_layernorm.weight", model.hidden, model.norm_eps)
    yield linear("router", "h2", "scores", model.hidden, ((f"{module}.gate", experts.count),), "")
    yield _route(experts, module)
    yield from _routed(model, experts, module)
    joined = "d"
    if experts.shared_ffn:
        yield from _shared(model, experts.shared_ffn, module)
        yield Node("add", "experts_add", ("d", "sd"), ("ds",), attrs=(("width", model.hidden),))
        joined = "ds"
    yield Node("add", "mlp_add", ("x1", joined), ("y",), attrs=(("width", model.hidden),))


def _route(experts: Experts, module: str) -> Node:
    """scores -> p, ids: `top_k` of `experts` for each token, within `top_groups` of `groups` groups of experts.

    A correction bias (`score_bias`) takes part in the choice alone: a buffer of `experts` elements.
    """
    attrs: tuple[tuple[str, int | float | str], ...] = (
        ("experts", experts.count),
        ("top_k", experts.top_k),
        ("groups", experts.groups),
        ("top_groups", experts.top_groups),
        ("group_best", 2 if experts.scoring == "sigmoid" else 1),
        ("scoring", experts.scoring),
        ("normalise", int(experts.normalise)),
        ("scale", experts.scale),
    )
    part = (f"{module}.gate.e_score_correction_bias", experts.count)
    bias = Weight("route.bias", (experts.count,), (part,), None, "zeros", wide=True)
    constants = (bias,) if experts.score_bias else ()
    return Node("route", "route", ("scores",), ("p", "ids"), attrs=attrs, constants=constants)


def _routed(model: ModelSpec, experts: Experts, module: str) -> Iterator[Node]:
    """(h2, p, ids) -> rows by expert -> d: all experts as two stacked weights, gate and up of one side by side.

    Under tensor parallelism each expert's width is divided, so that d is a partial sum, and so are the gradients of h2
    and p.
    """
    _, gate, up, down = TENSORS[model.architecture]
    each, count = experts.top_k, experts.count
    wide = tuple((f"{module}.experts.{i}.{name}.weight", experts.ffn) for i in range(count) for name in (gate, up))
    narrow = tuple((f"{module}.experts.{i}.{down}.weight", model.hidden) for i in range(count))
    first = Weight("experts.gate_up.weight", (count * 2 * experts.ffn, model.hidden), wide, 0, experts=count)
    last = Weight("experts.down.weight", (count * model.hidden, experts.ffn), narrow, 1, experts=count)
    sizes = (("experts", count), ("top_k", each))
    slots = ("order", "place", "ends")
    width = (*sizes, ("width", model.hidden))
    yield Node("dispatch", "dispatch", ("h2", "p", "ids"), ("rows", "rp", *slots), (), "column", width)
    inner = (*sizes, ("inputs", model.hidden), ("outputs", 2 * experts.ffn))
    yield Node("grouped", "experts_gate_up", ("rows", "ends"), ("egu",), (first,), "heads", inner)
    product = (*sizes, ("width", each * experts.ffn))
    yield Node("weighted_swiglu", "experts_swiglu", ("egu", "rp"), ("es",), (), "heads", product)
    outer = (*sizes, ("inputs", experts.ffn), ("outputs", model.hidden))
    yield Node("grouped", "experts_down", ("es", "ends"), ("ed",), (last,), "inner", outer)
    yield Node("combine", "combine", ("ed", "order", "place"), ("d",), (), "row", width)


def _shared(model: ModelSpec, width: int, module: str) -> Iterator[Node]:
    """h2 -> sd: the experts that every token visits, as one gated feed-forward of their total width."""
    shared = f"{module}.shared_experts"
    parts = tuple((f"{shared}.{name}_proj", width) for name in ("gate", "up"))
    yield linear("shared_gate_up", "h2", "sgu", model.hidden, parts, "column")
    yield Node("swiglu", "shared_swiglu", ("sgu",), ("ss",), (), "heads", (("width", width),))
    yield linear("shared_down", "ss", "sd", width, ((f"{shared}.down_proj", model.hidden),), "row")


def divided(block: Block, ranks: int, rank: int = 0) -> Block:
    """The block as rank `rank` of `ranks` that divide its routed experts has it: the products and weights of its run of
    experts, all else whole. The router still knows all of them. Untouched where there are no routed experts."""
    if ranks == 1 or not any(weight.experts for weight in block.weights()):
        return block
    return replace(block, nodes=tuple(_divided(node, ranks, rank) for node in block.nodes))


def _divided(node: Node, ranks: int, rank: int) -> Node:
    if not any(weight.experts for weight in node.weights):
        return node
    attrs = tuple((key, int(value) // ranks if key == "experts" else value) for key, value in node.attrs)
    return replace(node, attrs=attrs, weights=tuple(share(weight, ranks, rank) for weight in node.weights))


def share(weight: Weight, ranks: int, rank: int) -> Weight:
    """A rank's run of the experts that are stacked in a weight."""
    each = len(weight.parts) // ranks
    shape = (weight.shape[0] // ranks, *weight.shape[1:])
    parts = weight.parts[rank * each : (rank + 1) * each]
    return replace(weight, shape=shape, parts=parts, experts=weight.experts // ranks)
