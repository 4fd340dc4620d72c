"""The bounded backward: leave out softmax mass that the forward's statistics prove to be light (docs/maths.md).

A pair is a row and a vocabulary tile. The lightest pairs of the batch are dropped while the relative L1 error of
dlogits stays at most epsilon; a tile then multiplies the rows that still need it and no others. What was dropped is
given back as the tile's mean weight row, so every row of dlogits still sums to zero. Target entries never depend on a
tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked import routing, tiles
from flowrl_kernels.chunked.routing import SLACK, run_mass
from flowrl_kernels.chunked.tiles import Rows, Sinks
from flowrl_kernels.core.types import TILE, Budget, Head

COLUMNS = 1024  # vocabulary columns of one tile
ROWS = 256  # rows whose dropped masses are in memory at once
FALL_BACK = 0.6  # share of pairs above which the dense path is faster on a CPU (6NHV against s * 6NHV + overhead)
L2_SHARE = 0.2  # second budget: relative L2 error of dlogits, before the correction, in units of epsilon


class Plan(NamedTuple):
    active: Tensor  # [R, tiles] bool: pairs to compute
    bound: Tensor  # scalar: relative L1 error of dlogits that the dropped pairs can cause
    share: Tensor  # scalar: active pairs / all pairs


def make_plan(
    gradient: Tensor,  # [R] |grad| * logit_scale / temperature
    lse: Tensor,  # [R]
    tile_lse: Tensor,  # [runs, R]
    target: Tensor,  # [R]
    target_logp: Tensor,  # [R]
    epsilon: float,
    columns: int = COLUMNS,
    live: Tensor | None = None,  # [R] rows that take part, all if None; the others have gradient 0
    tile_costs: Callable[..., tuple[Tensor, Tensor]] = routing.tile_costs,
    drop_lightest: Callable[..., tuple[Tensor, Tensor]] = routing.drop_lightest,
) -> Plan:
    """Drop pairs batch-wide, those with the least squared mass first, while both budgets last: epsilon of the L1
    norm of dlogits, and L2_SHARE * epsilon of its L2 norm (one heavy entry costs more than a thin tail)."""
    rest = -torch.expm1(target_logp)  # [R] non-target mass
    rest_low = (rest - SLACK).clamp_min_(0.0)
    cost, square = tile_costs(tile_lse, lse, target, target_logp, gradient, columns // TILE)  # [R, tiles]
    norm = (2.0 * gradient * rest_low).sum(dtype=torch.float64)
    square_norm = (gradient * rest_low).double().square().sum()  # of the target entries alone: a lower bound
    active, spent = drop_lightest(cost, square, torch.stack([epsilon * norm, (L2_SHARE * epsilon) ** 2 * square_norm]))
    bound = spent[0] / norm.clamp_min(torch.finfo(torch.float64).tiny)
    pairs = active.numel() if live is None else (live.sum() * active.shape[1]).clamp_min(1)
    return Plan(active, bound, active.sum(dtype=torch.float64) / pairs)


def bounded_backward(
    rows: Rows,  # every one active, none with an entropy gradient
    head: Head,  # without softcap
    tile_lse: Tensor,  # [ceil(V/128), R]
    budget: Budget,
    into: Sinks,
) -> bool:
    """Fills the gradients and the report; False, with nothing done, if the exact path is the better one."""
    x, target, _, logp, lse_parts, scale, *_ = rows
    vocab_size = len(head.weight)
    target_logp = logp.masked_fill(target == vocab_size, -torch.inf).clamp_max(0.0)
    lse = lse_parts.sum(0)[:, 0]  # the statistics are fp16: nothing there to keep apart
    live = None if tiles.host_knows(x) else scale[:, 0] != 0
    plan = make_plan(scale[:, 0].abs(), lse, tile_lse, target, target_logp, budget.epsilon, COLUMNS, live)
    pays = bool(plan.share <= FALL_BACK)  # the one host sync of a bounded backward
    if not pays:
        return False
    budget.tell(plan.bound, plan.share, False)
    _compute(plan.active, rows._replace(logp=target_logp), head, lse, tile_lse, into)
    return True


def _compute(active: Tensor, rows: Rows, head: Head, lse: Tensor, tile_lse: Tensor, into: Sinks) -> None:
    x, target, temperature, target_logp, lse_parts, scale, _, _, inverse = rows
    weight, bias, dhidden, dweight, main_grad, dbias = head.weight, head.bias, *into
    vocab_size = weight.shape[0]
    num_rows, hidden_size = x.shape
    target_rows = tiles.operand(weight.index_select(0, target.clamp_max(vocab_size - 1)))  # [R, H]
    rest = -torch.expm1(target_logp)[:, None]  # [R, 1] non-target mass
    target_gradient = scale * rest  # entry of dlogits at the target
    need_weight = dweight is not None or main_grad is not None

    def dropped(own: slice) -> Tensor:
        """Share of each row's non-target mass per dropped run, 0 in runs that are computed. [ROWS, runs]"""
        mass = run_mass(lse[own], tile_lse[:, own], target[own], target_logp[own])
        total = mass.sum(1, keepdim=True)  # the statistics round up: scale them to what the row really has
        kept = active[own].repeat_interleave(COLUMNS // TILE, 1)[:, : mass.shape[1]]
        return mass.masked_fill_(kept, 0.0).div_(total)

    blocks = [slice(low, low + ROWS) for low in range(0, num_rows, ROWS)]
    spread = x.new_zeros((len(tile_lse), hidden_size), dtype=lse.dtype)  # [runs, H] what dropped runs owe dweight
    bias_spread = x.new_zeros(len(tile_lse), dtype=lse.dtype)
    if need_weight or dbias is not None:
        for own in blocks:
            owed = dropped(own).mul_(target_gradient[own])
            spread.addmm_(owed.T, x[own].to(lse.dtype))
            bias_spread += owed.sum(0)
    by_target = torch.argsort(target, stable=True)
    edges = torch.arange(0, vocab_size + COLUMNS, COLUMNS, device=target.device).clamp_max_(vocab_size)
    cuts = torch.searchsorted(target[by_target], edges).tolist()
    row_lists = active.T.nonzero()[:, 1].split(active.sum(0).tolist())  # rows of each tile, rising
    acc = x.new_zeros((num_rows, hidden_size), dtype=lse.dtype) if dhidden is not None else None
    computed = x.new_zeros(num_rows, dtype=lse.dtype)  # non-target mass that was computed, per row
    mean_rows = torch.zeros_like(spread)
    with tiles.exact_products():
        for tile, (start, stop) in enumerate(tiles.column_tiles(vocab_size, COLUMNS)):
            w = tiles.operand(weight[start:stop])
            runs = slice(start // TILE, -(-stop // TILE))
            if acc is not None:
                mean_rows[runs] = _run_means(w, lse.dtype)
            part = None
            mine = row_lists[tile]
            if len(mine) > 0:
                x_rows = x[mine]
                z = tiles.logits_tile(x_rows, w, None if bias is None else bias[start:stop], head.logit_scale, None)
                row_temperature = temperature if temperature.numel() == 1 else temperature[mine]
                shifted = tiles.divide_by_temperature(z, row_temperature).sub_(lse_parts[0, mine])
                p = shifted.exp_().mul_(lse_parts[1, mine].neg().exp())
                local = (target[mine] - start)[:, None]
                outside = (local < 0) | (local >= stop - start)
                local = local.clamp(0, stop - start - 1)
                p.scatter_(1, local, torch.where(outside, p.gather(1, local), 0.0))  # the target's entry goes by itself
                computed[mine] += p.sum(1)
                dz = p.mul_(-scale[mine])
                if dbias is not None:
                    dbias[start:stop] += dz.sum(0)
                dz = dz.to(x.dtype)
                if acc is not None:
                    acc[mine] += tiles.product(dz, w)
                if need_weight:
                    part = tiles.product(dz.T, x_rows)
            here = by_target[cuts[tile] : cuts[tile + 1]]  # rows whose target is in this tile
            if dbias is not None:
                dbias[start:stop] -= _per_column(bias_spread[runs, None], stop - start)[:, 0]
                tiles.add_rows(dbias, target[here], target_gradient[here, 0])
            if need_weight:
                part = w.new_zeros(w.shape, dtype=lse.dtype) if part is None else part
                part -= _per_column(spread[runs], stop - start)
                tiles.add_rows(part, target[here] - start, target_gradient[here] * x[here].to(lse.dtype))
                part = part if inverse is None else part.mul_(inverse)
                if main_grad is not None:
                    main_grad[start:stop] += part
                elif dweight is not None:
                    dweight[start:stop] = part
    if acc is not None:
        for own in blocks:
            part = dropped(own)
            part.div_(part.sum(1, keepdim=True).clamp_min_(torch.finfo(lse.dtype).tiny))
            owed = (rest[own] - computed[own, None]).clamp_min_(0.0) * scale[own]  # exactly what each row still owes
            acc[own] -= part.mul_(owed) @ mean_rows
        acc += target_gradient * target_rows.to(lse.dtype)
        assert dhidden is not None
        dhidden.copy_(acc)


def _run_means(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean row of each run of TILE columns. [runs, H]"""
    whole = w.shape[0] // TILE * TILE
    means = w[:whole].view(-1, TILE, w.shape[1]).mean(1, dtype=dtype)
    return means if whole == w.shape[0] else torch.cat([means, w[whole:].mean(0, keepdim=True, dtype=dtype)])


def _per_column(total: Tensor, columns: int) -> Tensor:
    """Each run's total spread evenly over its columns. [runs, H] -> [C, H]"""
    width = torch.full((len(total), 1), float(TILE), dtype=total.dtype, device=total.device)
    width[-1] = columns - TILE * (len(total) - 1)
    return (total / width).repeat_interleave(TILE, 0)[:columns]
