"""A draft that proposes a block in one pass: what it proposes, by which probabilities, at what price; and what is
refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from autotune.planners.decoding.passes import draft_passes
from autotune.planners.feasible import why_not
from autotune.planners.lower.generate import draft_bytes, draft_room, room
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.decoding.draft import Draft
from autotune.runners.decoding.reference import Drafts, at_once, one_by_one, speculative
from autotune.runners.decoding.seen import Proposer, Seen
from autotune.runners.generation import Generator
from autotune.runners.prompts import Prompts
from autotune.runners.reference import reference_logits
from autotune.runners.sampling import distribution, drawn, draws
from autotune.spec.errors import UsageError
from autotune.spec.families import from_config, load_model
from autotune.spec.graph import Weight, parameters
from autotune.spec.model import ModelSpec
from autotune.spec.plan import REJECTION, Plan
from autotune.spec.workload import Workload
from tests.commands import Inside
from tests.small import GENERATE, TRAIN
from tests.tasks import lively_weight, random_prompts
from tests.test_answers import LENGTHS
from tests.test_decoding import OWN, SHARED
from tests.test_generation import MODELS, WORK, lively

TARGET = MODELS["llama"]
WINDOW = replace(MODELS["window"], drafts=4, masks=1)
PLAN = Plan(decoding="parallel", speculate=4, attention="math")


@dataclass(frozen=True)
class Watched(Proposer):
    """A proposer that is looked at."""

    look: Callable[[Seen], Tensor]

    def propose(self, seen: Seen) -> Tensor:
        return self.look(seen)


def load(index: int, weight: Weight) -> Tensor:
    return lively_weight(weight, "fp64")


def generator(plan: Plan, work: Workload, target: ModelSpec = TARGET) -> Generator:
    return Generator.build(plan, target, work, 0, torch.device("cpu"), load, seed=3, load_draft=load)


@pytest.mark.parametrize("draft", [SHARED, OWN, WINDOW], ids=["one mask", "a mask a place", "window"])
@pytest.mark.parametrize("plan", [PLAN, PLAN.altered(speculate=3), PLAN.altered(speculate=1)], ids=["4", "3", "1"])
def test_a_block_is_what_plain_passes_over_text_and_masks_say(draft: ModelSpec, plan: Plan) -> None:
    """Round for round, of prompts from one token on; nothing that was rejected, and no mask, is ever seen again."""
    target = MODELS["window"] if draft is WINDOW else TARGET
    made = generator(plan, replace(WORK, draft=draft), target)
    drafter, weights, judged = made.proposer, lively(draft, "fp64"), list[int]()
    assert isinstance(drafter, Draft)
    propose = drafter.propose

    def watched(seen: Seen) -> Tensor:
        found, texts = propose(seen), seen.sequences
        for row, filled in enumerate(texts.filled.tolist()):
            text = texts.text[row, : filled + 1].tolist()
            for place in range(plan.speculate):
                tokens = torch.tensor([text + [draft.mask_token(p) for p in range(place)]])
                logits = reference_logits(draft, weights, tokens, torch.float64)[0, -1]
                assert int(found[row, place]) == int(logits.argmax()), (row, filled, place)
            judged.append(filled)
        return found

    made.proposer = Watched(watched)
    made.generate(Prompts(random_prompts(WORK, target.vocab), LENGTHS))
    assert len(judged) >= 2 * len(LENGTHS) and min(judged) == 1


@pytest.mark.parametrize("model", [SHARED, OWN], ids=["one mask", "a mask a place"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_own_masks_say_what_plain_passes_over_text_and_masks_say(model: ModelSpec, temperature: float) -> None:
    """The target's own: after the token before the newest, whichever was kept last. Answers are those without."""
    work = replace(WORK, temperature=temperature)
    made, judged = generator(Plan(decoding="masks", speculate=3, attention="math"), work, model), list[int]()
    propose, weights, numbers = made.proposer.propose, lively(model, "fp64"), draws(3, 0, work.batch, work.new_tokens)

    def watched(seen: Seen) -> Tensor:
        found, texts = propose(seen), seen.sequences
        for row, filled in enumerate(() if seen.first else texts.filled.tolist()):
            own = LENGTHS[row]
            if filled + 1 >= own + work.new_tokens:  # an answer that is whole
                continue
            text = texts.text[row, :filled].tolist()
            for place in range(3):
                tokens = torch.tensor([text + [model.mask_token(p) for p in range(place + 1)]])
                logits = reference_logits(model, weights, tokens, torch.float64)[:, -1]
                number = numbers[row, min(filled + 1 + place - own, work.new_tokens - 1)]
                expected = drawn(logits, number[None], work) if temperature else logits.argmax(-1)
                assert int(found[row, place]) == int(expected), (row, filled, place)
            judged.append(seen.news[row, 0].item())  # type: ignore[arg-type]
        return found

    made.proposer = Watched(watched)
    made.generate(Prompts(random_prompts(WORK, model.vocab), LENGTHS))
    assert len(judged) >= 2 * len(LENGTHS)


