"""What launches cost, in a table by batch, and what a trace of real kernels says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from autotune.planners.launches import Launches, Phase
from autotune.report.explanation import Explanation, Section, table
from autotune.report.units import percent, seconds
from autotune.spec.kernel_trace import KernelTrace
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.words import counted

HEADING = ("batch", "launches", "host", "device", "launch and queue", "by the host", "captured")


def explain_launches(
    plan: Plan, profile: Profile, found: Sequence[Launches], traced: tuple[str, KernelTrace] | None = None
) -> Explanation:
    """Key "launches" with a section's facts for each kind of pass, and "traced" where a trace was read; `traced`: its
    name and what it says."""
    kinds = [_kind(each, profile) for each in found]
    facts = {"passes": [_facts(each, profile) for each in found], "captures": not profile.inline}
    lines = tuple(line for text in kinds for line in text)
    sections = [
        Section("launches", "Who is waited for, host or device, by sequences at a time (predicted)", lines, facts)
    ]
    if traced:
        sections.append(_traced(*traced))
    return Explanation(f"{plan.describe()} on {profile.name}: launches", tuple(sections))


def _kind(found: Launches, profile: Profile) -> list[str]:
    captured = not profile.inline
    cut = len(HEADING) - (not captured)
    rows = [HEADING[:cut], *(_row(phase, captured)[:cut] for phase in found.swept)]
    own = found.own
    lines = [f"{found.name}:", *(f"  {row}" for row in table(rows)), f"  {_turn(found)}"]
    here = f"at this plan's {counted(own.batch, 'sequence')} "
    if captured:
        lines.append(
            f"  {here}capturing it in a graph gains {percent(own.gain)} ({seconds(own.eager_s - own.device_s)})"
        )
    else:
        lost = own.eager_s - own.device_s
        lines.append(f"  {here}handing over takes {seconds(lost)} of {seconds(own.eager_s)}: a processor has no graphs")
    return lines


def _row(phase: Phase, captured: bool) -> tuple[str, ...]:
    times = (phase.host_s, phase.device_s, phase.queue_s, phase.eager_s)
    gain = f"{percent(phase.gain)} faster" if phase.gain >= 5e-4 else "no faster"
    return (str(phase.batch), f"{phase.launches}", *map(seconds, times), gain)


def _turn(found: Launches) -> str:
    if found.turn is None:
        return f"launch-bound at every batch that can run, {found.last} at most"
    if found.turn == 1:
        return "never launch-bound: one sequence takes the device longer than the host"
    return f"launch-bound below {counted(found.turn, 'sequence')} at a time: from there on the device is waited for"


def _facts(found: Launches, profile: Profile) -> dict[str, Any]:
    rows = [_figures(phase, profile) for phase in found.swept]
    own = _figures(found.own, profile)
    return {"name": found.name, "turn": found.turn, "largest": found.last, "own": own, "batches": rows}


def _figures(phase: Phase, profile: Profile) -> dict[str, Any]:
    gain = None if profile.inline else phase.gain
    return asdict(phase) | {"launch_bound": phase.launch_bound, "capture_gain": gain}


def _traced(name: str, trace: KernelTrace) -> Section:
    mean, kernel = trace.queue_s / trace.calls, trace.kernel_s / trace.kernels
    text = (
        f"{name}: {counted(trace.kernels, 'kernel')} of {counted(trace.calls, 'call')} in {seconds(trace.span_s)}",
        f"launch and queue time {seconds(trace.queue_s)}, {seconds(mean)} a call",
        f"the calls take {seconds(trace.call_s)} of the host",
        f"a kernel runs {seconds(kernel)} on average; the device is idle {percent(trace.idle)} of the time",
        f"so a graph, or kernels joined, can gain {percent(trace.most_gain)} at most",
    )
    return Section(
        "traced",
        "As a trace has it (measured)",
        text,
        asdict(trace) | {"idle": trace.idle, "most_gain": trace.most_gain},
    )
