"""The operations of generation: what F, COMMIT, MOVE, PROPOSE, TAKE, SEND and RECV do on this rank, and the loop around
two programs.

The prefill program runs once, then the program of a round until every answer is whole. Everything that a step reads and
writes stays where it is (weights, cache, texts, how far each of them is), so that it is the same list of calls each
time: on CUDA what computes is captured once and replayed, and the host runs ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.planners.decoding.strategies import STRATEGIES, reads_rows, scored, tree_of
from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import ENDS, lower_generation, news, prompt_parts, text_columns
from autotune.planners.lower.pages import beyond, pool_pages, room
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.runners.body import Watch
from autotune.runners.capture import Captured, CapturedStep
from autotune.runners.clock import Clock
from autotune.runners.decoding.choosing import Chooser
from autotune.runners.decoding.pace import Pace
from autotune.runners.decoding.propose import DRAFTERS, PROPOSERS
from autotune.runners.decoding.rules import RULES, Asked, Kept, Rule
from autotune.runners.decoding.seen import Proposer, Seen
from autotune.runners.decoding.sequences import SPARE, Sequences
from autotune.runners.decoding.settle import settle
from autotune.runners.interpreter import Interpreter, Operation, Started, Trace
from autotune.runners.mesh import Mesh, barrier
from autotune.runners.passes import check_passes
from autotune.runners.prompts import Prompts
from autotune.runners.sampling import draws
from autotune.runners.scorer import Pass, Scorer
from autotune.runners.state import DTYPES, Loader
from autotune.runners.tokens import check_generation
from autotune.spec.errors import InfeasibleError, Problem, UsageError
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.program import Instruction
from autotune.spec.workload import Workload

COMPUTING = ("F", "COMMIT", "MOVE", "PROPOSE", "TAKE")  # what a CUDA graph may hold: the rest are messages
LOOK = {"cpu": 1, "cuda": 16}  # rounds after which it is asked whether all have ended: a device is waited for


class Generated(NamedTuple):
    """`tokens`: int64 [batch, new_tokens] on the CPU, the same on every rank; of each row the first `many` count: fewer
    than new_tokens where all answers of its replica have ended before. Seconds are this rank's own."""

    tokens: Tensor
    prefill_s: float  # until the first token is there
    token_s: tuple[float, ...]  # of each round after it: decoding a token at a time, of each further token
    many: tuple[int, ...] = ()
    taken: Tensor | None = None  # int64 [batch, rounds]: tokens that each round committed, 0 where there was none

    @property
    def answers(self) -> list[list[int]]:
        return [row[:count] for row, count in zip(self.tokens.tolist(), self.many, strict=True)]


@dataclass(frozen=True)
class _Program:
    """One kind of step: the passes of this stage, several where a prompt is read in parts, and the interpreter of its
    program."""

    passes: tuple[Pass, ...]
    interpreter: Interpreter
    first: bool  # whether it begins with the prompt
    whole: CapturedStep | None = None  # the same at one launch, where this rank's steps can be captured whole

    def step(self, traces: Mapping[int, Trace] | None, number: int) -> None:
        """The `number`-th step of a generation. One that traces any runs all of its steps operation by operation."""
        if traces is None and self.whole:
            self.whole()
        else:
            self.interpreter.step((traces or {}).get(number), wait=False)


