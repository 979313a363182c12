"""A 1F1B program played with made-up costs: timelines to draw and compare."""

from __future__ import annotations

import random
from collections import defaultdict

from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.timeline import Span, Timeline

ACTIVATION, MESSAGE, WEIGHTS = 64 << 20, 8 << 20, 512 << 20


SEND_TIME = 0.2


def one_f_one_b(ranks: int, items: int, name: str = "stage") -> Program:
    """1F1B (PipeDream-flush): rank r warms up with ranks - 1 - r forwards, then alternates, then drains."""
    listings = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, items)
        order = [("F", i) for i in range(ahead)]
        for i in range(items - ahead):
            order += [("F", ahead + i), ("BW", i)]
        order += [("BW", i) for i in range(items - ahead, items)]
        listing: list[Instruction] = []
        for op, item in order:
            listing += around(op, item, rank, ranks)
        listing.append(Instruction("OPT", rank, reads=("weights",), writes=("weights",)))
        listings.append(tuple(listing))
    sizes: list[dict[str, Buffer]] = []
    for listing in listings:
        names = {n for i in listing for n in i.writes if n != "weights"}
        sizes.append({n: Buffer(MESSAGE if n[0] in "xg" else ACTIVATION) for n in sorted(names)})
        sizes[-1]["weights"] = Buffer(WEIGHTS, persistent=True)
    return Program(tuple(listings), tuple(sizes), facts={"schedule": "1f1b", "name": name})


def around(op: str, item: int, rank: int, ranks: int) -> list[Instruction]:
    """A forward or backward of one stage with the messages before and after it."""
    made: list[Instruction] = []
    forward = op == "F"
    source, target = (rank - 1, rank + 1) if forward else (rank + 1, rank - 1)
    kind = "x" if forward else "g"
    if 0 <= source < ranks:
        made.append(message("RECV", kind, item, rank, source, rank, writes=(f"{kind}{item}",)))
    reads = (f"{kind}{item}",) if 0 <= source < ranks else ()
    out = (f"{kind}o{item}",) if 0 <= target < ranks else ()
    if forward:
        made.append(Instruction("F", rank, item, reads=reads, writes=(f"a{item}", *out), frees=reads))
    else:
        freed = (f"a{item}", *reads)
        made.append(Instruction("BW", rank, item, reads=(f"a{item}", *reads), writes=out, frees=freed))
    if out:
        made.append(message("SEND", kind, item, rank, rank, target, reads=out, frees=out))
    return made


def message(
    op: str,
    kind: str,
    item: int,
    rank: int,
    source: int,
    target: int,
    reads: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    frees: tuple[str, ...] = (),
) -> Instruction:
    meet, lane = f"{kind}{item}:{source}>{target}", f"p2p {kind} {source}>{target}"
    return Instruction(op, rank, item, 0, lane, reads, writes, frees, meet, (source, target))


COST = {"F": 1.0, "BW": 2.0, "OPT": 0.5, "SEND": SEND_TIME, "RECV": SEND_TIME}


def play(program: Program, cost: dict[str, float], kind: str = "predicted", jitter: float = 0.0) -> Timeline:
    """Start each instruction when its lane, what it reads and its meeting allow: a plain event loop over ranks."""
    noise = random.Random(7)
    world = program.world
    lane_free: list[dict[str, float]] = [defaultdict(float) for _ in range(world)]
    ready: list[dict[str, float]] = [defaultdict(float) for _ in range(world)]
    done: dict[tuple[int, int], Span] = {}
    arrived: dict[str, dict[int, tuple[int, float]]] = defaultdict(dict)
    pending = [list(enumerate(listing)) for listing in program.ranks]
    while any(pending):
        progressed = False
        for rank in range(world):
            blocked: set[str] = set()
            unwritten = {n for p, i in pending[rank] for n in i.writes if n != "weights"}
            for position, i in list(pending[rank]):
                if i.lane in blocked or unwritten & set(i.reads):
                    blocked.add(i.lane)
                    continue
                start = max([lane_free[rank][i.lane], *(ready[rank][n] for n in i.reads)])
                long = cost[i.op] * (1 + jitter * noise.random())
                if i.meet is not None:
                    arrived[i.meet][rank] = (position, start)
                    if len(arrived[i.meet]) < len(i.peers):
                        blocked.add(i.lane)
                        continue
                    start = max(at for _, at in arrived[i.meet].values())
                    members = [(r, p, at) for r, (p, at) in arrived[i.meet].items()]
                else:
                    members = [(rank, position, start)]
                for r, p, at in members:
                    # What was measured holds the wait for the other side; what is predicted begins when all are there.
                    done[r, p] = Span(r, p, at if kind == "measured" else start, start + long)
                    lane_free[r][program.ranks[r][p].lane] = start + long
                    ready[r].update((n, start + long) for n in program.ranks[r][p].writes)
                    pending[r] = [entry for entry in pending[r] if entry[0] != p]
                unwritten = {n for p, i in pending[rank] for n in i.writes if n != "weights"}
                progressed = True
        assert progressed, "the test's own program is deadlocked"
    memory, sent = [], []
    for rank, listing in enumerate(program.ranks):
        held, sizes = WEIGHTS, []
        buffers = program.buffers[rank]
        for i in listing:
            held += sum(buffers[n].size for n in i.writes if not buffers[n].persistent)
            sizes.append(held)
            held -= sum(buffers[n].size for n in i.frees)
        memory.append({"device": tuple(sizes)})
        sent.append(sum(MESSAGE for i in listing if i.op == "SEND"))
    spans = tuple(sorted(done.values(), key=lambda s: (s.start, s.rank, s.position)))
    return Timeline(kind, program, spans, memory, tuple(sent), {"jitter": jitter})
