"""The probes on tiny pieces: every kind is measured, measure() answers what it was asked, a world of two works."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest
import torch

from autotune.profiles_db import facts, profiling
from autotune.profiles_db.probes import PROBES, prepare, probe_for, world
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting, coarse_first, spread_out
from autotune.profiles_db.probes.interference import slowdowns
from autotune.profiles_db.probes.launch import HANDED
from autotune.profiles_db.probes.memory import shape_of
from autotune.profiles_db.probes.memory_ops import OPS
from autotune.profiles_db.probes.session import attempt, merged, run_session
from autotune.profiles_db.probes.timing import summary
from autotune.profiles_db.probes.world import Task, run_world
from autotune.profiles_db.profile_file import dump_profile, load_profile
from autotune.spec.errors import EnvironmentFault, UsageError
from autotune.spec.machine import Profile, Sample
from autotune.spec.work import (
    BYTES,
    KINDS,
    Attention,
    Collective,
    Copy,
    Launch,
    Matmul,
    Memory,
    Optimizer,
    Work,
)

pytestmark = pytest.mark.alone

BRIEF = 0.004
SQUARE = {"batch": 1, "queries": 16, "keys": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "fp32"}
PIECES: list[Work] = [
    *(Matmul(4, 16, 32, "fp32", form) for form in ("fwd", "dgrad", "wgrad")),
    *(Matmul(4, 16, 32, "bf16", form, 3) for form in ("fwd", "dgrad", "wgrad")),
    *(Attention(**SQUARE, backend=name, form=form) for name in ("sdpa", "math") for form in ("fwd", "bwd")),
    Attention(2, 1, 32, 4, 2, 8, "fp32", "sdpa"),
    Attention(2, 3, 32, 4, 2, 8, "fp32", "math"),
    *(Memory(op, 8192, dtype) for op in OPS for dtype in ("fp32", "bf16")),
    Optimizer(1000, "fp32"),
    Optimizer(1000, "mixed"),
    Optimizer(1000, "mixed", "host"),
    Copy("h2h", 4096, False),
    Copy("disk_write", 4096, False),
    Copy("disk_read", 4096, False),
    Launch(),
]


@pytest.fixture(scope="module")
def crew() -> Crew:
    return Crew("cpu")


def sound(sample: Sample) -> bool:
    return math.isfinite(sample.seconds) and sample.seconds > 0 and sample.runs >= 1 and sample.spread >= 0


@pytest.mark.parametrize("work", PIECES, ids=str)
def test_every_piece_is_timed(work: Work, crew: Crew) -> None:
    sample = attempt(work, crew, BRIEF)
    assert isinstance(sample, Sample), sample
    assert sample.work is work and sample.ranks == 1 and sound(sample)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_grids_hold_the_right_kinds_once(device: str, quick: bool) -> None:
    """A grid has no piece twice, every piece belongs to the probe that lists it, and all kinds of work are there."""
    listed = {name: probe.works(Setting(device, quick, 4)) for name, probe in PROBES.items()}
    for name, works in listed.items():
        assert works and len(set(works)) == len(works)
        assert {probe_for(work) for work in works} == {name}
    assert {work.kind for works in listed.values() for work in works} == set(KINDS)


def test_products_mean_what_work_says(crew: Crew) -> None:
    """The prepared operands have the shapes of spec.work: the result is (m, n), batched where asked."""
    for form in ("fwd", "dgrad", "wgrad"):
        for batch, dtype in ((1, "fp32"), (1, "bf16"), (3, "fp32")):
            result = prepare(Matmul(4, 16, 32, dtype, form, batch), crew).run(0)
            assert result.shape == ((batch, 4, 32) if batch > 1 else (4, 32))


def test_attention_probes_compute_attention(crew: Crew) -> None:
    """Both backends on the same operands: what is timed is right, forward and backward."""
    found = {}
    for backend in ("sdpa", "math"):
        for form in ("fwd", "bwd"):
            fresh = Crew("cpu")
            torch.manual_seed(0)
            found[backend, form] = prepare(Attention(**SQUARE, backend=backend, form=form), fresh).run(0)
    assert torch.allclose(found["sdpa", "fwd"][0], found["math", "fwd"][0], atol=1e-5)
    for a, b in zip(found["sdpa", "bwd"], found["math", "bwd"], strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_memory_shapes_move_the_bytes_asked() -> None:
    for op in OPS:
        for size in (100_000, 10_000_000):
            rows, width = shape_of(Memory(op, size, "fp32"))
            exact = rows * width * OPS[op].moved(BYTES["fp32"])
            assert abs(exact - size) <= 0.5 * width * OPS[op].moved(4)


def test_what_cannot_run_says_why(crew: Crew) -> None:
    assert "accelerator" in str(attempt(Copy("h2d", 4096), crew, BRIEF))
    assert "rmsnorm" in str(attempt(Memory("rmsnrm", 4096, "fp32"), crew, BRIEF))
    assert isinstance(attempt(Attention(**SQUARE, backend="flsh"), crew, BRIEF), str)
    told: list[str] = []
    samples = list(run_session(crew, {"copy": [Copy("h2d", 4096), Copy("h2h", 4096)]}, 0.05, told.append))
    assert {s.work for s in samples} == {Copy("h2h", 4096)}
    assert any("skipped 1 of 2" in line and "accelerator" in line for line in told)


def test_a_session_keeps_its_time_and_tells_what_it_left_out(crew: Crew) -> None:
    works = [Matmul(256, 256, 256, "fp32"), *(Matmul(2048, 2048, 2048 + i, "fp32") for i in range(50))]
    told: list[str] = []
    begun = profiling.datetime.now()
    samples = merged(run_session(crew, {"matmul": works}, 0.3, told.append))
    assert (profiling.datetime.now() - begun).total_seconds() < 5.0
    assert len(samples) < len(works) and any("no time left" in line for line in told)


def test_merged_keeps_the_fastest_look() -> None:
    work, other = Launch(), Copy("h2h", 1)
    looks = [Sample(work, 2.0, runs=3), Sample(other, 1.0), Sample(work, 1.5, runs=2), Sample(work, 3.0, 2)]
    assert merged(looks) == [Sample(work, 1.5, runs=5), Sample(other, 1.0), Sample(work, 3.0, 2)]


def test_summary_is_median_and_relative_quartiles() -> None:
    timing = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.seconds, timing.spread, timing.runs) == (3.0, pytest.approx(2 / 3), 5)


def test_coarse_orders_cover_everything_ends_first() -> None:
    for count in (1, 2, 3, 7, 15):
        order = coarse_first(count)
        assert sorted(order) == list(range(count)) and set(order[:2]) == {0, count - 1}
    points = spread_out((1, 2, 3), (4, 5))
    assert len(set(points)) == 6 and points[0] == (1, 4) and {p[0] for p in points[:4]} == {1, 3}


def test_slowdowns_take_the_free_part_out() -> None:
    """Compute alone 1 s and communication alone 2 s, each 1.5 and 2 times slower while both run."""
    together = 1.5  # compute ends here; communication has then done 0.75 s of its 2 s, and finishes alone
    assert slowdowns(1.0, 2.0, together, together + 1.25) == pytest.approx((1.5, 2.0))
    assert slowdowns(2.0, 1.0, together + 1.25, together) == pytest.approx((2.0, 1.5))
    assert slowdowns(1.0, 1.0, 0.9, 0.9) == (1.0, 1.0)


def test_a_link_is_fitted_from_messages() -> None:
    sizes = (1 << 10, 1 << 20, 1 << 24)
    samples = [Sample(Collective("send_recv", size, 2), 5e-5 + size / 4e9, 2) for size in sizes]
    link = profiling.fit_link(samples, "x", 0)
    assert link is not None and link.latency == pytest.approx(5e-5, rel=0.01)
    assert link.bandwidth == pytest.approx(4e9, rel=0.01)
    assert profiling.fit_link([], "x", 0) is None


def test_facts_name_the_machine() -> None:
    here = facts.machine_facts(accelerator=False)
    assert here.kind == "cpu" and here.cores >= 1 and here.memory_bytes > 1 << 20 and here.host.cores == here.cores
    assert here.fingerprint == facts.fingerprint(here.name, 1, here.cores, here.memory_bytes)
    slightly = facts.fingerprint("a", 1, 2, 15 * 2**30), facts.fingerprint("a", 1, 2, 16 * 2**30)
    assert slightly[0] == slightly[1]
    others = {facts.fingerprint(*given) for given in (("a", 1, 2, 2**34), ("b", 1, 2, 2**34), ("a", 2, 2, 2**34))}
    assert len(others) == 3


def test_measure_answers_in_order_for_one_rank() -> None:
    works: list[Work] = [Copy("h2h", 8192, False), Matmul(8, 32, 32, "fp32"), Memory("add", 8192, "fp32")]
    samples = profiling.measure([*works, works[0]], 1, "cpu", seconds_each=BRIEF)
    assert [s.work for s in samples] == works and all(sound(s) and s.ranks == 1 for s in samples)


def test_measure_refuses_what_no_world_can_form() -> None:
    with pytest.raises(UsageError, match="group of 4"):
        profiling.measure([Collective("all_reduce", 1024, 4)], 2, "cpu")
    if not facts.has_driver():
        with pytest.raises(EnvironmentFault, match="accelerators"):
            profiling.measure([Launch()], 1, "cuda")


def test_a_world_of_two_measures_collectives_and_compute() -> None:
    ops = [
        Collective(op, 4096, 2)
        for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce")
    ]
    collectives: list[Work] = [*ops, Collective("send_recv", 4096, 2), Collective("all_reduce", 10, 2)]
    compute: list[Work] = [Matmul(8, 32, 32, "fp32"), Memory("copy", 8192, "fp32"), Launch()]
    samples = profiling.measure([*collectives, *compute], 2, "cpu", seconds_each=BRIEF)
    assert [s.work for s in samples] == [*collectives, *compute]
    assert all(sound(s) and s.ranks == 2 for s in samples)


def test_a_world_that_cannot_make_a_piece_goes_on() -> None:
    told: list[str] = []
    works: list[Work] = [Collective("all_reduce", 1024, 2), Collective("send_recv", 1024, 3)]
    answer = run_world(Task("cpu", 2, {"collective": works}, 0.2, interference_s=0.2, patient=True), told.append)
    assert {s.work for s in answer.samples} == {works[0]} and any("group of 3" in line for line in told)
    assert len(answer.interference) == 1 and answer.context_bytes > 0
    assert answer.interference[0].compute >= 1 and answer.interference[0].communication >= 1


@pytest.mark.skipif(facts.has_driver(), reason="needs a machine whose workers cannot start on an accelerator")
def test_a_world_that_cannot_start_says_why() -> None:
    with pytest.raises(EnvironmentFault, match="2 workers did not start"):
        run_world(Task("cuda", 2, {"collective": [Collective("all_reduce", 1024, 2)]}, 0.2), print)


def test_handing_over_each_collective_is_timed() -> None:
    """Those of bodies, by two workers; one alone has nobody to hand them to."""
    wanted = [Launch(1, what) for what in HANDED]
    found = run_world(Task("cpu", 2, {"launch": wanted}, 0.5, patient=True), print).samples
    assert {s.work for s in found} == set(wanted) and all(s.seconds > 0 and s.ranks == 2 for s in found)
    assert "at least 2" in str(attempt(wanted[0], Crew("cpu"), BRIEF))
    assert "nearest: shift" in str(attempt(Launch(1, "shft"), Crew("cpu"), BRIEF))


def test_a_stuck_world_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world that does not answer in time is ended, and the caller hears why instead of waiting."""
    monkeypatch.setattr(world, "START_S", 0.0)
    monkeypatch.setattr(world, "GRACE_S", 0.1)
    before = set(multiprocessing.active_children())  # the session's own pool of workers
    with pytest.raises(EnvironmentFault, match="no answer in time"):
        run_world(Task("cpu", 2, {"launch": [Launch()]}, 0.0), print)
    assert set(multiprocessing.active_children()) <= before


def test_a_profile_of_some_probes(tmp_path: Path) -> None:
    """The whole way, for the cheapest probes: a measured profile with its sources, and its names checked."""
    told: list[str] = []
    profile = profiling.profile_machine(True, told.append, only=("launch", "disk"))
    assert isinstance(profile, Profile) and profile.grade == "measured" and profile.created
    assert profile.coefficients["launch_seconds"] > 0 and "coefficients.launch_seconds" in profile.sources
    assert {s.work.kind for s in profile.samples} == {"launch", "copy", "matmul", "memory"} and told
    assert profile.device.memory_bandwidth > 0 and profile.device.peak_flops["fp32"] > 0
    dump_profile(profile, tmp_path / "here.json")
    assert load_profile(tmp_path / "here.json") == profile
    with pytest.raises(UsageError, match="lauch"):
        profiling.profile_machine(True, told.append, only=("lauch",))


def test_the_names_are_those_of_the_table() -> None:
    assert set(profiling.NAMES) == {*PROBES, "host", "interference"}
