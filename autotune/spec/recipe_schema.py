"""The sections of a recipe as pydantic models: what each key means, which values it takes, and the JSON schema.

Only the shape is here. Reading files, layers of overrides and what a recipe means to a search are in recipe.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from autotune.spec.errors import nearest_name
from autotune.spec.objectives import KNEE, MAXIMIZED, MINIMIZED, MOST
from autotune.spec.plan import Plan

VERSION: Final = 1
SCHEMA_ID = "autotune.recipe/1"
MASK_SHARE, MASK_LEAST = 0.7, 0.2  # PARD's (2504.18583, section 4.1)
LONGEST_RANGE = 4096  # values that one { min, max } may stand for

# The choices of an axis. Schedules are a table of planners, which load_recipe is given; attention backends are one of
# the executor, which needs torch: a test holds the two equal.
CHOICES: dict[str, tuple[str | int, ...]] = {
    "recompute": ("none", "selective", "full"),
    "zero": (0, 1, 2, 3),
    "vocabulary": ("ends", "naive", "interlaced", "vocab-1", "vocab-2"),
    "optimizer": ("barrier", "post-validated"),
    "sync": ("eager", "late"),
    "split": ("own", "immediate", "fill", "end"),
    "offload_choice": ("selective", "uniform"),
    "gather_each": ("step", "unit"),
    "weight_gradients": ("apart", "joined"),
    "decoding": ("plain", "ngram", "jacobi", "lookahead", "masks", "draft", "parallel", "heads"),
    "refine": ("none", "ngram"),
    "commit": ("match", "rejection", "typical"),
    "weights": ("exact", "int8"),
    "page": (0, 16, 64, 256),
    "attention": ("sdpa", "flash", "cudnn", "efficient", "math"),
}


class Section(BaseModel):
    """Base of every section: unknown keys are errors, types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model: a Hugging Face config.json, a checkpoint folder with one, or the config's own keys in place."""

    model_config = ConfigDict(extra="allow", strict=True)

    config: str | None = Field(default=None, description="a Hugging Face config.json, path relative to the recipe")
    checkpoint: str | None = Field(
        default=None, description="a folder of safetensors files, path relative to the recipe"
    )


class DraftSection(ModelSection):
    """A smaller model that may propose tokens to the one of `[model]`; named as that is."""


class TargetSection(ModelSection):
    """The model whose hidden rows the decoding heads of `[model]` are trained on; named as that is."""


class MachineSection(Section):
    """Which machine the plan is for."""

    use: str = Field(default="this", description='"this", the name of a shipped or stored profile, or a path to one')
    devices: int | None = Field(
        default=None, ge=1, description="devices the plan may use; absent: all that the profile has"
    )
    price_per_hour: float | None = Field(
        default=None, gt=0, description="of one device, in any currency; absent: the profile's"
    )


# [workload] trained -> whether all weights but those of mask tokens stay what they are.
FROZEN = {"all": False, "masks": True}


class TrainSection(Section):
    """A training workload: one step is `global_batch` sequences of `sequence_length` tokens."""

    kind: Literal["train"]
    sequence_length: int = Field(ge=1, description="tokens of one sequence")
    global_batch: int = Field(ge=1, description="sequences of one optimizer step, over all replicas")
    precision: Literal["bf16", "fp32", "fp64"] = Field(default="bf16", description="bf16 keeps fp32 master weights")
    data: str = Field(
        default="", description='a text or .npy token file; "": the Python standard library\'s own source'
    )
    steps: int = Field(default=10, ge=1, description="steps that `autotune run` measures unless --steps says otherwise")
    learning_rate: float = Field(default=3e-4, gt=0, description="AdamW's")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's, decoupled")
    clip: float = Field(default=0.0, ge=0, description="most that the gradients' global norm may be; 0: no limit")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which learning_rate rises; 0: none")
    decay_steps: int = Field(default=0, ge=0, description="step at which it has fallen to a tenth; 0: never")
    trained: Literal["all", "masks"] = Field(
        default="all", description='"masks": the mask tokens alone, all other weights stay what they are'
    )
    mask_share: float = Field(
        default=MASK_SHARE, gt=0, le=1, description="of the masks one place ahead those that have another after them"
    )
    mask_least: float = Field(
        default=MASK_LEAST, ge=0, le=1, description="of all places those that have a mask, however far ahead"
    )

    @property
    def frozen(self) -> bool:
        return FROZEN[self.trained]


