"""Every operation and attention backend on a device, in bf16, against the reference in float64: a table, and its times.

    python tests/gpu/check_ops.py [--device cuda|cpu] [--tokens 2048]

Not collected by pytest. Exits with 6 when an error is over its bound. `transient` is what a call allocated at most
beyond what was there before it and what it returned.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotune.planners.lower.shape import sight_columns
from autotune.runners import reference, rope
from autotune.runners.ops import OPERATIONS, Env, KVCache, attention
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.attention_masked import FORMULAS, chosen
from autotune.runners.rows import drawn_rows
from autotune.spec.graph import Block, Node, blocks
from autotune.spec.model import LatentAttention, ModelSpec
from autotune.spec.opset import OPS
from autotune.spec.workload import Workload, mask_rows

BOUND = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}  # of the norm of the difference over the norm
LAYER = ModelSpec(
    "layer", "LlamaForCausalLM", 2048, 1, 32, 8, 64, 8192, 32064, max_positions=8192, qkv_bias=True, out_bias=True
)
# DeepSeek's heads: keys of 128 + 64, values of 128
LATENT = ModelSpec(
    "latent", "DeepseekV2ForCausalLM", 2048, 1, 16, 16, 192, 10944, 32064, latent=LatentAttention(0, 512, 128, 64, 128)
)
SMALL = replace(LAYER, hidden=128, heads=8, kv_heads=2, head_dim=16, ffn=256, vocab=512)


class Table:
    """Rows of what, error, bound, milliseconds and MiB; remembers whether any was over its bound."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, 0
        print(f"{'what':<44} {'error':>9} {'bound':>9} {'ms':>9} {'transient MiB':>14}")

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Median milliseconds of a warm call, and the MiB of its transient memory."""
        call()
        spent, transient = [], 0.0
        for _ in range(5):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            kept = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                made = torch.cuda.memory_allocated() - before
                transient = (torch.cuda.max_memory_allocated() - before - made) / 2**20
            spent.append(time.perf_counter() - begin)
            del kept
        return sorted(spent)[2] * 1e3, transient

    def row(self, what: str, found: Tensor, wanted: Tensor, bound: float, cost: tuple[float, float] | None) -> None:
        error = ((found.double() - wanted.view(found.shape)).norm() / wanted.norm()).item()
        wrong = not error <= bound
        self.failed += wrong
        spent = f"{cost[0]:9.3f} {cost[1]:14.1f}" if cost else ""
        print(f"{what:<44} {error:9.2e} {bound:9.0e} {spent}{'  WRONG' if wrong else ''}", flush=True)


def random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def widths(model: ModelSpec) -> dict[str, int]:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    special = {"qkv": q + 2 * kv, "q": q, "o": q, "k": kv, "v": kv, "gu": 2 * model.ffn, "s": model.ffn}
    if model.latent:
        low, heads = model.latent, model.heads
        special |= {"qh": q, "kva": low.kv_rank + low.rope_dim, "ckv": low.kv_rank, "kr": low.rope_dim}
        special |= {"kt": low.rope_dim, "kvb": heads * (low.nope_dim + low.v_dim)}
        special |= {"v": heads * low.v_dim, "o": heads * low.v_dim}
    return {**dict.fromkeys(("x", "h", "x1", "h2", "a", "d", "y"), model.hidden), **special, "logits": model.vocab}


@torch.enable_grad()
def oracle(
    model: ModelSpec, node: Node, sequence: int, reads: list[Tensor], weights: list[Tensor], seeds: list[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Writes, and gradients of every floating operand and weight, in float64 through autograd."""
    leaves = [t.double().requires_grad_() if t.is_floating_point() else t for t in (*reads, *weights)]
    values = {n: t.view(-1, sequence, *t.shape[1:]) for n, t in zip(node.reads, leaves, strict=False)}
    own = {(1, w.name): t for w, t in zip(node.weights, leaves[len(reads) :], strict=True)}
    reference._run(Block("layer", 1, (node,)), values, own, rope.tables(model, sequence, reads[0].device))
    writes = [values[n].reshape(len(reads[0]), -1) if values[n].dim() else values[n] for n in node.writes]
    total = torch.stack([(w * s.double()).sum() for w, s in zip(writes, seeds, strict=True)]).sum()
    wanted = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [w.detach() for w in writes], torch.autograd.grad(total, wanted)


