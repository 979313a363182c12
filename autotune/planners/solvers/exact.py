"""Branch and bound over the words of a small shop.

Branching is Giffler and Thompson's (1960): of the steps that could run next, the one that would end first (on rank r,
at c) shows that some step of r must start before c, so only those are tried. That holds because moving the one that
ends first into the idle time before a later step delays nothing. Under a limit and with several stages a rank, moving
a forward ahead of others may take the slot that they need; then one more branch keeps it from being the rank's next.

A node is pruned by the bound (heads, remaining work of a rank, tails; `may_take` keeps deadlocks out), or because
another with the same steps done had every clock and every pending input no later.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotune.planners.solvers.shop import Shop, Words, may_take

KEPT = 24  # states remembered for one set of done steps


@dataclass(frozen=True)
class Found:
    """The best words below the value that was to beat (None: there are none), and whether the search was complete."""

    words: Words | None
    value: float
    complete: bool
    nodes: int


def branch_and_bound(shop: Shop, beat: float, floor: float, nodes: int) -> Found:
    """Searches for words with an objective below `beat`, within a number of nodes; stops at `floor`, a lower bound."""
    search = _Search(shop, beat, floor, nodes)
    search.visit(0)
    complete = search.best is not None and search.value <= floor + search.near
    return Found(search.best, search.value, complete or search.visited < nodes, search.visited)


class _Search:
    """The state of a depth-first search: what is done, undone on the way back."""

    def __init__(self, shop: Shop, beat: float, floor: float, nodes: int) -> None:
        self.shop, self.value, self.floor, self.limit_nodes = shop, beat, floor, nodes
        self.near = 1e-9 * shop.scale
        self.best: Words | None = None
        self.visited = 0
        self.ended: list[list[float]] = [[] for _ in range(shop.letters)]
        self.clock = [0.0] * shop.ranks
        self.freed = [0.0] * shop.ranks
        self.words: list[list[int]] = [[] for _ in range(shop.ranks)]
        self.left = list(shop.work)
        self.forwards = [[l for l in letters if l < shop.stages] for letters in shop.of_rank]
        self.by_tail = [sorted(letters, key=lambda l: -shop.tail[l]) for letters in shop.of_rank]
        self.exclusive = shop.limit > 0 and shop.stages > shop.ranks
        self.seen: dict[tuple[int, ...], list[tuple[float, ...]]] = {}
        self.ban_of = [sum(1 << l for l in letters) for letters in shop.of_rank]

    def visit(self, ban: int) -> None:
        """`ban`: bits of letters that are not to be their rank's next."""
        if self.visited >= self.limit_nodes or self.value <= self.floor + self.near:
            return
        self.visited += 1
        shop = self.shop
        if not any(len(ends) < shop.items for ends in self.ended):
            value = max(clock - offset for clock, offset in zip(self.clock, shop.offset, strict=True))
            if value < self.value - self.near:
                self.value, self.best = value, tuple(map(tuple, self.words))
            return
        starts, known = self._starts()
        if self._bound(starts) >= self.value - self.near or self._dominated(starts, known, ban):
            return
        options = [l for l in range(shop.letters) if known[l] and not ban >> l & 1 and self._legal(l)]
        if not options:
            return
        first = min(options, key=lambda l: (starts[l] + shop.seconds[l], l))
        rank, soonest = shop.rank[first], starts[first] + shop.seconds[first]
        rivals = [l for l in options if shop.rank[l] == rank and starts[l] < soonest - self.near]
        rivals.sort(key=lambda l: (starts[l] - shop.tail[l], l))
        for letter in rivals:
            self._run(letter, starts[letter], ban & ~self.ban_of[rank])
        if self.exclusive and first < shop.stages:
            self.visit(ban | 1 << first)

    def _run(self, letter: int, start: float, ban: int) -> None:
        shop, rank = self.shop, self.shop.rank[letter]
        before, seconds, freed = self.clock[rank], shop.seconds[letter], self.freed[rank]
        self.clock[rank] = start + seconds
        self.ended[letter].append(start + seconds)
        self.words[rank].append(letter)
        self.left[rank] -= seconds
        self.freed[rank] += shop.frees[letter]
        self.visit(ban)
        self.freed[rank] = freed
        self.left[rank] += seconds
        self.words[rank].pop()
        self.ended[letter].pop()
        self.clock[rank] = before

    def _legal(self, letter: int) -> bool:
        shop, rank = self.shop, self.shop.rank[letter]
        if not shop.limit or letter >= shop.stages:
            return True
        counts = [len(self.ended[l]) for l in self.forwards[rank]]
        return may_take(len(self.ended[letter]), counts, self.freed[rank], shop.limit)

    def _starts(self) -> tuple[list[float], list[bool]]:
        """[letter] -> the earliest start of its next step (infinity: none left), and whether its inputs are known."""
        shop, far = self.shop, float("inf")
        starts, known = [far] * shop.letters, [False] * shop.letters
        for letter in shop.topological:
            k = len(self.ended[letter])
            if k == shop.items:
                continue
            start, sure = self.clock[shop.rank[letter]], True
            for need, delay in shop.before[letter]:
                ends = self.ended[need]
                if len(ends) > k:
                    start = max(start, ends[k] + delay)
                else:  # as far as this letter, so its next step is the one that is needed
                    start, sure = max(start, starts[need] + shop.seconds[need] + delay), False
            starts[letter], known[letter] = start, sure
        return starts, known

    def _bound(self, starts: list[float]) -> float:
        shop, found = self.shop, 0.0
        for letters in self.by_tail:
            work, head = 0.0, float("inf")
            for letter in letters:  # with tails at least this one's
                more = shop.items - len(self.ended[letter])
                if more:
                    own = more * shop.seconds[letter]
                    work += own
                    head = min(head, starts[letter])
                    found = max(found, head + work + shop.tail[letter], starts[letter] + own + shop.tail[letter])
        for rank, ends in enumerate(self.clock):
            found = max(found, ends - shop.offset[rank])
        return found

    def _dominated(self, starts: list[float], known: list[bool], ban: int) -> bool:
        """Whether a state with the same steps done was no later in anything; if not, remembers this one."""
        shop = self.shop
        key = (*map(len, self.ended), ban)
        state = list(self.clock)
        for letter in range(shop.letters):
            rank, k = shop.rank[letter], len(self.ended[letter])
            for need, delay in shop.before[letter]:
                if shop.rank[need] != rank:
                    state += [max(self.clock[rank], end + delay) for end in self.ended[need][k:]]
        mine = tuple(state)
        kept = self.seen.setdefault(key, [])
        if any(all(a <= b for a, b in zip(old, mine, strict=True)) for old in kept):
            return True
        if len(kept) < KEPT:
            kept.append(mine)
        return False
