"""Where trained weights are to be saved, and the config.json beside them: settled before any worker starts. No torch
here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.spec.errors import Problem, UsageError
from autotune.spec.families import FAMILIES
from autotune.spec.model import ModelSpec

NAMES = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}  # of precisions, in a config
EXTRA = ("num_nextn_predict_layers", "num_mtp_layers")  # counts of layers that the trained model does not have


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a training leaves: its folder, absolute, and the content of its config.json."""

    folder: str
    config: Mapping[str, Any]


def config_of(raw: Mapping[str, Any], model: ModelSpec, precision: str) -> dict[str, Any]:
    """The config.json of `model` in `precision`, of the config that it was read from.

    What transformers needs and we do not is added; what would no longer be true of the weights is changed.
    """
    config = {**raw, **dict.fromkeys(raw.keys() & {*EXTRA}, 0)}
    config["architectures"] = [model.architecture]
    if model.architecture in FAMILIES:  # decoding heads are nobody else's
        config.setdefault("model_type", FAMILIES[model.architecture].model_type)
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = NAMES[precision]
    if "dtype" in config:
        config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    return config


def check_free(folder: Path) -> None:
    """Nothing, or a UsageError where `folder` holds something already or cannot be made.

    It is made beside its place and then renamed, so that place may be an empty folder, but not one that is mounted.
    """

    def refuse(message: str, found: str, expected: str) -> UsageError:
        return UsageError(f"{folder}: {message}", problems=[Problem(str(folder), "", found, expected)])

    try:
        there = folder.exists() or folder.is_symlink()
        if there and (not folder.is_dir() or any(folder.iterdir())):
            raise refuse("not overwritten", "something there already", "a folder that does not exist or is empty")
        if there and os.path.ismount(folder):
            raise refuse("cannot be replaced", "a place where something is mounted", "a folder below it")
        above = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise refuse("cannot be looked at", reason, "a folder that does not exist or is empty") from None
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        found = f"{above}, which is {'not writable' if above.is_dir() else 'no folder'}"
        raise refuse("cannot be made", found, "a folder that can be written")
