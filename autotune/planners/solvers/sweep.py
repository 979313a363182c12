"""When the words of a shop run: every step as early as its inputs and its rank allow. Longest paths, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.planners.solvers.shop import Shop, Words


@dataclass(frozen=True)
class Sweep:
    """Ends of every step, by [rank][position] and by [letter][micro-batch]."""

    shop: Shop
    words: Words
    end: list[list[float]]
    ended: list[list[float]]

    @property
    def value(self) -> float:
        """The objective: the latest end of a rank, less its offset."""
        return max(ends[-1] - offset for ends, offset in zip(self.end, self.shop.offset, strict=True))


def sweep(shop: Shop, words: Words) -> Sweep | None:
    """None: the words deadlock."""
    before, seconds = shop.before, shop.seconds
    ended: list[list[float]] = [[] for _ in range(shop.letters)]
    end: list[list[float]] = [[] for _ in words]
    waiting: dict[int, list[int]] = {}  # letter -> ranks that wait for its next execution
    ready = list(range(len(words)))
    left = shop.steps
    while ready:
        rank = ready.pop()
        word, ends = words[rank], end[rank]
        clock = ends[-1] if ends else 0.0
        for position in range(len(ends), len(word)):
            letter = word[position]
            mine = ended[letter]
            k = len(mine)
            start = clock
            for need, delay in before[letter]:
                there = ended[need]
                if len(there) <= k:
                    waiting.setdefault(need, []).append(rank)
                    break
                if there[k] + delay > start:
                    start = there[k] + delay
            else:
                clock = start + seconds[letter]
                mine.append(clock)
                ends.append(clock)
                left -= 1
                if letter in waiting:
                    ready += waiting.pop(letter)
                continue
            break
    return None if left else Sweep(shop, words, end, ended)


def fits(shop: Shop, words: Words) -> bool:
    """Whether no rank holds more than the limit: a slot is taken where F stands and freed where B and W stand."""
    if not shop.limit:
        return True
    stages, frees = shop.stages, shop.frees
    for word in words:
        held = 0.0
        for letter in word:
            if letter < stages:
                held += 1.0
                if held > shop.limit + 1e-6:
                    return False
            else:
                held -= frees[letter]
    return True


def critical(found: Sweep) -> list[tuple[int, int]]:
    """One longest path through a sweep, first step first: (rank, position) of each, with no slack between them."""
    shop, near = found.shop, 1e-9 * found.shop.scale
    index: list[list[int]] = [[] for _ in range(shop.letters)]  # [letter][micro-batch] -> position
    for word in found.words:
        for position, letter in enumerate(word):
            index[letter].append(position)
    number = [[0] * len(word) for word in found.words]
    for letter, positions in enumerate(index):
        for k, position in enumerate(positions):
            number[shop.rank[letter]][position] = k
    rank = max(range(shop.ranks), key=lambda r: (found.end[r][-1] - shop.offset[r], -r))
    position = len(found.words[rank]) - 1
    path = [(rank, position)]
    while True:
        letter = found.words[rank][position]
        start = found.end[rank][position] - shop.seconds[letter]
        if position and found.end[rank][position - 1] >= start - near:
            position -= 1
        else:
            k = number[rank][position]
            for need, delay in shop.before[letter]:
                if found.ended[need][k] + delay >= start - near:
                    rank, position = shop.rank[need], index[need][k]
                    break
            else:
                return path[::-1]
        path.append((rank, position))
