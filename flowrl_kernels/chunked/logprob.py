"""Log-probabilities from logits, one block of rows and columns at a time: no second [N, V] tensor in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles
from flowrl_kernels.chunked.linear_logprob import dlogits_, kept_rows
from flowrl_kernels.chunked.several import Several, as_one, pick, put_, rows_of
from flowrl_kernels.core.types import Upstream

COLUMNS = 8192
ROWS = 64


def _scaled(logits: Tensor, softcap: float | None, temperature: Tensor, dtype: torch.dtype) -> Tensor:
    z = logits.to(dtype, copy=True)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return tiles.divide_by_temperature(z, temperature)


def _row_temperature(temperature: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return (temperature if temperature.numel() == 1 else temperature[rows]).to(dtype)[:, None]


def _row_blocks(live: Tensor) -> list[Tensor]:
    """The rows that take part, ROWS at a time. On a GPU all of them, for the host would have to wait for the count."""
    rows = kept_rows(live)
    rows = torch.arange(len(live), device=live.device) if rows is None else rows
    return list(rows.split(ROWS)) if len(rows) else []


def logprob_fwd(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N] or [N, K] int64; -1 skips the id, V means no target here
    temperature: Tensor,  # [N] or [1]
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp like target (-inf without one), log-sum-exp [2, N] as maximum and log of the sum, entropy [N] or [0]."""
    num_tokens, vocab_size = logits.shape
    dtype = tiles.accumulator_dtype(logits.dtype)
    logp = logits.new_zeros(target.shape, dtype=dtype)
    lse = logits.new_zeros((2, num_tokens), dtype=dtype)
    ent = torch.zeros_like(lse[0]) if entropy else logp.new_empty(0)
    live = rows_of(target) >= 0
    for own in _row_blocks(live):
        running = tiles.Sums(len(own), logp, entropy)
        row_temperature = _row_temperature(temperature, own, dtype)
        target_logit = logp.new_zeros(target[own].shape)
        for start, stop in tiles.column_tiles(vocab_size, COLUMNS):
            z = _scaled(logits[own, start:stop], softcap, row_temperature, dtype)
            local = target[own] - start
            picked = pick(z, local)
            mine = (local >= 0) & (local < stop - start)
            target_logit = torch.where(mine, picked, target_logit)
            running.add(z)
        lse[:, own] = running.lse()
        own_lse = lse[:, own] if target.dim() == 1 else lse[:, own, None]
        logp[own] = tiles.log_softmax(target_logit, own_lse)
        if entropy:
            ent[own] = running.entropy()
    if entropy:
        ent = ent.masked_fill(~live, 0.0)
    logp = logp.masked_fill(target == vocab_size, -torch.inf)
    return logp.masked_fill(target < 0, 0.0), lse.masked_fill(~live, 0.0), ent


def logprob_bwd(
    grad_logp: Tensor,  # [N] or [N, K], as target and logp
    grad_entropy: Tensor | None,  # [N]
    logits: Tensor,  # [N, V]
    target: Tensor,
    temperature: Tensor,  # [N] or [1]
    softcap: float | None,
    logp: Tensor,
    lse: Tensor,  # [2, N]
    entropy: Tensor,  # [N] or [0]
    inplace: bool,
) -> Tensor:
    """Gradient of the logits in their dtype, over the logits themselves if `inplace`. [N, V]"""
    dtype = tiles.accumulator_dtype(logits.dtype)
    dlogits = logits if inplace else torch.empty_like(logits)
    vocab_size = logits.shape[1]
    several = None
    if target.dim() == 1:
        live = (target >= 0) & (grad_logp != 0)
        if grad_entropy is not None:
            live |= (target >= 0) & (grad_entropy != 0)
    else:
        live, grad_logp, _, at_ids = as_one(Upstream(grad_logp, grad_entropy), target, logp, entropy)
        several = Several(target, at_ids)
        target, logp = torch.full_like(target[:, 0], vocab_size), torch.zeros_like(grad_logp)
    for own in _row_blocks(live):
        row_temperature = _row_temperature(temperature, own, dtype)
        scale = grad_logp[own, None].to(dtype) / row_temperature
        step = None if grad_entropy is None else grad_entropy[own, None].to(dtype) / row_temperature
        ids = None
        if several is not None:
            ids = Several(several.target[own], several.value[own].to(dtype) / row_temperature)
        for start, stop in tiles.column_tiles(vocab_size, COLUMNS):
            z = _scaled(logits[own, start:stop], softcap, row_temperature, dtype)
            slope = None
            if softcap is not None:
                slope = (z * row_temperature).div_(softcap).square_().neg_().add_(1.0)
            dz = dlogits_(
                z, target[own, None] - start, logp[own, None], lse[:, own, None], scale, step,
                None if step is None else entropy[own, None],
            )  # fmt: skip
            if ids is not None:
                put_(dz, ids, start)
            dlogits[own, start:stop] = (dz if slope is None else dz.mul_(slope)).to(logits.dtype)
    return dlogits.masked_fill_(~live[:, None], 0.0)
