"""Recipes as text: a commented one to start from, and any one as TOML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name

INLINE = """[model]                       # the keys of a Hugging Face config.json in place, or config = "FILE"
architectures = ["LlamaForCausalLM"]
vocab_size = 256              # one token a byte
hidden_size = 256
intermediate_size = 704
num_hidden_layers = 4
num_attention_heads = 8
num_key_value_heads = 4
max_position_embeddings = 4096
rms_norm_eps = 1e-5
rope_theta = 10000.0"""

WORK = {
    "train": """kind = "train"
sequence_length = 512         # tokens
global_batch = 16             # sequences a step
precision = "{precision}"           # bf16 keeps fp32 master weights
data = ""                     # a text or .npy token file; "": Python's standard library as bytes""",
    "generate": """kind = "generate"
prompt_length = 128           # tokens
new_tokens = 64
batch = 1                     # sequences together
precision = "{precision}\"""",
}


def write_recipe(file: Path, config: Path | None, kind: str, use: str, devices: int) -> None:
    """Write a new recipe. Raises UsageError for a kind that there is not or a file that is already there."""
    if kind not in WORK:
        problem = Problem("--kind", "", repr(kind), "train or generate", nearest_name(kind, WORK))
        raise UsageError("cannot write a recipe", problems=[problem])
    if file.suffix != ".toml":
        raise UsageError(f"{file}: a recipe's name ends in .toml", hint=f"{file.with_suffix('.toml')}")
    if config is not None and not config.is_file():
        raise UsageError(f"{config}: no such config", hint="a Hugging Face config.json")
    model = INLINE
    if config is not None:
        relative = os.path.relpath(config.absolute(), file.absolute().parent)
        model = f"[model]\nconfig = {json.dumps(relative)}   # path relative to this file"
    precision = "fp32" if use == "this" and config is None else "bf16"
    name = re.sub(r"[^A-Za-z0-9._+-]", "-", file.stem).lstrip("._+-") or "recipe"
    text = f"""# autotune search {file.name}; autotune run {file.name}
version = 1
name = {json.dumps(name)}

{model}

[machine]
use = {json.dumps(use)}                  # "this", a shipped or stored profile, or a path to one
devices = {devices}

[workload]
{WORK[kind].format(precision=precision)}

[objective]
minimize = "{"step_time" if kind == "train" else "latency"}"

[search]                      # an axis as a value, a list or {{ min = 1, max = 8 }}; absent: everything valid
budget = {{ seconds = 60, simulate = 20000, measure = 4 }}
seed = 0
"""
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise UsageError(f"{file} is already there", hint="choose another name, or edit it") from None
    except OSError as error:
        raise EnvironmentFault(f"{file}: cannot be written: {error.strerror}") from None


def as_toml(merged: Mapping[str, Any]) -> Iterator[str]:
    """A merged recipe as TOML lines; reading them back gives the same recipe."""
    for key, value in merged.items():
        if not isinstance(value, Mapping):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in merged.items():
        if isinstance(value, Mapping):
            yield f"\n[{_key(key)}]"
            yield from (f"{_key(inner)} = {_value(item)}" for inner, item in value.items())


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value) if "." in repr(value) or "e" in repr(value) else f"{value!r}.0"
    return json.dumps(value)
