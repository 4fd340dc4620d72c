"""`linear_logprob` over listed ids in Triton: gather and dot forward, two sorted lists backward, no atomics.

2KH FLOP forward and 4KH backward for K entries; the head's rows are read where they lie, once each way, and nothing of
size [K, H] is written. All sizes are known beforehand, so the host waits for nothing. A row's bits depend on the row,
its set of ids and H; gradients have the same bits from run to run. dz stays fp32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flowrl_kernels.chunked.kept_lists import Lists, by_column
from flowrl_kernels.core.types import Head, Needs, Saved, Upstream
from flowrl_kernels.triton.kept_kernels import (
    dhidden_kernel,
    dots_kernel,
    dweight_kernel,
    entry_gradients_kernel,
    softmax_kernel,
)

PART = 32  # entries of a row that one program takes
BLOCK = 128  # logits of a row at a time
BLOCK_H = 128  # columns of H at a time: at 256 the sums of bfloat16 spill on sm_100
TOGETHER = 16  # entries that are summed together
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def linear_logprob_kept_fwd(hidden: Tensor, lists: Lists, head: Head, entropy: bool) -> tuple[Saved, Tensor]:
    """logp [N] of each row's target (-inf where it has none), log-sum-exp [2, N] over its entries (-inf without any),
    entropy [N] or [0]; and the logits of the entries [E]; all fp32."""
    weight, bias, temperature, logit_scale, softcap = head
    _, columns, edges, of_target = lists
    (n, h), device = hidden.shape, hidden.device
    new = {"dtype": torch.float32, "device": device}
    z, logp, lse = torch.empty(len(columns), **new), torch.empty(n, **new), torch.empty(2, n, **new)
    ent = torch.empty(n if entropy else 0, **new)
    nothing = torch.empty((0, 0), dtype=torch.float16, device=device)
    if n == 0:
        return Saved(logp, lse, ent, nothing), z
    parts = (edges.diff() + PART - 1).div(PART, rounding_mode="floor")
    first_part = torch.nn.functional.pad(parts.cumsum(0), (1, 0))
    programs = torch.arange(n + triton.cdiv(len(columns), PART), device=device)
    part_row = torch.searchsorted(first_part[1:], programs, right=True)
    with torch.cuda.device_of(hidden):
        dots_kernel[(len(programs),)](
            hidden, weight, bias, temperature, part_row, first_part, edges, columns, z,
            n, h, hidden.stride(0), weight.stride(0), int(temperature.shape[0] > 1), logit_scale, softcap,
            PART=PART, BLOCK_H=BLOCK_H, **OPTIONS,
        )  # fmt: skip
        softmax_kernel[(n,)](z, edges, of_target, logp, lse, ent if entropy else None, n, BLOCK=BLOCK, **OPTIONS)
    return Saved(logp, lse, ent, nothing), z


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
    """Gradients of hidden [N, H] in fp32, of weight [V, H] in its dtype (added to main_grad if given) and bias [V] in
    fp32; those not needed are None."""
    weight, _, temperature, logit_scale, softcap = head
    rows, columns, edges, of_target = lists
    (n, h), v = hidden.shape, len(weight)
    new = {"dtype": torch.float32, "device": hidden.device}
    dz = torch.empty(len(columns), **new)
    dhidden = torch.empty(n, h, **new) if need.hidden else None
    dweight = torch.zeros_like(weight) if need.weight and main_grad is None else None
    dbias = torch.zeros(v, **new) if need.bias else None
    if n == 0:
        return dhidden, dweight, dbias
    grad_logp, grad_entropy = grad.logp.contiguous(), grad.entropy
    with torch.cuda.device_of(hidden):
        entry_gradients_kernel[(n,)](
            z, edges, of_target, -grad_logp * torch.expm1(saved.logp), saved.lse,
            None if grad_entropy is None else saved.entropy, grad_logp, grad_entropy, temperature, dz,
            n, int(temperature.shape[0] > 1), logit_scale, softcap, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        if dhidden is not None:
            dhidden_kernel[(n * triton.cdiv(h, BLOCK_H),)](
                weight, edges, columns, dz, dhidden, h, weight.stride(0), BLOCK=TOGETHER, BLOCK_H=BLOCK_H, **OPTIONS
            )
        if need.weight or need.bias:
            order, sorted_columns = by_column(columns)
            first_entry = segments(sorted_columns, v)
            into = (main_grad if main_grad is not None else dweight) if need.weight else None
            heights = triton.cdiv(h, BLOCK_H) if need.weight else 1
            dweight_kernel[((len(first_entry) - 1) * heights,)](
                hidden, first_entry, order, sorted_columns, rows, dz, dbias, into,
                len(columns), v, h if need.weight else 1, hidden.stride(0), ADD=main_grad is not None,
                BLOCK=TOGETHER, BLOCK_H=BLOCK_H, **OPTIONS,
            )  # fmt: skip
    return dhidden, dweight, dbias


def segments(columns: Tensor, vocab_size: int) -> Tensor:
    """The first entry of each column that has any, of sorted columns [E]; E from there on. [min(V, E) + 2]"""
    entries = len(columns)
    starts = torch.ones_like(columns, dtype=torch.bool)
    starts[1:] = columns[1:] != columns[:-1]
    most = min(vocab_size, entries) + 1  # and the one of what stands behind the entries
    first = torch.full((most + 2,), entries, device=columns.device)
    place = torch.where(starts, starts.cumsum(0) - 1, most + 1)
    return first.scatter_(0, place, torch.arange(entries, device=columns.device))[: most + 1]
