"""Training a draft to propose a block: rows of masks beside the text, against plain forwards of every place by itself;
under any plan; and what dropping masks leaves of the gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.planners.costs.price import Pricer
from autotune.planners.costs.works import model_flops, works
from autotune.planners.feasible import why_not
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import sight_columns, training_shape
from autotune.planners.lower.traits import stage_sizes
from autotune.profiles_db.profile_file import load_profile
from autotune.runners.ops.attention_masked import CPU, FORMULAS
from autotune.runners.reference import reference_gradients, reference_logits
from autotune.runners.rows import Batch, Rows, drawn_rows, prepared, with_masks
from autotune.spec.graph import blocks, parameters
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.work import Attention
from autotune.spec.workload import Workload, mask_rows
from tests.equal import assert_equal
from tests.pool import Pool
from tests.tasks import random_batch, random_rows
from tests.test_equality import LLAMA, QWEN
from tests.test_generation import lively
from tests.test_workspace import MODELS as WIDE_MODELS
from tests.test_workspace import SHIPPED, peaks

SHARED, OWN = replace(LLAMA, drafts=4, masks=1), replace(QWEN, drafts=4, masks=3)
WINDOW = replace(SHARED, name="window", window=5)
WORK = Workload(sequence_length=10, global_batch=4, precision="fp64", learning_rate=1e-2)
WORK = replace(WORK, masks=mask_rows(10, 4, 0.7, 0.2))  # 5, 3 and 2 rows: 20 of a sequence


def test_how_many_masks_there_are() -> None:
    assert mask_rows(10, 4, 0.7, 0.2) == (5, 3, 2) and mask_rows(10, 4, 1.0, 0.0) == (7, 7, 7)
    assert mask_rows(1024, 8, 0.7, 0.2) == (712, 498, 349, 244, 203, 203, 203)
    assert mask_rows(4, 4, 0.1, 0.0) == (1, 1, 1)
    assert WORK.rows == 20 and training_shape(Plan(), WORK).queries == 20 and WORK.tokens == 40
    rows = drawn_rows(WORK, 3)
    assert rows.seen(torch.device("cpu")).sum() == pytest.approx(WORK.seen, abs=12)
    groups: dict[int, list[int]] = {}
    for place, ahead in zip(rows.place[10:].tolist(), rows.ahead[10:].tolist(), strict=True):
        groups.setdefault(place, []).append(ahead)
    assert all(row == list(range(1, len(row) + 1)) for row in groups.values())  # a mask has those before it
    assert sorted(map(len, groups.values())) == [1, 1, 2, 3, 3] and max(groups) <= 6
    assert drawn_rows(WORK, 3).place.equal(rows.place) and not drawn_rows(WORK, 4).place.equal(rows.place)


@pytest.mark.parametrize("model", [SHARED, OWN, WINDOW], ids=lambda model: model.name)
def test_every_row_is_what_a_plain_forward_over_text_and_masks_says(model: ModelSpec) -> None:
    """Each mask's logits against those of [text up to its place, masks of its group], which causal attention computes;
    and what it is to say is the token that comes there."""
    weights, (text, after) = lively(model, "fp64"), random_batch(WORK, model.vocab)
    batch = prepared(model, WORK, Batch(text, after), 0)
    assert batch.rows is not None
    ours = reference_logits(model, weights, batch.tokens, torch.float64, batch.rows)
    plain = reference_logits(model, weights, text, torch.float64)
    assert torch.allclose(ours[:, :10], plain, rtol=0, atol=1e-12) and batch.targets[:, :10].equal(after)
    for row in range(10, WORK.rows):
        place, ahead = int(batch.rows.place[row]), int(batch.rows.ahead[row])
        masks = torch.tensor([[model.mask_token(number) for number in range(ahead)]]).expand(len(text), -1)
        alone = torch.cat((text[:, : place + 1], masks), dim=1)
        expected = reference_logits(model, weights, alone, torch.float64)[:, -1]
        assert torch.allclose(ours[:, row], expected, rtol=0, atol=1e-12), (place, ahead)
        assert batch.targets[:, row].equal(after[:, place + ahead])
        assert batch.tokens[:, row].equal(alone[:, -1])


def test_masks_of_other_groups_and_later_text_change_nothing() -> None:
    """The row's mask is no tautology: a token that a row may not see is changed, and its logits stay bit for bit."""
    weights, batch = lively(SHARED, "fp64"), random_rows(SHARED, WORK)
    assert batch.rows is not None
    seen = batch.rows.seen(torch.device("cpu"))
    before = reference_logits(SHARED, weights, batch.tokens, torch.float64, batch.rows)
    for column in range(WORK.rows):
        other = batch.tokens.clone()
        other[:, column] = (other[:, column] + 1) % SHARED.vocab
        after = reference_logits(SHARED, weights, other, torch.float64, batch.rows)
        assert ((before != after).any(dim=2).any(dim=0) == seen[:, column]).all()


