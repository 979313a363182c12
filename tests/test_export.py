"""Plans handed over to other engines: flags that parse back, tables by batch, and nothing that is silently dropped."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from autotune.export.engines import ENGINES
from autotune.export.served import Job, name_of
from autotune.export.vllm import ranges
from autotune.planners.by_batch import AtBatch, by_batch
from autotune.planners.decoding.strategies import AXES, LONGEST, STRATEGIES
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.families import load_model
from autotune.spec.plan import FUSED, INT8, PLAIN, REJECTION, Plan
from autotune.spec.workload import Acceptance, Workload
from tests.recipes import ROOT, Autotune

MODELS = ROOT / "recipes" / "models"
LLAMA, SMALL = (load_model(MODELS / f"meta-llama--Llama-{size}.json") for size in ("3.1-8B", "3.2-1B"))
WORK = Workload(kind="generate", prompt_length=512, new_tokens=256, batch=8, draft=SMALL)
PLANS = {
    PLAIN: Plan(micro_batch=4),
    "ngram": Plan(micro_batch=4, decoding="ngram", speculate=4, match=2),
    "jacobi": Plan(micro_batch=4, decoding="jacobi", speculate=4),
    "lookahead": Plan(micro_batch=4, decoding="lookahead", speculate=3, branches=4, window=5),
    "masks": Plan(micro_batch=4, decoding="masks", speculate=3),
    "draft": Plan(micro_batch=4, decoding="draft", speculate=3),
    "parallel": Plan(micro_batch=4, decoding="parallel", speculate=4),
    "heads": Plan(micro_batch=4, decoding="heads", speculate=3, tree="0,0,1,1,3"),
}
TABLE = (
    AtBatch(1, 4, 400.0, 200.0),
    AtBatch(2, 4, 700.0, 390.0),
    AtBatch(8, 2, 1600.0, 1500.0),
    AtBatch(32, 0, 4e3, 4e3),
)
RECIPE = f"""
[model]
config = "{MODELS / "meta-llama--Llama-3.1-8B.json"}"
[draft]
config = "{MODELS / "meta-llama--Llama-3.2-1B.json"}"
[machine]
use = "h200-sxm"
devices = 2
[workload]
kind = "generate"
prompt_length = 512
new_tokens = 256
batch = 8
acceptance = {{ "ngram match=2" = [0.5, 0.8, 0.8, 0.8], draft = [0.8, 0.7, 0.7] }}
"""
NGRAM = ("--pin", "decoding=ngram", "--pin", "speculate=4", "--pin", "match=2", "--pin", "micro_batch=4")

# Which flags there are, by engine, and what their values are.
WORDS: dict[str, dict[str, Any]] = {
    "vllm": {
        "--tensor-parallel-size": int,
        "--pipeline-parallel-size": int,
        "--data-parallel-size": int,
        "--dtype": str,
        "--max-model-len": int,
        "--max-num-seqs": int,
        "--attention-backend": str,
        "--speculative-config": json.loads,
    },
    "sglang": {
        "--model-path": str,
        "--tp-size": int,
        "--pp-size": int,
        "--dp-size": int,
        "--dtype": str,
        "--context-length": int,
        "--max-running-requests": int,
        "--pp-max-micro-batch-size": int,
        "--attention-backend": str,
        "--speculative-algorithm": str,
        "--speculative-draft-model-path": str,
        "--speculative-num-steps": int,
        "--speculative-num-draft-tokens": int,
        "--speculative-eagle-topk": int,
        "--speculative-ngram-max-bfs-breadth": int,
        "--speculative-ngram-max-trie-depth": int,
    },
}
WORDS["trtllm"] = {
    "--backend": str,
    "--tp_size": int,
    "--pp_size": int,
    "--max_batch_size": int,
    "--max_seq_len": int,
    "--max_num_tokens": int,
    "--config": str,
}
COMMANDS = {
    "vllm": ["vllm", "serve"],
    "sglang": ["python3", "-m", "sglang.launch_server"],
    "trtllm": ["trtllm-serve"],
}


def parsed(engine: str, command: str | tuple[str, ...]) -> dict[str, Any]:
    """The values of a command line, as an engine would read them."""
    words = shlex.split(command) if isinstance(command, str) else list(command)
    start = COMMANDS[engine]
    assert words[: len(start)] == start
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    if engine != "sglang":
        parser.add_argument("model")
    if engine == "trtllm":
        parser.add_argument("--enable_chunked_prefill", action="store_true")
    for flag, kind in WORDS[engine].items():
        parser.add_argument(flag, type=kind)
    return {key: value for key, value in vars(parser.parse_args(words[len(start) :])).items() if value is not None}


def lost_by(engine: str, plan: Plan, work: Workload = WORK) -> dict[str, str]:
    return {lost.axis: lost.instead for lost in ENGINES[engine](Job(plan, work, "m", "d", TABLE)).lost}


# --- every engine


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("decoding", STRATEGIES)
def test_a_strategy_is_flags_or_said_to_be_lost(engine: str, decoding: str) -> None:
    plan = PLANS[decoding]
    export = ENGINES[engine](Job(plan, WORK, "m", "d"))
    plain = ENGINES[engine](Job(PLANS[PLAIN], WORK, "m", "d"))
    lost = {one.axis for one in export.lost}
    parsed(engine, export.arguments)
    if decoding == PLAIN:
        assert lost == {"attention", "temperature"}
    elif "decoding" in lost:
        assert (export.arguments, export.text) == (plain.arguments, plain.text), "plain is used instead"
        assert {axis for axis in AXES if getattr(plan, axis) != getattr(Plan(), axis)} <= lost
    else:
        assert (export.arguments, export.text) != (plain.arguments, plain.text)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("decoding", STRATEGIES)
def test_no_axis_is_dropped(engine: str, decoding: str) -> None:
    """Whatever a generation's plan says is either in the command or named as lost."""
    work = replace(WORK, temperature=0.7)
    plan = PLANS[decoding]
    changes: dict[str, Any] = {"data": 2, "tensor": 2, "pipeline": 2, "micro_batch": 8, "attention": "flash"}
    changes |= {"kernels": FUSED, "schedule": "gpipe", "weights": INT8, "page": 64}
    numbers = [axis for axis in STRATEGIES[decoding].axes if isinstance(getattr(plan, axis), int)]
    changes |= {axis: 2 + getattr(plan, axis) for axis in numbers}
    changes |= {"tree": "0,1,2"} if "tree" in STRATEGIES[decoding].axes else {}
    changes |= {"commit": STRATEGIES[decoding].commits[-1]} if "commit" in STRATEGIES[decoding].axes else {}
    before = ENGINES[engine](Job(plan, work, "m", "d"))
    for axis, value in changes.items():
        after = ENGINES[engine](Job(replace(plan, **{axis: value}), work, "m", "d"))
        assert (after.arguments, after.text, after.lost) != (before.arguments, before.text, before.lost), axis


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_lost_is_named_with_what_is_used_instead(engine: str) -> None:
    ngram, draft = PLANS["ngram"], PLANS["draft"]
    warm = replace(WORK, temperature=0.7, top_k=40)
    assert "plain decoding is used" in lost_by(engine, PLANS["jacobi"])["decoding"]
    assert "one row" in lost_by(engine, replace(ngram, branches=2))["branches"]
    assert engine == "trtllm" or "rejection sampling" in lost_by(engine, draft, warm)["commit"]
    assert "commit" not in lost_by(engine, draft), "a greedy choice is matched by rejection sampling as well"
    assert "top_k=40" in lost_by(engine, ngram, warm)["top_k"]
    assert "of its own" in lost_by(engine, replace(ngram, kernels=FUSED))["kernels"]
    assert "made for it" in lost_by(engine, replace(ngram, weights=INT8))["weights"]
    assert "of its own" in lost_by(engine, replace(ngram, page=64))["page"]
    assert "float32" in lost_by(engine, ngram, replace(WORK, precision="fp64"))["precision"]
    assert "2 tensor ranks" in lost_by(engine, replace(draft, tensor=2))["draft"]
    assert "nothing like it" in lost_by(engine, replace(ngram, schedule="gpipe"))["schedule"]


