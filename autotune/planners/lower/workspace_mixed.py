"""Rules of workspace for experts and latent attention: see `lower/workspace.py`.

On a CPU they are exact; on accelerators they are what our own code keeps beside a kernel's results: padded values, the
product of a weight gradient before it is added, an activation that is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autotune.planners.lower.call import BOOL, CHUNK_BYTES, INT, Call

Rule = Callable[[Call], int]


def _route(c: Call) -> int:
    """The scores, a copy that a bias was added to, one masked by group; and before it each group's best, with where
    they are; or the sum of the chosen."""
    w, experts, each, groups = c.wide, *(c.node.attr(name) for name in ("experts", "top_k", "groups"))
    scores, made = w * experts * (2 if c.node.constants else 1), each * (w + INT)
    token = scores + w * bool(c.node.attr("normalise"))
    if c.node.attr("top_groups") < groups:
        best = groups * min(c.node.attr("group_best"), experts // groups)
        masked = w * experts + groups * (w + 2 * BOOL) - made
        token = max(token, scores + w * experts, scores + best * (w + INT) - made, scores + masked)
    return c.made[1] // (INT * each) * token


def _route_dgrad(c: Call) -> int:
    """The chosen scores, the gradient, a product of both, and sums of a token; a narrow result beside wide scores."""
    w, each = c.wide, c.node.attr("top_k")
    sigmoid, normalise = c.node.word("scoring") == "sigmoid", c.node.attr("normalise")
    sums = w * (bool(normalise) + (not sigmoid))
    token = 3 * w * each + 2 * w if normalise else (3 if sigmoid else 2) * w * each + sums
    if c.narrow:
        experts = c.node.attr("experts")
        token = max(w * experts + 2 * w * each + sums, (w - c.shape.width) * experts + token)
    return c.reads[0] // (w * each) * token


def _dispatch(c: Call) -> int:
    """Each row's expert and its token, before its weight is there; the experts' numbers."""
    return 2 * INT * c.slots + INT * c.node.attr("experts") - c.made[1]


def _added(c: Call) -> int:
    """What torch's CPU bag keeps of each bag, and in fp64 of each row twice."""
    return INT * (c.shape.tokens + 2 * c.slots) if c.shape.width == 8 else 3 * INT * c.shape.tokens


def _dispatch_dgrad(c: Call) -> int:
    return _added(c) - c.made[1]


def _tokens(c: Call) -> int:
    """Each row's token."""
    return INT * c.slots


def _weighted(c: Call) -> int:
    """A narrow product and its weighted self, both widened."""
    return 2 * c.widened(c.made[0]) if c.narrow else 0


def _weighted_dgrad(c: Call) -> int:
    """The product made again; narrow, it and its weighted self are also widened."""
    return c.reads[0] + (2 * c.widened(c.reads[0]) - c.made[0] if c.narrow else 0)


def _widths(c: Call) -> tuple[int, int]:
    """Bytes of a row of a product's input and of its result's gradient."""
    return c.reads[1] // c.slots, c.reads[0] // c.slots


def _grouped_wgrad(c: Call) -> int:
    """A narrow weight's product, of one expert, before it is added to its wide gradient."""
    inputs, outputs = _widths(c)
    return min(outputs // c.shape.width, max(1, CHUNK_BYTES // inputs)) * inputs if c.narrow else 0


def _stacked_wgrad(c: Call) -> int:
    """As above, of all experts at once."""
    inputs, outputs = _widths(c)
    return c.node.attr("experts") * inputs * outputs // c.shape.width


def _tables(c: Call, width: int) -> int:
    """cos and sin of the positions: fp32, one there twice while it is converted to fp64."""
    whole = 2 * c.shape.queries * width * 4
    return whole * 3 // 2 if c.shape.width == 8 else whole


def _turned(c: Call, heads: int, width: int) -> int:
    """The tables; a narrow half is widened and turned."""
    return _tables(c, width) + (2 * c.shape.tokens * heads * width // 2 * c.wide if c.narrow else 0)


def _key(c: Call) -> int:
    return _turned(c, 1, c.node.attr("width"))


def _latent_rotary(c: Call) -> int:
    """Before values are there."""
    return max(0, _turned(c, c.heads("heads"), c.node.attr("rope_dim")) - c.made[2])


def _latent_rotary_dgrad(c: Call) -> int:
    """Before the key's gradient is there."""
    return max(0, _turned(c, c.heads("heads"), c.node.attr("rope_dim")) - c.made[1])


def _rows(c: Call) -> int:
    """Tokens of a latent's gradient, or of the latent itself, with its key: fewer where they are sharded."""
    both = c.node.attr("width") + c.node.attr("rope_dim")
    return (c.reads[0] if len(c.reads) == 1 else c.reads[0] + c.reads[1]) // (both * c.shape.width)


def _latent(c: Call) -> int:
    """A wide latent."""
    return _rows(c) * c.node.attr("width") * c.wide


def _latent_norm(c: Call) -> int:
    """Widened and squared, before anything else is there."""
    return max(0, 2 * _latent(c) - c.made[0] - c.made[1]) if c.narrow else 0


def _latent_norm_dgrad(c: Call) -> int:
    """The normalised latent, the weighted gradient, their product, and its mean a token."""
    return 3 * _latent(c) + _rows(c) * c.wide


def _latent_norm_wgrad(c: Call) -> int:
    return 2 * _latent(c) if c.narrow else _latent(c) + c.node.attr("width") * c.wide


def padded(core: Rule) -> Rule:
    """Attention whose values are narrower than its keys: padded values, and a padded result that is cut at the end."""

    def rule(c: Call) -> int:
        if c.node.attr("v_dim") == c.node.attr("head_dim"):
            return core(c)
        pads = _padded(c, "kv_heads") + _padded(c, "heads")
        return max(pads, pads - c.made[0] + core(c))

    return rule


def padded_dgrad(core: Rule) -> Rule:
    """Padded are also the result, its gradient and, before it is cut, that of the values."""

    def rule(c: Call) -> int:
        if c.node.attr("v_dim") == c.node.attr("head_dim"):
            return core(c)
        pads = 2 * (_padded(c, "kv_heads") + _padded(c, "heads"))
        return max(pads, pads - c.made[2] + core(c))

    return rule


def _padded(c: Call, heads: str) -> int:
    return c.shape.tokens * c.heads(heads) * c.node.attr("head_dim") * c.shape.width


CPU: Mapping[str, Rule] = {
    "route": _route,
    "route.dgrad": _route_dgrad,
    "dispatch": _dispatch,
    "dispatch.dgrad": _dispatch_dgrad,
    "weighted_swiglu": _weighted,
    "weighted_swiglu.dgrad": _weighted_dgrad,
    "grouped.wgrad": _grouped_wgrad,
    "combine": _added,
    "combine.dgrad": _tokens,
    "latent_norm": _latent_norm,
    "latent_norm.dgrad": _latent_norm_dgrad,
    "latent_norm.wgrad": _latent_norm_wgrad,
    "latent_key": _key,
    "latent_key.dgrad": _key,
    "latent_rotary": _latent_rotary,
    "latent_rotary.dgrad": _latent_rotary_dgrad,
}
CUDA: Mapping[str, Rule] = {
    "weighted_swiglu.dgrad": lambda c: c.reads[0],
    "grouped.wgrad": _stacked_wgrad,
    "latent_norm.dgrad": _latent_norm_dgrad,
}
