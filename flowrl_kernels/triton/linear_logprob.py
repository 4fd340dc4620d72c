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

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flowrl_kernels.chunked.several import Several, as_one, rows_of
from flowrl_kernels.chunked.tiles import add_rows, fp16_factor
from flowrl_kernels.core.types import EXACT, TILE, Budget, Head, Needs, RowStatistics, Saved, Upstream
from flowrl_kernels.triton import tiles
from flowrl_kernels.triton.bounded import Wanted, bounded_backward
from flowrl_kernels.triton.linear_logprob_kernels import (
    dlogits_kernel,
    forward_kernel,
    merge_kernel,
    row_terms_kernel,
)
from flowrl_kernels.triton.matmul import exact_matmul, matmul_into
from flowrl_kernels.triton.primitives import compact, gather_rows, scatter_rows
from flowrl_kernels.triton.sampled import by_id, in_order, sampled_backward
from flowrl_kernels.triton.several_kernels import put_ids_kernel


def realigned(weight: Tensor) -> Tensor:
    """`weight`, or where it does not begin at a multiple of 16 bytes a copy that does (V H elements): a row's bits
    must not follow an address, and the tile that the others get cannot read it."""
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def _tile(rows: Tensor, weight: Tensor) -> tiles.Tile:
    hidden_size = weight.shape[1]
    aligned = hidden_size * weight.element_size() % 16 == 0
    return tiles.tile_for(tiles.arch_of(rows.device), weight.dtype, aligned, hidden_size)


def _operands(rows: Tensor, weight: Tensor, tile: tiles.Tile):
    """rows and weight as the kernels take them: host-side descriptors or plain tensors."""
    if not tile.descriptor:
        return rows, weight
    x = TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_k])
    w = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    return x, w


def _options(tile: tiles.Tile, hidden_size: int) -> dict:
    return {
        "DESCRIPTOR": tile.descriptor,
        "EVEN_K": hidden_size % tile.block_k == 0,
        "TILE": TILE,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "FLATTEN": tile.flatten,
        "enable_fp_fusion": False,
    }


class Compact(NamedTuple):
    """Rows that take part, moved together."""

    rows: Tensor  # [N, H]
    order: Tensor  # [N] where each stood
    count: Tensor  # [1] how many there are

    def part(self, own: slice) -> Compact:
        return Compact(self.rows[own], self.order[own], (self.count - own.start).clamp_(min=0))


class Outputs(NamedTuple):
    """Where the forward writes; each None leaves out its work, not a bit."""

    logp: Tensor  # [N], 0 so far
    lse: Tensor  # [2, N]
    entropy: Tensor | None = None  # [N]
    tile_lse: Tensor | None = None  # [ceil(V/128), N] fp16, 0 so far
    logits: Tensor | None = None  # [N, at least V rounded up to 128] fp32, written in the order of the rows
    ids: Tensor | None = None  # [K, N] int32 read, each row's rising; the target is one of none then
    id_logp: Tensor | None = None  # [K, N]
    statistics: RowStatistics | None = None


class Back(NamedTuple):
    """What dz is made of besides the logits."""

    lse: Tensor  # [2, N]
    at_target: Tensor  # [N] gradient of the target's logit, before the row's factor
    entropy: Tensor  # [N] or [0]
    grad: Upstream
    factor: Tensor | None  # [1] power of two that dz is multiplied by for float16
    inverse: Tensor | None  # [1]
    several: Several | None = None  # entries of dz at ids [N, K], with every factor: rows have no target then


class Sinks(NamedTuple):
    """Where the backward writes; None where no gradient is wanted."""

    dhidden: Tensor | None  # [N, H] fp32, in the order of the rows
    dweight: Tensor | None  # [V, H] written, or with `add` added to
    dbias: Tensor | None  # [V] fp32, added to
    add: bool