# --- one engine


def test_vllm() -> None:
    plan = replace(PLANS["ngram"], tensor=2, pipeline=2, attention="flash")
    export = ENGINES["vllm"](Job(plan, WORK, "meta-llama/Llama-3.1-8B", "", TABLE))
    values = parsed("vllm", export.arguments)
    config = values.pop("speculative_config")
    assert values == {
        "model": "meta-llama/Llama-3.1-8B",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "data_parallel_size": 1,
        "dtype": "bfloat16",
        "max_model_len": 768,
        "max_num_seqs": 4,
        "attention_backend": "FLASH_ATTN",
    }
    assert any("0.15" in note for note in export.notes) and any("EAGLE" in note for note in export.notes)
    assert export.table and config == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": LONGEST,
        "num_speculative_tokens_per_batch_size": [[1, 7, 4], [8, 31, 2], [32, 32, 0]],
    }
    draft = replace(PLANS["draft"], commit=REJECTION)
    config = parsed("vllm", ENGINES["vllm"](Job(draft, replace(WORK, temperature=1.0), "m", "d")).arguments)
    assert config["speculative_config"] == {
        "method": "draft_model",
        "model": "d",
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }


def test_trtllm() -> None:
    export = ENGINES["trtllm"](Job(replace(PLANS["ngram"], tensor=2, prompt_chunk=128), WORK, "m", "", TABLE))
    values = parsed("trtllm", export.arguments)
    assert values == {
        "model": "m",
        "backend": "pytorch",
        "tp_size": 2,
        "pp_size": 1,
        "max_batch_size": 4,
        "max_seq_len": 768,
        "max_num_tokens": 512,
        "enable_chunked_prefill": True,
        "config": export.file,
    }
    told = yaml.safe_load(export.text)
    assert export.table and told["speculative_config"]["draft_len_schedule"] == {7: 4, 31: 2}
    assert told["speculative_config"]["decoding_type"] == "NGram" and told["disable_overlap_scheduler"]
    draft = yaml.safe_load(ENGINES["trtllm"](Job(PLANS["draft"], WORK, "m", "d")).text)
    assert draft["speculative_config"] == {
        "decoding_type": "Draft_Target",
        "max_draft_len": 3,
        "speculative_model": "d",
    }
    assert "router" in lost_by("trtllm", replace(PLANS[PLAIN], data=2))["data"]
    warm = replace(WORK, temperature=1.0)
    assert "commit" not in lost_by("trtllm", PLANS["draft"], warm)
    assert "fewer kept" in lost_by("trtllm", replace(PLANS["draft"], commit=REJECTION), warm)["commit"]


