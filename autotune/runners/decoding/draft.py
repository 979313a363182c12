"""A smaller model proposes, a token after the other, with a cache of its own (Leviathan et al., 2211.17192; Chen et
al., 2302.01318).

It is whole on every rank of the last stage: a smaller model gains little from being shared, and nobody has to be told
what it proposes. Its first pass of a round has two tokens: of those that were kept the last may be one that it
proposed but has not read yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autotune.planners.decoding.passes import draft_shapes
from autotune.planners.lower.pages import room
from autotune.runners.decoding.seen import Seen
from autotune.runners.decoding.sequences import Sequences
from autotune.runners.sampling import distribution, draw, likeliest
from autotune.runners.scorer import Pass, Scorer
from autotune.runners.state import DTYPES, Loader
from autotune.spec.graph import blocks
from autotune.spec.plan import REJECTION, Plan
from autotune.spec.workload import Workload


@dataclass
class Draft:
    """`numbers`, float64 [batch, new_tokens]: what it draws its tokens by. Committed by what the target itself chooses
    it draws by the target's numbers: the likelier to be the same."""

    plan: Plan
    workload: Workload
    scorer: Scorer
    numbers: Tensor
    q: Tensor | None  # its probabilities [batch, speculate, vocabulary] of the last round, where a rule needs them
    prefill: Pass
    pair: Pass
    single: Pass
    prompt: int  # tokens of the longest prompt
    ends: Tensor  # int64 [batch]: row of each second token of a pair

    @classmethod
    def build(cls, plan: Plan, workload: Workload, load: Loader, device: torch.device, numbers: Tensor) -> Draft:
        model = workload.draft
        assert model is not None  # planners.decoding.strategies refuses a plan that drafts without one
        each, dtype = workload.batch // plan.data, DTYPES[workload.precision]
        places = each, room(plan, workload)
        scorer = Scorer.build(model, tuple(blocks(model)), load, places, plan, workload.precision, device)
        prefill, pair, single = (scorer.compile(shape) for shape in draft_shapes(plan, workload))
        prefill = replace(prefill, steps=prefill.steps[:-1])  # what follows the prompt the target says
        q = None
        if plan.commit == REJECTION:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            q = torch.zeros((each, plan.speculate, model.vocab), dtype=wide, device=device)
        ends = torch.arange(each, device=device) * 2 + 1
        return cls(plan, workload, scorer, numbers, q, prefill, pair, single, workload.prompt_length, ends)

    def held(self) -> dict[str, Any]:
        return {"dw": self.scorer.state.weight, "dkv": (self.scorer.cache.k, self.scorer.cache.v)}

    def propose(self, seen: Seen) -> Tensor:
        texts = seen.sequences
        filled = () if self.scorer.device_knows else tuple(texts.filled.tolist())
        if seen.first:
            self.scorer.run(self.prefill, texts.text[:, : self.prompt].reshape(-1))
        found: list[Tensor] = []
        for step in range(self.plan.speculate):
            now, back = (self.single, 0) if step else (self.pair, 1)
            assert now.lengths is not None
            now.lengths.move(texts.filled, step - back)
            x = found[-1] if step else texts.newest(2)
            before = tuple(number + step - back for number in filled)
            logits = self.scorer.run(now, x.reshape(-1), None if step else self.ends, before)
            found.append(self._chosen(logits, texts, step))
        return torch.cat(found, dim=1)

    def _chosen(self, logits: Tensor, texts: Sequences, step: int) -> Tensor:
        """int64 [batch, 1]: the token after each row of logits, `step` after the first that is proposed."""
        if not self.workload.temperature:
            return likeliest(logits)[1][:, None]
        p = distribution(logits, self.workload)
        if self.q is not None:
            self.q[:, step].copy_(p)
        place = (texts.filled + 1 + step - texts.own).clamp_max(self.numbers.shape[1] - 1)
        return draw(p, self.numbers.gather(1, place[:, None]))