@pytest.mark.parametrize("decoding", ["draft", "parallel"])
def test_rejection_is_the_emulation_token_for_token(decoding: str) -> None:
    """Algorithm 1 of speculative sampling with each place's own q, the draft's passes plain ones over whole texts."""
    work = replace(WORK, draft=OWN, temperature=0.9, top_k=30)
    plan = PLAN.altered(decoding=decoding, speculate=3, commit=REJECTION)
    found = generator(plan, work).generate(Prompts(random_prompts(WORK, TARGET.vocab), LENGTHS))
    target, draft = lively(TARGET, "fp64"), lively(OWN, "fp64")

    def chances(model: ModelSpec, tokens: Tensor) -> Tensor:
        weights = target if model is TARGET else draft
        return distribution(reference_logits(model, weights, tokens[None], torch.float64)[0], work)

    proposes: Drafts = {
        "draft": one_by_one(lambda tokens: chances(OWN, tokens)),
        "parallel": at_once(lambda tokens: chances(OWN, tokens), OWN.mask_token),
    }[decoding]
    streams = {p: draws(3, 0, work.batch, work.new_tokens, p).tolist() for p in ("", "accept", "draft")}
    whole = random_prompts(WORK, TARGET.vocab)
    for row, ours in enumerate(found.answers):
        prompt = whole[row, : LENGTHS[row]].tolist()
        numbers = {purpose: rows[row] for purpose, rows in streams.items()}
        expected, _ = speculative(
            lambda tokens: chances(TARGET, tokens), proposes, prompt, work.new_tokens, plan.speculate, numbers
        )
        assert ours == expected


def test_its_passes_and_bytes() -> None:
    """One pass a round, over as many tokens as a round may commit and a mask for each further proposal; its cache has
    room for them after the shortest prompt."""
    work = replace(WORK, draft=SHARED)
    passes = draft_passes(PLAN, work)
    ((shape, times),) = passes.round
    assert (shape.queries, shape.scored, times) == (5 + 3, 4, 1)
    assert passes.prompt.queries == passes.prompt.keys == WORK.prompt_length
    ((early, _),) = draft_passes(PLAN, work, 9).round
    assert early.keys == 9 + 3 and early.queries == shape.queries
    short = replace(work, prompt_length=1, new_tokens=2)
    assert draft_room(PLAN, short) == 8 > room(PLAN, short) == 7
    weights, cache = draft_bytes(PLAN, short)
    assert weights == parameters(SHARED) * 8
    made = generator(PLAN, short)
    assert isinstance(made.proposer, Draft) and made.proposer.scorer.cache.nbytes == cache
    assert parameters(SHARED) - parameters(TARGET) == TARGET.hidden
    assert parameters(OWN) - parameters(TARGET) == 3 * TARGET.hidden


@pytest.mark.parametrize(
    ("plan", "draft", "said"),
    [
        (PLAN, None, "decoding parallel needs a draft model: a [draft] section in the recipe"),
        (
            PLAN,
            TARGET,
            "needs a draft with mask tokens: parallel_draft in the config that it was trained with (found none",
        ),
        (PLAN.altered(speculate=5), SHARED, "speculate must be at most 4, the tokens that tiny-llama drafts at once"),
        (PLAN.altered(speculate=5), SHARED, "(found 5; nearest 4)"),
        (PLAN, replace(SHARED, vocab=260), "the draft's vocabulary must be the model's 272 (found 260 of tiny-llama)"),
        (PLAN.altered(branches=2), SHARED, "branches has no meaning with decoding parallel (found 2; nearest 1)"),
        (PLAN.altered(speculate=0), SHARED, "speculate must be at least 1 with decoding parallel"),
    ],
)
def test_what_cannot_draft_a_block_is_refused(plan: Plan, draft: ModelSpec | None, said: str) -> None:
    reason = why_not(TARGET, replace(WORK, draft=draft), plan)
    assert reason is not None and said in reason, reason


