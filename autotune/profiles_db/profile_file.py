"""The file form of a machine profile: JSON with the schema name "autotune.machine/1", one sample a line.

A file is data only: it is parsed, checked field by field against the dataclasses of spec/machine.py and spec/work.py,
and refused with every problem at once. A sample is `{"work": {"kind": "matmul", ...}, "seconds": ...}`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from autotune.spec.digest import digest
from autotune.spec.errors import Problem, UsageError, nearest_name
from autotune.spec.machine import GRADES, SCHEMA, Device, Host, Interference, Link, Profile, Sample
from autotune.spec.work import BYTES, KINDS, Attention, Work

MACHINES = Path(__file__).parent / "machines"

# What a string field may say, by class and field; every other string only has to be a string.
CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("Profile", "grade"): GRADES,
    ("Device", "kind"): ("cuda", "rocm", "cpu"),
    ("Matmul", "dtype"): tuple(BYTES),
    ("Matmul", "form"): ("fwd", "dgrad", "wgrad", "int8"),
    ("Attention", "dtype"): tuple(BYTES),
    ("Attention", "form"): ("fwd", "bwd"),
    ("Memory", "dtype"): tuple(BYTES),
    ("Optimizer", "dtype"): ("mixed", "fp32", "fp64"),
    ("Optimizer", "place"): ("device", "host"),
    ("Collective", "op"): (
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "reduce",
        "send_recv",
    ),
    ("Copy", "direction"): ("h2d", "d2h", "d2d", "h2h", "disk_read", "disk_write"),
}
# The least a number may be where that is not 0, and the fields that must be above 0 rather than at it.
AT_LEAST: dict[tuple[str, str], float] = {("Device", "count"): 1, ("Interference", "compute"): 1e-9}
AT_LEAST |= {("Sample", "ranks"): 1, ("Sample", "runs"): 1, ("Interference", "ranks"): 1}
AT_LEAST |= {(cls.__name__, f.name): 1 for cls in KINDS.values() for f in fields(cls) if f.type == "int"}
AT_LEAST |= {("Collective", "level"): 0}
# Fields younger than the schema: left out where they have their default, so that older versions read the file.
UNSAID = {("Collective", "inner"): 1, ("Collective", "captured"): False}
HUGE = 2**63 - 1  # what a database column holds
ABOVE_ZERO = {("Sample", "seconds"), ("Device", "memory_bandwidth"), ("Device", "memory_bytes")}
ABOVE_ZERO |= {("Link", "bandwidth"), ("Device", "peak_flops"), ("Interference", "communication")}


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in `path`. UsageError lists every problem of the file, or says that it cannot be read."""
    name = os.fspath(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
        raw = json.loads(text, object_pairs_hook=_no_twins)
    except OSError as error:
        problem = Problem(name, "", error.strerror or str(error), "a readable machine profile")
        raise UsageError("the machine profile cannot be read", problems=[problem]) from error
    except (ValueError, RecursionError) as error:
        problem = Problem(name, "", f"no JSON ({error})", f'an object with "schema": "{SCHEMA}"')
        raise UsageError("the machine profile is not JSON", problems=[problem]) from error
    return from_dict(raw, name)


def dump_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Writes `profile` to `path` in one step: a reader sees the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_text(profile))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a profile is there to be shared
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_text(profile: Profile) -> str:
    """The file's text: one key a line, one link, sample or interference a line, so that differences read."""
    lines = []
    for key, value in to_dict(profile).items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).replace("\n", "\n  ")
            lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_dict(profile: Profile) -> dict[str, Any]:
    """Plain JSON values, the schema name first. `from_dict(to_dict(p)) == p`."""
    out: dict[str, Any] = {"schema": SCHEMA}
    for field in fields(Profile):
        out[field.name] = _plain(getattr(profile, field.name))
    return out


def profile_digest(profile: Profile) -> str:
    """What names this content in the plan database and in a lock."""
    return digest(to_dict(profile))