class GenerateSection(Section):
    """A generation workload: `batch` sequences, each a prompt and then `new_tokens` tokens."""

    kind: Literal["generate"]
    prompt_length: int = Field(ge=1, description="tokens of the longest prompt")
    prompt_lengths: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        description="tokens of each prompt, `batch` of them, where no text says; absent: prompt_length each",
    )
    new_tokens: int = Field(ge=1, description="tokens generated after the prompt")
    batch: int = Field(default=1, ge=1, description="sequences generated together, over all replicas")
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        default="bf16", description="of weights, activations and KV cache"
    )
    prompt: str | list[str] = Field(
        default="", description='text to continue; "": cut from the default corpus, of files that are not trained on'
    )
    temperature: float = Field(default=0.0, ge=0, description="of a drawn token's logits; 0: the likeliest token")
    top_k: int = Field(default=0, ge=0, description="tokens that are drawn from, the likeliest; 0: all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="probability of the likeliest tokens that are drawn from")
    stop: str | list[str] = Field(default="", description="text that ends an answer, or several; not part of it")
    acceptance: dict[str, list[Annotated[float, Field(ge=0, le=1)]]] = Field(
        default_factory=dict, description="of a strategy, how often each of its tokens is kept, as `profile` prints it"
    )
    typical_epsilon: float = Field(
        default=0.09, gt=0, le=1, description="of commit typical: a probability that is always enough"
    )
    typical_delta: float = Field(
        default=0.3, gt=0, description="of commit typical: what is enough, as a share of exp(-entropy)"
    )
    steps: int = Field(default=3, ge=1, description="whole generations that `autotune run` measures")


class Limits(Section):
    """What a plan must stay under."""

    memory_fraction: float = Field(default=0.92, gt=0, le=1, description="of a device's memory that a plan may use")


def _names(known: Sequence[str]) -> Any:
    """The type of a key that takes one objective of `known`, or a list of different ones."""

    def check(raw: object) -> object:
        wrong = [name for name in (raw if isinstance(raw, list) else [raw]) if name not in known]
        many = isinstance(raw, list) and not 0 < len(raw) <= MOST
        if raw is None or not (wrong or many or (isinstance(raw, list) and len(set(raw)) < len(raw))):
            return raw
        near = nearest_name(str(wrong[0]), known) if wrong else None
        expected = " or ".join(", ".join(known).rsplit(", ", 1))
        several = f", or a list of at most {MOST} different ones" if len(known) > 1 else ""
        raise PydanticCustomError("axis", "{expected}", {"expected": f"{expected}{several}", "nearest": near})

    one: dict[str, Any] = {"type": "string", "enum": list(known)}
    forms = [one, {"type": "array", "items": one, "minItems": 1, "maxItems": MOST, "uniqueItems": True}]
    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"anyOf": forms})]


class ObjectiveSection(Section):
    """What makes one plan better than another."""

    minimize: _names(MINIMIZED) = Field(default=None, description="one objective, or a list: the plans of its front")
    maximize: _names(MAXIMIZED) = Field(default=None, description="the same; beside minimize, one more of its list")
    prefer: Literal[*MINIMIZED, *MAXIMIZED, KNEE] | None = Field(  # type: ignore[valid-type]
        default=None, description="of a front the plan that is locked: the best in this objective; absent: the first's"
    )
    tolerance: float | None = Field(
        default=None, ge=0, le=0.1, description="share by which a plan of a front must be better in some objective"
    )
    limits: Limits = Field(default_factory=Limits)


class Budget(Section):
    """When a search stops, whichever comes first."""

    seconds: float = Field(default=60.0, gt=0, description="of wall time")
    simulate: int = Field(default=20000, ge=1, description="plans simulated")
    measure: int = Field(default=4, ge=0, description="plans run for a few steps, where the machine is at hand")


class GateSection(Section):
    """How `autotune gate` compares."""

    launches: int = Field(default=5, ge=3, description="process launches a side")
    threshold: float = Field(default=0.03, gt=0, lt=1, description="change of the median that counts, as a fraction")
    retries: int = Field(default=4, ge=0, description="times that two launches a side are added while inconclusive")


