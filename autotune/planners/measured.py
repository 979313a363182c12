"""The measured stage: runs the most promising plans, chosen by Optuna's ask and tell, and keeps every result.

The best predicted plan is always run first. After that a tree-structured Parzen estimator proposes axes from what was
measured and, before it has enough, from the predictions' order; a proposal stands for the nearest plan of the
ranking that has not been run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from autotune.spec.errors import AutotuneError
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question


class Measured(NamedTuple):
    """Seconds by plan id; `whole`: every plan that was to be run has been."""

    seconds: dict[str, float]
    whole: bool


def _varying(ranking: Sequence[Prediction]) -> dict[str, list[str | int | bool]]:
    """The axes on which the candidates differ, with the values they take."""
    values: dict[str, list[str | int | bool]] = {}
    for prediction in ranking:
        for axis, value in prediction.plan.to_dict().items():
            seen = values.setdefault(axis, [])
            if value not in seen:
                seen.append(value)
    return {axis: seen for axis, seen in values.items() if len(seen) > 1}


def _distance(plan: Plan, wanted: Mapping[str, object]) -> int:
    return sum(getattr(plan, axis) != value for axis, value in wanted.items())


def measure_best(
    question: Question,
    ranking: Sequence[Prediction],
    known: Mapping[str, float],
    measure: Callable[[Plan], float],
    progress: Callable[[str], None],
) -> Measured:
    """Seconds of up to `measure_budget` plans; those `known` are not run again.

    A plan that fails to run is left out and said: the predicted answer stands without it.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    measured = {p.plan.id: known[p.plan.id] for p in ranking if p.plan.id in known}
    candidates = list(ranking[: max(4 * question.measure_budget, 8)])
    axes = _varying(candidates)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=question.seed, n_startup_trials=4))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        axis: optuna.distributions.CategoricalDistribution(values) for axis, values in axes.items()
    }
    for prediction in candidates:  # predictions stand in for the startup trials
        here = {axis: getattr(prediction.plan, axis) for axis in axes}
        value = measured.get(prediction.plan.id, prediction.step_s)
        study.add_trial(optuna.trial.create_trial(params=here, distributions=space, value=value))
    remaining = [p.plan for p in candidates if p.plan.id not in measured]
    best, whole = candidates[0].plan, True
    while remaining and (len(measured) < question.measure_budget or best in remaining):
        trial = study.ask(space)
        plan = best if best in remaining else min(remaining, key=lambda p: _distance(p, trial.params))
        remaining.remove(plan)
        progress(f"measuring {plan.describe()}")
        try:
            measured[plan.id] = measure(plan)
        except KeyboardInterrupt:
            progress("interrupted: keeping what was measured")
            whole = False
            break
        except AutotuneError as error:
            progress(f"  failed: {error.message.splitlines()[0]}")
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            whole = False
            continue
        progress(f"  {measured[plan.id]:.4g} s a step")
        study.tell(trial, measured[plan.id])
    return Measured(measured, whole)
