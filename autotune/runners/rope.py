"""Rotary position tables of a model, equal to those that `transformers` computes from the same configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autotune.spec.errors import UsageError, nearest_name
from autotune.spec.model import ModelSpec

Scaling = Mapping[str, float | int | str]


def _number(model: ModelSpec, scaling: Scaling, key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None:
        value = default
    if isinstance(value, int | float):
        return float(value)
    found = "nothing" if value is None else repr(value)
    raise UsageError(f"{model.name}: rope_scaling.{key}: found {found}; expected a number")


def _default(model: ModelSpec, period: Tensor, scaling: Scaling) -> tuple[Tensor, float]:
    return 1.0 / period, 1.0


def _linear(model: ModelSpec, period: Tensor, scaling: Scaling) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al., 2306.15595)."""
    return 1.0 / period / _number(model, scaling, "factor"), 1.0


def _llama3(model: ModelSpec, period: Tensor, scaling: Scaling) -> tuple[Tensor, float]:
    """Llama 3.1: short waves stay, long ones are divided by `factor`, those between are blended."""
    factor = _number(model, scaling, "factor")
    low, high = _number(model, scaling, "low_freq_factor"), _number(model, scaling, "high_freq_factor")
    trained = _number(model, scaling, "original_max_position_embeddings", model.max_positions)
    frequency = 1.0 / period
    wave = 2 * math.pi / frequency
    scaled = torch.where(wave > trained / low, frequency / factor, frequency)
    blend = (trained / wave - low) / (high - low)
    between = ~(wave < trained / high) & ~(wave > trained / low)
    return torch.where(between, (1 - blend) * scaled / factor + blend * scaled, scaled), 1.0


def _yarn(model: ModelSpec, period: Tensor, scaling: Scaling) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2309.00071, 3.2 to 3.4): a ramp from plain to interpolated, and a factor on both tables."""
    trained = _number(model, scaling, "original_max_position_embeddings", model.max_positions)
    factor = _number(model, scaling, "factor", model.max_positions / trained)
    half = len(period)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def bound(rotations: float) -> float:
        return half * math.log(trained / (rotations * 2 * math.pi)) / math.log(model.rope_theta)

    low, high = bound(_number(model, scaling, "beta_fast", 32)), bound(_number(model, scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    plain = 1 - ramp.clamp(0, 1)
    attention = magnitude(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention = magnitude(_number(model, scaling, "mscale")) / magnitude(_number(model, scaling, "mscale_all_dim"))
    frequency = 1.0 / (factor * period) * (1 - plain) + 1.0 / period * plain
    return frequency, _number(model, scaling, "attention_factor", attention)


# Each: (model, theta^(2i / head_dim) for each pair i, the config's table) -> angle a position, factor on cos and sin.
TYPES: dict[str, Callable[[ModelSpec, Tensor, Scaling], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def tables(model: ModelSpec, positions: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, head_dim], both halves of a row equal. Computed on the CPU, so equal everywhere.

    Latent attention turns a part of each head: its width takes head_dim's place.

    Raises UsageError for a scaling type that is not in TYPES, or that lacks a number it needs.
    """
    scaling = dict(model.rope_scaling)
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in TYPES:
        near = nearest_name(kind, TYPES)
        raise UsageError(
            f"{model.name}: rope_scaling.rope_type: found {kind!r}; expected one of {', '.join(TYPES)}",
            hint=f"did you mean {near}?" if near else None,
        )
    width = model.latent.rope_dim if model.latent else model.head_dim
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequency, factor = TYPES[kind](model, model.rope_theta**steps, scaling)
    angle = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * frequency
    angle = torch.cat((angle, angle), dim=1)
    return (angle.cos() * factor).to(device), (angle.sin() * factor).to(device)
