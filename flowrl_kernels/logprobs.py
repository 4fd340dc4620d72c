"""The front door of the log-prob primitives: signatures and docstrings; check, resolve, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from torch import Tensor

from flowrl_kernels.core import checks, dispatch
from flowrl_kernels.core.head import (
    check_targets,
    checked_budget,
    checked_head,
    fitting,
    flat_targets,
    refuse_reference,
    sampled_of,
    stem_of,
    targets_of,
    temperature_of,
)
from flowrl_kernels.core.kept import kept_of
from flowrl_kernels.core.types import LogProb, LogProbStatistics, Sampled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_logprob", "logprob"]


class _Settings(TypedDict, total=False):
    bias: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    ignore_index: int
    entropy: bool
    epsilon: float
    report: Tensor | None
    main_grad: Tensor | None
    kept: Any
    vocab_parallel: ProcessGroup | None
    sampled: Sampled | None
    impl: str


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, statistics: Literal[False] = False, **settings: Unpack[_Settings]
) -> LogProb: ...


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, statistics: Literal[True], **settings: Unpack[_Settings]
) -> LogProbStatistics: ...


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, statistics: bool, **settings: Unpack[_Settings]
) -> LogProb | LogProbStatistics: ...


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
    kept: Any = None,
    vocab_parallel: ProcessGroup | None = None,
    sampled: Sampled | None = None,
    statistics: bool = False,
    impl: str = "auto",
) -> LogProb | LogProbStatistics:
    """Log-probabilities of `target` under a language-model head, without a [N, V] tensor.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`` and ``logp = log_softmax(z)[target]``.
    Products of 16-bit inputs are accumulated in fp32 and never rounded before the softmax. A row's bits depend on
    that row and on (H, V, dtype, device) only: batch size, neighbours, padding and flags leave them alone.

    Args:
        hidden: [..., H] final-norm hidden states; float32, bfloat16, float16 (or float64: reference and chunked).
        weight: [V, H] the head's weight, dtype of `hidden`. Under autocast both are cast as a linear layer's would be.
        target: [...] integer token ids in [0, V), or [..., K]: K ids a row, each with its log-prob over the whole
            vocabulary (a teacher's top-k), from the same products. An id may repeat. `ignore_index` marks ids to leave
            out, such as the end of a shorter list; any other value gives NaN. Several ids go with neither `epsilon`,
            `sampled` nor `kept`.
        bias: [V] or None.
        temperature: a number above 0, or [...] per token. The sampling temperature: log-probs are taken after it.
        logit_scale: a finite number; multiplies the product (Cohere-type heads). A learned one is refused, like a
            learned temperature or softcap: no gradient is computed for them (multiply `hidden` by it instead).
        softcap: `cap * tanh(z / cap)` before the temperature (Gemma-type heads), or None.
        ignore_index: the target value that gives logp 0 and no gradient; a row without another has entropy 0.
        entropy: also return the entropy of each row, in nats, differentiable.
        epsilon: 0 for the exact backward. Above 0, the backward may leave out softmax mass as long as the relative
            L1 error of dlogits (non-target entries, before the tail correction) stays at most epsilon (docs/maths.md).
        report: fp32 [3] on the same device, filled by the backward with (bound reached, share of tiles computed, 1 if
            a bounded one returned to the exact path); (0, 1, 0) at epsilon 0. Refused where no backward would fill it.
            Beside `sampled` [4]: the bound is NaN, for none is certain, and the last is the relative L2 error of
            dlogits as estimated from what was kept (0 where all was computed).
        main_grad: fp32 [V, H]; the weight's gradient is added to it and `weight.grad` stays untouched. Refused beside
            a weight that wants no gradient. Under no_grad both are taken and left as they are.
        kept: the token ids that a sampler kept per row (top-k, top-p, min-p): log-probs and entropies are over them, at
            2KH FLOP forward and 4KH backward for K ids in all; rows of more than V/8 ids cost a dense row. The target
            counts as kept, an id that is listed twice once. Integers on the CPU or beside `hidden`, as they come:
            (ids [K], offsets [N+1]), rows packed one after the other; vLLM's mask (token_ids, offsets), or nested
            token_ids; SGLang's list of a list a token, or its (token_ids, lengths); prime-rl's mask (ids, counts),
            where count 0 is a row over the whole vocabulary; or a list of such masks, whose rows are N together. In a
            list of rows, None is the whole vocabulary too; an empty row elsewhere keeps its target alone. Rows over
            the whole vocabulary have the bits of a call without `kept`, and are all that epsilon is spent on.
        vocab_parallel: a ProcessGroup over which the rows of `weight` (and `bias`) are split, in rank order. Targets
            are global ids, `hidden` is the same on every rank, and its gradient is summed over the group.
        sampled: a `Sampled`, for a backward from a random part of the vocabulary whose expectation is the exact one;
            epsilon stays 0 beside it, and kept None. A softcap or an entropy gradient makes the backward exact, and
            the report says so. "chunked" and "triton" have it.
        statistics: return a `LogProbStatistics`, which also has each row's argmax, whether the targets are it (token
            accuracy) and the mean logit: from the same products, without gradient. Not beside `kept`, `vocab_parallel`
            or `sampled.order`. The log-probs keep their bits.
        impl: "auto", "reference", "chunked", "triton". See `flowrl_kernels.backends()`.

    Returns:
        LogProb(logp like target, entropy [...] or None), fp32 (float64 for float64 inputs); with `statistics` a
        LogProbStatistics, which has three fields more.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: the implementation that `impl` names cannot run here.
        NotImplementedError: a second derivative, forward mode or a torch.func transform of "chunked", "triton", kept
            or vocab_parallel. "reference" is plain torch and has them.
    """
    ignore_index, entropy = checks.integer("ignore_index", ignore_index), checks.flag("entropy", entropy)
    flat, ids, head, leading = checked_head(
        hidden, weight, target, bias, temperature, logit_scale, softcap, ignore_index, vocab_parallel is None, True
    )
    shape = tuple(target.shape)
    budget = checked_budget(flat, head, epsilon, report, main_grad, sampled_of(sampled, leading, head))
    chosen = dispatch.resolve(stem_of(budget) if kept is None else "linear_logprob_kept", impl, flat)
    if checks.flag("statistics", statistics):
        for name, given in (
            ("kept", kept is not None),
            ("vocab_parallel", vocab_parallel is not None),
            ("sampled.order", sampled is not None and sampled.order is not None),
        ):
            if given:
                checks.fail("statistics", f"False beside {name}", statistics)
    if ids.dim() > 1:
        for name, given in (("kept", kept is not None), ("epsilon", epsilon > 0.0), ("sampled", sampled is not None)):
            if given:
                checks.fail("target", f"one id a row beside {name}", f"{ids.shape[1]} ids")
    if vocab_parallel is not None:
        checks.process_group("vocab_parallel", vocab_parallel)
    if kept is not None and sampled is not None:
        checks.fail("kept", "no sampled beside it: its backward is exact", "both")
    if vocab_parallel is not None:
        for name, given in (
            ("epsilon", budget.epsilon > 0.0),
            ("report", report is not None),
            ("main_grad", main_grad is not None),
            ("sampled", sampled is not None),
        ):
            if given:
                checks.fail("vocab_parallel", "neither epsilon, report, main_grad nor sampled beside it", name)
    if chosen == "reference":
        if vocab_parallel is not None:
            raise RuntimeError("impl='reference' knows no vocab_parallel: use 'chunked' or 'triton'")
        refuse_reference(budget, main_grad)
    if kept is not None:
        listed = kept_of(kept, flat, None if vocab_parallel is not None else len(head.weight))
        from flowrl_kernels.ops import kept as op

        scale, softcap = head.logit_scale, head.softcap
        settings = op.Settings(
            listed, scale, softcap, ignore_index, entropy, budget, main_grad, vocab_parallel, chosen
        )  # fmt: skip
        return _shaped(op.apply(flat, ids, head, settings), shape, leading)
    if vocab_parallel is not None:
        from flowrl_kernels.ops import vocab_parallel as sharded

        return _shaped(sharded.apply(flat, ids, head, ignore_index, entropy, vocab_parallel, chosen), shape, leading)
    from flowrl_kernels.ops.linear_logprob import apply

    out = apply(flat, ids, head, ignore_index, entropy, chosen, budget, main_grad, statistics)
    made = _shaped(LogProb(out.logp, out.entropy), shape, leading)
    if not isinstance(out, LogProbStatistics):
        return made
    return LogProbStatistics(
        *made, out.argmax.reshape(leading), out.is_top1.reshape(shape), out.mean_logits.reshape(leading)
    )


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
        target: [...] integer token ids in [0, V), or [..., K] for K ids a row; `ignore_index` marks those to leave
            out. Any other value gives NaN.
        temperature: a number above 0, or [...] per token.
        softcap: `cap * tanh(z / cap)` before the temperature, or None.
        ignore_index: the target value that gives logp 0 and no gradient; a row without another has entropy 0.
        entropy: also return the entropy of each row, in nats, differentiable.
        inplace_backward: write the gradient over the logits. Saves one [N, V] tensor; the logits are lost, and a
            second backward through the same graph raises.
        impl: "auto", "reference", "chunked", "triton".

    Returns:
        LogProb(logp like target, entropy [...] or None), fp32 (float64 for float64 inputs).

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
    target, shape = targets_of(target, leading), tuple(target.shape)
    checks.same_device("target", target, "logits", logits)
    counted = target != ignore_index
    counted = counted if shape == leading else counted.any(-1)
    rows_temperature = temperature_of(temperature, leading, logits, counted)
    if softcap is not None:
        softcap = fitting("softcap", checks.positive("softcap", softcap), rows_temperature.dtype)
    check_targets(target, logits.shape[-1], ignore_index)
    chosen = dispatch.resolve("logprob", impl, logits)
    flat, ids = logits.reshape(-1, logits.shape[-1]), flat_targets(target, leading)
    if chosen != "reference" and inplace_backward and not flat.is_contiguous():
        checks.fail("logits", "a contiguous tensor, for inplace_backward=True", f"strides {logits.stride()}")
    from flowrl_kernels.ops.logprob import apply

    out = apply(flat, ids, rows_temperature, softcap, ignore_index, entropy, inplace_backward, chosen)
    return _shaped(out, shape, leading)


def _shaped(out: LogProb, shape: tuple[int, ...], leading: tuple[int, ...]) -> LogProb:
    """Log-probs in the shape of the targets, the rest in that of the rows."""
    return LogProb(out.logp.reshape(shape), None if out.entropy is None else out.entropy.reshape(leading))
