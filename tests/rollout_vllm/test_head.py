"""The trainer's head in vLLM's sampler: the same bits for the same hidden states, and what it costs to be wrong."""

import pytest
import torch
from test_in_process import PROMPTS, model, settings

from flowrl_kernels import linear_logprob
from flowrl_kernels.trainer.parallel import ALONE
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.vllm import VLLMEngine


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def engine(request):
    torch.set_num_threads(2)
    started = VLLMEngine(settings("--rollout.head", "trainer"), model(tied=request.param), ALONE)
    started.weights = model(seed=3, tied=request.param)
    started.update_weights(started.weights.state_dict().items(), 1)
    yield started
    started.close()


@pytest.fixture
def seen(engine, monkeypatch):
    """Hidden states, tokens and log-probs of each call of the hooked head, and the arguments that it made of them."""
    calls, head = [], engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.flowrl_head
    logp = head.logp

    def look(hidden, tokens, temperature, processed):
        calls.append(
            (
                hidden.clone(),
                tokens.clone(),
                temperature,
                processed.clone(),
                logp(hidden, tokens, temperature, processed),
            )
        )
        return calls[-1][-1]

    monkeypatch.setattr(head, "logp", look)
    return calls


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_equal_hidden_states_the_sampler_and_the_trainer_agree_to_the_bit(engine, seen, temperature):
    out = engine.generate(PROMPTS, 3, Sampling(10, temperature, (1,)), seed=4)
    hidden, tokens, said = (torch.cat([call[i] for call in seen]) for i in (0, 1, 4))
    weight = engine.weights.get_output_embeddings().weight
    with torch.no_grad():  # all rows in one call, as the trainer scores them
        scored = linear_logprob(hidden, weight, tokens, temperature=temperature).logp
    assert len(scored) > 50
    assert torch.equal(scored, said)
    left = sorted(said.tolist())
    for row, n in zip(out.logp, out.length.tolist()):
        for value in row[:n].tolist():  # what came back is what the head said, each of it once
            left.remove(value)
    vllm = torch.cat([call[3].gather(-1, call[1][:, None])[:, 0] for call in seen])
    torch.testing.assert_close(said, vllm, rtol=0, atol=2e-5)


def test_truncated_draws_are_weighed_over_what_was_kept(engine, seen):
    out = engine.generate(PROMPTS, 3, Sampling(6, 0.8, (), top_p=0.7, top_k=9, min_p=0.02), seed=4)
    hidden, tokens, _, processed, said = (torch.cat([call[i] for call in seen]) if i != 2 else None for i in range(5))
    kept = processed > -torch.inf
    assert kept.sum(-1).max() <= 9
    weight = engine.weights.get_output_embeddings().weight.double()
    z = (hidden.double() @ weight.T / 0.8).masked_fill(~kept, -torch.inf)
    torch.testing.assert_close(said.double(), z.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    assert sorted(out.logp.flatten().tolist()) == sorted(said.tolist())


def test_what_would_change_the_meaning_of_a_log_prob_is_refused_and_greedy_is_left_alone(engine):
    from vllm import SamplingParams

    greedy = engine.generate(PROMPTS, 1, Sampling(4, 0.0, (1,)), seed=0)
    assert greedy.logp.eq(0).all()
    ask = [{"prompt_token_ids": PROMPTS[0]}]
    mixed = [SamplingParams(temperature=t, max_tokens=3, logprobs=0, seed=1, detokenize=False) for t in (0.0, 1.0, 0.5)]
    outs = engine.llm.generate(ask * 3, mixed, use_tqdm=False)
    with torch.no_grad():
        for out, t in zip(outs, (1.0, 1.0, 0.5)):
            tokens = list(out.outputs[0].token_ids)
            z = engine.weights(input_ids=torch.tensor([PROMPTS[0] + tokens])).logits[0, len(PROMPTS[0]) - 1 : -1] / t
            want = z.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            got = torch.tensor([at[token].logprob for at, token in zip(out.outputs[0].logprobs, tokens)])
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
