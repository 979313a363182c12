"""The declared block graph of a model: what is computed from what, with which weights.

One declaration serves everything: parameter counts, FLOPs, weight and KV bytes, the body programs that the simulator
prices, and the operations that the executor runs. They cannot drift apart because nothing else describes a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class Weight:
    """A parameter of one block. `parts` are the Hugging Face tensors it is made of, stacked along dimension 0.

    `shard` is the dimension split over tensor ranks (each part by itself, so that a fused q, k, v stays aligned);
    None: every tensor rank holds it whole.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]  # (full checkpoint name, rows)
    shard: int | None = None
    init: str = "normal"  # normal | ones | zeros

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Node:
    """One operation of a block: `op` is a key of the cost table and of the operation table.

    `split` is how tensor parallelism divides it: "column" (its output features are sharded), "row" (its input
    features are, the output is a partial sum), "vocab" (rows of the embedding), "heads" (works on what a column
    split gave), or "" (token-wise, indifferent to other tokens: replicated, or sharded by sequence).
    """

    op: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[Weight, ...] = ()
    split: str = ""
    attrs: tuple[tuple[str, int | float | str], ...] = ()

    def attr(self, key: str) -> int:
        return int(dict(self.attrs)[key])

    def number(self, key: str) -> float:
        return float(dict(self.attrs)[key])


@dataclass(frozen=True)
class Block:
    """A straight piece of the model: reads `x` (or tokens), writes `x` (or logits, loss)."""

    kind: str  # embed | layer | head; blocks of one kind and equal nodes cost the same
    index: int
    nodes: tuple[Node, ...]

    def weights(self) -> Iterator[Weight]:
        for node in self.nodes:
            yield from node.weights


def _norm(name: str, read: str, write: str, tensor: str, width: int, eps: float) -> Node:
    weight = Weight(f"{name}.weight", (width,), ((tensor, width),), init="ones")
    return Node("rmsnorm", name, (read,), (write,), (weight,), attrs=(("width", width), ("eps", eps)))


def _linear(
    name: str, read: str, write: str, inner: int, parts: tuple[tuple[str, int], ...], split: str, bias: bool = False
) -> Node:
    rows = sum(count for _, count in parts)
    shard = {"column": 0, "row": 1, "": None}[split]
    weights = [Weight(f"{name}.weight", (rows, inner), tuple((f"{t}.weight", n) for t, n in parts), shard)]
    if bias:
        inputs = 0 if split == "column" else None
        weights.append(Weight(f"{name}.bias", (rows,), tuple((f"{t}.bias", n) for t, n in parts), inputs, "zeros"))
    return Node("linear", name, (read,), (write,), tuple(weights), split, (("inputs", inner), ("outputs", rows)))


def _attention(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x -> h -> q, k, v -> o -> a: grouped-query attention with rotary positions."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    heads = (("heads", model.heads), ("kv_heads", model.kv_heads), ("head_dim", model.head_dim))
    yield _norm("attn_norm", "x", "h", f"{prefix}.input_layernorm.weight", model.hidden, model.norm_eps)
    parts = tuple((f"{prefix}.self_attn.{n}_proj", rows) for n, rows in (("q", q), ("k", kv), ("v", kv)))
    yield _linear("qkv", "h", "qkv", model.hidden, parts, "column", model.qkv_bias)
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
    yield Node("attention", "attention", ("q", "k", "v"), ("o",), (), "heads", (*heads, ("window", model.window)))
    yield _linear("out", "o", "a", q, ((f"{prefix}.self_attn.o_proj", model.hidden),), "row", model.out_bias)
    yield Node("add", "attn_add", ("x", "a"), ("x1",), attrs=(("width", model.hidden),))


def _feed_forward(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x1 -> h2 -> gate and up -> s -> d -> y: the gated SiLU feed-forward."""
    yield _norm("mlp_norm", "x1", "h2", f"{prefix}.post_attention_layernorm.weight", model.hidden, model.norm_eps)
    parts = tuple((f"{prefix}.mlp.{n}_proj", model.ffn) for n in ("gate", "up"))
    yield _linear("gate_up", "h2", "gu", model.hidden, parts, "column")
    yield Node("swiglu", "swiglu", ("gu",), ("s",), (), "heads", (("width", model.ffn),))
    yield _linear("down", "s", "d", model.ffn, ((f"{prefix}.mlp.down_proj", model.hidden),), "row")
    yield Node("add", "mlp_add", ("x1", "d"), ("y",), attrs=(("width", model.hidden),))


def _embed(model: ModelSpec) -> Block:
    weight = Weight("embed.weight", (model.vocab, model.hidden), (("model.embed_tokens.weight", model.vocab),), shard=0)
    width = (("width", model.hidden), ("vocab", model.vocab))
    return Block("embed", 0, (Node("embedding", "embed", ("tokens",), ("y",), (weight,), "vocab", width),))


def _head(model: ModelSpec) -> Block:
    tensor = "model.embed_tokens" if model.tied else "lm_head"
    return Block(
        "head",
        model.layers + 1,
        (
            _norm("final_norm", "x", "h", "model.norm.weight", model.hidden, model.norm_eps),
            _linear("lm_head", "h", "logits", model.hidden, ((tensor, model.vocab),), "column"),
            Node("cross_entropy", "loss", ("logits", "targets"), ("loss",), (), "heads", (("vocab", model.vocab),)),
        ),
    )


@lru_cache(maxsize=64)
def blocks(model: ModelSpec) -> tuple[Block, ...]:
    """Every block in order: the embedding, the layers, the head with its loss."""
    layers = (
        Block(
            "layer",
            i + 1,
            (*_attention(model, f"model.layers.{i}"), *_feed_forward(model, f"model.layers.{i}")),
        )
        for i in range(model.layers)
    )
    return (_embed(model), *layers, _head(model))


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
