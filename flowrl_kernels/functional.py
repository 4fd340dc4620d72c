"""The front door of the log-prob primitives: signatures and docstrings; check, resolve, run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels import checks, dispatch, reference
from flowrl_kernels.types import LogProb

__all__ = ["linear_logprob", "logprob"]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    epsilon: float = 0.0,
    report: Tensor | None = None,
    main_grad: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    vocab_parallel: Any = None,
    impl: str = "auto",
) -> LogProb:
    """Log-probabilities of `target` under a language-model head, without a [N, V] tensor.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`` and ``logp = log_softmax(z)[target]``.
    Products of 16-bit inputs are accumulated in fp32 and never rounded before the softmax. A row's bits depend on
    that row and on (H, V, dtype, device) only: batch size, neighbours, padding and flags leave them alone.

    Args:
        hidden: [..., H] final-norm hidden states; float32, bfloat16, float16 (or float64: reference and chunked).
        weight: [V, H] the head's weight, dtype of `hidden`. Under autocast both are cast as a linear layer's would be.
        target: [...] integer token ids in [0, V); `ignore_index` marks rows to leave out. Any other value gives NaN.
        bias: [V] or None.
        temperature: a number above 0, or [...] per token. The sampling temperature: log-probs are taken after it.
        logit_scale: a finite number; multiplies the product (Cohere-type heads). A learned one is refused, like a
            learned temperature or softcap: no gradient is computed for them (multiply `hidden` by it instead).
        softcap: `cap * tanh(z / cap)` before the temperature (Gemma-type heads), or None.
        ignore_index: the target value of rows that give logp 0, entropy 0 and no gradient.
        entropy: also return the entropy of each row, in nats, differentiable.
        epsilon: 0 for the exact backward. Above 0, the backward may leave out softmax mass as long as the relative
            L1 error of dlogits (non-target entries, before the tail correction) stays at most epsilon (docs/maths.md).
        report: fp32 [3] on the same device, filled by the backward with (bound reached, share of tiles computed, 1 if
            a bounded one returned to the exact path); (0, 1, 0) at epsilon 0. Refused where no backward would fill it.
        main_grad: fp32 [V, H]; the weight's gradient is added to it and `weight.grad` stays untouched. Refused beside
            a weight that wants no gradient. Under no_grad both are taken and left as they are.
        kept: (ids [K], offsets [N+1]), the token ids a sampler kept per row (top-k, top-p), packed: log-probs are
            renormalised over them, in O(K H). The target counts as kept. Runs in torch on any device, whatever `impl`.
        vocab_parallel: a ProcessGroup over which the rows of `weight` (and `bias`) are split, in rank order. Targets
            are global ids, `hidden` is the same on every rank, and its gradient is summed over the group.
        impl: "auto", "reference", "chunked", "triton". See `flowrl_kernels.backends()`.

    Returns:
        LogProb(logp [...], entropy [...] or None), fp32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: the implementation that `impl` names cannot run here.
        NotImplementedError: a second derivative, forward mode or a torch.func transform of "chunked", "triton", kept
            or vocab_parallel. "reference" is plain torch and has them.
    """
    ignore_index, entropy = checks.integer("ignore_index", ignore_index), checks.flag("entropy", entropy)
    head = checked_head(hidden, weight, target, bias, temperature, softcap, ignore_index, whole=vocab_parallel is None)
    logit_scale, epsilon = checks.number("logit_scale", logit_scale), checks.number("epsilon", epsilon)
    if not 0.0 <= epsilon < 1.0:
        checks.fail("epsilon", "a number in [0, 1)", epsilon)
    flat, weight, ids, rows_temperature, softcap, leading = head
    _accumulator("report", report, (3,), flat)
    _accumulator("main_grad", main_grad, tuple(weight.shape), flat)
    if torch.is_grad_enabled():
        if main_grad is not None and not weight.requires_grad:
            checks.fail("main_grad", "a weight that requires a gradient beside it", "a frozen weight")
        trained = any(t is not None and t.requires_grad for t in (flat, weight, bias))
        if report is not None and not trained:
            checks.fail("report", "an input that requires a gradient: the backward fills it", "frozen inputs")
    chosen = dispatch.resolve("linear_logprob", impl, flat)
    if vocab_parallel is not None:
        checks.process_group("vocab_parallel", vocab_parallel)
    exact_only = "kept" if kept is not None else "vocab_parallel"
    if kept is not None or vocab_parallel is not None:
        for name, given in (
            ("epsilon", epsilon > 0.0),
            ("report", report is not None),
            ("main_grad", main_grad is not None),
        ):
            if given:
                checks.fail(exact_only, "neither epsilon, report nor main_grad beside it", name)
    # autocast has had its say: inside, it would round the very products that must stay in fp32
    with torch.autocast(flat.device.type, enabled=False):
        if kept is not None:
            if vocab_parallel is not None:
                checks.fail("kept", "no vocab_parallel beside it", "both")
            listed = _kept(kept, flat, weight.shape[0])
            from flowrl_kernels.ops.kept import KeptLogProb

            logp, ent = KeptLogProb.call(
                flat, weight, ids, *listed, bias, rows_temperature, logit_scale, softcap, ignore_index, entropy
            )
            return _shaped(logp, ent, leading)
        if vocab_parallel is not None:
            if chosen == "reference":
                raise RuntimeError("impl='reference' knows no vocab_parallel: use 'chunked' or 'triton'")
            from flowrl_kernels.ops.vocab_parallel import VocabParallel

            logp, ent = VocabParallel.call(
                flat, weight, ids, bias, rows_temperature, logit_scale, softcap, ignore_index, entropy,
                vocab_parallel, chosen,
            )  # fmt: skip
            return _shaped(logp, ent, leading)
        if chosen == "reference":
            if epsilon > 0.0 or main_grad is not None or report is not None:
                raise RuntimeError("impl='reference' is plain autograd: it takes neither epsilon, report nor main_grad")
            logp, ent = reference.linear_logprob(
                flat, weight, ids, bias, rows_temperature, logit_scale, softcap, ignore_index, entropy
            )
        else:
            from flowrl_kernels.ops.linear_logprob import linear_logprob as op

            logp, ent, _, _ = op(
                flat, weight, ids, bias, rows_temperature, logit_scale,
                softcap, ignore_index, entropy, epsilon, report, main_grad, chosen,
            )  # fmt: skip
    return _shaped(logp, ent if entropy else None, leading)


def logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> LogProb:
    """Log-probabilities of `target` from logits: one read forward, one read and one write backward.

    Args:
        logits: [..., V] float32, bfloat16, float16 (or float64).
        target: [...] integer token ids in [0, V); `ignore_index` marks rows to leave out. Any other value gives NaN.
        temperature: a number above 0, or [...] per token.
        softcap: `cap * tanh(z / cap)` before the temperature, or None.
        ignore_index: the target value of rows that give logp 0, entropy 0 and no gradient.
        entropy: also return the entropy of each row, in nats, differentiable.
        inplace_backward: write the gradient over the logits. Saves one [N, V] tensor; the logits are lost, and a
            second backward through the same graph raises.
        impl: "auto", "reference", "chunked", "triton".

    Returns:
        LogProb(logp [...], entropy [...] or None), fp32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: the implementation that `impl` names cannot run here.
        NotImplementedError: a second derivative, forward mode or a torch.func transform of "chunked" or "triton".
    """
    ignore_index, entropy = checks.integer("ignore_index", ignore_index), checks.flag("entropy", entropy)
    inplace_backward = checks.flag("inplace_backward", inplace_backward)
    checks.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        checks.fail("logits", "shape [..., V] with V of at least 1", checks.shape(logits))
    leading = tuple(logits.shape[:-1])
    target = checks.integers("target", target, leading).long()
    checks.same_device("target", target, "logits", logits)
    rows_temperature = _temperature(temperature, leading, logits, target != ignore_index)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    _check_targets(target, logits.shape[-1], ignore_index)
    chosen = dispatch.resolve("logprob", impl, logits)
    flat, ids = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if chosen == "reference":
        logp, ent = reference.logprob(flat, ids, rows_temperature, softcap, ignore_index, entropy)
        return _shaped(logp, ent, leading)
    if inplace_backward and not flat.is_contiguous():
        checks.fail("logits", "a contiguous tensor, for inplace_backward=True", f"strides {logits.stride()}")
    from flowrl_kernels.ops.logprob import logprob as op

    logp, ent, _ = op(
        flat.contiguous(),
        ids.contiguous(),
        rows_temperature,
        softcap,
        ignore_index,
        entropy,
        inplace_backward,
        chosen,
    )
    return _shaped(logp, ent if entropy else None, leading)


class Head(NamedTuple):
    """Checked arguments of a language-model head, flattened."""

    hidden: Tensor  # [N, H] contiguous
    weight: Tensor  # [V, H] contiguous
    target: Tensor  # [N] int64
    temperature: Tensor  # [N] or [1]
    softcap: float | None
    leading: tuple[int, ...]


def checked_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int = -100,
    whole: bool = True,
) -> Head:
    """The arguments of `linear_logprob` against their contract, after autocast."""
    hidden, weight = _autocast(checks.plain("hidden", hidden), checks.plain("weight", weight))
    checks.floating("hidden", hidden)
    if weight.numel() == 0:
        checks.fail(
            "weight",
            "[V, H] with a vocabulary of at least 1 row (DeepSpeed ZeRO-3 and FSDP1 empty parameters outside their own "
            "layer: gather it around forward and backward, deepspeed.zero.GatheredParameters, or use ZeRO-2 or FSDP2)",
            checks.shape(weight),
        )
    checks.floating("weight", weight, dims=2)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        checks.fail("hidden", f"shape [..., H] with H = {weight.shape[1]} as in weight", checks.shape(hidden))
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight: wanted the dtype of hidden, {hidden.dtype}; got {weight.dtype}")
    checks.same_device("weight", weight, "hidden", hidden)
    leading = tuple(hidden.shape[:-1])
    target = checks.integers("target", target, leading).long()  # narrow integers cannot hold every id nor -100
    checks.same_device("target", target, "hidden", hidden)
    vocab_size = weight.shape[0]
    if bias is not None:
        checks.floating("bias", bias, dims=1)
        if bias.shape[0] != vocab_size:
            checks.fail("bias", f"shape ({vocab_size},) as weight has rows", checks.shape(bias))
        checks.same_device("bias", bias, "hidden", hidden)
    rows_temperature = _temperature(temperature, leading, hidden, target != ignore_index)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    if whole:
        _check_targets(target, vocab_size, ignore_index)
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    return Head(flat, weight.contiguous(), target.reshape(-1).contiguous(), rows_temperature, softcap, leading)


def _shaped(logp: Tensor, entropy: Tensor | None, leading: tuple[int, ...]) -> LogProb:
    return LogProb(logp.reshape(leading), None if entropy is None else entropy.reshape(leading))


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64 and hidden.is_floating_point():
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _temperature(value: float | Tensor, leading: tuple[int, ...], like: Tensor, counted: Tensor) -> Tensor:
    """[N] or [1], fp32 (float64 beside float64); 1 in rows that do not count, which may hold anything."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((1,), checks.positive("temperature", value), dtype=dtype, device=like.device)
    checks.floating("temperature", value)
    if value.requires_grad:
        checks.fail(
            "temperature",
            "a tensor without requires_grad (its gradient is not computed)",
            "requires_grad=True",
        )
    if value.dim() != 0 and tuple(value.shape) != leading:
        checks.fail("temperature", f"a number or shape {leading}", checks.shape(value))
    checks.same_device("temperature", value, "the inputs", like)
    if value.dim() > 0:
        value = torch.where(counted, value, 1.0)
    if (value.device.type == "cpu" or dispatch.check_enabled()) and not torch.compiler.is_compiling():
        wrong = ~((value > 0) & value.isfinite())
        if bool(wrong.any()):
            checks.fail("temperature", "finite values above 0", float(value[wrong][0]))
    return value.to(dtype).reshape(-1).contiguous()


