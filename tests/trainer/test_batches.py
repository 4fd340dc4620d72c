"""Packing: every sequence once, whole, within the budget, and the same number of micro-batches everywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl_kernels.trainer.batches import build, pack, plan


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 160), st.sampled_from([0, 40]))
def test_a_plan_holds_every_sequence_once_within_the_budgets(lengths, max_tokens, row_tokens):
    micro = plan(lengths, max_tokens=max_tokens, row_tokens=row_tokens)
    assert sorted(i for rows in micro for row in rows for i in row) == list(range(len(lengths)))
    for rows in micro:
        widths = [sum(lengths[i] for i in row) for row in rows]
        assert max(widths) <= (row_tokens or max_tokens)
        assert len(rows) * max(widths) <= max_tokens


def test_equal_lengths_leave_no_gaps():
    micro = plan([8] * 64, max_tokens=256, row_tokens=64)
    assert [len(rows) for rows in micro] == [4, 4]
    assert all(len(row) == 8 for rows in micro for row in rows)


@pytest.mark.parametrize(("row_tokens", "name"), [(0, "max_tokens"), (16, "row_tokens")])
def test_a_sequence_longer_than_the_budget_names_the_setting(row_tokens, name):
    with pytest.raises(ValueError, match=rf"parallel\.{name}.*33 tokens"):
        plan([33], max_tokens=32, row_tokens=row_tokens)


def sequences(seed, count=7):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 50, rng.integers(1, 6)) for _ in range(count)]
    responses = [rng.integers(2, 50, rng.integers(1, 9)) for _ in range(count)]
    return prompts, responses


def test_each_response_token_is_predicted_by_the_slot_before_it():
    prompts, responses = sequences(0)
    (batch,) = pack(list(range(7)), prompts, responses, max_tokens=400, row_tokens=30, device="cpu")
    flat, positions = batch.ids.flatten(), batch.positions.flatten()
    for b, which in enumerate(batch.which.tolist()):
        lo, hi = batch.cu_seqlens[b], batch.cu_seqlens[b + 1]
        slots, target = batch.predict[lo:hi], batch.target[lo:hi]
        p, r = prompts[which], responses[which]
        assert target.tolist() == r.tolist()
        assert flat[slots].tolist() == [p[-1], *r[:-1]]
        assert positions[slots].tolist() == list(range(len(p) - 1, len(p) + len(r) - 1))
        own = batch.prompt[batch.prompt_cu_seqlens[b] : batch.prompt_cu_seqlens[b + 1]]
        assert flat[own].tolist() == p.tolist()
        assert positions[own].tolist() == list(range(len(p)))


def test_the_segment_of_each_token_is_its_sequence():
    prompts, responses = sequences(1)
    batch = build([[0, 3], [2]], prompts, responses, "cpu")
    assert batch.segment().tolist() == [b for b, i in enumerate([0, 3, 2]) for _ in responses[i]]


def test_sequences_that_are_left_out_are_not_in_any_batch():
    prompts, responses = sequences(2)
    batches = pack([1, 4], prompts, responses, max_tokens=100, row_tokens=0, device="cpu")
    assert sorted(torch.cat([b.which for b in batches]).tolist()) == [1, 4]


def test_a_rank_with_nothing_to_train_on_gets_a_stand_in():
    prompts, responses = sequences(3)
    (batch,) = pack([], prompts, responses, max_tokens=100, row_tokens=0, device="cpu")
    assert not batch.live
    assert batch.sequences == 1
