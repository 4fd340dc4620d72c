"""`flowrl::linear_residual`: the loss from hidden states with its gradients made in the forward (6NHV, one pass)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import presets
from flowrl_kernels.dispatch import launchers
from flowrl_kernels.ops.linear_logprob import clean_target
from flowrl_kernels.ops.operator import operator
from flowrl_kernels.ops.residual import NUM_METRICS

BUFFER = 1 << 26  # logits of one chunk on a CPU: 268 MB in fp32
GPU_BUFFER = 1 << 30


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """The most tokens whose logits are held at once."""
    return max(1, (BUFFER if device_type == "cpu" else GPU_BUFFER) // vocab_size)


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
    edges: list[int],  # the tokens at which chunks of whole sequences begin, and N: host values, so no sync here
    bounds: list[int],  # the sequences at which they begin, and B
    normalizer: Tensor | None,  # scalar
    row: str,
    need: list[bool],  # hidden, weight, bias
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], then dhidden, dweight, dbias ([0] if not needed), dlog_z [B]."""
    settings = presets.loads(row)
    clean, _, wrong = clean_target(target, weight.shape[0], -100)
    logp, *gradients = launchers("linear_residual", impl).linear_residual_fwd(
        settings, hidden, weight, clean, bias, temperature, logit_scale, softcap, anchor, old, sampler, reward, log_z,
        mask, cu_seqlens, groups, edges, bounds, normalizer, *need,
    )  # fmt: skip
    logp = logp.masked_fill(wrong, float("nan"))
    # the whole batch once more over [N]: its loss and metrics, and the gradient of log Z
    loss, d, w, metrics, _, dlog_z = launchers("residual", impl).residual_fwd(
        settings, logp, anchor, old, sampler, reward, log_z, mask, cu_seqlens, groups, normalizer
    )
    dtype = logp.dtype
    nothing = hidden.new_empty(0)
    dhidden, dweight, dbias = (nothing.clone() if g is None else g for g in gradients)
    if bias is not None and need[2]:
        dbias = dbias.to(bias.dtype)
    dlog_z = dlog_z.to(dtype if log_z is None else log_z.dtype)
    return loss.to(dtype), d.to(dtype), w.to(dtype), metrics.to(dtype), dhidden, dweight, dbias, dlog_z


@linear_residual.register_fake
def _(hidden, weight, bias, log_z, target, temperature, logit_scale, softcap, anchor, old, sampler, reward, mask,
      cu_seqlens, groups, edges, bounds, normalizer, row, need, impl):  # fmt: skip
    dtype, num = (torch.float64 if hidden.dtype == torch.float64 else torch.float32), reward.shape[0]
    parts = [
        torch.empty_like(t) if n and t is not None else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias), need)
    ]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(num, dtype=dtype),
        hidden.new_empty(num, dtype=dtype),
        hidden.new_empty(NUM_METRICS, dtype=dtype),
        *parts,
        hidden.new_empty(num, dtype=dtype if log_z is None else log_z.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 21
    scaled = getattr(ctx, "scaled", False)
    if scaled:
        raise RuntimeError(
            "linear_residual: a second backward through one forward; the first scaled the gradients in place. "
            "Use single_pass=False to go backward more than once"
        )
    # a copy of dweight would be the largest tensor of the whole loss; under a tracer it is the tracer's to plan
    plain = type(grad) is Tensor
    whole = plain and grad.device.type == "cpu" and bool(grad == 1)
    ctx.scaled = plain and not whole
    gradients = []
    for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad):
        if needed and saved.numel() and not whole:
            saved = saved.data.mul_(grad) if plain else (grad * saved).to(saved.dtype)
        gradients.append(saved if needed else None)
    return (*gradients, *(None,) * 17)


linear_residual.register_autograd(_backward, setup_context=_setup_context)
