"""vLLM in this process takes the trainer's weights, says its log-probabilities, and leaves the process as it was."""

import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import ALONE
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.faults import EngineError
from flowrl_kernels.trainer.rollout.hf import HFEngine
from flowrl_kernels.trainer.rollout.vllm import VLLMEngine

PROMPTS = [[3, 4, 13], [5], [2, 9, 9, 12, 13], [7, 13]]
THREADS = 2


def settings(*args):
    small = ["--rollout.kv_cache", "0.0625", "--rollout.engine", "vllm", "--run.threads", str(THREADS), *args]
    return config_file.override(Config(), small)


def model(seed=0, *, tied, heads=2):
    """Two layers of the kind of SmolLM2 (tied) or of a built model."""
    if not tied:
        cfg = tiny.config(model={"hidden": 64, "heads": heads}, run={"seed": seed})
        return tiny.model(cfg).eval()
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(shape).eval()


def train_once(weights):
    """Loss and gradients of a model after one step, every bit of them."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(301, 700), torch.nn.GELU(), torch.nn.Linear(700, 1))
    net.load_state_dict(weights)
    loss = net(torch.randn(513, 301)).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), torch.rand(5)]


@pytest.fixture(scope="module")
def before():
    """What training gave, and what the process was, before any engine had started."""
    torch.set_num_threads(THREADS)
    net = torch.nn.Sequential(torch.nn.Linear(301, 700), torch.nn.GELU(), torch.nn.Linear(700, 1)).state_dict()
    bits = train_once(net)
    torch.manual_seed(11), np.random.seed(11), random.seed(11)
    setter = torch.set_num_threads
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    return SimpleNamespace(net=net, bits=bits, setter=setter, states=states)


@pytest.fixture(scope="module")
def engine(before):
    started = VLLMEngine(settings(), model(tied=False), ALONE)
    before.after = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    started.update_weights(model(tied=False).state_dict().items(), 0)
    yield started
    started.close()


def gap(engine, module, sampling=None, seed=4):
    """Largest difference between the engine's log-probabilities and the module's own in float64."""
    sampling = sampling or Sampling(10, 0.7, (1,))
    out = engine.generate(PROMPTS, 3, sampling, seed=seed)
    exact, worst = module.double(), 0.0
    for b in range(len(out.tokens)):
        prompt, tokens = PROMPTS[b // 3], out.tokens[b, : out.length[b]].tolist()
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([prompt + tokens])).logits[0] / sampling.temperature
        want = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((out.logp[b, : len(tokens)].double() - want).abs().max()))
    module.float()
    return worst


def test_threads_random_numbers_and_bits_of_the_trainer_are_what_they_were(before, engine):
    assert torch.get_num_threads() == THREADS
    assert torch.set_num_threads is before.setter
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(THREADS)
    assert torch.equal(before.states[0], before.after[0])
    assert np.array_equal(before.states[1], before.after[1])
    assert before.states[2] == before.after[2]
    assert all(torch.equal(a, b) for a, b in zip(before.bits, train_once(before.net)))
    engine.generate(PROMPTS, 2, Sampling(4), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before.bits, train_once(before.net)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_models_at_the_temperature_after_every_push(engine, temperature):
    for version in (1, 2, 3):
        pushed = model(seed=version, tied=False)
        engine.update_weights(pushed.state_dict().items(), version)
        assert gap(engine, pushed, Sampling(10, temperature, (1,))) < 2e-5
        assert gap(engine, model(seed=9, tied=False)) > 0.1  # other weights would be seen
        assert engine.generate(PROMPTS, 1, Sampling(3), seed=0).version == version


def test_one_tensor_alone_is_pushed_too(engine):
    whole = model(seed=5, tied=False)
    engine.update_weights(whole.state_dict().items(), 1)
    with torch.no_grad():
        whole.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert gap(engine, whole) > 1e-3
    engine.update_weights(whole.state_dict().items(), 2)
    assert gap(engine, whole) < 2e-5


def test_a_response_ends_with_its_first_end_token_or_with_the_budget(engine):
    engine.update_weights(model(tied=False).state_dict().items(), 1)
    out = engine.generate(PROMPTS, 16, Sampling(12, 1.5, (1,)), seed=0)
    assert 0 < int(out.finished.sum()) < len(out.finished)
    for row, logp, n, done in zip(*out[:2], out.length.tolist(), out.finished.tolist()):
        assert row[n:].eq(0).all()
        assert logp[n:].eq(0).all()
        assert row[: n - 1].ne(1).all()
        assert bool(row[n - 1] == 1) == done
        assert done or n == 12
    long = engine.generate(PROMPTS, 4, Sampling(12, 1.5), seed=0)  # no end token: none that vLLM knows of either
    assert long.length.eq(12).all()
    assert long.tokens.eq(1).any()


def test_the_same_responses_come_out_however_prompts_are_shared(engine):
    engine.update_weights(model(tied=False).state_dict().items(), 1)
    sampling = Sampling(10, 1.0, (1,))
    whole = engine.generate(PROMPTS, 4, sampling, seed=9)
    assert torch.equal(whole.tokens, engine.generate(PROMPTS, 4, sampling, seed=9).tokens)
    assert not torch.equal(whole.tokens, engine.generate(PROMPTS, 4, sampling, seed=8).tokens)
    for mine in ([0, 2], [1, 3]):
        part = engine.generate([PROMPTS[i] for i in mine], 4, sampling, seed=9, numbers=mine)
        rows = torch.tensor([4 * i + j for i in mine for j in range(4)])
        assert torch.equal(part.length, whole.length[rows])
        assert torch.equal(part.tokens, whole.tokens[rows, : part.tokens.shape[1]])
    assert len({tuple(row) for row in whole.tokens.tolist()}) > 12  # each response has numbers of its own


def test_tokens_are_drawn_from_the_models_distribution(engine):
    pushed = model(seed=2, tied=False)
    engine.update_weights(pushed.state_dict().items(), 1)
    out = engine.generate([PROMPTS[0]], 2000, Sampling(1, 1.3), seed=1)
    with torch.no_grad():
        want = (pushed(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.3).softmax(-1)
    share = torch.bincount(out.tokens[:, 0], minlength=14) / 2000
    assert ((share - want) / (want * (1 - want) / 2000).sqrt().clamp(min=1e-3)).abs().max() < 5  # standard errors


def test_greedy_tokens_are_the_live_models(engine):
    pushed = model(seed=1, tied=False)
    engine.update_weights(pushed.state_dict().items(), 1)
    out = engine.generate(PROMPTS, 1, Sampling(8, 0.0, (1,)), seed=0)
    live = HFEngine(Policy(pushed), batch=8, device=torch.device("cpu")).generate(PROMPTS, 1, Sampling(8, 0.0, (1,)), 0)
    assert torch.equal(out.tokens, live.tokens)
    assert out.logp.eq(0).all()


def test_a_prefix_cached_under_old_weights_is_not_used_again(engine):
    long = [[2 + i % 12 for i in range(48)]]  # three blocks of 16 tokens
    old, new = model(seed=1, tied=False), model(seed=2, tied=False)
    engine.update_weights(old.state_dict().items(), 1)
    engine.generate(long, 2, Sampling(2), seed=0)
    engine.update_weights(new.state_dict().items(), 2)
    out = engine.generate(long, 2, Sampling(2), seed=0)
    with torch.no_grad():
        want = new(input_ids=torch.tensor(long)).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(out.logp[:, 0], want[out.tokens[:, 0]], rtol=0, atol=2e-5)


def test_a_tied_head_is_packed_again_under_whichever_names_the_weights_come(engine, before):
    engine.close()
    tied = VLLMEngine(settings(), model(tied=True), ALONE)
    for version, leave_out in ((1, ()), (2, ("lm_head.weight",)), (3, ("lm_head.weight",))):
        pushed = model(seed=version, tied=True)
        names = [(name, tensor) for name, tensor in pushed.state_dict().items() if name not in leave_out]
        tied.update_weights(names, version)
        assert gap(tied, pushed) < 2e-5
    tied.close()


def test_a_model_that_vllm_does_not_take_is_named():
    narrow = VLLMEngine(settings(), model(tied=False, heads=4), ALONE)
    with pytest.raises(EngineError, match=r"rollout\.engine: vLLM does not generate: .*head_dim=16"):
        narrow.generate(PROMPTS, 1, Sampling(4), seed=0)


# what needs a GPU, held against vLLM's own classes: nothing of it ran here


def test_sleep_wake_and_external_launcher_are_as_they_are_called():
    import vllm
    from vllm.config.parallel import DistributedExecutorBackend
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor

    assert "level" in inspect.signature(vllm.LLM.sleep).parameters
    assert "tags" in inspect.signature(vllm.LLM.wake_up).parameters
    assert "external_launcher" in DistributedExecutorBackend.__args__
    known = set(inspect.signature(EngineArgs).parameters)
    assert {"enable_sleep_mode", "kv_cache_memory_bytes", "logprobs_mode", "max_num_seqs", "load_format"} <= known
    source = inspect.getsource(Executor.wake_up)
    assert "tags" in source


def test_a_sleeping_engine_wakes_for_the_weights_first_and_for_the_cache_after_them():
    calls = []
    engine = object.__new__(VLLMEngine)
    engine.cuda, engine.asleep, engine.group, engine.world = True, False, 1, ALONE
    engine.llm = SimpleNamespace(
        sleep=lambda level: calls.append(("sleep", level)),
        wake_up=lambda tags: calls.append(("wake", *tags)),
        collective_rpc=lambda name, kwargs: calls.append((name, *kwargs)),
        reset_prefix_cache=lambda: calls.append(("reset",)) or True,
        llm_engine=SimpleNamespace(set_weight_version=lambda label: calls.append(("version", label))),
    )
    engine.release()
    engine.update_weights([], 5)
    engine.update_weights([], 6)
    load = [("reload_weights", "weights_iterator")]
    assert calls == [
        ("sleep", 2), ("wake", "weights"), *load, ("wake", "kv_cache"), ("reset",), ("version", "5"),
        *load, ("reset",), ("version", "6"),
    ]  # fmt: skip
