"""Times the free settings of the matrix kernels on this GPU, and puts the best ones into the kernels' table.

    python -m benchmarks.tune --out FILE      # time every candidate on the real heads: minutes, needs a GPU
    python -m benchmarks.tune --adopt FILE    # write its best rows into flowrl_kernels/triton/tiles.json: needs none

Free are the pipeline stages, the programs per multiprocessor, the raster (how many row blocks walk the vocabulary
together) and whether tiles and the steps of their products are one loop: none of them changes a bit of the result,
which is checked here for every candidate. Block sizes, warps and the length of a split fix the order of the reductions,
so they are fixed by contract (flowrl_kernels/triton/tiles.py); candidates for them are timed apart, marked with whether
they kept the bits, for whoever revises that file. They are never adopted. What should matter most by the machine code
comes first: one loop or two, stages, the length of a split. Last come the choices of the bounded backward and of the
single pass (benchmarks/tune_steps.py), not adopted either.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import time
from pathlib import Path

import torch

from benchmarks import machine, measure, tune_steps
from benchmarks.cases import HEADS

GAIN = 0.01  # a row is adopted for a median at least this much shorter than the table's own

FREE = ("num_stages", "programs_per_sm", "raster", "flatten")
STAGES, FLATTENED, RASTERS = (2, 3, 4), (True, False), (0.5, 1.0, 2.0)
SPLITS = (1, 2, 3, 4, 6, 9, 16)  # tiles each
BLOCKS = (
    (128, 256, 64, 8),
    (128, 128, 64, 4),
    (128, 128, 64, 8),
    (64, 256, 64, 4),
    (128, 256, 32, 8),
    (256, 128, 64, 8),
)


class Overrides:
    """Replaces the table's answer while a candidate runs; the launchers look the functions up at every call."""

    def __init__(self):
        from flowrl_kernels.triton import tiles

        self.tiles, self.tile_for, self.splits, self.change = tiles, tiles.tile_for, tiles.splits, {}

    def __enter__(self):
        def tile_for(*given):
            return self.tile_for(*given)._replace(**{k: v for k, v in self.change.items() if k != "tiles_a_split"})

        def splits(arch, hidden, vocab, block_n):
            per_split = self.change.get("tiles_a_split")
            if per_split is None:
                return self.splits(arch, hidden, vocab, block_n)
            return math.ceil(math.ceil(vocab / block_n) / per_split), per_split

        self.tiles.tile_for, self.tiles.splits = tile_for, splits
        return self

    def __exit__(self, *_):
        self.tiles.tile_for, self.tiles.splits = self.tile_for, self.splits


def candidates(tile) -> list[tuple[str, dict]]:
    """(kind, change): the table's own entry first, then free ones, then other splits, then other blocks."""
    made: list[tuple[str, dict]] = [("table", {})]
    for flatten, stages in itertools.product(FLATTENED, STAGES):
        made.append(("free", {"flatten": flatten, "num_stages": stages}))
    made += [("free", {"raster": raster}) for raster in RASTERS]
    made.append(("free", {"programs_per_sm": 2, "num_stages": 2}))
    made += [("splits", {"tiles_a_split": per_split}) for per_split in SPLITS]
    for m, n, k, warps in BLOCKS:
        made.append(("blocks", {"block_m": m, "block_n": n, "block_k": k, "num_warps": warps}))

    def differs(change: dict) -> bool:
        return "tiles_a_split" in change or tile._replace(**change) != tile

    return made[:1] + [(kind, change) for kind, change in made[1:] if differs(change)]


