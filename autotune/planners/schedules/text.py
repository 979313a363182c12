"""The text form of an order: one line a rank, `0F0 0F1 0BW0`: stage, operation, micro-batch.

It is what golden files hold and what a person edits. Labels of a whole program may stand in it too: those of messages
and updates are passed over, since passes add them again.
"""

from __future__ import annotations

import re

from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, Step

STEP = re.compile(r"(\d+)(F|BW|B|W)(\d+)")
OTHER = re.compile(r"\d+[A-Z][A-Z_0-9]*\d*(\.\d+)?(>[\d+]+)?(~\d+)?")


def dump(order: Order) -> str:
    """The order as text, a line a rank."""
    return "".join(" ".join(f"{s.stage}{s.op}{s.item}" for s in steps) + "\n" for steps in order)


def parse(text: str) -> Order:
    """The order that `text` says. ValueError names the line and the word that cannot be read."""
    found: Order = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        steps = []
        for place, word in enumerate(words, 1):
            match = STEP.fullmatch(word)
            if match:
                steps.append(Step(match[2], int(match[1]), int(match[3])))
            elif not OTHER.fullmatch(word):
                raise ValueError(f"line {number}, word {place}: found {word!r}; a step is like 0F3, 0B3, 0W3 or 0BW3")
        found.append(steps)
    return found


def order(pipe: Pipe) -> Order:
    return parse(pipe.order)


def place(pipe: Pipe) -> Place:
    """The ranks whose lines name each stage."""
    lines = parse(pipe.order)
    held = [{step.stage for step in steps} for steps in lines]
    return tuple(tuple(r for r, stages in enumerate(held) if s in stages) for s in range(pipe.stages))


def refuse(pipe: Pipe) -> str | None:
    """What cannot be lowered at all. What can, but is not sound, is found by planners.validate, with its place."""
    if not pipe.order:
        return "an order (the axis `order`: one line a rank, like `0F0 0F1 0BW0 0BW1`)"
    try:
        lines = parse(pipe.order)
    except ValueError as error:
        return f"an order that can be read ({error})"
    if len(lines) != pipe.ranks:
        return f"a line for each of {pipe.ranks} pipeline ranks (found {len(lines)})"
    for rank, steps in enumerate(lines):
        for number, (op, stage, item) in enumerate(steps):
            if stage >= pipe.stages or item >= pipe.items:
                most = f"stages below {pipe.stages} and micro-batches below {pipe.items}"
                return f"{most} (found {stage}{op}{item}, step {number} of rank {rank})"
    done = {(step.op, step.stage, step.item) for steps in lines for step in steps}
    for stage in range(pipe.stages):
        for item in range(pipe.items):
            if ("F", stage, item) not in done:
                return f"every stage's forward of every micro-batch (missing {stage}F{item})"
            if ("BW", stage, item) not in done and not {("B", stage, item), ("W", stage, item)} <= done:
                return f"every stage's backward of every micro-batch (missing {stage}BW{item}, or {stage}B{item} and W)"
    return None


SCHEDULE = Schedule(order, place, refuse, searched=False)
