"""`logprob` in Triton: log-probabilities from logits, z = softcap(logits) / temperature (docs/maths.md, eq. 2-4).

Forward: one read of the logits, one program a row. Each lane group of eight columns keeps its own running maximum
and sum, so that an exponential is spent per element and not two. Backward: one read and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowrl_kernels.chunked.several import Several, as_one, put_, rows_of
from flowrl_kernels.core.types import Upstream
from flowrl_kernels.triton.primitives import LN2, LOG2E, row_factor, shifted, tanh

LANES, WIDTH, WARPS = 512, 8, 4  # columns a step = LANES * WIDTH; 16 bytes of 16-bit logits a lane


@triton.jit
def _activate(a, factor, softcap):
    """z and the tanh of the soft-cap (else z again); factor = (softcap or 1) / temperature."""
    if softcap is not None:
        bend = tanh(a * (1.0 / softcap))
        return bend * factor, bend
    else:
        z = a * factor
        return z, z


# V is specialised: whether 16 divides it decides whether loads are vectors
@triton.jit(do_not_specialize=["N", "K", "temperature_stride"])
def forward_kernel(
    logits,  # [N, V]
    target,  # [N]
    ids,  # [N, K], or None
    temperature,  # [N] or [1]
    logp,  # [N]; [N, K] where there are ids, 0 so far
    lse,  # [2, N] maximum and log of the sum
    entropy,  # [N]
    N,
    V,
    K,
    stride_logits,
    temperature_stride,
    softcap,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    IDS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    b_target = tl.load(target + i)
    if b_target < 0:
        if ids is None:
            tl.store(logp + i, 0.0)
        tl.store(lse + i, 0.0)
        tl.store(lse + N.to(tl.int64) + i, 0.0)
        if ENTROPY:
            tl.store(entropy + i, 0.0)
    else:
        factor = row_factor(tl.load(temperature + i * temperature_stride), 1.0, softcap)
        p_row = logits + i * stride_logits
        b_max = tl.full((LANES,), float("-inf"), tl.float32)
        b_sum = tl.zeros((LANES,), tl.float32)
        b_dot = tl.zeros((LANES,), tl.float32)
        i_lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [LANES, WIDTH]
        for col0 in range(0, V, LANES * WIDTH):
            i_col = col0 + i_lane
            a = tl.load(p_row + i_col, mask=i_col < V, other=float("-inf")).to(tl.float32)
            z, _ = _activate(a, factor, softcap)
            z = tl.where(i_col < V, z, float("-inf"))
            new_max = tl.maximum(b_max, tl.max(z, 1))  # nats, like b_max; the rest is log2 units
            ref = tl.where(new_max == float("-inf"), 0.0, new_max * LOG2E)
            d = tl.fma(z, LOG2E, -ref[:, None])
            e = tl.exp2(d)
            step = b_max * LOG2E - ref
            scale = tl.exp2(step)
            if ENTROPY:
                shift = tl.where(b_sum > 0.0, step, 0.0)
                b_dot = scale * tl.fma(shift, b_sum, b_dot) + tl.sum(tl.maximum(d, -200.0) * e, 1)
            b_sum = tl.fma(b_sum, scale, tl.sum(e, 1))
            b_max = new_max
        top = tl.max(b_max, 0)
        ref = tl.where(top == float("-inf"), 0.0, top * LOG2E)
        step = b_max * LOG2E - ref
        scale = tl.exp2(step)
        total = tl.sum(b_sum * scale, 0)
        log_total = tl.log2(total)
        tl.store(lse + i, top)
        tl.store(lse + N.to(tl.int64) + i, log_total * LN2)
        if ids is None:
            known = b_target < V
            a = tl.load(p_row + b_target, mask=known, other=0.0).to(tl.float32)
            z, _ = _activate(a, factor, softcap)
            tl.store(logp + i, tl.where(known, (shifted(z, top) - log_total) * LN2, float("-inf")))
        else:
            for k in range(0, K, IDS):
                i_k = k + tl.arange(0, IDS)
                b_id = tl.load(ids + i * K + i_k, mask=i_k < K, other=-1)
                a = tl.load(p_row + b_id, mask=(b_id >= 0) & (b_id < V), other=0.0).to(tl.float32)
                z, _ = _activate(a, factor, softcap)
                b_logp = tl.where(b_id < V, (shifted(z, top) - log_total) * LN2, float("-inf"))
                tl.store(logp + i * K + i_k, b_logp, mask=b_id >= 0)
        if ENTROPY:
            shift = tl.where(b_sum > 0.0, step, 0.0)
            value = (log_total - tl.sum(scale * tl.fma(shift, b_sum, b_dot), 0) / total) * LN2
            tl.store(entropy + i, tl.where(value < 0.0, 0.0, value))


@triton.jit(do_not_specialize=["N", "num_blocks", "temperature_stride"])
def backward_kernel(
    logits,  # [N, V]
    dlogits,  # [N, V], may be logits
    target,  # [N]
    temperature,  # [N] or [1]
    lse,  # [2, N] maximum and log of the sum
    rest,  # [N] 1 - p of the target
    entropy,  # [N]
    grad_logp,  # [N]
    grad_entropy,  # [N] or None
    N,
    V,
    num_blocks,
    stride_logits,
    stride_dlogits,
    temperature_stride,
    softcap,
    BLOCK: tl.constexpr,
):
    """dlogits = [g (1{v=y} - p_v) - g_H p_v (log p_v + H)] dz/dlogits; every element is read and written once."""
    item = tl.program_id(0)
    i = (item // num_blocks).to(tl.int64)
    i_col = (item % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i_col < V
    b_target = tl.load(target + i)
    b_grad = tl.load(grad_logp + i)
    some = b_grad != 0.0
    if grad_entropy is not None:
        b_grad_entropy = tl.load(grad_entropy + i)
        some = some | (b_grad_entropy != 0.0)
    p_out = dlogits + i * stride_dlogits + i_col
    if (b_target >= 0) & some:
        factor = row_factor(tl.load(temperature + i * temperature_stride), 1.0, softcap)
        scale = row_factor(tl.load(temperature + i * temperature_stride), 1.0, None)
        a = tl.load(logits + i * stride_logits + i_col, mask=inside, other=0.0).to(tl.float32)
        z, bend = _activate(a, factor, softcap)
        log_sum = tl.load(lse + N.to(tl.int64) + i)
        x = shifted(z, tl.load(lse + i))
        p = tl.exp2(x) * tl.exp2(log_sum * -LOG2E)
        d = b_grad * tl.where(i_col == b_target, tl.load(rest + i), -p)
        if grad_entropy is not None:
            d -= b_grad_entropy * (p * (tl.maximum(x, -200.0) * LN2 + (tl.load(entropy + i) - log_sum)))  # p is 0 below
        if softcap is not None:
            d *= 1.0 - bend * bend
        d *= scale
        tl.store(p_out, d.to(dlogits.dtype.element_ty), mask=inside)
    else:
        tl.store(p_out, tl.zeros((BLOCK,), dlogits.dtype.element_ty), mask=inside)


def logprob_fwd(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log p of the target, log-sum-exp and entropy from logits [N, V], one read.

    target [N] int64: -1 skips the row (outputs 0, logits unread), V means no target here. temperature [N] or [1]
    fp32. Returns logp [N] (-inf without a target here), lse [2, N] as maximum and log of the sum relative to it,
    entropy [N] or [0], all fp32. Logits whose rows could be read in vectors but do not begin at a multiple of
    16 bytes are copied (N V elements): the order in which a row adds up must not follow an address. Of targets [N, K]
    -1 skips the id, and logp is [N, K].
    """
    n, v = logits.shape
    if logits.data_ptr() % 16 and logits.stride(0) % 16 == 0:
        logits = logits.clone()
    # three allocations: Triton compiles once more for a pointer that is no multiple of 16 bytes
    logp, lse, entropies = (
        torch.empty(size, dtype=torch.float32, device=logits.device) for size in (n, (2, n), n if entropy else 0)
    )
    ids, k = None, 0
    if target.dim() == 2:
        ids, target, k = target.contiguous(), rows_of(target), target.shape[1]
        logp = torch.zeros((n, k), dtype=torch.float32, device=logits.device)
    if n > 0:
        with torch.cuda.device_of(logits):
            forward_kernel[(n,)](
                logits, target, ids, temperature, logp, lse, entropies,
                n, v, k, logits.stride(0), int(temperature.shape[0] > 1), softcap,
                ENTROPY=entropy, LANES=LANES, WIDTH=WIDTH, IDS=32, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return logp, lse, entropies


def logprob_bwd(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    inplace: bool,
) -> Tensor:
    """Gradient by logits [N, V], in their dtype; written over the logits if `inplace`.

    grad_logp [N] and grad_entropy [N] or None are fp32; rows whose gradients are 0 are not read. grad_logp, target and
    logp may be [N, K].
    """
    n, v = logits.shape
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    num_blocks = triton.cdiv(v, LANES * WIDTH)
    several = None
    if target.dim() == 2:
        one = as_one(Upstream(grad_logp, grad_entropy), target, logp, entropy)
        scale = 1.0 / temperature[:, None]
        if softcap is not None:
            at = logits.gather(1, target.clamp(0, v - 1)).float()
            scale = scale * (1.0 - torch.tanh(at / softcap).square())
        several = Several(target.masked_fill(~one.live[:, None], v), (one.value * scale).to(dlogits.dtype))
        grad_logp, logp = one.total, torch.zeros_like(one.total)
        target = torch.where(rows_of(target) < 0, -1, v)
    if n > 0:
        with torch.cuda.device_of(logits):
            backward_kernel[(n * num_blocks,)](
                logits, dlogits, target, temperature, lse, -torch.expm1(logp), entropy,
                grad_logp.contiguous(), None if grad_entropy is None else grad_entropy.contiguous(),
                n, v, num_blocks, logits.stride(0), dlogits.stride(0), int(temperature.shape[0] > 1), softcap,
                BLOCK=LANES * WIDTH, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    if several is not None and n > 0:
        put_(dlogits, several, 0)
    return dlogits
