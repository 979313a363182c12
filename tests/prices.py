"""What the tests of prices share: every collective, the profiles that ship, and a profile that holds almost nothing."""

from __future__ import annotations

from dataclasses import replace

from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.machine import Device, Host, Link, Profile, Sample

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "send_recv")
SHIPPED = {name: load_profile(path) for name, path in shipped().items()}


def bare(*samples: Sample, **changes: object) -> Profile:
    device = Device("gpu", "cuda", 8, 2**36, 3e12, {"bf16": 9e14, "fp32": 6e13})
    links = (Link("inner", 8, 4e11, 1e-6), Link("outer", 0, 5e10, 5e-6))
    profile = Profile(
        "bare", "measured", "", device, Host(8, 2**36, 1e11), links, samples, (), {"kernel_seconds": 2e-6}
    )
    return replace(profile, **changes)  # type: ignore[arg-type]
