"""Exports of training plans given to the parsers and config classes of the engines themselves.

    python -m tests.beside_engines --megatron FOLDER --deepspeed FOLDER --torchtitan FOLDER

Each folder is a checkout of the engine, of the commit that its exporter names. Megatron-LM's own parser reads the
command; DeepSpeed's own config class reads the ZeRO section, and its source is searched for the other keys; of
torchtitan the fields of the config classes are read out of the source, since importing it takes its whole environment.
Not collected by pytest; exits with 6 where an engine would refuse what it is given. `--record FILE` writes the names of
Megatron-LM's options, which `tests/test_export_training.py` goes by.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotune.export.engines import TRAINERS
from autotune.export.trained import TrainJob
from tests.test_export_training import JOBS

STATIC = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16", "data_types")


def parser_of(folder: Path) -> argparse.ArgumentParser:
    """Megatron-LM's, with everything it says at import kept quiet."""
    sys.path.insert(0, str(folder))
    if not hasattr(typing, "override"):  # its source is of Python 3.12
        typing.override = lambda function: function  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments  # type: ignore[import-not-found]

    made: argparse.ArgumentParser = add_megatron_arguments(argparse.ArgumentParser(exit_on_error=False))
    return made


def megatron(folder: Path) -> Callable[[TrainJob], Iterator[str]]:
    parser = parser_of(folder)

    def wrong(job: TrainJob) -> Iterator[str]:
        words = list(TRAINERS["megatron"](job).arguments)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parser.parse_args(words[words.index("pretrain_gpt.py") + 1 :])
        except (SystemExit, argparse.ArgumentError) as error:
            yield f"{said.getvalue().strip().splitlines()[-1:]} {error}"

    return wrong


def deepspeed(folder: Path) -> Callable[[TrainJob], Iterator[str]]:
    sources = "\n".join(file.read_text() for file in (folder / "deepspeed" / "runtime").rglob("*.py"))
    fields = fields_of(folder / "deepspeed" / "runtime" / "zero" / "config.py", "DeepSpeedZeroConfig")
    offload = fields_of(folder / "deepspeed" / "runtime" / "zero" / "offload_config.py", "OffloadOptimizerConfig")

    def wrong(job: TrainJob) -> Iterator[str]:
        config = json.loads(TRAINERS["deepspeed"](job).text)
        yield from (f"no key {key}" for key in config if f'"{key}"' not in sources and f"'{key}'" not in sources)
        zero = config["zero_optimization"]
        yield from (f"no key zero_optimization.{key}" for key in zero if key not in fields)
        yield from (f"no key offload_optimizer.{k}" for k in zero.get("offload_optimizer", {}) if k not in offload)
        for key in config.get("scheduler", {}).get("params", {}):
            if f"{key}:" not in sources:
                yield f"no parameter {key} of {config['scheduler']['type']}"

    return wrong


def torchtitan(folder: Path) -> Callable[[TrainJob], Iterator[str]]:
    configs = folder / "torchtitan" / "config" / "configs.py"
    known = {
        "parallelism": fields_of(configs, "ParallelismConfig"),
        "training": fields_of(configs, "TrainingConfig"),
    }
    rates = fields_of(folder / "torchtitan" / "components" / "optimizer" / "lr_scheduler.py", "Config")

    def wrong(job: TrainJob) -> Iterator[str]:
        module = ast.parse(TRAINERS["torchtitan"](job).text)
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                section = node.value.attr
                if section in known and node.attr not in known[section]:
                    yield f"no field config.{section}.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "LRSchedulersContainer.Config":
                yield from (
                    f"no field {word.arg} of a learning rate" for word in node.keywords if word.arg not in rates
                )
            if isinstance(node, ast.ImportFrom) and node.module:
                place = folder / Path(*node.module.split("."))
                source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
                yield from (f"{node.module} has no {n.name}" for n in node.names if n.name not in source)

    return wrong


def fields_of(file: Path, name: str) -> set[str]:
    """The annotated fields of the classes whose name ends so."""
    return {
        field.target.id
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith(name)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


CHECKS: dict[str, Callable[[Path], Callable[[TrainJob], Iterator[str]]]] = {
    "megatron": megatron,
    "deepspeed": deepspeed,
    "torchtitan": torchtitan,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in CHECKS:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--record", type=Path, help="where the names of Megatron-LM's options go")
    asked: Any = parser.parse_args()
    failed = 0
    for name, check in CHECKS.items():
        folder = getattr(asked, name)
        if folder is None:
            continue
        wrong = check(folder)
        for label, job in JOBS.items():
            for problem in wrong(job):
                failed += 1
                print(f"{name} {label}: {problem}")
        print(f"{name}: {len(JOBS)} plans given to it")
    if asked.record and asked.megatron:
        names = sorted({o for action in parser_of(asked.megatron)._actions for o in action.option_strings})
        asked.record.write_text(json.dumps({"commit": "d98e8a64dd", "options": names}, indent=0) + "\n")
    return 6 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
