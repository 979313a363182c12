"""Probe: writing a file to disk until it is there (fsync), and reading one back that the page cache no longer holds."""

from __future__ import annotations

import os
import shutil
import tempfile

from autotune.profiles_db.facts import scratch_folder
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault
from autotune.spec.work import Copy

MIB = 1 << 20
CHUNK = 4 * MIB
ROOM = 4  # times the file's size that must be free before it is written


def works(setting: Setting) -> list[Copy]:
    """A checkpoint shard's worth, and a small file that shows the fixed cost."""
    sizes = (32 * MIB, MIB) if setting.quick else (256 * MIB, MIB, 32 * MIB)
    return [Copy(direction, size, False) for size in sizes for direction in ("disk_write", "disk_read")]


def _write(handle: int, size: int, chunk: bytes) -> None:
    os.lseek(handle, 0, os.SEEK_SET)
    for first in range(0, size, CHUNK):
        view = memoryview(chunk)[: min(CHUNK, size - first)]
        while view:
            view = view[os.write(handle, view) :]
    os.fsync(handle)


def _read(handle: int, size: int, buffer: bytearray) -> None:
    if hasattr(os, "posix_fadvise"):  # drops this file's clean pages; a cache below the kernel stays warm
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(handle, 0, os.SEEK_SET)
    left = size
    while left > 0:
        got = os.readv(handle, [memoryview(buffer)[: min(CHUNK, left)]])
        if got == 0:
            raise EnvironmentFault(f"disk: a file of {size} bytes ended {left} bytes early")
        left -= got


def prepare(work: Copy, crew: Crew) -> Trial:
    """A nameless temporary file of `size` random bytes in the user's cache folder; it is gone when the probe ends."""
    folder = scratch_folder()
    free = shutil.disk_usage(folder).free
    if free < ROOM * work.size * crew.world:
        raise EnvironmentFault(f"disk: {folder} has {free} bytes free; the probe wants {ROOM * work.size * crew.world}")
    chunk = os.urandom(CHUNK)
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the trial closes it
    if work.direction == "disk_write":
        return Trial(lambda i: _write(file.fileno(), work.size, chunk), clock="host", once=True, close=file.close)
    _write(file.fileno(), work.size, chunk)
    buffer = bytearray(CHUNK)
    return Trial(lambda i: _read(file.fileno(), work.size, buffer), clock="host", once=True, close=file.close)
