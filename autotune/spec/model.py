"""A model's shape, whatever family it comes from. `spec/families.py` reads it out of a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.spec.digest import digest


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): queries and keys-values through low-rank latents."""

    q_rank: int  # 0: queries are projected directly
    kv_rank: int
    nope_dim: int  # head width without position
    rope_dim: int  # head width with position, one key shared by all heads
    v_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts feed-forward. Layers before `first_layer` or off the `every` stride are dense."""

    count: int
    top_k: int
    ffn: int  # intermediate width of one routed expert
    shared_ffn: int = 0  # total intermediate width of the shared experts (0: none)
    shared_gate: bool = False  # Qwen2-MoE's sigmoid gate on the shared expert
    first_layer: int = 0
    every: int = 1
    dense_layers: tuple[int, ...] = ()
    groups: int = 1
    top_groups: int = 1
    scoring: str = "softmax"  # softmax | sigmoid
    normalise: bool = True
    scale: float = 1.0
    score_bias: bool = False  # DeepSeek-V3's e_score_correction_bias (a buffer there, not a parameter)

    def routed(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts."""
        on = layer >= self.first_layer and (layer + 1 - self.first_layer) % self.every == 0
        return on and layer not in self.dense_layers


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. Widths are in elements; `head_dim` is never derived from hidden / heads."""

    name: str
    architecture: str  # the Hugging Face class, e.g. LlamaForCausalLM: what everything dispatches on
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False  # input and output embeddings are one tensor
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float | int | str], ...] = ()  # sorted items of the config's own table
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's width before the rotation (Qwen3)
    window: int = 0  # sliding-window attention; 0: full
    max_positions: int = 0
    dtype: str = "bfloat16"
    experts: Experts | None = None
    latent: LatentAttention | None = None
    extra_layers: int = 0  # multi-token-prediction layers in the checkpoint, not in the model that is built
    drafts: int = 0  # tokens that it can draft in one pass, the first after real ones, the others after mask tokens
    masks: int = 0  # distinct mask tokens, with embeddings of their own beyond the vocabulary; 1: one for all places
    frozen: bool = False  # trained in its mask tokens alone: nothing else changes

    def mask_token(self, place: int) -> int:
        """The token that stands at a place to be drafted, from 0: the last mask for all that have none of their own."""
        return self.vocab + min(place, self.masks - 1)

    @property
    def digest(self) -> str:
        return digest(self)
