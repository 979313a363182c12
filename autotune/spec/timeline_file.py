"""The JSON form of a Timeline with its Program, and the text form of a Program.

Compact: every name (operation, lane, buffer, tier, meeting) stands once in `names` and is an index elsewhere, and an
instruction is an array without its trailing defaults. What is loaded is only ever data: it is checked field by field,
all problems are told at once with their place, and no name is trusted by whoever draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from autotune.spec.errors import Problem, UsageError, nearest_name
from autotune.spec.program import COMPUTE, Buffer, Instruction, Program
from autotune.spec.timeline import Span, Timeline

SCHEMA = "autotune.timeline/1"
KINDS = ("predicted", "measured")
MOST_PROBLEMS = 20  # a corrupt file of 30,000 rows is told once, not 30,000 times
# The array form of an instruction, least often left out first; what each is worth when it is left out.
DEFAULTS: tuple[tuple[str, Any], ...] = (
    ("op", None),
    ("lane", None),
    ("stage", 0),
    ("item", 0),
    ("reads", []),
    ("writes", []),
    ("frees", []),
    ("peers", []),
    ("meet", -1),
    ("part", 0),
    ("lag", 0),
)


def text(program: Program) -> str:
    """The labels of each rank's instructions, one line a rank in list order: `0F0 0F1 0BW0`."""
    return "".join(" ".join(i.label for i in listing) + "\n" for listing in program.ranks)


def to_dict(timeline: Timeline) -> dict[str, Any]:
    """The timeline as JSON values; times stay seconds and sizes bytes. `from_dict` gives an equal one back."""
    names: dict[str, int] = {COMPUTE: 0}

    def name(value: str) -> int:
        return names.setdefault(value, len(names))

    def row(instruction: Instruction) -> list[Any]:
        values: dict[str, Any] = instruction._asdict()
        values.update({key: name(values[key]) for key in ("op", "lane")})
        values.update({key: [name(n) for n in values[key]] for key in ("reads", "writes", "frees")})
        values["peers"] = list(instruction.peers)
        values["meet"] = -1 if instruction.meet is None else name(instruction.meet)
        listed = [values[key] for key, _ in DEFAULTS]
        while listed and listed[-1] == DEFAULTS[len(listed) - 1][1]:
            listed.pop()
        return listed

    program = timeline.program
    ranks = [
        {
            "instructions": [row(i) for i in listing],
            "buffers": [[name(n), b.size, name(b.tier), int(b.persistent)] for n, b in buffers.items()],
        }
        for listing, buffers in zip(program.ranks, program.buffers, strict=True)
    ]
    live = [sorted(map(name, sorted(kept))) for kept in program.live]
    return {
        "schema": SCHEMA,
        "kind": timeline.kind,
        "facts": _plain(timeline.facts),
        "program": {"facts": _plain(program.facts), "ranks": ranks, "live": live, "names": list(names)},
        "spans": [list(span) for span in timeline.spans],
        "memory": [{tier: list(sizes) for tier, sizes in tiers.items()} for tiers in timeline.memory],
        "sent": list(timeline.sent),
    }


def from_dict(raw: Any, source: str = "timeline") -> Timeline:
    """The timeline that `to_dict` wrote; `source` is the file's name. UsageError tells every problem and its place."""
    check = _Check(source)
    whole = check.mapping(raw, "", ("schema", "kind", "facts", "program", "spans", "memory", "sent"))
    if whole.get("schema") != SCHEMA:
        check.wrong("schema", whole.get("schema"), SCHEMA)
        check.done()
    kind = check.choice(whole.get("kind"), "kind", KINDS)
    program = _program(check, check.mapping(whole.get("program"), "program", ("facts", "ranks", "live", "names")))
    check.done()  # what follows points into the program
    spans = tuple(_span(check, s, f"spans[{i}]", program) for i, s in enumerate(check.array(whole["spans"], "spans")))
    memory = [
        _memory(check, tiers, f"memory[{r}]", program, r) for r, tiers in _per_rank(check, whole, "memory", program)
    ]
    sent = tuple(check.integer(n, f"sent[{r}]") for r, n in _per_rank(check, whole, "sent", program))
    facts = check.mapping(whole["facts"], "facts")
    check.done()
    return Timeline(kind, program, spans, memory, sent, facts)


