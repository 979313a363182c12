"""The `autotune` command as real processes, with a database and a machine profile of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.profiles_db.facts import machine_facts
from autotune.profiles_db.profile_file import dump_profile, load_profile, shipped
from autotune.profiles_db.store import Store
from autotune.spec.machine import Profile

LONGEST = 120.0  # seconds that any one command may take


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.stdout)
        return content


def two_workers() -> Profile:
    """A profile under this machine's fingerprint, with a processor's two workers and prices of another machine.

    Searches and runs take it for the machine at hand; what they measure themselves is this machine's.
    """
    priced = load_profile(shipped()["l40s"])
    device = replace(priced.device, name="two workers", kind="cpu", count=2)
    links = (replace(priced.links[0], size=2),)
    return replace(priced, name="two-workers", fingerprint=machine_facts().fingerprint, device=device, links=links)


@dataclass(frozen=True)
class Home:
    """A folder to run commands in. Its database is `plans.db`; its machine is there, and in the file `two.json`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Home:
        folder.mkdir(parents=True, exist_ok=True)
        dump_profile(two_workers(), folder / "two.json")
        with Store(folder / "plans.db") as store:
            store.save_profile(two_workers())
        return cls(folder)

    def store(self) -> Store:
        """The database, to be opened with `with`."""
        return Store(self.folder / "plans.db")

    @property
    def environment(self) -> dict[str, str]:
        """The test's own, without what would change the recipe, the database or the world."""
        ours = ("AUTOTUNE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        return kept | {"AUTOTUNE_DB": str(self.folder / "plans.db")}

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def start(self, *words: str, module: str = "autotune") -> subprocess.Popen[str]:
        """The command, started; Ctrl-C reaches it even where the test itself ignores it."""
        command = [sys.executable, "-c", RESTORED, module, *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=self.environment
        )

    def run(self, *words: str, module: str = "autotune") -> Said:
        process = self.start(*words, module=module)
        try:
            stdout, stderr = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Said(process.returncode, stdout, stderr)

    def files(self) -> dict[str, bytes]:
        """Every file here but the database's write-ahead log, by its path."""
        found = (file for file in sorted(self.folder.rglob("*")) if file.is_file())
        return {
            str(file.relative_to(self.folder)): file.read_bytes()
            for file in found
            if not file.name.endswith(("-wal", "-shm"))
        }


@dataclass(frozen=True)
class Inside(Home):
    """One whose commands run in the test's own process, by the fixture `autotune`."""

    command: Callable[..., Said] | None = None

    def run(self, *words: str, module: str = "autotune") -> Said:
        assert self.command is not None and module == "autotune"
        return self.command(*words)


# A shell that starts a command in the background leaves SIGINT ignored, which children inherit.
RESTORED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
