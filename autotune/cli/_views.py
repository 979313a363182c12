"""Answers as lines of text and as JSON values: searches, predictions and runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from autotune.cli import _output as out
from autotune.report.bands import interval, level, pools, short, span, verdict, within
from autotune.report.units import percent, seconds, signed, size
from autotune.spec.lock import answer, bands_of, why_lost
from autotune.spec.plan import Plan
from autotune.spec.prediction import Found, Prediction
from autotune.spec.words import counted
from autotune.spec.workload import Workload

if TYPE_CHECKING:
    from autotune.profiles_db.records import PlanEntry, RunEntry

TOP = 5  # plans of a ranking that are listed


def moment(stored: str) -> str:
    """A time of the plan database (ISO-8601 UTC) to read: `2026-11-30 07:12 UTC`."""
    return f"{stored[:10]} {stored[11:16]} UTC"


def rate(tokens_per_s: float) -> str:
    """`12.3 k tokens/s`."""
    for scale, unit in ((1e6, "M "), (1e3, "k ")):
        if tokens_per_s >= scale:
            return f"{tokens_per_s / scale:.4g} {unit}tokens/s"
    return f"{tokens_per_s:.4g} tokens/s"


def unit_of(workload: Workload) -> str:
    """What one `step_s` is of."""
    return "a step" if workload.kind == "train" else "a generation"


def rests_on(grades: Mapping[str, float]) -> str:
    """`measured 90 %, datasheet 10 %`: the grades that a prediction's time rests on."""
    shares = sorted(((share, grade) for grade, share in grades.items() if share >= 0.0005), reverse=True)
    return ", ".join(f"{grade} {percent(share)}" for share, grade in shares) or "nothing measured"


def predicted_line(prediction: Prediction, workload: Workload) -> str:
    """One line: time, rate, memory of the worst rank, each with its band."""
    bands, peak = prediction.bands, max(prediction.peak_bytes, default=0)
    parts = [f"{within(prediction.step_s, bands.get('step_s'), seconds)} {unit_of(workload)}"]
    parts.append(rate(prediction.tokens_per_s))
    if prediction.decode_s:
        first = within(prediction.prefill_s, bands.get("prefill_s"), seconds)
        then = within(prediction.decode_s, bands.get("decode_s"), seconds)
        parts.append(f"prefill {first}, then {then} a token")
    return ", ".join([*parts, f"peak {within(peak, bands.get('peak_bytes'), size)} a device"])


def bands_lines(prediction: Prediction) -> Iterator[str]:
    """What the bands were made from."""
    if told := pools(prediction):
        yield f"bands      {told}"


def reasons(infeasible: Mapping[str, int]) -> Iterator[str]:
    """Why structures were infeasible, the most frequent first."""
    for reason, count in sorted(infeasible.items(), key=lambda item: (-item[1], item[0])):
        yield f"  {count:>7} infeasible: {reason}"


def change_lines(plan: Plan) -> Iterator[str]:
    """What of a plan changes results."""
    return (f"CHANGES    {line}" for line in plan.changes)


def found_lines(found: Found) -> Iterator[str]:
    """A search's answer for people."""
    best, space, work = found.best, found.space, found.question.workload
    yield f"plan       {best.plan.id}  {best.plan.describe()}"
    yield from change_lines(best.plan)
    yield f"predicted  {predicted_line(best, work)}"
    yield f"           on {found.question.profile.name}; its time rests on prices that are {rests_on(best.grades)}"
    yield from bands_lines(best)
    if best.plan.id in found.measured:
        measured = found.measured[best.plan.id]
        off = signed(best.step_s / measured - 1)
        inside = f", {verdict(best.bands['step_s'].holds(measured))} its band" if "step_s" in best.bands else ""
        yield f"measured   {seconds(measured)} {unit_of(work)}: the prediction is off by {off}{inside}"
    gap = found.bound.gap
    if gap is None:
        yield "bound      gap unknown: the search stopped before all plans were bounded"
    elif found.finished:
        yield (
            f"bound      {seconds(found.bound.step_s)}: no plan in this space can be more than "
            f"{percent(max(gap, 0.0))} faster under this model"
        )
    else:
        yield f"bound      {seconds(found.bound.step_s)}, gap {percent(gap)}: the search stopped before closing it"
    unseen = f"; {space.unseen} choices of the outer axes were not looked at" if space.unseen else ""
    yield f"space      {space.structures} structures, {space.feasible} feasible{unseen}"
    yield from reasons(space.infeasible)
    yield f"evaluated  {found.bounded} bounded, {found.simulated} simulated, {len(found.measured)} measured"


