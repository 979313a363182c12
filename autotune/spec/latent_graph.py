"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1) as nodes of a block graph.

Queries, and keys with values, go through low-rank latents; position lives in a part of each query head and in one
rotary key that all heads share.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

from autotune.spec.model import ModelSpec
from autotune.spec.nodes import Node, Weight, linear, norm

LATENT_EPS = 1e-6  # the latents' norms keep their own epsilon: these families do not pass rms_norm_eps on to them


def latent_attention(model: ModelSpec, prefix: str) -> Iterator[Node]:
    """x -> h -> queries qh; h -> kva -> latent ckv -> kvb, rotary key kr -> kt; -> q, k, v -> o -> a -> x1.

    `prefix` is the layer's name in the checkpoint. Needs `model.latent`.
    """
    latent = model.latent
    assert latent is not None
    attention, width = f"{prefix}.self_attn", latent.nope_dim + latent.rope_dim
    shape = (
        ("heads", model.heads),
        ("nope_dim", latent.nope_dim),
        ("rope_dim", latent.rope_dim),
        ("v_dim", latent.v_dim),
        ("scale", score_scale(model)),
    )
    yield norm("attn_norm", "x", "h", f"{prefix}.input_layernorm.weight", model.hidden, model.norm_eps)
    yield from _queries(model, attention, model.heads * width)
    down = ((f"{attention}.kv_a_proj_with_mqa", latent.kv_rank + latent.rope_dim),)
    yield linear("kv_a", "h", "kva", model.hidden, down, "", model.qkv_bias)
    yield _latent_norm(f"{attention}.kv_a_layernorm.weight", latent.kv_rank, latent.rope_dim)
    up = ((f"{attention}.kv_b_proj", model.heads * (latent.nope_dim + latent.v_dim)),)
    yield linear("kv_b", "ckv", "kvb", latent.kv_rank, up, "column")
    yield Node("latent_key", "rotary_key", ("kr",), ("kt",), (), "column", (("width", latent.rope_dim),))
    yield Node("latent_rotary", "rotary", ("qh", "kt", "kvb"), ("q", "k", "v"), (), "heads", shape)
    heads = (
        ("heads", model.heads),
        ("kv_heads", model.heads),
        ("head_dim", width),
        ("v_dim", latent.v_dim),
        ("window", model.window),
    )
    yield Node("attention", "attention", ("q", "k", "v"), ("o",), (), "heads", heads)
    out = ((f"{attention}.o_proj", model.hidden),)
    yield linear("out", "o", "a", model.heads * latent.v_dim, out, "row", model.out_bias)
    yield Node("add", "attn_add", ("x", "a"), ("x1",), attrs=(("width", model.hidden),))


def _queries(model: ModelSpec, attention: str, rows: int) -> Iterator[Node]:
    """h -> qh, of `rows` features: through a latent of `q_rank`, or directly (and then never with a bias)."""
    assert model.latent is not None
    rank = model.latent.q_rank
    if not rank:
        yield linear("q", "h", "qh", model.hidden, ((f"{attention}.q_proj", rows),), "column")
        return
    yield linear("q_a", "h", "qa", model.hidden, ((f"{attention}.q_a_proj", rank),), "", model.qkv_bias)
    yield norm("q_norm", "qa", "cq", f"{attention}.q_a_layernorm.weight", rank, LATENT_EPS)
    yield linear("q_b", "cq", "qh", rank, ((f"{attention}.q_b_proj", rows),), "column")


def _latent_norm(tensor: str, rank: int, rope_dim: int) -> Node:
    """kva -> ckv, kr: RMSNorm of the first `rank` of `rank + rope_dim` features; the rotary key is what is beside."""
    weight = Weight("kv_norm.weight", (rank,), ((tensor, rank),), init="ones")
    attrs = (("width", rank), ("rope_dim", rope_dim), ("eps", LATENT_EPS))
    return Node("latent_norm", "kv_norm", ("kva",), ("ckv", "kr"), (weight,), attrs=attrs)


def score_scale(model: ModelSpec) -> float:
    """What the scores are multiplied by beside 1 / sqrt(head width): YaRN's temperature (2309.00071, 3.4), which these
    families put on the scores where `mscale_all_dim` says so."""
    scaling = dict(model.rope_scaling)
    weight, factor = float(scaling.get("mscale_all_dim", 0)), float(scaling.get("factor", 1))
    if not weight or factor <= 1:
        return 1.0
    return (0.1 * weight * log(factor) + 1.0) ** 2
