"""A machine profile: facts about the devices and links, and measured samples of work, with a grade for each.

`datasheet` profiles carry cited peaks and efficiency curves; `measured` ones carry samples; `calibrated` ones were
refined by whole runs. The file form is JSON with the schema name "autotune.machine/1"; see profiles_db/machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autotune.spec.work import Work

SCHEMA = "autotune.machine/1"
GRADES = ("datasheet", "measured", "calibrated")


@dataclass(frozen=True)
class Device:
    """One accelerator, or for kind "cpu" the processor that workers share."""

    name: str
    kind: str  # cuda | rocm | cpu
    count: int  # devices of this kind in one node; for a cpu: the most workers that were measured
    memory_bytes: int  # of one device; for a cpu: of the node
    memory_bandwidth: float  # bytes/s, read plus write, best achievable (measured) or peak (datasheet)
    peak_flops: Mapping[str, float]  # by dtype, dense; best measured or datasheet
    cores: int = 0  # multiprocessors, or cpu cores
    context_bytes: int = 0  # what the runtime takes before the first tensor
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Host:
    cores: int
    memory_bytes: int
    memory_bandwidth: float = 0.0  # bytes/s of a copy, read plus write
    peak_flops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """A level of the interconnect, innermost first: `size` devices reach one another without leaving it."""

    name: str  # e.g. nvlink4, infiniband-400g, shared-memory
    size: int  # devices joined at this level (0: no limit)
    bandwidth: float  # bytes/s that one device can send, one direction
    latency: float  # seconds of one hop, small message


@dataclass(frozen=True)
class Sample:
    """What a probe measured: median seconds of one piece of work while `ranks` workers did the same at once."""

    work: Work
    seconds: float
    ranks: int = 1
    runs: int = 1
    spread: float = 0.0  # interquartile range over median


# A coefficient for each number of accelerators of a node, e.g. "copies_at_once.2": how many copies between them and the
# host run at full speed at once, where the full speed is that of all of them copying one way.
COPIES_AT_ONCE = "copies_at_once"


@dataclass(frozen=True)
class Interference:
    """How much slower compute and a collective get while they overlap (1.0: not at all)."""

    compute: float = 1.0
    communication: float = 1.0
    ranks: int = 1


@dataclass(frozen=True)
class Profile:
    name: str
    grade: str
    fingerprint: str
    device: Device
    host: Host
    links: tuple[Link, ...]
    samples: tuple[Sample, ...] = ()
    interference: tuple[Interference, ...] = ()
    # Coefficients that are neither a sample nor a fact, by name, e.g. "matmul_efficiency", "memory_efficiency",
    # "link_efficiency", "launch_seconds": each has a grade and a source in `sources`.
    coefficients: Mapping[str, float] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)  # dotted field name to where its figure comes from
    created: str = ""

    @property
    def inline(self) -> bool:
        """Whether the host that issues instructions also computes them (a CPU): issue then waits for compute."""
        return self.device.kind == "cpu"

    def sharing(self, world: int) -> int:
        """How many of `world` workers share the memory that `device.memory_bytes` counts.

        An accelerator's is one worker's. A processor's is its node's: all workers', however many were measured, unless
        the node is one of several that an outer link joins; each then holds `device.count` of them.
        """
        if self.device.kind != "cpu":
            return 1
        node = self.device.count if len(self.links) > 1 else world
        return max(1, min(world, node or world))

    def refines(self, base: Profile) -> bool:
        """Whether this is `base` with nothing but further works measured."""
        mine, theirs = ({(s.work, s.ranks) for s in profile.samples} for profile in (self, base))
        same = replace(self, samples=base.samples, sources=base.sources) == base
        return same and mine >= theirs and self.sources.items() >= base.sources.items()
