"""Whether the passes of a generation can run on a device: refused before a weight is loaded."""

from __future__ import annotations

import torch

from autotune.runners.ops import grouped
from autotune.runners.ops.attention import unsupported
from autotune.runners.state import DTYPES
from autotune.spec.errors import Problem, UsageError
from autotune.spec.graph import blocks as all_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload


def check_passes(model: ModelSpec, workload: Workload, plan: Plan, device: torch.device) -> None:
    """Raises UsageError for what cannot."""
    _check_attention(model, workload, plan, device)
    _check_capture(model, workload, plan, device)


def _check_capture(model: ModelSpec, workload: Workload, plan: Plan, device: torch.device) -> None:
    """Raises UsageError where a pass cannot be captured because the host would have to know how many rows an expert
    has."""
    products = [node for block in all_blocks(model) for node in block.nodes if node.op == "grouped"]
    for node in products if device.type == "cuda" else ():
        why = grouped.unsupported(device, DTYPES[workload.precision], *grouped.widths(node, plan.tensor))
        if why is not None:
            expected = f"products by expert in one kernel, which {why}"
            problem = Problem("plan", node.name, f"experts in {workload.precision} on {device.type}", expected)
            raise UsageError("passes of this model cannot be captured:", problems=[problem])


def _check_attention(model: ModelSpec, workload: Workload, plan: Plan, device: torch.device) -> None:
    """Raises UsageError where the plan's attention cannot prefill."""
    prompt = workload.prompt_length
    window = model.window if prompt > model.window else 0
    dtype = DTYPES[workload.precision]
    if refused := unsupported(plan.attention, device, dtype, model.head_dim, prompt, window):
        problem = Problem("plan", "attention", plan.attention, f"a backend that runs here: this one {refused}")
        raise UsageError("the plan's attention cannot prefill:", problems=[problem])
