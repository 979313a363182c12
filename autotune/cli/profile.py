"""`autotune profile`: measures this machine and stores what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command
from autotune.spec.errors import UsageError


def add(app: typer.Typer) -> None:
    command(app)(profile)


def profile(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller grid: 40 s on two processor cores.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="PROBE", help="Measure only this, e.g. matmul; repeatable.")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the profile, for [machine] use elsewhere.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What to call the profile.")] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(
            "--acceptance", metavar="RECIPE", help="Not the machine: how often proposed tokens of RECIPE are kept."
        ),
    ] = None,
    overrides: arguments.Overrides = None,
) -> None:
    """Measure this machine and store its profile.

    What a cost model needs, with what was found and why: devices, matrix products, attention,
    memory-bound operations, launches, the optimizer, copies, disk, collectives, and how much compute and communication
    slow one another. Stored under the machine's fingerprint, where [machine] use = "this" finds it.

    With --acceptance it generates with every decoding strategy that RECIPE has the weights for, after prompts from
    files that are not trained on, and stores by position how often proposed tokens are kept: searches for RECIPE choose
    among the strategies by it.
    """
    if acceptance:
        from autotune.cli._acceptance import measure_acceptance

        for option, value in (("--quick", quick), ("--only", only), ("--out", out_file), ("--name", name)):
            if value:
                raise UsageError(f"{option}: of a machine's profile", hint="leave it out beside --acceptance")
        measure_acceptance(acceptance, overrides or [])
        return
    if overrides:
        raise UsageError("--set: a machine's profile has no recipe", hint="--acceptance RECIPE takes it")
    from dataclasses import replace

    from autotune.profiles_db.profile_file import dump_profile
    from autotune.runners.here import profile_here

    with opened() as store:
        progress = out.Progress(keep=True)
        found = profile_here(quick, progress, tuple(only or ()))
        found = replace(found, name=name) if name else found
        digest = store.save_profile(found)
        if out_file:
            dump_profile(found, out_file)
        out.data(
            f"profile    {found.name} ({found.grade}), {len(found.samples)} samples, machine {found.fingerprint}",
            f"device     {found.device.count} x {found.device.name}, {found.device.memory_bytes / 2**30:.1f} GiB",
            f"stored     {store.place.shown}" + (f" and {out_file}" if out_file else ""),
        )
        out.emit(
            "profile",
            {
                "name": found.name,
                "digest": digest,
                "grade": found.grade,
                "fingerprint": found.fingerprint,
                "samples": len(found.samples),
                "device": {"name": found.device.name, "kind": found.device.kind, "count": found.device.count},
                "software": dict(found.software),
                "file": str(out_file) if out_file else None,
                "db": store.place.shown,
            },
        )
    out.say("next: autotune search RECIPE")
