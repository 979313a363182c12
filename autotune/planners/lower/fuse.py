"""Neighbours in a body as one instruction, where one kernel does what several did (plan axis `kernels`).

A decoded token's operations are short: what lies between two of them, and what the second reads again, is a good part
of the time. The rewrite joins the operations of a run of RUNS that stand side by side, where nobody else reads what
they hand one another. The instruction is called by their names joined, and its `part` is the first one's node. Who
computes such a run is a line in `runners/ops/fused.py`; what it moves is `costs/fused.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from autotune.spec.graph import Block, Node
from autotune.spec.program import Instruction

JOIN = "+"
RUNS = (  # longer ones first
    ("rmsnorm", "linear", "swiglu"),
    ("rmsnorm", "linear_int8", "swiglu"),
    ("rmsnorm", "linear"),
    ("rmsnorm", "linear_int8"),
    ("linear", "add"),
    ("linear_int8", "add"),
    ("rotary", "attention"),
    ("rotary_norm", "attention"),
)


def parts(op: str) -> tuple[str, ...]:
    """The operations of an instruction."""
    return tuple(op.split(JOIN))


def nodes_of(block: Block, instruction: Instruction) -> tuple[Node, ...]:
    """The nodes that a joined instruction does."""
    return block.nodes[instruction.part : instruction.part + len(parts(instruction.op))]


def fuse(listing: Sequence[Instruction], block: Block, output: str) -> list[Instruction]:
    """The listing of a forward that keeps nothing, its runs joined; `output` is read by whoever comes after it."""
    reads = Counter(name for instruction in listing for name in set(instruction.reads)) + Counter([output])
    made: list[Instruction] = []
    at = 0
    while at < len(listing):
        run = next((run for run in RUNS if _joins(listing[at : at + len(run)], run, block, reads)), None)
        made.append(_joined(listing[at : at + len(run)], block) if run else listing[at])
        at += len(run) if run else 1
    return made


def _joins(some: Sequence[Instruction], run: Sequence[str], block: Block, reads: Counter[str]) -> bool:
    """Whether these are that run, each but the last read by the next alone."""
    if tuple(i.op for i in some) != tuple(run) or any(i.part != some[0].part + n for n, i in enumerate(some)):
        return False
    for one, following in pairwise(some):
        handed = set(block.nodes[one.part].writes)
        if not handed <= set(following.reads) or any(reads[name] > 1 for name in one.writes):
            return False
    return True


def _joined(some: Sequence[Instruction], block: Block) -> Instruction:
    inside = {name for instruction in some for name in instruction.writes}
    reads = dict.fromkeys(name for instruction in some for name in instruction.reads if name not in inside)
    last = some[-1]
    writes = last.writes[: len(block.nodes[last.part].writes)]  # statistics are for a backward
    return Instruction(JOIN.join(i.op for i in some), part=some[0].part, reads=tuple(reads), writes=writes)
