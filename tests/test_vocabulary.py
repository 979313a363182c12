"""Vocabulary parallelism (2411.05288): rows of both embeddings on every pipeline rank, in any schedule's order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.schedules import SCHEDULES
from autotune.planners.schedules.vocabulary import VOCABULARIES
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool

TIED = ModelSpec("tiny-llama", "LlamaForCausalLM", 16, 8, 4, 4, 4, 24, 29, tied=True)
OWN = ModelSpec("tiny-qwen", "Qwen3ForCausalLM", 24, 8, 8, 4, 4, 32, 45, qkv_bias=True, qk_norm=True)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
MODELS = {"tied": TIED, "own": OWN}


def case(schedule: str, vocabulary: str, pipeline: int = 2, **axes: object) -> Plan:
    entry = SCHEDULES[schedule]
    return Plan(pipeline=pipeline, schedule=schedule, chunks=entry.chunks[0], vocabulary=vocabulary,
                attention="math", **axes)  # type: ignore[arg-type]  # fmt: skip


CASES = [
    *((name, case(s, v, p)) for s in SCHEDULES for v in VOCABULARIES for name, p in (("tied", 4), ("own", 2))),
    *(("own", case("1f1b", v, 4, recompute="full")) for v in VOCABULARIES),
    *(("tied", case("1f1b", v, 2, data=2, zero=1, recompute="selective")) for v in VOCABULARIES),
    *(("own", case("1f1b", v, 2, data=2)) for v in VOCABULARIES),
    *(("tied", case("1f1b", v, 4, layers="1,3,3,1")) for v in VOCABULARIES),
    *(("own", case("interleaved-1f1b", v, 4, micro_batch=2)) for v in VOCABULARIES),
]


@pytest.mark.parametrize(("name", "plan"), CASES, ids=lambda x: x if isinstance(x, str) else x.describe())
def test_a_sharded_vocabulary_equals_the_reference(pool: Pool, name: str, plan: Plan) -> None:
    """Neither 29 nor 45 rows divide over 2 or 4 ranks: the last ranks have padding."""
    reason = why_not(MODELS[name], WORK, plan, plan.world)
    if reason is not None and reason.startswith(f"schedule {plan.schedule} needs"):
        pytest.skip(reason)
    assert reason is None
    assert_equal(pool, MODELS[name], plan, replace(WORK))
