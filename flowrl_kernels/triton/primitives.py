"""Pieces shared by the kernels: one tile of logits, the activation after it, and moves between row orders.

Kernels see rows in *compact* order: `order` [N] lists the rows that take part first, `count` [1] says how many
they are, and both stay on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """Within 1e-7 of tanh; overflow-free, and -1 / 1 at -inf / inf."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    magnitude = (1.0 - t) / (1.0 + t)
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def shifted(z, maximum):
    """z - maximum in log2 units, rounded once; the rounding of LOG2E maximum is the forward's, so its sum undoes it."""
    ref = tl.where(maximum == float("-inf"), 0.0, maximum * LOG2E)
    return tl.fma(z, LOG2E, -ref)


@triton.jit
def round_up_fp16(x):
    """The smallest fp16 not below x (fp32): a cast to nearest, then one step up where it fell below."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    # towards +inf: magnitudes grow for positive numbers and shrink for negative ones
    step = tl.where(bits < 0, bits - 1, bits + 1).to(tl.int16)
    return tl.where(half.to(tl.float32) < x, step, bits).to(tl.float16, bitcast=True)


@triton.jit
def matmul_tile(
    x,  # [N, H], descriptor or pointer
    w,  # [V, H], descriptor or pointer
    rows,  # the first row of x; with LIST each of them, [BLOCK_M]
    col0,
    N,
    V,
    H,
    stride_x,
    stride_w,
    LIST: tl.constexpr,  # x is a pointer then
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x[rows, :] @ w[col0:, :].T in fp32, [BLOCK_M, BLOCK_N]; rows and columns out of range hold anything finite."""
    ROWS: tl.constexpr = DESCRIPTOR and not LIST  # of x by descriptor too
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # clamped instead of masked: the caller discards what lies outside
    i_row = (rows if LIST else tl.minimum(rows + tl.arange(0, BLOCK_M), N - 1)).to(tl.int64)
    i_col = tl.minimum(col0 + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
    i_k = tl.arange(0, BLOCK_K)
    if not ROWS:
        p_x = x + i_row[:, None] * stride_x + i_k[None, :]
    if not DESCRIPTOR:
        p_w = w + i_col[None, :] * stride_w + i_k[:, None]
    for k in range(0, H, BLOCK_K):
        if ROWS:
            b_x = x.load([rows, k])
        elif EVEN_K:
            b_x = tl.load(p_x)
        else:
            b_x = tl.load(p_x, mask=i_k[None, :] < H - k, other=0.0)
        if DESCRIPTOR:
            b_w = w.load([col0, k]).T
        elif EVEN_K:
            b_w = tl.load(p_w)
        else:
            b_w = tl.load(p_w, mask=i_k[:, None] < H - k, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
        if not ROWS:
            p_x += BLOCK_K
        if not DESCRIPTOR:
            p_w += BLOCK_K
    return acc


@triton.jit
def row_factor(temperature, logit_scale, softcap):
    """What `activate` multiplies a row by last: (softcap or logit_scale) / temperature."""
    one = tl.zeros_like(temperature) + 1.0
    if softcap is not None:
        return tl.div_rn(one * softcap, temperature)
    else:
        return tl.div_rn(one * logit_scale, temperature)


@triton.jit
def activate(acc, bias, i_col, V, b_factor, logit_scale, softcap):
    """z = softcap(logit_scale (acc + bias)) / temperature, and tanh(...) of the soft-cap (else z again)."""
    if bias is not None:
        acc += tl.load(bias + i_col, mask=i_col < V, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        bend = tanh(acc * (logit_scale / softcap))
        z = bend * b_factor[:, None]
    else:
        z = acc * b_factor[:, None]
        bend = z
    return z, bend


@triton.jit
def raster(item, num_row_blocks, num_columns, group_rows):
    """Work item -> (row block, column): `group_rows` row blocks walk the columns together and share them in L2."""
    per_group = group_rows * num_columns
    first = (item // per_group) * group_rows
    height = tl.minimum(num_row_blocks - first, group_rows)
    inside = item % per_group
    return first + inside % height, inside // height


@triton.jit
def move_rows_kernel(
    source,  # [N, H]
    out,  # [N, H]
    order,  # [N]
    count,  # [1]
    factor,  # [1] or None
    H,
    stride_source,
    stride_out,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program: out[i] = source[order[i]] (GATHER) or out[order[i]] = source[i]; 0 from `count` on."""
    i = tl.program_id(0).to(tl.int64)
    other = tl.load(order + i)
    width = tl.where(i < tl.load(count), H, 0)
    p_source = source + (other if GATHER else i) * stride_source
    p_out = out + (i if GATHER else other) * stride_out
    for h in range(0, H, BLOCK):
        i_h = h + tl.arange(0, BLOCK)
        value = tl.load(p_source + i_h, mask=i_h < width, other=0.0)
        if factor is not None:
            value = value * tl.load(factor)
        tl.store(p_out + i_h, value.to(out.dtype.element_ty), mask=i_h < H)


def compact(live: Tensor) -> tuple[Tensor, Tensor]:
    """Live rows first, in their own order. live [N] bool -> order [N] int64, count [1] int64, no host sync."""
    order = torch.sort((~live).to(torch.uint8), stable=True).indices
    return order, live.sum().view(1)


def gather_rows(source: Tensor, order: Tensor, count: Tensor) -> Tensor:
    """source [N, H] in compact order, contiguous and zero from `count` on."""
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    move_rows_kernel[(source.shape[0],)](
        source, out, order, count, None, source.shape[1], source.stride(0), out.stride(0),
        GATHER=True, BLOCK=1024, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def scatter_rows(
    source: Tensor, order: Tensor, count: Tensor, dtype: torch.dtype, factor: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Undo `gather_rows`: [N, H] of `dtype` (`out`), times the number in `factor`, rows from `count` on zero."""
    if out is None:
        out = torch.empty(source.shape, dtype=dtype, device=source.device)
    move_rows_kernel[(source.shape[0],)](
        source, out, order, count, factor, source.shape[1], source.stride(0), out.stride(0),
        GATHER=False, BLOCK=1024, enable_fp_fusion=False,
    )  # fmt: skip
    return out
