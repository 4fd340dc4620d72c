"""The bounded backward in Triton: the definition is `flowrl_kernels.chunked.bounded` (docs/maths.md, eq. 19).

A pair is a row and a vocabulary tile of COLUMNS columns, and the plan is the definition's. What is left has the shape
of a mixture of experts: a tile is an expert, and each row goes to the tiles that it still needs. A tile's rows (CSC)
are cut into blocks; a block's rows of hidden states are gathered as the logits are recomputed, and its dz is stored
compactly. dweight of a tile is dz^T by the same gathered rows. For dhidden each pair's product with the tile is
stored, and a row adds up its own (CSR): every output has one program, every sum one order, no atomics. A flat row
goes to every tile, so it is computed densely. Target entries go by themselves, as a gather for dhidden and as a
product over the rows sorted by target for dweight.

2NHV + s 6NHV FLOP with the forward, s the share of active pairs, each tile's rows rounded up to whole blocks. A
pair's product with its tile is 2 COLUMNS H FLOP, and 8 H bytes to write it and read it again: 256 FLOP a byte, where
an H200 does 183 (788 TFLOP/s, 4.3 TB/s), so the traffic takes about 0.7 of the time of this one of three products.
Blocks of rows that share their tiles would add up in registers instead, and leave 4 to 9 times as many pairs
(docs/log.md).

Memory beyond the gradients, as in the exact backward: hidden states with zeros in rows that take no part, and dhidden
in fp32. In addition the owed masses, the size of the tile statistics, and a slab of the vocabulary at a time: dz and
the pairs' products, at most SLAB_BYTES or one tile's, N (2 COLUMNS + 4 H) bytes for 16-bit inputs. The host waits
once: for whether it pays, and where each tile's list begins.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flowrl_kernels import cuda
from flowrl_kernels.chunked import routing
from flowrl_kernels.chunked.bounded import COLUMNS, Plan, make_plan
from flowrl_kernels.chunked.routing import SLACK, BlockLists
from flowrl_kernels.core.types import TILE, Budget, Head, Saved
from flowrl_kernels.triton import tiles
from flowrl_kernels.triton.bounded_kernels import (
    columns_kernel,
    combine_kernel,
    costs_kernel,
    finish_kernel,
    owed_kernel,
    pairs_kernel,
    products_kernel,
    sums_kernel,
)
from flowrl_kernels.triton.matmul import matmul_into

# Share of blocks above which the exact backward is taken. Its products run at cuBLAS's rate, those over lists at an
# assumed 0.65 of it (not yet measured on hardware); the plan, the sums over pairs and the correction take the rest.
FALL_BACK = 0.5
SLAB_BYTES = 1 << 30  # of dz and of the pairs' products at a time
RUNS = 32  # runs of tile statistics a step


class Batch(NamedTuple):
    x: Tensor  # [N, H], 0 in rows that take no part
    target: Tensor  # [N]; V where the row has none
    target_logp: Tensor  # [N]
    target_gradient: Tensor  # [N] entry of dlogits at the target, times the float16 factor
    lse: Tensor  # [N]; inf in rows that take no part
    maximum: Tensor  # [N]; inf in rows that take no part
    factor: Tensor  # [N] logit_scale / temperature
    scale: Tensor  # [N] gradient by the products, times the float16 factor
    over_sum: Tensor  # [N] 1 / softmax sum relative to the maximum
    inverse: Tensor | None  # [1] what undoes the float16 factor


class Wanted(NamedTuple):
    """Which gradients, and where the weight's goes."""

    dweight: Tensor | None  # [V, H] written, or with `add` added to
    add: bool
    hidden: bool
    bias: bool


class Accumulators(NamedTuple):
    """What the slabs of the vocabulary add up in, fp32."""

    hidden: Tensor | None  # [N, H]
    computed: Tensor  # [N] non-target mass that was computed, per row
    bias: Tensor | None  # [tiles, COLUMNS]


