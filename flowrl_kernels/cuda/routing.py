"""The functions of `flowrl_kernels.chunked.routing` by the compiled library: the same names and results.

Each enqueues kernels on the current stream and returns at once. All raise TypeError or ValueError for tensors the
library cannot take, and RuntimeError, with the library's own words, where it cannot be used or refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flowrl_kernels import cuda
from flowrl_kernels.core.types import TILE


def _check(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int], like: Tensor) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: wanted {wanted}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: wanted all tensors on one device, got {tensor.device} and {like.device}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: wanted shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: wanted a contiguous tensor, got strides {tensor.stride()}")


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Makes `device` the current one; the handle of its current stream."""
    if device.type != "cuda":
        raise ValueError(f"wanted tensors on a CUDA device, got {device}")
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _call(name: str, like: Tensor, sizes: Sequence[int], *arguments: Tensor | float) -> None:
    """Run one function on `like`'s device and current stream; `sizes` are those that decide its workspace."""
    functions = cuda.functions()
    needed = functions[f"{name}_workspace_size"](*sizes)
    code = -min(needed, 0)
    if code == 0:
        with _current_stream(like.device) as stream:
            # may be freed on return: the allocator hands memory on in stream order
            workspace = torch.empty(needed, dtype=torch.uint8, device=like.device)
            plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            code = functions[name](*plain, workspace.data_ptr(), needed, stream)
    if code != 0:
        raise RuntimeError(f"flowrl_{name}: {functions['error_string'](code).decode()} (code {code})")


def tile_costs(
    tile_lse: Tensor,  # [runs, R] fp16
    lse: Tensor,  # [R] fp32
    target: Tensor,  # [R] int64
    target_logp: Tensor,  # [R] fp32
    gradient: Tensor,  # [R] fp32
    tile_runs: int,
    slack: float,
) -> tuple[Tensor, Tensor]:
    """Cost and squared cost per (row, tile), fp64; equal to the torch ones up to the rounding of exp in fp32."""
    if tile_lse.dim() != 2 or tile_runs < 1:
        raise ValueError(
            "tile_lse, tile_runs: wanted two dimensions and a size of at least 1, got "
            f"{tuple(tile_lse.shape)}, {tile_runs}"
        )
    num_runs, num_rows = tile_lse.shape
    _check("tile_lse", tile_lse, [torch.float16], tile_lse.shape, tile_lse)
    _check("lse", lse, [torch.float32], [num_rows], tile_lse)
    _check("target", target, [torch.int64], [num_rows], tile_lse)
    _check("target_logp", target_logp, [torch.float32], [num_rows], tile_lse)
    _check("gradient", gradient, [torch.float32], [num_rows], tile_lse)
    cost = torch.empty((num_rows, -(-num_runs // tile_runs)), dtype=torch.float64, device=lse.device)
    square = torch.empty_like(cost)
    _call(
        "tile_costs", lse, [num_rows],
        tile_lse, num_rows, lse, target, target_logp, gradient,
        num_rows, num_runs, TILE, tile_runs, slack, cost, square,
    )  # fmt: skip
    return cost, square


def drop_lightest(cost: Tensor, square: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """active (bool, as cost) and spent [2] fp64, the same bits as the torch ones."""
    _check("cost", cost, [torch.float64], cost.shape, cost)
    _check("square", square, [torch.float64], cost.shape, cost)
    _check("budget", budget, [torch.float64], [2], cost)
    active = torch.empty(cost.shape, dtype=torch.bool, device=cost.device)
    spent = torch.empty_like(budget)
    pairs = cost.numel()
    _call("drop_lightest", cost, [pairs], cost, square, pairs, budget, active, spent)
    return active, spent


def block_lists(active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `chunked.routing.BlockLists`, the same values."""
    if active.dim() != 2:
        raise ValueError(f"active: wanted two dimensions, got shape {tuple(active.shape)}")
    _check("active", active, [torch.bool], active.shape, active)
    num_blocks, num_tiles = active.shape
    lists = torch.empty((3, active.numel()), dtype=torch.int32, device=active.device)
    block_offsets = torch.empty(num_blocks + 1, dtype=torch.int64, device=active.device)
    tile_offsets = torch.empty(num_tiles + 1, dtype=torch.int64, device=active.device)
    outputs = (block_offsets, lists[0], tile_offsets, lists[1], lists[2])
    _call("block_lists", active, [num_blocks, num_tiles], active, num_blocks, num_tiles, *outputs)
    return outputs


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of packed values [N] fp32 over the sequences of cu_seqlens [B + 1] int32 or int64. [B] fp64, same bits."""
    _check("values", values, [torch.float32], [values.numel()], values)
    _check("cu_seqlens", cu_seqlens, [torch.int32, torch.int64], [cu_seqlens.numel()], values)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: wanted at least one entry, got none")
    num_sequences = cu_seqlens.numel() - 1
    sums = torch.empty(num_sequences, dtype=torch.float64, device=values.device)
    index_bytes = cu_seqlens.element_size()
    _call(
        "segment_sums", values, [num_sequences],
        values, values.numel(), cu_seqlens, index_bytes, num_sequences, sums,
    )  # fmt: skip
    return sums
