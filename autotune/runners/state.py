"""A stage's weights, gradients and optimizer states: flat tensors, with a view for every parameter.

Flat, so that one collective sums a stage's gradients, one fused call updates it, and a data rank's share is a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.lower.sharding import NOTHING, Sharding
from autotune.planners.lower.subgroups import SUBGROUPS, split
from autotune.spec.graph import Block, Weight

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16}
EPSILON = 1e-8  # AdamW's
Key = tuple[int, str]  # (block index, weight name)
Loader = Callable[[int, Weight], Tensor]  # this tensor rank's shard of a block's weight


def local_shape(weight: Weight, ranks: int) -> tuple[int, ...]:
    """The shape of one tensor rank's shard."""
    shape = list(weight.shape)
    if weight.shard is not None:
        shape[weight.shard] //= ranks
    return tuple(shape)


States = tuple[Tensor, Tensor, Tensor]  # weights in the wide precision and two moments, of a run of parameters
BETAS = (0.9, 0.95)


class Place(NamedTuple):
    """Where a parameter is in its stage's flat tensors, and its shape."""

    range: slice
    shape: tuple[int, ...]


class Flat(NamedTuple):
    """Whole weights or gradients of a stage, lent for a while: a flat tensor and every parameter in it."""

    whole: Tensor
    views: Mapping[Key, Tensor]


def _views(flat: Tensor, places: Mapping[Key, Place]) -> dict[Key, Tensor]:
    return {key: flat[place.range].view(place.shape) for key, place in places.items()}


def _frozen(
    blocks: tuple[Block, ...], load: Loader, tensor_size: int, dtype: torch.dtype, device: torch.device
) -> dict[Key, Tensor]:
    """The frozen weights; two blocks that share a tensor share it."""
    made: dict[tuple[tuple[str, int], ...], Tensor] = {}
    found: dict[Key, Tensor] = {}
    for block in blocks:
        for weight in block.weights():
            if weight.frozen:
                if weight.parts not in made:
                    made[weight.parts] = torch.empty(local_shape(weight, tensor_size), dtype=dtype, device=device)
                    made[weight.parts].copy_(load(block.index, weight))
                found[block.index, weight.name] = made[weight.parts]
    return found


class Rates(NamedTuple):
    learning_rate: float
    weight_decay: float


