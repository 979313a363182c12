"""The weights that a training has come to, written as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from autotune.runners.checkpoint import kept, save_checkpoint, split_parts
from autotune.runners.mesh import barrier
from autotune.runners.pieces import asked, gathered
from autotune.runners.saved import Saved
from autotune.runners.state import DTYPES, Key, Loader
from autotune.runners.training import Trainer
from autotune.spec.graph import blocks


def save_weights(trainer: Trainer, saved: Saved, load: Loader, folder: Path) -> None:
    """Writes the checkpoint on rank 0, whole or not at all; every rank calls it between two steps.

    The weights of the compute precision, which is what the wide masters round to. `load` is where they began: what no
    step changes comes from there again. `folder` takes the ranks' parts meanwhile.
    """
    trainer.finish()
    mine: dict[Key, Tensor] = {}
    for stage, state in trainer.states.items():
        # One after another: as much as a stage's whole weights fits beside what is there, as it does in a step.
        of_stage, told = trainer.whole(stage, state.weight), asked(trainer)
        mine |= {key: tensor.to("cpu", copy=True) for key, tensor in of_stage.items() if key in told}
        if trainer.mesh.replica == 0:
            mine |= {key: tensor.to("cpu", copy=True) for key, tensor in state.frozen.items()}
        del of_stage
    whole = gathered(trainer, mine, folder, "weights")
    if whole is not None:
        dtype = DTYPES[trainer.workload.precision]
        tensors: dict[str, Tensor] = {}
        for block in blocks(trainer.model):
            for weight in block.weights():
                tensors |= split_parts(weight, whole[block.index, weight.name])
            for constant in block.constants():
                tensors |= split_parts(constant, load(block.index, constant).to("cpu", kept(constant, dtype)))
        save_checkpoint(saved.folder, tensors, saved.config)
    barrier(trainer.mesh.device)
