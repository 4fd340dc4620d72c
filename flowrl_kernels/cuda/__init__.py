"""Loads the csrc library by its C ABI, or records why it cannot."""

from __future__ import annotations


def status() -> tuple[bool, str]:
    """Whether the compiled library is loaded, and what it is or why not."""
    return False, "not built (FLOWRL_BUILD_CUDA=1 pip install . or `make csrc`)"
