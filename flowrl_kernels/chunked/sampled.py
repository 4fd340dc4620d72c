"""The sampled backward: compute a random part of the pairs, unbiased (docs/maths.md, eq. 24).

A pair is a row and a run of 128 columns. Every pair is given the softmax mass that the forward's statistics tell of,
spread evenly over its run; a kept pair then has the difference to what it really is, times the inverse of the
probability with which it was kept. So the expectation of every gradient is the exact one, whatever the statistics are
worth, and no error leans to one side, which is what grows on its way through a backbone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked import sampling, tiles
from flowrl_kernels.chunked.routing import run_mass
from flowrl_kernels.chunked.tiles import Rows, Sinks
from flowrl_kernels.core.types import TILE, Budget, Draw, Head

ROWS = 256  # rows whose random numbers are in memory at once
FALL_BACK = 0.65  # share from which the exact path is as fast on a CPU, measured (docs/benchmarks/sampled.md)


class Plan(NamedTuple):
    mass: Tensor  # [R, runs] non-target softmax mass that each pair is given before the draw
    factor: Tensor  # [R, runs] inverse probability of the pairs that are kept, 0 of the others
    tau: Tensor  # fp64 scalar


def make_plan(
    gradient: Tensor,  # [R] |grad| * logit_scale / temperature
    lse: Tensor,  # [R]
    tile_lse: Tensor,  # [runs, R]
    target: Tensor,  # [R]
    target_logp: Tensor,  # [R]
    draw: Draw,
    live: Tensor | None = None,  # [R] rows that take part, all if None; the others have gradient 0
) -> Plan:
    """A pair's cost is its gradient mass: |grad| times the softmax mass that it is given."""
    num_rows, num_runs = len(lse), len(tile_lse)
    mass = gradient.new_empty((num_rows, num_runs))
    cost = torch.empty_like(mass)
    blocks = [slice(low, low + ROWS) for low in range(0, num_rows, ROWS)]
    tiny = torch.finfo(mass.dtype).tiny
    for own in blocks:
        found = run_mass(lse[own], tile_lse[:, own], target[own], target_logp[own])
        # the statistics round up: scaled to what the row really has, which is 0 for a row that is certain
        share = -torch.expm1(target_logp[own]) / found.sum(1).clamp_min_(tiny)
        mass[own] = found.mul_(share[:, None])
        cost[own] = found.mul_(gradient[own, None]).nan_to_num_(0.0, 0.0, 0.0)  # what is not finite is so by its mass
    tau = sampling.threshold(cost, draw.share, live, draw.group)
    assert draw.rows is not None
    factor = cost
    for own in blocks:
        chance = sampling.chances(cost[own], tau)
        kept = sampling.uniform(draw.key, draw.rows[own], num_runs) < chance
        factor[own] = torch.where(kept, sampling.ONE / chance.clamp_min_(1).to(factor.dtype), 0.0)
    return Plan(mass, factor, tau)


