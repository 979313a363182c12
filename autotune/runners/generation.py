"""The operations of generation: what F, PICK, TAKE, SEND and RECV do on this rank, and the loop around two programs.

The prefill program runs once, then the decode program once a token. Everything that a step reads and writes stays
where it is (weights, cache, newest tokens, positions), so that it is the same list of calls each time: on CUDA what
computes is captured once and replayed, and the host runs ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import inference_body, lower_generation
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.runners.body import Call, Values, Watch, compile_body, run_body
from autotune.runners.capture import Captured
from autotune.runners.clock import Clock
from autotune.runners.interpreter import Interpreter, Operation, Started, Trace
from autotune.runners.mesh import Mesh, barrier, staged
from autotune.runners.ops import Env, KVCache, grouped
from autotune.runners.ops.attention import unsupported
from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.prompts import Prompts
from autotune.runners.rope import tables
from autotune.runners.sampling import drawn, draws, likeliest
from autotune.runners.state import DTYPES, Loader, StageState
from autotune.runners.tokens import check_generation
from autotune.spec.errors import InfeasibleError, Problem, UsageError
from autotune.spec.graph import Block
from autotune.spec.graph import blocks as all_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction
from autotune.spec.workload import Workload

COMPUTING = ("F", "PICK", "TAKE")  # what a CUDA graph may hold: the rest are messages
LOOK = {"cpu": 1, "cuda": 16}  # tokens after which it is asked whether all have ended: a device is waited for


class Generated(NamedTuple):
    """`tokens`: int64 [batch, new_tokens] on the CPU, the same on every rank; where all answers have ended before
    there are so many, fewer. Seconds are this rank's own."""

    tokens: Tensor
    prefill_s: float  # until the first token is there
    token_s: tuple[float, ...]  # of each further token


class _Step(NamedTuple):
    """One block of a pass, resolved. `env` lacks only where the step starts."""

    block: Block
    calls: tuple[Call, ...]
    env: Env
    source: str  # what the body calls its input
    output: str


@dataclass(frozen=True)
class _Pass:
    """One kind of step: its shape, the blocks of this stage, the interpreter of its program."""

    shape: Shape
    steps: tuple[_Step, ...]
    interpreter: Interpreter


def _check_capture(model: ModelSpec, workload: Workload, plan: Plan, device: torch.device) -> None:
    """Raises UsageError where a pass cannot be captured because the host would have to know how many rows an expert
    has."""
    products = [node for block in all_blocks(model) for node in block.nodes if node.op == "grouped"]
    for node in products if device.type == "cuda" else ():
        why = grouped.unsupported(device, DTYPES[workload.precision], *grouped.widths(node, plan.tensor))
        if why is not None:
            expected = f"products by expert in one kernel, which {why}"
            problem = Problem("plan", node.name, f"experts in {workload.precision} on {device.type}", expected)
            raise UsageError("passes of this model cannot be captured:", problems=[problem])


