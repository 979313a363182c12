"""Updates of optimizer states that live on the host, a subgroup at a time (Deep Optimizer States, 2410.21316).

Of a stage's subgroups every `stride`-th is fetched to the device, updated there and returned; of the others the
gradients go down, the host updates, and the new weights come up. The two run side by side: on the lanes of the two copy
directions, on compute, and on the host's.

Buffers of stage s and subgroup j: oh.s.j its states on the host, f.s.j the same on the device while it updates them,
hg.s.j and hw.s.j its gradients and its new weights on the host. Tokens: r.s.j, that its move may start; e.s.j, that its
weights are up. Two subgroups at most are on the device: the next is fetched while one is updated and returned.

Early, the first two come while the last backwards run, whose activations give back memory as they go: a token that
compute writes some steps before the update says when (the paper's section 4.3 puts moves where memory is slack).
"""

from __future__ import annotations

from autotune.planners.lower.subgroups import SUBGROUPS, fetched
from autotune.spec.program import D2H, H2D, HOST, Instruction

AT_ONCE = 2  # subgroups on the device


def started(stage: int, stride: int, early: bool = False) -> tuple[str, ...]:
    """The tokens that the optimizer step writes: whose moves may start once it has seen the gradients' norm."""
    here = fetched(stride)
    apart = set(here if early else here[AT_ONCE:])  # those after the first wait for one that is returned
    return tuple(f"r.{stage}.{j}" for j in range(SUBGROUPS) if j not in apart)


def fetches(stage: int, stride: int) -> list[Instruction]:
    """The first subgroups for the device, some compute steps before the update; a token says when."""
    first = fetched(stride)[:AT_ONCE]
    mark = Instruction("MARK", stage, writes=tuple(f"r.{stage}.{j}" for j in first))
    return [mark, *(_fetch(stage, j) for j in first)] if first else []


def moves(stage: int, stride: int, early: bool = False) -> list[Instruction]:
    """Every subgroup's update, in order; what is fetched comes one subgroup ahead. `early`: the first have come."""
    here = fetched(stride)
    found = [_fetch(stage, j) for j in here[: AT_ONCE - 1]]
    for j in range(SUBGROUPS):
        found += _on_device(stage, here, here.index(j)) if j in here else _on_host(stage, j)
    come = set(here[:AT_ONCE]) if early else set()
    return [i for i in found if i.op != "FETCH" or i.item not in come]


def joined(stage: int, stride: int) -> list[Instruction]:
    """The weights that the host has made go up; JOIN empties the gradients when nothing reads them any more."""
    ups = []
    for j in (j for j in range(SUBGROUPS) if j not in fetched(stride)):
        weight, end = (f"hw.{stage}.{j}",), (f"e.{stage}.{j}",)
        ups.append(Instruction("WEIGHT_UP", stage, j, lane=H2D, reads=weight, writes=end, frees=weight))
    ends = tuple(name for i in ups for name in i.writes)
    states = (f"w.{stage}", f"g.{stage}")
    return [*ups, Instruction("JOIN", stage, reads=(*ends, *states), writes=states, frees=ends)]


def _fetch(stage: int, j: int) -> Instruction:
    token = f"r.{stage}.{j}"
    return Instruction(
        "FETCH", stage, j, lane=H2D, reads=(f"oh.{stage}.{j}", token), writes=(f"f.{stage}.{j}",), frees=(token,)
    )


def _on_device(stage: int, here: tuple[int, ...], at: int) -> list[Instruction]:
    """The gradients are not named as read: OPT, before it on the same lane, has waited for them."""
    j, later = here[at], here[at + 1 :]
    states = f"f.{stage}.{j}"
    room = tuple(f"r.{stage}.{n}" for n in later[AT_ONCE - 1 : AT_ONCE])
    return [
        *(_fetch(stage, n) for n in later[: AT_ONCE - 1]),
        Instruction("OPT_FETCHED", stage, j, reads=(states,), writes=(states, f"w.{stage}")),
        Instruction("RETURN", stage, j, lane=D2H, reads=(states,), writes=(f"oh.{stage}.{j}", *room), frees=(states,)),
    ]


def _on_host(stage: int, j: int) -> list[Instruction]:
    token, gradient, states, weight = (f"{kind}.{stage}.{j}" for kind in ("r", "hg", "oh", "hw"))
    reads, writes = (gradient, states), (states, weight)
    return [
        Instruction("GRADIENT_DOWN", stage, j, lane=D2H, reads=(token,), writes=(gradient,), frees=(token,)),
        Instruction("OPT_HOST", stage, j, lane=HOST, reads=reads, writes=writes, frees=(gradient,)),
    ]
