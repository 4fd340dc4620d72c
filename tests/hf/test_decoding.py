"""Decoding without copies: the same numbers as transformers' own cache and attention give."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from flowrl_kernels.hf import decoding
from flowrl_kernels.hf.decoding import RoomyLayer, roomy_cache


def model(key_heads=2, **settings):
    shape = LlamaConfig(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
                        num_key_value_heads=key_heads, initializer_range=0.3, **settings)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").eval()


@torch.no_grad()
def steps(llama, cache, ragged):
    """Logits of a prompt and of six tokens after it; the rows are repeated once and some are dropped on the way."""
    ids = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 5, dtype=torch.int64)
    if ragged:
        mask[0, :3] = mask[2, :1] = 0
    positions, out = (mask.cumsum(-1) - 1).clamp(min=0), []
    for t in range(7):
        z = llama(ids, position_ids=positions, attention_mask=mask if ragged else None, past_key_values=cache).logits
        out.append(z[:, -1])
        keep = torch.arange(len(ids))
        if t == 0:
            cache.batch_repeat_interleave(2)
            keep = keep.repeat_interleave(2)
        if t == 3:
            keep = torch.tensor([0, 2, 5])
            cache.batch_select_indices(keep)
        ids, mask, positions = z[keep, -1:].argmax(-1), mask[keep], positions[keep, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return out


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_decoding_without_copies_gives_what_transformers_gives(key_heads, ragged, monkeypatch):
    llama = model(key_heads)
    monkeypatch.setattr(decoding, "ROOM", 2)  # it has to grow on the way
    want = steps(llama, DynamicCache(config=llama.config), ragged)
    seen = []
    if key_heads < 6:
        attend = torch.nn.functional.scaled_dot_product_attention

        def counted(query, *args, **kwargs):
            seen.append(query.shape[2])
            return attend(query, *args, **kwargs)

        monkeypatch.setattr(decoding.F, "scaled_dot_product_attention", counted)
    with decoding.decoding(llama):
        got = steps(llama, roomy_cache(llama.config), ragged)
    assert llama.config._attn_implementation == "sdpa"
    assert seen.count(6 // key_heads) == (12 if key_heads < 6 else 0)  # two layers, six tokens after the prompt
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        assert a.std() > 0.1


def test_a_token_is_written_into_the_room_that_is_kept():
    layer, plain = RoomyLayer(), DynamicLayer()
    places = set()
    for t in range(1, 40):
        keys, values = torch.randn(2, 3, 1 if t > 1 else 9, 4), torch.randn(2, 3, 1 if t > 1 else 9, 4)
        got, want = layer.update(keys, values), plain.update(keys, values)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        places.add(got[0].data_ptr())
    assert len(places) == 1
    assert layer.get_seq_length() == plain.get_seq_length() == 9 + 38


def test_layers_with_a_window_keep_their_own_cache():
    from transformers import MistralConfig

    cache = roomy_cache(MistralConfig(num_hidden_layers=2, sliding_window=4))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer"] * 2
    assert [type(layer) for layer in roomy_cache(model().config).layers] == [RoomyLayer] * 2


def test_other_attention_is_left_alone_and_an_error_restores_it():
    llama = model()
    llama.set_attn_implementation("eager")
    with decoding.decoding(llama):
        assert llama.config._attn_implementation == "eager"
    llama.set_attn_implementation("sdpa")
    with pytest.raises(KeyError), decoding.decoding(llama):
        raise KeyError
    assert llama.config._attn_implementation == "sdpa"
