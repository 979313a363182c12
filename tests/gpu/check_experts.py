"""A layer's experts on a device, in bf16, against the same operations in float64: a table, and its times.

    python tests/gpu/check_experts.py [--device cuda|cpu] [--tokens 4096]

Not collected by pytest. Exits with 6 when an error is over its bound. The routing is given, so that both choose alike;
every fourth expert has no rows. In float64 there is a product an expert, in bf16 the library's kernel where it has one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from autotune.runners.ops import OPERATIONS, Env, grouped
from autotune.spec.graph import Block, blocks
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.opset import OPS
from tests.gpu.check_ops import BOUND, Table, random

LAYERS = {
    "Qwen3-30B-A3B": ModelSpec(
        "qwen", "Qwen3MoeForCausalLM", 2048, 1, 32, 4, 128, 6144, 32064, experts=Experts(128, 8, 768)
    ),
    "Mixtral-8x7B": ModelSpec(
        "mixtral", "MixtralForCausalLM", 4096, 1, 32, 8, 128, 14336, 32064, experts=Experts(8, 2, 14336)
    ),
}
CHAIN = ("dispatch", "grouped", "weighted_swiglu", "combine")
Costs = dict[str, tuple[float, float]]


def routing(model: ModelSpec, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights [tokens, top_k] and as many different experts of each token, none of them a fourth one."""
    experts = model.experts
    assert experts is not None
    scores = random(device, tokens, experts.count, seed=9)
    if experts.count >= 4 * experts.top_k:
        scores[:, ::4] = float("-inf")
    chosen = scores.topk(experts.top_k, -1)
    return chosen.values.softmax(-1), chosen.indices


@torch.no_grad()
def through(
    block: Block, env: Env, given: dict[str, Tensor], time: Callable[[Callable[[], object]], tuple[float, float]] | None
) -> tuple[dict[str, Tensor], Costs]:
    """The values of the nodes between the router and the sum by token, and the gradients of what goes in."""
    values, costs = dict(given), Costs()
    nodes = [node for node in block.nodes if node.op in CHAIN]
    for node in nodes:
        reads = [values[name] for name in node.reads]
        values.update(zip(node.writes, OPERATIONS[node.op].forward(env, node, *reads), strict=True))
        if time is not None:
            costs[node.name] = time(lambda n=node, r=reads: OPERATIONS[n.op].forward(env, n, *r))
    for node in reversed(nodes):
        operation, rule = OPERATIONS[node.op], OPS[node.op]
        groups = {"read": [values[n] for n in node.reads], "write": [values[n] for n in node.writes]}
        grads = tuple(values[f"d.{name}"] for name in node.writes if f"d.{name}" in values)
        saved = tuple(groups[where][i] for where, i in rule.dgrad)
        if operation.wgrad:
            late = tuple(groups[where][i] for where, i in rule.wgrad)
            operation.wgrad(env, node, grads, late)
            values[f"wgrad {node.name}"] = env.grads[node.weights[0].name].clone()
            if time is not None:
                costs[f"wgrad {node.name}"] = time(lambda o=operation, n=node, g=grads, s=late: o.wgrad(env, n, g, s))
        assert operation.dgrad is not None
        made = operation.dgrad(env, node, grads, saved)
        values.update({f"d.{name}": made[i] for i, name in enumerate(node.reads[: rule.inputs])})
        if time is not None:
            costs[f"dgrad {node.name}"] = time(lambda o=operation, n=node, g=grads, s=saved: o.dgrad(env, n, g, s))
    return values, costs


def check(table: Table, model: ModelSpec, tokens: int, device: torch.device) -> None:
    block = blocks(model)[1]
    weights = {
        w.name: random(device, *w.shape, seed=20 + i).mul_(0.05).bfloat16()
        for i, w in enumerate(w for node in block.nodes if node.op == "grouped" for w in node.weights)
    }
    p, ids = routing(model, tokens, device)
    given = {"h2": random(device, tokens, model.hidden, seed=1).bfloat16(), "p": p, "ids": ids}
    given["d.d"] = random(device, tokens, model.hidden, seed=2).bfloat16()
    found: dict[torch.dtype, dict[str, Tensor]] = {}
    costs = Costs()
    for dtype, main in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        own = {name: w.to(dtype) for name, w in weights.items()}
        grads = {name: torch.zeros(w.shape, dtype=main, device=device) for name, w in weights.items()}
        env = Env(model, 1, tokens, torch.arange(tokens, device=device), (p, p), own, grads)
        # p is as precise as a statistic
        cast = {n: x if n == "ids" else x.to(main if n == "p" else dtype) for n, x in given.items()}
        found[dtype], spent = through(block, env, cast, table.time if dtype == torch.bfloat16 else None)
        costs |= spent
    node = next(n for n in block.nodes if n.op == "grouped")
    why = grouped.unsupported(device, torch.bfloat16, *grouped.widths(node, 1))
    print(f"{model.name}: {'one kernel for all experts' if why is None else f'a product an expert: one kernel {why}'}")
    names = {"d": "combine", "d.h2": "dgrad dispatch", "d.p": "dgrad experts_swiglu"}
    for name, ours in found[torch.bfloat16].items():
        if name in names or name.startswith("wgrad"):
            wanted = found[torch.float64][name]
            table.row(f"{model.name} {name}", ours, wanted, BOUND[torch.bfloat16], costs[names.get(name, name)])
    for name, (ms, mib) in costs.items():
        print(f"{model.name} {name:<32} {ms:9.3f} ms {mib:10.1f} MiB transient")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    table, small = Table(device), device.type != "cuda"
    for model in LAYERS.values():
        experts = model.experts
        assert experts is not None
        shape = replace(model, hidden=64, experts=replace(experts, ffn=48)) if small else model
        check(table, shape, 96 if small else arguments.tokens, device)
    print(f"{table.failed} over their bounds" if table.failed else "all within their bounds")
    return 6 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
