"""Token streams: the same samples for every split, each window once, and what wrong data is told."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from autotune.runners.corpus import HELD_OUT, LIBRARY_CAP, PROFILED, TRAINED, divided, open_corpus
from autotune.runners.data import batch
from autotune.spec.errors import UsageError


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """101 tokens: 0 to 100."""
    np.save(tmp_path / "tokens.npy", np.arange(101, dtype=np.uint16))
    return tmp_path / "tokens.npy"


def test_the_default_corpus_is_the_standard_library() -> None:
    corpus = open_corpus("", 256)
    data = corpus.tokens.tobytes()
    assert 1_000_000 < len(data) <= LIBRARY_CAP
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out, profiled = (open_corpus("", 256, part).tokens.tobytes() for part in (HELD_OUT, PROFILED))
    names = ("argparse.py", "ast.py", "json/decoder.py", "__future__.py", "pathlib.py")
    texts = [(library / name).read_bytes() for name in names]
    here = [[part for part, all_of in enumerate((data, held_out, profiled)) if text in all_of] for text in texts]
    assert here == [[TRAINED], [TRAINED], [TRAINED], [HELD_OUT], [PROFILED]], "the hash of a path decides"
    for part in (held_out, profiled):
        assert 0.015 < len(part) / len(data) < 0.06
    assert open_corpus("", 512).digest == corpus.digest
    tokens, targets = batch(corpus, 0, 2, 64, 0, 2)
    assert bytes(tokens[0].tolist()) in data and bytes(targets[0].tolist()) in data


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    """Each file is in one of the parts, or in the first of those that would have its text; a new one moves no other."""
    files = {f"package/{n}.py": f"# {n}\n".encode() for n in range(1600)}
    parts = [text.decode().split("\n") for text in divided(files)]
    assert sorted(line for part in parts for line in part) == sorted(["", "", "", *(f"# {n}" for n in range(1600))])
    assert len(parts[TRAINED]) > 1450 and all(30 < len(parts[part]) < 80 for part in (HELD_OUT, PROFILED))
    twice = dict(reversed(files.items())) | {"again.py": b"# 5\n"}
    more = [set(text.decode().split("\n")) for text in divided(twice)]
    assert more == [set(part) for part in parts]
    assert "# 1" in parts[HELD_OUT] + parts[PROFILED] and "# 0" in parts[TRAINED]
    copied = [set(text.decode().split("\n")) for text in divided(files | {"package/0.py": b"# 1\n"})]
    assert copied[TRAINED] == set(parts[TRAINED]) - {"# 0"} | {"# 1"}, "what both have is trained on"
    assert copied[1:] == [set(part) - {"# 1"} for part in parts[1:]]
    (tmp_path / "own.txt").write_text("own text " * 9)
    own = {open_corpus(str(tmp_path / "own.txt"), 256, part).digest for part in (TRAINED, HELD_OUT, PROFILED)}
    assert len(own) == 1, "a file of one's own is not divided"


def test_any_text_file_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("grüße " * 10, encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "a.txt"), 300)
    assert corpus.tokens.tobytes().decode() == "grüße " * 10
    assert corpus.digest == hashlib.sha256(b"|u1" + ("grüße " * 10).encode()).hexdigest()


def test_targets_are_the_next_tokens(counting: Path) -> None:
    tokens, targets = batch(open_corpus(str(counting), 101), 3, 4, 5, 0, 4)
    assert tokens.shape == targets.shape == (4, 5)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)


def test_every_split_reads_the_same_samples(counting: Path) -> None:
    corpus = open_corpus(str(counting), 101)
    for step in range(3):
        whole = batch(corpus, step, 6, 4, 0, 6)
        for count in (1, 2, 3):
            pieces = [batch(corpus, step, 6, 4, first, count) for first in range(0, 6, count)]
            assert torch.equal(torch.cat([tokens for tokens, _ in pieces]), whole[0])
            assert torch.equal(torch.cat([targets for _, targets in pieces]), whole[1])


@pytest.mark.parametrize("length", [1, 3, 7, 10, 50, 100])
def test_each_window_is_read_once_before_any_comes_again(length: int, counting: Path) -> None:
    corpus = open_corpus(str(counting), 101)
    windows = 100 // length
    starts = [int(batch(corpus, step, 1, length, 0, 1)[0][0, 0]) for step in range(2 * windows)]
    assert sorted(starts[:windows]) == [i * length for i in range(windows)]
    assert starts[windows:] == starts[:windows]


def test_digest_follows_the_content(tmp_path: Path) -> None:
    for name, tokens in {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 4]}.items():
        np.save(tmp_path / f"{name}.npy", np.array(tokens))
    a, b, c = (open_corpus(str(tmp_path / f"{name}.npy"), 10).digest for name in "abc")
    assert a == b != c


def wrong(path: Path | str, vocab: int = 256) -> str:
    with pytest.raises(UsageError) as caught:
        open_corpus(str(path), vocab)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    assert "nearest: text.txt" in wrong(tmp_path / "test.txt")
    assert "no such file" in wrong(tmp_path)
    assert "at least 256" in wrong(tmp_path / "text.txt", 255)
    assert "at least 256" in wrong("", 100)
    np.save(tmp_path / "real.npy", np.ones(4))
    assert "float64" in wrong(tmp_path / "real.npy")
    np.save(tmp_path / "square.npy", np.ones((2, 2), dtype=np.int32))
    assert "[2, 2]" in wrong(tmp_path / "square.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    assert "not a plain .npy" in wrong(tmp_path / "objects.npy")
    (tmp_path / "text.npy").write_text("hello")
    assert "not a plain .npy" in wrong(tmp_path / "text.npy")


@pytest.mark.parametrize(("tokens", "place"), [([0, 5, 9, 10], 3), ([0, -1, 2, 3], 1)])
def test_ids_outside_the_vocabulary(tokens: list[int], place: int, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array(tokens))
    told = wrong(tmp_path / "t.npy", 10)
    assert f"position {place}: found token id {tokens[place]}; expected 0 to 9" in told


def test_ids_beyond_the_first_check_are_found_in_their_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.runners.corpus.SCANNED", 4)
    tokens = np.zeros((1 << 22) + 9, dtype=np.uint8)
    tokens[-1] = 99
    np.save(tmp_path / "t.npy", tokens)
    corpus = open_corpus(str(tmp_path / "t.npy"), 10)
    with pytest.raises(UsageError, match="token id 99"):
        batch(corpus, 0, 1, (1 << 22) + 8, 0, 1)


def test_too_short(counting: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"at least 102.*nearest: sequence_length = 100"):
        batch(open_corpus(str(counting), 101), 0, 1, 101, 0, 1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="0 tokens"):
        batch(open_corpus(str(tmp_path / "empty.txt"), 256), 0, 1, 4, 0, 1)


@pytest.mark.parametrize(("step", "first", "count"), [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 3, 2)])
def test_samples_outside_the_batch_are_our_mistake(step: int, first: int, count: int, counting: Path) -> None:
    with pytest.raises(ValueError, match="not in a batch of 4"):
        batch(open_corpus(str(counting), 101), step, 4, 5, first, count)
