"""`flowrl::linear_residual`: the loss from hidden states with its gradients made in the forward (6NHV, one pass).

The gradients wait for the incoming one, which multiplies them: in place where the graph is not kept, because a copy of
dweight would be the largest tensor of the whole loss; out of place where it is (`retain_graph=True` pays for a copy).
In float16 they wait with a power of two of their own for each row, so that a loss scale that comes later finds all
their digits: one number a row, and fp32 sums of [V, H] and [N, H] while they are made. First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import presets
from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import METRICS, Anchors, Chunks, Head, LossOutput, Needs, Sequences
from flowrl_kernels.ops.linear_logprob import clean_target
from flowrl_kernels.ops.operator import operator
from flowrl_kernels.ops.residual import output

SCALED_ROWS = 32768  # scaled at a time, in fp32


@operator("flowrl::linear_residual", mutates_args=())
def linear_residual(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    log_z: Tensor | None,  # [B]
    target: Tensor,  # [N]
    temperature: Tensor,  # [N] or [1]
    logit_scale: float,
    softcap: float | None,
    anchor: Tensor | None,  # [N]
    old: Tensor | None,  # [N]
    sampler: Tensor | None,  # [N]
    reward: Tensor,  # [B]
    mask: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [B+1] int64
    groups: Tensor | None,  # [B]
    most: int,  # tokens whose logits are held at once; a chunk of more is one long sequence
    edges: list[int],  # the tokens at which chunks of whole sequences begin, and N: host values, so no sync here
    bounds: list[int],  # the sequences at which they begin, and B
    normalizer: Tensor | None,  # scalar
    codes: list[int],  # of the row: `presets.Row.codes`
    numbers: Tensor,  # of the row: `presets.Row.packed_numbers`
    need: list[bool],  # hidden, weight, bias
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], then dhidden, dweight, dbias, dlog_z [B], and the factors
    [N] and [V] that the rows of dhidden and dweight still want in float16; [0] for what is not needed."""
    clean, _, _ = clean_target(target, weight.shape[0], -100)
    out = launchers("linear_residual", impl).linear_residual_fwd(
        presets.row_of(codes, numbers.tolist()), hidden, clean, Head(weight, bias, temperature, logit_scale, softcap),
        Anchors(anchor, old, sampler), Sequences(reward, log_z, groups, normalizer), Segments(mask, cu_seqlens),
        Chunks(most, edges, bounds), Needs(*need),
    )  # fmt: skip
    dtype = out.logp.dtype
    loss, d, w, metrics, dlog_z = (value.to(dtype) for value in out[1:6])
    nothing = hidden.new_empty(0, dtype=dtype)
    dhidden, dweight = (nothing.to(hidden.dtype, copy=True) if g is None else g for g in (out.dhidden, out.dweight))
    dbias = nothing.clone() if out.dbias is None else out.dbias
    factors = [nothing.clone(), nothing.clone()]
    if hidden.dtype == torch.float16:
        dhidden, factors[0] = halved(dhidden)
        dweight, factors[1] = halved(dweight)
    return loss, d, w, metrics, dhidden, dweight, dbias, dlog_z, *factors


def halved(value: Tensor) -> tuple[Tensor, Tensor]:
    """float16 [R, H] of an fp32 one, overwritten, with its rows just under 2^15, and what they were divided by. [R]"""
    if value.dtype == torch.float16:  # not needed
        return value, value.new_empty(0, dtype=torch.float32)
    largest = torch.maximum(value.amax(1), value.amin(1).neg())
    up = (15 - torch.frexp(largest).exponent).clamp(-120, 120)
    factor, inverse = (((e + 127) << 23).to(torch.int32).view(torch.float32) for e in (up, -up))  # exact powers of two
    return value.mul_(factor[:, None]).half(), inverse


@linear_residual.register_fake
def _(hidden, weight, bias, log_z, target, temperature, logit_scale, softcap, anchor, old, sampler, reward, mask,
      cu_seqlens, groups, most, edges, bounds, normalizer, codes, numbers, need, impl):  # fmt: skip
    dtype, num = (torch.float64 if hidden.dtype == torch.float64 else torch.float32), reward.shape[0]
    new, half = {"dtype": dtype}, hidden.dtype == torch.float16
    return (
        hidden.new_empty((), **new),
        hidden.new_empty(num, **new),
        hidden.new_empty(num, **new),
        hidden.new_empty(len(METRICS), **new),
        torch.empty_like(hidden) if need[0] else hidden.new_empty(0),
        torch.empty_like(weight) if need[1] else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0] if need[2] and bias is not None else 0, **new),
        hidden.new_empty(num, **new),
        hidden.new_empty(hidden.shape[0] if half and need[0] else 0, **new),
        hidden.new_empty(weight.shape[0] if half and need[1] else 0, **new),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:4]]
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 23
    if torch.is_grad_enabled():
        raise RuntimeError(
            "LinearFlowRLLoss: a single pass has first derivatives only (no create_graph, no torch.func transform); "
            "impl='reference' has the others"
        )
    *saved, hidden_factor, weight_factor = ctx.saved_tensors
    plain = type(grad) is Tensor
    last = plain and not _kept()  # nobody will read again what was saved
    unit = plain and grad.device.type == "cpu" and bool(grad == 1)
    factors = (hidden_factor, weight_factor, None, None)
    gradients: list[Tensor | None] = []
    for value, factor, dtype, needed in zip(saved, factors, ctx.dtypes, ctx.needs_input_grad):
        if not needed or dtype is None:
            gradients.append(None)
        elif factor is not None and factor.numel():
            gradients.append(_scale_rows(value, grad * factor, last))
        elif unit and last:
            gradients.append(value.to(dtype))
        elif last and value.dtype == dtype:
            gradients.append(value.data.mul_(grad))
        else:
            gradients.append((grad * value).to(dtype))
    return (*gradients, *(None,) * 19)


def _scale_rows(value: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    """float16 [R, H] times [R] in fp32, rounded once."""
    if not in_place:
        return (value * factor[:, None]).to(value.dtype)
    value = value.data
    for begin in range(0, len(value), SCALED_ROWS):
        own = slice(begin, begin + SCALED_ROWS)
        value[own] = value[own] * factor[own, None]
    return value


def _kept() -> bool:
    """Whether the backward that runs keeps the graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def apply(
    row: presets.Row, hidden: Tensor, target: Tensor, head: Head, anchors: Anchors, each: Sequences, segments: Segments,
    chunks: Chunks, need: Needs, impl: str,
) -> LossOutput:  # fmt: skip
    """The operator on structs; the tokens of `anchors` in any layout that is the packed one when flattened."""
    weight, bias, *dials = head
    assert segments.cu_seqlens is not None
    with torch.autocast(hidden.device.type, enabled=False):
        loss, d, weights, metrics, *_ = linear_residual(
            hidden, weight, bias, each.log_z, target, *dials, *anchors.flat(),
            each.reward, segments.mask, segments.cu_seqlens, each.groups, *chunks, each.normalizer,
            row.codes(), row.packed_numbers(), list(need), impl,
        )  # fmt: skip
    return output(loss, d, weights, metrics)


linear_residual.register_autograd(_backward, setup_context=_setup_context)
