"""A stage's weights, gradients and optimizer states: flat tensors, with a view for every parameter.

Flat, so that one collective sums a stage's gradients, one fused call updates it, and a data rank's share is a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.lower.sharding import NOTHING, Sharding
from autotune.planners.lower.subgroups import SUBGROUPS, split
from autotune.runners.flat import Place, elements, placed, views
from autotune.spec.graph import Block, Weight
from autotune.spec.program import COPIES, DATA

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


class Seat(NamedTuple):
    """A rank among those that share something."""

    rank: int = 0
    ranks: int = 1


class Flat(NamedTuple):
    """Whole weights or gradients of a stage, lent for a while: a flat tensor and every parameter in it."""

    whole: Tensor
    views: Mapping[Key, Tensor]


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


class Segment(NamedTuple):
    """A run of a stage's parameters that the same ranks hold: where it is in a flat tensor of all, this rank's share of
    it there, and the same where a tensor has the shares alone. `axis` of the mesh: those ranks."""

    axis: str
    where: slice
    mine: slice
    at: slice

    @property
    def ranks(self) -> int:
        """Of how many this rank has a share."""
        share = self.mine.stop - self.mine.start
        return (self.where.stop - self.where.start) // share if share else 1


def _segments(sizes: Sequence[tuple[str, int, Seat]]) -> tuple[Segment, ...]:
    """Segments one after another, of (axis, elements, who holds them): each padded to equal shares."""
    found, begin, at = [], 0, 0
    for axis, many, seat in sizes:
        each = -(-many // seat.ranks)
        end, first = begin + each * seat.ranks, begin + seat.rank * each
        found.append(Segment(axis, slice(begin, end), slice(first, first + each), slice(at, at + each)))
        begin, at = end, at + each
    return tuple(found)


class Owned(NamedTuple):
    """A run of this rank's shares: where it is in a flat tensor of all, and in one of the shares alone."""

    where: slice
    at: slice


