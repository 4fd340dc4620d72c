"""The residual in Triton: loss, residual, weight, metrics and the gradient (docs/maths.md, eq. 5-12).

Two launches for a loss whose sequences do not depend on each other (FlowRL's, with a number as normaliser or none):
sequences, then totals. Three where they do: rows centred by groups, at token level without a normaliser, or with a PPO
term. No atomics; every sum has one order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl_kernels.presets import Row
from flowrl_kernels.triton.residual_kernels import FIELDS, coupled_kernel, sequence_kernel, total_kernel

BLOCK, WARPS = 1024, 8  # tokens a step; four a thread, so that float64 sums stay in registers
LANES = 1024  # sequences a step
NUM_METRICS = 12


def residual_fwd(
    row: Row,
    logp: Tensor,  # [B, T] or [N] fp32|bf16|fp16
    anchor: Tensor | None,
    old: Tensor | None,
    sampler: Tensor | None,
    reward: Tensor,  # [B]
    log_z: Tensor | None,  # [B]
    mask: Tensor,  # bool, the layout of logp
    cu_seqlens: Tensor | None,  # int64 [B+1]
    groups: Tensor | None,  # [B]
    normalizer: Tensor | None,  # float64 scalar, or [2]: sequences and tokens
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], all fp32; dlogp (layout, dtype of logp), dlog_z [B] (of log_z)."""
    num, device = reward.shape[0], logp.device
    slots = logp.shape[1] if cu_seqlens is None else 0
    new = {"dtype": torch.float32, "device": device}
    residual, weight, loss = torch.empty(num, **new), torch.empty(num, **new), torch.empty((), **new)
    metrics = torch.empty(NUM_METRICS, **new)
    dlogp = torch.empty(logp.shape, dtype=logp.dtype, device=device)
    dlog_z = torch.empty(num, dtype=torch.float32 if log_z is None else log_z.dtype, device=device)
    if num == 0:
        return loss.zero_(), residual, weight, metrics.zero_(), dlogp, dlog_z
    record = torch.empty(FIELDS, num, dtype=torch.float64, device=device)
    token = row.level == "token"
    centre = row.log_z if row.log_z in ("group", "through") and log_z is None and not token else None
    low, high = row.clip
    weighs = old is not None
    token_weight = weighs and token and row.token_weight and row.ratio is not None
    drop_low, drop_high = (None, None) if row.drop is None or not weighs else (1 - row.drop[0], 1 + row.drop[1])
    eps = row.surrogate if weighs and not token else None
    coupled = centre is not None or (normalizer is None and (token or eps is not None))
    divisor = token_divisor = None
    if normalizer is not None:
        pair = normalizer.to(torch.float64).reshape(-1)
        divisor, token_divisor = pair[-1:] if token else pair[:1], pair[-1:]
    logp, anchor, old, sampler = (None if t is None else t.contiguous() for t in (logp, anchor, old, sampler))
    seen = mask.contiguous().view(torch.uint8)
    reward, log_z, groups = (None if t is None else t.contiguous() for t in (reward, log_z, groups))
    with torch.cuda.device_of(logp):
        sequence_kernel[(num,)](
            logp, anchor, old, sampler, reward, log_z, seen, cu_seqlens, divisor, token_divisor, record, residual,
            weight, dlogp, dlog_z, num, slots, row.beta, row.scale, low, high, row.tis_cap,
            math.log1p(-row.gate_clip[0]), math.log1p(row.gate_clip[1]), drop_low, drop_high, eps,
            TOKEN=token, TOKEN_WEIGHT=token_weight, RATIO=row.ratio if weighs else None,
            TIS=row.tis if weighs and sampler is not None else None, GATE=row.gate if weighs else None, PHI=row.phi,
            COUPLED=coupled, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        if coupled:
            coupled_kernel[(num,)](
                logp, anchor, old, reward, log_z, seen, cu_seqlens, groups, divisor, token_divisor, record, residual,
                dlogp, dlog_z, num, slots, row.beta, row.scale, low, high, drop_low, drop_high, eps,
                TOKEN=token, TOKEN_WEIGHT=token_weight, CENTRE=centre, PHI=row.phi, BLOCK=BLOCK, LANES=LANES,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        total_kernel[(1,)](
            record, divisor, loss, metrics, num, TOKEN=token, LANES=LANES, num_warps=WARPS, enable_fp_fusion=False
        )
    return loss, residual, weight, metrics, dlogp, dlog_z
