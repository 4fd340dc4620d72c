"""Decoding token by token through transformers, without its copies of the cache.

`DynamicCache` joins a new token's keys to the old ones by copying all of them, and SDPA under a mask gets keys and
values repeated for each query head of a group. Neither changes a number; on a CPU they cost more than the layers.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "flowrl_grouped"
ROOM = 64  # tokens of room beyond what is needed, at least


def _widened(states: Tensor, tokens: int) -> Tensor:
    """[B, heads, tokens, D], not filled."""
    return states.new_empty(*states.shape[:-2], tokens, states.shape[-1])


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in tensors with room for more tokens; what it hands out are views of them.

    keys, values: [B, heads, T, D], as in `DynamicLayer`, of which everything else is inherited.
    """

    room: tuple[Tensor, Tensor] | None = None
    given: Tensor | None = None  # the keys handed out last: others have been repeated or selected since

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[-2]
        room = self.room
        if room is None or self.keys is not self.given or room[0].shape[-2] < held + new:
            wide = held + new + max(ROOM, held // 2)
            room = self.room = (_widened(key_states, wide), _widened(value_states, wide))
            if self.keys is not None and self.values is not None and held:
                room[0][..., :held, :] = self.keys
                room[1][..., :held, :] = self.values
        room[0][..., held : held + new, :] = key_states
        room[1][..., held : held + new, :] = value_states
        self.keys, self.values = room[0][..., : held + new, :], room[1][..., : held + new, :]
        self.given = self.keys
        return self.keys, self.values


def roomy_cache(config: Any) -> DynamicCache:
    """A cache for a model of this configuration; layers of other kinds (windows, states) stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA; one token's query heads that share a key head go in as so many rows of that head.

    query: [B, h, q, D]; key, value: [B, g, T, D] with g | h; attention_mask: [B or 1, 1, q, T] or None.
    """
    rows, heads, tokens, width = query.shape
    shared = key.shape[1]
    plain = attention_mask is None or attention_mask.shape[1] == 1
    if tokens != 1 or heads == shared or not plain or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = F.scaled_dot_product_attention(
        query.reshape(rows, shared, heads // shared, width), key, value, attn_mask=attention_mask,
        scale=kwargs.get("scaling"),
    )  # fmt: skip
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Inside, a model with SDPA decodes by `grouped_attention`; other attention is left as it is."""
    config = model.config
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
