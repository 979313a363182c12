"""What a piece of work costs on a machine: `Pricer(profile, ranks).seconds(work)`.

Every price has a grade:
  measured      this very work was measured
  interpolated  between samples of the same operation, dtype and form, inside the range that they span
  extrapolated  outside that range, at the efficiency (never the trend) of its edge, or borrowed from another form,
                dtype, backend, operation, group or number of ranks that was measured
  datasheet     from cited peaks and efficiencies only
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from math import log
from typing import Any

from autotune.planners.costs.price_links import Links
from autotune.planners.costs.price_roofline import Roofline
from autotune.planners.costs.price_scatter import Point, Scatter
from autotune.planners.costs.price_tables import SizeTable
from autotune.spec.errors import UsageError
from autotune.spec.machine import Interference, Profile
from autotune.spec.work import BYTES, MASKED, Attention, Collective, Copy, Launch, Matmul, Memory, Optimizer, Work

GRADES = ("measured", "interpolated", "extrapolated", "datasheet")  # from the surest

Price = tuple[float, str]
Key = tuple[Hashable, ...]

# Who stands in for a backend that was not measured: the default first, then by how alike they are.
BACKENDS = ("sdpa", "flash", "efficient", "cudnn", "math")
FORMS = ("fwd", "dgrad", "wgrad", "int8", "bwd")


class Pricer:
    """Prices work on `profile` while `ranks` workers of one node do the same at once.

    Of each kind of work the samples taken with the most ranks not above `ranks` count; where a dtype or operation has
    none there, those of other rank counts do (graded extrapolated). Samples of a CPU differ much by this, since
    workers share its cores and memory. Prices are remembered by work: the object is cheap to ask and not to be shared
    between threads.
    """

    def __init__(self, profile: Profile, ranks: int = 1) -> None:
        self.profile = profile
        self.ranks = max(ranks, 1)
        self._roofline = Roofline(profile)
        self._links = Links(profile, self.ranks, self._roofline)
        self._prices: dict[Work, Price] = {}
        self._exact: dict[Work, float] = {}
        self._scatters: dict[Key, _Curve] = {}
        self._sizes: dict[Key, SizeTable] = {}
        self._chosen: dict[Key, tuple[Key | None, bool]] = {}
        self._index()
        self._peaks = {dtype: self._best_flops(dtype) for dtype in BYTES}
        self._bandwidth = self._best_bandwidth()
        self._copy_rates = self._best_copies()

    def price(self, work: Work) -> Price:
        """(seconds, grade) of `work`."""
        price = self._prices.get(work)
        if price is None:
            seconds, grade = PRICES[work.kind](self, work)
            price = self._prices[work] = (max(seconds, self.bound_seconds(work)), grade)
        return price

    def seconds(self, work: Work) -> float:
        """Seconds that `work` takes. UsageError where the profile has neither sample nor figure for it."""
        price = self._prices.get(work)
        return price[0] if price is not None else self.price(work)[0]

    def grade(self, work: Work) -> str:
        """Which of GRADES the price of `work` rests on."""
        return self.price(work)[1]

    def level(self, span: int) -> int:
        """The innermost link level that joins `span` ranks (a size of 0 joins any); the last level if none does."""
        return self._links.level(span)

    def spread(self, group: int, stride: int) -> tuple[int, int]:
        """(level, inner) of a group whose members are `stride` ranks apart: see `Collective`."""
        return self._links.spread(group, stride)

    def bound_seconds(self, work: Work) -> float:
        """A time that `work` cannot beat on this machine: at the best rate that the datasheet or any sample shows, of
        any shape and rank count. Never above `seconds(work)`."""
        if isinstance(work, (Matmul, Attention)):
            return max(work.flops / self._peaks[work.dtype], work.bytes / self._bandwidth)
        if isinstance(work, (Memory, Optimizer)):
            return work.bytes / self._bandwidth
        if isinstance(work, Collective):
            return self._links.bound(work)
        if isinstance(work, Copy):
            return work.size / self._copy_rates[work.direction] if work.direction in self._copy_rates else 0.0
        return 0.0

    def interference(self) -> Interference:
        """How much compute and communication slow each other, as measured with the nearest number of ranks."""
        known = self.profile.interference
        return min(known, key=lambda item: _far(item.ranks, self.ranks), default=Interference(ranks=self.ranks))

    # How each kind of work is priced (PRICES below).

    def _matmul(self, work: Matmul) -> Price:
        def unlike(key: Key) -> Any:
            form = str(key[2])
            return _width(key[1], work.dtype), _far(key[-1], self.ranks), form != work.form, FORMS.index(form)

        return self._dense(work, ("matmul", work.dtype, work.form), unlike)

    def _attention(self, work: Attention) -> Price:
        wanted: Key = ("attention", work.dtype, work.form, work.backend)

        whose = work.backend.removeprefix(f"{MASKED}.")  # without a mask: the nearest to what was not measured with one

        def unlike(key: Key) -> Any:
            backend = str(key[3])
            order = BACKENDS.index(backend) if backend in BACKENDS else len(BACKENDS)
            same = 0 if backend == work.backend else 1 if backend == whose else 2 + order
            return key[2] != work.form, _width(key[1], work.dtype), same, _far(key[-1], self.ranks)

        return self._dense(work, wanted, unlike)

    def _dense(self, work: Matmul | Attention, wanted: Key, unlike: Callable[[Key], Any]) -> Price:
        if work in self._exact:
            return self._exact[work], "measured"
        key, same = self._choose(self._scatters, wanted, unlike)
        if key is None:
            return self._roofline.dense(work) + self._roofline.widening(work), "datasheet"
        curve = self._scatters[key]
        efficiency, inside = curve.at(_point(work))
        more = self._roofline.widening(work) if key[2] != work.form else 0.0
        computes = self._roofline.computes(work)
        if not (curve.computing if computes else curve.moving):
            # Only the other side of the roofline was measured: its efficiency says nothing about this side.
            side = self._roofline.computing(work) if computes else self._roofline.moving(work)
            other = work.bytes / self._roofline.bandwidth if computes else work.flops / self._roofline.peak(work.dtype)
            return max(side, other / efficiency) + self._roofline.kernel_seconds + more, "extrapolated"
        seconds = self._roofline.ideal(work) / efficiency + more
        return seconds, "interpolated" if inside and same else "extrapolated"

    def _memory(self, work: Memory) -> Price:
        if work in self._exact:
            return self._exact[work], "measured"

        def unlike(key: Key) -> Any:
            return key[1] != work.op, _width(key[2], work.dtype), _far(key[-1], self.ranks)

        wanted: Key = ("memory", work.op, work.dtype)
        price = self._sized(wanted, unlike, work.bytes, lambda key: key[1] in (work.op, "copy"))
        return price or (self._roofline.memory(work), "datasheet")

    def _optimizer(self, work: Optimizer) -> Price:
        if work in self._exact:
            return self._exact[work], "measured"

        def unlike(key: Key) -> Any:
            return key[1] != work.dtype, str(key[1]), _far(key[-1], self.ranks)

        def usable(key: Key) -> bool:
            return key[2] == work.place

        price = self._sized(("optimizer", work.dtype, work.place), unlike, work.bytes, usable)
        if work.place == "host":  # the workers of a node share its memory, and one alone was measured
            seconds, grade = price or (self._roofline.on_host(work), "datasheet")
            return seconds * self.ranks, grade if self.ranks == 1 or grade == "datasheet" else "extrapolated"
        if price is None and any(key[0] == "memory" and key[1] == "copy" for key in self._sizes):
            dtype = "fp32" if work.dtype == "mixed" else work.dtype
            price = self._memory(Memory("copy", int(work.bytes), dtype))[0], "extrapolated"
        return price or (self._roofline.memory(work), "datasheet")

    def _collective(self, work: Collective) -> Price:
        return self._links.price(work)

    def _copy(self, work: Copy) -> Price:
        def unlike(key: Key) -> Any:
            return key[2] != work.pinned, _far(key[-1], self.ranks)

        wanted: Key = ("copy", work.direction, work.pinned)
        price = self._sized(wanted, unlike, work.size, lambda key: key[1] == work.direction)
        return price or (self._roofline.copy(work), "datasheet")

    def _launch(self, work: Launch) -> Price:
        if work in self._exact:
            return self._exact[work], "measured"
        if work.what:
            return self._launch(Launch(work.count))[0], "extrapolated"
        price = self._sized(("launch",), lambda key: _far(key[-1], self.ranks), work.count)
        return price or (work.count * self._roofline.launch(), "datasheet")

    # Finding the samples that stand for a piece of work.

    def _index(self) -> None:
        points: dict[Key, list[Matmul | Attention]] = {}
        values: dict[Key, list[float]] = {}
        sizes: dict[Key, list[tuple[float, float]]] = {}
        nearest: dict[Work, tuple[Any, list[float]]] = {}
        for sample in self.profile.samples:
            work, seconds = sample.work, sample.seconds
            if isinstance(work, (Matmul, Attention)):
                key = _dense_key(work, sample.ranks)
                points.setdefault(key, []).append(work)
                values.setdefault(key, []).append(self._roofline.ideal(work) / seconds)
            elif not isinstance(work, Collective) and not (isinstance(work, Launch) and work.what):
                size = work.count if isinstance(work, Launch) else work.bytes
                sizes.setdefault(_size_key(work, sample.ranks), []).append((size, seconds))
            far = _far(sample.ranks, self.ranks)
            if work not in nearest or far < nearest[work][0]:
                nearest[work] = far, []
            if far == nearest[work][0]:
                nearest[work][1].append(seconds)
        self._scatters = {key: _Curve(works, values[key], self._roofline) for key, works in points.items()}
        self._sizes = {key: SizeTable(pairs) for key, pairs in sizes.items()}
        self._exact |= {work: sum(times) / len(times) for work, (_, times) in nearest.items() if work.kind == "launch"}
        for kind in ("matmul", "attention", "memory", "optimizer"):
            ranks = {key[-1] for key in (*points, *sizes) if key[0] == kind}
            chosen = min(ranks, key=lambda measured: _far(measured, self.ranks), default=None)
            self._exact |= {
                work: sum(times) / len(times)
                for work, (far, times) in nearest.items()
                if work.kind == kind and far == _far(chosen, self.ranks)
            }

    def _choose(
        self,
        tables: Mapping[Key, Any],
        wanted: Key,
        unlike: Callable[[Key], Any],
        usable: Callable[[Key], bool] = lambda key: True,
    ) -> tuple[Key | None, bool]:
        """The key of `tables` that is least unlike `wanted`, and whether it is just that, measured with the rank count
        that counts for its kind. Remembered."""
        if wanted not in self._chosen:
            ranks = {key[-1] for key in tables if key[0] == wanted[0]}
            best = min(ranks, key=lambda measured: _far(measured, self.ranks), default=None)
            keys = [key for key in tables if key[0] == wanted[0] and usable(key)]
            self._chosen[wanted] = (chosen := min(keys, key=unlike, default=None)), chosen == (*wanted, best)
        return self._chosen[wanted]

    def _sized(
        self,
        wanted: Key,
        unlike: Callable[[Key], Any],
        size: float,
        usable: Callable[[Key], bool] = lambda key: True,
    ) -> Price | None:
        key, same = self._choose(self._sizes, wanted, unlike, usable)
        if key is None:
            return None
        floor = self._roofline.kernel_seconds if wanted[0] in ("memory", "optimizer") else 0.0
        if size <= 0:
            return floor, "extrapolated"
        seconds, grade = self._sizes[key].at(size, floor)
        return seconds, grade if same else "extrapolated"

    # The best rates that anything shows.

    def _best_flops(self, dtype: str) -> float:
        rates = (
            sample.work.flops / sample.seconds
            for sample in self.profile.samples
            if isinstance(sample.work, (Matmul, Attention)) and sample.work.dtype == dtype
        )
        return max(self._roofline.peak(dtype), *rates, 0.0)

    def _best_bandwidth(self) -> float:
        kinds = (Matmul, Attention, Memory, Optimizer)
        rates = (s.work.bytes / s.seconds for s in self.profile.samples if isinstance(s.work, kinds))
        return max(self.profile.device.memory_bandwidth, *rates, 0.0)

    def _best_copies(self) -> dict[str, float]:
        rates: dict[str, float] = {}
        for direction in ("h2d", "d2h", "d2d", "h2h", "disk_read", "disk_write"):
            with suppress(UsageError):  # a figure the profile lacks: then the samples alone say
                rates[direction] = self._roofline.copy_rate(Copy(direction, 1))
        for sample in self.profile.samples:
            if isinstance(sample.work, Copy):
                rate = sample.work.size / sample.seconds
                rates[sample.work.direction] = max(rates.get(sample.work.direction, 0.0), rate)
        return rates


class _Curve:
    """The efficiencies of the samples that share a key, and which sides of the roofline they saw."""

    def __init__(self, works: Iterable[Matmul | Attention], values: list[float], roofline: Roofline) -> None:
        works = list(works)
        sides = [roofline.computes(work) for work in works]
        self.computing, self.moving = any(sides), not all(sides)
        self.at = Scatter([_point(work) for work in works], values).at


def _point(work: Matmul | Attention) -> Point:
    if isinstance(work, Matmul):
        return log(work.m), log(work.k), log(work.n), log(work.batch)
    # Query heads that share a key-value head: what the bytes of a decoded token hang on, and nothing else does.
    shared = work.heads / work.kv_heads if work.queries == 1 else 1.0
    return log(work.batch * work.heads), log(work.queries), log(work.keys), log(work.head_dim), log(shared)


def _dense_key(work: Matmul | Attention, ranks: int) -> Key:
    if isinstance(work, Matmul):
        return "matmul", work.dtype, work.form, ranks
    return "attention", work.dtype, work.form, work.backend, ranks


def _size_key(work: Memory | Optimizer | Copy | Launch, ranks: int) -> Key:
    if isinstance(work, Memory):
        return "memory", work.op, work.dtype, ranks
    if isinstance(work, Optimizer):
        return "optimizer", work.dtype, work.place, ranks
    if isinstance(work, Copy):
        return "copy", work.direction, work.pinned, ranks
    return "launch", ranks


def _far(measured: Any, ranks: int) -> tuple[bool, int]:
    """Orders rank counts: those not above `ranks` first, the nearest of them first."""
    return (True, 0) if measured is None else (measured > ranks, abs(ranks - measured))


def _width(measured: Any, dtype: str) -> tuple[bool, int, str]:
    """Orders dtypes: `dtype` itself, then by how much their widths differ."""
    return measured != dtype, abs(BYTES[measured] - BYTES[dtype]), measured


PRICES: dict[str, Callable[[Pricer, Any], Price]] = {
    "matmul": Pricer._matmul,
    "attention": Pricer._attention,
    "memory": Pricer._memory,
    "optimizer": Pricer._optimizer,
    "collective": Pricer._collective,
    "copy": Pricer._copy,
    "launch": Pricer._launch,
}
