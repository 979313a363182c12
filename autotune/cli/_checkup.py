"""What `autotune doctor` looks at. A check says what it found even where all is well."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from autotune.cli._session import opened
from autotune.spec.errors import AutotuneError

LEAST_FREE = 1 << 30  # bytes of disk beside the database: traces and logs go there


@dataclass(frozen=True)
class Check:
    """One thing looked at. A hint with `ok` is advice; without, it says what to do."""

    name: str
    ok: bool
    found: str
    hint: str = ""


def checks() -> Iterator[Check]:
    """Every check in order; one that raises is a failed check, not the end."""
    for name, look in CHECKS.items():
        try:
            yield look()
        except AutotuneError as error:
            yield Check(name, False, error.message, error.hint or "")
        except (ImportError, OSError, RuntimeError) as error:
            yield Check(name, False, f"{type(error).__name__}: {error}")


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, platform.python_version(), "" if ok else "Python 3.11 or newer is needed")


def _packages() -> Check:
    """Installed versions against what this package declares."""
    import re

    missing, found = [], []
    for line in metadata.requires("autotune") or []:
        name = re.split(r"[ <>=!~;\[]", line, maxsplit=1)[0]
        if "extra ==" in line:
            continue
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    hint = f"pip install {' '.join(missing)}" if missing else ""
    return Check("packages", not missing, ", ".join(found), hint)


def _torch() -> Check:
    import torch

    backends = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    ok = torch.distributed.is_available() and "gloo" in backends
    hint = "" if ok else "install a torch build with torch.distributed and gloo"
    return Check("torch", ok, f"{torch.__version__}, {', '.join(backends) or 'no backend'}", hint)


def _devices() -> Check:
    from autotune.profiles_db.facts import machine_facts

    facts = machine_facts()
    memory = f"{facts.memory_bytes / 2**30:.1f} GiB"
    found = f"{facts.count} x {facts.name}, {memory}; host {facts.host.cores} cores; machine {facts.fingerprint}"
    return Check("devices", True, found)


def _database() -> Check:
    with opened() as store:
        path = store.place.path
        if path is None:
            return Check("database", True, store.place.shown)
        free = shutil.disk_usage(path.parent).free
        ok = free >= LEAST_FREE
        hint = "" if ok else "free some disk, or name another place with --db"
        return Check("database", ok, f"{store.place.shown}, {free / 2**30:.0f} GiB free", hint)


def _profile() -> Check:
    from autotune.profiles_db.facts import machine_facts

    with opened() as store:
        facts = machine_facts()
        profile = store.find_profile(facts.fingerprint)
    if profile is None:
        return Check("profile", True, "none of this machine yet", "`autotune profile --quick` measures it")
    changed = sorted(k for k, v in profile.software.items() if facts.software.get(k, v) != v)
    hint = f"{', '.join(changed)} changed since it was measured: profile again" if changed else ""
    return Check("profile", True, f"{profile.name} ({profile.grade}), {profile.created}", hint)


def _shipped() -> Check:
    from autotune.profiles_db.profile_file import load_profile, shipped

    names = [load_profile(path).name for path in shipped().values()]
    return Check("machines", bool(names), f"{len(names)} profiles ship: {', '.join(names)}")


def _corpus() -> Check:
    import sysconfig

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sum(1 for _ in folder.glob("*.py"))
    hint = "" if files else "name a text file with [workload] data"
    return Check("corpus", files > 0, f"Python's standard library, {files} files in {folder}", hint)


CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "devices": _devices,
    "database": _database,
    "profile": _profile,
    "machines": _shipped,
    "corpus": _corpus,
}
