"""A stage's weights, gradients and optimizer states: flat tensors, with a view for every parameter.

Flat, so that one collective sums a stage's gradients, one fused call updates it, and ZeRO-1 is a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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
    this data rank's `shard` of the flat range (all of it without ZeRO)."""

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
            for weight in block.weights():
                shape = local_shape(weight, tensor_size)
                tensor = tuple(name for name, _ in weight.parts)
                keys.append(((block.index, weight.name), weight, tensor))
                if tensor not in at:
                    at[tensor] = (size, shape)
                    size += torch.Size(shape).numel()
        padded = -(-size // shards) * shards
        flat = torch.zeros(padded, dtype=dtype, device=device)
        grad = torch.zeros(padded if train else 0, dtype=main, device=device)
        weights: dict[Key, Tensor] = {}
        grads: dict[Key, Tensor] = {}
        loaded: set[tuple[str, ...]] = set()
        for key, weight, tensor in keys:
            start, shape = at[tensor]
            cut = slice(start, start + torch.Size(shape).numel())
            weights[key] = flat[cut].view(shape)
            if train:
                grads[key] = grad[cut].view(shape)
            if tensor not in loaded:
                loaded.add(tensor)
                weights[key].copy_(load(key[0], weight))
        each = padded // shards
        mine = slice(shard * each, (shard + 1) * each)
        resident, group = split(size, shards, offload)
        own = slice(mine.start, mine.start + resident)
        piece = flat[own] if train else flat[:0]

        def on_host(begin: int) -> States:
            made = [torch.zeros(group, dtype=main, pin_memory=device.type == "cuda") for _ in range(3)]
            made[0].copy_(flat[begin : begin + group])
            return made[0], made[1], made[2]

        hosted = tuple(on_host(own.stop + j * group) for j in range(SUBGROUPS)) if train and offload else ()
        return cls(
            blocks,
            flat,
            grad,
            piece.to(main) if dtype != main else piece,
            torch.zeros_like(piece, dtype=main),
            torch.zeros_like(piece, dtype=main),
            torch.zeros((), dtype=torch.float32, device=device),
            weights,
            grads,
            mine,
            size,
            own,
            hosted,
        )

    def subgroup(self, number: int) -> slice:
        """Where one of the subgroups on the host is in the flat tensors."""
        each = (self.shard.stop - self.own.stop) // SUBGROUPS
        return slice(self.own.stop + number * each, self.own.stop + (number + 1) * each)

    def of(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, gradients) of one block by weight name."""
        names = [weight.name for weight in block.weights()]
        return (
            {name: self.weights[block.index, name] for name in names},
            {name: self.grads[block.index, name] for name in names} if self.grads else {},
        )

    def update(self, rates: Rates) -> None:
        """One AdamW step on what this rank holds of the shard; the subgroups on the host follow by themselves."""
        self.step += 1
        self.steps += 1
        adamw(self.master, self.exp_avg, self.exp_avg_sq, self.grad[self.own], self.step, rates)
        if self.master.dtype != self.weight.dtype:
            self.weight[self.own].copy_(self.master)

    def revert(self, rates: Rates) -> None:
        """Takes the last step back by solving its equations for what was before (Zero Bubble, 2401.10241, appendix C).

        The gradients must be those of the step. Exact up to rounding; the moments before the first step were zero.
        """
        step, gradient = float(self.step), self.grad[self.own]
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
        if self.master.dtype != self.weight.dtype:
            self.weight[self.own].copy_(self.master)
