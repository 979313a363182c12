"""Prompts as tokens and tokens as text, byte by byte: a token is one byte of UTF-8. No torch here.

What a prompt or a workload cannot be is refused here, before a worker starts or a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autotune.spec.errors import Problem, UsageError
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

BYTES = 256  # values of a byte: the least vocabulary
UNKNOWN = "\ufffd"  # stands for what is no text


def check_generation(model: ModelSpec, workload: Workload) -> None:
    """Raises UsageError with every reason why no prompt could be continued so: lengths, positions."""
    problems = []

    def wrong(key: str, found: str, expected: str, nearest: int) -> None:
        problems.append(Problem("workload", key, found, expected, str(nearest)))

    for key in ("prompt_length", "new_tokens", "batch"):
        if (value := getattr(workload, key)) < 1:
            wrong(key, str(value), "at least 1", 1)
    whole, most = workload.prompt_length + workload.new_tokens, model.max_positions
    if most and whole > most:
        limit = f"at most the {most} positions of {model.name}"
        if workload.prompt_length < most:
            wrong("new_tokens", f"{workload.prompt_length} of the prompt and {workload.new_tokens} new tokens", limit,
                  most - workload.prompt_length)  # fmt: skip
        else:
            wrong("prompt_length", f"{workload.prompt_length} tokens", limit, most - workload.new_tokens)
    if problems:
        raise UsageError("this workload cannot be generated:", problems=problems)


def encode(prompts: Sequence[str], model: ModelSpec, workload: Workload) -> tuple[tuple[int, ...], ...]:
    """The bytes of each prompt, workload.batch of them, each of 1 to prompt_length. One prompt alone stands for all
    sequences.

    Raises UsageError, all problems at once, for a vocabulary without all bytes, another number of prompts, a prompt
    that is empty, not valid UTF-8, or longer than prompt_length: none is cut unasked.
    """
    check_generation(model, workload)
    if model.vocab < BYTES:
        problem = Problem(model.name, "vocab_size", str(model.vocab), f"at least {BYTES}, to have every byte", "256")
        raise UsageError(f"{model.name}: text prompts are bytes, and need a larger vocabulary", problems=[problem])
    problems: list[Problem] = []
    rows: list[tuple[int, ...]] = []
    if len(prompts) not in (1, workload.batch):
        expected = f"1, or as many as the batch: {workload.batch}"
        nearest = min((1, workload.batch), key=lambda n: abs(n - len(prompts)))
        problems.append(Problem("workload", "prompt", f"{len(prompts)} prompts", expected, str(nearest)))
    for number, text in enumerate(prompts):
        key = f"prompt {number + 1} of {len(prompts)}"
        try:
            row = tuple(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            # How Python hands on bytes of the command line or of a file name that are no UTF-8.
            found = f"{text[error.start]!a} at character {error.start}"
            problems.append(Problem("workload", key, found, "valid UTF-8"))
            continue
        if fault := _length(row, key, workload):
            problems.append(fault)
        rows.append(row)
    if problems:
        raise UsageError("these prompts cannot be continued:", problems=problems)
    return tuple(rows if len(rows) == workload.batch else rows * workload.batch)


def _length(row: tuple[int, ...], key: str, workload: Workload) -> Problem | None:
    """What is wrong with the length of a prompt, or None."""
    most, cache = workload.prompt_length, workload.prompt_length + workload.new_tokens
    if 0 < len(row) <= most:
        return None
    if not row:
        return Problem("workload", key, "an empty prompt", f"1 to {most} bytes (prompt_length)")
    expected = f"at most {most} (prompt_length): no prompt is cut"
    if len(row) > cache:
        expected += f", and the cache has room for {cache} tokens"
    return Problem("workload", key, f"{len(row)} bytes", expected, f"prompt_length = {len(row)}")


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens that are bytes. What is no UTF-8, and tokens beyond the bytes, show as U+FFFD."""
    text, run = [], bytearray()
    for token in tokens:
        if 0 <= token < BYTES:
            run.append(token)
            continue
        text += [run.decode("utf-8", errors="replace"), UNKNOWN]
        run.clear()
    return "".join([*text, run.decode("utf-8", errors="replace")])