def test_masks_of_its_own_that_a_model_has_not() -> None:
    plan = Plan(decoding="masks", speculate=4)
    reason = why_not(TARGET, WORK, plan)
    assert reason is not None and "decoding masks needs a model with mask tokens: parallel_draft" in reason
    assert "(found none in tiny-llama; nearest decoding plain)" in reason
    reason = why_not(OWN, WORK, plan)
    assert reason == "speculate must be at most 3, the places of its masks (found 4; nearest 3)"


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parallel_draft": 1}, "parallel_draft: found 1; expected a whole number >= 2 (nearest: 2)"),
        ({"parallel_draft": 4, "parallel_masks": 4}, "parallel_masks: found 4; expected at most one for each"),
        ({"parallel_draft": 4, "parallel_masks": 4}, "(nearest: 3)"),
        ({"parallel_masks": 2}, "parallel_masks: found masks without parallel_draft"),
        ({"paralel_draft": 4}, "(nearest: parallel_draft)"),
    ],
)
def test_masks_that_no_model_has(keys: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError) as error:
        from_config({**CONFIG, **keys}, "d.json", inline=True)
    assert said in "\n".join(map(str, (error.value, *error.value.problems)))


def test_masks_of_a_config() -> None:
    one = from_config({**CONFIG, "parallel_draft": 8}, "d.json")
    assert (one.drafts, one.masks, one.mask_token(0), one.mask_token(6)) == (8, 1, 256, 256)
    own = from_config({**CONFIG, "parallel_draft": 8, "parallel_masks": 7}, "d.json")
    assert (own.mask_token(0), own.mask_token(6)) == (256, 262)
    assert from_config(CONFIG, "d.json").masks == 0


def test_a_draft_that_proposes_blocks_is_trained_measured_and_chosen(inside: Inside) -> None:
    """Trained with masks beside its text, checked against the reference and searched; then it drafts for itself."""
    masks = "parallel_draft = 3\nparallel_masks = 2\n"
    text = TRAIN.replace("[machine]", masks + "[machine]").replace("devices = 2", "devices = 1")
    recipe = inside.write("blocks.toml", text)
    ran = inside.run("run", recipe, "--pin", "micro_batch=4", "--steps", "2", "--check", "--save", "out", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5
    found = inside.run("search", recipe, "--measure", "1", "--json")
    assert found.code == 0, found.stderr
    assert found.json["space"]["feasible"] == 1
    config = json.loads((inside.folder / "out" / "config.json").read_text())
    assert config["parallel_draft"] == 3 and config["parallel_masks"] == 2
    alone = text[text.index("[machine]") :].replace("steps = 3", 'steps = 3\ntrained = "masks"')
    recipe = inside.write("alone.toml", '[model]\ncheckpoint = "out"\n' + alone)
    ran = inside.run("run", recipe, "--pin", "micro_batch=4", "--steps", "2", "--check", "--save", "masks", "--json")
    assert ran.code == 0 and ran.json["equal"] is True, ran.stderr
    model = load_model(inside.folder / "out")
    before, after = (open_checkpoint(inside.folder / name).whole(model, torch.float32) for name in ("out", "masks"))
    assert [key for key in before if not before[key].equal(after[key])] == [(0, "mask.weight")]
    talk = GENERATE[GENERATE.index("[machine]") :].replace("devices = 2", "devices = 1")
    axes = 'decoding = ["plain", "parallel"]\nspeculate = 3\n'
    talk = talk.replace('prompt = "def f("\n', "").replace("tensor = 2\n", axes)
    recipe = inside.write("talk.toml", '[model]\ncheckpoint = "out"\n[draft]\ncheckpoint = "out"\n' + talk)
    told = inside.run("profile", "--acceptance", recipe, "--json")
    assert told.code == 0, told.stderr
    (rates,) = (one["rates"] for one in told.json["acceptances"] if one["key"] == "parallel speculate=3")
    assert rates[0] == 1 and len(rates) == 3
    found = inside.run("search", recipe, "--measure", "1", "--json")
    assert found.code == 0, found.stderr
    assert found.json["space"]["feasible"] == 4
    pins = ("--pin", "decoding=parallel", "--pin", "speculate=3", "--pin", "micro_batch=2")
    ran = inside.run("run", recipe, *pins, "--steps", "1", "--check", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["measured"]["rounds"]["rates"][0] == 1
    warm = ("--set", "workload.temperature=0.9", "--pin", "commit=rejection")
    ran = inside.run("run", recipe, *pins, *warm, "--steps", "1", "--check", "--json")
    assert ran.code == 0 and ran.json["equal"] is True, ran.stderr
