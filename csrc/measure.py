"""Each function of the CUDA library against its torch equal: `python csrc/measure.py [--out FILE]`. Needs a GPU and
`make csrc`. Checks that both agree, then prints the median, the least and the greatest time in microseconds as JSON.
Exit 2: there is nothing to measure, and it says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from flowrl_kernels import cuda
from flowrl_kernels.chunked import routing
from flowrl_kernels.chunked.bounded import COLUMNS
from flowrl_kernels.core.types import TILE
from flowrl_kernels.cuda import routing as compiled

ROWS, VOCAB = 32768, 152064  # 7B, N = 32k
REPEATS = 30


def times(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds on the device from an idle stream: what an optimiser step would wait for, launches included."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        taken.append(1e3 * start.elapsed_time(stop))
    return {
        "median": round(statistics.median(taken), 1),
        "least": round(min(taken), 1),
        "greatest": round(max(taken), 1),
    }


def statistics_like(rows: int, vocab: int) -> tuple[torch.Tensor, ...]:
    """Masses that fall off like those of a peaked softmax: what matters here is their range, not their source."""
    make = torch.Generator("cuda").manual_seed(0)
    runs = -(-vocab // TILE)
    tile_lse = torch.randn((runs, rows), generator=make, device="cuda").sub_(14.0)
    tile_lse += 4.0 * torch.randn((runs, 1), generator=make, device="cuda")  # tokens of a tile are rare or frequent
    target = torch.randint(vocab, (rows,), generator=make, device="cuda")
    tile_lse.scatter_(0, (target // TILE)[None], -0.05)
    target_logp = torch.full((rows,), -0.1, device="cuda")
    gradient = torch.rand(rows, generator=make, device="cuda").pow_(8)
    return tile_lse.half(), torch.zeros(rows, device="cuda"), target, target_logp, gradient


def measure() -> dict[str, object]:
    found: dict[str, object] = {}

    def compare(name: str, mine: Callable[[], tuple], torchs: Callable[[], tuple]) -> None:
        pairs = list(zip(mine(), torchs(), strict=True))
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit(f"{name}: the library and torch disagree; nothing is measured")
        found[name] = {"cuda_us": times(mine), "torch_us": times(torchs)}

    inputs = statistics_like(ROWS, VOCAB)
    cost, square = routing.tile_costs(*inputs, COLUMNS // TILE)
    budget = torch.stack([0.01 * cost.sum(), 1e-4 * square.sum()])
    compare(
        "drop_lightest",
        lambda: compiled.drop_lightest(cost, square, budget),
        lambda: routing.drop_lightest(cost, square, budget),
    )
    active = routing.drop_lightest(cost, square, budget)[0]
    compare("block_lists", lambda: compiled.block_lists(active), lambda: routing.block_lists(active))
    share = float(active.double().mean())
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "active_share": share, "us": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    available, reason = cuda.status()
    if not available:
        print(f"NOT MEASURED: the CUDA library cannot be used: {reason}", file=sys.stderr)
        sys.exit(2)
    text = json.dumps(measure(), indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
