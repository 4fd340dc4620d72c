"""A transformers model's head: logits = cap * tanh(scale * (h W^T + b) / cap), which the fused head computes.

The scales come from the config by name; `check_head` compares with the model's own logits, so that a model whose head
does something else is refused instead of trained wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


class HeadScales(NamedTuple):
    """`logit_scale` and `softcap` of `linear_logprob`."""

    logit_scale: float
    softcap: float | None


def head_scales(config: Any) -> HeadScales:
    """The scales of a head, under the names that transformers' configs have for them."""
    text = config.get_text_config()

    def first(names: tuple[str, ...]) -> Any:
        return next((value for name in names if (value := getattr(text, name, None)) is not None), None)

    scale, cap, divisor = first(SCALES), first(CAPS), getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:  # HyperCLOVA X multiplies by what Granite divides by
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    return HeadScales(1.0 if scale is None else float(scale), float(cap) if cap else None)


def head_logits(head: Any, hidden: Tensor, scales: HeadScales) -> Tensor:
    """[N, H] -> [N, V] fp32, products of 16-bit inputs summed in fp32; for few rows, as in decoding."""
    weight, bias = head.weight, getattr(head, "bias", None)
    if hidden.dtype != torch.float32 and hidden.is_cuda:
        out = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        out = hidden.float() @ weight.float().t()
    if bias is not None:
        out = out + bias.float()
    out = out * scales.logit_scale if scales.logit_scale != 1.0 else out
    return scales.softcap * torch.tanh(out / scales.softcap) if scales.softcap else out


@torch.no_grad()
def check_head(model: Any, scales: HeadScales, field: str = "model") -> None:
    """Refuses a causal LM whose logits are not `head_logits` of its final hidden states.

    Its own forward runs on three tokens: as it is, against the backbone's last_hidden_state, and with the head's input
    made so large that logits reach 60, for a soft cap does not show in the small logits of a new model. Works on a
    model that is not sharded.

    Args:
        field: the user's name for the model, which the message starts with.

    Raises:
        ValueError: the difference is more than rounding.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if getattr(head, "weight", None) is None:
        raise ValueError(f"{field}: wanted a causal LM with one linear head; got {name} without")
    if head.weight.is_meta or hasattr(head.weight, "full_tensor"):
        return  # another rank has the weights, or they were looked at before they were sharded
    ids = torch.arange(1, 4, device=head.weight.device)[None] % model.config.get_text_config().vocab_size
    seen: list[Tensor] = []
    factor = 1.0

    def amplify(module: Any, args: Any) -> Any:
        seen.append(args[0] * factor)
        return (seen[-1], *args[1:])

    def compare(hidden: Tensor, want: Tensor) -> None:
        got, largest = head_logits(head, hidden[0], scales), float(want.abs().max())
        exact = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
        if not torch.allclose(got, want, rtol=exact, atol=exact * largest):
            raise ValueError(
                f"{field}: {name} turns hidden states into logits in a way the fused head does not know (largest "
                f"difference {float((got - want).abs().max()):.2g} in logits of at most {largest:.2g})"
            )

    hook = head.register_forward_pre_hook(amplify)
    try:
        with plain_attention(model):
            want = model(input_ids=ids, use_cache=False).logits[0].float()
            states = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            if states is None:
                raise ValueError(f"{field}: wanted a backbone that returns last_hidden_state; {name} has none")
            compare(states, want)
            factor = max(1.0, 60.0 / max(float(want.abs().max()), 1e-6))
            seen.clear()
            want = model(input_ids=ids, use_cache=False).logits[0].float()
            if not seen:
                raise ValueError(f"{field}: {name} makes its logits without calling its head")
            compare(seen[0], want)
    finally:
        hook.remove()


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """SDPA or eager attention in place of flash-attention where that cannot run: on a CPU, and in float32."""
    theirs = getattr(model.config, "_attn_implementation", None) or ""
    weight = model.get_output_embeddings().weight
    if "flash" not in theirs or (weight.is_cuda and weight.dtype != torch.float32):
        yield
        return
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(theirs)


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
