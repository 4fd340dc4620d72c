"""Routing of the bounded backward, on any device: which (row, vocabulary tile) pairs to drop, the rest as lists; and
sums over ragged sequences. The definition in torch of what csrc/routing.cuh computes, list for list.

Nothing here waits for the device. csrc/ has the same functions in CUDA (`flowrl_kernels.cuda.routing`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core.types import TILE

SLACK = 2e-5  # more than the rounding of a recomputed log-prob: keeps the bound on the safe side
BIN_BITS = 11
BINS = 1 << BIN_BITS  # of one histogram
KEYS = BINS * BINS
OCTAVE_BITS = 4  # 16 bins of the first histogram per factor of two: it spans 128 octaves
LANES = 256  # partial sums of one sequence
ROWS_AT_ONCE = 256  # of the [R, runs] masses in memory


class BlockLists(NamedTuple):
    """Active pairs by row block (CSR) and by vocabulary tile (CSC). Unused ends of the lists hold -1."""

    block_offsets: Tensor  # [blocks + 1] int64; the last one is the number of active pairs
    block_tiles: Tensor  # [blocks * tiles] int32: tiles of each row block, rising
    tile_offsets: Tensor  # [tiles + 1] int64
    tile_blocks: Tensor  # [blocks * tiles] int32: row blocks of each tile, rising
    tile_slots: Tensor  # [blocks * tiles] int32: where the same pair stands in block_tiles


def run_mass(
    lse: Tensor,  # [R]
    tile_lse: Tensor,  # [runs, R] fp16
    target: Tensor,  # [R]
    target_logp: Tensor,  # [R], -inf where the row has no target
) -> Tensor:
    """Upper bound of each row's non-target softmax mass per run of TILE columns. [R, runs]"""
    mass = (tile_lse.to(lse.dtype) - lse).exp_().mul_(1.0 + SLACK).clamp_max_(1.0).T.contiguous()
    column = (target // TILE).clamp_max_(mass.shape[1] - 1)[:, None]
    mass.scatter_add_(1, column, -(target_logp.exp() * (1.0 - SLACK))[:, None])
    rest = -torch.expm1(target_logp) + SLACK  # no run can hold more than the whole non-target mass
    return mass.clamp_min_(0.0).minimum(rest[:, None])


def tile_costs(
    tile_lse: Tensor,  # [runs, R] fp16
    lse: Tensor,  # [R]
    target: Tensor,  # [R]; V or more where the row has none
    target_logp: Tensor,  # [R], -inf where the row has no target
    gradient: Tensor,  # [R] |grad| * logit_scale / temperature
    tile_runs: int,
) -> tuple[Tensor, Tensor]:
    """Upper bounds of the non-target gradient mass per pair, and of its sum of squares. [R, tiles] fp64 each"""
    num_tiles = -(-len(tile_lse) // tile_runs)
    padding = (0, num_tiles * tile_runs - len(tile_lse))
    costs = gradient.new_empty((len(lse), num_tiles), dtype=torch.float64)
    squares = torch.empty_like(costs)
    for low in range(0, len(lse), ROWS_AT_ONCE):
        own = slice(low, low + ROWS_AT_ONCE)
        mass = run_mass(lse[own], tile_lse[:, own], target[own], target_logp[own]) * gradient[own, None]
        mass = torch.nn.functional.pad(mass, padding).view(-1, num_tiles, tile_runs).double()
        costs[own] = mass.sum(2)
        squares[own] = mass.square_().sum(2)
    return costs, squares


def _power_of_two(exponent: Tensor) -> Tensor:
    return (exponent + 1023 << 52).view(torch.float64)


def _units(budget: Tensor, pairs: int) -> tuple[Tensor, float, Tensor]:
    """Scale, cap and limit: units per 1.0, what a pair counts at most, and the budget in units rounded down."""
    bits = min(52, 62 - max(pairs - 1, 0).bit_length())  # pairs * cap <= 2^62
    exponent = ((budget.view(torch.int64) >> 52) - 1023).clamp(-900, 900)
    scale, cap = _power_of_two(bits - 1 - exponent), float(1 << bits)
    scaled = (budget * scale).clamp_max(cap - 1.0)
    return scale, cap, torch.where(scaled >= 1.0, scaled, 0.0).long()


def _in_units(value: Tensor, scale: Tensor, cap: float) -> Tensor:
    scaled = (value * scale).ceil_()
    return torch.where((scaled >= 0.0) & (scaled < cap), scaled, cap).long()  # nan counts as the cap


def drop_keys(square: Tensor, square_budget: Tensor) -> Tensor:
    """The leading bits that order the pairs: 22 of them, from 128 octaves under the budget up. int64, as `square`"""
    base = ((square_budget.view(torch.int64) >> (52 - OCTAVE_BITS)) - (BINS - 1)) * BINS
    key = ((square.view(torch.int64) >> (52 - OCTAVE_BITS - BIN_BITS)) - base).clamp_(0, KEYS - 1)
    return torch.where(square >= 0.0, key, KEYS - 1)


def drop_lightest(
    cost: Tensor,  # [...] fp64
    square: Tensor,  # [...] fp64
    budget: Tensor,  # [2] fp64: for the sums of cost and of square over what is dropped
) -> tuple[Tensor, Tensor]:
    """Drop pairs by rising key (`drop_keys`) while both sums stay within their budgets; equal keys go together.

    Sums are taken over integers, in units of a power of two and rounded up: no order of summation can change the
    result, and `spent` never understates it. Returns active [...] bool and spent [2] fp64.
    """
    key = drop_keys(square, budget[1]).flatten()
    cost_scale, cost_cap, cost_limit = _units(budget[0], key.numel())
    square_scale, square_cap, square_limit = _units(budget[1], key.numel())
    values = torch.stack(
        [_in_units(cost.flatten(), cost_scale, cost_cap), _in_units(square.flatten(), square_scale, square_cap)], 1
    )
    limit = torch.stack([cost_limit, square_limit])
    spent, threshold = torch.zeros_like(limit), torch.zeros_like(cost_limit)
    for level in range(2):
        chosen = (key // BINS == threshold)[:, None] if level else torch.ones_like(key, dtype=torch.bool)[:, None]
        bins = key % BINS if level else key // BINS
        running = torch.zeros((BINS, 2), dtype=torch.int64, device=key.device)
        running = spent + running.index_add_(0, bins, values * chosen).cumsum(0)
        fits = (running <= limit).all(1)
        broken = fits.sum()  # sums only rise: what fits is a prefix
        spent = torch.cat([spent[None], running]).index_select(0, broken[None])[0]
        threshold = threshold * BINS + broken
    return (key >= threshold).view(cost.shape), spent.double() / torch.stack([cost_scale, square_scale])


def block_lists(active: Tensor) -> BlockLists:  # [blocks, tiles] bool
    """The active pairs as lists, all sizes kept on the device."""
    num_pairs = active.numel()
    by_tile = active.T.contiguous()

    def offsets(lines: Tensor) -> Tensor:
        return torch.nn.functional.pad(lines.sum(1).cumsum(0), (1, 0))

    def compact(on: Tensor, values: Tensor) -> Tensor:
        place = torch.where(on, on.cumsum(0) - 1, num_pairs)  # what is not active goes past the end
        made = torch.full((num_pairs + 1,), -1, dtype=torch.int32, device=active.device)
        return made.scatter_(0, place, values.int())[:num_pairs]

    num_blocks, num_tiles = active.shape
    index = torch.arange(num_pairs, device=active.device)
    slots = (active.flatten().cumsum(0) - 1).view(active.shape).T.flatten()
    return BlockLists(
        offsets(active),
        compact(active.flatten(), index % max(num_tiles, 1)),
        offsets(by_tile),
        compact(by_tile.flatten(), index % max(num_blocks, 1)),
        compact(by_tile.flatten(), slots),
    )


def segment_sums(values: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Sums of packed values [N] fp32 over the sequences of cu_seqlens [B + 1], in fp64 and in a fixed order. [B]

    LANES partial sums each take every LANES-th value, then fold in halves: the order depends on the sequence's length
    alone. `max_length` is at least the longest length.
    """
    num_rounds = -(-max_length // LANES)
    edges = cu_seqlens.long().clamp(0, len(values))
    first, last = edges[:-1, None], edges[1:, None]
    lane = torch.arange(LANES, device=values.device)
    lanes = values.new_zeros((len(edges) - 1, LANES), dtype=torch.float64)
    padded = torch.nn.functional.pad(values, (0, 1))
    for i in range(num_rounds):
        place = first + i * LANES + lane
        place = torch.where(place < last, place, len(values))
        lanes += padded[place]
    while lanes.shape[1] > 1:
        left, right = lanes.chunk(2, 1)
        lanes = left + right
    return lanes[:, 0]
