"""FlowRL as slime's custom loss (read at THUDM/slime 624b824, slime/backends/megatron_utils/loss.py). With this folder
on PYTHONPATH:

    --loss-type custom_loss --custom-loss-function-path slime_flowrl.flowrl --advantage-estimator grpo

Log-probs are slime's own, from logits over tensor-parallel vocabulary shards. The loss sees no prompts, so the anchor
is the old policy, for which GRPO's centred advantages hold the group's log Z. For the reference policy as anchor:
`--use-kl-loss --kl-loss-coef 0 --ref-load ...` and the other preset. Leave out --normalize-advantages.
"""

import torch

from flowrl_kernels import flowrl_loss

SETTINGS = {"preset": "release_old_anchor_no_log_z", "beta": 15.0}  # or "release_no_log_z", with the reference


def flowrl(args, batch, logits, sum_of_sample_mean):
    """(sum over the micro-batch's responses, metrics summed alike): slime divides both by the step's responses.

    Args:
        batch: lists with one tensor [R] per response: log_probs, ref_log_probs, rollout_log_probs, advantages,
            loss_masks; also response_lengths, total_lengths, unconcat_tokens.
        logits: [1, T, V / tp] fp32.
    """
    from megatron.core import mpu
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    if mpu.get_context_parallel_world_size() > 1:
        raise ValueError("context-parallel-size: wanted 1, for each rank would see parts of responses")
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    _, scored = get_log_probs_and_entropy(
        logits, args=args, **{name: batch[name] for name in names}, **get_rollout_top_p_logprob_kwargs(args, batch)
    )
    logp = torch.cat(scored["log_probs"])
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    reference = batch.get("ref_log_probs")
    lengths = torch.tensor([0, *batch["response_lengths"]], device=logp.device)
    out = flowrl_loss(
        logp,
        torch.cat(reference) if reference else None,
        torch.stack([advantage[0] for advantage in batch["advantages"]]).float(),
        None,
        logp_old=torch.cat(old) if old else logp.detach(),  # slime leaves them out when there is one step per rollout
        mask=torch.cat(batch["loss_masks"]).bool(),
        cu_seqlens=lengths.cumsum(0),
        normalizer=1.0,
        **SETTINGS,
    )
    count = len(batch["response_lengths"])
    names = ("residual_mean_abs", "weight_mean", "clipped_high", "nonfinite")
    metrics = {f"flowrl_{name}": out.metrics[name] * count for name in names}
    return out.loss, {"loss": out.loss.detach(), **metrics}
