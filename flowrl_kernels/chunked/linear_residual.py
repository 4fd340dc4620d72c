"""Hidden states to loss and gradients in a single pass, 6NHV: a chunk's logits are made once and used three times.

A sequence's coefficient is one number that is known after its own forward. So whole sequences are taken together, up
to a buffer of logits: logits -> logp -> residual -> dlogits in place -> dhidden, dweight. The logits come from the tile
code of `linear_logprob`, so logp has the same bits. A chunk of more rows than the buffer holds is one long sequence:
its logits are made a second time (8NHV for its rows alone). Rows that do not count are left out first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked import residual, tiles
from flowrl_kernels.chunked.linear_logprob import (
    accumulate,
    clean,
    dlogits_,
    kept_rows,
    linear_logprob_bwd,
    linear_logprob_fwd,
    put,
    take,
)
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import EXACT, Anchors, Chunks, Head, Needs, Saved, Sequences, Upstream
from flowrl_kernels.presets.row import Row

COLUMNS = 8 * tiles.COLUMNS  # of one tile of dlogits


class SinglePass(NamedTuple):
    logp: Tensor  # [N]
    loss: Tensor
    residual: Tensor  # [B]
    weight: Tensor  # [B]
    metrics: Tensor  # [12]
    dlog_z: Tensor  # [B]
    dhidden: Tensor | None  # [N, H], dtype of hidden; fp32 for float16
    dweight: Tensor | None  # [V, H], dtype of weight; fp32 for float16
    dbias: Tensor | None  # [V], fp32 (float64 for float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients wait in for the incoming one: float16 has no room for a loss scale that is still to come."""
    return torch.float32 if dtype == torch.float16 else dtype


def linear_residual_fwd(
    row: Row,
    hidden: Tensor,  # [N, H] response positions; anything where target is -1
    target: Tensor,  # [N]; -1 skips the row, V gives NaN
    head: Head,
    anchors: Anchors,
    each: Sequences,  # groups: for one chunk that holds the whole batch
    segments: Segments,  # packed
    chunks: Chunks,
    need: Needs,
) -> SinglePass:
    """The loss of the batch with its gradients for an incoming one of 1; those not needed are None."""
    dtype = tiles.accumulator_dtype(hidden.dtype)
    weight, _, temperature, logit_scale, _ = head
    most, (mask, cu_seqlens, _) = chunks.most, segments
    assert cu_seqlens is not None
    vocab_size = weight.shape[0]
    logp = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
    dhidden = torch.zeros_like(hidden, dtype=wide(hidden.dtype)) if need.hidden else None
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need.weight else None
    dbias = logp.new_zeros(vocab_size) if need.bias else None
    parts, dlog_z = [], []
    with tiles.exact_products():
        for first, last, low, high in chunks.spans():
            own = slice(low, high)
            live = target[own] >= 0
            rows = kept_rows(live)
            x, ids = take(rows, hidden[own], target[own])
            scale = temperature if temperature.numel() == 1 else take(rows, temperature[own])[0]
            if rows is None and not tiles.host_knows(hidden):  # no count of rows without a wait: all there, but clean
                x, scale = clean(live, x, scale)
            own_head = head._replace(temperature=scale)
            twice = len(x) > most
            z: list[Tensor] = []
            if twice:
                own_logp, lse, *_ = linear_logprob_fwd(x, ids, own_head, False, False)
            elif len(x):
                z, lse, picked = _logits(tiles.operand(x), ids, own_head)
                own_logp = tiles.log_softmax(picked, lse)
            else:
                own_logp, lse = logp[:0], logp.new_zeros((2, 0))
            own_logp = own_logp.masked_fill(ids < 0, 0.0).masked_fill(ids >= vocab_size, torch.nan)
            logp[own] = put(rows, own_logp, high - low)
            part_of = Sequences(
                each.reward[first:last], None if each.log_z is None else each.log_z[first:last], each.groups,
                each.normalizer,
            )  # fmt: skip
            own_segments = Segments(mask[own], cu_seqlens[first : last + 1] - low)
            own_anchors = anchors.part(own)
            terms, dlogp, dz_own = residual.sequences(row, logp[own], own_anchors, part_of, own_segments)
            parts.append(terms)
            dlog_z.append(dz_own)
            grad = take(rows, dlogp.to(dtype).masked_fill(~live, 0.0))[0]
            part = None
            if twice:
                nothing = logp[:0]
                saved = Saved(own_logp, lse, nothing, nothing.view(0, 0))
                part, _, dbias_own = linear_logprob_bwd(Upstream(grad), x, ids, own_head, saved, need, EXACT, dweight)
                if dbias is not None and dbias_own is not None:
                    dbias += dbias_own
            elif len(x):
                g = (grad * logit_scale)[:, None] / scale[:, None].to(dtype)
                rows_in = tiles.Rows(tiles.operand(x), ids, scale[:, None], own_logp, lse[..., None], g)
                part = logp.new_zeros(x.shape) if need.hidden else None
                _products(z, rows_in, own_head, tiles.Sinks(part, dweight, None, dbias))
            if dhidden is not None and part is not None:
                dhidden[own] = put(rows, part, high - low)
            del z, part  # before the next chunk's
    totals = residual.totals(row, residual.joined(parts), each.normalizer, dtype)
    dweight = None if dweight is None else dweight.to(wide(weight.dtype))
    return SinglePass(logp, *totals, torch.cat(dlog_z), dhidden, dweight, dbias)


