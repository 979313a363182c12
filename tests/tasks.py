"""What the pool's workers do: each function runs on every rank of a gloo world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autotune.planners.lower.generate import inference_body
from autotune.planners.lower.join import joined_body
from autotune.planners.simulate import memory
from autotune.profiles_db.cores import all_cores, own_cores, share_of
from autotune.runners import reference
from autotune.runners.body import COLLECTIVES
from autotune.runners.checkpoint import shard
from autotune.runners.decoding.ranked import ranks_of
from autotune.runners.generation import Generator
from autotune.runners.interpreter import Trace
from autotune.runners.job import Job, RunResult
from autotune.runners.memory import peak_during
from autotune.runners.ops import Env
from autotune.runners.overhead import TINY
from autotune.runners.prompts import Prompts
from autotune.runners.reference import init_weight
from autotune.runners.rows import Batch, prepared
from autotune.runners.standing import Standing
from autotune.runners.state import DTYPES
from autotune.runners.training import Trainer
from autotune.runners.worker import part
from autotune.spec.graph import Weight
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.fitted import loaded

WIDE = {torch.bfloat16: torch.float32}  # what NumPy knows in the place of what it does not


def random_rows(model: ModelSpec, workload: Workload) -> Batch:
    """The same with the first step's masks, where a training has such."""
    return prepared(model, workload, Batch(*random_batch(workload, model.vocab)), 0)


def even(plan: Plan, model: ModelSpec) -> bool:
    """Whether as many rows come to a rank's experts as it sends, whatever the router says."""
    return plan.expert == 1 or model.experts is None or model.experts.top_k == model.experts.count


def random_batch(workload: Workload, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(vocab, (workload.global_batch, workload.sequence_length + 1), generator=generator)
    return text[:, :-1].clone(), text[:, 1:].clone()  # one row alone would be two views of one storage


def train(
    rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload, steps: int, faults: Any = ()
) -> dict[str, Any]:
    """Runs `steps` steps; gives losses, the first step's summed gradients, the last weights, and the trace.

    `faults`, (step, weight, value), are added to the summed gradient of a weight before its norm is taken.
    """
    load = lambda index, weight: shard(  # noqa: E731
        weight, init_weight(weight, 0, DTYPES[workload.precision]), trainer_tensor, plan.tensor
    )
    trainer_tensor = rank % plan.tensor
    whole = lambda index, weight: init_weight(weight, 0, DTYPES[workload.precision])  # noqa: E731
    frozen = whole if isinstance(model, HeadsSpec) else None
    load = reference.begun(model.target, load, whole) if isinstance(model, HeadsSpec) and model.target else load
    trainer = Trainer.build(plan, model, workload, rank, torch.device("cpu"), load, frozen)
    tokens, targets, rows = random_rows(model, workload)
    each = workload.global_batch // plan.data
    mine = slice(trainer.mesh.data * each, (trainer.mesh.data + 1) * each)
    gradients: dict[tuple[int, str], Any] = {}

    def capture(instruction: Any, values: Any) -> None:
        grad = trainer.states[instruction.stage].grad
        for key, gradient in trainer.whole(instruction.stage, grad).items():
            gradients.setdefault(key, gradient.clone().numpy())

    spoilt: set[int] = set()
    begun: list[int] = []

    def spoil(instruction: Any, values: Any) -> None:
        for number, (when, key, value) in enumerate(faults):
            if when == step and number not in spoilt:
                spoilt.add(number)
                for state in trainer.states.values():
                    if key in state.places:
                        state.part(state.grad, state.known(state.places[key].range)).add_(value)

    trainer.interpreter.hooks = {"OPT": capture, "NORM": spoil, "VALIDATE": lambda i, values: begun.append(step)}
    losses, trace = [], Trace()
    for step in range(steps):
        trainer.feed(Batch(tokens[mine], targets[mine], rows))
        if step == 0:
            trainer.watch = []
        trainer.interpreter.step(trace if step == 0 else None)
        if step == 0:
            _bodies_as_predicted(trainer)
            trainer.watch = None
        loss = trainer.interpreter.values.get("loss")
        losses.append(float(loss) if loss is not None else 0.0)
    trainer.finish()
    weights = {
        k: w.to(WIDE.get(w.dtype, w.dtype)).numpy()
        for stage, state in trainer.states.items()
        for k, w in trainer.whole(stage, state.weight).items()
    }
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": weights,
        "order": trace.order,
        "memory": trace.memory,
        "tensor": trainer.mesh.tensor,
        "pipeline": trainer.mesh.pipeline,
        "expert": trainer.mesh.expert,
        "sent": None,
        "validated": begun,  # the step of every validation: twice the same where it began again
    }


