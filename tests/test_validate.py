"""What the validator refuses, with the place; every lowered program is accepted and every mutant of one is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import lower_generation
from autotune.planners.lower.train import lower_training
from autotune.planners.simulate import resolve
from autotune.planners.validate import faults, validate
from autotune.spec.errors import UsageError
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.workload import Workload

I = Instruction
MODELS = (
    ModelSpec("tied", "LlamaForCausalLM", 16, 12, 4, 4, 4, 24, 32, tied=True),
    ModelSpec("norms", "Qwen3ForCausalLM", 24, 9, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True),
)


def one(*listing: Instruction, **held: Buffer) -> Program:
    names = {n for i in listing for n in i.reads + i.writes + i.frees}
    return Program((listing,), ({**{n: Buffer(1) for n in names}, **held},))


def refused(program: Program, *lines: str, inline: bool = False) -> str:
    """Validates; the message must have every one of `lines` in it."""
    with pytest.raises(UsageError) as caught:
        validate(program, inline)
    message = str(caught.value)
    for line in lines:
        assert line in message, message
    return message


# Buffers


def test_read_after_free() -> None:
    program = one(I("F", writes=("x",)), I("G", reads=("x",), frees=("x",)), I("H", 1, 2, reads=("x",)))
    refused(program, "rank 0 step 2 (1H2): reads x after it was freed")


def test_double_free() -> None:
    program = one(I("F", writes=("x",)), I("G", reads=("x",), frees=("x",)), I("H", frees=("x",)))
    refused(program, "rank 0 step 2 (0H0): frees x twice")


def test_free_before_write() -> None:
    refused(one(I("H", frees=("x",))), "rank 0 step 0 (0H0): frees x before it was written")


def test_never_freed() -> None:
    program = one(I("F", writes=("x", "y")), I("G", reads=("y",), frees=("y",)))
    refused(program, "rank 0: never frees x")
    validate(replace(program, facts={"leaves": True}))
    # A token holds nothing, so nothing leaks.
    validate(replace(program, buffers=({"x": Buffer(), "y": Buffer(1)},)))


def test_read_before_write() -> None:
    program = one(I("G", reads=("x",)), I("F", writes=("x",)), I("H", frees=("x",)))
    refused(program, "rank 0 step 0 (0G0): reads x before anything wrote it")


def test_unknown_buffers() -> None:
    program = Program(((I("F", reads=("x",), writes=("y",)),),), ({},))
    refused(
        program,
        "rank 0 step 0 (0F0): reads x, which is no buffer of this rank",
        "rank 0 step 0 (0F0): writes y, which is no buffer of this rank",
    )


def test_overwriting_what_is_live() -> None:
    program = one(I("F", writes=("x",)), I("F", 0, 1, writes=("x",)), I("G", reads=("x",), frees=("x",)))
    refused(program, "rank 0 step 1 (0F1): writes x, which is live and not read here")
    validate(one(I("F", writes=("x",)), I("G", reads=("x",), writes=("x",)), I("H", reads=("x",), frees=("x",))))


def test_freeing_what_outlives_the_step() -> None:
    refused(
        one(I("F", reads=("w",), frees=("w",)), w=Buffer(1, persistent=True)),
        "rank 0 step 0 (0F0): frees w, which outlives the step",
    )


def test_lagged_reads() -> None:
    """The version of a step ago needs no writer before it in the list, but one somewhere."""
    validate(one(I("F", reads=("h",), lag=1), I("G", writes=("h",))))
    refused(
        one(I("F", reads=("h",), lag=2)), "rank 0 step 0 (0F0~2): reads h of 2 steps ago, which no step ever writes"
    )
    validate(one(I("F", reads=("w",), lag=2), w=Buffer(1, persistent=True)))


def test_all_faults_are_told_at_once() -> None:
    program = one(I("F", reads=("x",)), I("G", frees=("y",)), I("H", writes=("z",)))
    assert len(faults(program)) == 3
    refused(program, "reads x before", "frees y before", "never frees z")


# Meetings and deadlocks


def pair(first: tuple[Instruction, ...], second: tuple[Instruction, ...]) -> Program:
    names = {n for i in (*first, *second) for n in i.reads + i.writes}
    held = {n: Buffer(1) for n in names}
    return Program((first, second), (held, held))


def send(name: str, source: int, lane: str = "net") -> Instruction:
    return I("SEND", lane=lane, reads=(name,), frees=(name,), meet=name, peers=(source, 1 - source))


def receive(name: str, source: int, lane: str = "net") -> Instruction:
    return I("RECV", lane=lane, writes=(name,), meet=name, peers=(source, 1 - source))


def make(name: str) -> Instruction:
    return I("F", writes=(name,))


def use(name: str) -> Instruction:
    return I("G", reads=(name,), frees=(name,))


def test_crossed_messages_on_one_lane() -> None:
    """Each rank's send waits behind its receive on one lane: neither message can start."""
    program = pair(
        (make("a"), receive("b", 1), send("a", 0), use("b")), (make("b"), receive("a", 0), send("b", 1), use("a"))
    )
    message = refused(
        program,
        "the program deadlocks",
        "rank 0 step 1: 0F0 | waits in 0RECV0>1+0 on lane net (meets ranks 1, 0 at b)",
        "rank 1 step 1: 0F0 | waits in 0RECV0>0+1 on lane net (meets ranks 0, 1 at a)",
    )
    assert len(message.splitlines()) == 3  # one row a rank
    two_lanes = pair(
        (make("a"), receive("b", 1, "in"), send("a", 0, "out"), use("b")),
        (make("b"), receive("a", 0, "out"), send("b", 1, "in"), use("a")),
    )
    validate(two_lanes)
    validate(two_lanes, inline=True)


