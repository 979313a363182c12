"""Our kernels, interpreted on a CPU, compute what the plain operations do; on a GPU tests/gpu/check_ops.py says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.planners.decoding.trees import Tree
from autotune.planners.feasible import MOST_FUSED
from autotune.runners.decoding.sequences import Sequences
from autotune.runners.decoding.settle import settle
from autotune.runners.ops import OPERATIONS, Env, KVCache, elementwise, fused, sharded_softmax
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.linear import operands
from autotune.runners.ops.sharded_softmax import Columns
from autotune.runners.rope import tables
from autotune.runners.rounded import random_weight
from autotune.spec.graph import Node, blocks
from autotune.spec.int8_graph import rounded
from autotune.spec.model import ModelSpec
from autotune.spec.work import FEW_ROWS

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="Triton is not installed for this machine")
from autotune.kernels import decode, matvec, rotary, rounds, softmax, swiglu, usable

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
HALF = 2e-3


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype == dtype
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert float(error) < BOUNDS.get(dtype, HALF)


def case(norm: bool, heads: int, keys: int, width: int, dtype: torch.dtype) -> tuple[Env, Node, rotary.Heads, Any]:
    """Two sequences of five tokens, not from the start of the tables."""
    model = ModelSpec("small", "Qwen3ForCausalLM", 64, 1, heads, keys, width, 128, 64, qk_norm=norm)
    node = next(n for n in blocks(model)[1].nodes if n.op.startswith("rotary"))
    weights = {w.name: (torch.rand(width) + 0.5).to(dtype) for w in node.weights}
    env = Env(model, 2, 5, torch.arange(3, 8), tables(model, 16, torch.device("cpu")), weights)
    norms = rotary.Norms(*weights.values(), node.number("eps")) if norm else None
    return env, node, rotary.Heads(heads, keys, width, 5), norms


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["turned", "normalised and turned"])
@pytest.mark.parametrize(("heads", "keys", "width"), [(6, 2, 24), (8, 8, 16), (3, 1, 64)])
def test_heads_are_split_and_turned(norm: bool, heads: int, keys: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(heads)
    env, node, sizes, norms = case(norm, heads, keys, width, dtype)
    qkv = torch.randn(10, (heads + 2 * keys) * width).to(dtype)
    wanted = OPERATIONS[node.op].forward(env, node, qkv)
    for a, b in zip(rotary.split_and_turn(qkv, sizes, env.rope, env.positions, norms), wanted, strict=True):
        close(a, b, dtype)
    grads = tuple(torch.randn_like(x) for x in wanted)
    back: Callable[..., Any] = OPERATIONS[node.op].dgrad  # type: ignore[assignment]
    saved = (qkv,) if norm else ()
    found = rotary.turn_back(grads, sizes, env.rope, env.positions, norms, *saved)  # type: ignore[arg-type]
    close(found, back(env, node, grads, saved)[0], dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("width", [96, 1500])
def test_gated_silu(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    both, grad = torch.randn(7, 2 * width).to(dtype), torch.randn(7, width).to(dtype)
    env: Any = None
    node: Any = None
    close(swiglu.swiglu(both), elementwise.swiglu(env, node, both)[0], dtype)
    wanted = elementwise.swiglu_dgrad(env, node, (grad,), (both,))[0]
    close(swiglu.swiglu_gradient(grad, both), wanted, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "padded"])
@pytest.mark.parametrize("block", [32, 8192], ids=["blocks", "one block"])
def test_softmax_over_a_shard(block: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in-place pass, and the loss's gradient by both ways to it; the last shard of 250 columns has 34 of 108."""
    monkeypatch.setattr(softmax, "BLOCK", block)
    torch.manual_seed(rank)
    columns, targets = Columns.of(250, rank, 108), torch.randint(0, 250, (9,))
    targets[:2] = columns.first  # some are here
    logits = columns.mask((3 * torch.randn(9, 108)).to(dtype))
    ours, plain = logits.clone(), logits.clone()
    torch.testing.assert_close(softmax.softmax(ours), sharded_softmax.softmax(plain), rtol=1e-6, atol=1e-6)
    close(ours, plain, dtype)
    factor = torch.rand(9)
    sharded_softmax.logits_gradient(plain, factor, targets, columns, 0.3)
    close(softmax.rescaled_gradient(ours, factor, targets, 0.3, columns.first, columns.valid), plain, dtype)
    top, ours, plain = logits.amax(1).float(), logits.clone(), logits.clone()
    torch.testing.assert_close(softmax.exponentials(ours, top), sharded_softmax.exponentials(plain, top))
    close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, targets = (3 * torch.randn(9, 200)).to(dtype), torch.randint(0, 200, (9,))
    lse = softmax.log_sum_exp(logits)
    torch.testing.assert_close(lse, logits.float().logsumexp(1), rtol=1e-6, atol=1e-6)
    one_hot = torch.nn.functional.one_hot(targets, 200)
    wanted = ((logits.float().softmax(1) - one_hot) * 0.3).to(dtype)
    close(softmax.cross_entropy_gradient(logits, lse, targets, 0.3), wanted, dtype)


