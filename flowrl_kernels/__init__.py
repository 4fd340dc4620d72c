"""FlowRL and the squared flow-balance family (arXiv 2509.15207) for language-model post-training.

The primitive is `linear_logprob`: hidden states to log-probabilities without logits. The losses stand on it. The
names below load on first use; importing this package loads neither triton nor a compiled library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl_kernels.advantages import gae, group_normalize, reinforce_pp_advantage
    from flowrl_kernels.dispatch import backends
    from flowrl_kernels.functional import linear_logprob, logprob
    from flowrl_kernels.losses import flowrl_loss, policy_gradient_loss, residual_loss, value_loss
    from flowrl_kernels.nn import FlowRLLoss, LinearFlowRLLoss, LogPartition
    from flowrl_kernels.types import LogProb, LossOutput

__version__ = "0.2.0"

_ROOMS = {
    "backends": "dispatch",
    "linear_logprob": "functional",
    "logprob": "functional",
    "flowrl_loss": "losses",
    "residual_loss": "losses",
    "policy_gradient_loss": "losses",
    "value_loss": "losses",
    "group_normalize": "advantages",
    "reinforce_pp_advantage": "advantages",
    "gae": "advantages",
    "FlowRLLoss": "nn",
    "LinearFlowRLLoss": "nn",
    "LogPartition": "nn",
    "LogProb": "types",
    "LossOutput": "types",
}
__all__ = [
    "FlowRLLoss",
    "LinearFlowRLLoss",
    "LogPartition",
    "LogProb",
    "LossOutput",
    "backends",
    "flowrl_loss",
    "gae",
    "group_normalize",
    "linear_logprob",
    "logprob",
    "policy_gradient_loss",
    "reinforce_pp_advantage",
    "residual_loss",
    "value_loss",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
