"""The examples for continuous integrations, tried: their steps' own commands, in a shell, in a new repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from autotune.cli import _reference
from tests.recipes import RECIPE, ROOT, Autotune

CI = ROOT / "docs" / "ci"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CI / name).read_text())
    return found


@pytest.fixture
def repository(tmp_path: Path, autotune: Autotune) -> Path:
    """A repository with `recipes/small.toml` and its lock, on branch `main`, which is its own origin."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.toml").write_text(RECIPE)
    assert autotune("search", "recipes/small.toml").code == 0
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for words in (("init", "-q", "-b", "main"), ("add", "recipes"), (*identity, "commit", "-q", "-m", "m")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    subprocess.run(["git", "remote", "add", "origin", str(tmp_path)], cwd=tmp_path, check=True)
    return tmp_path


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As runners start bash; `python` is the one that runs this test."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    if not (binaries / "python").exists():
        (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (binaries / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    words = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", command]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment | variables, timeout=120)


def inputs_of(step: dict[str, Any], action: dict[str, Any]) -> dict[str, str]:
    """What a step of a workflow gives to the action, over the action's defaults."""
    given = step.get("with", {})
    assert given.keys() <= action["inputs"].keys()
    for name, said in action["inputs"].items():
        assert said["description"] and (name in given or not said.get("required"))
    return {name: str(given.get(name, said.get("default", ""))) for name, said in action["inputs"].items()}


def filled(text: str, inputs: dict[str, str]) -> str:
    """`${{ inputs.NAME }}` as a runner fills it in."""
    return re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: inputs[found[1]], text)


def test_the_steps_of_the_action(repository: Path) -> None:
    action, workflow = read("github/action.yml"), read("github/workflows/gate.yml")
    (step,) = [s for s in workflow["jobs"]["predicted"]["steps"] if "autotune-gate" in s["uses"]]
    inputs = inputs_of(step, action)
    install, gate = action["runs"]["steps"]
    assert install["if"] == "inputs.install != ''" and "pip install" in install["run"]
    assert "${{" not in gate["run"] + install["run"], "inputs are no part of a script"
    variables = {name: filled(value, inputs) for name, value in gate["env"].items()}
    variables["GITHUB_STEP_SUMMARY"] = str(repository / "summary.md")
    done = shell(gate["run"], repository, **variables)
    assert done.returncode == 0 and "recipes/small.toml: pass" in done.stdout, done.stderr
    assert "| recipes/small.toml | pass |" in (repository / "summary.md").read_text()
    assert ElementTree.parse(repository / inputs["junit"]).getroot()[0].get("tests") == "1"

    better(repository)
    worse = shell(gate["run"], repository, **variables)
    assert worse.returncode == 7
    (line,) = [line for line in worse.stdout.splitlines() if line.startswith("::")]
    assert line.startswith("::error file=recipes/small.toml,title=autotune gate%3A regressed::predicted time")


def better(repository: Path) -> None:
    """The lock as if the plan had been predicted to be faster."""
    file = repository / "recipes" / "small.lock.json"
    raw = json.loads(file.read_text())
    raw["predicted"]["step_s"] *= 0.9
    file.write_text(json.dumps(raw))


def test_the_scripts_of_gitlab(repository: Path) -> None:
    jobs = read("gitlab.yml")
    variables = {key: str(value) for key, value in jobs.pop("variables").items()}
    job = jobs["gate-predicted"]
    done = shell("\n".join(job["script"]), repository, **variables)
    assert done.returncode == 0 and "recipes/small.toml: pass" in done.stdout, done.stderr
    report = repository / job["artifacts"]["reports"]["junit"]
    assert ElementTree.parse(report).getroot()[0].get("failures") == "0" and job["artifacts"]["when"] == "always"
    better(repository)
    assert shell("\n".join(job["script"]), repository, **variables).returncode == 7
    assert ElementTree.parse(report).getroot()[0].get("failures") == "1", "the report of what failed is there too"


def test_the_measured_jobs_reach_their_revision(repository: Path) -> None:
    """This machine is not the lock's: the commands are right up to there, and say so."""
    workflow = read("github/workflows/gate.yml")
    (step,) = [s for s in workflow["jobs"]["measured"]["steps"] if "autotune-gate" in s["uses"]]
    inputs = inputs_of(step, read("github/action.yml"))
    assert inputs["arguments"] == "--baseline git:origin/${{ github.base_ref }}"
    job = read("gitlab.yml")["gate-measured"]
    variables = {"RECIPES": "recipes/small.toml", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}
    done = shell("\n".join(job["script"]), repository, **variables)
    assert done.returncode == 4 and "the baseline is of another machine" in done.stderr, done.stderr
    assert job["allow_failure"] == {"exit_codes": 9}


def test_every_flag_of_the_examples_is_one() -> None:
    flags = set(_reference.flags()["autotune gate"])
    for file in (CI / "github" / "action.yml", CI / "github" / "workflows" / "gate.yml", CI / "gitlab.yml"):
        for line in file.read_text().splitlines():
            if "autotune gate" in line or "arguments:" in line or "default: --" in line:
                assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= flags, line
