"""A plan beside the one that the rule of thumb writes: what choosing it has gained, predicted and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.report.bands import interval, within
from autotune.report.explain import explain_versus
from autotune.report.explanation import Section
from autotune.report.units import percent, seconds, size
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction


@dataclass(frozen=True)
class Measured:
    """Seconds of a step of the plan and of the rule's, None where not known; `source`: what told both, or why there
    are not both."""

    step_s: float | None
    thumb_s: float | None
    source: str

    @property
    def gain(self) -> float | None:
        """How much longer the rule's plan takes than the plan, as a fraction."""
        return self.thumb_s / self.step_s - 1 if self.step_s and self.thumb_s else None


def thumb_section(rule: str, best: Prediction, thumb: Prediction | None, measured: Measured) -> Section:
    """Key "rule_of_thumb". `rule` says what the rule is, `thumb` is None where it leads to nothing that fits."""
    title, facts = "Against the rule of thumb", {"rule": rule}
    if thumb is None:
        nothing = (f"rule: {rule}", "it leads to no plan that fits here")
        return Section("rule_of_thumb", title, nothing, {**facts, "plan_id": None, "gain": None, "measured_gain": None})
    gain = thumb.step_s / best.step_s - 1
    told: dict[str, Any] = {
        **facts,
        "plan_id": thumb.plan.id,
        "plan": thumb.plan.to_dict(),
        "step_s": thumb.step_s,
        **interval(thumb.bands.get("step_s")),
        "peak_bytes": max(thumb.peak_bytes, default=0),
        "gain": gain,
        "measured_step_s": measured.step_s,
        "measured_thumb_s": measured.thumb_s,
        "measured_gain": measured.gain,
        "measured_source": measured.source,
    }
    if thumb.plan == best.plan:
        return Section("rule_of_thumb", title, (f"rule: {rule}", "it writes this very plan: nothing is gained"), told)
    apart = explain_versus(best, thumb).sections[0].facts["axes"]
    axes = ", ".join(f"{axis} {_short(mine)} instead of {_short(other)}" for axis, (mine, other) in apart.items())
    time = within(thumb.step_s, thumb.bands.get("step_s"), seconds)
    peak = within(max(thumb.peak_bytes), thumb.bands.get("peak_bytes"), size)
    text = (
        f"rule: {rule}",
        f"{thumb.plan.id}  {thumb.plan.describe()}: {time}, peak {peak}",
        f"predicted gain: {_gain(gain)} ({seconds(best.step_s)} instead of {seconds(thumb.step_s)})",
        _measured(measured),
        f"this plan has {axes}",
    )
    return Section("rule_of_thumb", title, text, told)


def _gain(gain: float) -> str:
    """What the rule's plan takes more, in words."""
    if abs(gain) < 5e-4:
        return "none"
    return f"{percent(gain)} faster" if gain > 0 else f"none, it is {percent(1 / (1 + gain) - 1)} slower"


def _measured(measured: Measured) -> str:
    if measured.gain is None or measured.step_s is None or measured.thumb_s is None:
        return f"measured gain: unknown, {measured.source}"
    told = f"{seconds(measured.step_s)} instead of {seconds(measured.thumb_s)}"
    return f"measured gain: {_gain(measured.gain)} ({told}, {measured.source})"


def _short(value: object) -> object:
    text = str(value)
    return value if text and len(text) <= 24 and "\n" not in text else "another" if text else "the default"


def pins(plan: Plan) -> str:
    """The options that make a command take the plan: each axis that is not as by default, and one that is where there
    is no other, since without any the locked plan would be taken. Not data, which fills the devices."""
    usual = Plan().to_dict()
    named = {axis: value for axis, value in plan.to_dict().items() if axis == "tensor" or value != usual[axis]}
    named.pop("data", None)
    texts = {axis: str(value).lower() if isinstance(value, bool) else str(value) for axis, value in named.items()}
    return " ".join(f"--pin {axis}={text}" for axis, text in texts.items())
