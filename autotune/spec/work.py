"""Work: the primitive pieces that bodies are made of, that probes measure and that a profile prices.

One vocabulary for all three, so that what a cost model asks is what a probe can answer. Sizes are in elements, `bytes`
in bytes; dtypes are the short names of `BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

FEW_ROWS = 16  # tokens that kernels of ours multiply with a weight as it lies (kernels.matvec.MOST_ROWS)
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Matmul:
    """(m, k) @ (k, n), `batch` times. `form` says which of a linear layer's three it is: their layouts differ.

    fwd: x (m, k) @ W(n, k)^T; dgrad: dy (m, k) @ W (k, n); wgrad: dy(k, m)^T @ x (k, n); int8: as fwd, of a W whose
    elements are a byte.
    """

    m: int
    k: int
    n: int
    dtype: str = "bf16"
    form: str = "fwd"
    batch: int = 1

    kind: ClassVar[str] = "matmul"

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n

    @property
    def bytes(self) -> float:
        width = BYTES[self.dtype]
        weight = self.k * self.n * (1 if self.form == "int8" else width)
        return float(self.batch * ((self.m * self.k + self.m * self.n) * width + weight))


PAGES = "pages"  # what a `Memory` is called that puts pages of a cache side by side
# The backend of attention whose queries do not see all that come before them; in training with whose it is, by a dot.
MASKED = "masked"


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of `queries` last positions over `keys` positions, one pass ("fwd" or "bwd")."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"
    backend: str = "sdpa"
    form: str = "fwd"

    kind: ClassVar[str] = "attention"

    @property
    def flops(self) -> float:
        """Of the causal half only: 2 products forward, 5 backward (FlashAttention-2, 2307.08691, section 3.1). Under a
        mask of all pairs: what nobody sees is computed and then left out."""
        pairs = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) / 2
        pairs = self.queries * self.keys if self.backend.startswith(MASKED) else pairs
        return 2.0 * (2 if self.form == "fwd" else 5) * self.batch * self.heads * self.head_dim * pairs

    @property
    def bytes(self) -> float:
        q = self.batch * self.queries * self.heads * self.head_dim
        kv = 2 * self.batch * self.keys * self.kv_heads * self.head_dim
        return float((2 * q + kv) * BYTES[self.dtype] * (1 if self.form == "fwd" else 2))


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory-bound operation that reads and writes `bytes` in all. `op` names it: see probes/memory.py."""

    op: str
    bytes: int
    dtype: str = "bf16"

    kind: ClassVar[str] = "memory"
    flops: ClassVar[float] = 0.0


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One AdamW update of `parameters` elements; "mixed" also writes the bf16 copy of the fp32 masters.

    `place`: by the device, or by the host's processor in the host's memory.
    """

    parameters: int
    dtype: str = "mixed"
    place: str = "device"

    kind: ClassVar[str] = "optimizer"
    flops: ClassVar[float] = 0.0

    @property
    def bytes(self) -> float:
        """Reads gradient, weight and two moments, writes the last three; "mixed": fp32, plus the bf16 weight."""
        width = {"mixed": 4, "fp32": 4, "fp64": 8}[self.dtype]
        return float(self.parameters * (7 * width + (2 if self.dtype == "mixed" else 0)))


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective (or `send_recv`) over a group. `size` is bytes of the whole, unsharded tensor.

    all_reduce, reduce: every rank's tensor; all_gather: the result; reduce_scatter: every rank's input; all_to_all: one
    rank's whole input; broadcast, send_recv: the message. `level` is the link level that the group's slowest hop
    crosses: an index into the profile's links, innermost 0. `inner`: how many of the group's ranks share each unit of
    the level below (a node, say), whose links to the outside they all have at hand. `captured`: replayed from a CUDA
    graph, where no stream waits for another's events.
    """

    op: str
    size: int
    group: int
    level: int = 0
    inner: int = 1
    captured: bool = False

    kind: ClassVar[str] = "collective"
    flops: ClassVar[float] = 0.0

    @property
    def bytes(self) -> float:
        """Bytes that one rank puts on the link (the ring algorithms' count, as nccl-tests' bus bandwidth). Where
        `inner` ranks share a node: on both levels together, which is just as many."""
        n = self.group
        share = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0, "reduce": 1.0, "send_recv": 1.0}.get(
            self.op, (n - 1) / n
        )
        return self.size * share if n > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy between tiers: direction is h2d, d2h, d2d, h2h, disk_read or disk_write."""

    direction: str
    size: int
    pinned: bool = True

    kind: ClassVar[str] = "copy"
    flops: ClassVar[float] = 0.0

    @property
    def bytes(self) -> float:
        return float(self.size)


@dataclass(frozen=True, slots=True)
class Launch:
    """`count` operations handed to the device: what that takes the host, whatever they have to do.

    `what`: kernels with nothing to do (""), a collective by its name, or instructions of our bodies ("train").
    """

    count: int = 1
    what: str = ""

    kind: ClassVar[str] = "launch"
    flops: ClassVar[float] = 0.0
    bytes: ClassVar[float] = 0.0


Work = Matmul | Attention | Memory | Optimizer | Collective | Copy | Launch

KINDS: dict[str, type] = {cls.kind: cls for cls in (Matmul, Attention, Memory, Optimizer, Collective, Copy, Launch)}
