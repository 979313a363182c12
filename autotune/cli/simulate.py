"""`autotune simulate`: predicts a plan without running it."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command


def add(app: typer.Typer) -> None:
    command(app)(simulate)


def simulate(
    target: arguments.Target,
    overrides: arguments.Overrides = None,
    pins: arguments.Pins = None,
    order: arguments.Order = None,
    text: Annotated[bool, typer.Option("--text", help="Print the program: a line of instructions a rank.")] = False,
) -> None:
    """Predict a plan without running it.

    Where the time goes, what each rank holds in memory, and how long it idles. What `--text` prints can be edited and
    given to `--order`.
    """
    from autotune.cli._execution import predict_target
    from autotune.cli._target import find_target, with_order
    from autotune.cli._views import prediction_json, prediction_lines
    from autotune.spec.timeline_file import text as program_text

    with opened() as store:
        found = find_target(target, overrides or [], pins or [], store)
        found = with_order(found, order) if order else found
        found.need_profile()
        prediction = predict_target(found)
        assert prediction is not None
        if text and prediction.timeline:
            out.data(program_text(prediction.timeline.program).rstrip())
        else:
            out.data(*prediction_lines(prediction, found.workload))
        out.emit("simulate", prediction_json(prediction))
