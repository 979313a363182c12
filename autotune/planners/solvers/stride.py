"""Which subgroups of the optimizer's states the device updates: every k-th, by the balance of four lanes.

Deep Optimizer States (2410.21316): of k subgroups the host updates k-1 in the time in which one is fetched, updated and
returned by the device. In full: with d of n subgroups on the device the host's lane needs (n-d) u seconds, the copies
to the device d f + (n-d) w, those from it d r + (n-d) g, and the device's own lane d c; the longest of them is the
update's time, and k is the stride that makes it least.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subgroup:
    """Seconds of each move and update of one subgroup."""

    fetch: float  # states to the device
    update: float  # by the device
    back: float  # states to the host
    gradient: float  # gradients to the host
    host: float  # update by the host
    weight: float  # weights to the device

    def seconds(self, count: int, stride: int) -> float:
        """The update of `count` subgroups with every `stride`-th on the device; 0: none.

        Beyond the longest lane there is what its first or last piece waits for: a gradient before the host can start
        and weights after it has ended; what of a fetch and an update the gradients before the first return do not hide;
        an update and a return after the last fetch.
        """
        here = count // stride if stride else 0
        there = count - here
        first = self.fetch + self.update - (stride - 1) * self.gradient
        lanes = [
            there * self.host + (self.gradient + self.weight if there else 0.0),
            here * self.fetch + there * self.weight + (self.update + self.back if here and not there else 0.0),
            here * self.back + there * self.gradient + (max(0.0, first) if here else 0.0),
            here * self.update + (self.fetch + self.back if here else 0.0),
        ]
        return float(max(lanes))


def strides(count: int) -> list[int]:
    """0 for none on the device, then the widest stride for each number of subgroups that one can put there."""
    widest = {count // stride: stride for stride in range(1, count + 1)}
    return [0, *(widest[here] for here in sorted(widest))]


def best_stride(count: int, subgroup: Subgroup) -> int:
    """The stride with the shortest update; of equals the one with the fewest subgroups on the device."""
    return min(strides(count), key=lambda stride: subgroup.seconds(count, stride))
