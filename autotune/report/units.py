"""Seconds, bytes and shares as people read them."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Three significant figures: `12.3 ms`, `-4.56 µs`, `1.20 s`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale * 0.9995:
            return f"{_three(value / scale)} {unit}"
    return "0 s" if value == 0 else f"{_three(value / 1e-9)} ns"


def size(value: float) -> str:
    """Binary units, three significant figures: `3.20 GiB`."""
    for scale, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= scale * 0.9995:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: float) -> str:
    """A share of one, with one decimal: `12.3 %`."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """A fraction with its sign: `+1.2 %`."""
    return f"{100 * value:+.1f} %"


def _three(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.2f}" if magnitude < 9.995 else f"{value:.1f}" if magnitude < 99.95 else f"{value:.0f}"
