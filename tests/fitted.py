"""Decoding heads that are right about some texts: their projections are fitted to a model's hidden rows of these, by
least squares, so that tests need no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autotune.runners import reference
from autotune.spec.graph import Weight
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec

RIDGE = 1e-6


def heads_of(model: ModelSpec, count: int = 3, ffn: int = 0) -> HeadsSpec:
    """The description of heads for a model."""
    return HeadsSpec(
        f"heads-of-{model.name}", "MedusaHeads", model.hidden, 0, 1, 1, 2, ffn, model.vocab, count=count, decay=0.8
    )


def hidden_rows(model: ModelSpec, weights: reference.Weights, tokens: Tensor) -> Tensor:
    """[tokens, hidden], after the final norm, of int64 tokens [tokens], by the reference."""
    return reference.head_values(model, weights, tokens[None])["h"][0]


def fitted(
    model: ModelSpec, weights: reference.Weights, texts: Sequence[Sequence[int]], count: int
) -> Mapping[str, Tensor]:
    """By checkpoint name the projection of each head, fitted to texts: from a row to the token that far ahead."""
    found = {}
    for head in range(count):
        rows, wanted = [], []
        for text in texts:
            tokens = torch.tensor(text)
            rows.append(hidden_rows(model, weights, tokens)[: len(text) - 2 - head])
            wanted.append(torch.nn.functional.one_hot(tokens[2 + head :], model.vocab).double())
        x, y = torch.cat(rows).double(), torch.cat(wanted)
        inner = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
        found[f"heads.{head}.lm_head.weight"] = torch.linalg.solve(inner, x.T @ y).T.contiguous()
    return found


def loaded(known: Mapping[str, Tensor], weight: Weight, dtype: torch.dtype) -> Tensor:
    """A head's weight: the fitted projection, and nothing else (its residual blocks add nothing)."""
    (name, _), *_ = weight.parts
    return known[name].to(dtype) if name in known else torch.zeros(weight.shape, dtype=dtype)
