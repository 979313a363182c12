"""Our executor beside torch's tensor and context parallelism: the same model, weights and tokens in one world of two.

    torchrun --standalone --nproc-per-node 2 --max-restarts 8 tests/gpu/torch_parallel.py [--device cpu --tiny]

Not collected by pytest. A Markdown row a pair: median seconds of a step (the slower rank's) of both, theirs by ours,
peak bytes, and the last timed step's loss of both, which shows that the same was computed; where they differ it says
so and ends with 6. A row that fails ends the world; torchrun starts it again and the next row follows. What several
rows have in common is run once.

Alike: micro-batches, bf16 weights from the same numbers, cuDNN attention that knows of grouped heads (FlashAttention in
theirs where a row says so), logits in bf16, fp32 masters and moments, one fused AdamW a step, no compiling but where a
row says so. At 64 k tokens both recompute whole layers: theirs would not fit otherwise, as its loss alone takes 50 GB.
Different: theirs runs under autograd; its gradients add up in bf16 (ours in fp32) and are widened once for the update;
its norm is torch's fused one; its loss widens the logits of a micro-batch whole (ours in chunks of 64 MiB); it makes
cos and sin tables in bf16. With tensor parallelism its q, k, v and gate, up are products of their own (ours are fused),
and embedding, head and loss are divided as torchtitan divides them. With context parallelism its replicas' gradients
are summed beside the backward by DistributedDataParallel; rows of Ulysses stand beside its ring, for it has no other.
On a CPU its context_parallel knows no kernel: there its ring is put around the CPU's (torch_context.divide_on_cpu), so
that losses can be compared, and times say nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from torch.nn.attention import SDPBackend
from torch_context import Context
from torch_model import LLAMA_1B, TINY
from torch_rows import Pair, chosen, parser, walk
from torch_side import Choices, Side
from torch_tensor import TensorParallel

from autotune.runners.job import Job
from autotune.runners.standing import Standing
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

USUAL, FLASH = Choices(grouped=True), Choices(SDPBackend.FLASH_ATTENTION, grouped=True)
COMPILED = "-compiled"  # ends the name of a row whose other side is compiled


@dataclass(frozen=True)
class Case:
    """A plan of ours, the work, and what torch's way to do it is called and made by; `length` of each sequence."""

    plan: Plan
    length: int
    sequences: int
    theirs: str
    make: Callable[[Job, Standing, Choices], Side]
    choices: Choices = USUAL


def tensor(sequence: bool) -> Case:
    theirs = f"parallelize_module{', SequenceParallel' if sequence else ''}"
    plan = Plan(tensor=2, micro_batch=4, sequence_parallel=sequence)
    return Case(plan, 4096, 16, theirs, TensorParallel)


def context(ring: int, length: int, sequences: int, rotate: str = "allgather", choices: Choices = USUAL) -> Case:
    kernel = ", flash" if choices is FLASH else ""
    theirs = f"context_parallel, {rotate}{kernel}, {length}"
    plan = Plan(context=2, context_ring=ring, recompute="full" if length > 32768 else "none")
    return Case(plan, length, sequences, theirs, partial(Context, rotate=rotate), choices)


CASES = {  # in the order of their importance
    "tp2": tensor(False),
    "tp2-sequence": tensor(True),
    "ring-64k": context(2, 65536, 1),
    "ulysses-64k": context(1, 65536, 1),
    "ring-16k": context(2, 16384, 4),
    "ulysses-16k": context(1, 16384, 4),
    "ring-64k-alltoall": context(2, 65536, 1, "alltoall"),
    "ring-16k-alltoall": context(2, 16384, 4, "alltoall"),
    "ring-64k-flash": context(2, 65536, 1, choices=FLASH),
    "ring-16k-flash": context(2, 16384, 4, choices=FLASH),
}
COMPILABLE = ("tp2", "tp2-sequence", "ring-64k", "ring-16k")
USUALLY = tuple(name for name in CASES if not name.endswith("-flash"))


def case(name: str) -> Case:
    """The case of a row."""
    found = CASES[name.removesuffix(COMPILED)]
    if not name.endswith(COMPILED):
        return found
    return replace(found, theirs=f"{found.theirs}, compiled", choices=replace(found.choices, compiled=True))


def job_of(one: Case, asked: argparse.Namespace) -> Job:
    """What a row has ours do: as the case says, or all of it small."""
    cuda = asked.device == "cuda"
    work = Workload(sequence_length=one.length, global_batch=one.sequences, precision="bf16" if cuda else "fp32")
    if asked.tiny:
        work = replace(work, sequence_length=one.length // 128)
    plan = one.plan.altered(attention="cudnn" if cuda else "sdpa")
    model = TINY if asked.tiny else LLAMA_1B
    return Job(plan, model, work, asked.steps, asked.warmup, device=asked.device, trace=False)


def pair(asked: argparse.Namespace, name: str, world: Standing) -> Pair:
    """One row."""
    one = case(name)
    job = job_of(one, asked)
    return Pair(job, one.theirs, lambda: one.make(job, world, one.choices))


def main() -> NoReturn:
    every = [*CASES, *(name + COMPILED for name in COMPILABLE)]
    made = parser(__doc__, "--only", every, USUALLY)
    made.add_argument("--compile", action="store_true", help="rows whose torch side is compiled layer by layer, last")
    made.set_defaults(steps=4)
    asked = made.parse_args()
    names = chosen(made, "--only", asked.names, every)
    if asked.compile:
        names += [name + COMPILED for name in COMPILABLE if name in names and name + COMPILED not in names]
    walk(names, partial(pair, asked), asked)


if __name__ == "__main__":
    main()
