"""vLLM: `vllm serve`, with the flags that pages of its documentation and its source have at these commits.

- degrees, lengths, type of numbers: "Engine Arguments" (docs.vllm.ai v0.8.5). That --max-num-seqs is of each
  data-parallel rank: docs/serving/data_parallel_deployment.md (01e4fce074).
- --max-num-batched-tokens, which chunked prefill divides prompts by: "Optimization and Tuning" (docs.vllm.ai).
- --attention-backend: the page of dynamic speculation below; its names: vllm/v1/attention/backends/registry.py
  (0033bf03ab).
- --speculative-config: docs/features/speculative_decoding/README.md (01ed47b416), draft_model.md (04329df5bd) and the
  fields in vllm/config/speculative.py (002e77c1f0). `draft_sample_method` probabilistic is speculative sampling; a
  version that lacks it refuses the key.
- num_speculative_tokens_per_batch_size: dynamic_speculative_decoding.md (015a47e128; pull request 32374). Its rows are
  first batch, last batch, tokens; they begin at 1; gaps go as the batch before; no row may have more tokens than
  num_speculative_tokens; vLLM switches it off where there are several data-parallel ranks. It was tested there with
  EAGLE and DFlash: for other methods the page promises nothing, and the export says so.
- a draft model is shared as the target is: vllm/v1/spec_decode/draft_model.py checks it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autotune.export.served import DTYPES, SAID, Export, Job, Lost, attention, lost_by_all, others, served
from autotune.planners.by_batch import AtBatch
from autotune.planners.decoding.strategies import LONGEST
from autotune.spec.plan import PLAIN, REJECTION

NAME = "vLLM"
ATTENTION = {"flash": "FLASH_ATTN"}


def vllm(job: Job) -> Export:
    """The command that serves a plan with vLLM."""
    plan, workload = job.plan, job.workload
    lost = lost_by_all(NAME, job) + others(NAME, plan, SAID)
    arguments = [
        *("vllm", "serve", job.model),
        *("--tensor-parallel-size", str(plan.tensor)),
        *("--pipeline-parallel-size", str(plan.pipeline)),
        *("--data-parallel-size", str(plan.data)),
        *("--dtype", DTYPES[workload.precision]),
        *("--max-model-len", str(workload.prompt_length + workload.new_tokens)),
        *("--max-num-seqs", str(plan.micro_batch)),  # of each data-parallel rank
    ]
    arguments += attention(NAME, plan, ATTENTION, lost)
    if plan.prompt_chunk:  # of all requests of a step together, tokens that go on from their caches too
        arguments += ["--max-num-batched-tokens", str(plan.prompt_chunk * plan.micro_batch)]
    if served(plan).decoding == PLAIN:
        return Export(tuple(arguments), tuple(lost))
    config, notes = speculation(job), []
    if plan.pipeline > 1:
        notes.append(f"{NAME} up to 0.15 does not speculate over a pipeline, by its documentation")
    takes = bool(job.table) and plan.data == 1
    if takes:
        most = max(plan.speculate, *(row.speculate for row in job.table))
        config |= {"num_speculative_tokens": most, "num_speculative_tokens_per_batch_size": ranges(job)}
        notes.append(
            f"{NAME} has tested its table of tokens by batch with EAGLE and DFlash only: try it against one number"
        )
    elif job.table:
        found = f"for {plan.data} data ranks"
        lost.append(Lost("table", found, f"{NAME} takes none there: {plan.speculate} tokens at every batch"))
    arguments += ["--speculative-config", json.dumps(config)]
    return Export(tuple(arguments), tuple(lost), takes, tuple(notes))


def speculation(job: Job) -> dict[str, Any]:
    """The speculative config without its table."""
    plan = job.plan
    config: dict[str, Any] = {"num_speculative_tokens": plan.speculate}
    if plan.decoding == "ngram":
        return {"method": "ngram", **config, "prompt_lookup_min": plan.match, "prompt_lookup_max": LONGEST}
    config = {"method": "draft_model", "model": job.draft, **config}
    return {**config, "draft_sample_method": "probabilistic"} if plan.commit == REJECTION else config


def ranges(job: Job) -> list[list[int]]:
    """The table as rows of first batch, last batch and tokens: a batch in between goes as the next smaller one that
    was predicted, the smallest one also as those below it."""
    table: Sequence[AtBatch] = sorted(job.table, key=lambda row: row.batch)
    last = max(table[-1].batch, job.plan.micro_batch)
    starts = [1, *(row.batch for row in table[1:])]
    ends = [*(start - 1 for start in starts[1:]), last]
    rows: list[list[int]] = []
    for start, end, row in zip(starts, ends, table, strict=True):
        if rows and rows[-1][2] == row.speculate:
            rows[-1][1] = end
        else:
            rows.append([start, end, row.speculate])
    return rows
