"""The interpreter: runs one rank's list of a program. It knows buffers and lanes; values come from a table.

It issues instructions in list order. An operation is a function of the instruction and the store; it gives the values
of the instruction's writes, and, if it only started the work, a handle to wait for. Whoever next reads or overwrites
what it writes, or overwrites what it reads, waits first.
On CUDA every lane is a stream and the handle an event; on a CPU a handle is a `torch.distributed` work object and
compute runs at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from autotune.runners.clock import Clock
from autotune.runners.flying import Flying, Handle
from autotune.spec.errors import RunError
from autotune.spec.program import COMPUTE, DEVICE, HOST, Instruction, Program

RUN_AHEAD = 3
Writing = dict[str, tuple[Handle, int]]  # buffers that are being written, each by the instruction at a position
Reading = dict[str, list[tuple[Handle, int]]]  # buffers that are being read, each by several


@dataclass(frozen=True)
class Started:
    """Values that are being made: `handle.wait()` returns when they may be used."""

    values: tuple[Any, ...]
    handle: Handle


@dataclass(frozen=True)
class Deferred:
    """Values that `work()` fills, on the lane of the host: when what the instruction reads and overwrites is there."""

    values: tuple[Any, ...]
    work: Callable[[], None]


@dataclass(frozen=True)
class Again:
    """Values, and the word that the step must begin again: what it was begun with has changed. Every rank says so, in
    the same operation, before it has changed anything that outlives the step."""

    values: tuple[Any, ...]


Operation = Callable[[Instruction, Mapping[str, Any]], "tuple[Any, ...] | Started | Deferred | Again"]


@dataclass
class Trace:
    """One step as it ran: (position, start, end) in seconds, and the counted bytes at each position."""

    spans: list[tuple[int, float, float]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)


@dataclass
class Interpreter:
    """Runs `program.ranks[rank]` step after step over one store. `values` holds what persists."""

    program: Program
    rank: int
    operations: Mapping[str, Operation]
    values: dict[str, Any]
    device: torch.device
    hooks: Mapping[str, Callable[[Instruction, Mapping[str, Any]], None]] = field(default_factory=dict)
    host_lanes: frozenset[str] = frozenset()  # lanes that the host serves even on CUDA: messages through its memory
    streams: dict[str, Any] = field(default_factory=dict)
    history: dict[str, deque[Any]] = field(default_factory=dict)
    flying: Flying = field(default_factory=Flying)
    helper: ThreadPoolExecutor | None = None  # the lane of the host, on CUDA

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.streams = {
                lane: torch.cuda.Stream(self.device)
                for lane in self.program.lanes(self.rank)
                if lane not in (COMPUTE, HOST) and lane not in self.host_lanes
            }
        lags: dict[str, int] = {}
        for instruction in self.program.ranks[self.rank]:
            for name in instruction.reads if instruction.lag else ():
                lags[name] = max(lags.get(name, 0), instruction.lag)
        self.history = {name: deque(maxlen=lag + 1) for name, lag in lags.items()}

    def step(self, trace: Trace | None = None, only: Collection[str] | None = None, wait: bool = True) -> None:
        """Runs the list once and waits for everything it started. `only`: of its operations, just these.

        Without `wait` a CUDA device may still be at work when it returns: the host can issue the next step meanwhile.
        """
        while not self._ran(trace, only, wait):
            if trace is not None:
                trace.spans, trace.memory, trace.order = [], [], []

    def _ran(self, trace: Trace | None, only: Collection[str] | None, wait: bool) -> bool:
        """Runs the list; False where it must begin again."""
        listing = self.program.ranks[self.rank]
        clock = Clock(self.device) if trace is not None else None
        zero = clock.mark() if clock else None
        pending: Writing = {}  # buffers that are being written
        reading: Reading = {}  # buffers that are being read, by whom
        waited: dict[int, float] = {}
        issued: list[Any] = []
        landed: dict[int, float] = {}
        ahead: deque[Any] = deque()

        def settle(handle: Handle, position: int) -> None:
            handle.wait()
            for name in listing[position].reads:  # a handle may hold its operands: nobody else is to hold it on
                if name in reading:
                    reading[name] = [reader for reader in reading[name] if reader[1] != position]
            if clock is not None and self.device.type != "cuda":
                waited[position] = clock.mark()

        held = Held(self._held()) if trace is not None else None
        for position, instruction in enumerate(listing):
            if only is not None and instruction.op not in only:
                continue
            deferred = bool(self.streams) and instruction.lane == HOST  # the host's own thread waits for what it needs
            # An older version arrived before its step ended; only the newest can be on its way.
            for name in (*(() if instruction.lag else instruction.reads), *instruction.writes):
                if name in pending and not deferred:
                    settle(*pending.pop(name))
            for name in instruction.writes if not deferred else ():
                for reader in reading.pop(name, ()):
                    settle(*reader)
            self.flying.drop(landed)
            if self.streams and instruction.lane == COMPUTE:
                self._hold_back(ahead)
            if instruction.op in self.hooks:
                self.hooks[instruction.op](instruction, self.values)
            before = (held.bytes, set(map(id, self.values.values()))) if held else None
            begin = clock.mark(self.streams.get(instruction.lane)) if clock else None
            made = self._issue(instruction, position, pending, reading)
            again = isinstance(made, Again)
            made = made.values if isinstance(made, Again) else made
            if clock is not None and trace is not None:
                issued.append((position, begin, clock.mark(self.streams.get(instruction.lane))))
                trace.order.append(instruction.label)
            for name, value in zip(instruction.writes, made, strict=True):
                if name in self.history:
                    self._keep(name, value, instruction)
                self.values[name] = value
            if trace is not None and held and before:
                here = [pair for pair in zip(instruction.writes, made, strict=True) if self._here(pair[0])]
                trace.memory.append(before[0] + counted({n: v for n, v in here if id(v) not in before[1]}))
                for written, value in (*here, *self._older(instruction.writes)):
                    held.note(written, value)
                del here
            made, value = (), None  # what is freed below must have no other holder
            for name in instruction.frees:
                # A message may still be on its way: do not stop here. On CUDA both streams are known to the allocator.
                value = self.values.pop(name)
                if held:
                    held.drop(name)
                used = [pending.pop(name)] if name in pending else []
                for handle, number in used + reading.pop(name, []):
                    if not isinstance(handle, _Recorded):
                        self.flying.keep(handle, number, value)
                value = None
            if again and only is None:
                self._begin_again(position, pending, reading)
                return False
        for by in [*pending.values(), *(one for several in reading.values() for one in several)]:
            settle(*by)
        pending.clear()
        reading.clear()
        self.flying.drop(landed, all_of_them=True)
        if self.device.type == "cuda" and (wait or clock is not None):
            torch.cuda.synchronize(self.device)
        if clock is not None and trace is not None:
            if self.device.type != "cuda":  # there the clock is made of events, and a message's end is not seen
                waited |= landed
            for position, begin, end in issued:
                ended = waited.get(position, end)
                trace.spans.append((position, clock.between(zero, begin), clock.between(zero, ended)))
        return True

    def _begin_again(self, position: int, pending: Writing, reading: Reading) -> None:
        """Ends what was started, takes in the messages that peers sent before they stopped too, drops what was made."""
        if self.history:
            raise RunError("a step that reads older versions cannot begin again")
        listing = self.program.ranks[self.rank]
        sent = set()
        for rank, other in enumerate(self.program.ranks):
            stop = next((at for at, i in enumerate(other) if i.op == listing[position].op), 0)
            sent |= {i.meet for i in other[:stop] if i.meet and rank != self.rank and self.rank in i.peers}
        received: Writing = {}
        kept = [self._issue(i, at, received, {}) for at, i in enumerate(listing[position:], position) if i.meet in sent]
        # All receives are posted before anything is waited for: two ranks may have messages for each other.
        for handle, _ in (*pending.values(), *(by for several in reading.values() for by in several)):
            handle.wait()
        for handle, _ in received.values():
            handle.wait()
        self.flying.drop({}, all_of_them=True)
        kept.clear()
        lasting = self.program.given(self.rank)
        for name in [n for n in self.values if n in self.program.buffers[self.rank] and n not in lasting]:
            del self.values[name]

    def _hold_back(self, ahead: deque[Any]) -> None:
        """Keeps the host at most RUN_AHEAD compute instructions ahead of the device.

        Memory that another lane still uses is not free until that lane has run; a host far ahead would allocate
        anew for every message meanwhile.
        """
        if len(ahead) >= RUN_AHEAD:
            ahead.popleft().synchronize()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        ahead.append(event)

    def _issue(
        self, instruction: Instruction, position: int, pending: Writing, reading: Reading
    ) -> tuple[Any, ...] | Again:
        view: Mapping[str, Any] = self.values
        if instruction.lag:
            view = {**self.values, **{n: self._version(n, instruction.lag) for n in instruction.reads}}
        operation = self.operations[instruction.op]
        stream = self.streams.get(instruction.lane)
        handle: Handle | None
        if stream is None:
            made = operation(instruction, view)
            handle = made.handle if isinstance(made, Started) else None
            if isinstance(made, Deferred):
                needs = [pending[n][0] for n in (*instruction.reads, *instruction.writes) if n in pending]
                needs += [reader for name in instruction.writes for reader, _ in reading.get(name, ())]
                handle = self._defer(made, needs)
        else:  # a CUDA lane beside compute: what reads something starts after what compute has been given so far
            compute = torch.cuda.current_stream(self.device)
            if instruction.reads:
                stream.wait_stream(compute)
            with torch.cuda.stream(stream):
                made = operation(instruction, view)
                if isinstance(made, Started):  # NCCL works on a stream of its own: this lane follows it
                    made.handle.wait()
            event = torch.cuda.Event()
            event.record(stream)
            handle = _Recorded(event, self.device)
            # Each side may free what the other still uses: the allocator must hear of both streams.
            for user, values in ((stream, [view[n] for n in instruction.reads]), (compute, made)):
                for tensor in tensors(values.values if isinstance(values, Started) else values):
                    if tensor.is_cuda:
                        tensor.record_stream(user)
        if handle is not None:
            for name in instruction.writes:
                pending[name] = (handle, position)
            for name in instruction.reads:
                if name not in instruction.writes:
                    reading.setdefault(name, []).append((handle, position))
        return made.values if isinstance(made, Started | Deferred) else made

    def _defer(self, made: Deferred, needs: list[Handle]) -> Handle | None:
        """On CUDA a thread works while the device does; a CPU has no other processor to leave it to."""
        if not self.streams:
            made.work()
            return None
        if self.helper is None:
            self.helper = ThreadPoolExecutor(1, "host")

        def work() -> None:
            for need in needs:
                need.synchronize() if isinstance(need, _Recorded) else need.wait()
            made.work()

        return _Later(self.helper.submit(work))

    def _held(self) -> dict[str, Any]:
        """The store and the older versions beside it."""
        here = {name: value for name, value in self.values.items() if self._here(name)}
        return {**here, **dict(self._older(self.history))}

    def _older(self, names: Iterable[str]) -> list[tuple[str, list[Any]]]:
        """The older versions of those names that are read late."""
        return [(f"{name} before", list(self.history[name])) for name in names if name in self.history]

    def _here(self, name: str) -> bool:
        """Whether a buffer is in the device's memory."""
        return self.program.buffers[self.rank][name].tier == DEVICE if name in self.program.buffers[self.rank] else True

    def _keep(self, name: str, value: Any, instruction: Instruction) -> None:
        """A version more of a buffer that is read late; the value at the start is the first."""
        kept = self.history[name]
        if not kept and name in self.values:
            kept.append(self.values[name])
        if kept and value is kept[-1]:
            raise RunError(f"{instruction.label} changes {name} in place, but its older versions are read later")
        kept.append(value)

    def _version(self, name: str, lag: int) -> Any:
        """The version of `lag` steps ago; before there is one, the oldest there is (None: nothing ever was)."""
        kept = self.history.get(name)
        if not kept:
            return self.values.get(name)
        return kept[max(0, len(kept) - 1 - lag)]


