"""The rounded weights of a stage and the scales of their rows: made from whole ones when they are loaded, one weight at
a time, so that never more than one of them is there twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.lower.call import tile_rows
from autotune.runners.flat import elements, placed, views
from autotune.runners.state import DTYPES, Key, Loader, local_shape
from autotune.spec.graph import Block, Weight
from autotune.spec.int8_graph import LARGEST, ROUNDED, pairs

Reduce = Callable[[Tensor, str], Tensor]


def scale_type(dtype: torch.dtype) -> torch.dtype:
    """What the scales of weights of a type are kept in."""
    return torch.promote_types(dtype, torch.float32)


def round_rows(weight: Tensor, rounded: Tensor, scales: Tensor, reduce: Reduce | None = None) -> None:
    """Rounds `weight` [outputs, inputs] into `rounded`, int8 of that shape, and `scales` [outputs], symmetrically: of
    each row the largest magnitude becomes 127 (a row of zeros stays one), the others what is nearest, halves to even.

    `reduce` gives the largest over the ranks that share a row's inputs.
    """
    low, high = torch.aminmax(weight, dim=1)
    top = torch.maximum(high, -low).to(scales.dtype)
    if reduce is not None:
        top = reduce(top, "max")
    scales.copy_(torch.where(top > 0, top, 1) / LARGEST)
    rows = tile_rows(weight.shape[1], scales.element_size())
    for part, some, scale in zip(rounded.split(rows), weight.split(rows), scales.split(rows), strict=True):
        part.copy_((some.to(scale.dtype) / scale[:, None]).round_())


class Rounded(NamedTuple):
    """Flat tensors of all of them, and a view for each."""

    weight: Tensor
    scale: Tensor
    views: Mapping[Key, Tensor]

    @classmethod
    def build(
        cls,
        blocks: tuple[Block, ...],
        load: Loader,
        *,
        precision: str,
        tensor_size: int,
        device: torch.device,
        reduce: Reduce | None = None,
    ) -> Rounded:
        """Allocates and fills them. `reduce`: over the tensor ranks, which all build at the same time."""
        held = [(block.index, *pair) for block in blocks for pair in pairs(block)]

        def flat(weights: list[tuple[int, Weight]], dtype: torch.dtype) -> tuple[Tensor, dict[Key, Tensor]]:
            shapes = {(index, weight.name): local_shape(weight, tensor_size) for index, weight in weights}
            whole = torch.zeros(elements(shapes), dtype=dtype, device=device)
            return whole, views(whole, placed(shapes))

        dtype = DTYPES[precision]
        weight, weights = flat([(index, whole) for index, whole, _ in held], torch.int8)
        scale, scales = flat([(index, of) for index, _, of in held], scale_type(dtype))
        for index, whole, of in held:
            shared = reduce if whole.shard == 1 and tensor_size > 1 else None
            whole_here = load(index, whole).to(device)  # weights drawn to be checked are drawn by the processor
            round_rows(whole_here, weights[index, whole.name], scales[index, of.name], shared)
        return cls(weight, scale, weights | scales)

    def of(self, block: Block) -> dict[str, Tensor]:
        """Those of one block, by name."""
        return {weight.name: self.views[block.index, weight.name] for pair in pairs(block) for weight in pair}


def random_weight(weight: Weight, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Some weight of this form and shape, to time operations with."""
    if weight.form == ROUNDED:
        return torch.randint(-LARGEST, LARGEST + 1, shape, dtype=torch.int8, device=device)
    made = 0.02 * torch.randn(shape, device=device)
    return made.abs().div_(LARGEST).to(scale_type(dtype)) if weight.form else made.to(dtype)
