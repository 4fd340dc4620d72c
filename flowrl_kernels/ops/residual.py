"""`flowrl::residual`: loss, residual, weight and metrics with the gradient beside them.

The forward returns d loss / d logp and d loss / d log_z for a gradient of 1; the backward multiplies. That costs one
tensor of the size of logp, and makes retain_graph, double use and torch.compile need nothing more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import presets
from flowrl_kernels.dispatch import launchers
from flowrl_kernels.ops.operator import operator

NUM_METRICS = 12


@operator("flowrl::residual", mutates_args=())
def residual(
    logp: Tensor,  # [B, T] or [N]
    log_z: Tensor | None,  # [B]
    anchor: Tensor | None,
    old: Tensor | None,
    sampler: Tensor | None,
    reward: Tensor,  # [B]
    mask: Tensor,  # bool, the layout of logp
    cu_seqlens: Tensor | None,  # int64 [B+1]
    groups: Tensor | None,  # [B]
    normalizer: Tensor | None,  # scalar, or [2]: sequences and tokens
    row: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], dlogp (layout and dtype of logp), dlog_z [B]."""
    loss, d, weight, metrics, dlogp, dlog_z = launchers("residual", impl).residual_fwd(
        presets.loads(row), logp, anchor, old, sampler, reward, log_z, mask, cu_seqlens, groups, normalizer
    )
    dtype = _dtype(logp)
    dlog_z = dlog_z.to(dtype if log_z is None else log_z.dtype)
    return loss.to(dtype), d.to(dtype), weight.to(dtype), metrics.to(dtype), dlogp.to(logp.dtype), dlog_z


def _dtype(logp: Tensor) -> torch.dtype:
    return torch.float64 if logp.dtype == torch.float64 else torch.float32


@residual.register_fake
def _(logp, log_z, anchor, old, sampler, reward, mask, cu_seqlens, groups, normalizer, row, impl):
    dtype, num = _dtype(logp), reward.shape[0]
    return (
        logp.new_empty((), dtype=dtype),
        logp.new_empty(num, dtype=dtype),
        logp.new_empty(num, dtype=dtype),
        logp.new_empty(NUM_METRICS, dtype=dtype),
        torch.empty_like(logp, memory_format=torch.contiguous_format),
        logp.new_empty(num, dtype=dtype if log_z is None else log_z.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.has_log_z = inputs[1] is not None
    ctx.save_for_backward(output[4], output[5])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    nothing: tuple = (None,) * 12
    if grad is None:
        return nothing
    dlogp, dlog_z = ctx.saved_tensors
    dlog_z = (grad * dlog_z).to(dlog_z.dtype) if ctx.has_log_z and ctx.needs_input_grad[1] else None
    return ((grad * dlogp).to(dlogp.dtype) if ctx.needs_input_grad[0] else None, dlog_z, *nothing[2:])


residual.register_autograd(_backward, setup_context=_setup_context)
