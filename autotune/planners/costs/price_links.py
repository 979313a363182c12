"""What a collective costs: measured for that group, carried over from another group, or from the link's datasheet.

A group that spans nodes with several ranks on each is priced as its phases inside and across the nodes (`phases`):
each rank has its own way out of the node.

The model is latency and bandwidth (Hockney 1994; for rings Thakur, Rabenseifner & Gropp 2005, section 3):
t = start + latency x steps + bytes on the link / (bandwidth x efficiency). Bytes are what one rank sends in a ring
(spec/work.py). Coefficients read here:
  collective_seconds                    what starting a collective takes before its first hop
  link_efficiency.<link>.<op>.<group>, link_efficiency.<link>.<op>, link_efficiency.<link>, link_efficiency
                                        the share of the bandwidth that is reached (above 1 where the switch reduces)
  link_pair_share.<link>                on a full mesh, the share of a device's bandwidth that one peer can get: a group
                                        of n then reaches (n - 1) shares; switched links have 1
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil, exp, gcd, inf, log, log2

from autotune.planners.costs.price_roofline import Roofline
from autotune.planners.costs.price_tables import SizeTable
from autotune.spec.errors import Problem, UsageError
from autotune.spec.machine import Link, Profile, Sample
from autotune.spec.work import Collective

ROOTED = ("broadcast", "reduce")


def steps(op: str, group: int) -> int:
    """Hops one after another. All-reduce and broadcast go up and down a tree when small (NCCL's choice), the other
    operations around a ring. A reduce is a broadcast backwards."""
    depth = ceil(log2(group)) if group > 1 else 0
    table = {"all_reduce": min(2 * (group - 1), 2 * depth), "send_recv": min(1, group - 1)}
    return table.get(op, depth if op in ROOTED else group - 1)


def phases(work: Collective) -> tuple[list[Collective], list[Collective]]:
    """What a collective over several units is made of: (inside a unit, across units).

    A rank takes its own share of the tensor across, wherever the operation lets it: a long all-reduce is a
    reduce-scatter and an all-gather (Thakur, Rabenseifner & Gropp 2005, section 4), and so at every level.
    """
    inner, outer = work.inner, work.group // work.inner

    def inside(op: str, size: int = work.size) -> Collective:
        return Collective(op, size, inner, work.level - 1)

    def across(size: int) -> list[Collective]:
        return [Collective(work.op, size, outer, work.level)]

    share = -(-work.size // inner)
    match work.op:
        case "all_reduce":
            return [inside("reduce_scatter"), inside("all_gather")], across(share)
        case "all_gather" | "reduce_scatter":
            return [inside(work.op)], across(share)
        case "all_to_all":  # what is for the neighbours stays inside
            return [inside(work.op, -(-work.size // outer))], across(work.size)
        case _:
            return [inside(work.op)], across(work.size)


Table = tuple[str, int, int, bool]  # op, level, inner, captured


class Links:
    """Prices of collectives on one machine."""

    def __init__(self, profile: Profile, ranks: int, roofline: Roofline) -> None:
        self._links = profile.links
        self._name = profile.name
        self._roofline = roofline
        self._start = roofline.coefficient("collective_seconds", default=0.0)
        self._tables = _tables(profile.samples, ranks)
        self._exact = _exact(profile.samples, ranks)
        self._best: dict[tuple[str, int, int], float] = {}
        for sample in profile.samples:
            if isinstance(sample.work, Collective) and sample.work.group > 1:
                key = sample.work.op, sample.work.level, sample.work.inner
                self._best[key] = max(self._best.get(key, 0.0), sample.work.bytes / sample.seconds)

    def level(self, span: int) -> int:
        """The innermost link level that joins `span` ranks (a size of 0 joins any); the last level if none does."""
        for index, link in enumerate(self._links):
            if link.size == 0 or link.size >= span:
                return index
        return max(len(self._links) - 1, 0)

    def spread(self, group: int, stride: int) -> tuple[int, int]:
        """(level, inner) of a group whose members are `stride` ranks apart, ranks filling one unit after another.

        Where the units do not hold equally many members, inner is what all of them hold a multiple of.
        """
        level = self.level(group * stride)
        inside = self._links[level - 1].size // stride if level else 0
        return level, gcd(group, inside) if inside else 1

    def price(self, work: Collective) -> tuple[float, str]:
        if work.group <= 1:
            return 0.0, "measured"  # by definition: nothing is sent
        if work in self._exact:
            return self._exact[work], "measured"
        if work.captured and _table(work) not in self._tables:
            return self.price(replace(work, captured=False))
        if self._has_levels(work):
            return self._two_levels(work)
        groups = self._tables.get(_table(work), {})
        if work.group in groups:
            return groups[work.group].at(work.size, floor=inf)
        if groups:
            return self._carried(work, groups)
        return self._model(work), "datasheet"

    def _has_levels(self, work: Collective) -> bool:
        """Whether the price is that of the work's phases: nothing of its kind was measured."""
        return 1 < work.inner < work.group and work.level > 0 and _table(work) not in self._tables

    def bound(self, work: Collective) -> float:
        """The bytes on the link at the best rate that the datasheet or a sample shows."""
        if work.group <= 1:
            return 0.0
        work = replace(work, captured=False)
        if self._has_levels(work):
            return max(sum(map(self.bound, side)) for side in phases(work))
        best = self._best.get((work.op, work.level, work.inner), 0.0)
        if self._links:
            bandwidth, efficiency = self._bandwidth(work)
            best = max(best, bandwidth * max(efficiency, 1.0))
        return work.bytes / best if best else 0.0

    def _two_levels(self, work: Collective) -> tuple[float, str]:
        """Inside the units and across them, in chunks of which one goes inside while another goes across (the rings and
        trees of NCCL): the slower of the two sets the rate, and the other adds what its smallest message takes. What
        is too small to gain from that goes over one way out, as NCCL's choice among its algorithms would have it."""
        sides = []
        grades = set()
        for side in phases(work):
            prices = [self.price(phase) for phase in side]
            grades |= {grade for _, grade in prices}
            least = sum(self.price(replace(phase, size=1))[0] for phase in side)
            sides.append((sum(seconds for seconds, _ in prices), least))
        (inside, start_inside), (across, start_across) = sides
        seconds = max(inside + start_across, across + start_inside)
        one, grade = self.price(replace(work, inner=1))
        if one < seconds:
            return one, grade if grade == "datasheet" else "extrapolated"
        return seconds, "datasheet" if "datasheet" in grades else "extrapolated"

    def _model(self, work: Collective) -> float:
        bandwidth, efficiency = self._bandwidth(work)
        hops = self._link(work).latency * steps(work.op, work.group)
        return self._start + hops + work.bytes / (bandwidth * efficiency)

    def _carried(self, work: Collective, groups: dict[int, SizeTable]) -> tuple[float, str]:
        """From the measured groups on either side, in log of the group; from the nearest where only one side is."""
        below = max((g for g in groups if g < work.group), default=0)
        above = min((g for g in groups if g > work.group), default=0)
        times = {g: self._from(work, g, groups[g]) for g in (below, above) if g}
        if len(times) == 1:
            return next(iter(times.values())), "extrapolated"
        part = log(work.group / below) / log(above / below)
        return exp((1 - part) * log(times[below]) + part * log(times[above])), "interpolated"

    def _from(self, work: Collective, group: int, table: SizeTable) -> float:
        """The time at `group` of a size with as many bytes on the link, and the hops that `work` has more or less."""
        unit = Collective(work.op, 1, group, work.level).bytes
        seconds, _ = table.at(work.bytes / unit, floor=inf)
        if not self._links:
            return seconds
        hops, measured = steps(work.op, work.group), steps(work.op, group)
        # A smaller group saves hops, but never more than they can have taken.
        return max(seconds + (hops - measured) * self._link(work).latency, seconds * min(1.0, hops / measured))

    def _link(self, work: Collective) -> Link:
        if not self._links:
            problem = Problem(
                self._name, "links", "none", f"a link that joins {work.group} ranks, or samples of {work.op}"
            )
            raise UsageError("the machine profile has no link between devices", problems=[problem])
        return self._links[min(work.level, len(self._links) - 1)]

    def _bandwidth(self, work: Collective) -> tuple[float, float]:
        """(bytes/s that one device can put on the link in this group, the share of it that is reached)."""
        link = self._link(work)
        share = self._roofline.coefficient(f"link_pair_share.{link.name}", default=1.0)
        name = f"link_efficiency.{link.name}"
        names = f"{name}.{work.op}.{work.group}", f"{name}.{work.op}", name, "link_efficiency"
        peers = 1 if work.op in ("send_recv", *ROOTED) else work.group - 1
        return link.bandwidth * min(1.0, share * peers), self._roofline.coefficient(*names, default=1.0)


def _exact(samples: Iterable[Sample], ranks: int) -> dict[Collective, float]:
    """Mean seconds of each collective that was measured just so, by as many ranks as `_tables` would choose."""
    found: dict[Collective, dict[int, list[float]]] = {}
    for sample in samples:
        if isinstance(sample.work, Collective) and sample.work.group > 1:
            found.setdefault(sample.work, {}).setdefault(sample.ranks, []).append(sample.seconds)
    exact = {}
    for work, by_ranks in found.items():
        limit = max(ranks, work.group)
        times = by_ranks[min(by_ranks, key=lambda measured: (measured > limit, abs(limit - measured)))]
        exact[work] = sum(times) / len(times)
    return exact


def _table(work: Collective) -> Table:
    return work.op, work.level, work.inner, work.captured


def _tables(samples: Iterable[Sample], ranks: int) -> dict[Table, dict[int, SizeTable]]:
    """Of each kind by group, the samples taken while the most ranks worked that are no more than `ranks` or the group
    itself; else those taken with the fewest above."""
    found: dict[Table, dict[int, dict[int, list[tuple[float, float]]]]] = {}
    for sample in samples:
        work = sample.work
        if isinstance(work, Collective) and work.group > 1:
            by_group = found.setdefault(_table(work), {})
            by_group.setdefault(work.group, {}).setdefault(sample.ranks, []).append((work.size, sample.seconds))
    tables: dict[Table, dict[int, SizeTable]] = {}
    for key, by_group in found.items():
        for group, by_ranks in by_group.items():
            limit = max(ranks, group)
            chosen = min(by_ranks, key=lambda measured: (measured > limit, abs(limit - measured)))
            tables.setdefault(key, {})[group] = SizeTable(by_ranks[chosen])
    return tables
