"""How wide what a node writes is: elements a token of each value, on one of the tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autotune.spec.graph import Node

Widths = tuple[int, ...]


def _own(node: Node, tensor: int) -> Widths:
    """As wide as the node says, of which a rank has its heads."""
    return (_shared(node, "width", tensor, "heads"),)


def _shared(node: Node, attribute: str, tensor: int, split: str) -> int:
    """An attribute, of which a rank has a share where the node is split so."""
    return node.attr(attribute) // (tensor if node.split == split else 1)


def _rotary(node: Node, tensor: int) -> Widths:
    queries, keys = (node.attr(name) // tensor * node.attr("head_dim") for name in ("heads", "kv_heads"))
    return queries, keys, keys


def _latent_rotary(node: Node, tensor: int) -> Widths:
    heads, turned = node.attr("heads") // tensor, node.attr("nope_dim") + node.attr("rope_dim")
    return heads * turned, heads * turned, heads * node.attr("v_dim")


def _dispatch(node: Node, tensor: int) -> Widths:
    """Rows, and of each its weight, slot and place; where experts end: elements in all, whatever the tokens."""
    each = node.attr("top_k")
    return each * node.attr("width"), each, each, each, node.attr("experts")


WIDTHS: Mapping[str, Callable[[Node, int], Widths]] = {
    "linear": lambda node, t: (_shared(node, "outputs", t, "column"),),
    "linear_int8": lambda node, t: (_shared(node, "outputs", t, "column"),),
    "rotary": _rotary,
    "rotary_norm": _rotary,
    "attention": lambda node, t: (node.attr("heads") // t * node.attr("v_dim"),),
    "latent_norm": lambda node, t: (node.attr("width"), node.attr("rope_dim")),
    "latent_rotary": _latent_rotary,
    "route": lambda node, t: (node.attr("top_k"), node.attr("top_k")),
    "dispatch": _dispatch,
    "grouped": lambda node, t: (node.attr("top_k") * _shared(node, "outputs", t, "heads"),),
    "cross_entropy": lambda node, t: (0,),
    "ahead_entropy": lambda node, t: (0,),
}


def columns(node: Node, tensor: int) -> Widths:
    """Of each of the node's writes, on one of `tensor` ranks; a line of WIDTHS where it is more than its own width."""
    return WIDTHS.get(node.op, _own)(node, tensor)
