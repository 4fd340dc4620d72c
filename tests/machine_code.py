"""What a matrix kernel's machine code does for one step along H and for one tile, read from its cubin without a GPU.

`nvdisasm` gives the instructions; branches between them make a graph. The steps along H are the innermost loop around
the matrix instructions, a tile is the innermost loop around those and the epilogue's exponentials: the same loop where
the two were flattened into one, an outer one where they were not. A path once around such a loop takes the branches
that multiply, load ahead and (for a tile) exponentiate, and otherwise the shortest: what rarely runs, like a target's
column, and the waiting itself are not in it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

BUDGET = Path(__file__).with_suffix(".json")
PINNED = "3.7.1"  # the version that wrote the budgets: others may take a tenth more


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers
    text: str
    predicated: bool


class Block(NamedTuple):
    """Instructions that run together, and the blocks that may come next."""

    instructions: list[Instruction]
    next: list[int]

    def count(self, opcode: str) -> int:
        return sum(i.opcode.startswith(opcode) for i in self.instructions)


class Work(NamedTuple):
    """One matrix kernel's machine code. Counts are instructions a warp."""

    mma: str  # shape of the matrix instruction and type it adds up in
    mma_a_step: int
    loads_a_step: int  # by tensor descriptor
    in_flight: int  # matrix instruction groups that a step leaves unfinished: 0 is synchronous
    step: int  # instructions a step along H
    barriers_a_step: int
    flattened: bool  # no loop outside the steps along H: tiles follow each other without a gap
    start: int  # instructions at the start of a tile where that is flattened: which tile it is, and its addresses
    epilogue: int  # instructions a tile after its steps; where that is not flattened, before them, too
    barriers: int  # of those
    exponentials: int
    loads: int  # from global memory
    stores: int  # by tensor descriptor


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def listing(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> list[Instruction]:
    made = []
    for line in listing(cubin).splitlines():
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(.*?);", line)
        if found is not None and found[3]:
            made.append(Instruction(int(found[1], 16), found[3].split()[0], found[3], found[2] is not None))
    return made


def graph(code: list[Instruction]) -> list[Block]:
    """Basic blocks in the order of the code. Calls come back, so they are no branch."""
    index = {i.address: k for k, i in enumerate(code)}

    def target(i: Instruction) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", i.text) if i.opcode.split(".")[0] == "BRA" else None
        return index.get(int(found[1], 16)) if found is not None else None

    ends = [k for k, i in enumerate(code) if i.opcode.split(".")[0] in ("BRA", "EXIT", "RET")]
    starts = sorted({0} | {k + 1 for k in ends} | {t for k in ends if (t := target(code[k])) is not None})
    starts = [s for s in starts if s < len(code)]
    number = {s: b for b, s in enumerate(starts)}
    blocks = []
    for b, (begin, end) in enumerate(zip(starts, [*starts[1:], len(code)])):
        last = code[end - 1]
        jump, after = target(last), [b + 1] if b + 1 < len(starts) else []
        falls = last.predicated or last.opcode.split(".")[0] not in ("BRA", "EXIT", "RET") or ".DIV" in last.opcode
        blocks.append(Block(code[begin:end], (after if falls else []) + ([number[jump]] if jump is not None else [])))
    return blocks


def loops(blocks: list[Block]) -> list[tuple[int, set[int]]]:
    """(head, blocks) of every natural loop, the smallest first; edges back to one head make one loop."""
    order: list[int] = []
    seen, stack = set(), [(0, iter(blocks[0].next))]
    seen.add(0)
    while stack:
        at, following = stack[-1]
        for n in following:
            if n not in seen:
                seen.add(n)
                stack.append((n, iter(blocks[n].next)))
                break
        else:
            order.append(at)
            stack.pop()
    order.reverse()
    before: dict[int, set[int]] = {b: set() for b in order}
    for b in order:
        for n in blocks[b].next:
            before[n].add(b)
    over = {b: set(order) for b in order}  # dominators
    over[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = {b} | set.intersection(*(over[p] for p in before[b]))
            if new != over[b]:
                over[b], changed = new, True
    made: dict[int, set[int]] = {}
    for b in order:
        for head in blocks[b].next:
            if head in over[b]:
                body, todo = made.setdefault(head, {head}), [b]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo += before[at]
    return sorted(made.items(), key=lambda loop: len(loop[1]))


def around(blocks: list[Block], loop: tuple[int, set[int]], wanted: tuple[str, ...]) -> list[Instruction]:
    """The instructions once around a loop: the path with the most of `wanted`, in that order, and then the fewest."""
    head, body = loop
    best: dict[int, tuple[tuple, list[int]]] = {}

    def value(block: Block) -> tuple:
        return (*(block.count(w) for w in wanted), -len(block.instructions))

    def longest(at: int, path: frozenset[int]) -> tuple[tuple, list[int]] | None:
        """From a block back to the head; None where the path only comes back to itself."""
        if at in best:
            return best[at]
        own, found = value(blocks[at]), None
        for n in blocks[at].next:
            if n == head:
                rest: tuple[tuple, list[int]] | None = ((0,) * len(own), [])
            elif n not in body or n in path:
                continue
            else:
                rest = longest(n, path | {n})
            if rest is not None and (found is None or rest[0] > found[0]):
                found = rest
        if found is None:
            return None
        best[at] = (tuple(a + b for a, b in zip(own, found[0])), [at, *found[1]])
        return best[at]

    found = longest(head, frozenset({head}))
    assert found is not None
    return [i for b in found[1] for i in blocks[b].instructions]


def work(cubin: bytes) -> Work:
    """Of a kernel with one loop of Hopper's matrix instructions. A ValueError says where there is none."""
    blocks = graph(instructions(cubin))
    matrix = [b for b, block in enumerate(blocks) if block.count("HGMMA")]
    holding = [loop for loop in loops(blocks) if any(b in loop[1] for b in matrix)]
    if not holding:
        raise ValueError("no matrix instructions in a loop")
    steps = holding[0]
    tiles = next((loop for loop in holding if sum(blocks[b].count("MUFU.EX2") for b in loop[1]) > 1), steps)
    step = around(blocks, steps, ("HGMMA", "UTMALDG"))
    tile = around(blocks, tiles, ("HGMMA", "MUFU.EX2", "UTMALDG"))

    def count(path: list[Instruction]) -> Counter[str]:
        return Counter(i.opcode.split(".")[0] for i in path)

    start = step
    if tiles is steps:  # a flattened loop starts a tile in branches of its own, which divide integers
        other = steps[1] - {b for b in steps[1] if blocks[b].count("MUFU.EX2")}
        start = around(blocks, (steps[0], other), ("HGMMA", "I2F", "UTMALDG"))
    one, all_of_it = count(step), count(tile)
    products = [i for i in step if i.opcode.startswith("HGMMA")]
    waits = [int(n, 16) for i in step for n in re.findall(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", i.text)]
    return Work(
        "+".join(sorted({i.opcode.removesuffix(".BF16") for i in products})),
        len(products),
        one["UTMALDG"],
        min(waits, default=0),
        len(step),
        one["BAR"],
        tiles is steps and len(holding) == 1,
        len(start) - len(step),
        len(tile) - len(step),
        all_of_it["BAR"] - one["BAR"],
        all_of_it["MUFU"] - one["MUFU"],
        all_of_it["LDG"] - one["LDG"],
        all_of_it["UTMASTG"] - one["UTMASTG"],
    )


def budget() -> dict[tuple[str, str], Work]:
    """The committed counts by (kernel, case): what the kernels took when they were last written down."""
    rows = json.loads(BUDGET.read_text())["rows"]
    return {(row["kernel"], row["case"]): Work(**row["work"]) for row in rows}


def save(works: dict[tuple[str, str], Work]) -> None:
    rows = [
        json.dumps({"kernel": kernel, "case": case, "work": work._asdict()})
        for (kernel, case), work in sorted(works.items())
    ]
    BUDGET.write_text('{\n "triton": "' + triton.__version__ + '",\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")


def faults(work: Work, kernel: str, case: str, flat: bool) -> list[str]:
    """What of a kernel's machine code is worse than it may be; empty if nothing is.

    However the budgets are written down, the forward and the logits of the backward (`flat`) multiply asynchronously,
    by the widest instruction there is, and their tiles follow each other without a gap.
    """
    found = []
    if flat and work.in_flight < 1:
        found.append("every step waits for its own products")
    if flat and not work.flattened:
        found.append("the loops over tiles and along H are not one: the pipeline drains after every tile")
    if flat and not work.mma.startswith("HGMMA.64x256x16."):
        found.append(f"products by {work.mma} instead of HGMMA.64x256x16")
    allowed = budget().get((kernel, case))
    if allowed is None:
        return found
    for name in ("mma", "mma_a_step", "loads_a_step", "in_flight", "stores"):
        got, wanted = getattr(work, name), getattr(allowed, name)
        if got != wanted:
            found.append(f"{name} {got}, was {wanted}")
    for name in ("step", "barriers_a_step", "start", "epilogue", "barriers", "exponentials", "loads"):
        got, most = getattr(work, name), getattr(allowed, name)
        if got > (most if triton.__version__ == PINNED else 1.15 * most + 2):
            found.append(f"{name} {got}, at most {most}")
    return found
