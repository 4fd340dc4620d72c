"""FlowRL in a plain PyTorch loop: hidden states in, one fused loss out, no logits."""

import copy

import torch
from common import PROMPT, Policy, parameters, rollout, tiny_model

from flowrl_kernels import LinearFlowRLLoss


def main(steps: int = 30) -> list[float]:
    policy = Policy(tiny_model())
    reference = copy.deepcopy(policy).requires_grad_(False)
    loss = LinearFlowRLLoss(beta=1.0)
    optimizer = torch.optim.AdamW(parameters(policy))
    history = []
    for step in range(steps):
        batch = rollout(policy, reference, seed=step)
        hidden = policy.model.base_model(batch["ids"]).last_hidden_state
        log_z = policy.log_z(hidden[:, :PROMPT], torch.ones(hidden[:, :PROMPT].shape[:2]))
        out = loss(
            hidden[:, PROMPT - 1 : -1], policy.model.lm_head.weight, batch["ids"][:, PROMPT:], batch["logp_ref"],
            batch["reward"], log_z, logp_old=batch["logp_old"], mask=batch["mask"],
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(float(out.residual.square().mean()))
    return history


if __name__ == "__main__":
    squared = main()
    print(f"mean squared residual {squared[0]:.3f} -> {squared[-1]:.3f}")
