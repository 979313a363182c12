"""What a torch.profiler trace says of launches: how long kernels waited for the host, and the device for kernels.

The form is the Chrome trace that `profile.export_chrome_trace` writes, plain or gzipped: complete events (`"ph": "X"`),
times in microseconds; a call that launches something is of category cuda_runtime or cuda_driver, what runs on the
device of kernel, gpu_memcpy or gpu_memset, and `args.correlation` joins the two. A replayed graph is one call with many
kernels. Definitions after SKIP (Vellaisamy et al., 2504.11750).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.spec.errors import Problem, UsageError
from autotune.spec.timeline import union

CALLS = ("cuda_runtime", "cuda_driver")
KERNEL, COPIES = "kernel", ("gpu_memcpy", "gpu_memset")
MICRO = 1e-6


@dataclass(frozen=True)
class KernelTrace:
    """Seconds, but for the counts. `queue_s`: of every call from its beginning to that of the first kernel it launched;
    `busy_s`: some kernel or copy ran; `span_s`: from the first such call to the end of the last kernel."""

    calls: int
    kernels: int
    call_s: float
    queue_s: float
    kernel_s: float
    busy_s: float
    span_s: float

    @property
    def idle(self) -> float:
        """The share of the time in which the device ran nothing."""
        return 1 - self.busy_s / self.span_s

    @property
    def most_gain(self) -> float:
        """What handing everything over at once can gain at most: then the device is never idle."""
        return self.span_s / self.busy_s - 1


def read_kernel_trace(file: Path) -> KernelTrace:
    """The launches of a trace. Raises UsageError, with what was found, for a file that is none."""
    try:
        packed = file.read_bytes()
        text = gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
        raw = json.loads(text)
    except OSError as error:
        raise _wrong(file, "", (error.strerror or "cannot be read").lower()) from None
    except (ValueError, EOFError) as error:
        raise _wrong(file, "", f"no JSON ({error})") from None
    events = raw.get("traceEvents") if isinstance(raw, dict) else raw
    if not isinstance(events, list):
        raise _wrong(file, "traceEvents", f"{type(events).__name__}")
    return launches_of([event for event in events if isinstance(event, dict) and event.get("ph") == "X"], file)


def launches_of(events: Sequence[Mapping[str, Any]], file: Path) -> KernelTrace:
    """The same of the complete events of the trace in `file`."""
    calls = {_joined(e): e for e in events if str(e.get("cat", "")).lower() in CALLS and _joined(e) is not None}
    ran = [e for e in events if str(e.get("cat", "")).lower() in (KERNEL, *COPIES) and _joined(e) in calls]
    kernels = [e for e in ran if str(e["cat"]).lower() == KERNEL]
    if not kernels:
        found = f"{len(events)} events, none of them a kernel with the call that launched it"
        raise _wrong(file, "traceEvents", found)
    first: dict[object, float] = {}
    for event in kernels:
        begin = _number(file, event, "ts")
        first[_joined(event)] = min(begin, first.get(_joined(event), begin))
    began = {name: _number(file, calls[name], "ts") for name in first}
    spans = [(t := _number(file, e, "ts"), t + _number(file, e, "dur")) for e in ran]
    busy = sum(end - begin for begin, end in union(sorted(spans)))
    return KernelTrace(
        len(first),
        len(kernels),
        MICRO * sum(_number(file, calls[name], "dur") for name in first),
        MICRO * sum(begin - began[name] for name, begin in first.items()),
        MICRO * sum(_number(file, e, "dur") for e in kernels),
        MICRO * busy,
        MICRO * (max(end for _, end in spans) - min(*began.values(), min(begin for begin, _ in spans))),
    )


def _joined(event: Mapping[str, Any]) -> object:
    args = event.get("args")
    return args.get("correlation") if isinstance(args, dict) else None


def _number(file: Path, event: Mapping[str, Any], key: str) -> float:
    value = event.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise _wrong(file, f"traceEvents: {event.get('name')!r}: {key}", repr(value), "microseconds")


def _wrong(file: Path, key: str, found: str, expected: str = "a torch.profiler trace of work on a GPU") -> UsageError:
    problem = Problem(str(file), key, found, expected)
    return UsageError("cannot read the kernels' trace", problems=[problem])
