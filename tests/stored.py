"""What tests of the plan database put into it."""

from __future__ import annotations

from dataclasses import replace

from autotune.spec.machine import Device, Host, Interference, Link, Profile, Sample
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question
from autotune.spec.work import Collective, Matmul
from autotune.spec.workload import Workload

DENSE = ModelSpec("tiny", "LlamaForCausalLM", 64, 2, 4, 2, 16, 128, 256)


SPARSE = replace(
    DENSE,
    name='Modèle "d\'ours" 🐻; DROP TABLE plans',
    rope_scaling=(("factor", 8.0), ("rope_type", "llama3")),
    experts=Experts(8, 2, 32, dense_layers=(0, 3)),
    latent=LatentAttention(0, 16, 8, 8, 16),
)


WORK = Workload(sequence_length=128, global_batch=8, precision="fp32")


def machine(name: str = "box", **changes: object) -> Profile:
    profile = Profile(
        name=name,
        grade="measured",
        fingerprint=f"print-of-{name}",
        device=Device("cpu", "cpu", 2, 1 << 34, 2e10, {"fp32": 1e11}, cores=2),
        host=Host(2, 1 << 34, 2e10, {"fp32": 1e11}),
        links=(Link("shared-memory", 0, 1e9, 1e-5),),
        samples=(
            Sample(Matmul(8, 64, 64, "fp32"), 1e-6, runs=5, spread=0.1),
            Sample(Collective("all_reduce", 64, 2), 1e-4),
        ),
        interference=(Interference(1.1, 1.2, 2),),
        coefficients={"launch_seconds": 1e-6},
        software={"torch": "2.13.0"},
        sources={"coefficients.launch_seconds": "probe"},
        created="2026-01-02T03:04:05+00:00",
    )
    return replace(profile, **changes)  # type: ignore[arg-type]


def question(**changes: object) -> Question:
    asked = Question(DENSE, WORK, machine(), devices=4, axes={"tensor": (1, 2), "schedule": ("1f1b",)})
    return replace(asked, **changes)  # type: ignore[arg-type]


def prediction(plan: Plan, step_s: float) -> Prediction:
    return Prediction(
        plan=plan,
        step_s=step_s,
        tokens_per_s=1024 / step_s,
        peak_bytes=(100, 90),
        memory=({"weights": 60, "activations": 40}, {"weights": 90}),
        breakdown={"matmul": step_s / 2, "collective": step_s / 3},
        grades={"measured": 0.75, "interpolated": 0.25},
        prefill_s=0.5,
    )


def batch(count: int, start: int = 1) -> list[Prediction]:
    return [prediction(Plan(micro_batch=i), 1.0 + 1 / i) for i in range(start, start + count)]
