"""Shared pieces of the chunked path: block sizes, exact products, the logits of one tile, running softmax sums."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked.recompute import WIDTH
from flowrl_kernels.core.types import TILE

COLUMNS = WIDTH  # vocabulary columns of one forward tile; a multiple of TILE
BUFFER = 1 << 22  # elements of one backward buffer (16 MB in fp32)
FLOOR = -1e4  # stands in for -inf where it meets a factor 0; exp(FLOOR) is 0


def host_knows(tensor: Tensor) -> bool:
    """Whether the host can read values without waiting for a device."""
    return tensor.device.type == "cpu"


def row_block(hidden_size: int, vocab_size: int) -> int:
    """Rows of one forward block: a function of (H, V) alone, because a GEMM's reduction order can depend on it."""
    return 256 if hidden_size * vocab_size >= 1 << 22 else 64


def column_tiles(end: int, width: int, start: int = 0) -> Iterator[tuple[int, int]]:
    for first in range(start, end, width):
        yield first, min(first + width, end)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Switches:
    """The process's switches for matrix products: the first thread in sets them, the last one out puts them back.

    float32 at float32 precision (no TF32, no bf16 shortcuts), and no 16-bit accumulation: cuBLAS may add split-K
    partial sums of a 16-bit product in 16 bits, which torch allows by default.
    """

    REDUCED = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = self._read()
                for room, name, _ in self.before:
                    setattr(room, name, "ieee" if name == "fp32_precision" else False)
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for room, name, value in self.before:
                    setattr(room, name, value)

    def _read(self) -> list[tuple[Any, str, Any]]:
        cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        # torch's older switch for all of them raises where these were set
        before = [(room, "fp32_precision", room.fp32_precision) for room in (cuda, mkldnn)]
        before.append((cuda, "allow_fp16_accumulation", cuda.allow_fp16_accumulation))
        for name in self.REDUCED:
            value, split_k = getattr(cuda, name), getattr(cuda, f"{name}_split_k", None)
            before.append((cuda, name, value if split_k is None else (value, split_k)))
        return before


_SWITCHES = _Switches()


@contextmanager
def exact_products() -> Iterator[None]:
    """Exact float32 products and fp32 sums of 16-bit ones, whatever the process allows elsewhere.

    The switches are the process's: while any thread is inside, the others' products are exact too.
    """
    _SWITCHES.enter()
    try:
        yield
    finally:
        _SWITCHES.leave()


