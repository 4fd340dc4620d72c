"""hidden -> log-probabilities in tiles of the vocabulary: 2NHV forward, 6NHV backward with recompute.

Memory beyond inputs and outputs: one tile of logits, and on a CPU what `chunked/recompute.py` lets a forward keep (at
most 48 MB a call), whose columns cost no second product. Row results are bit-identical under any batch layout: rows are
padded to one fixed block, and columns reduced in fixed runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles
from flowrl_kernels.chunked.bounded import bounded_backward
from flowrl_kernels.chunked.sampled import sampled_backward
from flowrl_kernels.chunked.several import Several, as_one, pick, put_, rows_of
from flowrl_kernels.chunked.statistics import Top
from flowrl_kernels.chunked.tiles import Rows, Sinks
from flowrl_kernels.core.types import EXACT, TILE, Budget, Head, Needs, RowStatistics, Saved, Upstream


def kept_rows(keep: Tensor) -> Tensor | None:
    """Indices of the rows that need work, or None for all. A GPU would have to wait for the count: all there."""
    if not tiles.host_knows(keep) or bool(keep.all()):
        return None
    return keep.nonzero()[:, 0]


def take(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [t if rows is None else t.index_select(0, rows) for t in tensors]


def put(rows: Tensor | None, value: Tensor, size: int) -> Tensor:
    """`value` at `rows` of a zero tensor with `size` rows."""
    if rows is None:
        return value
    return value.new_zeros((size, *value.shape[1:])).index_copy_(0, rows, value)


def clean(keep: Tensor, hidden: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that take no part, where they cannot be left out, with nothing in them: they may hold NaN."""
    hidden = hidden.masked_fill(~keep[:, None], 0.0)
    return hidden, temperature if temperature.numel() == 1 else temperature.masked_fill(~keep, 1.0)


class KeptLogits(NamedTuple):
    """Logits that a forward left."""

    logits: Tensor  # [N, C] of the first columns
    place: Tensor | None  # [R] where each row of a backward stands there; None for all in order

    def part(self, own: slice, start: int, stop: int) -> Tensor | None:
        """Of some rows in a tile of columns, if it is one of those. [R, C]"""
        if stop > self.logits.shape[1]:
            return None
        return self.logits[own if self.place is None else self.place[own], start:stop]


def room_for(kept: Tensor, own: slice, start: int, stop: int) -> Tensor | None:
    """Where a block's logits of one tile are kept, fewer rows than it has at the end; None if they are not."""
    return kept[own, start:stop] if stop <= kept.shape[1] and own.start < len(kept) else None