class _Check:
    """Reads values of the right type, and remembers what was wrong instead of stopping at the first."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []

    def wrong(self, place: str, found: object, expected: str, nearest: str | None = None) -> None:
        shown = repr(found) if len(repr(found)) <= 60 else repr(found)[:57] + "..."
        self.problems.append(Problem(self.source, place, shown, expected, nearest))
        if len(self.problems) >= MOST_PROBLEMS:
            self.done()

    def done(self) -> None:
        if self.problems:
            raise UsageError(f"{self.source}: not a timeline that can be read", problems=self.problems)

    def mapping(self, value: object, place: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
        """An object, with exactly `keys` where they are given."""
        if not isinstance(value, dict):
            self.wrong(place, value, "an object")
            self.done()
            return {}
        prefix = f"{place}." if place else ""
        for key in value if keys is not None else ():
            if key not in (keys or ()):
                self.wrong(
                    f"{prefix}{key}", "an unknown key", f"one of {', '.join(keys or ())}", nearest_name(key, keys or ())
                )
        missing = [key for key in keys or () if key not in value]
        for key in missing:
            self.wrong(f"{prefix}{key}", "nothing", "a value")
        if missing:
            self.done()
        return value

    def array(self, value: object, place: str) -> list[Any]:
        if isinstance(value, list):
            return value
        self.wrong(place, value, "an array")
        return []

    def choice(self, value: object, place: str, choices: Sequence[str]) -> str:
        if isinstance(value, str) and value in choices:
            return value
        self.wrong(place, value, f"one of {', '.join(choices)}", nearest_name(str(value), choices))
        return choices[0]

    def integer(self, value: object, place: str, low: int = 0, high: int | None = None) -> int:
        if type(value) is int and value >= low and (high is None or value <= high):
            return value
        self.wrong(
            place, value, f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        )
        return low

    def seconds(self, value: object, place: str) -> float:
        if type(value) in (int, float) and isfinite(value):  # type: ignore[arg-type]
            return float(value)  # type: ignore[arg-type]
        self.wrong(place, value, "a finite number of seconds")
        return 0.0


def _program(check: _Check, raw: Mapping[str, Any]) -> Program:
    names = check.array(raw["names"], "program.names")
    for index, value in enumerate(names):
        if not isinstance(value, str):
            check.wrong(f"program.names[{index}]", value, "a name")
    if not names:
        check.wrong("program.names", names, "at least the lane 'compute'")
    check.done()  # everything after this is an index into the names
    ranks = check.array(raw["ranks"], "program.ranks")
    listings: list[tuple[Instruction, ...]] = []
    buffers: list[dict[str, Buffer]] = []
    for rank, entry in enumerate(ranks):
        place = f"program.ranks[{rank}]"
        fields = check.mapping(entry, place, ("instructions", "buffers"))
        rows = check.array(fields["instructions"], f"{place}.instructions")
        listings.append(
            tuple(
                _instruction(check, row, f"{place}.instructions[{i}]", names, len(ranks)) for i, row in enumerate(rows)
            )
        )
        sizes: dict[str, Buffer] = {}
        for i, row in enumerate(check.array(fields["buffers"], f"{place}.buffers")):
            where = f"{place}.buffers[{i}]"
            if len(check.array(row, where)) != 4:
                check.wrong(where, row, "[name, size, tier, persistent]")
                continue
            name, tier = (names[check.integer(row[k], f"{where}[{k}]", 0, len(names) - 1)] for k in (0, 2))
            if name in sizes:
                check.wrong(f"{where}[0]", name, "a buffer that is listed once")
            persistent = bool(check.integer(row[3], f"{where}[3]", 0, 1))
            sizes[name] = Buffer(check.integer(row[1], f"{where}[1]"), tier, persistent)
        buffers.append(sizes)
    kept = check.array(raw["live"], "program.live")
    if kept and len(kept) != len(ranks):
        check.wrong("program.live", f"{len(kept)} entries", f"none, or one for each of {len(ranks)} ranks")
    live = tuple(
        frozenset(
            names[check.integer(n, f"program.live[{r}]", 0, len(names) - 1)]
            for n in check.array(each, f"program.live[{r}]")
        )
        for r, each in enumerate(kept)
    )
    return Program(tuple(listings), tuple(buffers), live, check.mapping(raw["facts"], "program.facts"))


def _instruction(check: _Check, row: object, place: str, names: Sequence[str], world: int) -> Instruction:
    values = check.array(row, place)
    if not 2 <= len(values) <= len(DEFAULTS):
        check.wrong(place, row, f"2 to {len(DEFAULTS)} values: {', '.join(key for key, _ in DEFAULTS)}")
        return Instruction("")
    filled = [*values, *(default for _, default in DEFAULTS[len(values) :])]
    found = {key: (value, f"{place}.{key}") for (key, _), value in zip(DEFAULTS, filled, strict=True)}

    def index(key: str, low: int = 0) -> int:
        return check.integer(*found[key], low, len(names) - 1)

    def listed(key: str) -> tuple[str, ...]:
        value, where = found[key]
        return tuple(names[check.integer(v, where, 0, len(names) - 1)] for v in check.array(value, where))

    meet = index("meet", -1)
    peers, where = found["peers"]
    return Instruction(
        op=names[index("op")],
        stage=check.integer(*found["stage"]),
        item=check.integer(*found["item"]),
        part=check.integer(*found["part"]),
        lane=names[index("lane")],
        reads=listed("reads"),
        writes=listed("writes"),
        frees=listed("frees"),
        meet=names[meet] if meet >= 0 else None,
        peers=tuple(check.integer(peer, where, 0, world - 1) for peer in check.array(peers, where)),
        lag=check.integer(*found["lag"]),
    )


def _span(check: _Check, row: object, place: str, program: Program) -> Span:
    values = check.array(row, place)
    if len(values) != 4:
        check.wrong(place, row, "[rank, position, start, end]")
        return Span(0, 0, 0.0, 0.0)
    rank = check.integer(values[0], f"{place}.rank", 0, program.world - 1)
    listing = program.ranks[rank] if rank < program.world else ()
    position = check.integer(values[1], f"{place}.position", 0, len(listing) - 1)
    start, end = (check.seconds(values[k], f"{place}.{key}") for k, key in ((2, "start"), (3, "end")))
    if end < start:
        check.wrong(f"{place}.end", end, f"no less than its start, {start!r}")
    return Span(rank, position, start, end)


def _memory(check: _Check, tiers: object, place: str, program: Program, rank: int) -> dict[str, tuple[int, ...]]:
    """Bytes at each instruction of a rank, by tier."""
    read: dict[str, tuple[int, ...]] = {}
    for tier, sizes in check.mapping(tiers, place).items():
        where = f"{place}.{tier}"
        read[tier] = tuple(check.integer(n, f"{where}[{i}]") for i, n in enumerate(check.array(sizes, where)))
        if len(read[tier]) != len(program.ranks[rank]):
            check.wrong(where, f"{len(read[tier])} sizes", f"one for each of {len(program.ranks[rank])} instructions")
    return read


def _per_rank(check: _Check, whole: Mapping[str, Any], key: str, program: Program) -> list[tuple[int, Any]]:
    values = check.array(whole[key], key)
    if len(values) != program.world:
        check.wrong(key, f"{len(values)} entries", f"one for each of {program.world} ranks")
    return list(enumerate(values[: program.world]))


def _plain(value: Any) -> Any:
    """Facts as JSON values: tuples become arrays, keys strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
