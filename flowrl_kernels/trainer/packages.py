"""What a setting needs that may not be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

# field of the config -> (module it imports, package that brings it, extra of this one)
PACKAGES = {
    "log.tensorboard": ("torch.utils.tensorboard", "tensorboard", "tensorboard"),
    "log.wandb": ("wandb", "wandb", "wandb"),
    "log.plots": ("matplotlib", "matplotlib", "train"),
    "lora.rank": ("peft", "peft", "lora"),
    "model.liger": ("liger_kernel", "liger_kernel", "liger"),
    "rollout.engine": ("vllm", "vllm", "vllm"),
}
VALUE = {"rollout.engine": "vllm"}  # where not every value but this one needs it


def require(field: str) -> ModuleType:
    """The module that a field of the config needs.

    Raises:
        ValueError: it is not installed, or does not import; names the field and what to install.
    """
    module, package, extra = PACKAGES[field]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not import ({error})"
        raise ValueError(f"{field}: {package} {why}: pip install 'flowrl-kernels[{extra}]'") from error
