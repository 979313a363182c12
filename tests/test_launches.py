"""Launches: closed forms of the queue, the batch where a model stops being launch-bound, traces read, and the view."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planners.launches import Phase, launches, queued
from autotune.planners.predict import Predictor
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.report.launches import explain_launches
from autotune.runners.job import Job
from autotune.spec.errors import UsageError
from autotune.spec.families import load_model
from autotune.spec.kernel_trace import launches_of, read_kernel_trace
from autotune.spec.plan import FUSED, Plan
from autotune.spec.workload import Workload
from tests.commands import Home
from tests.recipes import Autotune
from tests.small import TRAIN as TRAINED

MODELS = Path(__file__).parents[1] / "recipes" / "models"
MODEL = load_model(MODELS / "meta-llama--Llama-3.2-1B.json")
PROFILE = load_profile(shipped()["h200-sxm"])
ASK = Workload("generate", precision="bf16", prompt_length=512, new_tokens=64, batch=1)
TRAIN = Workload("train", 256, 8, "bf16")


# --- closed forms


def test_a_slower_host_makes_every_kernel_wait_its_own_launch_alone() -> None:
    assert queued([(10.0, 1.0)] * 5, call=2.0) == pytest.approx(5 * 2.0)


def test_a_slower_device_makes_kernels_queue() -> None:
    """Of n kernels of d seconds handed over every h < d the i-th waits i (d - h) beyond its launch."""
    n, host, device, call = 6, 1.0, 4.0, 0.5
    queue = sum(i * (device - host) for i in range(n))
    assert queued([(host, device)] * n, call) == pytest.approx(n * call + queue)


def test_a_long_kernel_hides_the_launches_after_it() -> None:
    whole = queued([(1.0, 10.0), (1.0, 0.5), (1.0, 0.5)], call=1.0)
    assert whole == pytest.approx(1.0 + (11.0 - 1.0) + (11.5 - 2.0))


# --- predicted


def test_the_turn_is_the_least_batch_that_the_device_is_waited_for() -> None:
    predictor = Predictor(MODEL, ASK, PROFILE)
    prefill, decode = launches(predictor, Plan())
    assert decode.turn is not None and decode.turn > 1
    at = {batch: launches(predictor, Plan(micro_batch=batch))[1].own for batch in (decode.turn - 1, decode.turn)}
    assert at[decode.turn - 1].launch_bound and not at[decode.turn].launch_bound
    assert prefill.turn is not None and prefill.turn < decode.turn, "a prompt's many tokens take the device longer"
    doubling = [phase.batch for phase in decode.swept]
    assert doubling == [2**k for k in range(len(doubling))] and doubling[-1] >= decode.turn


def test_below_the_turn_the_batch_changes_nothing_but_the_device() -> None:
    """What SKIP reads the turn from: launch and queue times stay level while launches are waited for, and then rise."""
    decode = launches(Predictor(MODEL, ASK, PROFILE), Plan())[1]
    bound = [phase for phase in decode.swept if phase.launch_bound]
    assert len({(phase.launches, phase.host_s, phase.eager_s) for phase in bound}) == 1
    assert bound[1].queue_s < 1.1 * bound[0].queue_s and decode.swept[-1].queue_s > 10 * bound[0].queue_s
    for phase in decode.swept:
        assert phase.eager_s == pytest.approx(max(phase.host_s, phase.device_s))
        assert phase.gain == pytest.approx(phase.eager_s / phase.device_s - 1)


def test_a_captured_generation_is_predicted_to_take_the_device_alone() -> None:
    """The device's seconds are those that a prediction of the plan adds up, which captures its passes."""
    short = replace(ASK, new_tokens=2)
    predictor = Predictor(MODEL, short, PROFILE)
    decode = launches(predictor, Plan())[1].own
    predicted = predictor.predict(Plan()).decode_s
    assert decode.device_s <= predicted <= 1.1 * decode.device_s, "the choice of the token comes on top"
    whole = Predictor(MODEL, TRAIN, PROFILE)
    step = whole.predict(Plan())
    (each,) = launches(whole, Plan())
    assert TRAIN.global_batch * each.own.eager_s == pytest.approx(
        sum(seconds for kind, seconds in step.breakdown.items() if kind not in ("optimizer", "idle")), rel=0.02
    )


def test_joined_kernels_are_fewer_launches_and_a_plan_s_own_limit_is_kept() -> None:
    predictor = Predictor(MODEL, ASK, PROFILE)
    library, fused = (launches(predictor, Plan(kernels=kernels))[1] for kernels in ("library", FUSED))
    assert fused.own.launches < library.own.launches and fused.own.host_s < library.own.host_s
    assert max(phase.batch for phase in fused.swept) <= 64, "joined kernels take no more tokens at a time"
    none = replace(PROFILE, coefficients={**PROFILE.coefficients, "instruction_seconds.decode": 1.0})
    never = launches(Predictor(MODEL, ASK, none), Plan(kernels=FUSED))[1]
    assert never.turn is None and never.last == 64
    text = "\n".join(explain_launches(Plan(), none, (never,)).lines())
    assert "launch-bound at every batch that can run, 64 at most" in text


def test_a_processor_has_nothing_to_capture() -> None:
    inline = replace(PROFILE, device=replace(PROFILE.device, kind="cpu", cores=8))
    found = launches(Predictor(MODEL, replace(TRAIN, precision="fp32"), inline), Plan())
    told = explain_launches(Plan(), inline, found)
    facts = told.to_dict()["launches"]
    assert facts["captures"] is False and facts["passes"][0]["own"]["capture_gain"] is None
    assert any("a processor has no graphs" in line for line in told.lines())