def tune_head(name: str, tokens: int, dtype: torch.dtype, repeats: int, deadline: float) -> dict:
    """Every candidate's forward time on one head, until the deadline."""
    from flowrl_kernels.core.types import Head
    from flowrl_kernels.triton import linear_logprob as kernels
    from flowrl_kernels.triton import tiles

    h, v = HEADS[name]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, h, device="cuda", dtype=dtype)
    weight = torch.randn(v, h, device="cuda", dtype=dtype) * h**-0.5
    target = torch.randint(0, v, (tokens,), device="cuda")
    one = torch.ones(1, device="cuda")
    arch = tiles.arch_of(hidden.device)
    own = tiles.tile_for(arch, dtype, True, h)
    clock = measure.Clock("cuda")

    def run():
        return kernels.linear_logprob_fwd(hidden, target, Head(weight, None, one), False, False)

    expected = run()[:2]
    made = []
    with Overrides() as overrides:
        for kind, change in candidates(own):
            if time.monotonic() > deadline:
                break
            overrides.change = change
            block_n = change.get("block_n", own.block_n)
            _, per_split = tiles.splits(arch, h, v, block_n)
            blocks = {name: value for name, value in change.items() if name != "tiles_a_split"}
            entry = {"kind": kind, **own._replace(**blocks)._asdict(), "tiles_a_split": per_split}
            try:
                got = run()[:2]
                entry["same_bits"] = all(torch.equal(a, b) for a, b in zip(got, expected))
                clock(run)
                times = [clock(run)[0] for _ in range(repeats)]
                entry["median_ms"] = sorted(times)[len(times) // 2] * 1e3
                entry["tflops"] = 2 * tokens * h * v / entry["median_ms"] / 1e9
                entry["repeats_ms"] = [t * 1e3 for t in times]
            except Exception as error:  # too much shared memory, say: a candidate that does not exist here
                entry["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            made.append(entry)
    fit = [e for e in made if "median_ms" in e and e["kind"] in ("table", "free") and e["same_bits"]]
    return {
        "head": name, "tokens": tokens, "h": h, "v": v, "dtype": str(dtype).removeprefix("torch."), "arch": arch,
        "best": min(fit, key=lambda e: e["median_ms"], default=None), "candidates": made,
    }  # fmt: skip


def rows_of(document: dict) -> list[dict]:
    """The rows of flowrl_kernels/triton/tiles.json that a tuning run speaks for: free settings that kept every bit and
    were faster than the table's own by GAIN."""
    rows = []
    for head in document["heads"]:
        own, best = head["candidates"][0], head["best"]
        if best is None or best["kind"] != "free" or best["median_ms"] > (1.0 - GAIN) * own["median_ms"]:
            continue
        source = (
            f"{document['machine']['gpu']}, triton {document['versions'].get('triton')}, {document['started'][:10]}: "
            f"{head['tokens']} tokens in {best['median_ms']:.2f} ms, before {own['median_ms']:.2f}"
        )
        key = {"arch": head["arch"], "dtype": head["dtype"], "h": head["h"]}
        rows.append({**key, **{name: best[name] for name in FREE}, "source": source})
    return rows


def adopt(documents: list[dict], table: Path) -> int:
    """Puts the rows of tuning runs into the table, in place of what it had for their keys; how many there were."""
    from flowrl_kernels.triton.tiles import read_table

    def key(row: dict) -> tuple:
        return row["arch"], row["dtype"], row["h"]

    read_table(table)
    new = {key(row): row for document in documents for row in rows_of(document)}
    rows = {key(row): row for row in json.loads(table.read_text())["rows"]} | new
    lines = ",\n".join("  " + json.dumps(rows[name]) for name in sorted(rows))
    table.write_text('{\n "schema": 1,\n "rows": [' + (f"\n{lines}\n " if lines else "") + "]\n}\n")
    read_table(table)
    return len(new)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--adopt", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=5.0, help="for the tile table")
    parser.add_argument("--step-minutes", type=float, default=2.0, help="for the bounded backward and the single pass")
    given = parser.parse_args(arguments)
    if given.adopt:
        from flowrl_kernels.triton.tiles import TABLE

        count = adopt([json.loads(path.read_text()) for path in given.adopt], TABLE)
        print(f"{count} rows put into {TABLE.name}")
        return 0
    if not torch.cuda.is_available():
        print("no GPU: tile timings were not taken")
        return 2
    deadline = time.monotonic() + 60 * given.minutes
    document = {
        "schema": 1,
        "kind": "tune",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe("cuda"),
        "versions": machine.versions(),
        **machine.commit(),
        "ceilings": machine.ceilings("cuda", False),
        "heads": [],
    }
    for name in ("qwen2.5-7b", "llama-3.1-8b", "qwen2.5-1.5b", "qwen2.5-32b"):
        if time.monotonic() > deadline:
            print(f"{name}: not timed, out of minutes")
            continue
        record = tune_head(name, given.tokens, torch.bfloat16, given.repeats, deadline)
        document["heads"].append(record)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
        own = record["candidates"][0]
        print(f"{name}: table {own.get('median_ms', float('nan')):.2f} ms {own.get('tflops', 0):.0f} TFLOP/s; ", end="")
        best = record["best"]
        print(f"best {best['median_ms']:.2f} ms, {best['tflops']:.0f} TFLOP/s with {best}" if best else "nothing ran")
        for entry in record["candidates"]:
            if entry["kind"] in ("table", "free") and entry.get("same_bits") is False:
                print(f"  WRONG: changed the bits: {entry}")
    last = time.monotonic() + 60 * given.step_minutes
    rl, loss = tune_steps.cases(given.tokens)
    for what, run, case in (("bounded", tune_steps.bounded, rl), ("single_pass", tune_steps.single_pass, loss)):
        try:
            document[what] = run(case, "cuda", given.repeats, last)
        except Exception as error:  # what was timed so far is kept
            document[what] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        given.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{what}: {document[what]}")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
