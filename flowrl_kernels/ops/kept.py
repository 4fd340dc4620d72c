"""Log-probs renormalised over the tokens a sampler kept (top-k, top-p): z_y - logsumexp(z over the kept set).

The kept set is a list of ids per row, so the cost is O(K H) for K kept entries in all, and nothing is [N, V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl_kernels.chunked.tiles import add_rows

ENTRIES = 1 << 24  # elements of the gathered rows held at once


def with_target(ids: Tensor, offsets: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and id of every entry with the target's own entry appended, and whether it counts. Each [K + N]

    A target that is among the kept ids counts once: its listed entry is switched off.
    """
    count = offsets.diff()
    rows = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(ids), device=ids.device), right=True)
    rows = rows.clamp_max(max(len(count) - 1, 0))
    counts = ids != target[rows] if len(target) else torch.ones_like(ids, dtype=torch.bool)
    everyone = torch.arange(len(target), device=ids.device)
    on = torch.cat([counts, torch.ones_like(target, dtype=torch.bool)])
    order = torch.argsort(torch.cat([rows, everyone]), stable=True)
    return torch.cat([rows, everyone])[order], torch.cat([ids, target])[order], on[order]


class KeptLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ids: Tensor, offsets: Tensor, bias: Tensor | None,
        temperature: Tensor, logit_scale: float, softcap: float | None, ignore_index: int, entropy: bool,
    ):  # fmt: skip
        """logp [N], entropy over the kept set [N] or None."""
        ignored = target == ignore_index
        target = target.long().masked_fill(ignored, 0)
        rows, columns, on = with_target(ids.long(), offsets.long(), target)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        z = hidden.new_empty(len(rows), dtype=dtype)
        step = max(1, ENTRIES // max(1, hidden.shape[1]))
        for low in range(0, len(rows), step):
            own = slice(low, low + step)
            z[own] = (hidden[rows[own]].to(dtype) * weight[columns[own]].to(dtype)).sum(1)
        if bias is not None:
            z += bias.to(dtype)[columns]
        z *= logit_scale
        capped = z if softcap is None else softcap * torch.tanh(z / softcap)
        slope = None if softcap is None else 1.0 - (capped / softcap).square()
        scale = temperature.to(dtype).expand(len(target))[rows]
        z = (capped / scale).masked_fill(~on, -torch.inf)
        edges = torch.searchsorted(rows, torch.arange(len(target) + 1, device=rows.device))
        top = _reduce(z, edges, "max", -torch.inf)
        weighty = (z - top[rows]).exp()
        lse = top + _reduce(weighty, edges, "sum", 0.0).log()
        logp_all = z - lse[rows]
        # entries of a row are in order, the target's own is the last
        logp = logp_all[edges[1:] - 1].masked_fill(ignored, 0.0) if len(target) else lse
        ent = None
        if entropy:
            ent = _reduce(-logp_all.exp() * logp_all.masked_fill(~on, 0.0), edges, "sum", 0.0).masked_fill(ignored, 0.0)
        ctx.save_for_backward(hidden, weight, rows, columns, on, logp_all, scale, slope, edges, ent, ignored, bias)
        ctx.logit_scale, ctx.step = logit_scale, step
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, rows, columns, on, logp, scale, slope, edges, ent, ignored, bias = ctx.saved_tensors
        dtype = logp.dtype
        p = logp.exp()
        dz = torch.zeros_like(p)
        if grad_logp is not None:
            g = grad_logp.to(dtype).masked_fill(ignored, 0.0)
            dz -= g[rows] * p
            dz[edges[1:] - 1] += g
        if grad_entropy is not None:
            g = grad_entropy.to(dtype).masked_fill(ignored, 0.0)
            dz -= g[rows] * p * (logp.masked_fill(~on, 0.0) + ent[rows])
        dz = dz / scale * ctx.logit_scale
        dz = dz if slope is None else dz * slope
        dhidden = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dhidden = hidden.new_zeros(hidden.shape, dtype=dtype)
        if ctx.needs_input_grad[1]:
            dweight = weight.new_zeros(weight.shape, dtype=dtype)
        for low in range(0, len(rows), ctx.step):
            own = slice(low, low + ctx.step)
            if dhidden is not None:
                add_rows(dhidden, rows[own], dz[own, None] * weight[columns[own]].to(dtype))
            if dweight is not None:
                add_rows(dweight, columns[own], dz[own, None] * hidden[rows[own]].to(dtype))
        if bias is not None and ctx.needs_input_grad[5]:
            dbias = bias.new_zeros(bias.shape, dtype=dtype)
            add_rows(dbias, columns, dz)
            dbias = dbias.to(bias.dtype)
        dhidden = None if dhidden is None else dhidden.to(hidden.dtype)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dhidden, dweight, None, None, None, dbias, *(None,) * 5


def _reduce(value: Tensor, edges: Tensor, how: str, initial: float) -> Tensor:
    return torch.segment_reduce(value, how, offsets=edges, axis=0, initial=initial, unsafe=True)
