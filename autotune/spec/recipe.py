"""A recipe: which model, which work, which machine, what matters. Read from TOML, checked whole, then asked.

The file's shape is in recipe_schema.py, the layers of overrides in recipe_layers.py, messages in recipe_problems.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autotune.spec.config_file import config_file, read_config
from autotune.spec.digest import digest
from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name
from autotune.spec.families import from_config, load_model
from autotune.spec.heads import HeadsSpec
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.prediction import Question
from autotune.spec.recipe_aim import Aim, objective_problems
from autotune.spec.recipe_layers import from_environment, from_flags, merge, parse_toml, read_toml
from autotune.spec.recipe_problems import problems
from autotune.spec.recipe_schema import (
    AXES,
    SCHEMA_ID,
    GenerateSection,
    ModelSection,
    RecipeFile,
    TrainSection,
    json_schema,
)
from autotune.spec.workload import Acceptance, Workload, mask_rows

__all__ = ["AXES", "SCHEMA_ID", "Recipe", "from_merged", "json_schema", "load_recipe"]

STDIN = "-"
ADDED = ("typical_epsilon", "typical_delta")  # keys of [workload] that earlier versions did not have


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `path` is as the user gave it; `folder` is what its relative paths start from."""

    path: str
    folder: Path
    file: RecipeFile

    @property
    def name(self) -> str:
        """The recipe's own name, or its file's."""
        return self.file.name or (Path(self.path).stem if self.path not in ("", STDIN) else "recipe")

    @property
    def kind(self) -> str:
        return self.file.workload.kind

    @property
    def use(self) -> str:
        """`[machine] use`; a path comes back resolved against the recipe's folder."""
        use = self.file.machine.use
        return str(self._at(use)) if is_path(use) else use

    @property
    def checkpoint(self) -> str:
        """The checkpoint's folder, absolute; "" without one."""
        folder = self.file.model.checkpoint
        return str(self._at(folder)) if folder else ""

    @property
    def draft_checkpoint(self) -> str:
        """The draft model's folder, absolute; "" without one."""
        folder = self.file.draft.checkpoint if self.file.draft else None
        return str(self._at(folder)) if folder else ""

    @property
    def target_checkpoint(self) -> str:
        """The folder of the model that heads are trained for, absolute; "" without one."""
        folder = self.file.target.checkpoint if self.file.target else None
        return str(self._at(folder)) if folder else ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts to continue; empty: prompts are cut from the default corpus's held-out files."""
        prompt = getattr(self.file.workload, "prompt", "")
        return (prompt,) if isinstance(prompt, str) and prompt else tuple(prompt)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stop = getattr(self.file.workload, "stop", "")
        return tuple(filter(None, (stop,) if isinstance(stop, str) else stop))

    @property
    def steps(self) -> int:
        """Steps (train) or whole generations (generate) that a run measures."""
        return self.file.workload.steps

    @property
    def seed(self) -> int:
        return int(self.merged()["search"]["seed"])

    def _spec(self, section: ModelSection, name: str) -> ModelSpec:
        """The model of a section, `[name]`."""
        if file := self._config_file(section):
            return load_model(file)
        raw = dict(section.model_extra or {})
        # Its content names it, not the file's or recipe's name: a model's digest covers its name.
        shape = f"{raw.get('hidden_size', '')}x{raw.get('num_hidden_layers', raw.get('num_heads', ''))}"
        return from_config(raw, f"{self.path}: {name}", str(raw.get("name") or f"inline-{shape}"), inline=True)

    def _config_file(self, section: ModelSection) -> Path | None:
        """Where a model's config is; None where its keys are in the recipe."""
        if section.config is not None:
            return config_file(self._at(section.config))
        return self._at(section.checkpoint) / "config.json" if section.checkpoint is not None else None

    def config(self) -> dict[str, Any]:
        """The model's config as `[model]` has it or as the file says that it names."""
        section = self.file.model
        return dict(read_config(file) if (file := self._config_file(section)) else section.model_extra or {})

    @cached_property
    def _model(self) -> ModelSpec:
        model = self._spec(self.file.model, "model")
        if getattr(self.file.workload, "frozen", False):
            model = replace(model, frozen=True)
        if self.file.target is None:
            return model
        if not isinstance(model, HeadsSpec):
            found = Problem(self.path, "target", f"a model of {model.architecture}", "decoding heads as [model]")
            raise UsageError(f"{self.path}: nothing is trained for a [target]", problems=[found])
        return replace(model, target=self._spec(self.file.target, "target"))

    @cached_property
    def _draft(self) -> ModelSpec | None:
        return self._spec(self.file.draft, "draft") if self.file.draft else None

    def model(self) -> ModelSpec:
        """The model that `[model]` names. Raises UsageError for a config that says too little or the wrong thing."""
        return self._model

    def workload_spec(self) -> Workload:
        """The work, without how long to run it."""
        section = self.file.workload
        if section.kind == "train":
            return Workload(
                kind="train",
                sequence_length=section.sequence_length,
                global_batch=section.global_batch,
                precision=section.precision,
                data=str(self._at(section.data)) if section.data else "",
                learning_rate=section.learning_rate,
                weight_decay=section.weight_decay,
                clip=section.clip,
                warmup_steps=section.warmup_steps,
                decay_steps=section.decay_steps,
                masks=self._masks(section),
            )
        return Workload(
            kind="generate",
            precision=section.precision,
            prompt_length=section.prompt_length,
            prompt_lengths=self._lengths(section),
            new_tokens=section.new_tokens,
            batch=section.batch,
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            typical_epsilon=section.typical_epsilon,
            typical_delta=section.typical_delta,
            draft=self._draft,
            acceptance=tuple(Acceptance(key, tuple(rates)) for key, rates in sorted(section.acceptance.items())),
        )

    def _lengths(self, section: GenerateSection) -> tuple[int, ...]:
        """The length of each prompt, as far as the recipe tells: its own list, or texts, a token a byte."""
        if section.prompt_lengths is not None:
            return tuple(section.prompt_lengths)
        texts = section.prompt if isinstance(section.prompt, list) else []
        lengths = tuple(len(text.encode("utf-8", "surrogateescape")) for text in texts)
        told = len(lengths) == section.batch and all(1 <= n <= section.prompt_length for n in lengths)
        return lengths if told else ()

    def _masks(self, section: TrainSection) -> tuple[int, ...]:
        """The rows of masks that a training of this model has. UsageError where there is no room for them, or where the
        recipe says how many there are of masks that its model does not have."""
        drafts, length = self.model().drafts, section.sequence_length
        if drafts:
            if length < drafts:
                expected = f"at least parallel_draft = {drafts}, the tokens that are drafted after a text"
                found = Problem(self.path, "workload.sequence_length", str(length), expected, str(drafts))
                raise UsageError(f"{self.path}: its sequences are too short to learn to draft", problems=[found])
            return mask_rows(length, drafts, section.mask_share, section.mask_least)
        usual = {key: TrainSection.model_fields[key].default for key in ("trained", "mask_share", "mask_least")}
        wrong = [
            Problem(
                self.path, f"workload.{key}", str(value), "a model with mask tokens (parallel_draft), or no such key"
            )
            for key, default in usual.items()
            if (value := getattr(section, key)) != default
        ]
        if wrong:
            raise UsageError(f"{self.path}: its model has no mask tokens", problems=wrong)
        return ()

    def axes(self) -> dict[str, tuple[object, ...]]:
        """Axis name to the values that `[search]` allows; an absent axis is not restricted."""
        given = self.merged()["search"]
        return {name: axis.values(given[name]) for name, axis in AXES.items() if given.get(name) is not None}

    def question(self, profile: Profile) -> Question:
        """What a search is asked about this recipe on `profile`'s machine.

        Raises EnvironmentFault where the recipe asks for more devices than the profile's links join.
        """
        devices = self.file.machine.devices or profile.device.count
        self._check_devices(devices, profile)
        search, limits = self.merged()["search"], self.file.objective.limits
        aim = Aim.of(self.file)
        return Question(
            model=self.model(),
            workload=self.workload_spec(),
            profile=profile,
            devices=devices,
            axes=self.axes(),
            minimize=aim.lead,
            memory_fraction=limits.memory_fraction,
            simulate_budget=search["budget"]["simulate"],
            measure_budget=search["budget"]["measure"],
            seconds=search["budget"]["seconds"],
            seed=search["seed"],
            objectives=aim.front,
            prefer=aim.prefer,
            tolerance=aim.tolerance,
            worlds=aim.worlds(devices, self.path),
            rates=aim.rates(profile, self.path),
        )

    def _check_devices(self, devices: int, profile: Profile) -> None:
        if any(link.size == 0 for link in profile.links):
            return
        most = max([profile.device.count, *(link.size for link in profile.links)])
        if devices > most:
            found = Problem(self.path, "machine.devices", str(devices), f"at most {most} on {profile.name}", str(most))
            raise EnvironmentFault("the machine has fewer devices than the recipe asks for", problems=[found])

    def merged(self) -> dict[str, Any]:
        """The whole recipe with overrides applied and defaults filled in; absent optional keys are left out."""
        return self._merged

    @cached_property
    def _merged(self) -> dict[str, Any]:
        whole = self.file.model_dump(exclude_none=True)
        whole["name"] = self.name
        return whole

    @property
    def digest(self) -> str:
        """Of everything that the answer depends on: not names and places of files, the gate, or how long to search."""
        merged = self.merged()
        usual = Workload()  # what came later and says nothing else than before is left out: older locks stay fresh
        left = {key for key in ADDED if merged["workload"].get(key) == getattr(usual, key)} | {
            "steps",
            "prompt",
            "stop",
        }
        workload = {key: value for key, value in merged["workload"].items() if key not in left}
        axes = {axis: list(values) for axis, values in self.axes().items()}
        parts = {"machine": merged["machine"], "objective": merged["objective"], "workload": workload, "search": axes}
        drafts = {"draft": self._draft.digest} if self._draft else {}
        devices = {"devices": search} if (search := merged["search"].get("devices")) is not None else {}
        return digest({**parts, "model": self.model().digest, **drafts, **devices})

    def _at(self, path: str) -> Path:
        return (self.folder / Path(path).expanduser()).absolute()


