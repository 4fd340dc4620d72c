"""Where the tokens of each sequence are, and sums over sequences and over groups: in order, in float64, no atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SegmentSum(torch.autograd.Function):
    """Sum over each sequence's packed tokens: linear, so it has every derivative, which torch's own has not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, cu_seqlens: Tensor):
        ctx.save_for_backward(cu_seqlens)
        ctx.num_tokens = len(value)
        return segment_sum(value, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return grad[owners(ctx.saved_tensors[0], ctx.num_tokens)], None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None):
        return segment_sum(tangent, ctx.saved_tensors[0])


class GroupSum(torch.autograd.Function):
    """Sum over each one's group [B]: a symmetric linear map, so it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, own: Grouped):
        ctx.own = own
        return segment_sum(value[own.order], own.offsets)[own.which]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return GroupSum.apply(grad, ctx.own), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None):
        return GroupSum.apply(tangent, ctx.own)


def segment_sum(value: Tensor, offsets: Tensor) -> Tensor:
    """Sums in order over [N] from each offset to the next. [B]"""
    return torch.segment_reduce(value, "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)


def owners(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The sequence of each packed token. [N]"""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


class Segments(NamedTuple):
    """Where the tokens of each sequence are. `mask` has the tokens' layout."""

    mask: Tensor  # bool [B, T] or [N]
    cu_seqlens: Tensor | None  # int64 [B+1]
    over_ranks: Callable[[Tensor], Tensor] | None = None  # adds up sums [B] of sequences that are split over ranks

    def total(self, value: Tensor) -> Tensor:
        """Sum over each sequence's tokens, in order, in float64. [B]"""
        value = torch.where(self.mask, value.double(), 0.0)
        if self.cu_seqlens is None:
            own = value.sum(1)
        else:
            total = segment_sum if torch.compiler.is_compiling() else SegmentSum.apply
            own = total(value, self.cu_seqlens)
        return own if self.over_ranks is None else self.over_ranks(own)

    def clean(self, value: Any) -> Any:
        """`value` (or None) in float64 with 0 at the tokens that do not count."""
        return None if value is None else torch.where(self.mask, value.double(), 0.0)

    def spread(self, value: Tensor) -> Tensor:
        """Each sequence's number at each of its tokens. [B] -> [B, T] or [N]"""
        if self.cu_seqlens is None:
            return value[:, None].expand(self.mask.shape)
        return value[self.owner().clamp_max(len(value) - 1)]

    def owner(self) -> Tensor:
        """The sequence of each packed token. [N]"""
        assert self.cu_seqlens is not None
        return owners(self.cu_seqlens, self.mask.shape[0])


class Grouped(NamedTuple):
    """[B] ids put in order, once: sums over the members of each one's group, linear in B and without atomics."""

    order: Tensor  # [B] int64, by group and then by place
    which: Tensor  # [B] int64: the group of each, counted from 0
    offsets: Tensor  # [B+1] int64: where groups begin in `order`, B from the last on

    def total(self, value: Tensor) -> Tensor:
        """Sum over each one's group, its members in order, in float64. [B]"""
        return GroupSum.apply(value.double(), self)

    def mean(self, value: Tensor, used: Tensor) -> Tensor:
        """Mean over the members that are `used`; 0 for a group without any. [B]"""
        on = used > 0
        return self.total(torch.where(on, value.double(), 0.0)) / self.total(on).clamp_min(1.0)


def grouped(groups: Tensor) -> Grouped:
    by_group, order = groups.long().sort(stable=True)
    first = torch.ones_like(by_group, dtype=torch.bool)
    first[1:] = by_group[1:] != by_group[:-1]
    rising = first.cumsum(0) - 1
    offsets = torch.searchsorted(rising, torch.arange(len(rising) + 1, device=rising.device))
    return Grouped(order, torch.empty_like(order).scatter_(0, order, rising), offsets)


def group_mean(value: Tensor, groups: Tensor, used: Tensor) -> Tensor:
    """Mean over the members of each one's group that are `used`; 0 for a group without any. [B] float64"""
    return grouped(groups).mean(value, used)
