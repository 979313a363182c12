"""What the machine is, before anything is timed: devices, processor, memory, versions, and its fingerprint.

Nothing here imports torch until a device driver is present, so that a processor-only machine is named in milliseconds.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from autotune.profiles_db.cores import all_cores
from autotune.spec.machine import Host

# Any of these exists where a CUDA or ROCm driver is loaded (the last is Windows' Linux subsystem).
DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")
# An unset cgroup-v1 limit reads as the largest page-aligned 64-bit number.
NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Facts:
    """One machine. Sizes in bytes; `cores` are multiprocessors of one accelerator, or usable processor cores."""

    kind: str  # cuda | rocm | cpu
    name: str
    count: int  # accelerators in this node; 1 for a processor
    memory_bytes: int  # of one accelerator, or what this process may use of the node's
    cores: int
    host: Host
    software: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's model name as the kernel gives it, else the architecture."""
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores that this process may run on (its affinity mask), not those of the whole board."""
    return len(all_cores())


def cgroup_limit() -> int | None:
    """The memory limit of this process's control group in bytes, or None without one (v2 first, then v1)."""
    inside = re.search(r"^0::(/.*)$", _read("/proc/self/cgroup"), re.MULTILINE)
    folders = [f"/sys/fs/cgroup{inside.group(1).rstrip('/')}"] if inside else []
    paths = [f"{folder}/memory.max" for folder in (*folders, "/sys/fs/cgroup")]
    limits = [
        int(text)
        for path in (*paths, "/sys/fs/cgroup/memory/memory.limit_in_bytes")
        if (text := _read(path).strip()).isdigit()
    ]
    limits = [limit for limit in limits if limit < NO_LIMIT]
    return min(limits) if limits else None


def host_memory() -> int:
    """Bytes of memory that this process may use: the node's, or its control group's limit where that is less."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    total = int(found.group(1)) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, cgroup_limit() or total)


def cache_bytes() -> int:
    """Bytes of the processor's largest cache as one core sees it; 32 MiB where the kernel does not tell."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(found.group(1)) * units[found.group(2)]
        for index in range(8)
        if (found := re.match(r"(\d+)([KMG]?)", _read(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")))
    ]
    return max(sizes, default=32 << 20)


def driver_version() -> str:
    """The accelerator driver's version, or "" without one."""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _read("/proc/driver/nvidia/version"))
    if found:
        return found.group(1)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.split()[0] if answer.split() else ""


def software() -> dict[str, str]:
    """Versions that a measurement depends on and that a fingerprint deliberately leaves out."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for package in ("torch", "triton", "autotune"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(name: str, count: int, cores: int, memory_bytes: int) -> str:
    """A short name for machines that run alike: device name, how many, cores, and memory to the nearest power of two.

    Versions are left out (a driver update is the same machine; they are stored beside), and memory is a class because
    kernels and virtual machines keep back a varying part of it.
    """
    memory_class = round(math.log2(max(memory_bytes, 1 << 20) / 2**30))
    text = f"{' '.join(name.split())}|{count}|{cores}|{memory_class}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def has_driver() -> bool:
    """Whether a driver for an accelerator is loaded: only then is torch asked what there is."""
    return any(os.path.exists(path) for path in DRIVER_FILES)


def _accelerator(host: Host, versions: dict[str, str]) -> Facts | None:
    if not has_driver():
        return None
    import torch

    cudnn: Any = torch.backends.cudnn  # untyped in torch, as its nccl module is
    nccl: Any = torch.cuda.nccl
    if not torch.cuda.is_available():
        return None
    first = torch.cuda.get_device_properties(0)
    kind = "rocm" if torch.version.hip else "cuda"
    count = torch.cuda.device_count()
    versions["driver"] = driver_version()
    versions["hip" if kind == "rocm" else "cuda"] = str(torch.version.hip or torch.version.cuda)
    versions["cudnn"] = str(cudnn.version())
    if torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(str(part) for part in nccl.version())
    cores, memory = first.multi_processor_count, first.total_memory
    return Facts(kind, first.name, count, memory, cores, host, versions, fingerprint(first.name, count, cores, memory))


def machine_facts(accelerator: bool = True) -> Facts:
    """The machine this runs on; `accelerator=False` describes its processor even where it has accelerators."""
    host = Host(cores=cpu_cores(), memory_bytes=host_memory())
    versions = software()
    found = _accelerator(host, versions) if accelerator else None
    if found:
        return found
    name, cores, memory = cpu_name(), host.cores, host.memory_bytes
    return Facts("cpu", name, 1, memory, cores, host, versions, fingerprint(name, 1, cores, memory))


def private_bytes() -> int:
    """Memory of this process in bytes, shared pages counted by their share (Pss); 0 where the kernel does not tell."""
    found = re.search(r"^Pss:\s+(\d+) kB", _read("/proc/self/smaps_rollup"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def scratch_folder() -> Path:
    """A folder on disk that this user may write: the cache folder where there is one, else the system's temporary."""
    import tempfile

    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "autotune"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.gettempdir())
