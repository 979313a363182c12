"""A session: one crew works through a list of pieces within a time, and says what it found and left out, and why."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autotune.profiles_db.probes import PROBES, prepare
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.timing import Timing, Trial, time_trial
from autotune.spec.machine import Sample
from autotune.spec.work import Work

Progress = Callable[[str], None]
USUAL = (
    ("batch", 1),
    ("level", 0),
    ("inner", 1),
    ("captured", False),
)  # what a phrase about a piece of work leaves unsaid
SLOW = 2.0  # a piece whose single run would take this many times its fair share is put off
LOOKS = 3  # times that a piece is measured at most, in one session
RUNS = 3  # a piece runs at least this often: to warm up, to be estimated, to be timed


@dataclass
class Rates:
    """The best seconds per floating-point operation or byte so far, by kind: what is far too long is seen coming."""

    best: dict[str, float] = field(default_factory=dict)

    def expected(self, work: Work) -> float:
        amount = work.flops or work.bytes
        return amount * self.best.get(work.kind, 0.0)

    def learn(self, work: Work, seconds: float) -> None:
        amount = work.flops or work.bytes
        if amount:
            self.best[work.kind] = min(self.best.get(work.kind, math.inf), seconds / amount)


def describe(work: Work) -> str:
    """`work` as one short phrase without its dataclass noise."""
    fields = [(name, getattr(work, name)) for name in getattr(type(work), "__slots__", ())]
    fields = [pair for pair in fields if pair not in USUAL]
    return f"{work.kind} " + " ".join(f"{name}={value}" for name, value in fields)


def why(error: BaseException) -> str:
    """The first line of an error, for a message that says why a piece was skipped."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def attempt(work: Work, crew: Crew, seconds: float) -> Sample | str:
    """Times `work` on every rank at once: a sample, or why there is none.

    A rank that cannot make the work ready tells the others, so that none waits for it.
    """
    trial, reason = None, ""
    try:
        trial = prepare(work, crew)
    except Exception as error:  # torch, a driver and the system each raise their own kinds; all mean: not here
        reason = why(error)
        crew.tidy()
    ready = [rank[0] for rank in crew.gather([0.0 if trial is None else 1.0])]
    if trial is None or min(ready) < 1:
        return reason or f"rank {ready.index(0.0)} could not make it ready"
    try:
        timing = _at_pace(trial, crew, seconds)
    except (RuntimeError, ValueError, OSError) as error:
        if crew.world > 1:
            raise  # the ranks are out of step: nothing after this could be trusted
        return why(error)
    finally:
        if trial.close:
            trial.close()
    return combined(work, timing, crew)


def _at_pace(trial: Trial, crew: Crew, seconds: float) -> Timing:
    """Times `trial`, again where the device turns out to have slowed meanwhile: of the looks, the fastest median."""
    looks = [time_trial(trial, crew, seconds)]
    while len(looks) < LOOKS and crew.device == "cuda" and trial.clock == "device":
        (slow,) = crew.agree([float(max(rank[0] for rank in crew.gather([float(crew.pace.behind())])))])
        if not slow:
            break
        crew.pace.settle()
        looks.append(time_trial(trial, crew, seconds))
    return min(looks, key=lambda timing: timing.seconds)


def combined(work: Work, timing: Timing, crew: Crew) -> Sample:
    """One sample from every rank's timing: a collective is as slow as its slowest rank, compute is the ranks' mean."""
    everyone = crew.gather([timing.seconds, timing.spread, float(timing.runs)])
    seconds = [rank[0] for rank in everyone]
    spread = statistics.fmean(rank[1] for rank in everyone)
    taken = max(seconds) if work.kind == "collective" else statistics.fmean(seconds)
    return Sample(work, taken, crew.world, timing.runs, round(spread, 4))


def merged(samples: Iterable[Sample]) -> list[Sample]:
    """One sample for each piece and number of ranks, in the order first met: of several looks, the fastest median.

    Whatever else a machine does while it is measured only ever slows it, and looks that lie apart in time are seldom
    disturbed alike. Runs add up.
    """
    found: dict[tuple[Work, int], Sample] = {}
    for sample in samples:
        key = (sample.work, sample.ranks)
        before = found.get(key)
        if before is not None:
            best = min(before, sample, key=lambda s: s.seconds)
            sample = replace(best, runs=before.runs + sample.runs)
        found[key] = sample
    return list(found.values())