def adamw(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, step: Tensor, rates: Rates) -> None:
    """One AdamW step (Loshchilov & Hutter, 1711.05101) in place, on whichever device its tensors are."""
    if not master.numel():
        return
    torch._fused_adamw_(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=rates.learning_rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=rates.weight_decay,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


@dataclass
class StageState:
    """`weight` is in the compute precision, `grad` fp32 for bf16 weights; `master`, `exp_avg`, `exp_avg_sq` cover
    this data rank's `shard` of the flat range (all of it without ZeRO). So do `weight` and `grad` where `shared` says
    so: then there are no `weights` or `grads`, and operations are lent whole ones (`Flat`)."""

    blocks: tuple[Block, ...]
    weight: Tensor
    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    weights: dict[Key, Tensor]
    grads: dict[Key, Tensor]
    shard: slice
    size: int  # elements before padding
    own: slice  # the part of the shard whose optimizer states are here: what master and moments cover
    hosted: tuple[States, ...] = ()  # states of the rest on the host, a subgroup each, in order
    steps: int = 0  # that were taken
    taken: float | None = 1.0  # what the last step multiplied the gradients by; None: it was skipped
    unsettled: bool = False  # whether the last step may yet be taken back
    places: Mapping[Key, Place] = field(default_factory=dict)
    shared: Sharding = NOTHING
    constants: Mapping[Key, Tensor] = field(default_factory=dict)  # whole on every rank
    frozen: Mapping[Key, Tensor] = field(default_factory=dict)  # this tensor rank's shards of weights that never change

    @classmethod
    def build(
        cls,
        blocks: tuple[Block, ...],
        load: Loader,
        *,
        precision: str,
        tensor_size: int,
        shards: int,
        shard: int,
        device: torch.device,
        train: bool = True,
        offload: int = 0,
        shared: Sharding = NOTHING,
    ) -> StageState:
        """Allocates and fills a stage. Two blocks that share a tensor (tied embeddings) share its view.

        `offload` percent of the optimizer states are put into the host's memory.
        """
        dtype = DTYPES[precision]
        main = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        at: dict[tuple[str, ...], tuple[int, tuple[int, ...]]] = {}
        keys: list[tuple[Key, Weight, tuple[str, ...]]] = []
        size = 0
        for block in blocks:
            for weight in (w for w in block.trained() if not w.form):  # others: runners/rounded.py
                shape = local_shape(weight, tensor_size)
                tensor = tuple(name for name, _ in weight.parts)
                keys.append(((block.index, weight.name), weight, tensor))
                if tensor not in at:
                    at[tensor] = (size, shape)
                    size += torch.Size(shape).numel()
        padded = -(-size // shards) * shards
        each = padded // shards
        flat = torch.zeros(padded, dtype=dtype, device=device)
        grad = torch.zeros((each if shared.gradients else padded) if train else 0, dtype=main, device=device)
        places = {key: Place(slice(at[t][0], at[t][0] + torch.Size(at[t][1]).numel()), at[t][1]) for key, _, t in keys}
        weights = _views(flat, places)
        loaded: set[tuple[str, ...]] = set()
        for key, weight, tensor in keys:
            if tensor not in loaded:
                loaded.add(tensor)
                weights[key].copy_(load(key[0], weight))
        mine = slice(shard * each, (shard + 1) * each)
        resident, group = split(size, shards, offload)
        own = slice(mine.start, mine.start + resident)
        kept, offset = (flat[mine].clone(), mine.start) if shared.weights else (flat, 0)
        piece = kept[own.start - offset : own.stop - offset] if train else flat[:0]

        def on_host(begin: int) -> States:
            made = [torch.zeros(group, dtype=main, pin_memory=device.type == "cuda") for _ in range(3)]
            made[0].copy_(flat[begin : begin + group])
            return made[0], made[1], made[2]

        hosted = tuple(on_host(own.stop + j * group) for j in range(SUBGROUPS)) if train and offload else ()
        return cls(
            blocks,
            kept,
            grad,
            piece.to(main) if dtype != main else piece,
            torch.zeros_like(piece, dtype=main),
            torch.zeros_like(piece, dtype=main),
            torch.zeros((), dtype=torch.float32, device=device),
            {} if shared.weights else weights,
            _views(grad, places) if train and not shared.gradients else {},
            mine,
            size,
            own,
            hosted,
            places=places,
            shared=shared,
            frozen=_frozen(blocks, load, tensor_size, dtype, device),
            constants={(b.index, c.name): load(b.index, c).to(device, main) for b in blocks for c in b.constants()},
        )

    def part(self, flat: Tensor, where: slice) -> Tensor:
        """A range of the stage's parameters in a flat tensor of all of them, or of this rank's shard alone."""
        offset = self.shard.start if flat.numel() == self.shard.stop - self.shard.start else 0
        return flat[where.start - offset : where.stop - offset]

    def known(self, where: slice) -> slice:
        """What of a range `grad` has."""
        if not self.shared.gradients:
            return where
        begin = min(max(where.start, self.shard.start), self.shard.stop)
        return slice(begin, max(begin, min(where.stop, self.shard.stop)))

    def views(self, flat: Tensor) -> dict[Key, Tensor]:
        """Every parameter in a flat tensor of all of them."""
        return _views(flat, self.places)

    def subgroup(self, number: int) -> slice:
        """Where one of the subgroups on the host is in the flat tensors."""
        each = (self.shard.stop - self.own.stop) // SUBGROUPS
        return slice(self.own.stop + number * each, self.own.stop + (number + 1) * each)

    def of(
        self, block: Block, weights: Flat | None = None, grads: Flat | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights and constants, gradients) of one block by name, of those that are here or lent."""
        names = [weight.name for weight in block.trained() if not weight.form]
        sources = (weights.views if weights else self.weights, grads.views if grads else self.grads)
        found = [{name: source[block.index, name] for name in names} if source else {} for source in sources]
        fixed = {constant.name: self.constants[block.index, constant.name] for constant in block.constants()}
        fixed |= {w.name: self.frozen[block.index, w.name] for w in block.weights() if w.frozen}
        return found[0] | fixed, found[1]

    def update(self, rates: Rates) -> None:
        """One AdamW step on what this rank holds of the shard; the subgroups on the host follow by themselves."""
        self.step += 1
        self.steps += 1
        adamw(self.master, self.exp_avg, self.exp_avg_sq, self.part(self.grad, self.own), self.step, rates)
        self._narrow()

    def _narrow(self) -> None:
        """The masters in the compute precision, where that is another."""
        if self.master.dtype != self.weight.dtype:
            self.part(self.weight, self.own).copy_(self.master)

    def revert(self, rates: Rates) -> None:
        """Takes the last step back by solving its equations for what was before (Zero Bubble, 2401.10241, appendix C).

        The gradients must be those of the step. Exact up to rounding; the moments before the first step were zero.
        """
        step, gradient = float(self.step), self.part(self.grad, self.own)
        divisor = self.exp_avg_sq.div(1 - BETAS[1] ** step).sqrt_().add_(EPSILON)
        self.master.addcdiv_(self.exp_avg, divisor, value=rates.learning_rate / (1 - BETAS[0] ** step))
        self.master.div_(1 - rates.learning_rate * rates.weight_decay)
        if step == 1:
            self.exp_avg.zero_()
            self.exp_avg_sq.zero_()
        else:
            self.exp_avg.sub_(gradient, alpha=1 - BETAS[0]).div_(BETAS[0])
            self.exp_avg_sq.addcmul_(gradient, gradient, value=BETAS[1] - 1).div_(BETAS[1]).clamp_(min=0)
        self.step -= 1
        self.steps -= 1
        self._narrow()
