"""TensorRT-LLM: `trtllm-serve`, with the flags of tensorrt_llm/commands/serve.py (00209af149) and the fields of the
config classes in tensorrt_llm/llmapi/llm_args.py (0004396720), which a YAML file sets.

- --max_num_tokens is of all requests of a step together; --enable_chunked_prefill divides prompts by it.
- speculative_config: NGramDecodingConfig (max_draft_len, max_matching_ngram_size, a pool for each request) and
  DraftTargetDecodingConfig (speculative_model). Its page on speculative decoding (nvidia.github.io/TensorRT-LLM,
  features) starts both without the overlap scheduler. Drawn tokens are kept where they are what the target draws;
  use_rejection_sampling is for drafts that are part of the model.
- draft_len_schedule: {4: 4, 8: 2} is 4 tokens up to batch 4, 2 up to 8 and none beyond; versions before counted each
  key as the first batch of a length (the note says so).
- One server is one replica; a router stands before several.
"""

from __future__ import annotations

from collections.abc import Iterator

from autotune.export.served import DTYPES, SAID, Export, Job, Lost, lost_by_all, others, served
from autotune.planners.decoding.strategies import LONGEST
from autotune.spec.plan import PLAIN, REJECTION

NAME = "TensorRT-LLM"
FILE = "trtllm.yaml"


def trtllm(job: Job) -> Export:
    """The command that serves a plan with TensorRT-LLM, and the file that it reads."""
    plan, workload = job.plan, job.workload
    lost = lost_by_all(NAME, job, matches=True) + others(NAME, plan, SAID)
    if plan.data > 1:
        lost.append(
            Lost("data", str(plan.data), f"a server of {NAME} is one replica: start {plan.data}, with a router")
        )
    lost.append(Lost("attention", plan.attention, f"{NAME} has kernels of its own, which are used"))
    longest = workload.prompt_length + workload.new_tokens
    together = plan.micro_batch * (plan.prompt_chunk or workload.prompt_length)
    arguments = [
        *("trtllm-serve", job.model, "--backend", "pytorch"),
        *("--tp_size", str(plan.tensor), "--pp_size", str(plan.pipeline)),
        *("--max_batch_size", str(plan.micro_batch)),
        *("--max_seq_len", str(longest)),
        *("--max_num_tokens", str(together)),
    ]
    arguments += ["--enable_chunked_prefill"] if plan.prompt_chunk else []
    arguments += ["--config", FILE]
    lines, notes, takes = [f"dtype: {DTYPES[workload.precision]}"], list[str](), False
    if served(plan).decoding != PLAIN:
        lines += speculation(job)
        takes = bool(job.table)
    if takes:
        notes.append(f"draft_len_schedule is read by {NAME} as the last batch of each length; before 1.4 as the first")
    if plan.commit == REJECTION:
        lost.append(
            Lost("commit", plan.commit, f"{NAME} keeps what the target draws: the same distribution, fewer kept")
        )
    if plan.decoding == "ngram" and plan.match > 1:
        lost.append(Lost("match", str(plan.match), f"{NAME} takes a match of any length up to {LONGEST}"))
    text = "\n".join(lines) + "\n"
    return Export(tuple(arguments), tuple(lost), takes, tuple(notes), FILE, text)


def speculation(job: Job) -> Iterator[str]:
    """The lines of a strategy that proposes tokens."""
    plan = job.plan
    most = max(plan.speculate, *(row.speculate for row in job.table)) if job.table else plan.speculate
    yield "disable_overlap_scheduler: true"
    yield "speculative_config:"
    yield f"  decoding_type: {'NGram' if plan.decoding == 'ngram' else 'Draft_Target'}"
    yield f"  max_draft_len: {most}"
    if plan.decoding == "ngram":
        yield f"  max_matching_ngram_size: {LONGEST}"
        yield "  is_public_pool: false"
        yield "  is_use_oldest: false"
    else:
        yield f"  speculative_model: {job.draft}"
    if job.table:
        rows = ", ".join(f"{batch}: {tokens}" for batch, tokens in schedule(job).items())
        yield f"  draft_len_schedule: {{{rows}}}"


def schedule(job: Job) -> dict[int, int]:
    """The last batch of each length, in the order of batches; what is beyond proposes nothing."""
    rows = sorted(job.table, key=lambda row: row.batch)
    # A batch in between goes as the next smaller one that was predicted.
    ends = [*(row.batch - 1 for row in rows[1:]), max(rows[-1].batch, job.plan.micro_batch)]
    found: dict[int, int] = {}
    for row, end, after in zip(rows, ends, [*rows[1:], None], strict=True):
        if after is None or after.speculate != row.speculate:
            found[end] = row.speculate
    if not rows[-1].speculate:
        del found[ends[-1]]
    return found
