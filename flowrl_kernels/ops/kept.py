"""`linear_logprob` renormalised over the tokens a sampler kept: which rows go which way, and what is put together.

Rows with few ids are gathered entry by entry (the launchers of "linear_logprob_kept"), rows with very many go by dense
tiles with a bit a column, and rows over the whole vocabulary are those of `linear_logprob` itself, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels import reference
from flowrl_kernels.chunked import linear_logprob as dense
from flowrl_kernels.chunked.kept_lists import Lists, Wide, make_lists, stray
from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.core.types import EXACT, Budget, Head, Kept, LogProb, Needs, Saved, Upstream
from flowrl_kernels.ops import linear_logprob as exact
from flowrl_kernels.ops import vocab_parallel
from flowrl_kernels.ops.operator import OnceDifferentiable, first_backward_only, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STEM = "linear_logprob_kept"


class Settings(NamedTuple):
    """What is no tensor that autograd should see."""

    kept: Kept
    logit_scale: float
    softcap: float | None
    ignore_index: int
    entropy: bool
    budget: Budget
    main_grad: Tensor | None
    group: ProcessGroup | None
    impl: str
    keep: bool = False  # logits of whole rows, where a call without kept sets keeps them


class Ways(NamedTuple):
    """Which rows go which way, and what each leaves for the backward."""

    target: Tensor  # [N] in this shard: -1 skips the row, V means no target here
    whole: Tensor | None  # [N] bool
    lists: Lists
    z: Tensor  # [E] logits of the entries
    wide: Wide | None
    tile_lse: Tensor  # of the whole rows, or [0, 0]
    logits: Tensor | None  # of the whole rows, [N, C]


class KeptLogProb(OnceDifferentiable):
    """logp [N], entropy over the kept set [N] or None."""

    name = "linear_logprob with kept"

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor,
        settings: Settings,
    ):  # fmt: skip
        kept, logit_scale, softcap, ignore_index, entropy, _, _, group, *_ = settings
        start: Tensor | int = 0
        vocab_size: Tensor | int = len(weight)
        if group is not None:
            start, vocab_size = vocab_parallel.shard(group, len(weight), hidden.device)
        target = target.long()
        ignored = target == ignore_index
        wrong = (((target < 0) | (target >= vocab_size)) | stray(kept, vocab_size)) & ~ignored
        local = target - start
        elsewhere = (local < 0) | (local >= len(weight))
        local = local.masked_fill(elsewhere, len(weight)).masked_fill(ignored, -1)
        head = Head(weight, bias, temperature, logit_scale, softcap)
        own, ways = _forward(hidden, local, head, kept._replace(ids=kept.ids - start), settings)
        if group is not None:
            logp, lse, ent = vocab_parallel.across(own, elsewhere, ignored, wrong, entropy, group)
        else:
            logp, lse, ent = exact.finish(own.logp, ignored, wrong), own.lse, own.entropy
        ctx.save_for_backward(hidden, weight, bias, temperature, logp, lse, ent, ignored, *_flat(ways))
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logp, ent if entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None):
        with torch.no_grad():
            gradients = without_autocast(KeptLogProb._gradients)(ctx.saved_tensors[0], ctx, grad_logp, grad_entropy)
        return first_backward_only(KeptLogProb.name, gradients, *ctx.saved_tensors[:2], grad_logp, grad_entropy)

    @staticmethod
    def _gradients(hidden: Tensor, ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        _, weight, bias, temperature, logp, lse, ent, ignored, *ways = ctx.saved_tensors
        settings: Settings = ctx.settings
        need = Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        head = Head(weight, bias, temperature, settings.logit_scale, settings.softcap)
        entropies = ent if ent is not None else logp.new_empty(0)
        dhidden, dweight, dbias = _backward(
            exact.both_upstream(grad_logp, grad_entropy, logp, ignored), hidden, head,
            Saved(logp, lse, entropies, logp.new_empty(0)), _ways(ways), need, settings,
        )  # fmt: skip
        if settings.main_grad is not None:
            torch.autograd.graph.increment_version(settings.main_grad)  # a kernel writes past autograd
        if dhidden is not None:
            if settings.group is not None:
                torch.distributed.all_reduce(dhidden, group=settings.group)
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, dweight, None if dbias is None or bias is None else dbias.to(bias.dtype), None, None, None


def _flat(ways: Ways) -> list[Tensor | None]:
    wide: tuple[Tensor | None, ...] = (None, None) if ways.wide is None else ways.wide
    return [ways.target, ways.whole, *ways.lists, ways.z, *wide, ways.tile_lse, ways.logits]


def _ways(flat: list[Any]) -> Ways:
    target, whole, *lists, z, wide_rows, bits, tile_lse, logits = flat
    return Ways(target, whole, Lists(*lists), z, None if bits is None else Wide(wide_rows, bits), tile_lse, logits)


def _of_rows(rows: Tensor, head: Head) -> Head:
    return head if head.temperature.numel() == 1 else head._replace(temperature=head.temperature[rows])


def _forward(hidden: Tensor, target: Tensor, head: Head, kept: Kept, settings: Settings) -> tuple[Saved, Ways]:
    """Of one shard: logp (-inf without a target here), log-sum-exp, entropy; 0 in skipped rows, which hold anything."""
    lists, wide = make_lists(kept, target, len(head.weight))
    saved, z = launchers(STEM, settings.impl).linear_logprob_kept_fwd(hidden, lists, head, settings.entropy)
    logp, lse, ent, nothing, *_ = saved
    tile_lse, logits = nothing, None
    if kept.whole is not None:
        alone = torch.where(kept.whole, target, -1)
        partial = settings.budget.epsilon > 0.0
        more: dict[str, Tensor] = {}
        if settings.keep:
            logits = exact.logits_to_keep(hidden, head.weight, True)
            more = {"kept": logits}
        made = launchers(exact.STEM, settings.impl).linear_logprob_fwd(
            hidden, alone, head, settings.entropy, partial, **more
        )
        logp, lse = torch.where(kept.whole, made.logp, logp), torch.where(kept.whole, made.lse, lse)
        ent = torch.where(kept.whole, made.entropy, ent) if settings.entropy else ent
        tile_lse = made.tile_lse
    if wide is not None:
        made = dense.linear_logprob_fwd(
            hidden[wide.rows], target[wide.rows], _of_rows(wide.rows, head), settings.entropy, False, bits=wide.bits
        )
        logp, lse = logp.index_copy(0, wide.rows, made.logp), lse.index_copy(1, wide.rows, made.lse)
        ent = ent.index_copy(0, wide.rows, made.entropy) if settings.entropy else ent
    skipped = target < 0
    logp, lse = logp.masked_fill(skipped, 0.0), lse.masked_fill(skipped, 0.0)
    ent = ent.masked_fill(skipped, 0.0) if settings.entropy else ent
    return Saved(logp, lse, ent, nothing), Ways(target, kept.whole, lists, z, wide, tile_lse, logits)


def _backward(
    grad: Upstream, hidden: Tensor, head: Head, saved: Saved, ways: Ways, need: Needs, settings: Settings
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden and bias in the accumulator's dtype, of weight in its own or in main_grad."""
    target, whole, lists, z, wide, tile_lse, logits = ways
    main_grad, budget, weight = settings.main_grad, settings.budget, head.weight
    several = whole is not None or wide is not None
    into, made = main_grad, None
    if need.weight and main_grad is None and several:
        # what several parts add to is rounded once
        into = made = torch.zeros_like(weight, dtype=saved.lse.dtype)
    dhidden, dweight, dbias = launchers(STEM, settings.impl).linear_logprob_kept_bwd(
        grad, hidden, lists, z, head, saved, need, into if need.weight else None
    )
    if whole is not None:
        alone = torch.where(whole, target, -1)
        more = launchers(exact.STEM, settings.impl).linear_logprob_bwd(
            grad, hidden, alone, head, saved._replace(tile_lse=tile_lse, kept=logits), need, budget, into,
            wide_hidden=True,
        )  # fmt: skip
        dhidden, dbias = _plus(dhidden, more[0]), _plus(dbias, more[2])
    else:
        budget.tell(0.0, 1.0, budget.epsilon > 0.0)
    if wide is not None:
        rows = wide.rows
        more = dense.linear_logprob_bwd(
            Upstream(grad.logp[rows], None if grad.entropy is None else grad.entropy[rows]), hidden[rows],
            target[rows], _of_rows(rows, head),
            Saved(saved.logp[rows], saved.lse[:, rows], saved.entropy[rows] if len(saved.entropy) else saved.entropy,
                  saved.tile_lse), need, EXACT, into, wide_hidden=True, bits=wide.bits,
        )  # fmt: skip
        if dhidden is not None:
            dhidden.index_copy_(0, rows, more[0])
        dbias = _plus(dbias, more[2])
    return dhidden, dweight if made is None else made.to(weight.dtype), dbias


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a + b.to(a.dtype)


def apply(hidden: Tensor, target: Tensor, head: Head, settings: Settings) -> LogProb:
    """`KeptLogProb` on structs, where autocast has had its say; the reference without it, in plain autograd."""
    weight, bias, temperature, *_ = head
    with torch.autocast(hidden.device.type, enabled=False):
        if settings.impl == "reference":
            return reference.linear_logprob_kept(
                hidden, weight, target, settings.kept, *head[1:], settings.ignore_index, settings.entropy
            )
        whole = settings.kept.whole is not None and settings.group is None
        settings = settings._replace(keep=whole and exact.keeps(hidden, head, settings.budget, settings.impl))
        return LogProb(*KeptLogProb.call(hidden, weight, bias, target, temperature, settings))
