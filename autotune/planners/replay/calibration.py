"""A calibration: a few coefficients of a machine profile, fitted to measured runs, each with its uncertainty.

It is kept apart from the profile: it holds for the software that ran (how long its host takes an instruction, say), not
for the machine, and the residual that it leaves is stated with it. The file form is JSON with the schema name
"autotune.calibration/1"; see `replay/data`. `python -m autotune.planners.replay.fit` makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.machine import Profile

SCHEMA = "autotune.calibration/1"
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Fitted:
    """One coefficient. `uncertainty`: one standard error, relative to the value (0.1: a tenth of it)."""

    value: float
    uncertainty: float
    sets: tuple[str, ...]  # the profile's coefficients that take this value


@dataclass(frozen=True)
class Calibration:
    """What was fitted, on which profile, to which rows, and what is left: the mean size of the rows' errors."""

    base: str  # the shipped profile whose other coefficients stay
    rows: int
    source: str
    residual: float
    fitted: Mapping[str, Fitted]

    def profile(self) -> Profile:
        """The base profile with the fitted coefficients, of grade "calibrated"."""
        base = load_profile(shipped()[self.base])
        values = {name: one.value for one in self.fitted.values() for name in one.sets}
        said = {
            f"coefficients.{name}": f"fitted to {self.rows} rows of {self.source}, +-{one.uncertainty:.0%}"
            for one in self.fitted.values()
            for name in one.sets
        }
        return replace(
            base,
            grade="calibrated",
            coefficients={**base.coefficients, **values},
            sources={**base.sources, **said},
        )


@cache
def load(name: str) -> Calibration:
    """The calibration in the file of that name."""
    raw = json.loads((DATA / f"{name}.json").read_text())
    if raw.pop("schema") != SCHEMA:
        raise ValueError(f"{name}.json: expected the schema {SCHEMA}")
    fitted = {
        key: Fitted(one["value"], one["uncertainty"], tuple(one["sets"])) for key, one in raw.pop("fitted").items()
    }
    return Calibration(**raw, fitted=fitted)


def dump(calibration: Calibration, path: Path) -> None:
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(calibration)}, indent=1) + "\n")
