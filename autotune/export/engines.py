"""The engines that a plan can be handed over to, a line each."""

from __future__ import annotations

from collections.abc import Callable

from autotune.export.served import Export, Job
from autotune.export.sglang import sglang
from autotune.export.vllm import vllm

ENGINES: dict[str, Callable[[Job], Export]] = {"vllm": vllm, "sglang": sglang}
