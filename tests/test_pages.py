"""A key-value cache in pages: the same tokens as without under every plan and strategy, and no page more than prompts
of their lengths take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autotune.planners.costs.generate import PassCosts
from autotune.planners.costs.works import works
from autotune.planners.decoding.strategies import scored
from autotune.planners.feasible import why_not
from autotune.planners.lower.call import Site
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import cache_bytes, inference_body, lower_generation, program_sizes
from autotune.planners.lower.pages import NOWHERE, pool_pages, room, table_columns
from autotune.planners.lower.shape import generation_shape
from autotune.planners.predict import Predictor
from autotune.planners.simulate import memory
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.runners.bench_parts import PassPiece
from autotune.runners.bench_pass import time_pass
from autotune.runners.job import Job
from autotune.runners.memory import peak_during
from autotune.runners.ops import KVCache
from autotune.runners.ops.paged import PagedCache
from autotune.runners.prompts import Prompts
from autotune.spec.errors import UsageError
from autotune.spec.families import load_model
from autotune.spec.graph import blocks, kv_bytes_per_token
from autotune.spec.plan import FUSED, Plan
from autotune.spec.work import PAGES as GATHERED
from autotune.spec.work import Attention, Memory
from autotune.spec.workload import Workload
from tests.commands import Inside
from tests.pool import Pool
from tests.small import GENERATE
from tests.tasks import random_prompts
from tests.test_answers import expected
from tests.test_generation import LLAMA, MODELS, WORK, build

SHIPPED = Path(__file__).parents[1] / "recipes" / "models"
WORLDS = (Plan(), Plan(tensor=2), Plan(pipeline=2), Plan(data=2), Plan(tensor=2, pipeline=2))
ROWS = Plan(decoding="jacobi", speculate=3)
BRANCHES = Plan(decoding="ngram", speculate=2, match=1, branches=2)
WINDOW = Plan(decoding="lookahead", speculate=2, branches=2, window=3)
DRAFT = Plan(decoding="draft", speculate=2)


LONG = replace(WORK, prompt_length=37, new_tokens=10)
LENGTHS = (37, 3, 16, 20, 7, 33, 1, 22)
DRAWN = replace(LONG, temperature=0.8, top_k=40, top_p=0.95)


def in_pages(plan: Plan, world: Plan = WORLDS[0], page: int = 16) -> Plan:
    return plan.altered(data=world.data, tensor=world.tensor, pipeline=world.pipeline, page=page)


CASES = [
    *(("llama", in_pages(Plan(), world), LONG) for world in WORLDS),
    *(("qwen", in_pages(BRANCHES, world), LONG) for world in WORLDS),
    *(("llama", in_pages(DRAFT, world), DRAWN) for world in WORLDS[1:4]),
    ("window", in_pages(Plan(prompt_chunk=9, attention="math"), WORLDS[1]), LONG),
    ("llama", in_pages(ROWS.altered(prompt_chunk=10), WORLDS[3], 64), LONG),
    ("window", in_pages(WINDOW, WORLDS[4]), LONG),
    ("qwen", in_pages(Plan(kernels=FUSED), WORLDS[2], 256), DRAWN),
    ("qwen", in_pages(Plan(prompt_chunk=2, weights="exact"), WORLDS[2]), DRAWN),
    ("window", in_pages(Plan(kernels=FUSED)), LONG),
]


@pytest.mark.parametrize(("name", "plan", "work"), CASES, ids=lambda case: getattr(case, "describe", lambda: "")())
def test_answers_are_the_references(pool: Pool, name: str, plan: Plan, work: Workload) -> None:
    """Exactly, in double precision, in a pool that has room for prompts of these lengths and no longer ones."""
    given = replace(work, prompt_lengths=LENGTHS, draft=MODELS[name] if plan.decoding == "draft" else None)
    found = pool.run("answer", plan.world, plan=plan, model=MODELS[name], workload=given, lengths=LENGTHS, noise=0.02)
    for answers, _ in found:
        assert answers == expected(name, work, LENGTHS)


def test_programs_hold_what_is_allocated(pool: Pool) -> None:
    """The traces of the passes, byte by byte: pages and table as predicted."""
    plan, work = Plan(tensor=2, pipeline=2, page=16), replace(LONG, prompt_lengths=(37,) * 8)
    for rank, answer in enumerate(pool.run("generate", plan.world, plan=plan, model=LLAMA, workload=work)):
        for (_, held), sizes in zip(answer["traces"], ((37, 37), (1, 46)), strict=True):
            program = expand(lower_generation(plan, LLAMA, work, *sizes), plan)
            assert held == memory(program, lambda rank, i: 0)[rank]["device"]


def test_a_pool_has_what_prompts_of_such_lengths_take() -> None:
    plan = Plan(page=16)
    assert room(plan, LONG) == 47 and table_columns(plan, LONG) == 3
    assert pool_pages(plan, LONG) == NOWHERE + 8 * 3  # nobody says how long they are
    known = replace(LONG, prompt_lengths=LENGTHS)
    assert pool_pages(plan, known) == NOWHERE + 3 + 1 + 2 + 2 + 2 + 3 + 1 + 2
    # Four at a time, in order: the first four take 8 pages, the others as many; of two replicas each has its own.
    assert pool_pages(plan, replace(known, batch=4)) == NOWHERE + 8
    assert pool_pages(plan.altered(data=2), known) == NOWHERE + 8
    speculating = plan.altered(decoding="jacobi", speculate=4)
    assert scored(speculating) == 5 and pool_pages(speculating, known) == NOWHERE + 4 + 2 + 2 + 3 + 2 + 3 + 1 + 3


def test_prompts_of_different_lengths_do_not_pay_for_the_longest() -> None:
    model = load_model(SHIPPED / "meta-llama--Llama-3.1-8B.json")
    work = Workload("generate", prompt_length=4096, new_tokens=256, batch=8, prompt_lengths=(4096, *(256,) * 7))
    profile = load_profile(shipped()["h200-sxm"])
    plan = Plan(micro_batch=8, kernels=FUSED)
    whole, paged = (Predictor(model, work, profile).predict(p).memory[0] for p in (plan, plan.altered(page=64)))
    assert whole["kv_cache"] == 8 * 4352 * kv_bytes_per_token(model)
    pages = 1 + 4352 // 64 + 7 * 512 // 64
    assert paged["kv_cache"] == pages * 64 * kv_bytes_per_token(model) + 8 * 68 * 8
    assert paged["kv_cache"] < 0.25 * whole["kv_cache"]
    parts = [cache_bytes(plan.altered(page=64, pipeline=2), model, work, n) for n in (20, 12)]
    assert sum(parts) == paged["kv_cache"] + 8 * 68 * 8  # each stage has a table


def peaks(name: str, plan: Plan, work: Workload) -> tuple[int, int]:
    """Bytes allocated at the peak of a whole generation, and predicted ones."""
    model, lengths = MODELS[name], work.prompt_lengths
    prompts = Prompts(random_prompts(work, model.vocab), lengths)
    with torch.no_grad():
        generator = build(model, work, plan)
        found = peak_during(lambda: generator.generate(prompts), generator.values, torch.device("cpu"))
    whole, most = work.prompt_length, 0
    for queries, keys in ((whole, whole), (1, whole + work.new_tokens - 1)):
        transient = program_sizes(plan, model, work, queries, keys, Site("cpu"))[0][0].transient
        program = lower_generation(plan, model, work, queries, keys)
        held = memory(program, lambda rank, i, of=transient: of if i.op == "F" else 0)  # type: ignore[misc]
        most = max(most, *held[0]["device"])
    return found, most


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_peak_of_a_prompts_pass_is_as_predicted(name: str, precision: str) -> None:
    """Beside what the library's attention takes inside itself, which is the same without pages."""
    work = replace(LONG, precision=precision, new_tokens=18, prompt_lengths=LENGTHS)
    (found, most), (before, said) = (peaks(name, plan, work) for plan in (Plan(page=16), Plan()))
    assert found - most == before - said and most < said and found < before


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_peak_of_a_round_is_as_predicted(batch: int, precision: str) -> None:
    """Where a layer's pages lie side by side; beside it attention folds its queries, makes its result and statistics,
    and its one thread has a block of scores."""
    work = replace(WORK, precision=precision, batch=batch, prompt_length=4, new_tokens=43, prompt_lengths=(4,) * batch)
    width, found = {"fp32": 4, "fp64": 8}[precision], [peaks("llama", Plan(page=page), work) for page in (16, 64)]
    for most, said in found:
        assert 0 <= most - said <= (batch * LLAMA.heads * (2 * LLAMA.head_dim + 1) + 46 + 2 + LLAMA.head_dim) * width
    assert found[1][1] - found[0][1] > 40_000 * batch * width // 8  # of which none comes from the size of a page


