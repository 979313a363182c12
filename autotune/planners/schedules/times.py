"""Relative durations of a pipeline's stages: what an order that is made for a machine looks at.

A plan carries them as text, so that its program depends on nothing but the plan: `F,B,W,hop`, each a number for all
stages or a number for each, separated by slashes: `20,21,9,1` or `10/10/12,11/11/15,5/5/9,1`. A fifth number says what
share of a chunk activation is alive from B to W, for orders made under a limit of memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Durations of F, B and W of each stage (one entry: of all stages) and of one message between ranks.

    `kept`: the share of a chunk activation that is alive from B to W.
    """

    forward: tuple[float, ...] = (1.0,)
    input_gradient: tuple[float, ...] = (1.0,)
    weight_gradient: tuple[float, ...] = (1.0,)
    hop: float = 0.0
    kept: float = 1.0

    def of(self, op: str, stage: int) -> float:
        """The duration of F, B, W or BW of a stage."""
        if op == "BW":
            return self.of("B", stage) + self.of("W", stage)
        values = {"F": self.forward, "B": self.input_gradient, "W": self.weight_gradient}[op]
        return values[stage] if len(values) > 1 else values[0]

    def __str__(self) -> str:
        columns = [self.forward, self.input_gradient, self.weight_gradient, (self.hop,)]
        columns += [(self.kept,)] if self.kept != 1 else []
        return ",".join("/".join(f"{value:g}" for value in column) for column in columns)


UNIT = Times()


def parse_times(text: str, stages: int) -> Times:
    """The times that a plan's `times` says ("": UNIT). ValueError says what is wrong with the text."""
    if not text:
        return UNIT
    columns = text.split(",")
    if len(columns) not in (4, 5):
        raise ValueError(f"four columns F,B,W,hop or five with the share kept (found {len(columns)} in {text!r})")
    try:
        numbers = [tuple(float(value) for value in column.split("/")) for column in columns]
    except ValueError:
        raise ValueError(f"numbers alone (found {text!r})") from None
    for name, column in zip("FBW", numbers[:3], strict=True):
        if len(column) not in (1, stages):
            raise ValueError(f"one {name} or one for each of {stages} stages (found {len(column)} in {text!r})")
    if len(numbers[3]) != 1 or min(min(column) for column in numbers) < 0 or min(map(min, numbers[:3])) <= 0:
        raise ValueError(f"positive F, B, W and one hop that is not negative (found {text!r})")
    kept = numbers[4][0] if len(numbers) == 5 else 1.0
    if not 0 <= kept <= 1:
        raise ValueError(f"a share kept from B to W between 0 and 1 (found {kept:g})")
    return Times(numbers[0], numbers[1], numbers[2], numbers[3][0], kept)
