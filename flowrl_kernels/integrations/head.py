"""What the adapters ask of a transformers head: its scales, no adapter on it, and a call that FSDP's hooks see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def call_head(head: Any, score: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`score(hidden)` as the head's own call: where the head is an FSDP unit, its hooks gather and reduce.

    Inside `score`, `head.weight` is the whole parameter.
    """
    kept = vars(head).get("forward")
    head.forward = score
    try:
        return head(hidden)
    finally:
        if kept is None:
            del head.forward
        else:
            head.forward = kept


def head_scales(config: Any) -> dict[str, Any]:
    """logit_scale and softcap of `linear_logprob`, under the names that transformers' configs have for them."""
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return {
        "logit_scale": 1.0 if scale is None else float(scale),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def refuse_adapter(model: Any) -> None:
    """Raises if the head of a transformers model has a PEFT adapter: `head.weight` is then the base weight alone."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "lm_head: wanted a plain linear layer; got one with a PEFT adapter, whose weights a fused head would leave "
            "out. Take 'lm_head' out of target_modules, or train the head whole with modules_to_save=['lm_head']"
        )
