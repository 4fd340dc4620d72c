"""FlowRL as a LightningModule: the rollouts come from the dataloader's place, the loss from `training_step`."""

import copy

import lightning
import torch
from common import Policy, parameters, rollout, tiny_model

from flowrl_kernels import FlowRLLoss


class FlowRLModule(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = Policy(tiny_model())
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.loss = FlowRLLoss(beta=1.0)
        self.history: list[float] = []

    def training_step(self, seed, index):
        batch = rollout(self.policy, self.reference, seed=int(seed))
        logp, log_z = self.policy(batch["ids"])
        out = self.loss(
            logp, batch["logp_ref"], batch["reward"], log_z, logp_old=batch["logp_old"], mask=batch["mask"]
        )  # fmt: skip
        self.log_dict(out.metrics)
        self.history.append(float(out.residual.square().mean()))
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(parameters(self.policy))


def main(steps: int = 30) -> list[float]:
    module = FlowRLModule()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(steps)))
    return module.history


if __name__ == "__main__":
    squared = main()
    print(f"mean squared residual {squared[0]:.3f} -> {squared[-1]:.3f}")