def _accumulator(name: str, value: Any, wanted: tuple[int, ...], like: Tensor) -> None:
    if value is None:
        return
    checks.plain(name, value)
    if value.dtype != (torch.float64 if like.dtype == torch.float64 else torch.float32):
        raise TypeError(f"{name}: wanted float32 (float64 beside float64 inputs); got {value.dtype}")
    if tuple(value.shape) != wanted:
        checks.fail(name, f"shape {wanted}", checks.shape(value))
    if value.requires_grad:
        checks.fail(name, "a tensor without requires_grad", "requires_grad=True")
    checks.same_device(name, value, "hidden", like)


def _kept(kept: Any, hidden: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    if not (isinstance(kept, tuple) and len(kept) == 2):
        checks.fail("kept", "a pair (ids [K], offsets [N+1])", type(kept).__name__)
    ids = checks.integers("kept ids", kept[0]).long()
    offsets = checks.integers("kept offsets", kept[1], (hidden.shape[0] + 1,)).long()
    if ids.dim() != 1:
        checks.fail("kept ids", "shape [K]", checks.shape(ids))
    for name, value in (("kept ids", ids), ("kept offsets", offsets)):
        checks.same_device(name, value, "hidden", hidden)
    if (hidden.device.type == "cpu" or dispatch.check_enabled()) and not torch.compiler.is_compiling():
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(ids) or bounds != sorted(bounds):
            checks.fail("kept offsets", f"rising boundaries from 0 to {len(ids)}", bounds)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            checks.fail("kept ids", f"ids in [0, {vocab_size})", f"{int(ids.min())} to {int(ids.max())}")
    return ids, offsets


def _check_targets(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Exact where looking costs no device sync (CPU) or is asked for; elsewhere a wrong target shows as NaN."""
    if torch.compiler.is_compiling() or not (target.device.type == "cpu" or dispatch.check_enabled()):
        return
    wrong = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if bool(wrong.any()):
        checks.fail("target", f"ids in [0, {vocab_size}) or ignore_index {ignore_index}", int(target[wrong][0]))
