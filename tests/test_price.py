"""Prices of work: interpolation against laws that are known, bounds, monotony, and what stands in for what."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from math import gcd

import pytest

from autotune.planners.costs.price import GRADES, Pricer
from autotune.planners.costs.price_scatter import Scatter
from autotune.planners.costs.price_tables import SizeTable
from autotune.spec.machine import Sample
from autotune.spec.work import Attention, Collective, Copy, Launch, Matmul, Memory, Optimizer, Work
from tests.prices import OPS, SHIPPED, bare


def law(work: Matmul) -> float:
    """A smooth device: rates that fall at small and skinny shapes, a soft maximum of compute and memory."""
    share = 1 / (1 + 0.4 * (300 / work.m) ** 1.2 + 250 / work.n + 200 / work.k)
    compute, memory = work.flops / (9e14 * 0.85 * share), work.bytes / (3e12 * 0.85 * work.n / (work.n + 400))
    return float((compute**4 + memory**4) ** 0.25 + 3e-6)


def grid(form: str = "fwd") -> list[Sample]:
    edges = (1024, 2048, 4096, 8192, 14336)
    works = [Matmul(2**i, k, n, form=form) for i in range(15) for k in edges for n in edges]
    return [Sample(work, law(work)) for work in works]


def anything(random_: random.Random, levels: int) -> Work:
    """Any piece of work, of any size that could be met."""

    def size(low: float, high: float) -> int:
        return int(2 ** random_.uniform(low, high))

    dtype = random_.choice(("bf16", "fp32", "fp64", "fp16", "fp8", "int8"))
    keys, group = size(0, 17), random_.choice((1, 2, 3, 8, 16, 1024))
    inner = random_.choice((1, gcd(group, 2), gcd(group, 8)))
    choices: list[Callable[[], Work]] = [
        lambda: Matmul(
            size(0, 18), size(0, 16), size(0, 18), dtype, random_.choice(("fwd", "dgrad", "wgrad")), size(0, 4)
        ),
        lambda: Attention(
            size(0, 8),
            random_.choice((1, keys, max(1, keys // 3))),
            keys,
            8 * size(0, 4),
            8,
            random_.choice((64, 128)),
            dtype,
            random_.choice(("sdpa", "flash", "cudnn", "math", "nobody")),
            random_.choice(("fwd", "bwd")),
        ),
        lambda: Memory(random_.choice(("copy", "rmsnorm")), size(0, 36), dtype),
        lambda: Optimizer(size(0, 34), random_.choice(("mixed", "fp32", "fp64")), random_.choice(("device", "host"))),
        lambda: Collective(random_.choice(OPS), size(0, 36), group, random_.randrange(levels), inner),
        lambda: Copy(
            random_.choice(("h2d", "d2h", "d2d", "h2h", "disk_read", "disk_write")), size(0, 36), bool(size(0, 1.9) - 1)
        ),
        lambda: Launch(size(0, 10)),
    ]
    return random_.choice(choices)()


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_bound_is_never_above_the_price(name: str) -> None:
    profile, source = SHIPPED[name], random.Random(name)
    if "launch_seconds" not in profile.coefficients:
        assert any(sample.work.kind == "launch" for sample in profile.samples)
    for ranks in (1, 2, 64):
        pricer = Pricer(profile, ranks)
        for _ in range(1500):
            work = anything(source, len(profile.links))
            seconds, grade = pricer.price(work)
            assert 0 <= pricer.bound_seconds(work) <= seconds < float("inf"), work
            assert grade in GRADES
            assert profile.samples or grade == "datasheet" or getattr(work, "group", 0) == 1


def test_bound_holds_for_noisy_samples() -> None:
    """Samples faster than the datasheet, or out of order, move the bound and not its promise."""
    source = random.Random(5)
    samples = [replace(sample, seconds=sample.seconds * source.uniform(0.2, 2)) for sample in grid()]
    samples += [Sample(Memory("copy", 2**i), 2**i / 3e12 * source.uniform(0.2, 2) + 2e-6) for i in range(10, 33)]
    samples += [
        Sample(Collective("all_reduce", 2**i, 2), 2**i / 3e11 * source.uniform(0.3, 2), 2) for i in range(9, 30)
    ]
    pricer = Pricer(
        bare(
            *samples,
            coefficients={
                "kernel_seconds": 2e-6,
                "launch_seconds": 1e-5,
                "disk_bandwidth": 1e9,
                "host_link_bandwidth": 5e10,
            },
        )
    )
    for _ in range(4000):
        work = anything(source, 2)
        assert pricer.bound_seconds(work) <= pricer.seconds(work), work
    for sample in samples:
        if sample.work.kind == "matmul":
            assert pricer.price(sample.work) == (sample.seconds, "measured")


def test_leave_one_out_on_a_smooth_law() -> None:
    samples, errors = grid(), []
    for i in random.Random(0).sample(range(len(samples)), 80):
        pricer = Pricer(bare(*samples[:i], *samples[i + 1 :]))
        errors.append(abs(pricer.seconds(samples[i].work) / samples[i].seconds - 1))
    assert sum(errors) / len(errors) < 0.02
    assert max(errors) < 0.12


def test_shapes_between_the_grid_points() -> None:
    pricer, source, errors = Pricer(bare(*grid())), random.Random(1), []
    for _ in range(400):
        work = Matmul(int(2 ** source.uniform(0, 14)), *(int(2 ** source.uniform(10, 13.8)) for _ in "kn"))
        assert pricer.grade(work) == "interpolated"
        errors.append(abs(pricer.seconds(work) / law(work) - 1))
    assert sum(errors) / len(errors) < 0.015
    assert sorted(errors)[int(0.95 * len(errors))] < 0.04


def test_leave_one_out_on_the_h200_samples() -> None:
    """How well the shipped samples tell one another, by kind: what a shape between them can be trusted to.

    Mean errors over every sample that the others surround: products 3.3 %, memory-bound operations 6.4 %, collectives
    5.3 %, those with few thread blocks 12 % (NCCL's protocols change between 256 KiB and 1 MiB: 21 and 67 us), copies
    11 % (pageable ones change their slope), attention passes 8.5 %, decoding 25 % (the curve does not tell numbers of
    key-value heads apart: with samples of one number alone it is 9 to 11 %).
    Every fifth is left out here, to save time; of those with few thread blocks each.
    """
    profile = SHIPPED["h200-sxm"]
    errors: dict[str, list[float]] = {}
    for i, sample in enumerate(profile.samples):
        few = isinstance(sample.work, Collective) and sample.work.op in ("broadcast", "reduce")
        if i % 5 and not few:
            continue
        rest = replace(profile, samples=profile.samples[:i] + profile.samples[i + 1 :])
        seconds, grade = Pricer(rest, sample.ranks).price(sample.work)
        if grade == "interpolated":
            decodes = isinstance(sample.work, Attention) and sample.work.queries < sample.work.keys
            kind = "decoding" if decodes else "few blocks" if few else sample.work.kind
            errors.setdefault(kind, []).append(abs(seconds / sample.seconds - 1))
    bounds = {"matmul": 0.035, "memory": 0.075, "collective": 0.06, "copy": 0.13, "attention": 0.095, "decoding": 0.32}
    bounds["few blocks"] = 0.13
    for kind, bound in bounds.items():
        assert len(errors[kind]) >= 5, kind
        assert sum(errors[kind]) / len(errors[kind]) <= bound, kind
    assert sorted(errors["matmul"])[int(0.9 * len(errors["matmul"]))] <= 0.08


def test_h200_samples_are_priced_as_measured() -> None:
    pricer = Pricer(SHIPPED["h200-sxm"], 2)
    dense = [s for s in SHIPPED["h200-sxm"].samples if s.work.kind in ("matmul", "attention")]
    assert len(dense) > 1000
    for sample in dense:
        assert pricer.price(sample.work) == (sample.seconds, "measured")


def decoding_products(layers: int = 32) -> list[Work]:
    """The products of one token of an 8B Llama: query-key-value, output, gate and up, down, a layer."""
    shapes = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
    return [Matmul(1, k, n) for _ in range(layers) for k, n in shapes]


def h200_table() -> list[tuple[list[Work], float]]:
    """(works, seconds): the project's table of what the machine reaches, measured apart from the profile's samples.

    Source: one and two H200, November 2026, torch 2.11+cu130. Rates in TFLOP/s and TB/s are turned into seconds by
    spec/work.py's counts; NCCL's microseconds are of 64 MiB, 256 MiB and 1 GiB (all-gather: of one rank's input).

    Known to disagree and left out: products of few rows (128x4096x4096, 16x4096x14336, 1x4096x14336: 223 TFLOP/s,
    2.76 and 2.75 TB/s; the profile is 24 to 27 % faster) and collectives of 1 KiB and 1 MiB (38 to 66 us; the profile 6
    to 16). The likely cause is the host's issuing (11 us there), which the probes keep out of what they time; one-row
    products are therefore compared as that table has them in one CUDA graph. Its messages are NCCL's: ours go through
    mapped memory.
    """
    rows: list[tuple[list[Work], float]] = []
    for m, k, n, tera in ((8192, 8192, 8192, 802), (4096, 4096, 4096, 725), (8192, 14336, 4096, 800)):
        product = Matmul(m, k, n)
        rows.append(([product], product.flops / (tera * 1e12)))
    rates = {
        "flash": ((8, 2048, 286, 206), (4, 4096, 304, 245), (1, 16384, 342, 305)),
        "cudnn": ((8, 2048, 509, 393), (4, 4096, 540, 434), (1, 16384, 583, 525)),
    }
    for backend, lengths in rates.items():
        for batch, keys, *both in lengths:
            for form, tera in zip(("fwd", "bwd"), both, strict=True):
                core = Attention(batch, keys, keys, 32, 8, 128, backend=backend, form=form)
                rows.append(([core], core.flops / (tera * 1e12)))
    micros = {
        "all_reduce": (254, 892, 3276),
        "all_gather": (293, 1054, 3848),
        "reduce_scatter": (167, 586, 2024),
        "all_to_all": (147, 480, 1625),
    }
    for op, times in micros.items():
        for size, micro in zip((2**26, 2**28, 2**30), times, strict=True):
            rows.append(([Collective(op, size * (2 if op == "all_gather" else 1), 2)], micro * 1e-6))
    rows += [([Copy("h2d", 2**30)], 2**30 / 53.4e9), ([Copy("d2h", 2**30)], 2**30 / 55.2e9)]
    rows += [([Copy("d2d", 2**30)], 2 * 2**30 / 4.27e12), ([Memory("read", 2**30)], 2**30 / 4.21e12)]
    token = decoding_products()
    return [*rows, (token, sum(work.bytes for work in token) / 3.71e12)]


def test_the_h200_profile_agrees_with_what_was_measured_apart_from_it() -> None:
    pricer = Pricer(SHIPPED["h200-sxm"], 2)
    ratios = [(sum(map(pricer.seconds, works)) / seconds, works[0]) for works, seconds in h200_table()]
    assert len(ratios) == 32
    for ratio, work in ratios:
        assert 0.8 <= ratio <= 1.2, work
    assert sum(abs(ratio - 1) for ratio, _ in ratios) / len(ratios) < 0.04
    assert all(pricer.grade(work) != "datasheet" for works, _ in h200_table() for work in works)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_more_bytes_are_never_faster(name: str) -> None:
    profile, sizes = SHIPPED[name], sorted({int(2 ** (i / 3)) for i in range(108)})
    makers: list[Callable[[int], Work]] = [lambda size: Memory("rmsnorm", size), Optimizer]
    makers += [lambda size, to=to: Copy(to, size) for to in ("h2d", "d2h", "d2d", "h2h", "disk_read")]
    for op in OPS:
        for level in range(len(profile.links)):
            makers += [lambda size, op=op, g=g, level=level: Collective(op, size, g, level) for g in (2, 3, 8, 64)]
    for ranks in (1, 8):
        pricer = Pricer(profile, ranks)
        for make in makers:
            times = [pricer.seconds(make(size)) for size in sizes]
            assert times == sorted(times), make(1)


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - {"h200-sxm"}))
def test_datasheet_work_grows_with_every_dimension(name: str) -> None:
    pricer = Pricer(SHIPPED[name])
    for base in (Matmul(16, 512, 512), Matmul(4096, 1024, 4096)):
        for field in ("m", "k", "n", "batch"):
            times = [pricer.seconds(replace(base, **{field: getattr(base, field) * 2**i})) for i in range(6)]
            assert times == sorted(times)
    prefill = Attention(1, 512, 512, 32, 8, 128)
    times = [pricer.seconds(replace(prefill, queries=512 * 2**i, keys=512 * 2**i)) for i in range(6)]
    assert times == sorted(times)
    decode = replace(prefill, queries=1, keys=32768, batch=16)
    assert pricer.seconds(decode) > decode.bytes / SHIPPED[name].device.memory_bandwidth


def test_size_tables() -> None:
    table = SizeTable([(400, 5.0), (100, 2.0), (200, 4.0), (300, 3.0)])  # 200 and 300 are out of order: pooled
    assert table.at(100, 0.0) == (2.0, "measured")
    assert table.at(200, 0.0) == table.at(300, 0.0) == (3.5, "measured")
    assert table.at(150, 0.0) == (2.75, "interpolated")
    assert table.at(800, 0.0) == (10.0, "extrapolated")
    assert table.at(50, 0.0) == (1.0, "extrapolated")
    assert table.at(50, 1.5) == (1.5, "extrapolated")
    assert table.at(1, float("inf")) == (2.0, "extrapolated")


def test_a_start_up_time_and_a_rate_are_recovered_exactly() -> None:
    samples = [Sample(Memory("copy", 2**i), 3e-6 + 2**i / 2e12) for i in (12, 20, 28, 31)]
    pricer = Pricer(bare(*samples))
    for size in (5000, 10**6, 10**8, 2 * 10**9):
        assert pricer.seconds(Memory("copy", size)) == pytest.approx(3e-6 + size / 2e12)


def test_scatter_keeps_the_edge_value_outside() -> None:
    scatter = Scatter([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], [0.2, 0.4, 0.4, 0.8])
    assert scatter.at((1.0, 1.0)) == (pytest.approx(0.8), True)
    assert scatter.at((9.0, 9.0)) == (pytest.approx(0.8), False)
    value, inside = scatter.at((0.5, 0.5))
    assert inside and value == pytest.approx(0.4, rel=1e-6)


def test_shapes_outside_keep_the_efficiency_of_the_edge() -> None:
    pricer = Pricer(bare(*grid()))
    edge, outside = Matmul(16384, 14336, 14336), Matmul(4 * 16384, 2 * 14336, 2 * 14336)
    assert pricer.grade(outside) == "extrapolated"
    assert outside.flops / pricer.seconds(outside) == pytest.approx(edge.flops / law(edge), rel=0.01)


def test_forms_and_dtypes_that_were_not_measured() -> None:
    pricer = Pricer(bare(*grid()))
    work = Matmul(2048, 4096, 4096)
    assert pricer.price(replace(work, form="wgrad")) == (pytest.approx(law(work)), "extrapolated")
    wide = replace(work, dtype="fp32")
    assert pricer.grade(wide) == "extrapolated"
    assert pricer.seconds(wide) / pricer.seconds(work) == pytest.approx(9e14 / 6e13, rel=0.05)
    assert pricer.seconds(replace(work, dtype="fp64")) > pricer.seconds(wide)


def test_the_side_of_the_roofline_that_was_not_measured() -> None:
    """Prefill rows at 30 % of the compute peak must not make decode read memory at 30 %."""
    prefill = [Attention(1, 2**i, 2**i, 32, 8, 128) for i in (11, 12, 13)]
    samples = [Sample(work, work.flops / (0.3 * 9e14)) for work in prefill]
    pricer = Pricer(bare(*samples, coefficients={"kernel_seconds": 0.0, "attention_memory_efficiency": 0.8}))
    decode = Attention(64, 1, 8192, 32, 8, 128)
    assert pricer.price(decode) == (pytest.approx(decode.bytes / (0.8 * 3e12)), "extrapolated")


def test_backends_stand_in_for_one_another() -> None:
    work = Attention(1, 4096, 4096, 32, 8, 128, backend="flash")
    samples = [
        Sample(work, 2e-3),
        Sample(replace(work, backend="sdpa"), 1e-3),
        Sample(replace(work, backend="math"), 9e-3),
    ]
    pricer = Pricer(bare(*samples))
    assert pricer.price(replace(work, backend="nobody")) == (pytest.approx(1e-3), "extrapolated")
    assert pricer.price(work) == (2e-3, "measured")


def test_operations_and_optimizers_without_samples_use_the_copy() -> None:
    pricer = Pricer(bare(*(Sample(Memory("copy", 2**i), 2**i / 2e12) for i in (20, 30))))
    assert pricer.price(Memory("rmsnorm", 2**20)) == (pytest.approx(2**20 / 2e12), "extrapolated")
    update = Optimizer(10**7)
    assert pricer.price(update) == (pytest.approx(update.bytes / 2e12), "extrapolated")


@pytest.mark.alone
def test_it_is_fast_enough_to_price_a_search() -> None:
    """Aims at 1 microsecond remembered and 200 fresh on 1,125 samples; the bars here allow for a busy machine."""
    pricer = Pricer(bare(*(sample for form in ("fwd", "dgrad", "wgrad") for sample in grid(form))))
    source = random.Random(2)
    works = [Matmul(*(int(2 ** source.uniform(0, 14)) for _ in "mkn")) for _ in range(1000)]
    again = [replace(work) for work in works]

    def best(asked: list[Matmul]) -> float:
        start = time.perf_counter()
        for work in asked:
            pricer.seconds(work)
        return (time.perf_counter() - start) / len(asked)

    assert best(works) < 1e-3
    assert min(best(again) for _ in range(5)) < 1e-5


@pytest.mark.alone
def test_a_measured_profile_is_indexed_and_asked_in_no_time() -> None:
    """Reached: 8 ms to index 1,700 samples, 80 microseconds a fresh product; the bars allow for a busy machine."""
    profile, source = SHIPPED["h200-sxm"], random.Random(2)
    sizes = [[int(2 ** source.uniform(0, 14)) for _ in "mkn"] for _ in range(500)]
    works = [Matmul(m, k, n) for m, k, n in sizes]
    start = time.perf_counter()
    pricer = Pricer(profile, 2)
    built = time.perf_counter()
    for work in works:
        pricer.seconds(work)
    assert built - start < 0.2
    assert (time.perf_counter() - built) / len(works) < 1e-3


def test_scores_that_are_written_out_take_as_long_for_any_width() -> None:
    """With a half width of h, a head of d takes (d + h) / d as long as its products alone: h is a time, not a rate."""

    plain = bare(coefficients={"kernel_seconds": 0.0})
    alone = Pricer(plain).seconds(Attention(4, 4096, 4096, 16, 16, 64, backend="math", form="fwd"))
    profile = bare(coefficients={"kernel_seconds": 0.0, "attention_half_width.math.fwd": 256.0})
    for width in (64, 128, 256):
        work = Attention(4, 4096, 4096, 16, 16, width, backend="math", form="fwd")
        assert Pricer(profile).seconds(work) == pytest.approx(alone * (width + 256) / 64)
        other = replace(work, backend="flash")
        assert Pricer(profile).seconds(other) == pytest.approx(alone * width / 64), "of that backend alone"