def is_path(use: str) -> bool:
    """Whether `[machine] use` is a file and not the name of a profile."""
    return "/" in use or use.endswith(".json")


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    names: Mapping[str, Collection[str]] | None = None,
) -> Recipe:
    """The recipe at `path` ("-": standard input) under AUTOTUNE_* variables and `--set` flags, the flags winning.

    `names` are the legal values of axes whose choices are tables of other parts (schedule, attention). Raises
    UsageError with every problem of every layer at once.
    """
    shown = str(path)
    if shown == STDIN:
        base, folder = parse_toml(sys.stdin.buffer.read(), "standard input"), Path.cwd()
    else:
        base, folder = read_toml(Path(path).expanduser(), shown), Path(path).expanduser().absolute().parent
    layers = [*from_environment(os.environ if environ is None else environ), *from_flags(overrides)]
    merged, origins = merge(base, layers)
    return _checked(merged, shown, folder, origins, names or {})


def from_merged(merged: Mapping[str, Any], path: str, folder: Path) -> Recipe:
    """The recipe that a lock or the database keeps, checked again: what is stored is input like any other."""
    return _checked(dict(merged), path, folder, {}, {})


def _checked(
    raw: dict[str, Any], shown: str, folder: Path, origins: Mapping[str, str], names: Mapping[str, Collection[str]]
) -> Recipe:
    found: list[Problem] = []
    file: RecipeFile | None = None
    try:
        file = RecipeFile.model_validate(raw)
    except ValidationError as error:
        found += problems(error, shown, origins, raw)
    found += _meaning(raw, shown, folder, origins, names)
    if found or file is None:
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise UsageError(f"{shown} has {count}", hint="`autotune recipe schema` lists every key", problems=found)
    return Recipe(shown, folder, file)


