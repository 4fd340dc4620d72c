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
import tempfile
import textwrap
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

from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Budget, Chunks, Draw, Head, Needs, Saved, Sequences, Upstream
from flowrl_kernels.triton import tiles
from tests import machine_code
from tests.machine_code import Work

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes a block
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD, DLOGITS = "linear_logprob_kernels.forward_kernel", "linear_logprob_kernels.dlogits_kernel"
BOUNDED = tuple(f"bounded_kernels.{name}_kernel" for name in ("pairs", "products", "columns"))
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
    spills: int  # NVIDIA: bytes of the stack frame, where spills go, if the code loads from it; AMD: vector registers
    shared: int  # bytes
    mma: str
    tma: bool
    tf32: bool
    seconds: float = 0.0
    work: Work | None = None  # of a matrix kernel of 16-bit inputs on sm_90


def _nvidia(kernel) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [machine_code.tool("cuobjdump"), f"--dump-{what}", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        registers, stack = int(found[1]), int(found[2])
        if stack > 0 and not re.search(r"\bLDL\b", dump("sass")):
            stack = 0  # some loads by descriptor put zeros there, which nothing reads
    return registers, stack, kernel.asm["ptx"]


def _amd(kernel) -> tuple[int, int, str]:
    text = kernel.asm["amdgcn"]
    values = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    # scalar registers spill to lanes of vector ones, not to memory: not counted
    return values["vgpr_count"], values["vgpr_spill_count"], text


def describe(kernel, name: str, case: str, dtype: str, arch: str, seconds: float) -> Entry:
    registers, spills, text = _amd(kernel) if arch.startswith("gfx") else _nvidia(kernel)
    patterns = {
        "wgmma": r"wgmma\.mma_async",
        "tcgen05": r"tcgen05\.mma",
        "mma": r"\bmma\.sync",
        "mfma": r"v_mfma_",
    }
    mma = "+".join(label for label, pattern in patterns.items() if re.search(pattern, text))
    tma = "cp.async.bulk.tensor" in text
    read = arch == "sm_90" and "wgmma" in mma and name in (FORWARD, DLOGITS, *BOUNDED)
    return Entry(
        name, case, dtype, arch, registers, spills, kernel.metadata.shared, mma, tma, "tf32" in text,
        round(seconds, 1), machine_code.work(kernel.asm["cubin"]) if read else None,
    )  # fmt: skip


@contextlib.contextmanager
def compiling(
    arch: str, case: str, dtype: str, only: str | None = None, seen: set[str] | None = None
) -> Iterator[list[Entry]]:
    """Inside, every launch compiles for `arch` instead of running; entries not `seen` before appear in the list."""
    entries: list[Entry] = []
    seen = set() if seen is None else seen
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        name = f"{self.fn.__module__.removeprefix('flowrl_kernels.triton.')}.{self.fn.__name__}"
        if only is not None and only != name:
            return
        start = time.perf_counter()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            entries.append(describe(kernel, name, case, dtype, arch, time.perf_counter() - start))

    with (
        mock.patch.object(driver, "_active", Driver(arch)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "arch_of", return_value=arch),
        mock.patch.object(tiles, "num_programs", return_value=132),
        mock.patch("flowrl_kernels.triton.linear_logprob.matmul_into"),
        mock.patch("flowrl_kernels.triton.linear_logprob.exact_matmul", contextlib.nullcontext),
        mock.patch("flowrl_kernels.triton.bounded.matmul_into"),
        mock.patch("flowrl_kernels.triton.bounded.read_plan", lambda plan, *_: (True, active_blocks(plan))),
        mock.patch("flowrl_kernels.triton.sampled.matmul_into"),
        mock.patch(
            "flowrl_kernels.triton.sampled.read_edges", lambda first: [8192 // 256 * run for run in range(len(first))]
        ),
        mock.patch("flowrl_kernels.triton.linear_residual.matmul_into"),
        mock.patch("flowrl_kernels.triton.linear_residual.exact_matmul", contextlib.nullcontext),
        torch.device("meta"),
    ):
        yield entries


def active_blocks(plan) -> list[int]:
    """First blocks of a plan that fills several slabs: half of all pairs."""
    rows, num_tiles = plan.active.shape
    return [rows // 256 * tile for tile in range(num_tiles + 1)]


def linear_logprob(
    dtype, h=3584, v=152064, bias=False, softcap=None, entropy=True, stats=True, ids=0, statistics=False
) -> None:
    from flowrl_kernels.core.types import RowStatistics
    from flowrl_kernels.triton import linear_logprob as op

    n = 8192
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
    target, temperature = torch.empty((n, ids) if ids else n, dtype=torch.int64), torch.empty(1)
    head = Head(weight, torch.empty(v, dtype=dtype) if bias else None, temperature, 1.0, softcap)
    into = RowStatistics(torch.empty(n, dtype=torch.int64), torch.empty(n)) if statistics else None
    out = op.linear_logprob_fwd(hidden, target, head, entropy, stats, statistics=into)
    op.linear_logprob_bwd(
        Upstream(out[0], out[2] if entropy else None), hidden, target, head, Saved(*out), Needs(True, True, bias)
    )


def bounded(dtype, h=3584, v=152064, more=False, budget=None) -> None:
    """The bounded backward; `more`: with a bias and into a main_grad."""
    from flowrl_kernels.triton import linear_logprob as op

    n = 8192
    hidden, weight, grad = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype), torch.empty(n)
    b = torch.empty(v, dtype=dtype) if more else None
    op.linear_logprob_bwd(
        Upstream(grad), hidden, torch.empty(n, dtype=torch.int64), Head(weight, b, torch.empty(1)),
        Saved(grad, torch.empty(2, n), grad, torch.empty(-(-v // 128), n, dtype=torch.float16)),
        Needs(True, True, more), budget or Budget(0.01), torch.empty(v, h) if more else None,
    )  # fmt: skip


def kept(dtype, h=3584, v=152064, more=False) -> None:
    """Over 20 ids a row; `more`: with a bias, a softcap and into a main_grad."""
    from flowrl_kernels.chunked.kept_lists import Lists
    from flowrl_kernels.triton import linear_logprob_kept as op

    n, entries = 8192, 8192 * 21
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
    lists = Lists(*(torch.empty(size, dtype=torch.int64) for size in (entries, entries, n + 1, n)))
    head = Head(weight, torch.empty(v, dtype=dtype) if more else None, torch.empty(1), 1.0, 30.0 if more else None)
    saved, z = op.linear_logprob_kept_fwd(hidden, lists, head, more)
    grad, need = Upstream(saved.logp, saved.entropy if more else None), Needs(True, True, more)
    main_grad = torch.empty(v, h) if more else None
    op.linear_logprob_kept_bwd(grad, hidden, lists, z, head, saved, need, main_grad)


def sampled(dtype, **settings) -> None:
    """The sampled backward: the same kernels over runs of 128 columns, with a factor for each pair."""
    bounded(dtype, **settings, budget=Budget(draw=Draw(0.1, 0)))


def logprob(dtype, v=152064, softcap=None, entropy=True) -> None:
    from flowrl_kernels.triton import logprob as op

    logits, target, temperature = (
        torch.empty(8192, v, dtype=dtype),
        torch.empty(8192, dtype=torch.int64),
        torch.empty(1),
    )
    out = op.logprob_fwd(logits, target, temperature, softcap, entropy)
    op.logprob_bwd(out[0], out[0] if entropy else None, logits, target, temperature, softcap, *out, False)


def residual(dtype, preset="paper", packed=False) -> None:
    from flowrl_kernels.presets import named
    from flowrl_kernels.triton import residual as op

    sequences, slots = 256, 8192
    shape = (sequences * slots,) if packed else (sequences, slots)
    row = named(preset)
    logp, anchor, old = (torch.empty(shape, dtype=dtype) for _ in range(3))
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int64) if packed else None
    groups = torch.empty(sequences, dtype=torch.int64) if row.log_z in ("group", "through") else None
    log_z = torch.empty(sequences) if groups is None else None
    mask = torch.empty(shape, dtype=torch.bool)
    each = Sequences(torch.empty(sequences), log_z, groups, None)
    op.residual_fwd(row, logp, Anchors(anchor, old, None), each, Segments(mask, cu_seqlens))


def linear_residual(dtype, h=3584, v=152064, softcap=None) -> None:
    """One chunk of whole sequences. A host sync anywhere would raise: meta tensors have no values."""
    from flowrl_kernels.presets import named
    from flowrl_kernels.triton import linear_residual as op

    n, sequences = 4096, 8
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
    target, mask = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.bool)
    ref, old, each = torch.empty(n), torch.empty(n), torch.empty(sequences)
    op.linear_residual_fwd(
        named("paper"), hidden, target, Head(weight, None, torch.empty(1), 1.0, softcap), Anchors(ref, old, None),
        Sequences(each, each, None, torch.empty(1)), Segments(mask, torch.empty(sequences + 1, dtype=torch.int64)),
        Chunks(n, [0, n], [0, sequences]), Needs(True, True, False),
    )  # fmt: skip


# every flag that changes the code, on and off, and the path without descriptors
CASES: dict[str, Callable[[torch.dtype], None]] = {
    "plain": lambda t: linear_logprob(t, entropy=False, stats=False),
    "stats": lambda t: linear_logprob(t, entropy=False),
    "entropy+stats": lambda t: linear_logprob(t),
    "bias": lambda t: linear_logprob(t, bias=True),
    "softcap": lambda t: linear_logprob(t, softcap=30.0),
    "odd H": lambda t: linear_logprob(t, h=3583),
    "bounded": lambda t: bounded(t),
    "bounded, bias, main_grad": lambda t: bounded(t, more=True),
    "bounded, odd H": lambda t: bounded(t, h=3583),
    "kept": lambda t: kept(t),
    "kept, bias, softcap, main_grad": lambda t: kept(t, more=True),
    "sampled": lambda t: sampled(t),
    "sampled, bias, main_grad": lambda t: sampled(t, more=True),
    "sampled, odd H": lambda t: sampled(t, h=3583),
    "logits": lambda t: logprob(t),
    "logits plain": lambda t: logprob(t, entropy=False),
    "logits softcap, odd V": lambda t: logprob(t, v=151937, softcap=30.0),
    "single pass": lambda t: linear_residual(t),
    "single pass, softcap": lambda t: linear_residual(t, softcap=30.0),
    "residual": lambda t: residual(t),
    "residual, groups": lambda t: residual(t, preset="group", packed=True),
}
# what `make test` compiles: each kernel once per architecture as it is shipped, and the float32 forward for its PTX
QUICK = [
    ("entropy+stats", "bf16", None),
    ("single pass", "bf16", None),
    ("bounded", "bf16", None),
    ("kept, bias, softcap, main_grad", "bf16", None),
    ("logits", "bf16", None),
    ("residual, groups", "bf16", None),
    ("plain", "fp32", FORWARD),
]
# what the machine code's budgets are kept for, on sm_90, and on top of QUICK compiled for it: the forward and the
# backward as most calls take them
BUDGETED = ("plain", "stats", "entropy+stats", "softcap", "single pass", "bounded")
PLAIN = ("plain", "bf16", None)


def compile_case(
    case: str, dtype: str, arch: str, only: str | None = None, seen: set[str] | None = None
) -> list[Entry]:
    with compiling(arch, case, dtype, only, seen) as entries:
        CASES[case](DTYPES[dtype])
    return entries


def faults(entry: Entry, spills: int = 0) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is. `spills`: bytes let pass."""
    found = []
    matrix = entry.kernel in (FORWARD, DLOGITS, *BOUNDED)
    if entry.spills > spills:
        found.append(f"spills {entry.spills}")
    if entry.shared > SHARED_LIMIT[entry.arch]:
        found.append(f"shared memory {entry.shared} over {SHARED_LIMIT[entry.arch]}")
    if entry.dtype == "fp32" and (entry.tf32 or (entry.mma and not entry.arch.startswith("gfx"))):
        found.append("float32 goes through tensor cores")  # gfx942 has float32 matrix instructions
    if matrix and entry.dtype != "fp32":
        wanted = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}.get(entry.arch, "mma")
        if wanted not in entry.mma.split("+"):
            found.append(f"no {wanted} (found {entry.mma or 'none'})")
        if entry.arch in ("sm_90", "sm_100", "sm_120") and not entry.case.endswith("odd H") and not entry.tma:
            found.append("no loads by tensor descriptor")
    if entry.work is not None and not entry.case.endswith("odd H"):
        found += machine_code.faults(
            entry.work, entry.kernel, entry.case,
            entry.kernel == FORWARD or (entry.kernel == DLOGITS and entry.case != "bias"),
        )  # fmt: skip
    return found


def everything(archs: list[str], cases: list[str]) -> list[Entry]:
    """Every case, dtype and architecture; a kernel that several cases share is listed under the first."""
    entries: list[Entry] = []
    for arch in archs:
        seen: set[str] = set()
        for case in cases:
            for dtype in DTYPES:
                found = compile_case(case, dtype, arch, None, seen)
                entries += found
                for e in found:
                    size = f"{e.registers:4} registers {e.shared:7} B {e.mma:8}"
                    print(f"{arch:7} {dtype:5} {case:22} {e.kernel:40} {size} {'; '.join(faults(e))}", flush=True)
    return entries


def load() -> dict[str, list[Entry]]:
    """The committed table: triton version -> entries."""
    if not JSON.exists():
        return {}
    return {version: [Entry(*row) for row in rows] for version, rows in json.loads(JSON.read_text())["triton"].items()}


def save(table: dict[str, list[Entry]]) -> None:
    lines = []
    for version in sorted(table):
        rows = ",\n".join("   " + json.dumps(list(entry[:-2])) for entry in table[version])
        lines.append(f'  "{version}": [\n{rows}\n  ]')
    fields = json.dumps(list(Entry._fields[:-2]))
    JSON.write_text('{\n "fields": ' + fields + ',\n "triton": {\n' + ",\n".join(lines) + "\n }\n}\n")
    TABLE.write_text(markdown(table))


PINNED = "3.7.1"
# versions, and architectures of the pinned one, compiled before the kernels last changed: after --write, edit by hand
OLDER_VERSIONS = ("3.6.0", "3.9.0")
OLDER_ARCHS: tuple[str, ...] = ("sm_80", "sm_100", "sm_120", "gfx942")


def _filled(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _summary(entries: list[Entry]) -> list[str]:
    """One line an architecture: how many kernels, and how near the machine's limits they come."""
    columns = [
        "",
        "kernels",
        "with matrix instructions",
        "most shared memory, of the limit",
        "most registers",
        "spilling",
    ]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for arch, limit in SHARED_LIMIT.items():
        own = [e for e in entries if e.arch == arch]
        shared = max(e.shared for e in own)
        spilled = sum(bool(e.spills) for e in own)
        cells = [arch, len(own), sum(bool(e.mma) for e in own), f"{shared / 1024:.0f} of {limit / 1024:.0f} KB"]
        rows.append("| " + " | ".join(map(str, [*cells, max(e.registers for e in own), spilled or "none"])) + " |")
    return rows


def _older() -> list[str]:
    """What of the table the kernels as they are have not been compiled for again; nothing if it is whole."""
    older = [f"triton {version}" for version in OLDER_VERSIONS]
    older += [f"{arch} under triton {PINNED}" for arch in OLDER_ARCHS]
    if not older:
        return []
    text = "Compiled before the kernels last changed, and not again since: " + ", ".join(older) + "."
    return ["", _filled(text + " Kernels that are gone are left out of those.")]


def markdown(table: dict[str, list[Entry]]) -> str:
    versions = sorted(table)
    text = [
        "# Compile matrix",
        "",
        _filled(
            "What the Triton kernels compile to, without a GPU: this says what the machine code is, not how fast it "
            "runs. Written by `make matrix` (`python -m tests.compile_matrix --write`); every row is in "
            "`tests/compile_matrix.json`. Shape: N = 8192, H = 3584 (3583 where odd), V = 152064 (151937 where odd); "
            "residual 256 x 8192. `make test` compiles bfloat16 "
            + ", ".join(f"`{case}`" for case, dtype, _ in QUICK if dtype == "bf16")
            + "."
        ),
        "",
        f"Under triton {PINNED}, which `constraints.txt` pins:",
        "",
        *_summary(table[PINNED]),
        *_older(),
        "",
        "## Every kernel",
        "",
        _filled(
            "A cell reads: registers a thread, shared memory, spills where there are any (NVIDIA: bytes of a "
            "thread's stack frame, which is where they go, if the code loads from there; AMD: vector registers). "
            "`float16` compiles like `bfloat16` and is in the JSON only. float32 multiplies without tensor cores; on "
            "gfx942 with its float32 matrix instructions."
        ),
    ]
    for arch in TARGETS:
        columns = ["kernel", "case", "dtype", "matrix instructions", *(f"triton {v}" for v in versions)]
        text += ["", f"### {arch}", "", '<details markdown="1">', f"<summary>kernels on {arch}</summary>", ""]
        text += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        cells: dict[tuple, dict[str, str]] = {}
        for version in versions:
            for e in table[version]:
                if e.arch == arch and e.dtype != "fp16":
                    spilled = f", **spills {e.spills}**" if e.spills else ""
                    key = (e.kernel, e.case, e.dtype, e.mma + (" + TMA" if e.tma else ""))
                    cells.setdefault(key, {})[version] = f"{e.registers}, {e.shared / 1024:.0f} KB{spilled}"
        for key, row in sorted(cells.items()):
            text.append("| " + " | ".join(key) + " | " + " | ".join(row.get(v, "") for v in versions) + " |")
        text += ["", "</details>"]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for every architecture without a GPU.")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--write", action="store_true", help="replace this triton version's part of the committed table"
    )
    parser.add_argument(
        "--budget", action="store_true", help="only sm_90, bf16: replace the committed budgets of its machine code"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    if options.budget:
        seen: set[str] = set()
        made = [e for case in BUDGETED for e in compile_case(case, "bf16", "sm_90", None, seen) if e.work is not None]
        machine_code.save({(e.kernel, e.case): e.work for e in made if e.work is not None})
        for e in made:
            print(e.kernel, e.case, e.work, *faults(e), sep="\n  ")
        return
    entries = everything(options.arch, options.case)
    print(f"triton {triton.__version__}: {len(entries)} kernels in {time.perf_counter() - start:.0f} s")
    if options.write:
        table, version = load(), triton.__version__
        kept = [e for e in table.get(version, []) if e.arch not in options.arch or e.case not in options.case]
        save({**table, version: kept + entries})


if __name__ == "__main__":
    main()