def _runs(segments: Sequence[Segment], at: slice) -> tuple[Owned, ...]:
    """A range of the shares, segment by segment; one run at least, if an empty one."""
    found = []
    for segment in segments:
        begin, end = max(at.start, segment.at.start), min(at.stop, segment.at.stop)
        ahead = segment.mine.start - segment.at.start
        if begin < end:
            found.append(Owned(slice(begin + ahead, end + ahead), slice(begin, end)))
    return tuple(found) or (Owned(slice(0, 0), slice(0, 0)),)


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
    """`weight` is in the compute precision, `grad` fp32 for bf16 weights; `masters` (one for each run of `owned`),
    `exp_avg` and `exp_avg_sq` cover this rank's shares of the segments (all of them without ZeRO). So do `weight` and
    `grad` where `shared` says so: then there are no `weights` or `grads`, and operations are lent whole ones
    (`Flat`)."""

    blocks: tuple[Block, ...]
    weight: Tensor
    grad: Tensor
    masters: tuple[Tensor, ...]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    weights: dict[Key, Tensor]
    grads: dict[Key, Tensor]
    segments: tuple[Segment, ...]  # one, or two where some of the ranks hold other experts
    owned: tuple[Owned, ...]  # what masters and moments cover
    rest: slice = field(default_factory=lambda: slice(0, 0))  # of the shares: what has its states on the host
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
        apart: Seat | None = None,
        train: bool = True,
        offload: int = 0,
        shared: Sharding = NOTHING,
    ) -> StageState:
        """Allocates and fills a stage. Two blocks that share a tensor (tied embeddings) share its view.

        `offload` percent of the optimizer states are put into the host's memory. `apart`: whose share of the routed
        experts this rank has, where not all that hold the rest hold the same ones.
        """
        dtype = DTYPES[precision]
        main = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        keys: list[tuple[Key, Weight, tuple[str, ...]]] = []
        shapes: tuple[dict[tuple[str, ...], tuple[int, ...]], ...] = {}, {}  # of what all hold, and of what is apart
        for block in blocks:
            for weight in (w for w in block.trained() if not w.form):  # others: runners/rounded.py
                tensor = tuple(name for name, _ in weight.parts)
                keys.append(((block.index, weight.name), weight, tensor))
                shapes[bool(apart and weight.experts)][tensor] = local_shape(weight, tensor_size)
        held = [(DATA, elements(shapes[0]), Seat(shard, shards))]
        segments = _segments([*held, (COPIES, elements(shapes[1]), apart)] if apart else held)
        padded, each = segments[-1].where.stop, segments[-1].at.stop
        flat = torch.zeros(padded, dtype=dtype, device=device)
        grad = torch.zeros((each if shared.gradients else padded) if train else 0, dtype=main, device=device)
        where = placed(shapes[0]) | placed(shapes[1], segments[-1].where.start)
        places = {key: where[tensor] for key, _, tensor in keys}
        weights = views(flat, places)
        loaded: set[tuple[str, ...]] = set()
        for key, weight, tensor in keys:
            if tensor not in loaded:
                loaded.add(tensor)
                weights[key].copy_(load(key[0], weight))
        resident, group = split(each, 1, offload)
        owned, rest = _runs(segments, slice(0, resident)), slice(resident, each)
        kept = torch.cat([flat[s.mine] for s in segments]) if shared.weights else flat
        pieces = [kept[own.at if shared.weights else own.where] for own in owned] if train else [flat[:0]]
        moments = sum(len(piece) for piece in pieces)

        def on_host(begin: int) -> States:
            made = [torch.zeros(group, dtype=main, pin_memory=device.type == "cuda") for _ in range(3)]
            for run in _runs(segments, slice(begin, begin + group)):
                made[0][run.at.start - begin : run.at.stop - begin].copy_(flat[run.where])
            return made[0], made[1], made[2]

        hosted = tuple(on_host(rest.start + j * group) for j in range(SUBGROUPS)) if train and offload else ()
        return cls(
            blocks,
            kept,
            grad,
            tuple(piece.to(main) if dtype != main else piece for piece in pieces),
            torch.zeros(moments, dtype=main, device=device),
            torch.zeros(moments, dtype=main, device=device),
            torch.zeros((), dtype=torch.float32, device=device),
            {} if shared.weights else weights,
            views(grad, places) if train and not shared.gradients else {},
            segments,
            owned,
            rest,
            hosted,
            places=places,
            shared=shared,
            frozen=_frozen(blocks, load, tensor_size, dtype, device),
            constants={(b.index, c.name): load(b.index, c).to(device, main) for b in blocks for c in b.constants()},
        )

    @classmethod
    def untrained(
        cls, blocks: tuple[Block, ...], load: Loader, precision: str, device: torch.device, tensor_size: int = 1
    ) -> StageState:
        """Weights alone, which nobody trains: no gradients, no optimizer states, all of them on every replica."""
        return cls.build(
            blocks,
            load,
            precision=precision,
            tensor_size=tensor_size,
            shards=1,
            shard=0,
            device=device,
            train=False,
        )

    def part(self, flat: Tensor, where: slice) -> Tensor:
        """A range of the stage's parameters in a flat tensor of all of them, or of this rank's shares alone."""
        offset = 0
        if flat.numel() == self.share < self.whole:
            segment = self._of(where)
            offset = segment.mine.start - segment.at.start
        return flat[where.start - offset : where.stop - offset]

    @property
    def whole(self) -> int:
        """Elements of all shares together."""
        return int(self.segments[-1].where.stop)

    @property
    def share(self) -> int:
        """Elements of this rank's shares."""
        return int(self.segments[-1].at.stop)

    def _of(self, where: slice) -> Segment:
        """The segment that a range lies in."""
        at = 0
        for number, segment in enumerate(self.segments):
            at = number if segment.where.start <= where.start else at
        return self.segments[at]

    def mine(self, where: slice) -> slice:
        """What of a range this rank has a share of."""
        share = self._of(where).mine
        begin = min(max(where.start, share.start), share.stop)
        return slice(begin, max(begin, min(where.stop, share.stop)))

    def copies(self, where: slice) -> str:
        """The axis of the mesh along which a range is the same."""
        return self._of(where).axis

    def known(self, where: slice) -> slice:
        """What of a range `grad` has."""
        return self.mine(where) if self.shared.gradients else where

    def views(self, flat: Tensor) -> dict[Key, Tensor]:
        """Every parameter in a flat tensor of all of them."""
        return views(flat, self.places)

    def subgroup(self, number: int) -> tuple[Owned, ...]:
        """Where one of the subgroups on the host is; `at` in its own tensors."""
        each = (self.rest.stop - self.rest.start) // SUBGROUPS
        begin = self.rest.start + number * each
        runs = _runs(self.segments, slice(begin, begin + each)) if each else ()
        return tuple(Owned(run.where, slice(run.at.start - begin, run.at.stop - begin)) for run in runs)

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
        """One AdamW step on what this rank owns; the subgroups on the host follow by themselves."""
        self.step += 1
        self.steps += 1
        for master, own in zip(self.masters, self.owned, strict=True):
            gradient = self.part(self.grad, own.where)
            adamw(master, self.exp_avg[own.at], self.exp_avg_sq[own.at], gradient, self.step, rates)
        self._narrow()

    def _narrow(self) -> None:
        """The masters in the compute precision, where that is another."""
        for master, own in zip(self.masters, self.owned, strict=True):
            if master.dtype != self.weight.dtype:
                self.part(self.weight, own.where).copy_(master)

    def revert(self, rates: Rates) -> None:
        """Takes the last step back by solving its equations for what was before (Zero Bubble, 2401.10241, appendix C).

        The gradients must be those of the step. Exact up to rounding; the moments before the first step were zero.
        """
        step = float(self.step)
        for master, own in zip(self.masters, self.owned, strict=True):
            gradient, mean, square = self.part(self.grad, own.where), self.exp_avg[own.at], self.exp_avg_sq[own.at]
            divisor = square.div(1 - BETAS[1] ** step).sqrt_().add_(EPSILON)
            master.addcdiv_(mean, divisor, value=rates.learning_rate / (1 - BETAS[0] ** step))
            master.div_(1 - rates.learning_rate * rates.weight_decay)
            if step == 1:
                mean.zero_()
                square.zero_()
            else:
                mean.sub_(gradient, alpha=1 - BETAS[0]).div_(BETAS[0])
                square.addcmul_(gradient, gradient, value=BETAS[1] - 1).div_(BETAS[1]).clamp_(min=0)
        self.step -= 1
        self.steps -= 1
        self._narrow()
