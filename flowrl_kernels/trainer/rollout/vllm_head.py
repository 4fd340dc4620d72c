"""The trainer's head in vLLM's sampler: log-probs of the sampled tokens by `linear_logprob`, from vLLM's hidden states.

Tokens are drawn by vLLM as ever. What is said about them then comes from the operator that the trainer scores with, on
the same rows and weights, so that of the gap between the two only the backbone's part is left: with equal hidden
states they agree to the bit, whatever else was in the batch. Over top-p, top-k and min-p it is the log-prob over the
tokens that were kept, as the trainer's is.

It hooks vLLM 0.32's model runner in three places, on its instances: `model.compute_logits` for the hidden states,
`sampler.topk_topp_sampler.forward` for what was kept, and `sampler.forward` for the tokens and the place to write to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.logprobs import linear_logprob

GREEDY = 1e-5  # vLLM's own limit of a temperature


class Head:
    """What one model runner is hooked with: `seen` in the model, `narrowed` and `said` in the sampler."""

    def __init__(self, runner: Any, impl: str):
        self.runner, self.impl = runner, impl
        self.hidden: Tensor | None = None  # [B, H] of the rows that a token is drawn for
        self.processed: Tensor | None = None  # [B, V] vLLM's log-probs, -inf where a token was left out
        model, sampler = runner.model, runner.sampler
        self.layer, self.scale, self.softcap = head_of(model)
        self.logits, self.narrow, self.sample = model.compute_logits, sampler.topk_topp_sampler.forward, sampler.forward
        model.compute_logits = self.seen
        sampler.topk_topp_sampler.forward = self.narrowed
        sampler.forward = self.said

    def seen(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden = hidden
        return self.logits(hidden, *args, **kwargs)

    def narrowed(self, *args: Any, **kwargs: Any) -> Any:
        tokens, self.processed = self.narrow(*args, **kwargs)
        return tokens, self.processed

    def said(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's output with the log-prob of each token that was drawn at a temperature replaced."""
        hidden, self.processed = self.hidden, None
        out = self.sample(logits, sampling_metadata, *args, **kwargs)
        tensors, heat = out.logprobs_tensors, sampling_metadata.temperature
        if tensors is None or heat is None or self.processed is None or hidden is None or len(hidden) != len(heat):
            return out  # no log-probs asked for, or greedy ones alone, or vLLM's dry run
        if changes(sampling_metadata):
            raise RuntimeError("rollout.head: penalties and token lists change what a log-prob is of; ask without them")
        drawn = (heat >= GREEDY).nonzero()[:, 0]
        tokens = out.sampled_token_ids[drawn, 0].long()
        logp = self.logp(hidden[drawn], tokens, self.temperature(heat[drawn]), self.processed[drawn])
        tensors.logprobs[drawn, 0] = logp  # the sampled token's column
        return out

    def temperature(self, heat: Tensor) -> float | Tensor:
        """One number where the rows have one, as the trainer takes it: in double precision, out of the requests."""
        batch = self.runner.input_batch
        asked = {self.runner.requests[name].sampling_params.temperature for name in batch.req_ids[: batch.num_reqs]}
        asked = {value for value in asked if value >= GREEDY}
        return asked.pop() if len(asked) == 1 else heat

    def logp(self, hidden: Tensor, tokens: Tensor, temperature: float | Tensor, processed: Tensor) -> Tensor:
        """[B] fp32 of `tokens` [B] from hidden states [B, H], over the tokens that `processed` [B, V] left."""
        weight = self.layer.weight[: processed.shape[1]]  # vLLM pads the vocabulary
        bias = getattr(self.layer, "bias", None)
        return linear_logprob(
            hidden,
            weight,
            tokens,
            bias=None if bias is None else bias[: len(weight)],
            temperature=temperature,
            logit_scale=self.scale,
            softcap=self.softcap,
            kept=kept_of(processed),
            impl=self.impl,
        ).logp


def install(runner: Any, impl: str = "auto") -> bool:
    """Hooks a model runner once; whether it was not hooked before.

    Raises:
        RuntimeError: it has no head of its own here, or one that is not `linear_logprob`'s.
    """
    if hasattr(runner, "flowrl_head"):
        return False
    runner.flowrl_head = Head(runner, impl)
    return True


def head_of(model: Any) -> tuple[Any, float, float | None]:
    """The layer that multiplies hidden states to logits, the scale and the soft cap that follow.

    Raises:
        RuntimeError: there is no such layer whole in this process, or its scales come in an order of their own.
    """
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    if get_tensor_model_parallel_world_size() > 1 or get_pp_group().world_size > 1:
        raise RuntimeError("rollout.head: wanted an engine in one process; this one's head is split")
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    layer = getattr(model, "lm_head", None)
    if len(processors) != 1 or layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise RuntimeError(f"rollout.head: {type(model).__name__} has no lm_head and logits processor to take over")
    (processor,) = processors
    if processor.soft_cap is not None and processor.scale != 1.0:  # vLLM scales what was capped; the operator before
        raise RuntimeError(f"rollout.head: {type(model).__name__} has a soft cap and a scale beside it")
    return layer, float(processor.scale), processor.soft_cap


def kept_of(processed: Tensor) -> tuple[Tensor, Tensor] | None:
    """Compressed rows of the tokens that have a log-prob, None where all have."""
    kept = processed > -torch.inf
    if kept.all():
        return None
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
    return kept.nonzero()[:, 1], offsets


def changes(metadata: Any) -> bool:
    """Whether logits were changed before the temperature: then a row's log-prob is not that of its hidden state."""
    edits = [
        getattr(p, name, None) for p in metadata.logitsprocs.non_argmax_invariant for name in ("biases", "min_toks")
    ]
    lists = metadata.allowed_token_ids_mask is not None or bool(metadata.bad_words_token_ids)
    return not metadata.no_penalties or lists or any(edits)
