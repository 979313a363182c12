"""The one-process oracle: the declared block graph in plain torch with autograd, sharing no code with `ops`.

What every plan, kernel and schedule is compared with, so it is written to be obviously right, not to be fast: whole
weights, whole sequences, explicit softmax, no cache, no fusion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from math import isfinite, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners import reference_parts as parts
from autotune.runners import rope
from autotune.runners.rows import Rows
from autotune.spec.graph import Block, Node, Weight, blocks
from autotune.spec.heads import HeadsSpec
from autotune.spec.heads_graph import TARGET
from autotune.spec.model import ModelSpec

Key = tuple[int, str]  # (block index, weight name)
Weights = Mapping[Key, Tensor]

INIT_STD = 0.02
BETAS, EPSILON = (0.9, 0.95), 1e-8  # AdamW's, as GPT-3 (2005.14165, appendix B) and Llama use them


def init_weight(
    weight: Weight, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The whole `weight`, the same whoever asks: each part from its own generator, seeded by its checkpoint name.

    Drawn in fp32 and then converted, so that precisions start equal. Parts that blocks share (tied embeddings) are
    equal because their names are. Another kind of device draws other numbers.
    """
    parts = []
    for name, rows in weight.parts:
        shape = (rows, *weight.shape[1:])
        if weight.init in ("normal", TARGET):
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
            parts.append(torch.randn(shape, generator=generator, device=device).mul_(INIT_STD))
        else:
            parts.append(torch.full(shape, {"ones": 1.0, "zeros": 0.0}[weight.init], device=device))
    return torch.cat(parts).to(dtype)


def begun(
    target: ModelSpec, load: Callable[[int, Weight], Tensor], of_target: Callable[[int, Weight], Tensor]
) -> Callable[[int, Weight], Tensor]:
    """A loader of heads that have not been trained: their output projections are as their target's."""
    head = blocks(target)[-1]
    product = next(node.weights[0] for node in head.nodes if node.op == "linear")
    return lambda index, weight: of_target(head.index, product) if weight.init == TARGET else load(index, weight)


def of_target(key: Key) -> Key:
    """Where a weight of the frozen target of heads is among theirs."""
    return -1 - key[0], key[1]


def beginning(model: ModelSpec, weights: Weights, target: ModelSpec, of_target: Weights) -> dict[Key, Tensor]:
    """The weights of heads that have not been trained, of random ones and their target's."""
    load = begun(target, lambda index, w: weights[index, w.name], lambda index, w: of_target[index, w.name].clone())
    return {(block.index, w.name): load(block.index, w) for block in blocks(model) for w in block.tensors()}


def with_target(model: HeadsSpec, weights: Weights, target: Weights, begin: bool) -> dict[Key, Tensor]:
    """The weights of heads with those of their target beside them. `begin`: as they are when training starts."""
    assert model.target
    found = beginning(model, weights, model.target, target) if begin else dict(weights)
    return found | {of_target(key): tensor for key, tensor in target.items()}


def init_weights(model: ModelSpec, seed: int, dtype: torch.dtype = torch.float32) -> dict[Key, Tensor]:
    """Every weight and constant of `model`, whole; tied ones are one tensor under two keys. Of heads that are to be
    trained those of their target too, see `of_target`."""
    made: dict[object, Tensor] = {}
    weights: dict[Key, Tensor] = {}
    for block in blocks(model):
        for weight in block.tensors():
            if weight.parts not in made:
                made[weight.parts] = init_weight(weight, seed, dtype)
            weights[block.index, weight.name] = made[weight.parts]
    if isinstance(model, HeadsSpec) and model.target:
        return with_target(model, weights, init_weights(model.target, seed, dtype), begin=True)
    return weights


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _rotary(node: Node, qkv: Tensor, cos: Tensor, sin: Tensor, norms: Sequence[Tensor]) -> tuple[Tensor, ...]:
    width = node.attr("head_dim")
    q_width, kv_width = node.attr("heads") * width, node.attr("kv_heads") * width
    q, k, v = torch.split(qkv, [q_width, kv_width, kv_width], dim=-1)
    turned = []
    for i, x in enumerate((q, k)):
        heads = x.reshape(*x.shape[:-1], -1, width)
        if norms:
            heads = _norm(heads, norms[i], node.number("eps"))
        turned.append(_turn(heads, cos.to(x.dtype), sin.to(x.dtype)).flatten(-2))
    return (*turned, v)


