"""The bounded backward in Triton: the definition is `flowrl_kernels.chunked.bounded` (docs/maths.md, eq. 19).

Rows are sorted by their non-target gradient mass and cut into blocks; a pair is a row block and a vocabulary tile of
128 columns. The lightest pairs of the batch are dropped while the bound lasts. The others are recomputed into compact
dz tiles, a slab of the vocabulary at a time, and turned into dhidden by the list of each row block (CSR) and into
dweight by the list of each tile (CSC): every output has one program, every sum one order, no atomics. Target entries
go by themselves, as a gather for dhidden and as a product over the rows sorted by target for dweight.

2NHV + s 6NHV FLOP with the forward, s the share of active pairs. Memory beyond the gradients: hidden in the plan's
order and dhidden in fp32 as in the exact backward, dz of at most SLAB_BYTES, and the owed masses, the size of the
tile statistics. The host waits once: for whether it pays, and where each tile's list begins.
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
from flowrl_kernels.chunked.bounded import Plan, make_plan
from flowrl_kernels.chunked.routing import SLACK, BlockLists
from flowrl_kernels.triton import tiles
from flowrl_kernels.triton.bounded_kernels import (
    columns_kernel,
    costs_kernel,
    finish_kernel,
    owed_kernel,
    pairs_kernel,
    rows_kernel,
    sums_kernel,
    target_kernel,
)
from flowrl_kernels.triton.matmul import matmul_into
from flowrl_kernels.triton.primitives import gather_rows
from flowrl_kernels.types import TILE

# Share of active pairs above which the exact backward is taken. Its products run at cuBLAS's rate, those over lists at
# an assumed 0.65 of it (not yet measured on hardware); the plan and the correction take the rest.
FALL_BACK = 0.5
SLAB_BYTES = 2 << 30  # of dz at a time
RUNS = 32  # runs of tile statistics a step


class Batch(NamedTuple):
    """Rows in the plan's order; those that take no part come last."""

    order: Tensor  # [N]
    count: Tensor  # [1] rows that take part
    x: Tensor  # [N, H], 0 in rows that take no part
    target: Tensor  # [N]; V where the row has none
    target_logp: Tensor  # [N]
    target_gradient: Tensor  # [N] entry of dlogits at the target, times the float16 factor
    lse: Tensor  # [N]; inf in rows that take no part
    factor: Tensor  # [N] logit_scale / temperature
    scale: Tensor  # [N] gradient by the products, times the float16 factor


def route(device: torch.device) -> ModuleType:
    """Where thresholds and lists come from: the compiled library where it is built, else torch. The same lists."""
    if device.type == "cuda" and cuda.status()[0]:
        from flowrl_kernels.cuda import routing as compiled

        return compiled
    return routing


def read_plan(plan: Plan, lists: BlockLists) -> tuple[bool, list[int]]:
    """Whether it pays, and the first slot of each tile: the one time the host waits in a bounded backward."""
    pays = (plan.share <= FALL_BACK) & plan.bound.isfinite()  # a NaN in the inputs goes the exact way
    values = torch.cat([pays.long()[None], lists.block_offsets]).tolist()
    return bool(values[0]), values[1:]