def ranking_lines(found: Found) -> list[str]:
    """The best plans as a table, each with what it loses on."""
    step = found.best.bands.get("step_s")
    at = f" ({level(step)})" if step else ""
    rows = [("", "plan", "axes", f"predicted{at}", "measured", f"peak{at}", "why it lost")]
    for place, row in enumerate(found.ranking[:TOP], 1):
        measured = found.measured.get(row.plan.id)
        lost = why_lost(found.best, row, found.measured) if place > 1 else ""
        told = seconds(measured) if measured else "-"
        said = short(row.step_s, row.bands.get("step_s"), seconds)
        peak = short(max(row.peak_bytes, default=0), row.bands.get("peak_bytes"), size)
        rows.append((str(place), row.plan.id, row.plan.describe(), said, told, peak, lost))
    return out.table(rows, right=(0, 3, 4, 5))


def found_json(found: Found, lock: str | None) -> dict[str, Any]:
    """The fields of `search --json`."""
    best = found.best
    return {
        "plan": best.plan.to_dict(),
        "plan_id": best.plan.id,
        "changes": list(best.plan.changes),
        "predicted": answer(best),
        "measured": {"step_s": found.measured.get(best.plan.id)},
        "bound": {"step_s": found.bound.step_s, "gap": found.bound.gap, "closed": found.finished},
        "space": {
            "structures": found.space.structures,
            "feasible": found.space.feasible,
            "unseen": found.space.unseen,
            "infeasible": dict(found.space.infeasible),
        },
        "evaluated": {"bounded": found.bounded, "simulated": found.simulated, "measured": len(found.measured)},
        "ranking": [
            {
                "plan": row.plan.to_dict(),
                "plan_id": row.plan.id,
                "step_s": row.step_s,
                **interval(row.bands.get("step_s")),
                "measured_s": found.measured.get(row.plan.id),
                "peak_bytes": list(row.peak_bytes),
                "reason": why_lost(best, row, found.measured) if row is not best else "",
            }
            for row in found.ranking[:20]
        ],
        "machine": {"name": found.question.profile.name, "grade": found.question.profile.grade},
        "devices": found.question.devices,
        "lock": lock,
    }


def prediction_lines(prediction: Prediction, workload: Workload) -> Iterator[str]:
    """A prediction in full: where the time goes, what each rank holds, how long it idles."""
    whole = sum(prediction.breakdown.values()) or 1.0
    yield f"plan       {prediction.plan.id}  {prediction.plan.describe()}"
    yield from change_lines(prediction.plan)
    yield f"predicted  {predicted_line(prediction, workload)}"
    yield f"           from times that are {rests_on(prediction.grades)}"
    yield from bands_lines(prediction)
    if prediction.timeline:
        yield f"idle share {percent(prediction.timeline.idle_share)} of all ranks' compute"
    yield "time of the slowest rank"
    parts = sorted(prediction.breakdown.items(), key=lambda item: -item[1])
    yield from out.table([(f"  {k}", seconds(v), percent(v / whole)) for k, v in parts if v > 0], right=(1, 2))
    yield "memory at its peak, by rank of the pipeline"
    kinds = sorted({kind for rank in prediction.memory for kind in rank})
    rows = [("  rank", *kinds, "all")]
    for rank, parts_of in enumerate(prediction.memory):
        rows.append((f"  {rank}", *(size(parts_of.get(k, 0)) for k in kinds), size(sum(parts_of.values()))))
    yield from out.table(rows, right=range(1, len(kinds) + 2))


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """The fields of `simulate --json`."""
    return {
        "plan": prediction.plan.to_dict(),
        "plan_id": prediction.plan.id,
        "changes": list(prediction.plan.changes),
        "predicted": answer(prediction),
        "memory": [dict(rank) for rank in prediction.memory],
        "idle_share": prediction.timeline.idle_share if prediction.timeline else None,
    }


