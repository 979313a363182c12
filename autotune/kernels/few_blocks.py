"""NCCL groups for what waits beside compute: a kernel that waits for its peer keeps its thread blocks, so it gets few.

Measured on two H200s: beside a message that waits with NCCL's own choice of blocks, compute is 10 to 20 % slower; with
two blocks 16 MiB take 0.5 ms instead of 0.07, which compute hides.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

BLOCKS = 2


def few_blocks(device: str) -> Any:
    """Options of a new group on `device` ("cuda" or another, which has none)."""
    if device != "cuda":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = BLOCKS
    return options
