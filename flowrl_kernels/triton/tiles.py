"""Block sizes of the matrix kernels by (architecture, dtype), and their settings by (architecture, dtype, hidden size).

Never tuned at import. What may change a bit of logp is fixed in this file: `block_k` and `num_warps` decide how a
product adds up and how a row's columns lie over the threads that sum them, `block_n` which columns are summed before
they meet the others and where a split of the vocabulary ends, `block_m` how many warps share a row. A change of any
of them makes log-probs of one machine differ from those of another version, and old ones from new ones, so
`benchmarks/tune.py` times other blocks apart, for a revision of this file, and adopts none.

What changes no bit (the pipeline's stages, programs per multiprocessor, the raster: how many row blocks walk the
vocabulary together, and whether tiles follow each other in one loop) may come from tiles.json, a table that
`python -m benchmarks.tune --adopt` writes from timings on hardware. Where it has no row for an architecture, dtype and
hidden size, the values here are used. The compile matrix (docs/compile_matrix.md) shows registers, spills and shared
memory of every entry in this file; what the loops hold on sm_90 is kept to budgets (tests/machine_code.json).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from flowrl_kernels.core.types import TILE

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
TABLE = Path(__file__).with_name("tiles.json")
# what a row of the table sets: type, least, most
FREE: dict[str, tuple[type, float, float]] = {
    "num_stages": (int, 1, 8),
    "programs_per_sm": (int, 1, 8),
    "raster": (float, 0.05, 64.0),
    "flatten": (bool, 0, 1),
}
KEY: dict[str, type] = {"arch": str, "dtype": str, "h": int}


class Tile(NamedTuple):
    """One program's share of a matrix product, and how it is pipelined."""

    block_m: int  # rows of hidden states
    block_n: int  # vocabulary columns; a multiple of 128
    block_k: int  # hidden columns a step
    num_warps: int
    num_stages: int
    programs_per_sm: int
    descriptor: bool  # host-side tensor descriptors where the strides allow
    raster: float = 1.0  # times the row blocks that walk the vocabulary together
    flatten: bool = False  # tiles and the steps of their products in one loop: no gap between tiles, more registers


# 16-bit inputs with 16-byte rows; sm_89 and sm_120 have 99 KB of shared memory, gfx942 64 KB
_HALF = {
    "sm_80": Tile(128, 128, 64, 8, 4, 1, False),
    "sm_89": Tile(128, 128, 32, 8, 3, 1, False),
    "sm_90": Tile(128, 256, 64, 8, 4, 1, True, flatten=True),
    "sm_100": Tile(128, 256, 64, 8, 4, 1, True),
    "sm_120": Tile(128, 128, 32, 8, 4, 1, True),
    "gfx942": Tile(128, 128, 64, 8, 2, 1, False),
    "interpreter": Tile(32, 256, 64, 4, 1, 1, True),
}
# 16-bit inputs whose rows are not: element-wise loads leave fewer registers
_HALF_UNALIGNED = Tile(64, 128, 32, 8, 2, 2, False)
# float32 multiplies on the ordinary cores ("ieee")
_SINGLE = Tile(64, 128, 16, 8, 2, 2, False)


