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
from dataclasses import replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from autotune.planners.decoding.strategies import tree_of
from autotune.planners.lower.generate import inference_body
from autotune.planners.lower.pages import NOWHERE, pages_of
from autotune.planners.lower.shape import Shape
from autotune.profiles_db.cores import all_cores, own_cores
from autotune.runners.at_once import at_once
from autotune.runners.bench import TRIM, VISITS, stand_in, trimmed
from autotune.runners.bench_parts import PassPiece, stages
from autotune.runners.body import Call, Values, compile_body
from autotune.runners.clock import Clock
from autotune.runners.ops import Env, KVCache
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.paged import PagedCache
from autotune.runners.rope import tables
from autotune.runners.rounded import random_weight
from autotune.runners.state import DTYPES, local_shape
from autotune.spec.errors import EnvironmentFault
from autotune.spec.graph import blocks
from autotune.spec.int8_graph import weight_bytes
from autotune.spec.machine import Sample
from autotune.spec.model import ModelSpec
from autotune.spec.work import Work

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
SHORTEST_S = 1e-7  # what noise makes of an operation that takes next to nothing


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
    leaves out again (the copies into the cache, which are also attention's) runs for its own time alone.

    What lies between two calls no such look sees, so layers run once more in every round with no clock inside: their
    calls share what these take longer in proportion. Heads, whose calls are long, do without.
    """
    whole = parts[-1][0]
    spent: dict[Work, list[float]] = defaultdict(list)
    longer: list[float] = []
    times = 1 if before else max(1, ROUNDS // len(layers))
    for number in range(WARM + REPLAYS * times):
        stamped = 0.0
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
                    at, within, stamped, seconds = at + 1, 0.0, stamped + seconds, seconds - within
                else:
                    within += seconds
                if number >= WARM:
                    for work in added:
                        spent[work].append(seconds / len(added))
        if before is None and number >= WARM:
            longer.append(_in_a_row(whole, layers, given) / stamped)
    share = statistics.median(longer or [1.0])
    return {work: max(SHORTEST_S, share * trimmed(each, TRIM["cpu"])) for work, each in spent.items()}


def _in_a_row(calls: tuple[Call, ...], layers: Sequence[Env], given: Values) -> float:
    """Seconds of these layers one after another."""
    begin = time.perf_counter()
    for env in layers:
        run_part(calls, env, dict(given))
    return time.perf_counter() - begin


def _visited(model: ModelSpec, pieces: Sequence[PassPiece], device: torch.device) -> dict[Work, float]:
    """Seconds of the operations of `pieces`, come back to as often as noise asks: the median of the visits; of an
    operation that several pieces have, the mean of theirs."""
    seen: list[dict[Work, list[float]]] = [defaultdict(list) for _ in pieces]
    for piece, visits in list(zip(pieces, seen, strict=True)) * VISITS[device.type]:
        for work, seconds in time_pass(model, piece, device).items():
            visits[work].append(seconds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    merged: dict[Work, list[float]] = defaultdict(list)
    for work, times in (one for visits in seen for one in visits.items()):
        merged[work].append(statistics.median(times))
    return {work: statistics.fmean(times) for work, times in merged.items()}


def _share(
    rank: int, ranks: int, cores: Sequence[int], model: ModelSpec, pieces: Sequence[PassPiece], out: Any
) -> None:
    """One of several processes that time the same at once."""
    torch.set_grad_enabled(False)
    own_cores(rank, ranks, cores)
    out.put(_visited(model, pieces, torch.device("cpu")))


def time_passes_together(model: ModelSpec, pieces: Sequence[PassPiece], ranks: int) -> list[Sample]:
    """Samples of the operations of `pieces` on this processor, timed by `ranks` processes at once that share it."""
    answers = at_once(_share, ranks, ranks, all_cores(), model, tuple(pieces))
    if len(answers) < ranks:
        raise EnvironmentFault("a process that times operations died", hint="--debug shows more")
    merged: dict[Work, list[float]] = defaultdict(list)
    for work, seconds in (one for answer in answers for one in answer.items()):
        merged[work].append(seconds)
    return [Sample(work, statistics.fmean(times), ranks, REPLAYS) for work, times in merged.items()]


def time_passes(model: ModelSpec, pieces: Sequence[PassPiece], place: str) -> list[Sample]:
    """Samples of the operations of `pieces` on the device called `place`."""
    found = _visited(model, pieces, torch.device(place))
    return [Sample(work, seconds, 1, REPLAYS) for work, seconds in found.items()]
