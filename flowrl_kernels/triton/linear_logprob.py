"""`linear_logprob` in Triton: z = softcap(logit_scale (hidden weight^T + bias)) / temperature (docs/maths.md, eq. 1-4).

Forward: every program walks one block of rows over one split of the vocabulary, keeps max, sum and entropy sum in
registers, and a second kernel merges the splits in order. 2NHV FLOP, no logits in memory. Which program does what
depends on N; what a row's numbers are made of does not.

Backward: dz is recomputed into a bounded buffer, a slab of the vocabulary at a time, and turned into dhidden and
dweight by matrix products that accumulate in fp32. 8NHV FLOP with the forward; no atomics anywhere.

Kernels are launched with `enable_fp_fusion=False`: a multiply-add is fused where it says fma and nowhere else, so a
flag that adds work cannot change how the rest is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flowrl_kernels.triton import tiles
from flowrl_kernels.triton.matmul import exact_matmul, matmul_into
from flowrl_kernels.triton.primitives import (
    LN2,
    LOG2E,
    activate,
    compact,
    gather_rows,
    matmul_tile,
    raster,
    round_up_fp16,
    row_factor,
    scatter_rows,
)
from flowrl_kernels.types import TILE


@triton.jit
def _absorb(
    acc, b_max, b_sum, b_dot, b_logit, bias, tile_lse, order, i_row, num_live, i_col0, N, V, b_target, b_factor,
    logit_scale, softcap, ENTROPY: tl.constexpr, STATS: tl.constexpr, EVEN_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Take [BLOCK_M, TILE] products into a row's running max, sum, entropy sum and target logit."""
    i_col = i_col0 + tl.arange(0, TILE)
    z, _ = activate(acc, bias, i_col, V, b_factor, logit_scale, softcap)
    held = (b_target >= i_col0) & (b_target < i_col0 + TILE)
    if tl.max(held.to(tl.int32), 0) > 0:
        b_logit += tl.sum(tl.where(i_col[None, :] == b_target[:, None], z, 0.0), 1)

    # against the tile's own maximum, so that its mass is known however small it is beside the row's
    if not EVEN_V:
        z = tl.where((i_col < V)[None, :], z, float("-inf"))
    t_max = tl.max(z, 1) * LOG2E
    d = tl.fma(z, LOG2E, -tl.where(t_max == float("-inf"), 0.0, t_max)[:, None])
    e = tl.exp2(d)
    t_sum = tl.sum(e, 1)
    t_dot = t_sum
    if ENTROPY:
        t_dot = tl.sum(tl.maximum(d, -200.0) * e, 1)  # e is 0 there: keeps 0 * -inf out
    if STATS:
        lse = (t_max + tl.log2(t_sum)) * LN2
        # covers the rounding of the fp32 logits; then up to fp16: an upper bound
        lse += (tl.abs(lse) + 1.0) * 3.8e-6
        live = i_row < num_live
        source = tl.load(order + i_row, mask=live, other=0)
        tl.store(tile_lse + (i_col0 // TILE).to(tl.int64) * N + source, round_up_fp16(lse), mask=live)

    new_max = tl.maximum(b_max, t_max)
    ref = tl.where(new_max == float("-inf"), 0.0, new_max)
    t_scale = tl.exp2(t_max - ref)
    scale = tl.exp2(b_max - ref)
    if ENTROPY:
        t_shift = tl.where(t_sum > 0.0, t_max - ref, 0.0)
        shift = tl.where(b_sum > 0.0, b_max - ref, 0.0)
        b_dot = scale * tl.fma(shift, b_sum, b_dot) + t_scale * tl.fma(t_shift, t_sum, t_dot)
    b_sum = tl.fma(b_sum, scale, t_sum * t_scale)
    return new_max, b_sum, b_dot, b_logit


@triton.jit(do_not_specialize=["N", "V", "num_splits", "tiles_per_split", "group_rows", "temperature_stride"])
def forward_kernel(
    x,  # [N, H] compact rows, descriptor or pointer
    w,  # [V, H], descriptor or pointer
    bias,  # [V] or None
    order,  # [N]
    count,  # [1]
    target,  # [N]
    temperature,  # [N] or [1]
    target_logit,  # [N]
    part_max,  # [splits, N] compact rows, log2 units
    part_sum,  # [splits, N]
    part_dot,  # [splits, N]: sum of (z - max) e, log2 units
    tile_lse,  # [V/128, N] fp16
    N,
    V,
    H,
    stride_x,
    stride_w,
    temperature_stride,
    logit_scale,
    softcap,
    num_splits,
    tiles_per_split,
    group_rows,
    ENTROPY: tl.constexpr,
    STATS: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    num_live = tl.load(count).to(tl.int32)
    num_row_blocks = tl.cdiv(num_live, BLOCK_M)
    num_tiles = tl.cdiv(V, BLOCK_N)
    for item in range(tl.program_id(0), num_row_blocks * num_splits, tl.num_programs(0)):
        i_block, i_split = raster(item, num_row_blocks, num_splits, group_rows)
        i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i_row < num_live
        source = tl.load(order + i_row, mask=live, other=0)
        b_target = tl.load(target + source, mask=live, other=-1).to(tl.int32)
        b_temperature = tl.load(temperature + source * temperature_stride, mask=live, other=1.0)
        b_factor = row_factor(b_temperature, logit_scale, softcap)
        first = i_split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, num_tiles)
        b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        b_dot = tl.zeros((BLOCK_M,), tl.float32)
        b_logit = tl.zeros((BLOCK_M,), tl.float32)
        for i_tile in range(first, last):
            col0 = i_tile * BLOCK_N
            acc = matmul_tile(
                x, w, i_block * BLOCK_M, col0, N, V, H, stride_x, stride_w,
                DESCRIPTOR, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if BLOCK_N == 2 * TILE:
                # half a tile at a time: the epilogue of a whole one does not fit the registers beside it
                left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, TILE)), (0, 2, 1)))
                b_max, b_sum, b_dot, b_logit = _absorb(
                    left, b_max, b_sum, b_dot, b_logit, bias, tile_lse, order, i_row, num_live, col0,
                    N, V, b_target, b_factor, logit_scale, softcap, ENTROPY, STATS, EVEN_V, TILE,
                )  # fmt: skip
                if col0 + TILE < V:  # a branch also keeps the compiler from weaving the halves together
                    b_max, b_sum, b_dot, b_logit = _absorb(
                        right, b_max, b_sum, b_dot, b_logit, bias, tile_lse, order, i_row, num_live, col0 + TILE,
                        N, V, b_target, b_factor, logit_scale, softcap, ENTROPY, STATS, EVEN_V, TILE,
                    )  # fmt: skip
            else:
                tl.static_assert(BLOCK_N == TILE)
                b_max, b_sum, b_dot, b_logit = _absorb(
                    acc, b_max, b_sum, b_dot, b_logit, bias, tile_lse, order, i_row, num_live, col0,
                    N, V, b_target, b_factor, logit_scale, softcap, ENTROPY, STATS, EVEN_V, TILE,
                )  # fmt: skip

        held = (b_target >= first * BLOCK_N) & (b_target < tl.minimum(last * BLOCK_N, V))
        tl.store(target_logit + source, b_logit, mask=live & held)
        p_part = i_split.to(tl.int64) * N + i_row
        tl.store(part_max + p_part, b_max, mask=live)
        tl.store(part_sum + p_part, b_sum, mask=live)
        if ENTROPY:
            tl.store(part_dot + p_part, b_dot, mask=live)