def from_dict(raw: Any, source: str = "<profile>") -> Profile:
    """The profile that `raw` (parsed JSON) says; `source` names it in the problems of a UsageError."""
    problems: list[Problem] = []
    if not isinstance(raw, dict):
        problems.append(Problem(source, "", _shown(raw), f'an object with "schema": "{SCHEMA}"'))
    elif raw.get("schema") != SCHEMA:
        problems.append(Problem(source, "schema", _shown(raw.get("schema", MISSING)), f'"{SCHEMA}"', SCHEMA))
    else:
        body = {key: value for key, value in raw.items() if key != "schema"}
        profile = _record(Profile, body, "", source, problems)
        if not problems:
            assert isinstance(profile, Profile)
            _whole(profile, source, problems)
            if not problems:
                return profile
    raise UsageError("the machine profile is not valid", problems=problems)


def shipped() -> dict[str, Path]:
    """The profiles that ship, by the name a recipe's `[machine] use =` calls them."""
    return {path.stem: path for path in sorted(MACHINES.glob("*.json"))}


def resolve(use: str, base: Path, stored: Callable[[str], Profile | None], recipe: str = "recipe") -> Profile:
    """What `[machine] use = "..."` means: a shipped name, a stored one, or a file relative to the folder `base`.

    A shipped name comes first, so that a recipe means the same on every machine; anything with a slash or ending in
    .json is a file. UsageError names the recipe and the nearest shipped profile.
    """
    names = shipped()
    is_file = use.endswith(".json") or "/" in use or os.sep in use
    if use in names and not is_file:
        return load_profile(names[use])
    if not is_file and (profile := stored(use)) is not None:
        return profile
    path = base / Path(use).expanduser()
    if path.is_file():
        return load_profile(path)
    wanted = f"a readable file ({path} is none)" if is_file else "this, a shipped or stored profile, or a path"
    near = nearest_name(Path(use).stem if is_file else use, [*names, "this"])
    problem = Problem(recipe, "machine.use", f'"{use}"', f"{wanted}; shipped: {', '.join(names)}", near)
    raise UsageError("no such machine profile", problems=[problem])


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" twice in one object')
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Sample):
        said = {f.name: getattr(value.work, f.name) for f in fields(value.work)}
        name = type(value.work).__name__
        work = {"kind": value.work.kind} | {key: v for key, v in said.items() if UNSAID.get((name, key)) != v}
        return {"work": work} | {f.name: getattr(value, f.name) for f in fields(value) if f.name != "work"}
    if isinstance(value, (Device, Host, Link, Interference)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@cache
def _shape(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
    """A dataclass's field types by name, and the names that a file must give."""
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}, frozenset(needed)


def _record(cls: type, raw: Any, key: str, source: str, problems: list[Problem]) -> Any:
    """`raw` as the dataclass `cls`, or None after adding what is wrong with it to `problems`."""
    if not isinstance(raw, dict):
        problems.append(Problem(source, key, _shown(raw), f"an object of {cls.__name__}"))
        return None
    before, (types, needed), values = len(problems), _shape(cls), {}
    for name, item in raw.items():
        if name not in types:
            near = nearest_name(name, types)
            problems.append(Problem(source, _join(key, name), "an unknown key", f"one of {', '.join(types)}", near))
        else:
            where = _join(key, name)
            values[name] = _value(types[name], (cls.__name__, name), item, where, source, problems)
    for name in sorted(needed - raw.keys()):
        problems.append(Problem(source, _join(key, name), "nothing", f"a {_wanted(types[name])}"))
    return cls(**values) if len(problems) == before else None


def _value(kind: Any, at: tuple[str, str], raw: Any, key: str, source: str, problems: list[Problem]) -> Any:
    if kind == Work:
        return _work(raw, key, source, problems)
    if isinstance(kind, type) and kind in (Device, Host):
        return _record(kind, raw, key, source, problems)
    item = {"links": Link, "samples": Sample, "interference": Interference}.get(at[1])
    if at[0] == "Profile" and item is not None:
        if not isinstance(raw, list):
            problems.append(Problem(source, key, _shown(raw), f"a list of {item.__name__}"))
            return ()
        return tuple(_record(item, row, f"{key}[{i}]", source, problems) for i, row in enumerate(raw))
    if kind in (Mapping[str, float], Mapping[str, str]):
        inner = float if kind == Mapping[str, float] else str
        if not isinstance(raw, dict):
            problems.append(Problem(source, key, _shown(raw), f"an object of names to {_wanted(inner)}s"))
            return {}
        return {name: _value(inner, at, item, _join(key, name), source, problems) for name, item in raw.items()}
    return _scalar(kind, at, raw, key, source, problems)


def _scalar(kind: Any, at: tuple[str, str], raw: Any, key: str, source: str, problems: list[Problem]) -> Any:
    if kind == float | None:
        if raw is None:
            return None
        kind = float
    is_number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    if kind is float and is_number and abs(raw) <= sys.float_info.max:  # a whole number may be too large for a float
        raw = float(raw)
    if type(raw) is not kind or (kind is float and not math.isfinite(raw)) or (is_number and raw > HUGE):
        problems.append(Problem(source, key, _shown(raw), f"a {_wanted(kind)}"))
    elif kind is str and at in CHOICES and raw not in CHOICES[at]:
        choices = CHOICES[at]
        problems.append(Problem(source, key, _shown(raw), f"one of {', '.join(choices)}", nearest_name(raw, choices)))
    elif is_number and (raw < AT_LEAST.get(at, 0) or (raw == 0 and at in ABOVE_ZERO)):
        least = "above 0" if at in ABOVE_ZERO else f"at least {AT_LEAST.get(at, 0):g}"
        problems.append(Problem(source, key, _shown(raw), f"a number {least}"))
    return raw


def _work(raw: Any, key: str, source: str, problems: list[Problem]) -> Any:
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        near = nearest_name(kind, KINDS) if isinstance(kind, str) else None
        found = _shown(kind if isinstance(raw, dict) else raw)
        problems.append(Problem(source, _join(key, "kind"), found, f"one of {', '.join(KINDS)}", near))
        return None
    rest = {name: item for name, item in raw.items() if name != "kind"}
    return _record(KINDS[kind], rest, key, source, problems)


def _whole(profile: Profile, source: str, problems: list[Problem]) -> None:
    """What no single field can show."""
    if not profile.name:
        problems.append(Problem(source, "name", '""', "a name"))
    if not profile.device.peak_flops:
        problems.append(Problem(source, "device.peak_flops", "no dtype", f"at least one of {', '.join(BYTES)}"))
    for dtype in [*profile.device.peak_flops, *profile.host.peak_flops]:
        if dtype not in BYTES:
            key = f"device.peak_flops.{dtype}"
            problems.append(Problem(source, key, "no dtype", f"one of {', '.join(BYTES)}", nearest_name(dtype, BYTES)))
    for i, (inner, outer) in enumerate(zip(profile.links, profile.links[1:], strict=False)):
        if inner.size == 0 or (outer.size and outer.size <= inner.size):
            key, found = f"links[{i + 1}].size", f"{outer.size} after {inner.size}"
            problems.append(Problem(source, key, found, "levels from the innermost, each larger (0, unlimited, last)"))
    for i, sample in enumerate(profile.samples):
        if isinstance(sample.work, Attention) and sample.work.queries > sample.work.keys:
            key, found = f"samples[{i}].work.queries", f"{sample.work.queries}"
            problems.append(Problem(source, key, found, f"at most keys = {sample.work.keys}"))


def _wanted(kind: Any) -> str:
    names = {str: "string", int: "whole number", float: "finite number", bool: "true or false"}
    return names.get(kind, "value")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _shown(raw: Any) -> str:
    if raw is MISSING:
        return "nothing"
    text = json.dumps(raw, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