def run_lines(report: Mapping[str, Any], workload: Workload) -> Iterator[str]:
    """A run's figures beside the prediction's. `report` is the content of `run --json`."""
    measured, predicted, error = report["measured"], report["predicted"], report["error"]
    yield f"plan       {report['plan_id']}"
    yield from (f"CHANGES    {line}" for line in report["changes"])
    said, fallen = predicted or {}, report.get("inside") or {}
    bands = bands_of(said)
    rests = next((f"{level(band)}, {band.rests_on}" for figure, band in bands.items() if figure == "step_s"), "band")
    rows: list[tuple[str, ...]] = [("", "predicted", "measured", "error", rests, "")]

    def row(name: str, key: str, form: Any, found: float | None, said: float | None) -> None:
        told = [form(said) if said else "-", form(found) if found else "-", _signed(error.get(key))]
        expected = span(said, bands.get(key), form) if said else ""
        rows.append((name, *told, expected or "-", verdict(fallen.get(key))))

    row(f"time of {unit_of(workload)}", "step_s", seconds, measured["step_s"], said.get("step_s"))
    row("tokens/s", "tokens_per_s", rate, measured["tokens_per_s"], said.get("tokens_per_s"))
    if measured.get("decode_s"):
        row("prefill", "prefill_s", seconds, measured["prefill_s"], said.get("prefill_s"))
        row("a token", "decode_s", seconds, measured["decode_s"], said.get("decode_s"))
    peaks, guess = measured["peak_bytes"], said.get("peak_bytes") or [0]
    row("peak memory", "peak_bytes", size, max(peaks, default=0), max(guess))
    yield from out.table(rows, right=(1, 2, 3, 4))
    all_steps, launches = measured["step_s_all"], counted(len(measured["launches"]), "launch", "launches")
    yield (
        f"steps      {len(all_steps)} in {launches}: median {seconds(median(all_steps))}, "
        f"from {seconds(min(all_steps))} to {seconds(max(all_steps))}, spread {percent(measured['spread'])}"
    )
    yield "memory     " + ", ".join(f"rank {rank} {size(value)}" for rank, value in enumerate(peaks))
    if measured["mfu"]:
        yield f"MFU        {percent(measured['mfu'])} of the best matrix product"
    if rounds := measured.get("rounds"):
        kept = " ".join(f"{rate:.2f}" for rate in rounds["rates"])
        expected = f" (expected {rounds['expected']:.2f})" if rounds["expected"] else ""
        yield f"rounds     {rounds['tokens']:.2f} tokens each{expected} in {seconds(rounds['round_s'])}; kept: {kept}"
    losses = measured["losses"]
    if losses:
        yield f"loss       {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
    if report.get("equal") is not None:
        if drift := report.get("drift"):
            some = f"{drift['differing']:g} of {drift['answers']:g} answers differ, the first other token after"
            told = f"mean log-probability {drift['log_p']:.3f}, without {drift['plain_log_p']:.3f}"
            shared = f"{percent(drift['equal'])} of tokens are as without the change"
            yield f"drift      {shared}; {some} {drift['first']:g}; {told}"
        said_so = "equal to" if report["equal"] else "NOT equal to"
        yield f"check      {said_so} the one-process reference, largest difference {report['max_difference']:.3g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else signed(value)


def plan_entry_rows(entries: Sequence[PlanEntry]) -> list[tuple[str, ...]]:
    """Stored plans as rows with a heading."""
    rows: list[tuple[str, ...]] = [("plan", "axes", "model", "work", "devices", "predicted", "measured", "runs")]
    for entry in entries:
        predicted = seconds(entry.predicted_s) if entry.predicted_s is not None else "-"
        measured = seconds(entry.measured_s) if entry.measured_s is not None else "-"
        axes = entry.plan.describe()
        rows.append(
            (entry.id, axes, entry.model, entry.workload, str(entry.devices), predicted, measured, str(entry.runs))
        )
    return rows


def left_out(shown: int, of_top: int, whole: int, limit: int) -> str:
    """How many of `whole` stored plans a list of `shown` lacks, and which options show them.

    `of_top` is how many --top alone leaves, `limit` the most that are listed now.
    """
    options = ["--top 0"] * (whole > of_top) + [f"--limit {whole}"] * (whole > limit)
    missing = whole - shown
    return f"{counted(missing, 'more plan is', 'more plans are')} stored: add {' '.join(options)}"


def plan_entry_json(entry: PlanEntry) -> dict[str, Any]:
    return {
        "plan_id": entry.id,
        "plan": entry.plan.to_dict(),
        "changes": list(entry.plan.changes),
        "model": entry.model,
        "workload": entry.workload,
        "devices": entry.devices,
        "predicted_s": entry.predicted_s,
        "measured_s": entry.measured_s,
        "peak_bytes": list(entry.peak_bytes),
        "runs": entry.runs,
    }


def run_entry_rows(runs: Sequence[RunEntry]) -> list[tuple[str, ...]]:
    """Stored runs as rows with a heading."""
    rows: list[tuple[str, ...]] = [("run", "started", "model", "predicted", "measured", "error", "band", "status")]
    for run in runs:
        said, found = run.prediction.step_s if run.prediction else None, run.step_s
        error = signed(said / found - 1) if said and found else "-"
        band = bands_of(run.facts.get("predicted", {})).get("step_s")
        told = (within(said, band, seconds) if said else "-", seconds(found) if found else "-")
        fallen = verdict(band.holds(found) if band and found else None)
        rows.append((run.id, run.started[:19], run.model.name, *told, error, fallen, run.status))
    return rows


def run_entry_json(run: RunEntry) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "status": run.status,
        "started": run.started,
        "model": run.model.name,
        "predicted_s": run.prediction.step_s if run.prediction else None,
        **interval(bands_of(run.facts.get("predicted", {})).get("step_s")),
        "step_s": run.step_s,
        "launches": [list(launch.steps) for launch in run.launches],
        "tokens_per_s": run.tokens_per_s,
        "peak_bytes": list(run.peak_bytes),
        "mfu": run.mfu,
        "losses": list(run.losses),
        "equal": run.equal,
        "max_difference": run.max_difference,
        "error": run.error,
    }
