"""What a round commits: the rules by hand, by enumeration of every draw, and by the distribution of whole answers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import lcm
from typing import Any

import pytest
import torch

from autotune.planners.decoding.trees import Tree
from autotune.runners.decoding.commit import Levels, match, match_row, rejection
from autotune.runners.generation import Generator
from autotune.runners.prompts import Prompts
from autotune.runners.reference import reference_logits
from autotune.runners.sampling import distribution
from autotune.spec.model import ModelSpec
from autotune.spec.plan import REJECTION, Plan
from autotune.spec.workload import Workload
from tests.tasks import lively_weight
from tests.test_generation import lively

F = Fraction
PAIRS = [  # (p, q): alike, apart, without tokens that the other has
    ((F(1, 4), F(1, 2), F(1, 4)), (F(1, 2), F(1, 4), F(1, 4))),
    ((F(1, 2), F(1, 2), F(0)), (F(1, 2), F(1, 2), F(0))),
    ((F(0), F(1, 2), F(1, 2)), (F(1, 2), F(1, 2), F(0))),
    ((F(1), F(0), F(0)), (F(0), F(1, 2), F(1, 2))),
    ((F(3, 4), F(1, 8), F(1, 8)), (F(1, 4), F(3, 8), F(3, 8))),
]


def grid(p: tuple[Fraction, ...], q: tuple[Fraction, ...]) -> int:
    """A number of equal parts of [0, 1) at whose edges everything changes that a draw decides."""
    more = [max(a - b, F(0)) for a, b in zip(p, q, strict=True)]
    whole = sum(more)
    parts = [*p, *q, *(a / b for a, b in zip(p, q, strict=True) if b), *(m / whole for m in more if whole)]
    return lcm(*(part.denominator for part in parts))


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_a_drafted_token_has_the_targets_probability(p: tuple[Fraction, ...], q: tuple[Fraction, ...]) -> None:
    """Every draw of the draft, of the acceptance and of what stands in its place, each as likely as any other."""
    parts = grid(p, q)
    numbers = (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
    drafted, accept, again = (n.flatten() for n in torch.meshgrid(numbers, numbers, numbers, indexing="ij"))
    p_, q_ = (torch.tensor([float(x) for x in row], dtype=torch.float64) for row in (p, q))
    rows = len(drafted)
    proposed = torch.bucketize(drafted, q_.cumsum(0), right=True).clamp_max(2)
    slate = torch.stack((torch.zeros_like(proposed), proposed), dim=1)
    after = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    both = torch.stack((p_, after)).expand(rows, 2, 3)
    news = rejection(slate, both, q_.expand(rows, 1, 3), accept[:, None], torch.stack((again, again), dim=1))
    first = torch.bincount(news[:, 1], minlength=3)
    assert [F(int(n), rows) for n in first] == list(p)
    kept = news[:, 0] == 2
    assert F(int(kept.sum()), rows) == sum(min(a, b) for a, b in zip(p, q, strict=True))
    if kept.any():
        assert torch.equal(news[kept, 1], proposed[kept])


def test_two_drafted_tokens_have_the_targets_joint_probability() -> None:
    """The second draft hangs on the first; all five draws of two positions are enumerated."""
    p = {(): PAIRS[0][0], (0,): PAIRS[2][0], (1,): PAIRS[1][0], (2,): PAIRS[0][1]}
    q = {(): PAIRS[0][1], (0,): PAIRS[2][1], (1,): PAIRS[1][1], (2,): PAIRS[0][0]}
    parts = lcm(*(grid(p[key], q[key]) for key in p))
    numbers = (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
    draws = [n.flatten() for n in torch.meshgrid(*[numbers] * 5, indexing="ij")]
    rows = len(draws[0])
    table = {
        name: {k: torch.tensor([float(x) for x in v]).double() for k, v in t.items()}
        for name, t in (("p", p), ("q", q))
    }
    one = torch.bucketize(draws[0], table["q"][()].cumsum(0), right=True).clamp_max(2)
    seconds = torch.stack([table["q"][k,] for k in range(3)])
    two = (seconds[one].cumsum(1) <= draws[1][:, None]).sum(1).clamp_max(2)
    ours = torch.stack([table["p"][k,] for k in range(3)])
    third = torch.full((rows, 3), 1 / 3, dtype=torch.float64)
    whole = torch.stack((table["p"][()].expand(rows, 3), ours[one], third), dim=1)
    theirs = torch.stack((table["q"][()].expand(rows, 3), seconds[one]), dim=1)
    slate = torch.stack((torch.zeros_like(one), one, two), dim=1)
    again = torch.stack((draws[4], draws[4], draws[4]), dim=1)
    news = rejection(slate, whole, theirs, torch.stack((draws[2], draws[3]), dim=1), again)
    for a, b in product(range(3), repeat=2):
        # Rounds that end after one token go on with the target's own distribution: only their first token counts here.
        long = news[:, 0] > 1
        share = F(int(((news[:, 1] == a) & (news[:, 2] == b) & long).sum()), rows)
        ended = F(int(((news[:, 1] == a) & ~long).sum()), rows)
        assert share + ended * p[a,][b] == p[()][a] * p[a,][b]


def test_kept_rows_and_trees_by_hand() -> None:
    slate = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]])
    choices = torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4], [7, 2, 3, 4]])
    assert match_row(slate, choices)[:, 0].tolist() == [4, 2, 1]
    assert match_row(slate, choices)[1].tolist() == [2, 1, 5, 3, 4]
    tree = Tree((0, 0, 1, 2, 2))  # 1 and 2 after the newest token, 3 after 1, 4 and 5 after 2
    slate = torch.tensor([[9, 1, 2, 3, 4, 5]] * 3)
    choices = torch.tensor([[2, 3, 5, 0, 0, 8], [1, 3, 5, 6, 0, 8], [4, 3, 5, 6, 0, 8]])
    news = match(Levels.of(tree, slate.device), slate, choices)
    assert news[0].tolist() == [3, 2, 5, 8, 2, 5]  # two kept: nodes 2 and 5
    assert news[1].tolist() == [3, 1, 3, 6, 1, 3]
    assert news[2, :2].tolist() == [1, 4]


TINY = ModelSpec("tiny", "LlamaForCausalLM", 8, 2, 2, 1, 4, 16, 5, max_positions=16)


@pytest.mark.parametrize("decoding", ["draft", "parallel"])
@pytest.mark.parametrize("change", [{}, {"top_p": 0.8}, {"top_k": 3}], ids=["whole", "nucleus", "top k"])
def test_answers_of_speculative_sampling_have_the_targets_distribution(change: dict[str, Any], decoding: str) -> None:
    """Three tokens of 6000 sequences against the exact probabilities of all 125 answers, by chi-square."""
    many, new = 6000, 3
    work = Workload("generate", precision="fp64", prompt_length=2, new_tokens=new, batch=many, temperature=1.3)
    work = replace(work, draft=replace(TINY, drafts=2, masks=1), **change)
    load = lambda index, weight: lively_weight(weight, "fp64")  # noqa: E731
    noisy = lambda index, weight: lively_weight(weight, "fp64") * 0.8  # noqa: E731
    plan = Plan(decoding=decoding, speculate=2, commit=REJECTION, attention="math")
    generator = Generator.build(plan, TINY, work, 0, torch.device("cpu"), load, seed=11, load_draft=noisy)
    prompt = torch.tensor([[1, 3]])
    made = generator.generate(Prompts(prompt.expand(many, 2), (2,) * many))
    seen = torch.zeros(5**new)
    for row in made.answers:
        seen[row[0] * 25 + row[1] * 5 + row[2]] += 1
    texts = torch.tensor(list(product(range(5), repeat=new)))
    rows = torch.cat((prompt.expand(len(texts), 2), texts), dim=1)
    logits = reference_logits(TINY, lively(TINY, "fp64"), rows, torch.float64)[:, 1:-1]
    chances = distribution(logits.flatten(0, 1), work).view(len(texts), new, 5)
    exact = many * chances.gather(2, texts[:, :, None]).squeeze(2).prod(dim=1)
    assert float(exact.sum()) == pytest.approx(many)
    assert not seen[exact == 0].any()
    often = exact >= 5
    chi = float(((seen - exact)[often] ** 2 / exact[often]).sum())
    freedom = int(often.sum())
    assert chi < freedom + 4 * (2 * freedom) ** 0.5
    assert made.taken is not None and float((made.taken > 1).double().mean()) > 0.2
