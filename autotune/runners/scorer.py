"""One rank's part of a model over a cache: new tokens in, the next stage's input or logits out.

A pass has a shape of its own (a prompt, one token, a round's proposals) and a list of calls; weights and cache are the
same for all passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autotune.planners.decoding.trees import Tree
from autotune.planners.lower.generate import ENDS, inference_body
from autotune.planners.lower.pages import pages_of
from autotune.planners.lower.shape import Shape
from autotune.runners.body import ALONE, Call, Groups, Values, Watch, compile_body, run_body
from autotune.runners.mesh import Mesh, staged
from autotune.runners.ops import Env, KVCache
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.paged import PagedCache
from autotune.runners.rope import tables
from autotune.runners.rounded import Rounded
from autotune.runners.state import DTYPES, Loader, StageState
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan


class Step(NamedTuple):
    """One block of a pass, resolved. `env` lacks only where the step starts, where the host knows that."""

    block: Block
    calls: tuple[Call, ...]
    env: Env
    source: str  # what the body calls its input
    output: str


@dataclass(frozen=True)
class Pass:
    """One kind of step: its shape, the blocks of this stage, and where its new tokens go (None: a prompt's)."""

    shape: Shape
    steps: tuple[Step, ...]
    lengths: Lengths | None


@dataclass
class Scorer:
    """`device_knows`: passes are captured, and only the device knows how much of the cache is filled."""

    model: ModelSpec
    state: StageState
    rounded: Rounded
    cache: KVCache
    rope: tuple[Tensor, Tensor]
    attention: str
    device_knows: bool
    tensor_rank: int = 0
    tensor_size: int = 1
    all_reduce: Callable[[Tensor, str], Tensor] | None = None
    groups: Groups = field(default_factory=lambda: ALONE)

    @classmethod
    def build(
        cls,
        model: ModelSpec,
        blocks: tuple[Block, ...],
        load: Loader,
        room: tuple[int, int],
        plan: Plan,
        precision: str,
        device: torch.device,
        mesh: Mesh | None = None,
        page: int = 0,
        pages: int = 0,
    ) -> Scorer:
        """These blocks of a model, with a cache for `room`, (sequences, positions); shared by the tensor ranks of
        `mesh`, or whole without it. `pages`: the cache is a pool of so many, of `page` positions each."""
        size = plan.tensor if mesh else 1
        reduce = mesh.all_reduce if mesh else None
        where: dict[str, Any] = {"precision": precision, "tensor_size": size, "device": device}
        state = StageState.untrained(blocks, load, **where)
        rounded = Rounded.build(blocks, load, **where, reduce=reduce)
        layers = sum(block.kind == "layer" for block in blocks)
        dtype = DTYPES[precision]
        kind: dict[str, Any] = {"tensor_size": size, "dtype": dtype, "device": device}
        if pages:
            table = room[0], pages_of(room[1], page)
            cache: KVCache = PagedCache.of_pages(model, layers, pages, page, table, **kind)
        else:
            cache = KVCache.empty(model, layers, *room, **kind)
        # A pass is captured, unless the messages inside it go through the host.
        captures = device.type == "cuda" and (plan.tensor == 1 or not staged(device))
        scorer = cls(model, state, rounded, cache, tables(model, room[1], device), plan.attention, captures)
        if mesh:
            scorer.tensor_rank, scorer.tensor_size = mesh.tensor, size
            scorer.all_reduce, scorer.groups = mesh.all_reduce, mesh.axes
        return scorer

    @property
    def weights(self) -> Tensor | tuple[Tensor, ...]:
        """All that is held of weights."""
        return (self.state.weight, *self.rounded[:2]) if len(self.rounded.weight) else self.state.weight

    @property
    def device(self) -> torch.device:
        return self.cache.k.device

    def compile(self, shape: Shape, tree: Tree | None = None) -> Pass:
        """The pass of a shape. `tree`: what its new tokens are, where they do not follow one another."""
        lengths, positions = None, torch.arange(shape.queries, device=self.device)
        if shape.keys > shape.queries:
            lengths = Lengths.empty(shape.batch, shape.queries, self.cache.max_len, self.device, tree)
            positions = lengths.positions
        env = Env(
            self.model,
            shape.batch,
            shape.queries,
            positions,
            self.rope,
            {},
            tensor_rank=self.tensor_rank,
            tensor_size=self.tensor_size,
            all_reduce=self.all_reduce,
            attention=self.attention,
            cache=self.cache,
            lengths=lengths,
        )
        steps, layer = [], 0
        for block in self.state.blocks:
            body = inference_body(block, shape)
            own = replace(env, weights=self.state.of(block)[0] | self.rounded.of(block), layer=layer)
            steps.append(Step(block, compile_body(block, body.forward), own, block.nodes[0].reads[0], body.output))
            layer += block.kind == "layer"
        return Pass(shape, tuple(steps), lengths)

    def run(
        self,
        now: Pass,
        x: Tensor,
        rows: Tensor | None = None,
        filled: tuple[int, ...] = (),
        watch: list[tuple[Block, Shape, Watch]] | None = None,
        left: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """x, tokens [batch * new] or activations [batch * new, hidden], through the blocks. `rows`, int64 [batch]:
        those that the head sees, all without it. `filled`: positions of each sequence's cache that are, where the host
        knows. `left`: gets what a final norm gives that is a block by itself, under that block's kind."""
        begins = self._begins(now, filled)
        for step in now.steps:
            if step.block.kind in ENDS and rows is not None:
                x, rows = x.index_select(0, rows), None
            x = self._run(now, step, x, begins, watch)
            if left is not None and step.block.kind == "norm":
                left["norm"] = x
        return x

    def _begins(self, now: Pass, filled: tuple[int, ...]) -> dict[str, Any]:
        """What every block is told of where its new tokens begin, where the host knows."""
        if now.lengths is None or self.device_knows:
            return {}
        if len(set(filled)) == 1 and now.lengths.visible is None:  # all alike: only what is filled is read
            return {"start": filled[0], "positions": now.lengths.positions[: now.shape.queries], "lengths": None}
        return {"start": max(filled)}

    def _run(
        self,
        now: Pass,
        step: Step,
        x: Tensor,
        begins: dict[str, Any],
        watch: list[tuple[Block, Shape, Watch]] | None,
    ) -> Tensor:
        """One block's body; a function of its own, so that nothing it made outlives it but its output."""
        seen = None
        if watch is not None:
            seen = Watch(outside=frozenset({step.source}))
            watch.append((step.block, now.shape, seen))
        given: Values = {step.source: x}
        env = step.env.altered(**begins) if begins else step.env
        return run_body(step.calls, env, given, self.groups, seen)[step.output]
