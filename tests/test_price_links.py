"""Prices of collectives on one profile: samples by rank count, levels, links, meshes, and what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.costs.price import Pricer
from autotune.planners.costs.price_links import steps
from autotune.planners.predict import Predictor
from autotune.planners.refine import plan_works
from autotune.spec.errors import UsageError
from autotune.spec.machine import Interference, Link, Sample
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.work import Collective, Copy, Launch, Matmul, Memory
from autotune.spec.workload import Workload
from tests.commands import two_workers
from tests.prices import OPS, SHIPPED, bare


def test_samples_of_the_right_number_of_ranks() -> None:
    work = Matmul(512, 512, 512)
    samples = [Sample(work, seconds, ranks) for ranks, seconds in ((1, 1e-3), (2, 2e-3), (4, 4e-3))]
    samples += [Sample(Memory("copy", 2**20), 1e-3, 1), Sample(Matmul(64, 64, 64, "fp32"), 1e-4, 1)]
    for ranks, seconds in ((0, 1e-3), (1, 1e-3), (2, 2e-3), (3, 2e-3), (4, 4e-3), (64, 4e-3)):
        assert Pricer(bare(*samples), ranks).price(work) == (seconds, "measured")
    assert Pricer(bare(*samples), 4).price(Memory("copy", 2**20)) == (1e-3, "measured")
    # fp32 was measured with one rank only: used, but not called measured, since products were measured with four.
    assert Pricer(bare(*samples), 4).price(Matmul(64, 64, 64, "fp32")) == (pytest.approx(1e-4), "extrapolated")
    assert Pricer(bare(*samples[1:3]), 1).price(work) == (2e-3, "measured")


def test_levels() -> None:
    pricer = Pricer(bare())
    assert [pricer.level(span) for span in (1, 2, 8, 9, 4096)] == [0, 0, 0, 1, 1]
    inner = Pricer(bare(links=(Link("inner", 8, 1e11, 1e-6),)))
    assert inner.level(64) == 0
    assert Pricer(bare(links=())).level(2) == 0


def test_collectives_from_links() -> None:
    coefficients = {"collective_seconds": 2e-5, "link_efficiency.inner": 0.5, "link_efficiency.inner.all_reduce.8": 2.0}
    pricer = Pricer(bare(coefficients=coefficients))
    size = 2**30
    ring = 2e-5 + 7e-6 + size * 7 / 8 / 2e11
    assert pricer.price(Collective("all_gather", size, 8)) == (pytest.approx(ring), "datasheet")
    assert pricer.seconds(Collective("all_reduce", size, 8)) == pytest.approx(2e-5 + 6e-6 + size * 1.75 / 8e11)
    assert pricer.seconds(Collective("all_reduce", size, 2)) == pytest.approx(2e-5 + 2e-6 + size / 2e11)
    assert pricer.seconds(Collective("send_recv", size, 2, 1)) == pytest.approx(2e-5 + 5e-6 + size / 5e10)
    assert pricer.price(Collective("all_reduce", size, 1)) == (0.0, "measured")
    assert pricer.bound_seconds(Collective("all_reduce", size, 8)) == pytest.approx(size * 1.75 / 8e11)


def test_a_pair_on_a_mesh_has_one_link() -> None:
    pricer = Pricer(SHIPPED["mi300x"])
    size = 2**32
    pair, all_eight = (Collective("all_reduce", size, group) for group in (2, 8))
    assert all_eight.bytes / pricer.seconds(all_eight) == pytest.approx(312.9e9, rel=0.02)
    assert pair.bytes / pricer.seconds(pair) == pytest.approx(47.7e9, rel=0.1)


def test_groups_that_were_not_measured() -> None:
    """A size that puts as many bytes on the link takes as long, and each hop more its latency."""

    def seconds(work: Collective) -> float:
        return 1e-5 + steps(work.op, work.group) * 1e-6 + work.bytes / 3e11

    for op in OPS:
        samples = [Sample(w, seconds(w), 2) for w in (Collective(op, 2**i, 2) for i in range(10, 31, 4))]
        wide = [Sample(w, seconds(w), 8) for w in (Collective(op, 2**i, 8) for i in range(10, 31, 4))]
        target = Collective(op, 2**25, 4)
        price, grade = Pricer(bare(*samples), 8).price(target)
        assert (price, grade) == (pytest.approx(seconds(target), rel=1e-6), "extrapolated")
        price, grade = Pricer(bare(*samples, *wide), 8).price(target)
        assert (price, grade) == (pytest.approx(seconds(target), rel=0.02), "interpolated")
        assert Pricer(bare(*samples), 8).price(replace(target, level=1))[1] == "datasheet"


def test_a_figure_that_is_missing_is_named() -> None:
    pricer = Pricer(bare(links=()))
    for work, key in (
        (Launch(), "coefficients.launch_seconds"),
        (Copy("disk_read", 1), "coefficients.disk_bandwidth.disk_read"),
        (Collective("all_reduce", 8, 2), "links"),
    ):
        with pytest.raises(UsageError) as caught:
            pricer.seconds(work)
        assert [problem.key for problem in caught.value.problems] == [key]


def test_interference_of_the_nearest_rank_count() -> None:
    known = (Interference(1.1, 1.2, 2), Interference(1.3, 1.4, 4))
    assert Pricer(bare(interference=known), 3).interference() == known[0]
    assert Pricer(bare(interference=known), 64).interference() == known[1]
    assert Pricer(bare(), 4).interference() == Interference(1.0, 1.0, 4)


def test_what_a_graph_replays_has_a_price_of_its_own() -> None:
    """A graph's collective waits for no stream's events; where none was measured it is taken to be as any other."""
    plain = [Sample(Collective("all_reduce", size, 2), 4e-5, 2) for size in (2**10, 2**16)]
    replayed = [Sample(replace(sample.work, captured=True), 1e-5, 2) for sample in plain]  # type: ignore[type-var]
    asked = Collective("all_reduce", 2**13, 2)
    captured = replace(asked, captured=True)
    pricer = Pricer(bare(*plain), 2)
    assert pricer.price(captured) == pricer.price(asked) == (pytest.approx(4e-5), "interpolated")
    pricer = Pricer(bare(*plain, *replayed), 2)
    assert pricer.price(captured) == (pytest.approx(1e-5), "interpolated")
    assert pricer.price(asked) == (pytest.approx(4e-5), "interpolated")
    assert pricer.bound_seconds(captured) <= pricer.seconds(captured)


def test_passes_of_a_generation_are_captured_on_a_gpu() -> None:
    model = ModelSpec("tiny", "LlamaForCausalLM", 32, 4, 4, 2, 8, 48, 256)
    work = Workload(kind="generate", prompt_length=8, new_tokens=4, batch=1, precision="bf16")
    for profile, captured in ((SHIPPED["h200-sxm"], True), (two_workers(), False)):
        made = plan_works(Predictor(model, work, profile), Plan(tensor=2))
        found = {each.captured for each in made if isinstance(each, Collective)}
        assert found == {captured}
    trained = plan_works(Predictor(model, Workload(sequence_length=8), SHIPPED["h200-sxm"]), Plan(tensor=2))
    assert {each.captured for each in trained if isinstance(each, Collective)} == {False}
