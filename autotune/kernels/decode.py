"""Attention of a few new tokens a sequence over a cache, with all that comes before it: q, k, v split, q and k
normalised (where asked) and turned, the new keys and values put into the cache. One kernel where libraries take five.

The keys of a sequence are shared out among programs, as many as the device has room for (Flash-Decoding, Dao et al.
2023): each merges its part into (m, l, o), the largest score, the sum of exponentials and the weighted values, and
whichever program of a head comes last merges the parts, which is one associative step more. Query heads that share a
key head, of all new tokens, are the rows of one product. New tokens follow one another or are a tree, each of whose
nodes sees its ancestors. How long the cache is only the device knows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernels import ahead
from autotune.kernels.rotary import Heads, Norms

LEAST_ROWS = 16  # of a matrix product
PROGRAMS = 2  # a processor, at least: where a sequence is short most of them have nothing to do
MERGED = 4096  # elements of the parts that are merged at a time
LOG2_E = 1.4426950408889634


class Parts(NamedTuple):
    """Where the programs of a head leave their parts: fp32 [heads of all sequences, splits, rows, 2 lanes + 2], and how
    many have, int32 [heads of all sequences], zero between two launches."""

    values: Tensor
    done: Tensor


class Tiles(NamedTuple):
    """Keys of one step of a program, and its warps."""

    keys: int = 32
    warps: int = 2
    least: int = 64  # keys of a program


class Cache(NamedTuple):
    """One layer's keys and values [batch, positions, key heads, width], and int32 [batch]: how many of the positions
    are filled once the new tokens are in. Of several new tokens of a sequence that do not follow one another `depths`,
    int64 [new], says how many come before each in its text, and `visible`, bool [new, new], which ones it sees.

    With a `table`, int64 [batch, pages], keys and values are a pool of pages [pages, positions of a page, key heads,
    width], and it says which of them a sequence has, in order."""

    keys: Tensor
    values: Tensor
    used: Tensor
    depths: Tensor | None = None
    visible: Tensor | None = None
    table: Tensor | None = None


@triton.jit
def _turned(at, lane, inside, weight, cos, sin, eps, half: tl.constexpr, norm: tl.constexpr):
    """Both halves of a vector at `at`, or of several, normalised and turned, in fp32."""
    a = tl.load(at + lane, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + half + lane, mask=inside, other=0.0).to(tl.float32)
    if norm:
        r = tl.rsqrt((tl.sum(a * a, 1, keep_dims=True) + tl.sum(b * b, 1, keep_dims=True)) / (2 * half) + eps)
        a = a * r * tl.load(weight + lane, mask=lane < half, other=0.0).to(tl.float32)
        b = b * r * tl.load(weight + half + lane, mask=lane < half, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _row(table, sequence, place, positions, page: tl.constexpr):
    """Which of all rows of the keys holds a position of a sequence, of `positions` each."""
    if page > 0:
        number = tl.load(table + (sequence * positions) // page + place // page, mask=place < positions, other=0)
        return number * page + place % page
    else:
        return sequence.to(tl.int64) * positions + place


@triton.jit
def _keys(
    keys, values, table, sequence, head, begin, end, lane, heads, positions,
    half: tl.constexpr, block: tl.constexpr, page: tl.constexpr,
):  # fmt: skip
    """Both halves of a block of keys and of their values, from `begin` and before `end`."""
    place = begin + tl.arange(0, block)
    known = (place < end)[:, None] & (lane < half)
    at = (_row(table, sequence, place, positions, page)[:, None] * heads + head) * 2 * half + lane
    ka = tl.load(keys + at, mask=known, other=0.0)
    kb = tl.load(keys + at + half, mask=known, other=0.0)
    va = tl.load(values + at, mask=known, other=0.0)
    vb = tl.load(values + at + half, mask=known, other=0.0)
    return ka, kb, va, vb


@triton.jit
def _merge(qa, qb, ka, kb, va, vb, m, l, oa, ob, scale, seen):
    """A block's part, of whose keys [rows, block] says which count, merged into (m, l, o)."""
    scores = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    scores = tl.dot(qb, tl.trans(kb), scores, input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(m, tl.max(scores, 1, keep_dims=True))
    sure = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
    p = tl.exp2(scores - sure)
    kept = tl.exp2(m - sure)
    l = l * kept + tl.sum(p, 1, keep_dims=True)
    oa = tl.dot(p.to(va.dtype), va, oa * kept, input_precision="ieee")
    ob = tl.dot(p.to(vb.dtype), vb, ob * kept, input_precision="ieee")
    return top, l, oa, ob


@triton.jit
def _attend(
    qkv, keys, values, table, used, depths, visible, cos, sin, q_weight, k_weight, eps, parts, done, out, scale,
    positions, window,
    queries: tl.constexpr, heads: tl.constexpr, half: tl.constexpr, lanes: tl.constexpr, rows: tl.constexpr,
    new: tl.constexpr, fresh: tl.constexpr, tree: tl.constexpr, page: tl.constexpr,
    block: tl.constexpr, splits: tl.constexpr,
    least: tl.constexpr, few: tl.constexpr, chunk: tl.constexpr, norm: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    ahead.begin(early)
    pair, split = tl.program_id(0), tl.program_id(1)
    sequence, head = pair // heads, pair % heads
    group: tl.constexpr = queries // heads
    width: tl.constexpr = 2 * half
    real: tl.constexpr = group * new
    row, lane = tl.arange(0, rows)[:, None], tl.arange(0, lanes)[None, :]
    inside = lane < half
    mine = (row < real) & inside
    # A row is a query head of a new token; where there is one token, what hangs on it is loaded once.
    token = row % new if new > 1 else tl.zeros([1, 1], tl.int32)
    depth = token.to(tl.int64)
    if tree:
        depth = tl.load(depths + token)
    # What this step's kernels do not write is asked for before any of them has ended.
    filled = tl.load(used + sequence) - new  # the first new token's position
    place = filled + depth
    first = tl.maximum(0, filled + 1 - window) if window > 0 else 0
    each = tl.cdiv(tl.maximum(least, tl.cdiv(filled - first, splits)), block) * block
    active = tl.maximum(1, tl.cdiv(filled - first, each))
    begin = first + split * each
    end = tl.minimum(filled, begin + each)
    ka, kb, va, vb = _keys(keys, values, table, sequence, head, begin, end, lane, heads, positions, half, block, page)
    c = tl.load(cos + place * width + lane, mask=inside, other=0.0)
    s = tl.load(sin + place * width + lane, mask=inside, other=0.0)
    ahead.wait(early)
    if split < active:
        stride: tl.constexpr = (queries + 2 * heads) * width
        of_sequence = qkv + sequence.to(tl.int64) * new * stride
        at_q = of_sequence + token * stride + (head * group + row // new) * width
        qa, qb = _turned(at_q, lane, mine, q_weight, c, s, eps, half, norm)
        kind = keys.dtype.element_ty
        qa, qb = qa.to(kind), qb.to(kind)
        m = tl.full([rows, 1], float("-inf"), tl.float32)
        l = tl.zeros([rows, 1], tl.float32)
        oa, ob = tl.zeros([rows, lanes], tl.float32), tl.zeros([rows, lanes], tl.float32)
        if split == 0:  # the new tokens' own keys and values
            if new == 1:
                d = tl.load(cos + filled * width + lane, mask=inside, other=0.0)
                e = tl.load(sin + filled * width + lane, mask=inside, other=0.0)
                na, nb = _turned(of_sequence + (queries + head) * width, lane, inside, k_weight, d, e, eps, half, norm)
                na, nb = na.to(kind), nb.to(kind)
                at_v = of_sequence + (queries + heads + head) * width + lane
                wa, wb = tl.load(at_v, mask=inside, other=0.0), tl.load(at_v + half, mask=inside, other=0.0)
                to = (_row(table, sequence, filled, positions, page) * heads + head) * width + lane
                tl.store(keys + to, na, mask=inside)
                tl.store(keys + to + half, nb, mask=inside)
                tl.store(values + to, wa, mask=inside)
                tl.store(values + to + half, wb, mask=inside)
                both = qa.to(tl.float32) * na.to(tl.float32) + qb.to(tl.float32) * nb.to(tl.float32)
                m = tl.sum(both, 1, keep_dims=True) * scale
                l = tl.full([rows, 1], 1.0, tl.float32)
                oa, ob = oa + wa.to(tl.float32), ob + wb.to(tl.float32)
            else:
                other = tl.arange(0, fresh)
                deep = other.to(tl.int64)
                if tree:
                    deep = tl.load(depths + other, mask=other < new, other=0)
                spot = filled + deep[:, None]
                there = (other < new)[:, None] & inside
                d = tl.load(cos + spot * width + lane, mask=there, other=0.0)
                e = tl.load(sin + spot * width + lane, mask=there, other=0.0)
                of_other = of_sequence + other[:, None] * stride
                na, nb = _turned(of_other + (queries + head) * width, lane, there, k_weight, d, e, eps, half, norm)
                na, nb = na.to(kind), nb.to(kind)
                at_v = of_other + (queries + heads + head) * width + lane
                wa, wb = tl.load(at_v, mask=there, other=0.0), tl.load(at_v + half, mask=there, other=0.0)
                to = (_row(table, sequence, filled + other, positions, page)[:, None] * heads + head) * width + lane
                tl.store(keys + to, na, mask=there)
                tl.store(keys + to + half, nb, mask=there)
                tl.store(values + to, wa, mask=there)
                tl.store(values + to + half, wb, mask=there)
                if tree:
                    sees = tl.load(visible + token * new + other[None, :], mask=(other < new)[None, :], other=0) != 0
                else:
                    sees = other[None, :] <= token
                if window > 0:
                    sees = sees & (depth - deep[None, :] < window)
                m, l, oa, ob = _merge(qa, qb, na, nb, wa, wb, m, l, oa, ob, scale, sees)
        low = place - window if window > 0 else place * 0 - 1  # what comes after it is seen
        if begin < end:
            at = begin + tl.arange(0, block)[None, :]
            m, l, oa, ob = _merge(qa, qb, ka, kb, va, vb, m, l, oa, ob, scale, (at < end) & (at > low))
        for start in range(begin + block, end, block):
            ka, kb, va, vb = _keys(
                keys, values, table, sequence, head, start, end, lane, heads, positions, half, block, page
            )
            at = start + tl.arange(0, block)[None, :]
            m, l, oa, ob = _merge(qa, qb, ka, kb, va, vb, m, l, oa, ob, scale, (at < end) & (at > low))
        of_out = out + sequence.to(tl.int64) * new * queries * width
        where = of_out + (token * queries + head * group + row // new) * width + lane
        if active == 1:
            tl.store(where, oa / l, mask=mine)
            tl.store(where + half, ob / l, mask=mine)
        else:
            size: tl.constexpr = rows * (2 * lanes + 2)
            of_pair = parts + pair.to(tl.int64) * splits * size
            at = of_pair + split * size
            line = row * lanes + lane
            tl.store(at + line, oa, mask=mine)
            tl.store(at + rows * lanes + line, ob, mask=mine)
            tl.store(at + 2 * rows * lanes + row, m)
            tl.store(at + 2 * rows * lanes + rows + row, l)
            tl.debug_barrier()  # all of this program's part is written before it says so
            if tl.atomic_add(done + pair, 1, sem="acq_rel") == active - 1:
                tl.debug_barrier()
                r, spot = tl.arange(0, few)[:, None], tl.arange(0, lanes)[None, :]
                m_all = tl.where(r < real, float("-inf"), 0.0)
                l_all = tl.where(r < real, 0.0, 1.0)
                a_all, b_all = tl.zeros([few, lanes], tl.float32), tl.zeros([few, lanes], tl.float32)
                for start in range(0, active, chunk):
                    part = start + tl.arange(0, chunk)[:, None, None]
                    there = (part < active) & (r < real)[None, :, :]
                    told = of_pair + part * size + 2 * rows * lanes + r[None, :, :]
                    m_of = tl.load(told, mask=there, other=float("-inf"), cache_modifier=".cg")
                    l_of = tl.load(told + rows, mask=there, other=0.0, cache_modifier=".cg")
                    left = of_pair + part * size + (r * lanes + spot)[None, :, :]
                    known = there & (spot < half)[None, :, :]
                    a_of = tl.load(left, mask=known, other=0.0, cache_modifier=".cg")
                    b_of = tl.load(left + rows * lanes, mask=known, other=0.0, cache_modifier=".cg")
                    higher = tl.maximum(m_all, tl.max(m_of, 0))
                    sure = tl.where(higher == float("-inf"), 0.0, higher)
                    keep, share = tl.exp2(m_all - sure), tl.exp2(m_of - sure[None, :, :])
                    l_all = l_all * keep + tl.sum(l_of * share, 0)
                    a_all = a_all * keep + tl.sum(a_of * share, 0)
                    b_all = b_all * keep + tl.sum(b_of * share, 0)
                    m_all = higher
                whole = of_out + ((r % new) * queries + head * group + r // new) * width + spot
                tl.store(whole, a_all / l_all, mask=(r < real) & (spot < half))
                tl.store(whole + half, b_all / l_all, mask=(r < real) & (spot < half))
                tl.store(done + pair, 0)


def parts(batch: int, heads: Heads, device: torch.device, splits: int = 0) -> Parts:
    """Room for the parts of all heads of `batch` sequences; what follows one another may share it. `splits`: programs a
    head; 0: as many as the device has room for."""
    pairs = batch * heads.keys
    if not splits:
        splits = max(1, -(-PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count // pairs))
    rows, lanes = _rows(heads), _lanes(heads)
    values = torch.empty((pairs, splits, rows * (2 * lanes + 2)), dtype=torch.float32, device=device)
    return Parts(values, torch.zeros(pairs, dtype=torch.int32, device=device))


def _lanes(heads: Heads) -> int:
    return max(LEAST_ROWS, int(triton.next_power_of_2(heads.width // 2)))


def _rows(heads: Heads) -> int:
    return max(LEAST_ROWS, int(triton.next_power_of_2(heads.queries // heads.keys * heads.sequence)))


def attend(
    qkv: Tensor,
    heads: Heads,
    rope: tuple[Tensor, Tensor],
    cache: Cache,
    room: Parts,
    window: int = 0,
    norms: Norms | None = None,
    how: Tiles | None = None,
) -> Tensor:
    """qkv [batch * new, (queries + 2 keys) width] of `heads.sequence` new tokens a sequence -> o [batch * new, queries
    * width].

    Their keys and values go into the cache from position used - new on. `rope`: cos and sin, fp32 [positions, width].
    `window`: so many positions are seen, a token's own included (0: all). `heads.width` / 2 at least 16.
    """
    how, new = how or Tiles(), heads.sequence
    batch, half = len(qkv) // new, heads.width // 2
    table, page, positions = cache.used, 0, cache.keys.shape[1]
    if cache.table is not None:
        table, page, positions = cache.table, positions, cache.table.shape[1] * positions
    splits = min(room.values.shape[1], triton.cdiv(positions, how.least))
    out = torch.empty((len(qkv), heads.queries * heads.width), dtype=qkv.dtype, device=qkv.device)
    tree = cache.visible is not None
    nodes = (cache.depths, cache.visible) if tree else (cache.used, cache.used)
    early = ahead.possible(qkv.device)
    weights = (norms.q, norms.k, norms.eps) if norms else (rope[0], rope[0], 0.0)
    few, lanes = triton.next_power_of_2(heads.queries // heads.keys * new), _lanes(heads)
    _attend[(batch * heads.keys, splits)](
        qkv.contiguous(), cache.keys, cache.values, table, cache.used, *nodes, *rope, *weights, *room, out,
        LOG2_E / heads.width**0.5, positions, window, heads.queries, heads.keys, half, lanes, _rows(heads),
        new, max(LEAST_ROWS, triton.next_power_of_2(new)), tree, page, how.keys, splits, how.least, few,
        max(1, MERGED // (few * lanes)), norms is not None, early, num_warps=how.warps, **ahead.launched(early),
    )  # fmt: skip
    return out