def operand(tensor: Tensor) -> Tensor:
    """What a product reads: 16-bit stays 16-bit on a GPU (fp32 accumulators there); a CPU multiplies it as fp32."""
    return tensor.float() if tensor.device.type == "cpu" and tensor.dtype.itemsize == 2 else tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with fp32 accumulation and fp32 result (float64 for float64)."""
    if left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def logits_tile(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None = None,  # [R, C]
) -> Tensor:
    """softcap(logit_scale (hidden weight^T + bias)), fp32, before the temperature; in `out` if given. [R, C]"""
    z = product(hidden, weight.T) if out is None else torch.mm(hidden, weight.T, out=out)
    if bias is not None:
        z.add_(bias.to(z.dtype))
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def divide_by_temperature(z: Tensor, temperature: Tensor) -> Tensor:
    """z / temperature per row, in place; temperature is [R, 1], [1, 1] or holds a single 1 that is skipped on CPU."""
    if temperature.numel() == 1 and temperature.device.type == "cpu" and float(temperature) == 1.0:
        return z
    return z.div_(temperature)


class Rows(NamedTuple):
    """Some rows of a batch as a backward takes them."""

    x: Tensor  # [R, H]
    target: Tensor  # [R]; V where the row has none
    temperature: Tensor  # [R, 1] or [1, 1]
    logp: Tensor  # [R] of the target
    lse: Tensor  # [2, R, 1] maximum and log of the sum
    scale: Tensor  # [R, 1] grad * logit_scale / temperature
    entropy_scale: Tensor | None = None  # [R, 1] the same of the entropy's
    entropy: Tensor | None = None  # [R]
    inverse: Tensor | None = None  # [1] what undoes the power of two that the scales carry for float16

    def part(self, own: slice) -> Rows:
        x, target, temperature, logp, lse, scale, entropy_scale, entropy, inverse = self
        temperature = temperature if temperature.numel() == 1 else temperature[own]
        second = None if entropy_scale is None else entropy_scale[own]
        entropy = None if entropy is None else entropy[own]
        return Rows(x[own], target[own], temperature, logp[own], lse[:, own], scale[own], second, entropy, inverse)


class Sinks(NamedTuple):
    """Where gradients go; None where they are not wanted."""

    dhidden: Tensor | None  # [R, H] zeros, accumulated into
    dweight: Tensor | None  # [V, H] written
    main_grad: Tensor | None  # [V, H] accumulated into
    dbias: Tensor | None  # [V] accumulated into


class Sums:
    """Running softmax sums of a block of rows: maximum m, s = sum e^(z-m), u = sum e^(z-m) (z-m).

    Columns are reduced in runs of TILE, runs in order, so the result depends on the row and on (H, V) only.
    """

    def __init__(self, rows: int, like: Tensor, entropy: bool):
        self.maximum = like.new_full((rows,), -torch.inf)
        self.total = like.new_zeros(rows)
        self.moment = like.new_zeros(rows) if entropy else None

    def add(self, z: Tensor, keep: bool = False) -> Tensor:
        """Take in logits [R, C], overwritten unless kept; returns the log-sum-exp of each run, [R, ceil(C/TILE)]."""
        columns = z.shape[1]
        if columns % TILE:
            z = torch.nn.functional.pad(z, (0, TILE - columns % TILE), value=-torch.inf)
        z = z.unflatten(1, (-1, TILE))
        top = z.amax(-1)  # [R, runs]
        shift = top.clamp_min(torch.finfo(top.dtype).min)  # a run of -inf alone must not make -inf - -inf
        z = z.sub(shift[..., None]) if keep else z.sub_(shift[..., None])
        if self.moment is None:
            run_total = z.exp_().sum(-1)
            run_moment = None
        else:
            mass = z.exp()
            run_total = mass.sum(-1)
            run_moment = mass.mul_(z.clamp_min_(FLOOR)).sum(-1)
        new = torch.maximum(self.maximum, top.amax(-1))
        safe = new.clamp_min(torch.finfo(new.dtype).min)
        old_step = (self.maximum - safe).clamp_min_(FLOOR)
        run_step = (shift - safe[:, None]).clamp_min_(FLOOR)  # [R, runs]
        old_scale, run_scale = old_step.exp(), run_step.exp()
        if self.moment is not None and run_moment is not None:
            self.moment = old_scale * (self.moment + self.total * old_step)
            self.moment += (run_scale * (run_moment + run_total * run_step)).sum(-1)
        self.total = self.total * old_scale + (run_total * run_scale).sum(-1)
        self.maximum = new
        return shift + run_total.log()

    def lse(self) -> Tensor:
        """Maximum and log of the sum relative to it, kept apart: their sum would round away a confident row's rest."""
        return torch.stack([self.maximum, self.total.log()])

    def entropy(self) -> Tensor:
        """-sum p log p as log s - u/s: two terms that are never negative."""
        assert self.moment is not None
        return self.total.log() - self.moment / self.total


def log_softmax(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse without rounding at the size of z: z [...] and lse [2, ...]."""
    return (z - lse[0]) - lse[1]


def fp16_factor(
    grad_logp: Tensor, grad_entropy: Tensor | None, entropy: Tensor, temperature: Tensor, logit_scale: float,
    live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[1] power of two that brings the largest |dz| a row can have just under 4096: fp16 has 5 exponent bits.

    Rows that are not `live` [N] may hold anything in `entropy` and `temperature`.
    """
    bound = grad_logp.abs()
    if grad_entropy is not None:
        bound = bound + grad_entropy.abs() * (entropy + 1.0)
    bound = bound * (abs(logit_scale) / temperature)
    bound = (bound if live is None else torch.where(live, bound, 0.0)).amax().view(1)
    exponent = (12 - torch.frexp(bound).exponent).clamp(-120, 120)
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)  # exact, which a power function need not be


def round_up_to_half(value: Tensor) -> Tensor:
    """The smallest fp16 number that is not below `value` (the tile statistics are upper bounds)."""
    half = value.to(torch.float16)
    low = half.to(value.dtype) < value
    return torch.where(low, torch.nextafter(half, half.new_tensor(torch.inf)), half)


def add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """into[index] += rows in a fixed order (index_add_ is sequential on a CPU, index_put_ sorts on a GPU)."""
    if into.device.type == "cpu":
        into.index_add_(0, index, rows)
    else:
        into.index_put_((index,), rows, accumulate=True)
