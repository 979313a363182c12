"""The gate tried on what is known to be equal, slower or larger: `python -m autotune.gate.trials RECIPE --times 60`.

Without `--slow` and `--memory` both sides are the same program, so that every verdict but a pass is wrong. With them
one side's workers really compute that much longer or hold that much more (see autotune.gate.handicap); how many matrix
products make so much longer is measured first, by launches with some.

A trial needs ten launches, and sixty need an hour where launches take five seconds. So launches of both sides are
measured once, in turn, A B, B A, ..., and trial n is judged by pairs n to n + launches - 1 of them: each a real gate
that began a pair later than the one before. Neighbours share launches, which makes their verdicts alike but no verdict
likelier. A trial that is inconclusive goes on with the following pairs, as retries do. `--whole N` holds N gates more
with launches of their own, both sides in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from autotune.gate.calm import Watch
from autotune.gate.checks import memory
from autotune.gate.handicap import worker
from autotune.gate.noise import noise_of
from autotune.gate.outcome import whole
from autotune.gate.rule import INCONCLUSIVE, interval, verdict
from autotune.gate.sides import MORE, Rule, Side, measure, medians
from autotune.gate.subject import Subject, locked, subject
from autotune.profiles_db.location import locate
from autotune.profiles_db.store import Store
from autotune.runners.launch import launch
from autotune.spec.errors import AutotuneError, RunError, UsageError
from autotune.spec.lock import Launch

CALIBRATING = 3  # launches with and without
# Of the first calibration, by device: more follow until they take long enough to be measured.
FIRST_PRODUCTS = {"cpu": 50, "cuda": 1000}
MOST_PRODUCTS = 1_000_000
ENOUGH = 0.2  # of a step: what the products of a calibration are to take at least


@dataclass
class Launches:
    """Launches of one subject, each in a folder of its own."""

    subject: Subject
    folder: Path
    tell: Callable[[str], None]
    count: int = 0

    def side(self, products: int = 0, size: int = 0) -> Side:
        """Launches with so many products a step and so many bytes more."""

        def launch_it() -> Launch:
            self.count += 1
            job = self.subject.job
            folder = self.folder / str(self.count)
            self.tell(f"launch {self.count}: {products} products, {size} bytes more")
            found = launch(job, nproc=job.plan.world, log_dir=folder, worker=worker(products, size))
            return Launch(found.step_s, found.peak_bytes)

        return launch_it


def products_for(launches: Launches, share: float) -> int:
    """How many matrix products a step make it longer by `share`, measured."""
    without = median(medians([launches.side()() for _ in range(CALIBRATING)]))
    many = FIRST_PRODUCTS[launches.subject.job.device]
    while many <= MOST_PRODUCTS:
        more = median(medians([launches.side(many)() for _ in range(CALIBRATING)])) - without
        if more >= ENOUGH * without:
            return max(1, round(share * without / (more / many)))
        many *= 4 if more <= ENOUGH * without / 8 else 2
    raise RunError(f"{MOST_PRODUCTS} matrix products a step make it no longer: the workers are not burdened")


def held(pairs: Sequence[tuple[Launch, Launch]], first: int, rule: Rule) -> tuple[str, float]:
    """The verdict of the trial that begins at a pair, and its ratio; retries take the pairs that follow."""
    for count in range(rule.launches, rule.most + 1, MORE):
        new, base = zip(*pairs[first : first + count], strict=True)
        found = interval(medians(new), medians(base), rule.seed)
        kind = verdict(found, rule.threshold)
        if kind != INCONCLUSIVE or first + count >= len(pairs):
            break
    return whole(kind, [memory(new, base)]), found.ratio


def main(words: Sequence[str] | None = None) -> None:
    """Measures, judges and prints."""
    parser = argparse.ArgumentParser(prog="python -m autotune.gate.trials", description=__doc__)
    parser.add_argument("recipe", help="a recipe with its lock")
    parser.add_argument("--db", help="as autotune --db")
    parser.add_argument("--times", type=int, default=60, help="trials")
    parser.add_argument("--slow", type=float, default=0.0, help="share of a step that is computed more, e.g. 0.05")
    parser.add_argument("--memory", type=float, default=0.0, help="share of the peak that is held more, e.g. 0.03")
    parser.add_argument("--launches", type=int)
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--retries", type=int)
    parser.add_argument("--steps", type=int, help="timed steps of a launch")
    parser.add_argument("--whole", type=int, default=0, help="gates with launches of their own besides")
    parser.add_argument("--json", type=Path, help="write every launch and verdict here")
    given = parser.parse_args(words)
    if given.times < 1 or min(given.slow, given.memory, given.whole) < 0:
        parser.error("expected one trial or more, and no negative share")
    try:
        _try(given)
    except AutotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


def _try(given: argparse.Namespace) -> None:
    found = locked(given.recipe, [f"workload.steps={given.steps}"] if given.steps else [])
    settings = {key: found.settings[key] if (own := getattr(given, key)) is None else own for key in found.settings}
    rule = Rule(int(settings["launches"]), settings["threshold"], int(settings["retries"]), found.recipe.seed)
    with Store(locate(given.db), create=False) as store:
        here = subject(found, store)
        place = store.place.files / "logs" / "gate-trials"
    if here.job.device == "cuda" and here.job.workload.kind != "train":
        raise UsageError("trials of a generation on an accelerator: its passes are captured, and cannot be burdened")
    launches = Launches(here, place, lambda text: print(text, file=sys.stderr))
    plain = launches.side()
    products = products_for(launches, given.slow) if given.slow else 0
    size = round(given.memory * max(plain().peak_bytes)) if given.memory else 0
    watch = Watch()
    if wrong := watch.settled():
        print(f"note: {wrong}: verdicts are those of a machine that is not quiet", file=sys.stderr)
    pairs, aside = _pairs(launches.side(products, size), plain, given.times + rule.launches - 1, watch)
    verdicts = [held(pairs, first, rule) for first in range(given.times)]
    for number in range(given.whole):
        one = measure(launches.side(products, size), plain, rule, Watch(), launches.tell)
        kind = whole(one.kind, [memory(one.new, one.base)] if one.new and one.base else [])
        print(f"whole gate {number + 1}: {kind} ({one.found.ratio - 1:+.2%})" if one.found else one.why)
    _report(given, rule, pairs, aside, verdicts, products, size)


def _pairs(new: Side, base: Side, many: int, watch: Watch) -> tuple[list[tuple[Launch, Launch]], int]:
    """Pairs of launches in turn, and beside how many of the launches the machine was not fit to be measured on: they
    are counted here and kept, as the trials are the harder for them."""
    pairs = []
    for number in range(many):
        both = {}
        for is_new in (True, False) if number % 2 == 0 else (False, True):
            both[is_new] = (new if is_new else base)()
            watch.take()
        pairs.append((both[True], both[False]))
    return pairs, sum(bool(watch.around(number)) for number in range(2 * many))


def _report(
    given: argparse.Namespace,
    rule: Rule,
    pairs: Sequence[tuple[Launch, Launch]],
    aside: int,
    verdicts: Sequence[tuple[str, float]],
    products: int,
    size: int,
) -> None:
    new, base = (medians(side) for side in zip(*pairs, strict=True))
    noise = noise_of([[base]])
    counts = Counter(kind for kind, _ in verdicts)
    print(
        f"{given.recipe}: {len(pairs)} pairs of launches; {aside} of the launches beside a machine that was not quiet"
    )
    print(f"rule: {rule.launches} launches a side, threshold {rule.threshold:.1%}, {rule.retries} retries")
    print(f"handicap: {products} products a step, {size} bytes; all launches: {median(new) / median(base) - 1:+.2%}")
    print(f"noise of a launch: {noise.launch:.2%} of {median(base) * 1e3:.4g} ms")
    print(f"{len(verdicts)} trials: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if given.json:
        content = {
            "recipe": given.recipe,
            "products": products,
            "bytes": size,
            "not_quiet": aside,
            "new_s": new,
            "base_s": base,
            "verdicts": [{"kind": kind, "ratio": ratio} for kind, ratio in verdicts],
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
