"""Processes, devices and shards: the only file that says FSDP or reads what torchrun sets.

One process without torchrun runs un-sharded; with torchrun, with a 16-bit compute type (which needs float32
master weights beside it) or with an offloaded reference every model goes through `fully_shard`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from flowrl_kernels.trainer.config import ModelConfig, ParallelConfig, RunConfig

T = TypeVar("T")

EVERYWHERE = "raised on every rank"  # noted on an exception, so that one of them speaks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # None: un-sharded

    @property
    def main(self) -> bool:
        return self.rank == 0


_joined: list[bool] = []
ALONE = World(0, 1, torch.device("cpu"), None)


def start(run: RunConfig, parallel: ParallelConfig) -> World:
    """Joins the process group, where there is one to join, and picks the device.

    Raises:
        ValueError: a device was asked for that is not there.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise ValueError("run.device: 'cuda' was asked for, and PyTorch sees no CUDA device")
    kind = run.device if run.device != "auto" else ("cuda" if cuda else "cpu")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    launched = "RANK" in os.environ
    if not launched and parallel.dtype == "float32" and not parallel.offload_reference:
        return World(0, 1, device, None)
    if not dist.is_initialized():
        backend: str = parallel.backend if parallel.backend != "auto" else ("nccl" if kind == "cuda" else "gloo")
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # object gathers and checkpoints go over the CPU
        single: dict[str, Any] = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **single)
        _joined.append(True)
    size, copies = dist.get_world_size(), parallel.replicate
    if copies > 1:
        mesh = init_device_mesh(kind, (copies, size // copies), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return World(dist.get_rank(), size, device, mesh)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ collectives


def total(values: Tensor, world: World, op: str = "sum") -> Tensor:
    """Sum (or "max") of a tensor over ranks, on the CPU; the one synchronisation of what calls it."""
    if world.size == 1:
        return values.cpu()
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return values.cpu()


def gather(value: T, world: World) -> list[T]:
    """Every rank's Python object, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    out: list[T] = [value] * world.size
    dist.all_gather_object(out, value)
    return out


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def first(action: Callable[[], T], world: World) -> T:
    """Runs `action` on rank 0 alone; its answer, or its exception, reaches every rank."""
    outcome: list[Any] = [None, None]
    if world.main:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].add_note(EVERYWHERE)
        raise outcome[1]
    return outcome[0]


def agree(action: Callable[[], T], world: World) -> T:
    """Runs `action`, which uses no collective, on every rank; where one fails, all raise the first one's exception."""
    answer: list[T] = []
    mine: Exception | None = None
    try:
        answer.append(action())
    except Exception as error:
        mine = error
    for failure in gather(mine, world):
        if failure is not None:
            failure.add_note(EVERYWHERE)
            raise failure
    return answer[0]


def joined() -> bool:
    """Whether this process has joined a group, if only once: before, every rank sees and says the same."""
    return bool(_joined)


def rank_here() -> int:
    """This process's rank, before or without a process group."""
    return int(os.environ.get("RANK", "0"))


# ------------------------------------------------------------------------------------------------ sharding


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, by the class names it lists itself as not to be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def prepare_layers(model: nn.Module, parallel: ParallelConfig) -> None:
    """Recomputation and compilation, decoder layer by decoder layer."""
    for layer in decoder_layers(model):
        if parallel.checkpoint_activations:
            # under the module's hooks, so a sharded layer is whole again when it is recomputed
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if parallel.compile:
            layer.compile()


def shard(
    root: nn.Module, model: nn.Module, extras: list[nn.Module], parallel: ParallelConfig, world: World, *,
    offload: bool = False,
) -> None:  # fmt: skip
    """Shards `root`: a unit per decoder layer of `model`, per module of `extras` (float32), and for the rest."""
    if world.mesh is None:
        return
    options: dict[str, Any] = {"mesh": world.mesh}
    if offload and world.device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    single = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mixed = single
    if parallel.dtype != "float32":
        mixed = MixedPrecisionPolicy(param_dtype=DTYPES[parallel.dtype], reduce_dtype=torch.float32)
    for extra in extras:
        fully_shard(extra, mp_policy=single, **options)
    for layer in decoder_layers(model):
        fully_shard(layer, mp_policy=mixed, **options)
    fully_shard(root, mp_policy=mixed, **options)


def spread(root: nn.Module, state: dict[str, Tensor] | None, world: World, *, offload: bool = False) -> None:
    """Fills a sharded module that was built without weights (meta device) from rank 0's full state dict.

    Args:
        state: name -> full tensor on rank 0, None elsewhere.
    """
    home = torch.device("cpu") if offload else world.device
    if any(p.is_meta for p in root.parameters()):
        root.to_empty(device=home)
    else:
        root.to(home)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(root, dict(state or {}), options=options)
    for buffer in root.buffers():  # those outside the state dict, rotary frequencies say, travel by hand
        if world.size > 1:
            whole = buffer.to(world.device)
            dist.broadcast(whole, src=0)
            buffer.copy_(whole)


@contextlib.contextmanager
def whole(root: nn.Module) -> Iterator[None]:
    """Parameters stay gathered from the first forward to the block's end: for token-by-token decoding."""
    if not isinstance(root, FSDPModule):
        yield
        return
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not root, recurse=False)


def full_state(root: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on rank 0's CPU (empty elsewhere); every rank must call it."""
    if not isinstance(root, FSDPModule):
        return {name: tensor.detach().cpu().clone() for name, tensor in root.state_dict().items()}
    whole: Any = get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole


def clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the global gradient norm in place and returns it (before clipping), a plain fp32 scalar."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def attention_of(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> str | None:
    """The attention implementation to ask transformers for; None: its own choice, SDPA for models that have it.

    Flash-attention takes 16-bit inputs on CUDA only.
    """
    if model.attention != "auto":
        return model.attention
    flash = device.type == "cuda" and parallel.dtype != "float32"
    return "flash_attention_2" if flash and importlib.util.find_spec("flash_attn") else None
