"""`autotune export`: a plan as the command line or the config of another engine."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command

BATCHES = "1,2,4,8,16,32"


def add(app: typer.Typer) -> None:
    command(app)(export)


def export(
    target: arguments.Target,
    engine: Annotated[
        str, typer.Option("--to", metavar="ENGINE", help="vllm, sglang or trtllm; megatron, torchtitan or deepspeed.")
    ],
    overrides: arguments.Overrides = None,
    pins: arguments.Pins = None,
    batches: Annotated[
        str,
        typer.Option(
            "--batches", metavar="N,N", help="Sequences of a replica for which to say how many tokens to propose."
        ),
    ] = BATCHES,
) -> None:
    """Write a plan as another engine's command line or config.

    Of a generation for vLLM, SGLang or TensorRT-LLM, of training for Megatron-LM, torchtitan or DeepSpeed. The command
    goes to stdout, or the text of the file that it names. What the engine cannot express is named on stderr, with what
    it does instead, and so is how many tokens to propose at each batch where the engine takes no such table.
    """
    from autotune.cli._exporting import checked_engine, checked_target, exported, parse_batches
    from autotune.cli._target import find_target

    checked_engine(engine)
    numbers = parse_batches(batches)
    with opened() as store:
        found = checked_target(find_target(target, overrides or [], pins or [], store), engine)
        handed = exported(found, engine, numbers)
    out.data(handed.export.text.rstrip() or handed.command)
    for line in handed.lines():
        out.say(line)
    out.emit("export", handed.to_dict())
