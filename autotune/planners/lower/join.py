"""Joined bodies: the weight gradients of a block over the tokens of several micro-batches, one product a weight.

The body is that of a micro-batch so many times as large; its W begins by putting together what forwards and input
gradients left for each micro-batch, each value where it is first read: `v@0`, `v@1`, ... become `v` and are given back.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from autotune.planners.lower.body import Body, as_program, lower_block, with_frees
from autotune.planners.lower.shape import Shape
from autotune.spec.graph import Block
from autotune.spec.opset import NO_NODE
from autotune.spec.program import Instruction


def part_of(name: str, number: int) -> str:
    """The value of one of the micro-batches that are put together."""
    return f"{name}@{number}"


def together(shape: Shape, count: int) -> Shape:
    """The shape of `count` micro-batches as one."""
    return replace(shape, batch=count * shape.batch)


@lru_cache(maxsize=4096)
def joined_body(block: Block, shape: Shape, policy: str, count: int, lent: bool = False) -> Body:
    """The body whose W is of `count` micro-batches of `shape`: for one, the block's own.

    `lent`: as it is counted where somebody else keeps the parts of the output's gradient until W has ended.
    """
    body = lower_block(block, together(shape, count), policy)
    if count == 1 and not lent:
        return body
    source, incoming = block.nodes[0].reads[0], f"d.{body.output}"
    outside = {source, *((incoming,) if lent else ())}
    out: list[Instruction] = []
    sizes, there, live = dict(body.sizes), set[str](), set[str]()
    for instruction in body.weight_gradient.ranks[0]:
        for name in instruction.reads if count > 1 else ():
            if name not in there:
                parts = tuple(part_of(name, number) for number in range(count))
                sizes |= dict.fromkeys(parts, sizes[name] // count)
                live.update(parts)
                out.append(Instruction("concat", part=NO_NODE, reads=parts, writes=(name,)))
                there.add(name)
        there.update(instruction.writes)
        out.append(instruction._replace(frees=()))
    if count == 1:
        live, given = set(body.weight_gradient.live[0]) | outside, outside
    else:
        given = {part for part in live if part.rpartition("@")[0] in outside}
    made = as_program(with_frees(out, given), sizes, given, live)
    return replace(body, weight_gradient=made, sizes=sizes)