@dataclass(frozen=True)
class _Recorded:
    """An event on a lane's stream: compute issued from now on comes after it; the host does not stop."""

    event: Any
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def synchronize(self) -> None:
        """The calling thread stops until the event has passed."""
        self.event.synchronize()


@dataclass(frozen=True)
class _Later:
    """What the thread of the host does: who waits for it stops."""

    future: Future[None]

    def wait(self) -> None:
        self.future.result()


def counted(values: Mapping[str, Any]) -> int:
    """Bytes of all distinct tensors that the store's values hold, each at the size of its view or storage."""
    return Held(values).bytes


class Held:
    """What a store holds, by name: where its tensors lie and their bytes. No tensor is kept alive by it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.places: dict[str, list[tuple[int, int]]] = {}
        for name, value in values.items():
            self.note(name, value)

    def note(self, name: str, value: Any) -> None:
        """A value that is new, or was changed."""
        self.places[name] = [(tensor.untyped_storage().data_ptr(), tensor.nbytes) for tensor in tensors(value)]

    def drop(self, name: str) -> None:
        self.places.pop(name, None)

    @property
    def bytes(self) -> int:
        """Bytes of all distinct tensors, each at the size of its largest view."""
        seen: dict[int, int] = {}
        for places in self.places.values():
            for pointer, size in places:
                if size > seen.get(pointer, 0):
                    seen[pointer] = size
        return sum(seen.values())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a value of the store: in lists, tuples and mappings, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
