"""The choice of a token, spread over the device: masses are whole numbers, so they add up alike in any order."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import tile

_TOKENS, _PIECE = 1024, 64  # of a program, and of a step that sorts them into octaves
_OCTAVES = 32  # of odds: 1 to 1/2, 1/2 to 1/4 ...; the last holds all the rest
_LIKELY = 512  # tokens of a step of the search
_ONE = tl.constexpr(2.0**62)  # the mass of all tokens of a row


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """See the reference of the same name: the same token, unless ``draw`` (or ``top_p``) falls within the reference's
    own rounding of an edge between two tokens: V 2^-53 from its running sum, and max|logit| / temperature 2^-52.

    Odds are float64 and ordered as such; a token's mass is its odds cut to whole multiples of 2^-62, which is within
    V 2^-62 of them in all. A nucleus is found among the tokens of the octaves it reaches into.
    """
    (rows, count), device = logits.shape, logits.device
    logits, blocks = logits.contiguous(), triton.cdiv(logits.shape[1], _TOKENS)
    numbers = [t.to(device, torch.float64).contiguous() for t in (temperature, top_p, draw)]
    top = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    total = torch.empty(rows, blocks, dtype=torch.float64, device=device)
    odds = torch.empty(rows, count, dtype=torch.float64, device=device)
    mass = torch.empty(rows, blocks, _OCTAVES, dtype=torch.int64, device=device)
    number = torch.empty(rows, blocks, _OCTAVES, dtype=torch.int32, device=device)
    likely, ids = torch.empty_like(odds), torch.empty(rows, count, dtype=torch.int32, device=device)
    some = torch.empty(rows, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    sizes, grid = {"N": _TOKENS, "C": tile(blocks), "O": _OCTAVES}, (rows, blocks)
    _total[grid](logits, numbers[0], top, total, count, N=_TOKENS)
    _odds[grid](logits, numbers[0], top, total, odds, mass, number, count, blocks, J=_PIECE, **sizes)
    _likely[grid](odds, numbers[1], mass, number, likely, ids, some, count, blocks, **sizes)
    _sample[(rows,)](*numbers, odds, mass, likely, ids, some, out, count, blocks, J=_LIKELY, **sizes, num_warps=8)
    return out


@triton.jit
def _relative(logits, top, temperature):
    """exp((logit - top) / temperature), float64; temperature 0 leaves the largest."""
    below = tl.where(logits == top, 0, logits.to(tl.float64) - top)
    return tl.exp(below / tl.maximum(temperature, 1e-300))


@triton.jit
def _total(logits, temperature, top, total, count, N: tl.constexpr):
    """A block's largest logit, and the sum of its odds relative to that."""
    row, blocks, i = tl.program_id(0).to(tl.int64), tl.num_programs(1), tl.program_id(1) * N + tl.arange(0, N)
    value = tl.load(logits + row * count + i, mask=i < count, other=float("-inf"))
    largest, at = tl.max(value, 0), row * blocks + tl.program_id(1)
    odds = _relative(value, largest, tl.load(temperature + row))
    tl.store(top + at, largest)
    tl.store(total + at, tl.sum(tl.where(i < count, odds, 0), 0))


@triton.jit
def _odds(
    logits, temperature, top, total, odds, mass, number, count, blocks,
    J: tl.constexpr, N: tl.constexpr, C: tl.constexpr, O: tl.constexpr,
):  # fmt: skip
    """Odds of the row, and of each block the mass and the number of its tokens by octave."""
    row, octave, block = tl.program_id(0).to(tl.int64), tl.arange(0, O), tl.arange(0, C)
    heat, own = tl.load(temperature + row), row * blocks + tl.program_id(1)
    tops = tl.load(top + row * blocks + block, mask=block < blocks, other=float("-inf"))
    totals = tl.load(total + row * blocks + block, mask=block < blocks, other=0)
    largest = tl.max(tops, 0)
    whole = tl.sum(totals * _relative(tops, largest, heat), 0)
    masses, numbers = tl.zeros([J, O], tl.int64), tl.zeros([J, O], tl.int32)
    for first in range(tl.program_id(1) * N, tl.minimum(tl.program_id(1) * N + N, count), J):
        i = first + tl.arange(0, J)
        value = tl.load(logits + row * count + i, mask=i < count, other=float("-inf"))
        p = _relative(value, largest, heat) / whole
        tl.store(odds + row * count + i, p, mask=i < count)
        inside = (_octave(p, O)[:, None] == octave[None, :]) & (i < count)[:, None]
        masses += tl.where(inside, _mass(p)[:, None], 0)
        numbers += inside.to(tl.int32)
    tl.store(mass + own * O + octave, tl.sum(masses, 0))
    tl.store(number + own * O + octave, tl.sum(numbers, 0))


@triton.jit
def _mass(odds):
    return (odds * _ONE).to(tl.int64)


@triton.jit
def _octave(odds, O: tl.constexpr):
    """0 for odds from 1/2 to 1 (and 1 itself), 1 from 1/4 ... as float64's exponent has it; O - 1 for all the rest."""
    exponent = (odds.to(tl.int64, bitcast=True) >> 52).to(tl.int32)
    return tl.minimum(tl.maximum(1022 - exponent, 0), O - 1)


