"""Whether a plan can be run at all, and if not why, with the nearest value that can."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from autotune.planners.decoding.strategies import AXES as DECODING_AXES
from autotune.planners.decoding.strategies import STRATEGIES, refused, scored
from autotune.planners.lower.recompute import RECOMPUTE
from autotune.planners.lower.sharding import LEVELS
from autotune.planners.lower.stage import FORMS, partition
from autotune.planners.lower.subgroups import SUBGROUPS
from autotune.planners.lower.traits import micro_batches, pipe_of
from autotune.planners.lower.vocabulary import shard_rows, shards
from autotune.planners.schedules import OWN, PLACEMENTS, SCHEDULES, Pipe, held, schedule_of
from autotune.planners.schedules.times import parse_times
from autotune.planners.schedules.vocabulary import VOCABULARIES
from autotune.spec.errors import nearest_divisor, nearest_name
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.plan import EXACT, FUSED, LIBRARY, Plan
from autotune.spec.workload import Workload

# Axes that have no meaning when training.
GENERATION_AXES = ("kernels", "prompt_chunk", "weights", "page", "decoding", *DECODING_AXES)
# Axes that have no meaning when generating.
TRAINING_AXES = (
    "zero",
    "recompute",
    "chunks",
    "layers",
    "group",
    "limit",
    "times",
    "order",
    "offload",
    "vocabulary",
    "sequence_parallel",
    "optimizer",
    "optimizer_offload",
    "optimizer_stride",
    "optimizer_window",
    "gathered",
    "sync",
    "weight_gradients",
    "gather_each",
    "offload_choice",
    "offload_window",
    "split",
    "context",
    "context_ring",
    "expert",
)
ALONE = "needs training: a captured pass of a generation cannot wait for how many rows come"
TOGETHER = "1f1b"  # the schedule that a vocabulary whose passes all ranks do together has an order for
OPTIMIZERS = ("barrier", "post-validated")
SYNCS = ("eager", "late")
PRODUCTS = ("apart", "joined")
GATHERS = ("step", "unit")
CHOICES = ("selective", "uniform")
KERNELS = (LIBRARY, FUSED)
PAGES = (0, 16, 64, 256)  # positions of a page
TAKES_MASK = ("efficient", "sdpa", "math")  # backends of attention, of training
MOST_FUSED = 64  # tokens at a time, of all sequences: kernels.decode keeps all of a sequence's in registers


def _divides(what: str, value: int, of: int, whole: str) -> str | None:
    if value >= 1 and of % value == 0:
        return None
    return f"{what} must divide {whole} {of} (found {value}; nearest {nearest_divisor(max(value, 1), of)})"


def unsharded(model: ModelSpec, tensor: int, ends: bool = True) -> str | None:
    """The first width of the model that `tensor` ranks cannot share evenly, or None: no shard has a shape then.

    `ends`: the vocabulary is a layer's width like others; elsewhere its shards are padded.
    """
    widths = [("heads", model.heads), ("kv_heads", model.kv_heads), ("ffn", model.ffn)]
    if model.experts:
        widths += [("experts' ffn", model.experts.ffn), ("shared experts' ffn", model.experts.shared_ffn)]
    widths += [("vocabulary", model.vocab)] if ends else []
    return next((why for whole, of in widths if (why := _divides("tensor", tensor, of, whole))), None)


def _tensor(plan: Plan, model: ModelSpec, workload: Workload, ends: bool) -> list[str | None]:
    found = [unsharded(model, plan.tensor, ends)]
    if plan.sequence_parallel:
        if plan.tensor == 1:
            found.append("sequence_parallel needs tensor > 1 (found 1; nearest 2)")
        if workload.kind == "train":
            tokens = plan.micro_batch * (workload.rows // plan.context)
            found.append(_divides("tensor", plan.tensor, tokens, "tokens of a micro-batch"))
    return found


def _heads(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    """What is wrong with training decoding heads, or with generating with them alone."""
    if not isinstance(model, HeadsSpec):
        return []
    if workload.kind != "train":
        return [f"{model.architecture} answer nothing alone: [model] names their target, and [draft] them"]
    target = model.target
    if target is None:
        return [f"{model.architecture} are trained on a model's hidden rows: a [target] section in the recipe"]
    found: list[str | None] = [
        f"{axis} must be 1 for decoding heads, which are small and whole on each rank (found {value}; nearest 1)"
        for axis in ("tensor", "context", "pipeline", "chunks")
        if (value := getattr(plan, axis)) != 1
    ]
    for key, ours, theirs in (
        ("hidden_size", model.hidden, target.hidden),
        ("vocab_size", model.vocab, target.vocab),
    ):
        if ours != theirs:
            found.append(f"the heads' {key} must be the target's {theirs} (found {ours} of {model.name})")
    if model.count >= workload.sequence_length:
        found.append(f"sequence_length must be more than the {model.count} heads (found {workload.sequence_length})")
    return found


def least_ring(plan: Plan, model: ModelSpec) -> int:
    """The smallest `context_ring` that leaves no more ranks to exchange heads than there are heads for."""
    heads = gcd(model.heads, model.kv_heads) // plan.tensor
    return plan.context // gcd(plan.context, max(1, heads))


def _context(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    """What is wrong with how ranks share sequences."""
    length, ring = workload.sequence_length, plan.context_ring
    found = [_divides("context_ring", ring, plan.context, "context")]
    if plan.context == 1 or found[0]:
        return found
    if workload.masks:
        found.append("context needs rows that see all that come before them (found masks among them; nearest 1)")
    found.append(_divides("context", plan.context, length, "sequence_length"))
    if ring > 1:
        found.append(_divides("2 x context_ring", 2 * ring, length, "sequence_length"))
        if 0 < model.window < length:
            found.append(f"context_ring needs attention to all tokens before (found window {model.window}; nearest 1)")
        if model.latent:
            found.append("context_ring needs values as wide as keys (found latent attention; nearest 1)")
    what = "context / context_ring" if ring > 1 else "context"
    for whole, heads in (("heads", model.heads), ("kv_heads", model.kv_heads)):
        if heads % plan.tensor == 0:  # else refused as such
            reason = _divides(what, plan.context // ring, heads // plan.tensor, f"{whole} of a tensor rank")
            found.append(reason and f"{reason[:-1]}, or context_ring {least_ring(plan, model)})")
    return found


def _expert(plan: Plan, model: ModelSpec) -> list[str | None]:
    """What is wrong with how replicas divide the routed experts."""
    if plan.expert == 1:
        return []
    if model.experts is None:
        return [f"expert needs a model with experts: {model.architecture} has none (found {plan.expert}; nearest 1)"]
    both = gcd(model.experts.count, plan.replicas)
    found: list[str | None] = []
    for whole, of in (("experts", model.experts.count), ("replicas (data x context)", plan.replicas)):
        wrong = f"expert must divide {whole} {of} (found {plan.expert}; nearest {nearest_divisor(plan.expert, both)})"
        found.append(wrong if of % plan.expert else None)
    return found


def unfit(plan: Plan, model: ModelSpec, workload: Workload) -> str | None:
    """The first reason why no choice of a training plan's inner axes can make it run, or None: degrees that the model
    or the batch cannot be shared by, or that leave an axis without a meaning."""
    if workload.kind != "train":
        return None
    checks = (
        *_heads(plan, model, workload),
        *_context(plan, model, workload),
        *_expert(plan, model),
        *_tensor(plan, model, workload, ends=False),
        *_replicas(plan, workload),
    )
    return next((reason for reason in checks if reason), None)


def _replicas(plan: Plan, workload: Workload) -> tuple[str | None, str | None]:
    """What is wrong with the number of replicas."""
    shared = _divides("data x micro_batch", plan.data * plan.micro_batch, workload.global_batch, "global_batch")
    return shared, "zero needs data > 1 (found 1; nearest 2)" if plan.zero and plan.replicas == 1 else None


def _texts(plan: Plan, model: ModelSpec) -> str | None:
    """What is wrong with the axes that are written as text."""
    try:
        parse_times(plan.times, plan.stages)
    except ValueError as error:
        return f"times must be {error}"
    if not plan.layers:
        return None
    even = ",".join(map(str, partition(model.layers, plan.stages)))
    counts = [int(n) if n.isdecimal() else 0 for n in plan.layers.split(",")]
    if len(counts) != plan.stages or sum(counts) != model.layers or min(counts) < 1:
        whole = f"{plan.stages} positive numbers that add up to layers {model.layers}"
        return f"layers must be {whole} (found {plan.layers!r}; nearest {even!r})"
    return None


def _vocabulary(plan: Plan, model: ModelSpec) -> str | None:
    """Why the vocabulary cannot lie where the plan wants it."""
    if plan.vocabulary == "ends":
        return None
    if plan.vocabulary not in VOCABULARIES:
        near = nearest_name(plan.vocabulary, ("ends", *VOCABULARIES))
        return f"vocabulary {plan.vocabulary!r} is unknown (nearest {near or 'ends'!r})"
    if model.masks:
        return (
            f"vocabulary {plan.vocabulary} needs a vocabulary without mask tokens (found {model.masks}; nearest 'ends')"
        )
    if plan.pipeline == 1:
        return f"vocabulary {plan.vocabulary} needs pipeline > 1 (found 1; nearest 2)"
    if VOCABULARIES[plan.vocabulary].together and plan.schedule != TOGETHER:
        return f"vocabulary {plan.vocabulary} needs schedule {TOGETHER} (found {plan.schedule}; nearest {TOGETHER})"
    least = shard_rows(model.vocab, shards(plan)) * (shards(plan) - 1) + 1
    if model.vocab < least:
        return f"vocabulary {plan.vocabulary} needs a row on every rank: at least {least} (found {model.vocab})"
    return None


def _training(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    found = list(_replicas(plan, workload))
    schedule = SCHEDULES.get(plan.schedule)
    if schedule is None:
        near = nearest_name(plan.schedule, SCHEDULES)
        return [*found, f"schedule {plan.schedule!r} is unknown (nearest {near or '1f1b'})"]
    if reason := _texts(plan, model) or _split(plan):
        return [*found, reason]
    if found[0] is None:
        reason = schedule.refuse(pipe_of(plan, micro_batches(plan, workload)))
        found.append(reason and f"schedule {plan.schedule} needs {reason}")
    if plan.order and plan.schedule != "given":
        found.append(f"order needs schedule given (found {plan.schedule})")
    if plan.stages > max(1, model.layers):
        found.append(f"pipeline x chunks must be at most layers {model.layers} (found {plan.stages})")
    if plan.recompute not in RECOMPUTE:
        found.append(f"recompute {plan.recompute!r} is unknown (nearest {nearest_name(plan.recompute, RECOMPUTE)})")
    found.append(_moves(plan))
    found.append(_vocabulary(plan, model))
    found.append(_optimizer(plan, workload))
    found.append(_sharding(plan))
    found.append(_sync(plan))
    found.append(_weight_gradients(plan, model))
    if model.frozen:
        found.append(_frozen(plan))
    if workload.masks and plan.attention not in TAKES_MASK:
        takes = f"an attention that is told which rows see which: {', '.join(TAKES_MASK)}"
        found.append(f"masks need {takes} (found {plan.attention}; nearest {TAKES_MASK[0]})")
    return found + _meaningless(plan, GENERATION_AXES, "training")


def _frozen(plan: Plan) -> str | None:
    """What is wrong with how mask tokens alone are trained: they are few, and in the first stage."""
    for axis in ("pipeline", "zero", "optimizer_offload"):
        if (value := getattr(plan, axis)) != (usual := getattr(Plan(), axis)):
            return f"{axis} has nothing to share where mask tokens alone are trained (found {value}; nearest {usual})"
    return None


def _sharding(plan: Plan) -> str | None:
    """What is wrong with how the data ranks share the stages."""
    if plan.zero not in LEVELS:
        nearest = min(LEVELS[-1], max(LEVELS[0], plan.zero))
        return f"zero must be {LEVELS[0]} to {LEVELS[-1]} (found {plan.zero}; nearest {nearest})"
    if plan.gather_each not in GATHERS:
        near = nearest_name(plan.gather_each, GATHERS)
        return f"gather_each {plan.gather_each!r} is unknown (nearest {near or GATHERS[0]})"
    if plan.gather_each != GATHERS[0] and (plan.zero != LEVELS[-1] or plan.gathered):
        found = f"found zero {plan.zero}, gathered {plan.gathered}; nearest {GATHERS[0]}"
        return f"gather_each {plan.gather_each} needs zero 3 and gathered 0 ({found})"
    if plan.zero < 2:
        return f"gathered needs zero 2 or 3 (found zero {plan.zero}; nearest 2)" if plan.gathered else None
    place = SCHEDULES[plan.schedule].place(Pipe(plan.pipeline, plan.pipeline * 2, plan.chunks))
    most = len(held(place, 0))
    if not 0 <= plan.gathered <= most:
        nearest = min(most, max(0, plan.gathered))
        return f"gathered must be 0 to {most}, the chunks of a rank (found {plan.gathered}; nearest {nearest})"
    return None


def _split(plan: Plan) -> str | None:
    """What is wrong with how the backwards are split."""
    if plan.split not in (OWN, *PLACEMENTS):
        return f"split {plan.split!r} is unknown (nearest {nearest_name(plan.split, (OWN, *PLACEMENTS)) or OWN})"
    if plan.split != OWN and SCHEDULES[plan.schedule].splits:
        return f"split {plan.split} needs a schedule of whole backwards (found {plan.schedule}; nearest split {OWN})"
    return None


def _moves(plan: Plan) -> str | None:
    """What is wrong with which activations move to the host, and when."""
    if not 0 <= plan.offload <= 100:
        return f"offload must be a percentage (found {plan.offload}; nearest {min(100, max(0, plan.offload))})"
    if plan.offload_choice not in CHOICES:
        near = nearest_name(plan.offload_choice, CHOICES)
        return f"offload_choice {plan.offload_choice!r} is unknown (nearest {near or CHOICES[0]})"
    if plan.offload_choice != CHOICES[0] and not 0 < plan.offload < 100:
        found = f"found {plan.offload}; nearest {min(99, max(1, plan.offload))}"
        return f"offload_choice {plan.offload_choice} needs offload above 0 and below 100 ({found})"
    if plan.offload_window < 1:
        return f"offload_window must be at least 1 compute step (found {plan.offload_window}; nearest 1)"
    if plan.offload_window != Plan().offload_window and not plan.offload:
        return f"offload_window needs offload above 0 (found {plan.offload}; nearest window {Plan().offload_window})"
    return None


def _sync(plan: Plan) -> str | None:
    """What is wrong with when gradients are summed over those that hold a stage."""
    if plan.sync not in SYNCS:
        near = nearest_name(plan.sync, SYNCS)
        return f"sync {plan.sync!r} is unknown (nearest {near or SYNCS[0]})"
    place = SCHEDULES[plan.schedule].place(Pipe(plan.pipeline, plan.pipeline * 2, plan.chunks))
    summed = plan.replicas > 1 and plan.zero < 2  # beyond, every stage's gradients are summed as they come
    if plan.sync == SYNCS[0] or summed or any(len(ranks) > 1 for ranks in place):
        return None
    whole = "gradients to sum at the end: data > 1 with zero 0 or 1, or a schedule of two directions"
    return f"sync {plan.sync} needs {whole} (found data {plan.data}, zero {plan.zero}; nearest {SYNCS[0]})"


def _weight_gradients(plan: Plan, model: ModelSpec) -> str | None:
    """What is wrong with how the weight gradients of a split backward are made."""
    how = plan.weight_gradients
    if how not in PRODUCTS:
        return f"weight_gradients {how!r} is unknown (nearest {nearest_name(how, PRODUCTS) or PRODUCTS[0]})"
    if how == PRODUCTS[0]:
        return None
    if not schedule_of(plan.schedule, plan.split).splits:
        near = f"found {plan.schedule}; nearest 2bp-1f1b"
        return f"weight_gradients {how} needs a schedule with a split backward ({near})"
    if model.experts:
        return f"weight_gradients {how} needs a model without experts: their rows are sorted by micro-batch"
    if plan.sequence_parallel:
        return f"weight_gradients {how} needs sequence_parallel false: shards of tokens are not joined (found true)"
    return None


def _optimizer(plan: Plan, workload: Workload) -> str | None:
    """What is wrong with how the optimizer's step is taken."""
    if plan.optimizer not in OPTIMIZERS:
        near = nearest_name(plan.optimizer, OPTIMIZERS)
        return f"optimizer {plan.optimizer!r} is unknown (nearest {near or OPTIMIZERS[0]})"
    if not 0 <= plan.optimizer_offload <= 100:
        nearest = min(100, max(0, plan.optimizer_offload))
        return f"optimizer_offload must be a percentage (found {plan.optimizer_offload}; nearest {nearest})"
    if not 0 <= plan.optimizer_stride <= SUBGROUPS:
        nearest = min(SUBGROUPS, max(0, plan.optimizer_stride))
        return f"optimizer_stride must be 0 to {SUBGROUPS} (found {plan.optimizer_stride}; nearest {nearest})"
    if plan.optimizer_stride and not plan.optimizer_offload:
        return f"optimizer_stride needs optimizer_offload above 0 (found stride {plan.optimizer_stride}; nearest 0)"
    if plan.optimizer_window < 0:
        return f"optimizer_window must be 0 or more compute steps (found {plan.optimizer_window}; nearest 0)"
    if plan.optimizer_window and not plan.optimizer_stride:
        return f"optimizer_window needs optimizer_stride above 0 (found window {plan.optimizer_window}; nearest 0)"
    if plan.optimizer == "barrier":
        return None
    if plan.optimizer_offload:
        return f"optimizer {plan.optimizer} needs optimizer_offload 0 (found {plan.optimizer_offload}; nearest 0)"
    if plan.vocabulary != "ends":
        found = f"found {plan.vocabulary}; nearest 'ends'"
        return f"optimizer {plan.optimizer} needs vocabulary 'ends': nobody may wait for others before it ({found})"
    if plan.pipeline == 1:
        return f"optimizer {plan.optimizer} needs pipeline > 1 (found 1; nearest 2)"
    if not workload.clip:
        return f"optimizer {plan.optimizer} needs [workload] clip above 0: nothing else waits for a norm (found 0)"
    return None