PLANS = [
    (SHARED, Plan(attention="math")),
    (SHARED, Plan(recompute="full", micro_batch=2)),
    (OWN, Plan(recompute="selective")),
    (WINDOW, Plan()),
    (OWN, Plan(data=2)),
    (SHARED, Plan(data=2, zero=3, attention="math")),
    (SHARED, Plan(tensor=2)),
    (OWN, Plan(tensor=2, sequence_parallel=True, micro_batch=2)),
    (SHARED, Plan(pipeline=2)),
    (OWN, Plan(pipeline=2, schedule="zb-h1", attention="math")),
    (SHARED, Plan(tensor=2, pipeline=2, micro_batch=2)),
    (SHARED, Plan(data=2, pipeline=2, zero=1, recompute="full")),
    (OWN, Plan(pipeline=2, schedule="2bp-gpipe", weight_gradients="joined")),
]


@pytest.mark.parametrize(("model", "plan"), PLANS, ids=lambda x: x.describe() if isinstance(x, Plan) else x.name)
def test_any_plan_equals_autograd(pool: Pool, model: ModelSpec, plan: Plan) -> None:
    """Loss, gradients and weights after two steps in double precision, in the order and with the bytes of its program,
    masks' embeddings among them."""
    assert why_not(model, WORK, plan, plan.world) is None
    assert_equal(pool, model, plan, WORK)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(attention="math"),
        Plan(recompute="full", micro_batch=2),
        Plan(data=2),
        Plan(tensor=2),
        Plan(tensor=2, sequence_parallel=True),
        Plan(schedule="zb-h1"),
    ],
    ids=Plan.describe,
)
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_masks_alone_are_trained(pool: Pool, plan: Plan, clip: float) -> None:
    """The target as it is: the same loss and gradients of the masks, and no others; whatever is kept is kept."""
    model, work = replace(OWN, frozen=True), replace(WORK, clip=clip)
    assert why_not(model, work, plan, plan.world) is None
    for answer in assert_equal(pool, model, plan, work):
        assert set(answer["gradients"]) == {(0, "mask.weight")} == set(answer["weights"])


def test_what_is_frozen_computes_no_gradient_of_a_weight() -> None:
    """Input gradients alone go through it; what a product's weight gradient needs is not kept."""
    frozen = replace(SHARED, frozen=True)
    for before, block in zip(blocks(SHARED), blocks(frozen), strict=True):
        shape = training_shape(Plan(), WORK)
        whole, body = lower_block(before, shape), lower_block(block, shape)
        ops = [i.op for i in body.backward.ranks[0]]
        assert [op for op in ops if op.endswith(".wgrad")] == (["embedding.wgrad"] if block.kind == "embed" else [])
        assert [i.op for i in whole.backward.ranks[0] if not i.op.endswith(".wgrad")] == [
            op for op in ops if not op.endswith(".wgrad")
        ]
        assert body.saved_bytes < whole.saved_bytes or block.kind == "embed"
    assert model_flops(frozen, 4, 20) < 0.75 * model_flops(SHARED, 4, 20)
    sizes = stage_sizes(Plan(), frozen, WORK)[0]
    assert (sizes.parameters, sizes.parameters + sizes.frozen) == (SHARED.hidden, parameters(SHARED))
    for plan, said in ((Plan(pipeline=2), "pipeline"), (Plan(data=2, zero=1), "zero")):
        reason = why_not(frozen, WORK, plan)
        assert reason is not None and f"{said} has nothing to share where mask tokens alone are trained" in reason


def test_attention_under_a_mask_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v, g = (torch.randn(2, heads, 20, 8, generator=generator).double() for heads in (4, 2, 2, 4))
    seen = drawn_rows(WORK, 1).seen(torch.device("cpu"))
    sight = torch.zeros(20, sight_columns(20)).double()[:, :20].masked_fill_(~seen, float("-inf"))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        wide = [leaf.repeat_interleave(2, dim=1) for leaf in leaves[1:]]
        scores = (leaves[0] @ wide[0].transpose(2, 3) / 8**0.5).masked_fill(~seen, float("-inf"))
        (scores.softmax(-1) @ wide[1]).backward(g)
    for backend in (FORMULAS, CPU):
        o, lse = backend.forward(q, k, v, sight)
        assert torch.allclose(lse, scores.detach().logsumexp(-1), rtol=0, atol=1e-12)
        for found, leaf in zip(backend.backward(g, q, k, v, o, lse, sight), leaves, strict=True):
            assert leaf.grad is not None and torch.allclose(found, leaf.grad, rtol=0, atol=1e-12)


