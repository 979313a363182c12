"""The command line: frozen flags, its own documentation, speed, streams, JSON, wrong input and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autotune.cli import _output as out
from autotune.cli import _reference, _settings
from autotune.spec.errors import RunError
from tests.recipes import RECIPE, ROOT, Autotune

pytestmark = pytest.mark.alone

GOLDEN = Path(__file__).parent / "golden" / "flags.json"


HEAVY = {"torch", "sqlalchemy", "optuna", "pydantic", "numpy", "rich", "safetensors"}


# --- what is frozen


def test_flags_are_frozen() -> None:
    """A new flag is added to the golden file on purpose; a removed or renamed one breaks somebody's script."""
    assert _reference.flags() == json.loads(GOLDEN.read_text())


def test_every_command_is_documented_from_its_own_help() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    assert page == _reference.reference(), "python -m autotune.cli._reference > docs/commands.md"
    for name, _ in _reference.commands():
        assert f"\n## {name}\n" in page


def test_every_option_says_what_it_does() -> None:
    for name, command in _reference.commands():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name}"


# --- speed and imports


def modules_after(*words: str, cwd: Path, **environ: str) -> tuple[int, set[str]]:
    """(exit code, top-level modules) of a fresh process that ran the command."""
    code = (
        "import sys\nfrom autotune.cli.main import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "print('\\n' + ' '.join([str(code), *sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **environ}, check=True
    )
    last = done.stdout.splitlines()[-1].split()
    return int(last[0]), set(last[1:])


@pytest.mark.parametrize("words", [("--help",), ("--version",)])
def test_help_loads_nothing_heavy(words: tuple[str, ...], tmp_path: Path) -> None:
    code, modules = modules_after(*words, cwd=tmp_path)
    assert code == 0 and modules & HEAVY == set()


@pytest.mark.parametrize("words", [("search", "--help"), ("recipe", "--help"), ("techniques",)])
def test_a_command_loads_only_what_it_needs(words: tuple[str, ...], tmp_path: Path) -> None:
    code, modules = modules_after(*words, cwd=tmp_path)
    assert code == 0 and modules & HEAVY <= {"pydantic"}, "typer itself converts options with pydantic"


def test_help_in_a_third_of_a_second() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "autotune", "--help"], stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3, times


def test_planning_for_a_cluster_needs_no_torch(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "llama-70b-64xh100.toml"
    pins = ("--pin", "tensor=8", "--pin", "pipeline=4")
    code, modules = modules_after("simulate", str(path), *pins, cwd=tmp_path, AUTOTUNE_DB=str(tmp_path / "p.db"))
    assert code == 0 and "torch" not in modules
    (tmp_path / "small.toml").write_text(RECIPE)
    code, modules = modules_after("search", "small.toml", cwd=tmp_path, AUTOTUNE_DB=str(tmp_path / "p.db"))
    assert code == 0 and "torch" not in modules


# --- streams


def test_data_on_stdout_the_rest_on_stderr(autotune: Autotune, recipe: str) -> None:
    said = autotune("recipe", "check", recipe)
    assert (said.code, said.stderr) == (0, "") and said.stdout.startswith("small.toml: ok")
    wrong = autotune("recipe", "check", "missing.toml")
    assert wrong.stdout == "" and wrong.stderr.startswith("error: ")


def test_options_stand_before_or_after_the_command(autotune: Autotune, recipe: str) -> None:
    before, after = autotune("--json", "recipe", "check", recipe), autotune("recipe", "check", recipe, "--json")
    assert before.json == after.json
    assert not _settings.current().debug


def test_no_escapes_off_a_terminal_or_where_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    terminal: Any = Terminal()
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    _settings.begin()
    assert out.styled("x", out.BOLD, terminal) != "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert out.styled("x", out.BOLD, terminal) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert out.styled("x", out.BOLD, terminal) == "x"
    monkeypatch.delenv("TERM")
    _settings.begin(no_color=True)
    assert out.styled("x", out.BOLD, terminal) == "x"
    _settings.begin()
    assert out.styled("x", out.BOLD, sys.__stdout__ or terminal) == "x" or (sys.__stdout__ or terminal).isatty()


def test_progress_off_a_terminal_is_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    _settings.begin()
    progress = out.Progress()
    for number in range(100):
        progress(f"simulated {number} plans")
    progress("measuring one")
    progress.close()
    assert capsys.readouterr().err == "simulated 0 plans\nmeasuring one\n"
    _settings.begin(quiet=True)
    out.Progress(keep=True)("silent")
    assert capsys.readouterr().err == ""


def test_json_has_no_infinities() -> None:
    assert out.finite({"a": [float("inf"), float("nan"), 1.5], "b": (1, {"c": -float("inf")})}) == {
        "a": [None, None, 1.5],
        "b": [1, {"c": None}],
    }


# --- what ends a command


def test_a_bug_says_so_with_its_traceback(autotune: Autotune, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("autotune.cli.recipe.read_recipe", broken)
    said = autotune("recipe", "check", recipe)
    assert said.code == 1
    assert "ZeroDivisionError: boom" in said.stderr and "this is a bug in autotune" in said.stderr


def test_interrupted(autotune: Autotune, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autotune.cli.recipe.read_recipe", stopped)
    said = autotune("recipe", "check", recipe)
    assert said.code == 130 and "Traceback" not in said.stderr


def test_an_error_of_ours_has_a_hint_and_no_traceback(
    autotune: Autotune, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: object) -> None:
        raise RunError("rank 1 died", hint="see its log")

    monkeypatch.setattr("autotune.cli.recipe.read_recipe", died)
    said = autotune("recipe", "check", recipe)
    assert said.code == 5
    assert said.stderr == "error: rank 1 died\nhint: see its log\n"
    assert "Traceback" in autotune("--debug", "recipe", "check", recipe).stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("nothing",), 2, "No such command 'nothing'"),
        (("search",), 2, "Missing argument"),
        (("search", "small.toml", "--devices", "0"), 2, "--devices"),
        (("search", "small.toml", "--frobnicate"), 2, "No such option"),
        (("search", "smal.toml"), 2, "nearest: small.toml"),
        (("search", "small.toml", "--set", "search.tensr=2"), 2, "nearest: tensor"),
        (
            ("search", "small.toml", "--set", "search.schedule=zero"),
            2,
            "search.schedule: found 'zero'; expected one of",
        ),
        (("search", "small.toml", "--set", "machine.use=h100-sx"), 2, "nearest: h100-sxm"),
        (("search", "small.toml", "--set", "machine.use=this"), 4, "autotune profile"),
        (("simulate", "small.toml"), 2, "autotune search small.toml"),
        (("simulate", "small.toml", "--pin", "tensr=2"), 2, "nearest: tensor"),
        (("simulate", "small.toml", "--pin", "tensor=x"), 2, "expected a whole number"),
        (("simulate", "small.toml", "--pin", "tensor=3"), 2, "a divisor of 4 devices"),
        (("simulate", "small.toml", "--pin", "tensor=2", "--pin", "micro_batch=3"), 3, "nearest"),
        (("simulate", "something"), 2, "a recipe (.toml), a lock (.lock.json) or a plan's id"),
        (("simulate", "0123456789"), 2, "found no such plan"),
        (("simulate", "x.lock.json"), 2, "a lock file"),
        (("simulate", "x.lock.json", "--pin", "tensor=2"), 2, "x.lock.json is a lock"),
        (("run", "small.toml", "--pin", "tensor=2"), 4, "the plan is for"),
        (("plot", "small.toml", "--pin", "tensor=2", "--out", "x.gif"), 2, "nearest: .svg"),
        (("plot", "small.toml", "--pin", "tensor=2", "--out", "no/x.svg"), 2, "there is no folder no"),
        (("plans", "ls"), 4, "there is no plan database yet"),
        (("plans", "show", "abcdef"), 4, "there is no plan database yet"),
        (("db", "info"), 4, "there is no plan database yet"),
        (("techniques", "gpype"), 2, "did you mean S078 GPipe?"),
        (("techniques", "S171"), 2, "S001 to S170"),
        (("techniques", "--state", "work"), 2, "did you mean works?"),
        (("recipe", "new", "small.toml"), 2, "small.toml is already there"),
        (("recipe", "new", "x.yaml"), 2, "x.toml"),
        (("recipe", "new", "x.toml", "--kind", "training"), 2, "nearest: train"),
        (("recipe", "new", "x.toml", "--config", "none.json"), 2, "no such config"),
        (("profile", "--only", "matmull"), 2, "did you mean matmul?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input(autotune: Autotune, recipe: str, words: tuple[str, ...], code: int, text: str) -> None:
    if words[0] == "run" and os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has an accelerator: the plan may be for it")
    said = autotune(*words)
    assert (said.code, said.stdout) == (code, ""), said.stderr
    assert text in said.stderr
    assert "Traceback" not in said.stderr
    assert not Path("x.toml").exists()


def test_a_database_that_is_none(autotune: Autotune, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_text("not a database, but long enough to have a header" * 100)
    said = autotune("plans", "ls", "--db", "bad.db")
    assert said.code == 4 and "bad.db" in said.stderr and "Traceback" not in said.stderr
