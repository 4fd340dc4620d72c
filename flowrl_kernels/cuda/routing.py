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


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], like: Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: wanted {dtype}, got {tensor.dtype}")
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


def _call(name: str, like: Tensor, sizes: Sequence[int], *arguments: Tensor | int) -> None:
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


def drop_lightest(cost: Tensor, square: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """active (bool, as cost) and spent [2] fp64, the same bits as the torch ones."""
    _check("cost", cost, torch.float64, cost.shape, cost)
    _check("square", square, torch.float64, cost.shape, cost)
    _check("budget", budget, torch.float64, [2], cost)
    active = torch.empty(cost.shape, dtype=torch.bool, device=cost.device)
    spent = torch.empty_like(budget)
    pairs = cost.numel()
    _call("drop_lightest", cost, [pairs], cost, square, pairs, budget, active, spent)
    return active, spent


def block_lists(active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `chunked.routing.BlockLists`, the same values."""
    if active.dim() != 2:
        raise ValueError(f"active: wanted two dimensions, got shape {tuple(active.shape)}")
    _check("active", active, torch.bool, active.shape, active)
    num_blocks, num_tiles = active.shape
    lists = torch.empty((3, active.numel()), dtype=torch.int32, device=active.device)
    block_offsets = torch.empty(num_blocks + 1, dtype=torch.int64, device=active.device)
    tile_offsets = torch.empty(num_tiles + 1, dtype=torch.int64, device=active.device)
    outputs = (block_offsets, lists[0], tile_offsets, lists[1], lists[2])
    _call("block_lists", active, [num_blocks, num_tiles], active, num_blocks, num_tiles, *outputs)
    return outputs