def linear_logprob_fwd(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    entropy: bool,
    stats: bool,
    order: Tensor | None = None,
    statistics: RowStatistics | None = None,
) -> Saved:
    """Log p of the target, log-sum-exp, entropy and tile statistics.

    hidden [N, H], weight [V, H] (fp32, bf16 or fp16); target [N] int64, -1 skips the row, V means no target here;
    bias [V] or None; temperature [N] or [1] fp32. Returns logp [N] (-inf without a target here), lse [2, N] as
    maximum and log of the sum relative to it, entropy [N] or [0] (all fp32) and tile_lse [ceil(V/128), N] fp16, an
    upper bound of the log-sum-exp over 128 columns, or [0, 0]. Skipped rows hold 0 everywhere; row blocks of nothing
    but skipped rows cost nothing. Of targets [N, K] -1 skips the id, and logp is [N, K]. With an order [V] of the
    ids, targets are places in it and so are the statistics'.
    """
    head = head if order is None else in_order(head, order)
    n, v = hidden.shape[0], head.weight.shape[0]
    new = {"dtype": torch.float32, "device": hidden.device}
    logp, lse = torch.zeros(n, **new), torch.empty(2, n, **new)
    entropies = torch.empty(n if entropy else 0, **new)
    tile_lse = torch.zeros((-(-v // TILE), n) if stats else (0, 0), dtype=torch.float16, device=hidden.device)
    ids = places = id_logp = None
    if target.dim() == 2:
        rising, places = target.to(torch.int32).sort(1)
        ids, id_logp = rising.T.contiguous(), torch.empty(target.shape[::-1], **new)
        target = torch.where(rows_of(target) < 0, -1, v)
    if n > 0:
        with torch.cuda.device_of(hidden):
            order, count = compact(target >= 0)
            batch = Compact(gather_rows(hidden, order, count), order, count)
            out = Outputs(logp, lse, entropies if entropy else None, tile_lse if stats else None)
            forward_rows(batch, target, head, out._replace(ids=ids, id_logp=id_logp, statistics=statistics))
    if places is not None and id_logp is not None:
        logp = torch.empty(places.shape, **new).scatter_(1, places, id_logp.T)
    return Saved(logp, lse, entropies, tile_lse)


def forward_rows(batch: Compact, target: Tensor, head: Head, into: Outputs) -> None:
    """The forward of at least one row, into the outputs."""
    (rows, order, count), (logp, lse, entropy, tile_lse, logits, ids, id_logp, statistics) = batch, into
    weight, bias, temperature, logit_scale, softcap = head
    n, h = rows.shape
    v, device = weight.shape[0], rows.device
    weight = realigned(weight)
    tile = _tile(rows, weight)
    num_splits, tiles_per_split = tiles.splits(tiles.arch_of(device), h, v, tile.block_n)
    # each part begins at a multiple of 16 bytes: Triton compiles once more for a pointer that does not
    size = -(-num_splits * n // 4) * 4
    parts = torch.empty(2 if entropy is None else 3, size, dtype=torch.float32, device=device)
    k = 0 if ids is None else len(ids)
    part_top = part_total = argmax = mean_logits = None
    if statistics is not None:
        argmax, mean_logits = statistics
        part_top, part_total = torch.empty(size, dtype=torch.int32, device=device), torch.empty_like(parts[0])
    store = 0
    if logits is not None:
        tile, store = tiles.logits_store(tiles.arch_of(device), tile)
    x, w = _operands(rows, weight, tile)
    out = logits
    if logits is not None and tile.descriptor:
        out = TensorDescriptor.from_tensor(logits, [tile.block_m, store])
    items = triton.cdiv(n, tile.block_m) * num_splits
    # a search and a loop of unknown length after the product: not one loop with it
    own = tile._replace(flatten=tile.flatten and ids is None)
    forward_kernel[(min(items, tiles.num_programs(device, tile)),)](
        x, w, bias, order, count, target, temperature,
        logp, parts[0], parts[1], parts[-1], tile_lse, out, ids, id_logp, part_top, part_total,
        n, v, k, h, rows.stride(0), weight.stride(0), 0 if logits is None else logits.stride(0),
        int(temperature.shape[0] > 1), logit_scale, softcap,
        num_splits, tiles_per_split, tiles.group_rows(h, rows.element_size(), tile),
        ENTROPY=entropy is not None, STATS=tile_lse is not None, EVEN_V=v % TILE == 0, STORE=store,
        **_options(own, h),
    )  # fmt: skip
    together = triton.next_power_of_2(num_splits)
    block = max(4, min(16, 2048 // together))
    merge_kernel[(triton.cdiv(n, block),)](
        parts[0], parts[1], parts[-1], order, count, target, logp, lse, entropy, ids, id_logp,
        part_top, part_total, argmax, mean_logits, n, v, k, num_splits,
        ENTROPY=entropy is not None, SPLITS=together, BLOCK=block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# dz of at most this many rows and columns at a time: 32768 columns keep the fp32 read-modify-write of dhidden under
# 1 % of the products, 2 GiB bound the buffer (0.5 GiB at 8192 rows of 16 bits, 2 GiB from 32768 rows on)
SLAB_ROWS, SLAB_COLUMNS, SLAB_BYTES = 65536, 32768, 2 << 30


def _slab_columns(rows: int, vocab: int, itemsize: int, block_n: int) -> int:
    most = min(SLAB_COLUMNS, SLAB_BYTES // (rows * itemsize))
    slabs = -(-vocab // most)
    return -(-vocab // (slabs * block_n)) * block_n


def linear_logprob_bwd(
    grad: Upstream,
    hidden: Tensor,
    target: Tensor,
    head: Head,
    saved: Saved,
    need: Needs,
    budget: Budget = EXACT,
    main_grad: Tensor | None = None,
    wide_hidden: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden [N, H] and weight [V, H] (in their dtypes) and bias [V] (fp32), each None if not needed.

    `grad`: fp32, any stride. With `wide_hidden` dhidden is fp32 as it was summed. With
    `main_grad` [V, H] fp32 the weight's gradient is added there and not returned. dz is rounded once, to the input
    dtype; sums run in fp32. Bits are the same from run to run.

    epsilon > 0 takes the bounded backward (bounded.py) where it pays, there is no softcap and no entropy gradient;
    `report` [3] gets the bound reached, the share of tiles computed, and 1 where it fell back to the exact one. A draw
    takes the sampled one (sampled.py) on the same terms, and has a fourth number for the estimated error.
    """
    order = None if budget.draw is None else budget.draw.order
    if order is None:
        return _backward(grad, hidden, target, head, saved, need, budget, main_grad, wide_hidden)
    into = None if main_grad is None else torch.zeros_like(main_grad)
    made = _backward(grad, hidden, target, in_order(head, order), saved, need, budget, into, wide_hidden)
    if main_grad is not None and into is not None:
        main_grad.index_add_(0, order, into)
    return made[0], by_id(made[1], order), by_id(made[2], order)


def _backward(
    grad: Upstream, hidden: Tensor, target: Tensor, head: Head, saved: Saved, need: Needs, budget: Budget,
    main_grad: Tensor | None, wide_hidden: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    (grad_logp, grad_entropy), (logp, lse, entropy, *_), (epsilon, report, draw) = grad, saved, budget
    weight, _, temperature, logit_scale, softcap = head
    if report is not None:
        report.zero_()
        report[1].fill_(1.0)
        report[2].fill_(float(epsilon > 0.0 or draw is not None))
    n, h = hidden.shape
    v = weight.shape[0]
    device, dtype = hidden.device, hidden.dtype
    if not any(need):
        return None, None, None
    shared = draw is not None and bool(draw.group)  # other ranks wait for this one, also without a row
    with exact_matmul(hidden):
        one, ids = None, target
        if target.dim() == 2:
            one = as_one(grad, target, logp, entropy)
            grad_logp, target = one.total, torch.where(rows_of(target) < 0, -1, v)
            logp = torch.zeros_like(one.total)
        grad_logp = grad_logp.contiguous()
        live = (target >= 0) & (grad_logp != 0)
        if grad_entropy is not None:
            grad_entropy = grad_entropy.contiguous()
            live |= (target >= 0) & (grad_entropy != 0)
        live = live if one is None else one.live
        factor = inverse = None
        weight = realigned(weight)
        head = head._replace(weight=weight)
        if dtype == torch.float16 and n > 0:
            size = grad_logp if one is None else one.size
            factor = fp16_factor(size, grad_entropy, entropy, temperature, logit_scale, live)
            inverse = 1.0 / factor
        if (epsilon > 0.0 or draw is not None) and softcap is None and grad_entropy is None and (n > 0 or shared):
            made = torch.empty(v, h, dtype=dtype, device=device) if need.weight and main_grad is None else None
            tile = tiles.tile_for(tiles.arch_of(device), dtype, h * weight.element_size() % 16 == 0)
            wanted = Wanted(
                main_grad if need.weight and made is None else made, main_grad is not None, need.hidden, need.bias
            )
            if draw is not None and draw.rows is None:
                budget = budget._replace(draw=draw._replace(rows=torch.arange(n, device=device)))
            backward = bounded_backward if draw is None else sampled_backward
            done = backward(grad_logp, hidden, target, head, saved, budget, tile, factor, wanted)
            if done is not None:
                return done[0], made, done[1]
            del made
        dhidden = torch.zeros(n, h, dtype=torch.float32, device=device) if need.hidden else None
        many = n > SLAB_ROWS
        dweight = main_grad
        if need.weight and main_grad is None:
            # one pass over the rows writes each element once; several add up in fp32
            dweight = torch.zeros(v, h, dtype=torch.float32 if many else dtype, device=device)
        dbias = torch.zeros(v, dtype=torch.float32, device=device) if need.bias else None
        if n > 0:
            order, count = compact(live)
            batch = Compact(gather_rows(hidden, order, count), order, count)
            at_target = -grad_logp * torch.expm1(logp)  # g (1 - p), accurate where p is nearly 1
            if grad_entropy is not None:
                p = logp.exp()
                at_target -= grad_entropy * p * torch.where(p > 0, logp, 0.0).add_(entropy)
            several = None
            if one is not None:
                scale = logit_scale / temperature[:, None]  # [N, 1] or [1, 1]
                if softcap is not None:  # z at the ids, from their log p
                    z = saved.logp + saved.lse[1, :, None] + saved.lse[0, :, None]
                    scale = scale * (1.0 - (z * temperature[:, None] / softcap).square())
                at_ids = one.value * scale if factor is None else one.value * scale * factor
                several = Several(ids, at_ids.contiguous())
                if dbias is not None:  # dz summed there is that of rows without a target: here is the rest
                    place = torch.where((ids >= 0) & (ids < v) & live[:, None], ids, v)
                    rest = torch.where(place < v, grad.logp * scale, 0.0)
                    dbias = torch.nn.functional.pad(dbias, (0, 1))
                    add_rows(dbias, place.flatten(), rest.flatten())
                    dbias = dbias[:v]
            back = Back(lse, at_target, entropy, Upstream(grad_logp, grad_entropy), factor, inverse, several)
            for begin in range(0, n, SLAB_ROWS):
                part = slice(begin, min(begin + SLAB_ROWS, n))
                into = Sinks(
                    None if dhidden is None else dhidden[part], dweight if need.weight else None, dbias,
                    many or main_grad is not None,
                )  # fmt: skip
                _backward_rows(batch.part(part), target, head, back, into)
            if dhidden is not None:
                dhidden = scatter_rows(dhidden, order, count, torch.float32 if wide_hidden else dtype, inverse)
        if need.weight and main_grad is None:
            return dhidden, None if dweight is None else dweight.to(dtype), dbias
        return dhidden, None, dbias


def _backward_rows(batch: Compact, target: Tensor, head: Head, back: Back, into: Sinks) -> None:
    """One block of compact rows against the whole vocabulary, slab by slab; dweight is added to or written."""
    (rows, order, count), (dhidden, dweight, dbias, add) = batch, into
    lse, at_target, entropy, (grad_logp, grad_entropy), factor, inverse, several = back
    weight, bias, temperature, logit_scale, softcap = head
    n, h = rows.shape
    v = weight.shape[0]
    device, itemsize = rows.device, rows.element_size()
    tile = _tile(rows, weight)
    columns = _slab_columns(n, v, itemsize, tile.block_n)
    row_blocks = triton.cdiv(n, tile.block_m)
    buffer = torch.empty(n, columns, dtype=rows.dtype, device=device)
    part_bias = torch.empty(row_blocks if dbias is not None else 0, columns, dtype=torch.float32, device=device)
    padded = row_blocks * tile.block_m
    columns_of = torch.empty(padded, dtype=torch.int32, device=device)
    terms = torch.empty(4 if grad_entropy is None else 5, padded, dtype=torch.float32, device=device)
    row_terms_kernel[(row_blocks,)](
        order, count, target, temperature, lse, at_target, entropy, grad_logp, grad_entropy, factor, columns_of, terms,
        n, int(temperature.shape[0] > 1), lse.stride(0), padded, logit_scale, softcap,
        BLOCK=tile.block_m, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    x, w = _operands(rows, weight, tile)
    out = TensorDescriptor.from_tensor(buffer, [tile.block_m, TILE]) if tile.descriptor else buffer
    # summing the columns for the bias takes what one loop would need of registers and shared memory
    own = tile._replace(flatten=tile.flatten and dbias is None)
    for begin in range(0, v, columns):
        slab = slice(begin, min(begin + columns, v))
        width = slab.stop - begin
        items = row_blocks * triton.cdiv(width, tile.block_n)
        dlogits_kernel[(min(items, tiles.num_programs(device, tile)),)](
            x, w, bias, count, columns_of, terms, out, part_bias,
            n, v, h, rows.stride(0), weight.stride(0), logit_scale, softcap, tiles.group_rows(h, itemsize, tile),
            begin, slab.stop, columns, padded,
            ENTROPY=grad_entropy is not None, BIAS=dbias is not None, **_options(own, h),
        )  # fmt: skip
        if several is not None:
            ids, at_ids = several
            put_ids_kernel[(triton.cdiv(n, 32),)](
                order, count, ids, at_ids, buffer, n, ids.shape[1], buffer.stride(0), begin, slab.stop,
                BLOCK=32, IDS=32, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        dz = buffer[:, :width]  # [N, width]
        if dbias is not None:
            total = part_bias[:, :width].sum(0)
            dbias[slab] += total if inverse is None else total * inverse
        if dhidden is not None:
            matmul_into(dhidden, dz, weight[slab], add=begin > 0)
        if dweight is not None:
            matmul_into(dweight[slab], dz.t(), rows, add, inverse)
