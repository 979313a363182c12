"""Wrong input, case by case: one message with file, key, found, expected, nearest; its exit code; nothing written."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autotune.cli.main import main
from autotune.profiles_db.profile_file import dump_profile, load_profile
from autotune.runners.checkpoint import save_checkpoint, split_parts
from autotune.runners.reference import init_weights
from autotune.spec.families import from_config
from autotune.spec.graph import blocks
from tests.commands import Home, Said

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
RECIPE = """
[model]
config = "model.json"
[machine]
use = "this"
devices = 2
[workload]
kind = "train"
sequence_length = 32
global_batch = 8
precision = "fp32"
[search]
budget = { measure = 0 }
"""
TALK = """
[model]
checkpoint = "ckpt"
[machine]
use = "this"
devices = 2
[workload]
kind = "generate"
prompt = "def f("
prompt_length = 6
new_tokens = 5
batch = 2
precision = "fp32"
[search]
budget = { measure = 1 }
"""
TENSOR = ("--pin", "tensor=2", "--pin", "micro_batch=2")

Autotune = Callable[..., Said]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.make(tmp_path / "home")
    home.write("model.json", json.dumps(CONFIG))
    home.write("r.toml", RECIPE)
    return home


@pytest.fixture
def autotune(home: Home, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Autotune:
    """The command in this process, in the home's folder."""
    for name in os.environ.keys() - home.environment.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOTUNE_DB", home.environment["AUTOTUNE_DB"])
    monkeypatch.chdir(home.folder)

    def run(*words: str) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        return Said(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def refused(autotune: Autotune, home: Home) -> Callable[..., str]:
    """What a command says that must fail with `code`, print no result and leave every file as it was."""

    def run(code: int, *words: str) -> str:
        before = home.files()
        said = autotune(*words)
        assert said.code == code, said.stderr
        assert said.stdout == "" and "Traceback" not in said.stderr
        errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said.stderr
        after = home.files()
        for name in set(before) | set(after):
            if name != "plans.db":
                assert before.get(name) == after.get(name), f"{name} was touched"
        return said.stderr

    return run


# --- recipes


def test_all_problems_of_a_recipe_at_once(refused: Callable[..., str], home: Home) -> None:
    text = RECIPE.replace("global_batch = 8", 'global_bach = 8\nglobal_batch = "eight"')
    home.write("r.toml", text.replace('"model.json"', '"modle.json"').replace("devices = 2", "devices = 0"))
    for command in ("search", "run", "simulate"):
        said = refused(2, command, "r.toml")
        assert "r.toml has 4 problems" in said
        lines = [line for line in said.splitlines() if line.startswith("  r.toml: ")]
        assert len(lines) == 4, said
        for key, found, nearest in (
            ("workload.global_bach", "found", "(nearest: global_batch)"),
            ("workload.global_batch", "found 'eight'", ""),
            ("model.config", "found 'modle.json', which does not exist", "(nearest: model.json)"),
            ("machine.devices", "found 0", ""),
        ):
            (line,) = [line for line in lines if line.startswith(f"  r.toml: {key}: ")]
            assert found in line and nearest in line and "; expected " in line, line


def test_all_problems_of_a_config_at_once(refused: Callable[..., str], home: Home) -> None:
    wrong = {**CONFIG, "num_key_value_heads": 3, "hidden_size": "wide", "hidden_act": "gelu"}
    del wrong["vocab_size"]
    home.write("model.json", json.dumps(wrong))
    said = refused(2, "search", "r.toml")
    for text in (
        "model.json: num_key_value_heads: found 3; expected a divisor of num_attention_heads = 4 (nearest: 2)",
        'model.json: hidden_size: found "wide"',
        'model.json: hidden_act: found "gelu"',
        "model.json: vocab_size: found",
    ):
        assert text in said
    home.write("model.json", '{"architectures": ["LlamaForCausalLM"],')
    assert "model.json: not JSON at line 1" in refused(2, "search", "r.toml")
    home.write("model.json", json.dumps({**CONFIG, "architectures": ["LamaForCausalLM"]}))
    assert "(nearest: LlamaForCausalLM)" in refused(2, "search", "r.toml")


@pytest.mark.parametrize(
    ("pin", "text"),
    [
        ("tensor=2", "tensor must divide kv_heads 1 (found 2; nearest 1)"),
        ("pipeline=2", "at most layers 1 (found 2"),
        ("micro_batch=3", "data x micro_batch must divide global_batch 8 (found 6; nearest"),
    ],
)
def test_a_degree_that_does_not_divide(refused: Callable[..., str], home: Home, pin: str, text: str) -> None:
    home.write("model.json", json.dumps({**CONFIG, "num_key_value_heads": 1, "num_hidden_layers": 1}))
    for command in ("simulate", "run"):
        assert text in refused(3, command, "r.toml", "--pin", pin)
    assert runs(home) == 0


def test_a_degree_that_no_plan_can_have(refused: Callable[..., str]) -> None:
    flags = ("--set", "search.tensor=4", "--set", "machine.use=h100-sxm", "--devices", "4")
    assert "tensor must divide kv_heads 2 (found 4; nearest 2)" in refused(3, "search", "r.toml", *flags)


def test_a_machine_that_nobody_knows(refused: Callable[..., str]) -> None:
    said = refused(2, "search", "r.toml", "--set", "machine.use=h10-sxm")
    assert '  r.toml: machine.use: found "h10-sxm"; expected this, a shipped or stored profile, or a path' in said
    assert "(nearest: h100-sxm)" in said


def test_a_model_that_fits_on_no_plan(refused: Callable[..., str], home: Home) -> None:
    huge = {**CONFIG, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    home.write("model.json", json.dumps(huge))
    said = refused(3, "search", "r.toml")
    assert "no feasible plan for" in said and "memory of a device: at most" in said and "GiB (found" in said


def test_fewer_devices_than_asked(refused: Callable[..., str], autotune: Autotune) -> None:
    said = refused(4, "search", "r.toml", "--devices", "3")
    assert "r.toml: machine.devices: found 3; expected at most 2 on two-workers (nearest: 2)" in said
    said = refused(2, "run", "r.toml", *TENSOR, "--nproc", "1")
    assert "needs 2 workers" in said and "--nproc 2" in said


# --- databases and locks


def test_a_corrupt_database(refused: Callable[..., str], home: Home) -> None:
    cut = (home.folder / "plans.db").read_bytes()[:5000]
    for name, content in {"text.db": b"no database" * 500, "cut.db": cut}.items():
        (home.folder / name).write_bytes(content)
        for words in (("search", "r.toml"), ("run", "r.toml", *TENSOR), ("plans", "ls"), ("db", "info")):
            said = refused(4, *words, "--db", name)
            assert name in said
        assert (home.folder / name).read_bytes() == content


def test_a_newer_database(refused: Callable[..., str], home: Home) -> None:
    with closing(sqlite3.connect(home.folder / "plans.db")) as file:
        file.execute("PRAGMA user_version=9")
    before = (home.folder / "plans.db").read_bytes()
    for words in (("search", "r.toml"), ("run", "r.toml", *TENSOR), ("db", "info"), ("db", "migrate")):
        said = refused(4, *words)
        assert "plans.db" in said and "found plan database version 9" in said and "upgrade autotune" in said
    assert (home.folder / "plans.db").read_bytes() == before


def test_a_lock_whose_recipe_changed(autotune: Autotune, refused: Callable[..., str], home: Home) -> None:
    assert autotune("search", "r.toml", "-q").code == 0
    home.write("r.toml", RECIPE.replace("global_batch = 8", "global_batch = 16"))
    for target in ("r.toml", "r.lock.json"):
        for command in ("run", "simulate", "explain"):
            said = refused(8, command, target)
            assert "r.lock.json is stale" in said and "workload.global_batch was 8 and is 16" in said
            assert "autotune search" in said
    home.write("r.lock.json", "{")
    assert "r.lock.json" in refused(2, "run", "r.lock.json")


# --- checkpoints and prompts


@pytest.fixture
def checkpoint(home: Home) -> Path:
    """A folder with random weights of the config."""
    model = from_config(CONFIG, "test")
    weights, tensors = init_weights(model, 0, torch.float32), {}
    for block in blocks(model):
        for weight in block.weights():
            tensors.update(split_parts(weight, weights[block.index, weight.name]))
    save_checkpoint(home.folder / "ckpt", tensors, CONFIG)
    home.write("t.toml", TALK)
    return home.folder / "ckpt"


def runs(home: Home) -> int:
    with home.store() as store:
        return len(store.runs())


def test_missing_and_misshapen_tensors(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.nrm.weight"] = tensors.pop("model.norm.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, file)
    for words in (("run", "t.toml", *TENSOR), ("search", "t.toml")):
        said = refused(2, *words)
        assert "model.safetensors: 2 of 21 tensors are not as the model needs them" in said
        assert "model.norm.weight: found no such tensor; expected a tensor of shape [32] (nearest: model.nrm" in said
        assert "up_proj.weight: found shape [48, 32]; expected a tensor of shape [64, 32]" in said
    assert runs(home) == 0 and not (home.folder / "plans.db.files" / "logs").exists(), "no worker was started"
    file.write_bytes(file.read_bytes()[:-10])
    assert "it is cut short" in refused(2, "run", "t.toml", *TENSOR)
    home.write("t.toml", TALK.replace('"ckpt"', '"ckpts"'))
    assert "model.checkpoint: found 'ckpts', which does not exist" in refused(2, "run", "t.toml", *TENSOR)


class Bomb:
    """What a pickled checkpoint could hold: reading it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_pickled_weights_are_refused_unread(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(home.folder / "boom")))
    said = refused(2, "run", "t.toml", *TENSOR)
    assert "found pytorch_model.bin; expected model.safetensors" in said and "pickled weights are never read" in said
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "a .safetensors file inside the folder" in refused(2, "run", "t.toml", *TENSOR)
    (home.folder / "tokens.npy").write_bytes(pickle.dumps(Bomb(home.folder / "boom")))
    assert "pickled" in refused(2, "run", "r.toml", "--set", "workload.data=tokens.npy", *TENSOR)
    assert not (home.folder / "boom").exists()


def _token_files(folder: Path) -> dict[str, str]:
    """Data files that no worker could train on, by name, and what is said of each."""
    np.save(folder / "real.npy", np.ones(99))
    np.save(folder / "wide.npy", np.zeros((9, 9), dtype=np.int64))
    np.save(folder / "beyond.npy", np.arange(200, 300))
    np.save(folder / "short.npy", np.arange(20))
    np.save(folder / "cut.npy", np.arange(99))
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:200])
    (folder / "text.npy").write_text("def f(x): return x" * 9)
    (folder / "empty.npy").write_bytes(b"")
    (folder / "empty.txt").write_bytes(b"")
    integers = "expected whole numbers in one dimension"
    plain = "expected a .npy file as numpy.save writes it"
    long_enough = "expected at least 33: a sequence and the token after it"
    return {
        "real.npy": f"{folder / 'real.npy'}: float64 of shape [99]; {integers}",
        "wide.npy": f"{folder / 'wide.npy'}: int64 of shape [9, 9]; {integers}",
        "beyond.npy": f"{folder / 'beyond.npy'}, position 56: token id 256; expected 0 to 255",
        "short.npy": f"{folder / 'short.npy'}: 20 tokens; {long_enough} (nearest: sequence_length = 19)",
        "cut.npy": plain,
        "text.npy": plain,
        "empty.npy": plain,
        "empty.txt": f"{folder / 'empty.txt'}: 0 tokens; {long_enough}",
    }


def test_data_that_cannot_be_trained_on(refused: Callable[..., str], home: Home) -> None:
    for name, text in _token_files(home.folder).items():
        for words in (("run", "r.toml", *TENSOR), ("search", "r.toml"), ("search", "r.toml", "--measure", "1")):
            said = refused(2, *words, "--set", f"workload.data={name}")
            assert "  r.toml: workload.data: found " in said and text in said, said
    assert runs(home) == 0 and not (home.folder / "plans.db.files" / "logs").exists(), "no worker was started"
    home.write("model.json", json.dumps({**CONFIG, "vocab_size": 64}))
    assert "found python standard library: bytes for a vocabulary of 64;" in refused(2, "run", "r.toml", *TENSOR)


def test_prompts_that_cannot_be_continued(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    home.write("t.toml", TALK.replace('"def f("', '["def f(", "def fun"]').replace("new_tokens = 5", "new_tokens = 50"))
    said = refused(2, "run", "t.toml", *TENSOR)
    assert "prompt 2 of 2: found 7 bytes; expected at most 6 (prompt_length)" in said
    home.write("t.toml", TALK.replace("new_tokens = 5", "new_tokens = 500"))
    assert "expected at most the 64 positions" in refused(2, "search", "t.toml")
    assert runs(home) == 0


def test_files_of_prompts(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    home.write("t.toml", TALK)
    home.write("p.txt", 'def\n{"prompt": 3}\n"open\n[1]\n\n{"text": "def"}\n')
    said = refused(2, "run", "t.toml", *TENSOR, "--prompts", "p.txt")
    assert 'p.txt: line 2: found an object without a text as "prompt"; expected a JSON string' in said
    assert "p.txt: line 3: found no JSON (Unterminated string starting at at column 1)" in said
    assert "p.txt: line 6: found an object without" in said and "line 4" not in said, "a line of text"
    (home.folder / "latin.txt").write_bytes(b"def\ncaf\xe9\n")
    assert "latin.txt: line 2: found byte 0xe9; expected UTF-8" in refused(
        2, "run", "t.toml", *TENSOR, "--prompts", "latin.txt"
    )
    home.write("long.txt", "def\ndef function\n")
    said = refused(2, "run", "t.toml", *TENSOR, "--prompts", "long.txt")
    assert "long.txt: prompt 2 of 2: found 12 bytes; expected at most 6 (prompt_length)" in said
    home.write("none.txt", "\n\n")
    assert "none.txt: found no prompts; expected at least one line" in refused(
        2, "run", "t.toml", *TENSOR, "--prompts", "none.txt"
    )
    said = refused(2, "run", "t.toml", *TENSOR, "--prompts", "gone.txt")
    assert "gone.txt: found no such file or directory; expected a file of prompts" in said
    assert "--prompts: this plan trains" in refused(2, "run", "r.toml", *TENSOR, "--prompts", "p.txt")
    assert "--stream: this plan trains" in refused(2, "run", "r.toml", *TENSOR, "--stream")
    assert "to prompts that nobody gave" in refused(2, "run", "t.toml", *TENSOR, "--answers", "a.jsonl")
    for key, value, said in (
        ("temperature", "-1", "found -1; expected at least 0"),
        ("top_p", "0", "found 0; expected more than 0"),
        ("stop", "3", "found 3; expected a string or a list of strings"),
    ):
        assert f"workload.{key}: {said}" in refused(2, "run", "t.toml", "--set", f"workload.{key}={value}")
    assert runs(home) == 0


def test_drafts_that_cannot_draft(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    draft = {**CONFIG, "vocab_size": 300}
    home.write("draft.json", json.dumps(draft))
    home.write("d.toml", TALK + '[draft]\nconfig = "draft.json"\n')
    pins = ("--pin", "decoding=draft", "--pin", "speculate=2", "--pin", "micro_batch=2")
    said = refused(3, "run", "d.toml", *pins, "--set", "machine.devices=1")
    assert "the draft's vocabulary must be the model's 256 (found 300" in said
    said = refused(3, "run", "t.toml", *pins, "--set", "machine.devices=1")
    assert "needs a draft model: a [draft] section in the recipe" in said
    home.write("draft.json", json.dumps(CONFIG))
    home.write("d.toml", TALK + '[draft]\nconfig = "draft.json"\n')
    pins = ("--pin", "decoding=parallel", *pins[2:])
    said = refused(3, "run", "d.toml", *pins, "--set", "machine.devices=1")
    assert "a draft with mask tokens: parallel_draft in the config that it was trained with (found none" in said
    home.write("draft.json", json.dumps({**CONFIG, "parallel_draft": 2}))
    said = refused(3, "run", "d.toml", *pins, "--pin", "speculate=3", "--set", "machine.devices=1")
    assert "speculate must be at most 2, the tokens that draft drafts at once (found 3; nearest 2)" in said
    home.write("d.toml", TALK + '[draft]\nconfig = "draft.json"\ncheckpoint = "ckpt"\n')
    assert "model.mask_tokens.weight: found no such tensor" in refused(2, "run", "d.toml", *pins)
    home.write("d.toml", TALK + '[draft]\ncheckpoint = "gone"\n')
    assert "draft.checkpoint: found 'gone', which does not exist" in refused(2, "run", "d.toml", *pins)
    home.write("draft.json", json.dumps({**CONFIG, "intermediate_size": 96}))
    home.write("d.toml", TALK + '[draft]\nconfig = "draft.json"\ncheckpoint = "ckpt"\n')
    assert "tensors are not as the model needs them" in refused(2, "run", "d.toml", *pins)
    home.write("e.toml", (home.folder / "r.toml").read_text() + '[draft]\nconfig = "draft.json"\n')
    assert "draft: found a draft model; expected none: nothing is drafted when training" in refused(
        2, "search", "e.toml"
    )
    for value, said in (("[1.5]", "at most 1"), ('"much"', "")):
        flag = f'workload.acceptance={{ "draft" = {value} }}'
        assert "workload.acceptance.draft" in (text := refused(2, "run", "t.toml", "--set", flag)) and said in text
    assert "its workload trains" in refused(2, "profile", "--acceptance", "r.toml")
    assert "--quick: of a machine's profile" in refused(2, "profile", "--acceptance", "t.toml", "--quick")
    assert "--set: a machine's profile has no recipe" in refused(2, "profile", "--set", "a.b=1")
    assert runs(home) == 0


def test_masks_that_are_not_there_to_be_trained(refused: Callable[..., str], home: Home) -> None:
    said = refused(2, "run", "r.toml", *TENSOR, "--set", "workload.trained=masks")
    assert "workload.trained: found masks; expected a model with mask tokens (parallel_draft), or no such key" in said
    share = ("--set", "workload.mask_share=0.5")
    assert "workload.mask_share: found 0.5" in refused(2, "run", "r.toml", *TENSOR, *share)
    said = refused(2, "run", "r.toml", *TENSOR, "--set", "workload.trained=mask")
    assert "workload.trained" in said and "(nearest: masks)" in said
    home.write("model.json", json.dumps({**CONFIG, "parallel_draft": 40}))
    said = refused(2, "run", "r.toml", *TENSOR)
    assert "workload.sequence_length: found 32; expected at least parallel_draft = 40" in said
    home.write("model.json", json.dumps({**CONFIG, "parallel_draft": 1}))
    assert "parallel_draft: found 1; expected a whole number >= 2" in refused(2, "run", "r.toml", *TENSOR)
    assert runs(home) == 0


def test_weights_that_cannot_be_saved(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    home.write("file", "x")
    for words, said in (
        (("t.toml", *TENSOR, "--save", "new"), "--save: this plan generates"),
        (("r.toml", *TENSOR, "--save", "ckpt"), "ckpt: found something there already; expected a folder that does not"),
        (("r.toml", *TENSOR, "--save", "file"), "file: not overwritten"),
        (("r.toml", *TENSOR, "--save", "file/below"), "which is no folder; expected a folder that can be written"),
    ):
        assert said in refused(2, "run", *words)
    assert runs(home) == 0 and not (home.folder / "new").exists()


def test_a_learning_rate_that_falls_before_it_has_risen(refused: Callable[..., str]) -> None:
    keys = ("--set", "workload.warmup_steps=10", "--set", "workload.decay_steps=10")
    said = refused(2, "run", "r.toml", *TENSOR, *keys)
    assert "workload.decay_steps: found 10; expected more than warmup_steps = 10, from where it falls, or 0" in said
    assert "workload.warmup_steps: found -1" in refused(2, "run", "r.toml", "--set", "workload.warmup_steps=-1")


# --- nothing that is read is executed


def test_names_are_text_in_pictures(autotune: Autotune, home: Home) -> None:
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    home.write("model.json", json.dumps({**CONFIG, "name": name}))
    for form in ("html", "svg"):
        said = autotune("plot", "r.toml", *TENSOR, "--out", f"t.{form}")
        assert said.code == 0, said.stderr
        page = (home.folder / f"t.{form}").read_text()
        assert "<img" not in page and "<script>alert" not in page
    assert autotune("search", "r.toml", "-q").code == 0 and autotune("plans", "ls").code == 0


def test_what_a_database_or_a_profile_holds_is_text(autotune: Autotune, home: Home) -> None:
    assert autotune("search", "r.toml", "-q").code == 0
    code = f"__import__('os').mkdir({str(home.folder / 'boom')!r})"
    profile = json.loads((home.folder / "two.json").read_text())
    profile["name"] = code
    home.write("two.json", json.dumps(profile))
    assert autotune("simulate", "r.toml", "--set", "machine.use=./two.json", *TENSOR).code == 0
    with closing(sqlite3.connect(home.folder / "plans.db")) as file:
        file.execute("UPDATE plans SET axes = ?", (code,))
        file.commit()
    said = autotune("plans", "ls")
    assert said.code == 4 and "Traceback" not in said.stderr
    assert not (home.folder / "boom").exists()


# --- caches


def small_device(home: Home, megabytes: float) -> None:
    """A machine like this one, of so little memory."""
    profile = load_profile(home.folder / "two.json")
    device = replace(profile.device, memory_bytes=int(megabytes * 2**20), context_bytes=0)
    dump_profile(replace(profile, name="small", device=device), home.folder / "small.json")


def test_a_cache_for_which_there_is_no_room(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    """Whether a search looks for a plan or a run has one: exit 3, what takes the room, and prompts that would fit."""
    talk = TALK.replace('use = "this"', 'use = "small.json"').replace('prompt = "def f("\n', "").replace("= 6", "= 50")
    home.write("long.toml", talk)
    small_device(home, 0.15)
    said = refused(3, "search", "long.toml", "--measure", "0")
    assert "memory of a device: at most" in said and "kv_cache" in said
    length = int(said.split("nearest: prompt_length = ")[1].split()[0])
    assert 1 <= length < 50
    fitting = home.run("search", home.write("fits.toml", talk.replace("= 50", f"= {length}")), "--measure", "0")
    assert fitting.code == 0, fitting.stderr
    longer = talk.replace("= 50", f"= {length + 1}")
    assert home.run("search", home.write("longer.toml", longer), "--measure", "0").code == 3
    small_device(home, 0.24)
    said = refused(3, "run", "long.toml", *TENSOR)
    assert "on a device, and two workers has" in said and "nearest: prompt_length = " in said
    small_device(home, 0.01)
    assert "its weights alone do not fit" in refused(3, "run", "long.toml", *TENSOR)


def test_lengths_of_prompts(refused: Callable[..., str], checkpoint: Path, home: Home) -> None:
    talk = TALK.replace('prompt = "def f("\n', "prompt_lengths = [6, 7]\n")
    home.write("t.toml", talk)
    said = refused(2, "run", "t.toml", *TENSOR)
    assert "t.toml: workload.prompt_lengths: found 7; expected at most 6 (prompt_length): the cache has no room" in said
    home.write("t.toml", talk.replace("[6, 7]", "[6, 5, 4]"))
    assert "found 3 lengths; expected one of each of the 2 prompts of the batch (nearest: 2)" in refused(
        2, "search", "t.toml"
    )
    home.write("t.toml", talk.replace("[6, 7]", "[6, 0]"))
    assert "workload.prompt_lengths" in refused(2, "search", "t.toml")
    home.write("t.toml", talk.replace("[6, 7]", '[6, 5]\nprompt = "a"'))
    assert "expected either prompt or prompt_lengths: texts have lengths" in refused(2, "search", "t.toml")
    home.write("t.toml", TALK.replace("[search]\n", "[search]\npage = 32\n"))
    assert "search.page: found 32; expected one of 0, 16, 64, 256" in refused(2, "search", "t.toml")
