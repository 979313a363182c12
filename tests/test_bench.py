"""Operations timed inside their bodies: every one of them, collectives as well where workers meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.planners.costs.price import Pricer
from autotune.planners.costs.works import works
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import canonical
from autotune.planners.refine import refined
from autotune.profiles_db.profile_file import load_profile
from autotune.runners.bench import Piece, time_pieces, told_apart, trimmed
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.work import Collective, Matmul, Memory

pytestmark = pytest.mark.alone

MODEL = ModelSpec("tiny", "LlamaForCausalLM", 32, 1, 4, 2, 8, 48, 64)
SHIPPED = Path(__file__).parent.parent / "autotune" / "profiles_db" / "machines" / "h200-sxm.json"


def test_hiccups_do_not_count() -> None:
    assert trimmed([1.0, *[2.0] * 8, 4.0, 4.0, 1e6], 0.1) == 2.4, "one of ten at either end"
    assert trimmed([1.0, 2.0, 3.0, 1e6], 0.25) == 2.5
    assert trimmed([5.0], 0.25) == 5.0


def test_a_narrow_weight_gradient_is_what_its_sum_leaves() -> None:
    product, total = Matmul(64, 16, 32, "bf16", "wgrad"), Memory("accumulate", 10240, "bf16")
    assert told_apart((product,), 3.0, None) == (product, 3.0)
    assert told_apart((product, total), 3.0, None) is None
    assert told_apart((product, total), 3.0, {total: 1.0}.__getitem__) == (product, 2.0)
    assert told_apart((product, total), 3.0, {total: 4.0}.__getitem__) is None
    assert told_apart((total, total), 3.0, {total: 1.0}.__getitem__) is None


def test_weight_gradients_are_timed_in_bf16() -> None:
    shape = Shape(2, 16, 16, 1, False, "bf16")
    piece = Piece(canonical(next(b for b in blocks(MODEL) if b.kind == "layer")), shape, "none")
    names = {
        s.work.form for s in time_pieces(MODEL, [piece], 1, "cpu", known=lambda work: 0.0) if s.work.kind == "matmul"
    }
    assert names == {"fwd", "dgrad", "wgrad"}


@pytest.mark.parametrize("split", [False, True])
def test_every_operation_of_a_body_is_timed(split: bool) -> None:
    """Two workers form the tensor group: what they exchange is timed where it stands, and priced as measured."""
    shape = Shape(2, 16, 16, 2, split, "fp32")
    pieces = [Piece(canonical(block), shape, "none") for block in blocks(MODEL)]
    samples = time_pieces(MODEL, pieces, 2, "cpu")
    found = {s.work: s for s in samples}
    assert len(found) == len(samples) and all(s.seconds > 0 and s.ranks == 2 for s in samples)
    wanted = set()
    for piece in pieces:
        body = lower_block(piece.block, shape, piece.policy)
        for instruction in (*body.forward.ranks[0], *body.backward.ranks[0]):
            made = works(piece.block, body, instruction, shape)
            wanted.update(made if len(made) == 1 else ())  # the loss is more than one piece of work: not told apart
    assert set(found) == wanted
    assert {w.op for w in wanted if isinstance(w, Collective)} == (
        {"all_gather", "reduce_scatter"} if split else {"all_reduce"}
    )
    profile = refined(load_profile(SHIPPED), samples)
    pricer = Pricer(profile, 2)
    for work, sample in found.items():
        if isinstance(work, Collective | Memory):
            seconds, grade = pricer.price(work)
            assert grade == "measured"
            assert seconds == pytest.approx(max(sample.seconds, pricer.bound_seconds(work)))
