"""What needs a GPU, run as far as it goes without one: vLLM's own engine core, executor and worker around a stub."""

from types import SimpleNamespace

import pytest
import torch

from flowrl_kernels.trainer.parallel import ALONE
from flowrl_kernels.trainer.rollout import vllm_head
from flowrl_kernels.trainer.rollout.vllm import VLLMEngine


class Memory:
    """A sleep-mode backend whose level 2 forgets everything, as vLLM's allocator on a GPU does."""

    def __init__(self, model):
        self.model, self.awake = model, {"weights", "kv_cache"}

    def suspend(self, level):
        assert level == 2
        self.awake = set()
        for buffer in self.model.buffers():
            buffer.zero_()

    def resume(self, tags):
        self.awake |= set(tags)


@pytest.fixture
def sleeper(monkeypatch):
    """(our engine, what it did) on vLLM's real sleep and wake_up of core, executor and worker."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1, 2))
    did, model = [], torch.nn.Module()
    model.register_buffer("rotary", torch.arange(5.0), persistent=False)  # no push brings it back
    memory = Memory(model)
    worker = object.__new__(Worker)
    worker.model_runner = SimpleNamespace(model=model)
    worker.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_nccl_comm_suspend=False))
    worker.model_config = SimpleNamespace(sleep_preserve_parameter_names=[])
    worker._sleep_mode_backend, worker._sleep_saved_parameters = memory, {}
    worker._sleep_saved_buffers, worker._sleep_saved_draft_buffers = {}, {}
    worker.get_draft_model = worker.synchronize_device = lambda: None

    class Alone(Executor):
        def collective_rpc(self, method, timeout=None, args=(), kwargs=None, **more):
            return [getattr(worker, method)(*args, **(kwargs or {}))]

    Alone.__abstractmethods__ = frozenset()
    executor = object.__new__(Alone)
    executor.sleeping_tags = set()
    core = SimpleNamespace(
        model_executor=executor,
        pause_scheduler=lambda mode, clear_cache: did.append("pause"),
        resume_scheduler=lambda: did.append("resume"),
    )
    engine = object.__new__(VLLMEngine)
    engine.cuda, engine.asleep, engine.group, engine.world = True, False, 1, ALONE

    def load(name, kwargs):
        did.append((name, sorted(memory.awake), model.rotary.tolist()))

    engine.llm = SimpleNamespace(
        sleep=lambda level: EngineCore.sleep(core, level),
        wake_up=lambda tags: EngineCore.wake_up(core, tags),
        collective_rpc=load,
        reset_prefix_cache=lambda: did.append("reset") or True,
        llm_engine=SimpleNamespace(set_weight_version=lambda label: None),
    )
    return engine, did, executor, memory


def test_weights_are_loaded_into_an_engine_that_sleeps_and_it_is_wholly_awake_after_them(sleeper):
    engine, did, executor, memory = sleeper
    for version in (1, 2):
        did.clear()
        engine.release()
        assert executor.is_sleeping
        assert memory.awake == set()
        engine.update_weights([], version)
        load = ("reload_weights", ["weights"], [0.0, 1.0, 2.0, 3.0, 4.0])  # what no push brings is back by then
        assert did == ["pause", load, "resume", "reset"]
        assert not executor.is_sleeping
        assert memory.awake == {"weights", "kv_cache"}


def test_the_head_is_hooked_into_what_vllms_runner_and_sampler_have():
    import inspect

    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    run = inspect.getsource(GPUModelRunner.execute_model)
    assert "self.model.compute_logits(sample_hidden_states)" in run
    assert "self.sampler(" in inspect.getsource(GPUModelRunner._sample)
    assert list(inspect.signature(Sampler.forward).parameters)[1:3] == ["logits", "sampling_metadata"]
    assert "processed_logprobs" in inspect.getsource(TopKTopPSampler.forward_native)
    plain = dict.fromkeys(SamplingMetadata.__dataclass_fields__)
    plain |= {"no_penalties": True, "bad_words_token_ids": {}, "logitsprocs": LogitsProcessors()}
    assert not vllm_head.changes(SamplingMetadata(**plain))
    bias = SimpleNamespace(is_argmax_invariant=lambda: False, biases={0: {5: 1.0}})
    for change in (
        {"no_penalties": False}, {"bad_words_token_ids": {0: [[3]]}}, {"allowed_token_ids_mask": torch.ones(1, 4)},
        {"logitsprocs": LogitsProcessors([bias])},
    ):  # fmt: skip
        assert vllm_head.changes(SamplingMetadata(**plain | change)), change