# --- measured


def call(name: int, at: float, seconds: float = 5.0, cat: str = "cuda_runtime") -> dict[str, object]:
    told = {"ph": "X", "cat": cat, "name": "cudaLaunchKernel", "ts": at, "dur": seconds}
    return {**told, "args": {"correlation": name}}


def kernel(name: int, at: float, seconds: float, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": "k", "ts": at, "dur": seconds, "args": {"correlation": name, "stream": 7}}


EVENTS = [
    call(1, 100.0),
    kernel(1, 110.0, 20.0),
    call(2, 106.0),
    kernel(2, 130.0, 10.0),
    call(3, 200.0, cat="cuda_driver"),  # a graph: one call and two kernels
    kernel(3, 220.0, 10.0),
    kernel(3, 235.0, 5.0),
    call(4, 150.0),
    kernel(4, 160.0, 8.0, cat="gpu_memcpy"),
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 90.0, "dur": 400.0, "args": {"External id": 9}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 400.0, "dur": 9.0, "args": {}},
]


def test_a_trace_tells_launch_and_queue_times() -> None:
    found = launches_of(EVENTS, Path("t.json"))
    assert (found.calls, found.kernels) == (3, 4)
    assert found.queue_s == pytest.approx(1e-6 * (10 + 24 + 20)) and found.call_s == pytest.approx(15e-6)
    assert found.kernel_s == pytest.approx(45e-6) and found.busy_s == pytest.approx(53e-6)
    assert found.span_s == pytest.approx(140e-6)
    assert found.idle == pytest.approx(1 - 53 / 140) and found.most_gain == pytest.approx(140 / 53 - 1)


def test_a_trace_is_read_plain_and_packed(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *EVENTS]})
    (tmp_path / "t.json").write_text(text)
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (read_kernel_trace(tmp_path / name) for name in ("t.json", "t.json.gz"))
    assert plain == packed == launches_of(EVENTS, Path("t.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("{}", "traceEvents: found NoneType"),
        (json.dumps({"traceEvents": EVENTS[-2:]}), "found 2 events, none of them a kernel"),
        (json.dumps({"traceEvents": [call(1, 1.0), {**kernel(1, 2.0, 3.0), "dur": "long"}]}), "'k': dur: found 'long'"),
    ],
)
def test_what_is_no_trace_of_kernels_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError) as refused:
        read_kernel_trace(tmp_path / "t.json")
    problem = str(refused.value.problems[0])
    assert said in problem and str(tmp_path / "t.json") in problem
    with pytest.raises(UsageError):
        read_kernel_trace(tmp_path / "missing.json")


def test_the_profiler_writes_what_is_read(tmp_path: Path) -> None:
    """On a processor there is no kernel in it, which is what is said; the form is torch's own."""
    torch = pytest.importorskip("torch")
    from autotune.runners.kernels import record_kernels

    ran: list[int] = []
    record_kernels(lambda: ran.append(1), torch.device("cpu"), None)
    record_kernels(lambda: ran.append(int(torch.ones(4).sum())), torch.device("cpu"), tmp_path / "k.json")
    assert ran == [1, 4]
    names = {event.get("name") for event in json.loads((tmp_path / "k.json").read_text())["traceEvents"]}
    assert "aten::sum" in names
    with pytest.raises(UsageError, match="cannot read"):
        read_kernel_trace(tmp_path / "k.json")
    job = Job(Plan(), MODEL, TRAIN, kernels=True)
    assert Job.from_json(job.to_json()) == job


# --- the command


def test_the_view_shows_one_question_alone(autotune: Autotune, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": EVENTS}))
    pins = ("--pin", "pipeline=2")
    raw = autotune("explain", recipe, *pins, "--view", "launches", "--trace", "t.json", "--json").json
    assert raw["schema"] == "autotune.explain/1" and set(raw) == {"schema", "subject", "launches", "traced"}
    assert raw["traced"]["calls"] == 3 and raw["launches"]["passes"][0]["own"]["batch"] == 1
    said = autotune("explain", recipe, *pins, "--view", "launches", "--trace", "t.json")
    assert "launch and queue time 54.0 µs" in said.stdout and "by the host" in said.stdout
    for words, told in (
        (("--view", "launchs"), "nearest: launches"),
        (("--trace", "t.json"), "add --view launches"),
        (("--view", "launches", "--sensitivity"), "drop --versus and --sensitivity"),
        (("--view", "launches", "--trace", "none.json"), "none.json"),
    ):
        refused = autotune("explain", recipe, *pins, *words)
        assert refused.code == 2 and told in refused.stderr, refused.stderr


def test_phases_are_bound_by_the_slower_side() -> None:
    assert Phase(1, 2, 2.0, 1.0, 0.0, 2.0).launch_bound and not Phase(1, 2, 1.0, 1.0, 0.0, 1.0).launch_bound


def test_a_processor_s_run_has_no_kernels_to_record(tmp_path: Path) -> None:
    home = Home.make(tmp_path / "home")
    home.write("small.toml", TRAINED)
    said = home.run("run", "small.toml", "--pin", "micro_batch=4", "--kernels", "k.json")
    assert said.code == 4 and "without launching kernels" in said.stderr
    assert home.run("run", "small.toml", "--pin", "micro_batch=4", "--kernels", "k.txt").code == 2