def test_what_dropping_leaves_is_the_full_gradient_in_expectation() -> None:
    """Over every order of the places: the sum of the rows' gradients is on average that of all masks, each offset's by
    the share of the places that it keeps. Nothing that is dropped changes what is left."""
    model = replace(SHARED, layers=1, drafts=3)
    work = replace(WORK, sequence_length=6, global_batch=1)
    weights, text = lively(model, "fp64"), Batch(*random_batch(work, model.vocab))
    kept, whole = mask_rows(6, 3, 0.5, 0.2), mask_rows(6, 3, 1.0, 0.0)
    assert kept == (2, 1) and whole == (4, 4)

    def summed(rows: Rows) -> dict[Any, Tensor]:
        batch = with_masks(model, text, rows)
        _, found = reference_gradients(model, weights, batch.tokens, batch.targets, torch.float64, rows)
        return {key: gradient * batch.tokens.shape[1] for key, gradient in found.items()}

    def rows_of(groups: dict[int, int]) -> Rows:
        pairs = [(place, ahead) for place, most in sorted(groups.items()) for ahead in range(1, most + 1)]
        place, ahead = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return Rows(torch.cat((torch.arange(6), place)), torch.cat((torch.zeros(6, dtype=torch.int64), ahead)))

    upto = [summed(rows_of(dict.fromkeys(range(4), most))) for most in range(3)]
    orders = list(permutations(range(4)))
    for key in upto[0]:
        offsets = [upto[1][key] - upto[0][key], upto[2][key] - upto[1][key]]
        expected = upto[0][key] + sum(part * many / 4 for part, many in zip(offsets, kept, strict=True))
        found = sum(summed(rows_of({order[0]: 2, order[1]: 1}))[key] for order in orders) / len(orders)
        assert torch.allclose(found, expected, rtol=0, atol=1e-10), key
        assert key != (0, "mask.weight") or float(offsets[1].norm()) > 0.01


def test_orders_are_as_likely_as_any_other() -> None:
    work = replace(WORK, sequence_length=6, masks=(2, 1))
    counts = torch.zeros(4)
    for step in range(2000):
        rows = drawn_rows(work, step)
        counts[rows.place[6:][rows.ahead[6:] == 1]] += 1
    assert ((counts / 2000 - 0.5).abs() < 5 * (0.25 / 2000) ** 0.5).all()


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(context=2), "context needs rows that see all that come before them (found masks among them; nearest 1)"),
        (Plan(pipeline=2, vocabulary="vocab-1"), "needs a vocabulary without mask tokens (found 1; nearest 'ends')"),
        (Plan(attention="flash"), "masks need an attention that is told which rows see which: efficient, sdpa, math"),
        (Plan(tensor=2, sequence_parallel=True), "tensor must divide tokens of a micro-batch 21"),
    ],
)
def test_what_masks_cannot_be_trained_with(plan: Plan, said: str) -> None:
    work = replace(WORK, masks=(5, 3, 3)) if plan.sequence_parallel else WORK
    reason = why_not(SHARED, work, plan)
    assert reason is not None and said in reason


def test_what_runs_is_what_is_counted() -> None:
    """The products of all rows; attention over every pair where it is priced, over those seen where a model's own work
    is counted."""
    shape, block = training_shape(Plan(), WORK), blocks(SHARED)[1]
    body = lower_block(block, shape)
    cores = [w for i in body.forward.ranks[0] for w in works(block, body, i, shape) if isinstance(w, Attention)]
    assert [core.backend for core in cores] == ["masked.sdpa"]
    assert cores[0].flops == 2 * 2 * SHARED.heads * SHARED.head_dim * 20 * 20
    priced = Pricer(load_profile(SHIPPED))
    wide = replace(cores[0], keys=4096, queries=4096, heads=32, kv_heads=8, head_dim=128, dtype="bf16")
    seconds = {name: priced.seconds(replace(wide, backend=name)) for name in ("masked.efficient", "efficient", "cudnn")}
    # Unmeasured it is its own kernel's, over twice the pairs, and not the fastest one's.
    assert 1.5 < seconds["masked.efficient"] / seconds["efficient"] < 2.5
    assert seconds["masked.efficient"] > 3 * seconds["cudnn"]
    causal, masked = model_flops(SHARED, 4, 20), model_flops(SHARED, 4, 20, WORK.seen)
    core = 12 * 4 * SHARED.layers * SHARED.heads * SHARED.head_dim  # 2 products forward, 4 backward: 12 a pair
    assert causal - masked == pytest.approx(core * (210 - WORK.seen))


@pytest.mark.alone
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("plan", [Plan(micro_batch=2), Plan(micro_batch=2, attention="math"), Plan(pipeline=2)])
def test_a_steps_peak_with_masks(pool: Pool, plan: Plan, frozen: bool) -> None:
    model = replace(WIDE_MODELS["llama"], layers=4, drafts=4, masks=3, frozen=frozen)
    if frozen and plan.pipeline > 1:
        plan = Plan(tensor=2, micro_batch=2)
    said, found = peaks(pool, model, plan, masks=mask_rows(128, 4, 0.7, 0.2))
    assert said == pytest.approx(found, rel=0.02 if plan.pipeline > 1 else 0.01)
