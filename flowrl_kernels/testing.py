"""What tests and benchmarks share: input makers, the float64 oracle, error checks that bite, and poison.

Public because a user who ports a kernel wants to judge it by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import reference
from flowrl_kernels.core.types import TILE


def peaked_inputs(
    n: int, h: int, v: int, *, dtype: torch.dtype = torch.float32, peak: float = 30.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], target [N] whose logits reach |z| of about `peak`; targets mostly likely tokens.

    Made in float64 and rounded once, so that every implementation and the oracle see the same numbers.
    """
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=make, dtype=torch.float64) / math.sqrt(h)
    target = torch.randint(v, (n,), generator=make)
    level = peak * (0.25 + 0.75 * torch.rand(n, 1, generator=make, dtype=torch.float64))
    noise = torch.randn(n, h, generator=make, dtype=torch.float64)
    toward = weight[target] / weight[target].square().sum(1, keepdim=True)
    hidden = level * toward + noise * 0.1 * level
    other = torch.randint(v, (n,), generator=make)
    target = torch.where(torch.rand(n, generator=make) < 0.2, other, target)  # some unlikely tokens too
    return hidden.to(dtype), weight.to(dtype), target


def rl_like_inputs(
    n: int,
    h: int,
    v: int,
    *,
    zipf: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharp: float = 0.8,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], target [N], grad [N]: a synthetic policy-gradient batch.

    Token frequencies follow a Zipf law over the ids, carried by a common direction of the weight as in a trained
    head. A share `sharp` of the rows is nearly decided; the others hesitate between 2 and 8 tokens drawn from the
    same law. Targets are sampled from the rows' own softmax; `grad` is constant within sequences of 64 tokens.
    Synthetic: real hidden states decide what a bounded backward saves. Each kind of device has its own stream.
    """
    make = torch.Generator(device).manual_seed(seed)
    on_device: dict[str, Any] = {"generator": make, "device": device}
    frequency = (torch.arange(v, dtype=torch.float64, device=device) + 2.7).pow(-zipf)
    frequency /= frequency.sum()
    common = torch.nn.functional.normalize(torch.randn(h, **on_device), dim=0)
    weight = torch.randn(v, h, **on_device) / math.sqrt(h)
    weight -= (weight @ common)[:, None] * common
    weight += frequency.log().float()[:, None] * common * 0.1
    hidden = 10.0 * common.expand(n, h).clone()  # background: softmax proportional to the frequency
    decided = torch.rand(n, **on_device) < sharp
    count = torch.where(decided, 1, torch.randint(2, 9, (n,), **on_device))
    margin = torch.where(decided, 7.0 + 2.0 * torch.randn(n, **on_device), 3.0 + torch.rand(n, **on_device))
    choices = torch.multinomial(frequency, 8 * n, replacement=True, generator=make).view(n, 8)
    for k in range(8):
        on = (k < count).float()
        row = weight[choices[:, k]]
        # lift the token from its background level to the row's margin, less a little for the later choices
        lift = margin - frequency.log().float()[choices[:, k]] - 0.5 * k
        side = row - (row @ common)[:, None] * common
        hidden += (on * lift / side.square().sum(1))[:, None] * side
    target = torch.empty(n, dtype=torch.int64, device=device)
    for low in range(0, n, 256):
        p = torch.softmax(hidden[low : low + 256] @ weight.T, -1)
        target[low : low + 256] = torch.multinomial(p, 1, generator=make)[:, 0]
    grad = torch.randn(-(-n // 64), **on_device).repeat_interleave(64)[:n] / 64
    return hidden.to(dtype), weight.to(dtype), target, grad


def composition(hidden: Tensor, weight: Tensor, target: Tensor, rows: int = 512) -> dict[str, float]:
    """What a batch is made of: entropy, confidence, and how many 128-column tiles hold 99 % of a row's mass."""
    z = hidden[:rows].float() @ weight.float().T
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    tiles = torch.nn.functional.pad(p, (0, -p.shape[1] % TILE)).view(len(p), -1, TILE).sum(-1)
    heavy = tiles.sort(-1, descending=True).values.cumsum(-1)
    return {
        "mean_entropy_nats": float(-(p * logp).sum(-1).mean()),
        "mean_target_probability": float(p.gather(1, target[:rows, None]).mean()),
        "share_of_targets_in_first_tile": float((target[:rows] < TILE).double().mean()),
        "mean_tiles_for_99_percent": float((heavy < 0.99).sum(-1).add(1).double().mean()),
        "tiles": float(tiles.shape[1]),
    }


def oracle(hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor | None = None, **settings):
    """logp, entropy and (where `grad` [N] is given) dhidden, dweight in float64 from the same rounded inputs."""
    x = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    for name in ("bias", "temperature"):
        if isinstance(settings.get(name), Tensor):
            settings[name] = settings[name].double()
    out = reference.linear_logprob(x, w, target, entropy=True, **settings)
    logp, entropy = out.logp, out.entropy
    assert entropy is not None
    if grad is None:
        return logp.detach(), entropy.detach(), None, None
    dx, dw = torch.autograd.grad(logp, (x, w), grad.double())
    return logp.detach(), entropy.detach(), dx, dw


def relative_error(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative L2 error of the whole, and of the worst row against the RMS row norm."""
    actual, expected = actual.double(), expected.double()
    difference = actual - expected
    whole = difference.norm() / expected.norm().clamp_min(1e-300)
    rows = difference.reshape(difference.shape[0], -1).norm(dim=1)
    scale = expected.reshape(expected.shape[0], -1).norm(dim=1).square().mean().sqrt().clamp_min(1e-300)
    return float(whole), float(rows.max() / scale)


def assert_grad_close(actual: Tensor, expected: Tensor, *, rel: float, row: float | None = None) -> None:
    """Relative L2 error at most `rel`, worst row at most `row` (10 * rel) of the RMS row.

    Proves itself: the same bounds must refuse zeros and the right answer times 1.02.
    """
    row = 10.0 * rel if row is None else row
    assert rel < 0.02, f"rel={rel} would let a gradient that is 2 % off pass"
    assert float(expected.double().norm()) > 0.0, "the expected gradient is zero: this test would prove nothing"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    for wrong in (torch.zeros_like(expected), 1.02 * expected.double()):
        assert relative_error(wrong, expected)[0] > rel
    whole, worst = relative_error(actual, expected)
    assert whole <= rel, f"relative L2 error {whole:.3e} > {rel:.3e}"
    assert worst <= row, f"worst row error {worst:.3e} of the RMS row > {row:.3e}"


def ragged_mask(b: int, t: int, *, seed: int = 0, holes: bool = True) -> Tensor:
    """bool [B, T]: random lengths from 1 to T, one empty row where B > 2, and masked-out tokens inside if `holes`."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b,), generator=make)
    if b > 2:
        lengths[b // 2] = 0
    mask = torch.arange(t) < lengths[:, None]
    if holes:
        inside = torch.rand(b, t, generator=make) < 0.8
        inside[:, 0] = True  # a response keeps at least one token
        mask &= inside
    return mask


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    """int32 [B+1] boundaries of packed sequences."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: whoever reads what was never written is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switch.fill_uninitialized_memory = fill
