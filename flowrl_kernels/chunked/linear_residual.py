"""Hidden states to loss and gradients in a single pass, 6NHV: a chunk's logits are made once and used three times.

A sequence's coefficient is one number that is known after its own forward. So whole sequences are taken together, up
to a buffer of logits: logits -> logp -> residual -> dlogits in place -> dhidden, dweight. The logits come from the tile
code of `linear_logprob`, so logp has the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles
from flowrl_kernels.chunked.linear_logprob import accumulate, dlogits_
from flowrl_kernels.chunked.residual import residual_fwd
from flowrl_kernels.presets import Row

COLUMNS = 8 * tiles.COLUMNS  # of one tile of dlogits


def linear_residual_fwd(
    row: Row,
    hidden: Tensor,  # [N, H] packed response positions
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]; -1 skips the row
    bias: Tensor | None,  # [V]
    temperature: Tensor,  # [N] or [1]
    logit_scale: float,
    softcap: float | None,
    anchor: Tensor | None,  # [N]
    old: Tensor | None,  # [N]
    sampler: Tensor | None,  # [N]
    reward: Tensor,  # [B]
    log_z: Tensor | None,  # [B]
    mask: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [B+1] int64
    groups: Tensor | None,  # [B], for one chunk that holds the whole batch
    edges: list[int],  # the tokens at which chunks begin, and N
    bounds: list[int],  # the sequences at which chunks begin, and B
    normalizer: Tensor | None,  # scalar
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logp [N] with the gradients of the loss in hidden, weight and bias (None where not needed)."""
    dtype = tiles.accumulator_dtype(hidden.dtype)
    x = tiles.operand(hidden)
    vocab_size = weight.shape[0]
    logp = x.new_zeros(hidden.shape[0], dtype=dtype)
    dhidden = torch.zeros_like(hidden) if need_hidden else None
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
    dbias = x.new_zeros(vocab_size, dtype=dtype) if need_bias else None
    with tiles.exact_products():
        for first, last, low, high in zip(bounds, bounds[1:], edges, edges[1:]):
            own = slice(low, high)
            scale = temperature if temperature.numel() == 1 else temperature[own]
            z, lse, picked = _logits(x[own], weight, target[own], bias, scale[:, None], logit_scale, softcap)
            skipped = target[own] < 0
            logp[own] = tiles.log_softmax(picked, lse).masked_fill(skipped, 0.0)
            a, o, t = (None if tokens is None else tokens[own] for tokens in (anchor, old, sampler))
            z_own = None if log_z is None else log_z[first:last]
            starts = cu_seqlens[first : last + 1] - low
            *_, dlogp, _ = residual_fwd(
                row, logp[own], a, o, t, reward[first:last], z_own, mask[own], starts, groups, normalizer
            )
            g = (dlogp.to(dtype).masked_fill(skipped, 0.0) * logit_scale)[:, None] / scale[:, None].to(dtype)
            part = x.new_zeros((high - low, hidden.shape[1]), dtype=dtype) if need_hidden else None
            for tile, (start, stop) in zip(z, tiles.column_tiles(vocab_size, COLUMNS)):
                dz = _dlogits_(tile, logp[own], lse, target[own] - start, g, scale[:, None], softcap)
                if dbias is not None:
                    dbias[start:stop] += dz.sum(0)
                dz = dz.to(x.dtype)
                if part is not None:
                    accumulate(part, dz, tiles.operand(weight[start:stop]))
                if dweight is not None:
                    accumulate(dweight[start:stop], dz.T, x[own])
            if dhidden is not None and part is not None:
                dhidden[own] = part
            del z, tile, dz  # before the next chunk's
    return logp, dhidden, None if dweight is None else dweight.to(weight.dtype), dbias


def _logits(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor, logit_scale: float,
    softcap: float | None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Logits in tiles [R, COLUMNS], log-sum-exp [2, R], target logit [R]: the bits of `linear_logprob_fwd`."""
    num_rows, vocab_size = x.shape[0], weight.shape[0]
    dtype = tiles.accumulator_dtype(x.dtype)
    block = tiles.row_block(x.shape[1], vocab_size)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_rows % block))
    # a product reads a tile of its own several times faster than columns of a [R, V] buffer
    z = [x.new_empty((num_rows, b - a), dtype=dtype) for a, b in tiles.column_tiles(vocab_size, COLUMNS)]
    starts = range(0, len(padded), block)
    sums = [tiles.Sums(block, z[0], False) for _ in starts]
    scale = temperature.to(dtype)
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


def _dlogits_(
    z: Tensor, logp: Tensor, lse: Tensor, target: Tensor, scale: Tensor, temperature: Tensor, softcap: float | None
) -> Tensor:
    """Over the logits of a tile: the gradient of the product hidden weight^T. [R, C]"""
    slope = None
    if softcap is not None:
        slope = (z * temperature).div_(softcap).square_().neg_().add_(1.0)
    dz = dlogits_(z, target[:, None], logp[:, None], lse[..., None], scale)
    return dz if slope is None else dz.mul_(slope)
