"""From sequences of different lengths to a few dense micro-batches by token budget.

A micro-batch is `[R, L]`: rows of whole sequences laid end to end, `position_ids` restarting at each. Of a
sequence only what predicts something is fed: prompt and response without its last token. Where prompts are shared, a
prompt stands once before several responses to it, each of which is a branch: it sees the prompt and itself.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer.rollout.base import Kept

SHORT_ROW = 128
SHARED_ROW = 512  # a longer row repeats fewer prompts, and its dense mask still costs little beside the layers


@dataclass
class MicroBatch:
    """B sequences with N response tokens and P prompt tokens, packed into R rows of L slots."""

    ids: Tensor  # [R, L] int64
    positions: Tensor  # [R, L] int64, restarting at 0 with each sequence (and with the padding at a row's end)
    branch: Tensor | None  # [R, L] int64, 0 for a prompt, else the response's number behind it; None: no shared prompts
    predict: Tensor  # [N] int64, flat slot whose hidden state predicts the response token
    target: Tensor  # [N] int64, that response token
    cu_seqlens: Tensor  # [B + 1] int32, where each response starts in the N tokens
    prompt: Tensor  # [P] int64, flat slot of each prompt token
    prompt_cu_seqlens: Tensor  # [B + 1] int32
    which: Tensor  # [B] int64, index of the sequence in the list that was packed
    live: bool = True  # False: a stand-in that keeps ranks in step; its loss is multiplied by 0
    per_sequence: dict[str, Tensor] = field(default_factory=dict)  # [B] each: reward, group, log_z
    per_token: dict[str, Tensor] = field(default_factory=dict)  # [N] each: sampler, old, ref, value, advantage, returns
    kept: Kept | None = None  # what each response token was drawn from, where that was not everything
    rows: Tensor | None = None  # [N] int64, names each response token among those of all ranks
    order: Tensor | None = None  # [V] int64, the vocabulary as a sampled backward cuts it (token_order.py)

    @property
    def sequences(self) -> int:
        return len(self.which)

    @property
    def tokens(self) -> int:
        return len(self.target)

    def take(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """The states [R, L, H] at flat slots [N], as [N, H]; gradients of a slot taken twice add up in fixed order."""
        flat = hidden.flatten(0, 1)
        return flat[slots] if self.branch is None else torch.nn.functional.embedding(slots, flat)

    def segment(self) -> Tensor:
        """[N] int64: the sequence each response token belongs to."""
        lengths = self.cu_seqlens.diff().long()
        every = torch.arange(self.sequences, device=lengths.device)
        return every.repeat_interleave(lengths, output_size=self.tokens)


def plan(lengths: list[int], *, max_tokens: int, row_tokens: int = 0, alone: bool = False) -> list[list[list[int]]]:
    """Micro-batches of rows of sequence indices, by best fit from the longest down.

    A row holds at most `row_tokens` (0: `max_tokens`) tokens, a micro-batch at most `max_tokens` slots once
    its rows are padded to the longest. Sequences are never split; with `alone` each has a row of its own.

    Raises:
        ValueError: a sequence is longer than a row may be.
    """
    capacity = row_tokens or max_tokens
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            name = "parallel.row_tokens" if row_tokens else "parallel.max_tokens"
            raise ValueError(f"{name}: a sequence of {length} tokens does not fit into {capacity}; raise the budget")
        place = len(free) if alone else bisect.bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([index])
            left = capacity - length
            row = len(rows) - 1
        else:
            left, row = free.pop(place)
            rows[row].append(index)
            left -= length
        if left:
            bisect.insort(free, (left, row))
    fill = [sum(lengths[i] for i in row) for row in rows]
    micro: list[list[list[int]]] = []
    widest = 0
    for row in sorted(range(len(rows)), key=lambda r: -fill[r]):
        if micro and (len(micro[-1]) + 1) * widest <= max_tokens:
            micro[-1].append(rows[row])
        else:
            micro.append([rows[row]])
            widest = fill[row]  # rows come longest first
    return micro


def trees(row: list[int], prompts: list[np.ndarray], *, share: bool) -> list[list[int]]:
    """A row's sequences in runs behind one copy of their prompt; each by itself where prompts are not shared."""
    if not share:
        return [[i] for i in row]
    return [list(run) for _, run in itertools.groupby(row, lambda i: prompts[i].tobytes())]


