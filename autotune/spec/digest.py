"""Digests: the sha256 of canonical JSON, so that equal content has one name on every machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; dataclasses become objects."""

    def plain(item: Any) -> Any:
        if is_dataclass(item) and not isinstance(item, type):
            return asdict(item)
        raise TypeError(f"{type(item).__name__} has no canonical form")

    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)


def digest(value: Any) -> str:
    """The full hexadecimal digest of `value`'s canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