def test_what_only_deadlocks_where_the_host_computes() -> None:
    """Each rank computes on what it receives before it sends: fine for streams, a deadlock for a host that waits."""
    program = pair(
        (make("a"), receive("b", 1, "b"), use("b"), send("a", 0, "a")),
        (make("b"), receive("a", 0, "a"), use("a"), send("b", 1, "b")),
    )
    validate(program)
    refused(program, "rank 0 step 1: 0F0 | waits in 0RECV0>1+0", "rank 1 step 1", inline=True)


def test_finished_ranks_are_told_too() -> None:
    program = Program(
        (
            (make("a"), receive("b", 1), send("a", 0), use("b")),
            (make("b"), receive("a", 0), send("b", 1), use("a")),
            (make("c"), use("c")),
        ),
        ({n: Buffer(1) for n in "ab"}, {n: Buffer(1) for n in "ab"}, {"c": Buffer(1)}),
    )
    refused(program, "rank 2: 0F0 0G0 | done")


def test_a_missing_partner() -> None:
    refused(pair((make("a"), send("a", 0)), (I("F"),)), "meeting a: ranks [0] came, each naming peers [(0, 1)]")


def test_wrong_peers() -> None:
    program = pair((make("a"), send("a", 0)), (receive("a", 0), use("a")))
    validate(program)
    third = Program((*program.ranks, ()), (*program.buffers, {}))
    wrong = program.ranks[0][1]._replace(peers=(0, 2))
    refused(
        replace(third, ranks=((program.ranks[0][0], wrong), *third.ranks[1:])),
        "meeting a: ranks [0, 1] came, each naming peers [(0, 1), (0, 2)]",
    )


def test_one_rank_twice_at_a_meeting() -> None:
    twice = I("S", meet="m", peers=(0, 1))
    refused(pair((twice, twice), (twice,)), "meeting m: ranks [0, 0, 1] came")


def test_peers_without_a_meeting() -> None:
    refused(one(I("S", peers=(0, 1))), "rank 0 step 0 (0S0>0+1): has peers but no meeting")


def test_a_meeting_on_two_lanes() -> None:
    """The lane names the process group: two lanes would be two groups that wait for each other."""
    program = pair((make("a"), send("a", 0, "red")), (receive("a", 0, "blue"), use("a")))
    refused(program, "meeting a: its ranks come on different lanes, blue, red")


# Real programs and their mutants


