"""Junk for the slots that do not count, and what must not notice it.

`poison(value)(tensor, mask)` is a copy of `tensor` with junk wherever `mask` is False. Every door promises the same
bits for it as for the clean tensor: of the loss, of the metrics, and of every gradient, which is 0 at those slots.
"""

import torch

VALUES = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf"), "1e38": 1e38}
JUNK_IDS = (-100, 10**6, -7, 0)  # what a target, a token id or a group may hold where nothing counts


def poison(value):
    def poisoned(tensor, mask):
        if tensor is None:
            return None
        out = tensor.detach().clone()
        unused = ~mask.to(torch.bool)
        if out.is_floating_point():
            out[unused] = value
        else:
            junk = torch.tensor(JUNK_IDS).to(out.dtype)
            out[unused] = junk[torch.arange(int(unused.sum())) % len(junk)]
        return out.requires_grad_(tensor.requires_grad)

    return poisoned


def bits(tensor):
    """The tensor with NaN made comparable: the same bits, whatever they say."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def assert_unmoved(clean, poisoned, masks=None):
    """Both are dicts of tensors by name: the same bits, all of them finite; with `masks`, zeros outside them."""
    assert clean.keys() == poisoned.keys()
    for name, value in clean.items():
        assert value.isfinite().all(), f"{name}: the clean run is not finite, so this proves nothing"
        assert torch.equal(bits(value), bits(poisoned[name])), f"{name} noticed what stands in unused slots"
    for name, mask in (masks or {}).items():
        assert (poisoned[name][~mask] == 0).all(), f"{name}: gradient at slots that do not count"
