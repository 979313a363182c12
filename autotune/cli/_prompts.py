"""Prompts from a file or standard input, and answers as JSON lines."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotune.cli import _output as out
from autotune.runners.tokens import BYTES, UNKNOWN, encode
from autotune.spec.errors import Problem, UsageError
from autotune.spec.model import ModelSpec
from autotune.spec.recipe import STDIN
from autotune.spec.workload import Workload


def _shown(source: str) -> str:
    return "standard input" if source == STDIN else source


def read_prompts(source: str) -> tuple[str, ...]:
    """The prompts in a file, or of standard input ("-"), one a line: JSON where it begins with a quotation mark (the
    prompt) or a brace (an object that has it as "prompt"), plain text otherwise. Empty lines are none.

    Raises UsageError, with every line that is wrong.
    """
    shown = _shown(source)
    try:
        raw = sys.stdin.buffer.read() if source == STDIN else Path(source).expanduser().read_bytes()
    except OSError as error:
        problem = Problem(shown, "", (error.strerror or str(error)).lower(), "a file of prompts, one a line")
        raise UsageError("cannot read the prompts", problems=[problem]) from None
    found, problems = list[str](), list[Problem]()
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_prompt(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            problems.append(Problem(shown, f"line {number}", f"byte 0x{line[error.start]:02x}", "UTF-8"))
        except ValueError as error:
            expected = 'a JSON string, or an object with a text as "prompt"'
            problems.append(Problem(shown, f"line {number}", str(error), expected))
    if not found and not problems:
        problems.append(Problem(shown, "", "no prompts", "at least one line"))
    if problems:
        raise UsageError("these prompts cannot be read:", problems=problems)
    return tuple(found)


def _prompt(line: str) -> str:
    """The prompt of one line. Raises ValueError, which says what was found."""
    if not line.lstrip().startswith(("{", '"')):
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError('an object without a text as "prompt"' if isinstance(value, dict) else "no text")
    return prompt


def fitted(
    prompts: Sequence[str], source: str, model: ModelSpec, workload: Workload, at_once: int
) -> tuple[tuple[str, ...], Workload]:
    """The prompts filled up with the last one to whole rounds of `at_once` sequences, and the workload that they are.
    Raises UsageError for what the model cannot continue, with the file that it comes from."""
    many = -(-len(prompts) // at_once) * at_once
    whole = (*prompts, *(prompts[-1],) * (many - len(prompts)))
    workload = replace(workload, batch=many, prompt_lengths=())
    try:
        encode(whole[: len(prompts)], model, replace(workload, batch=len(prompts)))
    except UsageError as error:
        problems = [replace(p, file=_shown(source)) if p.key.startswith("prompt ") else p for p in error.problems]
        raise UsageError(error.message, problems=problems) from None
    return whole, replace(workload, prompt_lengths=tuple(len(text.encode("utf-8")) for text in whole))


def answers(prompts: Sequence[str], report: Mapping[str, Any]) -> list[str]:
    """A JSON line a prompt: its answer as text and as tokens, and why it ended (`stop` or `length`)."""
    rows = zip(prompts, report["texts"], report["tokens"], report["ends"], strict=True)
    return [
        json.dumps({"prompt": prompt, "answer": text, "tokens": list(tokens), "end": end}, ensure_ascii=False)
        for prompt, text, tokens, end in rows
    ]


def write_answers(place: str, lines: Sequence[str]) -> None:
    """To a file, whole or not at all."""
    file = Path(place).expanduser()
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        problem = Problem(place, "", (error.strerror or str(error)).lower(), "a file that can be written")
        raise UsageError("cannot write the answers", problems=[problem]) from None


@dataclass
class Shown:
    """Answers on stdout as they grow: a JSON line for each piece of text, whole characters alone. Of the sequences that
    only fill a round nothing is shown."""

    sequences: int
    decoders: dict[int, codecs.IncrementalDecoder] = field(default_factory=dict)

    def tell(self, number: int, tokens: Sequence[int]) -> None:
        if number >= self.sequences:
            return
        decoder = self.decoders.setdefault(number, codecs.getincrementaldecoder("utf-8")("replace"))
        text = "".join(decoder.decode(bytes([t])) if t < BYTES else UNKNOWN for t in tokens)
        if text:
            out.data(json.dumps({"sequence": number, "text": text}, ensure_ascii=False))
            sys.stdout.flush()
