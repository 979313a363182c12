"""Our executor beside `torch.distributed.pipelining`: the same model, weights, tokens and schedule in one world.

    torchrun --standalone --nproc-per-node 2 --max-restarts 8 tests/gpu/torch_pipelining.py [--device cpu --tiny]

Not collected by pytest. A Markdown row a schedule: median seconds of a step (the slower rank's) of both, theirs by
ours, peak bytes, and the last timed step's loss of both, which shows that the same was computed; where they differ
it says so. A row that fails ends the world; torchrun starts it again and the next schedule follows.

Alike: layers of each stage, micro-batches, bf16 weights from the same numbers, cuDNN attention with repeated key heads,
fused q, k, v and gate, up products, logits in bf16, fp32 masters and moments, one fused AdamW a step, no compiling.
Different: theirs runs under autograd; its gradients add up in bf16 (ours in fp32) and are widened once for the update;
its norm is torch's fused one; its loss widens the logits of a micro-batch whole (ours in chunks of 64 MiB); it makes
cos and sin tables in bf16. "interleaved zero bubble" is compared with the nearest of ours, 2bp-interleaved-fill.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.planners.lower.traits import micro_batches, place_of
from autotune.planners.schedules import held
from autotune.runners.job import Job
from autotune.runners.ledger import ENDED, Ledger, Row
from autotune.runners.mesh import barrier
from autotune.runners.reference import BETAS, EPSILON, init_weight
from autotune.runners.rope import tables
from autotune.runners.standing import Standing, attempt_here
from autotune.runners.state import DTYPES
from autotune.runners.train_run import batches
from autotune.spec.graph import Block, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

SAME_LOSS = 1e-2  # relative, after some updates: the two round to bf16 in other places
DDP = "DistributedDataParallel"
PAIRS = {  # ours: (theirs, chunks a rank), in the order of their importance; GPipe holds most memory and comes last
    "1f1b": ("Schedule1F1B", 1),
    "interleaved-1f1b": ("ScheduleInterleaved1F1B", 2),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
    "dualpipe-v": ("ScheduleDualPipeV", 2),
    "2bp-interleaved-fill": ("ScheduleInterleavedZeroBubble", 2),
    "breadth-first": ("ScheduleLoopedBFS", 2),
    "data": (DDP, 1),
    "gpipe": ("ScheduleGPipe", 1),
}


class Attention(nn.Module):
    """Causal grouped-query attention on x [batch, sequence, width of q, k and v]."""

    def __init__(self, model: ModelSpec, rope: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.model, (self.cos, self.sin) = model, rope

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-b, a), dim=-1) * self.sin

    def forward(self, qkv: Tensor) -> Tensor:
        model = self.model
        batch, sequence, _ = qkv.shape
        heads = qkv.view(batch, sequence, -1, model.head_dim).transpose(1, 2)
        q, k, v = heads.split([model.heads, model.kv_heads, model.kv_heads], dim=1)
        q, k = self.turn(q), self.turn(k)
        if (groups := model.heads // model.kv_heads) > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return o.transpose(1, 2).reshape(batch, sequence, -1)


class Piece(nn.Module):
    """One block of ours as plain torch: the embedding, a layer, or the head up to its logits."""

    def __init__(self, block: Block, model: ModelSpec, dtype: torch.dtype, rope: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.kind, self.model, self.attention = block.kind, model, Attention(model, rope)
        for weight in block.weights():
            value = init_weight(weight, 0, dtype, rope[0].device)
            setattr(self, weight.name.split(".")[0], nn.Parameter(value))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.model.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "embed":
            return F.embedding(x, self.embed)
        if self.kind == "head":
            return F.linear(self.norm(x, self.final_norm), self.lm_head)
        x = x + F.linear(self.attention(F.linear(self.norm(x, self.attn_norm), self.qkv)), self.out)
        gate, up = F.linear(self.norm(x, self.mlp_norm), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


@dataclass
class Update:
    """AdamW on fp32 masters of the parameters, or on these themselves where they are fp32."""

    parameters: list[nn.Parameter]
    rates: Workload
    masters: list[Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        wide = self.parameters[0].dtype == torch.float32
        self.masters = list(self.parameters) if wide else [p.detach().float() for p in self.parameters]
        if not wide:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        decay = {"lr": self.rates.learning_rate, "weight_decay": self.rates.weight_decay}
        self.optimizer = torch.optim.AdamW(self.masters, betas=BETAS, eps=EPSILON, fused=True, **decay)

    @torch.no_grad()
    def step(self) -> None:
        if self.masters[0] is self.parameters[0]:
            self.optimizer.step()
        else:
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
            self.optimizer.step()
            torch._foreach_copy_([p.data for p in self.parameters], self.masters)
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True)
class Timed:
    """Seconds of each step (the slower rank's), the larger peak in bytes, and the last step's loss."""

    seconds: list[float]
    peak: int
    loss: float


def loss_of(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """The mean negative log-likelihood over `tokens`, of those that are here."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / tokens


class Side(ABC):
    """One rank of torch's way to do a job of ours."""

    def __init__(self, job: Job, world: Standing) -> None:
        self.job, self.world = job, world
        dtype = DTYPES[job.workload.precision]
        cos, sin = (t.to(dtype) for t in tables(job.model, job.workload.sequence_length, world.device))
        self.build = lambda some: nn.Sequential(*(Piece(block, job.model, dtype, (cos, sin)) for block in some))

    @abstractmethod
    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on this rank's sequences; this rank's part of the loss."""

    def run(self) -> Timed:
        job, device = self.job, self.world.device
        replica = self.world.rank % job.plan.data
        feed, seconds, loss = batches(job, replica), [], 0.0
        backends = sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if device.type == "cuda" else nullcontext()
        with torch.enable_grad(), backends:
            for number in range(job.warmup + job.steps):
                tokens, targets = (t.to(device) for t in next(feed))
                if device.type == "cuda" and number == job.warmup:
                    torch.cuda.reset_peak_memory_stats()
                barrier(device)
                begin = time.perf_counter()
                loss = self.step(tokens, targets)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        slowest = torch.tensor([*seconds[job.warmup :], float(peak)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        whole = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(whole)
        *times, most = slowest.tolist()
        return Timed(times, int(most), float(whole))


class Pipeline(Side):
    """torch.distributed.pipelining under the schedule `name`."""

    def __init__(self, job: Job, name: str, world: Standing) -> None:
        super().__init__(job, world)
        plan, model, work = job.plan, job.model, job.workload
        items = micro_batches(plan, work)
        cut = stage_blocks(model, cut_of(plan, model))
        self.stages = held(place_of(plan, items), world.rank)
        parts = [self.build(cut[stage]) for stage in self.stages]
        built = [
            pipelining.PipelineStage(part, stage, plan.stages, world.device)
            for stage, part in zip(self.stages, parts, strict=True)
        ]
        kind: Callable[..., Any] = getattr(pipelining, name)
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        loss = partial(loss_of, tokens=work.tokens)
        self.schedule = kind(built[0] if single else built, items, loss_fn=loss, scale_grads=False)
        self.update = Update([p for part in parts for p in part.parameters()], work)
        takes = inspect.signature(self.schedule.step).parameters
        self.quiet = {"return_outputs": False} if "return_outputs" in takes else {}

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        last = self.job.plan.stages - 1 in self.stages
        given = {"target": targets, "losses": losses} if last else {}
        self.schedule.step(*((tokens,) if 0 in self.stages else ()), **given, **self.quiet)
        self.update.step()
        return float(torch.stack(losses).detach().sum()) if last else 0.0


class Replicas(Side):
    """DistributedDataParallel, its gradients summed (in their bf16) beside the last micro-batch's backward."""

    def __init__(self, job: Job, world: Standing) -> None:
        super().__init__(job, world)
        whole = self.build(blocks(job.model))
        devices = [world.device.index] if world.device.type == "cuda" else None
        self.model = nn.parallel.DistributedDataParallel(whole, devices, gradient_as_bucket_view=True)
        self.update = Update(list(whole.parameters()), job.workload)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        size, replicas = self.job.plan.micro_batch, self.job.plan.data
        parts = list(zip(tokens.split(size), targets.split(size), strict=True))
        losses = []
        for number, (mine, wanted) in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else self.model.no_sync():
                # Gradients are averaged over the replicas: each takes the mean over its own tokens.
                loss = loss_of(self.model(mine), wanted, self.job.workload.tokens // replicas)
                loss.backward()
            losses.append(loss.detach() / replicas)
            del loss
        self.update.step()
        return float(torch.stack(losses).sum())


def row(ours: str, theirs: str, a: Timed, b: Timed) -> Row:
    """`a` ours, `b` theirs."""
    mine, other = statistics.median(a.seconds), statistics.median(b.seconds)
    return {
        "plan": ours,
        "theirs": theirs,
        "theirs_s": other,
        "ours_s": mine,
        "ratio": other / mine,
        "theirs_peak": b.peak,
        "ours_peak": a.peak,
        "theirs_loss": b.loss,
        "ours_loss": a.loss,
        "ours_steps": a.seconds,
        "theirs_steps": b.seconds,
    }


def line(found: Row) -> str:
    if "failed" in found:
        return f"| {found['plan']} | failed: {found['failed'][:160]} |"
    peaks = " | ".join(f"{found[k] / 2**20:.0f}" for k in ("theirs_peak", "ours_peak"))
    return (
        f"| {found['plan']} | {found['theirs']} | {found['theirs_s'] * 1e3:.1f} | {found['ours_s'] * 1e3:.1f} | "
        f"{found['ratio']:.3f} | {peaks} | {found['theirs_loss']:.4f} | {found['ours_loss']:.4f} |"
    )


def job_of(schedule: str, asked: argparse.Namespace, size: int) -> Job:
    """The job of one row: the shape of the suite `h200x2-schedules`, or a tiny one."""
    model = ModelSpec("llama-1b-untied", "LlamaForCausalLM", 2048, 16, 32, 8, 64, 8192, 128256, rope_theta=500000.0)
    cuda = asked.device == "cuda"
    work = Workload(sequence_length=4096, global_batch=16, precision="bf16" if cuda else "fp32")
    if asked.tiny:
        model = replace(model, hidden=64, layers=8, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=512)
        work = replace(work, sequence_length=32, global_batch=8)
    attention = "cudnn" if cuda else "sdpa"
    if schedule == "data":
        plan = Plan(data=size, attention=attention)
    else:
        plan = Plan(pipeline=size, schedule=schedule, chunks=PAIRS[schedule][1], attention=attention)
    return Job(plan, model, work, asked.steps, asked.warmup, device=asked.device, trace=False)


def compare(schedule: str, world: Standing, asked: argparse.Namespace) -> Row:
    """Runs both, ours first."""
    job, theirs = job_of(schedule, asked, world.size), PAIRS[schedule][0]
    if theirs != DDP and not hasattr(pipelining, theirs):
        return {"plan": schedule, "failed": f"torch {torch.__version__} has no {theirs}"}
    ran = world.run(job, schedule, asked.patience)
    ours = Timed(list(ran.step_s), max(ran.peak_bytes), ran.losses[-1])
    with world.watched(world.folder / schedule, asked.patience):
        side = Replicas(job, world) if theirs == DDP else Pipeline(job, theirs, world)
        other = side.run()
        del side
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return row(schedule, theirs, ours, other)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", default=",".join(PAIRS), help="these alone, by our names")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model that a test on a CPU runs in seconds")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60, help="most seconds of either side of a row")
    asked = parser.parse_args()
    names = asked.schedules.split(",")
    if unknown := set(names) - set(PAIRS):
        parser.error(f"--schedules: found {', '.join(sorted(unknown))}; expected some of {', '.join(PAIRS)}")
    world = Standing.join(asked.device)
    again, file = attempt_here() > 0, world.folder / "peer.json"
    ledger = world.share(lambda: Ledger.resume(file) if again else Ledger(file))
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if world.rank == 0 else (lambda text: None)
    if world.rank:
        ledger = Ledger(None, ledger.rows)
    elif last := ledger.unfinished():
        last["failed"] = world.why(last["plan"]) or ENDED
        ledger.save()
        say(line(last))
    if not ledger.rows:
        say("| ours | theirs | theirs ms | ours ms | theirs / ours | theirs MiB | ours MiB | their loss | our loss |")
        say("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        if ledger.row(name) is None:
            begun = ledger.begin(name)
            found = compare(name, world, asked)
            begun.clear()
            begun.update(found)
            ledger.save()
            say(line(begun))
    apart = [r for r in ledger.rows if "failed" not in r and abs(r["theirs_loss"] / r["ours_loss"] - 1) > SAME_LOSS]
    for found in apart:
        say(f"{found['plan']}: the losses differ: {found['theirs_loss']:.4f} and {found['ours_loss']:.4f}")
    world.leave()


if __name__ == "__main__":
    main()
