"""Compiles the kernels of a decoded round for a Hopper device, where there is none: `python -m tests.compiled`. What
the interpreter lets pass, such as a type that changes or a shape that no instruction has, the compiler refuses."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autotune.kernels import decode, matvec, rounds

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "*bf16": ("qkv", "keys", "values", "out", "q_weight", "k_weight", "x", "gain", "weight", "bias", "more"),
    "*fp32": ("cos", "sin", "parts", "scales"),
    "*i32": ("used", "done"),
    "*i1": ("visible",),
    "fp32": ("eps", "scale"),
    "i32": ("positions", "window", "tokens", "outputs", "inputs", "new_tokens", "columns", "rounds", "room", "slates"),
}
PRODUCT = {"columns": 16, "rows": 64, "lanes": 256, "stages": 3, "scaled": False, "biased": False, "early": True}
ROW = {"tokens": 1, "rows": 4, "lanes": 4096, "biased": False, "early": True}
ATTEND = {
    "page": 0,
    "queries": 32,
    "heads": 8,
    "half": 64,
    "lanes": 64,
    "block": 32,
    "splits": 33,
    "least": 64,
    "early": True,
}
SETTLE = {"depth": 5, "lanes": 8, "nodes": 5, "spots": 8, "first": False, "handed": True}
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "a token": (
        decode._attend,
        ATTEND | {"rows": 16, "new": 1, "fresh": 16, "tree": False, "few": 4, "chunk": 16, "norm": True},
        2,
    ),
    "a tree": (
        decode._attend,
        ATTEND | {"rows": 64, "new": 9, "fresh": 16, "tree": True, "few": 64, "chunk": 1, "norm": False},
        2,
    ),
    "a token in pages": (
        decode._attend,
        ATTEND | {"page": 16, "rows": 16, "new": 1, "fresh": 16, "tree": False, "few": 4, "chunk": 16, "norm": True},
        2,
    ),
    "a tree in pages": (
        decode._attend,
        ATTEND | {"page": 64, "rows": 64, "new": 9, "fresh": 16, "tree": True, "few": 64, "chunk": 1, "norm": False},
        2,
    ),
    "gated products": (matvec._products, PRODUCT | {"norm": True, "gated": True, "added": False}, 4),
    "products added to": (matvec._products, PRODUCT | {"norm": False, "gated": False, "added": True}, 4),
    "a row of bytes": (matvec._product, ROW | {"scaled": True, "norm": True, "gated": True, "added": False}, 4),
    "a row of bytes added to": (
        matvec._product,
        ROW | {"scaled": True, "norm": False, "gated": False, "added": True},
        4,
    ),
    "a row": (matvec._product, ROW | {"scaled": False, "norm": True, "gated": False, "added": False}, 4),
    "products of bytes": (matvec._products, PRODUCT | {"scaled": True, "norm": True, "gated": True, "added": False}, 4),
    "products of bytes added to": (
        matvec._products,
        PRODUCT | {"scaled": True, "norm": False, "gated": False, "added": True},
        4,
    ),
    "a round settled": (rounds._settle, SETTLE | {"chosen": True, "proposed": True}, 1),
    "places": (rounds._place, {"nodes": 5, "spots": 8}, 1),
}


def compiled(kernel: Any, fixed: dict[str, Any], warps: int) -> bool:
    """Whether the compiler made code of it. Raises what it says where it refuses."""
    names = kernel.arg_names
    known = {name: kind for kind, group in POINTERS.items() for name in group}
    # The state of sequences is whole numbers; what of it is narrower is named above.
    signature = {name: "constexpr" if name in fixed else known.get(name, "*i64") for name in names}
    if kernel in (rounds._settle, rounds._place):
        own = {"positions": "*i64", "wide": "i32", "offset": "i32", "used": "*i32"}
        signature |= {name: kind for name, kind in own.items() if name in names}
    if fixed.get("scaled"):
        signature["weight"] = "*i8"
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    return "cubin" in triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm


if __name__ == "__main__":
    for name, (kernel, fixed, warps) in KERNELS.items():
        print(name, compiled(kernel, fixed, warps), flush=True)
