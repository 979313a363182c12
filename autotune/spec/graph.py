"""The declared block graph of a model: what is computed from what, with which weights.

One declaration serves everything: parameter counts, FLOPs, weight and KV bytes, the body programs that the simulator
prices, and the operations that the executor runs. They cannot drift apart because nothing else describes a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from autotune.spec.experts_graph import experts_feed_forward
from autotune.spec.heads import HeadsSpec
from autotune.spec.heads_graph import features, head_blocks, training_blocks
from autotune.spec.latent_graph import latent_attention
from autotune.spec.model import ModelSpec
from autotune.spec.nodes import Block, Node, Weight, linear, norm

__all__ = ["Block", "Node", "Weight", "blocks", "kv_bytes_per_token", "parameters"]


def _attention(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x -> h -> q, k, v -> o -> a: grouped-query attention with rotary positions."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    heads = (("heads", model.heads), ("kv_heads", model.kv_heads), ("head_dim", model.head_dim))
    yield norm("attn_norm", "x", "h", f"{prefix}.input_layernorm.weight", model.hidden, model.norm_eps)
    parts = tuple((f"{prefix}.self_attn.{n}_proj", rows) for n, rows in (("q", q), ("k", kv), ("v", kv)))
    yield linear("qkv", "h", "qkv", model.hidden, parts, "column", model.qkv_bias)
    norms = tuple(
        Weight(
            f"rotary.{n}_norm",
            (model.head_dim,),
            ((f"{prefix}.self_attn.{n}_norm.weight", model.head_dim),),
            None,
            "ones",
        )
        for n in (("q", "k") if model.qk_norm else ())
    )
    rotary = (*heads, ("eps", model.norm_eps))
    op = "rotary_norm" if norms else "rotary"
    yield Node(op, "rotary", ("qkv",), ("q", "k", "v"), norms, "heads", rotary)
    attrs = (*heads, ("v_dim", model.head_dim), ("window", model.window))
    yield Node("attention", "attention", ("q", "k", "v"), ("o",), (), "heads", attrs)
    yield linear("out", "o", "a", q, ((f"{prefix}.self_attn.o_proj", model.hidden),), "row", model.out_bias)
    yield Node("add", "attn_add", ("x", "a"), ("x1",), attrs=(("width", model.hidden),))


def _feed_forward(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x1 -> h2 -> gate and up -> s -> d -> y: the gated SiLU feed-forward."""
    yield norm("mlp_norm", "x1", "h2", f"{prefix}.post_attention_layernorm.weight", model.hidden, model.norm_eps)
    parts = tuple((f"{prefix}.mlp.{n}_proj", model.ffn) for n in ("gate", "up"))
    yield linear("gate_up", "h2", "gu", model.hidden, parts, "column")
    yield Node("swiglu", "swiglu", ("gu",), ("s",), (), "heads", (("width", model.ffn),))
    yield linear("down", "s", "d", model.ffn, ((f"{prefix}.mlp.down_proj", model.hidden),), "row")
    yield Node("add", "mlp_add", ("x1", "d"), ("y",), attrs=(("width", model.hidden),))


def _embed(model: ModelSpec) -> Block:
    weights = [
        Weight("embed.weight", (model.vocab, model.hidden), (("model.embed_tokens.weight", model.vocab),), shard=0)
    ]
    if model.masks:  # of tokens beyond the vocabulary
        parts = (("model.mask_tokens.weight", model.masks),)
        weights.append(Weight("mask.weight", (model.masks, model.hidden), parts, fresh=True))
    width = (("width", model.hidden), ("vocab", model.vocab))
    return Block("embed", 0, (Node("embedding", "embed", ("tokens",), ("y",), tuple(weights), "vocab", width),))


def _head(model: ModelSpec) -> Block:
    tensor = "model.embed_tokens" if model.tied else "lm_head"
    return Block(
        "head",
        model.layers + 1,
        (
            norm("final_norm", "x", "h", "model.norm.weight", model.hidden, model.norm_eps),
            linear("lm_head", "h", "logits", model.hidden, ((tensor, model.vocab),), "column"),
            Node("cross_entropy", "loss", ("logits", "targets"), ("loss",), (), "heads", (("vocab", model.vocab),)),
        ),
    )


def _layer(model: ModelSpec, layer: int) -> Block:
    """Layer `layer` (from 0): its attention, then its dense or routed feed-forward."""
    prefix = f"model.layers.{layer}"
    attention = latent_attention if model.latent else _attention
    routed = model.experts is not None and model.experts.routed(layer)
    feed_forward = experts_feed_forward if routed else _feed_forward
    return Block("layer", layer + 1, (*attention(model, prefix), *feed_forward(model, prefix)))


def _frozen(block: Block) -> Block:
    """All weights but those that a training may begin without as they are."""
    nodes = (
        replace(node, weights=tuple(replace(weight, frozen=not weight.fresh) for weight in node.weights))
        for node in block.nodes
    )
    return replace(block, nodes=tuple(nodes))


@lru_cache(maxsize=64)
def blocks(model: ModelSpec) -> tuple[Block, ...]:
    """Every block in order: the embedding, the layers, the head with its loss; of decoding heads the frozen target and
    the heads, or without a target a block a head."""
    if isinstance(model, HeadsSpec):
        target = model.target
        return training_blocks(model, features(blocks(target))) if target else head_blocks(model)
    made = (_embed(model), *(_layer(model, i) for i in range(model.layers)), _head(model))
    return tuple(map(_frozen, made)) if model.frozen else made


def parameters(model: ModelSpec) -> int:
    """Elements of all parameters; a tensor that two blocks share (tied embeddings) counts once."""
    tensors = {w.parts: w.size for block in blocks(model) for w in block.weights()}
    return sum(tensors.values())


def kv_bytes_per_token(model: ModelSpec, width: int = 2) -> int:
    """Bytes of key-value cache that one token of one sequence takes in all layers, `width` bytes an element.

    Latent attention keeps one compressed latent and one rotary key for all heads (DeepSeek-V2, 2405.04434, 2.1).
    """
    if model.latent:
        return model.layers * (model.latent.kv_rank + model.latent.rope_dim) * width
    return model.layers * 2 * model.kv_heads * model.head_dim * width
