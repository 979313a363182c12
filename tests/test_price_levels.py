"""Collectives of groups that span nodes: how they lie on the links, what they are made of, what was measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from autotune.planners.bounds import Bounder
from autotune.planners.costs.price import Pricer
from autotune.planners.costs.price_links import phases
from autotune.planners.costs.step import StepCosts
from autotune.planners.predict import Predictor
from autotune.profiles_db.profile_file import from_dict, load_profile, shipped, to_dict
from autotune.spec.families import load_model
from autotune.spec.machine import Device, Host, Link, Profile, Sample
from autotune.spec.plan import Plan
from autotune.spec.work import Collective
from autotune.spec.workload import Workload

NVLINK, NIC = Link("nvlink", 8, 4e11, 1e-6), Link("nic", 0, 5e10, 5e-6)
SIZE = 2**30
MODELS = Path(__file__).parents[1] / "recipes" / "models"
SPLIT = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def nodes(*samples: Sample, links: tuple[Link, ...] = (NVLINK, NIC)) -> Profile:
    device = Device("gpu", "cuda", 8, 2**36, 3e12, {"bf16": 9e14, "fp32": 6e13})
    return Profile("nodes", "datasheet", "", device, Host(8, 2**36, 1e11), links, samples, (), {"kernel_seconds": 2e-6})


@pytest.mark.parametrize(
    ("group", "stride", "expected"),
    [
        (8, 1, (0, 1)),  # one node
        (64, 1, (1, 8)),  # all of eight nodes
        (16, 4, (1, 2)),  # two of each node's four pairs
        (8, 8, (1, 1)),  # one of each node
        (4, 16, (1, 1)),  # one of every second node
        (12, 1, (1, 4)),  # one node and a half
        (3, 4, (1, 1)),  # two on one node, one on the other
    ],
)
def test_how_a_group_lies_on_nodes_of_eight(group: int, stride: int, expected: tuple[int, int]) -> None:
    assert Pricer(nodes()).spread(group, stride) == expected


def test_one_node_has_no_other_level() -> None:
    assert Pricer(nodes(links=(NVLINK,))).spread(64, 1) == (0, 1)
    assert Pricer(nodes(links=())).spread(2, 1) == (0, 1)


@pytest.mark.parametrize(("op", "shape"), list(product(SPLIT[:3], [(64, 8), (16, 2), (12, 4)])))
def test_phases_put_as_many_bytes_on_links_as_one_ring(op: str, shape: tuple[int, int]) -> None:
    group, inner = shape
    work = Collective(op, 3 * SIZE, group, 1, inner)
    inside, across = phases(work)
    assert sum(p.bytes for p in inside + across) == pytest.approx(work.bytes, rel=1e-9)
    assert all((p.level, p.group) == (0, inner) for p in inside)
    assert all((p.level, p.group) == (1, group // inner) for p in across)


def test_every_rank_uses_its_own_way_out() -> None:
    pricer = Pricer(nodes())
    inside = 2 * 7 / 8 * SIZE / 4e11
    across = 2 * 7 / 8 * SIZE / 8 / 5e10
    starts = 2 * 7 * 1e-6  # a reduce-scatter and an all-gather of eight ranks
    price, grade = pricer.price(Collective("all_reduce", SIZE, 64, 1, 8))
    assert grade == "datasheet"
    assert price == pytest.approx(max(inside, across) + starts + 6 * 5e-6, rel=1e-3)
    assert pricer.seconds(Collective("all_reduce", SIZE, 64, 1)) > 7 * across
    slow = Pricer(nodes(links=(NVLINK, replace(NIC, bandwidth=1e9))))
    ratio = slow.seconds(Collective("all_gather", SIZE, 64, 1)) / slow.seconds(Collective("all_gather", SIZE, 64, 1, 8))
    assert ratio == pytest.approx(8 * 63 / 64 / (7 / 8), rel=0.01)


@pytest.mark.parametrize(("name", "op"), list(product(sorted(shipped()), SPLIT)))
def test_more_ways_out_are_never_slower_and_never_beat_the_bound(name: str, op: str) -> None:
    profile = load_profile(shipped()[name])
    pricer, level = Pricer(profile, 8), len(profile.links) - 1
    for size in (2**20, 2**26, 2**33):
        one, two, eight = (Collective(op, size, 64, level, inner) for inner in (1, 2, 8))
        assert pricer.bound_seconds(eight) <= pricer.seconds(eight)
        assert pricer.seconds(eight) <= pricer.seconds(two) * 1.01 <= pricer.seconds(one) * 1.05


def test_what_was_measured_wins() -> None:
    work = Collective("all_reduce", SIZE, 16, 1, 8)
    flat = replace(work, inner=1)
    measured = Pricer(nodes(Sample(work, 0.5), Sample(flat, 2.0)))
    assert measured.price(work) == (0.5, "measured")
    assert measured.price(flat) == (2.0, "measured")
    # One rank a node was measured: that is what goes across.
    pair = [Sample(Collective("all_reduce", size, 2, 1), seconds) for size, seconds in ((1, 1e-5), (SIZE // 8, 0.25))]
    across = Pricer(nodes(*pair, Sample(flat, 2.0)))
    assert across.seconds(work) == pytest.approx(0.25, rel=0.01)
    assert across.grade(work) == "datasheet"


def test_profile_files_of_before_are_read_and_written_as_they_were() -> None:
    old = nodes(Sample(Collective("all_reduce", SIZE, 8, 1), 1.0))
    raw = to_dict(old)
    assert "inner" not in raw["samples"][0]["work"]
    assert from_dict(raw) == old
    new = nodes(Sample(Collective("all_reduce", SIZE, 16, 1, 8), 1.0))
    assert to_dict(new)["samples"][0]["work"]["inner"] == 8
    assert from_dict(to_dict(new)) == new


def test_gradients_of_replicas_over_nodes_use_every_nic() -> None:
    profile = load_profile(shipped()["h100-sxm"])
    model = load_model(MODELS / "meta-llama--Llama-3.1-8B.json")
    predictor = Predictor(model, Workload("train", sequence_length=4096, global_batch=64), profile)
    for plan, inner in ((Plan(data=64), 8), (Plan(data=16, tensor=4), 2), (Plan(data=8, tensor=8), 1)):
        costs = StepCosts(plan, model, predictor.workload, profile, predictor.bodies(plan))
        (work,) = costs.pieces("ALL_REDUCE", 0)
        assert isinstance(work, Collective) and (work.group, work.level, work.inner) == (plan.data, 1, inner)
        bounder = Bounder(predictor)
        assert bounder.updates(plan)[0][0] == pytest.approx(costs.pricer.seconds(work))


def test_a_tensor_group_over_nodes() -> None:
    model = load_model(MODELS / "meta-llama--Llama-3.1-8B.json")
    predictor = Predictor(
        model, Workload("train", sequence_length=4096, global_batch=64), load_profile(shipped()["h100-sxm"])
    )
    for tensor, expected in ((8, (0, 1)), (16, (1, 8)), (32, (1, 8))):
        bodies = predictor.bodies(Plan(tensor=tensor))
        assert (bodies.level, bodies.inner) == expected
