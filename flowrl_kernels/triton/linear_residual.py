"""Hidden states to loss and gradients in a single pass, 6NHV (4NHV for a frozen head): whole sequences at a time.

A sequence's coefficient is one number that is known after its own forward (docs/maths.md, eq. 8). So a chunk's logits
are made once, by the forward kernel of `linear_logprob` with one more output, and kept in fp32: logp has the bits of
`linear_logprob`. Then residual, dz = dloss/d(hidden weight^T), and the two products.

dz takes the place of the logits, row by row: a second buffer would cost another 2 bytes a logit, or slabs of the
vocabulary whose dhidden has to be added up in fp32. In place, one row is one program that reads ahead of what it
writes, and each gradient is one product over the whole chunk.

Memory beyond the gradients: the logits, 4 bytes each (4.2 GB at 8192 x 128256), and two [chunk, H] of the inputs'
dtype. With several chunks dweight also adds up in fp32, 4VH bytes (2.2 GB for Qwen2.5-7B); one chunk rounds it
straight from the product's accumulators. In float16 both gradients stay in fp32 (ops/linear_residual.py rounds them).

A chunk of more rows than the buffer holds is one long sequence: its logits are made a second time, by the forward and
backward of `linear_logprob` (8NHV for its rows alone).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowrl_kernels.chunked.linear_residual import SinglePass, wide
from flowrl_kernels.chunked.tiles import fp16_factor
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import EXACT, TILE, Anchors, Chunks, Head, Needs, Sequences, Upstream
from flowrl_kernels.presets.row import Row
from flowrl_kernels.triton import residual
from flowrl_kernels.triton.linear_logprob import (
    Compact,
    Outputs,
    forward_rows,
    linear_logprob_bwd,
    linear_logprob_fwd,
    realigned,
)
from flowrl_kernels.triton.matmul import exact_matmul, matmul_into
from flowrl_kernels.triton.primitives import LOG2E, compact, gather_rows, row_factor, scatter_rows, shifted

BLOCK, WARPS = 4096, 8  # columns a step: four 16-byte loads a thread in flight


# `width` is specialised: only a multiple of 16 makes loads and stores vectors
@triton.jit(do_not_specialize=["N", "temperature_stride"])
def dlogits_in_place_kernel(
    logits,  # [N, width] fp32 compact rows, -inf from V on
    dz,  # the same memory as rows of the inputs' dtype
    order,  # [N]
    count,  # [1]
    target,  # [N]
    temperature,  # [N] or [1]
    lse,  # [2, N] maximum and log of the sum
    rest,  # [N] 1 - p of the target
    grad_logp,  # [N]
    factor,  # [1] power of two, or None
    N,
    width,
    stride_logits,
    stride_dz,
    temperature_stride,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
):
    """g (1{v=y} - p_v) dz/d(h W^T + b) of one row, over its logits; 0 in rows that take no part, anything from V on."""
    i_row = tl.program_id(0).to(tl.int64)
    live = i_row < tl.load(count)
    source = tl.load(order + i_row)
    b_grad = tl.load(grad_logp + source, mask=live, other=0.0)
    p_dz = dz + i_row * stride_dz
    if b_grad == 0.0:
        for v in range(0, width, BLOCK):
            i_col = v + tl.arange(0, BLOCK)
            tl.store(p_dz + i_col, tl.zeros((BLOCK,), dz.dtype.element_ty), mask=i_col < width)
    else:
        b_target = tl.load(target + source)
        b_temperature = tl.load(temperature + source * temperature_stride)
        b_max = tl.load(lse + source)
        b_scale = row_factor(b_temperature, logit_scale, None)
        if factor is not None:
            b_scale *= tl.load(factor)
        b_at_target = b_grad * tl.load(rest + source) * b_scale
        b_p = -b_grad * tl.exp2(tl.load(lse + N.to(tl.int64) + source) * -LOG2E) * b_scale
        p_logits = logits + i_row * stride_logits
        for v in range(0, width, BLOCK):
            i_col = v + tl.arange(0, BLOCK)
            z = tl.load(p_logits + i_col, mask=i_col < width, other=0.0)
            # a step's dz lies over this step's logits or earlier ones: every thread has to have read its own
            tl.debug_barrier()
            d = tl.where(i_col == b_target, b_at_target, b_p * tl.exp2(shifted(z, b_max)))
            if softcap is not None:
                bend = z * tl.div_rn(b_temperature, softcap + tl.zeros_like(b_temperature))
                d *= 1.0 - bend * bend
            tl.store(p_dz + i_col, d.to(dz.dtype.element_ty), mask=i_col < width)


def linear_residual_fwd(
    row: Row,
    hidden: Tensor,  # [N, H] packed response positions; fp32, bf16 or fp16
    target: Tensor,  # [N] int64; -1 skips the row, V gives NaN
    head: Head,
    anchors: Anchors,
    each: Sequences,  # groups: for one chunk that holds the whole batch
    segments: Segments,  # packed
    chunks: Chunks,
    need: Needs,
) -> SinglePass:
    """The loss of the batch with its gradients for an incoming one of 1; those not needed are None.

    dz is rounded once, to the input dtype; sums run in fp32. No host sync. Bits are the same from run to run.
    """
    weight, temperature, logit_scale, softcap = realigned(head.weight), *head[2:]
    head, most = head._replace(weight=weight), chunks.most
    (v, h), device, dtype = weight.shape, hidden.device, hidden.dtype
    logp = torch.zeros(hidden.shape[0], dtype=torch.float32, device=device)
    dhidden = torch.zeros_like(hidden, dtype=wide(dtype)) if need.hidden else None
    dbias = torch.zeros(v, dtype=torch.float32, device=device) if need.bias else None
    out = residual.outputs(logp, each.reward)
    spans = chunks.spans()
    sizes = [high - low for _, _, low, high in spans]
    twice = [size > most and dtype != torch.float16 for size in sizes]
    several = sum(size > 0 for size in sizes) != 1 or any(twice)
    sums = torch.float32 if several else wide(dtype)
    empty = torch.zeros if several else torch.empty  # one product writes each element once; several add up
    dweight = empty(v, h, dtype=sums, device=device) if need.weight else None
    rows_held = max((size for size, again in zip(sizes, twice) if not again), default=0)
    buffer = torch.empty(rows_held, -(-v // TILE) * TILE, dtype=torch.float32, device=device)
    with exact_matmul(hidden):
        for (first, last, low, high), again in zip(spans, twice):
            own = slice(low, high)
            # copies begin at a multiple of 16 bytes: Triton compiles once more for a pointer that does not
            ids = target[own].clone()
            degrees = temperature if temperature.shape[0] == 1 else temperature[own].clone()
            own_head = head._replace(temperature=degrees)
            if again:
                saved = linear_logprob_fwd(hidden[own], ids, own_head, False, False)
                made = saved.logp
            elif high > low:
                logits = buffer[: high - low]
                order, count = compact(ids >= 0)
                rows = gather_rows(hidden[own], order, count)
                made, lse = logp.new_zeros(high - low), logp.new_empty((2, high - low))
                forward_rows(Compact(rows, order, count), ids, own_head, Outputs(made, lse, logits=logits))
            if high > low:
                logp[own] = torch.where(ids < v, made, float("nan"))
            residual.sequences(row, out, logp, anchors, each, segments, first, last)
            if high == low:
                continue
            grad = out.dlogp[own].masked_fill(ids < 0, 0.0)
            if again:
                part, _, dbias_own = linear_logprob_bwd(
                    Upstream(grad), hidden[own], ids, own_head, saved, need, EXACT, dweight
                )
                if dhidden is not None:
                    dhidden[own] = part
                if dbias is not None:
                    dbias += dbias_own
                continue
            factor = inverse = None
            if dtype == torch.float16:
                factor = fp16_factor(grad, None, None, degrees, logit_scale)
                inverse = 1.0 / factor
            dz = logits.view(dtype)
            dlogits_in_place_kernel[(high - low,)](
                logits, dz, order, count, ids, degrees, lse, -torch.expm1(made), grad, factor,
                high - low, logits.shape[1], logits.stride(0), dz.stride(0), int(degrees.shape[0] > 1), logit_scale,
                softcap, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            dz = dz[:, :v]
            if dbias is not None:
                total = dz.sum(0, dtype=torch.float32)
                dbias += total if inverse is None else total * inverse
            if dhidden is not None:
                part = torch.empty(high - low, h, dtype=wide(dtype), device=device)
                matmul_into(part, dz, weight, add=False)
                scatter_rows(part, order, count, wide(dtype), inverse, out=dhidden[own])
            if dweight is not None:
                matmul_into(dweight, dz.t(), rows, several, inverse)
    residual.totals(row, out, each.normalizer)
    if dweight is not None:
        buffer = logits = dz = None  # dweight may need another [V, H] now
        dweight = dweight.to(wide(dtype))
    return SinglePass(logp, out.loss, out.residual, out.weight, out.metrics, out.dlog_z, dhidden, dweight, dbias)