def _attention(node: Node, q: Tensor, k: Tensor, v: Tensor, rows: Rows | None) -> Tensor:
    width, groups = node.attr("head_dim"), node.attr("heads") // node.attr("kv_heads")
    q, k = (x.reshape(*x.shape[:-1], -1, width).transpose(-2, -3) for x in (q, k))
    v = v.reshape(*v.shape[:-1], -1, node.attr("v_dim")).transpose(-2, -3)
    k, v = (x.repeat_interleave(groups, dim=-3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / sqrt(width)
    position = torch.arange(q.shape[-2], device=q.device)
    distance = position[:, None] - position
    seen = distance >= 0
    if node.attr("window"):
        seen &= distance < node.attr("window")
    if rows is not None:
        seen = rows.seen(q.device, node.attr("window"))
    scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def _run(
    block: Block,
    values: dict[str, Tensor],
    weights: Weights,
    tables: tuple[Tensor, Tensor],
    rows: Rows | None = None,
) -> None:
    """Evaluates the nodes of `block` on `values` [batch, sequence, ...] by name, in order; `tables`: cos and sin of
    each place of the sequence."""
    for node in block.nodes:
        reads = [values[name] for name in node.reads if name in values]
        if len(reads) < len(node.reads):
            return  # no targets: the logits are what is wanted
        own = [weights[block.index, weight.name] for weight in node.weights]
        out: tuple[Tensor, ...]
        if node.op == "frozen":
            continue  # its rows are there
        if node.op == "embedding":
            out = (F.embedding(reads[0], torch.cat(own)),)  # masks come after the vocabulary
        elif node.op == "rmsnorm":
            out = (_norm(reads[0], own[0], node.number("eps")),)
        elif node.op == "linear":
            out = (F.linear(reads[0], *own),)
        elif node.op in ("rotary", "rotary_norm"):
            cos, sin = (table[: reads[0].shape[1], None] for table in tables)
            out = _rotary(node, reads[0], cos, sin, own)
        elif node.op == "attention":
            out = (_attention(node, reads[0], reads[1], reads[2], rows),)
        elif node.op == "swiglu":
            gate, up = reads[0].chunk(2, dim=-1)
            out = (F.silu(gate) * up,)
        elif node.op == "add":
            out = (reads[0] + reads[1],)
        elif node.op in parts.OPERATIONS:
            fixed = [weights[block.index, c.name] for c in node.constants if (block.index, c.name) in weights]
            cos, sin = (table[: reads[0].shape[1], None] for table in tables)
            out = parts.OPERATIONS[node.op](node, reads, parts.Own(own, fixed, (cos, sin)))
        elif node.op == "cross_entropy":
            logits = reads[0].to(torch.promote_types(reads[0].dtype, torch.float32))
            out = (F.cross_entropy(logits.flatten(0, -2), reads[1].flatten()),)
        else:
            raise KeyError(f"the reference has no operation {node.op!r}")
        values.update(zip(node.writes, out, strict=True))


def _trained(model: ModelSpec, weights: Weights) -> dict[Key, Tensor]:
    """All but the constants, which no gradient reaches."""
    changed = {(block.index, weight.name) for block in blocks(model) for weight in block.weights()}
    return {key: tensor for key, tensor in weights.items() if key in changed}


def _forward(
    model: ModelSpec, weights: Weights, tokens: Tensor, targets: Tensor | None, rows: Rows | None = None
) -> dict[str, Tensor]:
    """Every value of the head block: at least logits [batch, sequence, vocab], and the loss if there are targets.
    `rows`: where the rows of a sequence stand and what they see, if not one after another all before them."""
    places = torch.arange(tokens.shape[1]) if rows is None else rows.positions
    cos, sin = rope.tables(model, int(places.max()) + 1, tokens.device)
    tables = cos[places.to(tokens.device)], sin[places.to(tokens.device)]
    values = {"tokens": tokens}
    if isinstance(model, HeadsSpec) and model.target:
        own = {of_target(key): tensor for key, tensor in weights.items() if key[0] < 0}
        values["y"] = head_values(model.target, own, tokens)["h"]
    for block in blocks(model):
        _run(block, values, weights, tables, rows)
        if block.kind != "head":
            values = {"x": values[block.nodes[-1].writes[0]]}
            if block.index == model.layers and targets is not None:
                values["targets"] = targets
    return values


def converted(weights: Weights, dtype: torch.dtype | None) -> dict[Key, Tensor]:
    """`weights` in `dtype` (None: as they are), shared tensors converted once."""
    made = {id(tensor): tensor if dtype is None else tensor.to(dtype) for tensor in weights.values()}
    return {key: made[id(tensor)] for key, tensor in weights.items()}


@torch.no_grad()
def head_values(model: ModelSpec, weights: Weights, tokens: Tensor) -> dict[str, Tensor]:
    """Every value of the head block for int64 tokens [batch, sequence]: `h`, the rows [batch, sequence, hidden] after
    the final norm, and the logits."""
    return _forward(model, weights, tokens, None)


@torch.no_grad()
def heads_logits(model: HeadsSpec, weights: Weights, rows: Tensor) -> list[Tensor]:
    """Of each head its logits [batch, sequence, vocabulary] for hidden rows [batch, sequence, hidden]; `weights` by
    (head, name)."""
    found, none = [], torch.zeros(0)
    for block in blocks(model):
        values = {"x": rows}
        _run(block, values, weights, (none, none))
        found.append(values["logits"])
    return found


@torch.no_grad()
def reference_logits(
    model: ModelSpec, weights: Weights, tokens: Tensor, dtype: torch.dtype | None = None, rows: Rows | None = None
) -> Tensor:
    """Logits [batch, sequence, vocab] of int64 tokens [batch, sequence]."""
    return _forward(model, converted(weights, dtype), tokens, None, rows)["logits"]


@torch.no_grad()
def reference_loss(
    model: ModelSpec, weights: Weights, tokens: Tensor, targets: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean negative log-likelihood over all tokens; tokens and targets int64 [batch, sequence]."""
    return _forward(model, converted(weights, dtype), tokens, targets)["loss"]


def reference_gradients(
    model: ModelSpec,
    weights: Weights,
    tokens: Tensor,
    targets: Tensor,
    dtype: torch.dtype | None = None,
    rows: Rows | None = None,
) -> tuple[Tensor, dict[Key, Tensor]]:
    """The mean loss and its gradient by every weight; tied weights share one tensor, the sum of both uses.

    One sequence after another, so that plain attention's scores and the logits of a whole batch need not fit at once.
    """
    cast = converted(weights, dtype)
    trained = _trained(model, cast)
    leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in trained.values()}
    own = {key: leaves.get(id(tensor), tensor) for key, tensor in cast.items()}
    loss, sums = torch.zeros(()), [torch.zeros_like(leaf) for leaf in leaves.values()]
    with torch.enable_grad():
        for row, target in zip(tokens.split(1), targets.split(1), strict=True):
            part = _forward(model, own, row, target, rows)["loss"] / len(tokens)
            for total, gradient in zip(sums, torch.autograd.grad(part, list(leaves.values())), strict=True):
                total.add_(gradient)
            loss = part.detach() + loss.to(part)
    grads = dict(zip(leaves, sums, strict=True))
    return loss, {key: grads[id(tensor)] for key, tensor in trained.items()}


def reference_generate(
    model: ModelSpec,
    weights: Weights,
    prompt: Tensor,
    new_tokens: int,
    dtype: torch.dtype | None = None,
    choose: Callable[[Tensor, int], Tensor] = lambda logits, step: logits.argmax(-1),
) -> Tensor:
    """Continuation int64 [batch, new_tokens] of prompt [batch, length]: the whole prefix again each time. `choose`: the
    tokens [batch] for logits [batch, vocabulary] of a step; greedy."""
    weights, tokens = converted(weights, dtype), prompt
    for step in range(new_tokens):
        chosen = choose(reference_logits(model, weights, tokens)[:, -1], step)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
    return tokens[:, prompt.shape[1] :]


@torch.no_grad()
def clip_gradients(gradients: Mapping[Key, Tensor], limit: float) -> bool:
    """Scales the gradients in place so that their global L2 norm is at most `limit`; a shared tensor counts once.

    False, and nothing scaled, where one of them is not finite: the step is to be skipped.
    """
    distinct = {id(gradient): gradient for gradient in gradients.values()}.values()
    norm = sqrt(sum(float(gradient.double().square().sum()) for gradient in distinct))
    if not isfinite(norm):
        return False
    for gradient in distinct:
        gradient.mul_(min(1.0, limit / norm) if norm else 1.0)
    return True


@torch.no_grad()
def adamw_step(
    weights: Weights,
    gradients: Mapping[Key, Tensor],
    state: MutableMapping[Key, tuple[Tensor, Tensor]],
    step: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """One AdamW step (Loshchilov and Hutter, 1711.05101, algorithm 2) in place; `step` counts from 1.

    `state` holds the two moments of each weight and is filled at the first step. Every weight decays; tied ones are
    updated once, and what has no gradient (a constant) not at all.
    """
    done: set[int] = set()
    for key, weight in weights.items():
        if id(weight) in done or key not in gradients:
            continue
        done.add(id(weight))
        gradient = gradients[key]
        if key not in state:
            state[key] = (torch.zeros_like(weight), torch.zeros_like(weight))
        mean, square = state[key]
        mean.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        unbiased = square.div(1 - BETAS[1] ** step).sqrt_().add_(EPSILON)
        weight.mul_(1 - learning_rate * weight_decay)
        weight.addcdiv_(mean, unbiased, value=-learning_rate / (1 - BETAS[0] ** step))
