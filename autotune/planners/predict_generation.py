"""Predicts a generation: one prefill, then a round at a time over a cache that grows.

A round is simulated at a few lengths of the context; between them its time is taken to be a straight line, which it is
wherever reading the cache is what grows. How many rounds there are follows from how often proposals are kept: a batch
goes on until its slowest sequence has all its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from autotune.planners.costs.body import NOTHING, Cost
from autotune.planners.costs.generate import PassCosts
from autotune.planners.decoding.chains import distribution
from autotune.planners.decoding.ranks import replayed as by_rank
from autotune.planners.decoding.rounds import largest, replayed, slowest
from autotune.planners.decoding.rounds import rounds as counted
from autotune.planners.decoding.strategies import acceptance_key, scored, tree_of
from autotune.planners.decoding.trees import Tree
from autotune.planners.lower.generate import lower_generation
from autotune.planners.simulate import resolve, simulate
from autotune.spec.graph import Block
from autotune.spec.machine import Profile
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.prediction import Prediction
from autotune.spec.program import COMPUTE
from autotune.spec.timeline import Timeline
from autotune.spec.workload import Acceptance, Workload, kept

if TYPE_CHECKING:
    from autotune.planners.lower.shape import Shape
    from autotune.planners.predict import Predictor

POINTS = 5  # lengths of the context at which a round is simulated
# What buffers are called in a prediction.
CLASSES = {"w": "weights", "kv": "kv_cache", "x": "boundaries", "dw": "weights", "dkv": "kv_cache"}


def contexts(workload: Workload) -> tuple[int, ...]:
    """Lengths of the context, from that of the first decoded token to that of the last; the prefill gives one token."""
    first, last = workload.prompt_length + 1, workload.prompt_length + workload.new_tokens - 1
    steps = last - first + 1
    if steps <= POINTS:
        return tuple(range(first, last + 1))
    return tuple(first + round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS))


def weights(points: Sequence[int]) -> tuple[float, ...]:
    """How often each point counts in the sum over every whole number from the first point to the last of a function
    that is a straight line between points."""
    found = [0.0] * len(points)
    for i, (a, b) in enumerate(pairwise(points)):
        n = b - a  # a, ..., b - 1
        after = (n - 1) / 2  # the sum over them of (k - a) / n
        found[i] += n - after
        found[i + 1] += after
    if found:
        found[-1] += 1
    return tuple(found)


def acceptance_of(plan: Plan, workload: Workload) -> Acceptance | None:
    """What is known of how often a plan's proposals are kept."""
    key = acceptance_key(plan)
    found = [known for known in workload.acceptance if known.key == key]
    return max(found, key=lambda known: len(known.rates), default=None)


def rates(plan: Plan, workload: Workload) -> tuple[float, ...]:
    """How often a plan's proposals are kept, by position: of as many as it proposes."""
    known = acceptance_of(plan, workload)
    if known is None:
        return ()
    most, tree = 1 + plan.speculate, tree_of(plan)
    told = known.traces or known.ranks
    return kept(_replayed(known, most, tree), most) if told else known.rates[: plan.speculate]


@lru_cache(maxsize=1024)
def _replayed(known: Acceptance, most: int, tree: Tree) -> tuple[tuple[int, ...], ...]:
    """The rounds of each text that told the acceptance: by what heads held likely, or with fewer tokens in a row."""
    if known.ranks:
        return tuple(by_rank(text, len(known.rates), tree) for text in known.ranks)
    return tuple(replayed(trace, 1 + len(known.rates), most) for trace in known.traces)


@lru_cache(maxsize=4096)
def rounds(plan: Plan, workload: Workload) -> float:
    """Expected rounds after the prefill until the slowest of the sequences that go together is done.

    Where it is known what the rounds of several texts kept, a batch is drawn from those texts; else every round is as
    any other.
    """
    left, known = workload.new_tokens - 1, acceptance_of(plan, workload)
    if plan.decoding == PLAIN or left < 1:
        return float(left)
    if known and (known.traces or known.ranks):
        traces = [trace for trace in _replayed(known, 1 + plan.speculate, tree_of(plan)) if trace]
        return max(1.0, largest([left * len(trace) / sum(trace) for trace in traces], workload.batch))
    return slowest(counted(distribution(rates(plan, workload)), left), workload.batch)