class Columns(NamedTuple):
    """What dweight takes besides the active pairs."""

    by_target: Tensor  # [N] rows by rising target
    cuts: Tensor  # [runs + 1] first place in by_target of each run of TILE columns
    spread: Tensor  # [runs rounded up to 8, H] fp32: what the dropped pairs of each run owe


class Lists(NamedTuple):
    """The active pairs, by tile and by row, and the blocks that the tiles' lists are cut into."""

    offsets: Tensor  # [tiles + 1] first slot of each tile
    slot_row: Tensor  # [slots] rows of each tile, rising
    row_offsets: Tensor  # [N + 1] first entry of each row
    entry_tile: Tensor  # [entries] tiles of each row, rising
    entry_slot: Tensor  # [entries] where the same pair stands in slot_row
    first_block: Tensor  # [tiles + 1] first block of each tile
    shift: Tensor  # [tiles] place of a slot minus the slot
    edges: list[int]  # first_block, on the host
    width: int  # columns of a tile
    factor: Tensor | None = None  # [N, tiles] what dz of a pair is multiplied by, 1 if None


def route(device: torch.device) -> ModuleType:
    """Where thresholds and lists come from: the compiled library where it is built, else torch. The same lists."""
    if device.type == "cuda" and cuda.status()[0]:
        from flowrl_kernels.cuda import routing as compiled

        return compiled
    return routing


def blocks_of(offsets: Tensor, block_rows: int) -> Tensor:
    """First block of each tile, and their number. [tiles + 1]"""
    blocks = (offsets.diff() + block_rows - 1).div(block_rows, rounding_mode="floor")
    return torch.nn.functional.pad(blocks.cumsum(0), (1, 0))


def read_plan(plan: Plan, first_block: Tensor, live: Tensor, block_rows: int) -> tuple[bool, list[int]]:
    """Whether it pays, and the first block of each tile: the one time the host waits in a bounded backward."""
    every = (live.sum() + block_rows - 1).div(block_rows, rounding_mode="floor") * plan.active.shape[1]
    pays = (first_block[-1] <= FALL_BACK * every) & plan.bound.isfinite()  # a NaN in the inputs goes the exact way
    values = torch.cat([pays.long()[None], first_block]).tolist()
    return bool(values[0]), values[1:]


def tile_costs(
    tile_lse: Tensor, lse: Tensor, target: Tensor, target_logp: Tensor, gradient: Tensor, tile_runs: int
) -> tuple[Tensor, Tensor]:
    """`chunked.routing.tile_costs` where tile_runs divides RUNS."""
    num_runs, n = tile_lse.shape
    num_tiles = triton.cdiv(num_runs, tile_runs)
    cost = torch.empty((n, num_tiles), dtype=torch.float64, device=lse.device)
    square = torch.empty_like(cost)
    at_once = RUNS // tile_runs
    costs_kernel[(triton.cdiv(n, 64) * triton.cdiv(num_tiles, at_once),)](
        tile_lse, lse, target, target_logp, gradient, cost, square, n, num_runs, num_tiles, SLACK,
        BLOCK_M=64, TILES=at_once, TILE_RUNS=tile_runs, TILE=TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return cost, square


def bounded_backward(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]; -1 skips the row, V means no target here
    head: Head,  # without softcap
    saved: Saved,
    budget: Budget,
    tile: tiles.Tile,
    fp16_factor: Tensor | None,  # [1] power of two that dz is multiplied by
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None] | None:
    """dhidden [N, H] and dbias [V] fp32, each None if not needed; None, with nothing done, if exact is the better one.

    N is at least 1. `report` is written where the bounded path is taken.
    """
    (epsilon, report, _), tile_lse, chosen = budget, saved.tile_lse, route(hidden.device)
    batch, live = make_batch(grad_logp, hidden, target, head, saved)
    plan = make_plan(
        batch.scale.abs(), saved.lse.sum(0), tile_lse, batch.target, batch.target_logp, epsilon, COLUMNS, live,
        tile_costs, chosen.drop_lightest,
    )  # fmt: skip
    made = BlockLists(*chosen.block_lists(plan.active.T.contiguous()))  # "blocks" of these lists are tiles
    first_block = blocks_of(made.block_offsets, tile.block_m)
    pays, edges = read_plan(plan, first_block, live, tile.block_m)
    if not pays:
        return None
    if report is not None:
        report.copy_(torch.stack([plan.bound, plan.share, torch.zeros_like(plan.share)]))
    lists = lists_of(made, first_block, edges, tile, COLUMNS)
    return _compute(in_float16(batch, fp16_factor), plan.active, lists, head, tile_lse, tile, wanted)


