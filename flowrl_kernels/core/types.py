"""Axis letters, the results the public functions return, and the structs that carry tensors between them.

Axis letters, the same everywhere: ``N`` packed tokens, ``B`` sequences (responses), ``T`` padded response slots,
``H`` hidden size, ``V`` vocabulary, ``G`` rollouts per prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE = 128  # columns of the vocabulary that share one entry of the tile statistics
METRICS = (
    "residual_mean_abs", "residual_max_abs", "weight_mean", "weight_min", "weight_max", "clipped_low", "clipped_high",
    "log_ratio_old_mean", "log_ratio_ref_mean", "log_z_mean", "log_z_std", "nonfinite",
)  # fmt: skip


class Head(NamedTuple):
    """What makes logits of hidden states: softcap(logit_scale (hidden weight^T + bias)) / temperature."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: Tensor  # [N] or [1]
    logit_scale: float = 1.0
    softcap: float | None = None


class Saved(NamedTuple):
    """What the forward of a log-prob leaves for its backward."""

    logp: Tensor  # [N], of the targets
    lse: Tensor  # [2, N] log-sum-exp as maximum and log of the sum
    entropy: Tensor  # [N] or [0]
    tile_lse: Tensor  # [ceil(V/128), N] fp16 or [0, 0]
    kept: Tensor | None = None  # [N, C] logits of the first C columns, of rows with a target, in order


class Upstream(NamedTuple):
    """The gradients that come in."""

    logp: Tensor  # [N]
    entropy: Tensor | None = None  # [N]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Sampled(NamedTuple):
    """A backward from a random part of the (row, run of 128 columns) pairs: unbiased, at the cost of the part.

    share: expected share of the pairs that are computed, in (0, 1]. Where that would not be faster, all are.
    draw: integers that name the draw, such as (run seed, step, update): the same ones give the same draw, under
        checkpointing and in a retained graph too. New ones at each step, or the errors do not average out.
    rows: [...] integer ids of the rows, such as sequence * 2^32 + position, over all ranks: what a row draws depends
        on its id and not on its place. None: its place in this call.
    order: [V] integer permutation: the token ids in the order in which runs of 128 are cut, such as by falling mean
        probability on earlier batches. Row results are summed in it, so calls whose log-probs are to be equal to the
        bit take the same one. None: by id.
    group: a torch.distributed group over whose ranks the batch is split (each calls once): the same pairs are kept,
        with the same factors, as on one rank.
    """

    share: float
    draw: tuple[int, ...]
    rows: Tensor | None = None
    order: Tensor | None = None
    group: Any = None


class Draw(NamedTuple):
    """`Sampled` as the launchers read it."""

    share: float
    key: int  # 64 bits
    rows: Tensor | None = None  # [N] int64
    order: Tensor | None = None  # [V] int64: the id at each place; targets are places then
    group: str = ""  # name, "" without


class Budget(NamedTuple):
    """How much softmax mass a backward may leave out, by which rule, and where it reports what it did."""

    epsilon: float = 0.0
    report: Tensor | None = None  # [3], [4] beside a draw
    draw: Draw | None = None

    def tell(self, bound: Tensor | float, share: Tensor | float, fell_back: bool, error: Tensor | float = 0.0) -> None:
        """Fill the report: a bound that is certain (NaN where none is), the share computed, whether an exact backward
        took the place of another, and the estimated relative error."""
        if self.report is not None:
            facts = (bound, share, float(fell_back), error)[: len(self.report)]
            self.report.copy_(torch.stack([torch.as_tensor(f, device=self.report.device).double() for f in facts]))


EXACT = Budget()


class Anchors(NamedTuple):
    """Other policies' log-probs of the same tokens, in the layout of logp; detached."""

    anchor: Tensor | None
    old: Tensor | None
    sampler: Tensor | None

    def part(self, own: slice) -> Anchors:
        return Anchors(*(None if tokens is None else tokens[own] for tokens in self))

    def flat(self) -> Anchors:
        return Anchors(*(None if tokens is None else tokens.reshape(-1) for tokens in self))


class Sequences(NamedTuple):
    """One number a sequence, and what their sum is divided by."""

    reward: Tensor  # [B]
    log_z: Tensor | None  # [B]
    groups: Tensor | None  # [B] ids
    normalizer: Tensor | None  # float64 scalar, or [2]: sequences and tokens


class Chunks(NamedTuple):
    """Whole sequences, a few at a time: host values."""

    most: int  # tokens whose logits are held at once; a chunk of more is one long sequence
    edges: list[int]  # the tokens at which chunks begin, and N
    bounds: list[int]  # the sequences at which they begin, and B

    def spans(self) -> list[tuple[int, int, int, int]]:
        """First and last sequence, first and last token of each."""
        return list(zip(self.bounds, self.bounds[1:], self.edges, self.edges[1:]))


class LogProb(NamedTuple):
    """Log-probabilities of the targets, in nats.

    logp: [...] fp32 (float64 for float64 inputs), [..., K] where K ids a row were given; ignored ids hold 0.
    entropy: [...] of the same dtype, or None where it was not asked for; ignored rows hold 0.
    """

    logp: Tensor
    entropy: Tensor | None


class LogProbStatistics(NamedTuple):
    """`LogProb`, with what trainers log of each row's logits, from the same products; the latter without gradient.

    logp, entropy: as in `LogProb`.
    argmax: [...] int64, the likeliest id, the lowest of equal ones; -1 in ignored rows.
    is_top1: like target, bool: whether the id is the argmax; False where ignored. Its mean over the ids that count is
        the token accuracy.
    mean_logits: [...] as logp, the mean of the logits over the vocabulary, after scale, soft cap and temperature; 0 in
        ignored rows, -inf where a token is banned.
    """

    logp: Tensor
    entropy: Tensor | None
    argmax: Tensor
    is_top1: Tensor
    mean_logits: Tensor


class RowStatistics(NamedTuple):
    """Where a forward writes them."""

    argmax: Tensor  # [N] int64
    mean_logits: Tensor  # [N]


class LossOutput(NamedTuple):
    """A loss and what a training log wants to know about it.

    loss: scalar, differentiable.
    residual: [B] detached, the flow-balance residual per sequence (for policy gradients: the mean token loss).
    weight: [B] detached, the importance weight per sequence.
    metrics: detached scalars kept on the device, so that reading none of them costs no synchronisation.
    """

    loss: Tensor
    residual: Tensor
    weight: Tensor
    metrics: dict[str, Tensor]