def _meaning(
    raw: Mapping[str, Any], shown: str, folder: Path, origins: Mapping[str, str], names: Mapping[str, Collection[str]]
) -> Iterator[Problem]:
    """Problems that the shape alone does not show: files that are not there, keys that exclude one another, names."""

    def at(key: str, found: str, expected: str, near: str | None = None) -> Problem:
        return Problem(origins.get(key, shown), key, found, expected, near)

    def section(name: str) -> Mapping[str, Any]:
        table = raw.get(name)
        return table if isinstance(table, dict) else {}

    for name in ("model", "draft", "target"):
        model = section(name)
        inline = sorted(model.keys() - {"config", "checkpoint"})
        if "config" in model and inline:
            near = nearest_name(inline[0], ("config", "checkpoint"))
            yield at(f"{name}.{inline[0]}", "a key beside config", "either config or the config's own keys", near)
        if model.keys().isdisjoint({"config", "checkpoint", "architectures"}):  # nothing tells what the others are of
            for key in inline:
                if near := nearest_name(key, ("config", "checkpoint")):
                    yield at(f"{name}.{key}", "an unknown key", "config, checkpoint, or the config's own keys", near)
        if name in raw and isinstance(raw[name], dict) and not model:
            yield at(name, "nothing", "config, checkpoint, or the config's own keys")
    if "draft" in raw and section("workload").get("kind") == "train":
        yield at("draft", "a draft model", "none: nothing is drafted when training")
    if "target" in raw and section("workload").get("kind") == "generate":
        yield at("target", "a target", "none: [model] is what generates, and [draft] what proposes to it")
    for dotted, value, is_folder in (
        ("model.config", section("model").get("config"), False),
        ("model.checkpoint", section("model").get("checkpoint"), True),
        ("draft.config", section("draft").get("config"), False),
        ("draft.checkpoint", section("draft").get("checkpoint"), True),
        ("target.config", section("target").get("config"), False),
        ("target.checkpoint", section("target").get("checkpoint"), True),
        ("workload.data", section("workload").get("data"), False),
        ("machine.use", section("machine").get("use"), False),
    ):
        if isinstance(value, str) and value and (dotted != "machine.use" or is_path(value)):
            yield from _file_problem(at, dotted, value, folder, is_folder)
    yield from _lengths_problems(at, section("workload"))
    warmup, decay = (section("workload").get(key) for key in ("warmup_steps", "decay_steps"))
    if type(warmup) is int and type(decay) is int and 0 < decay <= warmup:
        expected = f"more than warmup_steps = {warmup}, from where it falls, or 0"
        yield at("workload.decay_steps", str(decay), expected, str(warmup + 1))
    yield from objective_problems(at, section("objective"))
    for axis, known in names.items():
        value = section("search").get(axis)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item not in known:
                near = nearest_name(item, known)
                yield at(f"search.{axis}", repr(item), "one of " + ", ".join(sorted(known)), near)