def make_batch(grad_logp: Tensor, hidden: Tensor, target: Tensor, head: Head, saved: Saved) -> tuple[Batch, Tensor]:
    """What a backward over lists takes from its inputs, and which rows take part [N]."""
    logp, lse_parts, v = saved.logp, saved.lse, len(head.weight)
    live = (target >= 0) & (grad_logp != 0)
    target = torch.where(live, target, v)
    factor = torch.where(live, torch.full_like(head.temperature, head.logit_scale) / head.temperature, 1.0)
    scale = torch.where(live, grad_logp * factor, 0.0)
    target_logp = logp.masked_fill(target == v, -torch.inf).clamp_max(0.0)
    lse = lse_parts.sum(0)  # the statistics are fp16: nothing there to keep apart
    batch = Batch(
        torch.where(live[:, None], hidden, 0.0),
        target,
        target_logp,
        scale * -torch.expm1(target_logp),
        torch.where(live, lse, torch.inf),
        torch.where(live, lse_parts[0], torch.inf),
        factor,
        scale,
        torch.where(live, lse_parts[1], 0.0).neg().exp(),
        None,
    )
    return batch, live


def in_float16(batch: Batch, factor: Tensor | None) -> Batch:
    """The gradients times a power of two that keeps dz in float16's range."""
    if factor is None:
        return batch
    scale, gradient = batch.scale * factor, batch.target_gradient * factor
    return batch._replace(scale=scale, target_gradient=gradient, inverse=1.0 / factor)


def lists_of(
    made: BlockLists, first_block: Tensor, edges: list[int], tile: tiles.Tile, width: int, factor: Tensor | None = None
) -> Lists:
    shift = first_block[:-1] * tile.block_m - made.block_offsets[:-1]
    return Lists(*made, first_block, shift, edges, width, factor)