class Tally(NamedTuple):
    """What the draw tells of its own error, fp64 scalars: sums of squares of entries of dlogits."""

    variance: Tensor  # expected square of the error
    square: Tensor  # of dlogits

    def relative(self) -> Tensor:
        return (self.variance / self.square.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def sampled_backward(
    rows: Rows,  # every one active, none with an entropy gradient
    head: Head,  # without softcap
    tile_lse: Tensor,  # [ceil(V/128), R] of runs in the draw's order
    budget: Budget,  # with a draw whose rows are named
    into: Sinks,
) -> bool:
    """Fills the gradients and the report; False, with nothing done, if the exact path is the better one."""
    draw = budget.draw
    assert draw is not None
    if draw.share >= FALL_BACK:
        return False
    target = rows.target
    target_logp = rows.logp.masked_fill(target == len(head.weight), -torch.inf).clamp_max(0.0)
    lse = rows.lse.sum(0)[:, 0]  # the statistics are fp16: nothing there to keep apart
    live = None if tiles.host_knows(rows.x) else rows.scale[:, 0] != 0
    plan = make_plan(rows.scale[:, 0].abs(), lse, tile_lse, target, target_logp, draw, live)
    tally = _compute(plan, rows._replace(logp=target_logp), head, draw.order, into)
    pairs = max(plan.factor.numel(), 1) if live is None else (live.sum() * len(tile_lse)).clamp_min(1)
    share = (plan.factor > 0.0).sum(dtype=torch.float64) / pairs
    budget.tell(torch.nan, share, False, tally.relative())
    return True


def _compute(plan: Plan, rows: Rows, head: Head, order: Tensor | None, into: Sinks) -> Tally:
    x, target, temperature, target_logp, lse, scale, _, _, inverse = rows
    weight, bias, (dhidden, dweight, main_grad, dbias) = head.weight, head.bias, into
    (num_rows, hidden_size), vocab_size, num_runs = x.shape, len(weight), plan.mass.shape[1]
    dtype, need_weight = scale.dtype, dweight is not None or main_grad is not None
    target_gradient = scale * -torch.expm1(target_logp)[:, None]  # [R, 1] entry of dlogits at the target
    # a kept pair takes back `factor` times what it was given
    given = (1.0 - plan.factor).mul_(plan.mass).mul_(scale)  # [R, runs] to be spread over the run, negated
    spread = x.new_zeros((num_runs, hidden_size), dtype=dtype)
    if need_weight:
        for low in range(0, num_rows, ROWS):
            spread.addmm_(given[low : low + ROWS].T, x[low : low + ROWS].to(dtype))
    bias_spread = given.sum(0) if dbias is not None else None
    mean_rows = torch.zeros_like(spread)
    factor_by_run = plan.factor.T.contiguous()  # [runs, R]
    kept = factor_by_run > 0.0
    row_lists = kept.nonzero()[:, 1].split(kept.sum(1).tolist())  # rows of each run, rising
    by_target = torch.argsort(target, stable=True)
    edges = torch.arange(0, vocab_size + TILE, TILE, device=target.device).clamp_max_(vocab_size)
    cuts = torch.searchsorted(target[by_target], edges).tolist()
    acc = x.new_zeros((num_rows, hidden_size), dtype=dtype) if dhidden is not None else None
    width = torch.full((num_runs,), float(TILE), dtype=dtype, device=x.device)
    width[-1] = vocab_size - TILE * (num_runs - 1)
    variance, square = (x.new_zeros(num_runs, dtype=torch.float64) for _ in range(2))
    over_sum = lse[1].neg().exp()  # [R, 1]
    with tiles.exact_products():
        for run, (start, stop) in enumerate(tiles.column_tiles(vocab_size, TILE)):
            columns = slice(start, stop) if order is None else order[start:stop]
            w = tiles.operand(weight[columns])
            mean_rows[run] = w.mean(0, dtype=dtype)
            part, mine = None, row_lists[run]
            if len(mine) > 0:
                x_rows = x[mine]
                z = tiles.logits_tile(x_rows, w, None if bias is None else bias[columns], head.logit_scale, None)
                row_temperature = temperature if temperature.numel() == 1 else temperature[mine]
                p = tiles.divide_by_temperature(z, row_temperature).sub_(lse[0, mine]).exp_().mul_(over_sum[mine])
                local = (target[mine] - start)[:, None]
                outside = (local < 0) | (local >= stop - start)
                local = local.clamp(0, stop - start - 1)
                p.scatter_(1, local, torch.where(outside, p.gather(1, local), 0.0))  # the target's entry goes by itself
                factor, mass, amount = factor_by_run[run, mine], plan.mass[mine, run], scale[mine, 0]
                own = p.square().sum(1)
                even = mass.square() / width[run]
                off = own - 2.0 * mass * p.sum(1) / width[run] + even  # square of what the draw adds, times factor
                variance[run] = (amount.square() * factor * (factor - 1.0) * off).sum(dtype=torch.float64)
                square[run] = (amount.square() * factor * (own - even)).sum(dtype=torch.float64)
                dz = p.mul_((-amount * factor)[:, None])
                if dbias is not None:
                    dbias[columns] += dz.sum(0)
                dz = dz.to(x.dtype)
                if acc is not None:
                    acc.index_add_(0, mine, tiles.product(dz, w))
                if need_weight:
                    part = tiles.product(dz.T, x_rows)
            here = by_target[cuts[run] : cuts[run + 1]]  # rows whose target is in this run
            if dbias is not None and bias_spread is not None:
                each = (-bias_spread[run] / width[run]).expand(stop - start).clone()
                tiles.add_rows(each, target[here] - start, target_gradient[here, 0])
                dbias[columns] += each
            if need_weight:
                part = w.new_zeros(w.shape, dtype=dtype) if part is None else part
                part -= spread[run] / width[run]
                tiles.add_rows(part, target[here] - start, target_gradient[here] * x[here].to(dtype))
                part = part if inverse is None else part.mul_(inverse)
                if main_grad is not None:
                    main_grad[columns] += part
                elif dweight is not None:
                    dweight[columns] = part.to(dweight.dtype)
    if acc is not None:
        place = target.clamp_max(vocab_size - 1)
        target_rows = weight.index_select(0, place if order is None else order[place])
        acc.addmm_(given, mean_rows, alpha=-1.0)
        acc += target_gradient * target_rows.to(dtype)
        assert dhidden is not None
        dhidden.copy_(acc)
    at_target = target_gradient.double().square().sum()
    spread_evenly = ((plan.mass * scale).square() / width).sum(dtype=torch.float64)
    return Tally(variance.sum(), square.sum() + spread_evenly + at_target)
