"""Predicted times of the GPU cases, from what the kernels' machine code does; nothing here was measured on a GPU.

    python -m benchmarks.model            # prints the tables
    python -m benchmarks.model --write    # benchmarks/predicted.json and docs/benchmarks/predicted.md

A tile of the matrix kernels costs the cycles of its matrix instructions, which no program can beat, and those in which
they wait: while the last one drains, while the epilogue issues, while a store is staged. Instructions, stores and
whether the loops are flattened are read from the machine code (tests/machine_code.json); what a wait costs, and the
rate of matrix instructions that never wait, are assumed below and stay assumed until a GPU has been asked. Beside each
prediction stands what was measured, where a committed result of benchmarks/results/ has the case.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.cases import CASES, HEADS, Case
from benchmarks.plots import committed

ROOT = Path(__file__).parents[1]
COUNTS = ROOT / "tests" / "machine_code.json"
OUT = Path(__file__).with_name("predicted.json")
PAGE = ROOT / "docs" / "benchmarks" / "predicted.md"
RESULTS = Path(__file__).with_name("results")

# Assumed. FLOP/s of matrix instructions that never wait, at the clock that the power limit leaves (670 to 760)
RATE = 720e12
# cycles of two warp groups' matrix instructions in one step along H: each 64 x 256 x 64
STEP, BLOCK_M, BLOCK_N, BLOCK_K = 1024, 128, 256, 64
WARPS = 2  # share a scheduler, which issues one instruction a cycle
DRAIN = 1700  # cycles until loads and products are under way again after a tile whose loops are not flattened
LATENCY = 1000  # cycles a tile between the last product and the first of the next beside what is issued
STORE = 300  # cycles until a tile's part may be staged over the last one
LOADS = 1000  # cycles of loads that wait for one another between the product and what needs them
TAIL = {"forward": 0.985, "dlogits": 0.99}  # the share of the time that all multiprocessors run
DX, DW = 705e12, 735e12  # FLOP/s of the backward's two products, by cuBLAS
COPY = 0.9  # of the memory's bandwidth, by the kernels that only move
LAUNCH = 5e-6
SLAB_COLUMNS, SLAB_BYTES = 32768, 2 << 30  # flowrl_kernels/triton/linear_logprob.py


class Card(NamedTuple):
    name: str
    processors: int
    bandwidth: float  # bytes/s of device memory, read and written


H100, H200 = Card("H100", 132, 2.85e12), Card("H200", 132, 4.0e12)


class Kernel(NamedTuple):
    """What a tile of a matrix kernel does beside its products, a warp."""

    instructions: int
    flattened: bool = True
    stores: int = 0
    loads_wait: bool = False
    step: int = 0  # instructions a step along H


# counts of 0.2.0's kernels, and of dlogits with its loops flattened and the target's column behind a branch
BEFORE = {
    ("forward", "plain"): Kernel(1124, False),
    ("forward", "stats"): Kernel(1325, False),
    ("forward", "entropy+stats"): Kernel(1759, False),
    ("forward", "softcap"): Kernel(3949, False),
    ("forward", "single pass"): Kernel(1274, False, 4),
    ("dlogits", "plain"): Kernel(1869, False, 2, True),
    ("dlogits", "entropy+stats"): Kernel(2154, False, 2, True),
}
BETWEEN = Kernel(1063, True, 2, True)


def counted() -> dict[tuple[str, str], Kernel]:
    """The matrix kernels as they are, by (kernel, case), from the committed counts."""
    made = {}
    for row in json.loads(COUNTS.read_text())["rows"]:
        room, _, name = row["kernel"].rpartition(".")
        if room == "linear_logprob_kernels":
            work = row["work"]
            waits = name == "dlogits_kernel" and work["loads"] > 0
            made[name.removesuffix("_kernel"), row["case"]] = Kernel(
                work["start"] + work["epilogue"], work["flattened"], work["stores"], waits, work["step"]
            )
    return made


def efficiency(kernel: Kernel, hidden: int) -> float:
    """The share of a tile's cycles that its matrix instructions run."""
    products = max(STEP, WARPS * kernel.step) * math.ceil(hidden / BLOCK_K)
    waits = LATENCY + WARPS * kernel.instructions + STORE * kernel.stores
    waits += (0 if kernel.flattened else DRAIN) + (LOADS if kernel.loads_wait else 0)
    return products / (products + waits)


def split_before(hidden: int, vocab: int) -> int:
    """Tiles a split in 0.2.0."""
    return max(8, math.ceil(math.ceil(vocab / BLOCK_N) / 128))


