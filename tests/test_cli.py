"""The command line: frozen flags, its own documentation, speed, streams, JSON, wrong input and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.cli import _output as out
from autotune.cli import _reference, _settings
from autotune.cli.main import main
from autotune.profiles_db.profile_file import dump_profile, load_profile, shipped
from autotune.spec.errors import RunError

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "flags.json"
HEAVY = {"torch", "sqlalchemy", "optuna", "pydantic", "numpy", "rich", "safetensors"}

RECIPE = """
[model]
architectures = ["LlamaForCausalLM"]
vocab_size = 256
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
rms_norm_eps = 1e-5
[machine]
use = "h100-sxm"
devices = 4
[workload]
kind = "train"
sequence_length = 64
global_batch = 8
[search]
recompute = "none"
zero = 0
"""


class Said:
    """What a command printed and how it ended."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.stdout)
        return content


Autotune = Callable[..., Said]


@pytest.fixture
def autotune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Autotune:
    """Run the command line in this process, in an empty folder with a database of its own."""
    for name in [name for name in os.environ if name.startswith("AUTOTUNE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOTUNE_DB", str(tmp_path / "db" / "plans.db"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        stdout, stderr = capfd.readouterr()
        return Said(int(ended.value.code or 0), stdout, stderr)

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "small.toml").write_text(RECIPE)
    return "small.toml"


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


# --- what commands do


def test_a_new_recipe_is_ready_to_search(autotune: Autotune) -> None:
    for kind in ("train", "generate"):
        assert autotune("recipe", "new", f"{kind}.toml", "--kind", kind).code == 0
        said = autotune("recipe", "check", f"{kind}.toml", "--json")
        assert said.json["schema"] == "autotune.recipe.check/1" and said.json["kind"] == kind
    config = ROOT / "recipes" / "models" / "meta-llama--Llama-3.2-1B.json"
    assert autotune("recipe", "new", "big.toml", "--config", str(config), "--machine", "h200-sxm").code == 0
    assert tomllib.loads(Path("big.toml").read_text())["machine"]["use"] == "h200-sxm"
    assert "16 layers" in autotune("recipe", "check", "big.toml").stdout


def test_a_recipe_shown_is_a_recipe(autotune: Autotune, recipe: str) -> None:
    said = autotune("recipe", "show", recipe, "--set", "search.tensor=[1, 2]")
    Path("again.toml").write_text(said.stdout)
    first = autotune("recipe", "show", recipe, "--set", "search.tensor=[1, 2]", "--json").json
    second = autotune("recipe", "show", "again.toml", "--json").json
    assert first["digest"] == second["digest"]


def test_schema_is_json(autotune: Autotune) -> None:
    assert json.loads(autotune("recipe", "schema").stdout)["$id"] == "autotune.recipe/1"


def test_simulate(autotune: Autotune, recipe: str) -> None:
    pins = ("--pin", "tensor=2", "--pin", "micro_batch=2")
    said = autotune("simulate", recipe, *pins, "--json")
    assert said.code == 0 and said.json["schema"] == "autotune.simulate/1"
    assert said.json["plan"]["data"] == 2, "data fills the four devices"
    assert set(said.json["predicted"]) >= {"step_s", "tokens_per_s", "peak_bytes"}
    text = autotune("simulate", recipe, *pins)
    assert said.json["plan_id"] in text.stdout and "memory at its peak" in text.stdout


def test_explain_and_plot(autotune: Autotune, recipe: str) -> None:
    pins = ("--pin", "pipeline=2", "--pin", "micro_batch=1")
    said = autotune("explain", recipe, *pins, "--json")
    assert said.code == 0 and said.json["schema"] == "autotune.explain/1" and "time" in said.json
    for form, begins in (("html", "<!doctype html>"), ("svg", "<"), ("json", "{")):
        assert autotune("plot", recipe, *pins, "--out", f"t.{form}").code == 0
        assert Path(f"t.{form}").read_text().startswith(begins)
    assert not list(Path().glob("*.part"))


def test_techniques(autotune: Autotune) -> None:
    rows = autotune("techniques", "--json").json["techniques"]
    assert [row["id"] for row in rows] == [f"S{n:03d}" for n in range(1, 171)]
    works = autotune("techniques", "--state", "works", "--json").json["techniques"]
    assert {"S051", "S078", "S098"} <= {row["id"] for row in works}
    assert all(row["where"] for row in works)
    one = autotune("techniques", "gpipe", "--json").json["techniques"]
    assert [row["id"] for row in one] == ["S078"]
    assert autotune("techniques", "s78").stdout == autotune("techniques", "GPipe").stdout


def test_doctor(autotune: Autotune) -> None:
    said = autotune("doctor", "--json")
    checks = {check["name"]: check for check in said.json["checks"]}
    assert set(checks) == {"python", "packages", "torch", "devices", "database", "profile", "machines", "corpus"}
    assert said.code == 0 and all(check["ok"] for check in checks.values()), checks
    assert "autotune profile" in checks["profile"]["hint"]


def test_search_locks_and_the_lock_is_used(autotune: Autotune, recipe: str) -> None:
    said = autotune("search", recipe, "--json")
    assert said.code == 0, said.stderr
    found = said.json
    assert found["schema"] == "autotune.search/1" and found["lock"] == "small.lock.json"
    assert set(found["predicted"]) >= {"step_s", "tokens_per_s", "peak_bytes"}
    assert set(found["bound"]) >= {"step_s", "gap"} and found["bound"]["step_s"] <= found["predicted"]["step_s"]
    space = found["space"]
    assert space["structures"] - space["feasible"] == sum(space["infeasible"].values())
    assert set(found["evaluated"]) == {"bounded", "simulated", "measured"} and found["evaluated"]["measured"] == 0
    assert found["ranking"][0]["plan_id"] == found["plan_id"]

    simulated = autotune("simulate", recipe, "--json").json
    assert simulated["plan_id"] == found["plan_id"]
    assert simulated["predicted"]["step_s"] == pytest.approx(found["predicted"]["step_s"])
    assert autotune("simulate", "small.lock.json", "--json").json == simulated
    assert autotune("simulate", found["plan_id"], "--json").json["predicted"] == simulated["predicted"]
    explained = autotune("explain", recipe, "--json").json
    assert {"answer", "versus", "space", "proof"} <= set(explained)
    other = found["ranking"][1]["plan_id"]
    assert autotune("explain", recipe, "--versus", other).code == 0
    differ = autotune("plans", "diff", found["plan_id"], other, "--json").json["differences"]
    assert differ and all(mine != theirs for mine, theirs in differ.values())
    listed = autotune("plans", "ls", "--json").json["plans"]
    assert found["plan_id"] in [row["plan_id"] for row in listed]


def test_the_same_search_twice_writes_the_same_lock(autotune: Autotune, recipe: str) -> None:
    texts = []
    for _ in range(2):
        assert autotune("search", recipe).code == 0
        lock = json.loads(Path("small.lock.json").read_text())
        lock.pop("generated_at")
        texts.append(lock)
    assert texts[0] == texts[1]


def test_a_stale_lock_is_refused_and_says_what_changed(autotune: Autotune, recipe: str) -> None:
    assert autotune("search", recipe, "-q").code == 0
    before = Path("small.lock.json").read_bytes()
    stale = autotune("simulate", recipe, "--set", "workload.global_batch=16")
    assert stale.code == 8 and "workload.global_batch was 8 and is 16" in stale.stderr
    Path(recipe).write_text(RECIPE.replace("hidden_size = 64", "hidden_size = 128"))
    for name in (recipe, "small.lock.json"):
        said = autotune("run", name)
        assert said.code == 8 and "the model changed" in said.stderr
    assert Path("small.lock.json").read_bytes() == before
    Path(recipe).unlink()
    assert autotune("simulate", "small.lock.json").code == 0, "without its recipe a lock stands for itself"


def test_flags_of_search(autotune: Autotune, recipe: str) -> None:
    said = autotune("search", recipe, "--devices", "2", "--seconds", "5", "--measure", "0", "--no-lock", "--json")
    assert said.json["devices"] == 2 and said.json["lock"] is None
    assert not Path("small.lock.json").exists()
    assert said.json["plan"]["data"] * said.json["plan"]["tensor"] * said.json["plan"]["pipeline"] == 2


def test_no_plan_fits(autotune: Autotune, recipe: str) -> None:
    said = autotune("search", recipe, "--set", "search.tensor=3")
    assert said.code == 3 and said.stdout == "" and not Path("small.lock.json").exists()
    big = str(ROOT / "recipes" / "models" / "meta-llama--Llama-3.1-70B.json")
    Path("big.toml").write_text(f'model = {{ config = "{big}" }}\n' + RECIPE.split("rms_norm_eps = 1e-5")[1])
    said = autotune("search", "big.toml", "--devices", "1")
    assert said.code == 3 and "memory of a device" in said.stderr


def test_interrupting_a_search_keeps_the_database(autotune: Autotune, tmp_path: Path) -> None:
    path = ROOT / "recipes" / "llama-70b-64xh100.toml"
    words = [sys.executable, "-m", "autotune", "search", str(path), "--no-lock"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while process.poll() is None and not Path("db/plans.db").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in stderr, stderr
    assert autotune("db", "info", "--json").json["counts"]["searches"] == 1


@pytest.fixture
def here(tmp_path: Path) -> str:
    """A recipe for a processor with two workers, on prices that need not be this machine's."""
    priced = load_profile(shipped()["l40s"])
    device = replace(priced.device, name="two workers", kind="cpu", count=2)
    dump_profile(replace(priced, name="two-workers", fingerprint="two", device=device), tmp_path / "two.json")
    text = RECIPE.replace('use = "h100-sxm"\ndevices = 4', 'use = "./two.json"\ndevices = 2')
    (tmp_path / "here.toml").write_text(text.replace("[search]", 'precision = "fp32"\n[search]'))
    return "here.toml"


def test_run_measures_stores_and_compares(autotune: Autotune, here: str) -> None:
    pins = ("--pin", "tensor=2", "--pin", "micro_batch=4")
    assert "needs 2 workers" in autotune("run", here, *pins, "--nproc", "3").stderr
    said = autotune("run", here, *pins, "--steps", "2", "--warmup", "1", "--check", "--json", "--trace", "t.json")
    assert said.code == 0, said.stderr
    ran = said.json
    assert ran["schema"] == "autotune.run/1" and ran["equal"] is True and ran["max_difference"] < 1e-4
    measured, error = ran["measured"], ran["error"]
    assert len(measured["step_s_all"]) == 2 and len(measured["peak_bytes"]) == 2 and measured["losses"]
    assert error["step_s"] == pytest.approx(ran["predicted"]["step_s"] / measured["step_s"] - 1)
    assert json.loads(Path("t.json").read_text())["traceEvents"]

    shown = autotune("plans", "show", ran["plan_id"], "--json").json
    assert shown["plan"]["tensor"] == 2 and [run["run_id"] for run in shown["runs"]] == [ran["run_id"]]
    assert shown["runs"][0]["launches"] == measured["launches"]
    both = autotune("plot", here, *pins, "--out", "both.html", "--json").json
    assert both["timelines"] == ["predicted", "measured"]
    assert autotune("plot", ran["run_id"], "--json").json["timelines"] == ["measured"]
    assert "measured" in autotune("explain", here, *pins, "--json").json
    assert autotune("db", "export", "all.json").code == 0
    assert ran["run_id"] in Path("all.json").read_text()
    assert autotune("db", "info", "--json").json["counts"]["runs"] == 1


def test_a_worker_that_dies_takes_the_run_down(autotune: Autotune, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")  # a network interface that only a worker looks for
    words = ("run", here, "--pin", "data=2", "--steps", "1")
    start = time.monotonic()
    said = autotune(*words)
    assert time.monotonic() - start < 30
    assert said.code == 5 and "worker" in said.stderr and "nowhere0" in said.stderr
    (run,) = autotune("plans", "show", next(iter(plans_of(autotune))), "--json").json["runs"]
    assert run["status"] == "failed" and "nowhere0" in run["error"]


def plans_of(autotune: Autotune) -> list[str]:
    """Ids of every plan in the database."""
    autotune("db", "export", "plans.json")
    return [row["id"] for row in json.loads(Path("plans.json").read_text())["tables"]["plans"]]


def test_shipped_profiles_are_known_to_recipes(autotune: Autotune, recipe: str) -> None:
    for name, path in shipped().items():
        assert load_profile(path).name == name
        assert autotune("simulate", recipe, "--set", f"machine.use={name}", "--pin", "tensor=2", "-q").code == 0
