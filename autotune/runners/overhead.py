"""What one instruction costs however small it is: Python, dispatch and launches, measured on our own bodies.

A body of a few tokens and features does next to no arithmetic, so its time over its instructions is that cost. On an
accelerator it is the host's time to issue; the device's own is priced separately and the larger of the two counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from autotune.planners.lower.body import lower_block
from autotune.planners.lower.generate import inference_body
from autotune.planners.lower.shape import Shape
from autotune.runners.body import Values, compile_body, run_body
from autotune.runners.ops import Env, KVCache
from autotune.runners.reference import init_weight
from autotune.runners.rope import tables
from autotune.runners.state import DTYPES
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec

TINY = ModelSpec("tiny", "LlamaForCausalLM", 64, 1, 4, 2, 16, 128, 64)
TOKENS = 8
ROUNDS, WARM, LONG_S = 60, 10, 1.0  # at least so many rounds, and so long: a shared host is slow for whole spells


def instruction_seconds(device: torch.device, precision: str) -> dict[str, float]:
    """Median seconds of one instruction of a layer's body: "train" (forward and backward) and "decode" (one token)."""
    dtype = DTYPES[precision]
    block = blocks(TINY)[1]
    weights = {w.name: init_weight(w, 0, dtype).to(device) for w in block.weights()}
    grads = {name: torch.zeros_like(w, dtype=torch.promote_types(dtype, torch.float32)) for name, w in weights.items()}
    rope = tables(TINY, TOKENS, device)
    shape = Shape(1, TOKENS, TOKENS, dtype=precision)
    body = lower_block(block, shape)
    calls = compile_body(block, body.forward), compile_body(block, body.backward)
    env = Env(TINY, 1, TOKENS, torch.arange(TOKENS, device=device), rope, weights, grads)
    x = torch.randn(TOKENS, TINY.hidden, device=device).to(dtype)

    def train() -> None:
        values: Values = run_body(calls[0], env, {"x": x})
        values[f"d.{body.output}"] = values.pop(body.output)
        run_body(calls[1], env, values)

    single = Shape(1, 1, TOKENS, dtype=precision)
    decode_calls = compile_body(block, inference_body(block, single).forward)
    cache = KVCache.empty(TINY, 1, 1, TOKENS, dtype=dtype, device=device)
    step = Env(TINY, 1, 1, torch.full((1,), TOKENS - 1, device=device), rope, weights, cache=cache, start=TOKENS - 1)

    def decode() -> None:
        run_body(decode_calls, replace(step, start=TOKENS - 1), {"x": x[:1]})  # as the executor moves on

    with torch.no_grad():
        return {
            "train": _median(train, device) / (len(calls[0]) + len(calls[1])),
            "decode": _median(decode, device) / len(decode_calls),
        }


def _median(run: Callable[[], None], device: torch.device) -> float:
    """Median seconds of issuing `run`, the device left to follow; after a warm-up."""
    seconds: list[float] = []
    for _ in range(WARM):
        run()
    until = time.perf_counter() + LONG_S
    while len(seconds) < ROUNDS or time.perf_counter() < until:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