def test_vllm_takes_no_table_over_data_ranks() -> None:
    export = ENGINES["vllm"](Job(replace(PLANS["ngram"], data=2), WORK, "m", "", TABLE))
    values = parsed("vllm", export.arguments)
    assert "num_speculative_tokens_per_batch_size" not in values["speculative_config"] and not export.table
    assert (values["data_parallel_size"], values["max_num_seqs"]) == (2, 4), "as many sequences for each replica"
    assert "4 tokens at every batch" in {lost.axis: lost.instead for lost in export.lost}["table"]


def test_ranges_cover_every_batch_once() -> None:
    rows = [AtBatch(batch, speculate, 1.0, 1.0) for batch, speculate in ((16, 0), (4, 3))]
    assert ranges(Job(replace(PLANS["ngram"], micro_batch=64), WORK, "m", "", tuple(rows))) == [[1, 15, 3], [16, 64, 0]]


def test_sglang() -> None:
    values = parsed("sglang", ENGINES["sglang"](Job(replace(PLANS["ngram"], attention="flash"), WORK, "m")).arguments)
    assert values["speculative_algorithm"] == "NGRAM" and values["attention_backend"] == "fa3"
    assert values["speculative_num_draft_tokens"] == values["speculative_num_steps"] + 1 == 5
    assert values["speculative_ngram_max_trie_depth"] == LONGEST + 4
    values = parsed("sglang", ENGINES["sglang"](Job(PLANS["draft"], WORK, "m", "d")).arguments)
    assert values["speculative_algorithm"] == "STANDALONE" and values["speculative_draft_model_path"] == "d"
    over = ENGINES["sglang"](Job(replace(PLANS["draft"], pipeline=2), WORK, "m", "d"))
    assert "speculative_algorithm" not in parsed("sglang", over.arguments), "a pipeline does not speculate there"
    assert "plain decoding is used" in {lost.axis: lost.instead for lost in over.lost}["decoding"]


