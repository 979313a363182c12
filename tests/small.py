"""Recipes of a model so small that a whole run of it takes seconds."""

from __future__ import annotations

MODEL = """
[model]
architectures = ["LlamaForCausalLM"]
vocab_size = 256
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
rms_norm_eps = 1e-5
max_position_embeddings = 256
"""
TRAIN = (
    MODEL
    + """
[machine]
use = "this"
devices = 2
[workload]
kind = "train"
sequence_length = 32
global_batch = 8
precision = "fp32"
steps = 3
[search]
schedule = "1f1b"
micro_batch = 4
tensor = 1
recompute = "none"
zero = 0
budget = { seconds = 30, measure = 2 }
"""
)
GENERATE = (
    MODEL
    + """
[machine]
use = "this"
devices = 2
[workload]
kind = "generate"
prompt = "def f("
prompt_length = 6
new_tokens = 5
batch = 2
precision = "fp32"
steps = 2
[search]
tensor = 2
attention = "sdpa"
budget = { seconds = 30, measure = 1 }
"""
)
