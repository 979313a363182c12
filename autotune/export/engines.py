"""The engines that a plan can be handed over to, a line each: those that generate, and those that train."""

from __future__ import annotations

from collections.abc import Callable

from autotune.export.deepspeed import deepspeed
from autotune.export.megatron import megatron
from autotune.export.served import Export, Job
from autotune.export.sglang import sglang
from autotune.export.torchtitan import torchtitan
from autotune.export.trained import TrainJob
from autotune.export.trtllm import trtllm
from autotune.export.vllm import vllm

ENGINES: dict[str, Callable[[Job], Export]] = {"vllm": vllm, "sglang": sglang, "trtllm": trtllm}
TRAINERS: dict[str, Callable[[TrainJob], Export]] = {
    "megatron": megatron,
    "torchtitan": torchtitan,
    "deepspeed": deepspeed,
}
