"""A colour for every operation name, the same on every page.

Well-known names are in a table; any other takes a place in a fixed palette by a checksum of its name. Nothing here
knows what an operation does. Hues follow Okabe and Ito's (table) and Paul Tol's "muted" set (hashed), both made to be
told apart with any colour vision; each has a darker form for white pages and a lighter one for dark pages.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32


class Colour(NamedTuple):
    """`#rrggbb` on a light page and on a dark one."""

    light: str
    dark: str


BLUE = Colour("#2b83c6", "#56b4e9")
GREEN = Colour("#00805c", "#1fbd8f")
ORANGE = Colour("#d08400", "#f0b13a")
VERMILLION = Colour("#c75300", "#f0803c")
PINK = Colour("#b5628f", "#dd92bb")
VIOLET = Colour("#77509f", "#b295dc")
GREY = Colour("#767b80", "#a2a8ae")

KNOWN: dict[str, Colour] = {
    "F": BLUE,
    "PREFILL": BLUE,
    "B": GREEN,
    "DECODE": GREEN,
    "W": ORANGE,
    "BW": VERMILLION,
    "S": Colour("#117733", "#5cb87c"),
    "T": Colour("#93368a", "#c27bbb"),
    "EMBED": Colour("#3f8fb0", "#88ccee"),
    "SEND": PINK,
    "RECV": VIOLET,
    "OPT": GREY,
    "ALL_REDUCE": Colour("#332288", "#8f83e0"),
    "REDUCE_SCATTER": Colour("#2d8f80", "#44aa99"),
    "ALL_GATHER": Colour("#9c8426", "#ddcc77"),
    "SYNC": Colour("#5a4fcf", "#a59cf5"),
    "OFFLOAD": Colour("#b8505f", "#dd7788"),
    "RELOAD": Colour("#3f8fb0", "#88ccee"),
    "TIE": Colour("#882255", "#c9669a"),
}

HASHED: tuple[Colour, ...] = (
    Colour("#332288", "#8f83e0"),  # indigo
    Colour("#3f8fb0", "#88ccee"),  # cyan
    Colour("#2d8f80", "#44aa99"),  # teal
    Colour("#117733", "#5cb87c"),  # green
    Colour("#7d7d24", "#bcbc58"),  # olive
    Colour("#9c8426", "#ddcc77"),  # sand
    Colour("#b8505f", "#dd7788"),  # rose
    Colour("#882255", "#c9669a"),  # wine
    Colour("#93368a", "#c27bbb"),  # purple
)


def colour(op: str) -> Colour:
    """The colour of an operation: its own, that of the part before `_` (`SEND_F` as `SEND`), or one by its name."""
    known = KNOWN.get(op) or KNOWN.get(op.partition("_")[0])
    return known or HASHED[crc32(op.encode()) % len(HASHED)]


def ink(background: str) -> str:
    """Black or white, whichever reads better on `background` (WCAG 2.1 relative luminance)."""
    linear = [_linear(int(background[k : k + 2], 16) / 255) for k in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _linear(channel: float) -> float:
    return float(channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4)