def _products(z: list[Tensor], rows: tiles.Rows, head: Head, into: tiles.Sinks) -> None:
    """Adds a chunk's gradients from its logits, which are overwritten."""
    dhidden, dweight, _, dbias = into
    for tile, (start, stop) in zip(z, tiles.column_tiles(len(head.weight), COLUMNS)):
        dz = _dlogits_(tile, rows, start, head.softcap)
        if dbias is not None:
            dbias[start:stop] += dz.sum(0)
        dz = dz.to(rows.x.dtype)
        if dhidden is not None:
            accumulate(dhidden, dz, tiles.operand(head.weight[start:stop]))
        if dweight is not None:
            accumulate(dweight[start:stop], dz.T, rows.x)


def _logits(x: Tensor, target: Tensor, head: Head) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits in tiles [R, COLUMNS], log-sum-exp [2, R], target logit [R]: the bits of `linear_logprob_fwd`."""
    weight, bias, temperature, logit_scale, softcap = head
    num_rows, vocab_size = x.shape[0], weight.shape[0]
    dtype = tiles.accumulator_dtype(x.dtype)
    block = tiles.row_block(x.shape[1], vocab_size)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_rows % block))
    # a product reads a tile of its own several times faster than columns of a [R, V] buffer
    z = [x.new_empty((num_rows, b - a), dtype=dtype) for a, b in tiles.column_tiles(vocab_size, COLUMNS)]
    starts = range(0, len(padded), block)
    sums = [tiles.Sums(block, z[0], False) for _ in starts]
    scale = temperature.to(dtype)[:, None]
    if scale.shape[0] > 1:
        scale = torch.nn.functional.pad(scale, (0, 0, 0, -num_rows % block), value=1.0)
    for start, stop in tiles.column_tiles(vocab_size, tiles.COLUMNS):
        columns = tiles.operand(weight[start:stop])
        for low, running in zip(starts, sums):
            own = slice(low, low + block)
            part = tiles.logits_tile(
                padded[own], columns, None if bias is None else bias[start:stop], logit_scale, softcap
            )
            tiles.divide_by_temperature(part, scale if scale.shape[0] == 1 else scale[own])
            z[start // COLUMNS][own, start % COLUMNS : start % COLUMNS + stop - start] = part[: num_rows - low]
            running.add(part)
    lse = torch.cat([s.lse() for s in sums], 1)[:, :num_rows]
    picked = torch.zeros_like(lse[0])
    for tile, (start, stop) in zip(z, tiles.column_tiles(vocab_size, COLUMNS)):
        local = target - start
        here = (local >= 0) & (local < stop - start)
        picked = torch.where(here, tile.gather(1, local.where(here, 0)[:, None])[:, 0], picked)
    return z, lse, picked


def _dlogits_(z: Tensor, rows: tiles.Rows, start: int, softcap: float | None) -> Tensor:
    """Over the logits of a tile: the gradient of the product hidden weight^T. [R, C]"""
    slope = None
    if softcap is not None:
        slope = (z * rows.temperature).div_(softcap).square_().neg_().add_(1.0)
    dz = dlogits_(z, (rows.target - start)[:, None], rows.logp[:, None], rows.lse, rows.scale)
    return dz if slope is None else dz.mul_(slope)
