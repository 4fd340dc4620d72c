"""FlowRL in open-instruct's grpo_fast.py (read at allenai/open-instruct e6c3044). It has no hook for a loss, and its
`compute_grpo_loss` sees packed rows without their boundaries. `install` replaces that function, and wraps the forward
before it, whose position ids tell where a sequence starts. It has to run in each Ray worker, before the learner does:
add `"worker_process_setup_hook": "open_instruct_flowrl.install"` to the runtime_env in grpo_fast.py's `ray.init`.

    python open_instruct/grpo_fast.py --advantage_normalization_type standard --load_ref_policy True --beta 0.0 ...

Log-probs are open-instruct's, from logits; there is no log Z. Its rho weights are the second weight. open-instruct
divides by tokens: RESPONSE_TOKENS, the usual length, makes that a mean over responses. sequence_parallel_size: 1.
"""

import torch

from flowrl_kernels import flowrl_loss

SETTINGS = {"preset": "release_no_log_z", "beta": 15.0}  # "release_old_anchor_no_log_z" needs no reference
RESPONSE_TOKENS = 1.0


def flowrl(starts, invalid, new_logprobs, ratio, advantages, ref_logprobs, rho_weights):
    """Per-token losses [B, T - 1] whose masked sum is the sum over responses; clipped share and KL beside them.

    Args:
        starts: bool [B, T], True where a sequence begins (a padding token counts as one: it has no response).
        invalid: the value that stands for a log-prob outside the responses.
        the others: [B, T - 1], of the token after each position.
    """
    mask = new_logprobs != invalid
    old = (new_logprobs - ratio.log()).detach()
    first = starts[:, 1:].clone()
    first[:, 0] = True  # a row begins a sequence, whatever the row before ended with
    edges = first.reshape(-1).nonzero()[:, 0]
    cu_seqlens = torch.cat((edges, edges.new_tensor([first.numel()])))
    row = first.reshape(-1).cumsum(0) - 1
    total, count = (
        torch.zeros(len(edges), device=row.device).index_add_(0, row, value.reshape(-1).float())
        for value in (advantages * mask, mask)
    )
    out = flowrl_loss(
        new_logprobs.reshape(-1), None if ref_logprobs is None else ref_logprobs.reshape(-1),
        total / count.clamp_min(1), None, logp_old=old.reshape(-1), mask=mask.reshape(-1), cu_seqlens=cu_seqlens,
        logp_sampler=(old - rho_weights.clamp_min(1e-26).log()).reshape(-1), tis="token", tis_cap=1e30,
        normalizer=1.0 / RESPONSE_TOKENS, **SETTINGS,
    )  # fmt: skip
    spread = mask / mask.sum().clamp_min(1)
    return out.loss * spread, out.metrics["clipped_high"] * mask.float(), torch.zeros_like(new_logprobs)


def install():
    from open_instruct import grpo_utils

    theirs, starts = grpo_utils.forward_for_logprobs, []

    def forward_for_logprobs(model, query_responses, attention_mask, position_ids, *args, **kwargs):
        starts[:] = [position_ids == 0]
        return theirs(model, query_responses, attention_mask, position_ids, *args, **kwargs)

    def compute_grpo_loss(new_logprobs, ratio, advantages, ref_logprobs, config, rho_weights):
        return flowrl(starts[0], grpo_utils.INVALID_LOGPROB, new_logprobs, ratio, advantages, ref_logprobs, rho_weights)

    grpo_utils.forward_for_logprobs, grpo_utils.compute_grpo_loss = forward_for_logprobs, compute_grpo_loss
