"""What every worker would refuse, refused once and before any worker starts or a weight is read. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.runners.headers import read_headers
from autotune.runners.tokens import check_generation, encode
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


def check_inputs(model: ModelSpec, workload: Workload, checkpoint: str, prompts: Sequence[str]) -> None:
    """Nothing, or a UsageError: a checkpoint that is not this model's, prompts that it cannot continue.

    `checkpoint` is a folder of safetensors, "" for random weights; of its files only the headers are read.
    """
    if workload.kind == "generate":
        if prompts:
            encode(prompts, model, workload)
        else:
            check_generation(model, workload)
    if checkpoint:
        read_headers(checkpoint).verify(weight for block in blocks(model) for weight in block.weights())
