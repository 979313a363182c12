"""The whole way with real processes: search, lock, run, look at it; interrupted, and joined from outside."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autotune.profiles_db.profile_file import load_profile
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.reference import reference_logits
from autotune.spec.families import load_model
from autotune.spec.graph import blocks
from autotune.spec.machine import Sample
from autotune.spec.work import Memory
from tests.commands import Home
from tests.processes import gone, started_by, wait_for
from tests.small import GENERATE, MODEL, TRAIN

pytestmark = pytest.mark.alone


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.make(tmp_path / "home")


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the profile of a machine on which a search has measured what the training plans are made of."""
    home = Home.make(tmp_path_factory.mktemp("refined"))
    recipe = home.write("other.toml", TRAIN.replace("steps = 3", "steps = 3\nlearning_rate = 0.5"))
    said = home.run("search", recipe, "--measure", "1", "-v")
    assert said.code == 0 and "operations of the best plans with 2 workers" in said.stderr, said.stderr
    return home.folder / "plans.db"


def test_a_profile_file_is_not_measured_again(refined: Path, home: Home) -> None:
    shutil.copy(refined, home.folder / "plans.db")
    text = TRAIN.replace('use = "this"', 'use = "two.json"').replace("measure = 2", "measure = 1")
    recipe = home.write("file.toml", text)
    with home.store() as store:
        base = load_profile(home.folder / "two.json")
        before = store.refined(base)
        assert before.refines(base) and len(before.samples) > len(base.samples)
    for words in ((), ("--fresh",)):
        said = home.run("search", recipe, "-v", *words)
        assert said.code == 0, said.stderr
        assert "operations of the best plans" not in said.stderr
    with home.store() as store:
        assert store.refined(base) == before


def test_a_new_profile_of_the_same_machine_is_not_a_refinement(home: Home) -> None:
    base = load_profile(home.folder / "two.json")
    more = replace(base, samples=(*base.samples, Sample(Memory("add", 4096, "fp32"), 1e-6)))
    with home.store() as store:
        store.save_profile(more)
        store.save_profile(replace(more, coefficients={**base.coefficients, "launch_seconds": 1.0}))
        store.save_profile(replace(more, created="later"))
        assert store.refined(base) == more
        assert store.refined(replace(base, name="another")).samples == base.samples


@pytest.fixture
def experienced(home: Home, refined: Path) -> Home:
    """A home where nothing was run of this workload, but its operations are already measured."""
    shutil.copy(refined, home.folder / "plans.db")
    return home


# --- the whole way


def test_training_from_recipe_to_pictures(experienced: Home) -> None:
    home, recipe = experienced, experienced.write("small.toml", TRAIN)
    said = home.run("search", recipe, "--json")
    assert said.code == 0, said.stderr
    found, lock = said.json, json.loads((home.folder / "small.lock.json").read_text())
    assert found["lock"] == "small.lock.json" and lock["plan_id"] == found["plan_id"]
    assert found["evaluated"]["measured"] == 2 and lock["measured"]
    times = {row["plan_id"]: row["measured_s"] for row in found["ranking"] if row["measured_s"]}
    assert found["plan_id"] == min(times, key=lambda plan: times[plan]), "what was measured decides"

    again = home.run("search", recipe, "--json", "-v")
    assert again.code == 0 and "measuring" not in again.stderr
    assert {row["plan_id"]: row["measured_s"] for row in again.json["ranking"] if row["measured_s"]} == times
    assert not list(home.folder.glob("**/*.part"))

    ran = home.run("run", "small.lock.json", "--check", "--json")
    assert ran.code == 0, ran.stderr
    report = ran.json
    assert report["plan_id"] == found["plan_id"] and report["equal"] is True and report["max_difference"] < 1e-5
    assert len(report["measured"]["step_s_all"]) == 3 and len(report["measured"]["peak_bytes"]) == 2
    assert report["measured"]["losses"][0] == pytest.approx(5.55, abs=0.3), "the entropy of a byte, to begin with"
    with home.store() as store:
        (run,) = store.runs()
        assert (run.id, run.status, run.plan.id) == (report["run_id"], "finished", found["plan_id"])
        assert list(run.launches[0].steps) == report["measured"]["step_s_all"]
        assert run.prediction is not None and run.environment["software"]["torch"]
        timeline = store.timeline(run.id)
        assert timeline is not None and timeline.makespan > 0

    explained = home.run("explain", "small.lock.json", "--json").json
    assert {"time", "answer", "versus", "measured"} <= set(explained)
    for name in ("t.html", "t.json"):
        drawn = home.run("plot", "small.lock.json", "--out", name, "--json")
        assert drawn.code == 0 and drawn.json["timelines"] == ["predicted", "measured"], drawn.stderr
    assert (home.folder / "t.html").read_text().startswith("<!doctype html>")
    assert json.loads((home.folder / "t.json").read_text())["traceEvents"]

    home.write("small.toml", TRAIN.replace("hidden_size = 32", "hidden_size = 64"))
    stale = home.run("run", "small.lock.json")
    assert stale.code == 8 and "the model changed" in stale.stderr and "autotune search" in stale.stderr


