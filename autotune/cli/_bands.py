"""Bands put upon what is shown: predictions of a target, and the answer of a search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autotune.cli._target import Target

if TYPE_CHECKING:
    from autotune.profiles_db.bands.pools import Bands
    from autotune.spec.prediction import Found, Prediction


def banded(prediction: Prediction, target: Target) -> Prediction:
    """The prediction of a plan for the target's work and machine, with its bands; runs of the very same plan and work
    make none of them, so that they can be judged by them."""
    from autotune.profiles_db.bands.kept import run_name

    if target.bands is None or target.profile is None:
        return prediction
    own = run_name(target.model, target.workload, prediction.plan)
    return target.bands.upon(prediction, target.profile, target.workload.kind, own)


def banded_found(found: Found, bands: Bands) -> Found:
    """A search's answer with bands for every plan of its ranking."""
    from autotune.profiles_db.bands.kept import run_name

    asked = found.question
    ranking = (
        bands.upon(p, asked.profile, asked.workload.kind, run_name(asked.model, asked.workload, p.plan))
        for p in found.ranking
    )
    return replace(found, ranking=tuple(ranking))
