"""Which rows of a measured set something may be fitted to: a row's own text says it, for ever."""

from __future__ import annotations

import hashlib


def for_fitting(text: str) -> bool:
    """Whether the row with this text is one of the half that is fitted to; the others alone are judged.

    The parity of the text's sha256: no order of rows, no seed and no later row changes it.
    """
    return hashlib.sha256(text.encode()).digest()[-1] % 2 == 0
