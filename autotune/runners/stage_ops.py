"""F, BW, B and W: the blocks of a stage, one after another, for one micro-batch. One line of the table each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autotune.planners.lower.body import lower_block
from autotune.planners.lower.join import part_of
from autotune.runners.body import Values
from autotune.spec.graph import Block
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer

Made = tuple[Any, ...]
Store = Mapping[str, Any]


def _pick(instruction: Instruction, made: Mapping[str, Any], values: Store) -> Made:
    """The instruction's writes by what their names begin with; what was added to in place stays what it is."""
    kinds = [(name, name.partition(".")[0]) for name in instruction.writes]
    return tuple(made[kind] if kind in made else values[name] for name, kind in kinds)


def _source(trainer: Trainer, instruction: Instruction, values: Store) -> Tensor:
    """The stage's own input: tokens, or the activation that the stage before it made."""
    s, m = instruction.stage, instruction.item
    own = f"x.{s}.{m}"
    return values[own] if own in instruction.reads else trainer.rows(values, "tokens", m)


def _targets(trainer: Trainer, block: Block, instruction: Instruction, values: Store) -> Values:
    return {"targets": trainer.rows(values, "targets", instruction.item)} if block.kind == "head" else {}


def forward(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """Leaves, for every block, what B alone needs (a) and what W needs too (k), the inputs of inner blocks included."""
    state = trainer.states[instruction.stage]
    x = _source(trainer, instruction, values)
    early: list[Values] = []
    late: list[Values] = []
    for number, block in enumerate(state.blocks):
        source = block.nodes[0].reads[0]
        given: Values = {source: x, **_targets(trainer, block, instruction, values)}
        left = trainer.run(block, "F", instruction.stage, given)
        x = left.pop(block.nodes[-1].writes[0])
        left.pop("targets", None)
        if number == 0:  # the stage's own input is the store's, not the activations'
            left.pop(source)
        kept = set(lower_block(block, trainer.shape, trainer.plan.recompute).kept) | {source}
        late.append({name: value for name, value in left.items() if name in kept})
        early.append({name: value for name, value in left.items() if name not in kept})
    made = {"a": early, "k": late, "x": x}
    if "loss" in instruction.writes:
        made["loss"] = values["loss"].add_(x)
    return _pick(instruction, made, values)


def backward(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """Both gradients of every block, the last one first."""
    state = trainer.states[instruction.stage]
    early, late = (values[f"{n}.{instruction.stage}.{instruction.item}"] for n in "ak")
    gradient: Tensor | None = values.get(f"d.{instruction.stage}.{instruction.item}")
    source = _source(trainer, instruction, values)
    for block in reversed(state.blocks):
        body = lower_block(block, trainer.shape, trainer.plan.recompute)
        given = {**early.pop(), **late.pop(), **_targets(trainer, block, instruction, values)}
        given.setdefault(block.nodes[0].reads[0], source)
        if gradient is not None:
            given[f"d.{body.output}"] = gradient
        gradient = None  # the body frees it where it is last read
        left = trainer.run(block, "BW", instruction.stage, given)
        gradient = left.pop(body.gradient, None)
        left.clear()  # the block's input: nobody needs it any more
    return _pick(instruction, {"d": gradient}, values)


def input_gradient(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """The gradient of the stage's input; b holds what it leaves for W, block by block from the last."""
    state = trainer.states[instruction.stage]
    early, late = (values[f"{n}.{instruction.stage}.{instruction.item}"] for n in "ak")
    gradient: Tensor | None = values.get(f"d.{instruction.stage}.{instruction.item}")
    source = _source(trainer, instruction, values)
    made: list[Values] = []
    for number, block in reversed(list(enumerate(state.blocks))):
        body = lower_block(block, trainer.shape, trainer.plan.recompute)
        given = {**early.pop(), **late[number], **_targets(trainer, block, instruction, values)}
        given.setdefault(block.nodes[0].reads[0], source)
        incoming = f"d.{body.output}"
        if gradient is not None:
            given[incoming] = gradient
        gradient = None
        left = trainer.run(block, "B", instruction.stage, given)
        gradient = left.get(body.gradient)
        names = set(body.made)
        if body.late_gradient and number < len(state.blocks) - 1:  # the stage's own is the store's
            names.add(incoming)
        made.append({name: value for name, value in left.items() if name in names})
    return _pick(instruction, {"b": made, "d": gradient}, values)


def weight_gradient(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """The gradients of every block's weights, from what the forward and B left for them; of several micro-batches
    together where the instruction names several."""
    stage, state = instruction.stage, trainer.states[instruction.stage]
    items = [int(name.rpartition(".")[2]) for name in instruction.reads if name.startswith("k.")]
    sources = [_source(trainer, instruction._replace(item=m), values) for m in items]
    for number, block in reversed(list(enumerate(state.blocks))):
        body = lower_block(block, trainer.shape, trainer.plan.recompute)
        given: Values = {}
        for place, (m, source) in enumerate(zip(items, sources, strict=True)):
            own = {**values[f"k.{stage}.{m}"].pop(), **values[f"b.{stage}.{m}"].pop(0)}
            own.setdefault(block.nodes[0].reads[0], source)
            if body.late_gradient and number == len(state.blocks) - 1:
                own[f"d.{body.output}"] = values[f"d.{stage}.{m}"]
            given |= own if len(items) == 1 else {part_of(name, place): value for name, value in own.items()}
        own = {}
        trainer.run(block, "W", stage, given, len(items)).clear()
    return _pick(instruction, {}, values)


OPERATIONS = {"F": forward, "BW": backward, "B": input_gradient, "W": weight_gradient}
