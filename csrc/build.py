"""Builds the CUDA library with nvcc: `python csrc/build.py [--out FILE]` (in place by default). Needs no GPU, no torch.

FLOWRL_CUDA_ARCHS  architectures, separated by commas or spaces; default 80,90a,100a,120. PTX for the first one is
                   included, so that cards which none of them covers compile it on first use.
CUDA_HOME          where bin/nvcc is, if not on the path.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ARCHS = ("80", "90a", "100a", "120")
SOURCE = Path(__file__).parent / "routing.cu"
IN_PLACE = Path(__file__).parent.parent / "flowrl_kernels" / "cuda" / "libflowrl_cuda.so"
# no fused multiply-add: the host build and torch round after every operation, and memory is the limit here anyway
FLAGS = [
    *("-std=c++17", "-O3", "-fmad=false", "-shared", "-cudart", "static", "-Werror", "all-warnings"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "-Xlinker", "--exclude-libs,ALL"),
]


def find_nvcc() -> str:
    """Path of nvcc. Raises FileNotFoundError, with what to do about it, where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(on_path)] if (on_path := shutil.which("nvcc")) else []
    places += [Path("/usr/local/cuda/bin/nvcc")]
    found = next((str(place) for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(
            "FLOWRL_BUILD_CUDA/make csrc: nvcc was found neither in CUDA_HOME/bin, nor on PATH, nor in "
            "/usr/local/cuda/bin. Install the CUDA toolkit (12.8 or newer for sm_100a and sm_120), set CUDA_HOME, or "
            "build without FLOWRL_BUILD_CUDA: everything works without this library."
        )
    return found


def chosen_archs() -> tuple[str, ...]:
    """Architectures of FLOWRL_CUDA_ARCHS. Raises ValueError for one that is not like 90 or 90a (sm_ is allowed)."""
    names = re.split(r"[,;\s]+", os.environ.get("FLOWRL_CUDA_ARCHS", ""))
    archs = tuple(name.removeprefix("sm_") for name in names if name) or ARCHS
    if wrong := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
        raise ValueError(f"FLOWRL_CUDA_ARCHS: wanted names like 80, 90a or sm_120, got {wrong[0]!r}")
    return archs


def build(out: Path = IN_PLACE, extra: Sequence[str] = ()) -> str:
    """Compile the library to `out`, with `extra` options; returns what the compiler said.

    Raises FileNotFoundError without nvcc, ValueError for a wrong FLOWRL_CUDA_ARCHS, RuntimeError if compiling fails.
    """
    archs = chosen_archs()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"
    command = [find_nvcc(), *FLAGS, *extra, *targets, ptx, "-o", str(out), str(SOURCE)]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IN_PLACE)
    chosen = parser.parse_args().out
    try:
        print(f"{build(chosen)}built {chosen}")
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
