"""`flowrl::linear_logprob`: what the forward keeps, what the backward needs, and what is differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import reference
from flowrl_kernels.chunked import sampled, tiles
from flowrl_kernels.chunked.recompute import kept_shape
from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.core.types import (
    EXACT,
    TILE,
    Budget,
    Draw,
    Head,
    LogProb,
    LogProbStatistics,
    Needs,
    RowStatistics,
    Saved,
    Upstream,
)
from flowrl_kernels.ops.operator import operator

STEM = "linear_logprob"
NO_DRAW = (0.0, 0, None, None, "")


def clean_target(target: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets as the launchers read them (-1 skip, V no target), and the masks of ignored and of wrong ones."""
    target = target.long()
    ignored = target == ignore_index
    wrong = ((target < 0) | (target >= vocab_size)) & ~ignored
    return target.masked_fill(ignored, -1).masked_fill(wrong, vocab_size), ignored, wrong


def places(target: Tensor, order: Tensor) -> Tensor:
    """Where the targets stand in the order; those that are no ids stay as they are. [N]"""
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    known = (target >= 0) & (target < len(order))
    return torch.where(known, inverse[target.clamp(0, len(order) - 1)], target)


def finish(logp: Tensor, ignored: Tensor, wrong: Tensor) -> Tensor:
    """Ignored ids 0; a target outside the vocabulary NaN, which no later step can hide."""
    return logp.masked_fill(wrong, float("nan")).masked_fill(ignored, 0.0)


def upstream(grad: Tensor | None, like: Tensor, ignored: Tensor) -> Tensor:
    """A gradient as the launchers read it: dtype of `like`, dense, 0 where ignored."""
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype).masked_fill(ignored, 0.0).contiguous()


def rows_ignored(ignored: Tensor) -> Tensor:
    """Rows of which no id counts. [N] or [N, K] -> [N]"""
    return ignored if ignored.dim() == 1 else ignored.all(1)


def both_upstream(grad_logp: Tensor | None, grad_entropy: Tensor | None, like: Tensor, ignored: Tensor) -> Upstream:
    entropy = None if grad_entropy is None else upstream(grad_entropy, like, rows_ignored(ignored))
    return Upstream(upstream(grad_logp, like, ignored), entropy)


