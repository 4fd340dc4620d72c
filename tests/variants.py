"""Kernels with one thing changed, made from their own source: what a test proves about the difference.

The change is made in the text, so that it follows the kernel; a text that is no longer there is an error.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

from flowrl_kernels.triton import linear_logprob_kernels

MERGED = re.compile(
    r"    for step in tl\.range\(0, mine \* tiles_per_split, flatten=FLATTEN\):\n"
    r"        item = (.*)step // tiles_per_split(.*)\n"
    r"        i_tile = step % tiles_per_split\n"
    r"(.*?)(?=\n\n\n@triton\.jit)",
    re.DOTALL,
)


def kernels(change, folder: Path) -> ModuleType:
    """The module of linear_logprob's kernels with `change` of its text, from a file of its own (triton reads it)."""
    text = Path(linear_logprob_kernels.__file__).read_text()
    changed = change(text)
    assert changed != text, "the text that a variant changes is gone"
    path = folder / "variant.py"
    path.write_text(changed)
    spec = importlib.util.spec_from_file_location("variant", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def three_loops(text: str) -> str:
    """The forward with a loop of its own over a split's tiles: the bits are the same, nothing can be flattened."""
    return MERGED.sub(
        lambda found: (
            "    for turn in tl.range(0, mine, flatten=FLATTEN):\n"
            "        for i_tile in range(tiles_per_split):\n"
            f"            item = {found[1]}turn{found[2]}\n" + textwrap.indent(found[3], "    ")
        ),
        text,
    )


def unflattened(text: str) -> str:
    return text.replace(", flatten=FLATTEN)", ")")
