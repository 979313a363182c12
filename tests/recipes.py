"""Recipes that tests of the command line write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.commands import Said

ROOT = Path(__file__).parent.parent


RECIPE = """
[model]
architectures = ["LlamaForCausalLM"]
vocab_size = 256
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
rms_norm_eps = 1e-5
[machine]
use = "h100-sxm"
devices = 4
[workload]
kind = "train"
sequence_length = 64
global_batch = 8
[search]
recompute = "none"
zero = 0
"""


Autotune = Callable[..., Said]