@torch.no_grad()
def check_node(table: Table, model: ModelSpec, node: Node, tokens: int, batch: int, device: torch.device) -> None:
    """Forward, input gradient and weight gradient of one node in bf16."""
    dtype, sequence = torch.bfloat16, tokens // batch
    reads = [
        torch.randint(0, model.vocab, (tokens,), device=device)
        if name in ("tokens", "targets")
        else random(device, tokens, widths(model)[name], seed=i + 1).to(dtype)
        for i, name in enumerate(node.reads)
    ]
    weights = {w.name: random(device, *w.shape, seed=20 + i).mul_(0.05).to(dtype) for i, w in enumerate(node.weights)}
    grads = {name: torch.zeros(w.shape, device=device) for name, w in weights.items()}
    tables = rope.tables(model, sequence, device)
    positions = torch.arange(sequence, device=device)
    env = Env(model, batch, sequence, positions, tables, weights, grads, loss_scale=1 / tokens)
    operation, rule = OPERATIONS[node.op], OPS[node.op]
    results = operation.forward(env, node, *reads)
    made = results[: len(node.writes)]
    seeds = [
        torch.ones_like(w) if w.dim() == 0 else random(device, *w.shape, seed=40 + i).to(dtype)
        for i, w in enumerate(made)
    ]
    writes, derived = oracle(model, node, sequence, reads, list(weights.values()), seeds)
    cost = table.time(lambda: operation.forward(env, node, *reads))
    for name, found, wanted in zip(node.writes, made, writes, strict=True):
        table.row(f"{node.name} {name}", found, wanted, BOUND[dtype], cost)
    groups = {"read": reads, "write": made, "stat": results[len(node.writes) :]}
    incoming = () if node.op == "cross_entropy" else tuple(seeds)
    floating = sum(r.is_floating_point() for r in reads)
    if operation.wgrad:
        saved = tuple(groups[where][i] for where, i in rule.wgrad)
        operation.wgrad(env, node, incoming, saved)
        sums = [g.clone() for g in grads.values()]
        cost = table.time(lambda: operation.wgrad(env, node, incoming, saved))
        for name, found, wanted in zip(grads, sums, derived[floating:], strict=True):
            table.row(f"{node.name} wgrad {name}", found, wanted, BOUND[dtype], cost)
    if operation.dgrad:
        saved = tuple(groups[where][i].clone() for where, i in rule.dgrad)
        cost = table.time(lambda: operation.dgrad(env, node, incoming, saved))
        saved = tuple(groups[where][i] for where, i in rule.dgrad)
        outputs = operation.dgrad(env, node, incoming, saved)
        for name, found, wanted in zip(node.reads, outputs, derived, strict=False):
            table.row(f"{node.name} dgrad {name}", found, wanted, BOUND[dtype], cost)


SHAPES = [  # batch, heads, kv heads, sequence, head_dim, window
    (2, 32, 8, 2048, 64, 0),
    (1, 32, 8, 4096, 128, 0),
    (2, 16, 16, 1000, 128, 0),
    (3, 8, 1, 513, 64, 0),
    (1, 32, 8, 2048, 128, 512),
]


