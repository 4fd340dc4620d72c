"""FlowRL in the transformers Trainer by `compute_loss_func`, on stored rollouts.

`labels` holds one entry per sequence, so `num_items_in_batch` counts the sequences of the whole accumulated batch:
exactly the normaliser of the loss.
"""

import copy
import tempfile

from common import Policy, rollout, tiny_model
from transformers import Trainer, TrainingArguments

from flowrl_kernels import FlowRLLoss


class Scored(Policy):
    """The Trainer hands `compute_loss_func` the model's outputs and labels: the rest of the batch goes through."""

    def forward(self, ids, labels=None, **batch):
        logp, log_z = super().forward(ids)
        return {"logp": logp, "log_z": log_z, **batch}


def flowrl(outputs, labels, num_items_in_batch=None):
    out = FlowRLLoss(beta=1.0)(
        outputs["logp"], outputs["logp_ref"], outputs["reward"], outputs["log_z"], logp_old=outputs["logp_old"],
        mask=outputs["mask"], normalizer=len(labels) if num_items_in_batch is None else num_items_in_batch,
    )  # fmt: skip
    return out.loss


def main(steps: int = 30) -> list[float]:
    policy = Scored(tiny_model())
    start = Policy(copy.deepcopy(policy.model))
    stored = rollout(start, start)
    stored["labels"] = stored["reward"].new_ones(len(stored["ids"]), 1).long()
    rows = [{name: value[i] for name, value in stored.items()} for i in range(len(stored["ids"]))]
    args = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, max_steps=steps, learning_rate=2e-3, per_device_train_batch_size=8,
        gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(policy, args, train_dataset=rows, compute_loss_func=flowrl)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    squared = main()
    print(f"loss {squared[0]:.3f} -> {squared[-1]:.3f}")
