"""The sampled backward in Triton: the definition is `flowrl_kernels.chunked.sampled` (docs/maths.md, eq. 24).

Plan, pairs and factors are the definition's; what is kept goes through the kernels of the bounded backward, a tile
there being one run of 128 columns here. dz of a pair is multiplied by the pair's factor before it is rounded, and what
a pair was given before the draw is taken back by two small products, with the runs' mean rows and with the hidden
states.

2NHV + s 6NHV FLOP with the forward. Each pair's product with its run is written and read again, 8 H bytes for 256 H
FLOP: on an H200 5.7 times the time of its own product, so beyond a third of the pairs the exact backward is the faster
one by that arithmetic. Not yet measured on hardware. Memory beside the bounded backward's: masses and factors, N V / 16
bytes; with an order of the vocabulary a copy of the head in it, in the forward and in the backward. The host waits
once, for where each run's list begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.chunked.sampled import Plan, Tally, make_plan
from flowrl_kernels.chunked.sampling import threshold
from flowrl_kernels.core.types import TILE, Budget, Head, Saved
from flowrl_kernels.triton import bounded, tiles
from flowrl_kernels.triton.bounded import Accumulators, Batch, Columns, Lists, Wanted
from flowrl_kernels.triton.bounded_kernels import finish_kernel
from flowrl_kernels.triton.matmul import matmul_into

FALL_BACK = 0.3  # share from which the exact backward is taken, by the bytes above


def in_order(head: Head, order: Tensor) -> Head:
    """A head whose row i is the token order[i]: a copy, V H elements."""
    return head._replace(weight=head.weight[order], bias=None if head.bias is None else head.bias[order])


def by_id(values: Tensor | None, order: Tensor) -> Tensor | None:
    """Rows in the order back at their ids."""
    return None if values is None else torch.empty_like(values).index_copy_(0, order, values)


def sampled_backward(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]; -1 skips the row, V means no target here
    head: Head,  # without softcap
    saved: Saved,
    budget: Budget,  # with a draw whose rows are named
    tile: tiles.Tile,
    fp16_factor: Tensor | None,  # [1] power of two that dz is multiplied by
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None] | None:
    """dhidden [N, H] and dbias [V] fp32, each None if not needed; None, with nothing done, if exact is the better one.

    `report` is written where the sampled path is taken.
    """
    draw = budget.draw
    assert draw is not None
    if draw.share >= FALL_BACK:
        return None
    if len(hidden) == 0:  # other ranks wait for its part of tau
        threshold(hidden.new_empty((0, len(saved.tile_lse))), draw.share, None, draw.group)
        return None
    batch, live = bounded.make_batch(grad_logp, hidden, target, head, saved)
    plan = make_plan(batch.scale.abs(), batch.lse, saved.tile_lse, batch.target, batch.target_logp, draw, live)
    active = plan.factor > 0.0
    made = bounded.BlockLists(*bounded.route(hidden.device).block_lists(active.T.contiguous()))
    first_block = bounded.blocks_of(made.block_offsets, tile.block_m)
    lists = bounded.lists_of(made, first_block, read_edges(first_block), tile, TILE, plan.factor)
    dhidden, dbias, tally = _compute(bounded.in_float16(batch, fp16_factor), plan, active, lists, head, tile, wanted)
    share = active.sum(dtype=torch.float64) / (live.sum() * active.shape[1]).clamp_min(1)
    budget.tell(torch.nan, share, False, tally.relative())
    return dhidden, dbias


def read_edges(first_block: Tensor) -> list[int]:
    """The first block of each run [runs + 1]: the one time the host waits in a sampled backward."""
    return first_block.tolist()


def _compute(
    batch: Batch, plan: Plan, active: Tensor, lists: Lists, head: Head, tile: tiles.Tile, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tally]:
    x, weight, dweight, inverse = batch.x, head.weight, wanted.dweight, batch.inverse
    (n, h), v, device = x.shape, weight.shape[0], x.device
    num_runs = active.shape[1]
    padded = -(-num_runs // 8) * 8
    new = {"dtype": torch.float32, "device": device}
    width = torch.full((num_runs,), float(TILE), **new)
    width[-1:] = v - TILE * (num_runs - 1)
    # what a kept pair was given and takes back `factor` times, to be spread over its run, negated
    given = (1.0 - plan.factor).mul_(plan.mass).mul_(batch.scale[:, None])
    bias_spread = given.sum(0) / width if wanted.bias else None
    spread_out = torch.nn.functional.pad(given.to(x.dtype), (0, padded - num_runs))
    columns = None
    if dweight is not None:
        spread = torch.empty(padded, h, **new)
        matmul_into(spread, spread_out.t(), x, add=False)
        by_target = torch.argsort(batch.target, stable=True)
        edges = torch.arange(0, v + TILE, TILE, device=device).clamp_max_(v)
        columns = Columns(by_target, torch.searchsorted(batch.target[by_target], edges), spread)
    acc = torch.empty(n, h, **new) if wanted.hidden else None
    into = Accumulators(acc, torch.empty(n, **new), torch.empty(num_runs, TILE, **new) if wanted.bias else None)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    place_bytes = TILE * x.element_size() + (4 * h if wanted.hidden else 0)
    for first, last in bounded.slabs(lists.edges, max(1, bounded.SLAB_BYTES // (tile.block_m * place_bytes))):
        dz, mass = bounded.slab(batch, active, lists, first, last, head, tile, columns, into, wanted)
        sums += _errors(batch, plan, lists, first, last, tile.block_m, dz, mass[:, 0], width)
    dhidden = dbias = None
    if acc is not None:
        matmul_into(acc, -spread_out, bounded.run_means(weight, padded), add=True)
        dhidden = torch.empty(n, h, dtype=x.dtype, device=device)
        finish_kernel[(n,)](
            acc, weight, batch.target, batch.target_gradient, inverse, dhidden, v, h, weight.stride(0),
            BLOCK=1024, enable_fp_fusion=False,
        )  # fmt: skip
    if into.bias is not None and bias_spread is not None:
        dbias = bounded.finish_bias(into.bias, bias_spread, batch, v)
    at_target = batch.target_gradient.double().square().sum()
    evenly = ((plan.mass * batch.scale[:, None]).square() / width).sum(dtype=torch.float64)
    return dhidden, dbias, Tally(sums[0], sums[1] + evenly + at_target)


def _errors(
    batch: Batch, plan: Plan, lists: Lists, first: int, last: int, block_m: int, dz: Tensor, mass: Tensor, width: Tensor
) -> Tensor:
    """The tally's two sums over the pairs of a slab: expected squares of the error, and squares of dlogits. [2]"""
    begin, end = lists.edges[first], lists.edges[last]
    if begin == end:
        return torch.zeros(2, dtype=torch.float64, device=dz.device)
    blocks = lists.first_block[first : last + 1].diff()
    run = torch.arange(first, last, device=dz.device).repeat_interleave(blocks, output_size=end - begin)
    slot = (torch.arange(begin, end, device=dz.device) * block_m - lists.shift[run])[:, None]
    slot = slot + torch.arange(block_m, device=dz.device)  # [blocks, block_m]
    held = (slot < lists.offsets[run + 1][:, None]).flatten()
    row = lists.slot_row[slot.flatten().clamp_max_(len(lists.slot_row) - 1)].long().masked_fill_(~held, 0)
    run = run.repeat_interleave(block_m)
    factor, given, amount = plan.factor[row, run], plan.mass[row, run], batch.scale[row]
    factor = torch.where(held, factor, 1.0)
    size = torch.linalg.vector_norm(dz, dim=1, dtype=torch.float32).square()  # (scale factor)^2 |p|^2
    even = given.square() / width[run]
    cross = amount.square() * (even - 2.0 * given * mass / width[run])
    variance = (factor - 1.0) * (size / factor + factor * cross)
    square = size / factor - amount.square() * factor * even
    both = torch.stack([variance, square]).where(held, 0.0)
    return both.sum(1, dtype=torch.float64)