def test_names() -> None:
    assert name_of(LLAMA, "") == "meta-llama/Llama-3.1-8B"
    assert name_of(LLAMA, "/a b/c") == "/a b/c"


# --- tables


def test_a_table_flips_to_none_where_speculation_does_not_pay() -> None:
    profile = load_profile(shipped()["h200-sxm"])
    batches = (1, 8, 32, 128)

    def best(first: float) -> list[int]:
        known = Acceptance("ngram match=2", (first, *[0.8] * 7))
        work = replace(WORK, acceptance=(known,))
        rows = by_batch(PLANS["ngram"], LLAMA, work, profile, batches)
        assert [row.batch for row in rows] == list(batches)
        assert all(row.tokens_per_s >= row.plain_tokens_per_s for row in rows)
        return [row.speculate for row in rows]

    good, poor = best(0.5), best(0.05)
    assert good == sorted(good, reverse=True) and good[0] == 8 and good[-1] > 0
    assert poor[-1] == 0 and all(less <= more for less, more in zip(poor, good, strict=True))
    assert by_batch(PLANS["ngram"], LLAMA, WORK, profile, batches) == (), "nobody knows what is kept"
    assert by_batch(PLANS[PLAIN], LLAMA, WORK, profile, batches) == ()


def test_a_batch_that_does_not_fit_is_in_no_table() -> None:
    work = replace(WORK, acceptance=(Acceptance("ngram match=2", (0.5,)),))
    rows = by_batch(PLANS["ngram"], LLAMA, work, load_profile(shipped()["h200-sxm"]), (8, 50000))
    assert [row.batch for row in rows] == [8]


# --- the command


@pytest.fixture
def generates(tmp_path: Path) -> str:
    (tmp_path / "g.toml").write_text(RECIPE)
    return "g.toml"


def test_the_command(autotune: Autotune, generates: str) -> None:
    said = autotune("export", generates, "--to", "vllm", *NGRAM, "--pin", "tensor=2", "--batches", "32, 1,8,8")
    assert said.code == 0, said.stderr
    assert len(said.stdout.splitlines()) == 1
    values = parsed("vllm", said.stdout)
    rows = values["speculative_config"]["num_speculative_tokens_per_batch_size"]
    assert values["tensor_parallel_size"] == 2 and rows[0][0] == 1 and rows[-1][1] == 32
    assert "not expressed: attention sdpa" in said.stderr and "#" not in said.stderr

    said = autotune("export", generates, "--to", "sglang", *NGRAM, "--pin", "tensor=2", "--batches", "1,8", "--json")
    answer = said.json
    assert answer["schema"] == "autotune.export/1" and answer["engine"] == "sglang"
    assert shlex.split(answer["command"]) == answer["arguments"]
    assert [row["batch"] for row in answer["table"]] == [1, 8] and answer["table_in_command"] is False
    assert {"match", "table"} <= {lost["axis"] for lost in answer["not_expressed"]}
    assert "# 8: " in said.stderr
    poor = f"workload.acceptance={{ 'ngram match=2' = {[0.05] * 4} }}"
    said = autotune("export", generates, "--to", "vllm", *NGRAM, "--pin", "data=1", "--pin", "tensor=2", "--set", poor,
                    "--batches", "1,128")  # fmt: skip
    config = parsed("vllm", said.stdout)["speculative_config"]
    assert config["num_speculative_tokens_per_batch_size"][-1][2] == 0


