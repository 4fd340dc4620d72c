"""What a method sees of an update: sampled responses, scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """B sampled responses of at most T tokens, of cells that train side by side: as many of each, in order."""

    logp: Tensor  # [B, T] float64, with a gradient
    entropy: Callable[[], Tensor]  # [B, T] of the policy where each token was chosen, with a gradient
    ref: Tensor  # [B, T]
    old: Tensor | None  # [B, T] of the policy that sampled; None: it is this one
    mask: Tensor  # [B, T] bool
    reward: Tensor  # [B]
    right: Tensor  # [B] bool
    answer: Tensor  # [B] int64: which string
    groups: Tensor  # [B] int64: cell and prompt
    cell: Tensor  # [B] int64
    log_z: Tensor  # [B] learned, with a gradient
    value: Callable[[], Tensor]  # [B, T] of a critic's table before each token, with a gradient
    completed: Callable[[int], Tensor]  # [B, T] mean reward of so many fresh completions from before each token

    @property
    def sampled(self) -> Tensor:
        """Log-probs as rollouts are scored for their reward, once: of the policy that sampled. [B, T]"""
        return self.logp.detach() if self.old is None else self.old

    @property
    def gap(self) -> Tensor:
        """log pi - log pi_ref of each whole response when it was sampled. [B]"""
        return torch.where(self.mask, self.sampled - self.ref, 0.0).sum(-1)

    @property
    def ratio(self) -> Tensor:
        """pi / pi_old of each token, with a gradient. [B, T]"""
        return torch.where(self.mask, self.logp - self.sampled, 0.0).exp()

    def of_cells(self, value: Tensor) -> Tensor:
        """Sums over each cell's responses. [B] -> [C]"""
        return value.reshape(int(self.cell[-1]) + 1, -1).sum(-1)

    @property
    def share(self) -> Tensor:
        """What turns the mean over sequences of sums over tokens into a mean over the tokens of each's cell. [B]"""
        tokens = self.of_cells(self.mask.sum(-1).double())
        return (len(self.cell) / len(tokens) / tokens)[self.cell]
