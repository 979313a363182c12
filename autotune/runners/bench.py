"""Times the operations of a body where they stand: in their order, on cold operands, several workers at once.

An operation repeated alone finds its operands in the cache; between its neighbours it does not. So the pieces that a
plan's bodies are made of are timed by running those bodies. On a CPU the workers form the plan's tensor groups, and
collectives are timed where they stand as well: between computations, on workers that are never quite in step (whoever
comes first waits, and waiting is part of what a collective takes). On accelerators collectives have stand-ins here and
are measured by themselves. No step is timed: what a step takes stays a prediction.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels.one_shot import all_reduce
from autotune.planners.costs.works import works
from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.shape import Shape, sight_columns
from autotune.profiles_db.cores import all_cores, own_cores
from autotune.profiles_db.probes.crew import Crew, join
from autotune.runners.at_once import at_once
from autotune.runners.bench_rounds import ROUNDS, Stamps, Untimed, held_rounds, hot_rounds
from autotune.runners.body import Call, Values, compile_body
from autotune.runners.clock import Clock
from autotune.runners.expert_layouts import per_expert
from autotune.runners.ops import Env
from autotune.runners.rope import tables
from autotune.runners.state import DTYPES, local_shape
from autotune.spec.graph import Block
from autotune.spec.machine import Sample
from autotune.spec.model import ModelSpec
from autotune.spec.program import CONTEXT, RING, TENSOR
from autotune.spec.work import Launch, Work

Works = tuple[Work, ...]
Known = Callable[[Work], float]  # seconds of a work, as far as a profile tells

# Times that every body is come back to: what else runs on a processor slows it for spells of seconds, and of visits
# that lie apart the median one is seldom in a spell.
VISITS = {"cpu": 3, "cuda": 1}
# Of the times of a visit at either end so many are left out. A step adds up means: on a processor, whose times have a
# long tail, it pays for all but rare hiccups. On a device the tail is the clock's.
TRIM = {"cpu": 0.1, "cuda": 0.25}
COPIES = 4  # sets of weights that follow one another as a model's layers do, so that everything comes cold
TRAIN = "train"  # what a `Launch` of one of a training body's instructions is called
GLOO_S = 60.0  # a collective that takes longer is stuck


@dataclass(frozen=True)
class Piece:
    """One kind of block to time: as lowered for a training shape under a recompute policy."""

    block: Block
    shape: Shape
    policy: str


def stand_in(op: str, tensor: int) -> Callable[[Tensor], Tensor]:
    """What a collective leaves behind, made locally."""
    if op == "all_gather":
        return lambda x: x.repeat(tensor, 1)
    if op == "reduce_scatter":
        return lambda x: x[: x.shape[0] // tensor].clone()
    return lambda x: x


def _as_it_goes(env: Env, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return operands


# Of what is not as large: what would come if all ranks were as this one.
AWAY: dict[str, Callable[[Env, tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "counts_to_all": lambda env, operands: (per_expert(operands[0], env.expert_size),)
}


def _run(calls: tuple[Call, ...], env: Env, values: Values, group: Any, clock: Clock) -> list[Any]:
    """Runs a body and stamps before, between and after its calls. Collectives are waited for where they are issued."""
    stamps = [clock.mark()]
    for call in calls:
        operands = tuple(values[name] for name in call.reads)
        if not call.collective:
            made = call.run(env, None, operands)
        elif call.lane != TENSOR:  # what is exchanged or passed on is as large as what comes
            made = AWAY.get(call.label, _as_it_goes)(env, operands)[: len(call.writes)]
        elif group is None:
            made = (stand_in(call.label, env.tensor_size)(operands[0]),)
        else:
            *made, work = call.run(env, group, operands)  # type: ignore[assignment]
            work.wait()  # type: ignore[attr-defined]
            del work
        values.update(zip(call.writes, made, strict=True))  # type: ignore[arg-type]
        made, operands = (), ()
        for name in call.frees:
            del values[name]
        stamps.append(clock.mark())
    return stamps


@dataclass
class _Copy:
    """One set of weights of a block, and what its forward left."""

    env: Env
    values: Values


def _copies(model: ModelSpec, piece: Piece, device: torch.device, group: Any) -> list[_Copy]:
    """The block's sets of weights, as they start out in training."""
    block, shape = piece.block, piece.shape
    dtype = DTYPES[shape.dtype]
    main = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    rope = tables(model, shape.queries, device)
    positions = torch.arange(shape.queries, device=device)
    sight = None
    if shape.masked:  # all pairs are computed, whoever sees whom
        sight = torch.zeros((shape.queries, sight_columns(shape.queries)), dtype=dtype, device=device)

    def reduce(tensor: Tensor, how: str) -> Tensor:
        if group is not None:
            all_reduce(tensor, group, how)
        return tensor

    made = []
    for _ in range(COPIES if block.kind == "layer" else 1):
        weights = {
            w.name: (0.02 * torch.randn(local_shape(w, shape.tensor), device=device)).to(dtype) for w in block.weights()
        }
        grads = {w.name: torch.zeros_like(weights[w.name], dtype=main) for w in block.trained()}
        weights |= {c.name: torch.zeros(c.shape, dtype=main, device=device) for c in block.constants()}
        env = Env(
            model,
            shape.batch,
            shape.queries,
            positions,
            rope,
            weights,
            grads,
            tensor_rank=dist.get_rank(group) if group is not None else 0,
            tensor_size=shape.tensor,
            context_size=shape.context // shape.ring,
            ring_size=shape.ring,
            expert_size=shape.expert,
            all_reduce=reduce,
            attention=shape.attention,
            sight=sight,
        )
        made.append(_Copy(env, {}))
    return made


