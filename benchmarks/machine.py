"""What the numbers were taken on: hardware, versions, load, and the ceilings that the machine itself reaches."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import flowrl_kernels
from benchmarks.peers import version_of

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "flowrl-kernels", "liger-kernel", "cut-cross-entropy", "trl", "verl",
    "quack-kernels",
)  # fmt: skip


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _git(*arguments: str) -> str | None:
    try:
        made = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=20, cwd=Path(__file__).resolve().parent.parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return made.stdout.strip() if made.returncode == 0 else None


def describe(device: str) -> dict:
    """The machine as it goes into the JSON. No host name, user or path."""
    made = {
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        made["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "capability": list(torch.cuda.get_device_capability(0)),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return made


def versions() -> dict[str, str]:
    found = {name: version_of(name) for name in PACKAGES}
    found["torch"] = torch.__version__
    found["flowrl-kernels"] = flowrl_kernels.__version__  # a copy on the path has no metadata
    return {name: version for name, version in found.items() if version}


def commit() -> dict:
    """The commit, and whether the library's or the benchmark's files differ from it; COMMIT= names it for a copy
    without git."""
    changed = _git("status", "--porcelain", "--", "flowrl_kernels", "benchmarks")
    found = _git("rev-parse", "HEAD") or os.environ.get("COMMIT")
    return {"commit": found, "dirty": bool(changed) if changed is not None else None}


def load() -> list[float] | None:
    """1, 5 and 15 minute load averages: says whether others kept the machine busy."""
    try:
        return [round(x, 2) for x in os.getloadavg()]
    except OSError:
        return None


def _best(run, repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            before = time.perf_counter()
            run()
            times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def ceilings(device: str, quick: bool) -> dict[str, float]:
    """Measured rates on random data: a large matrix product (FLOP/s) and a large copy (bytes read + written per s)."""
    if device == "cuda":
        size, dtype, elements = 8192, torch.bfloat16, 1 << 31
    else:
        size, dtype, elements = (512 if quick else 2048), torch.float32, 1 << (22 if quick else 26)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    repeats = 20 if device == "cuda" else 3
    for _ in range(3):
        torch.mm(left, right, out=out)
    product = _best(lambda: torch.mm(left, right, out=out), repeats, device)
    source = torch.empty(elements, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    source.normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    copy = _best(lambda: target.copy_(source), repeats, device)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    return {
        f"matmul_{name}_flops": 2.0 * size**3 / product,
        "copy_bytes_per_s": 2.0 * source.numel() * source.element_size() / copy,
        "matmul_size": size,
    }
