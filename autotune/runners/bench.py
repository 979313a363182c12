"""Times the operations of a body where they stand: in their order, on cold operands, several workers at once.

An operation repeated alone finds its operands in the cache; between its neighbours it does not. So the pieces that a
plan's bodies are made of are timed by running those bodies, with stand-ins for the collectives (which are measured by
themselves). No step is timed: what a step takes stays a prediction.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from autotune.planners.costs.works import works
from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.shape import Shape
from autotune.profiles_db.heap import keep_heap
from autotune.runners.body import Call, Values, compile_body
from autotune.runners.ops import Env
from autotune.runners.rope import tables
from autotune.runners.state import DTYPES, local_shape
from autotune.spec.graph import Block
from autotune.spec.machine import Sample
from autotune.spec.model import ModelSpec
from autotune.spec.work import Work

COPIES = 4  # sets of weights that take turns, so that they come cold as a model's layers do
ROUNDS, WARM = 12, 3


@dataclass(frozen=True)
class Piece:
    """One kind of block to time: as lowered for a training shape under a recompute policy."""

    block: Block
    shape: Shape
    policy: str


def _stand_in(op: str, tensor: int) -> Callable[[Tensor], Tensor]:
    """What a collective leaves behind, made locally."""
    if op == "all_gather":
        return lambda x: x.repeat(tensor, 1)
    if op == "reduce_scatter":
        return lambda x: x[: x.shape[0] // tensor].clone()
    return lambda x: x


@dataclass
class _Clock:
    """Stamps between calls: events on CUDA, so that the host does not wait; wall time on a CPU."""

    cuda: bool

    def stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        return float(a.elapsed_time(b)) * 1e-3 if self.cuda else float(b - a)


def _run(calls: tuple[Call, ...], env: Env, values: Values, clock: _Clock) -> list[Any]:
    """Runs a body and stamps before, between and after its calls."""
    stamps = [clock.stamp()]
    for call in calls:
        made: tuple[object, ...]
        if call.collective:
            made = (_stand_in(call.label, env.tensor_size)(values[call.reads[0]]),)
        else:
            made = call.run(env, None, tuple(values[name] for name in call.reads))
        for name, value in zip(call.writes, made, strict=True):
            values[name] = value  # type: ignore[assignment]
        made = ()
        for name in call.frees:
            del values[name]
        stamps.append(clock.stamp())
    return stamps


def time_piece(model: ModelSpec, piece: Piece, device: torch.device) -> dict[Work, float]:
    """Median seconds of every compute instruction of a body that is one piece of work."""
    block, shape = piece.block, piece.shape
    dtype = DTYPES[shape.dtype]
    main = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    body: Body = lower_block(block, shape, piece.policy)
    calls = compile_body(block, body.forward), compile_body(block, body.backward)
    clock = _Clock(device.type == "cuda")
    sets = []
    for _ in range(COPIES if block.kind == "layer" else 1):
        weights = {w.name: torch.randn(local_shape(w, shape.tensor), device=device).to(dtype) for w in block.weights()}
        grads = {name: torch.zeros_like(w, dtype=main) for name, w in weights.items()}
        sets.append((weights, grads))
    rope = tables(model, shape.queries, device)
    tokens = torch.randint(model.vocab, (shape.tokens,), device=device)
    source = block.nodes[0].reads[0]
    rows = shape.rows(shape.sequence_parallel and shape.tensor > 1)
    seen: dict[Work, list[float]] = defaultdict(list)
    for round_ in range(ROUNDS + WARM):
        weights, grads = sets[round_ % len(sets)]
        env = Env(
            model,
            shape.batch,
            shape.queries,
            torch.arange(shape.queries, device=device),
            rope,
            weights,
            grads,
            tensor_size=shape.tensor,
            all_reduce=lambda tensor, how: tensor,
            attention=shape.attention,
        )
        x = tokens if source == "tokens" else torch.randn(rows, model.hidden, device=device).to(dtype)
        values: Values = {source: x, "targets": tokens % max(1, model.vocab // shape.tensor)}
        stamps = [_run(calls[0], env, values, clock)]
        if body.output != "loss":
            values[f"d.{body.output}"] = values.pop(body.output)
        stamps.append(_run(calls[1], env, values, clock))
        if clock.cuda:
            torch.cuda.synchronize(device)
        if round_ < WARM:
            continue
        for program, marks in zip((body.forward, body.backward), stamps, strict=True):
            for i, instruction in enumerate(program.ranks[0]):
                # What an operation sends is left out when it runs here alone: the rest of it is what is timed.
                made = [work for work in works(block, body, instruction, shape) if work.kind != "collective"]
                if len(made) == 1:
                    seen[made[0]].append(clock.between(marks[i], marks[i + 1]))
    return {work: statistics.median(times) for work, times in seen.items()}


def _worker(rank: int, ranks: int, device: str, model: ModelSpec, pieces: Sequence[Piece], gate: Any, out: Any) -> None:
    where = torch.device(device)
    torch.set_grad_enabled(False)
    if where.type == "cpu":
        keep_heap()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    found: list[dict[Work, float]] = []
    for piece in pieces:
        gate.wait(120)
        found.append(time_piece(model, piece, where))
    out.put((rank, found))


def time_pieces(model: ModelSpec, pieces: Sequence[Piece], ranks: int, device: str) -> list[Sample]:
    """Samples of the operations of `pieces`, while `ranks` workers run the same at once (CUDA: one worker)."""
    ranks = 1 if device != "cpu" else ranks
    context = get_context("spawn")
    gate, out = context.Barrier(ranks), context.SimpleQueue()
    arguments = (ranks, device, model, tuple(pieces), gate, out)
    processes = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    answers: list[list[dict[Work, float]]] = []
    while len(answers) < ranks:
        if out.empty():
            if any(p.exitcode not in (None, 0) for p in processes):
                break
            time.sleep(0.02)
            continue
        answers.append(out.get()[1])
    for process in processes:
        process.join(10) if len(answers) == ranks else process.terminate()
    merged: dict[Work, list[float]] = defaultdict(list)
    for found in answers:
        for piece in found:
            for work, seconds in piece.items():
                merged[work].append(seconds)
    return [Sample(work, statistics.fmean(times), ranks, ROUNDS) for work, times in merged.items()]