@dataclass
class _Bench:
    """A body made ready: `chains` of copies, one of which is passed through in a round."""

    model: ModelSpec
    piece: Piece
    device: torch.device
    group: Any
    body: Body = field(init=False)
    clock: Clock = field(init=False)
    chains: list[list[_Copy]] = field(init=False)

    def __post_init__(self) -> None:
        block, shape = self.piece.block, self.piece.shape
        self.body, self.clock = lower_block(block, shape, self.piece.policy), Clock(self.device)
        self.calls = compile_body(block, self.body.forward), compile_body(block, self.body.backward)
        copies = _copies(self.model, self.piece, self.device, self.group)
        self.chains = [[copy] for copy in copies] if self.device.type == "cuda" else [copies]
        self.tokens = torch.randint(self.model.vocab, (shape.tokens,), device=self.device)

    def input(self) -> Tensor:
        """What the body's first block reads."""
        if self.piece.block.nodes[0].reads[0] == "tokens":
            return self.tokens
        shape = self.piece.shape
        rows = shape.rows(shape.sequence_parallel and shape.tensor > 1)
        return torch.randn(rows, self.model.hidden, device=self.device).to(DTYPES[shape.dtype])

    def round(self, number: int) -> Stamps:
        """Forwards through a chain, and backwards."""
        return self.through(self.chains[number % len(self.chains)], self.input(), self.clock)

    def through(self, chain: Sequence[_Copy], x: Tensor, clock: Clock) -> Stamps:
        source, body = self.piece.block.nodes[0].reads[0], self.body
        stamps: Stamps = []
        for copy in chain:
            copy.values = {source: x, "targets": self.tokens}
            stamps.append((body.forward, _run(self.calls[0], copy.env, copy.values, self.group, clock)))
            x = copy.values[body.output] if body.output == "loss" else copy.values.pop(body.output)
        gradient = torch.randn_like(x) if body.output != "loss" else None
        for copy in reversed(chain):
            if gradient is not None:
                copy.values[f"d.{body.output}"] = gradient
            gradient = None
            stamps.append((body.backward, _run(self.calls[1], copy.env, copy.values, self.group, clock)))
            gradient = copy.values.pop(body.gradient, None)
            copy.values = {}
        return stamps

    def seconds(self, rounds: Sequence[Stamps]) -> float:
        """From the first mark of the first round to the last of the last."""
        return self.clock.between(rounds[0][0][1][0], rounds[-1][-1][1][-1])

    def issuing(self) -> float:
        """Seconds that the host takes to hand one instruction over: the median round's, the device left to follow."""
        seconds = list[float]()
        for number in range(ROUNDS):
            x, chain = self.input(), self.chains[number % len(self.chains)]
            self.clock.settle()
            begin = time.perf_counter()
            stamps = self.through(chain, x, Untimed(self.device))
            seconds.append((time.perf_counter() - begin) / sum(len(program.ranks[0]) for program, _ in stamps))
        self.clock.settle()
        return statistics.median(seconds)

    def times(self, rounds: Sequence[Stamps]) -> dict[Works, list[float]]:
        """Seconds of every instruction that is work at all."""
        seen: dict[Works, list[float]] = defaultdict(list)
        for program, marks in (one for stamps in rounds for one in stamps):
            for i, instruction in enumerate(program.ranks[0]):
                # What an operation sends is left out when it runs here alone: the rest of it is what is timed.
                made = works(self.piece.block, self.body, instruction, self.piece.shape)
                if self.group is None or instruction.lane in (CONTEXT, RING):
                    made = tuple(work for work in made if work.kind != "collective")
                if made:
                    seen[made].append(self.clock.between(marks[i], marks[i + 1]))
        return seen


def time_piece(model: ModelSpec, piece: Piece, device: torch.device, group: Any = None) -> dict[Works, list[float]]:
    """Seconds of every instruction of a body in every round, by the works that it is; of a layer on an accelerator also
    what handing one of its instructions over takes the host. `group`: the tensor ranks, where they meet.

    On a CPU the copies of a block are passed forwards one after another and then backwards, as a stage's layers are;
    on accelerators, whose caches are small, one at a time, which takes less memory.
    """
    bench = _Bench(model, piece, device, group)
    rounds = hot_rounds(bench) if device.type == "cuda" else []
    found = bench.times(rounds or held_rounds(bench, VISITS[device.type]))
    if device.type == "cuda" and piece.block.kind == "layer":
        found[Launch(1, TRAIN),] = [bench.issuing()]
    return found


