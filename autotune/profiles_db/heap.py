"""Keeps a CPU process's freed memory for its next tensors.

The C library gives large blocks back to the system when they are freed, and every new tensor then pays a page fault
for each 4 KiB: on small models more than the operation itself. Workers and probes both call this, so that what is
measured is what runs.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters, malloc.h
MOST = 1 << 30  # bytes; glibc caps the second at half its largest heap


def keep_heap() -> bool:
    """Asks glibc to reuse freed blocks of any size; False where the C library has no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, MOST)) and bool(mallopt(TRIM_THRESHOLD, MOST))
