"""What a run of joined operations moves: it is bound by memory, or nobody would have joined it (lower.fuse)."""

from __future__ import annotations

from autotune.planners.lower.body import Body
from autotune.planners.lower.fuse import nodes_of
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import local_size
from autotune.spec.graph import Block, Node
from autotune.spec.int8_graph import weight_bytes
from autotune.spec.program import Instruction
from autotune.spec.work import Memory


def _cache(node: Node, shape: Shape) -> int:
    """Elements of the keys and values that are read, and of the new ones that are written."""
    if node.op != "attention":
        return 0
    keys = min(shape.keys, node.attr("window") or shape.keys)
    return (
        shape.batch * (keys + 1) * node.attr("kv_heads") // shape.tensor * (node.attr("head_dim") + node.attr("v_dim"))
    )


def fused_work(block: Block, body: Body, instruction: Instruction, shape: Shape) -> Memory:
    """Operands, results, weights and cache, each once; what the joined operations hand one another is nowhere. Named by
    its tokens too: a few rows are multiplied one by one, so that with each the same bytes take longer."""
    nodes = nodes_of(block, instruction)
    own = [weight for node in nodes for weight in node.weights]
    weights = sum(local_size(w, shape.tensor) * weight_bytes(w, shape.width) for w in own)
    cache = sum(_cache(node, shape) for node in nodes) * shape.width
    passed = sum(body.sizes[name] for name in instruction.reads + instruction.writes)
    paged = f" pages of {shape.page}" if shape.page and any(node.op == "attention" for node in nodes) else ""
    return Memory(f"{instruction.op} x{shape.tokens}{paged}", weights + cache + passed, shape.dtype)