def linear_logprob_fwd(
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N] or [N, K] int64; -1 skips the id, V means no target here
    head: Head,
    entropy: bool,
    stats: bool,
    order: Tensor | None = None,  # [V] the id at each place; targets are places then
    bits: Tensor | None = None,  # [N, ceil(V/8)] uint8: the columns that count, of rows that all take part
    statistics: RowStatistics | None = None,  # written, where there is no order
    kept: Tensor | None = None,  # [N, C] filled with logits for the backward
) -> Saved:
    """logp like target (-inf without one here), log-sum-exp [2, N] as maximum and log of the sum, entropy [N] or [0],
    tile log-sum-exp [ceil(V/128), N] fp16 or [0, 0]; all 0 in skipped rows."""
    weight, bias, temperature, logit_scale, softcap = head
    num_tokens, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    live = rows_of(target) >= 0
    rows = kept_rows(live)
    if rows is None and not tiles.host_knows(hidden):
        hidden, temperature = clean(live, hidden, temperature)
    hidden, target = take(rows, hidden, target)
    temperature = temperature if temperature.numel() == 1 else take(rows, temperature)[0]
    num_rows = hidden.shape[0]
    block = tiles.row_block(hidden_size, vocab_size) if bits is None else tiles.WIDE_ROWS
    padded = -(-num_rows // block) * block
    dtype = tiles.accumulator_dtype(hidden.dtype)
    hidden = torch.nn.functional.pad(tiles.operand(hidden), (0, 0, 0, padded - num_rows))
    target = torch.cat([target, target.new_full((padded - num_rows, *target.shape[1:]), vocab_size)])
    if temperature.numel() > 1:
        temperature = torch.nn.functional.pad(temperature, (0, padded - num_rows), value=1.0)
    bits = None if bits is None else torch.nn.functional.pad(bits, (0, 0, 0, padded - num_rows))
    temperature = temperature.to(dtype)[:, None]
    blocks = [slice(start, start + block) for start in range(0, padded, block)]
    like = hidden.new_empty(0, dtype=dtype)
    sums = [tiles.Sums(block, like, entropy) for _ in blocks]
    tops = [] if statistics is None else [Top(block, like) for _ in blocks]
    target_logit = like.new_zeros(target.shape)
    num_runs = -(-vocab_size // TILE)
    tile_lse = like.new_empty((num_runs, padded) if stats else (0, 0), dtype=torch.float16)
    with tiles.exact_products():
        for start, stop in tiles.column_tiles(vocab_size, tiles.COLUMNS) if blocks else ():
            own_columns = slice(start, stop) if order is None else order[start:stop]
            columns = tiles.operand(weight[own_columns])
            tile_bias = None if bias is None else bias[own_columns]
            for i, (own, running) in enumerate(zip(blocks, sums)):
                into = None if kept is None else room_for(kept, own, start, stop)
                keep = into is not None and len(into) == block
                z = tiles.logits_tile(hidden[own], columns, tile_bias, logit_scale, softcap, into if keep else None)
                tiles.divide_by_temperature(z, temperature if temperature.numel() == 1 else temperature[own])
                if into is not None and not keep:
                    into.copy_(z[: len(into)])
                tiles.keep_(z, None if bits is None else bits[own], start)
                local = target[own] - start
                picked = pick(z, local)
                mine = (local >= 0) & (local < stop - start)
                target_logit[own] = torch.where(mine, picked, target_logit[own])
                if tops:
                    tops[i].add(z, start)
                runs = running.add(z, keep)
                if stats:
                    first = start // TILE
                    tile_lse[first : first + runs.shape[1], own] = tiles.round_up_to_half(runs).T
    lse = torch.cat([s.lse() for s in sums], 1)[:, :num_rows] if sums else like.new_zeros((2, 0))
    ent = torch.cat([s.entropy() for s in sums])[:num_rows] if entropy and sums else like
    if statistics is not None:
        best = torch.cat([t.argmax for t in tops]) if tops else target.new_empty(0)
        mean = torch.cat([t.total for t in tops]) / vocab_size if tops else like
        statistics.argmax.copy_(put(rows, best[:num_rows] + 1, num_tokens).masked_fill(~live, 0) - 1)
        statistics.mean_logits.copy_(put(rows, mean[:num_rows], num_tokens).masked_fill(~live, 0.0))
    target, tile_lse = target[:num_rows], tile_lse[:, :num_rows]
    own_lse = lse if target.dim() == 1 else lse[..., None]
    logp = tiles.log_softmax(target_logit[:num_rows], own_lse).masked_fill(target == vocab_size, -torch.inf)
    if rows is None:
        skipped = rows_of(target) < 0
        logp, lse = logp.masked_fill(target < 0, 0.0), lse.masked_fill(skipped, 0.0)
        ent = ent.masked_fill(skipped, 0.0) if entropy else ent
        return Saved(logp, lse, ent, (tile_lse.masked_fill(skipped, 0.0) if stats else tile_lse).contiguous(), kept)
    stats_out = put(rows, tile_lse.T, num_tokens).T.contiguous() if stats else tile_lse
    ent = put(rows, ent, num_tokens) if entropy else ent
    return Saved(put(rows, logp, num_tokens), put(rows, lse.T, num_tokens).T.contiguous(), ent, stats_out, kept)


def linear_logprob_bwd(
    grad: Upstream,
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N] or [N, K]: as grad.logp and saved.logp; several ids without a partial budget
    head: Head,
    saved: Saved,
    need: Needs,
    budget: Budget = EXACT,
    main_grad: Tensor | None = None,  # [V, H] fp32
    wide_hidden: bool = False,  # hidden's gradient as it was accumulated, not rounded to hidden's dtype
    bits: Tensor | None = None,  # [N, ceil(V/8)] uint8: the columns that count
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; those not needed are None (weight's goes into main_grad if given)."""
    (grad_logp, grad_entropy), (logp, lse, entropy, tile_lse, kept) = grad, saved
    weight, _, temperature, logit_scale, softcap = head
    order = None if budget.draw is None else budget.draw.order
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    dtype, out_dtype = tiles.accumulator_dtype(hidden.dtype), hidden.dtype
    one, several, live = None if target.dim() == 1 else as_one(grad, target, logp, entropy), None, rows_of(target) >= 0
    if one is None:
        active = live & (grad_logp != 0)
        if grad_entropy is not None:
            active |= live & (grad_entropy != 0)
    else:
        active, grad_logp = one.live, one.total
        several = Several(target.masked_fill(~active[:, None], vocab_size), one.value)
        target, logp = torch.full_like(target[:, 0], vocab_size), torch.zeros_like(one.total)
    rows = kept_rows(active)
    place = None  # of each row among the kept ones
    if kept is not None and not torch.equal(active, live):
        place = (live.cumsum(0) - 1)[active]
    if rows is None and not tiles.host_knows(hidden):
        hidden, temperature = clean(active, hidden, temperature)
        target, lse = target.masked_fill(~active, vocab_size), lse.masked_fill(~active, torch.inf)  # p = 0 there
    hidden, target, logp, lse, grad_logp = take(rows, hidden, target, logp, lse.T, grad_logp)
    lse = lse.T[..., None]  # [2, R, 1]
    temperature = temperature if temperature.numel() == 1 else take(rows, temperature)[0]
    temperature = temperature.to(dtype)[:, None]
    if grad_entropy is not None:
        grad_entropy, entropy = take(rows, grad_entropy, entropy)
    if several is not None:
        several = Several(*take(rows, *several))
        several = several._replace(value=several.value.to(dtype) * logit_scale / temperature)
    x = tiles.operand(hidden)
    scale = (grad_logp * logit_scale)[:, None].to(dtype) / temperature  # [R, 1]
    entropy_scale = None
    if grad_entropy is not None:
        entropy_scale = (grad_entropy * logit_scale)[:, None].to(dtype) / temperature
    inverse = None
    if x.dtype == torch.float16 and len(x) > 0:  # off the CPU, where dz is rounded to it
        size = grad_logp if one is None else take(rows, one.size)[0]
        factor = tiles.fp16_factor(size, grad_entropy, entropy, temperature[:, 0], logit_scale)
        scale, inverse = scale * factor, 1.0 / factor
        entropy_scale = None if entropy_scale is None else entropy_scale * factor
        several = None if several is None else several._replace(value=several.value * factor)
    dhidden = x.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    dweight = torch.empty_like(weight) if need.weight and main_grad is None else None
    dbias = x.new_zeros(vocab_size, dtype=dtype) if need.bias else None
    rows_in = Rows(
        x, target, temperature, logp, lse, scale, entropy_scale, None if entropy_scale is None else entropy, inverse
    )
    into = Sinks(dhidden, dweight, main_grad if need.weight else None, dbias)
    exact_only = softcap is not None or grad_entropy is not None
    done, partial = False, budget.epsilon > 0.0 or budget.draw is not None
    shared = budget.draw is not None and bool(budget.draw.group)  # other ranks wait for this one's part of tau
    if partial and not exact_only and (hidden.shape[0] > 0 or shared):
        stats = tile_lse if rows is None else tile_lse.index_select(1, rows)
        if budget.draw is not None:
            ids = budget.draw.rows
            ids = torch.arange(num_tokens, device=x.device) if ids is None else ids
            done = sampled_backward(
                rows_in, head, stats, budget._replace(draw=budget.draw._replace(rows=take(rows, ids)[0])), into
            )
        else:
            done = bounded_backward(rows_in, head, stats, budget, into)
    if not done:
        budget.tell(0.0, 1.0, partial)
        if order is not None:  # nothing of it depends on an order
            ids = torch.nn.functional.pad(order, (0, 1), value=vocab_size)[rows_in.target]
            rows_in = rows_in._replace(target=ids)
        own_bits = None if bits is None else take(rows, bits)[0]
        _exact_backward(rows_in, head, into, several, None if kept is None else KeptLogits(kept, place), own_bits)
    if inverse is not None:
        dbias = None if dbias is None else dbias.mul_(inverse)
        dhidden = None if dhidden is None else dhidden.mul_(inverse)
    dhidden_out = None
    if dhidden is not None:
        dhidden_out = put(rows, dhidden if wide_hidden else dhidden.to(out_dtype), num_tokens)
    return dhidden_out, dweight, dbias


def accumulate(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right in the accumulator's precision."""
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into += tiles.product(left, right)


def store(dweight: Tensor | None, main_grad: Tensor | None, start: int, stop: int, part: Tensor | None) -> None:
    """One tile of the weight's gradient into the output or the accumulator; no rows at all is a gradient of 0."""
    if main_grad is not None:
        if part is not None:
            main_grad[start:stop] += part
    elif dweight is not None:
        if part is None:
            dweight[start:stop] = 0
        else:
            dweight[start:stop] = part


def buffer_width(num_rows: int, beside_kept: bool) -> int:
    """Columns of a backward's buffer, which adds to what is kept."""
    most = (2 if beside_kept else 8) * tiles.COLUMNS
    return max(tiles.COLUMNS, min(most, tiles.BUFFER // max(1, num_rows) // TILE * TILE))


def _exact_backward(
    rows: Rows, head: Head, into: Sinks, several: Several | None = None, kept: KeptLogits | None = None,
    bits: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills the gradients, a tile of the vocabulary and a block of rows at a time."""
    dhidden, dweight, main_grad, dbias = into
    num_rows, end = len(rows.x), 0 if kept is None else kept.logits.shape[1]
    width = buffer_width(num_rows, end > 0)
    row_step = max(1, tiles.BUFFER // width)
    with tiles.exact_products():
        for start, stop in (*tiles.column_tiles(end, width), *tiles.column_tiles(len(head.weight), width, end)):
            w = tiles.operand(head.weight[start:stop])
            columns = head._replace(weight=w, bias=None if head.bias is None else head.bias[start:stop])
            tile_grad = target_grad = None  # in a buffer, or where it belongs
            if dweight is not None and dweight.dtype == rows.x.dtype == rows.scale.dtype and num_rows > 0:
                target_grad = dweight[start:stop]
            for low in range(0, num_rows, row_step):
                own = slice(low, min(low + row_step, num_rows))
                part = rows.part(own)
                at_ids = None if several is None else several.part(own)
                z = None if kept is None else kept.part(own, start, stop)
                dz = _dlogits(part, columns, start, at_ids, z, None if bits is None else bits[own])
                if dbias is not None:
                    dbias[start:stop] += dz.sum(0)
                dz = dz.to(part.x.dtype)
                if dhidden is not None:
                    accumulate(dhidden[own], dz, w)
                if dweight is not None or main_grad is not None:
                    if target_grad is None:
                        product = tiles.product(dz.T, part.x)
                        tile_grad = product if tile_grad is None else tile_grad.add_(product)
                    elif low == 0:
                        torch.mm(dz.T, part.x, out=target_grad)
                    else:
                        target_grad.addmm_(dz.T, part.x)
                del dz  # or the next would stand beside it
            if tile_grad is not None and rows.inverse is not None:
                tile_grad.mul_(rows.inverse)
            if target_grad is None:
                store(dweight, main_grad, start, stop, tile_grad)


def _dlogits(
    rows: Rows, columns: Head, start: int, several: Several | None, kept: Tensor | None, bits: Tensor | None
) -> Tensor:
    """Gradient of the product hidden weight^T in the columns from `start` on, fp32; `kept` logits stay. [R, C]"""
    local, entropy = (rows.target - start)[:, None], None if rows.entropy is None else rows.entropy[:, None]
    slope, z = None, kept
    if z is None:
        z = tiles.logits_tile(rows.x, columns.weight, columns.bias, columns.logit_scale, columns.softcap)
        slope = None if columns.softcap is None else (z / columns.softcap).square_().neg_().add_(1.0)
        z = tiles.keep_(tiles.divide_by_temperature(z, rows.temperature), bits, start)
    dz = dlogits_(z, local, rows.logp[:, None], rows.lse, rows.scale, rows.entropy_scale, entropy, kept is not None)
    if several is not None:
        put_(dz, several, start)
    return dz if slope is None else dz.mul_(slope)


def dlogits_(
    z: Tensor,  # [R, C] logits, overwritten unless kept
    local: Tensor,  # [R, 1] target minus the first column
    target_logp: Tensor,  # [R, 1]
    lse: Tensor,  # [2, R, 1]
    scale: Tensor,  # [R, 1]
    entropy_scale: Tensor | None = None,  # [R, 1]
    entropy: Tensor | None = None,  # [R, 1]
    keep: bool = False,
) -> Tensor:
    """scale (1{v=y} - p_v) - entropy_scale p_v (log p_v + H); the target's 1 - p from its own log p. [R, C]"""
    columns = z.shape[1]
    mine = (local >= 0) & (local < columns)
    local = local.clamp(0, columns - 1)
    shifted = z.sub(lse[0]) if keep else z.sub_(lse[0])
    if entropy_scale is None:
        dz = shifted.exp_().mul_(-scale * lse[1].neg().exp())  # the sum divides a row's factor, not its elements
        kept_back = torch.zeros_like(scale)
    else:
        assert entropy is not None
        logp = shifted.sub_(lse[1])
        p = logp.exp()
        by_entropy = logp.clamp_min_(tiles.FLOOR).add_(entropy).mul_(entropy_scale)
        kept_back = -by_entropy.gather(1, local) * p.gather(1, local)
        dz = by_entropy.add_(scale).mul_(p).neg_()
    at_target = kept_back - scale * torch.expm1(target_logp)
    return dz.scatter_(1, local, torch.where(mine, at_target, dz.gather(1, local)))
