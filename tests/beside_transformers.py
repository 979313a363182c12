"""Generation on this machine's processor beside `transformers`' own, in one run: a model's shape, random weights,
greedy.

    python -m tests.beside_transformers [--model Qwen--Qwen2.5-0.5B] [--precision fp32] [--prompt 128] [--new 32]

The two take turns. Prints medians of a token and of a prefill, and how many times faster ours is. Not collected by
pytest.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autotune.runners.generation import Generator
from autotune.runners.prompts import Prompts
from autotune.runners.reference import init_weight
from autotune.runners.state import DTYPES
from autotune.spec.families import load_model
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload

MODELS = Path(__file__).parents[1] / "recipes" / "models"
ROUNDS = 5  # of which the first warms up


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen--Qwen2.5-0.5B")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    file, dtype, new = MODELS / f"{asked.model}.json", DTYPES[asked.precision], asked.new
    model = load_model(file)
    work = Workload("generate", precision=asked.precision, prompt_length=asked.prompt, new_tokens=new)
    ours = Generator.build(
        Plan(), model, work, 0, torch.device("cpu"), lambda index, weight: init_weight(weight, 0, dtype)
    )
    raw = json.loads(file.read_text())
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[raw["model_type"]](**raw), dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None  # random weights end whenever
    prompt = torch.randint(1000, (1, asked.prompt))
    mask = torch.ones_like(prompt)

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        theirs.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - begin

    token: dict[str, list[float]] = {"ours": [], "theirs": []}
    prefill: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(ROUNDS):
        made = ours.generate(Prompts(prompt, (asked.prompt,)))
        one, all_ = seconds(1), seconds(new)
        if number:
            token["ours"].append(median(made.token_s))
            prefill["ours"].append(made.prefill_s)
            token["theirs"].append((all_ - one) / (new - 1))
            prefill["theirs"].append(one)
    for name, times in (("a token", token), ("prefill", prefill)):
        mine, other = (median(times[who]) * 1e3 for who in ("ours", "theirs"))
        print(f"{name:<8} ours {mine:.1f} ms, transformers {other:.1f} ms: {other / mine:.2f} x")


if __name__ == "__main__":
    main()
