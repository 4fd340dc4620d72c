"""What every rollout engine takes and gives, and the random numbers that make sampling repeatable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flowrl_kernels.trainer.rollout.stops import Stops


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn, in vLLM's order: temperature, then min-p, top-k and top-p on what is left of it."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy, which no truncation changes
    stop: tuple[int, ...] = ()  # token ids that end a response; the one sampled is its last token
    top_p: float = 1.0  # the most likely tokens that hold this share of the mass; 1: all
    top_k: int = 0  # so many of the most likely tokens, and those as likely as the last of them; 0: all
    min_p: float = 0.0  # tokens at least this share as likely as the most likely one; 0: all
    stops: Stops | None = None  # texts that end a response; the token that completes one is its last

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature: wanted a finite number of at least 0 (greedy); got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: wanted at least 1; got {self.max_new_tokens}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: wanted a number above 0 and at most 1 (all); got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: wanted at least 1, or 0 (all); got {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p: wanted a number in [0, 1]; got {self.min_p}")

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that end a response whatever came before."""
        return self.stop if self.stops is None else (*self.stop, *self.stops.tokens)

    @property
    def truncated(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


class Kept(NamedTuple):
    """The tokens that a truncated draw chose from: one row for each sampled token, response after response.

    Token t of response b has row sum(length[:b]) + t. These are the compressed rows of `linear_logprob(kept=)`.
    ids: [K] int32 or int64, token ids, rising within a row. offsets: [M + 1] int64, from 0 to K.
    """

    ids: Tensor
    offsets: Tensor

    def rows(self, which: Tensor) -> Kept:
        """The rows `which` [R] int64, in that order."""
        first, counts = self.offsets[which], self.offsets.diff()[which]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = (first - offsets[:-1]).repeat_interleave(counts)
        return Kept(self.ids[torch.arange(len(shift), device=shift.device) + shift], offsets)


class Generated(NamedTuple):
    """B = len(prompts) * n responses, those of one prompt next to each other; all on the CPU.

    tokens: [B, T] int64, the end token included, 0 after it.
    logp: [B, T] fp32, log-probability of each token under the distribution it was drawn from (after the
        temperature and over the kept tokens), 0 after the end.
    length: [B] int64, tokens of each response.
    finished: [B] bool, False where the budget ran out before an end token or text.
    kept: what a truncated draw chose from; None where nothing was left out, or the engine does not tell.
    version: number of the update whose weights generated this.
    """

    tokens: Tensor
    logp: Tensor
    length: Tensor
    finished: Tensor
    kept: Kept | None = None
    version: int = 0


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

    def release(self) -> None:
        """Gives up what memory it can until the next `update_weights`: called before the optimiser needs it."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


# splitmix64's constants as signed numbers: int64 products wrap as unsigned ones do
_GOLDEN, _MIX = -7046029254386353131, (-4658895280553007687, -7723592293110705685)


def uniform(seed: int, rows: Tensor, step: int) -> Tensor:
    """[B] float64 in [0, 1): a number for each (seed, row, step), whatever the batch around it (splitmix64).

    Args:
        rows: [B] int64, number of each response among all of the call.
    """
    key = (step * _MIX[0] + seed * _MIX[1]) % 2**64
    x = (rows + 1) * _GOLDEN + (key - 2**64 if key >= 2**63 else key)  # 0 would come out as 0
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1]), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # >> copies the sign: clear the copies
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


class Drawn(NamedTuple):
    token: Tensor  # [B] int64
    logp: Tensor  # [B] fp32, under the distribution it was drawn from
    kept: Tensor | None  # [B, V] bool, what it was drawn from; None: everything


def draw(logits: Tensor, sampling: Sampling, u: Tensor) -> Drawn:
    """A token of each row; logits [B, V] fp32, u [B] in [0, 1).

    By the inverse of the cumulative distribution in float64, so a token of probability 0 is never drawn. At temperature
    0 the most likely token (the first of equals), whose log-probability then is 0.
    """
    if sampling.temperature == 0.0:
        token = logits.argmax(-1)
        return Drawn(token, logits.new_zeros(token.shape), None)
    z = logits / sampling.temperature
    keep = kept_tokens(z, sampling) if sampling.truncated else None
    logp = torch.log_softmax(z if keep is None else z.masked_fill(~keep, -math.inf), dim=-1)
    cdf = logp.to(torch.float64, copy=True).exp_().cumsum_(-1)  # in place: [B, V] is large beside what a token costs
    token = torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(-1), right=True).clamp_(max=logits.shape[-1] - 1)
    return Drawn(token.squeeze(-1), logp.gather(-1, token).squeeze(-1), keep)


def kept_tokens(z: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] bool: what min-p, then top-k, then top-p leave of the distribution softmax(z), z after the temperature.

    As vLLM's sampler (vllm/v1/sample: the min-p processor, then ops/topk_topp_sampler.py): top-k keeps every token as
    likely as the k-th, and top-p takes shares of the mass that the others left. Of equals at top-p's edge the lower
    ids stay, which vLLM leaves to its sort.
    """
    keep = torch.ones_like(z, dtype=torch.bool)
    if sampling.min_p > 0.0:
        keep &= z >= z.amax(-1, keepdim=True) + math.log(sampling.min_p)
    if 0 < sampling.top_k < z.shape[-1]:
        left = z.masked_fill(~keep, -math.inf)
        keep &= z >= left.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1.0:
        left, order = z.masked_fill(~keep, -math.inf).sort(dim=-1, descending=True, stable=True)
        mass = left.double().softmax(-1)
        above = mass.cumsum(-1) - mass  # of the tokens before each
        keep &= torch.zeros_like(keep).scatter(-1, order, above < sampling.top_p)
    return keep