def _bodies_as_predicted(trainer: Trainer) -> None:
    """Every body ran in the program's order and held exactly the bytes that the simulator's walk says."""
    assert trainer.watch
    for block, op, many, watch in trainer.watch:
        body = joined_body(block, trainer.shape, trainer.plan.recompute, many)
        program = body.program(op)
        assert watch.order == [i.op for i in program.ranks[0]]
        predicted = memory(program, lambda r, i: 0)[0].get("device", [])
        assert not even(trainer.plan, trainer.model) or watch.series == predicted, (
            block.kind,
            op,
            list(zip(watch.order, watch.series, predicted, strict=True)),
        )


def peak(rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload) -> int:
    """Bytes at the peak of a warm step, counted."""
    torch.set_grad_enabled(False)
    load = lambda index, weight: shard(  # noqa: E731
        weight, init_weight(weight, 0, DTYPES[workload.precision]), rank % plan.tensor, plan.tensor
    )
    trainer = Trainer.build(plan, model, workload, rank, torch.device("cpu"), load)
    tokens, targets, rows = random_rows(model, workload)
    each = workload.global_batch // plan.data
    mine = slice(trainer.mesh.data * each, (trainer.mesh.data + 1) * each)
    trainer.feed(Batch(tokens[mine], targets[mine], rows))
    trainer.interpreter.step()
    return peak_during(trainer.interpreter.step, trainer.interpreter.values, torch.device("cpu"))


