"""Fits the calibration of vTrain's runs: `python -m autotune.planners.replay.fit` (some minutes).

Levenberg and Marquardt's method (Marquardt 1963) on the logarithms of predicted over measured, with Huber's weights
(Huber 1964) so that a few rows that no coefficient explains do not bend the rest; derivatives by differences. Only rows
that their hash gives to fitting are read. Starts from the shipped profile's coefficients, draws nothing at random: the
file comes out the same wherever it is made.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
from numpy.typing import NDArray

from autotune.planners.replay.calibration import DATA, Calibration, Fitted, dump
from autotune.planners.replay.machine import A100
from autotune.planners.replay.vtrain import CALIBRATION, Run, Teller, runs

Numbers = NDArray[np.float64]

HUBER = 0.1  # of the logarithm: errors above a tenth count in proportion, not squared
DIFFERENCE = 0.02  # of the logarithm of a coefficient
ROUNDS = 12
ENOUGH = 1e-3  # share of the loss that a round must still take off


@dataclass(frozen=True)
class Free:
    """A coefficient to be fitted: where it starts, the most it may be, and the profile's coefficients it sets."""

    start: float
    most: float
    sets: tuple[str, ...]


FREE: Mapping[str, Free] = {
    # The host: an eager framework hands over several kernels for one instruction of ours.
    "host seconds of an instruction": Free(8e-5, inf, ("instruction_seconds.train",)),
    # 271.2 of 312 TFLOP/s is the best product measured on an A100 (the profile's own source).
    "matrix products": Free(0.853, 0.869, ("matmul_efficiency",)),
    "memory-bound operations": Free(0.65, 1.0, ("memory_efficiency",)),
    # Logits are made fp32 and passed over several times; ours is one fused pass.
    "cross-entropy": Free(0.035, 1.0, ("memory_efficiency.cross_entropy", "memory_efficiency.cross_entropy_bwd")),
    # Scores are written out and read again, whatever the heads' width.
    "width of a head that reaches half": Free(
        200.0, inf, ("attention_half_width.math.fwd", "attention_half_width.math.bwd")
    ),
    "bandwidth of links": Free(0.8, 1.0, ("link_efficiency.nvlink3",)),
    "start of a collective": Free(2e-4, inf, ("collective_seconds",)),
}
# With scores written out the whole square is computed: half of what a product reaches counts as causal.
FIXED = {"attention_efficiency.math": (0.4265, ("attention_efficiency.math.fwd", "attention_efficiency.math.bwd"))}


def calibration(values: Sequence[float], uncertain: Sequence[float], residual: float, rows: int) -> Calibration:
    fitted = {
        name: Fitted(float(f"{value:.4g}"), float(f"{doubt:.2g}"), free.sets)
        for (name, free), value, doubt in zip(FREE.items(), values, uncertain, strict=True)
    }
    fitted |= {name: Fitted(value, 0.0, sets) for name, (value, sets) in FIXED.items()}
    source = "vTrain's single-node measurements (github.com/VIA-Research/vTrain, data; MIT)"
    return Calibration(A100, rows, source, residual, fitted)


def errors(logarithms: Numbers, given: Sequence[Run]) -> Numbers:
    """Logarithms of predicted over measured."""
    teller = Teller(calibration([exp(x) for x in logarithms], [0.0] * len(FREE), 0.0, len(given)).profile())
    return np.array([log(1e3 * teller.predict(run).step_s / run.iteration_ms) for run in given])


def loss(found: Numbers) -> float:
    size = np.abs(found)
    return float(np.where(size < HUBER, found**2, 2 * HUBER * size - HUBER**2).sum())


def fit(given: Sequence[Run], rounds: int = ROUNDS) -> Calibration:
    """The calibration of `given`; what a round reached is said on stderr."""
    at = np.array([log(free.start) for free in FREE.values()])
    most = np.array([log(free.most) if free.most < inf else inf for free in FREE.values()])
    found, damping = errors(at, given), 1e-2
    curvature = np.eye(len(at))
    weights = np.ones_like(found)
    for number in range(rounds):
        slopes = np.empty((len(given), len(at)))
        for column in range(len(at)):
            # A coefficient at its most is looked at from below: beyond, it would not be taken.
            step = -DIFFERENCE if at[column] + DIFFERENCE > most[column] else DIFFERENCE
            aside = at.copy()
            aside[column] += step
            slopes[:, column] = (errors(aside, given) - found) / step
        weights = np.minimum(1.0, HUBER / np.maximum(np.abs(found), 1e-12))
        curvature = slopes.T @ (weights[:, None] * slopes)
        gradient = slopes.T @ (weights * found)
        before, taken = loss(found), False
        while not taken and damping < 1e4:
            damped = curvature + damping * np.diag(np.diag(curvature) + 1e-6)
            there = np.minimum(at - np.linalg.solve(damped, gradient), most)
            trial = errors(there, given)
            taken = loss(trial) < before
            if taken:
                at, found = there, trial
            damping = damping / 5 if taken else damping * 5
        print(f"round {number}: loss {loss(found):.4f}", [f"{exp(x):.4g}" for x in at], file=sys.stderr, flush=True)
        if before - loss(found) < ENOUGH * before:
            break
    spread = float((weights * found**2).sum()) / max(1, len(given) - len(at))
    doubts = np.sqrt(np.diag(np.linalg.inv(curvature + 1e-9 * np.eye(len(at)))) * spread)
    residual = statistics.fmean(abs(exp(x) - 1) for x in found)
    return calibration([exp(x) for x in at], list(map(float, doubts)), round(residual, 4), len(given))


def main() -> int:
    made = fit([run for run in runs() if run.fitted])
    dump(made, DATA / f"{CALIBRATION}.json")
    for name, one in made.fitted.items():
        print(f"{name}: {one.value:.4g} +-{one.uncertainty:.0%}")
    print(f"mean size of the errors of the {made.rows} rows fitted to: {made.residual:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
