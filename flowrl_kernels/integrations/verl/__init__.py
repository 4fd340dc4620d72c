"""FlowRL in verl 0.9: `plugin` has the policy losses and advantage estimators, `engine` the FSDP2 engine with log Z.

verl loads this package on `import verl` (entry point `verl.plugins`, or VERL_USE_EXTERNAL_MODULES), and importing it
registers the losses where verl is installed. The engine is imported by its own name alone, by verl's workers.
"""

from flowrl_kernels.integrations.verl.plugin import PRESET_NAMES, ppo_loss, register

__all__ = ["PRESET_NAMES", "ppo_loss", "register"]
