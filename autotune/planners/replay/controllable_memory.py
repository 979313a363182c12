"""Bubbles and peaks of V-Min, V-Half and V-ZB at unit durations (2405.15362, the authors' published scheduler).

These are what the paper's public scheduler gives at F = B = W = 1 and no hop, not figures measured on a machine. Of
V-ZB's bubble, and of what the three reach on GPUs, no figures are at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from autotune.planners.replay.orders import measure
from autotune.planners.replay.row import Row, Table
from autotune.planners.schedules.schedule import Pipe

# (ranks, micro-batches, makespan bubble rate of V-Min, of V-Half)
BUBBLES = (
    (4, 8, 0.1864, 0.0943),
    (8, 16, 0.2195, 0.1504),
    (8, 32, 0.1233, 0.0813),
    (16, 32, 0.2351, 0.1760),
    (16, 64, 0.1332, 0.0965),
)
# (ranks, chunk activations of the fullest rank of V-Min, of V-Half): 2 floor((p+4)/3) and 2 floor((p+2)/2)
PEAKS = ((4, 4, 6), (8, 8, 10), (16, 12, 18))
V_ZB_PEAKS = ((4, 8), (8, 16), (16, 32))  # 2p: as many bytes as 1F1B
SCHEDULES = (("V-Min", "v-min"), ("V-Half", "v-half"))
SOURCE = "2405.15362, code"


def rows() -> Iterator[Row]:
    for column, (name, schedule) in enumerate(SCHEDULES):
        for p, m, *values in BUBBLES:
            metric = "makespan bubble rate"
            found = partial(measure, schedule, metric, Pipe(p, m, 2))
            yield Row(SOURCE, f"p={p} m={m}", name, metric, values[column], found)
        for p, *most in PEAKS:
            found = partial(measure, schedule, "peak", Pipe(p, 2 * p, 2))
            yield Row(SOURCE, f"p={p} m={2 * p}", name, "peak", most[column], found)
    for p, value in V_ZB_PEAKS:
        yield Row(
            SOURCE, f"p={p} m={2 * p}", "V-ZB", "peak", value, partial(measure, "v-zb", "peak", Pipe(p, 2 * p, 2))
        )


TABLE = Table("Controllable memory", "unit durations of F, B and W, no hop", False, rows)