def test_a_lock_and_a_stored_plan(autotune: Autotune, generates: str) -> None:
    axes = (
        "decoding=ngram",
        "tensor=2",
        "micro_batch=[4, 8]",
        "speculate=[2, 4]",
        "kernels=library",
        "attention=flash",
    )
    sets = [word for axis in axes for word in ("--set", f"search.{axis}")]
    found = autotune("search", generates, *sets, "--json")
    assert found.code == 0, found.stderr
    asked = ("--to", "vllm", *sets, "--json")
    of_recipe = autotune("export", generates, *asked).json
    assert of_recipe["plan_id"] == found.json["plan_id"]
    of_plan = autotune("export", found.json["plan_id"], "--to", "vllm", "--json").json
    assert of_plan["arguments"] == of_recipe["arguments"]
    Path(generates).unlink()
    assert autotune("export", "g.lock.json", "--to", "vllm", "--json").json == of_recipe


def test_paths_with_spaces(autotune: Autotune, generates: str) -> None:
    for folder, name in (("my model", "3.1-8B"), ("a draft's", "3.2-1B")):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text((MODELS / f"meta-llama--Llama-{name}.json").read_text())
        save_file({"x": np.zeros(1)}, Path(folder) / "model.safetensors")  # the export looks at no weight
    words = ("--set", "model.checkpoint=my model", "--set", "draft.checkpoint=a draft's")
    text = Path(generates).read_text().replace("config =", "#")
    Path(generates).write_text(text)
    pins = ("--pin", "decoding=draft", "--pin", "speculate=3", "--pin", "tensor=2")
    for engine, model, draft in (
        ("vllm", "model", lambda values: values["speculative_config"]["model"]),
        ("sglang", "model_path", lambda values: values["speculative_draft_model_path"]),
    ):
        said = autotune("export", generates, "--to", engine, *words, *pins)
        assert said.code == 0, said.stderr
        values = parsed(engine, said.stdout)
        assert (values[model], draft(values)) == (str(Path("my model").absolute()), str(Path("a draft's").absolute()))
        assert "names no checkpoint" not in said.stderr


def test_without_an_acceptance_there_is_no_table(autotune: Autotune, generates: str) -> None:
    said = autotune("export", generates, "--to", "vllm", "--set", "workload.acceptance={}", *NGRAM, "--pin", "tensor=2")
    assert said.code == 0 and "no table of tokens by batch" in said.stderr and "acceptance" in said.stderr
    assert parsed("vllm", said.stdout)["speculative_config"]["num_speculative_tokens"] == 4


def test_wrong_input(autotune: Autotune, generates: str, recipe: str) -> None:
    def refused(code: int, *words: str) -> str:
        said = autotune("export", *words)
        assert (said.code, said.stdout) == (code, "") and "Traceback" not in said.stderr, said.stderr
        return said.stderr

    assert "this plan trains" in refused(2, recipe, "--to", "vllm", "--pin", "tensor=2")
    assert "nearest: vllm" in refused(2, generates, "--to", "vlm", *NGRAM)
    assert "--to" in refused(2, generates)
    for batches in ("", "0", "1,,2", "1,two", "-1", "1.5", "1000000", "٣"):
        text = refused(2, generates, "--to", "vllm", *NGRAM, f"--batches={batches}")
        assert "--batches: found" in text and "whole numbers" in text
    assert "nearest" in refused(3, generates, "--to", "vllm", *NGRAM, "--pin", "tensor=2", "--pin", "micro_batch=3")
    assert "has no lock yet" in refused(2, generates, "--to", "vllm")
