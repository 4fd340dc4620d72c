"""Tokens of a micro-batch from a budget in memory: what autograd keeps of a token is counted on the model itself."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.policy import Policy

GIB = 2**30
TRIED = (32, 64)  # slots of two rows: what is kept for any row drops out of the difference


def kept_bytes(policy: Policy, slots: int, device: torch.device) -> int:
    """Bytes that a forward of one row keeps for its backward, parameters and buffers aside; a storage counts once."""
    known = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    found: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, slots, dtype=torch.int64, device=device)
    positions = torch.arange(slots, device=device)[None]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = policy(lambda actor, hidden: hidden, ids, positions)
        total = sum(storage.nbytes() for storage in found.values())
    del out
    return total


def bytes_a_token(policy: Policy, world: World) -> float:
    """What the backbone keeps of one more token, the most of any rank; every rank calls it."""
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or TRIED[1]
    few, many = min(TRIED[0], context // 2), min(TRIED[1], context)
    with parallel.whole(policy):
        kept = [kept_bytes(policy, slots, world.device) for slots in (few, many)]
    slope = torch.tensor([(kept[1] - kept[0]) / (many - few)], dtype=torch.float64, device=world.device)
    return float(parallel.total(slope, world, "max"))


def fitted(config: Config, policy: Policy, world: World) -> tuple[Config, list[str]]:
    """`config` with the `max_tokens` that `parallel.memory` leaves, and a line for the log; every rank calls it."""
    budget = config.parallel.memory
    if not budget:
        return config, []
    each = bytes_a_token(policy, world)
    most = min(config.parallel.max_tokens, max(1, int(budget * GIB / each)))
    settings = dataclasses.replace(config.parallel, max_tokens=most, row_tokens=min(config.parallel.row_tokens, most))
    note = f"micro-batches of {most} tokens: {each / 2**20:.2f} MiB of activations each, parallel.memory {budget:g} GiB"
    return dataclasses.replace(config, parallel=settings), [note]