def read_table(path: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """The free settings by (architecture, dtype, hidden size).

    Raises:
        ValueError: naming the file, the row, what was wanted and what came.
    """

    def fail(where: str, wanted: str, got: object) -> None:
        raise ValueError(f"{path}: {where}: wanted {wanted}; got {got!r}")

    try:
        rows = json.loads(path.read_text())["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: wanted an object with a list of "rows"; got {error!r}') from error
    table: dict[tuple[str, str, int], dict[str, float]] = {}
    for i, row in enumerate(rows):
        where = f"row {i}"
        if not isinstance(row, dict):
            fail(where, "an object", row)
        for name, kind in KEY.items():
            if type(row.get(name)) is not kind:
                fail(f"{where}, {name}", f"a value of type {kind.__name__}", row.get(name))
        key = (row["arch"], row["dtype"], row["h"])
        if row["arch"] not in _HALF or row["dtype"] not in ("bfloat16", "float16", "float32"):
            fail(where, f"an architecture of {', '.join(_HALF)} and a dtype of the kernels", key)
        if key in table:
            fail(where, "each architecture, dtype and hidden size once", key)
        settings = {name: value for name, value in row.items() if name not in KEY and name != "source"}
        for name, value in settings.items():
            if name not in FREE:
                fail(f"{where}, {name}", f"only {', '.join(FREE)}: anything else could change bits of logp", value)
            kind, least, most = FREE[name]
            if kind is bool:
                if not isinstance(value, bool):
                    fail(f"{where}, {name}", "true or false", value)
            elif isinstance(value, bool) or not isinstance(value, (kind, int)) or not least <= value <= most:
                fail(f"{where}, {name}", f"a number ({kind.__name__}) from {least} to {most}", value)
        table[key] = settings
    return table


@cache
def _table() -> dict[tuple[str, str, int], dict[str, float]]:
    return read_table(TABLE)


def tile_for(arch: str, dtype: torch.dtype, aligned: bool, hidden: int | None = None) -> Tile:
    """The block sizes of `linear_logprob` on `arch` (one of ARCHS, "sm_89" or "interpreter").

    `aligned`: rows of hidden and weight start at multiples of 16 bytes. With a `hidden` size, the settings that the
    table has for it; they were timed on the forward, whose operands the exact backward shares.
    """
    if arch == "interpreter":
        tile = _HALF[arch]._replace(descriptor=aligned)
    elif dtype == torch.float32:
        tile = _SINGLE
    else:
        tile = _HALF[arch] if aligned else _HALF_UNALIGNED
    if hidden is None or not aligned:
        return tile
    return tile._replace(**_table().get((arch, str(dtype).removeprefix("torch."), hidden), {}))


def pair_tile(tile: Tile) -> Tile:
    """For the logits of one block of the bounded backward: so that two programs share a multiprocessor on sm_90.
    float32, with its few registers left, is not pipelined."""
    return tile._replace(block_n=128, num_stages=min(tile.num_stages, 3 if tile.block_k > 16 else 1))


def list_tile(arch: str, tile: Tile) -> Tile:
    """For its dweight: NVIDIA's two further stages hold the index that the loads wait for."""
    return tile if arch == "gfx942" else tile._replace(num_stages=tile.num_stages + 2)


def logits_store(arch: str, tile: Tile) -> tuple[Tile, int]:
    """What the forward of `tile` becomes where it also stores its logits by descriptor, and the columns at a time.

    They are staged in shared memory, which must hold them beside the pipeline: with three stages a whole tile of 128
    columns, whose store is under way while the next one is made, where half a tile would wait for the half before it
    (and take sm_100 through a second register layout, and spill). Stages change no bit.
    """
    if arch in ("sm_90", "sm_100"):
        return tile._replace(num_stages=min(tile.num_stages, 3)), TILE
    return tile._replace(num_stages=min(tile.num_stages, 4)), TILE // 2


@cache
def _cuda_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return "gfx942"  # the smallest local memory of the CDNA parts
    major, minor = properties.major, properties.minor
    if major < 8:
        raise RuntimeError(f"the triton kernels need compute capability 8.0 or newer; got {major}.{minor}")
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def arch_of(device: torch.device) -> str:
    """The key of the tables for a device; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    return _cuda_arch(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(device: torch.device, tile: Tile) -> int:
    """How many persistent programs fill the device (never a part of the arithmetic)."""
    if device.type == "cpu":
        return 3
    return tile.programs_per_sm * _num_sms(device.index if device.index is not None else torch.cuda.current_device())


# multiprocessors of the part that splits are sized for; a device with more or fewer gives the same bits
MULTIPROCESSORS = {
    "sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304, "interpreter": 132
}  # fmt: skip
ROW_BLOCKS = tuple(round(8 * 2 ** (i / 8)) for i in range(41))  # 8 to 256 alike on a scale of doublings
# FLOP in the time of a byte: 720 TFLOP/s against 3 TB/s; bytes of partial sums a row and split, written and read
FLOP_A_BYTE, PARTIAL_BYTES = 240, 24


def busy(row_blocks: int, tiles: int, per_split: int, programs: int) -> float:
    """The share of the time that `programs` programs multiply what counts, where the one with most tiles sets it."""
    items = row_blocks * -(-tiles // per_split)
    return row_blocks * tiles / programs / (per_split * -(-items // programs))


@cache
def splits(arch: str, hidden: int, vocab: int, block_n: int) -> tuple[int, int]:
    """(number of vocabulary splits, tiles in each): a function of (H, V, dtype, arch) alone, for bits follow it.

    Short splits even out the last wave, and each costs a row its partial sums. Of 2 to 16 tiles this takes the length
    that loses least of both on average over batches of 8 to 256 row blocks, the longest within a thousandth of it. The
    merge holds all of a row's splits at once, which bounds them by 1024.
    """
    tiles = -(-vocab // block_n)
    least = max(2, -(-tiles // 1024))
    lost = {}
    for per in range(least, least + 15):
        idle = sum(1.0 - busy(n, tiles, per, MULTIPROCESSORS[arch]) for n in ROW_BLOCKS) / len(ROW_BLOCKS)
        lost[per] = idle + PARTIAL_BYTES * FLOP_A_BYTE / (2 * block_n * per * hidden)
    per_split = max(per for per, share in lost.items() if share <= min(lost.values()) + 1e-3)
    return -(-tiles // per_split), per_split


def group_rows(hidden: int, itemsize: int, tile: Tile) -> int:
    """Row blocks that walk the vocabulary together: about 16 MB of hidden states, to stay in L2 beside the weights."""
    return max(4, int(tile.raster * (16 << 20)) // (tile.block_m * hidden * itemsize))