def _meaningless(plan: Plan, axes: Sequence[str], doing: str) -> list[str | None]:
    """What of the plan says nothing about what is done."""
    return [
        f"{axis} has no meaning when {doing} (found {getattr(plan, axis)!r}; nearest {plain!r})"
        for axis in axes
        if getattr(plan, axis) != (plain := getattr(Plan(), axis))
    ]


def _kernels(plan: Plan) -> str | None:
    """What is wrong with whose kernels decode."""
    if plan.kernels not in KERNELS:
        return f"kernels {plan.kernels!r} is unknown (nearest {nearest_name(plan.kernels, KERNELS) or LIBRARY})"
    if plan.kernels != FUSED or plan.decoding not in STRATEGIES:
        return None
    each = scored(plan)
    if (tokens := plan.micro_batch * each) > MOST_FUSED:
        near = f"found {tokens}; nearest micro_batch {max(1, MOST_FUSED // each)}"
        return f"kernels {FUSED} take at most {MOST_FUSED} tokens at a time ({near})"
    return None


def _weights(plan: Plan, model: ModelSpec) -> str | None:
    """What is wrong with how layers keep their weights."""
    if plan.weights not in FORMS:
        return f"weights {plan.weights!r} is unknown (nearest {nearest_name(plan.weights, FORMS) or EXACT})"
    if plan.weights != EXACT and model.experts:
        return (
            f"weights {plan.weights} needs a model without experts, most of whose weights would stay (nearest {EXACT})"
        )
    return None


