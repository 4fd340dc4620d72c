"""FlowRL as a loss of NeMo-RL (read at NVIDIA-NeMo/RL 7ea279a, nemo_rl/algorithms/loss/interfaces.py):

    python nemo_rl_flowrl.py RL/examples/run_grpo.py --config RL/examples/configs/grpo_math_1B.yaml ...

`grpo.setup` names its loss class; this file stands another in its place, and runs NeMo-RL's own script. Where you
have a script of your own, hand `FlowRLLossFn(...)` to `grpo_train` as loss_fn. flowrl_kernels has to be installed where
the policy's workers run. The loss sees no prompts, so the anchor is the old policy, for which normalised advantages
hold the group's log Z. For the reference as anchor: `loss_fn.reference_policy_kl_penalty=1e-8`, with which NeMo-RL
loads it (this loss has no KL term), and preset "release_no_log_z".
"""

import runpy
import sys

from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer

from flowrl_kernels import flowrl_loss


class FlowRLLossFn:
    """NeMo-RL's `LossFunction`: called with a micro-batch, or one sequence at a time where sequences are packed."""

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self, cfg=None, use_fused_linear_logprobs=False, *, preset="release_old_anchor_no_log_z", beta=15.0):
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.settings = {"preset": preset, "beta": beta}
        self.metric_normalizations = {  # others are divided as the loss is
            "token_mult_prob_error": MetricNormalizer.TOKENS, "num_valid_samples": MetricNormalizer.NONE,
        }  # fmt: skip

    def __call__(self, data, global_valid_seqs, global_valid_toks, next_token_logprobs):
        """(loss, metrics) of [B, S - 1] log-probs: shares of the global batch, which NeMo-RL adds up."""
        mask = (data["token_mask"] * data["sample_mask"][:, None])[:, 1:].bool()
        old, generated = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        reference = data.get("reference_policy_logprobs")
        count = mask.sum(1)
        reward = (data["advantages"][:, 1:] * mask).sum(1) / count.clamp_min(1)  # equal along the response
        out = flowrl_loss(
            next_token_logprobs, None if reference is None else reference[:, 1:], reward, None, logp_old=old, mask=mask,
            normalizer=global_valid_seqs, **self.settings,
        )  # fmt: skip
        share = (count > 0).sum() / global_valid_seqs
        names = ("residual_mean_abs", "weight_mean", "clipped_high")
        error = (((generated - old).abs() * mask).exp() * mask).sum() / global_valid_toks  # what grpo_train looks at
        return out.loss, {
            "loss": out.loss.item(),
            "token_mult_prob_error": error.item(),
            "num_valid_samples": data["sample_mask"].sum().item(),
            **{f"flowrl_{name}": (out.metrics[name] * share).item() for name in names},
        }


if __name__ == "__main__":
    from nemo_rl.algorithms import grpo

    grpo.ClippedPGLossFn = FlowRLLossFn
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
