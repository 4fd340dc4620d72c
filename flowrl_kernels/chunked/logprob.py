"""Log-probabilities from logits, one block of rows and columns at a time: no second [N, V] tensor in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles

COLUMNS = 8192
ROWS = 64


def _scaled(logits: Tensor, softcap: float | None, temperature: Tensor, dtype: torch.dtype) -> Tensor:
    z = logits.to(dtype, copy=True)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return tiles.divide_by_temperature(z, temperature)


def _row_temperature(temperature: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    return (temperature if temperature.numel() == 1 else temperature[rows]).to(dtype)[:, None]


def logprob_fwd(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N] int64; -1 skips the row, V means no target here
    temperature: Tensor,  # [N] or [1]
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Target logit [N], log-sum-exp [N], entropy [N] or [0]."""
    num_tokens, vocab_size = logits.shape
    dtype = tiles.accumulator_dtype(logits.dtype)
    target_logit = logits.new_zeros(num_tokens, dtype=dtype)
    lse = torch.zeros_like(target_logit)
    ent = torch.zeros_like(target_logit) if entropy else target_logit.new_empty(0)
    for low in range(0, num_tokens, ROWS):
        own = slice(low, min(low + ROWS, num_tokens))
        running = tiles.Sums(own.stop - low, target_logit, entropy)
        for start, stop in tiles.column_tiles(vocab_size, COLUMNS):
            row_temperature = _row_temperature(temperature, own, dtype)
            z = _scaled(logits[own, start:stop], softcap, row_temperature, dtype)
            local = target[own] - start
            picked = z.gather(1, local.clamp(0, stop - start - 1)[:, None])[:, 0]
            mine = (local >= 0) & (local < stop - start)
            target_logit[own] = torch.where(mine, picked, target_logit[own])
            running.add(z)
        lse[own] = running.lse()
        if entropy:
            ent[own] = running.entropy()
    skipped = target < 0
    if entropy:
        ent = ent.masked_fill(skipped, 0.0)
    return target_logit.masked_fill(skipped, 0.0), lse.masked_fill(skipped, 0.0), ent


def logprob_bwd(
    grad_logp: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    temperature: Tensor,  # [N] or [1]
    softcap: float | None,
    lse: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    inplace: bool,
) -> Tensor:
    """Gradient of the logits in their dtype, over the logits themselves if `inplace`. [N, V]"""
    dtype = tiles.accumulator_dtype(logits.dtype)
    dlogits = logits if inplace else torch.empty_like(logits)
    vocab_size = logits.shape[1]
    for low in range(0, logits.shape[0], ROWS):
        own = slice(low, low + ROWS)
        row_temperature = _row_temperature(temperature, own, dtype)
        scale = grad_logp[own, None].to(dtype) / row_temperature
        used = target[own, None] >= 0
        for start, stop in tiles.column_tiles(vocab_size, COLUMNS):
            z = _scaled(logits[own, start:stop], softcap, row_temperature, dtype)
            slope = None
            if softcap is not None:
                slope = (z * row_temperature).div_(softcap).square_().neg_().add_(1.0)
            logp = z.sub_(lse[own, None])
            if grad_entropy is None:
                dz = logp.exp_().mul_(-scale)
            else:
                p = logp.exp()
                step = grad_entropy[own, None].to(dtype) / row_temperature
                dz = logp.clamp_min_(tiles.FLOOR).add_(entropy[own, None]).mul_(step).add_(scale).mul_(p).neg_()
            local = target[own, None] - start
            mine = (local >= 0) & (local < stop - start)
            dz.scatter_add_(1, local.clamp(0, stop - start - 1), torch.where(mine, scale, 0.0))
            if slope is not None:
                dz.mul_(slope)
            dlogits[own, start:stop] = dz.masked_fill_(~used, 0.0)
    return dlogits
