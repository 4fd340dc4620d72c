"""Compile every Triton kernel for every architecture without a GPU: `python -m tests.compile_matrix --help`.

The launchers run on meta tensors under a stand-in driver, so what is compiled is what would be launched: block
sizes, specialisations and options included. Recorded per kernel: registers, spills, shared memory, and which matrix
instructions the machine code holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from flowrl_kernels.triton import tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes a block
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
JSON = Path(__file__).with_suffix(".json")
TABLE = Path(__file__).parents[1] / "docs" / "compile_matrix.md"


class Driver:
    """Stands where the GPU's driver would: knows a target, can launch nothing."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]


class Entry(NamedTuple):
    """One compiled kernel. `mma`: the matrix instructions found, joined by '+'."""

    kernel: str
    case: str
    dtype: str
    arch: str
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes
    mma: str
    tma: bool
    tf32: bool
    seconds: float


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(kernel, arch: str) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    return registers, stack, kernel.asm["ptx"]


def _amd(kernel) -> tuple[int, int, str]:
    text = kernel.asm["amdgcn"]
    values = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    # scalar registers spill to lanes of vector ones, not to memory: not counted
    return values["vgpr_count"], values["vgpr_spill_count"], text


def describe(kernel, name: str, case: str, dtype: str, arch: str, seconds: float) -> Entry:
    registers, spills, text = _amd(kernel) if arch.startswith("gfx") else _nvidia(kernel, arch)
    patterns = {
        "wgmma": r"wgmma\.mma_async",
        "tcgen05": r"tcgen05\.mma",
        "mma": r"\bmma\.sync",
        "mfma": r"v_mfma_",
    }
    mma = "+".join(label for label, pattern in patterns.items() if re.search(pattern, text))
    tma = "cp.async.bulk.tensor" in text
    return Entry(
        name, case, dtype, arch, registers, spills, kernel.metadata.shared, mma, tma, "tf32" in text, round(seconds, 1)
    )


@contextlib.contextmanager
def compiling(arch: str, case: str, dtype: str, only: str | None = None) -> Iterator[list[Entry]]:
    """Inside, every launch compiles for `arch` instead of running; the entries appear in the list."""
    entries: list[Entry] = []
    seen: set[int] = set()
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        name = f"{self.fn.__module__.removeprefix('flowrl_kernels.triton.')}.{self.fn.__name__}"
        if only is not None and only != name:
            return
        start = time.perf_counter()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            entries.append(describe(kernel, name, case, dtype, arch, time.perf_counter() - start))

    driver.set_active(Driver(arch))
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "arch_of", lambda device: arch),
        mock.patch.object(tiles, "num_programs", lambda device, tile: 132),
        mock.patch("flowrl_kernels.triton.linear_logprob.matmul_into"),
        mock.patch("flowrl_kernels.triton.linear_logprob.exact_matmul", contextlib.nullcontext),
        torch.device("meta"),
    ):
        yield entries


def linear_logprob(dtype, h=3584, v=152064, bias=False, softcap=None, entropy=True, stats=True) -> None:
    from flowrl_kernels.triton import linear_logprob as op

    n = 8192
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
    target, temperature = torch.empty(n, dtype=torch.int64), torch.empty(1)
    b = torch.empty(v, dtype=dtype) if bias else None
    out = op.linear_logprob_fwd(hidden, weight, target, b, temperature, 1.0, softcap, entropy, stats)
    op.linear_logprob_bwd(
        out[1], out[1] if entropy else None, hidden, weight, target, b, temperature, 1.0, softcap,
        out[1], out[2], out[3], 0.0, None, None, True, True, bias,
    )  # fmt: skip


def logprob(dtype, v=152064, softcap=None, entropy=True) -> None:
    from flowrl_kernels.triton import logprob as op

    logits, target, temperature = torch.empty(8192, v, dtype=dtype), torch.empty(8192, dtype=torch.int64), torch.empty(1)
    out = op.logprob_fwd(logits, target, temperature, softcap, entropy)
    op.logprob_bwd(out[1], out[1] if entropy else None, logits, target, temperature, softcap, out[1], out[2], False)


# every flag that changes the code, on and off, and the path without descriptors
CASES: dict[str, Callable[[torch.dtype], None]] = {
    "plain": lambda t: linear_logprob(t, entropy=False, stats=False),
    "stats": lambda t: linear_logprob(t, entropy=False),
    "entropy+stats": lambda t: linear_logprob(t),
    "bias": lambda t: linear_logprob(t, bias=True),
    "softcap": lambda t: linear_logprob(t, softcap=30.0),
    "odd H": lambda t: linear_logprob(t, h=3583),
    "logits": lambda t: logprob(t),
    "logits plain": lambda t: logprob(t, entropy=False),
    "logits softcap, odd V": lambda t: logprob(t, v=151937, softcap=30.0),
}
# what `make test` compiles: each kernel once per architecture as it is shipped, and the float32 forward for its PTX
QUICK = [("entropy+stats", "bf16", None), ("logits", "bf16", None), ("plain", "fp32", "linear_logprob.forward_kernel")]


def compile_case(case: str, dtype: str, arch: str, only: str | None = None) -> list[Entry]:
    with compiling(arch, case, dtype, only) as entries:
        CASES[case](DTYPES[dtype])
    return entries


def faults(entry: Entry) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = []
    matrix = entry.kernel in ("linear_logprob.forward_kernel", "linear_logprob.dlogits_kernel")
    if entry.spills:
        found.append(f"spills {entry.spills}")
    if entry.shared > SHARED_LIMIT[entry.arch]:
        found.append(f"shared memory {entry.shared} over {SHARED_LIMIT[entry.arch]}")
    if entry.dtype == "fp32" and (entry.tf32 or (entry.mma and not entry.arch.startswith("gfx"))):
        found.append("float32 goes through tensor cores")
    if matrix and entry.dtype != "fp32":
        wanted = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}.get(entry.arch, "mma")
        if wanted not in entry.mma.split("+"):
            found.append(f"no {wanted} (found {entry.mma or 'none'})")
        if entry.arch in ("sm_90", "sm_100", "sm_120") and entry.case != "odd H" and not entry.tma:
            found.append("no tensor-memory loads")
    return found
