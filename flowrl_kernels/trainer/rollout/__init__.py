"""Rollout engines: prompts in, token ids and sampling log-probabilities out."""

from flowrl_kernels.trainer.rollout.base import Engine, Generated, Sampling

__all__ = ["Engine", "Generated", "Sampling"]
