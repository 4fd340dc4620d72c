"""`flowrl::residual`: loss, residual, weight and metrics with the gradient beside them.

The forward returns d loss / d logp and d loss / d log_z for a gradient of 1, in fp32 whatever logp is, because a loss
scale comes later; the backward multiplies and rounds once. That costs 4 bytes a token (8 in float64), and makes
retain_graph, double use and torch.compile need nothing more. Second derivatives are the reference's, made when asked
for; third ones are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import presets
from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import METRICS, Anchors, LossOutput, Sequences
from flowrl_kernels.ops.operator import operator
from flowrl_kernels.reference import residual as reference


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
    codes: list[int],  # of the row: `presets.Row.codes`
    numbers: Tensor,  # of the row: `presets.Row.packed_numbers`
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], dlogp (layout of logp), dlog_z [B]; fp32, or float64 as logp."""
    out = launchers("residual", impl).residual_fwd(
        presets.row_of(codes, numbers.tolist()),
        logp,
        Anchors(anchor, old, sampler),
        Sequences(reward, log_z, groups, normalizer),
        Segments(mask, cu_seqlens),
    )
    loss, d, weight, metrics, dlogp, dlog_z = (value.to(wide(logp)) for value in out)
    return loss, d, weight, metrics, dlogp, dlog_z


def wide(logp: Tensor) -> torch.dtype:
    return torch.float64 if logp.dtype == torch.float64 else torch.float32


@residual.register_fake
def _(logp, log_z, anchor, old, sampler, reward, mask, cu_seqlens, groups, normalizer, codes, numbers, impl):
    dtype, num = wide(logp), reward.shape[0]
    return (
        logp.new_empty((), dtype=dtype),
        logp.new_empty(num, dtype=dtype),
        logp.new_empty(num, dtype=dtype),
        logp.new_empty(len(METRICS), dtype=dtype),
        torch.empty_like(logp, dtype=dtype, memory_format=torch.contiguous_format),
        logp.new_empty(num, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, codes, numbers, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.row = codes, numbers
    ctx.save_for_backward(*output[4:], *tensors)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    nothing: tuple = (None,) * 13
    if grad is None:
        return nothing
    dlogp, dlog_z, *inputs = ctx.saved_tensors
    if torch.is_grad_enabled():
        dlogp, dlog_z = Gradient.apply(grad, presets.row_of(ctx.row[0], ctx.row[1].tolist()), dlogp, dlog_z, *inputs)
    else:
        dlogp, dlog_z = scaled(grad, dlogp, inputs[0]), scaled(grad, dlog_z, inputs[1])
    need_logp, need_log_z = ctx.needs_input_grad[:2]
    return (dlogp if need_logp else None, dlog_z if need_log_z else None, *nothing[2:])


def scaled(grad: Tensor, saved: Tensor, like: Tensor | None) -> Tensor | None:
    """The gradient of `like` from the one that was saved for a gradient of 1; rounded once."""
    return None if like is None else (grad * saved).to(like.dtype)


def apply(
    row: presets.Row, logp: Tensor, anchors: Anchors, each: Sequences, segments: Segments, impl: str
) -> LossOutput:
    """The operator on structs; the reference without it, in plain autograd."""
    if impl == "reference":
        terms = reference.residual(row, logp, anchors, each, segments)
        loss = reference.total(row, terms, each.normalizer).to(wide(logp))
        with torch.no_grad():
            values = reference.metrics(terms, loss).to(wide(logp))
        return output(loss, terms.residual.to(wide(logp)), terms.weight.to(wide(logp)), values)
    loss, d, weight, values, _, _ = residual(
        logp.contiguous(), each.log_z, *anchors, each.reward, segments.mask, segments.cu_seqlens, each.groups,
        each.normalizer, row.codes(), row.packed_numbers(), impl,
    )  # fmt: skip
    return output(loss, d, weight, values)


def output(loss: Tensor, residual: Tensor, weight: Tensor, metrics: Tensor) -> LossOutput:
    return LossOutput(loss, residual, weight, dict(zip(METRICS, metrics.unbind())))


residual.register_autograd(_backward, setup_context=_setup_context)


class Gradient(torch.autograd.Function):
    """The gradients as functions of the incoming gradient, logp and log_z: exact once more, by the reference."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, row: presets.Row, dlogp: Tensor, dlog_z: Tensor, *inputs: Tensor | None):
        ctx.row = row
        ctx.save_for_backward(grad, dlogp, dlog_z, *inputs)
        return scaled(grad, dlogp, inputs[0]), scaled(grad, dlog_z, inputs[1])

    @staticmethod
    def backward(ctx: Any, *towards: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError("flowrl_loss: third derivatives are not computed; impl='reference' has them")
        grad, dlogp, dlog_z, *inputs = ctx.saved_tensors
        pairs = [(t, saved) for t, saved in zip(towards, (dlogp, dlog_z)) if t is not None]
        dgrad = sum(((t.double() * saved.double()).sum() for t, saved in pairs), torch.zeros_like(grad).double())
        second = second_order(ctx.row, inputs, towards)
        second = [None if s is None else (grad.double() * s).to(t.dtype) for s, t in zip(second, inputs)]
        return (dgrad.to(grad.dtype), None, None, None, *second, *(None,) * (len(inputs) - 2))


def second_order(row: presets.Row, inputs: list, towards: tuple) -> list[Tensor | None]:
    """The Hessian of the loss in logp and log_z (None where there is none) times `towards`, in float64."""
    logp, log_z, anchor, old, sampler, reward, mask, cu_seqlens, groups, normalizer = inputs
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in (logp, log_z)]
        x, z = leaves
        assert x is not None
        each = Sequences(reward, z, groups, normalizer)
        terms = reference.residual(row, x, Anchors(anchor, old, sampler), each, Segments(mask, cu_seqlens))
        loss = reference.total(row, terms, normalizer)
        wanted = [leaf for leaf in leaves if leaf is not None]
        first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
        along = [t for t, leaf in zip(towards, leaves) if leaf is not None]
        dot = sum((g * t.double()).sum() for g, t in zip(first, along) if t is not None)
        if not (isinstance(dot, Tensor) and dot.requires_grad):  # a penalty without curvature
            return [None, None]
        second = iter(torch.autograd.grad(dot, wanted, materialize_grads=True))
    return [None if leaf is None else next(second) for leaf in leaves]
