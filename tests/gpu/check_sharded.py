"""Weights and gradients shared by two devices: the weights of whole ones after a step, and the memory predicted.

    torchrun --nproc-per-node 2 tests/gpu/check_sharded.py [--layers 16] [--steps 6]

Not collected by pytest. Exits with 6 when more weights differ from those of replicas than
rounding explains.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time

import torch
import torch.distributed as dist

from autotune.planners.lower.train import lower_training
from autotune.planners.simulate import memory
from autotune.runners.reference import init_weight
from autotune.runners.state import Key
from autotune.runners.training import Trainer
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

BOUND = 1e-2  # the share of bf16 weights that may round to a neighbour: sums are taken in another order
PLANS = [
    Plan(2),
    Plan(2),  # again: attention's backward adds up in no fixed order
    Plan(2, zero=1),
    Plan(2, schedule="breadth-first", chunks=4, zero=1),
    Plan(2, zero=3),
    Plan(2, schedule="breadth-first", chunks=4, zero=2, gathered=1),
    Plan(2, schedule="breadth-first", chunks=4, zero=3),
    Plan(2, schedule="breadth-first", chunks=4, zero=3, gathered=1),
    Plan(2, schedule="breadth-first", chunks=4, zero=3, gathered=2),
    Plan(2, schedule="breadth-first", chunks=8, zero=3, gathered=2),
    Plan(2, schedule="zeropp", chunks=4, zero=3, gathered=2, group=1),
    Plan(2, schedule="zeropp", chunks=4, zero=3, gathered=2, group=2),
]


def run(
    plan: Plan, model: ModelSpec, work: Workload, rank: int, steps: int
) -> tuple[float, int, dict[Key, torch.Tensor]]:
    """(median seconds of a step, bytes at the peak, weights after the first step, on the host)."""
    device = torch.device("cuda", rank)
    gc.collect()  # a trainer's cycles
    torch.cuda.empty_cache()

    def load(index: int, weight: object) -> torch.Tensor:
        return init_weight(weight, 0, torch.bfloat16, device)  # type: ignore[arg-type]

    trainer = Trainer.build(plan, model, work, rank, device, load)
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(model.vocab, (work.global_batch, work.sequence_length + 1), generator=generator)
    each = work.global_batch // plan.data
    mine = text[trainer.mesh.data * each : (trainer.mesh.data + 1) * each]
    times: list[float] = []
    weights: dict[Key, torch.Tensor] = {}
    for _ in range(steps):
        trainer.feed((mine[:, :-1].contiguous(), mine[:, 1:].contiguous()))
        torch.cuda.synchronize()
        dist.barrier(device_ids=[rank])
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        trainer.interpreter.step()
        times.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated()
        if not weights:
            for s, state in trainer.states.items():
                weights |= {key: w.cpu() for key, w in trainer.whole(s, state.weight).items()}
    trainer.mesh.close()
    return sorted(times[2:])[len(times[2:]) // 2], peak, weights


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cuda:nccl,cpu:gloo", device_id=torch.device("cuda", rank))
    model = ModelSpec("wide", "LlamaForCausalLM", 2048, given.layers, 32, 8, 64, 8192, 32000)
    work = Workload(sequence_length=2048, global_batch=8)
    expected: dict[Key, torch.Tensor] = {}
    wrong = 0
    for plan in PLANS:
        seconds, peak, weights = run(plan, model, work, rank, given.steps)
        expected = expected or weights
        other = sum(int((w != expected[key]).sum()) for key, w in weights.items())
        share = other / sum(w.numel() for w in weights.values())
        wrong += share > BOUND
        said = max(memory(lower_training(plan, model, work), lambda rank, i: 0)[0]["device"])
        if rank == 0:
            print(
                f"{plan.describe()}: {1e3 * seconds:.1f} ms, peak {peak / 1e6:.0f} MB, between instructions "
                f"{said / 1e6:.0f} MB said; other weights {share:.1e}",
                flush=True,
            )
    dist.destroy_process_group()
    return 6 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
