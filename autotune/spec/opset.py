"""The operations a block graph may use, and what each keeps from its forward for its backward. No torch here.

A body program's backward is derived from this table alone, so the simulator's activation bytes and the executor's
saved tensors are the same statement. `stats` are extra outputs of the forward that only the backward reads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stat:
    """An extra saved tensor: `per_token` fp32 elements a token, times the attribute named by `times` if any."""

    name: str
    times: str = ""  # "" or "heads"


@dataclass(frozen=True)
class OpRule:
    """Indices into a node's reads and writes that its gradients need.

    `dgrad` / `wgrad` say which of ("read", i), ("write", i) or ("stat", i) the input gradient and the weight gradient
    need. `through`: the gradient of every input is the output's own (an addition): no instruction at all.
    """

    stats: tuple[Stat, ...] = ()
    dgrad: tuple[tuple[str, int], ...] = ()
    wgrad: tuple[tuple[str, int], ...] = ()
    inputs: int = 1  # how many leading reads get a gradient
    through: bool = False
    inplace: bool = False  # the input gradient overwrites the first read and takes its place
    repeats: bool = False  # runs several times on one read, whose gradients are summed as they come
    cheap: bool = False  # memory-bound: what the selective recompute policy runs again


OPS: dict[str, OpRule] = {
    "embedding": OpRule(wgrad=(("read", 0),), inputs=0),
    "rmsnorm": OpRule(
        stats=(Stat("rstd"),),
        dgrad=(("read", 0), ("stat", 0)),
        wgrad=(("read", 0), ("stat", 0)),
        cheap=True,
    ),
    "linear": OpRule(wgrad=(("read", 0),)),
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
    "swiglu": OpRule(dgrad=(("read", 0),), cheap=True),
    "add": OpRule(inputs=2, through=True),
    # Its own seed: the loss has no gradient coming in.
    "cross_entropy": OpRule(stats=(Stat("lse"),), dgrad=(("read", 0), ("read", 1), ("stat", 0)), inplace=True),
}
