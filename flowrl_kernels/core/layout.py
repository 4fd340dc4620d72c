"""The layout of tokens and what sums over them are divided by: checked once, for losses and modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.core import checks
from flowrl_kernels.core.dispatch import can_look
from flowrl_kernels.core.segments import Segments


def check_tokens(name: str, value: Any, like: Tensor) -> None:
    if value is None:
        return
    checks.floating(name, value)
    if value.shape != like.shape:
        checks.fail(name, f"shape {tuple(like.shape)} as the first argument has", checks.shape(value))
    checks.same_device(name, value, "the first argument", like)


def check_mask(mask: Any, tokens: Tensor) -> None:
    if checks.plain("mask", mask).shape != tokens.shape:
        checks.fail("mask", f"shape {tuple(tokens.shape)} as the tokens have", checks.shape(mask))
    if mask.dtype.is_complex:
        raise TypeError(f"mask: wanted bool or 0/1; got {mask.dtype}")
    checks.same_device("mask", mask, "the first argument", tokens)
    if can_look(tokens) and mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        checks.fail("mask", "True or 1 at tokens that count and False or 0 elsewhere", "other values")


def segments_of(
    tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, name: str, each: Tensor | None = None,
    each_name: str = "",
) -> Segments:  # fmt: skip
    """The layout of `tokens`, called `name`, with `each` holding one number per sequence; checked.

    Looks at values only where that costs no sync.
    """
    look = can_look(tokens)
    if mask is not None:
        check_mask(mask, tokens)
    if cu_seqlens is None:
        if tokens.dim() != 2:
            checks.fail(name, "[B, T] with mask, or [N] with cu_seqlens", checks.shape(tokens))
        if each is not None and len(each) != tokens.shape[0]:
            checks.fail(each_name, f"one number per sequence, ({tokens.shape[0]},)", checks.shape(each))
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        return Segments(mask.to(torch.bool), None)
    checks.integers("cu_seqlens", cu_seqlens, None if each is None else (len(each) + 1,))
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        checks.fail("cu_seqlens", "shape [B+1]", checks.shape(cu_seqlens))
    checks.same_device("cu_seqlens", cu_seqlens, "the first argument", tokens)
    if tokens.dim() != 1:
        checks.fail(name, "[N] beside cu_seqlens", checks.shape(tokens))
    if look:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(tokens) or bounds != sorted(bounds):
            checks.fail("cu_seqlens", f"rising boundaries from 0 to {len(tokens)}", bounds)
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    return Segments(mask.to(torch.bool), cu_seqlens.long())


def normalizer_of(value: Any, like: Tensor, pair: bool = False) -> Tensor | None:
    """float64, [] or (where `pair`) [2].

    A tensor may hold 0, which is what a part of a batch without tokens counts. One that is negative is refused where it
    can be read, and elsewhere becomes NaN, which no later step can hide.
    """
    if value is None:
        return None
    wanted = "a number or a tensor of one" + (", or two of them: sequences and tokens" if pair else "")
    if isinstance(value, Tensor):
        if value.numel() != 1 and not (pair and value.shape == (2,)):
            checks.fail("normalizer", wanted, checks.shape(value))
        value = checks.plain("normalizer", value).detach()
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"normalizer: wanted {wanted}; got {value.dtype}")
        if can_look(value) and not bool((value >= 0).all() & (value < torch.inf).all()):
            checks.fail("normalizer", "finite numbers of at least 0", value.tolist())
        value = value.to(like.device, torch.float64)
        value = torch.where(value >= 0, value, torch.nan)
        return value if value.shape == (2,) else value.reshape(())
    if isinstance(value, (tuple, list)):
        if not pair or len(value) != 2:
            checks.fail("normalizer", wanted, value)
        parts = [normalizer_of(one, like) for one in value]
        return torch.stack([one for one in parts if one is not None])
    return torch.full((), checks.positive("normalizer", value), dtype=torch.float64, device=like.device)
