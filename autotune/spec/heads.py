"""Decoding heads: small networks that read a target's hidden row and say which token comes several places ahead.

Two published shapes are one here. Medusa (Cai et al., 2401.10774, 2.1): each head is residual blocks h + SiLU(W h) and
a vocabulary projection. Blockwise parallel decoding (Stern et al., 1811.03115, 6): each head is a residual feed-forward
of its own width with ReLU. A head's vocabulary projection is its own and starts as the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.spec.fields import Fields
from autotune.spec.model import ModelSpec

MEDUSA_DECAY = 0.8  # lambda_k = 0.8^k: Medusa 2401.10774, 2.2.1


@dataclass(frozen=True)
class HeadsSpec(ModelSpec):
    """The heads of a target of the same `hidden` and `vocab`. Head k, from 1, guesses the token k places after the one
    that the target itself chooses next.

    `ffn`: width of a block's feed-forward; 0: a block is one square product. They are trained on the hidden rows of
    `target`, which stays as it is, with the mean over heads of decay^k times head k's cross-entropy.
    """

    count: int = 0
    depth: int = 1  # residual blocks of each head
    activation: str = "silu"  # silu | relu
    decay: float = 1.0
    target: ModelSpec | None = None


@dataclass(frozen=True)
class Form:
    """What an architecture's name says of its heads."""

    wide: bool  # whether a block has a feed-forward, of intermediate_size
    activation: str
    decay: float


FORMS: Mapping[str, Form] = {
    "MedusaHeads": Form(wide=False, activation="silu", decay=MEDUSA_DECAY),
    # A head is drawn at random for each batch there: in the mean over batches all count the same.
    "BlockwiseHeads": Form(wide=True, activation="relu", decay=1.0),
}


def kind_of(raw: Mapping[str, Any]) -> type[ModelSpec]:
    """Which of the two the JSON form of a model is."""
    return HeadsSpec if "count" in raw else ModelSpec


KEYS = frozenset({"architectures", "name", "model_type", "dtype", "torch_dtype", "transformers_version"})


def heads_from(fields: Fields, architecture: str, name: str, dtypes: tuple[str, ...], inline: bool) -> HeadsSpec:
    """A HeadsSpec from config keys; every problem is left in `fields`."""
    form, hidden = FORMS[architecture], fields.integer("hidden_size")
    heads = HeadsSpec(
        name=name,
        architecture=architecture,
        hidden=hidden,
        layers=0,
        heads=1,
        kv_heads=1,
        head_dim=2,
        ffn=fields.integer("intermediate_size") if form.wide else 0,
        vocab=fields.integer("vocab_size"),
        dtype=fields.choice("dtype", dtypes, "bfloat16", also=("torch_dtype",)),
        count=fields.integer("num_heads"),
        depth=fields.integer("num_layers", 1),
        activation=fields.choice("hidden_act", ("silu", "relu"), form.activation),
        decay=fields.number("loss_decay", form.decay),
    )
    if inline:
        fields.unknown(KEYS)
    else:
        fields.misspelled()
    return heads
