"""Times the operations of a generation's bodies where they stand: as they run, on cold weights, layer after layer.

A captured pass runs without the host, and most of its kernels are too short for a clock between them. So each body is
captured up to its first operation, its second, and so on: what one more operation adds is what it takes there. On a CPU
nothing is captured, and a clock between the operations tells.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from autotune.planners.costs.between import between
from autotune.planners.costs.works import works
from autotune.planners.decoding.strategies import tree_of
from autotune.planners.lower.body import Body
from autotune.planners.lower.generate import inference_body
from autotune.planners.lower.pages import NOWHERE, pages_of
from autotune.planners.lower.shape import Shape
from autotune.profiles_db.cores import all_cores, own_cores
from autotune.runners.at_once import at_once
from autotune.runners.bench import TRIM, stand_in, trimmed
from autotune.runners.body import Call, Values, compile_body
from autotune.runners.clock import Clock
from autotune.runners.decoding.commit import Levels, match
from autotune.runners.decoding.lookahead import Lookahead
from autotune.runners.decoding.ngram import lookup
from autotune.runners.decoding.seen import Seen
from autotune.runners.decoding.sequences import Sequences
from autotune.runners.decoding.settle import settle
from autotune.runners.ops import Env, KVCache
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.paged import PagedCache
from autotune.runners.rope import tables
from autotune.runners.rounded import random_weight
from autotune.runners.sampling import drawn, likeliest
from autotune.runners.state import DTYPES, local_shape
from autotune.spec.errors import EnvironmentFault
from autotune.spec.graph import Block, blocks
from autotune.spec.int8_graph import weight_bytes
from autotune.spec.machine import Sample
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import COMPUTE
from autotune.spec.work import PAGES, Memory, Work
from autotune.spec.workload import Workload

COLD_BYTES = 256 * 2**20  # of weights that follow one another, so that none is left in a cache when it comes again
COPIES = 4, 32  # at least, so that what starting a graph takes is spread, and at most
REPLAYS, WARM = 11, 2
ROUNDS = 12  # on a CPU: layers that a replay is worth
# A prefill is a burst after tokens that leave the processors idle. A short one runs at the device's highest clock, one
# of a fifth of a second at what its power limit allows: layers are timed in bursts as long as the pass, with rests.
RESTS, LONGEST_REST_S = 3.0, 0.05
LONGEST_BURST_S, FEWEST, ENOUGH_S = 0.2, 2, 0.4
HANDOVER_S = 2e-3  # graphs as long follow one another with no gap that counts
LAUNCHED_S = 3e-4  # the host has handed a graph over
ROOM = 4  # columns of a text that is given one token
SHORTEST_S = 1e-7  # what noise makes of an operation that takes next to nothing


@dataclass(frozen=True)
class PassPiece:
    """One kind of block to time, in a pass over shape.queries new tokens that attend to shape.keys. `round`: the plan
    whose tokens are proposed, where a head is followed by what that takes; `columns`: of a sequence's text then."""

    block: Block
    shape: Shape
    columns: int = 0
    round: Plan | None = None


