"""Kept ids as sorted lists, each id of a row once, and wide rows as a bit a column (docs/maths.md, eq. 30-31)."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles
from flowrl_kernels.core.types import Kept

WIDE = 8  # a row of more than V / WIDE ids goes by dense tiles: on a CPU a gathered row costs as much as 8 columns
PACKED_ROWS = 64  # rows whose columns are in memory as a byte each


class Lists(NamedTuple):
    """Entries by row and then by column. Where a host cannot count, what is left of the room stands behind them."""

    rows: Tensor  # [E]; N behind them
    columns: Tensor  # [E]; V behind them
    edges: Tensor  # [N + 1] first entry of each row, and the one past the last
    of_target: Tensor  # [N] the target's entry, -1 where the row has none


class Wide(NamedTuple):
    rows: Tensor  # [R] rising
    bits: Tensor  # [R, ceil(V/8)] uint8


class Columns(NamedTuple):
    """The entries once more, by column and then by row."""

    entries: Tensor  # [E] where each stands among the entries by row
    columns: Tensor  # [E] rising


def wide_limit(vocab_size: int) -> int:
    return max(tiles.COLUMNS // WIDE, vocab_size // WIDE)


def make_lists(kept: Kept, target: Tensor, vocab_size: int) -> tuple[Lists, Wide | None]:
    """Lists of the rows that take part, the target among its row's ids, ids outside [0, V) nowhere.

    target: [N], -1 skips the row, V means no target here. Rows that are whole have no entries. What a row's entries
    are does not depend on the order of its ids, on repeated ones or on other rows.
    """
    num_rows, stride = len(target), vocab_size + 1
    live = target >= 0 if kept.whole is None else (target >= 0) & ~kept.whole
    places = torch.arange(len(kept.ids), device=target.device)
    rows = torch.searchsorted(kept.offsets[1:].contiguous(), places, right=True).clamp_max(max(num_rows - 1, 0))
    inside = (kept.ids >= 0) & (kept.ids < vocab_size)
    columns = torch.where(inside, kept.ids, vocab_size)
    if num_rows:
        columns = torch.where(live[rows], columns, vocab_size)
    own = torch.where(live, target, vocab_size) + torch.arange(num_rows, device=target.device) * stride
    key = torch.cat([rows * stride + columns, own]).sort().values
    repeated = torch.cat([torch.zeros_like(key[:1], dtype=torch.bool), key[1:] == key[:-1]])
    rows, columns = key.div(stride, rounding_mode="floor"), key % stride
    off = repeated | (columns == vocab_size)
    wide = None
    if kept.widest + 1 > wide_limit(vocab_size):
        edges = torch.searchsorted(key, torch.arange(num_rows + 1, device=key.device) * stride)
        counts = torch.nn.functional.pad((~off).cumsum(0), (1, 0))[edges].diff()
        many = counts > wide_limit(vocab_size)
        chosen = many.nonzero()[:, 0]  # waits for the device, if it is one
        if len(chosen):
            taken = many[rows] & ~off
            wide = Wide(chosen, _pack(chosen, rows[taken], columns[taken], vocab_size))
            off |= many[rows]
    on = ~off
    before = torch.nn.functional.pad(on.cumsum(0), (1, 0))  # entries in front of each key
    edges = before[torch.searchsorted(key, torch.arange(num_rows + 1, device=key.device) * stride)]
    first = torch.searchsorted(key, own)  # the first of its kind, which is the one that is on
    has = live & (target < vocab_size)
    if num_rows:
        has &= on[first]
    of_target = torch.where(has, before[first], -1)
    if tiles.host_knows(key):
        return Lists(rows[on], columns[on], edges, of_target), wide
    place = torch.where(on, before[:-1], len(key))
    made = (torch.full((len(key) + 1,), fill, device=key.device) for fill in (num_rows, vocab_size))
    rows, columns = (into.scatter_(0, place, given)[:-1] for into, given in zip(made, (rows, columns)))
    return Lists(rows, columns, edges, of_target), wide


def _pack(chosen: Tensor, rows: Tensor, columns: Tensor, vocab_size: int) -> Tensor:
    """A bit a column of the chosen rows, little end first. [R, ceil(V/8)] uint8"""
    width = -(-vocab_size // 8)
    bits = torch.empty((len(chosen), width), dtype=torch.uint8, device=rows.device)
    place = torch.searchsorted(chosen, rows)
    cuts = torch.searchsorted(
        place, torch.arange(0, len(chosen) + PACKED_ROWS, PACKED_ROWS, device=rows.device)
    ).tolist()
    value = 1 << torch.arange(8, dtype=torch.uint8, device=rows.device)
    for i, (first, last) in enumerate(pairwise(cuts)):
        part = bits[i * PACKED_ROWS : (i + 1) * PACKED_ROWS]
        on = torch.zeros((len(part), width * 8), dtype=torch.uint8, device=rows.device)
        on[place[first:last] - i * PACKED_ROWS, columns[first:last]] = 1
        part.copy_((on.view(len(part), width, 8) * value).sum(-1))
    return bits


def by_column(columns: Tensor) -> Columns:
    order = torch.argsort(columns, stable=True)
    return Columns(order, columns[order])


def stray(kept: Kept, vocab_size: int | Tensor) -> Tensor:
    """The rows that list an id outside the vocabulary. [N] bool"""
    outside = (kept.ids < 0) | (kept.ids >= vocab_size)
    before = torch.nn.functional.pad(outside.long().cumsum(0), (1, 0))
    return before[kept.offsets.clamp(0, len(outside))].diff() > 0
