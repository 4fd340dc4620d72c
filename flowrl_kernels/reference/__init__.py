"""The specification: plain torch, one page each, differentiable by autograd, exact in float64."""

from flowrl_kernels.reference.linear_logprob import linear_logprob
from flowrl_kernels.reference.logprob import logprob

__all__ = ["linear_logprob", "logprob"]