def _lengths_problems(at: Any, workload: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the lengths of prompts, beside their shape."""
    lengths, key = workload.get("prompt_lengths"), "workload.prompt_lengths"
    if not isinstance(lengths, list) or not all(type(n) is int for n in lengths):
        return
    if workload.get("prompt"):
        yield at(key, "lengths beside texts", "either prompt or prompt_lengths: texts have lengths", "prompt")
    batch, most = workload.get("batch", 1), workload.get("prompt_length")
    if type(batch) is int and len(lengths) != batch:
        yield at(key, f"{len(lengths)} lengths", f"one of each of the {batch} prompts of the batch", str(batch))
    longer = [n for n in lengths if type(most) is int and n > most]
    if longer:
        yield at(key, str(longer[0]), f"at most {most} (prompt_length): the cache has no room for more", str(most))


def _file_problem(at: Any, key: str, value: str, folder: Path, is_folder: bool) -> Iterator[Problem]:
    """The problem with a path of a recipe, if any: it must be there, of its kind, and readable."""
    path = folder / Path(value).expanduser()
    expected = "a readable folder" if is_folder else "a readable file"
    try:
        right, there = (path.is_dir() if is_folder else path.is_file()), path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        right, there = False, False
    if not right:
        near = None
        if path.parent.is_dir() and not there:
            close = nearest_name(path.name, (p.name for p in path.parent.iterdir()))
            near = str(Path(value).parent / close) if close else None
        yield at(key, f"{value!r}, {'which is not one' if there else 'which does not exist'}", expected, near)
    elif not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
        yield at(key, f"{value!r}, which may not be read", expected)
