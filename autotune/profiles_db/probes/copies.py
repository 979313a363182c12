"""Probe: copies by direction and size: host to device and back, pinned and pageable, and within each memory."""

from __future__ import annotations

import torch

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault
from autotune.spec.work import Copy

KIB, MIB = 1 << 10, 1 << 20
NEEDS_DEVICE = ("h2d", "d2h", "d2d")


def works(setting: Setting) -> list[Copy]:
    """Large sizes first (the rate), then small ones (the fixed cost), then between."""
    if setting.device == "cpu":
        sizes = [64 * MIB, 4 * KIB, MIB] if setting.quick else [256 * MIB, 4 * KIB, MIB, 64 * KIB, 16 * MIB, 64 * MIB]
        return [Copy("h2h", size, False) for size in sizes]
    if setting.world > 1:  # what they share of the host counts where copies are large
        return [Copy(direction, size, True) for size in (256 * MIB, 16 * MIB) for direction in ("d2h", "h2d")]
    sizes = [256 * MIB, 64 * KIB, 4 * MIB]
    if not setting.quick:
        sizes = [1024 * MIB, 4 * KIB, MIB, 64 * MIB, 64 * KIB, 16 * MIB, 256 * MIB]
    kinds = [("h2d", True), ("d2h", True), ("d2d", True), ("h2d", False), ("d2h", False)]
    return [Copy(direction, size, pinned) for size in sizes for direction, pinned in kinds]


def _host(size: int, pinned: bool) -> torch.Tensor:
    pattern = torch.randint(0, 255, (min(size, MIB),), dtype=torch.uint8)
    data = pattern.repeat(-(-size // pattern.numel()))[:size].contiguous()
    return data.pin_memory() if pinned else data


def prepare(work: Copy, crew: Crew) -> Trial:
    """Bytes from one buffer to another of equal size. Pageable copies hold the host until they are done."""
    if work.direction in NEEDS_DEVICE and crew.device == "cpu":
        raise EnvironmentFault(f"copy {work.direction} needs an accelerator; this is a processor")
    size = max(1, work.size)
    if work.direction in ("h2h", "d2d"):
        place = torch.device("cpu") if work.direction == "h2h" else crew.place
        copies = max(1, min(256, -(-crew.pool.cache // size)))
        sources = [_host(size, False).to(place) for _ in range(copies)]
        targets = [torch.empty_like(source) for source in sources]
        clock = "host" if work.direction == "h2h" else "device"
        return Trial(lambda i: targets[i % copies].copy_(sources[i % copies]), clock=clock)
    host, device = _host(size, work.pinned), torch.empty(size, dtype=torch.uint8, device=crew.place).random_(0, 255)
    target, source = (device, host) if work.direction == "h2d" else (host, device)
    clock = "device" if work.pinned else "host"
    return Trial(lambda i: target.copy_(source, non_blocking=work.pinned), clock=clock)
