"""Matrix products of 16-bit inputs that accumulate, and may end, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowrl_kernels.chunked.tiles import exact_products


@contextmanager
def exact_matmul(like: Tensor) -> Iterator[None]:
    """`exact_products` on the device of `like`, without gradients or autocast."""
    with exact_products(), torch.no_grad(), torch.cuda.device_of(like), torch.autocast(like.device.type, enabled=False):
        yield


SCALED_ROWS = 32768  # of `out`, at a time, where the product is scaled


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool, factor: Tensor | None = None) -> None:
    """out (+)= a @ b with fp32 accumulation: a [M, K], b [K, N] of one dtype, out [M, N] of that dtype or fp32.

    Adding into a 16-bit `out` would round once a call; pass fp32 there. The product is multiplied by the number in
    `factor` [1] before it is rounded.
    """
    if factor is not None:
        for begin in range(0, out.shape[0], SCALED_ROWS):
            own = slice(begin, begin + SCALED_ROWS)
            product = torch.empty(out[own].shape, dtype=torch.float32, device=out.device)
            matmul_into(product, a[own], b, add=False)
            product *= factor
            out[own].add_(product) if add else out[own].copy_(product)
    elif a.device.type == "cpu" and a.dtype != torch.float32:
        product = a.float() @ b.float()  # no mixed product on the CPU: same meaning, wider operands
        out.add_(product) if add else out.copy_(product)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
