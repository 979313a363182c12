"""Probe: operations that memory bandwidth bounds, by the bytes they move.

Every pass that a real operation makes beyond the ideal shows as a lower rate, which is what a price wants. Small
operands stay in the cache, where the operation before would have left them; large ones do not fit there anyhow.
"""

from __future__ import annotations

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.memory_ops import HEAD, OPS, Shape
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault, nearest_name
from autotune.spec.work import BYTES, MASKED, Attention, Matmul, Memory, Work

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def works(setting: Setting) -> list[Memory]:
    """Every operation at a size beyond the cache, then at small and middle ones."""
    if setting.device == "cuda":
        dtype = "bf16"
        sizes = [512 * MIB, MIB, 32 * MIB] if setting.quick else [GIB, 256 * KIB, 32 * MIB, 2 * MIB, 256 * MIB]
    else:
        dtype = "fp32"
        sizes = [16 * MIB, 128 * KIB, 2 * MIB] if setting.quick else [64 * MIB, 32 * KIB, 2 * MIB, 256 * KIB, 16 * MIB]
    peak = [] if setting.device == "cuda" else [Memory("copy", 128 * MIB, dtype), Memory("read", 64 * MIB, dtype)]
    return list(dict.fromkeys([*peak, *(Memory(op, size, dtype) for size in sizes for op in OPS)]))


def probed(work: Work) -> bool:
    """Whether a probe can time this work by itself. A memory-bound operation without one is timed inside bodies alone,
    and priced as a copy elsewhere; so is attention under a mask, whose probes know of none."""
    if isinstance(work, Attention):
        return not work.backend.startswith(MASKED)
    if isinstance(work, Matmul):
        return work.form != "int8"  # no library multiplies so
    return not isinstance(work, Memory) or work.op in OPS


def shape_of(work: Memory) -> tuple[int, int]:
    """Rows and width for which `op` moves about `bytes`: whole rows while there are any, else one narrower row."""
    if work.op not in OPS:
        near = nearest_name(work.op, OPS)
        raise EnvironmentFault(f"no memory probe named {work.op!r} (nearest: {near}; known: {', '.join(OPS)})")
    op = OPS[work.op]
    elements = max(HEAD, work.bytes // op.moved(BYTES[work.dtype]))
    width = min(op.width, elements // HEAD * HEAD)
    return max(1, round(elements / width)), width


def prepare(work: Memory, crew: Crew) -> Trial:
    """The operation at the rows and width that `shape_of` gives; bytes beyond whole rows are made up in proportion."""
    rows, width = shape_of(work)
    run = OPS[work.op].make(Shape(rows, width, DTYPES[work.dtype], crew))
    exact = rows * width * OPS[work.op].moved(BYTES[work.dtype])
    return Trial(run, each=exact / work.bytes if rows > 1 else 1.0)
