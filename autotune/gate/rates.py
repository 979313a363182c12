"""How often the rule is right and wrong, by simulation: `python -m autotune.gate.rates`.

Launches are drawn with the noise that is given (`--noise 0.0035`) or that the launches of the plan database have
(`--db PATH`, as `autotune --db`); `--drift` is how much a whole side differs by chance from one that was measured at
another time (a stored baseline; launches that are interleaved have none). Retries are those of the rule.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from autotune.gate.noise import noise_of, stored_groups
from autotune.gate.rule import INCONCLUSIVE, LEAST, REGRESSED, log_intervals, verdicts
from autotune.gate.sides import Rule
from autotune.profiles_db.location import locate
from autotune.profiles_db.store import Store

CHANGES = (0.0, 0.02, 0.03, 0.05, 0.10)
COUNTS = (3, 5, 8)
TRIALS = 4000
TOGETHER = 250  # trials judged at once: their resamples are in memory


@dataclass(frozen=True)
class Rate:
    """Of many simulated gates, the shares by verdict, and the launches that this side took on average."""

    launches: int
    threshold: float
    change: float
    regressed: float
    inconclusive: float
    mean_launches: float


def rate(rule: Rule, change: float, launch: float, drift: float, trials: int = TRIALS, fixed: bool = False) -> Rate:
    """Simulated gates under `rule` where the truth is `change`. `launch`, `drift`: standard deviations of logarithms.
    `fixed`: the baseline is stored, and retries add launches to this side alone."""
    random = np.random.default_rng([rule.seed, rule.launches, round(change * 1e6)])
    sides = [random.normal(0.0, launch, (trials, rule.most)) for _ in range(2)]
    sides[0] += random.normal(np.log1p(change), drift, (trials, 1)) if drift else np.log1p(change)
    new, base = (np.exp(side) for side in sides)
    kinds = np.full(trials, INCONCLUSIVE)
    used = np.zeros(trials)
    left = np.arange(trials)
    for count in range(rule.launches, rule.most + 1, 2):
        there = rule.launches if fixed else count
        for part in np.array_split(left, max(1, -(-len(left) // TOGETHER))):
            found = log_intervals(new[part, :count], base[part, :there], rule.seed)
            kinds[part] = verdicts(found, rule.threshold)
        used[left] = count
        left = left[kinds[left] == INCONCLUSIVE]
        if not len(left):
            break
    regressed, open_ = (float(np.mean(kinds == kind)) for kind in (REGRESSED, INCONCLUSIVE))
    return Rate(rule.launches, rule.threshold, change, regressed, open_, float(used.mean()))


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table, or with --json one object."""
    parser = argparse.ArgumentParser(prog="python -m autotune.gate.rates", description=__doc__)
    parser.add_argument("--noise", type=float, help="standard deviation of a launch's median, as a fraction")
    parser.add_argument("--drift", type=float, default=0.0, help="the same of a whole side")
    parser.add_argument("--db", help="take the noise of the launches that this plan database keeps")
    parser.add_argument("--launches", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--threshold", type=float, nargs="+", default=(0.02, 0.03))
    parser.add_argument("--retries", type=int, default=4)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--stored", action="store_true", help="the baseline is stored: it gets no launches more")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    if (
        min(given.launches) < LEAST
        or given.trials < 1
        or given.retries < 0
        or not all(0 < t < 1 for t in given.threshold)
    ):
        parser.error(
            f"expected launches of {LEAST} or more, thresholds between 0 and 1, trials, and no negative retries"
        )
    launch, drift, said = given.noise, given.drift, "given"
    if launch is None:
        with Store(locate(given.db), create=False) as store:
            try:
                known = noise_of(stored_groups(store))
            except ValueError as error:
                parser.error(f"{store.place.shown}: {error}; give --noise")
        launch, drift = known.launch, max(drift, known.drift if given.stored else 0.0)
        said = f"of {known.launches} launches in {known.runs} runs"
    if not launch > 0 or drift < 0:
        parser.error("expected a noise above 0 and a drift of 0 or more")
    rows = [
        rate(Rule(count, limit, given.retries), change, launch, drift, given.trials, given.stored)
        for count in given.launches
        for limit in given.threshold
        for change in CHANGES
    ]
    if given.json:
        print(json.dumps({"noise": launch, "drift": drift, "source": said, "rates": [asdict(row) for row in rows]}))
        return
    print(f"noise of a launch {launch:.2%} ({said}), drift of a side {drift:.2%}; {given.trials} gates a row")
    print("launches  threshold  true change  regressed  inconclusive  launches used")
    for row in rows:
        print(
            f"{row.launches:8}  {row.threshold:9.1%}  {row.change:+11.0%}  {row.regressed:9.2%}"
            f"  {row.inconclusive:12.2%}  {row.mean_launches:13.1f}"
        )


if __name__ == "__main__":
    main()
