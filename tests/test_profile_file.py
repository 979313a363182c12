"""The file form of machine profiles, and the profiles that ship."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.profiles_db.profile_file import dump_profile, from_dict, load_profile, resolve, shipped, to_dict, to_text
from autotune.spec.errors import UsageError
from autotune.spec.machine import Device, Host, Interference, Link, Profile, Sample
from autotune.spec.work import Attention, Collective, Copy, Launch, Matmul, Memory, Optimizer

WORKS = (
    Matmul(8, 16, 32, "fp32", "wgrad", 2),
    Attention(1, 1, 128, 8, 2, 64, "bf16", "cudnn", "bwd"),
    Memory("rmsnorm", 4096),
    Optimizer(1000, "fp32"),
    Collective("all_gather", 1024, 4, 1),
    Copy("d2h", 4096, pinned=False),
    Launch(3),
)


def small() -> Profile:
    device = Device("cpu", "cpu", 2, 2**34, 2e10, {"fp32": 1e11, "bf16": 5e10}, 2)
    samples = tuple(Sample(work, 1e-3 * (i + 1), ranks=2, runs=5, spread=0.01) for i, work in enumerate(WORKS))
    return Profile(
        name="small",
        grade="measured",
        fingerprint="abc",
        device=device,
        host=Host(2, 2**34, 2e10, {"fp32": 1e11}),
        links=(Link("shared-memory", 2, 5e9, 1e-5), Link("ethernet", 0, 1e9, 5e-5)),
        samples=samples,
        interference=(Interference(1.5, 1.25, 2),),
        coefficients={"launch_seconds": 1e-6},
        software={"torch": "2.13"},
        sources={"samples": "measured"},
        created="2026-11-22",
    )


def problems(raw: Any) -> dict[str, str]:
    with pytest.raises(UsageError) as caught:
        from_dict(raw, "m.json")
    assert caught.value.exit_code == 2
    assert all(problem.file == "m.json" for problem in caught.value.problems)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    dump_profile(small(), tmp_path / "new" / "small.json")
    assert load_profile(tmp_path / "new" / "small.json") == small()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small.json"]


def test_one_sample_a_line() -> None:
    lines = to_text(small()).splitlines()
    assert sum('"seconds"' in line for line in lines) == len(WORKS)
    assert sum('"kind": "matmul"' in line and '"seconds": 0.001' in line for line in lines) == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "small.json"
    dump_profile(small(), target)
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_profile(replace(small(), coefficients={"bad": float("nan")}), target)
    assert load_profile(target) == small()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_profiles_load_and_cite_every_figure(name: str) -> None:
    path = shipped()[name]
    profile = load_profile(path)
    assert profile.name == name
    assert path.read_text() == to_text(profile), "the file is in the form that dump_profile writes"
    assert profile.device.count == 8
    assert profile.links[-1].size == 0, "a search for many nodes needs a link that joins them"
    figures = {f"device.{key}" for key in ("memory_bytes", "memory_bandwidth", "peak_flops", "cores", "context_bytes")}
    figures |= {"device.count", "host"} | {f"links.{link.name}" for link in profile.links}
    figures |= {f"coefficients.{key}" for key in profile.coefficients}
    figures |= {"samples"} if profile.samples else set()
    figures |= {"interference"} if profile.interference else set()
    assert set(profile.sources) == figures
    assert all(len(source) > 15 or source in ("the same fit",) for source in profile.sources.values())


def test_what_must_ship() -> None:
    wanted = {"a100-sxm-80gb", "h100-sxm", "h200-sxm", "b200", "mi300x", "l40s", "rtx-4090"}
    assert wanted | {"h100-sxm-ethernet-100g", "a100-sxm-80gb-ethernet-100g"} <= set(shipped())
    assert {load_profile(shipped()[name]).grade for name in wanted - {"h200-sxm"}} == {"datasheet"}


def test_all_problems_at_once() -> None:
    raw = to_dict(small())
    raw["colour"] = "red"
    raw["grade"] = "messured"
    raw["device"]["cores"] = 2.5
    raw["device"]["memory_bandwith"] = raw["device"].pop("memory_bandwidth")
    raw["links"][0]["size"] = True
    raw["samples"][0]["work"]["m"] = 0
    raw["samples"][1]["work"]["kind"] = "atention"
    raw["samples"][2]["seconds"] = 0
    raw["samples"][3]["work"]["dtype"] = "bf16"
    raw["coefficients"]["launch_seconds"] = "fast"
    found = problems(raw)
    assert set(found) == {
        "colour",
        "grade",
        "device.cores",
        "device.memory_bandwith",
        "device.memory_bandwidth",
        "links[0].size",
        "samples[0].work.m",
        "samples[1].work.kind",
        "samples[2].seconds",
        "samples[3].work.dtype",
        "coefficients.launch_seconds",
    }
    assert "nearest: measured" in found["grade"]
    assert "nearest: memory_bandwidth" in found["device.memory_bandwith"]
    assert "nearest: attention" in found["samples[1].work.kind"]
    assert "mixed, fp32, fp64" in found["samples[3].work.dtype"]


def test_what_no_single_field_shows() -> None:
    raw = to_dict(small())
    raw["links"].reverse()
    raw["device"]["peak_flops"]["fp23"] = 1.0
    raw["samples"][1]["work"]["queries"] = 129
    found = problems(raw)
    assert set(found) == {"links[1].size", "device.peak_flops.fp23", "samples[1].work.queries"}
    assert "nearest: fp32" in found["device.peak_flops.fp23"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 2**64, -1])
def test_numbers_that_are_none(value: float) -> None:
    raw = to_dict(small())
    raw["host"]["memory_bytes"] = value
    raw["samples"][0]["seconds"] = value
    assert {"host.memory_bytes", "samples[0].seconds"} <= set(problems(raw))


@pytest.mark.parametrize("raw", [None, [], 3, {}, {"schema": "autotune.machine/2"}, {"schema": 1}])
def test_other_things_than_a_profile(raw: Any) -> None:
    assert set(problems(raw)) in ({""}, {"schema"})


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"a": 1, "a": 2}', "[" * 100_000, "import os"])
def test_files_that_are_not_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"m\.json"):
        load_profile(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"m\.json"):
        load_profile(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(UsageError, match="directory"):
        load_profile(tmp_path)


def test_resolve(tmp_path: Path) -> None:
    dump_profile(small(), tmp_path / "mine.json")
    dump_profile(small(), tmp_path / "sub" / "bare")
    store = {"lab": replace(small(), name="lab"), "h100-sxm": replace(small(), name="lab")}
    assert resolve("h100-sxm", tmp_path, store.get).name == "h100-sxm"
    assert resolve("lab", tmp_path, store.get).name == "lab"
    assert resolve("mine.json", tmp_path, store.get) == small()
    assert resolve("sub/bare", tmp_path, store.get) == small()
    assert resolve(str(tmp_path / "mine.json"), Path("/"), store.get) == small()


def test_resolve_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve("h100-smx", tmp_path, lambda name: None)
    assert "nearest: h100-sxm" in str(caught.value)
    assert "rtx-4090" in str(caught.value)
    with pytest.raises(UsageError, match=r"machine.use: found \"none.json\""):
        resolve("none.json", tmp_path, lambda name: None)


def test_loading_a_profile_loads_no_heavy_module() -> None:
    code = (
        "import sys, autotune.profiles_db.profile_file as f, autotune.planners.costs.price as p;"
        "p.Pricer(f.load_profile(f.shipped()['h200-sxm']));"
        "print(json.dumps([m for m in ('torch', 'numpy', 'sqlalchemy', 'optuna', 'pydantic') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", "import json;" + code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
