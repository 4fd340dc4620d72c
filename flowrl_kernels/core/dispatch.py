"""The only room that knows which backends exist, and the only one that reads the environment.

``FLOWRL_IMPL`` replaces the choice that ``impl="auto"`` makes. ``FLOWRL_CHECK=1`` turns on argument checks that
look at values and therefore wait for the device.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("flowrl_kernels")

IMPLS = ("reference", "chunked", "triton")
# stems with a launcher module in each room; the reference is a plain function and serves every stem
SHARED = ("linear_logprob", "linear_logprob_sampled", "linear_logprob_kept", "linear_residual", "logprob", "residual")
STEMS = {"chunked": (*SHARED, "context_parallel"), "triton": SHARED}
# Triton's interpreter reads the bits of bfloat16 as integers; a test that mends it says so here
interpreter_multiplies_bfloat16 = False


class Backend(NamedTuple):
    """Whether a backend can run here, and the reason if not (or what it runs on)."""

    available: bool
    reason: str


def check_enabled() -> bool:
    """True if ``FLOWRL_CHECK=1``: value checks that wait for the device are on."""
    return os.environ.get("FLOWRL_CHECK", "0") == "1"


def can_look(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device, or waiting was asked for."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or check_enabled())


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _triton_import_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CUDA and ROCm builds of torch bring it; else `pip install triton`)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken wheel is a reason like any other
        return f"triton does not import: {error}"
    return None


def _triton() -> Backend:
    if (error := _triton_import_error()) is not None:
        return Backend(False, error)
    if _interpreting():
        return Backend(True, "triton's interpreter (TRITON_INTERPRET=1), on CPU tensors")
    if not torch.cuda.is_available():
        return Backend(False, "no CUDA or ROCm device (CPU tensors need TRITON_INTERPRET=1)")
    return Backend(True, "triton on the GPU")


def _cuda() -> Backend:
    try:
        library = importlib.import_module("flowrl_kernels.cuda")
    except ImportError as error:
        return Backend(False, f"flowrl_kernels.cuda does not import: {error}")
    return Backend(*library.status())


def backends() -> dict[str, Backend]:
    """What is available on this machine and why the rest is not.

    Returns a dict to ``Backend(available, reason)`` from the names ``impl=`` takes, and from "cuda": the compiled
    library that the bounded backward of "triton" takes its routing from. It holds no operator, so no ``impl``.
    """
    everywhere = Backend(True, "plain torch, any device")
    return {"reference": everywhere, "chunked": everywhere, "triton": _triton(), "cuda": _cuda()}


def _refusal(stem: str, impl: str, tensor: Tensor) -> str | None:
    """Why `impl` cannot run `stem` on `tensor`, or None if it can."""
    if impl == "reference":
        return None
    if stem not in STEMS[impl]:
        return f"there is no {impl} implementation of {stem}"
    if impl == "triton":
        state = _triton()
        if not state.available:
            return state.reason
        if tensor.dtype == torch.float64:
            return "the triton kernels take float32, bfloat16 and float16, not float64"
        if tensor.device.type != "cuda" and not _interpreting():
            return f"the tensors are on {tensor.device}; triton needs a GPU or TRITON_INTERPRET=1"
        on_cpu = tensor.device.type == "cpu" and not interpreter_multiplies_bfloat16
        if tensor.dtype == torch.bfloat16 and on_cpu and stem.startswith("linear_"):
            return "triton's interpreter multiplies bfloat16 wrongly; use float16 or float32"
    return None


@cache
def _log_choice(stem: str, impl: str, device: str) -> None:
    logger.info("impl='auto' runs %s on %s by %s", stem, device, impl)


def resolve(stem: str, impl: str, tensor: Tensor) -> str:
    """The implementation that will run `stem` on `tensor`.

    An explicit request succeeds or raises; only ``"auto"`` chooses: ``triton`` on a GPU where it can run, else
    ``chunked``.

    Raises:
        ValueError: `impl` is not a known name.
        RuntimeError: the named implementation cannot run here, with the reason.
    """
    source = "impl"
    if not isinstance(impl, str):
        raise TypeError(f"impl: wanted one of 'auto', {', '.join(map(repr, IMPLS))}; got {impl!r}")
    if impl == "auto":
        impl, source = os.environ.get("FLOWRL_IMPL", "auto"), "FLOWRL_IMPL"
    if impl == "auto":
        on_gpu = tensor.device.type == "cuda"
        choice = "triton" if on_gpu and _refusal(stem, "triton", tensor) is None else "chunked"
        if not torch.compiler.is_compiling():
            _log_choice(stem, choice, tensor.device.type)
        return choice
    if impl not in IMPLS:
        why = " (the CUDA library routes for 'triton' and holds no operator of its own)" if impl == "cuda" else ""
        raise ValueError(f"{source}: wanted one of 'auto', {', '.join(map(repr, IMPLS))}; got {impl!r}{why}")
    if (reason := _refusal(stem, impl, tensor)) is not None:
        raise RuntimeError(f"{source}={impl!r} was asked for and cannot run: {reason}")
    return impl


def launchers(stem: str, impl: str) -> ModuleType:
    """The module that holds the launchers of `stem` for `impl`; imported on first use."""
    return importlib.import_module(f"flowrl_kernels.{impl}.{stem}")
