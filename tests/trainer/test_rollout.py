"""Decoding: left padding, caches, stopping, and random numbers that do not depend on who draws them."""

import math

import pytest
import tiny
import torch

from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.base import Kept, draw, kept_tokens, uniform
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
    token, logp, kept = draw(logits.expand(4000, -1), Sampling(1, 2.0), u)
    assert kept is None
    share = torch.bincount(token, minlength=5) / 4000
    want = (logits / 2.0).softmax(-1)
    assert (share - want).abs().max() < 1e-3
    torch.testing.assert_close(logp, want.log()[token])
    edge = draw(logits[None], Sampling(1), torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert int(edge.token) in (3, 4)  # the last token that has any probability, or rounding past it


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


def left_by_the_definition(logits, temperature, top_k, top_p, min_p):
    """The kept ids token by token: vLLM's sampler with the mass below a token added up from the least likely one."""
    p = [math.exp(z / temperature) for z in logits]
    left = [i for i in range(len(p)) if p[i] >= min_p * max(p)]
    if top_k:
        least = sorted((p[i] for i in left), reverse=True)[:top_k][-1]
        left = [i for i in left if p[i] >= least]
    total, below, out = sum(p[i] for i in left), 0.0, []
    for i in sorted(left, key=lambda i: (p[i], -i)):
        below += p[i] / total
        if below > 1 - top_p + 1e-12:
            out.append(i)
    return sorted(out)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (4, 0.7, 0.0), (5, 0.9, 0.1), (1, 0.5, 0.0)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_truncation_keeps_what_its_definition_keeps(top_k, top_p, min_p, temperature):
    logits = torch.randn(40, 11, generator=torch.Generator().manual_seed(7)) * 2
    logits[::3, 4] = logits[::3, 9]  # equals
    sampling = Sampling(1, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    keep = kept_tokens(logits / temperature, sampling)
    for row, mine in zip(logits.tolist(), keep):
        assert mine.nonzero()[:, 0].tolist() == left_by_the_definition(row, temperature, top_k, top_p, min_p)


def test_a_truncated_draw_follows_the_kept_tokens_alone():
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5, -9.0])
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    token, logp, keep = draw(logits.expand(4000, -1), Sampling(1, 2.0, top_k=3), u)
    want = torch.tensor([2.0, 1.0, -math.inf, 0.5, -math.inf]).div(2.0).softmax(-1)
    assert keep[0].tolist() == [True, True, False, True, False]
    assert (torch.bincount(token, minlength=5) / 4000 - want).abs().max() < 1e-3
    torch.testing.assert_close(logp, want.log()[token])


@pytest.mark.parametrize("batch", [64, 4])
def test_each_sampled_token_comes_with_what_it_was_drawn_from(policy, batch):
    sampling = Sampling(10, 1.4, STOP, top_p=0.7, top_k=6)
    out = engine(policy, batch).generate(PROMPTS, 3, sampling, seed=4)
    assert len(out.kept.offsets) == int(out.length.sum()) + 1
    assert len(set(out.length.tolist())) > 2  # rows shed on the way
    row, sizes = 0, set()
    for b in range(12):
        prompt, tokens = PROMPTS[b // 3], out.tokens[b, : out.length[b]].tolist()
        with torch.no_grad():
            z = policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / 1.4
        for t, token in enumerate(tokens):
            ids = out.kept.ids[out.kept.offsets[row] : out.kept.offsets[row + 1]].tolist()
            assert ids == left_by_the_definition(z[t].tolist(), 1.0, 6, 0.7, 0.0)
            want = z[t, ids].log_softmax(-1)[ids.index(token)]
            torch.testing.assert_close(out.logp[b, t], want, rtol=0, atol=3e-6)
            row, sizes = row + 1, sizes | {len(ids)}
    assert len(sizes) > 2


def test_kept_rows_are_picked_in_the_order_asked_for():
    kept = Kept(torch.tensor([5, 1, 2, 9, 3, 4]), torch.tensor([0, 1, 3, 3, 6]))
    picked = kept.rows(torch.tensor([3, 1, 2, 3]))
    assert picked.ids.tolist() == [9, 3, 4, 1, 2, 9, 3, 4]
    assert picked.offsets.tolist() == [0, 3, 5, 5, 8]


@pytest.mark.parametrize(
    ("field", "value"), [("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("min_p", -0.1), ("min_p", 2.0)]
)
def test_truncations_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: wanted"):
        Sampling(4, **{field: value})


def test_the_first_number_of_seed_0_is_no_corner_and_the_numbers_are_splitmix64s():
    """Of key 0 the first outputs of splitmix64, as its author's page has them: 0xE220A8397B1DCDAF, ..."""
    first = uniform(0, torch.arange(3), 0)
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [round(float(u) * 2**53) for u in first] == [w >> 11 for w in wanted]