def predict_generation(predictor: Predictor, plan: Plan, timeline: bool = True) -> Prediction:
    """The prediction of a feasible plan: `step_s` is one whole generation, `timeline` one token at mid context."""
    model, workload, profile = predictor.model, predictor.workload, predictor.profile
    bodies = predictor.bodies(plan)
    blocks: dict[tuple[Block, Shape], Cost] = {}

    def run(queries: int, keys: int) -> tuple[Timeline, PassCosts]:
        costs = PassCosts(plan, model, workload, bodies, queries, keys, blocks)
        program = lower_generation(plan, model, workload, queries, keys)
        return simulate(program, costs, resolved=resolve(program, profile.inline)), costs

    points = contexts(workload)
    new = scored(plan)
    prefill = run(workload.prompt_length, workload.prompt_length)
    decodes = [run(new, keys - 1 + new) for keys in points]
    share = rounds(plan, workload) / max(1, workload.new_tokens - 1)  # of a round for each further token
    passes = [(1.0, *prefill), *((w * share, *d) for w, d in zip(weights(points), decodes, strict=True))]
    seconds = sum(w * line.makespan for w, line, _ in passes)
    decode_s = (seconds - prefill[0].makespan) / max(1, workload.new_tokens - 1)
    ranks = range(plan.pipeline)
    slowest = max(ranks, key=lambda r: sum(w * line.busy(r) for w, line, _ in passes))
    kinds, grades = _busy(passes, slowest)
    # The last decode has the most positions, the prefill the most activations.
    fullest = [decodes[-1][0], prefill[0]] if decodes else [prefill[0]]
    memory = tuple(max((_memory(line, r, profile) for line in fullest), key=_total) for r in ranks)
    middle = decodes[len(decodes) // 2][0] if decodes else prefill[0]
    return Prediction(
        plan,
        seconds,
        workload.tokens / seconds,
        tuple(map(_total, memory)),
        memory,
        kinds,
        grades,
        middle if timeline else None,
        prefill[0].makespan,
        decode_s,
    )


def _busy(
    passes: Sequence[tuple[float, Timeline, PassCosts]], rank: int
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Seconds of a rank by kind over the whole generation, and the share of its busy ones on each grade."""
    total, exposed, idle = NOTHING, 0.0, 0.0
    for weight, line, costs in passes:
        hidden = line.exposed_communication(rank)
        exposed += weight * hidden
        idle += weight * max(0.0, line.makespan - line.busy(rank) - hidden)
        for instruction in line.program.ranks[rank]:
            if instruction.lane == COMPUTE:
                total += costs.cost(instruction).times(weight)
    kinds = {**total.kinds, "exposed communication": exposed, "idle": idle}
    whole = sum(total.grades.values())
    return kinds, {grade: seconds / whole for grade, seconds in total.grades.items()} if whole else {}


def _total(memory: Mapping[str, int]) -> int:
    return sum(memory.values())


def _memory(line: Timeline, rank: int, profile: Profile) -> Mapping[str, int]:
    """Device bytes of a rank at its peak by class; they add up to the peak and the runtime's own."""
    program, series = line.program, line.memory[rank]["device"]
    at = max(range(len(series)), key=series.__getitem__)
    live = set(program.given(rank))
    for instruction in program.ranks[rank][:at]:
        live.update(instruction.writes)
        live.difference_update(instruction.frees)
    live.update(program.ranks[rank][at].writes)
    parts: Counter[str] = Counter()
    for name in live:
        parts[CLASSES.get(name.split(".")[0], "data")] += program.buffers[rank][name].size
    parts["transient"] = series[at] - parts.total()
    parts["overhead"] = profile.device.context_bytes
    return dict(parts)
