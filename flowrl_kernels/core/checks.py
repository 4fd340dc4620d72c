"""Argument contracts: every message names the argument, what was wanted and what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
)  # fmt: skip


def fail(name: str, wanted: str, got: object) -> None:
    """Raise the one kind of ValueError this library raises."""
    raise ValueError(f"{name}: wanted {wanted}; got {got}")


def shape(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}"


def plain(name: str, value: object) -> Tensor:
    """A plain tensor: not a DTensor, not a module, not a list."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor; got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: wanted a plain tensor; got a DTensor. Call the op inside the forward of the FSDP unit that owns "
            f"the parameter (its hooks unshard it); or gather it, with the ranks' gradients summed: "
            f"{name}.full_tensor(grad_placements=[Partial()] * {name}.device_mesh.ndim); or, for a head split over its "
            f"rows and the same tokens on every rank, pass {name}.to_local() with vocab_parallel=the process group"
        )
    return value


def floating(name: str, value: object, dims: int | None = None) -> Tensor:
    value = plain(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float32, bfloat16, float16 or float64; got {value.dtype}")
    if dims is not None and value.dim() != dims:
        fail(name, f"{dims} dimensions", shape(value))
    return value


def integers(name: str, value: object, wanted_shape: tuple[int, ...] | None = None) -> Tensor:
    value = plain(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: wanted an integer tensor; got {value.dtype}")
    if wanted_shape is not None and tuple(value.shape) != tuple(wanted_shape):
        fail(name, f"shape {tuple(wanted_shape)}", shape(value))
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        fail(name, f"the device of {other_name}, {other.device}", value.device)


def number(name: str, value: object, wanted: str = "a finite number") -> float:
    """A finite float from a number of Python or numpy, or a tensor of one element (on a device: waits for it)."""
    value = setting(name, value.cpu() if isinstance(value, Tensor) else value, wanted)
    if not math.isfinite(value):
        fail(name, wanted, value)
    return value


def setting(name: str, value: object, wanted: str = "a number") -> float:
    """As `number`, for what is set before a step: infinity may stand for "no bound", and no device is waited for."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            fail(
                name,
                f"{wanted}, or a tensor without requires_grad (its .item(): no gradient reaches it)",
                "requires_grad=True",
            )
        if value.device.type != "cpu":
            fail(name, f"{wanted}, or a tensor of one on the CPU (its .item() waits)", value.device)
        if value.numel() != 1:
            fail(name, wanted, shape(value))
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name}: wanted {wanted}; got {value.dtype}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: wanted {wanted}; got {value!r} of type {type(value).__name__}")
    return float(value)


def positive(name: str, value: object) -> float:
    value = number(name, value, "a finite number above 0")
    if not value > 0.0:
        fail(name, "a finite number above 0", value)
    return value


def integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: wanted an integer; got {value!r} of type {type(value).__name__}")
    return int(value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: wanted True or False; got {value!r} of type {type(value).__name__}")
    return value


def one_of(name: str, value: object, wanted: tuple) -> None:
    if not (value is None or isinstance(value, str)) or value not in wanted:  # == of an array is no answer
        fail(name, f"one of {', '.join(map(repr, wanted))}", repr(value))


def process_group(name: str, value: object) -> None:
    """A torch.distributed group of which this process is a member."""
    import torch.distributed as dist

    if not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{name}: wanted a torch.distributed.ProcessGroup with this rank in it (of a DeviceMesh: "
            f"mesh['name'].get_group()); got {type(value).__name__}"
        )


def no_tangent(name: str, value: object) -> None:
    """Forward mode would pass an operator by, unseen."""
    level = torch.autograd.forward_ad
    if torch.compiler.is_compiling() or level._current_level < 0 or not isinstance(value, Tensor):
        return
    if level.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name}: forward-mode derivatives are not computed here; impl='reference' has them")