def _generation(plan: Plan, model: ModelSpec, workload: Workload) -> list[str | None]:
    found = [_divides("data x micro_batch", plan.data * plan.micro_batch, workload.batch, "batch")]
    if plan.expert > 1:
        found.append(f"expert {ALONE} (found {plan.expert}; nearest 1)")
    if model.latent:
        found.append(f"{model.architecture}'s latent attention has no key-value cache in this version: it trains only")
    if plan.pipeline > model.layers:
        found.append(f"pipeline must be at most layers {model.layers} (found {plan.pipeline})")
    found += [_kernels(plan), _weights(plan, model)]
    if plan.page not in PAGES:
        near = min(PAGES, key=lambda size: abs(size - plan.page))
        found.append(f"page must be one of {', '.join(map(str, PAGES))} (found {plan.page}; nearest {near})")
    if not 0 <= plan.prompt_chunk < workload.prompt_length:
        most = f"0, or fewer than prompt_length {workload.prompt_length}"
        nearest = 0 if plan.prompt_chunk < 0 else workload.prompt_length - 1
        found.append(f"prompt_chunk must be {most} (found {plan.prompt_chunk}; nearest {nearest})")
    return found + refused(plan, model, workload) + _meaningless(plan, TRAINING_AXES, "generating")


def why_not(model: ModelSpec, workload: Workload, plan: Plan, devices: int | None = None) -> str | None:
    """The first reason why `plan` cannot run, or None. `devices` must equal the plan's world when given."""
    checks: list[str | None] = []
    degrees = plan.data, plan.context, plan.context_ring, plan.expert, plan.tensor, plan.pipeline, plan.chunks
    if min(*degrees, plan.micro_batch) < 1:
        return "every degree must be at least 1"
    if devices is not None and plan.world != devices:
        names = "data x context x tensor x pipeline" if plan.context > 1 else "data x tensor x pipeline"
        checks.append(f"{names} must equal devices {devices} (found {plan.world})")
    checks += _heads(plan, model, workload)
    checks += [*_context(plan, model, workload), *_expert(plan, model)] if workload.kind == "train" else []
    checks += _tensor(plan, model, workload, plan.vocabulary == "ends")
    checks += (_training if workload.kind == "train" else _generation)(plan, model, workload)
    return next((reason for reason in checks if reason), None)
