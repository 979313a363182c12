"""What is kept with a run so that it can be told from another: the code's revision, and variables that change how
workers run."""

from __future__ import annotations

import os
import subprocess


def git_revision() -> str:
    """The commit of the folder that the command runs in, with `+` where it has changes; "" outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def environment() -> dict[str, str]:
    """Variables that change how workers run: worth keeping with a run."""
    prefixes = ("OMP_", "MKL_", "CUDA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_")
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith(prefixes)}
