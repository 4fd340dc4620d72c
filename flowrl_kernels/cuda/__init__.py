"""Loads the csrc library by its C ABI, or records why it cannot. `routing` wraps its functions."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

ABI_VERSION = 3  # FLOWRL_ABI_VERSION in csrc/flowrl.h
PATH = Path(__file__).parent / "libflowrl_cuda.so"

_POINTER, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_SCRATCH = [_POINTER, _SIZE, _POINTER]  # workspace, its bytes, stream
# csrc/flowrl.h, in its order
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "abi_version": (ctypes.c_int, []),
    "error_string": (ctypes.c_char_p, [ctypes.c_int]),
    "drop_lightest_workspace_size": (_LONG, [_LONG]),
    "drop_lightest": (ctypes.c_int, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, *_SCRATCH]),
    "block_lists_workspace_size": (_LONG, [_LONG, _LONG]),
    "block_lists": (ctypes.c_int, [_POINTER, _LONG, _LONG, *[_POINTER] * 5, *_SCRATCH]),
}


def load(path: Path, prefix: str = "flowrl_") -> dict[str, ctypes._NamedFuncPointer]:
    """The functions of a library built from csrc/, typed, by their names without the prefix. Needs no GPU.

    Raises:
        OSError: the file does not load.
        RuntimeError: it lacks a function, or was built from another version of the interface.
    """
    library = ctypes.CDLL(str(path))
    functions = {}
    for name, (result, arguments) in SIGNATURES.items():
        try:
            function = getattr(library, prefix + name)
        except AttributeError:
            raise RuntimeError(f"{path} has no {prefix}{name}: build it again (`make csrc`)") from None
        function.restype, function.argtypes = result, arguments
        functions[name] = function
        if name == "abi_version" and (found := function()) != ABI_VERSION:
            raise RuntimeError(f"{path} has ABI version {found}, this package needs {ABI_VERSION}: run `make csrc`")
    return functions


@cache
def _load() -> tuple[dict[str, ctypes._NamedFuncPointer] | None, str]:
    if not PATH.exists():
        return None, "not built (FLOWRL_BUILD_CUDA=1 pip install . or `make csrc`)"
    try:
        return load(PATH), str(PATH)
    except (OSError, RuntimeError) as error:
        return None, f"built, but does not load: {error}"


def status() -> tuple[bool, str]:
    """Whether the compiled library can be used, and what it is or why not."""
    functions, reason = _load()
    if functions is None:
        return False, reason
    if torch.version.cuda is None:
        return False, "built, but this torch is not a CUDA build"
    if not torch.cuda.is_available():
        return False, "built, but torch sees no CUDA device"
    return True, reason


def functions() -> dict[str, ctypes._NamedFuncPointer]:
    """The library's functions. Raises RuntimeError, with the reason, where it cannot be used."""
    available, reason = status()
    loaded = _load()[0]
    if not available or loaded is None:
        raise RuntimeError(f"the CUDA library cannot be used: {reason}")
    return loaded
