"""Zero Bubble's bubble rates (2401.10241, table 5), from the durations that the paper profiled: plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from autotune.planners.replay.orders import measure
from autotune.planners.replay.row import Row, Table
from autotune.planners.schedules.schedule import Pipe
from autotune.planners.schedules.times import Times


@dataclass(frozen=True)
class Profile:
    """A row of Zero Bubble's profiles: a GPT on p stages, times of a stage and of a hop in milliseconds.

    `layers` are all layers of the model: the first and the last stage have one less than the others, to make up for
    the embedding and the head, and the paper's bubble rates are indeed those of equal stages.
    """

    model: str
    layers: int
    heads: int
    hidden: int
    ranks: int
    items: int
    forward: float
    input_gradient: float
    weight_gradient: float
    hop: float
    sequence: int = 1024

    def pipe(self, limit: int = 0) -> Pipe:
        """The share kept from B to W is 32h of 34h+5as bytes a token and layer (2401.10241, table 1)."""
        kept = 32 * self.hidden / (34 * self.hidden + 5 * self.heads * self.sequence)
        times = Times((self.forward,), (self.input_gradient,), (self.weight_gradient,), self.hop, kept)
        return Pipe(self.ranks, self.items, limit=limit, times=times)


# (the schedule's name in the paper, its name here, the memory limit as a multiple of p activations, 0 for none)
ZERO_BUBBLE_COLUMNS = (
    ("1F1B", "1f1b", 0),
    ("ZB-H1", "zb-h1", 0),
    ("ZB-H2", "zb-h2", 0),
    ("ZB-1p", "zb-auto", 1),
    ("ZB-2p", "zb-auto", 2),
)
ZERO_BUBBLE_ROWS = (
    (Profile("1.5B", 22, 24, 2304, 8, 32, 18.513, 18.086, 9.331, 0.626), (0.1985, 0.1242, 0.0837, 0.1242, 0.0039)),
    (Profile("6.2B", 30, 32, 4096, 8, 24, 29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698, 0.1323, 0.0029)),
    (Profile("14.6B", 46, 40, 5120, 16, 128, 11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266, 0.0576, 0.0028)),
)


def rows() -> Iterator[Row]:
    """A row for each schedule of each profile."""
    for profile, values in ZERO_BUBBLE_ROWS:
        setup = f"{profile.model} p={profile.ranks} m={profile.items}"
        for (name, schedule, limit), value in zip(ZERO_BUBBLE_COLUMNS, values, strict=True):
            pipe = profile.pipe(limit * profile.ranks)
            found = partial(measure, schedule, "bubble rate", pipe)
            yield Row("2401.10241, table 5", setup, name, "bubble rate", value, found)


TABLE = Table("Zero Bubble", "the paper's profiled durations of F, B, W and a hop", False, rows)
