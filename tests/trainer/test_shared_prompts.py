"""A prompt laid out once for several responses: the same numbers as each response behind a prompt of its own."""

import numpy as np
import pytest
import tiny
import torch
from test_policy import unpacked

from flowrl_kernels.hf.packing import Probe, shares_prompts
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.batches import pack
from flowrl_kernels.trainer.objective import log_z, score_head
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.tasks import char_tokenizer


def groups(count=3, samples=4, seed=0):
    """Prompts and responses of `count` groups, one response of a single token among them."""
    rng = np.random.default_rng(seed)
    asked = [rng.integers(2, 14, rng.integers(3, 8)) for _ in range(count)]
    prompts = [prompt for prompt in asked for _ in range(samples)]
    responses = [np.append(rng.integers(2, 14, rng.integers(0, 9)), 1) for _ in prompts]
    responses[1] = np.array([1])
    return prompts, responses


def pack_shared(prompts, responses, max_tokens, row_tokens=0):
    every = list(range(len(prompts)))
    return pack(every, prompts, responses, max_tokens=max_tokens, row_tokens=row_tokens, device="cpu", share=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("max_tokens", "row_tokens"), [(400, 0), (60, 30), (18, 18)])
def test_behind_a_shared_prompt_log_probs_and_gradients_are_those_of_each_alone(attention, max_tokens, row_tokens):
    cfg = tiny.config(rollout={"temperature": 0.7}, model={"tied": True})
    model = policies.build_model(cfg, char_tokenizer(tiny.ALPHABET), attention).eval()
    prompts, responses = groups()
    batches = pack_shared(prompts, responses, max_tokens, row_tokens)
    assert (len(batches) == 1) == (max_tokens == 400)
    weight = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    alone = unpacked(model, prompts, responses, 0.7)
    sum(w * logp.sum() for w, logp in zip(weight, alone)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    policy, seen = Policy(model), []
    for batch in batches:
        out = policy(score_head(cfg, batch), batch.ids, batch.positions, branch=batch.branch)
        for b, which in enumerate(batch.which.tolist()):
            got = out.logp[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
            torch.testing.assert_close(got.double(), alone[which].detach(), rtol=0, atol=2e-6)
            seen.append(which)
        (weight[batch.which][batch.segment()] * out.logp).sum().backward()
    assert sorted(seen) == list(range(12))
    for name, p in model.named_parameters():
        error = (p.grad - want[name]).norm() / want[name].norm().clamp(min=1e-3)
        assert error < 2e-5, f"{name}: {error}"


def test_log_z_of_a_shared_prompt_is_that_of_the_prompt():
    cfg = tiny.config()
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg), log_z=True)
    torch.nn.init.normal_(policy.log_z.out.weight)  # it starts at 0
    prompts, responses = groups()
    found = {}
    for share in (False, True):
        every = list(range(12))
        (batch,) = pack(every, prompts, responses, max_tokens=400, row_tokens=0, device="cpu", share=share)
        value = policy(lambda p, h, b=batch: log_z(p, h, b), batch.ids, batch.positions, branch=batch.branch)
        found[share] = value[batch.which.argsort()]
    assert found[True].unique().numel() >= 3
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=2e-6)


def test_a_prompt_is_laid_out_once_for_as_many_responses_as_a_row_holds():
    prompts = [np.arange(2, 12)] * 8
    responses = [np.arange(2, 6)] * 8  # three slots each behind ten of the prompt
    (batch,) = pack_shared(prompts, responses, 400)
    assert batch.ids.shape == (1, 10 + 8 * 3)
    (batch,) = pack_shared(prompts, responses, 400, row_tokens=19)
    assert batch.ids.shape == (3, 19)  # three, three and two
    assert batch.branch.amax(-1).tolist() == [3, 3, 2]
    batches = pack_shared(prompts, responses, 38, row_tokens=19)
    assert [len(b.ids) for b in batches] == [2, 1]


def test_a_model_that_lets_branches_see_each_other_does_not_share_prompts():
    cfg = tiny.config()
    policy = Policy(tiny.model(cfg).eval())

    @torch.no_grad()
    def forward(ids, positions, mask, leak=0.0):
        out = policy(lambda actor, hidden: hidden, ids, positions, mask)
        return out + leak * out.roll(1, 1)

    assert shares_prompts(forward, policy.model.config)
    assert not shares_prompts(lambda i, p, m: forward(i, p, m, 1e-3), policy.model.config)
    # without the mask: one sequence after the other
    assert not shares_prompts(lambda i, p, m: forward(i, p, None), policy.model.config)
    assert Probe(forward, 14, 64).shared_error() < 1e-6


def test_a_model_that_cannot_share_prompts_is_refused_by_name(monkeypatch):
    cfg = tiny.config(parallel={"share_prompts": True})
    model = tiny.model(cfg)
    assert policies.make_policy(cfg, tiny.ALONE, model).shares
    monkeypatch.setattr(policies, "shares_prompts", lambda *args, **kwargs: False)
    with pytest.raises(ValueError, match=r"parallel\.share_prompts: wanted false: Qwen2ForCausalLM with sdpa"):
        policies.make_policy(cfg, tiny.ALONE, model)
