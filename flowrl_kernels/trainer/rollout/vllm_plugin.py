"""What this project adds to vLLM's own processes: a worker method, and a mend of weight updates on CPUs.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Imports vLLM inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXTENSION = "flowrl_kernels.trainer.rollout.vllm_plugin.WorkerExtension"


def register() -> None:
    """Lets every in-place weight update on a CPU reach heads that share their weight with the embedding.

    On a CPU vLLM multiplies by packed copies of the weights. Its layer-wise reload packs a layer again when tensors
    under the layer's own names came; the head of a tied model gets none, so it would go on with the old copy, silently.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    finalize = layerwise.finalize_layerwise_processing
    if hasattr(finalize, "flowrl"):
        return

    @wraps(finalize)
    def finalize_and_repack(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        repack_tied(model)

    finalize_and_repack.flowrl = True  # type: ignore[attr-defined]
    layerwise.finalize_layerwise_processing = finalize_and_repack


def repack_tied(model: torch.nn.Module) -> int:
    """Packs the CPU copies of layers that share a weight with another one again; how many there were."""
    owners: dict[int, int] = {}
    parts: list[Any] = list(model.modules())
    packed = [m for m in parts if hasattr(m, "cpu_linear") and m.weight.numel()]
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.numel():
            owners[weight.data_ptr()] = owners.get(weight.data_ptr(), 0) + 1
    tied: list[Any] = [module for module in packed if owners[module.weight.data_ptr()] > 1]
    for module in tied:
        module.quant_method.process_weights_after_loading(module)
    return len(tied)


class WorkerExtension:
    """Mixed into vLLM's workers (`--worker-extension-cls`); called by name through `/collective_rpc`."""

    def flowrl_head(self, impl: str) -> bool:
        """Takes the sampled tokens' log-probs by the trainer's head from now on (vllm_head.py)."""
        from flowrl_kernels.trainer.rollout.vllm_head import install

        worker: Any = self
        return install(worker.model_runner, impl)

    def flowrl_load(self, folder: str) -> dict[str, int]:
        """Loads every tensor of a folder of safetensors files into the running model."""
        names = 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal names
            from safetensors import safe_open

            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it cannot be iterated itself)
                        names += 1
                        yield name, opened.get_tensor(name)

        worker: Any = self
        worker.reload_weights(weights_iterator=tensors())
        return {"tensors": names}
