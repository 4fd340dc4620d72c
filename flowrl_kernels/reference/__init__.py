"""Plain torch, one page each, differentiable by autograd, exact in float64.

Of `linear_logprob`, `linear_logprob_kept` and `logprob`, whose tensors have a vocabulary, this is the specification
and nothing else: `chunked` and `triton` have their own, held to it by tests. Of `residual` and `policy_gradient`, whose
tensors are [B, T] or [N] and cheap in float64, it is both the definition and what runs: `chunked` calls it, and tests
hold it to `tests/residual_oracle.py` and to loops, a second route.
"""

from flowrl_kernels.reference.linear_logprob import linear_logprob
from flowrl_kernels.reference.linear_logprob_kept import linear_logprob_kept
from flowrl_kernels.reference.logprob import logprob

__all__ = ["linear_logprob", "linear_logprob_kept", "logprob"]
