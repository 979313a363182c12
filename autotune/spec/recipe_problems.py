"""What is wrong with a recipe, as Problems: each names the layer it came from, the key, what was found and expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from autotune.spec.errors import Problem, nearest_name
from autotune.spec.recipe_schema import INNER, SECTIONS, VERSION, RecipeFile

# pydantic's error types in words; those with a limit take it from the error's own context.
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a section (a table of keys)",
    "model_attributes_type": "a section (a table of keys)",
    "dict_type": "a table of keys",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "letters, digits and . _ + - only, starting with a letter or digit",
    "axis": "{expected}",
}


def keys_of(section: str, kind: str | None) -> tuple[str, ...]:
    """The keys that `section` ("", "search", "search.budget") takes; `kind` is the workload's."""
    if not section:
        return tuple(RecipeFile.model_fields)
    if section in INNER:
        return tuple(INNER[section].model_fields)
    models = SECTIONS.get(section, ())
    if section == "workload" and kind in ("train", "generate"):
        models = models[:1] if kind == "train" else models[1:]
    return tuple(dict.fromkeys(key for model in models for key in model.model_fields))


def _shown(value: object) -> str:
    """A found value, short enough for one line."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(section: str, key: str, kind: str | None) -> tuple[str, str, str | None]:
    if section == "workload" and key == "request_rate":
        return "a request rate, which is not yet searchable in this version", "batch instead", "batch"
    valid = keys_of(section, kind)
    elsewhere = next((s for s in SECTIONS if key in keys_of(s, kind)), None)
    near = f"{elsewhere}.{key}" if elsewhere else nearest_name(key, valid)
    return "an unknown key", "one of " + ", ".join(valid), near


def _translate(error: ErrorDetails, kind: str | None) -> tuple[str, str, str, str | None]:
    """(key, found, expected, nearest) of one pydantic error."""
    loc = [str(part) for part in error["loc"]]
    if loc[:1] == ["workload"] and len(loc) > 1 and loc[1] in ("train", "generate"):
        del loc[1]  # the discriminator's tag is not a key of the file
    if loc[:2] in (["workload", "prompt"], ["workload", "stop"]):
        return ".".join(loc[:2]), _shown(error["input"]), "a string or a list of strings", None
    key, context = ".".join(loc), error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            found, expected, near = _unknown(".".join(loc[:-1]), loc[-1], kind)
            return key, found, expected, near
        case "missing":
            where = SECTIONS.get(loc[0], (RecipeFile,)) if len(loc) > 1 else (RecipeFile,)
            about = next((m.model_fields[loc[-1]].description for m in where if loc[-1] in m.model_fields), None)
            return key, "nothing", about or ("a section" if loc[0] in SECTIONS else "a value"), None
        case "union_tag_not_found":
            return "workload.kind", "nothing", "train or generate", None
        case "union_tag_invalid":
            tag = str(context.get("tag"))
            return "workload.kind", repr(tag), "train or generate", nearest_name(tag, ("train", "generate"))
        case "literal_error" if key == "version":
            newer = isinstance(error["input"], int) and error["input"] > VERSION
            words = f"{VERSION} (this file is for a newer autotune)" if newer else f"{VERSION}"
            return key, _shown(error["input"]), words, None
        case "literal_error":
            expected = str(context.get("expected", ""))
            choices = [choice.strip("' ") for choice in expected.replace(" or ", ", ").split(",")]
            return key, _shown(error["input"]), expected.replace("'", ""), nearest_name(str(error["input"]), choices)
        case other:
            words = EXPECTED[other].format(**context) if other in EXPECTED else error["msg"]
            return key, _shown(error["input"]), words, context.get("nearest")


def problems(
    error: ValidationError, file: str, origins: Mapping[str, str], raw: Mapping[str, Any]
) -> Iterator[Problem]:
    """Every problem of a validation, each with the layer (file, environment, flag) that its key came from.

    `origins` maps a dotted key to the layer that set it last; keys that no override touched come from `file`.
    """
    workload = raw.get("workload")
    kind = workload.get("kind") if isinstance(workload, dict) else None
    for detail in error.errors(include_url=False):
        key, found, expected, near = _translate(detail, kind if isinstance(kind, str) else None)
        yield Problem(origins.get(key, file), key, found, expected, near)
