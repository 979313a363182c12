"""SGLang: `sglang.launch_server`, with the flags that pages of its documentation and its source have at these commits.

- degrees, lengths, type of numbers, batches, parts of prompts: docs/advanced_features/server_arguments.md (004813e1dd).
That
  --max-running-requests is of each replica, but where attention alone is data-parallel: its model runner's source.
- speculation: speculative_decoding.md (067ad4d335) and the fields of python/sglang/srt/arg_groups/fields/spec.py
  (015c872628). Its draft tokens count the newest token, which is scored with them: one more than are proposed. The page
  still has flags for the least and the longest match; the source has neither, only the depth of the cache's tree, in
  which a match and what follows it share a path.
- what goes with what: python/sglang/srt/arg_groups/speculative_hook.py (004c82e07d): sampling by the draft's own
  distribution is EAGLE's alone. That a pipeline goes with no strategy of ours: its checks of server arguments.
- adaptive_speculative_decoding.md (369fa46b11): the number of tokens can follow the acceptance, with EAGLE only;
  nothing takes a table.
- attention_backend.md (000984ed03): fa3 is FlashAttention 3, the default on Hopper.
"""

from __future__ import annotations

from autotune.export.served import DTYPES, SAID, Export, Job, Lost, attention, lost_by_all, others, served
from autotune.planners.decoding.strategies import LONGEST
from autotune.spec.plan import PLAIN, REJECTION

NAME = "SGLang"
ATTENTION = {"flash": "fa3"}


def sglang(job: Job) -> Export:
    """The command that serves a plan with SGLang."""
    plan, workload = job.plan, job.workload
    lost = lost_by_all(NAME, job) + others(NAME, plan, SAID)
    arguments = [
        *("python3", "-m", "sglang.launch_server", "--model-path", job.model),
        *("--tp-size", str(plan.tensor)),
        *("--pp-size", str(plan.pipeline)),
        *("--dp-size", str(plan.data)),
        *("--dtype", DTYPES[workload.precision]),
        *("--context-length", str(workload.prompt_length + workload.new_tokens)),
        *("--max-running-requests", str(plan.micro_batch)),  # of each replica
    ]
    arguments += attention(NAME, plan, ATTENTION, lost)
    if plan.prompt_chunk:
        arguments += ["--chunked-prefill-size", str(plan.prompt_chunk)]
    if plan.pipeline > 1:  # all of a replica's sequences go through the stages together
        arguments += ["--pp-max-micro-batch-size", str(plan.micro_batch)]
    if served(plan).decoding == PLAIN:
        return Export(tuple(arguments), tuple(lost))
    if plan.pipeline > 1:
        lost.append(
            Lost("decoding", plan.decoding, f"{NAME} does not speculate over a pipeline: plain decoding is used")
        )
        return Export(tuple(arguments), tuple(lost))
    if plan.decoding == "ngram":
        how = f"{NAME} takes a match of any length, in the text of all requests"
        lost.append(Lost("match", str(plan.match), how))
    if plan.commit == REJECTION:
        how = f"{NAME} keeps a draft's token by the target's probability alone: the same distribution, fewer are kept"
        lost.append(Lost("commit", plan.commit, how))
    if job.table:
        how = f"{NAME} takes none: {plan.speculate} tokens at every batch"
        lost.append(Lost("table", "of tokens by batch", how))
    return Export((*arguments, *speculation(job)), tuple(lost))


def speculation(job: Job) -> tuple[str, ...]:
    """The flags of a strategy that proposes tokens."""
    plan = job.plan
    counts = (
        *("--speculative-num-steps", str(plan.speculate)),
        *("--speculative-num-draft-tokens", str(plan.speculate + 1)),
    )
    if plan.decoding == "ngram":
        return (
            *("--speculative-algorithm", "NGRAM", *counts),
            *("--speculative-ngram-max-bfs-breadth", "1"),
            *("--speculative-ngram-max-trie-depth", str(LONGEST + plan.speculate)),
        )
    return (
        *("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", job.draft, *counts),
        *("--speculative-eagle-topk", "1"),
    )
