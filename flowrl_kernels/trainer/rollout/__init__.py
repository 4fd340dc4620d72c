"""Rollout engines: prompts in, token ids and sampling log-probabilities out."""

from flowrl_kernels.trainer.rollout.base import Engine, Generated, Kept, Sampling

__all__ = ["Engine", "Generated", "Kept", "Sampling"]
