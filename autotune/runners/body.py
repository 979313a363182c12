"""Runs the body of one block, instruction by instruction: what the simulator priced, in the order it was priced.

A body program is compiled once into a list of steps. Collectives are issued without waiting; the
next instruction that touches their buffer waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels.exchange import GATHER, SCATTER, Several, shift
from autotune.kernels.one_shot import all_reduce
from autotune.planners.lower.fuse import JOIN, nodes_of
from autotune.runners import expert_layouts, layouts
from autotune.runners.ops import OPERATIONS, Env
from autotune.runners.ops.fused import FUSED
from autotune.spec.graph import Block
from autotune.spec.opset import OPS
from autotune.spec.program import COMPUTE, Instruction, Program

Values = dict[str, Tensor]
Groups = Mapping[str, dist.ProcessGroup | None]  # by lane: whom this rank meets there
ALONE: Groups = {}


class Call(NamedTuple):
    """One instruction, resolved: `run(env, group, operands)` gives its writes (an in-place one gives none)."""

    run: Callable[[Env, dist.ProcessGroup | None, tuple[Tensor, ...]], tuple[object, ...]]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...]
    touches: tuple[str, ...]
    lane: str
    label: str

    @property
    def collective(self) -> bool:
        return self.lane != COMPUTE


def _forward(block: Block, instruction: Instruction) -> Call:
    node, forward = block.nodes[instruction.part], OPERATIONS[instruction.op].forward
    if hop := instruction.item:
        return _call(instruction, lambda env, group, reads: forward(replace(env, hop=hop), node, *reads))
    return _call(instruction, lambda env, group, reads: forward(env, node, *reads))


def _fused(block: Block, instruction: Instruction) -> Call:
    function, nodes = FUSED[instruction.op], nodes_of(block, instruction)
    return _call(instruction, lambda env, group, reads: function(env, nodes, *reads))


def _gradient(block: Block, instruction: Instruction, op: str, form: str) -> Call:
    node, rule = block.nodes[instruction.part], OPS[op]
    given = len(instruction.reads) - len(rule.dgrad if form == "dgrad" else rule.wgrad)
    function, hop = getattr(OPERATIONS[op], form), instruction.item

    def run(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
        seen = replace(env, hop=hop) if hop else env
        return function(seen, node, reads[:given], reads[given:]) or ()

    return _call(instruction, run)


def _call(
    instruction: Instruction,
    run: Callable[[Env, dist.ProcessGroup | None, tuple[Tensor, ...]], tuple[object, ...]],
) -> Call:
    i = instruction
    touches = tuple(dict.fromkeys(i.reads + i.writes))
    return Call(run, i.reads, i.writes, i.frees, touches, i.lane, i.op)


def _accumulate(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    return (reads[1].add_(reads[0]),)


def _concat(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    return (torch.cat(reads),)


def _all_reduce(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    return reads[0], all_reduce(reads[0], group, async_op=True)


def _all_gather(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    part = reads[0].contiguous()
    whole = part.new_empty(part.shape[0] * env.tensor_size, *part.shape[1:])
    return whole, GATHER(whole, part, group=group, async_op=True)


def _reduce_scatter(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    whole = reads[0].contiguous()
    part = whole.new_empty(whole.shape[0] // env.tensor_size, *whole.shape[1:])
    return part, SCATTER(part, whole, group=group, async_op=True)


def _all_to_all(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """[ranks, ...] by who gets it -> [ranks, ...] by whose it was."""
    received = torch.empty_like(reads[0])
    return received, dist.all_to_all_single(received, reads[0], group=group, async_op=True)


def _shifted(way: int) -> Callable[[Env, dist.ProcessGroup | None, tuple[Tensor, ...]], tuple[object, ...]]:
    """Each operand to the rank `way` further in the ring, from the one as far before."""

    def run(env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
        received, started = shift(reads, group, way)
        return *received, started

    return run


_pause = 0.0


@contextmanager
def unhurried(seconds: float = 5e-4) -> Iterator[None]:
    """Inside, a body stops after each collective until the backend's thread, too, has let go of its buffers.

    For counting memory: that thread is woken last, and what it gives back no count of ours sees.
    """
    global _pause
    before, _pause = _pause, seconds
    try:
        yield
    finally:
        _pause = before


def _end(work: dist.Work | Several) -> None:
    work.wait()
    if _pause:
        time.sleep(_pause)


LAYOUTS = {**layouts.LAYOUTS, **expert_layouts.LAYOUTS}
LOCAL = {"accumulate": _accumulate, "concat": _concat}  # of no node
COLLECTIVES = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "shift": _shifted(1),
    "shift_back": _shifted(-1),
    **expert_layouts.COLLECTIVES,
}


def compile_body(block: Block, program: Program) -> tuple[Call, ...]:
    """The calls of a one-rank body program."""
    calls = []
    for instruction in program.ranks[0]:
        op, _, form = instruction.op.partition(".")
        if instruction.lane != COMPUTE:
            calls.append(_call(instruction, COLLECTIVES[op]))
        elif form:
            calls.append(_gradient(block, instruction, op, form))
        elif JOIN in op:
            calls.append(_fused(block, instruction))
        elif op in LAYOUTS:
            shares = tuple(program.buffers[0][name].size for name in instruction.writes)
            calls.append(_call(instruction, partial(LAYOUTS[op], shares)))
        elif op in LOCAL:
            calls.append(_call(instruction, LOCAL[op]))
        else:
            calls.append(_forward(block, instruction))
    return tuple(calls)


@dataclass
class Watch:
    """Counts the bytes of the values alive in a body at every instruction: what the simulator's walk predicts."""

    series: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    outside: frozenset[str] = frozenset()

    def see(self, label: str, values: Values) -> None:
        storages = {v.untyped_storage().data_ptr(): v.nbytes for n, v in values.items() if n not in self.outside}
        given = {v.untyped_storage().data_ptr() for n, v in values.items() if n in self.outside}
        self.series.append(sum(size for pointer, size in storages.items() if pointer not in given))
        self.order.append(label)


def run_body(
    calls: tuple[Call, ...], env: Env, values: Values, groups: Groups = ALONE, watch: Watch | None = None
) -> Values:
    """Runs the calls over `values`, which holds what the body is given and is left with what it does not free."""
    pending: dict[str, dist.Work | Several] = {}
    for call in calls:
        if pending:
            for name in call.touches:
                if name in pending:
                    _end(pending.pop(name))
        made = call.run(env, groups.get(call.lane), tuple(values[name] for name in call.reads))
        if call.collective:
            pending.update(dict.fromkeys(call.writes, made[-1]))  # type: ignore[arg-type]
            made = made[:-1]
        values.update(zip(call.writes, made, strict=True))  # type: ignore[arg-type]  # a loop's variable would keep one
        if watch is not None:
            watch.see(call.label, values)
        made = ()
        for name in call.frees:
            if name in pending:
                _end(pending.pop(name))
            del values[name]
    for work in pending.values():
        _end(work)
    return values