@dataclass(frozen=True)
class Axis:
    """An axis of `[search]`: the type of its values, and the choices where they are known here."""

    name: str
    type: type
    choices: tuple[str | int, ...] = ()
    least: int = 1  # of a whole number

    def refuse(self, value: object) -> PydanticCustomError:
        """The error for one value that this axis cannot take."""
        near = nearest_name(str(value), map(str, self.choices)) if self.choices else None
        return PydanticCustomError("axis", "{expected}", {"expected": self.expected, "nearest": near})

    @property
    def expected_one(self) -> str:
        """What a single value of this axis is, in words."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        return {int: f"a whole number from {self.least}", bool: "true or false", str: "a name"}[self.type]

    @property
    def expected(self) -> str:
        """What `[search]` may say for this axis, in words."""
        spread = ", or { min, max, step }" if self.type is int and not self.choices else ""
        return f"{self.expected_one}, a list of such{spread}"

    def one(self, value: object) -> object:
        """`value` if it is a legal single value of the axis."""
        legal = type(value) is self.type and (self.type is not int or bool(self.choices) or value >= self.least)  # type: ignore[operator]
        if not legal or (self.choices and value not in self.choices):
            raise self.refuse(value)
        return value

    def values(self, raw: object) -> tuple[object, ...]:
        """Every value that `raw` (a value, a list or a range) allows, in order, without repeats."""
        if isinstance(raw, dict):
            return self._range(raw)
        if isinstance(raw, list):
            if not raw:
                raise PydanticCustomError("axis", "{expected}", {"expected": f"{self.expected}; not an empty list"})
            return tuple(dict.fromkeys(self.one(item) for item in raw))
        return (self.one(raw),)

    def _range(self, raw: dict[str, object]) -> tuple[object, ...]:
        if self.type is not int or self.choices:
            raise self.refuse(raw)
        if not {"min", "max"} <= raw.keys() <= {"min", "max", "step"}:
            raise PydanticCustomError("axis", "{expected}", {"expected": "a range { min = 1, max = 8, step = 1 }"})
        low, high = (self.one(raw[key]) for key in ("min", "max"))
        step = replace(self, least=1).one(raw.get("step", 1))
        assert isinstance(low, int) and isinstance(high, int) and isinstance(step, int)
        if high < low:
            raise PydanticCustomError("axis", "{expected}", {"expected": f"max at least min, {low}"})
        if (high - low) // step >= LONGEST_RANGE:
            expected = f"a range of at most {LONGEST_RANGE} values: raise step or give a list"
            raise PydanticCustomError("axis", "{expected}", {"expected": expected})
        return tuple(range(low, high + 1, step))

    def json_schema(self) -> dict[str, Any]:
        one: dict[str, Any] = {"type": {int: "integer", bool: "boolean", str: "string"}[self.type]}
        if self.choices:
            one["enum"] = list(self.choices)
        elif self.type is int:
            one["minimum"] = self.least
        forms = [one, {"type": "array", "items": one, "minItems": 1}]
        if self.type is int and not self.choices:
            ends = {key: {"type": "integer", "minimum": self.least} for key in ("min", "max")}
            keys = {**ends, "step": {"type": "integer", "minimum": 1}}
            forms.append(
                {"type": "object", "properties": keys, "required": ["min", "max"], "additionalProperties": False}
            )
        return {"anyOf": forms}


# One axis for each field of a plan: a new field of Plan is searchable without a change here. Numbers begin with their
# default: a degree with 1, what may be left out with 0.
AXES: dict[str, Axis] = {
    f.name: Axis(f.name, type(f.default), CHOICES.get(f.name, ()), int(f.default == 1)) for f in fields(Plan)
}


def _checked(axis: Axis) -> Callable[[object], object]:
    def check(raw: object) -> object:
        if raw is not None:
            axis.values(raw)
        return raw

    return check


# How many devices a plan uses: no field of a plan, which has the degrees that make it.
DEVICES = Axis("devices", int)


def _search_section() -> type[BaseModel]:
    """`[search]`: each axis of a plan, and the budget and seed."""
    keys: dict[str, Any] = {
        axis.name: (Annotated[Any, BeforeValidator(_checked(axis)), WithJsonSchema(axis.json_schema())], None)
        for axis in (*AXES.values(), DEVICES)
    }
    return create_model(
        "SearchSection",
        __base__=Section,
        __doc__="Axes as a value (pinned), a list (choices) or { min, max }; an absent axis takes everything valid.",
        budget=(Budget, Field(default_factory=Budget)),
        seed=(Annotated[int, Field(ge=0)], 0),
        **keys,
    )


SearchSection = _search_section()


class RecipeFile(Section):
    """A whole recipe file."""

    version: Literal[1] = VERSION
    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", description="absent: the file's own name"
    )
    model: ModelSection
    draft: DraftSection | None = Field(default=None, description="a smaller model, or heads, that may propose tokens")
    target: TargetSection | None = Field(default=None, description="the frozen model that heads are trained for")
    machine: MachineSection = Field(default_factory=MachineSection)
    workload: Annotated[TrainSection | GenerateSection, Field(discriminator="kind")]
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    search: SearchSection = Field(default_factory=SearchSection)  # type: ignore[valid-type]
    gate: GateSection = Field(default_factory=GateSection)


SECTIONS: dict[str, Sequence[type[BaseModel]]] = {
    "model": (ModelSection,),
    "draft": (DraftSection,),
    "target": (TargetSection,),
    "machine": (MachineSection,),
    "workload": (TrainSection, GenerateSection),
    "objective": (ObjectiveSection,),
    "search": (SearchSection,),
    "gate": (GateSection,),
}
INNER: dict[str, type[BaseModel]] = {"objective.limits": Limits, "search.budget": Budget}


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe, for editors."""
    schema = RecipeFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
