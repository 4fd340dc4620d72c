"""Training: prompts -> rollouts -> rewards -> packed micro-batches -> a library loss -> FSDP2 update.

`from flowrl_kernels.trainer import Config, load, train` is the way in from Python; the command line has the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl_kernels.trainer.config import Config
    from flowrl_kernels.trainer.config_file import load
    from flowrl_kernels.trainer.entry import Trained, train

__all__ = ["Config", "Trained", "load", "train"]
_HOME = {"Config": "config", "Trained": "entry", "load": "config_file", "train": "entry"}


def __getattr__(name: str) -> Any:
    """Imports on first use: the trainer's parts are imported one by one, and this package with each of them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
