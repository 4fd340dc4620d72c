"""LoRA by peft: adapters put into a model, taken out of its names, added to its weights (arXiv 2106.09685).

A layer with an adapter computes x W^T + scale (x A^T) B^T. B starts at 0, so the policy starts as the model it was, and
the model with its adapters off is the frozen reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.trainer.config import Config

ADAPTER = "default"  # peft's name for the one there is
FOLDER = "adapter"  # beside an exported model: the same as a peft folder
_MARK, _BASE = ".lora_", ".base_layer."


def inject(model: Any, config: Config) -> None:
    """Puts adapters into `model`, of first weights from the run's seed.

    Raises:
        ValueError: no layer has such a name, or one is not a plain linear layer, or is the head.
    """
    import peft

    c = config.lora
    alpha: Any = c.alpha or 2 * c.rank  # peft says int, and multiplies
    settings = peft.LoraConfig(
        r=c.rank,
        lora_alpha=alpha,
        target_modules="all-linear" if c.targets == ("all-linear",) else list(c.targets),
        lora_dropout=0.0,  # log-probabilities have to repeat
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed + 2)
        try:
            peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"lora.targets: {list(c.targets)!r}: {error}") from None
    head = model.get_output_embeddings()
    for name, layer in layers(model):
        if layer is head or type(layer) is not peft.tuners.lora.Linear:
            what = "the head, whose weight the fused loss reads" if layer is head else f"a {type(layer).__name__}"
            raise ValueError(f"lora.targets: wanted linear layers beside the head; {name!r} is {what}")


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Those with an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def freeze(model: Any) -> None:
    """Leaves the adapters alone to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_MARK in name)


@contextlib.contextmanager
def off(model: Any) -> Iterator[None]:
    """The model as it was, in the block."""
    every = [layer for _, layer in layers(model)]
    for layer in every:  # not enable_adapters(), which also changes what needs a gradient
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in every:
            layer._disable_adapters = False


def merged(model: Any, names: Iterable[str], tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the model without adapters, each added to its weight.

    names: of its state dict with adapters. tensor: the whole tensor of one; asked for in one order on every rank.
    """
    settings = {name: (layer.scaling[ADAPTER], layer.fan_in_fan_out) for name, layer in layers(model)}
    for name in names:
        if _MARK in name:
            continue
        value = tensor(name)
        home, base, leaf = name.partition(_BASE)
        if base and leaf == "weight":
            scale, turned = settings[home]
            a, b = (tensor(f"{home}{_MARK}{side}.{ADAPTER}.weight") for side in "AB")  # [r, in], [out, r]
            delta = scale * (b @ a)
            value = value + (delta.T if turned else delta)
        yield (f"{home}.{leaf}" if base else name), value


def save(model: Any, state: Mapping[str, Tensor], folder: Path, source: str) -> None:
    """Writes the adapters as a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    state: name -> whole tensor. source: name or folder of the model they are for.
    """
    import copy

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: t.contiguous() for name, t in state.items() if _MARK in name}
    own = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": t for name, t in own.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy.deepcopy(model.peft_config[ADAPTER])
    settings.base_model_name_or_path, settings.inference_mode = source, True
    settings.save_pretrained(folder)