def layers_of(model: ModelSpec, piece: PassPiece, device: torch.device) -> list[Env]:
    """The block several times over, each with its own weights and its own part of a cache."""
    block, shape = piece.block, piece.shape
    dtype = DTYPES[shape.dtype]
    sides = [local_shape(weight, shape.tensor) for weight in block.weights()]
    own = list(zip(block.weights(), sides, strict=True))
    size = sum(prod(side) * weight_bytes(weight, dtype.itemsize) for weight, side in own)
    many = min(COPIES[1], max(COPIES[0], -(-COLD_BYTES // max(1, size))))
    if device.type == "cpu":  # as many as follow one another there
        many = min(many, max(1, model.layers))  # heads have none
    cache = _cache(model, many, shape, device)
    lengths, start = None, shape.keys - shape.queries
    if start and (device.type == "cuda" or shape.masked):
        tree = tree_of(piece.round) if piece.round and shape.masked else None
        lengths = Lengths.empty(shape.batch, shape.queries, cache.max_len, device, tree)
        lengths.move(torch.full((shape.batch,), start, device=device))
    env = Env(
        model,
        shape.batch,
        shape.queries,
        lengths.positions if lengths else torch.arange(start, shape.keys, device=device),
        tables(model, shape.keys, device),
        {},
        tensor_size=shape.tensor,
        all_reduce=lambda tensor, how: tensor,
        attention=shape.attention,
        cache=cache,
        start=0 if device.type == "cuda" and lengths else start,
        lengths=lengths,
    )
    made, weights = [], {}
    for layer in range(many):
        if not layer or block.kind == "layer":  # a model has one head, and it is large
            weights = {weight.name: random_weight(weight, side, dtype, device) for weight, side in own}
            weights |= {c.name: torch.zeros(c.shape, device=device) for c in block.constants()}
        made.append(replace(env, layer=layer, weights=weights))
    return made


def _cache(model: ModelSpec, layers: int, shape: Shape, device: torch.device) -> KVCache:
    """As many positions as the pass sees and one more, so that sequences lie apart as they do where more tokens are to
    come; pages in the order in which a pool hands them out."""
    kind: dict[str, Any] = {"tensor_size": shape.tensor, "dtype": DTYPES[shape.dtype], "device": device}
    if not shape.page:
        return KVCache.empty(model, layers, shape.batch, shape.keys + 1, **kind)
    each = pages_of(shape.keys, shape.page)
    pages = NOWHERE + shape.batch * each
    cache = PagedCache.of_pages(model, layers, pages, shape.page, (shape.batch, each), **kind)
    cache.assign((shape.keys,) * shape.batch)
    return cache


def run_part(calls: tuple[Call, ...], env: Env, values: Values) -> None:
    for call in calls:
        operands = tuple(values[name] for name in call.reads)
        made = (
            (stand_in(call.label, env.tensor_size)(operands[0]),) if call.collective else call.run(env, None, operands)
        )
        values.update(zip(call.writes, made, strict=True))  # type: ignore[arg-type]
        made, operands = (), ()
        for name in call.frees:
            del values[name]


def _captured(calls: tuple[Call, ...], layers: Sequence[Env], given: Values) -> Any:
    """A graph that runs the calls on all of these layers, one after another."""
    run_part(calls, layers[0], dict(given))  # what is compiled when it first runs
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for env in layers:
            run_part(calls, env, dict(given))
    return graph


def _replayed(graph: Any, clock: Clock, in_a_row: int = 1) -> float:
    """Median seconds of a replay. `in_a_row`: how many a pass is worth, which follow one another if they are long."""
    rounds, most, rest, spent = 1, WARM + REPLAYS, True, list[float]()
    while len(spent) < most:
        if spent and rest:
            time.sleep(min(LONGEST_REST_S, RESTS * rounds * spent[-1]))
        clock.hold(LAUNCHED_S)
        begin = clock.mark()
        for _ in range(rounds):
            graph.replay()
        end = clock.mark()
        clock.settle()
        spent.append(clock.between(begin, end) / rounds)
        if len(spent) == WARM and spent[-1] > HANDOVER_S:
            rounds = max(1, min(in_a_row, int(LONGEST_BURST_S / spent[-1])))
            rest = rounds == in_a_row  # a longer pass keeps the device at its limit from one burst to the next
            most = WARM + max(FEWEST, min(REPLAYS, ceil(ENOUGH_S / (rounds * spent[-1]))))
    return statistics.median(spent[WARM:])


def _started(calls: tuple[Call, ...], layers: Sequence[Env], given: Values, clock: Clock) -> float:
    """Seconds before a graph's first kernel: what one of twice the layers does not take twice."""
    once, twice = (_replayed(_captured(calls, [*layers] * times, given), clock) for times in (1, 2))
    return max(0.0, 2 * once - twice)


def _append(env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What attention does first in a pass: its keys and values into the cache."""
    assert env.cache is not None
    keys, values = (x.view(env.batch, env.sequence, -1, env.model.head_dim).transpose(1, 2) for x in reads[1:])
    if env.lengths is not None:
        env.cache.append_at(env.layer, keys, values, env.lengths.places)
    else:
        env.cache.append(env.layer, keys, values, env.start)
    return ()


def _gather(env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What attention does next where its keys and values lie in pages that no kernel of it knows of."""
    assert env.cache is not None
    if env.lengths is not None and env.start == 0:
        env.cache.flat(env.layer)
    else:
        env.cache.view(env.layer, 0, env.start + env.sequence)
    return ()


def _pick(env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What follows the head: the likeliest token of each sequence, and where it goes."""
    _, token = likeliest(reads[0])
    return token.clone(), token[:, None].clone()


def _sample(workload: Workload, env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """The same of a drawn token."""
    token = drawn(reads[0], reads[0].new_full(reads[0].shape[:1], 0.5), workload)
    return token.clone(), token[:, None].clone()


CHOICES: dict[str, Callable[..., tuple[object, ...]]] = {
    "pick": _pick,
    "sample": partial(_sample, Workload("generate", temperature=1.0)),
    "sample_cut": partial(_sample, Workload("generate", temperature=1.0, top_k=40, top_p=0.95)),
}


@lru_cache(maxsize=4)
def _texts(batch: int, columns: int, device: torch.device) -> Sequences:
    return Sequences.empty(batch, columns, columns, device)


def _commit(piece: PassPiece, env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What a round does with the tokens that were picked: which proposals are kept, and the texts with them."""
    assert piece.round is not None
    choices = reads[0].view(piece.shape.batch, -1)
    texts, levels = _texts(piece.shape.batch, piece.columns, choices.device), _levels(piece.round, choices.device)
    slate, depth, first = choices.clone(), 1 + piece.round.speculate, False
    lengths = env.lengths or _next(piece, choices.device)
    if levels:
        settle(texts, lengths, 1, depth, first, match(levels, slate, choices), token=slate)
    else:
        settle(texts, lengths, 1, depth, first, None, choices, slate, slate)
    for tensor in (texts.filled, texts.round):  # the same again next time
        tensor.zero_()
    return (slate,)


def _settle(piece: PassPiece, env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    """The same of a token that nobody proposed."""
    choices = reads[0].view(piece.shape.batch, 1)
    texts = _texts(piece.shape.batch, ROOM, choices.device)
    settle(texts, env.lengths or _next(piece, choices.device), 1, 1, False, None, choices, None, choices)
    for tensor in (texts.filled, texts.round):  # the same again next time
        tensor.zero_()
    return (choices,)


@lru_cache(maxsize=4)
def _next(piece: PassPiece, device: torch.device) -> Lengths:
    return Lengths.empty(piece.shape.batch, piece.shape.scored, 1, device)


@lru_cache(maxsize=8)
def _levels(plan: Plan, device: torch.device) -> Levels | None:
    tree = tree_of(plan)
    return None if tree.chain else Levels.of(tree, device, plan.speculate * plan.branches)


def _lookup(piece: PassPiece, env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    texts = _texts(piece.shape.batch, piece.columns, reads[0].device)
    return (lookup(texts.text, texts.filled, piece.shape.scored, 1, 1),)


@lru_cache(maxsize=2)
def _window(plan: Plan, model: ModelSpec, batch: int, device: torch.device) -> Lookahead:
    return Lookahead.build(plan, model, batch, device)


def _pool(piece: PassPiece, env: Env, group: Any, reads: tuple[Tensor, ...]) -> tuple[object, ...]:
    assert piece.round is not None
    choices = reads[0].view(piece.shape.batch, -1)
    texts = _texts(piece.shape.batch, piece.columns, choices.device)
    window = _window(piece.round, env.model, piece.shape.batch, choices.device)
    return (window.propose(Seen(texts, choices, 1, False, choices, choices)),)


# What lies between a round's choice and the next round: see planners.costs.between.
BETWEEN: dict[str, Callable[..., tuple[object, ...]]] = {
    "settle": _settle,
    "commit": _commit,
    "lookup": _lookup,
    "pool": _pool,
}


def stages(body: Body, calls: tuple[Call, ...], piece: PassPiece) -> list[tuple[tuple[Call, ...], tuple[Work, ...]]]:
    """Longer and longer parts of a pass, and the work that each adds to the one before: one piece, or the same piece
    several times over. Nothing where an instruction is several pieces, which no clock tells apart."""
    block, shape = piece.block, piece.shape
    found: list[tuple[tuple[Call, ...], tuple[Work, ...]]] = []
    for many, instruction in enumerate(body.forward.ranks[0]):
        call = calls[many]
        made = [work for work in works(block, body, instruction, shape) if work.kind != "collective"]
        if instruction.op == "attention":
            copies = Call(_append, call.reads, (), (), call.reads, COMPUTE, "append")
            each = Memory("append", 2 * body.sizes[call.reads[1]], shape.dtype)  # keys are as large as values
            before = (*calls[:many], copies)
            found.append((before, (each, each)))
            for work in [work for work in made if isinstance(work, Memory) and work.op == PAGES]:
                made.remove(work)
                found.append(((*before, Call(_gather, call.reads, (), (), call.reads, COMPUTE, PAGES)), (work,)))
        found.append((calls[: many + 1], tuple(made) if len(made) == 1 and not call.collective else ()))
    if block.kind == "head":
        follows = between(piece.round or Plan(), shape.batch, piece.columns, shape.dtype)
        if piece.round is None and shape.scored > 1:  # of a draft, after whose passes nothing is settled
            follows = {}
        for name, run in CHOICES.items():  # each adds to what came before it
            calls = (*calls, Call(run, (body.output,), (f"{name}ed", "column"), (), (), COMPUTE, name))
            found.append((calls, (Memory(name, body.sizes[body.output], shape.dtype),)))
            if name == "pick":  # and at once what follows a choice: after further ones it would find its code at hand
                for also, work in follows.items():
                    reads, ran = ("picked",), partial(BETWEEN[also], piece)
                    calls = (*calls, Call(ran, reads, (also,), (), (), COMPUTE, also))
                    found.append((calls, (work,)))
    return found


@torch.no_grad()
def time_pass(model: ModelSpec, piece: PassPiece, device: torch.device) -> dict[Work, float]:
    """Seconds of every instruction of a pass's body that is one piece of work; collectives have stand-ins."""
    block, shape = piece.block, piece.shape
    body = inference_body(block, shape)
    layers, clock = layers_of(model, piece, device), Clock(device)
    source = block.nodes[0].reads[0]
    x: Tensor = torch.randint(model.vocab, (shape.tokens,), device=device)
    if source != "tokens":
        x = torch.randn(shape.tokens, model.hidden, device=device).to(DTYPES[shape.dtype])
    found: dict[Work, list[float]] = defaultdict(list)
    if device.type == "cpu":
        parts, given = stages(body, compile_body(block, body.forward), piece), {source: x}
        if block.kind == "layer":
            return _stamped(parts, layers, given)
        return _stamped(parts, layers[:2], given, _layers_before(model, shape, device))
    parts, given = stages(body, compile_body(block, body.forward), piece), {source: x}
    passes = max(1, model.layers // len(layers)) if block.kind == "layer" else 1
    before = _started(parts[0][0], layers, given, clock)
    for calls, added in parts:
        after = _replayed(_captured(calls, layers, given), clock, passes)
        for work in added:
            found[work].append((after - before) / len(layers) / len(added))
        before = after
    return {work: max(SHORTEST_S, statistics.fmean(times)) for work, times in found.items()}


def _layers_before(model: ModelSpec, shape: Shape, device: torch.device) -> Callable[[], None]:
    """Runs layers of the model, as they run between an embedding and a head: of what these need, code and data, a
    processor has nothing at hand when their turn comes."""
    block = next((block for block in blocks(model) if block.kind == "layer"), None)
    if block is None:  # heads alone
        return lambda: None
    alike = replace(shape, masked=False, page=0)
    body = inference_body(block, alike)
    calls, layers = compile_body(block, body.forward), layers_of(model, PassPiece(block, alike), device)
    given = {block.nodes[0].reads[0]: torch.randn(alike.tokens, model.hidden).to(DTYPES[shape.dtype])}

    def run() -> None:
        for env in layers:
            run_part(calls, env, dict(given))

    return run


def _stamped(
    parts: list[tuple[tuple[Call, ...], tuple[Work, ...]]],
    layers: list[Env],
    given: Values,
    before: Callable[[], None] | None = None,
) -> dict[Work, float]:
    """The same on a CPU: each round runs all layers, and looks at the clock after every call. A call that a longer part
    leaves out again (the copies into the cache, which are also attention's) runs for its own time alone."""
    whole = parts[-1][0]
    spent: dict[Work, list[float]] = defaultdict(list)
    times = 1 if before else max(1, ROUNDS // len(layers))
    for number in range(WARM + REPLAYS * times):
        for env in layers:
            if before is not None:
                before()
            values, at, within = dict(given), 0, 0.0  # `within`: what the next call does too
            for calls, added in parts:
                call = calls[-1]
                stays = at < len(whole) and call is whole[at]
                reads = values if stays else {name: values[name] for name in call.reads}
                begin = time.perf_counter()
                run_part((call,), env, reads)
                seconds = time.perf_counter() - begin
                if stays:
                    at, within, seconds = at + 1, 0.0, seconds - within
                else:
                    within += seconds
                if number >= WARM:
                    for work in added:
                        spent[work].append(seconds / len(added))
    return {work: max(SHORTEST_S, trimmed(each, TRIM["cpu"])) for work, each in spent.items()}


def _share(
    rank: int, ranks: int, cores: Sequence[int], model: ModelSpec, pieces: Sequence[PassPiece], out: Any
) -> None:
    """One of several processes that time the same at once."""
    torch.set_grad_enabled(False)
    own_cores(rank, ranks, cores)
    out.put([time_pass(model, piece, torch.device("cpu")) for piece in pieces])


def time_passes_together(model: ModelSpec, pieces: Sequence[PassPiece], ranks: int) -> list[Sample]:
    """Samples of the operations of `pieces` on this processor, timed by `ranks` processes at once that share it."""
    answers = at_once(_share, ranks, ranks, all_cores(), model, tuple(pieces))
    if len(answers) < ranks:
        raise EnvironmentFault("a process that times operations died", hint="--debug shows more")
    merged: dict[Work, list[float]] = defaultdict(list)
    for work, seconds in (one for answer in answers for found in answer for one in found.items()):
        merged[work].append(seconds)
    return [Sample(work, statistics.fmean(times), ranks, REPLAYS) for work, times in merged.items()]


def time_passes(model: ModelSpec, pieces: Sequence[PassPiece], place: str) -> list[Sample]:
    """Samples of the operations of `pieces` on the device called `place`; of one that several have, the mean."""
    device = torch.device(place)
    merged: dict[Work, list[float]] = defaultdict(list)
    for piece in pieces:
        for work, seconds in time_pass(model, piece, device).items():
            merged[work].append(seconds)
        torch.cuda.empty_cache()
    return [Sample(work, statistics.fmean(times), 1, REPLAYS) for work, times in merged.items()]
