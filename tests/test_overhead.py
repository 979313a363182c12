"""What an instruction costs to issue: measured on real layers, found by form and batch, and waited for as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planners.costs.body import BodyCosts
from autotune.planners.costs.in_place import IN_PLACE, body_mark
from autotune.planners.costs.price import Pricer
from autotune.planners.costs.works import handed
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import Shape
from autotune.planners.refine import refined
from autotune.profiles_db.profile_file import load_profile
from autotune.runners.ops.linear import ALIGNED_ROWS, WGRAD_CHUNK_BYTES, wgrad_rows
from autotune.spec.graph import blocks
from autotune.spec.machine import Profile, Sample
from autotune.spec.model import ModelSpec
from autotune.spec.program import COMPUTE
from autotune.spec.work import Launch

MODEL = ModelSpec("small", "LlamaForCausalLM", 64, 2, 4, 2, 16, 128, 96)
SHIFT = Launch(1, "shift")
SHIPPED = Path(__file__).parents[1] / "autotune" / "profiles_db" / "machines" / "h200-sxm.json"


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return load_profile(SHIPPED)


def costs(profile: Profile, **coefficients: float) -> BodyCosts:
    named = {name.replace("_at_", "."): value for name, value in coefficients.items()}
    profile = replace(profile, coefficients={**profile.coefficients, **named})
    return BodyCosts(profile, Pricer(profile))


@pytest.mark.parametrize("tokens", [8, 1 << 15])
def test_a_body_takes_the_longer_of_its_work_and_its_issuing(shipped: Profile, tokens: int) -> None:
    """Few tokens wait for the host; of many the long operations hide the issuing of the short ones."""
    wide = replace(MODEL, hidden=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192)
    block, shape = blocks(wide)[1], Shape(1, tokens, tokens, dtype="bf16", attention="cudnn")
    body, known = lower_block(block, shape), costs(shipped)
    cost = known.price(block, body, body.forward, shape)
    issuing = len(body.forward.ranks[0]) * known.issue("train")
    busy = sum(seconds for kind, seconds in cost.kinds.items() if kind != "launch")
    assert cost.seconds == pytest.approx(max(issuing, busy))
    assert (issuing > busy) is (tokens == 8)


def test_what_was_timed_where_it_stands_is_not_issued_again(shipped: Profile) -> None:
    """On a processor small operations take at least an instruction's time, unless that is in what was timed: by the
    name of this very body, policy and number of workers."""
    block, shape = blocks(MODEL)[1], Shape(1, 8, 8, dtype="fp32", attention="math")
    host = replace(shipped, device=replace(shipped.device, kind="cpu"))
    floored = costs(host, instruction_seconds_at_train=1.0)
    assert floored.of(block, shape, "none", "F").kinds["launch"] > 1.0
    for mark, placed in ((body_mark(block, shape, "none", 1), True), (body_mark(block, shape, "none", 2), False)):
        told = replace(floored.profile, sources={**host.sources, mark: IN_PLACE})
        cost = BodyCosts(told, Pricer(told)).of(block, shape, "none", "F")
        assert (cost.kinds.get("launch", 0.0) == 0.0) is placed
        assert (cost.seconds < 1.0) is placed


def test_a_collective_is_handed_over_as_measured(shipped: Profile) -> None:
    """Where it was measured; else, as every instruction of ours, by the body's own."""
    known = replace(MODEL, hidden=128)
    block, shape = blocks(known)[1], Shape(1, 8, 8, context=2, ring=2, dtype="bf16", attention="cudnn")
    body = lower_block(block, shape)
    instructions = (*body.forward.ranks[0], *body.backward.ranks[0])
    exchanged = [i for i in instructions if i.lane != COMPUTE]
    assert {i.op for i in exchanged} == {"shift", "shift_back"} and {handed(i) for i in exchanged} == {SHIFT}
    bare = replace(shipped, samples=tuple(s for s in shipped.samples if s.work.kind != "launch" or not s.work.what))
    plain, told = costs(bare), costs(refined(bare, [Sample(SHIFT, 1e-3, 2), Sample(Launch(1, "train"), 1e-6, 1)]))
    assert {plain.handing(i) for i in instructions} == {bare.coefficients["instruction_seconds.train"]}
    assert {told.handing(i) for i in exchanged} == {1e-3}
    assert {told.handing(i) for i in instructions if i.lane == COMPUTE} == {1e-6}
    assert told.pricer.grade(Launch(1, "all_to_all")) == "extrapolated"


@pytest.mark.parametrize("inputs", [896, 1024, 2048, 3584, 1 << 26])
def test_chunks_of_a_weight_gradient_start_aligned(inputs: int) -> None:
    rows = wgrad_rows(inputs, 2)
    assert rows % ALIGNED_ROWS == 0 and rows >= ALIGNED_ROWS
    assert rows == ALIGNED_ROWS or rows * inputs * 2 <= WGRAD_CHUNK_BYTES
