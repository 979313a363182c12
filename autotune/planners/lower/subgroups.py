"""Subgroups: equal pieces of a stage's optimizer states that live in the host's memory, and what is left on the device.

A subgroup is the unit of Deep Optimizer States (2410.21316): the fp32 weights and two moments of a run of parameters.
"""

from __future__ import annotations

from autotune.spec.work import BYTES

SUBGROUPS = 16  # of a stage; a sixteenth of the states on the device at a time hides its copies and costs little memory


def split(parameters: int, shards: int, percent: int) -> tuple[int, int]:
    """(elements whose states stay on the device, elements of one subgroup) of one data rank's shard."""
    padded = -(-parameters // shards)
    each = padded * percent // (100 * SUBGROUPS)
    return padded - SUBGROUPS * each, each


def wide(precision: str) -> str:
    """The precision of gradients and states."""
    return "fp32" if precision == "bf16" else precision


def subgroup_bytes(each: int, precision: str) -> tuple[int, int, int]:
    """Bytes of a subgroup's states, gradients and weights. On the host the states hold weights in any precision."""
    width = BYTES[wide(precision)]
    return 3 * width * each, width * each, BYTES[precision] * each


def fetched(stride: int) -> tuple[int, ...]:
    """The subgroups that the device updates: every `stride`-th; none for 0."""
    return tuple(j for j in range(SUBGROUPS) if stride and (j + 1) % stride == 0)
