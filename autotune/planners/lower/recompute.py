"""Recompute policies: which operations of a layer run again in the backward instead of keeping what they wrote.

A policy is one line of the table. "selective" keeps the products and the attention output and repeats what is bound
by memory (norms, rotations, the gated activation), but nothing that would have to be sent again: Korthikanti et al.
(2205.05198, section 5) repeat the attention core instead, which a fused attention kernel no longer stores. "full"
keeps only the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable

from autotune.spec.opset import OPS

RECOMPUTE: dict[str, Callable[[str], bool]] = {
    "none": lambda op: False,
    "selective": lambda op: op in OPS and OPS[op].cheap,
    "full": lambda op: True,
}
