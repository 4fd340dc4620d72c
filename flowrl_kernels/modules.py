"""Modules over the losses: settings held, tensors called with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowrl_kernels.core import checks, dispatch
from flowrl_kernels.core.head import checked_budget, checked_head, refuse_reference, sampled_of, stem_of
from flowrl_kernels.core.passes import one_pass
from flowrl_kernels.core.settle import Given, check_settings, dials_of, settle
from flowrl_kernels.core.types import LossOutput, Needs, Sampled
from flowrl_kernels.losses import flowrl_loss, run
from flowrl_kernels.ops import linear_logprob, linear_residual

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlowRLLoss", "LinearFlowRLLoss"]


class FlowRLLoss(nn.Module):
    """`flowrl_loss` with its settings held: `FlowRLLoss(preset="release")(logp, logp_ref, reward, log_z, ...)`.

    The constructor takes the settings (preset, beta, ratio, clip, length_normalize, length_power, anchor, phi, tis,
    tis_cap, correction, correction_cap, impl), the call takes the tensors (logp_old, mask or cu_seqlens, groups,
    normalizer, logp_sampler) and cp_group.
    """

    def __init__(self, **settings: Any):
        super().__init__()
        check_settings(type(self).__name__, settings)
        self.settings = settings

    def forward(
        self, logp: Tensor, logp_ref: Tensor | None, reward: Tensor, log_z: Any = ..., **tensors: Any
    ) -> LossOutput:
        return flowrl_loss(logp, logp_ref, reward, log_z, **tensors, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearFlowRLLoss(FlowRLLoss):
    """The FlowRL loss from hidden states: log-probs, residual and gradients without a vocabulary-sized tensor.

    Args of the constructor: `temperature`, `epsilon` (see `linear_logprob`), those of `FlowRLLoss`, and `single_pass`.
    With it, where gradients are wanted and epsilon is 0, `chunked` and `triton` make the logits of whole sequences
    once (6NHV instead of 8NHV) and hold them in a buffer of 2^26 numbers (2^30 on a GPU); logp has the same bits. Of a
    sequence longer than the buffer allows (7067 tokens at V = 151936) the logits are made twice, of it alone. The whole
    batch takes two passes where its sequences depend on each other (group-centred, token-level without normalizer) and
    do not fit together, or where such a long sequence is float16; the log (`flowrl_kernels`, INFO) says so once. A
    packed batch's `cu_seqlens` is read on the host once, to cut it into chunks; the padded layout waits for nothing.

    The gradients are made in the forward and multiplied by the incoming one in the backward, with no copy unless the
    graph is retained. One pass has first derivatives only, and says so; impl="reference" has all of them.
    """

    def __init__(self, *, temperature: float = 1.0, epsilon: float = 0.0, single_pass: bool = True, **settings: Any):
        super().__init__(**settings)
        if not isinstance(temperature, Tensor) or temperature.dim() == 0:
            temperature = checks.positive("temperature", checks.setting("temperature", temperature))
        epsilon = checks.setting("epsilon", epsilon)
        if not 0.0 <= epsilon < 1.0:
            checks.fail("epsilon", "a number in [0, 1)", epsilon)
        self.single_pass = checks.flag("single_pass", single_pass)
        self.temperature = temperature
        self.epsilon = epsilon

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        logp_ref: Tensor | None,
        reward: Tensor,
        log_z: Any = ...,
        *,
        logp_old: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        groups: Tensor | None = None,
        normalizer: Tensor | float | tuple[float, float] | None = None,
        logp_sampler: Tensor | None = None,
        bias: Tensor | None = None,
        temperature: float | Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        main_grad: Tensor | None = None,
        report: Tensor | None = None,
        cp_group: ProcessGroup | None = None,
        sampled: Sampled | None = None,
    ) -> LossOutput:
        """The loss of response positions only.

        Args:
            hidden: [B, T, H] with `mask` [B, T], or packed [N, H] with `cu_seqlens`: what predicts each token.
            weight: [V, H] the head.
            target: [B, T] or [N] the sampled token ids. Masked-out positions are not computed, and may hold anything in
                any tensor.
            logp_ref, reward, log_z, logp_old, mask, cu_seqlens, groups, normalizer, logp_sampler, cp_group: as in
                `flowrl_loss`. With cp_group it takes two passes.
            bias, temperature, logit_scale, softcap, main_grad, report, sampled: as in `linear_logprob`; main_grad and
                sampled take two passes.
        """
        checks.floating("hidden", hidden)
        ids = checks.integers("target", target, tuple(hidden.shape[:-1]))
        impl = self.settings.get("impl", "auto")
        if impl != "reference":
            for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias), ("log_z", log_z)):
                checks.no_tangent(name, value)
        if cp_group is not None:
            checks.process_group("cp_group", cp_group)
            if self.settings.get("correction") is not None:
                checks.fail("correction", "None beside cp_group, where a rank has parts of sequences only", "both")
        layout = torch.empty((), dtype=torch.float32, device=hidden.device).expand(ids.shape)
        given = Given(logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer)
        settled = settle(layout, given, dials_of(self.settings))
        temperature = self.temperature if temperature is None else temperature
        if mask is not None or self.settings.get("correction") is not None:
            left_out = ~settled.segments.mask
            ids = ids.long().masked_fill(left_out, -100)
            if isinstance(temperature, Tensor) and temperature.shape == ids.shape:
                temperature = temperature.masked_fill(left_out, 1.0)
        scale = checks.setting("logit_scale", logit_scale)
        cap = None if softcap is None else checks.setting("softcap", softcap)
        flat, ids, head, leading = checked_head(hidden, weight, ids, bias, temperature, scale, cap)
        draw = sampled_of(sampled, leading, head)
        budget = checked_budget(flat, head, self.epsilon, report, main_grad, draw)
        grad = torch.is_grad_enabled()
        need = Needs(*(grad and t is not None and t.requires_grad for t in (flat, head.weight, bias)))
        chosen = dispatch.resolve("linear_residual", impl, flat)
        plain = budget.epsilon == 0.0 and draw is None and main_grad is None and cp_group is None
        if self.single_pass and plain and any(need) and chosen != "reference":
            plan = one_pass(flat, len(head.weight), settled)
            if plan is not None:
                out = linear_residual.apply(
                    settled.row, flat, ids, head, settled.anchors, plan.each, plan.segments, plan.chunks, need, chosen
                )
                if report is not None:  # as an exact backward says
                    report.copy_(report.new_tensor([0.0, 1.0, 0.0]))
                return out
        chosen = dispatch.resolve(stem_of(budget), impl, flat)
        if chosen == "reference":
            refuse_reference(budget, main_grad)
        logp = linear_logprob.apply(flat, ids, head, -100, False, chosen, budget, main_grad).logp.reshape(leading)
        chosen = dispatch.resolve("residual" if cp_group is None else "context_parallel", impl, logp)
        return run(logp, settled, cp_group, chosen)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, epsilon={self.epsilon}, {super().extra_repr()}"
