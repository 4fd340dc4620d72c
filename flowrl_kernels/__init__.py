"""FlowRL and the squared flow-balance family (arXiv 2509.15207) for language-model post-training.

The primitive is `linear_logprob`: hidden states to log-probabilities without logits. The losses stand on it. The
names below load on first use; importing this package loads neither triton nor a compiled library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl_kernels.advantages import gae, group_normalize, reinforce_pp_advantage
    from flowrl_kernels.core.dispatch import backends
    from flowrl_kernels.core.types import LogProb, LogProbStatistics, LossOutput, Sampled
    from flowrl_kernels.log_partition import LogPartition
    from flowrl_kernels.logprobs import linear_logprob, logprob
    from flowrl_kernels.losses import flowrl_loss, residual_loss
    from flowrl_kernels.modules import FlowRLLoss, LinearFlowRLLoss
    from flowrl_kernels.policy_gradient import policy_gradient_loss, rollout_correction, value_loss

__version__ = "0.2.0"

_ROOMS = {
    "backends": "core.dispatch",
    "linear_logprob": "logprobs",
    "logprob": "logprobs",
    "flowrl_loss": "losses",
    "residual_loss": "losses",
    "policy_gradient_loss": "policy_gradient",
    "rollout_correction": "policy_gradient",
    "value_loss": "policy_gradient",
    "group_normalize": "advantages",
    "reinforce_pp_advantage": "advantages",
    "gae": "advantages",
    "FlowRLLoss": "modules",
    "LinearFlowRLLoss": "modules",
    "LogPartition": "log_partition",
    "LogProb": "core.types",
    "LogProbStatistics": "core.types",
    "LossOutput": "core.types",
    "Sampled": "core.types",
}
__all__ = [
    "FlowRLLoss",
    "LinearFlowRLLoss",
    "LogPartition",
    "LogProb",
    "LogProbStatistics",
    "LossOutput",
    "Sampled",
    "backends",
    "flowrl_loss",
    "gae",
    "group_normalize",
    "linear_logprob",
    "logprob",
    "policy_gradient_loss",
    "reinforce_pp_advantage",
    "residual_loss",
    "rollout_correction",
    "value_loss",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
