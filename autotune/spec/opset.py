"""The operations a block graph may use, and what each keeps from its forward for its backward. No torch here.

A body program's backward is derived from this table alone, so the simulator's activation bytes and the executor's
saved tensors are the same statement. `stats` are extra outputs of the forward that only the backward reads.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_NODE = -1  # the `part` of a body's instruction that belongs to no node of its block


@dataclass(frozen=True)
class Stat:
    """An extra saved tensor: `per_token` fp32 elements a token, times the attribute named by `times` if any."""

    name: str
    times: str = ""  # "" or "heads"


# What an element of a write is: an activation, as precise as a statistic, an int64 index, or an int32 count (of which
# there are as many as experts, however many tokens).
ACTIVATION, WIDE, INDEX, COUNT = "activation", "wide", "index", "count"


@dataclass(frozen=True)
class OpRule:
    """Indices into a node's reads and writes that its gradients need.

    `dgrad` / `wgrad` say which of ("read", i), ("write", i) or ("stat", i) the input gradient and the weight gradient
    need. `through`: the gradient of every input is the output's own (an addition): no instruction at all. `kinds` says
    what each write holds; activations where it is empty. Indices and counts have no gradients.
    """

    stats: tuple[Stat, ...] = ()
    dgrad: tuple[tuple[str, int], ...] = ()
    wgrad: tuple[tuple[str, int], ...] = ()
    inputs: int = 1  # how many leading reads get a gradient
    through: bool = False
    inplace: bool = False  # the input gradient overwrites the first read and takes its place
    repeats: bool = False  # runs several times on one read, whose gradients are summed as they come
    cheap: bool = False  # memory-bound: what the selective recompute policy runs again
    kinds: tuple[str, ...] = ()


LOSSES = ("cross_entropy", "ahead_entropy")  # whose write is one number

OPS: dict[str, OpRule] = {
    "embedding": OpRule(wgrad=(("read", 0),), inputs=0),
    "rmsnorm": OpRule(
        stats=(Stat("rstd"),),
        dgrad=(("read", 0), ("stat", 0)),
        wgrad=(("read", 0), ("stat", 0)),
        cheap=True,
    ),
    "linear": OpRule(wgrad=(("read", 0),)),
    "linear_int8": OpRule(),  # of a generation: no backward
    # With q and k norms the rotation's input is needed again; without, its gradient is a rotation back.
    "rotary": OpRule(cheap=True),
    "rotary_norm": OpRule(dgrad=(("read", 0),), wgrad=(("read", 0),), cheap=True),
    "attention": OpRule(
        stats=(Stat("lse", times="heads"),),
        dgrad=(("read", 0), ("read", 1), ("read", 2), ("write", 0), ("stat", 0)),
        inputs=3,
    ),
    # The same queries over further keys (reads 1, 2), merged into o and lse in place: every part's gradient needs the
    # final ones alone (2307.08691, 2.2).
    "attention_more": OpRule(
        dgrad=(("read", 0), ("read", 1), ("read", 2), ("write", 0), ("stat", 0)),
        inputs=3,
        repeats=True,
    ),
    # Latent attention: neither the split of a latent from its rotary key nor a rotation needs anything again.
    "latent_norm": OpRule(
        stats=(Stat("rstd"),),
        dgrad=(("read", 0), ("stat", 0)),
        wgrad=(("read", 0), ("stat", 0)),
        cheap=True,
    ),
    "latent_key": OpRule(cheap=True),
    "latent_rotary": OpRule(inputs=3, cheap=True),
    "swiglu": OpRule(dgrad=(("read", 0),), cheap=True),
    # Experts: scores -> each token's weights and experts; rows sorted by expert with their weights, the slot of each
    # row, the row of each slot, and where each expert's rows end; products by expert; rows added up by token.
    "route": OpRule(dgrad=(("read", 0), ("write", 1)), cheap=True, kinds=(WIDE, INDEX)),
    "dispatch": OpRule(dgrad=(("write", 3),), inputs=2, cheap=True, kinds=(ACTIVATION, WIDE, INDEX, INDEX, COUNT)),
    "grouped": OpRule(dgrad=(("read", 1),), wgrad=(("read", 0), ("read", 1))),
    "weighted_swiglu": OpRule(dgrad=(("read", 0), ("read", 1)), inputs=2, cheap=True),
    "combine": OpRule(dgrad=(("read", 1),)),
    "add": OpRule(inputs=2, through=True),
    # Decoding heads: a frozen model's hidden rows, which no gradient reaches; an activation by itself; the loss of
    # tokens further ahead, added to the loss so far (read 2).
    "frozen": OpRule(inputs=0),
    "activate": OpRule(dgrad=(("read", 0),), cheap=True),
    "ahead_entropy": OpRule(stats=(Stat("lse"),), dgrad=(("read", 0), ("read", 1), ("stat", 0)), inplace=True),
    # Its own seed: the loss has no gradient coming in.
    "cross_entropy": OpRule(stats=(Stat("lse"),), dgrad=(("read", 0), ("read", 1), ("stat", 0)), inplace=True),
}
