"""What is timed of a generation's pass: longer and longer parts of a block's body, and what lies between two passes.

How it is timed is in bench_pass.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from autotune.planners.costs.between import between
from autotune.planners.costs.works import works
from autotune.planners.decoding.strategies import tree_of
from autotune.planners.lower.body import Body
from autotune.planners.lower.shape import Shape
from autotune.runners.body import Call
from autotune.runners.decoding.commit import Levels, match
from autotune.runners.decoding.lookahead import Lookahead
from autotune.runners.decoding.ngram import lookup
from autotune.runners.decoding.seen import Seen
from autotune.runners.decoding.sequences import Sequences
from autotune.runners.decoding.settle import settle
from autotune.runners.ops import Env
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.sampling import drawn, likeliest
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import COMPUTE
from autotune.spec.work import PAGES, Memory, Work
from autotune.spec.workload import Workload

ROOM = 4  # columns of a text that is given one token


@dataclass(frozen=True)
class PassPiece:
    """One kind of block to time, in a pass over shape.queries new tokens that attend to shape.keys. `round`: the plan
    whose tokens are proposed, where a head is followed by what that takes; `columns`: of a sequence's text then."""

    block: Block
    shape: Shape
    columns: int = 0
    round: Plan | None = None


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
        for call, work in _after(piece, body):
            calls = (*calls, call)
            found.append((calls, (work,)))
    return found


def _after(piece: PassPiece, body: Body) -> Iterator[tuple[Call, Memory]]:
    """What may follow a head: the likeliest token, and at once what its round does then, which after further choices
    would find its code at hand; then other ways to choose. A draft's pass, which scores several tokens and has no round
    of its own, settles nothing."""
    shape, logits = piece.shape, body.output

    def choice(name: str) -> tuple[Call, Memory]:
        call = Call(CHOICES[name], (logits,), (f"{name}ed", "column"), (), (), COMPUTE, name)
        return call, Memory(name, body.sizes[logits], shape.dtype)

    first, *others = CHOICES
    yield choice(first)
    if piece.round is not None or shape.scored == 1:
        for name, work in between(piece.round or Plan(), shape.batch, piece.columns, shape.dtype).items():
            yield Call(partial(BETWEEN[name], piece), ("picked",), (name,), (), (), COMPUTE, name), work
    yield from map(choice, others)