def _owed(batch: Batch, active: Tensor, tile_lse: Tensor, amount: Tensor, dropped: bool) -> Tensor:
    """`amount` of each row over its dropped runs, in proportion to their masses. [N, runs rounded up to 8]"""
    n, num_runs = len(amount), len(tile_lse)
    out = torch.empty((n, triton.cdiv(num_runs, 8) * 8), dtype=batch.x.dtype, device=amount.device)
    owed_kernel[(triton.cdiv(n, 32),)](
        tile_lse, active.view(torch.uint8), batch.lse, batch.target, batch.target_logp, amount, out,
        n, num_runs, active.shape[1], out.stride(0), SLACK,
        DROPPED=dropped, BLOCK_M=32, RUNS=RUNS, TILE_RUNS=COLUMNS // TILE, TILE=TILE,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def slabs(edges: list[int], most: int) -> list[tuple[int, int]]:
    """Neighbouring tiles of together at most `most` blocks (at least one tile)."""
    slabs, first = [], 0
    for tile in range(1, len(edges) - 1):
        if edges[tile + 1] - edges[first] > most:
            slabs.append((first, tile))
            first = tile
    return [*slabs, (first, len(edges) - 1)]


def run_means(weight: Tensor, rows: int) -> Tensor:
    """Mean row of each run of TILE columns, in weight's dtype; zeros up to `rows`. [rows, H]"""
    v, h = weight.shape
    means = torch.zeros((rows, h), dtype=weight.dtype, device=weight.device)
    whole = v // TILE
    means[:whole] = weight[: whole * TILE].unflatten(0, (whole, TILE)).mean(1, dtype=torch.float32)
    if v % TILE:
        means[whole] = weight[whole * TILE :].mean(0, dtype=torch.float32)
    return means


def _compute(
    batch: Batch, active: Tensor, lists: Lists, head: Head, tile_lse: Tensor, tile: tiles.Tile, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    x, target, target_logp, target_gradient, *_ = batch
    scale, inverse, weight, dweight = batch.scale, batch.inverse, head.weight, wanted.dweight
    (n, h), v, device = x.shape, weight.shape[0], x.device
    num_tiles, num_runs = active.shape[1], len(tile_lse)
    new = {"dtype": torch.float32, "device": device}
    acc = torch.empty(n, h, **new) if wanted.hidden else None
    computed = torch.empty(n, **new)  # non-target mass that was computed, per row
    bias_sums = torch.empty(num_tiles, COLUMNS, **new) if wanted.bias else None
    columns = bias_spread = None
    if dweight is not None or wanted.bias:  # by the statistics: what was computed is known only after the last slab
        owed = _owed(batch, active, tile_lse, target_gradient, dropped=False)
        if wanted.bias:
            bias_spread = owed.sum(0, dtype=torch.float32)[:num_runs]
        if dweight is not None:
            spread = torch.empty(owed.shape[1], h, **new)
            matmul_into(spread, owed.t(), x, add=False)
            by_target = torch.argsort(target, stable=True)
            edges = torch.arange(0, v + TILE, TILE, device=device).clamp_max_(v)
            columns = Columns(by_target, torch.searchsorted(target[by_target], edges), spread)
        del owed
    place_bytes = lists.width * x.element_size() + (4 * h if wanted.hidden else 0)
    for first, last in slabs(lists.edges, max(1, SLAB_BYTES // (tile.block_m * place_bytes))):
        into = Accumulators(acc, computed, bias_sums)
        slab(batch, active, lists, first, last, head, tile, columns, into, wanted)
    dhidden = dbias = None
    if acc is not None:
        still = (-torch.expm1(target_logp) - computed).clamp_min_(0.0) * -scale  # exactly what each row still owes
        owed = _owed(batch, active, tile_lse, still, dropped=True)
        matmul_into(acc, owed, run_means(weight, owed.shape[1]), add=True)
        dhidden = torch.empty(n, h, dtype=x.dtype, device=device)
        finish_kernel[(n,)](
            acc, weight, target, target_gradient, inverse, dhidden, v, h, weight.stride(0),
            BLOCK=1024, enable_fp_fusion=False,
        )  # fmt: skip
    if bias_sums is not None and bias_spread is not None:
        width = torch.full((num_runs,), float(TILE), **new)
        width[-1:] = v - TILE * (num_runs - 1)
        dbias = finish_bias(bias_sums, bias_spread / width, batch, v)
    return dhidden, dbias


def finish_bias(sums: Tensor, spread: Tensor, batch: Batch, v: int) -> Tensor:
    """The bias' gradient from its column sums [tiles, columns], what each column of a run owes [runs], and the rows'
    targets. [V]"""
    each = spread.repeat_interleave(TILE, output_size=len(spread) * TILE)
    # sorted on a GPU, sequential on a CPU: a fixed order; the one past the last column takes what has no target
    dbias = torch.nn.functional.pad(sums.view(-1)[:v] - each[:v], (0, 1))
    dbias.index_put_((batch.target,), batch.target_gradient, accumulate=True)
    return dbias[:v] if batch.inverse is None else dbias[:v] * batch.inverse


def slab(
    batch: Batch, active: Tensor, lists: Lists, first: int, last: int, head: Head, tile: tiles.Tile,
    columns: Columns | None, into: Accumulators, wanted: Wanted,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tiles from `first` to `last`: their part of every gradient. Returns dz [places, columns], rounded, and its
    mass by runs [places, columns / TILE]."""
    x, target, (acc, computed, bias_sums), dweight = batch.x, batch.target, into, wanted.dweight
    weight, bias, width = head.weight, head.bias, lists.width
    stride_factor = None if lists.factor is None else lists.factor.stride(0)
    (n, h), v, device = x.shape, weight.shape[0], x.device
    pair_tile, list_tile = tiles.pair_tile(tile), tiles.list_tile(tiles.arch_of(device), tile)
    block_m, block_n, block_k = tile[:3]
    begin, end = lists.edges[first], lists.edges[last]
    base, num_blocks = begin * block_m, end - begin
    blocks = lists.first_block[first : last + 1]
    places = max(num_blocks, 1) * block_m
    dz = torch.empty(places, width, dtype=x.dtype, device=device)
    part_mass = torch.empty(places, width // TILE, dtype=torch.float32, device=device)
    part_bias = torch.empty(num_blocks if bias_sums is not None else 0, width, dtype=torch.float32, device=device)
    block_tile = torch.arange(first, last, device=device).repeat_interleave(blocks.diff(), output_size=num_blocks)
    block_slot = torch.arange(begin, end, device=device) * block_m - lists.shift[block_tile]

    def operand(tensor: Tensor, *block: int):
        return TensorDescriptor.from_tensor(tensor, list(block)) if tile.descriptor else tensor

    wide = {"DESCRIPTOR": tile.descriptor, "COLUMNS": width, "enable_fp_fusion": False}
    if num_blocks > 0:
        pairs_kernel[(num_blocks * (width // TILE),)](
            x, operand(weight, TILE, pair_tile.block_k), bias, block_tile, block_slot, lists.offsets, lists.slot_row,
            target, batch.maximum, batch.over_sum, batch.factor, batch.scale, lists.factor, operand(dz, block_m, TILE),
            part_mass, part_bias, v, h, stride_factor, x.stride(0), weight.stride(0),
            BIAS=bias_sums is not None, EVEN_K=h % pair_tile.block_k == 0, BLOCK_M=block_m,
            BLOCK_K=pair_tile.block_k, TILE=TILE, num_warps=pair_tile.num_warps,
            num_stages=pair_tile.num_stages, **wide,
        )  # fmt: skip
    heights = triton.cdiv(h, block_n)
    wide |= {"BLOCK_H": block_n, "num_warps": tile.num_warps}
    if acc is not None:
        part = torch.empty(places, h, dtype=torch.float32, device=device)
        if num_blocks > 0:
            products_kernel[(num_blocks * heights,)](
                operand(dz, block_m, block_k), operand(weight, block_k, block_n), block_tile, part,
                places, v, h, weight.stride(0), heights,
                BLOCK_M=block_m, BLOCK_K=block_k, num_stages=tile.num_stages, **wide,
            )  # fmt: skip
        # each row's entries within this slab
        entry = lists.row_offsets[:-1] + active[:, :first].sum(1)
        stop = entry + active[:, first:last].sum(1)
        combine_kernel[(n * triton.cdiv(h, 1024),)](
            part, part_mass, entry, stop, lists.entry_tile, lists.entry_slot, lists.shift, acc, computed, base, v, h,
            ADD=first > 0, COLUMNS=width, TILE=TILE, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        del part
    if bias_sums is not None:
        sums_kernel[(last - first,)](
            part_bias, blocks, bias_sums[first:last], WIDTH=width, BLOCK=4, enable_fp_fusion=False
        )
    if dweight is not None and columns is not None:
        lines = torch.argsort(blocks.diff(), descending=True, stable=True) + first
        height, step = min(block_m, TILE), min(block_k, block_m)
        columns_kernel[(len(lines) * (width // height) * heights,)](
            operand(dz, step, height), x, lines, lists.offsets, lists.shift, lists.slot_row,
            columns.by_target, columns.cuts, target, batch.target_gradient, columns.spread, batch.inverse, dweight,
            base, v, h, x.stride(0), dweight.stride(0), heights,
            ADD=wanted.add, BLOCK_C=height, BLOCK_K=step, TILE=TILE, num_stages=list_tile.num_stages, **wide,
        )  # fmt: skip
    return dz, part_mass
