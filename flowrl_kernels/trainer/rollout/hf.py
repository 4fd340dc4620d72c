"""The default engine: batched decoding of the live model with a KV cache, on any device, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.policy import Policy, logits
from flowrl_kernels.trainer.rollout.base import Generated, Kept, Sampling, draw, uniform


class HFEngine:
    """Decodes with the policy itself, so there are no weights to push.

    The batch is static: it starts with every prompt, ends with the last response, and sheds finished rows
    each time half of it has finished. Prompts are read once and their cache repeated for the n responses.
    Under truncated sampling it tells what each token was drawn from, and stop texts are looked for in what came: both
    wait for a GPU at every token.
    """

    def __init__(self, policy: Policy, *, batch: int, device: torch.device):
        self.policy, self.batch, self.device = policy, batch, device
        self.version = 0

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Notes the version; the live model is what generates."""
        self.version = version

    def release(self) -> None:
        """Nothing to do: it holds nothing between two calls."""

    def close(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: list[int] | None = None,
    ) -> Generated:
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("prompts: wanted at least one prompt of at least one token each")
        numbers = numbers if numbers is not None else list(range(len(prompts)))
        chunk = max(1, self.batch // n)
        parts = []
        from flowrl_kernels.hf.decoding import decoding

        with parallel.whole(self.policy), decoding(self.policy.model):
            for start in range(0, len(prompts), chunk):
                part = slice(start, start + chunk)
                parts.append(self._decode(prompts[part], n, sampling, seed, numbers[part]))
        width = max(part.tokens.shape[1] for part in parts)
        pad = [(0, width - part.tokens.shape[1]) for part in parts]
        return Generated(
            torch.cat([torch.nn.functional.pad(part.tokens, p) for part, p in zip(parts, pad)]),
            torch.cat([torch.nn.functional.pad(part.logp, p) for part, p in zip(parts, pad)]),
            torch.cat([part.length for part in parts]),
            torch.cat([part.finished for part in parts]),
            joined([part.kept for part in parts if part.kept is not None]),
            self.version,
        )

    def _decode(self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, numbers: list[int]) -> Generated:
        from flowrl_kernels.hf.decoding import roomy_cache

        device, policy = self.device, self.policy
        width, count = max(map(len, prompts)), len(prompts) * n
        ragged = min(map(len, prompts)) < width
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [P, W] padded left
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        columns = torch.arange(width, device=device)
        mask = (columns >= (width - lengths)[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = roomy_cache(policy.model.config)
        z = policy(_last, ids, positions, mask if ragged else None, cache)  # [P, V]
        if n > 1:
            cache.batch_repeat_interleave(n)
            z, lengths, mask = (x.repeat_interleave(n, 0) for x in (z, lengths, mask))
        stop, stops = torch.tensor(sampling.ends, device=device, dtype=torch.int64), sampling.stops
        alive = torch.arange(count, device=device)  # rows still in the batch
        number = torch.tensor([i * n + j for i in numbers for j in range(n)], device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)  # of those, finished
        tokens = torch.zeros(count, sampling.max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(count, sampling.max_new_tokens, device=device)
        length = torch.zeros(count, dtype=torch.int64, device=device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)
        drawn_from: list[tuple[Tensor, Tensor, Tensor]] = []  # of each step: its responses, their kept ids, how many
        every = 1 if device.type == "cpu" or stops is not None else 16  # looking at `done` waits for a GPU
        for t in range(sampling.max_new_tokens):
            token, logp, keep = draw(z, sampling, uniform(seed, number, t))
            if keep is not None:
                keep &= ~done[:, None]
                drawn_from.append((alive[~done], keep.nonzero()[:, 1].int(), keep.sum(-1)[~done]))
            tokens[alive, t] = token.masked_fill(done, 0)
            logps[alive, t] = logp.masked_fill(done, 0.0)
            length[alive] += ~done
            done = done | torch.isin(token, stop)
            if stops is not None:
                on = (~done).nonzero().squeeze(-1)
                last = tokens[alive[on], max(0, t + 1 - stops.window) : t + 1].tolist()
                done[on] = torch.tensor(stops.ended(last), dtype=torch.bool, device=device)
            finished[alive] = done
            if t + 1 == sampling.max_new_tokens:
                break
            if t % every == every - 1:
                left = int((~done).sum())
                if left == 0:
                    break
                if left <= len(alive) // 2:
                    keep = (~done).nonzero().squeeze(-1)
                    cache.batch_select_indices(keep)
                    alive, done, token, number = alive[keep], done[keep], token[keep], number[keep]
                    lengths, mask = lengths[keep], mask[keep]
            if ragged:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            step = (lengths + t)[:, None]
            z = policy(_last, token[:, None], step, mask if ragged else None, cache)
        used = int(length.max())
        kept = by_response(drawn_from) if sampling.truncated else None
        return Generated(tokens[:, :used].cpu(), logps[:, :used].cpu(), length.cpu(), finished.cpu(), kept)


def by_response(steps: list[tuple[Tensor, Tensor, Tensor]]) -> Kept:
    """Kept rows of (responses [R], ids [K], how many of them each response has [R]) step by step, put in order."""
    response, ids, counts = (torch.cat(part).cpu() for part in zip(*steps))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Kept(ids, offsets).rows(response.argsort(stable=True))


def joined(parts: list[Kept]) -> Kept | None:
    """Their rows one after the other."""
    if not parts:
        return None
    counts = torch.cat([part.offsets.diff() for part in parts])
    return Kept(torch.cat([part.ids for part in parts]), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def _last(policy: Policy, hidden: Tensor) -> Tensor:
    """Logits of the last position, fp32."""
    return logits(policy, hidden[:, -1])