def build(
    rows: list[list[int]],
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    device: torch.device | str,
    *,
    share: bool = False,
) -> MicroBatch:
    """The tensors of one micro-batch.

    Args:
        rows: sequence indices row by row, one element of `plan`'s answer.
        prompts: [] int64 token ids per sequence, at least one token each.
        responses: [] int64 token ids per sequence with the end token, at least one token each.
        share: neighbours in a row with the same prompt stand behind one copy of it.
    """
    runs = [trees(row, prompts, share=share) for row in rows]
    width = max(sum(occupied(run, prompts, responses) for run in row) for row in runs)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    branch = np.zeros((len(rows), width), dtype=np.int64)
    count = np.arange(width)
    predict, prompt = [], []
    order = [i for row in rows for i in row]
    for r, row in enumerate(runs):
        end = 0
        for run in row:
            p = len(prompts[run[0]])
            start, end = end, end + p
            ids[r, start:end] = prompts[run[0]]
            positions[r, start:end] = count[:p]
            slots = count[start:end] + r * width
            for number, i in enumerate(run, start=1):
                first, end = end, end + len(responses[i]) - 1
                ids[r, first:end] = responses[i][:-1]
                positions[r, first:end] = count[p : p + end - first]
                branch[r, first:end] = number
                prompt.append(slots)
                predict.append(np.append(slots[-1:], count[first:end] + r * width))
        positions[r, end:] = count[: width - end]

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def cu(parts: list[np.ndarray]) -> Tensor:
        return to(np.cumsum([0] + [len(part) for part in parts], dtype=np.int32))

    return MicroBatch(
        ids=to(ids),
        positions=to(positions),
        branch=to(branch) if share else None,
        predict=to(np.concatenate(predict)),
        target=to(np.concatenate([responses[i] for i in order])),
        cu_seqlens=cu(predict),
        prompt=to(np.concatenate(prompt)),
        prompt_cu_seqlens=cu(prompt),
        which=to(np.asarray(order, dtype=np.int64)),
    )


def occupied(run: list[int], prompts: list[np.ndarray], responses: list[np.ndarray]) -> int:
    """Slots of a prompt and the responses that share it."""
    return len(prompts[run[0]]) + sum(len(responses[i]) - 1 for i in run)


def clumps(part: list[int], prompts: list[np.ndarray], responses: list[np.ndarray], most: int) -> list[list[int]]:
    """The sequences of `part` by their prompt, in runs of at most `most` slots with one copy of it, longest first."""
    by_prompt: dict[bytes, list[int]] = {}
    for i in part:
        by_prompt.setdefault(prompts[i].tobytes(), []).append(i)
    found: list[list[int]] = []
    for members in by_prompt.values():
        runs: list[list[int]] = []
        for i in sorted(members, key=lambda i: -len(responses[i])):
            for run in runs:
                if occupied([*run, i], prompts, responses) <= most:
                    run.append(i)
                    break
            else:
                runs.append([i])
        found += runs
    return found


def pack(
    keep: list[int],
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    *,
    max_tokens: int,
    row_tokens: int,
    device: torch.device | str,
    together: int = 1,
    alone: bool = False,
    share: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of the sequences in `keep`; where that is empty, one stand-in.

    Args:
        row_tokens: see `plan`; 0 makes rows short, which suits attention with a dense mask.
        together: sequences i with the same i // together go into the same micro-batch.
        alone: one sequence a row, for models that do not keep packed ones apart (`Policy.packing`).
        share: sequences of one prompt stand behind one copy of it, as many as a row holds.

    Raises:
        ValueError: a sequence, or sequences that must go together, do not fit into `max_tokens`.
    """
    if not keep:
        return [stand_in(prompts, responses, device)]
    lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, responses)]
    longest = max(lengths[i] for i in keep)
    if longest > max_tokens:
        raise ValueError(f"parallel.max_tokens: a sequence of {longest} tokens does not fit into {max_tokens}")
    # a dense mask costs the square of the row: rows no longer than a sequence must have, or a short few
    short = SHARED_ROW if share else SHORT_ROW
    row_tokens = row_tokens or max(min(short, max_tokens), longest)

    def micro(part: list[int]) -> list[list[list[int]]]:
        runs = clumps(part, prompts, responses, row_tokens) if share else [[i] for i in part]
        room = [occupied(run, prompts, responses) for run in runs]
        rows = plan(room, max_tokens=max_tokens, row_tokens=row_tokens, alone=alone)
        return [[[i for j in row for i in runs[j]] for row in batch] for batch in rows]

    if together == 1:
        return [build(rows, prompts, responses, device, share=share) for rows in micro(keep)]
    batches: list[list[list[int]]] = []
    part: list[int] = []
    for _, members in itertools.groupby(keep, lambda i: i // together):
        group = list(members)
        if len(micro(group)) > 1:
            wanted = sum(lengths[i] for i in group)
            raise ValueError(f"parallel.max_tokens: a group of {wanted} tokens does not fit into {max_tokens}")
        if part and len(micro(part + group)) > 1:
            batches += micro(part)
            part = []
        part += group
    batches += micro(part)
    return [build(rows, prompts, responses, device, share=share) for rows in batches]


def stand_in(prompts: list[np.ndarray], responses: list[np.ndarray], device: torch.device | str) -> MicroBatch:
    """A micro-batch of the shortest sequence, for collectives alone: every gradient it gives is zero."""
    shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    batch = build([[shortest]], prompts, responses, device)
    batch.live = False
    return batch
