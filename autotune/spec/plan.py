"""A Plan: every decision, one field an axis. Frozen and hashable; its digest is its name.

A new axis is a field with the default that means "as before", so that old locks keep their meaning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from autotune.spec.digest import digest
from autotune.spec.errors import UsageError, nearest_name

LIBRARY, FUSED = "library", "fused"  # whose kernels decode a token
PLAIN = "plain"  # decoding a token at a time
MATCH, REJECTION, TYPICAL = "match", "rejection", "typical"  # how proposed tokens are committed
EXACT, INT8 = "exact", "int8"  # how the layers' linear weights are kept
# Values of axes that change results, and what is said wherever such a plan is shown. A search tries none of them unless
# the recipe names it; `run --check` compares with an emulation of the same choice, and says how far its answers are
# from those without it (runners/drift.py).
CHANGES = {
    ("commit", TYPICAL): "tokens are kept that are likely enough, not only those that the model would choose",
    ("weights", INT8): "the layers' linear weights are rounded to 8 bits: answers are not the exact model's",
}


@dataclass(frozen=True)
class Plan:
    """World size is data x context x tensor x pipeline. Ranks are numbered tensor fastest, then context, then data,
    then pipeline."""

    data: int = 1  # replicas of the model
    tensor: int = 1  # ranks that share each layer
    pipeline: int = 1  # ranks that share the list of layers
    micro_batch: int = 1  # sequences that a replica takes at once (generation: that it generates together)
    schedule: str = "1f1b"  # a key of planners.schedules.SCHEDULES
    chunks: int = 1  # model chunks (virtual stages) a pipeline rank
    recompute: str = "none"  # none | selective (attention core and gated activation) | full (whole layer)
    attention: str = "sdpa"  # attention backend, a key of runners.ops.attention.BACKENDS
    zero: int = 0  # sharded over data: 0 nothing; 1 optimizer states; 2 gradients too; 3 weights too
    sequence_parallel: bool = False  # Megatron's: norms and residuals sharded over the tensor ranks by sequence
    order: str = ""  # the schedule "given": a line a rank, `0F0 0F1 0BW0` (planners.schedules.text)
    offload: int = 0  # percent of a rank's chunk activations that wait on the host for their backward
    optimizer: str = "barrier"  # with clipping: barrier | post-validated (update first, judge by the norm later)
    optimizer_offload: int = 0  # percent of a rank's optimizer states that live on the host, in subgroups
    optimizer_stride: int = 0  # each so manieth of those subgroups is updated by the device; 0: none
    optimizer_window: int = 0  # compute steps before the update at which the first of these start to be fetched
    layers: str = ""  # layers of each stage, "5,6,6,5"; "": as even as can be
    group: int = 0  # micro-batches of a scheduling unit, for schedules with such; 0: the schedule's own choice
    limit: int = 0  # chunk activations that a rank may hold, for schedules made under a limit; 0: the schedule's own
    vocabulary: str = (
        "ends"  # embedding and head: "ends" on the outer stages, or over all (planners.schedules.vocabulary)
    )
    gathered: int = 0  # chunks whose whole weights (zero 3), or gradients (2, 3), a rank holds at once; 0: all it has
    times: str = ""  # relative durations "F,B,W,hop" that a schedule was made for (planners.schedules.times); "": equal
    sync: str = "eager"  # gradient sums over replicas: eager (after the stage's last backward) | late (the rank's last)
    weight_gradients: str = "apart"  # of a split backward: a product a micro-batch | "joined": one for all W in a row
    gather_each: str = "step"  # whole weights of zero 3, with room for all: once a step | unit (passes.shard)
    split: str = "own"  # backwards in two halves: as the schedule has them | immediate | fill | end (schedules.split)
    offload_window: int = 2  # compute steps that a copy of them may take before it is waited for
    offload_choice: str = "selective"  # which chunk activations move: the longest waits | uniform (an even share)
    context: int = 1  # ranks that share each sequence (planners.lower.context)
    context_ring: int = 1  # of them those that pass keys and values around; so many groups exchange heads for tokens
    kernels: str = (
        LIBRARY  # of a decoded token: the libraries' | fused, ours that join neighbours (planners.lower.fuse)
    )
    prompt_chunk: int = 0  # tokens of a prompt that are read at a time; 0: all of them
    decoding: str = PLAIN  # who proposes tokens (planners.decoding.strategies): plain, nobody
    speculate: int = 0  # tokens in a row that are proposed a round, to be scored in one pass; 0: none
    branches: int = 1  # such rows side by side, each after the newest token
    match: int = 0  # of "ngram": newest tokens that must have come before where a continuation is looked up
    window: int = 0  # of "lookahead": places after the newest token whose tokens are guessed again and again
    tree: str = ""  # of "heads": parents of the proposed tokens, "0,0,1,1,2" (planners.decoding.trees); "": a row
    refine: str = "none"  # of "heads" in a row: ngram, by pairs of tokens of the text so far | none
    # What is kept: match (what the target itself chooses) | rejection (speculative sampling) | typical (likely enough).
    commit: str = MATCH
    weights: str = EXACT  # of a generation's layers: exact, as the precision says | int8, rounded (spec.int8_graph)
    page: int = 0  # of a generation's cache, positions of a page; 0: none, all sequences have room for the longest
    expert: int = 1  # replicas that divide each layer's routed experts among themselves (planners.lower.expert)

    @property
    def world(self) -> int:
        return self.replicas * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, but for routed experts: what sums gradients and what ZeRO shards over."""
        return self.data * self.context

    @property
    def copies(self) -> int:
        """Of the replicas those that hold the same routed experts."""
        return self.replicas // self.expert

    @property
    def stages(self) -> int:
        return self.pipeline * self.chunks

    @property
    def digest(self) -> str:
        return digest(self)

    @property
    def id(self) -> str:
        """The short name that people read and type."""
        return self.digest[:10]

    def altered(self, **axes: Any) -> Plan:
        """The plan with other values of some axes, as `dataclasses.replace` gives it: a search makes many thousands."""
        made = object.__new__(Plan)
        made.__dict__.update(self.__dict__, **axes)
        return made

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "plan") -> Plan:
        """The plan in `raw`; unknown axes and wrong types are refused by name."""
        known = {f.name: type(f.default) for f in fields(cls)}
        for key, value in raw.items():
            if key not in known:
                near = nearest_name(key, known)
                raise UsageError(f"{source}: {key}: unknown axis", hint=f"did you mean {near}?" if near else None)
            if type(value) is not known[key]:
                raise UsageError(f"{source}: {key}: found {value!r}; expected {known[key].__name__}")
        return cls(**raw)

    def describe(self) -> str:
        """One line a person can read: only what differs from the defaults, degrees always."""
        context = f"cp{self.context} " if self.context > 1 else ""
        expert = f"ep{self.expert} " if self.expert > 1 else ""
        mesh = f"dp{self.data} {context}{expert}tp{self.tensor} pp{self.pipeline} mb{self.micro_batch}"
        rest = [
            f"{f.name}={_short(getattr(self, f.name))}"
            for f in fields(self)
            if f.name not in ("data", "context", "expert", "tensor", "pipeline", "micro_batch")
            and getattr(self, f.name) != f.default
        ]
        return " ".join([mesh, *rest, *(["(changes results)"] if self.changes else [])])

    @property
    def changes(self) -> tuple[str, ...]:
        """What of the plan changes results, `weights = int8: why`; nothing of most plans."""
        return tuple(f"{a} = {value}: {why}" for (a, value), why in CHANGES.items() if getattr(self, a) == value)

    @property
    def unchanged(self) -> Plan:
        """The plan without what changes results."""
        usual = Plan()
        return self.altered(**{a: getattr(usual, a) for a, value in CHANGES if getattr(self, a) == value})


def _short(value: object) -> object:
    """A value that fits into a line: a long text by its digest."""
    return digest(value)[:10] if isinstance(value, str) and (len(value) > 24 or "\n" in value) else value
