"""Log-probs renormalised over the tokens a sampler kept (top-k, top-p): z_y - logsumexp(z over the kept set).

The kept set is a list of ids per row, so the cost is O(K H) for K kept entries in all, and nothing is [N, V].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked.tiles import FLOOR, add_rows
from flowrl_kernels.core.types import Head, LogProb
from flowrl_kernels.ops.operator import OnceDifferentiable, first_backward_only, without_autocast

ENTRIES = 1 << 24  # elements of the gathered rows held at once


class Entries(NamedTuple):
    """The kept sets as one list, by row and then by id, each id of a row once and the target among them."""

    rows: Tensor  # [E]
    columns: Tensor  # [E]
    on: Tensor  # [E] False in a repeated entry, and in rows that do not count
    edges: Tensor  # [N + 1] first entry of each row
    of_target: Tensor  # [N] the target's entry
    wrong: Tensor  # [N] bool: the target or a kept id lies outside the vocabulary


def entries(ids: Tensor, offsets: Tensor, target: Tensor, ignored: Tensor, vocab_size: int) -> Entries:
    """Rows that are ignored keep one entry, which is off; on a CPU their lists are left out."""
    everyone = torch.arange(len(target), device=ids.device)
    rows = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(ids), device=ids.device), right=True)
    rows = rows.clamp_max(max(len(target) - 1, 0))
    if ids.device.type == "cpu" and len(target):
        counts = ~ignored[rows]
        rows, ids = rows[counts], ids[counts]
    outside = (ids < 0) | (ids >= vocab_size)
    wrong = torch.zeros_like(target).index_add_(0, rows, outside.long()) > 0
    wrong |= (target < 0) | (target >= vocab_size)
    target = target.clamp(0, vocab_size - 1)
    own = everyone * vocab_size + target
    key = torch.cat([rows * vocab_size + ids.clamp(0, vocab_size - 1), own]).sort().values
    rows, columns = key.div(vocab_size, rounding_mode="floor"), key % vocab_size
    on = torch.cat([torch.ones_like(key[:1], dtype=torch.bool), key[1:] != key[:-1]])
    edges = torch.searchsorted(key, torch.arange(len(target) + 1, device=key.device) * vocab_size)
    of_target = torch.searchsorted(key, own)  # the first of its kind, which is the one that is on
    return Entries(rows, columns, on & ~ignored[rows], edges, of_target, wrong & ~ignored)


class KeptLogProb(OnceDifferentiable):
    """logp [N], entropy over the kept set [N] or None."""

    name = "linear_logprob with kept"

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ids: Tensor, offsets: Tensor, bias: Tensor | None,
        temperature: Tensor, logit_scale: float, softcap: float | None, ignore_index: int, entropy: bool,
    ):  # fmt: skip
        target = target.long()
        ignored = target == ignore_index
        target = target.masked_fill(ignored, 0)
        rows, columns, on, edges, of_target, wrong = entries(ids.long(), offsets.long(), target, ignored, len(weight))
        x = hidden.masked_fill(ignored[:, None], 0.0)  # such a row may hold anything, and 0 * NaN is NaN
        temperature = temperature.expand(len(target)).masked_fill(ignored, 1.0)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        z = hidden.new_empty(len(rows), dtype=dtype)
        step = max(1, ENTRIES // max(1, hidden.shape[1]))
        for low in range(0, len(rows), step):
            own = slice(low, low + step)
            z[own] = (x[rows[own]].to(dtype) * weight[columns[own]].to(dtype)).sum(1)
        if bias is not None:
            z += bias.to(dtype)[columns]
        z *= logit_scale
        capped = z if softcap is None else softcap * torch.tanh(z / softcap)
        slope = None if softcap is None else 1.0 - (capped / softcap).square()
        scale = temperature.to(dtype)[rows]
        z = (capped / scale).masked_fill(~on, -torch.inf)
        top = _reduce(z, edges, "max", -torch.inf).masked_fill(ignored, 0.0)
        shifted = z - top[rows]
        log_sum = _reduce(shifted.exp(), edges, "sum", 0.0).log().masked_fill(ignored, 0.0)
        logp_all = shifted - log_sum[rows]  # -inf where off
        logp = logp_all[of_target].masked_fill(wrong, torch.nan).masked_fill(ignored, 0.0)
        ent = None
        if entropy:
            ent = _reduce(-logp_all.exp() * logp_all.clamp_min(FLOOR), edges, "sum", 0.0).masked_fill(ignored, 0.0)
        ctx.save_for_backward(hidden, weight, rows, columns, logp_all, scale, slope, of_target, ent, ignored, bias)
        ctx.logit_scale, ctx.step = logit_scale, step
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None):
        with torch.no_grad():
            gradients = without_autocast(KeptLogProb._gradients)(ctx.saved_tensors[0], ctx, grad_logp, grad_entropy)
        return first_backward_only(KeptLogProb.name, gradients, *ctx.saved_tensors[:2], grad_logp, grad_entropy)

    @staticmethod
    def _gradients(hidden: Tensor, ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        _, weight, rows, columns, logp, scale, slope, of_target, ent, ignored, bias = ctx.saved_tensors
        dtype = logp.dtype
        live = torch.zeros_like(ignored)
        p = logp.exp()
        dz = torch.zeros_like(p)
        if grad_logp is not None:
            g = grad_logp.to(dtype).masked_fill(ignored, 0.0)
            live = live | (g != 0)
            dz -= g[rows] * p
            dz[of_target] = g * -torch.expm1(logp[of_target])
        if grad_entropy is not None:
            g = grad_entropy.to(dtype).masked_fill(ignored, 0.0)
            live = live | (g != 0)
            dz -= g[rows] * p * (logp.clamp_min(FLOOR) + ent[rows])
        dz = dz / scale * ctx.logit_scale
        dz = dz if slope is None else dz * slope
        dz = dz.masked_fill(~live[rows], 0.0)
        hidden = hidden.masked_fill(~live[:, None], 0.0)
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


def apply(
    hidden: Tensor, target: Tensor, ids: Tensor, offsets: Tensor, head: Head, ignore_index: int, entropy: bool
) -> LogProb:
    """`KeptLogProb` on structs, where autocast has had its say."""
    weight, bias, *dials = head
    with torch.autocast(hidden.device.type, enabled=False):
        return LogProb(*KeptLogProb.call(hidden, weight, target, ids, offsets, bias, *dials, ignore_index, entropy))