@operator("flowrl::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] or [N, K]
    bias: Tensor | None,  # [V]
    temperature: Tensor,  # [N] or [1]
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    entropy: bool,
    epsilon: float,
    report: Tensor | None,  # [3], written by the backward
    main_grad: Tensor | None,  # [V, H], written by the backward
    impl: str,
    share: float = 0.0,  # above 0: a sampled backward, by the draw that the rest names
    draw: int = 0,
    rows: Tensor | None = None,  # [N] int64
    order: Tensor | None = None,  # [V] int64
    group: str = "",
    statistics: bool = False,
    keep: bool = False,  # logits for the backward, as chunked/recompute.py says
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp like target, entropy [N] or [0], lse [2, N], tile statistics [ceil(V/128), N] or [0, 0], argmax and
    mean logit [N] or [0] each, kept logits [N, C] or [0, 0].

    lse is a row's log-sum-exp as its maximum and the log of the sum relative to it: of a confident row, the sum of the
    two keeps nothing of what is left to the other tokens.
    """
    clean, ignored, wrong = clean_target(target, weight.shape[0], ignore_index)
    head = Head(weight, bias, temperature, logit_scale, softcap)
    room, partial = launchers(STEM, impl), epsilon > 0.0 or share > 0.0
    count, dtype = len(hidden) if statistics else 0, torch.float64 if hidden.dtype == torch.float64 else torch.float32
    into = RowStatistics(hidden.new_empty(count, dtype=torch.int64), hidden.new_empty(count, dtype=dtype))
    kept, more = logits_to_keep(hidden, weight, keep), dict[str, Any]()
    if statistics:
        more["statistics"] = into
    elif order is not None:
        more["order"], clean = order, places(clean, order)
    if keep:
        more["kept"] = kept
    logp, lse, ent, stats, _ = room.linear_logprob_fwd(hidden, clean, head, entropy, partial, **more)
    return finish(logp, ignored, wrong), ent, lse, stats, *into, kept


def logits_to_keep(hidden: Tensor, weight: Tensor, keep: bool) -> Tensor:
    """Room for them. [N, C] or [0, 0]"""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shape = kept_shape(hidden.shape[0], weight.shape[0], hidden.dtype.itemsize) if keep else (0, 0)
    return hidden.new_empty(shape, dtype=dtype)


@linear_logprob.register_fake
def _(hidden, weight, target, bias, temperature, logit_scale, softcap, ignore_index, entropy, epsilon, report,
      main_grad, impl, share=0.0, draw=0, rows=None, order=None, group="", statistics=False, keep=False):  # fmt: skip
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    runs = (vocab_size + TILE - 1) // TILE
    return (
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(num_tokens if entropy else 0, dtype=dtype),
        hidden.new_empty((2, num_tokens), dtype=dtype),
        hidden.new_empty((runs, num_tokens) if epsilon > 0.0 or share > 0.0 else (0, 0), dtype=torch.float16),
        hidden.new_empty(num_tokens if statistics else 0, dtype=torch.int64),
        hidden.new_empty(num_tokens if statistics else 0, dtype=dtype),
        logits_to_keep(hidden, weight, keep),
    )


@operator("flowrl::linear_logprob_bwd", mutates_args=("report", "main_grad"))
def linear_logprob_bwd(
    grad_logp: Tensor | None,  # [N] or [N, K], as target and logp
    grad_entropy: Tensor | None,  # [N]
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    ent: Tensor,
    stats: Tensor,
    report: Tensor | None,
    main_grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    epsilon: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    share: float = 0.0,
    draw: int = 0,
    rows: Tensor | None = None,  # [N]
    order: Tensor | None = None,  # [V]
    group: str = "",
    kept: Tensor | None = None,  # [N, C]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [N, H], weight [V, H], bias [V]; [0] where not needed or kept in main_grad."""
    clean, ignored, _ = clean_target(target, weight.shape[0], ignore_index)
    head, saved = Head(weight, bias, temperature, logit_scale, softcap), Saved(logp, lse, ent, stats, kept)
    clean = clean if order is None else places(clean, order)
    budget = Budget(epsilon, report, Draw(share, draw, rows, order, group) if share > 0.0 else None)
    dhidden, dweight, dbias = launchers(STEM, impl).linear_logprob_bwd(
        both_upstream(grad_logp, grad_entropy, logp, ignored), hidden, clean, head, saved,
        Needs(need_hidden, need_weight, need_bias), budget, main_grad,
    )  # fmt: skip
    nothing = hidden.new_empty(0)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return (
        nothing if dhidden is None else dhidden,
        nothing.clone() if dweight is None else dweight,
        nothing.clone() if dbias is None else dbias,
    )


@linear_logprob_bwd.register_fake
def _(grad_logp, grad_entropy, hidden, weight, target, bias, temperature, logp, lse, ent, stats, report, main_grad,
      logit_scale, softcap, ignore_index, epsilon, need_hidden, need_weight, need_bias, *_, **__):  # fmt: skip
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return torch.empty_like(tensor) if wanted and tensor is not None else hidden.new_empty(0)

    return like(hidden, need_hidden), like(weight, need_weight and main_grad is None), like(bias, need_bias)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, target, bias, temperature, *settings = inputs
    logit_scale, softcap, ignore_index, ctx.entropy, epsilon, report, main_grad, impl, *draw = settings
    share, key, rows, order, group = draw[:5] or NO_DRAW
    keep = len(draw) > 6 and draw[6]  # a call may leave out what stands at the end
    logp, ent, lse, stats, *statistics, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, stats, *statistics, kept)
    kept = kept if keep else None
    ctx.save_for_backward(hidden, weight, target, bias, temperature, logp, lse, ent, stats, rows, order, kept)
    ctx.draw = share, key, group
    # what the backward writes, so no saved value: it may change between forward and backward, and twice
    ctx.written = report, main_grad
    ctx.settings = (logit_scale, softcap, ignore_index, epsilon)
    ctx.impl = impl


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple:
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    report, main_grad = ctx.written
    nothing = (None,) * 20
    *saved, rows, order, kept = ctx.saved_tensors
    share, key, group = ctx.draw
    grad_entropy = grad_entropy if ctx.entropy else None
    if grad_logp is None and grad_entropy is None:
        return nothing
    dhidden, dweight, dbias = linear_logprob_bwd(
        grad_logp, grad_entropy, *saved, report, main_grad, *ctx.settings,
        need_hidden, need_weight, need_bias, ctx.impl, share, key, rows, order, group, kept,
    )  # fmt: skip
    return (
        dhidden if need_hidden else None,
        dweight if need_weight and main_grad is None else None,
        None,
        dbias if need_bias else None,
        *nothing[4:],
    )


def keeps(hidden: Tensor, head: Head, budget: Budget, impl: str) -> bool:
    """Whether the forward leaves logits for an exact backward: on a CPU, where a product costs more than its memory.

    A sampled backward that is known to be the exact one has that one's bits.
    """
    draw = budget.draw
    exact = budget.epsilon == 0.0 and (draw is None or (draw.share >= sampled.FALL_BACK and draw.order is None))
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)
    )
    return (
        impl == "chunked" and tiles.host_knows(hidden) and exact and wanted and head.softcap is None
        and kept_shape(hidden.shape[0], head.weight.shape[0], hidden.dtype.itemsize) != (0, 0)
    )  # fmt: skip


def apply(
    hidden: Tensor, target: Tensor, head: Head, ignore_index: int, entropy: bool, impl: str, budget: Budget = EXACT,
    main_grad: Tensor | None = None, statistics: bool = False,
) -> LogProb | LogProbStatistics:  # fmt: skip
    """The operator on structs, where autocast has had its say; the reference without it, in plain autograd."""
    # inside, autocast would round the very products that must stay in fp32
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "reference":
            return reference.linear_logprob(hidden, head.weight, target, *head[1:], ignore_index, entropy, statistics)
        logp, ent, _, _, argmax, mean_logits, _ = linear_logprob(
            hidden, head.weight, target, head.bias, head.temperature, head.logit_scale, head.softcap, ignore_index,
            entropy, budget.epsilon, budget.report, main_grad, impl, *(budget.draw or NO_DRAW), statistics,
            keeps(hidden, head, budget, impl),
        )  # fmt: skip
    if not statistics:
        return LogProb(logp, ent if entropy else None)
    is_top1 = (target == (argmax if target.dim() == 1 else argmax[:, None])) & (target != ignore_index)
    return LogProbStatistics(logp, ent if entropy else None, argmax, is_top1, mean_logits)


linear_logprob.register_autograd(_backward, setup_context=_setup_context)
