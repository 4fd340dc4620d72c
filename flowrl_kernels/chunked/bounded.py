"""The bounded backward: leave out softmax mass that the forward's statistics prove to be light (docs/maths.md).

Rows are sorted by their non-target gradient mass, cut into blocks, and the lightest (row block, vocabulary tile)
pairs are dropped while the relative L1 error of dlogits stays at most epsilon. What was dropped is given back as
the tile's mean weight row, so every row of dlogits still sums to zero. Target entries never depend on a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles
from flowrl_kernels.types import TILE

ROWS = 64  # rows of one block
COLUMNS = 1024  # vocabulary columns of one tile
FALL_BACK = (
    0.6  # share of tiles above which the dense path is faster on a CPU (6NHV against s * 6NHV + overhead)
)
SLACK = 2e-5  # more than the rounding of a recomputed log-prob: keeps the bound on the safe side


class Plan(NamedTuple):
    order: Tensor  # [R] rows by rising non-target gradient mass
    active: Tensor  # [blocks, tiles] bool: pairs to compute
    mass: Tensor  # [R, tiles] bound of the non-target mass, in the sorted order
    bound: Tensor  # scalar: relative L1 error of dlogits that the dropped pairs can cause
    share: Tensor  # scalar: active pairs / all pairs


def tile_mass(lse: Tensor, tile_lse: Tensor, columns: int) -> Tensor:
    """Upper bound of each row's softmax mass per tile of `columns` columns, from fp16 statistics. [R, tiles]"""
    group = columns // TILE
    parts = [
        (tile_lse[i : i + group].to(lse.dtype) - lse).exp_().sum(0) for i in range(0, len(tile_lse), group)
    ]
    return torch.stack(parts, 1).mul_(1.0 + SLACK).clamp_max_(1.0)


