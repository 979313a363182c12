"""What every worker would refuse, refused once and before any worker starts or a weight is read. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autotune.runners.headers import read_headers
from autotune.runners.tokens import check_generation, encode
from autotune.spec.errors import UsageError
from autotune.spec.graph import blocks
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


def check_inputs(
    recipe: str,
    model: ModelSpec,
    workload: Workload,
    checkpoint: str,
    prompts: Sequence[str],
    runs: bool,
    draft_checkpoint: str = "",
    target_checkpoint: str = "",
) -> None:
    """Nothing, or a UsageError: a checkpoint that is not this model's, prompts that it cannot continue, data that it
    cannot be trained on.

    `recipe` is the file that names them, as the user gave it. `checkpoint` is a folder of safetensors, "" for random
    weights, `draft_checkpoint` the draft model's, `target_checkpoint` that of the model which heads are trained for; of
    their files only the headers are read. `runs`: workers are to start, so that the default corpus counts.
    """
    if workload.kind == "generate":
        if prompts:
            encode(prompts, model, workload)
        else:
            check_generation(model, workload)
    if workload.data or (runs and not prompts):
        _check_data(recipe, model, workload)
    if checkpoint:
        whole = (weight for block in blocks(model) for weight in block.tensors())
        read_headers(checkpoint).verify(whole, train=workload.kind == "train")
    if draft_checkpoint and workload.draft:
        drafted = blocks(workload.draft)
        read_headers(draft_checkpoint).verify(weight for block in drafted for weight in block.tensors())
    if target_checkpoint and isinstance(model, HeadsSpec) and model.target:
        frozen = blocks(model.target)  # its output projection is what those of heads begin as
        read_headers(target_checkpoint).verify(weight for block in frozen for weight in block.tensors())


def _check_data(recipe: str, model: ModelSpec, workload: Workload) -> None:
    """Opens the corpus as workers will. Its problems are told as ones of `[workload] data`, or of what it is cut to."""
    from autotune.runners.corpus import HELD_OUT, TRAINED, open_corpus, windows

    try:
        corpus = open_corpus(workload.data, model.vocab, HELD_OUT if workload.kind == "generate" else TRAINED)
        windows(corpus, workload.sequence_length if workload.kind == "train" else workload.prompt_length)
    except UsageError as error:
        problems = []
        for p in error.problems:
            place = f"{p.file}, {p.key}" if p.key else p.file
            problems.append(replace(p, file=recipe, key="workload.data", found=f"{place}: {p.found}"))
        raise UsageError(f"{recipe}: the data is not what the workload needs", problems=problems) from None
