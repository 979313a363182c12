"""Experts divided among devices: the weights of whole ones after a step, the memory predicted, and the time.

    torchrun --nproc-per-node 2 tests/gpu/check_expert_ranks.py [--layers 4] [--tokens 4096] [--steps 8]

Any even number of devices. Not collected by pytest. Exits with 6 when more weights differ from those of whole experts
than rounding explains. The model has Qwen3-30B-A3B's layers: 128 experts of 768, 8 a token. Seeded random routers are
uneven: what is said of memory is of one in balance, so the peaks of ranks lie around it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from math import prod

import torch
import torch.distributed as dist

from autotune.planners.lower.train import lower_training
from autotune.planners.simulate import memory
from autotune.runners.checkpoint import shard
from autotune.runners.reference import init_weight
from autotune.runners.state import Key
from autotune.runners.training import Trainer
from autotune.spec.graph import Weight, blocks
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

# The share of bf16 weights that may round to a neighbour or step the other way: rows stand in other products, and a
# token whose scores are nearly equal may choose another expert.
BOUND = 5e-2


def plans(ranks: int) -> list[Plan]:
    """The first is what the others are compared with; the second says what adding up in no fixed order does alone."""
    plain = Plan(ranks, attention="flash")
    wide = [Plan(ranks // 2, 2, expert=ranks // 2, attention="flash")] if ranks > 2 else []
    deep = [Plan(ranks // 2, 1, 2, expert=ranks // 2, micro_batch=1, attention="flash")] if ranks > 2 else []
    return [
        plain,
        plain,
        plain.altered(expert=ranks),
        plain.altered(expert=ranks, recompute="selective"),
        plain.altered(expert=ranks, recompute="full", zero=1),
        plain.altered(expert=2, zero=1),
        plain.altered(expert=2, zero=3),
        *wide,
        *deep,
    ]


def run(
    plan: Plan, model: ModelSpec, work: Workload, rank: int, steps: int
) -> tuple[float, int, dict[Key, torch.Tensor], int]:
    """(median seconds of a step, bytes at the peak, weights here after the first step, which run of the experts)."""
    device = torch.device("cuda", rank)
    gc.collect()  # a trainer's cycles
    torch.cuda.empty_cache()

    def load(index: int, weight: Weight) -> torch.Tensor:
        return shard(weight, init_weight(weight, 0, torch.bfloat16, device), rank % plan.tensor, plan.tensor)

    trainer = Trainer.build(plan, model, work, rank, device, load)
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(model.vocab, (work.global_batch, work.sequence_length + 1), generator=generator)
    each = work.global_batch // plan.data
    mine = text[trainer.mesh.data * each : (trainer.mesh.data + 1) * each]
    times: list[float] = []
    weights: dict[Key, torch.Tensor] = {}
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        trainer.feed((mine[:, :-1].contiguous(), mine[:, 1:].contiguous()))
        torch.cuda.synchronize()
        dist.barrier(device_ids=[rank])
        begin = time.perf_counter()
        trainer.interpreter.step()
        times.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated()
        if not weights:
            for s, state in trainer.states.items():
                weights |= {key: w.cpu() for key, w in trainer.whole(s, state.weight).items()}
            torch.cuda.reset_peak_memory_stats()
    run_of = trainer.mesh.expert
    trainer.mesh.close()
    return sorted(times[2:])[len(times[2:]) // 2], peak, weights, run_of


def other(
    plan: Plan, model: ModelSpec, expected: dict[Key, torch.Tensor], found: dict[Key, torch.Tensor], at: int
) -> float:
    """The share of this rank's weights that differ; of tensor ranks' shards nothing is compared but what is whole."""
    differ = seen = 0
    routed = {(b.index, w.name): bool(w.experts) for b in blocks(model) for w in b.weights()}
    for key, weight in found.items():
        whole = expected.get(key)
        if whole is None:
            continue
        part = whole
        if routed[key] and plan.expert > 1:
            rows = whole.shape[0] // plan.expert
            part = whole[at * rows : (at + 1) * rows]
        if part.shape == weight.shape:
            differ += int((part != weight).sum())
            seen += prod(weight.shape)
    return differ / max(1, seen)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cuda:nccl,cpu:gloo", device_id=torch.device("cuda", rank))
    ranks = dist.get_world_size()
    shape = (2048, given.layers, 32, 4, 128, 6144, 32064)
    model = ModelSpec("qwen", "Qwen3MoeForCausalLM", *shape, qk_norm=True, experts=Experts(128, 8, 768))
    work = Workload(sequence_length=given.tokens, global_batch=2 * ranks)
    expected: dict[Key, torch.Tensor] = {}
    wrong = 0
    for plan in plans(ranks):
        seconds, peak, weights, at = run(plan, model, work, rank, given.steps)
        expected = expected or weights
        share = other(plan, model, expected, weights, at)
        numbers: list[tuple[float, int]] = [(0.0, 0)] * ranks
        dist.all_gather_object(numbers, (share, peak))
        wrong += max(each for each, _ in numbers) > BOUND
        said = max(memory(lower_training(plan, model, work), lambda rank, i: 0)[0]["device"])
        if rank == 0:
            peaks = ", ".join(f"{size / 1e6:.0f}" for _, size in numbers)
            print(
                f"{plan.describe()}: {1e3 * seconds:.1f} ms, peaks {peaks} MB, between instructions "
                f"{said / 1e6:.0f} MB said; other weights {max(each for each, _ in numbers):.1e}",
                flush=True,
            )
    dist.destroy_process_group()
    return 6 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