def test_a_lock_carries_what_data_ranks_share(experienced: Home) -> None:
    home = experienced
    shared = TRAIN.replace("zero = 0", "zero = 3\nchunks = 2\ngathered = 1").replace('"1f1b"', '"zeropp"')
    recipe = home.write("shared.toml", shared.replace("micro_batch = 4", "micro_batch = 1"))
    found = home.run("search", recipe, "--measure", "0", "--json")
    assert found.code == 0, found.stderr
    plan = found.json["plan"]
    assert (plan["zero"], plan["gathered"], plan["data"], plan["schedule"]) == (3, 1, 2, "zeropp")
    ran = home.run("run", "shared.lock.json", "--check", "--steps", "1", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["plan_id"] == found.json["plan_id"]


def test_generation_from_recipe_to_pictures(home: Home) -> None:
    recipe = home.write("talk.toml", GENERATE)
    found = home.run("search", recipe, "--json")
    assert found.code == 0, found.stderr
    assert found.json["plan"]["tensor"] == 2 and found.json["evaluated"]["measured"] == 1
    ran = home.run("run", recipe, "--check", "--json", "--trace", "t.svg")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and [len(row) for row in ran.json["tokens"]] == [5, 5]
    assert ran.json["tokens"][0] == ran.json["tokens"][1], "one prompt stands for both sequences"
    measured = ran.json["measured"]
    assert measured["decode_s"] > 0 and measured["step_s"] >= measured["prefill_s"] > 0
    assert (home.folder / "t.svg").read_text().startswith("<svg")
    assert home.run("plot", ran.json["run_id"], "--out", "t.html").code == 0
    assert home.run("explain", recipe).code == 0


def test_prompts_from_a_file_are_answered(home: Home) -> None:
    """More prompts than are generated at once, of different lengths, drawn, until a space comes."""
    sampled = GENERATE.replace("batch = 2", 'batch = 2\ntemperature = 0.7\nstop = [" "]\n')
    recipe = home.write("talk.toml", sampled.replace("new_tokens = 5", "new_tokens = 24"))
    home.write("p.jsonl", 'def f(\n"im"\n{"prompt": "x", "id": 7}\n')
    pins = ("--pin", "tensor=1", "--pin", "data=2", "--pin", "micro_batch=1")
    words = ("run", recipe, *pins, "--prompts", "p.jsonl", "--steps", "1", "--warmup", "0", "--check")
    ran = home.run(*words, "--answers", "a.jsonl", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True
    answers = [json.loads(line) for line in (home.folder / "a.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["def f(", "im", "x"]
    for answer in answers:
        assert answer["end"] in ("stop", "length") and len(answer["tokens"]) <= 24
        assert 32 not in answer["tokens"] and (answer["end"] == "stop" or len(answer["tokens"]) == 24)
    again = home.run(*words, "--stream")
    assert again.code == 0, again.stderr
    lines = [json.loads(line) for line in again.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if "prompt" in line] == answers, "the seed makes the answers"
    for number, answer in enumerate(answers):
        told = "".join(line["text"] for line in lines if line.get("sequence") == number)
        assert told.rstrip("\ufffd") == answer["answer"].rstrip("\ufffd"), "an answer may end within a character"


def test_what_was_trained_is_continued(home: Home) -> None:
    """Checked, saved, loaded by transformers from the keys of a recipe, and continued by us from its folder alone."""
    train = home.write("r.toml", TRAIN.replace("steps = 3", "warmup_steps = 2\ndecay_steps = 8\nlearning_rate = 0.01"))
    pins = ("--pin", "pipeline=2", "--pin", "micro_batch=2", "--steps", "4", "--warmup", "1")
    ran = home.run("run", train, *pins, "--check", "--save", "made/byte", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5
    assert ran.json["saved"] == str(home.folder / "made" / "byte") and len(ran.json["measured"]["losses"]) == 6
    assert sorted(file.name for file in (home.folder / "made").rglob("*")) == [
        "byte",
        "config.json",
        "model.safetensors",
    ]
    talk = GENERATE.replace(MODEL, '[model]\ncheckpoint = "made/byte"\n').replace('prompt = "def f("\n', "")
    said = home.run("run", home.write("t.toml", talk), "--pin", "tensor=2", "--check", "--steps", "1", "--json")
    assert said.code == 0, said.stderr
    assert said.json["equal"] is True
    model = load_model(home.folder / "made" / "byte")
    weights = open_checkpoint(home.folder / "made" / "byte").whole(model, torch.float32)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(home.folder / "made" / "byte")(tokens).logits
    assert torch.allclose(reference_logits(model, weights, tokens), logits, rtol=1e-5, atol=1e-5)


def test_how_tokens_are_proposed_is_measured_and_chosen(home: Home) -> None:
    """A draft that is the model itself is always right; what was measured is searched and predicted with."""
    text = GENERATE.replace(
        "tensor = 2\n", 'decoding = ["plain", "ngram", "draft"]\nspeculate = 2\nmatch = 1\nbranches = 1\n'
    )
    text = text.replace('prompt = "def f("\n', "").replace("devices = 2", "devices = 1")
    recipe = home.write("talk.toml", text + MODEL.replace("[model]", "[draft]"))
    refused = home.run("search", recipe, "--set", 'search.decoding="draft"')
    assert refused.code == 3 and "needs the acceptance of 'draft'" in refused.stderr, refused.stderr
    told = home.run("profile", "--acceptance", recipe, "--json")
    assert told.code == 0, told.stderr
    rates = {one["key"]: one["rates"] for one in told.json["acceptances"]}
    assert rates["draft"] == [1, 1] and len(rates["ngram match=1"]) == 2
    found = home.run("search", recipe, "--measure", "0", "--json")
    assert found.code == 0, found.stderr
    assert found.json["space"]["feasible"] == 6  # three strategies, of one sequence at a time and of both
    pins = ("--pin", "decoding=draft", "--pin", "speculate=2", "--pin", "micro_batch=2")
    ran = home.run("run", recipe, *pins, "--steps", "1", "--check", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["measured"]["rounds"]["expected"] == 3
    assert ran.json["measured"]["rounds"]["rates"] == [1, 1]


def test_a_draft_that_proposes_blocks_is_trained_measured_and_chosen(home: Home) -> None:
    """Trained with masks beside its text, checked against the reference and searched; then it drafts for itself."""
    masks = "parallel_draft = 3\nparallel_masks = 2\n"
    text = TRAIN.replace("[machine]", masks + "[machine]").replace("devices = 2", "devices = 1")
    recipe = home.write("blocks.toml", text)
    ran = home.run("run", recipe, "--pin", "micro_batch=4", "--steps", "2", "--check", "--save", "out", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5
    found = home.run("search", recipe, "--measure", "1", "--json")
    assert found.code == 0, found.stderr
    assert found.json["space"]["feasible"] == 1
    config = json.loads((home.folder / "out" / "config.json").read_text())
    assert config["parallel_draft"] == 3 and config["parallel_masks"] == 2
    alone = text[text.index("[machine]") :].replace("steps = 3", 'steps = 3\ntrained = "masks"')
    recipe = home.write("alone.toml", '[model]\ncheckpoint = "out"\n' + alone)
    ran = home.run("run", recipe, "--pin", "micro_batch=4", "--steps", "2", "--check", "--save", "masks", "--json")
    assert ran.code == 0 and ran.json["equal"] is True, ran.stderr
    model = load_model(home.folder / "out")
    before, after = (open_checkpoint(home.folder / name).whole(model, torch.float32) for name in ("out", "masks"))
    assert [key for key in before if not before[key].equal(after[key])] == [(0, "mask.weight")]
    talk = GENERATE[GENERATE.index("[machine]") :].replace("devices = 2", "devices = 1")
    axes = 'decoding = ["plain", "parallel"]\nspeculate = 3\n'
    talk = talk.replace('prompt = "def f("\n', "").replace("tensor = 2\n", axes)
    recipe = home.write("talk.toml", '[model]\ncheckpoint = "out"\n[draft]\ncheckpoint = "out"\n' + talk)
    told = home.run("profile", "--acceptance", recipe, "--json")
    assert told.code == 0, told.stderr
    (rates,) = (one["rates"] for one in told.json["acceptances"] if one["key"] == "parallel speculate=3")
    assert rates[0] == 1 and len(rates) == 3
    found = home.run("search", recipe, "--measure", "1", "--json")
    assert found.code == 0, found.stderr
    assert found.json["space"]["feasible"] == 4
    pins = ("--pin", "decoding=parallel", "--pin", "speculate=3", "--pin", "micro_batch=2")
    ran = home.run("run", recipe, *pins, "--steps", "1", "--check", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["measured"]["rounds"]["rates"][0] == 1
    warm = ("--set", "workload.temperature=0.9", "--pin", "commit=rejection")
    ran = home.run("run", recipe, *pins, *warm, "--steps", "1", "--check", "--json")
    assert ran.code == 0 and ran.json["equal"] is True, ran.stderr


def test_a_checked_run(home: Home) -> None:
    pins = ("--pin", "data=2", "--pin", "zero=1", "--pin", "micro_batch=2")
    ran = home.run("run", home.write("r.toml", TRAIN), *pins, "--check", "--steps", "1", "--warmup", "0", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5


def test_a_world_that_torchrun_started(home: Home) -> None:
    recipe = home.write("r.toml", TRAIN)
    words = ("run", recipe, "--pin", "tensor=2", "--pin", "sequence_parallel=true", "--pin", "micro_batch=4")
    begin = ("--standalone", "--nproc-per-node=2", "-m", "autotune")
    said = home.run(*begin, *words, "--check", "--save", "out", "--json", module="torch.distributed.run")
    assert said.code == 0, said.stderr
    open_checkpoint(home.folder / "out").verify(w for b in blocks(load_model(home.folder / "out")) for w in b.weights())
    assert said.stdout.count('"schema"') == 1, "rank 0 answers for all"
    assert said.json["equal"] is True and len(said.json["measured"]["peak_bytes"]) == 2
    with home.store() as store:
        assert [run.status for run in store.runs()] == ["finished"]


# --- asked again


def test_a_measured_answer_is_given_again(experienced: Home) -> None:
    """With every launch of the lock and no worker started; --fresh runs the plans again."""
    home, recipe = experienced, experienced.write("small.toml", TRAIN)
    file, log = home.folder / "small.lock.json", home.store().place.files / "logs"
    first = home.run("search", recipe)
    assert first.code == 0, first.stderr
    lock, logs = file.read_bytes(), sorted(log.rglob("*"))
    assert json.loads(lock)["measured"][0]["step_s"] and logs
    again = home.run("search", recipe)
    assert again.stdout == first.stdout and "from the plan database" in again.stderr
    assert file.read_bytes() == lock and sorted(log.rglob("*")) == logs
    more = home.run("search", recipe, "--measure", "3", "--json", "-v")
    assert [one["what"] for one in more.json["changed"]] == ["search.budget.measure"]
    assert "2 plans are already measured" in more.stderr and more.json["evaluated"]["measured"] == 3
    with home.store() as store:
        (entry,) = [entry for entry in store.searches() if entry.measured == 3]
    fresh = home.run("search", recipe, "--fresh", "--json", "-v")
    assert fresh.json["cached"] is False and "already measured" not in fresh.stderr
    with home.store() as store:
        assert store.search(entry.digest).measured == 5


# --- interrupted


def test_ctrl_c_while_measuring_keeps_what_was_measured(experienced: Home) -> None:
    home, recipe = experienced, experienced.write("small.toml", TRAIN)
    process = home.start("search", recipe, "-v")
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if sum(text.startswith("measuring d") for text in said) == 2:
            break
    wait_for(lambda: [c for c in started_by(process.pid).values() if "autotune.runners.worker" in c])
    workers = list(started_by(process.pid))
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in rest, rest
    assert "interrupted: keeping what was measured" in rest
    wait_for(lambda: all(map(gone, workers)), 5)
    with home.store() as store:
        entry, _ = store.searches()
        first = store.measured(entry.digest)
    assert len(first) == 1 and json.loads((home.folder / "small.lock.json").read_text())["plan_id"] in first
    again = home.run("search", recipe, "--json", "-v")
    assert again.code == 0 and "1 plans are already measured" in again.stderr
    assert again.json["evaluated"]["measured"] == 2
    with home.store() as store:
        kept = store.measured(entry.digest)
    assert len(kept) == 2 and first.items() <= kept.items()
