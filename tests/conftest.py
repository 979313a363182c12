"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autotune.cli._settings import begin
from autotune.cli.main import main
from autotune.profiles_db.store import Store
from autotune.runners import launch
from tests.commands import Inside, Said
from tests.pool import Pool
from tests.recipes import RECIPE, Autotune


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """torch on one thread of this process: its others would wait for work in a loop, on the cores of worker processes.

    On two cores that are busy with workers, the reference step of a small model took twenty times as long with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "plans.db") as opened:
        yield opened


@pytest.fixture
def autotune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Autotune]:
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

    yield run
    begin()  # the last command's options are not those of what follows


@pytest.fixture
def standing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched jobs run in the pool's world: starting workers takes longer than what small models do in them."""
    start = launch._elastic

    def run(nproc: int, folder: Path, timeout_s: float, reader: launch.Looking | None, module: Sequence[str]) -> None:
        if module[0] != launch.WORKER:
            return start(nproc, folder, timeout_s, reader, module)
        pool.run("work", nproc, job=Path(module[1]), folder=folder)
        if reader:
            reader.look()

    monkeypatch.setattr(launch, "_elastic", run)


@pytest.fixture
def inside(standing: None, autotune: Autotune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Inside:
    """A home whose commands run in this process, and their jobs in the pool's world."""
    home = Inside.make(tmp_path / "home")
    monkeypatch.setenv("AUTOTUNE_DB", home.environment["AUTOTUNE_DB"])
    monkeypatch.chdir(home.folder)
    return replace(home, command=autotune)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A small recipe for four devices, in the folder that `autotune` runs in."""
    (tmp_path / "small.toml").write_text(RECIPE)
    return "small.toml"
