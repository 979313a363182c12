"""A smaller model proposes, with a cache of its own: a token after the other (Leviathan et al., 2211.17192; Chen et
al., 2302.01318), or all in one pass, after mask tokens (PARD, 2504.18583; ParallelSpec, 2410.05589).

It is whole on every rank of the last stage: a smaller model gains little from being shared, and nobody has to be told
what it proposes. Of the tokens that a round has kept, the cache may lack some: a pass begins with as many of the newest
ones as that can be, known ones again, so that it has the same shape whatever was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autotune.planners.decoding.passes import draft_passes
from autotune.planners.lower.generate import draft_room
from autotune.runners.decoding.seen import Drafter, Seen
from autotune.runners.decoding.sequences import Sequences
from autotune.runners.sampling import distribution, draw, likeliest
from autotune.runners.scorer import Pass, Scorer
from autotune.runners.state import DTYPES, Loader
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import REJECTION, Plan
from autotune.spec.workload import Workload

# int64 [batch, speculate]: what may come after the newest tokens of texts, of which so many are filled, where the host
# knows.
Way = Callable[["Draft", Sequences, tuple[int, ...]], Tensor]


@dataclass
class Draft(Drafter):
    """`way`: the passes of a round. `numbers`, float64 [batch, new_tokens]: what it draws its tokens by. Committed by
    what the target itself chooses it draws by the target's numbers: the likelier to be the same."""

    way: Way
    plan: Plan
    workload: Workload
    model: ModelSpec
    scorer: Scorer
    numbers: Tensor
    q: Tensor | None  # its probabilities [batch, speculate, vocabulary] of the last round, where a rule needs them
    prefill: Pass
    passes: tuple[Pass, ...]  # of a round
    begins: Tensor  # int64 [batch, 1]: of a round's first pass, the row of each sequence's first token
    ends: Tensor  # int64 [batch]: and that of its last

    @classmethod
    def build(
        cls, way: Way, plan: Plan, workload: Workload, load: Loader, device: torch.device, numbers: Tensor
    ) -> Draft:
        model = workload.draft
        assert model is not None  # planners.decoding.strategies refuses a plan that drafts without one
        each, dtype = workload.batch // plan.data, DTYPES[workload.precision]
        places = each, draft_room(plan, workload)
        scorer = Scorer.build(model, tuple(blocks(model)), load, places, plan, workload.precision, device)
        shapes = draft_passes(plan, workload)
        prefill = scorer.compile(shapes.prompt)
        prefill = replace(prefill, steps=prefill.steps[:-1])  # what follows the prompt the target says
        q = None
        if plan.commit == REJECTION:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            q = torch.zeros((each, plan.speculate, model.vocab), dtype=wide, device=device)
        passes = tuple(scorer.compile(shape) for shape, _ in shapes.round)
        queries = passes[0].shape.queries
        begins = torch.arange(each, device=device)[:, None] * queries
        ends = begins.flatten() + queries - 1
        return cls(way, plan, workload, model, scorer, numbers, q, prefill, passes, begins, ends)

    def held(self) -> dict[str, Any]:
        return {"dw": self.scorer.state.weight, "dkv": (self.scorer.cache.k, self.scorer.cache.v)}

    def probabilities(self) -> Tensor | None:
        return self.q

    def propose(self, seen: Seen) -> Tensor:
        texts = seen.sequences
        filled = () if self.scorer.device_knows else tuple(texts.filled.tolist())
        if seen.first:
            self.scorer.run(self.prefill, texts.text[:, : self.workload.prompt_length].reshape(-1))
        return self.way(self, texts, filled)

    def chosen(self, logits: Tensor, texts: Sequences, step: int) -> Tensor:
        """int64 [batch, places]: the tokens after the rows of logits [batch * places, vocabulary], of which the first
        is the one that is proposed `step` after the first."""
        batch = len(texts.own)
        if not self.workload.temperature:
            return likeliest(logits)[1].view(batch, -1)
        p = distribution(logits, self.workload)
        places = len(p) // batch
        if self.q is not None:
            self.q[:, step : step + places].copy_(p.view(batch, places, -1))
        place = (texts.filled + 1 - texts.own)[:, None] + torch.arange(step, step + places, device=p.device)
        numbers = self.numbers.gather(1, place.clamp_max(self.numbers.shape[1] - 1))
        return draw(p, numbers.view(-1, 1)).view(batch, -1)


def one_by_one(draft: Draft, texts: Sequences, filled: tuple[int, ...]) -> Tensor:
    """Its first pass of a round has two tokens: of those that were kept the last may be one that it proposed but has
    not read yet."""
    pair, single = draft.passes
    found: list[Tensor] = []
    for step in range(draft.plan.speculate):
        now, back = (single, 0) if step else (pair, 1)
        assert now.lengths is not None
        now.lengths.move(texts.filled, step - back)
        x = found[-1] if step else texts.newest(2)
        before = tuple(number + step - back for number in filled)
        logits = draft.scorer.run(now, x.reshape(-1), None if step else draft.ends, before)
        found.append(draft.chosen(logits, texts, step))
    return torch.cat(found, dim=1)


def at_once(draft: Draft, texts: Sequences, filled: tuple[int, ...]) -> Tensor:
    """One pass over the newest tokens, as many as a round may have committed, and masks after them; all see what comes
    before them. Keys of masks are where those of later tokens will be: the next pass begins at or before the first of
    them, and writes them all anew.

    Of a text that is shorter than that the pass begins with the text, and what is proposed comes earlier in it.
    """
    (now,), many = draft.passes, draft.plan.speculate
    assert now.lengths is not None
    begin = (texts.filled - many).clamp_min(0)
    now.lengths.move(begin)
    place = begin[:, None] + torch.arange(2 * many, device=begin.device)
    ahead = place - texts.filled[:, None] - 1  # below 0: a token that is known
    masks = ahead.clamp(0, draft.model.masks - 1) + draft.model.vocab
    known = texts.text.gather(1, place.clamp_max(texts.text.shape[1] - 1))
    x = torch.where(ahead < 0, known, masks)
    first = draft.begins + (texts.filled - begin)[:, None]  # the rows of the newest tokens
    rows = (first + torch.arange(many, device=begin.device)).flatten()
    logits = draft.scorer.run(now, x.flatten(), rows, tuple(max(0, number - many) for number in filled))
    return draft.chosen(logits, texts, 0)
