"""The few calls of NCCL that sending weights takes, by ctypes from the library that PyTorch has loaded.

A process group of torch's keeps its communicator's unique id to itself (it can be dug out of its store, which no
promise covers); these calls are NCCL's public interface.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor


class UniqueId(ctypes.Structure):
    """ncclUniqueId: 128 bytes that whoever wants to join a communicator must know."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


FLOAT32, SUM = 7, 0
TYPES = {
    torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4,
    torch.float16: 6, torch.float32: FLOAT32, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ncclGetErrorString": (c_char_p, [c_int]),
    "ncclGetVersion": (c_int, [POINTER(c_int)]),
    "ncclGetUniqueId": (c_int, [POINTER(UniqueId)]),
    "ncclCommInitRank": (c_int, [POINTER(c_void_p), c_int, UniqueId, c_int]),
    "ncclAllReduce": (c_int, [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p]),
    "ncclBroadcast": (c_int, [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p]),
    "ncclCommAbort": (c_int, [c_void_p]),
}


class NcclError(RuntimeError):
    """NCCL is not there, or one of its calls failed: which, and what NCCL says of it."""


class Library:
    """NCCL (RCCL on ROCm). Raises NcclError where it cannot be loaded, or lacks a call."""

    def __init__(self, path: str = ""):
        path = path or ("librccl.so.1" if torch.version.hip else "libnccl.so.2")
        try:
            self.lib = ctypes.CDLL(path)
            for name, (result, arguments) in SIGNATURES.items():
                call = getattr(self.lib, name)
                call.restype, call.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NcclError(f"{path}: {error}") from None

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.lib, name)(*arguments)
        if status:
            said = self.lib.ncclGetErrorString(status).decode(errors="replace")
            hint = ""
            if name == "ncclCommInitRank":
                hint = f"; every process needs NCCL {self.version()} and a GPU of its own"
            raise NcclError(f"{name}: {said} ({status}){hint}")

    def version(self) -> int:
        """E.g. 22809 for 2.28.9."""
        version = c_int()
        self.call("ncclGetVersion", ctypes.byref(version))
        return version.value

    def unique_id(self) -> bytes:
        """128 bytes for a new communicator, of which this process must be rank 0."""
        made = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)

    def join(self, unique_id: bytes, size: int, device: torch.device) -> Communicator:
        """Rank 0 of a communicator of `size` ranks; waits until all of them have come.

        vLLM's ranks add up one number each as soon as they have joined, so this one does too.
        """
        with torch.cuda.device(device):
            handle = c_void_p()
            self.call("ncclCommInitRank", ctypes.byref(handle), size, UniqueId.from_buffer_copy(unique_id), 0)
            made = Communicator(self, handle, device)
            one = torch.zeros(1, device=device)
            stream = torch.cuda.current_stream()
            at = c_void_p(one.data_ptr())
            self.call("ncclAllReduce", at, at, 1, FLOAT32, SUM, handle, c_void_p(stream.cuda_stream))
            stream.synchronize()
        return made


class Communicator:
    """Rank 0's end of one. Made by `Library.join`."""

    def __init__(self, library: Library, handle: c_void_p, device: torch.device):
        self.library, self.handle, self.device = library, handle, device

    def send(self, tensors: list[Tensor]) -> None:
        """Broadcasts contiguous tensors of this device, one after the other; returns when all have gone."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())  # which made them
            for tensor in tensors:
                at = c_void_p(tensor.data_ptr())
                self.library.call(
                    "ncclBroadcast", at, at, tensor.numel(), TYPES[tensor.dtype], 0, self.handle,
                    c_void_p(stream.cuda_stream),
                )  # fmt: skip
            stream.synchronize()

    def abort(self) -> None:
        """Ends it; a call that waits for the other ranks returns."""
        self.library.call("ncclCommAbort", self.handle)


def missing(device: str) -> str:
    """Why weights cannot be sent from here by NCCL; empty where they can.

    Args:
        device: `run.device`, or the kind of device that came of it.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return "the trainer runs on a CPU" if device == "cpu" else "PyTorch sees no CUDA device"
    try:
        Library()
    except NcclError as error:
        return f"NCCL cannot be loaded ({error})"
    return ""
