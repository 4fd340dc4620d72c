"""The arguments of a language-model head against their contract: shapes, dtypes, devices, values where they show."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core import checks
from flowrl_kernels.core.counter import fold
from flowrl_kernels.core.dispatch import can_look
from flowrl_kernels.core.types import Budget, Draw, Head, Sampled


class Tokens(NamedTuple):
    """Hidden states and targets against their contract, flattened, with the head that reads them."""

    hidden: Tensor  # [N, H] contiguous
    target: Tensor  # [N] or [N, K] int64
    head: Head
    leading: tuple[int, ...]


def checked_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int = -100,
    whole: bool = True,
    several: bool = False,
) -> Tokens:
    """The arguments of `linear_logprob` against their contract, after autocast; `several` ids a row where allowed."""
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
    target = targets_of(target, leading) if several else checks.integers("target", target, leading).long()
    checks.same_device("target", target, "hidden", hidden)
    vocab_size = weight.shape[0]
    if bias is not None:
        checks.floating("bias", bias, dims=1)
        if bias.shape[0] != vocab_size:
            checks.fail("bias", f"shape ({vocab_size},) as weight has rows", checks.shape(bias))
        checks.same_device("bias", bias, "hidden", hidden)
    counted = target != ignore_index
    counted = counted if target.dim() == len(leading) else counted.any(-1)
    rows_temperature = temperature_of(temperature, leading, hidden, counted)
    dtype = rows_temperature.dtype
    softcap = None if softcap is None else fitting("softcap", checks.positive("softcap", softcap), dtype)
    logit_scale = checks.number("logit_scale", logit_scale)
    if logit_scale != 0.0:
        fitting("logit_scale", logit_scale, dtype)
    if whole:
        check_targets(target, vocab_size, ignore_index)
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    head = Head(weight.contiguous(), bias, rows_temperature, logit_scale, softcap)
    return Tokens(flat, flat_targets(target, leading), head, leading)


def targets_of(target: Tensor, leading: tuple[int, ...]) -> Tensor:
    """Ids [...] or [..., K] as int64: narrow integers cannot hold every id nor -100."""
    target = checks.integers("target", target)
    shape = tuple(target.shape)
    if shape != leading and (shape[:-1] != leading or shape[-1] == 0):
        checks.fail("target", f"shape {leading}, or {(*leading, 'K')} for K of at least 1 ids a row", shape)
    return target.long()


def flat_targets(target: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[N], also of one id a row; or [N, K]. Contiguous."""
    several = target.dim() > len(leading) and target.shape[-1] > 1
    return (target.reshape(-1, target.shape[-1]) if several else target.reshape(-1)).contiguous()


def checked_budget(
    hidden: Tensor, head: Head, epsilon: float, report: Tensor | None, main_grad: Tensor | None,
    draw: Draw | None = None,
) -> Budget:  # fmt: skip
    """What a backward may leave out, and what it writes, against their contract."""
    epsilon = checks.number("epsilon", epsilon)
    if not 0.0 <= epsilon < 1.0:
        checks.fail("epsilon", "a number in [0, 1)", epsilon)
    if draw is not None and epsilon > 0.0:
        checks.fail("epsilon", "0 beside sampled, whose error is an expectation and has no bound", epsilon)
    accumulator("report", report, (3,) if draw is None else (4,), hidden)
    accumulator("main_grad", main_grad, tuple(head.weight.shape), hidden)
    if torch.is_grad_enabled():
        if main_grad is not None and not head.weight.requires_grad:
            checks.fail("main_grad", "a weight that requires a gradient beside it", "a frozen weight")
        trained = any(t is not None and t.requires_grad for t in (hidden, head.weight, head.bias))
        if report is not None and not trained:
            checks.fail("report", "an input that requires a gradient: the backward fills it", "frozen inputs")
    return Budget(epsilon, report, draw)


def sampled_of(sampled: Any, leading: tuple[int, ...], head: Head) -> Draw | None:
    """A `Sampled` against its contract."""
    if sampled is None:
        return None
    if not isinstance(sampled, Sampled):
        raise TypeError(f"sampled: wanted a flowrl_kernels.Sampled or None; got {type(sampled).__name__}")
    share = checks.number("sampled.share", sampled.share)
    if not 0.0 < share <= 1.0:
        checks.fail("sampled.share", "a number in (0, 1]", share)
    draw = sampled.draw
    if not isinstance(draw, (tuple, list)) or len(draw) == 0:
        raise TypeError(f"sampled.draw: wanted a tuple of integers such as (seed, step); got {draw!r}")
    key = fold(checks.integer("sampled.draw", number) for number in draw)
    rows, order, weight = sampled.rows, sampled.order, head.weight
    if rows is not None:
        rows = checks.integers("sampled.rows", rows, leading).reshape(-1).long()
        checks.same_device("sampled.rows", rows, "hidden", weight)
    if order is not None:
        order = checks.integers("sampled.order", order, (len(weight),)).long()
        checks.same_device("sampled.order", order, "hidden", weight)
        if can_look(order):
            if not bool(torch.equal(order.sort().values, torch.arange(len(order), device=order.device))):
                checks.fail("sampled.order", f"each id in [0, {len(order)}) once", "some more than once, or others")
    if sampled.group is not None:
        checks.process_group("sampled.group", sampled.group)
    return Draw(share, key, rows, order, "" if sampled.group is None else sampled.group.group_name)


def stem_of(budget: Budget) -> str:
    return "linear_logprob" if budget.draw is None else "linear_logprob_sampled"


def refuse_reference(budget: Budget, main_grad: Tensor | None) -> None:
    if budget.epsilon > 0.0 or main_grad is not None or budget.report is not None or budget.draw is not None:
        raise RuntimeError(
            "impl='reference' is plain autograd: it takes neither epsilon, report, main_grad nor sampled"
        )


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64 and hidden.is_floating_point():
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def temperature_of(value: float | Tensor, leading: tuple[int, ...], like: Tensor, counted: Tensor) -> Tensor:
    """[N] or [1], fp32 (float64 beside float64); 1 in rows that do not count, which may hold anything."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        value = fitting("temperature", checks.positive("temperature", value), dtype)
        return torch.full((1,), value, dtype=dtype, device=like.device)
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
    given, value = value, value.to(dtype)
    if can_look(value):
        wrong = ~((value >= torch.finfo(dtype).tiny) & value.isfinite())  # as it will divide
        if bool(wrong.any()):
            checks.fail("temperature", f"finite values above 0 in {dtype}", float(given[wrong][0]))
    return value.reshape(-1).contiguous()


def fitting(name: str, value: float, dtype: torch.dtype) -> float:
    """`value`, which is not 0, unless it would be 0 or infinite in `dtype`."""
    if isinstance(value, float) and not torch.finfo(dtype).tiny <= abs(value) <= torch.finfo(dtype).max:
        checks.fail(name, f"a number that is neither 0 nor infinite in {dtype}", value)
    return value


def check_targets(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Exact where looking costs no device sync (CPU) or is asked for; elsewhere a wrong target shows as NaN."""
    if not can_look(target):
        return
    wrong = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if bool(wrong.any()):
        checks.fail("target", f"ids in [0, {vocab_size}) or ignore_index {ignore_index}", int(target[wrong][0]))


def accumulator(name: str, value: Any, wanted: tuple[int, ...], like: Tensor) -> None:
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