def told_apart(made: Works, seconds: float, known: Known | None) -> tuple[Work, float] | None:
    """Of an instruction that is several works, its product and what is left for it when the others take what is known
    of them (a narrow weight gradient is added to its wide sum). None where that cannot be said."""
    if len(made) == 1:
        return made[0], seconds
    products = [work for work in made if work.kind == "matmul"]
    if known is None or len(products) != 1:
        return None
    left = seconds - sum(known(work) for work in made if work is not products[0])
    return (products[0], left) if left > 0 else None


def trimmed(times: Sequence[float], share: float) -> float:
    """The mean of `times` without this share of them at either end."""
    cut = int(share * len(times))
    return statistics.fmean(sorted(times)[cut : len(times) - cut])


def _worker(
    rank: int,
    ranks: int,
    cores: Sequence[int],
    device: str,
    model: ModelSpec,
    pieces: Sequence[Piece],
    meet: str,
    out: Any,
) -> None:
    torch.set_grad_enabled(False)
    if device == "cpu":
        where = torch.device(device)
        own_cores(rank, ranks, cores)
        crew = join(device, rank, ranks, meet, GLOO_S) if ranks > 1 else Crew(device)
    else:  # each by itself on a device of its own
        where = torch.device(device, rank)
        torch.cuda.set_device(where)
        crew, ranks = Crew(device), 1
    seen: list[dict[Works, list[float]]] = [{} for _ in pieces]  # a figure a visit
    told: list[str] = []
    for piece, times in list(zip(pieces, seen, strict=True)) * VISITS[where.type]:
        group = crew.block(piece.shape.tensor) if 1 < piece.shape.tensor <= ranks else None
        crew.barrier()
        try:
            for made, more in time_piece(model, piece, where, group).items():
                times.setdefault(made, []).append(trimmed(more, TRIM[where.type]))
        except RuntimeError as error:  # out of memory, or a backend that refuses: the other bodies are still wanted
            if ranks > 1:  # the other workers would wait in its collectives
                raise
            shape, said = piece.shape, str(error).splitlines()[0]
            told.append(f"not timed: {piece.block.kind}, {shape.batch} x {shape.queries} {shape.attention}: {said}")
        if where.type == "cuda":
            torch.cuda.empty_cache()
    told = list(dict.fromkeys(told))  # once, however many visits
    out.put(
        (rank, [{made: statistics.median(every) for made, every in times.items()} for times in seen if times], told)
    )
    crew.barrier()
    if ranks > 1:
        dist.destroy_process_group()


def time_pieces(
    model: ModelSpec,
    pieces: Sequence[Piece],
    ranks: int,
    device: str,
    progress: Callable[[str], None] = lambda text: None,
    known: Known | None = None,
) -> list[Sample]:
    """Samples of the operations of `pieces`, while `ranks` workers run the same at once. `known`: see `told_apart`.

    On CUDA one worker runs them on each device, and the slowest device's count: devices of one kind differ by several
    percent, and whichever rank has the slowest sets the pace.
    """
    workers = ranks if device == "cpu" else torch.cuda.device_count()
    answers: dict[int, list[dict[Works, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="autotune-bench-") as folder:
        meet = (Path(folder) / "store").as_uri()
        for rank, answer, told in at_once(_worker, workers, workers, all_cores(), device, model, tuple(pieces), meet):
            answers[rank] = answer
            for line in told if rank == 0 else ():
                progress(line)
    counted = list(answers.values()) if device == "cpu" or not answers else [_slowest(answers, progress)]
    merged: dict[Work, list[float]] = defaultdict(list)
    for found in counted:
        for sample in (told_apart(made, seconds, known) for piece in found for made, seconds in piece.items()):
            if sample is not None:
                merged[sample[0]].append(sample[1])
    ranks = ranks if device == "cpu" else 1
    return [Sample(work, statistics.fmean(times), ranks, ROUNDS) for work, times in merged.items()]


def _slowest(
    answers: Mapping[int, Sequence[dict[Works, float]]], progress: Callable[[str], None]
) -> Sequence[dict[Works, float]]:
    """Of the devices that timed most, the one that took longest over all of it."""
    sums = {rank: (len(found), sum(sum(p.values()) for p in found)) for rank, found in answers.items()}
    slowest, fastest = max(sums, key=sums.__getitem__), min(sums, key=sums.__getitem__)
    if slowest != fastest:
        gap = sums[slowest][1] / sums[fastest][1] - 1
        progress(f"of {len(sums)} devices number {slowest} is the slowest, {gap:.1%} behind number {fastest}")
    return answers[slowest]