@dataclass
class Generator:
    """One rank of a generation. `generate` may be called again and again: weights and cache stay allocated."""

    plan: Plan
    model: ModelSpec
    workload: Workload
    mesh: Mesh
    scorer: Scorer
    values: dict[str, Any]
    sequences: Sequences
    ends: Tensor  # int64 [batch]: the row of each prompt's last token among all of the prefill
    chooser: Chooser
    choices: Tensor  # int64 [batch, scored]: what the target chose after each token of the last round
    proposer: Proposer
    rule: Rule
    seed: int = 0
    prefill: _Program = field(init=False)
    decode: _Program = field(init=False)
    watch: list[tuple[Block, Shape, Watch]] | None = None
    _now: _Program = field(init=False)
    _filled: tuple[int, ...] = ()  # of each sequence before this step, where the host knows

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
        load_draft: Loader | None = None,
    ) -> Generator:
        """Groups, this stage's weights and cache, and the compiled bodies; `seed`: of what is drawn; `load_draft`:
        where a draft model's weights come from.

        Raises InfeasibleError or UsageError, before any weight is loaded, for what cannot run.
        """
        check_generation(model, workload)
        if reason := why_not(model, workload, plan):
            raise InfeasibleError(f"plan {plan.describe()}: {reason}")
        dtype, prompt, new = DTYPES[workload.precision], workload.prompt_length, scored(plan)
        drafts = STRATEGIES[plan.decoding].draft
        alone = drafts and workload.draft and not reads_rows(plan)  # whether another model has passes of its own
        for reader in (model, workload.draft) if alone and workload.draft else (model,):
            check_passes(reader, workload, plan, device)
        sizes = (prompt, prompt), (new, prompt + new)
        programs = [expand(lower_generation(plan, model, workload, *size), plan) for size in sizes]
        mesh = Mesh.build(plan, programs, rank, device)
        blocks = stage_blocks(model, cut_of(plan, model))[mesh.pipeline]
        each, most = workload.batch // plan.data, room(plan, workload)
        paged = {"page": plan.page, "pages": pool_pages(plan, workload)} if plan.page else {}
        scorer = Scorer.build(model, blocks, load, (each, most), plan, workload.precision, device, mesh, **paged)
        sequences = Sequences.empty(each, text_columns(plan, workload), workload.new_tokens, device)
        s, last = mesh.pipeline, mesh.pipeline == plan.pipeline - 1
        held = {f"w.{s}": scorer.weights, f"kv.{s}": scorer.cache.held}
        values: dict[str, Any] = {**held, "out": sequences.text}
        if last and plan.prompt_chunk:
            values["h"] = torch.zeros((each, model.hidden), dtype=dtype, device=device)
        if s == 0:
            values["prompt"] = torch.zeros((each, prompt), dtype=torch.int64, device=device)
            values["token"] = torch.zeros((each, new), dtype=torch.int64, device=device)
        elif last and plan.decoding != PLAIN:
            values["slate"] = torch.zeros((each, new), dtype=torch.int64, device=device)
        drawn, committing = (each, workload.new_tokens), RULES[plan.commit]
        numbers = {p: torch.zeros(drawn, dtype=torch.float64, device=device) for p in committing.purposes}
        proposer: Proposer
        if drafts and last:
            assert load_draft is not None
            own = numbers[committing.drafts]
            proposer = drafter = DRAFTERS[plan.decoding](plan, workload, load_draft, device, own)
            values |= drafter.held()
        else:
            proposer = PROPOSERS[PLAIN if drafts else plan.decoding](plan, model, each, device)
        ends = torch.zeros(each, dtype=torch.int64, device=device)
        choices = torch.zeros((each, new), dtype=torch.int64, device=device)
        chooser = Chooser(workload, mesh, plan.tensor, sequences, numbers)
        rule = committing.rule(Asked(plan, workload, device, chooser, choices, proposer.probabilities()))
        shared_state = (mesh, scorer, values, sequences, ends, chooser, choices, proposer, rule)
        generator = cls(plan, model, workload, *shared_state, seed)
        parts = prompt_parts(plan, workload), sizes[1:]
        generator.prefill, generator.decode = (
            generator._compile(part, Interpreter(program, rank, {}, values, device), program is programs[0])
            for program, part in zip(programs, parts, strict=True)
        )
        generator._now = generator.prefill
        return generator

    def _compile(self, parts: Sequence[tuple[int, int]], interpreter: Interpreter, first: bool) -> _Program:
        """`parts`: (new tokens, keys) of its passes."""
        operations, whole = self.operations(), None
        interpreter.operations = operations
        if self.scorer.device_knows:
            pool: Any = torch.cuda.graph_pool_handle()
            listing = interpreter.program.ranks[interpreter.rank]
            if all(instruction.op in COMPUTING for instruction in listing):
                whole = CapturedStep(listing, operations, interpreter.values, pool)
            captured = {name: Captured(operations[name], pool) for name in COMPUTING}
            interpreter.operations = {**operations, **captured}
        shapes = [generation_shape(self.plan, self.workload, *part) for part in parts]
        tree = None if first else tree_of(self.plan)
        return _Program(tuple(self.scorer.compile(shape, tree) for shape in shapes), interpreter, first, whole)

    def generate(
        self,
        prompts: Prompts,
        traces: Mapping[int, Trace] | None = None,
        ended: Callable[[list[list[int]]], bool] | None = None,
    ) -> Generated:
        """Continues all prompts of the workload, on every rank, by new_tokens; a replica stops before that where all
        its answers have `ended`, which is asked of the answers so far.

        `traces` records steps by number: 0 is the prefill, n the n-th round. Raises UsageError for another shape and
        for token ids that the vocabulary does not have.
        """
        self._feed(prompts)
        device = self.mesh.device
        if self.plan.world > 1:
            barrier(device)
        clock, pace = Clock(device), Pace(self.sequences, self._here(prompts), device, sure=self.plan.decoding == PLAIN)
        marks = [clock.mark()]
        for step in range(self.workload.new_tokens + SPARE):
            self._now = self.decode if step else self.prefill
            self._filled = () if self.scorer.device_knows else self._known(prompts, step)
            self._now.step(traces, step)
            marks.append(clock.mark())
            enough = pace.after(step)
            if enough is not None:
                marks = marks[: enough + 2]
                break
            if ended and (step + 1) % LOOK[device.type] == 0 and ended(self.sequences.answers()):
                break
        clock.settle()
        seconds = [clock.between(a, b) for a, b in pairwise(marks)]
        tokens, many, taken = self._gather()
        return Generated(tokens, seconds[0], tuple(seconds[1:]), many, taken)

    def _known(self, prompts: Prompts, step: int) -> tuple[int, ...]:
        """Filled positions of each sequence: decoding a token at a time they need not be read."""
        if self.plan.decoding != PLAIN:
            return tuple(self.sequences.filled.tolist())
        return tuple(length + max(0, step - 1) for length in self._here(prompts))

    def _here(self, prompts: Prompts) -> tuple[int, ...]:
        """Lengths of this replica's prompts."""
        each = self.workload.batch // self.plan.data
        return prompts.lengths[self.mesh.data * each : (self.mesh.data + 1) * each]

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
        more = beyond(self.plan, self.workload)
        self.scorer.cache.assign([length + more for length in lengths[here]])
        self.sequences.begin(tokens[here], own)
        self.ends.copy_(torch.arange(each) * expected[1] + own - 1)
        for purpose, numbers in self.chooser.numbers.items() if self.workload.temperature else ():
            first = prompts.first + here.start
            numbers.copy_(draws(self.seed, first, each, self.workload.new_tokens, purpose))
        if "prompt" in self.values:
            self.values["prompt"].copy_(tokens[here])

    def _gather(self) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """All replicas' answers, how much of each counts, and what their rounds committed, from the last stage's first
        tensor rank of each, on every rank."""
        each, new = self.workload.batch // self.plan.data, self.workload.new_tokens
        rounds = self.sequences.taken.shape[1]
        whole = torch.zeros((self.workload.batch, new + 1 + rounds), dtype=torch.int64, device=self.mesh.device)
        if self._last and self.mesh.tensor == 0:
            texts, here = self.sequences, slice(self.mesh.data * each, (self.mesh.data + 1) * each)
            whole[here, :new] = texts.text.gather(1, texts.own[:, None] + torch.arange(new, device=whole.device))
            whole[here, new] = texts.filled + 1 - texts.own
            whole[here, new + 1 :] = texts.taken
        if self.plan.world > 1:
            dist.all_reduce(whole)
        whole = whole.cpu()
        taken = whole[:, new + 1 :]
        return whole[:, :new], tuple(whole[:, new].tolist()), taken[:, : int(taken.any(dim=0).sum())]

    @property
    def _last(self) -> bool:
        return self.mesh.pipeline == self.plan.pipeline - 1

    def operations(self) -> Mapping[str, Operation]:
        return {
            "F": self.forward,
            "COMMIT": self.commit,
            "MOVE": self.move,
            "PROPOSE": self.propose,
            "TAKE": self.take,
            "SEND": self.send,
            "RECV": self.receive,
        }

    def forward(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The stage's blocks one after another: (the cache, the next stage's input or the logits, and the rows that
        these are of where somebody reads them)."""
        x: Tensor = values[instruction.reads[2]]
        left: dict[str, Tensor] = {}
        if len(self._now.passes) > 1:
            out = self._part(instruction, x, left)
        else:
            x = x if instruction.stage else x.reshape(-1)
            rows = self.ends if self._now.first and self.workload.prompt_length > 1 else None
            out = self.scorer.run(self._now.passes[0], x, rows, self._filled, self.watch, left)
        read = (left["norm"],) if "rows" in instruction.writes else ()
        return values[instruction.writes[0]], out, *read

    def _part(self, instruction: Instruction, x: Tensor, left: dict[str, Tensor]) -> Tensor:
        """A part of the prompts through the stage. The last stage keeps what follows the prompts that end in it, and
        after the last part gives the logits of all."""
        now = self._now.passes[instruction.item]
        shape = now.shape
        start = shape.keys - shape.queries
        if not instruction.stage:
            x = x[:, start : shape.keys].reshape(-1)
        if now.lengths is not None:
            now.lengths.move(torch.zeros_like(self.sequences.filled), start)
        filled = (start,) * shape.batch
        if not self._last:
            return self.scorer.run(now, x, None, filled, self.watch)
        ends = sum(step.block.kind in ENDS for step in now.steps)
        layers, head = (replace(now, steps=steps) for steps in (now.steps[:-ends], now.steps[-ends:]))
        x = self.scorer.run(layers, x, None, filled, self.watch).view(shape.batch, shape.queries, -1)
        place = self.sequences.own - 1 - start  # of each prompt's last token in this part
        ended = x[torch.arange(shape.batch, device=x.device), place.clamp(0, shape.queries - 1)]
        here = ((place >= 0) & (place < shape.queries))[:, None]
        kept: Tensor = self.values["h"]
        kept.copy_(torch.where(here, ended, kept))
        return kept if "h" in instruction.writes else self.scorer.run(head, kept, None, filled, self.watch, left)

    def commit(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Which of the scored tokens are kept, and the token after them."""
        first, logits = self._now.first, values["logits"]
        begun = self.values.get("token" if self.plan.pipeline == 1 else "slate")  # what the next pass begins with
        if first or self.plan.decoding == PLAIN:  # nothing was proposed
            kept = Kept(None, self.chooser.tokens(logits, None if first else self._depths))
        else:
            kept = self.rule.kept(logits, values[instruction.reads[2]], self._depths)
        news = self._took(first, begun, kept)
        return begun if instruction.writes[0] == "token" else news, values["out"]

    @property
    def _depths(self) -> Tensor:
        lengths = self.decode.passes[0].lengths
        assert lengths is not None
        return lengths.depths

    def _took(self, first: bool, token: Tensor | None, kept: Kept) -> Tensor:
        """What follows once a round's tokens are known."""
        lengths, most = self.decode.passes[0].lengths, self.scorer.cache.max_len
        assert lengths is not None
        return settle(self.sequences, lengths, most, self._depth(first), first, *kept, token)

    def _depth(self, first: bool) -> int:
        """Tokens that a step's news may hold."""
        return 1 if first else 1 + self.plan.speculate

    def move(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The keys and values of kept branches to where those of a text's tokens stand: one after another."""
        kv, cache = values[instruction.reads[1]], self.scorer.cache
        nodes = values["n"][:, 2 + self.plan.speculate :]
        texts, most = self.sequences, cache.max_len
        begin = torch.arange(len(nodes), device=nodes.device)[:, None] * most + texts.before[:, None]
        after = begin + torch.arange(1, nodes.shape[1] + 1, device=nodes.device)
        to, where = cache.rows(after.flatten()), cache.rows((begin + nodes).flatten())
        for part in (cache.k, cache.v):
            rows = part.view(len(part), -1, *part.shape[3:])
            rows.index_copy_(1, to, rows.index_select(1, where))
        return (kv,)

    def propose(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What may come after the newest token of each sequence, which stands there already: what the next round
        scores."""
        first = self._now.first
        slate: Tensor = self.values[instruction.writes[0]]
        said = self._depth(first), first, self.choices, slate, values.get("rows")
        seen = Seen(self.sequences, values["n"], *said)
        slate[:, 1:].copy_(self.proposer.propose(seen))
        made: dict[str, Any] = {"t": slate, "dkv": values.get("dkv")}
        if "t" in instruction.writes:
            made["t"] = slate.clone()
        return slate, *(made[name] for name in instruction.writes[1:])

    def take(self, instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the last stage committed and, on the first, what it proposes."""
        token = self.values["token"] if instruction.writes[0] == "token" else None
        self._took(self._now.first, token, Kept(values["n"]))
        if token is None:
            return (values["out"],)
        return token.copy_(values["t"]) if "t" in instruction.reads else token, values["out"]

    def send(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        return Started((), self.mesh.send(instruction, values[instruction.reads[0]]))

    def receive(self, instruction: Instruction, values: Mapping[str, Any]) -> Started:
        """A boundary activation [tokens, hidden] in the compute precision, or whole numbers, int64 [batch, ...]."""
        name, device = instruction.writes[0], self.mesh.device
        number = int(name.split(".")[2]) if name.count(".") > 1 else -1  # of the part of a prompt
        shape = self._now.passes[number].shape
        if name in ("n", "t"):
            columns = scored(self.plan) if name == "t" else news(self.plan, self._now.first)
            empty = torch.empty((shape.batch, columns), dtype=torch.int64, device=device)
        else:
            dtype = DTYPES[self.workload.precision]
            empty = torch.empty((shape.tokens, self.model.hidden), dtype=dtype, device=device)
        return Started((empty,), self.mesh.receive(instruction, empty))