def sharded_bytes(rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload) -> int:
    """Bytes that this rank hands on in one step's gathers and scattered sums over the data ranks, as the ring
    algorithms do: of a whole tensor all but one share."""
    handed: list[int] = []

    def counting(operation: Any, whole: int) -> Any:
        def run(*tensors: torch.Tensor, **rest: Any) -> Any:
            handed.append(tensors[whole].nbytes * (plan.data - 1) // plan.data)
            return operation(*tensors, **rest)

        return run

    load = lambda index, weight: shard(weight, init_weight(weight, 0, DTYPES[workload.precision]), 0, 1)  # noqa: E731
    trainer = Trainer.build(plan, model, workload, rank, torch.device("cpu"), load)
    tokens, targets, rows = random_rows(model, workload)
    each = workload.global_batch // plan.data
    mine = slice(trainer.mesh.data * each, (trainer.mesh.data + 1) * each)
    trainer.feed(Batch(tokens[mine], targets[mine], rows))
    was = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    try:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = counting(was[0], 0), counting(was[1], 1)
        trainer.interpreter.step()
    finally:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = was
    return sum(handed)


def expert_rows(rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload) -> tuple[list[int], list[int]]:
    """Of each all-to-all of one step the bytes that this rank hands to others, and the rows that it gets."""
    handed, came = [], []
    exchange = dist.all_to_all_single

    def counting(received: torch.Tensor, sent: torch.Tensor, into: Any = None, out: Any = None, **rest: Any) -> Any:
        ranks, own = dist.get_world_size(rest["group"]), dist.get_rank(rest["group"])
        parts = out or [len(sent) // ranks] * ranks
        handed.append((len(sent) - parts[own]) * (sent.nbytes // max(1, len(sent))))
        came.append(len(received))
        return exchange(received, sent, into, out, **rest)

    load = lambda index, weight: shard(  # noqa: E731
        weight, init_weight(weight, 0, DTYPES[workload.precision]), rank % plan.tensor, plan.tensor
    )
    trainer = Trainer.build(plan, model, workload, rank, torch.device("cpu"), load)
    tokens, targets = random_batch(workload, model.vocab)
    each = workload.global_batch // plan.data
    mine = slice(trainer.mesh.data * each, (trainer.mesh.data + 1) * each)
    trainer.feed((tokens[mine], targets[mine]))
    try:
        dist.all_to_all_single = counting
        trainer.interpreter.step()
    finally:
        dist.all_to_all_single = exchange
    return handed, came


def taken(rank: int, world: int, op: str, rows: int, columns: int) -> int:
    """Bytes that a collective of a body takes beyond its operands while it runs: [rows, columns] whole, fp32."""
    x = torch.ones(rows // world if op == "all_gather" else rows, columns)
    env = Env(TINY, 1, rows, torch.arange(rows), (x, x), {}, tensor_size=world)
    found: list[Any] = []

    def run() -> None:
        made, work = COLLECTIVES[op](env, None, (x,))
        work.wait()  # type: ignore[attr-defined]
        found.append(made)

    run()
    most = peak_during(run, {}, torch.device("cpu"))
    return most - (0 if found[-1] is x else found[-1].nbytes)


def random_prompts(workload: Workload, vocab: int) -> torch.Tensor:
    """The whole batch of prompts, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(vocab, (workload.batch, workload.prompt_length), generator=generator)


def lively_weight(weight: Weight, precision: str) -> torch.Tensor:
    """Random weights large enough that every layer, and every token before it, has a say in the next token."""
    return init_weight(weight, 0, DTYPES[precision]) * (15 if weight.init == "normal" else 1)


def generate(rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload) -> dict[str, Any]:
    """Generates twice (the second time traced); gives the tokens, and the prefill's and the last token's trace."""
    load = lambda index, weight: shard(  # noqa: E731
        weight, lively_weight(weight, workload.precision), rank % plan.tensor, plan.tensor
    )
    generator = Generator.build(plan, model, workload, rank, torch.device("cpu"), load)
    whole = random_prompts(workload, model.vocab)
    prompts = Prompts(whole, (workload.prompt_length,) * workload.batch)
    again = generator.generate(prompts._replace(tokens=whole.flip(0))).tokens.flip(0)  # other keys stay in the cache
    traces = {0: Trace(), workload.new_tokens - 1: Trace()}
    generator.watch = []
    found = generator.generate(prompts, traces)
    for block, shape, watch in generator.watch:
        program = inference_body(block, shape).forward
        assert watch.order == [i.op for i in program.ranks[0]]
        predicted = memory(program, lambda r, i: 0)[0].get("device", [])
        assert watch.series == predicted, (
            block.kind,
            shape,
            list(zip(watch.order, watch.series, predicted, strict=True)),
        )
    assert len(found.token_s) == workload.new_tokens - 1
    return {
        "tokens": found.tokens.tolist(),
        "again": again.tolist(),
        "traces": [(trace.order, trace.memory) for trace in traces.values()],
    }


def answer(
    rank: int,
    world: int,
    plan: Plan,
    model: ModelSpec,
    workload: Workload,
    lengths: tuple[int, ...],
    until: tuple[int, ...] = (),
    noise: float = 0.0,
    heads: dict[str, torch.Tensor] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens after prompts of these lengths, generated after others, with seed 3; until every answer has the token
    of `until` that is its own. And how many tokens each round committed. A draft has weights that differ by `noise`;
    heads have these projections."""
    load = lambda index, weight: shard(  # noqa: E731
        weight, lively_weight(weight, workload.precision), rank % plan.tensor, plan.tensor
    )

    def load_draft(index: int, weight: Weight) -> torch.Tensor:
        if heads is not None:
            return loaded(heads, weight, DTYPES[workload.precision])
        whole = lively_weight(weight, workload.precision)
        return whole + noise * torch.randn(whole.shape, generator=torch.Generator().manual_seed(index))

    generator = Generator.build(plan, model, workload, rank, torch.device("cpu"), load, seed=3, load_draft=load_draft)
    whole = random_prompts(workload, model.vocab)
    generator.generate(Prompts(whole.flip(1), workload.prompt_lengths or (workload.prompt_length,) * workload.batch))
    first = generator.mesh.data * (workload.batch // plan.data)

    def ended(rows: list[list[int]]) -> bool:
        return all(token in row for token, row in zip(until[first:], rows, strict=False))

    found = generator.generate(Prompts(whole, lengths), ended=ended if until else None)
    assert found.taken is not None
    return found.answers, found.taken.tolist()


def ranked(
    rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload, heads: dict[str, torch.Tensor]
) -> tuple[list[list[int]], list[str]]:
    """What each round of heads committed after whole prompts, and the ranks of what came."""
    load = lambda index, weight: lively_weight(weight, workload.precision)  # noqa: E731
    own = lambda index, weight: loaded(heads, weight, DTYPES[workload.precision])  # noqa: E731
    device = torch.device("cpu")
    generator = Generator.build(plan, model, workload, rank, device, load, seed=3, load_draft=own)
    whole = random_prompts(workload, model.vocab)
    found = generator.generate(Prompts(whole, (workload.prompt_length,) * workload.batch))
    texts = [([*row.tolist(), *answer], len(row)) for row, answer in zip(whole, found.answers, strict=True)]
    assert found.taken is not None
    ranks = ranks_of(generator.proposer.rankers(), plan, model, workload, load, texts, device)
    return [[count for count in row if count] for row in found.taken.tolist()], list(ranks)


def verified(
    rank: int, world: int, plan: Plan, model: ModelSpec, workload: Workload, heads: dict[str, torch.Tensor]
) -> list[tuple[list[list[int]], list[list[int]], torch.Tensor]]:
    """Of each round the texts, what was scored after them (the newest token first), and its logits."""
    load = lambda index, weight: lively_weight(weight, workload.precision)  # noqa: E731
    own = lambda index, weight: loaded(heads, weight, DTYPES[workload.precision])  # noqa: E731
    generator = Generator.build(plan, model, workload, rank, torch.device("cpu"), load, seed=3, load_draft=own)
    found: list[tuple[list[list[int]], list[list[int]], torch.Tensor]] = []

    def look(instruction: Any, values: Any) -> None:
        texts, filled = generator.sequences.text.tolist(), generator.sequences.filled.tolist()
        before = [row[:count] for row, count in zip(texts, filled, strict=True)]
        slate = values[instruction.reads[2]]
        found.append((before, slate.tolist(), values["logits"].view(*slate.shape, -1).clone()))

    generator.decode.interpreter.hooks = {"COMMIT": look}
    whole = random_prompts(workload, model.vocab)
    generator.generate(Prompts(whole, (workload.prompt_length,) * workload.batch))
    return found


def bind(rank: int, world: int) -> tuple[tuple[int, ...], int]:
    """The cores that a CPU worker of this world computes on, and its threads; lets them go again."""
    own_cores(rank, world, all_cores())
    bound = (
        tuple(sorted(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else share_of(rank, world, all_cores())
    )
    threads = torch.get_num_threads()
    own_cores(0, 1, all_cores())
    torch.set_num_threads(1)
    return bound, threads


def standing(rank: int, world: int, jobs: list[Job], folder: Path) -> list[tuple[float, ...]]:
    """The losses of jobs that run one after another in this world."""
    torch.set_grad_enabled(False)
    here = Standing(rank, world, torch.device("cpu"), folder)
    return [here.run(job, str(number), 100.0).losses for number, job in enumerate(jobs)]


def work(rank: int, world: int, job: Path, folder: Path) -> None:
    """What a worker of a launch does in a world that it has joined."""
    torch.set_grad_enabled(False)
    part(Job.from_json(job.read_text()), rank, torch.device("cpu"), folder)


def results(rank: int, world: int, jobs: list[Job], folder: Path) -> list[RunResult]:
    """The results of jobs that run one after another in this world."""
    torch.set_grad_enabled(False)
    here = Standing(rank, world, torch.device("cpu"), folder)
    return [here.run(job, str(number), 200.0) for number, job in enumerate(jobs)]