@triton.jit(do_not_specialize=["N", "num_splits"])
def merge_kernel(
    part_max,
    part_sum,
    part_dot,
    order,
    count,
    lse,  # [N]
    entropy,  # [N]
    N,
    num_splits,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits of a row, in one fixed tree: lse and entropy in nats; 0 for rows that take no part."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i_row < N
    live = i_row < tl.load(count)
    source = tl.load(order + i_row, mask=inside, other=0)
    i_split = tl.arange(0, SPLITS)
    held = (i_split < num_splits)[:, None] & live[None, :]
    p_part = i_split[:, None].to(tl.int64) * N + i_row[None, :]
    b_max = tl.load(part_max + p_part, mask=held, other=float("-inf"))  # [SPLITS, BLOCK]
    b_sum = tl.load(part_sum + p_part, mask=held, other=0.0)
    top = tl.max(b_max, 0)
    ref = tl.where(top == float("-inf"), 0.0, top)
    scale = tl.exp2(b_max - ref[None, :])
    total = tl.sum(b_sum * scale, 0)
    log_total = tl.log2(total)
    tl.store(lse + source, tl.where(live, (ref + log_total) * LN2, 0.0), mask=inside)
    if ENTROPY:
        b_dot = tl.load(part_dot + p_part, mask=held, other=0.0)
        shift = tl.where(b_sum > 0.0, b_max - ref[None, :], 0.0)
        dot = tl.sum(scale * tl.fma(shift, b_sum, b_dot), 0)
        value = (log_total - dot / total) * LN2
        value = tl.where(value < 0.0, 0.0, value)  # rounding only; keeps NaN
        tl.store(entropy + source, tl.where(live, value, 0.0), mask=inside)


@triton.jit
def _store_dlogits(
    acc, dz, part_bias, bias, i_block, i_col0, i_out0, N, V, stride_dz, b_target, b_factor, b_lse,
    b_grad, b_grad_entropy, b_entropy, b_scale, logit_scale, softcap,
    ENTROPY: tl.constexpr, BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[g (1{v=y} - p_v) - g_H p_v (log p_v + H)] dz/d(h W^T + b) of [BLOCK_M, COLUMNS] products, rounded and stored."""
    i_col = i_col0 + tl.arange(0, COLUMNS)
    z, bend = activate(acc, bias, i_col, V, b_factor, logit_scale, softcap)
    logp = z - b_lse[:, None]
    p = tl.exp2(logp * LOG2E)
    d = b_grad[:, None] * (tl.where(i_col[None, :] == b_target[:, None], 1.0, 0.0) - p)
    if ENTROPY:
        d -= b_grad_entropy[:, None] * (p * (tl.maximum(logp, -200.0) + b_entropy[:, None]))  # p is 0 below
    if softcap is not None:
        d *= 1.0 - bend * bend
    d *= b_scale[:, None]
    if BIAS:
        tl.store(part_bias + i_block.to(tl.int64) * stride_dz + i_out0 + tl.arange(0, COLUMNS), tl.sum(d, 0))
    if DESCRIPTOR:
        dz.store([i_block * BLOCK_M, i_out0], d.to(dz.dtype))
    else:
        i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        p_dz = dz + i_row[:, None].to(tl.int64) * stride_dz + (i_out0 + tl.arange(0, COLUMNS))[None, :]
        tl.store(p_dz, d.to(dz.dtype.element_ty), mask=(i_row < N)[:, None])


@triton.jit(do_not_specialize=["N", "V", "group_rows", "col_begin", "col_end", "temperature_stride"])
def dlogits_kernel(
    x,  # [N, H] compact rows, descriptor or pointer
    w,  # [V, H], descriptor or pointer
    bias,  # [V] or None
    order,  # [N]
    count,  # [1]
    target,  # [N]
    temperature,  # [N] or [1]
    lse,  # [N]
    entropy,  # [N]
    grad_logp,  # [N]
    grad_entropy,  # [N] or None
    factor,  # [1] power of two, or None
    dz,  # [N, columns of the slab, a multiple of BLOCK_N] compact rows, descriptor or pointer
    part_bias,  # [row blocks, columns of the slab] fp32
    N,
    V,
    H,
    stride_x,
    stride_w,
    temperature_stride,
    logit_scale,
    softcap,
    group_rows,
    col_begin,
    col_end,
    stride_dz,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """dz of one slab of the vocabulary; rows that take no part get 0, columns past the slab anything."""
    ENTROPY: tl.constexpr = grad_entropy is not None
    num_live = tl.load(count).to(tl.int32)
    num_row_blocks = tl.cdiv(N, BLOCK_M)
    num_tiles = tl.cdiv(col_end - col_begin, BLOCK_N)
    for item in range(tl.program_id(0), num_row_blocks * num_tiles, tl.num_programs(0)):
        i_block, i_tile = raster(item, num_row_blocks, num_tiles, group_rows)
        i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i_row < num_live
        col0 = col_begin + i_tile * BLOCK_N
        acc = matmul_tile(
            x, w, i_block * BLOCK_M, col0, N, V, tl.where(i_block * BLOCK_M < num_live, H, 0), stride_x, stride_w,
            DESCRIPTOR, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        source = tl.load(order + i_row, mask=live, other=0)
        b_target = tl.load(target + source, mask=live, other=-1).to(tl.int32)
        b_temperature = tl.load(temperature + source * temperature_stride, mask=live, other=1.0)
        b_lse = tl.load(lse + source, mask=live, other=float("inf"))  # p = 0 in rows that take no part
        b_grad = tl.load(grad_logp + source, mask=live, other=0.0)
        b_grad_entropy = b_grad
        b_entropy = b_grad
        if ENTROPY:
            b_grad_entropy = tl.load(grad_entropy + source, mask=live, other=0.0)
            b_entropy = tl.load(entropy + source, mask=live, other=0.0)
        b_factor = row_factor(b_temperature, logit_scale, softcap)
        b_scale = tl.div_rn(logit_scale + tl.zeros_like(b_temperature), b_temperature)
        if factor is not None:
            b_scale *= tl.load(factor)
        if BLOCK_N == 2 * TILE:
            # half a tile at a time: the epilogue of a whole one does not fit the registers beside it
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, TILE)), (0, 2, 1)))
            _store_dlogits(
                left, dz, part_bias, bias, i_block, col0, i_tile * BLOCK_N, N, V, stride_dz,
                b_target, b_factor, b_lse, b_grad, b_grad_entropy, b_entropy, b_scale, logit_scale, softcap,
                ENTROPY, BIAS, DESCRIPTOR, BLOCK_M, TILE,
            )  # fmt: skip
            if col0 + TILE < col_end:
                _store_dlogits(
                    right, dz, part_bias, bias, i_block, col0 + TILE, i_tile * BLOCK_N + TILE, N, V, stride_dz,
                    b_target, b_factor, b_lse, b_grad, b_grad_entropy, b_entropy, b_scale, logit_scale, softcap,
                    ENTROPY, BIAS, DESCRIPTOR, BLOCK_M, TILE,
                )  # fmt: skip
        else:
            tl.static_assert(BLOCK_N == TILE)
            _store_dlogits(
                acc, dz, part_bias, bias, i_block, col0, i_tile * BLOCK_N, N, V, stride_dz,
                b_target, b_factor, b_lse, b_grad, b_grad_entropy, b_entropy, b_scale, logit_scale, softcap,
                ENTROPY, BIAS, DESCRIPTOR, BLOCK_M, TILE,
            )  # fmt: skip


def _tile(rows: Tensor, weight: Tensor) -> tiles.Tile:
    def aligned(t: Tensor) -> bool:
        return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0

    return tiles.tile_for(tiles.arch_of(rows.device), rows.dtype, aligned(rows) and aligned(weight))


def _operands(rows: Tensor, weight: Tensor, tile: tiles.Tile):
    """rows and weight as the kernels take them: host-side descriptors or plain tensors."""
    if not tile.descriptor:
        return rows, weight
    x = TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_k])
    w = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    return x, w


def _options(tile: tiles.Tile) -> dict:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logit of the target, log-sum-exp, entropy and tile statistics.

    hidden [N, H], weight [V, H] (fp32, bf16 or fp16); target [N] int64, -1 skips the row, V means no target here;
    bias [V] or None; temperature [N] or [1] fp32. Returns target_logit [N], lse [N], entropy [N] or [0] (all fp32)
    and tile_lse [ceil(V/128), N] fp16, an upper bound of the log-sum-exp over 128 columns, or [0]. Skipped rows
    hold 0 everywhere; row blocks of nothing but skipped rows cost nothing.
    """
    n, h = hidden.shape
    v = weight.shape[0]
    device = hidden.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    target_logit = torch.zeros(n, dtype=torch.float32, device=device)
    lse = empty(n)
    entropies = empty(n if entropy else 0)
    tile_lse = torch.zeros((-(-v // TILE), n) if stats else (0, 0), dtype=torch.float16, device=device)
    if n == 0:
        return target_logit, lse, entropies, tile_lse
    with torch.cuda.device_of(hidden):
        order, count = compact(target >= 0)
        rows = gather_rows(hidden, order, count)
        tile = _tile(rows, weight)
        num_splits, tiles_per_split = tiles.splits(v, tile)
        parts = empty(3 if entropy else 2, num_splits, n)
        x, w = _operands(rows, weight, tile)
        items = triton.cdiv(n, tile.block_m) * num_splits
        forward_kernel[(min(items, tiles.num_programs(device, tile)),)](
            x, w, bias, order, count, target, temperature,
            target_logit, parts[0], parts[1], parts[-1], tile_lse,
            n, v, h, rows.stride(0), weight.stride(0), int(temperature.shape[0] > 1), logit_scale, softcap,
            num_splits, tiles_per_split, tiles.group_rows(h, hidden.element_size(), tile),
            ENTROPY=entropy, STATS=stats, EVEN_V=v % TILE == 0, DESCRIPTOR=tile.descriptor, EVEN_K=h % tile.block_k == 0, TILE=TILE,
            **_options(tile),
        )  # fmt: skip
        merge_kernel[(triton.cdiv(n, 16),)](
            parts[0], parts[1], parts[-1], order, count, lse, entropies, n, num_splits,
            ENTROPY=entropy, SPLITS=triton.next_power_of_2(num_splits), BLOCK=16,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return target_logit, lse, entropies, tile_lse


# dz of at most this many rows and columns at a time: 32768 columns keep the fp32 read-modify-write of dhidden under
# 1 % of the products, 2 GiB bound the buffer (0.5 GiB at 8192 rows of 16 bits, 2 GiB from 32768 rows on)
SLAB_ROWS, SLAB_COLUMNS, SLAB_BYTES = 65536, 32768, 2 << 30


def _slab_columns(rows: int, vocab: int, itemsize: int, block_n: int) -> int:
    most = min(SLAB_COLUMNS, SLAB_BYTES // (rows * itemsize))
    slabs = -(-vocab // most)
    return -(-vocab // (slabs * block_n)) * block_n


def _fp16_factor(grad_logp, grad_entropy, entropy, temperature, logit_scale) -> Tensor:
    """[1] power of two that brings the largest |dz| a row can have just under 4096: fp16 has 5 exponent bits."""
    bound = grad_logp.abs()
    if grad_entropy is not None:
        bound = bound + grad_entropy.abs() * (entropy + 1.0)
    bound = (bound * (abs(logit_scale) / temperature)).amax().view(1)
    return torch.ldexp(torch.ones_like(bound), (12 - torch.frexp(bound).exponent).clamp(-120, 120))


def linear_logprob_bwd(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    lse: Tensor,
    entropy: Tensor,
    tile_lse: Tensor,
    epsilon: float,
    report: Tensor | None,
    main_grad: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden [N, H] and weight [V, H] (in their dtypes) and bias [V] (fp32), each None if not needed.

    grad_logp [N] and grad_entropy [N] or None: fp32, any stride. lse and entropy are the forward's. With
    `main_grad` [V, H] fp32 the weight's gradient is added there and not returned. dz is rounded once, to the input
    dtype; sums run in fp32. Bits are the same from run to run.

    Raises:
        RuntimeError: epsilon > 0; the bounded backward is in `chunked`.
    """
    if epsilon > 0.0:
        raise RuntimeError(f"epsilon={epsilon}: the bounded backward runs with impl='chunked'; triton has the exact one")
    if report is not None:  # bound, share of tiles computed, fell back: exact
        report.zero_()
        report[1].fill_(1.0)
    n, h = hidden.shape
    v = weight.shape[0]
    device, dtype = hidden.device, hidden.dtype
    if not (need_hidden or need_weight or need_bias):
        return None, None, None
    with exact_matmul(hidden):
        grad_logp = grad_logp.contiguous()
        live = (target >= 0) & (grad_logp != 0)
        if grad_entropy is not None:
            grad_entropy = grad_entropy.contiguous()
            live |= (target >= 0) & (grad_entropy != 0)
        factor = inverse = None
        if dtype == torch.float16:
            factor = _fp16_factor(grad_logp, grad_entropy, entropy, temperature, logit_scale)
            inverse = 1.0 / factor
        dhidden = torch.zeros(n, h, dtype=torch.float32, device=device) if need_hidden else None
        many = n > SLAB_ROWS
        dweight = main_grad
        if need_weight and main_grad is None:
            # one pass over the rows writes each element once; several add up in fp32
            dweight = torch.zeros(v, h, dtype=torch.float32 if many else dtype, device=device)
        dbias = torch.zeros(v, dtype=torch.float32, device=device) if need_bias else None
        if n > 0:
            order, count = compact(live)
            rows = gather_rows(hidden, order, count)
            for begin in range(0, n, SLAB_ROWS):
                part = slice(begin, min(begin + SLAB_ROWS, n))
                _backward_rows(
                    rows[part], order[part], (count - begin).clamp_(min=0), weight, target, bias, temperature,
                    logit_scale, softcap, lse, entropy, grad_logp, grad_entropy, factor, inverse,
                    dhidden[part] if need_hidden else None, dweight if need_weight else None, dbias,
                    add=many or main_grad is not None,
                )  # fmt: skip
            if need_hidden:
                dhidden = scatter_rows(dhidden, order, count, dtype, inverse)
        if need_weight and main_grad is None:
            return dhidden, dweight.to(weight.dtype), dbias
        return dhidden, None, dbias


def _backward_rows(
    rows, order, count, weight, target, bias, temperature, logit_scale, softcap, lse, entropy,
    grad_logp, grad_entropy, factor, inverse, dhidden, dweight, dbias, add,
) -> None:  # fmt: skip
    """One block of compact rows against the whole vocabulary, slab by slab; dweight is added to or written."""
    n, h = rows.shape
    v = weight.shape[0]
    device, itemsize = rows.device, rows.element_size()
    tile = _tile(rows, weight)
    columns = _slab_columns(n, v, itemsize, tile.block_n)
    row_blocks = triton.cdiv(n, tile.block_m)
    buffer = torch.empty(n, columns, dtype=rows.dtype, device=device)
    part_bias = torch.empty(row_blocks if dbias is not None else 0, columns, dtype=torch.float32, device=device)
    x, w = _operands(rows, weight, tile)
    out = TensorDescriptor.from_tensor(buffer, [tile.block_m, TILE]) if tile.descriptor else buffer
    for begin in range(0, v, columns):
        slab = slice(begin, min(begin + columns, v))
        width = slab.stop - begin
        items = row_blocks * triton.cdiv(width, tile.block_n)
        dlogits_kernel[(min(items, tiles.num_programs(device, tile)),)](
            x, w, bias, order, count, target, temperature, lse, entropy, grad_logp, grad_entropy, factor,
            out, part_bias,
            n, v, h, rows.stride(0), weight.stride(0), int(temperature.shape[0] > 1), logit_scale, softcap,
            tiles.group_rows(h, itemsize, tile), begin, slab.stop, columns,
            BIAS=dbias is not None, DESCRIPTOR=tile.descriptor, EVEN_K=h % tile.block_k == 0, TILE=TILE,
            **_options(tile),
        )  # fmt: skip
        dz = buffer[:, :width]  # [N, width]
        if dbias is not None:
            total = part_bias[:, :width].sum(0)
            dbias[slab] += total if inverse is None else total * inverse
        if dhidden is not None:
            matmul_into(dhidden, dz, weight[slab], add=begin > 0)
        if dweight is None:
            continue
        if inverse is None:
            matmul_into(dweight[slab], dz.t(), rows, add=add)
        else:
            product = torch.empty(width, h, dtype=torch.float32, device=device)
            matmul_into(product, dz.t(), rows, add=False)
            product *= inverse
            dweight[slab].add_(product) if add else dweight[slab].copy_(product)
