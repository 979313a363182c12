"""What ranks that share sequences exchange around attention: heads for tokens (Ulysses, 2309.14509, section 3.1).

Each rank has a part of every sequence's tokens with all heads of its tensor rank. Before attention an all-to-all gives
it every token of its share of the heads, after it every head of its own tokens again. What is sent to each rank lies
together, so the values are laid out anew on both sides; all of it is linear, and the gradient of each step is the
other's (EXCHANGES).
"""

from __future__ import annotations

from autotune.planners.lower.shape import Shape
from autotune.spec.program import CONTEXT, Instruction

NO_NODE = -1  # the `part` of an instruction that belongs to no node

# Of each step, the one that takes its gradient back. Ranks are numbered as their tokens follow one another.
EXCHANGES = {
    "heads_apart": "heads_together",  # local tokens of several values: by rank, whose heads they are
    "heads_together": "heads_apart",
    "tokens_together": "tokens_apart",  # by rank, whose tokens they are: whole sequences of several values
    "tokens_apart": "tokens_together",
    "all_to_all": "all_to_all",
}


def around_attention(attention: Instruction, shape: Shape, size: dict[str, int]) -> list[Instruction]:
    """Attention with what its operands and its output go through; adds the bytes of new values to `size`.

    Bytes are the same on both sides: fewer heads of more tokens. `v.whole` is value v over whole sequences.
    """
    if shape.context == 1:
        return [attention]
    out: list[Instruction] = []

    def step(op: str, reads: tuple[str, ...], writes: tuple[str, ...], lane: str | None = None) -> None:
        made = Instruction(op, part=NO_NODE, reads=reads, writes=writes)
        out.append(made if lane is None else made._replace(lane=lane))

    output, *stats = attention.writes
    inputs = tuple(f"{name}.whole" for name in attention.reads)
    whole = f"{output}.whole"
    size |= {there: size[here] for there, here in zip(inputs, attention.reads, strict=True)}
    total = sum(size[name] for name in attention.reads)
    size |= {f"{attention.op}.{way}": total for way in ("sent", "received")}
    size |= dict.fromkeys((whole, f"{whole}.sent", f"{whole}.received"), size[output])
    step("heads_apart", attention.reads, (f"{attention.op}.sent",))
    step("all_to_all", (f"{attention.op}.sent",), (f"{attention.op}.received",), CONTEXT)
    step("tokens_together", (f"{attention.op}.received",), inputs)
    out.append(attention._replace(reads=inputs, writes=(whole, *stats)))
    step("tokens_apart", (whole,), (f"{whole}.sent",))
    step("all_to_all", (f"{whole}.sent",), (f"{whole}.received",), CONTEXT)
    step("heads_together", (f"{whole}.received",), (output,))
    return out
