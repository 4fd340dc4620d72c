"""The kept ids of samplers, as engines and trainers hand them over, against their contract."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core import checks
from flowrl_kernels.core.dispatch import can_look
from flowrl_kernels.core.types import Kept

WANTED = (
    "a pair (ids [K], offsets [N+1]), a mask with token_ids and offsets or lengths, one with ids and counts, or a list "
    "of masks or of rows (each a list of ids, or None), of one response or of a batch"
)


class _Rows(NamedTuple):
    ids: Tensor  # [K] int64
    counts: Tensor  # [R] int64
    whole: Tensor | None  # [R] bool


def kept_of(kept: Any, hidden: Tensor, vocab_size: int | None) -> Kept:
    """`kept` of hidden [N, H] as the launchers read it; ids of any vocabulary where its size is None.

    Whatever is not on a device already is looked at: its ids, and how many the widest row has.
    """
    rows = _read(kept)
    if len(rows.counts) != len(hidden):
        checks.fail("kept offsets", f"boundaries of N = {len(hidden)} rows, as hidden has", f"{len(rows.counts)} rows")
    if len(rows.ids) and vocab_size is not None and can_look(rows.ids):
        low, high = int(rows.ids.min()), int(rows.ids.max())
        if low < 0 or high >= vocab_size:
            checks.fail("kept ids", f"ids in [0, {vocab_size})", f"{low} to {high}")
    known = rows.counts.device.type == "cpu" and not torch.compiler.is_compiling()
    widest = int(rows.counts.max()) if known and len(rows.counts) else len(rows.ids)
    whole = rows.whole
    if whole is not None and not bool(whole.any()):  # waits, if a device holds the counts: a dense pass costs more
        whole = None
    ids, counts = (
        _moved(name, value, hidden) for name, value in (("kept ids", rows.ids), ("kept offsets", rows.counts))
    )
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Kept(ids, offsets, None if whole is None else _moved("kept counts", whole, hidden), widest)


def _read(kept: Any) -> _Rows:
    if isinstance(kept, list):
        return _joined(kept)
    fields = {name for name in ("token_ids", "offsets", "lengths", "ids", "counts") if hasattr(kept, name)}
    if isinstance(kept, Tensor):
        fields = set()
    if {"token_ids", "offsets"} <= fields:
        return _by_offsets("token_ids", kept.token_ids, kept.offsets)
    if {"token_ids", "lengths"} <= fields:
        return _by_counts("token_ids", kept.token_ids, kept.lengths, "lengths")
    if {"ids", "counts"} <= fields:
        read = _by_counts("ids", kept.ids, kept.counts, "counts")
        return read._replace(whole=read.counts == 0)  # in this format, a position that nothing was recorded for
    if {"ids", "offsets"} <= fields:
        return _by_offsets("ids", kept.ids, kept.offsets)
    if "token_ids" in fields and isinstance(kept.token_ids, list):
        return _joined(kept.token_ids)
    if isinstance(kept, tuple) and len(kept) == 2:
        return _by_offsets("ids", *kept)
    checks.fail("kept", WANTED, f"a {type(kept).__name__}")
    raise AssertionError


def _joined(parts: list[Any]) -> _Rows:
    """Masks or rows one after the other. A row is a list of ids; None is one over the whole vocabulary."""
    made: list[_Rows] = []
    plain: list[Any] = []

    def close() -> None:
        if plain:
            listed = [[] if row is None else row for row in plain]
            counts = torch.tensor([len(row) for row in listed])
            ids = _integers("kept ids", [i for row in listed for i in row])
            whole = torch.tensor([row is None for row in plain])
            made.append(_Rows(ids, counts, whole))
            plain.clear()

    for part in parts:
        if isinstance(part, list) and part and (part[0] is None or isinstance(part[0], list)):
            close()
            made.append(_joined(part))  # the rows of one response
        elif part is None or isinstance(part, list) or hasattr(part, "tolist"):
            plain.append(part if part is None or isinstance(part, list) else part.tolist())
        else:
            close()
            made.append(_read(part))
    close()
    if not made:
        return _Rows(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), None)
    whole = None
    if any(part.whole is not None for part in made):
        nothing = [torch.zeros_like(part.counts, dtype=torch.bool) for part in made]
        whole = torch.cat([none if part.whole is None else part.whole for part, none in zip(made, nothing)])
    return _Rows(torch.cat([part.ids for part in made]), torch.cat([part.counts for part in made]), whole)


def _by_offsets(name: str, ids: Any, offsets: Any) -> _Rows:
    ids, offsets = _integers(f"kept {name}", ids), _integers("kept offsets", offsets)
    if can_look(offsets):
        bounds = offsets.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != len(ids) or bounds != sorted(bounds):
            checks.fail("kept offsets", f"rising boundaries from 0 to {len(ids)}", bounds)
    return _Rows(ids, offsets.diff(), None)


def _by_counts(name: str, ids: Any, counts: Any, counted: str) -> _Rows:
    ids, counts = _integers(f"kept {name}", ids), _integers(f"kept {counted}", counts)
    if can_look(counts) and (int(counts.sum()) != len(ids) or bool((counts < 0).any())):
        checks.fail(f"kept {counted}", f"numbers of at least 0 that add up to {len(ids)}", counts.tolist())
    return _Rows(ids, counts, None)


def _integers(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: wanted integers in one dimension; got {type(value).__name__} ({error})") from None
        if value.numel() == 0:
            value = value.long()
    value = checks.integers(name, value)
    if value.dim() != 1:
        checks.fail(name, "shape [K]" if name.endswith("ids") else "shape [N+1]", checks.shape(value))
    return value.long()


def _moved(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    if value.device.type == "cpu":
        return value.to(hidden.device, non_blocking=True)
    checks.same_device(name, value, "hidden", hidden)
    return value
