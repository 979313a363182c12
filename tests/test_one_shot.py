"""Small sums in one step: which tensors it is for. What it gives is tested as every tensor-parallel plan is, and on two
GPUs by `tests/gpu/check_one_shot.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.kernels.one_shot import LARGEST, small


def tensor(**changed: Any) -> Any:
    usual = {"is_cuda": True, "dtype": torch.bfloat16, "nbytes": 8192, "contiguous": True, "place": 512}
    given = usual | changed
    return SimpleNamespace(
        is_cuda=given["is_cuda"],
        dtype=given["dtype"],
        nbytes=given["nbytes"],
        is_contiguous=lambda: given["contiguous"],
        data_ptr=lambda: given["place"],
    )


def test_a_token_of_a_layer_is_small() -> None:
    assert small(tensor())
    assert small(tensor(nbytes=LARGEST))
    assert small(tensor(dtype=torch.float32))


@pytest.mark.parametrize(
    "changed",
    [
        {"is_cuda": False},
        {"dtype": torch.int64},
        {"nbytes": LARGEST + 16},
        {"nbytes": 0},
        {"nbytes": 24},
        {"contiguous": False},
        {"place": 520},
    ],
)
def test_what_the_kernel_cannot_add_goes_to_the_backend(changed: dict[str, Any]) -> None:
    assert not small(tensor(**changed))


def test_a_tensor_of_the_host_is_not() -> None:
    assert not small(torch.zeros(64))