def split_now(hidden: int, vocab: int) -> int:
    """Tiles a split, by the rule of the kernels."""
    from flowrl_kernels.triton import tiles

    return tiles.splits("sm_90", hidden, vocab, BLOCK_N)[1]


def waves(rows: int, vocab: int, per_split: int, padded: bool, hidden: int, programs: int) -> float:
    """Ideal over worst: an even share of all tiles, and those of the program that has most.

    padded: a last split that is shorter costs as much as the others. Else what it costs depends on who gets it: work
    items in the order of the raster, dealt to the programs in turn.
    """
    blocks, tiles = -(-rows // BLOCK_M), -(-vocab // BLOCK_N)
    splits = -(-tiles // per_split)
    if padded:
        return blocks * tiles / programs / (per_split * -(-blocks * splits // programs))
    group = max(4, (16 << 20) // (BLOCK_M * hidden * 2))
    load = [0] * programs
    for item in range(blocks * splits):
        height = min(blocks - item // (group * splits) * group, group)
        load[item % programs] += min(per_split, tiles - item % (group * splits) // height * per_split)
    return blocks * tiles / programs / max(load)


def forward_rate(kernel: Kernel, rows: int, hidden: int, vocab: int, busy: float) -> float:
    """FLOP/s of the forward where the busiest program is `busy` of its time on what an even share would be."""
    return RATE * efficiency(kernel, hidden) * busy * TAIL["forward"] * (rows / BLOCK_M) / -(-rows // BLOCK_M)


def slabs(rows: int, vocab: int, programs: int) -> tuple[int, float]:
    """How many slabs of the vocabulary the backward takes, and ideal over worst of their tiles."""
    most = min(SLAB_COLUMNS, SLAB_BYTES // (rows * 2))
    count = -(-vocab // most)
    columns = -(-vocab // (count * BLOCK_N)) * BLOCK_N
    tiles = [-(-rows // BLOCK_M) * -(-min(columns, vocab - begin) // BLOCK_N) for begin in range(0, vocab, columns)]
    return len(tiles), sum(tiles) / programs / sum(-(-t // programs) for t in tiles)


def seconds(case: Case, card: Card, kernels: dict[tuple[str, str], Kernel]) -> dict[str, float] | None:
    """Of a case's forward and of its forward and backward; None where the batch decides, as in the bounded backward."""
    n, h, v = case.n, case.h, case.v
    if case.op in ("logprob", "residual"):
        return {what: count / (COPY * card.bandwidth) + LAUNCH for what, count in case.bytes().items()}
    if case.epsilon:
        return None
    product = 2.0 * n * h * v
    busy = waves(n, v, split_now(h, v), True, h, card.processors)
    gathered = (4.0 * n * h + 16.0 * n * -(-v // (BLOCK_N * split_now(h, v)))) / (COPY * card.bandwidth)
    if case.op == "flowrl_loss":
        forward = product / forward_rate(kernels["forward", "single pass"], n, h, v, busy) + gathered
        in_place = 6.0 * n * v / card.bandwidth
        gradients = product * (2 if case.train_head else 1) / DW
        return {"forward": forward + in_place + gradients + 0.3e-3, "step": forward + in_place + gradients + 0.3e-3}
    what = "entropy+stats" if case.entropy else "plain"
    forward = product / forward_rate(kernels["forward", what], n, h, v, busy) + gathered + 4 * LAUNCH
    count, share = slabs(n, v, card.processors)
    rate = RATE * efficiency(kernels["dlogits", what], h) * share * TAIL["dlogits"]
    moved = 4.0 * n * h / (COPY * card.bandwidth)
    back = product / rate + product / DX + (product / DW if case.train_head else 0.0) + moved + 4 * count * LAUNCH
    return {"forward": forward, "step": forward + back}


def measured(name: str) -> dict[str, float]:
    """Median seconds by "card: forward" and "card: step" from committed results; empty while there is none."""
    found = {}
    for _, document in committed(RESULTS):
        gpu = document.get("machine", {}).get("gpu")
        for case in document.get("cases", []) if gpu else []:
            if case.get("name") != name:
                continue
            ours = [e for key, e in case.get("implementations", {}).items() if key.startswith("ours-triton")]
            for entry in ours:
                for what in ("forward", "step"):
                    if entry.get("status") == "ok" and what in entry:
                        least = found.get(f"{gpu['name']}: {what}", math.inf)
                        found[f"{gpu['name']}: {what}"] = min(least, entry[what]["median_s"])
    return found


def cases() -> list[dict]:
    kernels, made = counted(), []
    for case in CASES.values():
        if case.device != "cuda":
            continue
        entry: dict = {
            "case": case.name,
            "flops": case.flops(),
            "bytes": case.bytes(),
            "measured_s": measured(case.name),
        }
        for card in (H100, H200):
            predicted = seconds(case, card, kernels)
            entry[card.name] = predicted and {what: float(f"{value:.4g}") for what, value in predicted.items()}
        made.append(entry)
    return made


TOKENS = (256, 1024, 2048, 4096, 8192, 16384, 32768)


def forward_steps() -> list[dict]:
    """TFLOP/s of the forward for each head and batch: before, with today's splits, with flattened loops."""
    now, made = counted(), []
    for head, (h, v) in HEADS.items():
        for n in TOKENS:
            old = waves(n, v, split_before(h, v), False, h, H100.processors)
            new = waves(n, v, split_now(h, v), True, h, H100.processors)
            before = BEFORE["forward", "plain"]
            rates = [
                forward_rate(before, n, h, v, old),
                forward_rate(before, n, h, v, new),
                forward_rate(now["forward", "plain"], n, h, v, new),
            ]
            made.append(
                {
                    "head": head, "n": n, "tiles_a_split": split_now(h, v), "busy_before": round(old, 3),
                    "busy": round(new, 3), "tflops": [round(rate / 1e12, 1) for rate in rates],
                }
            )  # fmt: skip
    return made


def dlogits_steps() -> list[dict]:
    """TFLOP/s of dlogits at 8192 tokens: before, flattened with a target's column apart, with loads ahead as well."""
    now, made = counted(), []
    for head, (h, v) in HEADS.items():
        share = slabs(8192, v, H100.processors)[1]
        kernels = (BEFORE["dlogits", "plain"], BETWEEN, now["dlogits", "plain"])
        rates = [RATE * efficiency(kernel, h) * share * TAIL["dlogits"] / 1e12 for kernel in kernels]
        made.append({"head": head, "busy": round(share, 3), "tflops": [round(rate, 1) for rate in rates]})
    return made


def document() -> dict:
    return {
        "kind": "predicted, not measured",
        "assumed": {
            "rate": RATE, "drain_cycles": DRAIN, "latency_cycles": LATENCY, "store_cycles": STORE,
            "load_cycles": LOADS, "dx": DX, "dw": DW, "copy": COPY,
            "cards": [card._asdict() for card in (H100, H200)],
        },
        "cases": cases(), "forward": forward_steps(), "dlogits": dlogits_steps(),
    }  # fmt: skip


def _ms(entry: dict | None, what: str) -> str:
    return "-" if entry is None else f"{entry[what] * 1e3:.3g}"


def tables(made: dict) -> str:
    """The generated part of the page."""
    rows = []
    for entry in made["cases"]:
        real = "; ".join(f"{what} {value * 1e3:.3g}" for what, value in entry["measured_s"].items())
        times = [_ms(entry[card], what) for card in ("H100", "H200") for what in ("forward", "step")]
        rows.append((f"`{entry['case']}`", *times, real or "none yet"))
    header = ("case", "H100 forward", "H100 step", "H200 forward", "H200 step", "measured")
    parts = ["## Every case (predicted, ms)", report.markdown(header, rows)]
    forward = [
        (
            e["head"], str(e["n"]), *(f"{rate:.0f}" for rate in e["tflops"]), f"{e['tflops'][-1] / e['tflops'][0]:.3f}",
            f"{e['busy_before']:.3f}", f"{e['busy']:.3f}",
        )
        for e in made["forward"]
    ]  # fmt: skip
    header = ("head", "N", "0.2.0", "splits by the last wave", "and one loop", "gain", "evenness in 0.2.0", "evenness")
    parts += ["## Forward by head and batch (predicted, TFLOP/s)", report.markdown(header, forward)]
    back = [(e["head"], *(f"{rate:.0f}" for rate in e["tflops"]), f"{e['busy']:.3f}") for e in made["dlogits"]]
    header = ("head", "0.2.0", "one loop, target apart", "and rows' numbers loaded ahead", "evenness")
    parts += ["## Logits of the backward, N = 8192 (predicted, TFLOP/s)", report.markdown(header, back)]
    return "\n\n".join(part.strip() for part in parts)


def page(text: str, made: dict) -> str:
    before, rest = text.split(report.BEGIN)
    return f"{before}{report.BEGIN}\n\n{tables(made)}\n\n{report.END}{rest.split(report.END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.model", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the committed JSON and the page's tables")
    given = parser.parse_args(arguments)
    made = document()
    if given.write:
        OUT.write_text(json.dumps(made, indent=1) + "\n")
        PAGE.write_text(page(PAGE.read_text(), made))
    else:
        print(tables(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
