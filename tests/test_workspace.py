"""What operations take inside themselves, rule by rule, against every allocation that torch's profiler records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.workspace import Site, workspace
from autotune.runners.body import compile_body
from autotune.runners.ops import Env
from autotune.runners.rope import tables
from autotune.runners.state import DTYPES, local_shape
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec

MODELS = {
    "llama": ModelSpec("llama", "LlamaForCausalLM", 128, 2, 4, 2, 32, 384, 512),
    "qwen": ModelSpec("qwen", "Qwen3ForCausalLM", 96, 2, 6, 2, 32, 256, 512, qkv_bias=True, qk_norm=True),
    "mistral": ModelSpec("mistral", "MistralForCausalLM", 128, 2, 4, 2, 32, 384, 512, window=100),
}
SLACK = 64  # bytes of scalars that torch makes on the way


class Seen(NamedTuple):
    """One instruction as it ran: bytes above its writes at its peak, and what the rule says."""

    kind: str
    op: str
    found: int
    said: int
    made: int


def inside(run: Callable[[], object]) -> tuple[object, int, int]:
    """(what `run` made, bytes it left, bytes at its peak), by every allocation recorded."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        made = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return made, now, peak


def instructions(model: ModelSpec, shape: Shape) -> Iterator[Seen]:
    """Every compute instruction of an embedding, a layer and a head; collectives have local stand-ins."""
    site = Site("cpu", torch.get_num_threads())
    dtype = DTYPES[shape.dtype]
    main = torch.float32 if shape.width < 4 else dtype
    rope = tables(model, shape.queries, torch.device("cpu"))
    for block in (blocks(model)[0], blocks(model)[1], blocks(model)[-1]):
        body = lower_block(block, shape)
        weights = {w.name: torch.randn(local_shape(w, shape.tensor)).to(dtype) for w in block.weights()}
        grads = {name: torch.zeros_like(w, dtype=main) for name, w in weights.items()}
        env = Env(
            model,
            shape.batch,
            shape.queries,
            torch.arange(shape.queries),
            rope,
            weights,
            grads,
            tensor_size=shape.tensor,
            all_reduce=lambda tensor, how: tensor,
            attention=shape.attention,
        )
        source = block.nodes[0].reads[0]
        tokens = torch.randint(model.vocab, (shape.tokens,))
        rows = shape.rows(shape.sequence_parallel and shape.tensor > 1)
        x = tokens if source == "tokens" else torch.randn(rows, model.hidden).to(dtype)
        values = {source: x, "targets": tokens % (model.vocab // shape.tensor)}
        for program in (body.forward, body.backward):
            for call, instruction in zip(compile_body(block, program), program.ranks[0], strict=True):
                operands = tuple(values[name] for name in call.reads)
                if call.collective:
                    size = body.sizes[instruction.writes[0]] // shape.width // operands[0].shape[1]
                    made: object = (operands[0].repeat(shape.tensor, 1)[:size].clone(),)
                else:
                    made, left, peak = inside(lambda c=call, e=env, o=operands: c.run(e, None, o))
                    said = workspace(block, instruction, shape, body.sizes, site)
                    yield Seen(block.kind, call.label, peak - left, said, left)
                for name, value in zip(call.writes, made, strict=True):  # type: ignore[call-overload]
                    values[name] = value
                for name in call.frees:
                    del values[name]
            if program is body.forward and body.output != "loss":
                values[f"d.{body.output}"] = values.pop(body.output)


SHAPES = [
    (name, Shape(batch, queries, queries, tensor, split, dtype, attention))
    for name, (batch, queries), (tensor, split), dtype, attention in product(
        MODELS, ((2, 256), (3, 64)), ((1, False), (2, False), (2, True)), ("fp32", "fp64"), ("sdpa", "math")
    )
]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=lambda x: x if isinstance(x, str) else "")
def test_rules_equal_the_allocator(name: str, shape: Shape) -> None:
    """In fp32 and fp64 to a few scalars; attention by formulas within 3 %, and a mask within 3 times itself."""
    with torch.no_grad():
        for seen in instructions(MODELS[name], shape):
            if seen.op == "attention.dgrad" or seen.op == "attention":
                mask = shape.queries * shape.keys * 4 if MODELS[name].window else 0
                loose = 0.03 * (seen.said + seen.made) if shape.attention == "math" else mask
                assert seen.found == pytest.approx(seen.said, abs=SLACK + loose), (seen, shape)
            else:
                assert seen.found == pytest.approx(seen.said, abs=SLACK), (seen, shape)