@triton.jit
def _least(share):
    """The running mass of a token must exceed this to have reached ``share`` of all."""
    whole = (share * _ONE).to(tl.int64)
    return tl.maximum(whole - (whole == share * _ONE).to(tl.int64), 0)


@triton.jit
def _likely(
    odds, top_p, mass, number, likely, ids, some, count, blocks, N: tl.constexpr, C: tl.constexpr, O: tl.constexpr
):  # fmt: skip
    """The tokens of the octaves that a nucleus reaches into, in the order of their ids, and how many they are."""
    row, own, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(1) * N + tl.arange(0, N)
    share, block, octave = tl.load(top_p + row), tl.arange(0, C), tl.arange(0, O)
    if share >= 1:
        return
    at, there = (row * blocks + block)[:, None] * O + octave[None, :], (block < blocks)[:, None]
    reached = tl.cumsum(tl.sum(tl.load(mass + at, mask=there, other=0), 0), 0)
    last = tl.sum((reached <= _least(share)).to(tl.int32), 0)
    inside = tl.sum(tl.where(octave[None, :] <= last, tl.load(number + at, mask=there, other=0), 0), 1)
    place = tl.sum(tl.where(block < own, inside, 0), 0)
    p = tl.load(odds + row * count + i, mask=i < count, other=0)
    take = (_octave(p, O) <= last) & (i < count)
    place += tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(likely + row * count + place, p, mask=take)
    tl.store(ids + row * count + place, i, mask=take)
    tl.store(some + row, tl.sum(inside, 0), mask=own == 0)


@triton.jit
def _sample(
    temperature, top_p, draw, odds, mass, likely, ids, some, out, count, blocks,
    J: tl.constexpr, N: tl.constexpr, C: tl.constexpr, O: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    aim = tl.where(tl.load(temperature + row) > 0, tl.load(draw + row), 0)
    share, chosen = tl.load(top_p + row), tl.zeros([], tl.int32)
    if share < 1:
        nucleus, names, size = likely + row * count, ids + row * count, tl.load(some + row)
        edge, above, place = _find(nucleus, size, _least(share), J)
        kept = above + (place + 1) * _mass(edge)
        edge, above, place = _find(nucleus, size, _below(kept, aim), J)
        j = tl.arange(0, J)
        for first in range(0, size, J):  # the place-th of its equals
            equal = tl.load(nucleus + first + j, mask=first + j < size, other=-1) == edge
            one = equal & (tl.cumsum(equal.to(tl.int32), 0) == place + 1)
            chosen += tl.sum(tl.where(one, tl.load(names + first + j, mask=one, other=0), 0), 0)
            place -= tl.sum(equal.to(tl.int32), 0)
    else:
        block, octave = tl.arange(0, C), tl.arange(0, O)
        at = (row * blocks + block)[:, None] * O + octave[None, :]
        part = tl.sum(tl.load(mass + at, mask=(block < blocks)[:, None], other=0), 1)
        whole = tl.sum(part, 0)
        least = _below(whole, aim)
        own = tl.sum((tl.cumsum(part, 0) <= least).to(tl.int32), 0)
        at = own * N + tl.arange(0, N)
        p = tl.load(odds + row * count + at, mask=at < count, other=0)
        reached = tl.sum(tl.where(block < own, part, 0), 0) + tl.cumsum(_mass(p), 0)
        chosen = own * N + tl.sum((reached <= least).to(tl.int32), 0)
    tl.store(out + row, chosen.to(tl.int64))


@triton.jit
def _below(whole, share):
    """``share`` of a mass, below the whole of it."""
    return tl.minimum((whole.to(tl.float64) * share).to(tl.int64), whole - 1)


@triton.jit
def _find(likely, some, least, J: tl.constexpr):
    """The token with which the mass, the most probable first, exceeds ``least``: its odds, the mass above them, and its
    place among its equals. The odds' bits order as integers; they are found 4 at a time, the upper ones first."""
    j, digit, zero = tl.arange(0, J), tl.arange(0, 16), tl.zeros([], tl.int64)
    whole = zero
    for first in range(0, some, J):
        whole += tl.sum(_mass(tl.load(likely + first + j, mask=first + j < some, other=0)), 0)
    least, above, bits = tl.minimum(least, whole - 1), zero, zero + (3 << 60)  # what has a mass is above 2^-255
    for stage in range(15):
        edge = bits + (digit.to(tl.int64) << (56 - 4 * stage))
        masses = tl.zeros([16, J], tl.int64)
        for first in range(0, some, J):
            p = tl.load(likely + first + j, mask=first + j < some, other=0)
            masses += tl.where(p.to(tl.int64, bitcast=True)[None, :] >= edge[:, None], _mass(p)[None, :], 0)
        reached = tl.sum(masses, 1)
        best = tl.sum((reached > least).to(tl.int32), 0) - 1
        above = tl.maximum(above, tl.max(tl.where(digit > best, reached, 0), 0))
        bits += best.to(tl.int64) << (56 - 4 * stage)
    edge = bits.to(tl.float64, bitcast=True)
    return edge, above, (least - above) // _mass(edge)
