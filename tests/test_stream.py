"""Answers are told as they grow, each token once, and never a text that stops them."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.cli._prompts import Shown
from autotune.runners.stream import Reader, Teller


def told(folder: Path) -> tuple[dict[int, list[int]], Reader]:
    found: dict[int, list[int]] = {}
    return found, Reader(folder, lambda number, tokens: found.setdefault(number, []).extend(tokens))


def test_every_token_comes_once_and_in_order(tmp_path: Path) -> None:
    found, reader = told(tmp_path)
    tellers = [Teller.open(tmp_path, rank, ()) for rank in (0, 2)]
    tellers[0].tell(0, [[1], [2]], last=False)
    reader.look()
    assert found == {0: [1], 1: [2]}
    tellers[1].tell(2, [[7, 8]], last=False)
    tellers[0].tell(0, [[1, 3], [2, 4]], last=True)
    reader.look()
    reader.look()
    assert found == {0: [1, 3], 1: [2, 4], 2: [7, 8]}


def test_what_may_begin_a_stop_waits(tmp_path: Path) -> None:
    found, reader = told(tmp_path)
    teller = Teller.open(tmp_path, 0, ("END", "."))
    answer = list(b"an ENDIVE")
    for many in range(1, len(answer) + 1):
        teller.tell(0, [answer[:many], list(b"EN")], last=False)
        reader.look()
        assert bytes(found.get(0, [])) == b"an "[: max(0, many - 2)]
    teller.tell(0, [answer, list(b"EN")], last=True)
    reader.look()
    assert bytes(found[0]) == b"an " and bytes(found[1]) == b"EN"


def test_half_a_line_waits_for_the_other_half(tmp_path: Path) -> None:
    found, reader = told(tmp_path)
    file = tmp_path / "stream-0.jsonl"
    file.write_text("[0, [1]]\n[0, [2")
    reader.look()
    assert found == {0: [1]}
    file.write_text("[0, [1]]\n[0, [2]]\n")
    reader.look()
    assert found == {0: [1, 2]}


def test_characters_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown(1)
    for token in "né".encode():
        shown.tell(0, [token])
    shown.tell(0, [300])
    shown.tell(1, [97])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        '{"sequence": 0, "text": "n"}',
        '{"sequence": 0, "text": "é"}',
        '{"sequence": 0, "text": "\ufffd"}',
    ]
