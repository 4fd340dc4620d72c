"""What every rollout engine takes and gives, and the random numbers that make sampling repeatable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Training refuses top-p and top-k; evaluation may not use them either."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    stop: tuple[int, ...] = ()  # token ids that end a response; the one sampled is its last token

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature: wanted a finite number of at least 0 (greedy); got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: wanted at least 1; got {self.max_new_tokens}")


class Generated(NamedTuple):
    """B = len(prompts) * n responses, those of one prompt next to each other; all on the CPU.

    tokens: [B, T] int64, the end token included, 0 after it.
    logp: [B, T] fp32, log-probability of each token under the distribution it was drawn from (after the
        temperature), 0 after the end.
    length: [B] int64, tokens of each response.
    finished: [B] bool, False where the budget ran out before an end token.
    """

    tokens: Tensor
    logp: Tensor
    length: Tensor
    finished: Tensor


class Engine(Protocol):
    """Generates for this rank; every rank calls with its own prompts."""

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: list[int] | None = None,
    ) -> Generated:
        """`n` responses to each prompt.

        Args:
            seed: of this call; with the same weights the same call gives the same responses.
            numbers: number of each prompt among those of all ranks (default: 0, 1, ...). It picks the random
                numbers, so the same responses come out however the prompts are shared out.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the policy's full tensors (see `policy.named_weights`) after update number `version`."""
        ...


# splitmix64's constants as signed numbers: int64 products wrap as unsigned ones do
_GOLDEN, _MIX = -7046029254386353131, (-4658895280553007687, -7723592293110705685)


def uniform(seed: int, rows: Tensor, step: int) -> Tensor:
    """[B] float64 in [0, 1): a number for each (seed, row, step), whatever the batch around it (splitmix64).

    Args:
        rows: [B] int64, number of each response among all of the call.
    """
    key = (step * _MIX[0] + seed * _MIX[1]) % 2**64
    x = rows * _GOLDEN + (key - 2**64 if key >= 2**63 else key)
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1]), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # >> copies the sign: clear the copies
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B] at `temperature`; logits [B, V] fp32, u [B] in [0, 1).

    By the inverse of the cumulative distribution in float64, so a token of probability 0 is never drawn. At temperature
    0 the most likely token (the first of equals), whose log-probability then is 0.
    """
    if temperature == 0.0:
        token = logits.argmax(-1)
        return token, logits.new_zeros(token.shape)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    cdf = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(-1), right=True).clamp_(max=logits.shape[-1] - 1)
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)