def test_a_cpu_runs_none_of_them() -> None:
    assert not usable(torch.zeros(1))


def test_the_planner_knows_how_many_rows_are_multiplied() -> None:
    assert matvec.MOST_ROWS <= MOST_FUSED


def joined(op: str, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The run of `nodes` that stands for `op`."""
    names = tuple(op.split("+"))
    found = (nodes[i : i + len(names)] for i in range(len(nodes)))
    return next(run for run in found if tuple(node.op for node in run) == names)


# A biased product, and one without; what is gated has no bias in any family.
WAYS = [("rmsnorm+{}", ""), ("rmsnorm+{}", "bias"), ("{}+add", ""), ("{}+add", "bias"), ("rmsnorm+{}+swiglu", "")]


def ways(linear: str) -> list[Any]:
    """Each run of operations around a product, without and with the bias that it may have."""
    return [pytest.param(op.format(linear), bool(bias), id=op.format(linear) + f"-{bias}" * bool(bias)) for op, bias in WAYS]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("op", "bias"), ways("linear"))
def test_product_of_a_few_rows(op: str, tokens: int, bias: bool, dtype: torch.dtype) -> None:
    """Widths that are no powers of two, and fewer outputs than the last program has rows."""
    torch.manual_seed(tokens)
    model = ModelSpec("small", "LlamaForCausalLM", 72, 1, 3, 1, 24, 100, 64, qkv_bias=bias, out_bias=bias)
    nodes = joined(op, blocks(model)[1].nodes)
    weights = {w.name: (0.3 * torch.randn(w.shape) + (w.init == "ones")).to(dtype) for n in nodes for w in n.weights}
    env = Env(model, tokens, 1, torch.arange(1), tables(model, 16, torch.device("cpu")), weights)
    reads = [torch.randn(tokens, 72).to(dtype) for _ in range(1 + op.endswith("add"))]
    wide = {name: weight.double() for name, weight in weights.items()}
    (wanted,) = fused.one_by_one(replace(env, weights=wide), nodes, *(x.double() for x in reads))
    linear = next(n for n in nodes if n.op == "linear")
    weight, *more = (weights[w.name] for w in linear.weights)
    norm = matvec.Norm(weights[nodes[0].weights[0].name], nodes[0].number("eps")) if op[0] == "r" else None
    many = [matvec.Blocks(rows, 64, 2, 4) for rows in (16, 32)] if tokens > 1 and dtype != torch.bfloat16 else []
    for how in (*[matvec.Tiles(rows, 4) for rows in (1, 4) if tokens < 4], *many):
        found = matvec.product(
            reads[0],
            weight,
            norm,
            more[0] if more else None,
            *(reads[1:] or [None]),
            gated=op.endswith("swiglu"),
            how=how,
        )
        close(found, wanted.to(dtype), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(("op", "bias"), ways("linear_int8"))
def test_product_of_a_few_rows_with_weights_of_a_byte(op: str, tokens: int, bias: bool, dtype: torch.dtype) -> None:
    """As the operations one after another in double precision on the same whole numbers and scales."""
    torch.manual_seed(tokens)
    model = ModelSpec("small", "LlamaForCausalLM", 72, 1, 3, 1, 24, 100, 64, qkv_bias=bias, out_bias=bias)
    nodes = joined(op, rounded(blocks(model)[1]).nodes)
    cpu = torch.device("cpu")
    weights = {w.name: random_weight(w, w.shape, dtype, cpu) for n in nodes for w in n.weights}
    weights |= {w.name: (torch.rand(w.shape) + 0.5).to(dtype) for n in nodes for w in n.weights if w.init == "ones"}
    env = Env(model, tokens, 1, torch.arange(1), tables(model, 16, cpu), weights)
    reads = [torch.randn(tokens, 72).to(dtype) for _ in range(1 + op.endswith("add"))]
    wide = {name: weight if weight.dtype == torch.int8 else weight.double() for name, weight in weights.items()}
    (wanted,) = fused.one_by_one(replace(env, weights=wide), nodes, *(x.double() for x in reads))
    linear = next(n for n in nodes if n.op == "linear_int8")
    weight, scales, more = operands(env, linear)
    norm = matvec.Norm(weights[nodes[0].weights[0].name], nodes[0].number("eps")) if op[0] == "r" else None
    many = [matvec.Blocks(rows, 64, 2, 4) for rows in (16, 32)] if tokens > 1 and dtype != torch.bfloat16 else []
    for how in (*[matvec.Tiles(rows, 4) for rows in (1, 4) if tokens < 4], *many):
        gated = op.endswith("swiglu")
        found = matvec.product(
            reads[0], weight, norm, more, *(reads[1:] or [None]), gated=gated, how=how, scales=scales
        )
        close(found, wanted.to(dtype), dtype)


def test_a_byte_is_as_many_bytes_in_twice_the_rows() -> None:
    for inputs in (4096, 8192, 14336):
        assert matvec.tiles(inputs, False, 1).rows == 2 * matvec.tiles(inputs, False).rows
    assert matvec.MOST_ROWS == FEW_ROWS


def decoding(norm: bool, heads: rotary.Heads, dtype: torch.dtype, batch: int) -> tuple[Any, ...]:
    """What attention of new tokens of each sequence needs: (env with a filled cache, nodes, norms, qkv)."""
    torch.manual_seed(heads.queries)
    model = ModelSpec("small", "Qwen3ForCausalLM", 64, 1, heads.queries, heads.keys, heads.width, 128, 64, qk_norm=norm)
    nodes = joined("rotary_norm+attention" if norm else "rotary+attention", blocks(model)[1].nodes)
    weights = {w.name: (torch.rand(heads.width) + 0.5).to(dtype) for w in nodes[0].weights}
    norms = rotary.Norms(*weights.values(), nodes[0].number("eps")) if norm else None
    cache = KVCache.empty(model, 2, batch, 128, dtype=dtype)
    for part in (cache.k, cache.v):
        part.copy_(torch.randn(part.shape))
    new = heads.sequence
    rope = tables(model, 128, torch.device("cpu"))
    env = Env(model, batch, new, torch.arange(new), rope, weights, cache=cache, layer=1)
    return env, nodes, norms, torch.randn(batch * new, (heads.queries + 2 * heads.keys) * heads.width).to(dtype)


def own(cache: KVCache, layer: int, used: Tensor) -> decode.Cache:
    return decode.Cache(cache.k.clone()[layer], cache.v.clone()[layer], used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # interpreted, bf16 has no products
@pytest.mark.parametrize(("norm", "window"), [(False, 0), (True, 0), (False, 20)], ids=["", "norms", "window"])
@pytest.mark.parametrize(("used", "splits"), [(1, 4), (33, 4), (33, 1), (128, 3), (100, 2)])
@pytest.mark.parametrize(("heads", "keys", "width"), [(6, 2, 48), (3, 3, 32), (20, 1, 64)])
def test_attention_over_a_cache(
    heads: int, keys: int, width: int, used: int, splits: int, norm: bool, window: int, dtype: torch.dtype
) -> None:
    """Parts of a head's keys, and none; the new key and value come into the cache and nothing else changes there."""
    sizes = rotary.Heads(heads, keys, width, 1)
    env, nodes, norms, qkv = decoding(norm, sizes, dtype, 2)
    cache = own(env.cache, 1, torch.full((2,), used, dtype=torch.int32))
    room = decode.parts(2, sizes, qkv.device, splits)
    found = decode.attend(qkv, sizes, env.rope, cache, room, window, norms)
    attention = replace(nodes[1], attrs=(*(a for a in nodes[1].attrs if a[0] != "window"), ("window", window)))
    env = replace(env, start=used - 1, positions=torch.tensor([used - 1]))
    (wanted,) = fused.one_by_one(env, (nodes[0], attention), qkv)
    close(found, wanted, dtype)
    for ours, plain in ((cache.keys, env.cache.k[1]), (cache.values, env.cache.v[1])):
        torch.testing.assert_close(ours, plain, rtol=HALF if dtype == torch.float16 else 1e-5, atol=1e-5)
    assert not room.done.any()


def scattered(cache: KVCache, layer: int, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same keys and values in pages that lie in any order among others, and the table that tells."""
    batch, positions = cache.k.shape[1:3]
    columns = positions // page
    table = 3 + torch.randperm(batch * columns + 4)[: batch * columns].view(batch, columns)
    pools = []
    for part in (cache.k[layer], cache.v[layer]):
        pool = torch.full((3 + batch * columns + 4, page, *part.shape[2:]), float("nan"), dtype=part.dtype)
        pool[table.flatten()] = part.reshape(batch * columns, page, *part.shape[2:])
        pools.append(pool)
    return pools[0], pools[1], table


def in_order(pool: Tensor, table: Tensor) -> Tensor:
    """What a pool has of each sequence, position after position."""
    return pool[table.flatten()].view(len(table), -1, *pool.shape[2:])


@pytest.mark.parametrize("tree", [False, True], ids=["", "tree"])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize(("splits", "window"), [(1, 0), (3, 0), (3, 20)])
def test_attention_over_pages(splits: int, window: int, new: int, page: int, tree: bool) -> None:
    """Bit by bit what it gives over a cache without pages, and in it; pages of others hold no numbers and stay so."""
    if tree and new == 1:
        pytest.skip("a tree has several nodes")
    sizes = rotary.Heads(6, 2, 48, new)
    env, _, _, qkv = decoding(False, sizes, torch.float32, 3)
    lengths = Lengths.empty(3, new, 128, qkv.device, TREE if tree else None)
    lengths.move(torch.tensor([5, 100, 128 - new]))
    plain = own(env.cache, 1, lengths.used)
    keys, values, table = scattered(env.cache, 1, page)
    paged = plain._replace(keys=keys, values=values, table=table)
    if tree:
        plain, paged = (c._replace(depths=lengths.depths, visible=lengths.visible) for c in (plain, paged))
    room = decode.parts(3, sizes, qkv.device, splits)
    wanted = decode.attend(qkv, sizes, env.rope, plain, room, window)
    assert torch.equal(decode.attend(qkv, sizes, env.rope, paged, room, window), wanted)
    assert torch.equal(in_order(keys, table), plain.keys) and torch.equal(in_order(values, table), plain.values)
    others = torch.ones(len(keys), dtype=torch.bool)
    others[table.flatten()] = False
    assert keys[others].isnan().all() and values[others].isnan().all()


TREE = Tree((0, 0, 1, 1, 2, 3, 3, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("norm", "window"), [(False, 0), (True, 20)], ids=["", "norms and window"])
@pytest.mark.parametrize(("tree", "new"), [(None, 3), (None, 17), (TREE, 9)], ids=["few", "many", "tree"])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_of_several_new_tokens(
    tree: Tree | None, new: int, splits: int, norm: bool, window: int, dtype: torch.dtype
) -> None:
    """Of sequences that differ in length, each new token sees what comes before it, or its ancestors alone."""
    sizes = rotary.Heads(6, 2, 48, new)
    env, nodes, norms, qkv = decoding(norm, sizes, dtype, 2)
    lengths = Lengths.empty(2, new, 128, qkv.device, tree)
    lengths.move(torch.tensor([5, 100]))
    cache = own(env.cache, 1, lengths.used)
    if tree:
        cache = cache._replace(depths=lengths.depths, visible=lengths.visible)
    room = decode.parts(2, sizes, qkv.device, splits)
    found = decode.attend(qkv, sizes, env.rope, cache, room, window, norms)
    attention = replace(nodes[1], attrs=(*(a for a in nodes[1].attrs if a[0] != "window"), ("window", window)))
    env = replace(env, lengths=lengths, positions=lengths.positions)
    (wanted,) = fused.one_by_one(env, (nodes[0], attention), qkv)
    close(found, wanted, dtype)
    for ours, plain in ((cache.keys, env.cache.k[1]), (cache.values, env.cache.v[1])):
        torch.testing.assert_close(ours, plain, rtol=HALF if dtype == torch.float16 else 1e-5, atol=1e-5)
    assert not room.done.any()


def test_sequences_of_different_lengths() -> None:
    sizes = rotary.Heads(4, 2, 32, 1)
    env, _, _, qkv = decoding(False, sizes, torch.float32, 3)
    used = torch.tensor([3, 128, 65], dtype=torch.int32)
    room = decode.parts(3, sizes, qkv.device, 2)
    together = decode.attend(qkv, sizes, env.rope, own(env.cache, 1, used), room)
    for i in range(3):
        alone = decode.Cache(*(part[i : i + 1] for part in own(env.cache, 1, used)[:3]))
        room = decode.parts(1, sizes, qkv.device, 2)
        torch.testing.assert_close(decode.attend(qkv[i : i + 1], sizes, env.rope, alone, room), together[i : i + 1])


@pytest.mark.parametrize("first", [False, True], ids=["round", "prompt"])
@pytest.mark.parametrize("kind", ["row", "plain", "tree"])
def test_a_round_is_settled(kind: str, first: bool) -> None:
    """Texts, counts and places as torch's operations leave them; one answer is whole already, one ends in the round."""
    torch.manual_seed(3)
    batch, new, depth, columns = 4, 9, 1 if first or kind == "plain" else 4, 40
    slate, choices = torch.randint(2, (batch, depth)), torch.randint(2, (batch, depth))
    slate[0], choices[0] = torch.arange(depth), torch.arange(depth) + 1  # all are right
    news = torch.cat((torch.randint(1, depth + 1, (batch, 1)), choices, slate), dim=1)
    kept = []
    for interpreted in (False, True):
        texts, lengths = Sequences.empty(batch, columns, new, slate.device), Lengths.empty(batch, 5, 20, slate.device)
        texts.begin(
            torch.randint(9, (batch, 6), generator=torch.Generator().manual_seed(1)), torch.tensor([6, 3, 4, 2])
        )
        if not first:
            texts.filled.copy_(texts.own + torch.tensor([2, 8, 7, 0]))
            texts.round.copy_(torch.tensor([1, 5, 5, 0]))
        told, token = news.clone() if kind == "tree" else None, torch.full((batch, 3), -1)
        given = (choices, slate if kind == "row" and not first else None) if told is None else (None, None)
        if interpreted:
            state = rounds.State(*texts[:-1], lengths.used, lengths.places, lengths.positions, lengths.depths)
            told = rounds.empty_news(choices) if told is None else told
            rounds.settle(state, told, depth, new, 20, first, *given, token)
        else:
            told = settle(texts, lengths, 20, depth, first, told, *given, token)
        # Behind an answer's end anything may stand.
        for row, end in zip(texts.text, (texts.filled + 1).tolist(), strict=True):
            row[end:] = 0
        kept.append((told, token, *texts[:-1], *lengths[:7]))
    for ours, plain in zip(*kept, strict=True):
        assert torch.equal(ours, plain)


def test_places_of_the_next_tokens() -> None:
    filled, kept = torch.tensor([3, 0, 11]), []
    for interpreted in (False, True):
        lengths = Lengths.empty(3, 5, 20, filled.device, Tree((0, 1, 0, 3)))
        if interpreted:
            rest = (lengths.used, lengths.places, lengths.positions, lengths.depths)
            rounds.place(filled, 2, lengths.begins, *rest)
        else:
            lengths.move(filled, 2)
        kept.append((lengths.used, lengths.places, lengths.positions))
    for ours, plain in zip(*kept, strict=True):
        assert torch.equal(ours, plain)
