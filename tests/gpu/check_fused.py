"""The kernels that join a decoded token's operations, on a device: right, how fast, and with which tiles.

    python tests/gpu/check_fused.py [--model meta-llama--Llama-3.1-8B] [--tokens 1] [--weights int8] [--page 64]
        [--sweep]

Each run of operations of the model's layer and head is computed by its kernel and by the operations one after another,
in bf16, and compared with the latter in fp64 (fp32 where a library has nothing wider). Times are of a CUDA graph of
calls whose weights together do not fit the device's cache, medians of several replays. Not collected by pytest; exits
with 6 when an error is over its bound.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from autotune.kernels import ahead, decode, matvec, rotary
from autotune.planners.feasible import PAGES
from autotune.planners.lower.fuse import JOIN, nodes_of
from autotune.planners.lower.generate import inference_body
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import FORMS
from autotune.runners import rope
from autotune.runners.ops import Env, KVCache, fused
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.paged import PagedCache
from autotune.runners.rounded import random_weight
from autotune.spec.families import load_model
from autotune.spec.graph import Block, Node, Weight, blocks
from autotune.spec.int8_graph import weight_bytes
from autotune.spec.model import ModelSpec
from autotune.spec.plan import EXACT

BOUND = 1.5e-2  # of the norm of the difference over the norm
APART = 256 << 20  # bytes that calls in one graph read in all, at least: past any cache
MODELS = Path(__file__).parents[2] / "recipes" / "models"


def graph_us(calls: Iterable[Callable[[], Any]]) -> float:
    """Microseconds of one of the calls, which are recorded in one graph."""
    calls = list(calls)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    spent = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    del kept
    return 1e3 * statistics.median(spent[2:]) / len(calls)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class Table:
    def __init__(self) -> None:
        self.failed = 0
        print(f"{'what':<64} {'error':>9} {'plain':>9} {'us':>8} {'plain us':>9} {'TB/s':>6}")

    def row(self, what: str, ours: Tensor, plain: Tensor, wanted: Tensor, us: float, before: float, read: int) -> None:
        e, p = error(ours, wanted), error(plain, wanted)
        self.failed += not e <= BOUND
        print(f"{what:<64} {e:9.1e} {p:9.1e} {us:8.2f} {before:9.2f} {read / us / 1e6:6.2f}", flush=True)


def runs(model: ModelSpec, tokens: int, weights: str) -> list[tuple[Block, tuple[Node, ...]]]:
    """The joined operations of a layer and of the head, in order."""
    shape = Shape(tokens, 1, 512, 1, False, "bf16", "flash", fused=True)
    found = []
    for block in map(FORMS[weights], (blocks(model)[1], blocks(model)[-1])):
        for instruction in inference_body(block, shape).forward.ranks[0]:
            if JOIN in instruction.op:
                found.append((block, nodes_of(block, instruction)))
    return found


def some(weight: Weight) -> Tensor:
    """A weight that keeps what it multiplies about as large as it is."""
    device = torch.device("cuda")
    if weight.form:
        return random_weight(weight, weight.shape, torch.bfloat16, device)
    return torch.randn(weight.shape, device=device, dtype=torch.bfloat16) * (weight.shape[-1] ** -0.5)


def products(model: ModelSpec, tokens: int, weights: str, table: Table) -> None:
    device = torch.device("cuda")
    for _, nodes in runs(model, tokens, weights):
        if "attention" in nodes[-1].op:
            continue
        op = JOIN.join(n.op for n in nodes)
        own = [w for n in nodes for w in n.weights]
        size = sum(weight_bytes(w, 2) * w.size for w in own)
        copies = max(2, min(24, APART // size + 1))
        sets = [{w.name: some(w) for w in own} for _ in range(copies)]
        linear = next(n for n in nodes if n.op in fused.PRODUCTS)
        x = torch.randn(tokens, linear.weights[0].shape[1], device=device, dtype=torch.bfloat16)
        outputs = linear.weights[0].shape[0]
        reads = [x] + [torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)] * op.endswith("add")
        plain_env = Env(model, tokens, 1, torch.zeros(1), (x, x), sets[0])
        wide = replace(plain_env, weights={n: w if w.dtype == torch.int8 else w.double() for n, w in sets[0].items()})
        (wanted,) = fused.one_by_one(wide, nodes, *(r.double() for r in reads))
        (plain,) = fused.one_by_one(plain_env, nodes, *reads)
        (ours,) = fused.FUSED[op](plain_env, nodes, *reads)
        each = [replace(plain_env, weights=own_set) for own_set in sets]
        before = graph_us(partial(fused.one_by_one, env, nodes, *reads) for env in each)
        now = graph_us(partial(fused.FUSED[op], env, nodes, *reads) for env in each)
        shape = "x".join(map(str, linear.weights[0].shape))
        table.row(f"{op} {shape}", ours, plain, wanted, now, before, size)
        del sets


def empty_cache(model: ModelSpec, tokens: int, keys: int, page: int) -> KVCache:
    """Of all layers, for `tokens` sequences of so many keys; in pages that do not lie in order where `page` says so."""
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    if not page:
        return KVCache.empty(model, model.layers, tokens, keys, **kind)
    each = -(-keys // page)
    cache = PagedCache.of_pages(model, model.layers, 1 + tokens * each, page, (tokens, each), **kind)
    cache.pages.copy_(1 + torch.randperm(tokens * each).view(tokens, each))
    return cache


def attention(model: ModelSpec, tokens: int, page: int, table: Table) -> None:
    device = torch.device("cuda")
    _, nodes = next(r for r in runs(model, tokens, EXACT) if r[1][-1].op == "attention")
    op = JOIN.join(n.op for n in nodes)
    heads = rotary.Heads(model.heads, model.kv_heads, model.head_dim, 1)
    layers = model.layers
    for keys in (128, 576, 4096, 32768):
        if tokens * keys * layers * model.kv_heads * model.head_dim * 4 > 40 << 30:
            continue
        cache = empty_cache(model, tokens, keys, page)
        for part in (cache.k, cache.v):
            part.normal_()
        lengths = Lengths.empty(tokens, 1, cache.max_len, device)
        lengths.move(torch.full((tokens,), keys - 1, device=device))
        weights = {
            w.name: torch.rand(w.shape, device=device, dtype=torch.bfloat16) + 0.5 for n in nodes for w in n.weights
        }
        env = Env(
            model, tokens, 1, torch.full((1,), keys - 1, device=device), rope.tables(model, keys, device), weights,
            attention="flash", cache=cache, layer=0, lengths=lengths,
        )  # fmt: skip
        qkv = torch.randn(tokens, (heads.queries + 2 * heads.keys) * heads.width, device=device, dtype=torch.bfloat16)
        (ours,) = fused.FUSED[op](env, nodes, qkv)
        own_keys = cache.k[0].clone()
        (plain,) = fused.one_by_one(env, nodes, qkv)
        again = error(own_keys, cache.k[0])
        assert again < 5e-3, again
        known = replace(env, lengths=None, start=keys - 1, attention="math")
        wide_cache = replace(cache, k=cache.k[:1].float(), v=cache.v[:1].float())
        wide = replace(known, cache=wide_cache, weights={n: w.float() for n, w in weights.items()})
        (wanted,) = fused.one_by_one(wide, nodes, qkv.float())
        each = [replace(env, layer=layer) for layer in range(layers)]
        before = graph_us(partial(fused.one_by_one, e, nodes, qkv) for e in each)
        now = graph_us(partial(fused.FUSED[op], e, nodes, qkv) for e in each)
        read = tokens * keys * model.kv_heads * model.head_dim * 4
        table.row(f"{op} {tokens} x {keys} keys", ours, plain, wanted, now, before, read)
        del cache


def without_early(run: Callable[[], float]) -> float:
    """With every kernel beginning only after the one in front of it has ended."""
    possible = ahead.possible
    ahead.possible = lambda device: False
    try:
        return run()
    finally:
        ahead.possible = possible


def candidates(tokens: int, each: int) -> list[matvec.Tiles | matvec.Blocks]:
    """Tiles worth trying for a product whose program reads `each` elements a row."""
    if tokens > 1:
        return [matvec.Blocks(*how) for how in itertools.product((32, 64, 128), (128, 256, 512), (2, 3, 4, 5), (4, 8))]
    every = itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
    return [matvec.Tiles(rows, warps) for rows, warps in every if 1024 <= rows * each // warps <= 8192]


def chain(model: ModelSpec, tokens: int, keys: int, weights: str, page: int, sweep: bool) -> None:
    """All layers one after another, as a token meets them: here one kernel hides what another waits for."""
    device = torch.device("cuda")
    layers, block = model.layers, FORMS[weights](blocks(model)[1])
    mine = [nodes for of, nodes in runs(model, tokens, weights) if of is block or of == block]
    own = [w for nodes in mine for n in nodes for w in n.weights]
    sets = [{w.name: some(w) for w in own} for _ in range(layers)]
    cache = empty_cache(model, tokens, keys, page)
    lengths = Lengths.empty(tokens, 1, cache.max_len, device)
    lengths.move(torch.full((tokens,), keys - 1, device=device))
    env = Env(
        model, tokens, 1, torch.full((1,), keys - 1, device=device), rope.tables(model, keys, device), {},
        attention="flash", cache=cache, lengths=lengths,
    )  # fmt: skip
    start = torch.randn(tokens, model.hidden, device=device, dtype=torch.bfloat16)

    def layer(number: int, by: Callable[[str], Callable[..., tuple[Tensor, ...]]]) -> Tensor:
        here, x, before = replace(env, weights=sets[number], layer=number), start, start
        for nodes in mine:
            op = JOIN.join(n.op for n in nodes)
            (x,) = by(op)(here, nodes, x, before) if op.endswith("add") else by(op)(here, nodes, x)
            before = x if op.endswith("add") else before
        return x

    def timed() -> float:
        return graph_us(partial(layer, n, fused.FUSED.__getitem__) for n in range(layers))

    plain = graph_us(partial(layer, n, lambda op: fused.one_by_one) for n in range(layers))
    size = sum(weight_bytes(w, 2) * w.size for w in own)
    us = timed()
    print(
        f"a layer, {keys} keys: {us:.2f} us ({size / us / 1e6:.2f} TB/s), one after another {plain:.2f} us", flush=True
    )
    print(f"   without starting early {without_early(timed):.2f} us", flush=True)
    if not sweep:
        return
    chosen: dict[Any, matvec.Tiles | matvec.Blocks] = {}
    product = matvec.product

    def as_chosen(x: Tensor, weight: Tensor, *given: Any, **more: Any) -> Tensor:
        return product(x, weight, *given, **more, how=chosen.get(tuple(weight.shape)))

    matvec.product = as_chosen
    found = []
    attend = decode.attend

    def tiled(how: decode.Tiles, *given: Any) -> Tensor:
        return attend(*given, how)

    for how in map(decode.Tiles._make, itertools.product((16, 32, 64), (1, 2, 4), (32, 64, 128))):
        decode.attend = partial(tiled, how)
        try:
            found.append((timed(), *how))
        except OutOfResources as problem:
            print(f"   {how}: {str(problem)[:80]}")
    print(
        "   us (keys, warps, least): " + ", ".join(f"{u:.2f} {tuple(r)}" for u, *r in sorted(found)[:8]),
        flush=True,
    )
    best_how = decode.Tiles(*min(found)[1:])
    decode.attend = lambda qkv, heads, *_: qkv[:, : heads.queries * heads.width].contiguous()
    print(f"   without attention {timed():.2f} us", flush=True)
    decode.attend = partial(tiled, best_how)

    for nodes in mine:
        if nodes[-1].op == "attention":
            continue
        linear = next(n for n in nodes if n.op in fused.PRODUCTS)
        outputs, inputs = linear.weights[0].shape
        found = []
        for how in candidates(tokens, inputs * (1 + (nodes[-1].op == "swiglu"))):
            chosen[outputs, inputs] = how
            try:
                found.append((timed(), how))
            except OutOfResources as problem:
                print(f"   {outputs}x{inputs} {tuple(how)}: {str(problem)[:80]}")
        best = min(found)
        chosen[outputs, inputs] = best[1]
        print(
            f"   {outputs}x{inputs} us {best[1]._fields}: "
            + ", ".join(f"{u:.2f} {tuple(r)}" for u, r in sorted(found)[:5])
        )
    decode.attend, matvec.product = attend, product


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="meta-llama--Llama-3.1-8B")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--weights", choices=sorted(FORMS), default=EXACT)
    parser.add_argument("--page", type=int, choices=PAGES, default=0)
    parser.add_argument("--sweep", action="store_true")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    model = load_model(MODELS / f"{asked.model}.json")
    table = Table()
    products(model, asked.tokens, asked.weights, table)
    attention(model, asked.tokens, asked.page, table)
    for keys in (576, 8192):
        chain(model, asked.tokens, keys, asked.weights, asked.page, asked.sweep)
    return 6 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
