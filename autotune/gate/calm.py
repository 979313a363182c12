"""Whether the machine is fit to be measured on: nobody else at work on it, and nothing slowing it down.

A fixed piece of work is done on every core at once, before the first launch and after each. A core that gave it less
than its share of wall time is somebody else's for that time. Processor seconds above the least that the same work took
while this gate ran are a slower clock, or a neighbour on the same core. Accelerators are asked through `nvidia-smi`.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.profiles_db.cores import all_cores
from autotune.profiles_db.facts import has_driver

BYTES, REPEATS = 32 << 20, 3  # hashed on each core: about a twentieth of a second
LEAST_SHARE, LEAST_WORST = 0.9, 0.6  # of wall time that cores must give the work, on average and each
AGAIN_S = 1.0  # after which a look is taken again: what a launch leaves behind may take its time to end
MOST_SLOWER = 1.25  # processor seconds, by the least seen
# Bits of NVML's clock event reasons that mean a device cannot run as fast as it would: hardware slowdown, software and
# hardware thermal slowdown, power brake. (A software power cap, 0x4, is how a device under full load always runs.)
HINDERED = 0x08 | 0x20 | 0x40 | 0x80
IN_USE = 0.05  # of a device's memory that may be taken while nothing of ours runs
QUERY = ("nvidia-smi", "--format=csv,noheader,nounits")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the new and the old name

_BUFFER: list[bytes] = []


@dataclass(frozen=True)
class Reading:
    """One look. `share`: what cores gave of their wall time, on average, and `worst` the least of one; `seconds`: the
    most processor time that the work took on one; `devices`: what is wrong with accelerators, in words."""

    share: float
    seconds: float
    devices: str = ""
    worst: float = 1.0


def quota() -> float:
    """Cores that this process's control group may use; infinity where it has no limit."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(allowed) / float(period)
    except (OSError, ValueError):
        return float("inf")


def read() -> Reading:
    """Does the work on every core and asks the accelerators."""
    if not _BUFFER:
        _BUFFER.append(bytes(BYTES))
    many = max(1, int(min(len(all_cores()), quota())))
    found: list[tuple[float, float]] = []
    together = threading.Barrier(many)

    def work() -> None:
        hashlib.sha256(_BUFFER[0]).digest()  # a core that idled comes to its clock
        together.wait()
        wall, own = time.perf_counter(), time.thread_time()
        for _ in range(REPEATS):
            hashlib.sha256(_BUFFER[0]).digest()  # of so many bytes without the interpreter's lock
        found.append((time.perf_counter() - wall, time.thread_time() - own))

    threads = [threading.Thread(target=work) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shares = [own / wall for wall, own in found]
    return Reading(sum(shares) / many, max(own for _, own in found), devices(), min(shares))


def devices() -> str:
    """What hinders this machine's accelerators; "" where nothing does or there are none."""
    if not has_driver():
        return ""
    for name in REASONS:
        try:
            command = [*QUERY, f"--query-gpu=index,memory.used,memory.total,{name}"]
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return hindered(said)
    return ""


def hindered(said: str) -> str:
    """What nvidia-smi's lines of index, MiB used, MiB in all and clock event reasons say is wrong."""
    found = []
    for line in said.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4:
            continue
        index, used, total, reasons = parts
        if used.isdigit() and total.isdigit() and int(used) > IN_USE * int(total):
            found.append(f"device {index} is in use: {int(used) / 1024:.1f} GiB of it are taken")
        if reasons.startswith("0x") and int(reasons, 16) & HINDERED:
            found.append(f"device {index} is throttled (clock event reasons {reasons})")
    return "; ".join(found)


def disturbance(reading: Reading, least: float) -> str:
    """What was wrong at a reading, where the work once took `least` processor seconds; "": nothing."""
    if reading.devices:
        return reading.devices
    if reading.share < LEAST_SHARE:
        return f"the machine is under load: its cores gave {reading.share:.0%} of their time"
    if reading.worst < LEAST_WORST:
        return f"the machine is under load: a core gave {reading.worst:.0%} of its time"
    if reading.seconds > MOST_SLOWER * least:
        return f"the machine is throttled: the same work took {reading.seconds / least:.2f} times its least seconds"
    return ""


@dataclass
class Watch:
    """The readings of one gate, in order: launch n was between reading n and n + 1."""

    look: Callable[[], Reading] = lambda: read()
    readings: tuple[Reading, ...] = ()

    def take(self) -> None:
        """The reading after a launch."""
        before = self.readings
        self.readings = (*before, self.look())
        if self.why(-1):
            time.sleep(AGAIN_S)
            self.readings = (*before, self.look())

    def settled(self, tries: int = 3, wait_s: float = 2.0) -> str:
        """Takes the first reading, again where somebody is just about to end; what is wrong with the last one."""
        for left in range(tries - 1, -1, -1):
            self.readings = (self.look(),)
            wrong = self.why(0)
            if not wrong or not left:
                return wrong
            time.sleep(wait_s)
        return ""

    def why(self, number: int) -> str:
        """What was wrong at a reading, by all that are known now."""
        return disturbance(self.readings[number], min(reading.seconds for reading in self.readings))

    def around(self, number: int) -> str:
        """What was wrong just before or just after a launch; "": nothing."""
        return self.why(number) or self.why(number + 1)


def reasons(watch: Watch, launches: Sequence[int]) -> list[str]:
    """What was wrong around these launches, each reason once."""
    return list(dict.fromkeys(filter(None, map(watch.around, launches))))
