"""Predicted figures with their bands as people read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotune.report.units import percent
from autotune.spec.band import Band
from autotune.spec.prediction import Prediction

Form = Callable[[float], str]
NAMES = {"step_s": "time", "prefill_s": "prefill", "decode_s": "a token", "peak_bytes": "memory"}


def level(band: Band) -> str:
    """`90 %`."""
    return f"{100 * band.level:g} %"


def span(value: float, band: Band | None, form: Form) -> str:
    """`441 to 489`, in the unit of `value` where all three have the same; "" without a band."""
    if band is None:
        return ""
    unit = form(value).rpartition(" ")[2]
    ends = [form(band.low), form(band.high)]
    if all(end.endswith(f" {unit}") for end in ends):
        ends = [end.removesuffix(f" {unit}") for end in ends]
    return " to ".join(ends)


def within(value: float, band: Band | None, form: Form) -> str:
    """`458 ms (441 to 489 at 90 %, interpolated)`."""
    if band is None:
        return form(value)
    pooled = ", pooled" if band.pooled else ""
    return f"{form(value)} ({span(value, band, form)} at {level(band)}, {band.rests_on}{pooled})"


def short(value: float, band: Band | None, form: Form) -> str:
    """`458 ms (441 to 489)`, for tables whose heading says the level."""
    return form(value) if band is None else f"{form(value)} ({span(value, band, form)})"


def pools(prediction: Prediction) -> str:
    """`time from 45 residuals of its class; memory from 96 of all workloads`; "" without bands."""
    told: dict[tuple[int, str], list[str]] = {}
    for figure, name in NAMES.items():
        if band := prediction.bands.get(figure):
            told.setdefault((band.residuals, band.pool), []).append(name)
    parts = [f"{' and '.join(names)} from {n} residuals ({pool})" for (n, pool), names in told.items()]
    return "; ".join(parts)


def interval(band: Band | None) -> dict[str, Any]:
    """The fields of a figure's band that lists give."""
    return {"interval": [band.low, band.high] if band else None, "rests_on": band.rests_on if band else None}


def fell(bands: Mapping[str, Band], figure: str, measured: float) -> bool | None:
    """Whether a measured figure fell into its band; None where there is none."""
    band = bands.get(figure)
    return band.holds(measured) if band and measured else None


def verdict(inside: bool | None) -> str:
    """`inside`, `outside`, or `-`."""
    return "-" if inside is None else "inside" if inside else "outside"


def judged(inside: int, of: int) -> str:
    """`166 of 174, 95.4 %`."""
    return f"{inside} of {of}, {percent(inside / of)}"
