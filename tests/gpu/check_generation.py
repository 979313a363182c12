"""Captured generation on a device: the reference's tokens, replay after replay, whatever the prompt; one row a plan.

    python tests/gpu/check_generation.py [--device cuda|cpu] [--ranks 1] [--only llama,answers] [--precision bf16]
        [--decoding ngram,draft] [--weights int8] [--page 16]

`answers` has prompts of different lengths, and draws its tokens. `--decoding`: rounds that propose tokens, in the place
of the usual plans; the draft is a model of the same weights in fewer layers, and the target itself; heads are those
that training begins with.

Not collected by pytest. Exits with 6 where a token differs from the reference's by more than its precision explains.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from autotune.planners.decoding.strategies import STRATEGIES
from autotune.planners.feasible import KERNELS, PAGES
from autotune.planners.lower.stage import FORMS
from autotune.runners.job import Job
from autotune.runners.launch import launch
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.plan import EXACT, FUSED, Plan
from autotune.spec.workload import Workload

MODEL = ModelSpec("small", "LlamaForCausalLM", 256, 4, 8, 4, 64, 704, 256)
WORK = Workload(kind="generate", prompt_length=48, new_tokens=40, batch=4)
PROMPTS = ("d", "def answers(self):", "import os\nimport sys\n\nclass Prompts(Named):\n", "x" * 48)
PLANS = {
    1: (Plan(micro_batch=4), Plan(micro_batch=1), Plan(micro_batch=4, kernels=FUSED), Plan(kernels=FUSED)),
    2: (
        Plan(tensor=2, micro_batch=4),
        Plan(pipeline=2, micro_batch=4),
        Plan(data=2, micro_batch=2),
        Plan(tensor=2, micro_batch=4, kernels=FUSED),
    ),
}


DECODINGS = (
    Plan(micro_batch=4, decoding="ngram", speculate=4, match=1),
    Plan(micro_batch=4, decoding="ngram", speculate=3, match=1, branches=3),
    Plan(micro_batch=1, decoding="jacobi", speculate=6),
    Plan(micro_batch=4, decoding="lookahead", speculate=3, branches=4, window=5),
    Plan(micro_batch=4, decoding="draft", speculate=3),
    Plan(micro_batch=1, decoding="draft", speculate=5),
    Plan(micro_batch=4, decoding="draft", speculate=3, commit="rejection"),
    Plan(micro_batch=4, decoding="parallel", speculate=4),
    Plan(micro_batch=1, decoding="parallel", speculate=8),
    Plan(micro_batch=4, decoding="parallel", speculate=4, commit="rejection"),
    Plan(micro_batch=4, decoding="masks", speculate=2),
    Plan(micro_batch=4, decoding="heads", speculate=4),
    Plan(micro_batch=1, decoding="heads", speculate=3, tree="0,0,0,1,1,2,4"),
    Plan(micro_batch=4, decoding="heads", speculate=2, tree="0,0,1,2", commit="typical"),
)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ranks", type=int, default=1, choices=sorted(PLANS))
    parser.add_argument("--only", help="these variants alone, e.g. llama,answers")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="this alone")
    parser.add_argument("--kernels", choices=KERNELS, help="plans with these alone")
    parser.add_argument("--weights", choices=sorted(FORMS), default=EXACT, help="how layers keep them")
    parser.add_argument("--page", type=int, choices=PAGES, default=0, help="positions of a page of the cache")
    parser.add_argument("--decoding", help="these strategies, in the place of decoding a token at a time")
    asked = parser.parse_args()
    failed, plans = 0, PLANS[asked.ranks]
    if asked.decoding:
        plans = tuple(plan for plan in DECODINGS if plan.decoding in asked.decoding.split(","))
        plans = tuple(replace(plan, kernels=asked.kernels or plan.kernels) for plan in plans)
    variants = {
        "llama": MODEL,
        "window": replace(MODEL, window=32),
        "qk norm": replace(MODEL, architecture="Qwen3ForCausalLM", qk_norm=True),
        "answers": MODEL,
    }
    for plan in (p for p in plans if asked.kernels in (None, p.kernels)):
        for precision in ("fp32", "bf16") if asked.precision is None else (asked.precision,):
            for name, model in variants.items():
                if asked.only and name not in asked.only.split(","):
                    continue
                work, prompts = replace(WORK, precision=precision), tuple[str, ...]()
                if name == "answers":
                    work, prompts = replace(work, temperature=0.8, top_k=50, top_p=0.95), PROMPTS
                    work = replace(work, prompt_lengths=tuple(map(len, PROMPTS)))
                own = replace(model, drafts=8, masks=7) if STRATEGIES[plan.decoding].masks else model
                if plan.decoding == "heads":  # untrained: they guess that a token comes again
                    wide = (model.hidden, 0, 1, 1, 2, 0, model.vocab)
                    work = replace(work, draft=HeadsSpec("heads", "MedusaHeads", *wide, count=4))
                elif STRATEGIES[plan.decoding].draft:
                    work = replace(work, draft=replace(own, layers=2) if name == "answers" else own)
                if plan.commit == "rejection" and not work.temperature:
                    continue
                attention = "flash" if asked.device == "cuda" and precision == "bf16" else "math"
                at = replace(plan, attention=attention, weights=asked.weights, page=asked.page)
                mine = own if plan.decoding == "masks" else model
                job = Job(at, mine, work, 2, 2, check=True, device=asked.device, prompts=prompts)
                with tempfile.TemporaryDirectory() as folder:
                    ran = launch(job, nproc=plan.world, log_dir=Path(folder), timeout_s=120)
                failed += not ran.equal
                mean = f"{ran.rounds.mean:.2f} a round  " if ran.rounds else ""
                print(
                    f"{at.describe():<48} {mean}{precision} {name:<8} {'equal' if ran.equal else 'DIFFERS'} "
                    f"margin {ran.max_difference:.1e}  a token {ran.decode_s * 1e3:.3f} ms, "
                    f"prefill {ran.prefill_s * 1e3:.3f} ms, peak {max(ran.peak_bytes) / 2**20:.1f} MiB"
                    + (f"  as the exact model's {ran.drift['equal']:.1%}" if ran.drift else ""),
                    flush=True,
                )
    print(f"{failed} differ" if failed else "all equal")
    return 6 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
