"""Whether a transformers model keeps packed sequences apart, found by running it: no list of types stays right.

A packed row holds whole sequences end to end with position ids restarting at 0 in each. Most models read the
boundaries off those (`positions`); others want the causal mask drawn out block by block (`mask`); state-space and
convolution layers, and attention with a window of its own, need each sequence in a row of its own (`alone`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Packing = Literal["positions", "mask", "alone"]
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(ids [R, L], positions [R, L], mask [R, 1, L, L] or None) -> features of each slot, [R, L, ...]."""


def block_mask(positions: Tensor, branch: Tensor | None = None, *, boolean: bool) -> Tensor:
    """[R, 1, L, L] causal within each sequence of a row; bool (True: attends), or fp32 to be added to scores.

    branch: [R, L] int64, for sequences that share a prompt laid out once: 0 for the prompt's slots, which every
        response of it sees, and a number for each response, whose slots see the prompt and themselves alone.
    """
    sequence = (positions == 0).cumsum(-1)  # [R, L]
    order = torch.arange(positions.shape[1], device=positions.device)
    allowed = (sequence[:, :, None] == sequence[:, None, :]) & (order[:, None] >= order)
    if branch is not None:
        allowed &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    if boolean:
        return allowed[:, None]
    least = torch.finfo(torch.float32).min
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, least)[:, None]


def one_row(config: Any) -> bool:
    """Whether boundaries are read off the positions of a batch of one row only: transformers with flash-attention."""
    return "flash" in (getattr(config, "_attn_implementation", None) or "")


def takes_masks(config: Any) -> bool:
    """Whether one mask can serve every layer: no layer looks through a window or at chunks."""
    text = config.get_text_config()
    if one_row(config):
        return False
    kinds = getattr(text, "layer_types", None) or ()
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    windows = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
    return getattr(text, "use_sliding_window", True) is False or not any(getattr(text, name, None) for name in windows)


class Probe:
    """Four short sequences, alone and packed; `error(packing)` is how far the packed ones are off, relatively.

    Only sequences a model tells apart can show a leak, so `context` says how much one sequence changes in another's
    wake; where that is nothing, nothing is proved.
    """

    def __init__(self, forward: Forward, vocabulary: int, context: int | None, device: torch.device | str = "cpu"):
        self.forward = forward
        longest = max(2, min(7, (context or 14) // 2))
        lengths = [longest, max(1, longest - 2), max(1, longest - 3), max(1, longest - 4)]
        random = torch.Generator().manual_seed(0)
        low = min(3, vocabulary - 1)
        self.sequences = [torch.randint(low, vocabulary, (n,), generator=random).to(device) for n in lengths]
        self.wanted = [self._alone(ids) for ids in self.sequences]
        first, second = self.sequences[:2]
        joined = self._alone(torch.cat([first, second]))[len(first) :]
        self.context = relative(joined, self.wanted[1])

    def _alone(self, ids: Tensor) -> Tensor:
        return self.forward(ids[None], torch.arange(len(ids), device=ids.device)[None], None)[0]

    def error(self, packing: Packing, rows: list[list[int]] | None = None, boolean: bool = True) -> float:
        """The largest relative difference (L2) of a sequence from itself alone; nan where something is not finite."""
        if rows is None:
            rows = [[0], [1], [2], [3]] if packing == "alone" else [[0, 1], [3, 2]]
        width = max(sum(len(self.sequences[i]) for i in row) for row in rows)
        device = self.sequences[0].device
        ids = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
        positions = torch.zeros_like(ids)
        places = {}
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                n = len(self.sequences[i])
                ids[r, at : at + n] = self.sequences[i]
                positions[r, at : at + n] = torch.arange(n, device=device)
                places[i] = (r, slice(at, at + n))
                at += n
            positions[r, at:] = torch.arange(width - at, device=device)
        mask = block_mask(positions, boolean=boolean) if packing == "mask" else None
        out = self.forward(ids, positions, mask)
        errors = [relative(out[r, span], self.wanted[i]) for i, (r, span) in places.items()]
        return max(errors, key=lambda e: float("inf") if e != e else e)

    def shared_error(self, boolean: bool = True) -> float:
        """As `error`, of the first two sequences and a third as responses to one prompt that stands in the row once."""
        prompt, *answers = self.sequences[1], self.sequences[0], self.sequences[2], self.sequences[3]
        p, device = len(prompt), prompt.device
        ids = torch.cat([prompt, *answers])[None]
        parts = [torch.arange(p), *(torch.arange(len(answer)) + p for answer in answers)]
        positions = torch.cat(parts)[None].to(device)
        branch = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])[None].to(device)
        out = self.forward(ids, positions, block_mask(positions, branch, boolean=boolean))[0]
        errors, at = [relative(out[:p], self.wanted[1])], p
        for answer in answers:
            own = self._alone(torch.cat([prompt, answer]))[p:]
            errors.append(relative(out[at : at + len(answer)], own))
            at += len(answer)
        return max(errors, key=lambda e: float("inf") if e != e else e)

    def tolerance(self, dtype: torch.dtype) -> float:
        """What rounding explains: 1e-5 in float32, more only where leaks would be larger still."""
        return max(1e-5 if dtype == torch.float32 else 1e-2, 1e-4 * self.context)


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def find_packing(
    forward: Forward,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    name: str = "the model",
    field: str = "model",
) -> Packing:
    """The densest way of packing under which every sequence gives what it gives alone.

    Args:
        forward: the model's final hidden states, as training will call it.
        config: of the model.
        dtype: in which the forward computes.

    Raises:
        ValueError: even a padded row of its own changes a sequence, or the numbers are not finite.
    """
    text = config.get_text_config()
    try:
        probe = Probe(forward, text.vocab_size, getattr(text, "max_position_embeddings", None), device)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{field}: {name} does not run on token and position ids alone: {error}") from error
    tolerance, found = probe.tolerance(dtype), {}
    ways: list[Packing] = ["positions", "mask"] if takes_masks(config) else ["positions"]
    if not probe.context > 2 * tolerance:  # a new model's layers may all start at 0: no leak could be seen
        ways = []
    for way in [*ways, "alone"]:
        rows = [[0, 1, 3, 2]] if way == "positions" and one_row(config) else None
        try:
            found[way] = probe.error(way, rows, boolean=getattr(config, "_attn_implementation", "") != "eager")
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            found[way] = float("inf")
            reason = f"; {type(error).__name__}: {str(error)[:200]}"
        else:
            reason = ""
        if found[way] <= tolerance:
            return way
    raise ValueError(
        f"{field}: {name} gives a sequence in a padded row of its own other hidden states than alone (relative "
        f"difference {found['alone']:.2g}, tolerated {tolerance:.0e}), so no batch of it can be trained on{reason}"
    )


@torch.no_grad()
def shares_prompts(
    forward: Forward, config: Any, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> bool:
    """Whether responses may stand behind one copy of their prompt: under a mask by branch each is what it is alone.

    Arguments as for `find_packing`, which has said that the model runs on ids and positions.
    """
    if not takes_masks(config):
        return False
    text = config.get_text_config()
    probe = Probe(forward, text.vocab_size, getattr(text, "max_position_embeddings", None), device)
    if not probe.context > 2 * probe.tolerance(dtype):  # no leak could be seen
        return False
    try:
        error = probe.shared_error(getattr(config, "_attn_implementation", "") != "eager")
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return False
    return error <= probe.tolerance(dtype)