def paged(page: int, rooms: tuple[int, ...], columns: int) -> tuple[PagedCache, KVCache]:
    """A cache in pages, and one without, with the same numbers where sequences have them."""
    torch.manual_seed(page)
    pages = NOWHERE + sum(-(-room // page) for room in rooms)
    cache = PagedCache.of_pages(LLAMA, 2, pages, page, (len(rooms), columns), dtype=torch.float64)
    cache.assign(rooms)
    plain = KVCache.empty(LLAMA, 2, len(rooms), cache.max_len, dtype=torch.float64)
    return cache, plain


@pytest.mark.parametrize("page", [1, 3, 16])
def test_what_is_written_is_read(page: int) -> None:
    """By prompts, by places, sequence by sequence; what a shorter prompt's pass puts behind its end touches nobody."""
    rooms = (20, 5, 11)
    cache, plain = paged(page, rooms, -(-20 // page))
    heads, width = LLAMA.kv_heads, LLAMA.head_dim
    for both in ((cache, plain),):
        k, v = torch.randn(2, 3, heads, 12, width, dtype=torch.float64)
        for each in both:
            each.append(1, k, v, 0)
        k, v = torch.randn(2, 3, heads, 2, width, dtype=torch.float64)
        places = torch.tensor([12, 13, 3, 4, 9, 10]) + torch.arange(3).repeat_interleave(2) * cache.max_len
        for each in both:
            each.append_at(1, k, v, places)
    for begin, end in ((0, 20), (2, 17), (5, 6)):
        for ours, theirs in zip(cache.view(1, begin, end), plain.view(1, begin, end), strict=True):
            for i, room_ in enumerate(rooms):
                stop = max(0, min(end, room_) - begin)
                assert torch.equal(ours[i, :, :stop], theirs[i, :, :stop])
    for ours, theirs in zip(cache.flat(1), plain.flat(1), strict=True):
        for i, room_ in enumerate(rooms):
            row = i * cache.max_len
            assert torch.equal(ours[row : row + room_], theirs[row : row + room_])
    assert not cache.k[0].any() and not cache.k[1].view(-1, heads, width)[cache.rows(torch.tensor([14, 19]))].any()


def test_prompts_that_take_more_than_the_pool_are_refused() -> None:
    work = replace(LONG, batch=2, prompt_lengths=(3, 3))
    generator = build(LLAMA, work, Plan(page=16))
    prompts = random_prompts(work, LLAMA.vocab)
    with pytest.raises(
        UsageError, match=r"lengths: found 6 pages of 16 positions; expected at most the 2 .*nearest: 2"
    ):
        generator.generate(Prompts(prompts, (37, 37)))
    assert len(generator.generate(Prompts(prompts, (3, 3))).answers[0]) == 10


def test_a_gpu_puts_pages_side_by_side_for_others_kernels_alone() -> None:
    """The whole room of every sequence, for the host knows no length there; in fp32 also where ours are asked for."""
    work, layer = replace(LONG, precision="bf16"), 2 * 8 * 48 * 4 * 8
    for kernels, precision, bytes_ in (("library", "bf16", 2), (FUSED, "bf16", 0), (FUSED, "fp32", 4)):
        given = replace(work, precision=precision)
        plan = Plan(page=16, kernels=kernels)
        with_, without = (program_sizes(p, LLAMA, given, 1, 40)[0][0].transient for p in (plan, plan.altered(page=0)))
        assert (with_ - without > layer * bytes_ // 2) == (bytes_ > 0) and with_ - without <= layer * bytes_


def test_what_cannot_be_is_refused() -> None:
    reason = why_not(LLAMA, WORK, Plan(page=32))
    assert reason == "page must be one of 0, 16, 64, 256 (found 32; nearest 16)"
    train = replace(WORK, kind="train", sequence_length=8, global_batch=8)
    assert "page has no meaning when training" in str(why_not(LLAMA, train, Plan(page=16)))


def test_putting_pages_side_by_side_is_priced_and_timed() -> None:
    """A piece of its own where a library attends; our kernels, which read pages as they lie, have their own name."""
    work = replace(WORK, precision="fp32", batch=2)
    block = blocks(LLAMA)[1]
    shape = generation_shape(Plan(page=16), work, 1, 9)
    body = inference_body(block, shape)
    wanted = {w for i in body.forward.ranks[0] for w in works(block, body, i, shape)}
    moved = Memory(GATHERED, 2 * 2 * 2 * 16 * 4 * 8 * 4, "fp32")
    assert moved in wanted
    found = time_pass(LLAMA, PassPiece(block, shape), torch.device("cpu"))
    assert found[moved] > 0 and any(isinstance(known, Attention) for known in found)
    assert wanted <= set(found)
    prefill = generation_shape(Plan(page=16), work, 7, 7)
    body = inference_body(block, prefill)
    assert not any(w.op == GATHERED for i in body.forward.ranks[0] for w in works(block, body, i, prefill)
                   if isinstance(w, Memory))  # fmt: skip
    fused = generation_shape(Plan(page=16, kernels=FUSED), work, 1, 9)
    body = inference_body(block, fused)
    names = [w.op for i in body.forward.ranks[0] for w in works(block, body, i, fused) if isinstance(w, Memory)]
    assert "rotary+attention x2 pages of 16" in names and GATHERED not in names
    predictor = Predictor(LLAMA, work, load_profile(shipped()["h200-sxm"]))
    plans = Plan(page=16), Plan()
    paged_, plain = (PassCosts(p, LLAMA, work, predictor.bodies(p), 1, 9).block(block).seconds for p in plans)
    assert paged_ > plain


def test_a_recipe_tells_the_lengths(inside: Inside) -> None:
    pages = GENERATE.replace("[search]\n", "[search]\npage = 16\n").replace("prompt_length = 6", "prompt_length = 40")
    texts = pages.replace('prompt = "def f("', f'prompt = ["{"x" * 40}", "y"]')
    recipe = inside.write("texts.toml", texts)
    pins = ("--pin", "tensor=1", "--pin", "pipeline=2", "--pin", "page=16", "--pin", "micro_batch=2", "--steps", "1")
    ran = inside.run("run", recipe, *pins, "--check", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["plan"]["page"] == 16
    lengths = pages.replace('prompt = "def f("', "prompt_lengths = [40, 1]")
    cut = inside.run("run", inside.write("lengths.toml", lengths), *pins, "--check", "--json")
    assert cut.code == 0, cut.stderr
    assert cut.json["equal"] is True
    longest = inside.run("run", inside.write("all.toml", lengths.replace("[40, 1]", "[40, 40]")), *pins, "--json")
    at = [max(said["predicted"]["peak_bytes"]) for said in (ran.json, cut.json, longest.json)]
    assert at[0] == at[1] < at[2]
    off = [
        max(said["measured"]["peak_bytes"]) - max(said["predicted"]["peak_bytes"]) for said in (cut.json, longest.json)
    ]
    assert off[0] == off[1]  # what a page more takes is what was predicted
    inside.write("p.txt", "abc\n" + "z" * 33 + "\n")
    one = inside.run(
        "run", inside.write("one.toml", pages.replace("prompt_length = 6", "prompt_length = 40")), *pins, "--json"
    )
    assert max(one.json["predicted"]["peak_bytes"]) < at[2]  # a text of six bytes stands for both prompts
    asked = inside.run("run", recipe, *pins, "--prompts", "p.txt", "--check", "--json")
    assert asked.code == 0 and asked.json["equal"] is True, asked.stderr


def test_a_job_keeps_the_lengths() -> None:
    job = Job(Plan(page=16), LLAMA, replace(LONG, prompt_lengths=LENGTHS))
    assert Job.from_json(job.to_json()) == job
