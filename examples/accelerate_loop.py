"""FlowRL under Accelerate: DDP, mixed precision and gradient accumulation as usual.

`accelerator.backward` divides by the accumulation steps and DDP averages over ranks, so a mean over each equal
micro-batch (the default normaliser) gives the gradient of one big batch.
"""

import copy

import torch
from accelerate import Accelerator
from common import Policy, parameters, rollout, tiny_model

from flowrl_kernels import FlowRLLoss


def main(steps: int = 30) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    policy = Policy(tiny_model())
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameters(policy))
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    loss = FlowRLLoss(beta=1.0)
    history = []
    for step in range(steps):
        batch = rollout(policy, reference, seed=step)
        squared = 0.0
        for half in torch.arange(len(batch["ids"])).chunk(2):
            part = {name: value[half] for name, value in batch.items()}
            with accelerator.accumulate(wrapped):
                logp, log_z = wrapped(part["ids"])
                out = loss(
                    logp, part["logp_ref"], part["reward"], log_z, logp_old=part["logp_old"], mask=part["mask"]
                )  # fmt: skip
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            squared += float(out.residual.square().mean()) / 2
        history.append(squared)
    return history


if __name__ == "__main__":
    squared = main()
    print(f"mean squared residual {squared[0]:.3f} -> {squared[-1]:.3f}")
