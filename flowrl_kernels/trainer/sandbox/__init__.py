"""Programs that a model wrote, run where they can do no harm (docs/code.md says what is guaranteed)."""

from flowrl_kernels.trainer.sandbox.box import Ended, Limits, Pool, Sandbox, Watch
from flowrl_kernels.trainer.sandbox.launch import SandboxUnavailable

__all__ = ["Ended", "Limits", "Pool", "Sandbox", "SandboxUnavailable", "Watch"]
