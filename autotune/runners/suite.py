"""Predicted against measured over a stated list of plans: `python -m autotune.runners.suite SUITE [--profile FILE]`.

Plan by plan, the operations that it is made of are measured, a prediction is made, and the plan runs; `--repeats` of
this alternate, since a shared machine's speed drifts from minute to minute, and the medians count. No plan's own step
time is ever used. Prints a Markdown table with signed errors, then mean and worst, and writes the rows as JSON where
`--out` says. Under `torchrun --nproc-per-node 1` all plans of one device run in this process, which saves starting one
for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.profiles_db.profile_file import dump_profile, load_profile
from autotune.runners.here import refine_for
from autotune.runners.job import Job, RunResult
from autotune.runners.launch import launch
from autotune.spec.errors import AutotuneError
from autotune.spec.families import load_model
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload


@dataclass(frozen=True)
class Suite:
    """Plans of one model and workload."""

    model: ModelSpec
    workload: Workload
    plans: tuple[Plan, ...]
    device: str
    steps: int = 5
    check: bool = False  # whether each run is compared with the one-process reference too


def _small() -> ModelSpec:
    return ModelSpec("llama-7m", "LlamaForCausalLM", 256, 6, 8, 4, 32, 768, 256, tied=True)


def _other() -> ModelSpec:
    return ModelSpec("qwen-4m", "Qwen3ForCausalLM", 192, 8, 6, 2, 32, 640, 512, qk_norm=True)


def _models() -> Path:
    return Path(__file__).resolve().parents[2] / "recipes" / "models"


def _llama_1b() -> ModelSpec:
    return load_model(_models() / "meta-llama--Llama-3.2-1B.json")


def suites() -> dict[str, Suite]:
    """The suites by name: small models on two CPU workers, the Llama-3.2-1B shape on one and two GPUs."""
    cpu = Workload(sequence_length=256, global_batch=16, precision="fp32")
    gpu = Workload(sequence_length=4096, global_batch=16, precision="bf16")
    one = tuple(
        Plan(micro_batch=m, recompute=r, attention=a)
        for m, r, a in (
            (1, "none", "cudnn"),
            (2, "none", "cudnn"),
            (4, "none", "cudnn"),
            (8, "none", "cudnn"),
            (4, "selective", "cudnn"),
            (8, "selective", "cudnn"),
            (16, "selective", "cudnn"),
            (4, "full", "cudnn"),
            (16, "full", "cudnn"),
            (4, "none", "flash"),
            (2, "full", "flash"),
            (4, "none", "efficient"),
        )
    )
    two = (
        Plan(data=2, micro_batch=4, attention="cudnn"),
        Plan(data=2, micro_batch=4, attention="cudnn", zero=1),
        Plan(data=2, micro_batch=2, attention="cudnn", recompute="selective", zero=1),
        Plan(tensor=2, micro_batch=4, attention="cudnn"),
        Plan(tensor=2, micro_batch=4, attention="cudnn", sequence_parallel=True),
        Plan(tensor=2, micro_batch=8, attention="cudnn", sequence_parallel=True, recompute="selective"),
        Plan(pipeline=2, micro_batch=2, attention="cudnn"),
        Plan(pipeline=2, micro_batch=1, attention="cudnn"),
        Plan(pipeline=2, micro_batch=2, attention="cudnn", schedule="gpipe"),
        Plan(pipeline=2, micro_batch=2, attention="cudnn", schedule="interleaved-1f1b", chunks=2),
        Plan(pipeline=2, micro_batch=1, attention="cudnn", schedule="interleaved-1f1b", chunks=4),
        Plan(pipeline=2, micro_batch=2, attention="cudnn", recompute="full"),
    )
    here = (
        Plan(micro_batch=2),
        Plan(micro_batch=4),
        Plan(micro_batch=8),
        Plan(micro_batch=16),
        Plan(micro_batch=4, recompute="selective"),
        Plan(micro_batch=8, recompute="full"),
        Plan(data=2, micro_batch=2),
        Plan(data=2, micro_batch=8, zero=1),
        Plan(data=2, micro_batch=4, recompute="full"),
        Plan(tensor=2, micro_batch=4),
        Plan(tensor=2, micro_batch=8, sequence_parallel=True),
        Plan(pipeline=2, micro_batch=2),
        Plan(pipeline=2, micro_batch=4, schedule="gpipe"),
        Plan(pipeline=2, micro_batch=2, schedule="interleaved-1f1b", chunks=2),
    )
    held_out = (
        Plan(micro_batch=4),
        Plan(micro_batch=16, recompute="selective"),
        Plan(micro_batch=8, recompute="full"),
        Plan(data=2, micro_batch=4, zero=1),
        Plan(data=2, micro_batch=16),
        Plan(tensor=2, micro_batch=8, recompute="selective"),
        Plan(tensor=2, micro_batch=16, sequence_parallel=True),
        Plan(pipeline=2, micro_batch=4),
        Plan(pipeline=2, micro_batch=4, schedule="interleaved-1f1b", chunks=4),
        Plan(pipeline=2, micro_batch=8, schedule="gpipe", recompute="full"),
    )
    other = Workload(sequence_length=128, global_batch=32, precision="fp32")
    alike = (Plan(micro_batch=4, attention="cudnn"), Plan(micro_batch=8, attention="cudnn", recompute="selective"))
    shorter = Workload(sequence_length=2048, global_batch=32, precision="bf16")
    longer = Workload(sequence_length=8192, global_batch=8, precision="bf16")
    apart = (Plan(micro_batch=2, attention="cudnn"), Plan(micro_batch=4, attention="flash", recompute="full"))
    # Eight sequences one after another, and together: the suite measures one round of each.
    answers = Workload(kind="generate", prompt_length=512, new_tokens=64, batch=8, precision="bf16")
    rounds = (Plan(micro_batch=1), Plan(micro_batch=8))
    # One device holds every stage: what splitting the backward and moving activations to the host cost and give.
    alone = tuple(
        Plan(micro_batch=1, attention="cudnn", schedule=s, chunks=c, offload=o)
        for s, c, o in (
            ("1f1b", 1, 0),
            ("zb-h1", 1, 0),
            ("gpipe", 1, 0),
            ("gpipe", 1, 50),
            ("gpipe", 1, 100),
            ("breadth-first", 4, 0),
            ("breadth-first", 4, 100),
        )
    )
    eight = Workload(sequence_length=4096, global_batch=8, precision="bf16")
    # Several ranks share a device, whose messages go through the host: correct, and as large as predicted; no speed.
    wide = ModelSpec("llama-128k", "LlamaForCausalLM", 1024, 8, 16, 8, 64, 2816, 131072)
    shared = tuple(
        Plan(pipeline=p, schedule=s, chunks=c, vocabulary=v, offload=o, attention="cudnn")
        for p, s, c, v, o in (
            (2, "1f1b", 1, "ends", 0),
            (2, "zb-h1", 1, "ends", 0),
            (2, "v-half", 2, "ends", 0),
            (2, "dualpipe-v", 2, "ends", 100),
            (2, "chimera", 1, "ends", 0),
            (2, "1f1b", 1, "vocab-2", 0),
            (4, "zb-v", 2, "ends", 0),
            (4, "1f1b", 1, "vocab-1", 0),
            (2, "v-half", 2, "vocab-2", 0),
            (2, "dualpipe", 1, "vocab-2", 0),
            (2, "1f1b", 1, "interlaced", 0),
        )
    )
    shared += tuple(
        Plan(tensor=2, pipeline=2, vocabulary="vocab-2", sequence_parallel=s, attention="cudnn") for s in (False, True)
    )
    short = Workload(sequence_length=1024, global_batch=8, precision="bf16")
    return {
        "h200-alone": Suite(_llama_1b(), eight, alone, "cuda"),
        "h200-shared": Suite(wide, short, shared, "cuda", steps=2, check=True),
        "cpu": Suite(_small(), cpu, here, "cpu"),
        "cpu-held-out": Suite(_other(), other, held_out, "cpu"),
        "h200": Suite(_llama_1b(), gpu, one, "cuda"),
        "h200-qwen3": Suite(load_model(_models() / "Qwen--Qwen3-0.6B.json"), shorter, alike, "cuda"),
        "h200-qwen2.5": Suite(load_model(_models() / "Qwen--Qwen2.5-0.5B.json"), longer, apart, "cuda"),
        "h200-generate-1b": Suite(_llama_1b(), answers, rounds, "cuda", steps=1),
        "h200-generate-8b": Suite(load_model(_models() / "meta-llama--Llama-3.1-8B.json"), answers, rounds, "cuda", 1),
        "cpu-generate": Suite(
            _small(), replace(answers, prompt_length=64, new_tokens=16, precision="fp32"), rounds, "cpu"
        ),
        "h200x2": Suite(_llama_1b(), gpu, two, "cuda"),
    }


def run_suite(
    suite: Suite,
    profile_for: Callable[[Plan], Profile],
    repeats: int = 1,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """A row a plan: predicted and measured step seconds and peak bytes; a plan that fails says why.

    `profile_for(plan)` gives the profile that a prediction is made with; it is asked before each of the `repeats`.
    """
    rows: list[dict[str, Any]] = []
    for plan in suite.plans:
        if reason := why_not(suite.model, suite.workload, plan):
            raise SystemExit(f"{plan.describe()}: {reason}")
        row: dict[str, Any] = {"plan": plan.describe(), "predictions": [], "steps": []}
        for _ in range(repeats):
            profile = profile_for(plan)
            said = Predictor(suite.model, suite.workload, profile).predict(plan)
            try:
                ran = _ran(suite, plan, profile)
            except AutotuneError as error:
                row["failed"] = error.message
                break
            row["predictions"].append(said.step_s)
            row["steps"] += ran.step_s
            row |= {
                "predicted_s": statistics.median(row["predictions"]),
                "measured_s": statistics.median(row["steps"]),
                "predicted": max(said.peak_bytes),
                "measured": max(ran.peak_bytes),
                "predicted_prefill_s": said.prefill_s,
                "predicted_decode_s": said.decode_s,
                "prefill_s": ran.prefill_s,
                "decode_s": ran.decode_s,
                "mfu": ran.mfu,
                "differs": ran.max_difference,
                "loss": ran.losses[-1] if ran.losses else None,
                "predicted_kinds": dict(said.breakdown),
                "ops": by_op(said.timeline, ran.timeline),
            }
            gc.collect()  # where a trainer lived in this process, its cycles must not count in the next peak
        rows.append(row)
        print(line(row), flush=True)
        if out:  # row by row: an interrupted suite keeps what it measured
            out.write_text(json.dumps(rows, indent=1))
    return rows


def _ran(suite: Suite, plan: Plan, profile: Profile) -> RunResult:
    peak = profile.device.peak_flops.get(suite.workload.precision, 0.0)
    job = Job(
        plan, suite.model, suite.workload, steps=suite.steps, device=suite.device, peak_flops=peak, check=suite.check
    )
    with tempfile.TemporaryDirectory() as folder:
        return launch(job, nproc=plan.world, log_dir=Path(folder), timeout_s=300)


def by_op(predicted: Any, measured: Any) -> dict[str, list[float]]:
    """Mean seconds of each operation, predicted and measured: where an error comes from."""
    found: dict[str, list[list[float]]] = {}
    for which, timeline in enumerate((predicted, measured)):
        for span in timeline.spans:
            i = timeline.instruction(span)
            found.setdefault(f"{i.stage}{i.op}", [[], []])[which].append(span.end - span.start)
    return {k: [statistics.fmean(a) if a else 0.0, statistics.fmean(b) if b else 0.0] for k, (a, b) in found.items()}


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['plan']} | failed: {row['failed'][:160]} |"
    time, memory = row["predicted_s"] / row["measured_s"] - 1, row["predicted"] / row["measured"] - 1
    more = [f"{row['mfu']:.1%}"] if row["mfu"] else []
    for name in ("prefill_s", "decode_s"):
        if row[name]:
            said, ran = row[f"predicted_{name}"], row[name]
            more.append(f"{name[:-2]} {said * 1e3:.2f} / {ran * 1e3:.2f} ms {said / ran - 1:+.1%}")
    if row.get("differs") is not None:
        more.append(f"differs {row['differs']:.4f}")
    return (
        f"| {row['plan']} | {row['predicted_s'] * 1e3:.1f} | {row['measured_s'] * 1e3:.1f} | {time:+.1%} | "
        f"{row['predicted'] / 2**20:.0f} | {row['measured'] / 2**20:.0f} | {memory:+.1%} | {', '.join(more)} |"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m autotune.runners.suite", description=__doc__)
    parser.add_argument("suite", choices=sorted(suites()))
    parser.add_argument("--profile", required=True, type=Path, help="the machine's profile (autotune profile --out)")
    parser.add_argument("--out", type=Path, help="where the rows go as JSON")
    parser.add_argument("--refined", type=Path, help="where the refined profile goes (GPU suites)")
    parser.add_argument("--seconds-each", type=float, default=0.1, help="time for measuring one operation")
    parser.add_argument("--plans", help="these plans alone, by number from 0, e.g. 0,3,9")
    parser.add_argument("--repeats", type=int, default=0, help="rounds of measuring and running (CPU: 3, GPU: 1)")
    asked = parser.parse_args(arguments)
    suite = suites()[asked.suite]
    if asked.plans:
        suite = replace(suite, plans=tuple(suite.plans[int(number)] for number in asked.plans.split(",")))
    question = Question(suite.model, suite.workload, load_profile(asked.profile), 0)
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    if suite.device == "cpu":
        profile_for = lambda plan: refine_for(question, [plan], say, asked.seconds_each)  # noqa: E731
    else:
        # Ranks that share a device are judged by their memory and their numbers: nothing need be timed for that.
        refined = question.profile if suite.check else refine_for(question, suite.plans, say, asked.seconds_each)
        profile_for = lambda plan: refined  # noqa: E731
        if asked.refined:
            dump_profile(refined, asked.refined)
    print("| plan | predicted ms | measured ms | error | predicted MiB | measured MiB | error | MFU, or parts |")
    print("|---|---|---|---|---|---|---|---|")
    rows = run_suite(suite, profile_for, asked.repeats or (3 if suite.device == "cpu" else 1), asked.out)
    good = [r for r in rows if "measured_s" in r]
    summed = {
        "step time": ("predicted_s", "measured_s"),
        "peak memory": ("predicted", "measured"),
        "prefill": ("predicted_prefill_s", "prefill_s"),
        "a decoded token": ("predicted_decode_s", "decode_s"),
    }
    for name, (a, b) in summed.items():
        errors = [r[a] / r[b] - 1 for r in good if r[b]]
        if errors:
            print(f"{name}: mean {statistics.fmean(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
