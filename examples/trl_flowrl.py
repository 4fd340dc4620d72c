"""FlowRL in TRL: two names change, the rest of a GRPO script stays."""

import tempfile

from common import save_tiny
from datasets import Dataset

from flowrl_kernels.integrations.trl import FlowRLConfig, FlowRLTrainer


def late(completion_ids, **_):
    """A stand-in for a verifier: late symbols of the vocabulary are good."""
    return [sum(ids) / len(ids) / 2 for ids in completion_ids]


def main(steps: int = 30) -> list[float]:
    args = FlowRLConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=16, num_generations=8, max_completion_length=6, max_steps=steps, logging_steps=1,
        learning_rate=2e-3, log_z_learning_rate=1e-2, beta=1.0, scale_rewards="none", lr_scheduler_type="constant",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = FlowRLTrainer(
        model=save_tiny(tempfile.mkdtemp()),  # a name or a folder: TRL loads the reference from it
        reward_funcs=late,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{j}="} for i in range(8) for j in range(8)]),
    )
    trainer.train()
    name = "flowrl/residual_squared"
    return [entry[name] for entry in trainer.state.log_history if name in entry]


if __name__ == "__main__":
    squared = main()
    print(f"mean squared residual {squared[0]:.3f} -> {squared[-1]:.3f}")
