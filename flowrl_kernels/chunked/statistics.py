"""What trainers log of a row of logits beside its log-probs: the likeliest id and the mean, from the same tiles."""

from __future__ import annotations

import torch
from torch import Tensor


class Top:
    """Running maximum, where it stands, and sum of a block of rows; tiles come by rising column."""

    def __init__(self, rows: int, like: Tensor):
        self.maximum = like.new_full((rows,), -torch.inf)
        self.argmax = like.new_zeros(rows, dtype=torch.int64)
        self.total = like.new_zeros(rows)

    def add(self, z: Tensor, start: int) -> None:
        """One tile of logits [R, C], whose first column is `start`."""
        top, place = z.max(1)  # the first of equal ones, and below a tile before keeps what is equal
        self.argmax = torch.where(top > self.maximum, place + start, self.argmax)
        self.maximum = torch.maximum(self.maximum, top)
        self.total += z.sum(1)
