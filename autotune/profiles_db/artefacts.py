"""Large values as compressed JSON files beside the database, named by the sha256 of what is inside."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from autotune.spec.errors import EnvironmentFault


def where(folder: Path, digest: str) -> Path:
    """The file of `digest`; two digits of it make a subfolder, so that no folder grows too large to list."""
    return folder / digest[:2] / f"{digest}.json.gz"


def put(folder: Path, value: Any) -> tuple[str, int]:
    """Write `value` as JSON, once; (digest, bytes before compression). The file appears whole or not at all."""
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    path = where(folder, digest)
    if path.exists():
        return digest, len(data)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(gzip.compress(data, compresslevel=6, mtime=0))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise EnvironmentFault(
            f"{path}: cannot be written: {error.strerror}", hint="free space or make the folder writable"
        ) from None
    return digest, len(data)


def get(folder: Path, digest: str) -> Any:
    """The value of `digest`, verified against its name."""
    path = where(folder, digest)
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{path}: this file of the plan database is missing", hint="copy it from where the database came from"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise EnvironmentFault(f"{path}: this file of the plan database is damaged: {error}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise EnvironmentFault(f"{path}: this file of the plan database is damaged: its digest is not its name")
    return json.loads(data)