def random_programs(count: int, seed: int) -> list[tuple[Plan, Program]]:
    """Lowered and expanded programs of random plans, worlds of 2 to 16."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        schedule, chunks = draw.choice([("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3)])
        plan = Plan(
            draw.choice([1, 2]),
            draw.choice([1, 2]),
            draw.choice([1, 2, 3, 4]),
            draw.choice([1, 2]),
            schedule,
            chunks,
            draw.choice(["none", "selective", "full"]),
            zero=draw.choice([0, 1, 2, 3]),
            gathered=draw.choice([0, 0, 1]),
            sequence_parallel=draw.choice([False, True]),
        )
        model = draw.choice(MODELS)
        workload = Workload(sequence_length=8, global_batch=draw.choice([8, 12, 24]))
        if plan.world > 1 and why_not(model, workload, plan, plan.world) is None:
            found.append((plan, expand(lower_training(plan, model, workload), plan)))
    return found


PROGRAMS = random_programs(60, 5)


@pytest.mark.parametrize("inline", [False, True])
def test_every_lowered_program_is_accepted(inline: bool) -> None:
    for plan, program in PROGRAMS:
        assert not faults(program), plan.describe()
        validate(program, inline)


@pytest.mark.parametrize("inline", [False, True])
def test_every_generation_is_accepted_step_after_step(inline: bool) -> None:
    """Prefill and decode; a decode can run again and again."""
    workload = Workload("generate", prompt_length=6, new_tokens=5, batch=4)
    for data, tensor, pipeline in product((1, 2), (1, 2), (1, 2, 3, 4)):
        plan = Plan(data, tensor, pipeline)
        assert why_not(MODELS[0], workload, plan, plan.world) is None
        for queries, keys in ((6, 6), (1, 7)):
            program = expand(lower_generation(plan, MODELS[0], workload, queries, keys), plan)
            validate(program, inline)
            resolve(program, inline, steps=3)


def edited(program: Program, rank: int, listing: list[Instruction]) -> Program:
    ranks = list(program.ranks)
    ranks[rank] = tuple(listing)
    return replace(program, ranks=tuple(ranks))


def places(program: Program, wanted: Callable[[Instruction], bool]) -> list[tuple[int, int]]:
    return [(rank, position) for rank, position, i in program if wanted(i)]


Mutation = Callable[[Program, random.Random], Program | None]


def dropping(wanted: Callable[[Instruction], bool]) -> Mutation:
    """One instruction is missing."""

    def mutate(program: Program, draw: random.Random) -> Program | None:
        found = places(program, wanted)
        if not found:
            return None
        rank, position = draw.choice(found)
        listing = list(program.ranks[rank])
        del listing[position]
        return edited(program, rank, listing)

    return mutate


def changing(wanted: Callable[[Instruction], bool], change: Callable[[Instruction, int], Instruction]) -> Mutation:
    """One instruction is another; `change` also gets the world size."""

    def mutate(program: Program, draw: random.Random) -> Program | None:
        found = places(program, wanted)
        if not found:
            return None
        rank, position = draw.choice(found)
        listing = list(program.ranks[rank])
        listing[position] = change(listing[position], program.world)
        return edited(program, rank, listing)

    return mutate


def another_peer(instruction: Instruction, world: int) -> Instruction:
    """The last peer is a rank that is not in the meeting."""
    others = [r for r in range(world + 1) if r not in instruction.peers]
    return instruction._replace(peers=(*instruction.peers[:-1], others[0]))


def swapped_messages(program: Program, draw: random.Random) -> Program | None:
    """Two messages of one channel change places on one of its two ends."""
    lanes: dict[tuple[int, str], list[int]] = {}
    for rank, position, i in program:
        if i.op in ("SEND", "RECV"):
            lanes.setdefault((rank, i.lane), []).append(position)
    channels = [(rank, found) for (rank, _), found in lanes.items() if len(found) > 1]
    if not channels:
        return None
    rank, found = draw.choice(channels)
    at = draw.randrange(len(found) - 1)
    a, b = found[at], found[at + 1]
    listing = list(program.ranks[rank])
    listing[a], listing[b] = listing[b], listing[a]
    return edited(program, rank, listing)


def backward_before_forward(program: Program, draw: random.Random) -> Program | None:
    rank, position = draw.choice(places(program, lambda i: i.op == "F"))
    listing = list(program.ranks[rank])
    f = listing[position]
    other = next(k for k, i in enumerate(listing) if (i.op, i.stage, i.item) == ("BW", f.stage, f.item))
    listing[position], listing[other] = listing[other], listing[position]
    return edited(program, rank, listing)


def twice(program: Program, draw: random.Random) -> Program | None:
    """A forward, backward or message comes a second time at once."""
    rank, position = draw.choice(places(program, lambda i: i.op in ("F", "BW", "SEND", "RECV")))
    listing = list(program.ranks[rank])
    listing.insert(position, listing[position])
    return edited(program, rank, listing)


def freed_early(program: Program, draw: random.Random) -> Program | None:
    """An activation is freed by the forward that makes it."""
    rank, position = draw.choice(places(program, lambda i: i.op == "F"))
    listing = list(program.ranks[rank])
    listing[position] = listing[position]._replace(frees=(listing[position].writes[0],))
    return edited(program, rank, listing)


MUTATIONS: dict[str, Mutation] = {
    "dropped send": dropping(lambda i: i.op == "SEND"),
    "dropped receive": dropping(lambda i: i.op == "RECV"),
    "dropped forward": dropping(lambda i: i.op == "F"),
    "dropped backward": dropping(lambda i: i.op == "BW"),
    "dropped collective": dropping(lambda i: i.op in ("ALL_REDUCE", "REDUCE_SCATTER", "ALL_GATHER", "TIE")),
    "dropped free": changing(
        lambda i: bool(i.frees) and i.op != "UNSHARD", lambda i, world: i._replace(frees=i.frees[:-1])
    ),
    "wrong peer": changing(lambda i: len(i.peers) > 1, another_peer),
    "wrong meeting": changing(
        lambda i: i.meet is not None and len(i.peers) > 1, lambda i, world: i._replace(meet="elsewhere")
    ),
    "wrong lane": changing(lambda i: len(i.peers) > 1, lambda i, world: i._replace(lane="elsewhere")),
    "swapped messages": swapped_messages,
    "backward before forward": backward_before_forward,
    "twice": twice,
    "freed early": freed_early,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutant_is_refused(name: str) -> None:
    draw, made = random.Random(name), 0
    for plan, program in PROGRAMS:
        for _ in range(3):
            mutant = MUTATIONS[name](program, draw)
            if mutant is None:
                continue
            made += 1
            for inline in (False, True):
                with pytest.raises(UsageError, match=r"rank \d|meeting"):
                    validate(mutant, inline)
                    pytest.fail(f"{name}: accepted for {plan.describe()}")
    assert made >= 30
