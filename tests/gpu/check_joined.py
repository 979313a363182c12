"""Weight gradients of several micro-batches as one product, beside one after another: the same numbers, and the times.

    python tests/gpu/check_joined.py [--device cuda|cpu] [--profile h100-sxm] [--quick]

One transformer layer in bf16 (fp32 on a CPU). `apart` runs the layer's W once a micro-batch, `joined` puts their values
together (`concat`, a part of it) and runs it once; `said` are the prices from a profile. Not collected by pytest. Exits
with 6 when the gradients differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from autotune.planners.costs.body import BodyCosts
from autotune.planners.costs.price import Pricer
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.join import joined_body, part_of
from autotune.planners.lower.shape import Shape
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.runners.body import Call, Values, compile_body, run_body
from autotune.runners.clock import Clock
from autotune.runners.ops import Env
from autotune.runners.reference import init_weight
from autotune.runners.rope import tables
from autotune.runners.state import DTYPES
from autotune.spec.graph import Block, blocks
from autotune.spec.model import ModelSpec

BOUND = 2e-2  # norm of the difference over the norm: each product is rounded to bf16, apart once a micro-batch
ROUNDS = 7
LAYERS = (
    ModelSpec("1B", "LlamaForCausalLM", 2048, 1, 32, 8, 64, 8192, 512),
    ModelSpec("8B", "LlamaForCausalLM", 4096, 1, 32, 8, 128, 14336, 512),
)
TINY = ModelSpec("tiny", "LlamaForCausalLM", 64, 1, 4, 2, 16, 128, 64)
COLUMNS = "{:<6} {:>7} {:>6} {:>10} {:>10} {:>10} {:>8} {:>11} {:>11} {:>9}"


def left(block: Block, shape: Shape, env: Env, seed: int) -> Values:
    """What a forward and an input gradient leave for W, of random values."""
    generator = torch.Generator(env.positions.device).manual_seed(seed)
    body = lower_block(block, shape)
    width, dtype = block.nodes[0].attr("width"), DTYPES[shape.dtype]

    def noise() -> Tensor:
        return torch.randn(shape.tokens, width, generator=generator, device=env.positions.device).to(dtype)

    values = run_body(compile_body(block, body.forward), env, {"x": noise()})
    values.pop(body.output)
    values[f"d.{body.output}"] = noise()
    values = run_body(compile_body(block, body.input_gradient), env, values)
    wanted = {name for i in body.weight_gradient.ranks[0] for name in i.reads}
    return {name: value for name, value in values.items() if name in wanted}


def timed(run: Callable[[], object], clock: Clock) -> float:
    """Median milliseconds of a warm call."""
    run()
    spent = []
    for _ in range(ROUNDS):
        clock.hold(2e-3)
        begin = clock.mark()
        run()
        end = clock.mark()
        clock.settle()
        spent.append(1e3 * clock.between(begin, end))
    return statistics.median(spent)


def check(model: ModelSpec, tokens: int, count: int, device: torch.device, costs: BodyCosts) -> bool:
    """One row; whether both ways agree."""
    block, clock = blocks(model)[1], Clock(device)
    shape = Shape(1, tokens, tokens, dtype="bf16" if device.type == "cuda" else "fp32", attention="sdpa")
    dtype = DTYPES[shape.dtype]
    weights = {w.name: init_weight(w, 0, dtype, device) for w in block.weights()}
    grads = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    env = Env(model, 1, tokens, torch.arange(tokens, device=device), tables(model, tokens, device), weights, grads)
    wide, body = replace(env, batch=count), joined_body(block, shape, "none", count)
    one = compile_body(block, lower_block(block, shape).weight_gradient)
    many = compile_body(block, body.weight_gradient)
    kept = [left(block, shape, env, seed) for seed in range(count)]

    def apart() -> None:
        for values in kept:
            run_body(one, env, dict(values))

    def parts() -> Values:
        return {part_of(name, n): value for n, values in enumerate(kept) for name, value in values.items()}

    def joined() -> None:
        run_body(many, wide, parts())

    copies: tuple[Call, ...] = tuple(call for call in many if call.label == "concat")

    def concat() -> None:
        run_body(copies, wide, parts())

    def gradients(run: Callable[[], None]) -> Tensor:
        for gradient in grads.values():
            gradient.zero_()
        run()
        return torch.cat([gradient.flatten() for gradient in grads.values()])

    expected, found = gradients(apart), gradients(joined)
    error = ((found - expected).norm() / expected.norm()).item()
    del expected, found
    said = [
        1e3 * (count * costs.of(block, shape, "none", "W").seconds),
        1e3 * costs.of(block, shape, "none", "W", count).seconds,
    ]
    times = [timed(run, clock) for run in (apart, joined, concat)]
    numbers = [*(f"{ms:.3f}" for ms in times), f"{times[0] / times[1]:.2f}x", *(f"{ms:.3f}" for ms in said)]
    wrong = not error <= BOUND
    row = COLUMNS.format(model.name, tokens, count, *numbers, f"{error:.1e}")
    print(row + ("  WRONG" if wrong else ""), flush=True)
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", default="h100-sxm", help="a shipped profile that prices are said from")
    parser.add_argument("--quick", action="store_true", help="one tiny layer: to see that the script works")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    device, profile = torch.device(options.device), load_profile(shipped()[options.profile])
    costs = BodyCosts(profile, Pricer(profile))
    print(COLUMNS.format("layer", "tokens", "count", "apart ms", "joined ms", "concat ms", "gain",
                         "said apart", "said joined", "error"))  # fmt: skip
    cases = [
        (model, tokens, count)
        for model in ((TINY,) if options.quick else LAYERS)
        for tokens, counts in (
            ((32, (4,)),) if options.quick else ((256, (4, 16, 64)), (1024, (4, 16)), (4096, (4, 8)))
        )
        for count in counts
    ]
    right = [check(model, tokens, count, device, costs) for model, tokens, count in cases]
    return 0 if all(right) else 6


if __name__ == "__main__":
    sys.exit(main())
