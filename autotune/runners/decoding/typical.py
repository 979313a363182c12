"""Typical acceptance (Cai et al., 2401.10774, 2.3.1): a proposed token is kept where the target holds it likely enough,
even if it would have chosen another. Answers are other ones than plain decoding's.

A token x after a prefix is kept if p(x) > min(epsilon, delta exp(-H(p))), with the target's distribution p there and
its entropy H in nats: where the target is sure little else passes, where it is not many tokens do. p is that of the
workload's temperature, or of temperature 1 where that is 0, and no token is cut. Of the paths whose tokens are all kept
the longest is committed, of equally long ones the likeliest, and after it the token that the target chooses: so the
first token of a round never is a proposal, as in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.decoding.trees import Tree
from autotune.runners.decoding.commit import Levels
from autotune.runners.ops.env import wide
from autotune.spec.workload import Workload


def chances(logits: Tensor, workload: Workload) -> Tensor:
    """log p [rows, vocabulary] of whole logits."""
    return (logits.to(wide(logits.dtype)) / (workload.temperature or 1.0)).log_softmax(dim=1)


def least(log_p: Tensor, workload: Workload) -> Tensor:
    """What a token's probability must be above, [rows]: min(epsilon, delta exp(-H))."""
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(dim=1)  # of what cannot come 0 log 0
    return (workload.typical_delta * (-entropy).exp()).clamp_max(workload.typical_epsilon)


class Typical(NamedTuple):
    """`paths`, int64 [nodes, 1 + depth]: the nodes from the root to each, and 0 beyond it."""

    levels: Levels
    parents: Tensor  # int64 [nodes]: the root's is itself
    depths: Tensor  # int64 [nodes]
    paths: Tensor
    chain: bool
    workload: Workload

    @classmethod
    def of(cls, tree: Tree, workload: Workload, device: torch.device) -> Typical:
        paths = [(*tree.path(node), *([0] * (tree.depth - tree.depths[node]))) for node in range(tree.size + 1)]
        rows = ((0, *tree.parents), tree.depths, paths)
        parents, depths, table = (torch.tensor(row, device=device) for row in rows)
        return cls(Levels.of(tree, device), parents, depths, table, tree.chain, workload)

    def commit(self, slate: Tensor, choices: Tensor, logits: Tensor) -> Tensor:
        """int64 [batch, 1 + (1 + depth) + depth] as `commit.match` gives it, of a row without the nodes that were kept.
        `slate`, `choices` int64 [batch, nodes]: what was scored, and what the target chooses after each; `logits`
        [batch * nodes, vocabulary], whole."""
        log_p = chances(logits, self.workload)
        bound = least(log_p, self.workload).view(slate.shape)[:, self.parents]
        whole = log_p.view(*slate.shape, -1)
        own = whole[:, self.parents].gather(2, slate[:, :, None]).squeeze(2)  # of each node after its parent
        enough = own.exp() > bound
        kept, likely = torch.ones_like(enough), torch.zeros_like(own)
        for nodes, parents in zip(*self.levels, strict=True):
            kept[:, nodes] = kept[:, parents] & enough[:, nodes]
            likely[:, nodes] = likely[:, parents] + own[:, nodes]
        deepest = torch.where(kept, self.depths, -1)
        most = deepest.max(dim=1, keepdim=True).values
        last = torch.where(deepest == most, likely, -torch.inf).argmax(dim=1)  # of equal ones the first
        path, after = self.paths[last], choices.gather(1, last[:, None])
        following = torch.cat((slate.gather(1, path)[:, 1:], after), dim=1)
        news = torch.cat((most + 1, following.scatter(1, most, after)), dim=1)
        return news if self.chain else torch.cat((news, path[:, 1:]), dim=1)
