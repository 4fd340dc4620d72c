"""Log-probs over listed ids: gather a tile of the head's rows, multiply, reduce by row (docs/maths.md, eq. 30-31).

2KH FLOP forward and 4KH backward for K entries. Memory beyond inputs and outputs: one tile of gathered rows, and a few
numbers an entry. A row's bits depend on the row, its set of ids and H: tiles end anywhere, and change no sum's order.
On a device the host waits for the number of entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.chunked import tiles
from flowrl_kernels.chunked.kept_lists import Lists, by_column
from flowrl_kernels.chunked.linear_logprob import store
from flowrl_kernels.core.types import Head, Needs, Saved, Upstream

GATHERED = 1 << 18  # elements of the rows gathered at once: 1 MB in fp32, so that they are read from a cache


def _parts(entries: int, hidden_size: int) -> list[slice]:
    step = max(1, GATHERED // max(1, hidden_size))
    return [slice(low, min(low + step, entries)) for low in range(0, entries, step)]


def _counted(lists: Lists) -> Lists:
    """Without what stands behind the entries."""
    if tiles.host_knows(lists.rows):
        return lists
    count = int(lists.edges[-1])
    return lists._replace(rows=lists.rows[:count], columns=lists.columns[:count])


def linear_logprob_kept_fwd(hidden: Tensor, lists: Lists, head: Head, entropy: bool) -> tuple[Saved, Tensor]:
    """logp [N] of each row's target (-inf where it has none), log-sum-exp [2, N] over its entries (-inf without any),
    entropy [N] or [0]; and the logits of the entries [E]."""
    weight, bias, temperature, logit_scale, softcap = head
    rows, columns, edges, of_target = _counted(lists)
    dtype = tiles.accumulator_dtype(hidden.dtype)
    z = hidden.new_empty(len(rows), dtype=dtype)
    for own in _parts(len(rows), hidden.shape[1]):
        product = weight[columns[own]].to(dtype).mul_(hidden[rows[own]])
        z[own] = product.sum(1)
    if bias is not None:
        z += bias.to(dtype)[columns]
    z *= logit_scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    tiles.divide_by_temperature(z, temperature.to(dtype) if temperature.numel() == 1 else temperature.to(dtype)[rows])
    top = _reduce(z, edges, "max", -torch.inf)
    shifted = z - top[rows]
    e = shifted.exp().double()
    total = _reduce(e, edges, "sum", 0.0)
    lse = torch.stack([top, total.log().to(dtype)])
    ent = z.new_empty(0)
    if entropy:
        moment = _reduce(e * shifted.double().clamp_min(tiles.FLOOR), edges, "sum", 0.0)
        ent = (total.log() - moment / total).to(dtype)
    picked = z[of_target.clamp_min(0)] if len(z) else z.new_zeros(len(of_target))
    logp = tiles.log_softmax(picked, lse).masked_fill(of_target < 0, -torch.inf)
    return Saved(logp, lse, ent, z.new_empty((0, 0), dtype=torch.float16)), z


def _reduce(value: Tensor, edges: Tensor, how: str, initial: float) -> Tensor:
    return torch.segment_reduce(value, how, offsets=edges, axis=0, initial=initial, unsafe=True)


def entry_gradients(grad: Upstream, lists: Lists, z: Tensor, head: Head, saved: Saved) -> Tensor:
    """Gradient of each entry's product of a hidden state and a row of the head; 0 in rows whose gradients are. [E]"""
    rows, _, _, of_target = _counted(lists)
    _, _, temperature, logit_scale, softcap = head
    logp = tiles.log_softmax(z, saved.lse[:, rows])
    p = logp.exp()
    live = grad.logp != 0
    dz = -grad.logp[rows] * p
    mine = of_target >= 0
    at = of_target.clamp_min(0)[mine]
    dz[at] = (grad.logp * -torch.expm1(saved.logp))[mine]
    if grad.entropy is not None:
        live = live | (grad.entropy != 0)
        dz -= grad.entropy[rows] * p * (logp.clamp_min(tiles.FLOOR) + saved.entropy[rows])
    temperature = temperature.to(dz.dtype) if temperature.numel() == 1 else temperature.to(dz.dtype)[rows]
    dz = dz / temperature * logit_scale
    if softcap is not None:
        dz = dz * (1.0 - (z * temperature / softcap).square())
    return dz.masked_fill_(~live[rows] | (z == -torch.inf), 0.0)


def linear_logprob_kept_bwd(
    grad: Upstream,
    hidden: Tensor,  # [N, H]
    lists: Lists,
    z: Tensor,  # [E]
    head: Head,
    saved: Saved,
    need: Needs,
    main_grad: Tensor | None = None,  # [V, H] fp32
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [N, H] in the accumulator's dtype, of weight [V, H] (into main_grad if given) and bias [V]
    in the accumulator's dtype; those not needed are None. Entries are added one by one in the order of the lists."""
    weight = head.weight
    dz = entry_gradients(grad, lists, z, head, saved)
    rows, columns, _, _ = _counted(lists)
    taken = dz != 0  # NaN too: what is not finite shows
    if not bool(taken.all()):
        dz, rows, columns = dz[taken], rows[taken], columns[taken]
    dtype, hidden_size = dz.dtype, hidden.shape[1]
    dhidden = dweight = dbias = None
    if need.hidden:
        dhidden = hidden.new_zeros(hidden.shape, dtype=dtype)
        for own in _parts(len(rows), hidden_size):
            tiles.add_rows(dhidden, rows[own], weight[columns[own]].to(dtype).mul_(dz[own, None]))
    if not (need.weight or need.bias):
        return dhidden, None, None
    order, columns = by_column(columns)
    dz, rows = dz[order], rows[order]
    if need.bias:
        dbias = hidden.new_zeros(len(weight), dtype=dtype)
        tiles.add_rows(dbias, columns, dz)
    if need.weight:
        dweight = torch.empty_like(weight) if main_grad is None else None
        _weight_gradient(dz, rows, columns, hidden, dweight, main_grad)
    return dhidden, dweight, dbias


def _weight_gradient(
    dz: Tensor, rows: Tensor, columns: Tensor, hidden: Tensor, dweight: Tensor | None, main_grad: Tensor | None
) -> None:
    """sum of dz hidden over each column's entries, in rising order of rows: in dweight, or added to main_grad."""

    def add(into: Tensor, first: int, own: range) -> None:
        for part in _parts(len(own), hidden.shape[1]):
            here = slice(own.start + part.start, own.start + part.stop)
            tiles.add_rows(into, columns[here] - first, hidden[rows[here]].to(dz.dtype).mul_(dz[here, None]))

    whole = main_grad if main_grad is not None else dweight
    assert whole is not None
    if whole.dtype == dz.dtype:
        if main_grad is None:
            whole.zero_()
        add(whole, 0, range(len(columns)))
        return
    vocab_size = len(whole)
    width = max(1, tiles.BUFFER // max(1, hidden.shape[1]))
    starts = list(range(0, vocab_size, width))
    cuts = torch.searchsorted(columns, torch.tensor([*starts, vocab_size], device=columns.device)).tolist()
    for start, first, last in zip(starts, cuts, cuts[1:]):
        stop = min(start + width, vocab_size)
        part = None
        if last > first:
            part = hidden.new_zeros((stop - start, hidden.shape[1]), dtype=dz.dtype)
            add(part, start, range(first, last))
        store(dweight, None, start, stop, part)