@torch.no_grad()
def check_backend(table: Table, name: str, given: list[Tensor], wanted: list[Tensor], window: int) -> None:
    """One attention backend on q, k, v and o's gradient, forward and backward; or why it cannot."""
    (q, k, v, g), backend = given, attention.BACKENDS[name]
    batch, heads, sequence, width = q.shape
    what = f"{name} {str(q.dtype)[6:]} b{batch} h{heads}:{k.shape[1]} s{sequence} d{width} w{window}"
    reason = backend.supported(q.device, q.dtype, width, sequence, window)
    if reason:
        print(f"{what:<44} {reason}")
        return
    o, lse = backend.forward(q, k, v, window)
    found = (o, lse, *backend.backward(g, q, k, v, o, lse, window))
    costs = {
        "o": table.time(lambda: backend.forward(q, k, v, window)),
        "dq": table.time(lambda: backend.backward(g, q, k, v, o, lse, window)),
    }
    for label, ours, theirs in zip(("o", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        table.row(f"{what} {label}", ours, theirs, BOUND[q.dtype], costs.get(label))


@torch.no_grad()
def check_backends(table: Table, device: torch.device, small: bool) -> None:
    """Each attention backend in bf16 and fp32, against the formulas in float64."""
    plain = attention.BACKENDS["math"]
    for batch, heads, kv_heads, full, width, window in SHAPES:
        sequence = full // 16 if small else full
        for dtype in BOUND:
            counts = (heads, kv_heads, kv_heads, heads)
            flat = [random(device, batch, sequence, n, width, seed=i).to(dtype) for i, n in enumerate(counts)]
            given = [x.transpose(1, 2) for x in flat]
            q, k, v, g = (x.double() for x in given)
            o, lse = plain.forward(q, k, v, window)
            wanted = [o, lse, *plain.backward(g, q, k, v, o, lse, window)]
            for name in attention.BACKENDS:
                check_backend(table, name, given, wanted, window)


@torch.no_grad()
def check_masked(table: Table, device: torch.device, small: bool) -> None:
    """Attention of a training with masks beside its text, as a plan has it, against the formulas in float64; its rows
    are 1024 of text and 2412 of masks (recipes/byte-parallel.toml)."""
    length = 64 if small else 1024
    work = Workload(sequence_length=length, masks=mask_rows(length, 8, 0.7, 0.2))
    seen, many = drawn_rows(work, 0).seen(device), work.rows
    for heads, kv_heads, width in ((8, 8, 64), (32, 8, 128)):
        for dtype in BOUND:
            counts = (heads, kv_heads, kv_heads, heads)
            flat = [random(device, 1, many, n, width, seed=i).to(dtype) for i, n in enumerate(counts)]
            q, k, v, g = (x.transpose(1, 2) for x in flat)
            whole = torch.zeros((many, sight_columns(many)), device=device, dtype=torch.float64)
            whole[:, :many].masked_fill_(~seen, float("-inf"))
            wide, exact = [x.double() for x in (q, k, v, g)], whole[:, :many]
            o, lse = FORMULAS.forward(*wide[:3], exact)
            wanted = (o, lse, *FORMULAS.backward(wide[3], *wide[:3], o, lse, exact))
            backend, sight = chosen("efficient", q), whole.to(dtype)[:, :many]
            o, lse = backend.forward(q, k, v, sight)
            found = (o, lse, *backend.backward(g, q, k, v, o, lse, sight))
            costs = {
                "o": table.time(partial(backend.forward, q, k, v, sight)),
                "dq": table.time(partial(backend.backward, g, q, k, v, o, lse, sight)),
            }
            what = f"masked {str(dtype)[6:]} h{heads}:{kv_heads} rows {many} d{width}"
            for label, ours, theirs in zip(("o", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
                table.row(f"{what} {label}", ours, theirs, BOUND[dtype], costs.get(label))


@torch.no_grad()
def check_decoding(table: Table, model: ModelSpec, device: torch.device, told: bool) -> None:
    """Prefill, one token and several tokens against a cache, compared with attention over the whole sequence; whether
    the host is `told` how full the cache is, or only the device."""
    node = next(n for n in blocks(model)[1].nodes if n.op == "attention")
    batch, total = 4, 96
    q, k, v = (
        random(device, batch, total, heads * model.head_dim, seed=i).bfloat16()
        for i, heads in enumerate((model.heads, model.kv_heads, model.kv_heads))
    )
    shape = (batch, total, -1, model.head_dim)
    views = [x.double().view(shape).transpose(1, 2) for x in (q, k, v)]
    wanted = attention.BACKENDS["math"].forward(*views, model.window)[0].transpose(1, 2).reshape(batch, total, -1)
    cache = KVCache.empty(model, 1, batch, total, dtype=torch.bfloat16, device=device)
    env = Env(model, batch, 0, torch.empty(0), (q, q), {}, cache=cache)
    start = 0
    for new in (64, 1, 8, 1, 22):
        rows = [x[:, start : start + new].reshape(batch * new, -1) for x in (q, k, v)]
        at = replace(env, sequence=new, start=start)
        if start and not told:
            lengths = Lengths.empty(batch, new, cache.max_len, device)
            lengths.move(torch.full((batch,), start, device=device))
            positions = torch.arange(start, start + new, device=device)
            at = replace(env, sequence=new, positions=positions, lengths=lengths)
        o = OPERATIONS["attention"].forward(at, node, *rows)[0]
        cost = table.time(lambda e=at, r=rows: OPERATIONS["attention"].forward(e, node, *r))
        part = wanted[:, start : start + new].reshape(batch * new, -1)
        where = "host" if told else "device"
        table.row(f"cache w{model.window} +{new} at {start} ({where}'s length)", o, part, BOUND[torch.bfloat16], cost)
        start += new


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device) if on_cuda else 'CPU'}")
    table = Table(device)
    model = LAYER if on_cuda else SMALL
    tokens = arguments.tokens if on_cuda else 96
    nodes = {n.name: (m, n) for m in (model, replace(model, qk_norm=True)) for b in blocks(m) for n in b.nodes}
    check_model = [*nodes.values(), (model, next(n for n in blocks(model)[1].nodes if n.op == "rotary"))]
    low = LATENT if on_cuda else replace(LATENT, hidden=128, heads=4, kv_heads=4)
    check_model += [(low, n) for n in blocks(low)[1].nodes if n.op.startswith("latent") or n.op == "attention"]
    for shape, node in check_model:
        check_node(table, shape, node, tokens, 2, device)
    check_backends(table, device, not on_cuda)
    check_masked(table, device, not on_cuda)
    for window in (0, 40):
        for told in (True, False):
            check_decoding(table, replace(model, window=window), device, told)
    print(f"{table.failed} over their bounds" if table.failed else "all within their bounds")
    return 6 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