def make_plan(
    gradient: Tensor,  # [R] |grad| * logit_scale / temperature
    mass: Tensor,  # [R, tiles] upper bounds
    target_logp: Tensor,  # [R]
    target_tile: Tensor,  # [R] int64; `tiles` where the row has no target
    epsilon: float,
) -> Plan:
    """Choose the pairs to drop: all light pairs, batch-wide, that fit into epsilon of the whole gradient's L1 norm."""
    p_target = target_logp.exp()
    rest = -torch.expm1(target_logp)  # [R] non-target mass
    rest_low, rest_high = (rest - SLACK).clamp_min_(0.0), rest + SLACK
    has_target = target_tile < mass.shape[1]
    column = target_tile.clamp_max(mass.shape[1] - 1)[:, None]
    own = mass.gather(1, column) - torch.where(has_target, p_target * (1.0 - SLACK), 0.0)[:, None]
    mass = mass.scatter(1, column, own.clamp_min_(0.0))
    mass = torch.minimum(mass, rest_high[:, None])
    order = torch.argsort(gradient * rest_high, stable=True)
    mass, gradient, rest_low = mass[order], gradient[order], rest_low[order]
    blocks = -(-len(order) // ROWS)
    cost = torch.nn.functional.pad(mass * gradient[:, None], (0, 0, 0, blocks * ROWS - len(order)))
    cost = cost.view(blocks, ROWS, -1).sum(1, dtype=torch.float64)  # [blocks, tiles]
    norm = (2.0 * gradient * rest_low).sum(dtype=torch.float64)
    ordered, index = cost.flatten().sort(stable=True)
    spent = ordered.cumsum(0)
    dropped = spent <= epsilon * norm
    bound = (spent * dropped).max() / norm.clamp_min(torch.finfo(torch.float64).tiny)
    active = torch.ones_like(dropped).index_put_((index,), ~dropped).view_as(cost)
    return Plan(order, active, mass, bound, active.double().mean())


def bounded_backward(
    scale: Tensor,  # [R, 1] grad * logit_scale / temperature, every row active
    x: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [R]; V where the row has none
    bias: Tensor | None,  # [V]
    temperature: Tensor,  # [R, 1] or [1, 1]
    logit_scale: float,
    lse: Tensor,  # [R]
    tile_lse: Tensor,  # [ceil(V/128), R]
    epsilon: float,
    report: Tensor | None,  # [3]
    dhidden: Tensor | None,  # [R, H] zeros, accumulated into
    dweight: Tensor | None,  # [V, H] written
    main_grad: Tensor | None,  # [V, H] accumulated into
    dbias: Tensor | None,  # [V] accumulated into
) -> bool:
    """Fills the gradients and `report`; False, with nothing but `report` written, if the exact path is the better one."""
    vocab_size = weight.shape[0]
    has_target = target < vocab_size
    safe_target = target.clamp_max(vocab_size - 1)
    target_rows = tiles.operand(weight.index_select(0, safe_target))  # [R, H]
    target_logit = (x.to(lse.dtype) * target_rows.to(lse.dtype)).sum(1)
    if bias is not None:
        target_logit = target_logit + bias.to(lse.dtype)[safe_target]
    target_logp = target_logit * logit_scale / temperature[:, 0] - lse
    target_logp = target_logp.masked_fill(~has_target, -torch.inf).clamp_max_(0.0)
    mass = tile_mass(lse, tile_lse, COLUMNS)
    plan = make_plan(scale[:, 0].abs(), mass, target_logp, target // COLUMNS, epsilon)
    pays = bool(plan.share <= FALL_BACK)  # the one host sync of a bounded backward
    if report is not None:
        exact = report.new_tensor([0.0, 1.0, 1.0])
        report.copy_(torch.stack([plan.bound, plan.share, plan.share.new_zeros(())]) if pays else exact)
    if not pays:
        return False
    _compute(
        plan, scale, x, weight, target, target_logp, target_rows, bias, temperature, logit_scale, lse,
        dhidden, dweight, main_grad, dbias,
    )  # fmt: skip
    return True


def _compute(
    plan, scale, x, weight, target, target_logp, target_rows, bias, temperature, logit_scale, lse,
    dhidden, dweight, main_grad, dbias,
) -> None:  # fmt: skip
    order, vocab_size = plan.order, weight.shape[0]
    num_rows, hidden_size = x.shape
    x, scale, lse, target = x[order], scale[order], lse[order], target[order]
    temperature = temperature if temperature.numel() == 1 else temperature[order]
    target_gradient = scale * -torch.expm1(target_logp[order, None])  # [R, 1] entry of dlogits at the target
    kept = plan.active.repeat_interleave(ROWS, 0)[:num_rows]  # [R, tiles]
    dropped_mass = plan.mass.masked_fill(kept, 0.0)  # [R, tiles]
    # the statistics round up: scale the bounds so that a row's masses sum to what the row really has
    correction = dropped_mass * scale * (-torch.expm1(target_logp[order]) / plan.mass.sum(1))[:, None]
    by_target = torch.argsort(target, stable=True)
    edges = torch.arange(0, vocab_size + COLUMNS, COLUMNS, device=target.device).clamp_max_(vocab_size)
    cuts = torch.searchsorted(target[by_target], edges).tolist()
    block_lists = plan.active.T.tolist()
    need_weight = dweight is not None or main_grad is not None
    acc = x.new_zeros((num_rows, hidden_size), dtype=lse.dtype) if dhidden is not None else None
    computed = x.new_zeros(num_rows, dtype=lse.dtype)  # non-target mass that was computed, per row
    mean_rows = x.new_zeros((len(block_lists), hidden_size), dtype=lse.dtype)
    spread = (correction.T @ x.to(lse.dtype)) if need_weight else None  # [tiles, H]
    with tiles.exact_products():
        for tile, (start, stop) in enumerate(tiles.column_tiles(vocab_size, COLUMNS)):
            w = tiles.operand(weight[start:stop])
            if acc is not None:
                mean_rows[tile] = w.mean(0, dtype=lse.dtype)
            part = None
            rows = _rows_of(block_lists[tile], num_rows, x.device)
            if rows is not None:
                z = tiles.logits_tile(
                    x[rows], w, None if bias is None else bias[start:stop], logit_scale, None
                )
                row_temperature = temperature if temperature.numel() == 1 else temperature[rows]
                p = tiles.divide_by_temperature(z, row_temperature).sub_(lse[rows, None]).exp_()
                local = (target[rows] - start)[:, None]
                outside = (local < 0) | (local >= stop - start)
                local = local.clamp(0, stop - start - 1)
                p.scatter_(
                    1, local, torch.where(outside, p.gather(1, local), 0.0)
                )  # the target's entry goes by itself
                computed[rows] += p.sum(1)
                dz = p.mul_(-scale[rows])
                if dbias is not None:
                    dbias[start:stop] += dz.sum(0) / logit_scale
                dz = dz.to(x.dtype)
                if acc is not None:
                    acc[rows] += tiles.product(dz, w)
                if need_weight:
                    part = tiles.product(dz.T, x[rows])
            own = by_target[cuts[tile] : cuts[tile + 1]]
            if dbias is not None:
                dbias[start:stop] -= correction[:, tile].sum() / (logit_scale * (stop - start))
                dbias.index_add_(0, target[own], target_gradient[own, 0] / logit_scale)
            if need_weight:
                part = w.new_zeros(w.shape, dtype=lse.dtype) if part is None else part
                part -= spread[tile] / (stop - start)
                _add_rows(part, target[own] - start, target_gradient[own] * x[own].to(lse.dtype))
                if main_grad is not None:
                    main_grad[start:stop] += part
                else:
                    dweight[start:stop] = part
    if acc is not None:
        left = -torch.expm1(target_logp[order]) - computed  # exactly what each row still owes
        weights = dropped_mass / dropped_mass.sum(1, keepdim=True).clamp_min(torch.finfo(lse.dtype).tiny)
        acc -= scale * left.clamp_min_(0.0)[:, None] * (weights @ mean_rows)
        acc += target_gradient * target_rows[order].to(lse.dtype)
        dhidden[order] = acc


def _rows_of(active: list[bool], num_rows: int, device: torch.device) -> Tensor | slice | None:
    """Rows of the active blocks: a slice where they are neighbours, so that nothing is copied."""
    blocks = [i for i, on in enumerate(active) if on]
    if not blocks:
        return None
    if blocks[-1] - blocks[0] + 1 == len(blocks):
        return slice(blocks[0] * ROWS, min((blocks[-1] + 1) * ROWS, num_rows))
    rows = torch.cat([torch.arange(b * ROWS, min((b + 1) * ROWS, num_rows)) for b in blocks])
    return rows.to(device)


def _add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """into[index] += rows in a fixed order (index_add_ is sequential on a CPU, index_put_ sorts on a GPU)."""
    if into.device.type == "cpu":
        into.index_add_(0, index, rows)
    else:
        into.index_put_((index,), rows, accumulate=True)