def run_session(
    crew: Crew, plan: Mapping[str, Sequence[Work]], seconds: float, say: Progress, patient: bool = False
) -> Iterator[Sample]:
    """Works through `plan` (probe name to works, most telling first) in about `seconds`, yielding samples.

    Each probe gets its share of what is left, each piece an equal part of its probe's; what a piece does not use goes
    to those after it. Time that is left at the end goes to the pieces that were too long for their part, then to second
    looks at the others, the least steady first: a piece may come more than once, see `merged`. Skipped pieces are told
    to `say` with the reason, those of one reason together. A `patient` session leaves nothing out for lack of time: it
    is for few pieces, each of them wanted.
    """
    end = time.perf_counter() + seconds
    if paced := crew.pace.settle():
        say(paced)
    names, rates = list(plan), Rates()
    weights = {name: PROBES[name].share for name in names}
    later: list[tuple[str, Work]] = []
    every: list[Sample] = []
    for i, name in enumerate(names):
        begun = time.perf_counter()
        until = begun + max(0.0, end - begun) * weights[name] / sum(weights[n] for n in names[i:])
        done: list[Sample] = []
        skipped: Counter[str] = Counter()
        for j, work in enumerate(plan[name]):
            left = until - time.perf_counter()
            fair = left / (len(plan[name]) - j)
            too_long = left <= 0 or rates.expected(work) > max(SLOW * fair, left / 2)
            fair, late = crew.agree([fair, float(too_long)])
            if late and not patient:
                later.append((name, work))
                continue
            answer = attempt(work, crew, fair)
            if isinstance(answer, str):
                skipped[answer] += 1
                continue
            rates.learn(work, answer.seconds)
            done.append(answer)
            yield answer
        say(told(name, done, crew, time.perf_counter() - begun))
        for reason, count in skipped.items():
            say(f"{name}: skipped {count} of {len(plan[name])}: {reason}")
        every += done
        crew.tidy()
    caught = yield from _put_off(crew, later, end, rates, say)
    yield from _second_looks(crew, [*every, *caught], end)
    if crew.pace.again:
        say(f"pace: the device fell behind {crew.pace.again} times; the pieces at hand were timed again")
    crew.pace.release()


def _put_off(
    crew: Crew, later: Sequence[tuple[str, Work]], end: float, rates: Rates, say: Progress
) -> Generator[Sample, None, list[Sample]]:
    """Measures what was put off in whatever time there still is, and tells what stays unmeasured."""
    skipped: Counter[str] = Counter()
    caught: list[Sample] = []
    for j, (name, work) in enumerate(later):
        left = end - time.perf_counter()
        fair, late = crew.agree([left / (len(later) - j), float(left <= 0 or RUNS * rates.expected(work) > left)])
        answer = "no time left" if late else attempt(work, crew, fair)
        if isinstance(answer, str):
            skipped[f"{name}: skipped {{}} pieces: {answer}"] += 1
            continue
        rates.learn(work, answer.seconds)
        caught.append(answer)
        yield answer
    if caught:
        say(f"slow pieces: {len(caught)} measured in the time that was left")
    for line, count in skipped.items():
        say(line.replace("{}", str(count)))
    return caught


def _second_looks(crew: Crew, samples: Sequence[Sample], end: float) -> Iterator[Sample]:
    """Measures pieces again, twice at most, the least steady first, while there is time; ranks agree on each."""
    for _ in range(LOOKS - 1):
        for sample in sorted(samples, key=lambda s: -s.spread):
            left = end - time.perf_counter()
            fair, late = crew.agree([left / len(samples), float(RUNS * sample.seconds > left)])
            if not late:
                answer = attempt(sample.work, crew, fair)
                if isinstance(answer, Sample):
                    yield answer


def told(name: str, done: Sequence[Sample], crew: Crew, spent: float) -> str:
    """One line on what a probe found: how many pieces, how long, and its best rate."""
    at_once = f" by {crew.world} workers at once" if crew.world > 1 else ""
    line = f"{name}: {len(done)} measured{at_once} in {spent:.1f} s"
    if name == "launch" and done:
        return f"{line}, {done[0].seconds * 1e6:.2f} us a launch"
    fast = max((s for s in done if s.work.flops), key=lambda s: s.work.flops / s.seconds, default=None)
    if fast:
        return f"{line}, best {fast.work.flops / fast.seconds / 1e12:.3g} TFLOP/s ({describe(fast.work)})"
    fast = max((s for s in done if s.work.bytes), key=lambda s: s.work.bytes / s.seconds, default=None)
    if fast:
        return f"{line}, best {fast.work.bytes / fast.seconds / 1e9:.3g} GB/s ({describe(fast.work)})"
    return line
