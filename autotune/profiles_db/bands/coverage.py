"""Whether bands hold what they promise: a half of all rows makes them, the other half is judged by them.

A hash of a row's own name says which half it is in, for ever and wherever it is kept, so that a plan that ran before
never makes the band that it is judged by now. The hash is another one than that which parts rows to fit to from rows
to judge (planners.replay.split): by the same one all judged rows would be in one half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from autotune.profiles_db.bands.conformal import binomial_bounds
from autotune.profiles_db.bands.kept import of_judgement
from autotune.profiles_db.bands.pools import HERE, Bands
from autotune.spec.band import LEVEL, METRICS, Band, Kind, Residual
from autotune.spec.validation import Coverage, Judgement


def makes_bands(residual: Residual) -> bool:
    """Whether the row is of the half that makes bands; the others are judged."""
    name = residual.row.partition("\0")[0]
    return hashlib.sha256(f"band {name}".encode()).digest()[0] % 2 == 0


def covered(
    rows: Sequence[Judgement], others: Iterable[Residual], level: float = LEVEL
) -> tuple[tuple[Judgement, ...], tuple[Coverage, ...], int]:
    """The rows, those of the judged half with the interval that the other half makes for them; the share of them
    inside, by class; how many of that half have no band, for too few others rest on their grade or a weaker one.
    `others`: residuals that are known beside these rows."""
    own = [of_judgement(row, HERE) for row in rows]
    bands = Bands([r for r in (*filter(None, own), *others) if makes_bands(r)], level)
    judged, told, without = list(rows), dict[Kind, list[tuple[bool, Band]]](), 0
    for number, (row, residual) in enumerate(zip(rows, own, strict=True)):
        if residual is None or makes_bands(residual):
            continue
        ratio = bands.ratio(residual.kind)
        if ratio is None:
            without += 1
            continue
        _, inverse = METRICS[row.metric]
        band = ratio.inverse(row.predicted) if inverse else ratio.times(row.predicted)
        judged[number] = replace(row, interval=(band.low, band.high))
        told.setdefault(residual.kind, []).append((band.holds(row.measured), ratio))
    return tuple(judged), tuple(_coverage(kind, found) for kind, found in told.items()), without


def _coverage(kind: Kind, found: Sequence[tuple[bool, Band]]) -> Coverage:
    inside, band = sum(holds for holds, _ in found), found[0][1]
    low, high = binomial_bounds(inside, len(found))
    return Coverage(
        kind.quantity,
        kind.grade,
        kind.device,
        kind.workload,
        band.level,
        band.residuals,
        band.pool,
        (band.low, band.high),
        len(found),
        inside,
        low,
        high,
    )
