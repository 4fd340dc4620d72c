"""FlowRL in OpenRLHF (read at OpenRLHF/OpenRLHF 3c3be62, version 0.11.0). It has no hook for a loss: `PolicyModelActor`
makes an `ActorPPOTrainer`, which makes its loss. This file's `install` puts a subclass of the trainer in its place, in
each Ray worker:

    ray job submit --runtime-env-json '{"working_dir": "...", "worker_process_setup_hook": "openrlhf_flowrl.install"}' \
        -- python -m openrlhf.cli.train_ppo_ray --algo.advantage.estimator group_norm \
           --algo.kl.use_loss --algo.kl.init_coef 1e-8 ...

The last two make OpenRLHF keep the reference's log-probs. Log-probs are OpenRLHF's, from fp32 logits; there is no log Z
(for the old policy as anchor, group-normalised advantages hold the group's). Its correction for vLLM is not applied.
"""

import torch

from flowrl_kernels import flowrl_loss


class FlowRLPolicyLoss(torch.nn.Module):
    """What OpenRLHF calls `actor_loss_fn`; `reference` [B, A] is set before each call."""

    def __init__(self, preset="release_no_log_z", beta=15.0):
        super().__init__()
        self.settings = {"preset": preset, "beta": beta}
        self.reference = None

    def forward(
        self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None,
        dp_size=1, batch_num_tokens=None, global_batch_size=None,
    ):  # fmt: skip
        """(loss, clipped share, KL to the old policy, None); all tensors [B, A]."""
        mask = action_mask.bool()
        count = mask.sum(1)
        reward = (advantages.float() * mask).sum(1) / count.clamp_min(1)  # equal along the response
        sequences = (count > 0).sum() if global_batch_size is None else global_batch_size
        out = flowrl_loss(
            log_probs, self.reference, reward, None, logp_old=old_log_probs, mask=mask,
            normalizer=sequences / dp_size, **self.settings,
        )  # fmt: skip
        kl = ((old_log_probs - log_probs.detach()) * mask).sum() / count.sum().clamp_min(1)
        return out.loss, out.metrics["clipped_low"] + out.metrics["clipped_high"], kl, None


def install():
    from openrlhf.trainer.ray import ppo_actor

    class FlowRLActorTrainer(ppo_actor.ActorPPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.actor_loss_fn = FlowRLPolicyLoss()

        def training_step(self, experience, *args, **kwargs):
            self.actor_loss_fn.reference = experience.base_action_log_probs
            return super().training_step(experience, *args, **kwargs)

    ppo_actor.ActorPPOTrainer = FlowRLActorTrainer