def tile_costs(tile_lse, lse, target, target_logp, gradient, order, block_rows, tile_runs) -> tuple[Tensor, Tensor]:
    """`chunked.routing.tile_costs` for tiles of one run."""
    assert tile_runs == 1
    num_runs, n = tile_lse.shape
    cost = torch.empty((triton.cdiv(n, block_rows), num_runs), dtype=torch.float64, device=lse.device)
    square = torch.empty_like(cost)
    costs_kernel[(cost.shape[0] * triton.cdiv(num_runs, RUNS),)](
        tile_lse, lse, target, target_logp, gradient, order, cost, square, n, num_runs, SLACK,
        BLOCK_M=block_rows, RUNS=RUNS, TILE=TILE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return cost, square


def bounded_backward(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]; -1 skips the row, V means no target here
    bias: Tensor | None,  # [V]
    temperature: Tensor,  # [N] or [1]
    logit_scale: float,
    lse: Tensor,  # [N]
    tile_lse: Tensor,  # [ceil(V/128), N]
    epsilon: float,
    report: Tensor | None,  # [3]
    tile: tiles.Tile,
    fp16_factor: Tensor | None,  # [1] power of two that dz is multiplied by
    dweight: Tensor | None,  # [V, H] written, or with `add` added to
    add: bool,
    need_hidden: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None] | None:
    """dhidden [N, H] and dbias [V] fp32, each None if not needed; None, with nothing done, if exact is the better one.

    N is at least 1. `report` is written where the bounded path is taken.
    """
    n, h = hidden.shape
    v, device = weight.shape[0], hidden.device
    live = (target >= 0) & (grad_logp != 0)
    target = torch.where(live, target, v)
    factor = (torch.full_like(temperature, logit_scale) / temperature).expand(n)
    scale = torch.where(live, grad_logp * factor, 0.0)
    target_logp = torch.empty(n, dtype=torch.float32, device=device)
    target_kernel[(triton.cdiv(n, 64),)](
        hidden, weight, bias, target, temperature, lse, target_logp,
        n, v, h, hidden.stride(0), weight.stride(0), int(temperature.shape[0] > 1), logit_scale,
        BLOCK=64, BLOCK_K=min(tile.block_k, 64), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    chosen = route(device)
    plan = make_plan(
        scale.abs(), lse, tile_lse, target, target_logp, epsilon, tile.block_m, TILE, live, tile_costs,
        chosen.drop_lightest,
    )  # fmt: skip
    lists = BlockLists(*chosen.block_lists(plan.active.T.contiguous()))  # "blocks" of these lists are tiles
    pays, offsets = read_plan(plan, lists)
    if not pays:
        return None
    if report is not None:
        report.copy_(torch.stack([plan.bound, plan.share, torch.zeros_like(plan.share)]))
    order, count = plan.order, live.sum().view(1)
    inverse = None
    if fp16_factor is not None:
        scale, inverse = scale * fp16_factor, 1.0 / fp16_factor
    batch = Batch(
        order,
        count,
        gather_rows(hidden, order, count),
        target[order],
        target_logp[order],
        (scale * -torch.expm1(target_logp))[order],
        torch.where(live, lse, torch.inf)[order],
        factor[order],
        scale[order],
    )
    return _compute(
        batch, plan.active, lists, offsets, weight, bias, tile_lse, tile, inverse, dweight, add, need_hidden, need_bias
    )


def _owed(batch: Batch, active: Tensor, tile_lse: Tensor, amount: Tensor, block_rows: int, dropped: bool) -> Tensor:
    """`amount` of each row over its dropped runs, in proportion to their masses. [N, runs rounded up to 8]"""
    n, num_runs = len(amount), len(tile_lse)
    out = torch.empty((n, triton.cdiv(num_runs, 8) * 8), dtype=batch.x.dtype, device=amount.device)
    owed_kernel[(triton.cdiv(n, 32),)](
        tile_lse, batch.order, active.view(torch.uint8), batch.lse, batch.target, batch.target_logp, amount, out,
        n, num_runs, block_rows, out.stride(0), SLACK,
        DROPPED=dropped, BLOCK_M=32, RUNS=RUNS, TILE=TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _slabs(offsets: list[int], most: int) -> list[tuple[int, int]]:
    """Neighbouring tiles of together at most `most` pairs (at least one tile)."""
    slabs, first = [], 0
    for tile in range(1, len(offsets) - 1):
        if offsets[tile + 1] - offsets[first] > most:
            slabs.append((first, tile))
            first = tile
    return [*slabs, (first, len(offsets) - 1)]


def _run_means(weight: Tensor, rows: int) -> Tensor:
    """Mean row of each run of TILE columns, in weight's dtype; zeros up to `rows`. [rows, H]"""
    v, h = weight.shape
    means = torch.zeros((rows, h), dtype=weight.dtype, device=weight.device)
    whole = v // TILE
    means[:whole] = weight[: whole * TILE].unflatten(0, (whole, TILE)).mean(1, dtype=torch.float32)
    if v % TILE:
        means[whole] = weight[whole * TILE :].mean(0, dtype=torch.float32)
    return means


def _compute(
    batch: Batch, active: Tensor, lists: BlockLists, offsets: list[int], weight: Tensor, bias: Tensor | None,
    tile_lse: Tensor, tile: tiles.Tile, inverse: Tensor | None, dweight: Tensor | None, add: bool,
    need_hidden: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    order, count, x, target, _, target_gradient, _, _, scale = batch
    (n, h), v, device = x.shape, weight.shape[0], x.device
    num_blocks, num_tiles = active.shape
    new = {"dtype": torch.float32, "device": device}
    acc = torch.empty(n, h, **new) if need_hidden else None
    computed = torch.zeros(num_blocks, tile.block_m, **new)  # non-target mass that was computed, per row
    bias_sums = torch.zeros(num_tiles if need_bias else 0, TILE, **new)
    spread = bias_spread = None
    if dweight is not None or need_bias:  # by the statistics: what was computed is known only after the last slab
        owed = _owed(batch, active, tile_lse, target_gradient, tile.block_m, dropped=False)
        if need_bias:
            bias_spread = owed.sum(0, dtype=torch.float32)[:num_tiles]
        if dweight is not None:
            spread = torch.empty(owed.shape[1], h, **new)
            matmul_into(spread, owed.t(), x, add=False)
        del owed
    for first, last in _slabs(offsets, max(1, SLAB_BYTES // (tile.block_m * TILE * x.element_size()))):
        _slab(
            batch, active, lists, first, last, offsets[first], offsets[last], weight, bias, tile, inverse, spread,
            acc, computed, bias_sums if need_bias else None, dweight, add,
        )  # fmt: skip
    dhidden = dbias = None
    if acc is not None:
        rest = -torch.expm1(batch.target_logp)
        still = (rest - computed.view(-1)[:n]).clamp_min_(0.0) * -scale  # exactly what each row still owes
        owed = _owed(batch, active, tile_lse, still, tile.block_m, dropped=True)
        matmul_into(acc, owed, _run_means(weight, owed.shape[1]), add=True)
        dhidden = torch.empty(n, h, dtype=x.dtype, device=device)
        finish_kernel[(n,)](
            acc, weight, order, count, target, target_gradient, inverse, dhidden, v, h, weight.stride(0), BLOCK=1024
        )
    if bias_spread is not None:
        width = torch.full((num_tiles, 1), float(TILE), **new)
        width[-1:] = v - TILE * (num_tiles - 1)
        bias_sums -= bias_spread[:, None] / width
        # sorted on a GPU, sequential on a CPU: a fixed order; the one past the last column takes what has no target
        dbias = torch.nn.functional.pad(bias_sums.view(-1)[:v], (0, 1))
        dbias.index_put_((target,), target_gradient, accumulate=True)
        dbias = dbias[:v] if inverse is None else dbias[:v] * inverse
    return dhidden, dbias


def _slab(
    batch: Batch, active: Tensor, lists: BlockLists, first: int, last: int, base: int, end: int, weight: Tensor,
    bias: Tensor | None, tile: tiles.Tile, inverse: Tensor | None, spread: Tensor | None, acc: Tensor | None,
    computed: Tensor, bias_sums: Tensor | None, dweight: Tensor | None, add: bool,
) -> None:  # fmt: skip
    """The tiles from `first` to `last`, whose active pairs are the slots from `base` to `end`."""
    x, target = batch.x, batch.target
    (n, h), v, device = x.shape, weight.shape[0], x.device
    pairs, pair_tile, list_tile = end - base, tiles.pair_tile(tile), tiles.list_tile(tiles.arch_of(device), tile)
    (block_m, block_n, block_k), row_step = tile[:3], min(tile.block_k, tile.block_m)
    dz = torch.empty(max(pairs, 1) * block_m, TILE, dtype=x.dtype, device=device)
    part_rows = torch.empty(pairs, block_m, dtype=torch.float32, device=device)
    part_columns = torch.empty(pairs if bias_sums is not None else 0, TILE, dtype=torch.float32, device=device)

    def operand(tensor: Tensor, *block: int):
        return TensorDescriptor.from_tensor(tensor, list(block)) if tile.descriptor else tensor

    # the lists within this slab
    offsets, slot_block = lists.block_offsets, lists.block_tiles
    before = lists.tile_offsets[:-1]
    begin = before + active[:, :first].sum(1)
    stop = begin + active[:, first:last].sum(1)
    tile_lengths = offsets[first + 1 : last + 1] - offsets[first:last]
    if pairs > 0:
        slot_tile = torch.arange(first, last, dtype=torch.int32, device=device)
        slot_tile = slot_tile.repeat_interleave(tile_lengths, output_size=pairs)
        # row blocks in groups that stay in L2, a group through its tiles together
        group = tiles.group_rows(h, x.element_size(), tile)
        raster = torch.argsort((slot_block[base:end] // group) * len(tile_lengths) + (slot_tile - first), stable=True)
        pairs_kernel[(pairs,)](
            operand(x, block_m, pair_tile.block_k), operand(weight, TILE, pair_tile.block_k), bias,
            raster, slot_block[base:end], slot_tile, target, batch.lse, batch.factor, batch.scale,
            operand(dz, block_m, TILE), part_rows, part_columns, n, v, h, x.stride(0), weight.stride(0),
            BIAS=bias_sums is not None, DESCRIPTOR=tile.descriptor, EVEN_K=h % pair_tile.block_k == 0,
            BLOCK_M=block_m, BLOCK_K=pair_tile.block_k, TILE=TILE,
            num_warps=pair_tile.num_warps, num_stages=pair_tile.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    heights = triton.cdiv(h, block_n)
    shared = {"DESCRIPTOR": tile.descriptor, "BLOCK_M": block_m, "BLOCK_H": block_n, "TILE": TILE}
    shared |= {"num_warps": tile.num_warps, "num_stages": list_tile.num_stages, "enable_fp_fusion": False}
    if acc is not None:
        sums_kernel[(len(active),)](part_rows, begin, stop, lists.tile_slots, computed, base, WIDTH=block_m, BLOCK=32)
        lines = torch.argsort(stop - begin, descending=True, stable=True)  # the longest first: they end together
        rows_kernel[(len(lines) * heights,)](
            operand(dz, block_m, block_k), operand(weight, block_k, block_n), lines, begin, stop,
            lists.tile_blocks, lists.tile_slots, acc, base, n, v, h, weight.stride(0), heights,
            ADD=first > 0, BLOCK_K=block_k, **shared,
        )  # fmt: skip
    if bias_sums is not None:
        sums_kernel[(last - first,)](
            part_columns, offsets[first:last], offsets[first + 1 : last + 1], None, bias_sums[first:last], base,
            WIDTH=TILE, BLOCK=32,
        )  # fmt: skip
    if dweight is not None:
        by_target = torch.argsort(target, stable=True)
        edges = torch.arange(0, (len(offsets) - 1) * TILE + 1, TILE, device=device).clamp_max_(v)
        cuts = torch.searchsorted(target[by_target], edges)
        work = tile_lengths * block_m + cuts[first + 1 : last + 1] - cuts[first:last]
        lines = torch.argsort(work, descending=True, stable=True) + first
        parts = TILE // min(block_m, TILE)
        columns_kernel[(len(lines) * parts * heights,)](
            operand(dz, row_step, TILE // parts), operand(x, row_step, block_n), x, lines, offsets, slot_block,
            by_target, cuts, target, batch.target_gradient, spread, inverse, dweight,
            base, n, v, h, dweight.stride(0), heights, parts,
            ADD=add, BLOCK_C=TILE // parts, BLOCK_K=row_step, **shared,
        )  # fmt: skip
