"""`autotune simulate`: predicts a plan without running it."""

from __future__ import annotations

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(simulate)


def simulate(target: arguments.Target, overrides: arguments.Overrides = None, pins: arguments.Pins = None) -> None:
    """Predict a plan without running it.

    Where the time goes, what each rank holds in memory, and how long it idles.
    """
    from autotune.cli._execution import predict_target
    from autotune.cli._target import find_target
    from autotune.cli._views import prediction_json, prediction_lines

    with opened() as store:
        found = find_target(target, overrides or [], pins or [], store)
        found.need_profile()
        prediction = predict_target(found)
        assert prediction is not None
        out.data(*prediction_lines(prediction, found.workload))
        out.emit("simulate", prediction_json(prediction))
