"""Optimizer states on the host, on a device: the same weights for every stride, and the stride picked by the model.

    python tests/gpu/check_subgroups.py [--layers 8] [--steps 4]

Not collected by pytest. Exits with 6 when weights differ from those of a run with every state on the device.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from autotune.planners.lower.subgroups import SUBGROUPS, split, subgroup_bytes
from autotune.planners.lower.traits import stage_sizes
from autotune.planners.solvers.stride import Subgroup, best_stride, strides
from autotune.profiles_db.profiling import measure
from autotune.runners.reference import init_weight
from autotune.runners.training import Trainer
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.work import Copy, Optimizer, Work
from autotune.spec.workload import Workload

BOUND = 2.0**-7  # of a bf16 weight: one unit in its last place
PLAIN = Plan(recompute="full")
WINDOWS = (1, 2)  # of the stride that the model picks


def run(plan: Plan, model: ModelSpec, work: Workload, steps: int) -> tuple[float, int, dict[object, torch.Tensor]]:
    """(seconds of the fastest step but the first, bytes at the peak, weights after the first step, on the host).

    The first step's gradients are the same whoever updates. Afterwards a weight that was rounded to its neighbour gives
    other ones, and Adam turns the sign of a gradient near zero into a whole step.
    """
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    trainer = Trainer.build(plan, model, work, 0, device, lambda index, w: init_weight(w, 0, torch.bfloat16, device))
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(model.vocab, (work.global_batch, work.sequence_length + 1), generator=generator)
    times: list[float] = []
    weights: dict[object, torch.Tensor] = {}
    for _ in range(steps):
        trainer.feed((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        trainer.interpreter.step()
        times.append(time.perf_counter() - begin)
        weights = weights or {key: w.cpu() for state in trainer.states.values() for key, w in state.weights.items()}
    return min(times[1:]), torch.cuda.max_memory_allocated(), weights


def measured(model: ModelSpec, work: Workload) -> Subgroup:
    """A subgroup's moves and updates, as the probes find them here."""
    _, each = split(stage_sizes(PLAIN, model, work)[0].parameters, 1, 100)
    states, gradient, weight = subgroup_bytes(each, work.precision)
    pieces: list[Work] = [
        Copy("h2d", states), Optimizer(each), Copy("d2h", states), Copy("d2h", gradient),
        Optimizer(each, "mixed", "host"), Copy("h2d", weight),
    ]  # fmt: skip
    found = {s.work: s.seconds for s in measure([p for p in pieces if getattr(p, "place", "") != "host"], 1, "cuda")}
    found |= {s.work: s.seconds for s in measure([pieces[4]], 1, "cpu")}
    return Subgroup(*(found[piece] for piece in pieces))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("cuda:nccl,cpu:gloo", init_method=f"file://{file.name}s", rank=0, world_size=1)
        model = ModelSpec("wide", "LlamaForCausalLM", 4096, given.layers, 32, 8, 128, 14336, 32000)
        work = Workload(sequence_length=1024, global_batch=1)
        times = measured(model, work)
        print(torch.cuda.get_device_name(), "a subgroup, ms:", {k: round(1e3 * v, 2) for k, v in vars(times).items()})
        plain, most, expected = run(PLAIN, model, work, given.steps)
        heads = (("stride", 8), ("window", 7), ("step ms", 9), ("beyond ms", 10), ("model ms", 9), ("peak GiB", 9))
        print(" ".join(f"{name:>{width}}" for name, width in (*heads, ("difference", 11))))
        print(f"{'device':>8} {'':>7} {1e3 * plain:9.1f} {'':>10} {'':>9} {most / 2**30:9.2f}")
        failed, taken = 0, {}
        chosen = best_stride(SUBGROUPS, times)
        early = [(chosen, window) for window in WINDOWS] if chosen else []
        for stride, window in [*((stride, 0) for stride in strides(SUBGROUPS)), *early]:
            plan = replace(PLAIN, optimizer_offload=100, optimizer_stride=stride, optimizer_window=window)
            seconds, peak, weights = run(plan, model, work, given.steps)
            taken |= {} if window else {stride: seconds}
            worst = max(
                float(((w.float() - expected[key].float()).abs() / (expected[key].float().abs() + 1e-3)).max())
                for key, w in weights.items()
            )
            failed += worst > BOUND
            print(
                f"{stride:8d} {window:7d} {1e3 * seconds:9.1f} {1e3 * (seconds - plain):10.1f} "
                f"{1e3 * times.seconds(SUBGROUPS, stride):9.1f} {peak / 2**30:9.2f} {worst:11.2e}"
            )
        print(f"the model picks {chosen}; the fastest measured is {min(taken, key=taken.__getitem__)}")
        dist.destroy_process_group()
    return 6 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