@dataclass
class Generator:
    """One rank of a generation. `generate` may be called again and again: weights and cache stay allocated."""

    plan: Plan
    model: ModelSpec
    workload: Workload
    mesh: Mesh
    state: StageState
    cache: KVCache
    values: dict[str, Any]
    picked: Tensor  # int64 [1]: tokens of each sequence in `out`
    ends: Tensor  # int64 [batch]: the row of each prompt's last token among all of the prefill
    draws: Tensor  # float64 [batch, new_tokens]
    filled: Tensor  # int64 [batch]: positions of each sequence's cache that are filled before a decoded token
    lengths: Lengths  # the same as kernels read it
    seed: int = 0
    prefill: _Pass = field(init=False)
    decode: _Pass = field(init=False)
    watch: list[tuple[Block, Shape, Watch]] | None = None
    _pass: _Pass = field(init=False)
    _start: int = 0  # tokens in the cache before this step, of the longest sequence
    _alike: bool = True  # all sequences have as many

    @classmethod
    def build(
        cls,
        plan: Plan,
        model: ModelSpec,
        workload: Workload,
        rank: int,
        device: torch.device,
        load: Loader,
        seed: int = 0,
    ) -> Generator:
        """Groups, this stage's weights and cache, and the compiled bodies; `seed`: of what is drawn.

        Raises InfeasibleError or UsageError, before any weight is loaded, for what cannot run.
        """
        check_generation(model, workload)
        if reason := why_not(model, workload, plan):
            raise InfeasibleError(f"plan {plan.describe()}: {reason}")
        dtype, prompt = DTYPES[workload.precision], workload.prompt_length
        window = model.window if prompt > model.window else 0
        if refused := unsupported(plan.attention, device, dtype, model.head_dim, prompt, window):
            problem = Problem("plan", "attention", plan.attention, f"a backend that runs here: this one {refused}")
            raise UsageError("the plan's attention cannot prefill:", problems=[problem])
        _check_capture(model, workload, plan, device)
        sizes = (prompt, prompt), (1, prompt + 1)
        programs = [expand(lower_generation(plan, model, workload, *size), plan) for size in sizes]
        mesh = Mesh.build(plan, programs, rank, device)
        blocks = stage_blocks(model, cut_of(plan, model))[mesh.pipeline]
        state = StageState.build(
            blocks,
            load,
            precision=workload.precision,
            tensor_size=plan.tensor,
            shards=1,
            shard=0,
            device=device,
            train=False,
        )
        each, most = workload.batch // plan.data, prompt + workload.new_tokens
        layers = sum(block.kind == "layer" for block in blocks)
        cache = KVCache.empty(model, layers, each, most, tensor_size=plan.tensor, dtype=dtype, device=device)
        s = mesh.pipeline
        values: dict[str, Any] = {f"w.{s}": state.weight, f"kv.{s}": (cache.k, cache.v)}
        if s == 0:
            values["prompt"] = torch.zeros((each, prompt), dtype=torch.int64, device=device)
            values["token"] = torch.zeros(each, dtype=torch.int64, device=device)
        if s == plan.pipeline - 1:
            values["out"] = torch.zeros((each, workload.new_tokens), dtype=torch.int64, device=device)
        picked = torch.zeros(1, dtype=torch.int64, device=device)
        ends = torch.zeros(each, dtype=torch.int64, device=device)
        numbers = torch.zeros((each, workload.new_tokens), dtype=torch.float64, device=device)
        filled, lengths = torch.zeros_like(ends), Lengths.empty(each, 1, most, device)
        generator = cls(plan, model, workload, mesh, state, cache, values, picked, ends, numbers, filled, lengths, seed)
        rope = tables(model, most, device)
        generator.prefill, generator.decode = (
            generator._compile(
                generation_shape(plan, workload, *size), rope, Interpreter(program, rank, {}, values, device)
            )
            for program, size in zip(programs, sizes, strict=True)
        )
        generator._pass = generator.prefill
        return generator

    def _compile(self, shape: Shape, rope: tuple[Tensor, Tensor], interpreter: Interpreter) -> _Pass:
        interpreter.operations = self.operations()
        if self._captures():
            pool: Any = torch.cuda.graph_pool_handle()
            captured = {name: Captured(interpreter.operations[name], pool) for name in COMPUTING}
            interpreter.operations = {**interpreter.operations, **captured}
        device_knows = self._captures() and shape.keys > shape.queries
        env = Env(
            self.model,
            shape.batch,
            shape.queries,
            self.filled if device_knows else torch.arange(shape.queries, device=self.mesh.device),
            rope,
            {},
            tensor_rank=self.mesh.tensor,
            tensor_size=self.plan.tensor,
            all_reduce=self.mesh.all_reduce,
            attention=self.plan.attention,
            cache=self.cache,
            lengths=self.lengths if device_knows else None,
        )
        steps, layer = [], 0
        for block in self.state.blocks:
            body = inference_body(block, shape)
            own = replace(env, weights=self.state.of(block)[0], layer=layer)
            source = block.nodes[0].reads[0]
            steps.append(_Step(block, compile_body(block, body.forward), own, source, body.output))
            layer += block.kind == "layer"
        return _Pass(shape, tuple(steps), interpreter)

    def _captures(self) -> bool:
        """Whether steps are CUDA graphs: not where the tensor group's messages go through the host."""
        return self.mesh.device.type == "cuda" and (self.plan.tensor == 1 or not staged(self.mesh.device))

    def generate(
        self,
        prompts: Prompts,
        traces: Mapping[int, Trace] | None = None,
        ended: Callable[[list[list[int]]], bool] | None = None,
    ) -> Generated:
        """Continues all prompts of the workload, on every rank, by new_tokens or until all have `ended`, which is asked
        of the answers so far.

        `traces` records steps by number: 0 is the prefill, n the step that picks token n. Raises UsageError for
        another shape and for token ids that the vocabulary does not have.
        """
        self._feed(prompts)
        if self.plan.world > 1:
            barrier(self.mesh.device)
        clock = Clock(self.mesh.device)
        marks = [clock.mark()]
        for step in range(self.workload.new_tokens):
            self._pass = self.decode if step else self.prefill
            self._start = max(prompts.lengths) + step - 1 if step else 0
            self.picked.fill_(step)
            if step > 1:
                self.filled.add_(1)
            if step:
                self.lengths.move(self.filled)
            self._pass.interpreter.step((traces or {}).get(step), wait=False)
            marks.append(clock.mark())
            if ended and (step + 1) % LOOK[self.mesh.device.type] == 0 and self._all(ended, step + 1):
                break
        clock.settle()
        seconds = [clock.between(a, b) for a, b in pairwise(marks)]
        return Generated(self._gather()[:, : len(seconds)], seconds[0], tuple(seconds[1:]))

    def _all(self, ended: Callable[[list[list[int]]], bool], many: int) -> bool:
        """Whether every rank's answers of so many tokens have ended."""
        mine = ended(self.values["out"][:, :many].tolist()) if "out" in self.values else True
        if self.plan.world == 1:
            return mine
        agreed = torch.tensor([int(mine)], device=self.mesh.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _feed(self, prompts: Prompts) -> None:
        expected = (self.workload.batch, self.workload.prompt_length)
        tokens, lengths, problem = prompts.tokens, prompts.lengths, None
        if tuple(tokens.shape) != expected:
            found = str(list(tokens.shape))
            problem = Problem("prompts", "shape", found, f"[batch, prompt_length] = {list(expected)}")
        elif len(lengths) != expected[0] or not all(1 <= length <= expected[1] for length in lengths):
            problem = Problem("prompts", "lengths", str(list(lengths)), f"{expected[0]} from 1 to {expected[1]}")
        elif int(tokens.min()) < 0 or int(tokens.max()) >= self.model.vocab:
            found = f"token ids from {int(tokens.min())} to {int(tokens.max())}"
            problem = Problem("prompts", "tokens", found, f"0 to {self.model.vocab - 1}")
        if problem is not None:
            raise UsageError("these prompts cannot be continued:", problems=[problem])
        each = self.workload.batch // self.plan.data
        here = slice(self.mesh.data * each, (self.mesh.data + 1) * each)
        own = torch.tensor(lengths[here])
        self._alike = len(set(lengths[here])) == 1
        self.filled.copy_(own)
        self.ends.copy_(torch.arange(each) * expected[1] + own - 1)
        if self.workload.temperature:
            first = prompts.first + here.start
            self.draws.copy_(draws(self.seed, first, each, self.workload.new_tokens))
        if "prompt" in self.values:
            self.values["prompt"].copy_(tokens[here])

    def _gather(self) -> Tensor:
        """All replicas' tokens, from the last stage's first tensor rank of each, on every rank."""
        each = self.workload.batch // self.plan.data
        whole = torch.zeros((self.workload.batch, self.workload.new_tokens), dtype=torch.int64, device=self.mesh.device)
        if "out" in self.values and self.mesh.tensor == 0:
            whole[self.mesh.data * each : (self.mesh.data + 1) * each] = self.values["out"]
        if self.plan.world > 1:
            dist.all_reduce(whole)
        return whole.cpu()

    def operations(self) -> Mapping[str, Operation]:
        return {"F": self.forward, "PICK": self.pick, "TAKE": self.take, "SEND": self.send, "RECV": self.receive}

    def forward(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The stage's blocks one after another: (the cache, the next stage's input or the logits)."""
        now = self._pass
        x: Tensor = values[instruction.reads[2]]
        x = x if instruction.stage else x.reshape(-1)
        for step in now.steps:
            if step.block.kind == "head" and now.shape.queries > 1:  # what follows each sequence's last token
                x = x.index_select(0, self.ends)
            x = self._run(step, x)
        return values[instruction.writes[0]], x

    def _run(self, step: _Step, x: Tensor) -> Tensor:
        """One block's body; a function of its own, so that nothing it made outlives it but its output."""
        watch = None
        if self.watch is not None:
            watch = Watch(outside=frozenset({step.source}))
            self.watch.append((step.block, self._pass.shape, watch))
        given: Values = {step.source: x}
        if self._captures() or self._pass is self.prefill:
            env = step.env
        elif self._alike:
            env = replace(step.env, start=self._start, positions=self.filled[:1])
        else:
            env = replace(step.env, start=self._start, positions=self.filled, lengths=self.lengths)
        return run_body(step.calls, env, given, self.mesh.axes, watch)[step.output]

    def pick(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The next token of each sequence."""
        logits = values["logits"]
        token = self._drawn(logits) if self.workload.temperature else self._likeliest(logits)
        out = values["out"]
        out.index_copy_(1, self.picked, token[:, None])
        if instruction.writes[0] == "token":  # one stage alone: where the next step reads it
            token = values["token"].copy_(token)
        return token, out

    def _drawn(self, logits: Tensor) -> Tensor:
        """One of each row by its probability: every tensor rank draws the same from the whole row."""
        if self.plan.tensor > 1:
            parts = logits.new_empty((self.plan.tensor * len(logits), logits.shape[1]))
            dist.all_gather_into_tensor(parts, logits.contiguous(), group=self.mesh.axes["tensor"])
            logits = parts.view(self.plan.tensor, len(logits), -1).transpose(0, 1).flatten(1)
        now = self.draws.index_select(1, self.picked).squeeze(1)
        return drawn(logits, now, self.workload)

    def _likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest of each row; of equal ones the first, whoever holds it."""
        best, token = likeliest(logits)
        if self.plan.tensor > 1:
            mine = torch.stack((best.double(), (token + self.mesh.tensor * logits.shape[1]).double()))
            pairs = mine.new_empty((self.plan.tensor * 2, mine.shape[1]))
            dist.all_gather_into_tensor(pairs, mine, group=self.mesh.axes["tensor"])
            pairs = pairs.view(self.plan.tensor, 2, -1)
            owner = pairs[:, 0].argmax(dim=0, keepdim=True)
            token = pairs[:, 1].gather(0, owner).squeeze(0).long()
        return token

    def take(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return (values["token"].copy_(values["t"]),)

    def send(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        return Started((), self.mesh.send(instruction, values[instruction.reads[0]]))

    def receive(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        """A boundary activation [tokens, hidden] in the compute precision, or the picked tokens, int64 [batch]."""
        shape, device = self._pass.shape, self.mesh.device
        if instruction.writes[0] == "t":
            empty = torch.empty(shape.batch, dtype=torch.int64, device=device)
        else:
            dtype = DTYPES[self.workload.precision]
            empty = torch.empty((shape.tokens, self.model.hidden), dtype=dtype, device=device)
        return Started((empty,), self.mesh.receive(instruction, empty))
