"""What runs of small models make: locks, answers, weights, proposals. They are compared, and none is timed."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM

from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.reference import reference_logits
from autotune.spec.families import load_model
from tests.commands import Home, Inside
from tests.small import GENERATE, MODEL, TRAIN


def test_a_lock_carries_what_data_ranks_share(inside: Inside) -> None:
    shared = TRAIN.replace("zero = 0", "zero = 3\nchunks = 2\ngathered = 1").replace('"1f1b"', '"zeropp"')
    recipe = inside.write("shared.toml", shared.replace("micro_batch = 4", "micro_batch = 1"))
    found = inside.run("search", recipe, "--measure", "0", "--json")
    assert found.code == 0, found.stderr
    plan = found.json["plan"]
    assert (plan["zero"], plan["gathered"], plan["data"], plan["schedule"]) == (3, 1, 2, "zeropp")
    ran = inside.run("run", "shared.lock.json", "--check", "--steps", "1", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["plan_id"] == found.json["plan_id"]


def test_prompts_from_a_file_are_answered(inside: Inside) -> None:
    """More prompts than are generated at once, of different lengths, drawn, until a space comes."""
    sampled = GENERATE.replace("batch = 2", 'batch = 2\ntemperature = 0.7\nstop = [" "]\n')
    recipe = inside.write("talk.toml", sampled.replace("new_tokens = 5", "new_tokens = 24"))
    inside.write("p.jsonl", 'def f(\n"im"\n{"prompt": "x", "id": 7}\n')
    pins = ("--pin", "tensor=1", "--pin", "data=2", "--pin", "micro_batch=1")
    words = ("run", recipe, *pins, "--prompts", "p.jsonl", "--steps", "1", "--warmup", "0", "--check")
    ran = inside.run(*words, "--answers", "a.jsonl", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True
    answers = [json.loads(line) for line in (inside.folder / "a.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["def f(", "im", "x"]
    for answer in answers:
        assert answer["end"] in ("stop", "length") and len(answer["tokens"]) <= 24
        assert 32 not in answer["tokens"] and (answer["end"] == "stop" or len(answer["tokens"]) == 24)
    again = Home(inside.folder).run(*words, "--stream")  # in processes of its own, read along with
    assert again.code == 0, again.stderr
    lines = [json.loads(line) for line in again.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if "prompt" in line] == answers, "the seed makes the answers"
    for number, answer in enumerate(answers):
        told = "".join(line["text"] for line in lines if line.get("sequence") == number)
        assert told.rstrip("\ufffd") == answer["answer"].rstrip("\ufffd"), "an answer may end within a character"


def test_what_was_trained_is_continued(inside: Inside) -> None:
    """Checked, saved, loaded by transformers from the keys of a recipe, and continued by us from its folder alone."""
    train = inside.write(
        "r.toml", TRAIN.replace("steps = 3", "warmup_steps = 2\ndecay_steps = 8\nlearning_rate = 0.01")
    )
    pins = ("--pin", "pipeline=2", "--pin", "micro_batch=2", "--steps", "4", "--warmup", "1")
    ran = inside.run("run", train, *pins, "--check", "--save", "made/byte", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5
    assert ran.json["saved"] == str(inside.folder / "made" / "byte") and len(ran.json["measured"]["losses"]) == 6
    assert sorted(file.name for file in (inside.folder / "made").rglob("*")) == [
        "byte",
        "config.json",
        "model.safetensors",
    ]
    talk = GENERATE.replace(MODEL, '[model]\ncheckpoint = "made/byte"\n').replace('prompt = "def f("\n', "")
    said = inside.run("run", inside.write("t.toml", talk), "--pin", "tensor=2", "--check", "--steps", "1", "--json")
    assert said.code == 0, said.stderr
    assert said.json["equal"] is True
    model = load_model(inside.folder / "made" / "byte")
    weights = open_checkpoint(inside.folder / "made" / "byte").whole(model, torch.float32)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(inside.folder / "made" / "byte")(tokens).logits
    assert torch.allclose(reference_logits(model, weights, tokens), logits, rtol=1e-5, atol=1e-5)


def test_how_tokens_are_proposed_is_measured_and_chosen(inside: Inside) -> None:
    """A draft that is the model itself is always right; what was measured is searched and predicted with."""
    text = GENERATE.replace(
        "tensor = 2\n", 'decoding = ["plain", "ngram", "draft"]\nspeculate = 2\nmatch = 1\nbranches = 1\n'
    )
    text = text.replace('prompt = "def f("\n', "").replace("devices = 2", "devices = 1")
    recipe = inside.write("talk.toml", text + MODEL.replace("[model]", "[draft]"))
    refused = inside.run("search", recipe, "--set", 'search.decoding="draft"')
    assert refused.code == 3 and "needs the acceptance of 'draft'" in refused.stderr, refused.stderr
    told = inside.run("profile", "--acceptance", recipe, "--json")
    assert told.code == 0, told.stderr
    rates = {one["key"]: one["rates"] for one in told.json["acceptances"]}
    assert rates["draft"] == [1, 1] and len(rates["ngram match=1"]) == 2
    found = inside.run("search", recipe, "--measure", "0", "--json")
    assert found.code == 0, found.stderr
    assert found.json["space"]["feasible"] == 6  # three strategies, of one sequence at a time and of both
    pins = ("--pin", "decoding=draft", "--pin", "speculate=2", "--pin", "micro_batch=2")
    ran = inside.run("run", recipe, *pins, "--steps", "1", "--check", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["measured"]["rounds"]["expected"] == 3
    assert ran.json["measured"]["rounds"]["rates"] == [1, 1]


def test_a_checked_run(inside: Inside) -> None:
    pins = ("--pin", "data=2", "--pin", "zero=1", "--pin", "micro_batch=2")
    ran = inside.run("run", inside.write("r.toml", TRAIN), *pins, "--check", "--steps", "1", "--warmup", "0", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5
