"""The residual in Triton: loss, residual, weight, metrics and the gradient (docs/maths.md, eq. 5-12).

Two launches for a loss whose sequences do not depend on each other (FlowRL's, with a number as normaliser or none):
sequences, then totals. Three where they do: rows centred by groups, at token level without a normaliser, or with a PPO
term. No atomics; every sum has one order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import METRICS, Anchors, Sequences
from flowrl_kernels.presets.row import Row, penalty_of
from flowrl_kernels.triton.residual_kernels import coupled_kernel, sequence_kernel
from flowrl_kernels.triton.residual_totals import FIELDS, total_kernel

BLOCK, WARPS = 1024, 8  # tokens a step; four a thread, so that float64 sums stay in registers
LANES = 1024  # sequences a step


class Outputs(NamedTuple):
    loss: Tensor  # [] fp32, as all but `record`
    residual: Tensor  # [B]
    weight: Tensor  # [B]
    metrics: Tensor  # [12]
    dlogp: Tensor  # the layout of logp
    dlog_z: Tensor  # [B]
    record: Tensor  # [FIELDS, B] float64


def outputs(logp: Tensor, reward: Tensor) -> Outputs:
    """Memory for a batch's results, unwritten."""
    num, new = reward.shape[0], {"dtype": torch.float32, "device": logp.device}
    return Outputs(
        torch.empty((), **new), torch.empty(num, **new), torch.empty(num, **new), torch.empty(len(METRICS), **new),
        torch.empty(logp.shape, **new), torch.empty(num, **new),
        torch.empty(FIELDS, num, dtype=torch.float64, device=logp.device),
    )  # fmt: skip


def residual_fwd(
    row: Row,
    logp: Tensor,  # [B, T] or [N] fp32|bf16|fp16
    anchors: Anchors,
    each: Sequences,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], dlogp (layout of logp), dlog_z [B]; all fp32."""
    out = outputs(logp, each.reward)
    sequences(row, out, logp, anchors, each, segments)
    totals(row, out, each.normalizer)
    return out[:6]


def sequences(
    row: Row, out: Outputs, logp: Tensor, anchors: Anchors, each: Sequences, segments: Segments, first: int = 0,
    last: int | None = None,
) -> None:  # fmt: skip
    """Everything but loss and metrics of the sequences from `first` to before `last`, into `out`.

    Fewer than all of them only where they do not depend on each other, and beside a normaliser.
    """
    (anchor, old, sampler), (reward, log_z, groups, normalizer) = anchors, each
    mask, cu_seqlens, _ = segments
    num = reward.shape[0]
    last = num if last is None else last
    if last == first:
        return
    slots = logp.shape[1] if cu_seqlens is None else 0
    token = row.level == "token"
    # one L_alpha goes by alpha - 1, which double precision keeps where a kernel's argument would not
    phi: str | float = row.phi
    if phi in ("exp", "exp_half") or not isinstance(phi, str):
        phi = penalty_of(phi)[1][0] - 1.0
    centre = row.log_z if row.log_z in ("group", "through") and log_z is None and not token else None
    low, high = row.clip
    weighs = old is not None
    token_weight = weighs and token and row.token_weight and row.ratio is not None
    drop_low, drop_high = (None, None) if row.drop is None or not weighs else (1 - row.drop[0], 1 + row.drop[1])
    eps = row.surrogate if weighs and not token else None
    coupled = centre is not None or (normalizer is None and (token or eps is not None))
    divisor, token_divisor = divisors(row, normalizer)
    logp, anchor, old, sampler = (None if t is None else t.contiguous() for t in (logp, anchor, old, sampler))
    seen = mask.contiguous().view(torch.uint8)
    reward, log_z, groups = (None if t is None else t.contiguous() for t in (reward, log_z, groups))
    with torch.cuda.device_of(logp):
        sequence_kernel[(last - first,)](
            logp, anchor, old, sampler, reward, log_z, seen, cu_seqlens, divisor, token_divisor, out.record,
            out.residual, out.weight, out.dlogp, out.dlog_z, num, slots, first, row.beta, row.scale, low, high,
            row.tis_cap, row.length_power or None, math.log1p(-row.gate_clip[0]), math.log1p(row.gate_clip[1]),
            drop_low, drop_high, eps,
            TOKEN=token, TOKEN_WEIGHT=token_weight, RATIO=row.ratio if weighs else None,
            TIS=row.tis if weighs and sampler is not None else None, GATE=row.gate if weighs else None, PHI=phi,
            COUPLED=coupled, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        if coupled:
            coupled_kernel[(num,)](
                logp, anchor, old, reward, log_z, seen, cu_seqlens, groups, divisor, token_divisor, out.record,
                out.residual, out.dlogp, out.dlog_z, num, slots, row.beta, row.scale, low, high, drop_low, drop_high,
                eps, TOKEN=token, TOKEN_WEIGHT=token_weight, CENTRE=centre, PHI=phi, BLOCK=BLOCK, LANES=LANES,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip


def totals(row: Row, out: Outputs, normalizer: Tensor | None) -> None:
    """Loss and metrics from the records of all sequences."""
    num = out.residual.shape[0]
    if num == 0:
        out.loss.zero_()
        out.metrics.zero_()
        return
    with torch.cuda.device_of(out.record):
        total_kernel[(1,)](
            out.record, divisors(row, normalizer)[0], out.loss, out.metrics, num, TOKEN=row.level == "token",
            LANES=LANES, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def divisors(row: Row, normalizer: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """[1] what the row divides by, and [1] what a PPO term does; None for their own counts."""
    if normalizer is None:
        return None, None
    pair = normalizer.to(torch.float64).reshape(-1)
    return (pair[-1:] if row.level == "token" else pair[:1]), pair[-1:]
