"""Decoding: left padding, caches, stopping, and random numbers that do not depend on who draws them."""

import pytest
import tiny
import torch

from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.base import draw, uniform
from flowrl_kernels.trainer.rollout.hf import HFEngine

STOP = (1,)


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny.model().eval())


def engine(policy, batch=64):
    return HFEngine(policy, batch=batch, device=torch.device("cpu"))


PROMPTS = [[3, 4, 13], [5], [2, 9, 9, 12, 13], [7, 13]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_are_the_models_at_the_temperature(policy, temperature):
    out = engine(policy).generate(PROMPTS, 3, Sampling(10, temperature, STOP), seed=4)
    for b in range(12):
        prompt, tokens = PROMPTS[b // 3], out.tokens[b, : out.length[b]].tolist()
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0] / temperature
        want = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(out.logp[b, : len(tokens)], want, rtol=0, atol=3e-6)


def test_a_response_ends_with_its_first_end_token_or_with_the_budget(policy):
    out = engine(policy).generate(PROMPTS, 16, Sampling(12, 1.5, STOP), seed=0)
    assert 0 < int(out.finished.sum()) < len(out.finished)
    for row, logp, n, done in zip(*out[:2], out.length.tolist(), out.finished.tolist()):
        assert row[n:].eq(0).all()
        assert logp[n:].eq(0).all()
        assert logp[:n].lt(0).all()
        assert row[: n - 1].ne(1).all()
        assert bool(row[n - 1] == 1) == done
        assert done or n == 12


def test_the_same_responses_come_out_however_prompts_are_shared_and_batched(policy):
    sampling = Sampling(10, 1.0, STOP)
    together = engine(policy).generate(PROMPTS, 4, sampling, seed=9)
    small = engine(policy, batch=4).generate(PROMPTS, 4, sampling, seed=9)
    assert torch.equal(together.tokens, small.tokens)
    for mine in ([0, 2], [1, 3]):
        part = engine(policy).generate([PROMPTS[i] for i in mine], 4, sampling, seed=9, numbers=mine)
        rows = torch.tensor([4 * i + j for i in mine for j in range(4)])
        assert torch.equal(part.length, together.length[rows])
        assert torch.equal(part.tokens, together.tokens[rows, : part.tokens.shape[1]])


def test_another_seed_gives_other_responses(policy):
    sampling = Sampling(10, 1.0, STOP)
    first, second = (engine(policy).generate(PROMPTS, 4, sampling, seed=s).tokens for s in (1, 2))
    width = min(first.shape[1], second.shape[1])
    assert not torch.equal(first[:, :width], second[:, :width])


def test_empty_prompts_are_refused(policy):
    with pytest.raises(ValueError, match="prompts: wanted at least one"):
        engine(policy).generate([[3], []], 1, Sampling(4), seed=0)


def test_uniform_numbers_are_uniform_and_independent_across_steps_rows_and_seeds():
    rows = torch.arange(20_000)
    draws = torch.stack([uniform(seed, rows, step) for seed in (0, 1) for step in (0, 1)])
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert (draws.mean(-1) - 0.5).abs().max() < 0.01
    assert (draws.var(-1) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(torch.cat([draws, draws.roll(1, -1)])) - torch.eye(8)).abs().max() < 0.04


def test_drawn_tokens_follow_their_probabilities_and_never_have_none():
    logits = torch.tensor([2.0, -float("inf"), 0.0, 1.0, -float("inf")])
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    token, logp = draw(logits.expand(4000, -1), 2.0, u)
    share = torch.bincount(token, minlength=5) / 4000
    want = (logits / 2.0).softmax(-1)
    assert (share - want).abs().max() < 1e-3
    torch.testing.assert_close(logp, want.log()[token])
    edge, _ = draw(logits[None], 1.0, torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert int(edge) in (3, 4)  # the last token that has any probability, or rounding past it


def test_temperature_zero_takes_the_most_likely_token_and_what_is_no_temperature_is_refused(policy):
    out = engine(policy).generate(PROMPTS, 2, Sampling(6, 0.0, STOP), seed=3)
    for b in range(8):
        ids = list(PROMPTS[b // 2])
        for token in out.tokens[b, : out.length[b]].tolist():
            with torch.no_grad():
                assert token == int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    assert out.logp.eq(0).all()
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature: wanted a finite number of at least 0"):
            Sampling(6, bad, STOP)
