"""Worlds that Slurm starts: what its variables say, and two of its tasks that train together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.runners.world import World, expand_counts, first_host, slurm_world
from tests.commands import Home, Said
from tests.small import TRAIN

pytestmark = pytest.mark.alone

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "cpu01,gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def test_a_task_of_a_step() -> None:
    port = 20000 + 4711 * 8 % 10000
    assert slurm_world(STEP) == World(9, 12, 1, 4, "gpu07", port), "not the node that srun was called on"
    given = slurm_world(STEP | {"MASTER_ADDR": "here", "MASTER_PORT": "1234", "SLURM_NODEID": "0"})
    assert given == World(9, 12, 1, 8, "here", 1234)
    assert given.variables == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "1234",
    }
    other = slurm_world(STEP | {"SLURM_STEP_ID": "1"})
    assert other is not None and other.port != port, "steps of one job may run side by side"


def test_what_is_no_world() -> None:
    batch = {key: value for key, value in STEP.items() if "STEP" not in key}
    assert slurm_world(batch | {"SLURM_PROCID": "0"}) is None, "a batch script outside srun"
    assert slurm_world(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert slurm_world({"SLURM_NTASKS": "4"}) is None
    assert slurm_world({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[07-09,12],x", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack1-n[001-128]-ib,y", "rack1-n001-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


def test_two_tasks_train_together(tmp_path: Path) -> None:
    home = Home.make(tmp_path / "home")
    recipe = home.write("r.toml", TRAIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("run", recipe, "--pin", "data=2", "--pin", "micro_batch=4", "--check", "--json")
    tasks = []
    for rank in range(2):
        step = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_NODEID": "0",
            "SLURM_TASKS_PER_NODE": "2",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-m", "autotune", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=home.folder,
                env=home.environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | step,
            )
        )
    said = [Said(0, *task.communicate(timeout=120)) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    report = json.loads(said[0].stdout)
    assert report["equal"] is True and len(report["measured"]["peak_bytes"]) == 2
    assert said[1].stdout == "", "rank 0 answers for all"
    with home.store() as store:
        assert [run.status for run in store.runs()] == ["finished"]
