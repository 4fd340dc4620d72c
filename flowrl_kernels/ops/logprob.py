"""`flowrl::logprob`: the same contract as `flowrl::linear_logprob`, from logits that already exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import reference
from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.core.types import LogProb
from flowrl_kernels.ops.linear_logprob import both_upstream, clean_target, finish
from flowrl_kernels.ops.operator import first_backward_only, operator

STEM = "logprob"


@operator("flowrl::logprob", mutates_args=())
def logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N] or [N, K]
    temperature: Tensor,  # [N] or [1]
    softcap: float | None,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp like target, entropy [N] or [0], lse [2, N]: maximum and log of the sum."""
    clean, ignored, wrong = clean_target(target, logits.shape[1], ignore_index)
    logp, lse, ent = launchers(STEM, impl).logprob_fwd(logits, clean, temperature, softcap, entropy)
    return finish(logp, ignored, wrong), ent, lse


@logprob.register_fake
def _(logits, target, temperature, softcap, ignore_index, entropy, *_):
    num_tokens = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(target.shape, dtype=dtype),
        logits.new_empty(num_tokens if entropy else 0, dtype=dtype),
        logits.new_empty((2, num_tokens), dtype=dtype),
    )


def _gradient(
    grad: tuple[Tensor | None, Tensor | None], logits: Tensor, target: Tensor, temperature: Tensor,
    saved: tuple[Tensor, Tensor, Tensor], softcap: float | None, ignore_index: int, inplace: bool, impl: str,
) -> Tensor:  # fmt: skip
    clean, ignored, _ = clean_target(target, logits.shape[1], ignore_index)
    upstream = both_upstream(*grad, saved[0], ignored)
    return launchers(STEM, impl).logprob_bwd(*upstream, logits, clean, temperature, softcap, *saved, inplace)


@operator("flowrl::logprob_bwd", mutates_args=())
def logprob_bwd(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    ent: Tensor,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> Tensor:
    """Gradient of the logits in their dtype. [N, V]"""
    grad, saved = (grad_logp, grad_entropy), (logp, lse, ent)
    return _gradient(grad, logits, target, temperature, saved, softcap, ignore_index, False, impl)


@logprob_bwd.register_fake
def _(grad_logp, grad_entropy, logits, *_):
    return torch.empty_like(logits)


@operator("flowrl::logprob_bwd_", mutates_args=("logits",))
def logprob_bwd_(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    ent: Tensor,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> None:
    """Writes the gradient over the logits: one [N, V] buffer for both, and no second backward."""
    grad, saved = (grad_logp, grad_entropy), (logp, lse, ent)
    _gradient(grad, logits, target, temperature, saved, softcap, ignore_index, True, impl)


@logprob_bwd_.register_fake
def _(*_) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, target, temperature, softcap, ignore_index, ctx.entropy, inplace, impl = inputs
    logp, ent, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, target, temperature, logp, lse, ent)
    ctx.settings, ctx.inplace = (softcap, ignore_index, impl), inplace


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple:
    grad_entropy = grad_entropy if ctx.entropy else None
    if grad_logp is None and grad_entropy is None:
        return (None,) * 8
    logits, *rest = ctx.saved_tensors
    arguments = (grad_logp, grad_entropy, logits, *rest, *ctx.settings)
    if not ctx.inplace:
        return (logprob_bwd(*arguments),) + (None,) * 7
    # autograd's version counter refuses a second backward: the logits it saved are gone
    with torch.no_grad():
        logprob_bwd_(*arguments)
    return first_backward_only(STEM, (logits.detach(),) + (None,) * 7, logits, grad_logp, grad_entropy)


def apply(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None, ignore_index: int, entropy: bool,
    inplace: bool, impl: str,
) -> LogProb:  # fmt: skip
    """The operator; the reference without it, in plain autograd."""
    if impl == "reference":
        out = reference.logprob(logits, target, temperature, softcap, ignore_index, entropy)
        return LogProb(out.logp, out.entropy)
    logp, ent, _ = logprob(
        logits.contiguous(), target.contiguous(), temperature, softcap, ignore_index, entropy, inplace, impl
    )
    return LogProb(logp, ent if entropy else None)


logprob.register_autograd(_backward, setup_context=_setup_context)
