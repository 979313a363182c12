"""docs/commands.md, made from every command's own --help: `python -m autotune.cli._reference > docs/commands.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDTH = 100

HEAD = """# Commands

Every command's own `--help`, as `python -m autotune.cli._reference` prints it. A test keeps this page equal to it.

Results go to stdout, everything else to stderr. `--json` prints one object that names its schema, such as
`autotune.search/1`. `NO_COLOR`, `TERM=dumb` and `--no-color` give plain text; off a terminal it is plain anyway. The
options of the first listing may stand before or after a command's name.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug in autotune |
| 2 | wrong usage, or a recipe, lock or profile that does not say what it must |
| 3 | no plan fits; the message has the binding constraints |
| 4 | the machine, the plan database or an installed version is not what the command needs |
| 5 | the run failed: workers died or ran out of memory |
| 6 | wrong numbers: a checked run differs from the one-process reference, or a gated one from its baseline |
| 7 | a regression: a gated plan is slower or larger than its baseline, or no longer the best predicted |
| 8 | a stale lock: the recipe, the model or the machine changed since |
| 9 | inconclusive |
| 130 | interrupted |
"""


def commands() -> Iterator[tuple[str, Any]]:
    """(full name, command) of the program, its groups and every command, in the order of `--help`."""
    from typer.main import get_command

    from autotune.cli.main import app

    root = get_command(app)
    yield "autotune", root
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        yield f"autotune {name}", command
        for inner, below in getattr(command, "commands", {}).items():
            yield f"autotune {name} {inner}", below


def help_text(name: str) -> str:
    """What `name --help` prints at the width of the page, whatever the terminal."""
    from typer.testing import CliRunner

    from autotune.cli.main import app

    words = name.split()[1:]
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="autotune", env={"COLUMNS": str(WIDTH)})
    return "\n".join(line.rstrip() for line in result.stdout.rstrip().splitlines())


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, _ in commands():
        parts.append(f"## {name}\n\n```text\n{help_text(name)}\n```\n")
    return "\n".join(parts)


def flags() -> dict[str, list[str]]:
    """Command to its arguments and options, sorted: what scripts rely on."""
    listing = {}
    for name, command in commands():
        names: list[str] = []
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            names += [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.metavar]
        listing[name] = sorted(names)
    return listing


if __name__ == "__main__":
    print(reference(), end="")
