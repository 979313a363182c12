"""What the target chooses after each token that a pass has scored: from logits that tensor ranks have parts of, the
likeliest, or one drawn by a number that was made beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.runners.decoding.sequences import Sequences
from autotune.runners.mesh import Mesh
from autotune.runners.sampling import distribution, drawn, likeliest
from autotune.spec.workload import Workload


@dataclass(frozen=True)
class Chooser:
    """One rank's. Every tensor rank chooses the same. `numbers`, float64 [batch, new_tokens]: what is drawn by, for
    each purpose: "" a token of the target's, "accept" and "draft" where tokens are committed by rejection."""

    workload: Workload
    mesh: Mesh
    tensor: int  # ranks that share the vocabulary
    texts: Sequences
    numbers: dict[str, Tensor]

    def tokens(self, logits: Tensor, depths: Tensor | None) -> Tensor:
        """int64 [batch, rows] for logits [batch * rows, this rank's vocabulary]. `depths`, int64 [rows]: how many of
        the scored tokens come before each in its text; None: they are the prompts' last ones."""
        batch = len(self.texts.own)
        if self.workload.temperature:
            return drawn(self.whole(logits), self.drawn_by("", depths).flatten(), self.workload).view(batch, -1)
        return self._likeliest(logits).view(batch, -1)

    def chances(self, logits: Tensor) -> Tensor:
        """The target's probabilities [batch, rows, vocabulary]."""
        p = distribution(self.whole(logits), self.workload)
        return p.view(len(self.texts.own), -1, p.shape[1])

    def drawn_by(self, purpose: str, depths: Tensor | None) -> Tensor:
        """float64 [batch, rows]: the numbers for the token after each scored one, or, with None, for the first
        token."""
        numbers, texts = self.numbers[purpose], self.texts
        if depths is None:
            return numbers[:, :1]
        place = (texts.filled + 1 - texts.own)[:, None] + depths
        return numbers.gather(1, place.clamp_max(numbers.shape[1] - 1))

    def whole(self, logits: Tensor) -> Tensor:
        """Whole rows of logits."""
        if self.tensor == 1:
            return logits
        parts = logits.new_empty((self.tensor * len(logits), logits.shape[1]))
        dist.all_gather_into_tensor(parts, logits.contiguous(), group=self.mesh.axes["tensor"])
        return parts.view(self.tensor, len(logits), -1).transpose(0, 1).flatten(1)

    def _likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest of each row; of equal ones the first, whoever holds it."""
        best, token = likeliest(logits)
        if self.tensor > 1:
            mine = torch.stack((best.double(), (token + self.mesh.tensor * logits.shape[1]).double()))
            pairs = mine.new_empty((self.tensor * 2, mine.shape[1]))
            dist.all_gather_into_tensor(pairs, mine, group=self.mesh.axes["tensor"])
            pairs = pairs.view(self.tensor, 2, -1)
            owner = pairs[:, 0].argmax(dim=0, keepdim=True)
            token = pairs[:, 1].gather(0, owner).squeeze(0).long()
        return token
