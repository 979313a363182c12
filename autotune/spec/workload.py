"""A workload: what is trained or generated, independent of the plan and the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi
from typing import Any

from autotune.spec.digest import digest
from autotune.spec.model import ModelSpec


def kept(taken: Sequence[Sequence[int]], most: int) -> tuple[float, ...]:
    """Of rounds that committed so many tokens each, at most `most`: of those that kept j proposals in a row, the share
    that kept the next one too, for j from 0 to most - 2."""
    counts = Counter(count for row in taken for count in row)
    reached = [sum(counts[n] for n in range(least, most + 1)) for least in range(1, most + 1)]
    return tuple(after / before if before else 0.0 for before, after in pairwise(reached))


@dataclass(frozen=True)
class Acceptance:
    """How often proposed tokens are kept: `rates[j]` is the share of the rounds that kept j tokens in a row, and
    proposed another, that kept this one too (Leviathan et al., 2211.17192, by position). `traces` are what the rounds
    of each sequence that told it committed, in order: texts differ, and a batch waits for its slowest. `ranks`: of
    heads, of each text how likely they held what came (planners.decoding.ranks)."""

    key: str  # what proposes them: planners.decoding.strategies.acceptance_key
    rates: tuple[float, ...]
    source: str = "recipe"  # "recipe": somebody's word | "measured"
    traces: tuple[tuple[int, ...], ...] = ()
    ranks: tuple[str, ...] = ()


def acceptance_from(raw: Mapping[str, Any]) -> Acceptance:
    """From its `asdict` form."""
    traces = tuple(map(tuple, raw.get("traces", ())))
    ranks = tuple(raw.get("ranks", ()))
    return Acceptance(raw["key"], tuple(raw["rates"]), raw.get("source", "recipe"), traces, ranks)


LEAST_RATE = 0.1  # of the learning rate, which is what a decay ends at (GPT-3, 2005.14165, appendix B)


def mask_rows(sequence_length: int, drafts: int, share: float, least: float) -> tuple[int, ...]:
    """Of each training sequence the rows of masks that stand one, two, ... places after a text that ends: of all places
    after which `drafts` tokens follow, the share r of the one before, and never less than `least` (PARD, 2504.18583,
    section 3.2, conditional drop: a mask is there only where those before it are)."""
    places = sequence_length - drafts + 1
    return tuple(max(1, round(places * max(share**ahead, least))) for ahead in range(1, drafts))


@dataclass(frozen=True)
class Workload:
    """`kind` train uses sequence_length and global_batch; generate uses prompt_length, new_tokens and batch."""

    kind: str = "train"  # train | generate
    sequence_length: int = 0  # tokens of one training sequence
    global_batch: int = 0  # sequences of one optimizer step, over all replicas
    precision: str = "bf16"  # bf16 (fp32 master weights), fp32, or fp64 (tests)
    prompt_length: int = 0  # tokens
    prompt_lengths: tuple[int, ...] = ()  # tokens of each prompt in order, where they are known; (): as the longest
    new_tokens: int = 0  # tokens generated after the prompt
    batch: int = 1  # sequences generated together, over all replicas
    temperature: float = 0.0  # of the logits that a new token is drawn from; 0: the likeliest token
    top_k: int = 0  # it is one of the so many likeliest; 0: of all
    top_p: float = 1.0  # and of the fewest that together are so likely
    # With commit typical (Medusa 2401.10774, 2.3.1) a proposed token is kept whose probability is above the smaller of
    # epsilon and delta exp(-entropy); the authors' own values, delta being the root of epsilon.
    typical_epsilon: float = 0.09
    typical_delta: float = 0.3
    draft: ModelSpec | None = None  # a smaller model at hand, which may propose tokens
    acceptance: tuple[Acceptance, ...] = ()  # of what proposes tokens, in such text
    data: str = ""  # a text or .npy token file, absolute; "": the Python standard library's own source as bytes
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    clip: float = 0.0  # most that the gradients' global L2 norm may be (and a step with a NaN is skipped); 0: no limit
    warmup_steps: int = 0  # optimizer steps over which the learning rate rises to its full height; 0: at once
    decay_steps: int = 0  # the step at which it has fallen to a tenth; 0: it never falls
    masks: tuple[int, ...] = ()  # rows of masks that a training sequence has beside its text, by how far they are ahead

    @property
    def digest(self) -> str:
        return digest(self)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`; the first that is taken is 1, and skipped ones do not count.

        It rises in a line over the warm-up, falls along half a cosine to a tenth at `decay_steps`, and stays there.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if not self.decay_steps:
            return self.learning_rate
        along = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps))
        return self.learning_rate * (LEAST_RATE + (1 - LEAST_RATE) * (1 + cos(pi * along)) / 2)

    @property
    def rows(self) -> int:
        """Rows of one training sequence: its text, and masks."""
        return self.sequence_length + sum(self.masks)

    @property
    def seen(self) -> float:
        """Pairs of a training sequence's rows of which one sees the other, itself too: of causal text half of all; of a
        mask the text before it, on average half of where masks may be, and its own group."""
        text = self.sequence_length * (self.sequence_length + 1) / 2
        before = (self.sequence_length - len(self.masks) + 1) / 2
        return text + sum(many * (before + ahead) for ahead, many in enumerate(self.masks, 1))

    @property
    def tokens(self) -> int:
        """Tokens of one step (train) or of one whole generation (generate: new tokens only)."""
        if self.kind == "train":
            return self.sequence_length * self.global_batch
        return self.new_tokens * self.batch
